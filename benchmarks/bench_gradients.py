"""What each way to differentiate a solve costs, and how exact it is, beside torchdiffeq in the same run.

    python benchmarks/bench_gradients.py [--json FILE] [--runs N] [--quick] [--threads N] [--device cpu|cuda]

A small MLP on a state of 64 x 8 is solved from 0 to 16 by dopri5 in 4 to 1,024 equal steps, forced with first_step = min_step =
max_step and counted. All ways take the same steps forwards, and those that solve backwards take as many there. Columns:

    error y0, theta  of dL/dy0 and of all parameters' gradients, in float64, relative to those of dopri8 at 1e-12
    kept KiB         storage alive between forward and backward pass: what the way keeps, with y0, the result, the parameters;
                     on CUDA all that torch's allocator has given out
    peak KiB         the most that is alive in the backward pass
    total ms         forward and backward, float32, with its least and most
    bound ms         what func and its vector-Jacobian products take of it: no solver that calls them as often can be faster
    share            bound / total
    solver us/step   the rest, for each step forwards
    func calls       in both passes, those for steps made again included

Our products are counted where they happen, as are those of torchdiffeq's adjoint. Its direct gradient is one walk of autograd:
each product counts there as one by autograd's engine alone, measured beside, so that its solver time is less exact. On CUDA the
total is between events and func's time that of its calls on the host: what the GPU still works then counts as the solver's.
"""

import argparse
import copy
import gc
from collections.abc import Callable
from typing import Any

import torch
from bench_odeint import product_seconds
from fields import MLP
from live_storage import kept_and_peak_storage
from measure import Samples, TimedField, elapsed, find_device, interleave, print_machine, print_table, save, timed_products
from torch import Tensor, nn

import odenet_cuda
from odenet_cuda.settings import GRADIENTS

try:
    import torchdiffeq
except ImportError:
    raise SystemExit("this benchmark compares with torchdiffeq: pip install 'odenet-cuda[bench]'") from None

Way = Callable[[nn.Module, Tensor, Tensor, dict[str, float]], Tensor]  # (field, y0, t, forced steps) -> y at the end

END = 16.0  # and numbers of steps that are powers of two: the ends of all steps are exact
DIRECT, ADJOINT = "torchdiffeq odeint", "torchdiffeq odeint_adjoint"
BACKWARD_SOLVES = ("adjoint", "adjoint, seminorm", "quadrature", ADJOINT)
RATIOS = {"adjoint": ADJOINT, "direct": DIRECT, "checkpoint": DIRECT}  # ours: torchdiffeq's that it is held against
# Gradients of the same discrete solve: how far they may be apart, relatively, in float32 and in float64.
AGREE = {
    ("checkpoint", "direct"): (1e-5, 1e-12),
    ("checkpoint, 8", "direct"): (1e-5, 1e-12),
    (DIRECT, "direct"): (1e-4, 1e-11),
    ("adjoint, seminorm", "adjoint"): (1e-4, 1e-11),
    (ADJOINT, "adjoint"): (1e-3, 1e-11),
}


def ours(gradient: str, **arguments: Any) -> Way:
    def solve(field: nn.Module, y0: Tensor, t: Tensor, forced: dict[str, float]) -> Tensor:
        return odenet_cuda.solve(field, y0, t, gradient=gradient, **forced, **arguments).ys[-1]

    return solve


def theirs(interface: str) -> Way:
    def solve(field: nn.Module, y0: Tensor, t: Tensor, forced: dict[str, float]) -> Tensor:
        return getattr(torchdiffeq, interface)(field, y0, t, method="dopri5", options=forced)[-1]

    return solve


def ways() -> dict[str, Way]:
    made = {
        "direct": ours("direct"),
        "adjoint": ours("adjoint"),
        "adjoint, seminorm": ours("adjoint", adjoint_options={"norm": "seminorm"}),
        "checkpoint": ours("checkpoint"),
        "checkpoint, 8": ours("checkpoint", max_checkpoints=8),
    }
    if "quadrature" in GRADIENTS:
        made["quadrature"] = ours("quadrature")
    return {**made, DIRECT: theirs("odeint"), ADJOINT: theirs("odeint_adjoint")}


class Steps(nn.Module):
    """A field that counts the steps accepted and rejected, forwards and backwards: both packages know these callbacks."""

    def __init__(self, field: nn.Module):
        super().__init__()
        self.field, self.accepted, self.rejected, self.accepted_backward = field, 0, 0, 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.field(t, y)

    def callback_accept_step(self, t: Tensor, y: Tensor, dt: Tensor) -> None:
        self.accepted += 1

    def callback_accept_step_adjoint(self, t: Tensor, y: Any, dt: Tensor) -> None:
        self.accepted_backward += 1

    def callback_reject_step(self, t: Tensor, y: Any, dt: Tensor) -> None:
        self.rejected += 1

    callback_reject_step_adjoint = callback_reject_step


class Problem:
    """The field, the state at the start and the times, in one type."""

    def __init__(self, field: nn.Module, y0: Tensor, dtype: torch.dtype):
        self.field, self.y0 = copy.deepcopy(field).to(dtype), y0.to(dtype)
        self.t = torch.tensor([0.0, END], dtype=dtype, device=y0.device)

    def loss(self, way: Way, field: nn.Module, y0: Tensor, steps: int) -> Tensor:
        h = END / steps
        return way(field, y0, self.t, {"first_step": h, "min_step": h, "max_step": h}).square().sum()

    def gradients(self, way: Way, field: nn.Module, steps: int) -> list[Tensor]:
        """dL/dy0, and the parameters' in one vector."""
        y0 = self.y0.clone().requires_grad_()
        self.field.zero_grad()
        self.loss(way, field, y0, steps).backward()
        return [y0.grad, torch.cat([p.grad.flatten() for p in self.field.parameters()])]

    def reference(self) -> list[Tensor]:
        def accurate(field: nn.Module, y0: Tensor, t: Tensor, forced: dict[str, float]) -> Tensor:
            return odenet_cuda.solve(field, y0, t, method="dopri8", rtol=1e-12, atol=1e-12).ys[-1]

        return self.gradients(accurate, self.field, 1)


def difference(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]


def verified_gradients(problem: Problem, steps: int) -> dict[str, list[Tensor]]:
    """The gradients by every way, whose steps are counted and which must agree where they are those of the same steps."""
    found = {}
    for name, way in ways().items():
        counted = Steps(problem.field)
        found[name] = problem.gradients(way, counted, steps)
        made = counted.accepted, counted.rejected, counted.accepted_backward
        if made != (steps, 0, steps if name in BACKWARD_SOLVES else 0):
            raise SystemExit(f"{name} took {made[0]} steps, {made[1]} rejected, {made[2]} backwards, where {steps} were forced")
    for (name, expected), limits in AGREE.items():
        apart = max(difference(found[name], found[expected]))
        if not apart <= limits[problem.y0.dtype == torch.float64]:
            raise SystemExit(f"gradients of {name} and {expected} are {apart:.2g} apart, {steps} steps of {problem.y0.dtype}")
    return found


def storage(problem: Problem, way: Way, steps: int) -> tuple[int, int]:
    """Bytes alive between the passes, and at most in the backward pass."""
    y0 = problem.y0.clone().requires_grad_()
    problem.field.zero_grad()

    def forward() -> Tensor:
        return problem.loss(way, problem.field, y0, steps)

    if not y0.is_cuda:
        return kept_and_peak_storage(forward, Tensor.backward)
    loss = forward()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    kept = torch.cuda.memory_allocated()
    loss.backward()
    torch.cuda.synchronize()
    return kept, torch.cuda.max_memory_allocated()


def timed(name: str, way: Way, problem: Problem, field: TimedField, steps: int) -> Callable[[], dict[str, float]]:
    def run() -> dict[str, float]:
        product = product_seconds(field, problem.y0, 20) if name == DIRECT else 0.0
        y0 = problem.y0.clone().requires_grad_()
        problem.field.zero_grad()
        field.clock.reset()
        with timed_products() as products:
            total = elapsed(lambda: problem.loss(way, field, y0, steps).backward(), y0.device.type)
        bound = field.clock.seconds + products.seconds + field.clock.calls * product
        return {"total": total, "bound": bound, "solver": total - bound, "calls": field.clock.calls}

    return run


def bench(steps: int, runs: int, device: str) -> dict[str, Any]:
    torch.manual_seed(0)
    field, y0 = MLP().to(device), torch.randn(64, 8).to(device)
    exact, problem = Problem(field, y0, torch.float64), Problem(field, y0, torch.float32)
    reference = exact.reference()
    errors = {name: difference(found, reference) for name, found in verified_gradients(exact, steps).items()}
    verified_gradients(problem, steps)
    memory = {name: storage(problem, way, steps) for name, way in ways().items()}
    clocked = TimedField(problem.field)
    samples = interleave({name: timed(name, way, problem, clocked, steps) for name, way in ways().items()}, runs, warmup=1)
    rows: list[dict[str, Any]] = []
    results: dict[str, Any] = {}
    for name, sample in samples.items():
        (error_y0, error_theta), (kept, peak) = errors[name], memory[name]
        figures = {"error_y0": error_y0, "error_theta": error_theta, "kept_bytes": kept, "peak_bytes": peak}
        share, solver = sample.median("bound") / sample.median("total"), sample.median("solver") / steps
        results[name] = {**figures, "share": share, "solver_step": solver, **sample.summary()}
        rows.append(
            {
                "": name,
                "error y0": f"{error_y0:.1e}",
                "theta": f"{error_theta:.1e}",
                "kept KiB": kept / 2**10,
                "peak KiB": peak / 2**10,
                **sample.milliseconds(),
                "bound ms": sample.median("bound") * 1e3,
                "share": share,
                "solver us/step": solver * 1e6,
                "func calls": int(sample.median("calls")),
            }
        )
    print_table(f"{steps} steps: 64 x 8, MLP 8-32-8, dopri5, {runs} runs in turn", rows)
    return {**results, "ratio": {name: ratio(samples[name], samples[other]) for name, other in RATIOS.items()}}


def ratio(sample: Samples, other: Samples) -> dict[str, float]:
    return {key: other.median(key) / sample.median(key) for key in ("solver", "total")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="also write the results there")
    parser.add_argument(
        "--runs", type=int, help="runs of each way (a quarter from 256 steps on); 20 unless given, 5 with --quick"
    )
    parser.add_argument("--quick", action="store_true", help="4 and 64 steps alone")
    parser.add_argument("--threads", type=int, default=1, help="of torch, 1 unless given: the state is small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    device = find_device(arguments.device)
    torch.set_num_threads(arguments.threads)
    print_machine()
    runs, results = arguments.runs or (5 if arguments.quick else 20), {}
    for steps in (4, 64) if arguments.quick else (4, 16, 64, 256, 1024):
        results[str(steps)] = bench(steps, runs if steps < 256 else max(3, runs // 4), device)
    rows = []
    for name, other in RATIOS.items():
        ratios = {f"{key}, {n}": of["ratio"][name][key] for key in ("solver", "total") for n, of in results.items()}
        rows.append({"": f"{other} / {name}", **ratios})
    print_table("torchdiffeq's time over ours, by the number of steps", rows)
    save(arguments.json, {"gradients": results})


if __name__ == "__main__":
    main()
