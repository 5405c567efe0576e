"""Each op beside plain torch, torch.compile of the same formula, and the bandwidth of a copy of the same size, in one run.

    python benchmarks/bench_ops.py [--quick] [--json FILE] [--threads N] [--device cpu|cuda] [--ops stage4 ...]
                                   [--dtypes float32 ...] [--sizes 1K 64M ...] [--compile]

Bandwidth is the bytes an op must read and write, divided by its time. "share" is that over the bandwidth of a copy, the
better of torch's own (memcpy) and one with streaming stores, of a state of the same size by the same threads; "read" is
what torch's sum of one state reaches, which stores nothing. "torch" and "compile" are how many times longer those take.
Every op is compared with the formula in float64 before it is timed.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from measure import Samples, print_machine, print_table, save
from torch import Tensor

from odenet_cuda import formulas, ops
from odenet_cuda.methods import find_method

SIZES = {
    "1K": 1 << 10,
    "2K": 1 << 11,
    "16K": 1 << 14,
    "256K": 1 << 18,
    "4M": 1 << 22,
    "64M": 1 << 26,
    "256M": 1 << 28,
    "1G": 1 << 30,
}
DTYPES = ["float32", "float64", "float16", "bfloat16", "complex64", "complex128"]
DOPRI5 = find_method("dopri5")


@dataclass
class Case:
    """One op on states of one size. passes: states read and written. plain: the formula, of the tensors it is given."""

    run: Callable[[], Any]
    plain: Callable[..., Any]
    arguments: tuple
    result: Callable[[], Tensor]
    expected: Callable[[], Tensor]
    passes: int


def wide(x: Tensor) -> Tensor:
    return x.to(torch.complex128 if x.dtype.is_complex else torch.float64)


def states(count: int, size: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """`count` states of `size` bytes; the same numbers in each, shifted, for random numbers take long to draw."""
    numel = max(1, size // dtype.itemsize)
    base = torch.randn(min(numel, 1 << 16), dtype=torch.float32).to(dtype).to(device)
    return [base.roll(i).repeat(-(-numel // len(base)))[:numel] for i in range(count)]


def stage_case(slopes: int) -> Callable[..., Case]:
    weights = [0.5 / (j + 1) for j in range(slopes)]

    def make(size: int, dtype: torch.dtype, device: str) -> Case:
        y, y0, *k = states(slopes + 2, size, dtype, device)
        dt = torch.full((1,), 0.1, dtype=torch.float64, device=device)
        small = slice(0, 1 << 16)
        return Case(
            run=lambda: ops.stage([y], [y0], k, weights, dt),
            plain=lambda y0, *k: formulas.stage(y0, k, weights, 0.1),
            arguments=(y0, *k),
            result=lambda: y[small],
            expected=lambda: formulas.stage(wide(y0[small]), [wide(x[small]) for x in k], weights, 0.1),
            passes=slopes + 2,
        )

    return make


def error_case(size: int, dtype: torch.dtype, device: str) -> Case:
    """The error of dopri5: six slopes, two states."""
    e = [x for x in DOPRI5.e if x != 0]
    y0, y1, *k = states(len(e) + 2, size, dtype, device)
    dt = torch.full((1,), 0.1, dtype=torch.float64, device=device)
    ratio = torch.zeros(1, dtype=torch.float64, device=device)

    def plain(y0: Tensor, y1: Tensor, *k: Tensor) -> Tensor:
        scaled = formulas.scaled_error(y0, y1, k, e, 0.1, 1e-3, 1e-3)
        return (scaled.abs() if scaled.is_complex() else scaled).square().mean().sqrt()

    def expected() -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=device)
        for begin in range(0, y0.numel(), 1 << 22):
            part = slice(begin, begin + (1 << 22))
            scaled = formulas.scaled_error(wide(y0[part]), wide(y1[part]), [wide(x[part]) for x in k], e, 0.1, 1e-3, 1e-3)
            total += scaled.abs().square().sum()
        return (total / y0.numel()).sqrt()[None]

    return Case(
        run=lambda: ops.error(ratio, [y0], [y1], k, e, dt, [1e-3], [1e-3]),
        plain=plain,
        arguments=(y0, y1, *k),
        result=lambda: ratio,
        expected=expected,
        passes=len(e) + 2,
    )


def dense_output_case(size: int, dtype: torch.dtype, device: str) -> Case:
    """One output in the middle of a step of dopri5."""
    ys, y0, y1, *k = states(DOPRI5.stages + 3, size, dtype, device)
    state = torch.zeros(ops.NUM_FIELDS, 1, dtype=torch.float64)
    for name, value in (("last_time", 0.0), ("last_dt", 0.1), ("time", 0.1), ("output_begin", 0), ("output_end", 1)):
        state[ops.FIELDS[name]] = value
    t, p = torch.tensor([0.05], dtype=torch.float64, device=device), [x for row in DOPRI5.p for x in row]
    state, small = state.to(device), slice(0, 1 << 16)
    return Case(
        run=lambda: ops.dense_output([ys], [y0], [y1], k, p, len(DOPRI5.p[0]), state, t),
        plain=lambda y0, *k: formulas.dense_output(DOPRI5, y0, k, 0.5, 0.1),
        arguments=(y0, *k),
        result=lambda: ys[small],
        expected=lambda: formulas.dense_output(DOPRI5, wide(y0[small]), [wide(x[small]) for x in k], 0.5, 0.1),
        passes=DOPRI5.stages + 2,
    )


def advance_case(size: int, dtype: torch.dtype, device: str) -> Case:
    y0, k0, y1, k1 = states(4, size, dtype, device)
    accept = torch.ones(1, dtype=torch.float64, device=device)
    return Case(
        run=lambda: ops.advance([y0], [k0], [y1], [k1], accept),
        plain=lambda y0, k0, y1, k1: (torch.where(accept != 0, y1, y0), torch.where(accept != 0, k1, k0)),
        arguments=(y0, k0, y1, k1),
        result=lambda: y0,
        expected=lambda: wide(y1),
        passes=4,
    )


CASES: dict[str, Callable[..., Case]] = {
    **{f"stage{n}": stage_case(n) for n in (1, 4, 6, 12)},
    "error": error_case,
    "dense_output": dense_output_case,
    "advance": advance_case,
}

# States that a case holds at once: its own, the copy's target, and what plain torch makes on the way.
ROOM = {"stage1": 8, "stage4": 11, "stage6": 13, "stage12": 19, "error": 24, "dense_output": 16, "advance": 9}


class Timer:
    """Seconds a call takes: `number` calls in a row, by the clock of the device."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"

    def seconds(self, call: Callable[[], Any], number: int) -> float:
        if self.cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(number):
                call()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) * 1e-3 / number
        start = time.perf_counter()
        for _ in range(number):
            call()
        return (time.perf_counter() - start) / number


def measure(calls: dict[str, Callable[[], Any]], device: str, budget: float) -> dict[str, Samples]:
    """Each call in turn, in batches long enough for the clock, until the budget of seconds is spent; at least 5 batches.

    Calls of a millisecond and more go one at a time: repeated, a copy would find part of its source in the last cache,
    which the op beside it, with several times as many bytes, does not.
    """
    timer, numbers, samples = Timer(device), {}, {}
    for name, call in calls.items():
        call()
        once = timer.seconds(call, 1)
        numbers[name] = max(1, min(1000, int(min(budget / 40, 1e-3) / max(once, 1e-7))))
        samples[name] = Samples()
    start, batches = time.perf_counter(), 0
    while batches < 5 or time.perf_counter() - start < budget:
        for name, call in calls.items():
            samples[name].add(s=timer.seconds(call, numbers[name]))
        batches += 1
    return samples


def verify(name: str, case: Case) -> None:
    case.run()
    found, expected = wide(case.result()), case.expected()
    kind = case.arguments[0].dtype
    tolerance = 64 * torch.finfo(kind).eps
    worst = float(((found - expected).abs() / (1 + expected.abs())).max())
    if not worst <= tolerance:
        raise SystemExit(f"{name} of {kind} errs by {worst}, more than {tolerance}")


def bench(name: str, size: int, dtype: torch.dtype, device: str, budget: float, compiled: Any) -> dict[str, Any]:
    case = CASES[name](size, dtype, device)
    verify(name, case)
    source = case.arguments[0]
    target = torch.empty_like(source)
    one = torch.ones(1, dtype=torch.float64, device=device)
    calls = {
        "ours": case.run,
        "memcpy": lambda: target.copy_(source),
        "streamed": lambda: ops.stage([target], [source], [], [], one),
        "read": lambda: torch.sum(source),
        "torch": lambda: case.plain(*case.arguments),
    }
    if compiled is not None:
        calls["compile"] = lambda: compiled(*case.arguments)
    samples = measure(calls, device, budget)
    state = source.numel() * source.element_size()
    ours = samples["ours"].median("s")
    copy = 2 * state / min(samples[way].median("s") for way in ("memcpy", "streamed")) / 1e9
    rate = case.passes * state / ours / 1e9
    row = {"": name, "dtype": str(dtype).removeprefix("torch."), "bytes": state, "us": ours * 1e6, "GB/s": rate}
    read = state / samples["read"].median("s") / 1e9
    row |= {"copy GB/s": copy, "share": rate / copy, "read GB/s": read, "torch": samples["torch"].median("s") / ours}
    if compiled is not None:
        row["compile"] = samples["compile"].median("s") / ours
    row["spread"] = (max(samples["ours"].values["s"]) - min(samples["ours"].values["s"])) / ours
    return row


def bench_step_size(device: str, budget: float) -> list[dict[str, Any]]:
    """The control of 1, 64 and 4,096 rows: a decision, so it has no bandwidth to be compared with."""
    from odenet_cuda.step_control import StepControl, initial_state

    rows = []
    for count in (1, 64, 4096):
        state = torch.from_numpy(initial_state(0.0, count)).to(device)
        state[ops.FIELDS["dt"]], state[ops.FIELDS["step_end"]] = 1e-9, 1e-9
        state[ops.FIELDS["error_ratio"]] = 0.5
        stops = torch.tensor([[1e9], [float(ops.STOPS["end"])]], dtype=torch.float64, device=device)
        t = torch.tensor([0.0, 1e9], dtype=torch.float64, device=device)
        times = torch.empty(DOPRI5.stages, count, device=device)
        constants = StepControl().constants(DOPRI5.order, 1.0)

        def run(state: Tensor = state, times: Tensor = times, stops: Tensor = stops, t: Tensor = t, c: Any = constants) -> None:
            ops.step_size(state, times, stops, t, DOPRI5.c, c)

        run()
        assert bool((state[ops.FIELDS["accept"]] == 1).all()), "a step with error ratio 0.5 must be accepted"
        samples = measure({"ours": run}, device, budget)
        rows.append({"": "step_size", "rows": count, "us": samples["ours"].median("s") * 1e6})
    return rows


def available_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo") as info:
        return next(int(line.split()[1]) * 1024 for line in info if line.startswith("MemAvailable"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few sizes, float32 and bfloat16, short")
    parser.add_argument("--json", help="also write the results there")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--ops", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES))
    parser.add_argument("--compile", action="store_true", help="beside torch.compile too, which takes its time to compile")
    parser.add_argument("--budget", type=float, default=0.5, help="seconds for each case")
    arguments = parser.parse_args()
    device, quick = arguments.device, arguments.quick
    torch.set_num_threads(arguments.threads)
    dtypes = arguments.dtypes or (["float32", "bfloat16"] if quick else DTYPES)
    sizes = arguments.sizes or (["1K", "256K", "64M"] if quick else list(SIZES))
    budget = 0.1 if quick else arguments.budget
    print_machine()
    rows: list[dict[str, Any]] = []
    for name in arguments.ops:
        done = len(rows)
        for dtype in (getattr(torch, kind) for kind in dtypes):
            compiled = None
            if arguments.compile:
                torch.compiler.reset()
                compiled = torch.compile(CASES[name](1 << 12, dtype, device).plain, dynamic=True)
            for size in sizes:
                if ROOM[name] * SIZES[size] > available_bytes(device):
                    rows.append({"": name, "dtype": str(dtype).removeprefix("torch."), "bytes": SIZES[size], "us": "no room"})
                    continue
                rows.append(bench(name, SIZES[size], dtype, device, budget, compiled))
        print_table(f"{name} on {device}, {arguments.threads} threads", rows[done:])
        save(arguments.json, {"ops": rows})
    control = bench_step_size(device, budget)
    print_table("step control", control)
    save(arguments.json, {"ops": rows, "step_size": control})


if __name__ == "__main__":
    main()
