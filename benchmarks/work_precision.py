"""Work and precision of every method: error against evaluations of the field and against time, beside torchdiffeq's.

    python benchmarks/work_precision.py [METHOD ...] [--json FILE] [--png FOLDER] [--runs N] [--quick]

Problems with exact solutions, or references by scipy's DOP853 that our dopri8 must meet first; float64, rtol = atol = tol. Two
solves a tolerance: to the end alone ("end": error there), and with outputs between ("interior": the largest error at those).
Adaptive methods go through tolerances, methods on a grid through numbers of steps. Evaluations are calls of the field.

At equal evaluations, by interpolating log(error) over log(evaluations), "ratio" is torchdiffeq's error over ours: 1 or more
means that ours is no worse. Median and worst are over the range of evaluations that both curves cover.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import elapsed, print_machine, print_table, save
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from problems import ADAPTIVE_METHODS, FIXED_METHODS, PROBLEMS, VanDerPol

import odenet_cuda

try:
    import torchdiffeq
    from scipy.integrate import solve_ivp
except ImportError:
    raise SystemExit("this benchmark needs torchdiffeq and scipy: pip install 'odenet-cuda[bench]'") from None

END = 10.0
INTERIOR = 40  # output times between
COUNTERPARTS = {"tsit5": "dopri5"}  # torchdiffeq 0.2.5 has no tsit5: its other method of order 5 stands beside ours
QUANTITIES = ("end", "interior")
LIBRARIES = ("odenet_cuda", "torchdiffeq")
QUICK_METHODS = ("dopri5", "dopri8", "bosh3", "rk4")
QUICK_PROBLEMS = ("cosine", "orbit")


@dataclass(frozen=True)
class Problem:
    """dy/dt = func(t, y) from y0 at 0 to END, and the solution at some times."""

    name: str
    func: Callable[[Tensor, Tensor], Tensor]
    y0: Tensor
    solution: Callable[[Tensor], Tensor]


@dataclass
class Curve:
    """One method of one library on one problem: the points of a sweep, from loose to tight."""

    parameter: list[float] = field(default_factory=list)
    nfe: list[int] = field(default_factory=list)
    error: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def rigid_body(t: Tensor, y: Tensor) -> Tensor:
    """Euler's equations of a rigid body without external forces; DETEST B5."""
    return torch.stack([y[1] * y[2], -y[0] * y[2], -0.51 * y[0] * y[1]])


def predators(t: Tensor, y: Tensor) -> Tensor:
    """The growth of two conflicting populations; DETEST B1."""
    return torch.stack([2 * (y[0] - y[0] * y[1]), -(y[1] - y[0] * y[1])])


def orbit(t: Tensor, y: Tensor) -> Tensor:
    """A body around a fixed mass, position and velocity; DETEST D."""
    return torch.cat([y[2:], -y[:2] / (y[0] * y[0] + y[1] * y[1]) ** 1.5])


def referenced(name: str, func: Callable, y0: list[float]) -> Problem:
    """A problem without a formula for its solution."""
    start = torch.tensor(y0, dtype=torch.float64)

    def right(t: float, y: np.ndarray) -> np.ndarray:
        return func(torch.tensor(t), torch.from_numpy(y)).numpy()

    dense = solve_ivp(right, (0.0, END), y0, method="DOP853", rtol=1e-13, atol=1e-13, t_eval=output_times()[1:].numpy()).y.T
    table = dict(zip(output_times()[1:].tolist(), torch.from_numpy(dense), strict=True))
    return Problem(name, func, start, lambda t: torch.stack([table[x] for x in t.tolist()]))


def output_times() -> Tensor:
    """0, times between that are on no grid of equal steps, END."""
    between = END * (torch.arange(INTERIOR, dtype=torch.float64) + (math.sqrt(5) - 1) / 2) / (INTERIOR + 1)
    return torch.cat([torch.zeros(1, dtype=torch.float64), between, torch.full((1,), END, dtype=torch.float64)])


def problems(names: tuple[str, ...] | None) -> list[Problem]:
    exact = [Problem(p.name, p.func, p.y0, p.exact) for p in PROBLEMS.values()]
    oscillator = VanDerPol(torch.ones(1, 1, dtype=torch.float64))
    eccentricity = 0.5  # from the point nearest to the mass
    makers = {
        "van_der_pol": lambda: referenced("van_der_pol", lambda t, y: oscillator(t, y[None])[0], [2.0, 0.0]),
        "rigid_body": lambda: referenced("rigid_body", rigid_body, [0.0, 1.0, 1.0]),
        "predators": lambda: referenced("predators", predators, [1.0, 3.0]),
        "orbit": lambda: referenced(
            "orbit", orbit, [1 - eccentricity, 0.0, 0.0, math.sqrt((1 + eccentricity) / (1 - eccentricity))]
        ),
    }
    chosen = [p for p in exact if names is None or p.name in names]
    return chosen + [make() for name, make in makers.items() if names is None or name in names]


def verify(problem: Problem) -> None:
    """What the errors are measured against, against our dopri8 at a tight tolerance."""
    t = output_times()
    tight = odenet_cuda.odeint(problem.func, problem.y0, t, method="dopri8", rtol=1e-12, atol=1e-12)[1:]
    difference = float((tight - problem.solution(t[1:])).abs().max())
    assert difference < 1e-9, f"the reference of {problem.name} is {difference:.2g} away from dopri8 at 1e-12"


def solver(
    library: str, method: str, problem: Problem, t: Tensor, parameter: float, landing: bool
) -> Callable[[], tuple[Tensor, int]]:
    """One solve: the states at t and the calls of the field. parameter: the tolerance, or the number of steps on a grid.

    Outputs between the steps of a grid are the method's own here and cubic there, the best that each has. landing:
    torchdiffeq is asked for a step that ends at the end, as ours always has.
    """

    def solve() -> tuple[Tensor, int]:
        calls = 0

        def counted(time: Tensor, y: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return problem.func(time, y)

        if library == "odenet_cuda":
            steps = {"step_size": END / parameter} if method in FIXED_METHODS else {"rtol": parameter, "atol": parameter}
            return odenet_cuda.solve(counted, problem.y0, t, method=method, **steps).ys, calls
        if method in FIXED_METHODS:
            options = {"step_size": END / parameter, "interp": "cubic"}
            return torchdiffeq.odeint(counted, problem.y0, t, method=method, options=options), calls
        theirs = COUNTERPARTS.get(method, method)
        options = {"step_t": t[-1:]} if landing else None
        ys = torchdiffeq.odeint(counted, problem.y0, t, method=theirs, rtol=parameter, atol=parameter, options=options)
        return ys, calls

    return solve


def sweep(method: str, problem: Problem, runs: int, quick: bool, landing: bool) -> dict[str, dict[str, Curve]]:
    """Curves of both libraries, in turn at each tolerance; a curve ends before a tolerance that needs too many evaluations."""
    limit = 700 if quick else 10000
    if method in FIXED_METHODS:
        parameters = [float(round(10 * 2 ** (i / 2))) for i in range(0, 13 if quick else 20, 2 if quick else 1)]
    else:
        parameters = [10.0 ** (-i / 2) for i in range(6, 21, 2 if quick else 1)]
    curves = {quantity: {library: Curve() for library in LIBRARIES} for quantity in QUANTITIES}
    all_times = output_times()
    for quantity in QUANTITIES:
        t = all_times[[0, -1]] if quantity == "end" else all_times
        expected = problem.solution(t[1:])
        errors = slice(0, 1) if quantity == "end" else slice(0, INTERIOR)
        for parameter in parameters:
            for library in LIBRARIES:
                curve = curves[quantity][library]
                if curve.nfe and curve.nfe[-1] > limit:
                    continue
                solve = solver(library, method, problem, t, parameter, landing)
                results, seconds = [], []
                for _ in range(runs):
                    seconds.append(elapsed(lambda solve=solve, results=results: results.append(solve())))
                ys, nfe = results[-1]
                curve.parameter.append(parameter)
                curve.nfe.append(nfe)
                curve.error.append(float((ys[1:][errors] - expected[errors]).abs().max()))
                curve.seconds.append(statistics.median(seconds))
    return curves


def error_ratios(curves: dict[str, Curve], scale: float) -> list[float]:
    """torchdiffeq's error over ours at equal evaluations, all along the common range; [] where there is none.

    Errors below what rounding leaves of a solution of that scale are taken as that; a solve that is further away than ten
    times the scale has left the solution, on too coarse a grid, and takes no part.
    """
    floor = 4 * torch.finfo(torch.float64).eps * scale
    logs = {}
    for library, curve in curves.items():
        at: dict[int, list[float]] = {}
        for nfe, error in zip(curve.nfe, curve.error, strict=True):
            if error < 10 * scale:  # not of NaN
                at.setdefault(nfe, []).append(math.log(max(error, floor)))
        if not at:
            return []
        points = sorted((math.log(nfe), statistics.fmean(values)) for nfe, values in at.items())
        logs[library] = tuple(np.array(column) for column in zip(*points, strict=True))
    low, high = max(x[0] for x, _ in logs.values()), min(x[-1] for x, _ in logs.values())
    if low > high:
        return []
    at_nfe = np.linspace(low, high, 65)
    ours, theirs = (np.interp(at_nfe, *logs[library]) for library in LIBRARIES)
    return np.exp(theirs - ours).tolist()


def bench_method(method: str, chosen: list[Problem], runs: int, quick: bool, landing: bool) -> dict[str, Any]:
    rows, results, all_curves = [], {}, {}
    for problem in chosen:
        scale = float(problem.solution(output_times()[1:]).abs().max())
        curves = all_curves[problem.name] = sweep(method, problem, runs, quick, landing)
        row: dict[str, Any] = {"": problem.name}
        results[problem.name] = {}
        for quantity in QUANTITIES:
            ratios = error_ratios(curves[quantity], scale)
            summary = {"median": statistics.median(ratios), "worst": min(ratios)} if ratios else {}
            row.update({f"{quantity} {name}": summary.get(name, "none in common") for name in ("median", "worst")})
            results[problem.name][quantity] = {**summary, **{name: vars(curve) for name, curve in curves[quantity].items()}}
        tightest = {name: curves["end"][name] for name in LIBRARIES}
        row["nfe"] = f"{max(c.nfe[0] for c in tightest.values())} to {min(c.nfe[-1] for c in tightest.values())}"
        rows.append(row)
    theirs = COUNTERPARTS.get(method, method)
    title = f"{method}: torchdiffeq's error over ours at equal evaluations" + (f", theirs {theirs}" if theirs != method else "")
    print_table(title, rows)
    return {"problems": results, "counterpart": theirs, "curves": all_curves}


def summarise(results: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for method, result in results.items():
        row: dict[str, Any] = {"": method}
        for quantity in QUANTITIES:
            medians = {name: p[quantity]["median"] for name, p in result["problems"].items() if "median" in p[quantity]}
            if medians:
                worst = min(medians, key=lambda name: medians[name])
                row[f"{quantity}: median"] = statistics.median(medians.values())
                row["worst problem" if quantity == "end" else "its worst problem"] = f"{medians[worst]:.3g} {worst}"
                row[f"{quantity}: no worse"] = f"{sum(m >= 0.99 for m in medians.values())} of {len(medians)}"
        rows.append(row)
    print_table("every method over its problems, by their medians; no worse: to 1 %", rows)
    return rows


def plot(method: str, result: dict[str, Any], folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    kinds = (
        ("end", "nfe", "error at the end"),
        ("interior", "nfe", "largest error between"),
        ("end", "seconds", "error at the end"),
    )
    names = list(result["curves"])
    figure, axes = plt.subplots(
        len(kinds), len(names), figsize=(2.6 * len(names) + 0.6, 7.4), squeeze=False, layout="constrained"
    )
    for (quantity, over, label), line in zip(kinds, axes, strict=True):
        for axis, name in zip(line, names, strict=True):
            for library, mark in zip(LIBRARIES, ("o-", "s--"), strict=True):
                curve = result["curves"][name][quantity][library]
                axis.loglog(
                    getattr(curve, over), [min(max(e, 1e-17), 1e2) for e in curve.error], mark, markersize=3, linewidth=1
                )
            axis.set_xlabel("evaluations of the field" if over == "nfe" else "seconds", fontsize=8)
            axis.grid(alpha=0.3)
            axis.tick_params(labelsize=7)
            axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 3)))
            axis.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        line[0].set_ylabel(label, fontsize=9)
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(name, fontsize=9)
    theirs = result["counterpart"]
    figure.legend(
        ["odenet_cuda", "torchdiffeq" + (f" {theirs}" if theirs != method else "")], loc="outside upper right", ncols=2
    )
    figure.suptitle(method, x=0.02, ha="left")
    figure.savefig(folder / f"work_precision_{method}.png", dpi=110)
    plt.close(figure)


def main() -> None:
    every = (*ADAPTIVE_METHODS, *FIXED_METHODS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"{', '.join(every)}; all unless given")
    parser.add_argument("--json", help="also write the results there")
    parser.add_argument("--png", type=Path, help="also draw the curves of each method into this folder")
    parser.add_argument("--runs", type=int, help="timed runs of each solve; 3 unless given, 1 with --quick")
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK_METHODS)} on {', '.join(QUICK_PROBLEMS)}")
    parser.add_argument("--landing", action="store_true", help="make torchdiffeq end a step at the end, as ours always does")
    arguments = parser.parse_args()
    unknown = set(arguments.methods) - set(every)
    if unknown:
        parser.error(f"unknown method {unknown.pop()!r}; there are {', '.join(every)}")
    torch.set_num_threads(1)
    print_machine()
    chosen = problems(QUICK_PROBLEMS if arguments.quick else None)
    for problem in chosen:
        verify(problem)
    runs = arguments.runs or (1 if arguments.quick else 3)
    results = {}
    for method in arguments.methods or (QUICK_METHODS if arguments.quick else every):
        results[method] = bench_method(method, chosen, runs, arguments.quick, arguments.landing)
        if arguments.png:
            arguments.png.mkdir(parents=True, exist_ok=True)
            plot(method, results[method], arguments.png)
    summary = summarise(results)
    kept = {method: {"problems": r["problems"], "counterpart": r["counterpart"]} for method, r in results.items()}
    save(arguments.json, {"summary": summary, "landing": arguments.landing, "methods": kept})


if __name__ == "__main__":
    main()
