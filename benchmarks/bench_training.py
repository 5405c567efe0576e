"""One training step of an ODE-Net (forward, backward, a step of SGD), beside torchdiffeq: time, evaluations, memory.

    python benchmarks/bench_training.py [--json FILE] [--runs N] [--quick] [--device cpu|cuda]

Both libraries train the same network from the same weights on the same batch, with the direct gradient (odeint) and with the
adjoint (odeint_adjoint), dopri5, float32. First their losses and gradients are held against each other. Memory is the largest
storage of tensors alive at once during a step, on CUDA the largest that torch's allocator had given out.
"""

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from fields import MLP, ConvolutionField, Counted
from live_storage import peak_live_storage
from measure import elapsed, find_device, interleave, print_machine, print_table, save
from torch import Tensor, nn

import odenet_cuda

try:
    import torchdiffeq
except ImportError:
    raise SystemExit("this benchmark compares with torchdiffeq: pip install 'odenet-cuda[bench]'") from None

THREADS = torch.get_num_threads()
CLASSES = 10
INTERFACES = {"direct": "odeint", "adjoint": "odeint_adjoint"}
LIBRARIES = {"odenet_cuda": odenet_cuda, "torchdiffeq": torchdiffeq}


class ODENet(nn.Module):
    """An ODE block from t = 0 to 1 and a linear classifier; solve is either library's function."""

    def __init__(self, field: nn.Module, features: int, tol: float):
        super().__init__()
        self.field, self.classifier, self.tol = Counted(field), nn.Linear(features, CLASSES), tol

    def forward(self, x: Tensor, solve: Callable) -> Tensor:
        t = torch.tensor([0.0, 1.0], device=x.device)
        y = solve(self.field, x, t, rtol=self.tol, atol=self.tol, method="dopri5")[-1]
        return self.classifier(y.flatten(2).mean(2) if y.dim() > 2 else y)


@dataclass(frozen=True)
class Case:
    name: str
    net: ODENet
    x: Tensor
    labels: Tensor


def cases(quick: bool, device: str) -> list[Case]:
    torch.manual_seed(0)
    made = []
    for batch in (64, 1024):
        net = ODENet(MLP(64, 128), 64, 1e-4)
        made.append((f"MLP block 64-128-64, batch {batch}", net, torch.randn(batch, 64)))
    for batch in (8,) if quick else (32, 128):
        net = ODENet(ConvolutionField(), 64, 1e-3)
        made.append((f"convolution block 64 x 6 x 6, batch {batch}", net, torch.randn(batch, 64, 6, 6)))
    labels = [torch.randint(CLASSES, (len(x),)) for _, _, x in made]
    return [Case(n, net.to(device), x.to(device), y.to(device)) for (n, net, x), y in zip(made, labels, strict=True)]


class Trainer:
    """One library's copy of the network, with its optimiser."""

    def __init__(self, library: Any, gradient: str, case: Case):
        self.solve = getattr(library, INTERFACES[gradient])
        self.case, self.net = case, copy.deepcopy(case.net)
        self.optimiser = torch.optim.SGD(self.net.parameters(), lr=1e-3)

    def loss_and_gradients(self) -> tuple[Tensor, Tensor]:
        """The loss, and the gradients of all parameters in one vector."""
        loss = nn.functional.cross_entropy(self.net(self.case.x, self.solve), self.case.labels)
        self.optimiser.zero_grad()
        loss.backward()
        return loss.detach(), torch.cat([p.grad.flatten() for p in self.net.parameters()])

    def step(self) -> None:
        self.optimiser.zero_grad()
        nn.functional.cross_entropy(self.net(self.case.x, self.solve), self.case.labels).backward()
        self.optimiser.step()


def verify(ours: Trainer, theirs: Trainer, tol: float) -> dict[str, float]:
    """Relative differences of the loss and the gradients, which must be within what the tolerance allows."""
    (loss, gradient), (expected_loss, expected) = ours.loss_and_gradients(), theirs.loss_and_gradients()
    differences = {
        "loss": float((loss - expected_loss).abs() / expected_loss.abs()),
        "gradient": float((gradient - expected).norm() / expected.norm()),
    }
    for name, difference in differences.items():
        assert difference < 1e2 * tol, f"the {name} differs from torchdiffeq's by {difference:.2g}, relatively"
    return differences


def memory(step: Callable[[], None], device: str) -> int:
    """Bytes at the peak of one step."""
    if device == "cpu":
        return peak_live_storage(step)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def bench_case(case: Case, gradient: str, runs: int, device: str) -> dict[str, Any]:
    trainers = {name: Trainer(library, gradient, case) for name, library in LIBRARIES.items()}
    differences = verify(*trainers.values(), case.net.tol)
    peaks = {name: memory(trainer.step, device) for name, trainer in trainers.items()}

    def timed(trainer: Trainer) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            trainer.net.field.calls = 0
            return {"total": elapsed(trainer.step, device), "nfe": trainer.net.field.calls}

        return run

    samples = interleave({name: timed(trainer) for name, trainer in trainers.items()}, runs, warmup=1)
    rows = []
    for name, sample in samples.items():
        rows.append({"": name, **sample.milliseconds(), "nfe": int(sample.median("nfe")), "peak MiB": peaks[name] / 2**20})
    print_table(f"{case.name}, {gradient}", rows)
    ratios = {
        "total": samples["torchdiffeq"].median("total") / samples["odenet_cuda"].median("total"),
        "memory": peaks["torchdiffeq"] / peaks["odenet_cuda"],
    }
    print(
        f"torchdiffeq / odenet_cuda: total {ratios['total']:.2f}, memory {ratios['memory']:.2f}; they differ by "
        f"{differences['loss']:.1g} in the loss and {differences['gradient']:.1g} in the gradients"
    )
    summaries = {name: {**sample.summary(), "peak_bytes": peaks[name]} for name, sample in samples.items()}
    return {"ratio": ratios, "difference": differences, **summaries}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="also write the results there, after each case")
    parser.add_argument("--runs", type=int, help="timed steps of each case; 7 unless given, 3 with --quick")
    parser.add_argument("--quick", action="store_true", help="the convolution block with a batch of 8 alone")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    device = find_device(arguments.device)
    torch.set_num_threads(THREADS)
    print_machine()
    runs = arguments.runs or (3 if arguments.quick else 7)
    results: dict[str, Any] = {}
    for case in cases(arguments.quick, device):
        for gradient in INTERFACES:
            results.setdefault(case.name, {})[gradient] = bench_case(case, gradient, runs, device)
            save(arguments.json, {"training": results})


if __name__ == "__main__":
    main()
