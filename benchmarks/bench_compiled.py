"""Solves of compiled fields beside other libraries, and beside C++ written by hand for one equation, in one run.

    python benchmarks/bench_compiled.py [--quick] [--json FILE] [--threads N] [--runs N] [--cases lorenz-one ...]

Every solver is held against a reference in float64 first: `error` is the largest difference, relative to the largest number.
`forward` and `training` (forward and backward, gradients of the mean square of the end for y0 and parameters) are medians of
interleaved runs; `/ ours` is a solver's time over that of the compiled field with the same control. `control` says whether
the batch has one step size or each sample its own, `gradient` how it was made. Norms are root mean squares of what is under
control, scaled by atol + rtol max(|y0|, |y1|); diffrax scales alike. The compiled adjoint leaves the parameters out of it.
Calls of less than five milliseconds are timed several in a row, so that none is timed with what another left in the caches.

"by hand" is by_hand.cpp, compiled with the same compiler and flags. Lorenz's solution cannot be predicted to t = 100, so the
errors of `lorenz-one` are those at t = 10. `peak` is the share of the arithmetic that torch's matrix product reaches here.
"""

import argparse
import ctypes
import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compiled_cases import Case, cases
from measure import Samples, print_machine, print_table, save
from torch import Tensor

import odenet_cuda
from odenet_cuda import _C
from odenet_cuda.compiled.build import FLAGS, LEVEL_FLAGS, find_compiler

Result = list[Tensor]  # the end, or gradients of y0 and of parameters


class Solver:
    """control, gradient: as in the table. forward() gives the end, training() the gradients; None: not served."""

    label = ""
    control = "joint"
    gradient = ""

    def forward(self) -> Any: ...

    training: Callable[[], Any] | None = None

    def tensors(self, result: Any) -> Result:
        return [result] if isinstance(result, Tensor) else list(result)

    steps: str | int = ""


class TorchSolver(Solver):
    """solve(y0, args): the end."""

    def __init__(self, case: Case, label: str, control: str, gradient: str, solve: Callable[..., Tensor]):
        self.case, self.label, self.control, self.gradient, self.solve = case, label, control, gradient, solve
        if case.gradients:
            self.training = self.gradients

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.solve(self.case.y0, self.case.args)

    def gradients(self) -> Result:
        y0 = self.case.y0.clone().requires_grad_()
        inputs = [y0, *self.case.parameters]
        return list(torch.autograd.grad(self.solve(y0, self.case.args).square().mean(), inputs))


def ours(case: Case, control: str, gradient: str = "direct") -> TorchSolver:
    field = odenet_cuda.compile(case.field)

    def solve(y0: Tensor, args: Any) -> Tensor:
        solution = odenet_cuda.solve(
            field, y0, [0.0, case.end], args=args, rtol=case.rtol, atol=case.atol, step_control=control, gradient=gradient
        )
        solver.steps = solution.stats.nfe
        return solution.ys[-1]

    solver = TorchSolver(case, "compiled", control, gradient, solve)
    solver.forward()
    if field.explain() != "compiled":
        raise SystemExit(f"{case.name} was {field.explain()}")
    return solver


def torchdiffeq(case: Case, gradient: str) -> TorchSolver:
    library = importlib.import_module("torchdiffeq")
    function = library.odeint_adjoint if gradient == "adjoint" else library.odeint
    t = torch.tensor([0.0, case.end], dtype=case.y0.dtype)

    class Field(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.func = case.field

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            solver.steps += 1  # type: ignore[operator]
            return self.func(t, y, *case.args)

    field = Field()

    def solve(y0: Tensor, args: Any) -> Tensor:
        solver.steps = 0
        return function(field, y0, t, rtol=case.rtol, atol=case.atol, method="dopri5")[-1]

    solver = TorchSolver(case, "torchdiffeq", "joint", gradient, solve)
    return solver


def torchode(case: Case) -> TorchSolver:
    library = importlib.import_module("torchode")
    bounds = torch.tensor([[0.0], [case.end]], dtype=case.y0.dtype)
    begin, end = bounds.expand(2, len(case.y0))

    def field(t: Tensor, y: Tensor) -> Tensor:
        return case.field(t[:, None], y, *case.args)

    term = library.ODETerm(field, with_stats=False)
    controller = library.IntegralController(atol=case.atol, rtol=case.rtol, term=term)
    adjoint = library.AutoDiffAdjoint(library.Dopri5(term=term), controller, backprop_through_step_size_control=False)
    adjoint = adjoint.to(case.y0)

    def solve(y0: Tensor, args: Any) -> Tensor:
        solution = adjoint.solve(library.InitialValueProblem(y0, t_start=begin, t_end=end))
        return solution.ys[:, -1]

    return TorchSolver(case, "torchode", "per_sample", "direct", solve)


class Diffrax(Solver):
    """Compiled before anything is timed. Control for each sample is jax.vmap over the solve of one."""

    def __init__(self, case: Case, control: str):
        jax, diffrax = importlib.import_module("jax"), importlib.import_module("diffrax")
        jax.config.update("jax_enable_x64", case.y0.dtype == torch.float64)
        self.jax, self.label, self.control, self.gradient = jax, "diffrax", control, "checkpoint"
        self.y0 = jax.numpy.asarray(case.y0.numpy())
        self.args = tuple(jax.numpy.asarray(x.numpy()) for x in case.args)
        self.parameters = tuple(jax.numpy.asarray(x.detach().numpy()) for x in case.parameters)

        def one(y0: Any, parameters: Any, args: Any, field: Callable[..., Any]) -> Any:
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(lambda t, y, _: field(t, y, parameters, *args)),
                diffrax.Dopri5(), 0.0, case.end, None, y0, max_steps=1 << 14,
                stepsize_controller=diffrax.PIDController(rtol=case.rtol, atol=case.atol),
            )  # fmt: skip
            return solution.ys[-1]

        if case.y0.dim() == 1:
            solve = lambda y0, parameters, args: one(y0, parameters, args, case.per_row)  # noqa: E731
        elif control == "joint":
            rows = jax.vmap(case.per_row, in_axes=(None, 0, None, *[0] * len(self.args)))
            solve = lambda y0, parameters, args: one(y0, parameters, args, rows)  # noqa: E731
        else:
            solve = jax.vmap(lambda y0, parameters, args: one(y0, parameters, args, case.per_row), in_axes=(0, None, 0))
        self._forward = jax.jit(solve)
        self._training = jax.jit(jax.grad(lambda y0, p, args: (solve(y0, p, args) ** 2).mean(), argnums=(0, 1)))
        if case.gradients:
            self.training = self.gradients

    def forward(self) -> Any:
        return self.jax.block_until_ready(self._forward(self.y0, self.parameters, self.args))

    def gradients(self) -> Any:
        return self.jax.block_until_ready(self._training(self.y0, self.parameters, self.args))

    def tensors(self, result: Any) -> Result:
        return [torch.from_numpy(np.array(leaf)) for leaf in self.jax.tree_util.tree_leaves(result)]


class Scipy(Solver):
    label, control = "scipy RK45", "joint"

    def __init__(self, case: Case):
        self.case, self.integrate = case, importlib.import_module("scipy.integrate")

    def forward(self) -> Tensor:
        case = self.case

        def lorenz(t: float, y: Any) -> list[float]:
            return [10 * (y[1] - y[0]), y[0] * (28 - y[2]) - y[1], y[0] * y[1] - 8 / 3 * y[2]]

        found = self.integrate.solve_ivp(lorenz, (0, case.end), case.y0.numpy(), "RK45", rtol=case.rtol, atol=case.atol)
        self.steps = found.nfev
        return torch.from_numpy(found.y[:, -1].copy())


class ByHand(Solver):
    label = "by hand, C++"

    def __init__(self, case: Case, library: ctypes.CDLL):
        self.case, self.out = case, torch.empty_like(case.y0)
        self.control = "joint" if case.y0.dim() == 1 else "per_sample"
        self.function = getattr(library, str(case.by_hand))
        self.function.restype = ctypes.c_int64

    def forward(self) -> Tensor:
        case, end, tol = self.case, ctypes.c_double(self.case.end), ctypes.c_double(self.case.atol)
        y0, out = ctypes.c_void_p(case.y0.data_ptr()), ctypes.c_void_p(self.out.data_ptr())
        if case.y0.dim() == 1:
            self.function(y0, out, end, tol)
        else:
            p = ctypes.c_void_p(case.args[0].data_ptr() if case.args else 0)
            self.function(y0, p, out, ctypes.c_int64(len(case.y0)), end, tol)
        return self.out.clone()


def compile_by_hand(folder: str) -> ctypes.CDLL:
    result = Path(folder) / "by_hand.so"
    source = Path(__file__).parent / "by_hand.cpp"
    command = [find_compiler()[0], *FLAGS, *LEVEL_FLAGS[_C.cpu_level()], str(source), "-o", str(result), "-lmvec", "-lm"]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(result))


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def solvers_of(case: Case, library: ctypes.CDLL) -> list[Solver]:
    solvers: list[Solver] = []
    for control in case.controls:
        solvers.append(ours(case, control))
        if case.gradients:
            solvers.append(ours(case, control, "adjoint"))
    if case.by_hand:
        solvers.append(ByHand(case, library))
    if "torchdiffeq" in case.peers and installed("torchdiffeq"):
        solvers.append(torchdiffeq(case, "direct"))
        if case.gradients:
            solvers.append(torchdiffeq(case, "adjoint"))
    if "scipy" in case.peers and installed("scipy"):
        solvers.append(Scipy(case))
    if "torchode" in case.peers and installed("torchode"):
        solvers.append(torchode(case))
    if "diffrax" in case.peers and installed("diffrax"):
        solvers += [Diffrax(case, control) for control in case.controls]
    return solvers


def reference(case: Case) -> tuple[Result, Result]:
    """The end and the gradients, by a higher order at a tighter tolerance in float64."""
    wide = [parameter.data for parameter in case.parameters]
    for parameter in case.parameters:
        parameter.data = parameter.data.double()
    try:
        y0 = case.y0.double().requires_grad_(case.gradients)
        args = tuple(x.double() for x in case.args)
        field = odenet_cuda.compile(case.field)
        end = case.check_end or case.end
        control = "per_sample" if len(case.controls) > 1 else "joint"
        tol = min(case.rtol, case.atol) * 1e-4
        solution = odenet_cuda.solve(
            field, y0, [0.0, end], args=args, method="dopri8", rtol=max(tol, 1e-13), atol=max(tol, 1e-13), step_control=control
        )
        found = solution.ys[-1]
        if not case.gradients:
            return [found.detach()], []
        grads = torch.autograd.grad(found.square().mean(), [y0, *case.parameters])
        return [found.detach()], list(grads)
    finally:
        for parameter, data in zip(case.parameters, wide, strict=True):
            parameter.data = data


def error(found: Result, expected: Result) -> float:
    pairs = [(x.double() - y).abs().max() / y.abs().max() for x, y in zip(found, expected, strict=True)]
    return float(max(pairs))


def seconds(call: Callable[[], Any], number: int = 1) -> float:
    begin = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - begin) / number


def bench(case: Case, library: ctypes.CDLL, runs: int, budget: float) -> list[dict[str, Any]]:
    expected, gradients = reference(case)
    solvers = solvers_of(case, library)
    rows: list[dict[str, Any]] = []
    timings: dict[str, dict[Solver, Samples]] = {"forward": {}, "training": {}}
    for solver in solvers:
        gradient = solver.gradient if case.gradients else ""
        row: dict[str, Any] = {"": solver.label, "control": solver.control, "gradient": gradient}
        if case.check_end is not None:
            end, case.end = case.end, case.check_end
            checked = next(s for s in solvers_of(replace(case), library) if s.label == solver.label)
            row["error"] = error(checked.tensors(checked.forward()), expected)
            case.end = end
        else:
            row["error"] = error(solver.tensors(solver.forward()), expected)
        if solver.training is not None:
            row["error of gradients"] = error(solver.tensors(solver.training()), gradients)
        rows.append(row)
    for kind, samples in timings.items():
        calls: dict[Solver, Callable[[], Any]] = {}
        for solver in solvers:
            call = solver.training if kind == "training" else None if solver.gradient == "adjoint" else solver.forward
            if call is not None:
                calls[solver], samples[solver] = call, Samples()
                call()
        numbers = {solver: max(1, min(20, int(5e-3 / seconds(call)))) for solver, call in calls.items()}
        begin, run = time.perf_counter(), 0
        while run < 3 or (run < runs and time.perf_counter() - begin < budget):
            for solver, call in calls.items():
                if run >= 1 and samples[solver].values and samples[solver].median("s") > budget / 4:
                    continue  # some take many seconds: once is enough
                samples[solver].add(s=seconds(call, numbers[solver]))
            run += 1
    for solver, row in zip(solvers, rows, strict=True):
        row["nfe"] = solver.steps
        for kind, samples in timings.items():
            if solver not in samples:
                continue
            row[f"{kind} ms"] = samples[solver].median("s") * 1e3
            same = next((s for s in solvers if s.label == "compiled" and s.control == solver.control and s in samples), None)
            if same is not None and solver.label != "compiled":
                row[f"{kind} / ours"] = samples[solver].median("s") / samples[same].median("s")
    return rows


def arithmetic(case: Case, nfe: int, forward: float) -> dict[str, float]:
    """GFLOP/s of the linear layers in a forward solve, and of torch's matrix product of 1,024."""
    x = torch.randn(1024, 1024)
    best = min(seconds(lambda: x @ x) for _ in range(10))
    macs = sum(parameter.numel() for parameter in case.parameters if parameter.dim() == 2)
    reached = 2 * macs * len(case.y0) * nfe / forward / 1e9
    peak = 2 * 1024**3 / best / 1e9
    return {"GFLOP/s": reached, "matrix product GFLOP/s": peak, "peak": reached / peak}


def two_threads(case: Case, runs: int) -> dict[str, Any]:
    """How much faster two threads are than one, per-sample control."""
    solver, times = ours(case, "per_sample"), {}
    before = torch.get_num_threads()
    samples = {1: Samples(), 2: Samples()}
    for _ in range(runs):
        for threads in samples:
            torch.set_num_threads(threads)
            samples[threads].add(s=seconds(solver.forward))
    torch.set_num_threads(before)
    times = {threads: s.median("s") for threads, s in samples.items()}
    return {"": case.name, "one thread ms": times[1] * 1e3, "two ms": times[2] * 1e3, "ratio": times[1] / times[2]}


_CHILD = """
import time, torch, odenet_cuda
from torch import nn
def field(width):
    net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2))
    return odenet_cuda.compile(type("Field", (nn.Module,), {"forward": lambda self, t, y: net(y)})())
torch.manual_seed(0)
for width in (16, 24):
    f, y = field(width), torch.randn(8, 2, requires_grad=True)
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        odenet_cuda.solve(f, y, [0.0, 1.0], rtol=1e-3, atol=1e-3).ys[-1].sum().backward()
        times.append(time.perf_counter() - begin)
    assert f.explain() == "compiled", f.explain()
    print(times[0] - times[-1])
"""


def compile_time() -> list[dict[str, Any]]:
    """Seconds from a first solve to its gradient, less what it takes when compiled; in processes of their own."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for cache in ("empty", "full"):
            env = {**os.environ, "ODENET_CACHE": folder}
            out = subprocess.run([sys.executable, "-c", _CHILD], env=env, check=True, capture_output=True, text=True).stdout
            for name, value in zip(("first field of a process", "second field"), out.split(), strict=True):
                rows.append({"": f"{name}, cache {cache}", "seconds": float(value)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer trajectories and runs")
    parser.add_argument("--json", help="also write the results there")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, help="at most; default 50, quick 5")
    parser.add_argument("--cases", nargs="+", help="those whose names begin so")
    arguments = parser.parse_args()
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    if arguments.threads == 1 and hasattr(os, "sched_setaffinity") and installed("jax"):
        importlib.import_module("jax")
    torch.set_num_threads(arguments.threads)
    runs, budget = arguments.runs or (5 if arguments.quick else 50), 1.0 if arguments.quick else 8.0
    print_machine()
    missing = [name for name in ("torchdiffeq", "torchode", "diffrax") if not installed(name)]
    if missing:
        print("not installed: " + ", ".join(missing))
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        library = compile_by_hand(folder)
        chosen = [c for c in cases(arguments.quick) if not arguments.cases or any(map(c.name.startswith, arguments.cases))]
        for case in chosen:
            rows = bench(case, library, runs, budget)
            print_table(f"{case.name}, {arguments.threads} threads, rtol {case.rtol}, atol {case.atol}, t to {case.end}", rows)
            results[case.name] = rows
            if case.name.startswith("mlp"):
                results["peak"] = arithmetic(case, rows[0]["nfe"], rows[0]["forward ms"] / 1e3)
                print(", ".join(f"{name} {value:.3g}" for name, value in results["peak"].items()))
            if case.name == "lotka-volterra":
                results["threads"] = two_threads(case, runs)
                print_table("two threads", [results["threads"]])
    if not arguments.cases or "compile" in arguments.cases:
        results["compile time"] = compile_time()
        print_table("compile time", results["compile time"])
    save(arguments.json, results)


if __name__ == "__main__":
    main()
