"""Learning physics: the friction of a pendulum, a law nobody wrote down, as a small net inside a known equation.

    python examples/pendulum.py [--short] [--compare] [--out demo_results]

Known: angle'' = -k sin(angle) - friction(speed), k not. From noisy angles of a few swings, at irregular times of each swing,
the net and k are learnt through the solve, with gradients of the discrete solve. The law behind the data is c1 v + c2 v |v|.
"""

import torch
from gallery import beside, options, plt, progress, save
from torch import Tensor, nn

from odenet_cuda import ODEBlock

SWINGS, TIMES, END, NOISE = 16, 40, 8.0, 0.02
K, LINEAR, SQUARE = 4.0, 0.1, 0.15


def friction_law(v: Tensor) -> Tensor:
    return LINEAR * v + SQUARE * v * v.abs()


class Truth(nn.Module):
    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        angle, v = y[:, :1], y[:, 1:]
        return torch.cat([v, -K * torch.sin(angle) - friction_law(v)], 1)


class Learnt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log_k = nn.Parameter(torch.tensor(1.0))
        self.net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1, bias=False))

    def friction(self, v: Tensor) -> Tensor:
        """Odd: it slows down either way alike, and not at all at rest."""
        return self.net(v) - self.net(-v)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        angle, v = y[:, :1], y[:, 1:]
        return torch.cat([v, -self.log_k.exp() * torch.sin(angle) - self.friction(v)], 1)


def layer(func: nn.Module) -> ODEBlock:
    return ODEBlock(func, return_all=True, step_control="per_sample", gradient="checkpoint", rtol=1e-5, atol=1e-5)


def main() -> None:
    arguments = options(__doc__)
    y0 = torch.stack([2.5 * (2 * torch.rand(SWINGS) - 1), 2 * torch.randn(SWINGS)], 1)
    own = torch.rand(SWINGS, TIMES, dtype=torch.float64).sort(1).values * END
    t = torch.cat([torch.zeros(SWINGS, 1, dtype=torch.float64), own], 1)  # each swing its own times
    with torch.no_grad():
        angles = layer(Truth())(y0, t)[..., 0]
        seen = angles + NOISE * torch.randn_like(angles)
    func = Learnt()
    block = layer(func)
    optimiser = torch.optim.Adam(func.parameters(), 0.01)
    steps = 3 if arguments.short else 600
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    bar = progress(range(steps), "pendulum")
    losses = []
    for step in bar:
        inside = (t <= END * min(1.0, 0.15 + step / (0.5 * steps))).T  # first the beginning of each swing, then all
        loss = (block(y0, t)[..., 0] - seen)[inside].square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix_str(f"loss {losses[-1]:.2e}", refresh=False)
    print(f"served by: {block.explain()}; k {func.log_k.exp().item():.3f}, in truth {K}")
    print(f"last loss {losses[-1]:.2e}, the square of the noise {NOISE**2:.1e}")
    if arguments.compare:
        compare(func, block, y0, t)
    with torch.no_grad():
        draw(func, y0, t, seen, arguments.out / "pendulum.png")


def compare(func: Learnt, block: ODEBlock, y0: Tensor, t: Tensor) -> None:
    """torchdiffeq has one list of times for all: the union of them, of which each swing picks its own."""
    union, place = t.unique(return_inverse=True)
    rows = torch.arange(SWINGS)

    def gradient(angles: Tensor) -> Tensor:
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(angles.square().mean(), list(func.parameters()))])

    def theirs(torchdiffeq) -> Tensor:
        ys = torchdiffeq.odeint(func, y0, union, rtol=1e-5, atol=1e-5)
        return gradient(ys[place.T, rows, 0])

    beside("a training step", lambda: gradient(block(y0, t)[..., 0]), theirs, 1e-2)


def draw(func: Learnt, y0: Tensor, t: Tensor, seen: Tensor, path) -> None:
    figure, (axis, other) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", width_ratios=[2, 1])
    fine = torch.linspace(0, END, 400, dtype=torch.float64)
    ys = layer(func)(y0, fine)
    for i in range(3):
        (line,) = axis.plot(fine, ys[:, i, 0], linewidth=1.2)
        axis.plot(t[i], seen[:, i], ".", color=line.get_color(), markersize=5)
    axis.set(xlabel="seconds", ylabel="angle", title="three swings: seen (points) and learnt (lines)")
    v = torch.linspace(-5, 5, 200)[:, None]
    other.plot(v, friction_law(v), color="black", label="the law")
    other.plot(v, func.friction(v), "--", color="tab:red", label="learnt")
    fastest = ys[..., 1].abs().max().item()
    other.axvspan(-fastest, fastest, color="tab:blue", alpha=0.08, label="speeds that were seen")
    other.set(xlabel="speed", title="friction")
    other.legend(fontsize=8)
    save(figure, path)


if __name__ == "__main__":
    main()
