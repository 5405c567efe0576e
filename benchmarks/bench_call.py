"""What a call costs besides its kernels and func, and short solves by every method, beside torchdiffeq and diffrax.

    python benchmarks/bench_call.py [calls] [matrix] [--json FILE] [--runs N] [--quick]

Part calls: an MLP 2-50-2 on a state of 20 x 2 is solved in 2 and in 34 equal steps. A line through both times gives the time
of a step, kernels and func, and that of a call whose steps take none: its *call*. The calls of func that a call makes whatever
its steps are (the first slope, the choice of the first step, what a gradient depends on) are counted and taken off, at the time
that func, and where it records its product, take alone. A call is also given in additions of two 20 x 2 tensors, measured in
the same run, so that figures of two machines can be compared. Each row is verified against torchdiffeq's first.

Part matrix: torchdiffeq's time over ours, for an MLP 4-32-4 and 16 samples: every method for 2, 11 and 101 times, without a
gradient, by the graph of the solve (direct) and by the adjoint, forward and backward. At tolerance 1e-4, where adaptive solves
are shortest. Results and gradients are compared before anything is timed. Beside the methods on a grid stands the limit: the
bare loop, steps written out for this one equation, in the same operations of torch, with no solver around them.

All times are those that the process had on the processor, which a busy machine disturbs least, and the medians of runs in turn.
One thread of torch.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from fields import MLP
from measure import interleave, print_machine, print_table, save
from peers import Case, DiffraxSolver, diffrax_installed
from torch import Tensor, nn

import odenet_cuda

try:
    import torchdiffeq
except ImportError:
    raise SystemExit("this benchmark compares with torchdiffeq: pip install 'odenet-cuda[bench]'") from None

FEW, MANY = 2, 34  # steps
TOL = 1e-4
CLOSE = 1e-4  # of results and gradients of the same steps in float32, relative
APART = 2e-2  # of those of adaptive solves at TOL: each library has its own interpolants and backward steps
METHODS = ("euler", "midpoint", "rk4", "bosh3", "adaptive_heun", "dopri5", "dopri8")
GRIDS = METHODS[:3]
MODES = ("none", "direct", "adjoint")
OURS, THEIRS, JAX, BARE = "odenet_cuda", "torchdiffeq", "diffrax", "bare loop"
Solve = Callable[[nn.Module, Tensor, int], Tensor]  # (field, y0, steps) -> y(1)


class Calls(nn.Module):
    """A field that counts its calls, those that record a graph apart."""

    def __init__(self, field: nn.Module):
        super().__init__()
        self.field, self.plain, self.recorded = field, 0, 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.recorded += 1
        else:
            self.plain += 1
        return self.field(t, y)


def seconds(call: Callable[[], Any], least: float = 2e-3) -> float:
    """On the processor, for one of as many calls as take `least` seconds together."""
    count, begin = 0, time.process_time()
    while True:
        call()
        count += 1
        spent = time.process_time() - begin
        if spent >= least:
            return spent / count


def medians(cases: dict[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    samples = interleave({name: lambda call=call: {"total": seconds(call)} for name, call in cases.items()}, runs, warmup=1)
    return {name: sample.median("total") for name, sample in samples.items()}


def differentiated(solve: Callable[[Tensor], Tensor], field: nn.Module, y0: Tensor) -> list[Tensor]:
    """The result, dL/dy0 and dL/dparameters of L, the result's sum."""
    field.zero_grad()
    y = y0.clone().requires_grad_()
    result = solve(y)
    result.sum().backward()
    return [result, y.grad, *(p.grad for p in field.parameters())]


def undifferentiated(solve: Callable[[Tensor], Tensor], field: nn.Module, y0: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [solve(y0)]


def verify(what: str, found: list[Tensor], expected: list[Tensor], limit: float) -> None:
    """Each tensor against its pair, relatively."""
    distance = max(float((x - y).detach().norm() / y.detach().norm()) for x, y in zip(found, expected, strict=True))
    if not distance < limit:
        raise SystemExit(f"{what}: odenet_cuda and torchdiffeq are {distance:.2g} apart, more than {limit:.2g}")


# ---- what a call costs -------------------------------------------------------------------------------------------------


def forced(steps: int) -> dict[str, float]:
    return {"min_step": 1 / steps, "max_step": 1 / steps}


def by(solve: Callable, **arguments: Any) -> Solve:
    """Both libraries' odeint and odeint_adjoint."""
    t = torch.tensor([0.0, 1.0])
    if "method" in arguments:
        return lambda f, y, steps: solve(f, y, t, options={"step_size": 1 / steps}, **arguments)[-1]
    return lambda f, y, steps: solve(f, y, t, options=forced(steps), **arguments)[-1]


def rows_of_calls(field: nn.Module) -> dict[str, tuple[bool, Solve, Solve]]:
    """For each row whether it is differentiated, our solve and theirs."""
    t, blocks = torch.tensor([0.0, 1.0]), {}
    compiled, joint, grid = odenet_cuda.compile(field), by(odenet_cuda.odeint), by(odenet_cuda.odeint, method="euler")
    theirs, their_grid = by(torchdiffeq.odeint), by(torchdiffeq.odeint, method="euler")

    def by_compiled(f: nn.Module, y: Tensor, steps: int) -> Tensor:
        return joint(f if isinstance(f, Calls) else compiled, y, steps)

    def rows(f: nn.Module, y: Tensor, steps: int) -> Tensor:
        return odenet_cuda.solve(f, y, t, step_control="per_sample", **forced(steps)).ys[-1]

    def block(f: nn.Module, y: Tensor, steps: int) -> Tensor:
        if (f, steps) not in blocks:
            blocks[f, steps] = odenet_cuda.ODEBlock(f, gradient="direct", rtol=1e-7, atol=1e-9, compile=False, **forced(steps))
        return blocks[f, steps](y)

    return {
        "compiled": (False, by_compiled, theirs),
        "compiled, gradient direct": (True, by_compiled, theirs),
        "stepper, joint": (False, joint, theirs),
        "stepper, per sample": (False, rows, theirs),
        "stepper, gradient direct": (True, joint, theirs),
        "ODEBlock, gradient direct": (True, block, theirs),
        "odeint_adjoint": (True, by(odenet_cuda.odeint_adjoint), by(torchdiffeq.odeint_adjoint)),
        "grid, euler": (False, grid, their_grid),
        "grid, euler, gradient direct": (True, grid, their_grid),
    }


def besides_steps(solve: Solve, way: Callable, field: nn.Module, y0: Tensor) -> list[float]:
    """Calls of func that do not depend on the number of steps: those that record nothing, and those that record a graph."""
    counts = []
    for steps in (FEW, MANY):
        counted = Calls(field)
        way(lambda y: solve(counted, y, steps), counted, y0)  # noqa: B023
        counts.append((counted.plain, counted.recorded))
    return [few - FEW * (many - few) / (MANY - FEW) for few, many in zip(*counts, strict=True)]


def func_alone(field: nn.Module, y0: Tensor) -> dict[str, Callable[[], Any]]:
    other, t, ones = torch.randn_like(y0), torch.tensor(0.5), torch.ones_like(y0)

    def func() -> Tensor:
        with torch.no_grad():
            return field(t, y0)

    def product() -> Any:
        y = y0.detach().requires_grad_()
        return torch.autograd.grad(field(t, y), [y, *field.parameters()], ones)

    return {"addition": lambda: y0 + other, "func": func, "func and product": product}


def by_diffrax(field: nn.Module, y0: Tensor, steps: int) -> DiffraxSolver:
    return DiffraxSolver(Case("", field, y0, 1.0, 1e-7), per_sample=False, step=1 / steps)


def bench_calls(runs: int) -> dict[str, Any]:
    torch.manual_seed(0)
    field, y0 = MLP(2, 50), torch.randn(20, 2)
    cases = func_alone(field, y0)
    taken_off: dict[tuple[str, str], list[float]] = {}
    for name, (gradient, ours, theirs) in rows_of_calls(field).items():
        way = differentiated if gradient else undifferentiated
        for steps in (FEW, MANY):
            calls = [lambda s=s, way=way, steps=steps: way(lambda y: s(field, y, steps), field, y0) for s in (ours, theirs)]
            verify(f"{name}, {steps} steps", calls[0](), calls[1](), CLOSE)
            cases |= {f"{name}|{side}|{steps}": call for side, call in zip((OURS, THEIRS), calls, strict=True)}
        for side, solve in ((OURS, ours), (THEIRS, theirs)):
            taken_off[name, side] = [0.0, 0.0] if solve is ours and "compiled" in name else besides_steps(solve, way, field, y0)
    if diffrax_installed():
        for name, direction in (("compiled", "forward"), ("compiled, gradient direct", "training")):
            for steps in (FEW, MANY):
                cases[f"{name}|{JAX}|{steps}"] = getattr(by_diffrax(field, y0, steps), direction)
    median = medians(cases, runs)
    func = [median["func"], median["func and product"]]
    print(f"\nfunc takes {func[0] * 1e6:.0f} us, with its product {func[1] * 1e6:.0f} us", end="")
    print(f"; an addition of two 20 x 2 tensors {median['addition'] * 1e6:.2f} us")
    results: dict[str, Any] = {name: median[name] for name in func_alone(field, y0)}
    rows = []
    for name in rows_of_calls(field):
        results[name] = {}
        for side in (OURS, THEIRS, JAX):
            few, many = (median.get(f"{name}|{side}|{steps}") for steps in (FEW, MANY))
            if few is None or many is None:
                continue
            step = (many - few) / (MANY - FEW)
            besides = sum(n * cost for n, cost in zip(taken_off.get((name, side), ()), func, strict=False))
            call = few - FEW * step - besides
            results[name][side] = {"call": call, "step": step, "two_steps": few, "additions": call / median["addition"]}
        rows.append(row_of(name, results[name]))
    print_table("what a call costs besides its steps and func", rows)
    return results


def row_of(name: str, of_side: dict[str, dict[str, float]]) -> dict[str, Any]:
    ours, theirs, jax = of_side[OURS], of_side[THEIRS], of_side.get(JAX)
    row = {
        "": name,
        "call us": ours["call"] * 1e6,
        "additions": ours["additions"],
        "us/step": ours["step"] * 1e6,
        "torchdiffeq: call us": theirs["call"] * 1e6,
        "us / step": theirs["step"] * 1e6,
        f"{FEW} steps, / ours": theirs["two_steps"] / ours["two_steps"],
    }
    return row if jax is None else {**row, "diffrax: call us": jax["call"] * 1e6, "us /step": jax["step"] * 1e6}


# ---- every method ------------------------------------------------------------------------------------------------------


def matrix_case(library: Any, field: nn.Module, y0: Tensor, t: Tensor, method: str, mode: str) -> Callable[[], list[Tensor]]:
    solve = library.odeint_adjoint if mode == "adjoint" else library.odeint
    way = undifferentiated if mode == "none" else differentiated
    return lambda: way(lambda y: solve(field, y, t, method=method, rtol=TOL, atol=TOL), field, y0)


def bare_step(method: str, field: nn.Module, t: Tensor, y: Tensor, dt: float) -> Tensor:
    k1 = field(t, y)
    if method == "euler":
        return torch.add(y, k1, alpha=dt)
    if method == "midpoint":
        return torch.add(y, field(t, torch.add(y, k1, alpha=dt / 2)), alpha=dt)
    k2 = field(t, torch.add(y, k1, alpha=dt / 3))  # the method of 3/8, as in torchdiffeq
    k3 = field(t, torch.add(torch.add(y, k2, alpha=dt), k1, alpha=-dt / 3))
    k4 = field(t, torch.add(torch.add(torch.add(y, k1, alpha=dt), k2, alpha=-dt), k3, alpha=dt))
    return torch.add(y, k1 + 3 * (k2 + k3) + k4, alpha=dt / 8)


def bare_loop(field: nn.Module, y0: Tensor, t: Tensor, method: str) -> Tensor:
    ys, dts = [y0], t.diff().tolist()
    for t0, dt in zip(t.unbind(), dts, strict=False):
        ys.append(bare_step(method, field, t0, ys[-1], dt))
    return torch.stack(ys)


def bench_matrix(runs: int, quick: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    field, y0 = MLP(4, 32), torch.randn(16, 4)
    rows, results, limits = [], {}, dict[str, dict[str, Any]]()
    for method in ("euler", "rk4", "dopri5") if quick else METHODS:
        row: dict[str, Any] = {"": method}
        for mode in MODES:
            for times in (2, 11) if quick else (2, 11, 101):
                t, name = torch.linspace(0, 1, times), f"{mode}, {times}"
                libraries = {OURS: odenet_cuda, THEIRS: torchdiffeq}
                cases = {side: matrix_case(library, field, y0, t, method, mode) for side, library in libraries.items()}
                limit = CLOSE if method in GRIDS else APART
                verify(f"{method}, {name}", cases[OURS](), cases[THEIRS](), limit)
                if method in GRIDS and mode != "adjoint":
                    way = undifferentiated if mode == "none" else differentiated
                    cases[BARE] = partial(way, partial(bare_loop, field, t=t, method=method), field, y0)
                    verify(f"{method}, {name}, bare loop", cases[BARE](), cases[THEIRS](), limit)
                median = medians(cases, runs if times < 101 else max(3, runs // 4))
                row[name] = median[THEIRS] / median[OURS]
                results[f"{method}, {name}"] = {**median, "ratio": row[name]}
                if BARE in median:
                    limits.setdefault(method, {"": method})[name] = median[THEIRS] / median[BARE]
        rows.append(row)
    print_table("torchdiffeq's time over ours: gradient, times", rows)
    print_table("and over the bare loop's, the limit", [*limits.values()])
    below = [name for name, result in results.items() if result["ratio"] < 1]
    print(f"\nslower than torchdiffeq: {'; '.join(below) if below else 'none'}")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=("calls", "matrix", []), help="all unless given")
    parser.add_argument("--json", help="also write the results there")
    parser.add_argument("--runs", type=int, help="runs of each case; 20 unless given, 5 with --quick")
    parser.add_argument("--quick", action="store_true", help="fewer methods and times")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print_machine()
    runs, results = arguments.runs or (5 if arguments.quick else 20), {}
    if not arguments.parts or "calls" in arguments.parts:
        results["calls"] = bench_calls(runs)
    if not arguments.parts or "matrix" in arguments.parts:
        results["matrix"] = bench_matrix(runs, arguments.quick)
    save(arguments.json, results)


if __name__ == "__main__":
    main()
