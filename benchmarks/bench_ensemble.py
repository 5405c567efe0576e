"""Ensembles and nets of many samples, compiled, beside other libraries: what a GPU is for.

    python benchmarks/bench_ensemble.py [rivals] [lorenz] [nets] [--json FILE] [--runs N] [--limit S] [--quick]
                                        [--device cuda|cpu]

`rivals`: see bench_rivals.py. `lorenz`: trajectories with a parameter of their own; rk4 takes 1,000 steps over [0, 10], dopri5
goes over [0, 1] at 1e-6, each with its own steps. `nets`: a net of the state's size under dopri5 at 1e-4, each sample with its
own steps in the compiled rows, all with one in the others. float32; a result is held against torchdiffeq's first. Columns:

    total ms         between CUDA events, with least and most
    ratio            that row's total over the compiled field's
    GFLOP/s, share   arithmetic of the rk4 row by the count below, and its share of the card's peak
    published        seconds published for as many trajectories on a V100 (15.7 TFLOP/s), times 15.7 over this card's peak, over
                     ours: above 1 ours is ahead for each FLOP/s. MPGOS and DiffEqGPU.jl: Utkarsh et al. 2023, arXiv:2304.06835

A way that takes longer than --limit seconds is timed once, and not tried at larger sizes. The loop of JAX runs on the device
that JAX has, which its row names. With --device cpu everything runs, at a thousandth of the size.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from bench_rivals import bench_rivals, lorenz
from bench_rivals import compiled_solves as compiled_rivals
from fields import MLP
from measure import Samples, elapsed, find_device, interleave, print_machine, print_table, save
from torch import Tensor, nn

import odenet_cuda

STEPS = 1000
END = 10.0
FLOPS = 4 * 9 + 3 * 6 + 3 * 8  # a step of rk4: four slopes, three stages, the sum
PUBLISHED = {8_400_000: {"MPGOS": 0.094, "DiffEqGPU.jl": 0.145}, 8: {"MPGOS": 0.0021, "DiffEqGPU.jl": 0.00023}}
PUBLISHED_PEAK = 15.7e12
TRAJECTORIES = [8, 1_000, 10_000, 100_000, 1_000_000, 8_400_000]
NETS = ((2, 50), (64, 128))  # the state's width and the hidden layer's
BATCHES = [64, 1_024, 8_192, 65_536]
Way = Callable[[], Tensor]


@dataclass
class Settings:
    """limit: seconds. slow: ways that took longer, by problem."""

    device: str
    runs: int
    limit: float
    slow: dict[str, set[str]] = field(default_factory=dict)


def peak(device: str) -> float | None:
    """float32 operations a second that the card can make: 128 lanes a multiprocessor, two in a multiplication with addition."""
    if device == "cpu":
        return None
    properties = torch.cuda.get_device_properties(0)
    return properties.multi_processor_count * 128 * 2 * properties.clock_rate * 1e3


def compiled(field: Any, y0: Tensor, end: float, args: tuple[Tensor, ...], matmul: str = "float32", **options: Any) -> Way:
    func = odenet_cuda.compile(field, cuda=True, matmul=matmul)

    def solve() -> Tensor:
        y = odenet_cuda.solve(func, y0, [0.0, end], args=args, **options).ys[-1]
        if func.explain() != "compiled":
            raise NotImplementedError(func.explain())
        return y

    return solve


def stepper(field: Any, y0: Tensor, end: float, args: tuple[Tensor, ...], **options: Any) -> Way:
    return lambda: odenet_cuda.solve(field, y0, [0.0, end], args=args, **options).ys[-1]


def torchdiffeq(field: Any, y0: Tensor, end: float, args: tuple[Tensor, ...], **options: Any) -> Way:
    library = __import__("torchdiffeq")
    t = torch.tensor([0.0, end], device=y0.device)
    if "step_size" in options:
        options["options"] = {"step_size": options.pop("step_size")}
    return lambda: library.odeint(lambda t, y: field(t, y, *args), y0, t, **options)[-1]


def jax_lorenz(y0: Tensor, rho: Tensor) -> tuple[str, Way]:
    """1,000 steps of rk4 in one compiled loop. Raises ImportError without JAX."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory too
    import jax

    jnp = jax.numpy

    def slope(y: Any, r: Any) -> Any:
        return jnp.stack([10 * (y[1] - y[0]), y[0] * (r - y[2]) - y[1], y[0] * y[1] - 8 / 3 * y[2]])

    def step(_: int, y: Any, r: Any, h: float = END / STEPS) -> Any:
        k1 = slope(y, r)
        k2 = slope(y + h / 2 * k1, r)
        k3 = slope(y + h / 2 * k2, r)
        return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(y + h * k3, r))

    solve = jax.jit(lambda y, r: jax.lax.fori_loop(0, STEPS, lambda i, x: step(i, x, r), y))
    start, ratios = jnp.asarray(y0.cpu().numpy().T), jnp.asarray(rho[:, 0].cpu().numpy())

    def run() -> Tensor:
        return torch.from_numpy(__import__("numpy").array(jax.block_until_ready(solve(start, ratios)))).T

    return f"JAX loop, {jax.devices()[0].platform}", run


def ways_of_lorenz(y0: Tensor, rho: Tensor, adaptive: bool) -> dict[str, Way]:
    if adaptive:
        own = {"rtol": 1e-6, "atol": 1e-6}
        return {
            "compiled": compiled(lorenz, y0, 1.0, (rho,), step_control="per_sample", **own),
            "torchdiffeq": torchdiffeq(lorenz, y0, 1.0, (rho,), method="dopri5", **own),
        }
    grid = {"method": "rk4", "step_size": END / STEPS}
    made = {
        "compiled": compiled(lorenz, y0, END, (rho,), **grid),
        "captured": stepper(lorenz, y0, END, (rho,), cuda_graph=True, **grid),
        "torchdiffeq": torchdiffeq(lorenz, y0, END, (rho,), **grid),
    }
    try:
        name, way = jax_lorenz(y0, rho)
    except ImportError:
        return made
    return {**made, name: way}


def ways_of_net(field: nn.Module, y0: Tensor, card: bool) -> dict[str, Way]:
    own = {"rtol": 1e-4, "atol": 1e-4}
    rounded = ("tf32", "bf16") if card else ()
    return {
        "compiled": compiled(field, y0, 1.0, (), step_control="per_sample", **own),
        **{f"compiled, {m}": compiled(field, y0, 1.0, (), m, step_control="per_sample", **own) for m in rounded},
        "compiled, joint": compiled(field, y0, 1.0, (), **own),
        "step loop": stepper(field, y0, 1.0, (), **own),
        "captured": stepper(field, y0, 1.0, (), cuda_graph=True, **own),
        "torchdiffeq": torchdiffeq(field, y0, 1.0, (), method="dopri5", **own),
    }


def bench(title: str, problem: str, ways: dict[str, Way], apart: float, settings: Settings) -> dict[str, Any]:
    """problem: under which slow ways are remembered. apart: how far results may be from torchdiffeq's, by the median."""
    expected, served, results = None, {}, dict[str, Any]()
    slow, device = settings.slow.setdefault(problem, set()), settings.device
    with torch.no_grad():
        for name in sorted(ways, key=lambda name: name != "torchdiffeq"):
            if name in slow:
                results[name] = {"note": "too slow at a smaller size"}
                continue
            try:
                found = ways[name]().to("cpu", torch.float64)
            except (NotImplementedError, torch.OutOfMemoryError, ImportError) as error:
                results[name] = {"note": f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"}
                continue
            expected = found if expected is None else expected
            distance = float((found - expected).abs().median() / expected.abs().median())
            if not distance <= apart * (5 if name.endswith("bf16") else 1):
                raise SystemExit(f"{title}: {name} is {distance:.2g} from torchdiffeq, by the median")
            seconds = elapsed(ways[name], device)
            if seconds <= settings.limit:
                served[name] = ways[name]
                continue
            slow.add(name)
            results[name] = Samples({"total": [seconds]}).summary()
        timed = {name: (lambda way=way: {"total": elapsed(way, device)}) for name, way in served.items()}
        results |= {name: found.summary() for name, found in interleave(timed, settings.runs, warmup=1).items()}
    if "total" in results.get("compiled", {}):
        for result in results.values():
            if "total" in result:
                result["ratio"] = result["total"]["median"] / results["compiled"]["total"]["median"]
    return results


def rows_of(results: dict[str, Any], more: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name, result in results.items():
        row: dict[str, Any] = {"": name}
        if "total" in result:
            row |= {f"{key} ms": result["total"][key] * 1e3 for key in ("median", "min", "max")}
        row |= {key: result[key] for key in ("ratio", "note") if key in result}
        rows.append(row | (more if name == "compiled" and "total" in result else {}))
    return rows


def arithmetic(count: int, seconds: float, device: str) -> dict[str, Any]:
    """What the rk4 row reaches, and how that stands to what was published."""
    found: dict[str, Any] = {"GFLOP/s": count * STEPS * FLOPS / seconds / 1e9}
    most = peak(device)
    if most is not None:
        found["share"] = found["GFLOP/s"] * 1e9 / most
        for name, published in PUBLISHED.get(count, {}).items():
            found[f"published, {name}"] = published * PUBLISHED_PEAK / most / seconds
    return found


def lorenz_ensembles(device: str, quick: bool, scale: int) -> Iterator[tuple[str, str, int, Callable[[], dict[str, Way]]]]:
    """Title, problem, number of trajectories and ways, by size. scale: what sizes are divided by."""
    made = set()
    for count in TRAJECTORIES[: 2 if quick else None]:
        count = max(8, count // scale)
        if count in made:
            continue
        made.add(count)
        rho = torch.linspace(0, 21, count, device=device)[:, None]
        y0 = torch.ones(count, 3, device=device) + 0.1 * torch.randn(count, 3, device=device)
        for kind in ("rk4", "dopri5"):
            ways = lambda y0=y0, rho=rho, kind=kind: ways_of_lorenz(y0, rho, kind == "dopri5")  # noqa: E731
            yield f"lorenz, {kind}, {count:,} trajectories", kind, count, ways


def nets(device: str, quick: bool, card: bool) -> Iterator[tuple[str, str, Callable[[], dict[str, Way]]]]:
    for width, hidden in NETS:
        for batch in BATCHES[: 1 if quick else None]:
            if not card and batch > 1_024:
                continue
            net, y0 = MLP(width, hidden).to(device), torch.randn(batch, width, device=device)
            problem = f"net {width}-{hidden}-{width}"
            yield f"{problem}, batch {batch:,}", problem, lambda net=net, y0=y0: ways_of_net(net, y0, card)


def compiled_solves() -> Iterator[tuple[str, Way]]:
    """Those that gpu_prepare compiles beforehand, of tensors of the CPU."""
    yield from compiled_rivals()
    for title, _, *_, ways in chain(lorenz_ensembles("cpu", quick=False, scale=1), nets("cpu", quick=False, card=True)):
        yield from ((f"{title}: {name}", way) for name, way in ways().items() if name.startswith("compiled"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="*", metavar="PROBLEM", help="rivals, lorenz, nets; all unless given")
    parser.add_argument("--json", help="also write the results there, after each problem")
    parser.add_argument("--runs", type=int, default=5, help="of each way")
    parser.add_argument("--limit", type=float, default=20.0, help="seconds; 20 unless given")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes alone")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    problems = arguments.problems or ["rivals", "lorenz", "nets"]
    if unknown := set(problems) - {"rivals", "lorenz", "nets"}:
        parser.error(f"there is no problem {unknown.pop()!r}")
    device, quick = find_device(arguments.device), arguments.quick
    settings = Settings(device, arguments.runs, arguments.limit)
    torch.manual_seed(0)
    print_machine()
    results: dict[str, Any] = {}

    def add(title: str, found: dict[str, Any]) -> None:
        results[title] = found
        save(arguments.json, {"ensemble": results})

    if "rivals" in problems:
        bench_rivals(device, quick, settings.runs, add)
    scale = 1000 if device == "cpu" else 1
    if "lorenz" in problems:
        for title, problem, count, ways in lorenz_ensembles(device, quick, scale):
            found = bench(title, problem, ways(), 1e-3, settings)
            total = found.get("compiled", {}).get("total")
            more = arithmetic(count, total["median"], device) if total and problem == "rk4" else {}
            print_table(title, rows_of(found, more))
            add(title, {**found, **more})
    if "nets" in problems:
        for title, problem, made in nets(device, quick, device == "cuda"):
            found = bench(title, problem, made(), 1e-2, settings)
            print_table(title, rows_of(found, {}))
            add(title, found)


if __name__ == "__main__":
    main()
