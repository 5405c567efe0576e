"""A sweep of 10^5 parameters: how a driven pendulum turns, over the strength of its drive and its damping.

    python examples/sweep.py [--short] [--compare] [--out demo_results]

angle'' = -damping angle' - sin(angle) + drive cos(2/3 t). Each pair of parameters is a trajectory with a step size of its own;
they are solved by a compiled field, some thousands a call. The picture shows how fast each turns on average once it has
settled: one colour where it is locked to the drive, noise where it is chaotic.
"""

import math
import time

import torch
from gallery import beside, options, plt, progress, save
from torch import Tensor

import odenet_cuda
from odenet_cuda import solve

FREQUENCY = 2 / 3
PERIOD = 2 * math.pi / FREQUENCY
TOLERANCES = {"rtol": 1e-5, "atol": 1e-5}
PARTS = 16  # calls, to have a progress bar


def pendulum(t: Tensor, y: Tensor, drive: Tensor, damping: Tensor) -> Tensor:
    angle, speed = y[:, :1], y[:, 1:]
    return torch.cat([speed, drive * torch.cos(FREQUENCY * t) - damping * speed - torch.sin(angle)], 1)


FIELD = odenet_cuda.compile(pendulum)


def turning(drive: Tensor, damping: Tensor, periods: int) -> Tensor:
    """Turns in a period of the drive, on average over the second half of so many periods, [batch]."""
    y0 = torch.zeros(len(drive), 2, dtype=drive.dtype)
    t = [0.0, periods // 2 * PERIOD, periods * PERIOD]
    ys = solve(FIELD, y0, t, args=(drive, damping), step_control="per_sample", **TOLERANCES).ys
    return (ys[2, :, 0] - ys[1, :, 0]) / (2 * math.pi * (periods - periods // 2))


def main() -> None:
    arguments = options(__doc__)
    size, periods = (24, 4) if arguments.short else (320, 60)
    drive, damping = torch.linspace(0.9, 1.6, size), torch.linspace(0.3, 1.0, size)
    pairs = torch.stack(torch.meshgrid(damping, drive, indexing="ij"), -1).reshape(-1, 2)
    turning(pairs[:64, 1:], pairs[:64, :1], 2)  # compiles
    begin, found = time.perf_counter(), []
    for part in progress(pairs.split(math.ceil(len(pairs) / PARTS)), "pendulums"):
        found.append(turning(part[:, 1:], part[:, :1], periods))
    seconds = time.perf_counter() - begin
    print(f"served by: {FIELD.explain()}; {len(pairs):,} trajectories over {periods} periods in {seconds:.1f} s")
    if arguments.compare:
        compare(pairs[:: max(1, len(pairs) // 1000)])
    draw(torch.cat(found).view(size, size), drive, damping, arguments.out / "sweep.png")


def compare(pairs: Tensor) -> None:
    """Over one period, in which chaos has not yet parted the two."""
    drive, damping, y0 = pairs[:, 1:].double(), pairs[:, :1].double(), torch.zeros(len(pairs), 2, dtype=torch.float64)
    t = torch.tensor([0.0, PERIOD], dtype=torch.float64)

    def ours() -> Tensor:
        return solve(FIELD, y0, t, args=(drive, damping), step_control="per_sample", **TOLERANCES).ys[-1]

    def theirs(torchdiffeq) -> Tensor:
        return torchdiffeq.odeint(lambda t, y: pendulum(t, y, drive, damping), y0, t, **TOLERANCES)[-1]

    with torch.no_grad():
        beside(f"{len(pairs)} trajectories over one period", ours, theirs, 1e-2)


def draw(turns: Tensor, drive: Tensor, damping: Tensor, path) -> None:
    figure, axis = plt.subplots(figsize=(7.5, 6), layout="constrained")
    extent = (drive[0].item(), drive[-1].item(), damping[0].item(), damping[-1].item())
    image = axis.imshow(turns, extent=extent, origin="lower", aspect="auto", cmap="RdBu_r", vmin=-1.2, vmax=1.2)
    axis.set(xlabel="drive", ylabel="damping", title=f"{turns.numel():,} driven pendulums")
    figure.colorbar(image, label="turns in a period of the drive")
    save(figure, path)


if __name__ == "__main__":
    main()
