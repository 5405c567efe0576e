"""First contact of the Python side with a GPU: every way to solve and to differentiate, small, beside the same on the CPU.

    python benchmarks/gpu_smoke.py [--device cuda|cpu] [--seconds 20] [--only WORDS]

One line of JSON a case, written at once: how far it is `apart` from the CPU, relatively, and whether that is `good`. A case
that takes longer than --seconds is given up, or, where it hangs in the driver, told of with its place. Exit status: 0, 1 where
a case is not good, 3 where the context on the card is lost.
"""

import argparse
import faulthandler
import json
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import odenet_cuda
from odenet_cuda import solve
from odenet_cuda.graphed.capture import graphs

F64, F32 = torch.float64, torch.float32
TIGHT = {"rtol": 1e-7, "atol": 1e-7}
SMALL = {"sizes": (4, 8, 4), "batch": 6, "dtype": F64}
ALONE = {**SMALL, "batch": 20_000}  # a thread a sample
WIDE = {"sizes": (18, 64, 18), "batch": 300, "dtype": F32}  # several threads a sample
LOOSE = {"rtol": 1e-4, "atol": 1e-4}
GRID = {"method": "rk4", "step_size": 0.05}


class Field(nn.Module):
    """A net with tanh between its layers, and the time."""

    def __init__(self, sizes: tuple[int, ...], dtype: torch.dtype):
        super().__init__()
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for columns, rows in pairwise(sizes):
            layers += [nn.Linear(columns, rows), nn.Tanh()]
        self.net = nn.Sequential(*layers[:-1]).to(dtype)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y) - t * y


def once(
    device: str,
    sizes: tuple[int, ...],
    batch: int,
    dtype: torch.dtype,
    gradient: str | None = None,
    compiled: dict[str, str] | None = None,
    **options: Any,
) -> list[Tensor]:
    """The outputs, and the gradients of the start and of the weights. compiled: options of compile. What is captured is solved
    three times, so that it is replayed too."""
    field = Field(sizes, dtype).to(device).requires_grad_(gradient is not None)
    func: Any = field if compiled is None else odenet_cuda.compile(field, cuda=True, **compiled)
    torch.manual_seed(1)
    y0 = torch.randn(batch, sizes[0], dtype=dtype).to(device).requires_grad_(gradient is not None)
    found: list[Tensor] = []
    for _ in range(3 if "cuda_graph" in options else 1):
        ys = solve(func, y0, [0.0, 0.3, 1.0], gradient=gradient or "adjoint", **options).ys
        found = [ys.detach()]
        if gradient is not None:
            found += torch.autograd.grad(ys.square().sum(), [y0, *field.parameters()])
    if compiled is not None and func.explain() != "compiled":
        raise RuntimeError(func.explain())
    return [x.cpu().double() for x in found]


def on_the_cpu(**options: Any) -> list[Tensor]:
    """The same by the step loop. What `direct` records of a captured step are states, as checkpoint's."""
    if options.pop("cuda_graph", None) and options.get("gradient") == "direct" and "method" not in options:
        options["gradient"] = "checkpoint"
    options.pop("compiled", None)
    return once("cpu", **options)


def cases() -> Iterator[tuple[str, float, dict[str, Any]]]:
    """Name, how far apart it may be, and the arguments of `once`."""
    for control in ("joint", "per_sample"):
        small = {**SMALL, **TIGHT, "step_control": control}
        yield f"forward, {control}", 1e-6, small
        for gradient in ("adjoint", "direct", "checkpoint", "quadrature"):
            yield f"{gradient}, {control}", 1e-4, {**small, "gradient": gradient}
    yield "rk4, direct", 1e-10, {**SMALL, **GRID, "gradient": "direct"}
    for graph in (True, "loop"):
        for control in ("joint", "per_sample"):
            small = {**SMALL, **TIGHT, "step_control": control, "cuda_graph": graph}
            yield f"graph {graph}, forward, {control}", 1e-6, small
            yield f"graph {graph}, adjoint, {control}", 1e-4, {**small, "gradient": "adjoint"}
    for gradient in ("direct", "checkpoint", "adjoint"):
        yield f"graph of a grid, {gradient}", 1e-4, {**SMALL, **GRID, "gradient": gradient, "cuda_graph": True}
        yield f"graph of steps, {gradient}", 1e-4, {**SMALL, **TIGHT, "gradient": gradient, "cuda_graph": True}
    for control in ("per_sample", "joint"):
        own: dict[str, Any] = {"step_control": control, "compiled": {}}
        yield f"compiled, a thread a sample, {control}", 1e-5, {**ALONE, **TIGHT, **own, "gradient": "direct"}
        yield f"compiled, several threads, {control}", 1e-3, {**WIDE, **LOOSE, **own, "gradient": "direct"}
        yield f"compiled, several threads, adjoint, {control}", 1e-2, {**WIDE, **LOOSE, **own, "gradient": "adjoint"}
        yield f"compiled, rodas5p, {control}", 1e-5, {**ALONE, **TIGHT, **own, "method": "rodas5p"}
    for matmul, limit in (("tf32", 1e-2), ("bf16", 5e-2)):
        own = {"method": "rk4", "step_size": 0.25, "compiled": {"matmul": matmul}}
        yield f"compiled, {matmul}", limit, {**WIDE, **own, "gradient": "direct"}


def compiled_solves() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Those that gpu_prepare compiles beforehand."""
    for name, _, options in cases():
        if "compiled" in options:
            yield f"smoke: {name}", partial(once, "cpu", **options)


def run_case(name: str, limit: float, options: dict[str, Any], device: str, seconds: int) -> dict[str, Any]:
    begin, result = time.perf_counter(), dict[str, Any](case=name)

    def give_up(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    faulthandler.dump_traceback_later(seconds + 5)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = once(device, **options)
        result["warnings"] = [str(warning.message)[:200] for warning in said][:3]
        expected = on_the_cpu(**options)
        distances = [(a - b).abs().max() / b.abs().max().clamp_min(1e-300) for a, b in zip(found, expected, strict=True)]
        worst = float(torch.stack(distances).max())
        result |= {"apart": worst, "good": worst <= limit}
    except Exception as error:  # the next case may go well
        words = f"{type(error).__name__}: {str(error)[:400]}"
        result |= {"good": False, "error": words, "where": traceback.format_exc()[-600:]}
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
    return {**result, "seconds": round(time.perf_counter() - begin, 2)}


def context_is_lost() -> str | None:
    try:
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").add_(1).cpu()
    except RuntimeError as error:
        return str(error)[:200]
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=int, default=20, help="for each case")
    parser.add_argument("--only", default="", help="cases whose name holds these words")
    arguments = parser.parse_args()
    cuda = arguments.device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise SystemExit("--device cuda needs a GPU that torch can use")
    good = True
    for name, limit, options in cases():
        if arguments.only not in name:
            continue
        result = run_case(name, limit, options, arguments.device, arguments.seconds)
        print(json.dumps(result), flush=True)
        good = good and result["good"]
        if cuda and "error" in result and (words := context_is_lost()):
            print(json.dumps({"case": "the context is lost", "good": False, "error": words}), flush=True)
            return 3
    print(json.dumps({"case": "end", "graphs kept": len(graphs)}), flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
