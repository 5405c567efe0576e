"""Robertson's kinetics, one trajectory and many with rates of their own, in one run: our compiled field and stepper, diffrax's
Kvaerno5 under vmap where it is installed, and a loop over scipy's Radau; and the gradients for the rates by the first three.

    python benchmarks/bench_stiff_ensemble.py [--json FILE] [--runs N] [--quick]

To t = 1e5; rtol 1e-8 for one trajectory and 1e-6 for many, atol 1e-8 times that, for the second species is small. Each result
is compared with a solve at a hundredth of the tolerance before anything is timed. What takes long is measured on fewer
trajectories and multiplied, which is said. One thread of torch and one of XLA; seconds on the processor.
"""

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import torch
from measure import interleave, print_machine, print_table, save
from peers import diffrax_installed
from torch import Tensor, nn

import odenet_cuda

try:
    from scipy.integrate import solve_ivp
except ImportError:
    raise SystemExit("this benchmark compares with scipy: pip install 'odenet-cuda[bench]'") from None

END = 1e5
# (rates [batch, 3], rtol) -> states at the end [batch, 3], or the gradients of the sum of all but their second for the rates
Solve = Callable[[np.ndarray, float], np.ndarray]


class Robertson(nn.Module):
    def forward(self, t: Tensor, y: Tensor, k: Tensor) -> Tensor:
        a, b, c = y.unbind(1)
        first, second, third = k[:, 0] * a, k[:, 1] * b * b, k[:, 2] * b * c
        return torch.stack([third - first, first - second - third, second], 1)


def rates_of(batch: int) -> np.ndarray:
    factors = 2.0 ** np.linspace(-1, 1, batch) if batch > 1 else np.ones(1)
    return np.array([[0.04, 3e7, 1e4]]) * factors[:, None] ** np.array([1.0, -1.0, 0.5])


def ours(compiled: bool, gradient: bool = False) -> Solve:
    field: Any = odenet_cuda.compile(Robertson()) if compiled else Robertson()

    def run(k: np.ndarray, rtol: float) -> np.ndarray:
        y0 = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64).repeat(len(k), 1)
        rates = torch.from_numpy(k).requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            solution = odenet_cuda.solve(
                field, y0, [0.0, END], args=(rates,), method="rodas5p", rtol=rtol, atol=rtol * 1e-8,
                step_control="per_sample", compile=None if compiled else False,
            )  # fmt: skip
        assert solution.engine == ("compiled" if compiled else "stepper"), solution.explanation
        if not gradient:
            return solution.ys[-1].numpy()
        return torch.autograd.grad(solution.ys[-1, :, ::2].sum(), rates)[0].numpy()

    return run


def scipy(k: np.ndarray, rtol: float) -> np.ndarray:
    def slope(t: float, y: np.ndarray, k1: float, k2: float, k3: float) -> list[float]:
        first, second, third = k1 * y[0], k2 * y[1] * y[1], k3 * y[1] * y[2]
        return [third - first, first - second - third, second]

    return np.array(
        [solve_ivp(slope, (0, END), [1, 0, 0], "Radau", rtol=rtol, atol=rtol * 1e-8, args=row).y[:, -1] for row in k]
    )


def diffrax(gradient: bool = False) -> Solve:
    import diffrax as library
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)

    def slope(t: Any, y: Any, k: Any) -> Any:
        first, second, third = k[0] * y[0], k[1] * y[1] * y[1], k[2] * y[1] * y[2]
        return jnp.stack([third - first, first - second - third, second])

    def solve(k: Any, rtol: Any) -> Any:
        def one(row: Any) -> Any:
            solution = library.diffeqsolve(
                library.ODETerm(slope), library.Kvaerno5(), 0.0, END, None, jnp.array([1.0, 0.0, 0.0]), row,
                stepsize_controller=library.PIDController(rtol=rtol, atol=rtol * 1e-8), max_steps=100_000,
                saveat=library.SaveAt(t1=True), **how,
            )  # fmt: skip
            return solution.ys[0]

        return jax.vmap(one)(k)

    how = {"adjoint": library.RecursiveCheckpointAdjoint(checkpoints=500)} if gradient else {}
    call = jax.jit(jax.grad(lambda k, rtol: solve(k, rtol)[:, ::2].sum()) if gradient else solve)
    return lambda k, rtol: np.asarray(call(jnp.asarray(k), rtol))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="also write the results there")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a hundred trajectories instead of 10,000")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print_machine()
    solvers: dict[str, tuple[Solve, int]] = {  # and with how many trajectories it is measured, at most
        "odenet_cuda, compiled": (ours(True), 10_000),
        "odenet_cuda, stepper": (ours(False), 1_000),
        **({"diffrax, Kvaerno5": (diffrax(), 100)} if diffrax_installed() else {}),
        "scipy, Radau": (scipy, 20),
    }
    gradients: dict[str, tuple[Solve, int]] = {
        "odenet_cuda, compiled": (ours(True, True), 10_000),
        "odenet_cuda, stepper": (ours(False, True), 100),
        **({"diffrax, Kvaerno5": (diffrax(True), 100)} if diffrax_installed() else {}),
    }
    many = 100 if arguments.quick else 10_000
    results = {}
    for title, found in (("Robertson to 1e5", solvers), ("with the gradients for the rates", gradients)):
        results[title] = [
            row for batch, rtol in ((1, 1e-8), (many, 1e-6)) for row in compared(found, batch, rtol, arguments.runs)
        ]
        print_table(title, results[title])
    save(arguments.json, results)


def compared(solvers: dict[str, tuple[Solve, int]], batch: int, rtol: float, runs: int) -> list[dict[str, Any]]:
    """A row for each of these; the first is what the others are held against."""
    reference = next(iter(solvers.values()))[0]
    calls = {}
    for name, (solve, most) in solvers.items():
        k = rates_of(batch)[:: max(1, batch // most)][:most]
        expected = reference(k, rtol * 1e-2)
        error = float((np.abs(solve(k, rtol) - expected) / np.abs(expected)).max())
        if error > 1e3 * rtol:
            raise SystemExit(f"{name} errs by {error:.1e} at rtol {rtol:.0e}")
        calls[name] = k, rtol, solve, error

    def timed(k: np.ndarray, rtol: float, solve: Solve, error: float) -> dict[str, float]:
        begin = time.process_time()
        solve(k, rtol)
        return {"seconds": time.process_time() - begin}

    samples = interleave({name: lambda call=call: timed(*call) for name, call in calls.items()}, runs, warmup=1)
    rows: list[dict[str, Any]] = []
    for name, (k, _, _, error) in calls.items():
        seconds = samples[name].median("seconds") * batch / len(k)
        rows.append(
            {
                "trajectories": batch,
                "": name + ("" if len(k) == batch else f" (from {len(k)})"),
                "largest error / rtol": error / rtol,
                "ms": 1e3 * seconds,
                "over ours, compiled": 1e3 * seconds / (rows[0]["ms"] if rows else 1e3 * seconds),
            }
        )
    return rows


if __name__ == "__main__":
    main()
