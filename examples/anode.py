"""Annuli that a flow of the plane cannot take apart, and one with more dimensions can: augmented neural ODEs.

    python examples/anode.py [--short] [--compare] [--out demo_results]

A disc of one class inside a ring of the other (Dupont, Doucet and Teh 2019, arXiv:1904.01681). Paths of an ODE cannot cross, so
in the plane the disc cannot leave the ring: the net cuts the ring open along a line, ever thinner, some points of the ring stay
on the wrong side, and its calls of the field grow. With two zeros added to each point it lifts the disc out. Both have
one width and are trained alike.
"""

import torch
from gallery import beside, options, plt, progress, save
from torch import Tensor, nn

from odenet_cuda import ODEBlock

WIDTH, BATCH, POINTS = 32, 128, 2000
DISC, RING = 0.5, (1.0, 1.5)
TOLERANCES = {"rtol": 1e-4, "atol": 1e-4}
COLORS, VIEW = ("tab:blue", "tab:orange"), 5.0


class Field(nn.Module):
    def __init__(self, dimensions: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(dimensions + 1, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, dimensions)
        )

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(torch.cat([y, torch.ones_like(y[:, :1]) * t], 1))


class Classifier(nn.Module):
    """A flow, which must take the classes apart, for a plane cuts what it gives. augmented: how many zeros."""

    def __init__(self, augmented: int):
        super().__init__()
        self.augmented = augmented
        self.block = ODEBlock(Field(2 + augmented), gradient="checkpoint", return_all=True, **TOLERANCES)
        self.cut = nn.Linear(2 + augmented, 1)

    def paths(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """[T, points, 2 + augmented]."""
        return self.block(nn.functional.pad(x, (0, self.augmented)), t)

    def forward(self, x: Tensor) -> Tensor:
        return self.cut(self.paths(x)[-1])[:, 0]


def annuli(count: int) -> tuple[Tensor, Tensor]:
    """Points, uniform by area, and whether each is of the ring."""
    ring = torch.arange(count) % 2 == 1
    low, high = torch.where(ring, RING[0], 0.0), torch.where(ring, RING[1], DISC)
    radius = (low**2 + (high**2 - low**2) * torch.rand(count)).sqrt()
    angle = 2 * torch.pi * torch.rand(count)
    return radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1), ring.float()


def train(name: str, augmented: int, steps: int) -> tuple[Classifier, list[tuple[float, int]]]:
    """The classifier; loss and calls of the field of each step."""
    torch.manual_seed(0)
    model = Classifier(augmented)
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    history, bar = [], progress(range(steps), name)
    for step in bar:
        x, ring = annuli(BATCH)
        loss = nn.functional.binary_cross_entropy_with_logits(model(x), ring)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        history.append((loss.item(), model.block.nfe_forward))
        if step % 20 == 0:
            bar.set_postfix_str(f"loss {history[-1][0]:.4f}, calls {history[-1][1]}", refresh=False)
    return model, history


def main() -> None:
    arguments = options(__doc__)
    steps = 5 if arguments.short else 3000
    x, ring = annuli(POINTS)
    found = []
    for name, augmented in (("in the plane", 0), ("two more dimensions", 2)):
        model, history = train(name, augmented, steps)
        with torch.no_grad():
            right = ((model(x) > 0) == (ring > 0.5)).float().mean().item()
        loss, calls = torch.tensor(history[-100:]).mean(0).tolist()
        print(f"{name}: {100 * right:.1f} % right, loss {loss:.2g}, {calls:.0f} calls, at first {history[0][1]}")
        print(f"served by: {model.block.explain()}")
        found.append((name, model, history))
    if arguments.compare:
        compare(found[-1][1])
    with torch.no_grad():
        draw(found, arguments.out / "anode.png")


def compare(model: Classifier) -> None:
    x, ring = annuli(BATCH)

    def gradient(logits: Tensor) -> Tensor:
        loss = nn.functional.binary_cross_entropy_with_logits(logits, ring)
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])

    def theirs(torchdiffeq) -> Tensor:
        y0 = nn.functional.pad(x, (0, model.augmented))
        ys = torchdiffeq.odeint(model.block.func, y0, torch.tensor([0.0, 1.0]), **TOLERANCES)
        return gradient(model.cut(ys[-1])[:, 0])

    beside(f"a training step, batch {BATCH}", lambda: gradient(model(x)), theirs, 1e-2)


def draw(found: list, path) -> None:
    figure, axes = plt.subplots(2, 3, figsize=(12, 7), layout="constrained", width_ratios=[1, 1, 1.3])
    (x, ring), edge = annuli(400), torch.linspace(-1.8, 1.8, 121)
    plane = torch.stack(torch.meshgrid(edge, edge, indexing="xy"), -1).view(-1, 2)
    for (axis, other, _), (name, model, _) in zip(axes, found, strict=True):
        belief = model(plane).sigmoid().view(121, 121)
        axis.pcolormesh(edge.numpy(), edge.numpy(), belief.numpy(), cmap="PuOr_r", vmin=0, vmax=1, rasterized=True)
        axis.set(title=f"{name}: belief in the ring", aspect="equal")
        ys = model.paths(x, torch.linspace(0, 1, 60))
        for own, color in zip((ring < 0.5, ring > 0.5), COLORS, strict=True):
            axis.plot(*x[own].T, ".", color=color, markersize=2)
            other.plot(ys[:, own, 0][:, ::2], ys[:, own, 1][:, ::2], color=color, linewidth=0.5, alpha=0.7)
        other.set(title="paths, first two numbers", xlim=(-VIEW, VIEW), ylim=(-VIEW, VIEW), aspect="equal")
    for name, _, history in found:
        loss, calls = torch.tensor(history).unfold(0, min(50, len(history)), 1).mean(-1).T
        axes[0, 2].semilogy(loss, label=name)
        axes[1, 2].plot(calls, label=name)
    axes[0, 2].set(xlabel="step", title="loss")
    axes[1, 2].set(xlabel="step", title="calls of the field")
    axes[1, 2].legend(fontsize=8)
    save(figure, path)


if __name__ == "__main__":
    main()
