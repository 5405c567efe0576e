"""Forward solves, and forward and backward, beside every other library that is installed, in the same run.

    python benchmarks/bench_peers.py [--json FILE] [--runs N] [--quick] [--device cpu|cuda]

All solve by dopri5 at one tolerance in float32. Those that take one step size for the batch are compared with our joint
control, those that take one for each sample with our per-sample control. A library is verified before it is timed, against
torchdiffeq's dopri8 in float64 at a tighter tolerance; one that is missing, raises or errs is a row that says so.
"""

import argparse
import copy
import dataclasses
from typing import Any

import torch
from fields import MLP, ConvolutionField, LotkaVolterra
from measure import elapsed, find_device, interleave, print_machine, print_table, save
from peers import LIBRARIES, OURS, OURS_PER_SAMPLE, Case
from torch import Tensor

try:
    import torchdiffeq
except ImportError:
    raise SystemExit("this benchmark compares with torchdiffeq: pip install 'odenet-cuda[bench]'") from None

THREADS = torch.get_num_threads()
BOUNDS = {"forward": 1e2, "training": 3e2}  # allowed relative error over the tolerance; kinks in a field cost gradients more


def cases(quick: bool, device: str) -> list[Case]:
    torch.manual_seed(0)
    made = []
    for batch in (1, 64) if quick else (1, 64, 4096):
        populations = 1 + 9 * torch.rand(batch, 2)
        made.append(Case(f"formula, Lotka-Volterra, {batch} x 2", LotkaVolterra(), populations, 10.0, 1e-5))
        made.append(Case(f"MLP 8-32-8, {batch} x 8", MLP(), torch.randn(batch, 8), 10.0, 1e-5))
        if batch < 4096 and not quick:
            block = torch.randn(batch, 64, 6, 6)
            made.append(Case(f"convolution block, {batch} x 64 x 6 x 6", ConvolutionField(), block, 1.0, 1e-3, 1e-1))
    return [dataclasses.replace(case, field=case.field.to(device), y0=case.y0.to(device)) for case in made]


def reference(case: Case) -> dict[str, list[Tensor]]:
    """For each direction what it should give: the state at the end, or the gradients, by a higher order and in float64."""
    field, y0 = copy.deepcopy(case.field).double(), case.y0.double().requires_grad_()
    t, tol = torch.tensor([0.0, case.end], dtype=torch.float64, device=y0.device), case.tol * case.tight
    landing = {"step_t": t[-1:]}  # else it reads the end from an interpolant of order 4
    y1 = torchdiffeq.odeint(field, y0, t, rtol=tol, atol=tol, method="dopri8", options=landing)[-1]
    return {
        "forward": [y1.detach()],
        "training": list(torch.autograd.grad(y1.square().mean(), [y0, *field.parameters()])),
    }


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """|found - expected| / |expected|, of all tensors together, by the Euclidean norm."""
    if [x.shape for x in found] != [x.shape for x in expected]:
        raise RuntimeError(f"shapes {[tuple(x.shape) for x in found]}, not {[tuple(x.shape) for x in expected]}")
    found, expected = (torch.cat([x.detach().double().cpu().flatten() for x in tensors]) for tensors in (found, expected))
    return float((found - expected).norm() / expected.norm())


def bench_case(case: Case, direction: str, expected: list[Tensor], runs: int, device: str) -> dict[str, Any]:
    bound = BOUNDS[direction] * case.tol
    ready, status, found = {}, {}, {}
    for library in LIBRARIES:
        if not library.installed():
            status[library.label] = "not installed"
            continue
        try:
            solver = library.solver(case, library.per_sample)
            call = getattr(solver, direction)
            error = relative_error(solver.tensors(call()), expected)
            if not error < bound:
                raise RuntimeError(f"relative error {error:.2g}, more than {bound:.2g}")
            found[library.label] = {"error": error, "nfe": solver.evaluations()}
        except Exception as failure:  # whatever another library raises belongs into the table
            if library in (OURS, OURS_PER_SAMPLE):
                raise
            status[library.label] = f"failed: {type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"
            continue
        ready[library.label] = lambda call=call: {"total": elapsed(call, device)}
    samples = interleave(ready, runs, warmup=1)
    rows, results = [], {}
    for library in LIBRARIES:
        label = library.label
        if label in status:
            rows.append({"": label, "status": status[label]})
            results[label] = {"status": status[label]}
            continue
        base = OURS_PER_SAMPLE if library.per_sample else OURS
        ratio = samples[label].median("total") / samples[base.label].median("total")
        rows.append({"": label, **samples[label].milliseconds(), **found[label], "/ ours": ratio})
        results[label] = {**found[label], "ratio": ratio, **samples[label].summary()}
    print_table(f"{case.name}, tolerance {case.tol:g}, {direction}", rows)
    return results


def bench_peers(runs: int, quick: bool = False, device: str = "cpu", path: str | None = None) -> dict[str, Any]:
    """path: where the results are also written, after each case."""
    torch.set_num_threads(THREADS)
    print(f"\ndopri5, float32, {device}, {THREADS} threads; / ours: time over ours with the same step control")
    results: dict[str, Any] = {}
    for case in cases(quick, device):
        expected = reference(case)
        directions = ("forward",) if quick else ("forward", "training")
        results[case.name] = {name: bench_case(case, name, expected[name], runs, device) for name in directions}
        save(path, {"peers": results})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="also write the results there")
    parser.add_argument("--runs", type=int, help="runs of each case; 7 unless given, 3 with --quick")
    parser.add_argument("--quick", action="store_true", help="batches 1 and 64, forward, without the convolution block")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    device = find_device(arguments.device)
    print_machine()
    runs = arguments.runs or (3 if arguments.quick else 7)
    bench_peers(runs, arguments.quick, device, arguments.json)


if __name__ == "__main__":
    main()
