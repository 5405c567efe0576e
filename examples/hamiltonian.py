"""Learning an energy: a net H(q, p) whose derivatives move a pendulum keeps it for long, a plain net loses it.

    python examples/hamiltonian.py [--short] [--compare] [--out demo_results]

From noisy angles and momenta of short swings two nets of one size are learnt through the solve: a plain one, and H, with
dq/dt = dH/dp, dp/dt = -dH/dq by `torch.autograd.grad` inside the field (Greydanus et al. 2019, arXiv:1906.01563), which the
compiled engine reads. A third is H = T(p) + V(q) in two parts (`Separable`), solved by leapfrog, whose steps are undone for the
gradient. Then each goes on for a hundred times as long.
"""

import torch
from gallery import beside, options, plt, progress, save
from torch import Tensor, nn

from odenet_cuda import Separable, compile, solve

SWINGS, TIMES, NOISE, WIDTH = 32, 31, 0.05, 32
SEEN, LONG = 3.0, 300.0
HOW = {"gradient": "checkpoint", "rtol": 1e-5, "atol": 1e-5}


def net(into: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(into, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, out))


def energy(y: Tensor) -> Tensor:
    """The true one; y: [..., 2], angle and momentum."""
    return y[..., 1].square() / 2 - torch.cos(y[..., 0])


def truth(t: Tensor, y: Tensor) -> Tensor:
    return torch.cat([y[:, 1:], -torch.sin(y[:, :1])], 1)


def slope(potential: nn.Module, x: Tensor) -> Tensor:
    """The gradient of a sum over samples, with a graph of its own: gradients of the solve go through it."""
    with torch.enable_grad():
        if not x.requires_grad:
            x = x.detach().requires_grad_()
        return torch.autograd.grad(potential(x).sum(), x, create_graph=True)[0]


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net(2, 2)
        self.field = compile(self.slopes)

    def slopes(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y)

    def paths(self, y0: Tensor, t: Tensor) -> Tensor:
        """[T, swings, 2]."""
        return solve(self.field, y0, t, **HOW).ys


class Hamiltonian(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net = net(2, 1)

    def slopes(self, t: Tensor, y: Tensor) -> Tensor:
        of_q, of_p = slope(self.net, y).split(1, 1)
        return torch.cat([of_p, -of_q], 1)


class InParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kinetic, self.potential = net(1, 1), net(1, 1)
        self.parts = Separable(lambda p: slope(self.kinetic, p), lambda t, q: -slope(self.potential, q))

    def paths(self, y0: Tensor, t: Tensor) -> Tensor:
        q, p = solve(
            self.parts, (y0[:, :1], y0[:, 1:]), t, method="leapfrog", step_size=float(t[1] - t[0]), gradient="reversible"
        ).ys
        return torch.cat([q, p], -1)


def train(name: str, model: nn.Module, y0: Tensor, t: Tensor, seen: Tensor, steps: int) -> float:
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    bar = progress(range(steps), name)
    for _ in bar:
        loss = (model.paths(y0, t) - seen).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.2e}", refresh=False)
    return loss.item()


def main() -> None:
    arguments = options(__doc__)
    t = torch.linspace(0, SEEN, TIMES, dtype=torch.float64)
    y0 = torch.stack([2.0 * (2 * torch.rand(SWINGS) - 1), 2 * torch.rand(SWINGS) - 1], 1)
    with torch.no_grad():
        seen = solve(truth, y0, t, **HOW).ys
    seen = seen + NOISE * torch.randn_like(seen)
    models = {"a plain net": Plain(), "H(q, p)": Hamiltonian(), "T(p) + V(q), leapfrog": InParts()}
    start = torch.tensor([[1.5, 0.0]])
    long = torch.linspace(0, 1.0 if arguments.short else LONG, 11 if arguments.short else 3001, dtype=torch.float64)
    found = {}
    for name, model in models.items():
        loss = train(name, model, y0, t, seen, 3 if arguments.short else 800)
        with torch.no_grad():
            found[name] = model.paths(start, long)[:, 0]
        off = (energy(found[name]) - energy(start)).abs()
        print(f"{name}: loss {loss:.2e}; energy off by {off.max().item():.3f} at most, {off[-1].item():.3f} at {long[-1]:.0f}")
        if isinstance(model, Plain):
            print(f"served by: {model.field.explain()}")
    print(f"the square of the noise {NOISE**2:.2e}")
    if arguments.compare:
        compare(models["H(q, p)"], y0, t)
    draw(found, long, start, arguments.out / "hamiltonian.png")


def compare(model: Hamiltonian, y0: Tensor, t: Tensor) -> None:
    def gradient(ys: Tensor) -> Tensor:
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(ys.square().mean(), list(model.net.parameters())[:-1])])

    def theirs(torchdiffeq) -> Tensor:
        return gradient(torchdiffeq.odeint(model.slopes, y0, t, rtol=HOW["rtol"], atol=HOW["atol"]))

    beside("a training step of H(q, p)", lambda: gradient(model.paths(y0, t)), theirs, 1e-2)


def draw(found: dict[str, Tensor], long: Tensor, start: Tensor, path) -> None:
    figure, (axis, *planes) = plt.subplots(
        1, 1 + len(found), figsize=(15, 3.6), layout="constrained", width_ratios=[1.4, 1, 1, 1]
    )
    axis.axvspan(0, SEEN, color="black", alpha=0.15)
    colors = "tab:red", "tab:blue", "tab:green"
    for (name, ys), plane, color in zip(found.items(), planes, colors, strict=True):
        axis.plot(long, energy(ys), label=name, color=color, linewidth=1)
        plane.plot(*ys.T, color=color, linewidth=0.4)
        plane.plot(*start.T, "ko", markersize=4)
        plane.set(xlabel="angle", ylabel="momentum", title=name, xlim=(-2, 2), ylim=(-1.7, 1.7), aspect="equal")
    axis.axhline(energy(start).item(), color="black", linewidth=0.6)
    axis.set(xlabel="seconds", title="the energy; what was seen is gray")
    axis.legend(fontsize=8)
    save(figure, path)


if __name__ == "__main__":
    main()
