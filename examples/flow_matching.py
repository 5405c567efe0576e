"""Flow matching: a field learnt by regression on straight paths, sampled in 2, 4, 8 steps, or as many as a tolerance needs.

    python examples/flow_matching.py [--short] [--compare] [--out demo_results]

For data x1 and noise x0 the field at t, x0 + t (x1 - x0) is to be x1 - x0 on average (Lipman et al. 2023): no equation is
solved in training. Sampling solves one: the method and its steps trade quality for evaluations of the field.
"""

import math

import torch
from gallery import beside, options, plt, progress, save
from torch import Tensor, nn

import odenet_cuda
from odenet_cuda import solve

WIDTH, BATCH, SAMPLES = 64, 512, 4000
WAYS = (
    ("euler", {"method": "euler", "step_size": 1 / 2}),
    ("euler", {"method": "euler", "step_size": 1 / 8}),
    ("midpoint", {"method": "midpoint", "step_size": 1 / 4}),
    ("rk4", {"method": "rk4", "step_size": 1 / 4}),
    ("dopri5, 1e-3", {"method": "dopri5", "rtol": 1e-3, "atol": 1e-3}),
)


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(3, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.Linear(WIDTH, 2))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.net(torch.cat([x, torch.ones_like(x[:, :1]) * t], 1))


def spirals(count: int) -> Tensor:
    """Two arms."""
    turn, arm = torch.rand(count).sqrt() * 1.5 * math.pi, torch.where(torch.rand(count) < 0.5, 1.0, -1.0)
    arms = torch.stack([torch.cos(turn), torch.sin(turn)], 1) * (arm * turn / (1.5 * math.pi))[:, None]
    return 2.5 * arms + 0.1 * torch.randn(count, 2)


def distance(x: Tensor, y: Tensor) -> float:
    """The energy distance of two sets of points (Szekely and Rizzo 2013): 0 for one distribution."""
    pairs = [2 * torch.cdist(x, y).mean(), torch.cdist(x, x).mean(), torch.cdist(y, y).mean()]
    return (pairs[0] - pairs[1] - pairs[2]).item()


def sample(field: nn.Module, x0: Tensor, options: dict) -> tuple[Tensor, int]:
    solution = solve(field, x0, [0.0, 1.0], **options)
    return solution.ys[-1], solution.stats.nfe


def compare(field: odenet_cuda.CompiledField, noise: Tensor, way: dict) -> None:
    given, t = dict(way), torch.tensor([0.0, 1.0])
    if "step_size" in given:
        given["options"] = {"step_size": given.pop("step_size")}

    def ours() -> Tensor:
        return sample(field, noise, way)[0]

    def theirs(torchdiffeq) -> Tensor:
        return torchdiffeq.odeint(field.func, noise, t, **given)[-1]

    beside(f"{len(noise)} samples by {way['method']}", ours, theirs, 1e-2)


def main() -> None:
    arguments = options(__doc__)
    field = Field()
    optimiser = torch.optim.Adam(field.parameters(), 3e-3)
    steps = 20 if arguments.short else 8000
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    average, bar = None, progress(range(steps), "matching")
    for step in bar:
        x1 = spirals(BATCH)
        x0, t = torch.randn_like(x1), torch.rand(BATCH, 1)
        loss = (field(t, torch.lerp(x0, x1, t)) - (x1 - x0)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        average = loss.item() if average is None else 0.99 * average + 0.01 * loss.item()
        if step % 100 == 0:
            bar.set_postfix_str(f"loss {average:.3f}", refresh=False)
    compiled = odenet_cuda.compile(field)
    count = 500 if arguments.short else SAMPLES
    noise, data = torch.randn(count, 2), spirals(count)
    found = []
    with torch.no_grad():
        for name, way in WAYS:
            x, nfe = sample(compiled, noise, way)
            found.append((f"{name}, {nfe} evaluations", x))
            print(f"{found[-1][0]}: energy distance to data {distance(x, data):.4f} ({compiled.explain()})")
    draw([("data", data), ("noise", noise), *found], arguments.out / "flow_matching.png")
    if arguments.compare:
        with torch.no_grad():
            compare(compiled, noise, {"method": "rk4", "step_size": 1 / 4})
            compare(compiled, noise, {"method": "dopri5", "rtol": 1e-5, "atol": 1e-5})


def draw(sets: list[tuple[str, Tensor]], path) -> None:
    figure, axes = plt.subplots(1, len(sets), figsize=(1.9 * len(sets), 2.2), layout="constrained")
    for axis, (name, x) in zip(axes, sets, strict=True):
        axis.scatter(*x.T, s=0.6, color="black" if name == "data" else "tab:red")
        axis.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal", xticks=[], yticks=[])
        axis.set_title(name, fontsize=9)
    save(figure, path)


if __name__ == "__main__":
    main()
