"""Doses of many subjects, each with its own times, in one call.

    python benchmarks/bench_doses.py [--json FILE] [--runs N] [--subjects N] [--quick]

One compartment with absorption of first order, for 500 subjects: each with its own clearance, volume and rate of absorption,
3 to 10 doses of its own amounts and times within a week, and 4 to 20 observations at times of its own; dopri5 at 1e-8,
float64, one thread. Values, and gradients of their sum of squares for the three parameters of each subject and the amounts,
must first be within 1e-8 of the closed form (a sum over doses; Bateman 1910), relative to the largest. Rows:

    compiled, stepper   doses as a `Jump` [batch, J], observations as t [batch, T], under per-sample control
    torchdiffeq, loop   what it offers: a call for each interval between doses of each subject; measured on some of the
                        subjects, times their number

    values, gradients ms    median, with least and most, without a gradient, and with its way back; ratio: over the compiled
                            field's
    error                   the larger of values' and gradients', relative to the largest
"""

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from measure import Samples, elapsed, interleave, print_machine, print_table, save
from torch import Tensor

import odenet_cuda
from odenet_cuda import Jump

D = torch.float64
CLOSE = 1e-8
ALONE = 10  # subjects of the loop
OPTIONS = {"method": "dopri5", "rtol": 1e-8, "atol": 1e-8}  # the fastest of those by which each is as close
PARTS = ("values", "gradients")
WEEK = 168.0  # hours


def kinetics(t: Tensor, y: Tensor, parameters: Tensor) -> Tensor:
    """parameters: logarithms of clearance, volume and rate of absorption, [batch, 3]. y: amounts in gut and blood."""
    clearance, volume, rate = parameters.exp().split(1, 1)
    absorbed = rate * y[:, :1]
    return torch.cat([-absorbed, absorbed - clearance / volume * y[:, 1:]], 1)


def own_times(count: int, least: int, most: int) -> Tensor:
    """[count, most] increasing times within the week, NaN where a subject has fewer."""
    lengths = torch.randint(least, most + 1, (count, 1))
    t = 1.0 + (WEEK - 2.0) * torch.rand(count, most, dtype=D).sort(1).values
    return torch.where(torch.arange(most) < lengths, t, torch.nan)


class Subjects:
    def __init__(self, count: int):
        self.count = count
        typical = torch.tensor([5.0, 50.0, 1.0], dtype=D).log()
        self.parameters = (typical + 0.3 * torch.randn(count, 3, dtype=D)).requires_grad_()
        self.doses = own_times(count, 3, 10)
        self.amounts = (50.0 + 100.0 * torch.rand(count, 10, dtype=D)).requires_grad_()
        observed = own_times(count, 4, 20)
        self.t = torch.cat([torch.zeros(count, 1, dtype=D), observed], 1)
        self.y0 = torch.zeros(count, 2, dtype=D)
        self.field = odenet_cuda.compile(kinetics)

    @property
    def inputs(self) -> list[Tensor]:
        return [self.parameters, self.amounts]

    def closed_form(self) -> Tensor:
        """Concentrations [batch, T]."""
        clearance, volume, rate = self.parameters.exp()[..., None].unbind(1)  # [batch, 1]
        since = (self.t[:, :, None] - self.doses[:, None, :]).nan_to_num(-1.0)  # [batch, T, J]
        out, into = (clearance / volume)[..., None], rate[..., None]
        past = since.clamp(min=0.0)
        shares = into / (into - out) * ((-out * past).exp() - (-into * past).exp())
        return torch.where(since > 0, shares * self.amounts[:, None, :], 0.0).sum(2) / volume

    def ours(self, func: Any, **options: Any) -> Tensor:
        def dose(t: Tensor, y: Tensor, i: Tensor, parameters: Tensor) -> Tensor:
            return y + torch.cat([self.amounts.gather(1, i[:, None]), torch.zeros_like(y[:, :1])], 1)

        options = {"step_control": "per_sample", **OPTIONS, **options}
        jumps = Jump(self.doses, dose)
        ys = odenet_cuda.solve(func, self.y0, self.t, args=(self.parameters,), jumps=jumps, **options).ys
        return ys[..., 1].T / self.parameters[:, 1:2].exp()

    def one_by_one(self, rows: range) -> list[Tensor]:
        """By torchdiffeq: concentrations of each subject at its own times."""
        import torchdiffeq

        found = []
        for row in rows:
            parameters = self.parameters[row : row + 1]
            t, doses = (x[row][~x[row].isnan()] for x in (self.t, self.doses))
            y, now, seen = self.y0[row : row + 1], 0.0, [self.y0[row : row + 1]]
            for stop, amount in zip([*doses.tolist(), math.inf], [*self.amounts[row, : len(doses)], None], strict=True):
                inside = t[(t > now) & (t <= stop)]
                ends = [] if amount is None or stop in inside.tolist() or stop > t[-1] else [stop]
                times = torch.cat([torch.tensor([now], dtype=D), inside, torch.tensor(ends, dtype=D)])
                if len(times) > 1:
                    func = lambda t, y, parameters=parameters: kinetics(t, y, parameters)  # noqa: E731
                    ys = torchdiffeq.odeint(func, y, times, **OPTIONS)
                    seen += [*ys[1 : 1 + len(inside)]]
                    y = ys[-1]
                if amount is None or stop >= t[-1]:
                    break
                now, y = stop, torch.cat([y[:, :1] + amount, y[:, 1:]], 1)
            found.append(torch.cat(seen)[:, 1] / parameters[0, 1].exp())
        return found


def loss(concentrations: Tensor) -> Tensor:
    return concentrations.nan_to_num(0.0).square().sum()


def apart(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).abs() / expected.abs().max()).max())


def verified(subjects: Subjects, some: range) -> dict[str, float]:
    """The error of each way, once all are within CLOSE of the closed form."""
    exact = subjects.closed_form()
    known = ~subjects.t.isnan()
    expected = torch.autograd.grad(loss(torch.where(known, exact, 0.0)), subjects.inputs)
    errors = {}
    for name, func, options in (("compiled", subjects.field, {}), ("stepper", kinetics, {"compile": False})):
        found = subjects.ours(func, **options)
        grads = torch.autograd.grad(loss(found), subjects.inputs)
        if not torch.equal(found.isnan(), ~known):
            raise SystemExit(f"{name} has not the outputs that were asked for")
        pairs = [(found[known], exact[known]), *zip(grads, expected, strict=True)]
        errors[name] = max(apart(x.detach(), y.detach()) for x, y in pairs)
    if subjects.field.explain() != "compiled":
        raise SystemExit(f"the field was not compiled: {subjects.field.explain()}")
    looped = subjects.one_by_one(some)
    grads = torch.autograd.grad(sum(loss(x) for x in looped), subjects.inputs)
    rows = torch.tensor(list(some))
    pairs = [(torch.cat(looped), torch.cat([exact[row][known[row]] for row in some]))]
    pairs += [(x[rows], y[rows]) for x, y in zip(grads, expected, strict=True)]
    errors["torchdiffeq, loop"] = max(apart(x.detach(), y.detach()) for x, y in pairs)
    for name, error in errors.items():
        if not error <= CLOSE:
            raise SystemExit(f"{name} is {error:.2g} away from the closed form, more than {CLOSE}")
    return errors


def timed(call: Callable[[], Any], inputs: list[Tensor], share: float) -> dict[str, float]:
    with torch.no_grad():
        values = elapsed(call)

    def both() -> None:
        found = call()
        torch.autograd.grad(sum(loss(x) for x in found) if isinstance(found, list) else loss(found), inputs)

    return {"values": values * share, "gradients": elapsed(both) * share}


def bench(count: int, runs: int) -> list[dict[str, Any]]:
    subjects = Subjects(count)
    some = range(0, count, max(1, count // ALONE))
    errors = verified(subjects, some)
    ways: dict[str, Callable[[], Any]] = {
        "compiled": lambda: subjects.ours(subjects.field),
        "stepper": lambda: subjects.ours(kinetics, compile=False),
        "torchdiffeq, loop": lambda: subjects.one_by_one(some),
    }
    share = {"torchdiffeq, loop": count / len(some)}
    each = {name: (lambda name=name: timed(ways[name], subjects.inputs, share.get(name, 1.0))) for name in ways}
    samples: dict[str, Samples] = interleave(each, runs, warmup=1)
    first = samples["compiled"]
    return [
        {
            "way": name,
            **{key: value for part in PARTS for key, value in x.beside(first, part).items()},
            "error": errors[name],
        }
        for name, x in samples.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="also write the results there")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--subjects", type=int, default=500)
    parser.add_argument("--quick", action="store_true", help="50 subjects, once")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print_machine()
    count, runs = (50, 1) if arguments.quick else (arguments.subjects, arguments.runs)
    rows = bench(count, runs)
    print_table(f"{count} subjects with doses and observations at times of their own", rows)
    print(f"the loop: {ALONE} of {count} subjects measured, times {count // ALONE}")
    save(arguments.json, {"doses": rows})


if __name__ == "__main__":
    main()
