"""Sunspots ahead: a latent ODE encodes half the years of three decades, which half each time, and goes on for twelve years.

    python examples/latent_ode.py [--short] [--compare] [--out demo_results]

A GRU reads what was seen backwards, with the gaps between, and believes a Gaussian of a latent state at the beginning; a small
net is the field of that state, another reads sunspots off it (Chen et al. 2018, section 5; Rubanova et al. 2019,
arXiv:1907.03907). Each sample has times of its own. Learnt from 1700 to 1934, each window stretched at random in time
and height; what it goes on to is compared with the years from 1935 on.
"""

import numpy
import torch
from gallery import beside, options, plt, progress, save
from torch import Tensor, nn

from odenet_cuda import ODEBlock

# Yearly sunspot numbers 1700 to 2008: National Geophysical Data Center (NOAA), public domain.
NUMBERS = """
5 11 16 23 36 58 29 20 10 8 3 0 0 2 11 27 47 63 60 39 28 26 22 11 21 40 78 122 103 73 47 35 11 5 16 34 70 81 111 101 73 40 20
16 5 11 22 40 60 80.9 83.4 47.7 47.8 30.7 12.2 9.6 10.2 32.4 47.6 54 62.9 85.9 61.2 45.1 36.4 20.9 11.4 37.8 69.8 106.1 100.8
81.6 66.5 34.8 30.6 7 19.8 92.5 154.4 125.9 84.8 68.1 38.5 22.8 10.2 24.1 82.9 132 130.9 118.1 89.9 66.6 60 46.9 41 21.3 16
6.4 4.1 6.8 14.5 34 45 43.1 47.5 42.2 28.1 10.1 8.1 2.5 0 1.4 5 12.2 13.9 35.4 45.8 41.1 30.1 23.9 15.6 6.6 4 1.8 8.5 16.6
36.3 49.6 64.2 67 70.9 47.8 27.5 8.5 13.2 56.9 121.5 138.3 103.2 85.7 64.6 36.7 24.2 10.7 15 40.1 61.5 98.5 124.7 96.3 66.6
64.5 54.1 39 20.6 6.7 4.3 22.7 54.8 93.8 95.8 77.2 59.1 44 47 30.5 16.3 7.3 37.6 74 139 111.2 101.6 66.2 44.7 17 11.3 12.4 3.4
6 32.3 54.3 59.7 63.7 63.5 52.2 25.4 13.1 6.8 6.3 7.1 35.6 73 85.1 78 64 41.8 26.2 26.7 12.1 9.5 2.7 5 24.4 42 63.5 53.8 62
48.5 43.9 18.6 5.7 3.6 1.4 9.6 47.4 57.1 103.9 80.6 63.6 37.6 26.1 14.2 5.8 16.7 44.3 63.9 69 77.8 64.9 35.7 21.2 11.1 5.7 8.7
36.1 79.7 114.4 109.6 88.8 67.8 47.5 30.6 16.3 9.6 33.2 92.6 151.6 136.3 134.7 83.9 69.4 31.5 13.9 4.4 38 141.7 190.2 184.8
159 112.3 53.9 37.6 27.9 10.2 15.1 47 93.8 105.9 105.5 104.5 66.6 68.9 38 34.5 15.5 12.6 27.5 92.5 155.4 154.6 140.4 115.9
66.6 45.9 17.9 13.4 29.4 100.2 157.6 142.6 145.7 94.3 54.6 29.9 17.5 8.6 21.5 64.3 93.3 119.6 111 104 63.7 40.4 29.8 15.2 7.5
2.9
"""
SUNSPOTS = torch.tensor([float(number) for number in NUMBERS.split()])
FIRST, SPLIT = 1700, 1935
PAST, AHEAD, SEEN = 30, 12, 15
LATENT, WIDTH, BATCH, DRAWS = 8, 48, 64, 40
TOLERANCES = {"rtol": 1e-4, "atol": 1e-4}
UNIT = 2.0  # of time in the latent state, years


def scaled(numbers: Tensor) -> Tensor:
    """Of size one, and of a spread that does not grow with them."""
    return numbers.sqrt() / 3 - 2


def spots(x: Tensor) -> Tensor:
    return (3 * (x + 2)).clamp_min(0).square()


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(LATENT, WIDTH), nn.Tanh(), nn.Linear(WIDTH, LATENT))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.net(z)


class LatentODE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.belief = nn.GRU(2, WIDTH, batch_first=True), nn.Linear(WIDTH, 2 * LATENT)
        how = {"step_control": "per_sample", "gradient": "checkpoint", **TOLERANCES}
        self.block = ODEBlock(Field(), return_all=True, **how)
        self.decoder = nn.Sequential(nn.Linear(LATENT, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))
        self.noise = nn.Parameter(torch.tensor(0.3).log())

    def encode(self, years: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and the logarithm of the width of z at year 0. years, x: [batch, SEEN], what was seen."""
        gaps = years.diff(dim=1, prepend=torch.zeros_like(years[:, :1])).float() / 10
        read = torch.stack([x, gaps], 2).flip(1)
        mean, width = self.belief(self.encoder(read)[0][:, -1]).chunk(2, 1)
        return mean, width

    def decode(self, z: Tensor, years: Tensor) -> Tensor:
        """[batch, T]: scaled sunspots at these years, from the latent state at year 0."""
        t = torch.cat([torch.zeros_like(years[:, :1]), years], 1) / UNIT
        return self.decoder(self.block(z, t)[1:])[..., 0].T

    def loss(self, years: Tensor, x: Tensor, weight: float) -> Tensor:
        """Minus a bound of the log likelihood of what was seen and what came, a sample and a time."""
        mean, width = self.encode(years[:, :SEEN], x[:, :SEEN])
        off = self.decode(mean + width.exp() * torch.randn_like(mean), years) - x
        far = 0.5 * (mean.square() + (2 * width).exp() - 1) - width
        return 0.5 * (off / self.noise.exp()).square().mean() + self.noise + weight * far.sum(1).mean() / x.shape[1]


def windows(begin: Tensor) -> tuple[Tensor, Tensor]:
    """Years from each begin on, [batch, SEEN + AHEAD], the seen ones drawn, and their sunspots, scaled."""
    drawn = torch.rand(len(begin), PAST).argsort(1)[:, :SEEN].sort(1).values
    years = 1 + torch.cat([drawn, (PAST + torch.arange(AHEAD)).expand(len(begin), -1)], 1)
    return years.double(), scaled(SUNSPOTS)[begin[:, None] + years - 1]


def stretched(years: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Windows as there might have been: cycles of other lengths and heights, and noise."""
    length, height = (torch.tensor([[[0.12]], [[0.4]]]) * torch.randn(2, len(x), 1)).exp()
    return years * length.double(), scaled(spots(x) * height) + 0.1 * torch.randn_like(x)


def train(model: LatentODE, steps: int) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), 5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    bar, average = progress(range(steps), "sunspots"), None
    for step in bar:
        begin = torch.randint(SPLIT - FIRST - PAST - AHEAD + 1, (BATCH,))
        loss = model.loss(*stretched(*windows(begin)), 0.03 * min(1.0, 2 * step / steps))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if step % 20 == 0:
            bar.set_postfix_str(f"loss {average:.3f}", refresh=False)


def guesses(years: Tensor, real: Tensor, begin: Tensor) -> dict[str, Tensor]:
    """What else one might say of the years ahead, [batch, AHEAD]."""
    before = torch.arange(AHEAD) + PAST - 11  # a cycle has about eleven years
    rows = [numpy.interp(before + 1, *row) for row in zip(years[:, :SEEN].numpy(), real[:, :SEEN].numpy(), strict=True)]
    return {
        "the mean of what was seen": real[:, :SEEN].mean(1, keepdim=True).expand(-1, AHEAD),
        "eleven years before, between what was seen": torch.tensor(numpy.stack(rows)),
        "eleven years before, were all seen": SUNSPOTS[begin[:, None] + before],
    }


def main() -> None:
    arguments = options(__doc__)
    model = LatentODE()
    train(model, 5 if arguments.short else 6000)
    begin = torch.arange(SPLIT - FIRST - PAST, len(SUNSPOTS) - PAST - AHEAD + 1)  # what is ahead was never learnt from
    years, x = windows(begin)
    real, every = spots(x), 1 + torch.arange(PAST + AHEAD).double().expand(len(begin), -1)
    with torch.no_grad():
        mean, width = model.encode(years[:, :SEEN], x[:, :SEEN])
        draws = torch.stack([model.decode(mean + width.exp() * torch.randn_like(mean), every) for _ in range(DRAWS)])
        found = spots(draws + model.noise.exp() * torch.randn_like(draws))
    ways = {"the latent ODE": found.mean(0)[:, PAST:], **guesses(years, real, begin)}
    errors = {name: (guess - real[:, SEEN:]).square().mean(0).sqrt() for name, guess in ways.items()}
    print(f"served by: {model.block.explain()}; {len(begin)} windows of {AHEAD} years ahead")
    for name, error in errors.items():
        print(f"{name}: off by {error.square().mean().sqrt().item():.1f} sunspots")
    draw(begin, years, real, found, errors, arguments.out / "latent_ode.png")
    if arguments.compare:
        compare(model)


def compare(model: LatentODE) -> None:
    """torchdiffeq has one list of times for all: every year, without stretching, of which each sample picks its own."""
    years, x = windows(torch.randint(SPLIT - FIRST - PAST - AHEAD + 1, (BATCH,)))
    z, rows = model.encode(years[:, :SEEN], x[:, :SEEN])[0].detach(), torch.arange(BATCH)
    union, place = torch.cat([torch.zeros(BATCH, 1), years], 1).unique(return_inverse=True)

    def gradient(found: Tensor) -> Tensor:
        parameters = list(model.block.parameters())
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(found.square().mean(), parameters)])

    def theirs(torchdiffeq) -> Tensor:
        zs = torchdiffeq.odeint(model.block.func, z, union / UNIT, **TOLERANCES)
        return gradient(model.decoder(zs[place.T[1:], rows])[..., 0].T)

    beside(f"the solve of a training step, batch {BATCH}", lambda: gradient(model.decode(z, years)), theirs, 2e-2)


def draw(begin: Tensor, years: Tensor, real: Tensor, found: Tensor, errors: dict[str, Tensor], path) -> None:
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.7), layout="constrained")
    for axis, row in zip(axes, (0, len(begin) // 2, len(begin) - 1), strict=False):
        first = FIRST + int(begin[row])
        t = first + torch.arange(PAST + AHEAD)
        low, middle, high = found[:, row].quantile(torch.tensor([0.1, 0.5, 0.9]), 0)
        axis.fill_between(t, low, high, color="tab:red", alpha=0.25, linewidth=0)
        axis.plot(t, middle, color="tab:red", linewidth=1.2)
        axis.plot(t, SUNSPOTS[begin[row] : begin[row] + PAST + AHEAD], color="black", linewidth=0.8)
        axis.plot(first - 1 + years[row, :SEEN], real[row, :SEEN], "ko", markersize=4)
        axis.axvline(first + PAST - 0.5, color="black", linewidth=0.6, linestyle="--")
        axis.set(xlabel="year", title=f"seen to {first + PAST - 1}, and ahead")
    for name, error in errors.items():
        axes[3].plot(1 + torch.arange(AHEAD), error, label=name)
    axes[3].set(xlabel="years ahead", title="sunspots off, root mean square", ylim=(0, None))
    axes[3].legend(fontsize=7)
    save(figure, path)


if __name__ == "__main__":
    main()
