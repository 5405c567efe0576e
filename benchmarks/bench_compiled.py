"""Solves of compiled fields beside other libraries, and beside C++ written by hand for one equation, in one run.

    python benchmarks/bench_compiled.py [--quick] [--json FILE] [--threads N] [--runs N] [--cases lorenz-one ...]

Every solver is held against a reference in float64 first: the stepper, dopri8 at a tolerance 10,000 times tighter. One that
errs more than ten times as much as the median of a case, raises or is not installed is a row that says so. Where the problem
magnifies errors, as the spiral at 1e-3 does, all of them err by much, and a backward solve by most. Columns:

    control          one step size for the batch (joint), or each sample its own (per_sample)
    gradient         direct and checkpoint: of the discrete solve; adjoint: one more solve backwards
    norm             under which an error is held against atol + rtol max(|y0|, |y1|): the root mean square of what is under
                     control; the backward solve's by the adjoint, with or without the gradients of parameters
    error            largest difference, relative to the largest number: of the end, and of the worst gradient
    steps, mean      steps tried, of the sample that took most and of all samples on average
    nfe              calls of the field in forward, where they are counted
    forward ms       the end alone, median of interleaved runs
    training ms      forward and backward: gradients of the mean square of the end, for y0 and parameters
    / ours           time over that of the compiled field with the same control and the same kind of gradient; above 1 ours
                     is faster

"by hand" is by_hand.cpp, compiled with the same compiler and flags: the limit. Lorenz's solution cannot be predicted to
t = 100, so the errors of `lorenz-one` are those at t = 10. `peak` is the share of the arithmetic that torch's matrix product
reaches here, with as many threads. `in-use` is what a field costs as it is used: the guards of a call, and the share of the
time that comparisons with func take. Calls of less than ten milliseconds are timed several in a row after one that is not, so
that none is timed with what another left in the caches. JAX is held to the same number of threads: its flags alone leave it
more.
"""

import argparse
import ctypes
import importlib
import importlib.util
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compiled_cases import Case, cases
from measure import Clock, Samples, print_machine, print_table, save
from torch import Tensor, nn

import odenet_cuda
from odenet_cuda import _C
from odenet_cuda.compiled import recheck
from odenet_cuda.compiled.compilers import LEVEL_FLAGS, compiler_flags, find_compiler, has_mvec
from odenet_cuda.problem import Structure

Result = list[Tensor]  # the end, or gradients of y0 and of parameters


_SHORT = 10e-3  # seconds
PACKAGES = ("torchdiffeq", "scipy", "torchode", "diffrax")


class Solver:
    """control, gradient: as in the table. forward() gives the end, training() the gradients; None: not served."""

    label = ""
    control = "joint"
    gradient = ""
    norm = "rms"
    steps: float | None = None
    mean: float | None = None
    nfe: int | None = None
    training: Callable[[], Any] | None = None

    def forward(self) -> Any: ...

    def tensors(self, result: Any) -> Result:
        return [result] if isinstance(result, Tensor) else list(result)


class TorchSolver(Solver):
    """solve(y0): the end."""

    def __init__(self, case: Case, label: str, control: str, gradient: str, norm: str = "rms"):
        self.case, self.label, self.control, self.gradient, self.norm = case, label, control, gradient, norm
        self.solve: Callable[[Tensor], Tensor]
        if case.gradients:
            self.training = self.gradients

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.solve(self.case.y0)

    def gradients(self) -> Result:
        y0 = self.case.y0.clone().requires_grad_()
        return list(torch.autograd.grad(self.solve(y0).square().mean(), [y0, *self.case.parameters]))


def ours(case: Case, control: str, gradient: str = "direct") -> TorchSolver:
    field = odenet_cuda.compile(case.field)
    norm = "rms, no parameters" if gradient == "adjoint" else "rms"
    solver = TorchSolver(case, "compiled", control, gradient, norm)

    def solve(y0: Tensor) -> Tensor:
        solution = odenet_cuda.solve(
            field,
            y0,
            [0.0, case.end],
            args=case.args,
            rtol=case.rtol,
            atol=case.atol,
            step_control=control,
            gradient=gradient,
        )
        stats, solver.stats = solution.stats, solution.stats
        solver.nfe = stats.nfe
        return solution.ys[-1]

    solver.solve = solve
    solver.forward()
    tried = torch.as_tensor(solver.stats.num_accepted + solver.stats.num_rejected).double()
    solver.steps, solver.mean = float(tried.max()), float(tried.mean())
    if field.explain() != "compiled":
        print(f"{case.name}, {control}, {gradient}: {field.explain()}")
        solver.label = "compiled, but served by the stepper"
    return solver


class CountedField(torch.nn.Module):
    """The field of a case with its arguments; calls are counted."""

    def __init__(self, case: Case):
        super().__init__()
        self.func, self.args, self.calls = case.field, case.args, 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return self.func(t, y, *self.args)


def torchdiffeq(case: Case, gradient: str) -> TorchSolver:
    library = importlib.import_module("torchdiffeq")
    function = library.odeint_adjoint if gradient == "adjoint" else library.odeint
    t = torch.tensor([0.0, case.end], dtype=case.y0.dtype)
    field = CountedField(case)
    norm = "rms, with parameters" if gradient == "adjoint" else "rms"
    solver = TorchSolver(case, "torchdiffeq", "joint", gradient, norm)

    def solve(y0: Tensor) -> Tensor:
        field.calls = 0
        end = function(field, y0, t, rtol=case.rtol, atol=case.atol, method="dopri5")[-1]
        solver.nfe, solver.steps = field.calls, (field.calls - 2) / 6
        return end

    solver.solve = solve
    return solver


def torchode(case: Case) -> TorchSolver:
    library = importlib.import_module("torchode")
    bounds = torch.tensor([[0.0], [case.end]], dtype=case.y0.dtype)
    begin, end = bounds.expand(2, len(case.y0))
    counted = CountedField(case)
    term = library.ODETerm(lambda t, y: counted(t[:, None], y), with_stats=False)
    controller = library.IntegralController(atol=case.atol, rtol=case.rtol, term=term)
    adjoint = library.AutoDiffAdjoint(library.Dopri5(term=term), controller, backprop_through_step_size_control=False)
    adjoint = adjoint.to(case.y0)
    solver = TorchSolver(case, "torchode", "per_sample", "direct")

    def solve(y0: Tensor) -> Tensor:
        counted.calls = 0
        solution = adjoint.solve(library.InitialValueProblem(y0, t_start=begin, t_end=end))
        solver.nfe, tried = counted.calls, solution.stats["n_steps"]
        solver.steps, solver.mean = float(tried.max()), float(tried.double().mean())
        return solution.ys[:, -1]

    solver.solve = solve
    return solver


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
                diffrax.Dopri5(), 0.0, case.end, None, y0, max_steps=4096 if case.gradients else 1 << 14,
                stepsize_controller=diffrax.PIDController(rtol=case.rtol, atol=case.atol),
            )  # fmt: skip
            return solution.ys[-1], solution.stats["num_steps"]

        if case.y0.dim() == 1:
            solve = lambda y0, parameters, args: one(y0, parameters, args, case.per_row)  # noqa: E731
        elif control == "joint":
            rows = jax.vmap(case.per_row, in_axes=(None, 0, None, *[0] * len(self.args)))
            solve = lambda y0, parameters, args: one(y0, parameters, args, rows)  # noqa: E731
        else:
            solve = jax.vmap(lambda y0, parameters, args: one(y0, parameters, args, case.per_row), in_axes=(0, None, 0))
        self._forward = jax.jit(solve)
        self._training = jax.jit(jax.grad(lambda y0, p, args: (solve(y0, p, args)[0] ** 2).mean(), argnums=(0, 1)))
        if case.gradients:
            self.training = self.gradients

    def forward(self) -> Any:
        end, self.tried = self.jax.block_until_ready(self._forward(self.y0, self.parameters, self.args))
        return end

    def count(self) -> None:
        tried = np.asarray(self.tried)
        self.steps, self.mean = float(tried.max()), float(tried.mean())

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
        self.nfe, self.steps = found.nfev, (found.nfev - 2) / 6
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
            self.steps = float(self.function(y0, out, end, tol))
        else:
            p = ctypes.c_void_p(case.args[0].data_ptr() if case.args else 0)
            self.mean = self.function(y0, p, out, ctypes.c_int64(len(case.y0)), end, tol) / len(case.y0)
        return self.out.clone()


def compile_by_hand(folder: str) -> ctypes.CDLL:
    result = Path(folder) / "by_hand.so"
    source = Path(__file__).parent / "by_hand.cpp"
    flags = [*compiler_flags(), *LEVEL_FLAGS[_C.cpu_level()], *shlex.split(os.environ.get("ODENET_CXXFLAGS", ""))]
    libraries = [*(["-lmvec"] if has_mvec() else []), "-lm"]
    command = [*find_compiler()[0], *flags, str(source), "-o", str(result), *libraries]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(result))


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def makers_of(case: Case, library: ctypes.CDLL) -> list[Callable[[Case], Solver]]:
    """What makes each solver of a case; those of packages that are installed."""
    gradients = ("direct", "adjoint") if case.gradients else ("direct",)
    makers: list[Callable[[Case], Solver]] = []
    for control in case.controls:
        makers += [lambda c, control=control, gradient=gradient: ours(c, control, gradient) for gradient in gradients]
    if case.by_hand:
        makers.append(lambda c: ByHand(c, library))
    peers: dict[str, list[Callable[[Case], Solver]]] = {
        "torchdiffeq": [lambda c, gradient=gradient: torchdiffeq(c, gradient) for gradient in gradients],
        "scipy": [Scipy],
        "torchode": [torchode],
        "diffrax": [lambda c, control=control: Diffrax(c, control) for control in case.controls],
    }
    for package in case.peers:
        if installed(package):
            makers += peers[package]
    return makers


def reference(case: Case) -> tuple[Result, Result]:
    """The end and the gradients by the stepper: a higher order at a tighter tolerance in float64."""
    kept = [parameter.data for parameter in case.parameters]
    for parameter in case.parameters:
        parameter.data = parameter.data.double()
    try:
        y0 = case.y0.double().clone().requires_grad_(case.gradients)
        args = tuple(x.double() for x in case.args)
        end, tol = case.check_end or case.end, max(min(case.rtol, case.atol) * 1e-4, 1e-13)
        solution = odenet_cuda.solve(case.field, y0, [0.0, end], args=args, method="dopri8", rtol=tol, atol=tol)
        found = solution.ys[-1]
        if not case.gradients:
            return [found.detach()], []
        return [found.detach()], list(torch.autograd.grad(found.square().mean(), [y0, *case.parameters]))
    finally:
        for parameter, data in zip(case.parameters, kept, strict=True):
            parameter.data = data


def error(found: Result, expected: Result) -> float:
    pairs = [(x.double() - y).abs().max() / y.abs().max() for x, y in zip(found, expected, strict=True)]
    return float(max(pairs))


def seconds(call: Callable[[], Any], number: int = 1) -> float:
    begin = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - begin) / number


def verified(case: Case, library: ctypes.CDLL) -> tuple[list[Solver], list[dict[str, Any]], list[dict[str, Any]]]:
    """The solvers that are accurate and their rows; the rows of the others."""
    expected, gradients = reference(case)
    found: list[tuple[Solver, dict[str, Any]]] = []
    failed: list[dict[str, Any]] = [{"": package, "note": "not installed"} for package in case.peers if not installed(package)]
    for make in makers_of(case, library):
        solver = None
        try:
            solver = make(case)
            checked = solver if case.check_end is None else make(replace(case, end=case.check_end))
            row: dict[str, Any] = {"": solver.label, "control": solver.control}
            row |= {"gradient": solver.gradient if case.gradients else "", "norm": solver.norm}
            row["error"] = error(checked.tensors(checked.forward()), expected)
            if solver.training is not None:
                row["of gradients"] = error(solver.tensors(solver.training()), gradients)
            found.append((solver, row))
        except Exception as problem:  # of a library: a row, while ours ends the run
            if solver is None or solver.label == "compiled":
                raise
            failed.append({"": solver.label, "note": f"raised {type(problem).__name__}"})
    for name in ("error", "of gradients"):
        errors = [row[name] for _, row in found if name in row]
        limit = 10 * statistics.median(errors) if errors else 0.0
        for solver, row in list(found):
            if name in row and not row[name] <= limit:
                if solver.label == "compiled" and solver.gradient != "adjoint":
                    raise SystemExit(f"{case.name}: the compiled field errs by {row[name]:.2g}: {row}")
                row["note"] = "not accurate"
                if name == "error":
                    found.remove((solver, row))
                    failed.append(row)
    return [solver for solver, _ in found], [row for _, row in found], failed


def bench(case: Case, library: ctypes.CDLL, runs: int, budget: float) -> list[dict[str, Any]]:
    solvers, rows, failed = verified(case, library)
    timings: dict[str, dict[Solver, Samples]] = {"forward": {}, "training": {}}
    for kind, samples in timings.items():
        calls: dict[Solver, Callable[[], Any]] = {}
        for solver in solvers:
            call = solver.training if kind == "training" else solver.forward if solver.gradient != "adjoint" else None
            if call is not None:
                calls[solver], samples[solver] = call, Samples()
        once = {solver: seconds(call) for solver, call in calls.items()}
        warm = {solver: seconds(call) if once[solver] < _SHORT else once[solver] for solver, call in calls.items()}
        numbers = {solver: max(1, min(20, int(_SHORT / taken))) for solver, taken in warm.items()}
        begin, run = time.perf_counter(), 0
        while run < 3 or (run < runs and time.perf_counter() - begin < budget):
            for solver, call in calls.items():
                if run and once[solver] > budget / 4:
                    continue  # some take many seconds: once is enough
                if warm[solver] < _SHORT:
                    call()
                samples[solver].add(s=seconds(call, numbers[solver]))
            run += 1
    for solver, row in zip(solvers, rows, strict=True):
        if isinstance(solver, Diffrax):
            solver.count()
        counts = {"steps": solver.steps, "mean": solver.mean, "nfe": solver.nfe}
        row |= {name: value for name, value in counts.items() if value is not None}
        for kind, samples in timings.items():
            if solver not in samples:
                continue
            row[f"{kind} ms"] = samples[solver].median("s") * 1e3
            same = next((s for s in samples if s.label == "compiled" and alike(s, solver, kind)), None)
            if same is not None and same is not solver:
                row[f"{kind} / ours"] = row[f"{kind} ms"] / (samples[same].median("s") * 1e3)
    return rows + failed


def alike(ours: Solver, other: Solver, kind: str) -> bool:
    """Whether both do the same: step control, and in training the kind of gradient."""
    return ours.control == other.control and (
        kind == "forward" or (ours.gradient == "adjoint") == (other.gradient == "adjoint")
    )


def arithmetic(case: Case, nfe: int, forward: float) -> dict[str, float]:
    """GFLOP/s of the linear layers in a forward solve, and of torch's matrix product of 1,024."""
    x = torch.randn(1024, 1024)
    best = statistics.median(seconds(lambda: x @ x) for _ in range(10))
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
            solver.forward()  # OpenMP starts its threads anew where their number changes
            samples[threads].add(s=seconds(solver.forward, 5))
    torch.set_num_threads(before)
    times = {threads: s.median("s") for threads, s in samples.items()}
    return {"": case.name, "one thread ms": times[1] * 1e3, "two ms": times[2] * 1e3, "ratio": times[1] / times[2]}


_CHILD = """
import time, torch, odenet_cuda
from torch import nn
class Field(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2))
    def forward(self, t, y):
        return self.net(y)
torch.set_num_threads(1)
y = torch.randn(8, 2, requires_grad=True)
Field(4)(None, y).sum().backward()  # torch has started
for width in (16, 24):
    field, times = odenet_cuda.compile(Field(width)), []
    for _ in range(5):
        begin = time.perf_counter()
        odenet_cuda.solve(field, y, [0.0, 1.0], rtol=1e-3, atol=1e-3).ys[-1].sum().backward()
        times.append(time.perf_counter() - begin)
    assert field.explain() == "compiled", field.explain()
    print(times[0] - min(times[1:]))
"""
_CHILD_DIFFRAX = """
import time, jax, jax.numpy as jnp, diffrax
def solve(p, y0):
    field = lambda t, y, p: jnp.tanh(y @ p[0] + p[1]) @ p[2] + p[3]
    control = diffrax.PIDController(rtol=1e-3, atol=1e-3)
    return diffrax.diffeqsolve(
        diffrax.ODETerm(field), diffrax.Dopri5(), 0.0, 1.0, None, y0, p, stepsize_controller=control).ys[-1].sum()
y = jax.random.normal(jax.random.key(0), (8, 2))
jax.block_until_ready(y @ y.T)  # JAX has started
for width in (16, 24):
    p = tuple(jnp.ones(shape) * 0.1 for shape in ((2, width), (width,), (width, 2), (2,)))
    gradients, times = jax.jit(jax.grad(solve, argnums=(0, 1))), []
    for _ in range(5):
        begin = time.perf_counter()
        jax.block_until_ready(gradients(p, y))
        times.append(time.perf_counter() - begin)
    print(times[0] - min(times[1:]))
"""


def compile_time() -> list[dict[str, Any]]:
    """Seconds from a first solve to its gradient, less those of a later one; in processes of their own."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        children = [("compiled, cache empty", _CHILD), ("compiled, cache full", _CHILD)]
        if installed("diffrax"):
            children.append(("diffrax", _CHILD_DIFFRAX))
        for name, child in children:
            env = {**os.environ, "ODENET_CACHE": folder}
            out = subprocess.run([sys.executable, "-c", child], env=env, check=True, capture_output=True, text=True).stdout
            first, second = map(float, out.split())
            rows.append({"": name, "first of a process s": first, "second, another width s": second})
    return rows


def in_use(budget: float) -> list[dict[str, Any]]:
    """What a field costs as it is used, beside its solves: guards at every call, and comparisons with func now and then, whose
    share is that of all solves in so many seconds after the first twelve."""
    rows = []
    for name, widths, batch in (("mlp 3-16-3", (3, 16, 3), 16), ("mlp 3-64-64-3", (3, 64, 64, 3), 1024)):
        layers = [part for pair in pairwise(widths) for part in (nn.Linear(*pair), nn.Tanh())]
        net, y0 = nn.Sequential(*layers[:-1]), torch.randn(batch, 3)
        field, state = odenet_cuda.compile(lambda t, y, net=net: net(y)), Structure(y0)
        solve = partial(odenet_cuda.solve, field, y0, [0.0, 1.0], rtol=1e-5, atol=1e-5)
        clock, compare = Clock(), recheck._difference
        with torch.no_grad():
            seconds(solve, 12)
            recheck._difference = clock.wrap(compare)
            begin, solves = time.perf_counter(), 0
            while (total := time.perf_counter() - begin) < budget:
                solve()
                solves += 1
            recheck._difference = compare
            guards = min(seconds(partial(field.plan, state, (), False), 200) for _ in range(5))
        assert field.explain() == "compiled", field.explain()
        row = {"": f"{name}, batch {batch}", "solve ms": (total - clock.seconds) / solves * 1e3, "guards us": guards * 1e6}
        rows.append({**row, "comparisons": clock.calls, "share %": 100 * clock.seconds / total})
    return rows


def start_jax(threads: int) -> None:
    """JAX with so many threads: the pool has one for each core that the process may use when it is made."""
    if threads == 1:
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    if not installed("jax"):
        return
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    if cores:
        os.sched_setaffinity(0, set(sorted(cores)[:threads]))
    importlib.import_module("jax").devices()
    for thread in os.listdir("/proc/self/task") if cores else ():
        os.sched_setaffinity(int(thread), cores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer trajectories and runs")
    parser.add_argument("--json", help="also write the results there")
    parser.add_argument("--threads", type=int, default=1, help="of torch and JAX, 1 unless given")
    parser.add_argument("--runs", type=int, help="at most; default 50, quick 5")
    parser.add_argument("--cases", nargs="+", help="those whose names begin so")
    arguments = parser.parse_args()
    start_jax(arguments.threads)
    torch.set_num_threads(arguments.threads)
    runs, budget = arguments.runs or (5 if arguments.quick else 50), 1.0 if arguments.quick else 8.0
    print_machine()
    missing = [name for name in PACKAGES if not installed(name)]
    if missing:
        print("not installed: " + ", ".join(missing))
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        library = compile_by_hand(folder)
        chosen = [c for c in cases(arguments.quick) if not arguments.cases or any(map(c.name.startswith, arguments.cases))]
        for case in chosen:
            rows = bench(case, library, runs, budget)
            print_table(
                f"{case.name}, {arguments.threads} thread(s), rtol {case.rtol}, atol {case.atol}, t to {case.end}", rows
            )
            results[case.name] = rows
            if case.name.startswith("mlp"):
                results["peak"] = arithmetic(case, rows[0]["nfe"], rows[0]["forward ms"] / 1e3)
                print(", ".join(f"{name} {value:.3g}" for name, value in results["peak"].items()))
            if case.name == "lotka-volterra":
                results["threads"] = two_threads(case, runs)
                print_table("two threads", [results["threads"]])
    if not arguments.cases or any(map("compile-time".startswith, arguments.cases)):
        results["compile-time"] = compile_time()
        print_table("compile-time: forward and backward of an MLP 2-16-2, then 2-24-2", results["compile-time"])
    if not arguments.cases or any(map("in-use".startswith, arguments.cases)):
        results["in-use"] = in_use(2.0 if arguments.quick else 10.0)
        print_table("in-use: guards, and comparisons with func", results["in-use"])
    save(arguments.json, results)


if __name__ == "__main__":
    main()
