"""Irregular time series, each with its own times, in one call.

    python benchmarks/bench_times.py [--json FILE] [--runs N] [--series N] [--quick]

1,000 series of 10 to 100 times each, over spans of their own within [0, 40], of an oscillator of Van der Pol, each with its own
stiffness; dopri5 at 1e-6, float64, one thread. Verified against each other and, for some series, against a solve of that series
alone, whose bits the rows must have. Rows:

    compiled, stepper       times [batch, T] under per-sample control
    torchdiffeq, union      what it offers: all rows at all times of any, from which each series picks its own
    torchdiffeq, loop       a call for each series; measured on some of them, times their number

    total ms                median, with least and most; ratio: over the compiled field's
    evaluations a row       of func, on average; alone: what the same solver takes for the series one by one
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from measure import Samples, elapsed, interleave, print_machine, print_table, save
from torch import Tensor

import odenet_cuda

TOLERANCE = 1e-6
CLOSE = 3e-3  # of solves at 1e-6: what an error moves in time is large where the solution is steep
ALONE = 20  # series that are solved one by one
OPTIONS = {"rtol": TOLERANCE, "atol": TOLERANCE, "step_control": "per_sample"}


def oscillator(t: Tensor, y: Tensor, mu: Tensor) -> Tensor:
    x, v = y[:, :1], y[:, 1:]
    return torch.cat([v, mu * (1 - x * x) * v - x], 1)


def irregular(count: int, most: int = 100, least: int = 10) -> Tensor:
    """[count, most] times, NaN where a series has fewer."""
    lengths = torch.randint(least, most + 1, (count, 1))
    starts, spans = 20 * torch.rand(count, 1, dtype=torch.float64), 1 + 19 * torch.rand(count, 1, dtype=torch.float64)
    inside = torch.rand(count, most, dtype=torch.float64).sort(1).values
    t = starts + spans * inside
    return torch.where(torch.arange(most) < lengths, t, torch.nan)


def evaluations(stats: Any) -> Tensor:
    """Of each row: six a step of dopri5, two at the start."""
    return (6 * (stats.num_accepted + stats.num_rejected) + 2).double()


class Series:
    def __init__(self, count: int):
        self.t, self.count = irregular(count), count
        self.y0 = torch.tensor([[2.0, 0.0]], dtype=torch.float64) + 0.1 * torch.randn(count, 2, dtype=torch.float64)
        self.mu = 0.1 + 3 * torch.rand(count, 1, dtype=torch.float64)
        self.field = odenet_cuda.compile(oscillator)

    def ours(self, func: Any, **options: Any) -> Any:
        return odenet_cuda.solve(func, self.y0, self.t, args=(self.mu,), **OPTIONS, **options)

    def alone(self, i: int) -> Any:
        t = self.t[i][~self.t[i].isnan()]
        options = {**OPTIONS, "compile": False}
        return odenet_cuda.solve(oscillator, self.y0[i : i + 1], t, args=(self.mu[i : i + 1],), **options)

    def on_union(self, calls: list[int]) -> Tensor:
        """By torchdiffeq: every series starts at its own first time, so time is counted from there, in a field that is told."""
        import torchdiffeq

        offsets = self.t[:, :1]
        own = (self.t - offsets).nan_to_num(0.0)
        union = own.reshape(-1).unique()

        def func(t: Tensor, y: Tensor) -> Tensor:
            calls[0] += 1
            return oscillator(t + offsets, y, self.mu)

        ys = torchdiffeq.odeint(func, self.y0, union, rtol=TOLERANCE, atol=TOLERANCE)
        found = ys[torch.searchsorted(union, own), torch.arange(self.count)[:, None]]  # [batch, T, 2]
        return torch.where(self.t.isnan()[..., None], torch.nan, found).transpose(0, 1)

    def one_by_one(self, rows: range, calls: list[int]) -> list[Tensor]:
        import torchdiffeq

        found = []
        for i in rows:

            def func(t: Tensor, y: Tensor, mu: Tensor = self.mu[i : i + 1]) -> Tensor:
                calls[0] += 1
                return oscillator(t, y, mu)

            t = self.t[i][~self.t[i].isnan()]
            found.append(torchdiffeq.odeint(func, self.y0[i : i + 1], t, rtol=TOLERANCE, atol=TOLERANCE)[:, 0])
        return found


def verified(series: Series) -> dict[str, float]:
    """Evaluations a row of each way, once all agree."""
    stepper, compiled = series.ours(oscillator, compile=False), series.ours(series.field)
    if series.field.explain() != "compiled":
        raise SystemExit(f"the field was not compiled: {series.field.explain()}")
    some = range(0, series.count, max(1, series.count // ALONE))
    alone = []
    for i in some:
        part = series.alone(i)
        if not torch.equal(stepper.ys[: len(part.ys), i], part.ys[:, 0]):
            raise SystemExit(f"series {i} is not what it is alone")
        alone.append(float(evaluations(part.stats)[0]) / float(evaluations(stepper.stats)[i]))
    calls, looped = [0], [0]
    union = series.on_union(calls)
    for name, ys in (("compiled", compiled.ys), ("torchdiffeq, union", union)):
        apart = (ys - stepper.ys).abs().nan_to_num(0.0).max()
        if not apart <= CLOSE or not torch.equal(ys.isnan(), stepper.ys.isnan()):
            raise SystemExit(f"{name} differs from the stepper by {float(apart):.2g}")
    series.one_by_one(some, looped)
    work = evaluations(stepper.stats)
    share = float(work.mean() / work[list(some)].mean())  # of all series over those solved one by one
    found = {
        "compiled": float(evaluations(compiled.stats).mean()),
        "stepper": float(evaluations(stepper.stats).mean()),
        "torchdiffeq, union": float(calls[0]),
        "torchdiffeq, loop": share * looped[0] / len(some),
    }
    print(f"evaluations of a series alone over those in the batch: {min(alone):.3f} to {max(alone):.3f}")
    return found


def bench(count: int, runs: int) -> list[dict[str, Any]]:
    series = Series(count)
    some = range(0, count, max(1, count // ALONE))
    with torch.no_grad():
        work = verified(series)
        ways: dict[str, Callable[[], Any]] = {
            "compiled": lambda: series.ours(series.field),
            "stepper": lambda: series.ours(oscillator, compile=False),
            "torchdiffeq, union": lambda: series.on_union([0]),
            "torchdiffeq, loop": lambda: series.one_by_one(some, [0]),
        }
        share = {"torchdiffeq, loop": count / len(some)}
        timed = {name: (lambda name=name: {"total": elapsed(ways[name]) * share.get(name, 1.0)}) for name in ways}
        samples: dict[str, Samples] = interleave(timed, runs, warmup=1)
    first = samples["compiled"].median("total")
    return [
        {"way": name, **x.milliseconds(), "ratio": x.median("total") / first, "evaluations a row": work[name]}
        for name, x in samples.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="also write the results there")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--series", type=int, default=1000)
    parser.add_argument("--quick", action="store_true", help="100 series, once")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print_machine()
    count, runs = (100, 1) if arguments.quick else (arguments.series, arguments.runs)
    rows = bench(count, runs)
    print_table(f"{count} series of 10 to 100 times", rows)
    save(arguments.json, {"times": rows})


if __name__ == "__main__":
    main()
