"""What the examples of the gallery share: their options, their progress, and how they are timed beside torchdiffeq."""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    import matplotlib

    matplotlib.use("Agg")
    from tqdm import tqdm
except ImportError as error:
    raise SystemExit(f"the examples need {error.name}: pip install matplotlib tqdm") from None

from matplotlib import pyplot as plt

__all__ = ["beside", "options", "plt", "progress", "save"]


def options(doc: str | None) -> argparse.Namespace:
    """short: seconds instead of minutes, for the tests. compare: also time torchdiffeq. out: the folder of the picture."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--compare", action="store_true", help="also time the same under torchdiffeq")
    parser.add_argument("--out", type=Path, default=Path("demo_results"), help="folder of the picture (demo_results)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    return arguments


def progress(steps: Iterable[Any], name: str) -> Any:
    return tqdm(steps, desc=name, unit="step", mininterval=0.5)


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"picture: {path}")


def beside(what: str, ours: Callable[[], Tensor], theirs: Callable[[Any], Tensor], tolerance: float, runs: int = 5) -> None:
    """Times both in turn, after a call of each whose results must agree to this. theirs: is given the module torchdiffeq."""
    try:
        import torchdiffeq
    except ImportError:
        raise SystemExit("--compare needs torchdiffeq: pip install torchdiffeq") from None
    calls = {"odenet_cuda": ours, "torchdiffeq": lambda: theirs(torchdiffeq)}
    found = [call().detach() for call in calls.values()]
    difference = float((found[0] - found[1]).abs().max() / found[1].abs().max())
    assert difference < tolerance, f"the results differ by {difference:.2g}"
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begin)
    ms = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    ratio = ms["torchdiffeq"] / ms["odenet_cuda"]
    print(f"{what}: odenet_cuda {ms['odenet_cuda']:.3g} ms, torchdiffeq {ms['torchdiffeq']:.3g} ms, {ratio:.3g} times as long")
