"""The ensemble that other libraries published figures for on an H200: what must be beaten.

    python benchmarks/bench_ensemble.py rivals

Lorenz's equations in float64, a rho from 0 to 21 for each trajectory, from (1, 0, 0) over [0, 1], Tsit5 with steps of its own
for each at 1e-6, forwards, and the gradient of the sum of y(1) with respect to each rho. `error` is the median of the
trajectories' relative errors against a solve at 1e-11 (dopri8 of torchdiffeq, and its gradient): a time counts beside the
error that it buys. `to beat ms` is what makes us the fastest at the same error; `published ms` is what GRADSOLVE, DiffEqGPU.jl
and diffrax took on an H200 NVL in September 2026.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from measure import elapsed, interleave, print_table
from torch import Tensor

import odenet_cuda

FORWARD, GRADIENT = (32_768, 524_288), 32_768
PUBLISHED = {
    "forward, 32,768": {"GRADSOLVE": 0.148, "DiffEqGPU.jl": 0.176},
    "forward, 524,288": {"GRADSOLVE": 0.657, "DiffEqGPU.jl": 1.922},
    "gradient, 32,768": {"GRADSOLVE": 3.42, "diffrax": 32.5},
}  # milliseconds
TO_BEAT = {"forward, 32,768": 0.148, "forward, 524,288": 0.5, "gradient, 32,768": 2.5}
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}
WORST = 1e-4  # an error beyond this is a mistake


def lorenz(t: Tensor, y: Tensor, rho: Tensor) -> Tensor:
    """y [batch, 3], rho [batch, 1]"""
    a, b, c = y.unbind(-1)
    return torch.stack([10 * (b - a), a * (rho[:, 0] - c) - b, a * b - 8 / 3 * c], -1)


def ensemble(count: int, device: str) -> tuple[Tensor, Tensor]:
    """y0 and rho."""
    y0 = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64, device=device).repeat(count, 1)
    return y0, torch.linspace(0, 21, count, dtype=torch.float64, device=device)[:, None]


def slope_of(y_end: Tensor, rho: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(y_end.sum(), rho)
    return found


def tight(y0: Tensor, rho: Tensor, gradient: bool) -> Tensor:
    library = __import__("torchdiffeq")
    t = torch.tensor([0.0, 1.0], dtype=torch.float64, device=y0.device)
    rho = rho.detach().requires_grad_(gradient)
    with torch.set_grad_enabled(gradient):
        y = library.odeint(lambda t, y: lorenz(t, y, rho), y0, t, rtol=1e-11, atol=1e-11, method="dopri8")[-1]
        return slope_of(y, rho) if gradient else y


def ours(y0: Tensor, rho: Tensor, gradient: str | None, compiled: bool, **options: Any) -> Callable[[], Tensor]:
    """gradient: how it is found, or None for y(1)."""
    func = odenet_cuda.compile(lorenz, cuda=True) if compiled else lorenz
    rho = rho.detach().requires_grad_(gradient is not None)

    def solve() -> Tensor:
        with torch.set_grad_enabled(gradient is not None):
            own = {**TOLERANCE, "method": "tsit5", "step_control": "per_sample", **options}
            y = odenet_cuda.solve(func, y0, [0.0, 1.0], args=(rho,), gradient=gradient or "adjoint", **own).ys[-1]
            if compiled and func.explain() != "compiled":
                raise NotImplementedError(func.explain())
            return y if gradient is None else slope_of(y, rho)

    return solve


def ways(y0: Tensor, rho: Tensor, gradient: bool) -> dict[str, Callable[[], Tensor]]:
    if gradient:
        return {"compiled, direct": ours(y0, rho, "direct", True)}  # back in time the adjoint meets other trajectories
    return {"compiled": ours(y0, rho, None, True), "captured": ours(y0, rho, None, False, cuda_graph=True)}


def cases(quick: bool) -> list[tuple[int, bool]]:
    """Trajectories, and whether the gradient is asked for."""
    return [(FORWARD[0], False)] if quick else [*((count, False) for count in FORWARD), (GRADIENT, True)]


def compiled_solves() -> Iterator[tuple[str, Callable[[], Tensor]]]:
    for count, gradient in cases(quick=False):
        for name, way in ways(*ensemble(count, "cpu"), gradient).items():
            if name.startswith("compiled"):
                yield f"rivals, {count:,} trajectories: {name}", way


def bench_rivals(device: str, quick: bool, runs: int, add: Callable[[str, dict[str, Any]], None]) -> None:
    """add(title, results) after each case. On the CPU at a thousandth of the size, where nothing is to be beaten."""
    for count, gradient in cases(quick):
        case = f"{'gradient' if gradient else 'forward'}, {count:,}"
        count = count if device == "cuda" else max(8, count // 1000)
        y0, rho = ensemble(count, device)
        expected, results, served = tight(y0, rho, gradient), dict[str, Any](), {}
        for name, way in ways(y0, rho, gradient).items():
            try:
                apart = (way() - expected).norm(dim=-1) / expected.norm(dim=-1)
            except (NotImplementedError, torch.OutOfMemoryError) as error:
                results[name] = {"note": f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"}
                continue
            error = float(apart.nanmedian())
            if not error <= WORST:
                raise SystemExit(f"rivals, {case}: the error of {name} is {error:.2g}")
            results[name] = {"error": error}
            served[name] = lambda way=way: {"total": elapsed(way, device)}
        for name, samples in interleave(served, runs).items():
            results[name] |= samples.summary()
        rows = [row(name, result, TO_BEAT[case] if device == "cuda" else None) for name, result in results.items()]
        rows += [{"": f"{name}, published", "published ms": ms} for name, ms in PUBLISHED[case].items()]
        title = f"rivals, {'gradient' if gradient else 'forward'}, {count:,} trajectories"
        print_table(title, rows)
        add(title, results | {"to beat ms": TO_BEAT[case], "published ms": PUBLISHED[case]})


def row(name: str, result: dict[str, Any], to_beat: float | None) -> dict[str, Any]:
    made: dict[str, Any] = {"": name}
    if "total" in result:
        made |= {f"{key} ms": result["total"][key] * 1e3 for key in ("median", "min", "max")}
        made["error"] = f"{result['error']:.1e}"
        if to_beat is not None:
            made["to beat ms"] = to_beat
    return made | {key: result[key] for key in ("note",) if key in result}
