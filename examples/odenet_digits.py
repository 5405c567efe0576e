"""An ODE-Net beside a residual network on 1,797 real handwritten digits: accuracy, memory, function evaluations.

    python examples/odenet_digits.py [--seeds 3] [--epochs 16] [--out demo_results] [--tensorboard FOLDER]

Both networks have the same stem and head. Between them one has a stack of residual blocks y + g(y), the other an ODEBlock
whose field is one such block that also sees the time. Training images are shifted at random by up to one pixel. The test
set is looked at once for each training, after its last epoch. Prints tables, saves plots, and exits with status 1 if the
ODE-Net misses its targets.
"""

import argparse
import copy
import gc
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from odenet_cuda import ODEBlock, solve

try:
    import digits_plots
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from tqdm import tqdm
except ImportError as error:
    raise SystemExit(f"the demo needs {error.name}: pip install 'odenet-cuda[demo]'") from None

# How memory is counted and tables are printed is that of the benchmarks.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from live_storage import peak_live_storage
from measure import print_machine, print_table

CHANNELS, GROUPS, RESIDUAL_BLOCKS = 32, 8, 4
BATCH, LEARNING_RATE, WEIGHT_DECAY = 64, 4e-3, 1e-2
TOLERANCE = 1e-3
MEMORY_STEPS = (2, 4, 8, 16, 32)
TRADE_TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
EULER_STEPS = (1, 2, 4, 8, 16, 32, 64, 128)
MEAN_TARGET, WORST_TARGET = 0.98, 0.97


class ResidualBlock(nn.Module):
    """y + g(y), g two convolutions, each after a group normalisation."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(GROUPS, channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(GROUPS, channels), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, y: Tensor) -> Tensor:
        return y + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(y))))))


class Field(nn.Module):
    """dy/dt = g(t, y): the g of a residual block, with the time as one more channel of each convolution.

    SiLU rather than ReLU in both networks: where the field has kinks, an adaptive solver loses its order and takes many
    more steps at tight tolerances.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(GROUPS, channels), nn.Conv2d(channels + 1, channels, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(GROUPS, channels), nn.Conv2d(channels + 1, channels, 3, padding=1)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        time_channel = t * torch.ones_like(y[:, :1])
        y = self.conv1(torch.cat([time_channel, F.silu(self.norm1(y))], 1))
        return self.conv2(torch.cat([time_channel, F.silu(self.norm2(y))], 1))


class Network(nn.Module):
    """Stem, body and head; only the body differs between the two networks."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, CHANNELS, 3, padding=1),
            nn.GroupNorm(GROUPS, CHANNELS),
            nn.SiLU(),
            nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2, padding=1),
        )
        self.body = body
        self.head = nn.Sequential(nn.GroupNorm(GROUPS, CHANNELS), nn.SiLU(), nn.Flatten(), nn.Linear(16 * CHANNELS, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(self.stem(images)))


def residual_network() -> Network:
    return Network(nn.Sequential(*(ResidualBlock(CHANNELS) for _ in range(RESIDUAL_BLOCKS))))


def ode_network() -> Network:
    return Network(ODEBlock(Field(CHANNELS), t=(0.0, 1.0), rtol=TOLERANCE, atol=TOLERANCE, gradient="adjoint"))


NETWORKS = {"residual network": residual_network, "ODE-Net": ode_network}


def load_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images [N, 1, 8, 8] in 0..1 and labels, then those of the test: a quarter, the same for every seed."""
    digits = load_digits()
    split = train_test_split(digits.images, digits.target, test_size=0.25, stratify=digits.target, random_state=0)
    train_x, test_x = (torch.as_tensor(images, dtype=torch.float32)[:, None] / 16 for images in split[:2])
    train_y, test_y = (torch.as_tensor(labels, dtype=torch.int64) for labels in split[2:])
    return train_x, train_y, test_x, test_y


def shifted(images: Tensor) -> Tensor:
    """Each image moved by -1, 0 or 1 pixel along both axes; what comes in at the border is background."""
    windows = F.pad(images[:, 0], (1, 1, 1, 1)).unfold(1, 8, 1).unfold(2, 8, 1)
    down, right = torch.randint(3, (2, len(images)))
    return windows[torch.arange(len(images)), down, right][:, None]


def accuracy(network: Network, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return (network(images).argmax(1) == labels).double().mean().item()


def writer_of(folder: Path | None) -> Any:
    """What writes scalars for TensorBoard into this folder, or None."""
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise SystemExit("--tensorboard needs tensorboard: pip install tensorboard") from None
    return SummaryWriter(str(folder))


def train(
    name: str, seed: int, epochs: int, images: Tensor, labels: Tensor, bar: tqdm, writer: Any
) -> tuple[Network, dict[str, Any]]:
    """The network after the last epoch, and its mean NFE a training step in every epoch. writer: see `writer_of`."""
    torch.manual_seed(seed)
    network = NETWORKS[name]()
    batches = len(images) // BATCH  # an incomplete last batch is left out; each epoch leaves out other images
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=epochs * batches)
    history: dict[str, Any] = {"nfe_forward": [], "nfe_backward": [], "loss": []}
    begin = time.perf_counter()
    for epoch in range(epochs):
        steps: dict[str, list[float]] = {key: [] for key in history}
        for batch in torch.randperm(len(images))[: batches * BATCH].view(batches, BATCH):
            loss = F.cross_entropy(network(shifted(images[batch])), labels[batch], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            steps["loss"].append(loss.item())
            if isinstance(network.body, ODEBlock):
                steps["nfe_forward"].append(network.body.nfe_forward)
                steps["nfe_backward"].append(network.body.nfe_backward)
            bar.update()
        for key, values in steps.items():
            if values:
                history[key].append(statistics.fmean(values))
                if writer is not None:
                    writer.add_scalar(f"{name}, seed {seed}/{key}", history[key][-1], epoch + 1)
        bar.set_description(f"seed {seed}, {name}, epoch {epoch + 1}, loss {history['loss'][-1]:.3f}")
    history["seconds"] = time.perf_counter() - begin
    return network, history


def measure_memory(network: Network, images: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """Peak live storage of a training step of the ODE-Net with n steps of rk4, by the direct gradient and the adjoint."""
    rows = []
    for n in MEMORY_STEPS:
        row: dict[str, Any] = {"steps": n}
        for gradient in ("direct", "adjoint"):
            body = ODEBlock(network.body.func, method="rk4", step_size=1 / n, gradient=gradient)
            model = Network(body)
            model.stem, model.head = network.stem, network.head

            def step(model: Network = model) -> None:
                F.cross_entropy(model(images), labels).backward()

            step()  # parameters have their .grad from here on, whichever case comes first
            gc.collect()
            row[gradient] = peak_live_storage(step)
        rows.append(row)
    return rows


def measure_trade(network: Network, images: Tensor, labels: Tensor) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """NFE, relative error of the block's output, time and accuracy: by tolerance with dopri5, by number of Euler steps.

    The error is the root mean square of the difference from dopri8 in float64 at 1e-10, over that of the output.
    """
    field = network.body.func
    with torch.no_grad():
        y0 = network.stem(images)
        field64, tight = copy.deepcopy(field).double(), {"rtol": 1e-10, "atol": 1e-10}
        reference = solve(field64, y0.double(), [0.0, 1.0], method="dopri8", **tight).ys[-1]

        def measure(block: ODEBlock) -> dict[str, Any]:
            seconds = []
            for _ in range(6):
                begin = time.perf_counter()
                y = block(y0)
                seconds.append(time.perf_counter() - begin)
            return {
                "nfe": block.nfe_forward,
                "rejected": block.stats.num_rejected,
                "error": ((y - reference).norm() / reference.norm()).item(),
                "seconds": statistics.median(seconds[1:]),
                "accuracy": (network.head(y).argmax(1) == labels).double().mean().item(),
            }

        adaptive = [
            {"tolerance": tolerance, **measure(ODEBlock(field, rtol=tolerance, atol=tolerance))}
            for tolerance in TRADE_TOLERANCES
        ]
        euler = [{"steps": n, **measure(ODEBlock(field, method="euler", step_size=1 / n))} for n in EULER_STEPS]
    return adaptive, euler


def percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def print_trade(adaptive: list[dict[str, Any]], euler: list[dict[str, Any]], images: int) -> None:
    def columns(row: dict[str, Any]) -> dict[str, Any]:
        error, ms = f"{row['error']:.1e}", f"{row['seconds'] * 1e3:.1f}"
        return {"NFE": row["nfe"], "rejected": row["rejected"], "error": error, "ms": ms, "accuracy": percent(row["accuracy"])}

    rows = [{"solver": f"dopri5, tolerance {digits_plots.power(row['tolerance'])}", **columns(row)} for row in adaptive]
    rows += [{"solver": f"Euler, {row['steps']} step{'s' * (row['steps'] > 1)}", **columns(row)} for row in euler]
    print_table(f"the trained block on {images} test images: relative error against dopri8, float64, tolerance 1e-10", rows)
    print("one Euler step, y + g(0, y), is a residual block")


def verdict(results: dict[str, list[dict[str, Any]]]) -> bool:
    """Says of each target whether it was met."""
    ours = [run["accuracy"] for run in results["ODE-Net"]]
    parameters = {name: runs[0]["parameters"] for name, runs in results.items()}
    mean, worst = statistics.fmean(ours), min(ours)
    few = parameters["ODE-Net"] < parameters["residual network"]
    checks = [
        (mean >= MEAN_TARGET, f"ODE-Net, mean test accuracy {percent(mean)}, target {percent(MEAN_TARGET)}"),
        (worst >= WORST_TARGET, f"ODE-Net, worst test accuracy {percent(worst)}, target {percent(WORST_TARGET)}"),
        (few, f"ODE-Net, {parameters['ODE-Net']:,} parameters, residual network {parameters['residual network']:,}"),
    ]
    print()
    for met, text in checks:
        print(f"{'met   ' if met else 'MISSED'}  {text}")
    return all(met for met, _ in checks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each network (3)")
    parser.add_argument("--epochs", type=int, default=16, help="epochs of each training (16)")
    parser.add_argument("--out", type=Path, default=Path("demo_results"), help="folder of the plots (demo_results)")
    parser.add_argument("--tensorboard", type=Path, help="folder for the loss and NFE of each epoch, for TensorBoard")
    arguments = parser.parse_args()
    if arguments.seeds < 1 or arguments.epochs < 1:
        parser.error("--seeds and --epochs must be at least 1")
    arguments.out.mkdir(parents=True, exist_ok=True)
    writer = writer_of(arguments.tensorboard)
    begin = time.perf_counter()
    # The tensors are small: a second thread gains little, and costs much when other work wants its core.
    torch.set_num_threads(1)
    print_machine()
    train_x, train_y, test_x, test_y = load_data()
    print(f"{len(train_x)} images to train on, shifted at random by up to one pixel, {len(test_x)} to test on")

    results: dict[str, list[dict[str, Any]]] = {name: [] for name in NETWORKS}
    total = arguments.seeds * len(NETWORKS) * arguments.epochs * (len(train_x) // BATCH)
    with tqdm(total=total, unit="step") as bar:
        for seed in range(arguments.seeds):
            for name in NETWORKS:
                network, history = train(name, seed, arguments.epochs, train_x, train_y, bar, writer)
                parameters = sum(parameter.numel() for parameter in network.parameters())
                result = {"seed": seed, "accuracy": accuracy(network, test_x, test_y), "parameters": parameters, **history}
                results[name].append(result)
    if writer is not None:
        writer.close()

    rows = [
        {
            "network": name,
            "seed": run["seed"],
            "parameters": f"{run['parameters']:,}",
            "test accuracy": percent(run["accuracy"]),
            "loss": f"{run['loss'][-1]:.3f}",
            "training s": f"{run['seconds']:.1f}",
        }
        for name, runs in results.items()
        for run in runs
    ]
    print_table(f"after epoch {arguments.epochs}", rows)

    keys = ("nfe_forward", "nfe_backward")
    series = [[run[key] for run in results["ODE-Net"]] for key in keys]
    forward, backward = ([statistics.fmean(epoch) for epoch in zip(*runs, strict=True)] for runs in series)
    rows = [
        {"epoch": epoch, "forward": f"{calls:.1f}", "backward": f"{calls_backward:.1f}"}
        for epoch, (calls, calls_backward) in enumerate(zip(forward, backward, strict=True), 1)
    ]
    print_table(f"NFE of a training step of the ODE-Net, mean of the seeds, tolerance {digits_plots.power(TOLERANCE)}", rows)

    memory = measure_memory(network, train_x[:BATCH], train_y[:BATCH])
    mib = [{key: value if key == "steps" else f"{value / 2**20:.2f}" for key, value in row.items()} for row in memory]
    print_table(f"peak live storage of a training step, batch {BATCH}, rk4, MiB", mib)

    adaptive, euler = measure_trade(network, test_x, test_y)
    print_trade(adaptive, euler, len(test_x))

    digits_plots.plot_accuracy(results, MEAN_TARGET, arguments.out / "accuracy.png")
    digits_plots.plot_memory(memory, BATCH, arguments.out / "memory.png")
    digits_plots.plot_nfe(results["ODE-Net"], TOLERANCE, arguments.out / "nfe.png")
    digits_plots.plot_trade(adaptive, euler, arguments.out / "tolerance.png")
    print(f"\nplots in {arguments.out}/, {time.perf_counter() - begin:.0f} s in all")
    if not verdict(results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
