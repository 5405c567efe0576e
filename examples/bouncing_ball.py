"""A bouncing ball: its restitution, the drag of the air and gravity, learnt from the times at which it was heard to bounce.

    python examples/bouncing_ball.py [--short] [--compare] [--out demo_results]

The ball falls with drag, and at each bounce keeps a part of its speed. The times of bounces are events of the solve; their
gradients go through every bounce before them. Drops from several heights are one batch, each with its own events.
"""

import torch
from gallery import beside, options, plt, progress, save
from torch import Tensor, nn

from odenet_cuda import Event, solve

HEIGHTS = torch.tensor([1.0, 2.0, 3.5, 5.0], dtype=torch.float64)
BOUNCES, NOISE = 4, 0.005
TRUTH = {"restitution": 0.8, "drag": 0.05, "gravity": 9.81}
ABOVE = torch.tensor([1e-9, 0.0], dtype=torch.float64)  # from where torchdiffeq sees the next change of sign
TOLERANCES = {"rtol": 1e-7, "atol": 1e-9}


class Ball(nn.Module):
    """State: height and speed, [batch, 2]. Its numbers are kept as their logarithms: they are positive."""

    def __init__(self, restitution: float, drag: float, gravity: float):
        super().__init__()
        self.logs = nn.Parameter(torch.tensor([restitution, drag, gravity], dtype=torch.float64).log())

    def numbers(self) -> Tensor:
        return self.logs.exp()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        (_, drag, gravity), speed = self.numbers(), y[..., 1]
        return torch.stack([speed, -gravity - drag * speed * speed.abs()], -1)

    def bounce(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([torch.zeros_like(y[..., 0]), -self.numbers()[0] * y[..., 1]], -1)

    def solve(self, t: Tensor, heights: Tensor = HEIGHTS):
        y0 = torch.stack([heights, torch.zeros_like(heights)], -1)
        ground = Event(lambda t, y: y[..., 0], direction=-1, apply=self.bounce)
        return solve(self, y0, t, events=ground, max_events=BOUNCES, step_control="per_sample", **TOLERANCES)

    def bounces(self) -> Tensor:
        """[BOUNCES, batch]."""
        return self.solve(torch.tensor([0.0, 20.0], dtype=torch.float64)).event_t

    def heard_by(self, torchdiffeq) -> Tensor:
        """The same with torchdiffeq: a drop at a time, a solve a bounce."""
        found = []
        for height in HEIGHTS:
            t, y, times = torch.zeros((), dtype=torch.float64), torch.stack([height, torch.zeros_like(height)]), []
            for _ in range(BOUNCES):
                t, ys = torchdiffeq.odeint_event(self, y, t, event_fn=lambda t, y: y[0], **TOLERANCES)
                times.append(t)
                y = self.bounce(t, ys[-1]) + ABOVE
            found.append(torch.stack(times))
        return torch.stack(found, 1)


def main() -> None:
    arguments = options(__doc__)
    torch.set_num_threads(1)
    truth, ball = Ball(**TRUTH), Ball(restitution=0.6, drag=0.02, gravity=8.0)
    with torch.no_grad():
        heard = truth.bounces()
        heard = heard + NOISE * torch.randn_like(heard)
    optimiser = torch.optim.LBFGS(ball.parameters(), lr=0.8, max_iter=1)
    losses = []

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = (ball.bounces() - heard).square().mean()
        loss.backward()
        return loss

    bar = progress(range(3 if arguments.short else 40), "bounces")
    for _ in bar:
        losses.append(optimiser.step(closure).item())
        bar.set_postfix_str(f"loss {losses[-1]:.2e}", refresh=False)
    for (name, value), found in zip(TRUTH.items(), ball.numbers().tolist(), strict=True):
        print(f"{name}: {found:.4f}, in truth {value}")
    assert losses[-1] < losses[0]
    if arguments.compare:
        beside(
            f"{len(HEIGHTS)} x {BOUNCES} bounces, forward and backward",
            lambda: gradient(ball),
            lambda t: gradient(ball, t),
            1e-3,
        )
    draw(ball, heard, losses, arguments.out / "bouncing_ball.png")


def gradient(ball: Ball, torchdiffeq=None) -> Tensor:
    times = ball.bounces() if torchdiffeq is None else ball.heard_by(torchdiffeq)
    return torch.cat([times.reshape(-1), *torch.autograd.grad(times.sum(), [ball.logs])])


def draw(ball: Ball, heard: Tensor, losses: list[float], path) -> None:
    figure, (axis, other) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", width_ratios=[2, 1])
    with torch.no_grad():
        t = torch.linspace(0, 6, 600, dtype=torch.float64)
        paths = ball.solve(t).ys[..., 0]
    for i, height in enumerate(HEIGHTS):
        (line,) = axis.plot(t, paths[:, i], linewidth=1.2, label=f"from {float(height):g} m")
        axis.plot(heard[:, i], torch.zeros(BOUNCES), "v", color=line.get_color(), markersize=7)
    axis.set(xlabel="seconds", ylabel="height in metres", title="learnt from the bounces that were heard (triangles)")
    axis.legend(fontsize=8)
    other.semilogy(losses)
    other.axhline(NOISE**2, color="#555555", linestyle="--", linewidth=0.8)
    other.set(xlabel="step", title="squared error; dashed: the noise")
    save(figure, path)


if __name__ == "__main__":
    main()
