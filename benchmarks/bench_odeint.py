"""Solver time a step and in total, forwards and backwards, beside torchdiffeq in the same run.

    python benchmarks/bench_odeint.py [small] [convolution] [rows] [memory] [peers] [--json FILE] [--runs N] [--quick]

Solver time is the total minus what func and its vector-Jacobian products take, counted in the same run. Where torchdiffeq's
backward pass is one walk of autograd through everything (its direct gradient), the products are measured alone and taken off.
Each comparison is verified first: both results against a reference, at the same tolerance. Part peers, beside every other
library that is installed, is benchmarks/bench_peers.py.
"""

import argparse
import time
from typing import Any

import torch
from bench_peers import bench_peers
from fields import MLP, ConvolutionField
from measure import Samples, TimedField, find_device, interleave, print_machine, print_table, save, timed_products
from torch import nn

import odenet_cuda
from odenet_cuda import products

try:
    import torchdiffeq
except ImportError:
    raise SystemExit("this benchmark compares with torchdiffeq: pip install 'odenet-cuda[bench]'") from None


def product_seconds(field: nn.Module, y: torch.Tensor, repeats: int) -> float:
    """Median seconds of autograd's engine in one vector-Jacobian product of func with its parameters, alone."""
    product, t = Samples(), torch.tensor(0.5)
    for _ in range(repeats):
        x = y.detach().requires_grad_()
        k = field(t, x)
        inputs, cotangents = [x, *field.parameters()], [torch.ones_like(k)]
        begin = time.perf_counter()
        products.product([k], inputs, cotangents, False)
        product.add(s=time.perf_counter() - begin)
    return product.median("s")


def forward_case(module: Any, field: TimedField, y0: torch.Tensor, t: torch.Tensor, tol: float):
    def run() -> dict[str, float]:
        field.clock.reset()
        with torch.no_grad():
            begin = time.perf_counter()
            module.odeint(field, y0, t, rtol=tol, atol=tol)
            total = time.perf_counter() - begin
        return {
            "total": total,
            "func": field.clock.seconds,
            "solver": total - field.clock.seconds,
            "nfe": field.clock.calls,
        }

    return run


def adjoint_case(module: Any, field: TimedField, y0: torch.Tensor, t: torch.Tensor, tol: float):
    def run() -> dict[str, float]:
        y = y0.clone().requires_grad_()
        ys = module.odeint_adjoint(field, y, t, rtol=tol, atol=tol)
        loss = ys[-1].square().sum()
        field.clock.reset()
        with timed_products() as products:
            begin = time.perf_counter()
            loss.backward()
            total = time.perf_counter() - begin
        inside = field.clock.seconds + products.seconds
        return {"total": total, "func": inside, "solver": total - inside, "nfe": field.clock.calls}

    return run


def direct_case(field: TimedField, y0: torch.Tensor, t: torch.Tensor, tol: float, product: float):
    """torchdiffeq's direct gradient, whose products are part of one pass of autograd: each counts as one alone."""

    def run() -> dict[str, float]:
        y = y0.clone().requires_grad_()
        field.clock.reset()
        begin = time.perf_counter()
        torchdiffeq.odeint(field, y, t, rtol=tol, atol=tol)[-1].square().sum().backward()
        total = time.perf_counter() - begin
        inside = field.clock.seconds + field.clock.calls * product
        return {"total": total, "func": inside, "solver": total - inside, "nfe": field.clock.calls}

    return run


def training_case(module: Any, interface: str, field: TimedField, y0: torch.Tensor, t: torch.Tensor, tol: float):
    solve = getattr(module, interface)

    def run() -> dict[str, float]:
        y = y0.clone().requires_grad_()
        field.clock.reset()
        with timed_products() as products:
            begin = time.perf_counter()
            solve(field, y, t, rtol=tol, atol=tol)[-1].square().sum().backward()
            total = time.perf_counter() - begin
        inside = field.clock.seconds + products.seconds
        return {"total": total, "func": inside, "solver": total - inside, "nfe": field.clock.calls}

    return run


def compare(title: str, cases: dict[str, Any], steps: float, runs: int) -> dict[str, Any]:
    """Runs ours and theirs in turn; the ratio of solver time a step is what the small-state promise is about."""
    samples = interleave(cases, runs)
    rows = []
    for name, sample in samples.items():
        rows.append(
            {
                "": name,
                "total ms": sample.median("total") * 1e3,
                "func ms": sample.median("func") * 1e3,
                "solver us/step": sample.median("solver") / steps * 1e6,
                "nfe": int(sample.median("nfe")),
            }
        )
    ours, theirs = samples["odenet_cuda"], samples["torchdiffeq"]
    ratios = {key: theirs.median(key) / ours.median(key) for key in ("total", "solver")}
    share = ours.median("solver") / ours.median("total")
    print_table(title, rows)
    print(
        f"torchdiffeq / odenet_cuda: total {ratios['total']:.2f}, solver {ratios['solver']:.2f}; our solver's share {share:.1%}"
    )
    return {
        "ratio": ratios,
        "share": share,
        "steps": steps,
        **{name: sample.summary() for name, sample in samples.items()},
    }


def verify(field: nn.Module, y0: torch.Tensor, t: torch.Tensor, tol: float, factor: float) -> None:
    with torch.no_grad():
        reference = odenet_cuda.odeint(field, y0, t, method="dopri8", rtol=tol * 1e-2, atol=tol * 1e-2)[-1]
        for module in (odenet_cuda, torchdiffeq):
            error = (module.odeint(field, y0, t, rtol=tol, atol=tol)[-1] - reference).abs().max()
            assert error < factor * tol * (1 + reference.abs().max()), f"{module.__name__} errs by {error}"


def bench_small(runs: int, quick: bool) -> dict[str, Any]:
    """64 x 8, a small MLP, float32, one thread, joint dopri5."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    field = TimedField(MLP())
    y0, tol = torch.randn(64, 8), 1e-5
    results = {}
    for end in (10.0,) if quick else (10.0, 100.0):
        t = torch.tensor([0.0, end])
        verify(field, y0, t, tol, 1e3)
        with torch.no_grad():
            stats = odenet_cuda.solve(field, y0, t, rtol=tol, atol=tol).stats
        steps = stats.num_accepted + stats.num_rejected
        modules = {"odenet_cuda": odenet_cuda, "torchdiffeq": torchdiffeq}
        product = product_seconds(field, y0, 200)
        title = f"64 x 8, MLP 8-32-8, float32, one thread, {steps} steps of joint dopri5"
        results[f"forward_{steps}"] = compare(
            f"{title}: forward, no_grad",
            {n: forward_case(m, field, y0, t, tol) for n, m in modules.items()},
            steps,
            runs,
        )
        results[f"adjoint_{steps}"] = compare(
            f"{title}: backward by the adjoint",
            {n: adjoint_case(m, field, y0, t, tol) for n, m in modules.items()},
            steps,
            runs,
        )
        results[f"direct_{steps}"] = compare(
            f"{title}: forward and backward, direct",
            {
                "odenet_cuda": training_case(odenet_cuda, "odeint", field, y0, t, tol),
                "torchdiffeq": direct_case(field, y0, t, tol, product),
            },
            steps,
            runs,
        )
    return results


def bench_convolution(runs: int, quick: bool) -> dict[str, Any]:
    """The ODE-Net block of torchdiffeq's MNIST example: 64 channels, 6 x 6, batch 128 (quick: 16), tolerance 1e-3."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    field = TimedField(ConvolutionField())
    batch = 16 if quick else 128
    y0, t, tol = torch.randn(batch, 64, 6, 6), torch.tensor([0.0, 1.0]), 1e-3
    verify(field, y0, t, tol, 1e2)
    with torch.no_grad():
        stats = odenet_cuda.solve(field, y0, t, rtol=tol, atol=tol).stats
    steps = stats.num_accepted + stats.num_rejected
    modules = {"odenet_cuda": odenet_cuda, "torchdiffeq": torchdiffeq}
    title = f"convolution block 64 x 6 x 6, batch {batch}, float32, two threads, {steps} steps"
    results = {
        "forward": compare(
            f"{title}: forward", {n: forward_case(m, field, y0, t, tol) for n, m in modules.items()}, steps, runs
        )
    }
    for name, interface in () if quick else (("adjoint", "odeint_adjoint"), ("direct", "odeint")):
        results[name] = compare(
            f"{title}: forward and backward, {name}"
            + (" (func: without torchdiffeq's products, which autograd runs)" if name == "direct" else ""),
            {n: training_case(m, interface, field, y0, t, tol) for n, m in modules.items()},
            steps,
            runs,
        )
    return results


def bench_rows(runs: int, quick: bool) -> dict[str, Any]:
    """Van der Pol, 256 rows, mu from 0.1 to 20, tolerance 1e-6, t from 0 to 20: joint against per-sample step control."""
    torch.set_num_threads(1)
    mu = torch.linspace(0.1, 20, 256, dtype=torch.float64)[:, None]

    def field(t: torch.Tensor, y: torch.Tensor, mu: torch.Tensor = mu) -> torch.Tensor:
        x, v = y[:, :1], y[:, 1:]
        return torch.cat([v, mu * (1 - x * x) * v - x], 1)

    y0 = torch.tensor([[2.0, 0.0]], dtype=torch.float64).repeat(256, 1)
    arguments = {"rtol": 1e-6, "atol": 1e-6}
    samples, rows = Samples(), []
    with torch.no_grad():
        for _ in range(1 if quick else max(3, runs // 4)):
            for control in ("joint", "per_sample"):
                begin = time.perf_counter()
                solution = odenet_cuda.solve(field, y0, [0.0, 20.0], step_control=control, **arguments)
                samples.add(**{control: time.perf_counter() - begin})
                if control == "joint":
                    joint = solution
        alone, stride = [], 51 if quick else 5
        identical = True
        for row in range(0, 256, stride):
            single = odenet_cuda.solve(
                lambda t, y, row=row: field(t, y, mu[row : row + 1]),
                y0[row : row + 1],
                [0.0, 20.0],
                step_control="per_sample",
                **arguments,
            )
            alone.append(int(single.stats.num_accepted + single.stats.num_rejected))
            identical &= bool(torch.equal(single.ys[-1, 0], solution.ys[-1, row]))
    per_row = (solution.stats.num_accepted + solution.stats.num_rejected)[::stride].double()
    difference = ((per_row - torch.tensor(alone)).abs() / torch.tensor(alone)).max().item()
    total = solution.stats.num_accepted + solution.stats.num_rejected
    rows.append({"": "joint", "steps": joint.stats.num_accepted + joint.stats.num_rejected, "s": samples.median("joint")})
    rows.append({"": "per sample, longest row", "steps": int(total.max()), "s": samples.median("per_sample")})
    rows.append({"": "per sample, mean", "steps": float(total.double().mean())})
    rows.append({"": "each row alone, mean", "steps": sum(alone) / len(alone)})
    print_table("van der Pol, 256 rows, mu 0.1 to 20, 1e-6, t 0 to 20", rows)
    print(
        f"steps of a row against the row alone: at most {difference:.1%} apart"
        f"; the results of {len(alone)} rows alone are the same to the bit: {identical}"
    )
    return {"rows": rows, "difference": difference, "identical": identical}


def bench_memory(runs: int, quick: bool) -> dict[str, Any]:
    """Live storage of a training step as the number of steps grows, counted in a child process with forced steps."""
    import subprocess
    import sys

    rows, results = [], {}
    for gradient in ("adjoint",) if quick else ("adjoint", "direct"):
        for steps in (8, 128) if quick else (8, 32, 128):
            output = subprocess.run(
                [sys.executable, __file__, "--child-memory", gradient, str(steps)],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            results[f"{gradient}_{steps}"] = float(output)
            rows.append({"": gradient, "steps": steps, "live MiB": float(output) / 2**20})
    print_table("live storage of a training step, state 256 x 64, MLP 64-256-64, rk4", rows)
    print(f"adjoint, 16 times the steps: {results['adjoint_128'] / results['adjoint_8']:.3f} times the storage")
    return results


def child_memory(gradient: str, steps: int) -> None:
    from live_storage import peak_live_storage

    torch.manual_seed(0)
    block = odenet_cuda.ODEBlock(MLP(64, 256), method="rk4", step_size=1 / steps, gradient=gradient, compile=False)
    y0 = torch.randn(256, 64)
    block(y0).square().sum().backward()  # gradients and caches exist from here on
    print(peak_live_storage(lambda: block(y0).square().sum().backward()))


def main() -> None:
    parts = {"small": bench_small, "convolution": bench_convolution, "rows": bench_rows, "memory": bench_memory}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(parts)}, peers; all unless given")
    parser.add_argument("--json", help="also write the results there")
    parser.add_argument("--runs", type=int, help="runs of each case (fewer for the slow ones); 20 unless given, 5 with --quick")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases: a look at each question")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of part peers; the others time the CPU")
    parser.add_argument("--child-memory", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child_memory:
        child_memory(arguments.child_memory[0], int(arguments.child_memory[1]))
        return
    device, quick = find_device(arguments.device), arguments.quick
    parts["peers"] = lambda runs, quick: bench_peers(runs, quick, device)
    unknown = set(arguments.parts) - set(parts)
    if unknown:
        parser.error(f"unknown part {unknown.pop()!r}; there are {', '.join(parts)}")
    print_machine()
    results = {}
    all_runs = arguments.runs or (5 if quick else 20)
    for name in arguments.parts or parts:
        runs = all_runs if name == "small" else max(3, all_runs // 4)
        results[name] = parts[name](runs, quick)
    save(arguments.json, results)


if __name__ == "__main__":
    main()
