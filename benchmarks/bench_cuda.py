"""Solves on a GPU: kernels launched, synchronisations and solver time a step, beside torchdiffeq in the same run.

    python benchmarks/bench_cuda.py [--json FILE] [--runs N] [--quick] [--device cuda|cpu]

A small and a larger MLP and the convolution block of torchdiffeq's MNIST example are solved by dopri5 in equal steps, forced
with first_step = min_step = max_step, so that all ways take the same. Forwards alone, and with the gradient by the adjoint and
by the direct way. Each result is held against torchdiffeq's first. Columns:

    total ms         between CUDA events, with least and most
    ratio            torchdiffeq's total over this one
    solver us/step   total without func (and its product) called as often alone, for each step; not of compiled ones
    launches/step    kernels on the device, those of func and its product taken off
    syncs            calls in a whole solve that wait for the device: synchronisations of a stream, a device or an event, and
                     copies to the host's ordinary memory

The counts are from profiles of solves of two lengths: what is launched once a solve is not in them. With --device cpu
everything runs but the counts, to see that it does.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from fields import MLP, ConvolutionField, Counted
from measure import Samples, elapsed, find_device, interleave, print_machine, print_table, save
from torch import Tensor, nn

import odenet_cuda

try:
    import torchdiffeq
except ImportError:
    raise SystemExit("this benchmark compares with torchdiffeq: pip install 'odenet-cuda[bench]'") from None

Way = Callable[[nn.Module, Tensor, int], Tensor]  # (field, y0, steps) -> y at the end
STEPS = 32
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
THEIRS = "torchdiffeq"


def forced(steps: int) -> dict[str, float]:
    h = 1.0 / steps
    return {"first_step": h, "min_step": h, "max_step": h}


def times(y0: Tensor) -> Tensor:
    return torch.tensor([0.0, 1.0], device=y0.device)


def theirs(interface: str) -> Way:
    def solve(field: nn.Module, y0: Tensor, steps: int) -> Tensor:
        return getattr(torchdiffeq, interface)(field, y0, times(y0), method="dopri5", options=forced(steps))[-1]

    return solve


def ours(gradient: str, **options: Any) -> Way:
    def solve(field: nn.Module, y0: Tensor, steps: int) -> Tensor:
        return odenet_cuda.solve(field, y0, [0.0, 1.0], gradient=gradient, **forced(steps), **options).ys[-1]

    return solve


def compiled(gradient: str, field: nn.Module) -> Way:
    func = odenet_cuda.compile(field, cuda=True)

    def solve(_: nn.Module, y0: Tensor, steps: int) -> Tensor:
        y = odenet_cuda.solve(func, y0, [0.0, 1.0], gradient=gradient, **forced(steps)).ys[-1]
        if func.explain() != "compiled":
            raise NotImplementedError(func.explain())
        return y

    return solve


def ways(gradient: str | None, field: nn.Module) -> dict[str, Way]:
    """By name. gradient: None for forwards alone."""
    interface = "odeint_adjoint" if gradient == "adjoint" else "odeint"
    made = {THEIRS: theirs(interface), "ours": ours(gradient or "adjoint")}
    if gradient != "direct":
        made["ours, captured"] = ours(gradient or "adjoint", cuda_graph=True)
        made["ours, repeated by the device"] = ours(gradient or "adjoint", cuda_graph="loop")
    return {**made, "ours, compiled": compiled(gradient or "adjoint", field)}


def call(way: Way, field: nn.Module, y0: Tensor, steps: int, gradient: str | None) -> list[Tensor]:
    """The end, and with a gradient that of y0 and of the parameters."""
    if gradient is None:
        with torch.no_grad():
            return [way(field, y0, steps)]
    start = y0.clone().requires_grad_()
    y = way(field, start, steps)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [start, *field.parameters()])]


def func_seconds(field: nn.Module, y0: Tensor, gradient: str | None, calls: int) -> float:
    """Seconds of one call of func, with its product where one is needed, in a row of them with nothing between."""
    t, cotangent = torch.zeros((), device=y0.device), torch.ones_like(y0)

    def row() -> None:
        for _ in range(calls):
            if gradient is None:
                with torch.no_grad():
                    field(t, y0)
            else:
                y = y0.detach().requires_grad_()
                torch.autograd.grad(field(t, y), [y, *field.parameters()], cotangent)

    row()
    return elapsed(row, y0.device.type) / calls


def profiled(run: Callable[[], Any]) -> tuple[int, int]:
    """(kernels launched, calls that wait for the device) in run()."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        run()
        # Leaving the profile waits for the device itself; that is outside of what is counted.
    kernels = waits = 0
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels += not event.name.startswith(("Memcpy", "Memset"))
            waits += "DtoH" in event.name and "Pageable" in event.name
        waits += event.name in WAITS
    return kernels, waits


def counts(way: Way, field: nn.Module, y0: Tensor, gradient: str | None) -> dict[str, float]:
    """Launches a step, those of func and its product taken off, and what waits in a solve."""
    found, calls = [], []
    for steps in (STEPS, 2 * STEPS):
        counted = Counted(field)
        run = lambda n=steps, f=counted: call(way, f, y0, n, gradient)  # noqa: E731
        run()
        counted.calls = 0
        found.append(profiled(run))
        calls.append(counted.calls)
    (few, waits), (many, _) = found
    alone = profiled(lambda: func_seconds(field, y0, gradient, 10))[0] / 20  # it makes two rows
    return {"launches": (many - few - (calls[1] - calls[0]) * alone) / STEPS, "syncs": waits}


def verified(name: str, found: list[Tensor], expected: list[Tensor], limit: float) -> None:
    for a, b in zip(found, expected, strict=True):
        apart = float((a - b).norm() / b.norm())
        if not apart <= limit:
            raise SystemExit(f"{name} is {apart:.2g} from {THEIRS}, relatively")


def bench(title: str, field: nn.Module, y0: Tensor, gradient: str | None, runs: int) -> dict[str, Any]:
    served, expected, why = {}, None, []
    for name, way in ways(gradient, field).items():
        try:
            found = call(way, field, y0, STEPS, gradient)
        except NotImplementedError as error:
            why.append(f"{name}: {error}")
            continue
        expected = expected or found
        verified(name, found, expected, 1e-3 if gradient == "adjoint" else 1e-4)
        served[name] = way

    def timed(way: Way) -> Callable[[], dict[str, float]]:
        return lambda: {"total": elapsed(lambda: call(way, field, y0, STEPS, gradient), y0.device.type)}

    samples: dict[str, Samples] = interleave({name: timed(way) for name, way in served.items()}, runs)
    # A gradient calls func forwards, and once more with its product for every slope backwards.
    calls = 6 * STEPS + 2
    func = calls * func_seconds(field, y0, None, calls)
    if gradient is not None:
        func += calls * func_seconds(field, y0, gradient, calls)
    rows, results = [], {}
    base = samples[THEIRS].median("total")
    for name, sample in samples.items():
        total = sample.median("total")
        figures = {"ratio": base / total}
        columns: dict[str, Any] = {"ratio": base / total}
        if "compiled" not in name:
            figures["solver_step"] = (total - func) / STEPS
            columns["solver us/step"] = figures["solver_step"] * 1e6
        if y0.is_cuda:
            figures |= counts(served[name], field, y0, gradient)
            columns |= {"launches/step": figures["launches"], "syncs": int(figures["syncs"])}
        results[name] = {**sample.summary(), **figures}
        rows.append({"": name, **sample.milliseconds(), **columns})
    print_table(f"{title}, {gradient or 'forward'}: {STEPS} steps of dopri5, {runs} runs in turn", rows)
    print("\n".join(why))
    return {**results, "func_alone": func, "not served": why}


def cases(quick: bool) -> dict[str, tuple[nn.Module, Tensor]]:
    """Fields and starts, the smallest first."""
    torch.manual_seed(0)
    made: dict[str, tuple[nn.Module, Tensor]] = {"MLP 8-32-8, 64 x 8": (MLP(), torch.randn(64, 8))}
    if not quick:
        made["MLP 64-64-64, 4,096 x 64"] = MLP(64, 64), torch.randn(4096, 64)
        made["convolution block, 128 x 64 x 6 x 6"] = ConvolutionField(), torch.randn(128, 64, 6, 6)
    return made


def compiled_solves() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Those that gpu_prepare compiles beforehand: of the fields that can be read."""
    for title, (field, y0) in cases(quick=False).items():
        for gradient in (None, "adjoint", "direct") if isinstance(field, MLP) else ():
            way = compiled(gradient or "adjoint", field)
            yield f"{title}, {gradient or 'forward'}", partial(call, way, field, y0, STEPS, gradient)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="also write the results there, after each case")
    parser.add_argument("--runs", type=int, help="of each way; 15 unless given, 3 with --quick")
    parser.add_argument("--quick", action="store_true", help="the small MLP alone")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    device = find_device(arguments.device)
    print_machine()
    results: dict[str, Any] = {}
    for title, (field, y0) in cases(arguments.quick).items():
        for gradient in (None, "adjoint", "direct"):
            runs = arguments.runs or (3 if arguments.quick else 15)
            results[f"{title}, {gradient or 'forward'}"] = bench(title, field.to(device), y0.to(device), gradient, runs)
            save(arguments.json, {"cuda": results})


if __name__ == "__main__":
    main()
