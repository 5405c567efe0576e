"""Ensembles and nets of many samples, compiled, beside other libraries: what a GPU is for.

    python benchmarks/bench_ensemble.py [--json FILE] [--runs N] [--quick] [--device cuda|cpu]

`lorenz, rk4`: trajectories with a parameter of their own take 1,000 steps of rk4 over [0, 10]; `lorenz, dopri5`: each with its
own steps, over [0, 1] at 1e-6. `net`: a net of the state's size under dopri5 at 1e-4, each sample with its own steps in the
compiled rows, all with one in the others. float32; a result is held against torchdiffeq's first. Columns:

    total ms         between CUDA events, with least and most
    ratio            that row's total over the compiled field's
    GFLOP/s, share   arithmetic of the rk4 row by the count below, and its share of the card's peak
    published        seconds published for as many trajectories on a V100 (15.7 TFLOP/s), times 15.7 over this card's peak, over
                     ours: above 1 ours is ahead for each FLOP/s. MPGOS and DiffEqGPU.jl: Utkarsh et al. 2023, arXiv:2304.06835

The loop of JAX runs on the device that JAX has, which its row names. With --device cpu everything runs, at a thousandth of the
size.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from fields import MLP
from measure import Samples, elapsed, find_device, interleave, print_machine, print_table, save
from torch import Tensor, nn

import odenet_cuda

STEPS = 1000
END = 10.0
FLOPS = 4 * 9 + 3 * 6 + 3 * 8  # a step of rk4: four slopes, three stages, the sum
PUBLISHED = {8_400_000: {"MPGOS": 0.094, "DiffEqGPU.jl": 0.145}, 8: {"MPGOS": 0.0021, "DiffEqGPU.jl": 0.00023}}
PUBLISHED_PEAK = 15.7e12
LIMIT_S = 20.0  # a way that takes longer than this at one size is not tried at larger ones
Way = Callable[[], Tensor]


def lorenz(t: Tensor, y: Tensor, rho: Tensor) -> Tensor:
    a, b, c = y.unbind(-1)
    return torch.stack([10 * (b - a), a * (rho[:, 0] - c) - b, a * b - 8 / 3 * c], -1)


def peak(device: str) -> float | None:
    """float32 operations a second that the card can make: 128 lanes a multiprocessor, two in a multiplication with addition."""
    if device == "cpu":
        return None
    properties = torch.cuda.get_device_properties(0)
    return properties.multi_processor_count * 128 * 2 * properties.clock_rate * 1e3


def compiled(field: Any, y0: Tensor, end: float, args: tuple[Tensor, ...], matmul: str = "float32", **options: Any) -> Way:
    func = odenet_cuda.compile(field, cuda=y0.is_cuda, matmul=matmul)

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


def ways_of_net(field: nn.Module, y0: Tensor) -> dict[str, Way]:
    own = {"rtol": 1e-4, "atol": 1e-4}
    rounded = ("tf32", "bf16") if y0.is_cuda else ()
    return {
        "compiled": compiled(field, y0, 1.0, (), step_control="per_sample", **own),
        **{f"compiled, {m}": compiled(field, y0, 1.0, (), m, step_control="per_sample", **own) for m in rounded},
        "compiled, joint": compiled(field, y0, 1.0, (), **own),
        "step loop": stepper(field, y0, 1.0, (), **own),
        "captured": stepper(field, y0, 1.0, (), cuda_graph=True, **own),
        "torchdiffeq": torchdiffeq(field, y0, 1.0, (), method="dopri5", **own),
    }


def bench(title: str, ways: dict[str, Way], slow: set[str], limit: float, runs: int, device: str) -> dict[str, Any]:
    """slow: ways that took too long at a smaller size; those found here are added. limit: how far results may be apart."""
    expected, served, notes = None, {}, {}
    with torch.no_grad():
        for name in sorted(ways, key=lambda name: name != "torchdiffeq"):
            if name in slow:
                notes[name] = "too slow at a smaller size"
                continue
            try:
                found = ways[name]().to("cpu", torch.float64)
            except (NotImplementedError, torch.OutOfMemoryError, ImportError) as error:
                notes[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
                continue
            expected = found if expected is None else expected
            apart = float((found - expected).abs().median() / expected.abs().median())
            if not apart <= limit * (5 if name.endswith("bf16") else 1):
                raise SystemExit(f"{title}: {name} is {apart:.2g} from torchdiffeq, by the median")
            served[name] = ways[name]
            if elapsed(ways[name], device) > LIMIT_S:
                slow.add(name)
        timed = {name: (lambda way=way: {"total": elapsed(way, device)}) for name, way in served.items()}
        samples: dict[str, Samples] = interleave(timed, runs, warmup=1)
    base = samples["compiled"].median("total") if "compiled" in samples else None
    results: dict[str, Any] = {name: {"note": note} for name, note in notes.items()}
    for name, sample in samples.items():
        results[name] = sample.summary() | ({} if base is None else {"ratio": sample.median("total") / base})
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="also write the results there")
    parser.add_argument("--runs", type=int, default=5, help="of each way")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes alone")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    device, runs = find_device(arguments.device), arguments.runs
    torch.manual_seed(0)
    print_machine()
    scale = 1000 if device == "cpu" else 1
    results: dict[str, Any] = {}
    slow: dict[str, set[str]] = {}
    for count in [8, 1_000, 10_000, 100_000, 1_000_000, 8_400_000][: 2 if arguments.quick else None]:
        count = max(8, count // scale)
        rho = torch.linspace(0, 21, count, device=device)[:, None]
        y0 = torch.ones(count, 3, device=device) + 0.1 * torch.randn(count, 3, device=device)
        for kind, adaptive in (("rk4", False), ("dopri5", True)):
            title = f"lorenz, {kind}, {count:,} trajectories"
            if title in results:
                continue
            found = bench(title, ways_of_lorenz(y0, rho, adaptive), slow.setdefault(kind, set()), 1e-3, runs, device)
            total = found.get("compiled", {}).get("total")
            more = arithmetic(count, total["median"], device) if total and not adaptive else {}
            print_table(title, rows_of(found, more))
            results[title] = {**found, **more}
    for width, hidden in ((2, 50), (64, 128)):
        for batch in [64, 1_024, 8_192, 65_536][: 1 if arguments.quick else None]:
            if device == "cpu" and batch > 1_024:
                continue
            title = f"net {width}-{hidden}-{width}, batch {batch:,}"
            ways = ways_of_net(MLP(width, hidden).to(device), torch.randn(batch, width, device=device))
            found = bench(title, ways, slow.setdefault(title.split(",")[0], set()), 1e-2, runs, device)
            print_table(title, rows_of(found, {}))
            results[title] = found
    save(arguments.json, {"ensemble": results})


if __name__ == "__main__":
    main()
