"""Digits out of noise in few steps: a diffusion model, by Euler, Heun, DPM-Solver++(2M) and to a tolerance, with guidance.

    python examples/few_steps.py [--short] [--compare] [--out demo_results]

A net D(x, sigma) learns to take noise of size sigma off (Karras et al. 2022). The flow from noise to data is dx/dsigma =
(x - D) / sigma. With s = 1 / sigma and u = x / sigma that is du/ds = D: a step of Euler in s is one of DDIM, and "dpmpp_2m" is
DPM-Solver++(2M), two steps and one call each. Guidance (Ho and Salimans 2022) takes each digit twice through the net, in one
batch: with its class and without.
"""

import torch
from gallery import beside, options, plt, progress, save
from torch import Tensor, nn

from odenet_cuda import solve

try:
    from sklearn.datasets import load_digits
except ImportError:
    raise SystemExit("this example needs scikit-learn: pip install scikit-learn") from None

WIDTH, BATCH, CLASSES, NOBODY = 256, 256, 10, 10
SPREAD, LOW, HIGH, GUIDANCE = 0.75, 0.03, 20.0, 1.5
WAYS = [("euler", 6), ("dpmpp_2m", 6), ("heun2", 3), ("euler", 18), ("dpmpp_2m", 18), ("dopri5", 1)]


class Denoiser(nn.Module):
    """D(x, sigma, label), scaled so that the net sees and gives numbers of size one (Karras et al., table 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.label = nn.Embedding(CLASSES + 1, 32)
        self.into = nn.Linear(64 + 32 + 16, WIDTH)
        self.inner = nn.ModuleList([nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.SiLU()) for _ in range(3)])
        self.out = nn.Linear(WIDTH, 64)
        self.register_buffer("waves", torch.linspace(0.5, 4.0, 8))

    def net(self, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        size = (sigma**2 + SPREAD**2).sqrt()
        place = 0.25 * sigma.log() * self.waves
        h = self.into(torch.cat([x / size, place.sin(), place.cos(), self.label(label)], 1))
        for layer in self.inner:
            h = h + layer(h)
        return self.out(h)

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        size = (sigma**2 + SPREAD**2).sqrt()
        return (SPREAD / size) ** 2 * x + sigma * SPREAD / size * self.net(x, sigma, label)

    def loss(self, data: Tensor, label: Tensor) -> Tensor:
        sigma = torch.exp(1.4 * torch.randn(len(data), 1) - 0.8)
        x, size = data + sigma * torch.randn_like(data), (sigma**2 + SPREAD**2).sqrt()
        wanted = (data - (SPREAD / size) ** 2 * x) * size / (sigma * SPREAD)
        return (self.net(x, sigma, label) - wanted).square().mean()


class Flow(nn.Module):
    """du/ds, the guided prediction of the data. last: that of the last call, which is at the end of the grid: the digit."""

    def __init__(self, denoiser: Denoiser, label: Tensor, guidance: float = GUIDANCE):
        super().__init__()
        self.denoiser, self.guidance, self.label = denoiser, guidance, torch.cat([label, torch.full_like(label, NOBODY)])
        self.last: Tensor | None = None

    def forward(self, s: Tensor, u: Tensor) -> Tensor:
        twice = torch.cat([u, u]) / s
        of_class, of_all = self.denoiser(twice, (1 / s).expand(len(twice), 1), self.label).chunk(2)
        self.last = torch.lerp(of_all, of_class, self.guidance)
        return self.last


def grid(steps: int) -> Tensor:
    """1 / sigma on the noise levels of Karras et al., equation 5, rho = 7."""
    place = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return (HIGH ** (1 / 7) + place * (LOW ** (1 / 7) - HIGH ** (1 / 7))) ** -7


def sample(denoiser: Denoiser, noise: Tensor, label: Tensor, method: str, steps: int) -> tuple[Tensor, int]:
    """Digits from noise of size one, and the calls of the net that they took."""
    flow = Flow(denoiser, label)
    solution = solve(flow, noise, grid(steps), method=method, rtol=1e-3, atol=1e-3)
    if method == "dpmpp_2m":
        return flow.last, solution.stats.nfe
    return flow(grid(steps)[-1].float(), solution.ys[-1]), solution.stats.nfe + 1


def distance(x: Tensor, y: Tensor) -> float:
    """The energy distance of two sets of points (Szekely and Rizzo 2013): 0 for one distribution."""
    pairs = [2 * torch.cdist(x, y).mean(), torch.cdist(x, x).mean(), torch.cdist(y, y).mean()]
    return (pairs[0] - pairs[1] - pairs[2]).item()


def train(data: Tensor, label: Tensor, steps: int) -> Denoiser:
    denoiser = Denoiser()
    optimiser = torch.optim.Adam(denoiser.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    bar, average = progress(range(steps), "denoising"), None
    for step in bar:
        chosen = torch.randint(len(data), (BATCH,))
        seen = torch.where(torch.rand(BATCH) < 0.15, NOBODY, label[chosen])
        loss = denoiser.loss(data[chosen], seen)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        average = loss.item() if average is None else 0.99 * average + 0.01 * loss.item()
        if step % 50 == 0:
            bar.set_postfix_str(f"loss {average:.3f}", refresh=False)
    return denoiser.eval().requires_grad_(False)


def main() -> None:
    arguments = options(__doc__)
    digits = load_digits()
    data, label = torch.tensor(digits.data, dtype=torch.float32) / 8 - 1, torch.tensor(digits.target)
    denoiser = train(data, label, 20 if arguments.short else 6000)
    count = 100 if arguments.short else 1000
    noise, classes = torch.randn(count, 64), torch.arange(count) % CLASSES
    exact = sample(denoiser, noise, classes, "rk4", 12 if arguments.short else 200)[0]
    found = []
    for method, steps in WAYS:
        x, calls = sample(denoiser, noise, classes, method, steps)
        name, off = f"{method}, {calls} calls", (x - exact).square().mean().sqrt().item()
        found.append((name, x))
        print(f"{name}: {off:.3f} from the exact flow, energy distance to real digits {distance(x, data):.4f}")
    draw(found, arguments.out / "few_steps.png")
    if arguments.compare:
        compare(denoiser, noise, classes)


def compare(denoiser: Denoiser, noise: Tensor, label: Tensor) -> None:
    flow, s = Flow(denoiser, label), grid(18)

    def ours() -> Tensor:
        return solve(flow, noise, s, method="midpoint").ys[-1]

    beside(
        f"{len(noise)} digits by midpoint in 18 steps", ours, lambda td: td.odeint(flow, noise, s, method="midpoint")[-1], 1e-2
    )


def draw(found: list[tuple[str, Tensor]], path) -> None:
    figure, axes = plt.subplots(2, len(found) // 2, figsize=(12, 4.6), layout="constrained")
    for axis, (name, x) in zip(axes.flat, found, strict=True):
        apart = nn.functional.pad(x[: 4 * CLASSES].view(-1, 8, 8), (1, 1, 1, 1), value=-1.0)
        sheet = apart.view(4, CLASSES, 10, 10).permute(0, 2, 1, 3).reshape(40, 10 * CLASSES)
        axis.imshow(sheet, cmap="gray", vmin=-1, vmax=1)
        axis.set(xticks=[], yticks=[])
        axis.set_title(name, fontsize=9)
    save(figure, path)


if __name__ == "__main__":
    main()
