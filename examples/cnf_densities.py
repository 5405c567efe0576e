"""A continuous normalizing flow on densities of the plane: a field carries a Gaussian to the data, and its density with it.

    python examples/cnf_densities.py [--short] [--compare] [--out demo_results]

d log p / dt is minus the divergence of the field (Chen et al. 2018; Grathwohl et al. 2019), taken exactly, by
torch.autograd.grad inside the field. It is trained by the likelihood of the data, carried backwards in time; gradients are by
the adjoint.
"""

import math

import torch
from gallery import beside, options, plt, progress, save
from torch import Tensor, nn

from odenet_cuda import ODEBlock

WIDTH, BATCH, TOLERANCES = 32, 512, {"rtol": 1e-4, "atol": 1e-4}
DATA_TIME, NOISE_TIME = 1.0, 0.0


class Field(nn.Module):
    """The velocity of points of the plane, and the rate of their log-density."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 2))

    def velocity(self, t: Tensor, z: Tensor) -> Tensor:
        return self.net(torch.cat([z, torch.ones_like(z[:, :1]) * t], 1))

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z = state[0].requires_grad_(True)
            dz = self.velocity(t, z)
            columns = [torch.autograd.grad(dz[:, i].sum(), z, create_graph=True)[0][:, i] for i in range(2)]
        return dz, -(columns[0] + columns[1])[:, None]


def moons(count: int) -> Tensor:
    """Two half circles, with noise."""
    angle, upper = math.pi * torch.rand(count), torch.rand(count) < 0.5
    x = torch.where(upper, torch.cos(angle), 1 - torch.cos(angle)) - 0.5
    y = torch.where(upper, torch.sin(angle), 0.5 - torch.sin(angle)) - 0.25
    return 1.5 * torch.stack([x, y], 1) + 0.1 * torch.randn(count, 2)


def standard_normal(z: Tensor) -> Tensor:
    return -0.5 * z.square().sum(1) - math.log(2 * math.pi)


class Flow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.field = Field()
        self.to_noise = ODEBlock(self.field, t=(DATA_TIME, NOISE_TIME), gradient="adjoint", **TOLERANCES)
        self.to_data = ODEBlock(self.field, t=torch.linspace(NOISE_TIME, DATA_TIME, 5), return_all=True, **TOLERANCES)

    def log_density(self, x: Tensor) -> Tensor:
        z, change = self.to_noise((x, torch.zeros_like(x[:, :1])))
        return standard_normal(z) - change[:, 0]

    def samples(self, count: int) -> Tensor:
        """[5, count, 2]: from noise to data."""
        z = torch.randn(count, 2)
        return self.to_data((z, torch.zeros(count, 1)))[0]


def main() -> None:
    arguments = options(__doc__)
    flow = Flow()
    optimiser = torch.optim.Adam(flow.parameters(), 5e-3)
    steps = 3 if arguments.short else 1500
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    losses = []
    bar = progress(range(steps), "flow")
    for _ in bar:
        loss = -flow.log_density(moons(64 if arguments.short else BATCH)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix_str(f"loss {losses[-1]:.3f}, {flow.to_noise.nfe_forward} evaluations", refresh=False)
    print(f"served by: {flow.to_noise.explain()}; log-likelihood {-losses[-1]:.3f}, at first {-losses[0]:.3f}")
    if arguments.compare:
        x = moons(64 if arguments.short else BATCH)
        beside("a training step by the adjoint", lambda: gradient(flow, x), lambda t: gradient(flow, x, t), 1e-2)
    with torch.no_grad():
        draw(flow, arguments.out / "cnf_densities.png", 40 if arguments.short else 160)


def gradient(flow: Flow, x: Tensor, torchdiffeq=None) -> Tensor:
    """Of the loss, by all weights."""
    if torchdiffeq is None:
        density = flow.log_density(x)
    else:
        times = torch.tensor([DATA_TIME, NOISE_TIME])
        z, change = torchdiffeq.odeint_adjoint(flow.field, (x, torch.zeros_like(x[:, :1])), times, **TOLERANCES)
        density = standard_normal(z[-1]) - change[-1][:, 0]
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(-density.mean(), list(flow.parameters()))])


def draw(flow: Flow, path, points: int) -> None:
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.7), layout="constrained")
    x = moons(3000)
    axes[0].scatter(*x.T, s=1, color="black")
    axes[0].set_title("data")
    line = torch.linspace(-3, 3, points)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).reshape(-1, 2)
    density = torch.cat([flow.log_density(part).exp() for part in grid.split(4096)]).view(points, points)
    axes[1].imshow(density, extent=(-3, 3, -3, 3), origin="lower", cmap="magma")
    axes[1].set_title("density of the flow")
    states = flow.samples(3000)
    axes[2].scatter(*states[-1].T, s=1, color="tab:red")
    axes[2].set_title("samples of the flow")
    axes[3].plot(*states[:, :150].permute(2, 0, 1), color="tab:blue", linewidth=0.4)
    axes[3].scatter(*states[-1, :150].T, s=5, color="tab:red", zorder=3)
    axes[3].set_title("from noise to data")
    for axis in axes:
        axis.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal", xticks=[], yticks=[])
    save(figure, path)


if __name__ == "__main__":
    main()
