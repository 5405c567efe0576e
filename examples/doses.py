"""Doses of many subjects: a population's clearance, volume and absorption, and how people differ, from few samples of blood.

    python examples/doses.py [--short] [--compare] [--out demo_results]

One compartment with absorption of first order. Each of 60 subjects takes doses of its own at times of its own, a `Jump`, and
gives blood four to eight times, three of them early. Parameters are typical * exp(eta), eta normal and of each subject. What
is believed of eta is a Gaussian for each subject (Kingma and Welling 2014), fitted with the population through the solve: all
subjects are one call.
"""

import math

import torch
from gallery import beside, options, plt, progress, save
from torch import Tensor, nn

from odenet_cuda import Jump, compile, solve

NAMES = ("clearance, l/h", "volume, l", "absorption, 1/h")
TYPICAL, SPREAD, NOISE = torch.tensor([5.0, 50.0, 1.0]), torch.tensor([0.3, 0.2, 0.4]), 0.1
SUBJECTS, DRAWS, WEEK = 60, 4, 96.0


def kinetics(t: Tensor, y: Tensor, parameters: Tensor) -> Tensor:
    """y: amounts in gut and blood. parameters: [batch, 3]."""
    absorbed = parameters[:, 2:] * y[:, :1]
    return torch.cat([-absorbed, absorbed - parameters[:, :1] / parameters[:, 1:2] * y[:, 1:]], 1)


class Study(nn.Module):
    """Who took what when, and when blood was taken. [subjects, J] and [subjects, T], NaN where a subject has fewer."""

    def __init__(self) -> None:
        super().__init__()
        count, number = torch.randint(3, 8, (SUBJECTS, 1)), torch.arange(7)
        doses = 0.5 + 12.0 * number + 2.0 * torch.rand(SUBJECTS, 7)
        self.doses = torch.where(number < count, doses, torch.nan).double()
        self.amounts = 50.0 + 100.0 * torch.rand(SUBJECTS, 7)
        early = doses[:, :1] + 0.3 + 3.0 * torch.rand(SUBJECTS, 3)  # while the first dose is absorbed
        t = torch.cat([early, 6.0 + (WEEK - 8.0) * torch.rand(SUBJECTS, 5)], 1).sort(1).values
        t = torch.where(torch.arange(8) < torch.randint(4, 9, (SUBJECTS, 1)), t, torch.nan).double()
        self.t = torch.cat([torch.zeros(SUBJECTS, 1, dtype=torch.float64), t], 1)
        self.field = compile(kinetics)

    def logs(self, parameters: Tensor, rows: Tensor, t: Tensor | None = None) -> Tensor:
        """Logarithms of concentrations, [T, rows], where none was taken without a meaning. parameters: [rows, 3]."""
        amounts = self.amounts[rows]

        def dose(t: Tensor, y: Tensor, i: Tensor, *_: Tensor) -> Tensor:
            return y + torch.cat([amounts.gather(1, i[:, None]), torch.zeros_like(y[:, 1:])], 1)

        how = {"step_control": "per_sample", "rtol": 1e-4, "atol": 1e-4, "gradient": "direct"}
        t, y0 = self.t[rows] if t is None else t.expand(len(rows), -1), torch.zeros(len(rows), 2)
        ys = solve(self.field, y0, t, args=(parameters,), jumps=Jump(self.doses[rows], dose), **how).ys
        return (ys[1:, :, 1].nan_to_num(1.0) / parameters[:, 1]).clamp(min=1e-3).log()


class Population(nn.Module):
    """The population, and what is believed of each subject: eta of a mean and a width."""

    def __init__(self) -> None:
        super().__init__()
        self.typical = nn.Parameter(torch.tensor([2.0, 20.0, 2.0]).log())
        self.spread = nn.Parameter(torch.full((3,), 0.5).log())
        self.noise = nn.Parameter(torch.tensor(0.3).log())
        self.mean, self.width = nn.Parameter(torch.zeros(SUBJECTS, 3)), nn.Parameter(torch.full((SUBJECTS, 3), 0.2).log())

    def parameters_of(self, eta: Tensor) -> Tensor:
        return (self.typical + eta).exp()

    def loss(self, study: Study, seen: Tensor, rows: Tensor) -> Tensor:
        """Minus a bound of the log likelihood, by subject."""
        eta = self.mean[rows] + self.width[rows].exp() * torch.randn(len(rows), 3)
        off = (
            torch.where(seen.isnan()[:, rows], 0.0, study.logs(self.parameters_of(eta), rows) - seen[:, rows])
            / self.noise.exp()
        )
        fit = 0.5 * off.square().sum() / DRAWS + (~seen.isnan()).sum() * self.noise
        ratio = (self.width - self.spread).exp().square() + (self.mean / self.spread.exp()).square()
        return (fit + (0.5 * (ratio - 1) - self.width + self.spread).sum()) / SUBJECTS


def main() -> None:
    arguments = options(__doc__)
    study, everybody = Study(), torch.arange(SUBJECTS)
    truth = TYPICAL * (SPREAD * torch.randn(SUBJECTS, 3)).exp()
    with torch.no_grad():
        seen = study.logs(truth, everybody)
        seen = torch.where(study.t.T[1:].isnan(), torch.nan, seen + NOISE * torch.randn_like(seen))
    model, rows = Population(), everybody.repeat_interleave(DRAWS)
    steps = 5 if arguments.short else 1500
    optimiser = torch.optim.Adam(model.parameters(), 0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for step in (bar := progress(range(steps), "population")):
        loss = model.loss(study, seen, rows)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 10 == 0:
            bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    found, spread = model.typical.exp().tolist(), model.spread.exp().tolist()
    print(f"served by: {study.field.explain()}; noise {model.noise.exp().item():.3f}, in truth {NOISE}")
    for i, name in enumerate(NAMES):
        print(f"{name}: {found[i]:.3g}, in truth {TYPICAL[i]:.3g}; people differ by {spread[i]:.2f}, in truth {SPREAD[i]:.2f}")
    if arguments.compare:
        compare(study, truth)
    with torch.no_grad():
        draw(study, model, truth, seen, arguments.out / "doses.png")


def compare(study: Study, truth: Tensor) -> None:
    """Six subjects: torchdiffeq has no doses, so it is called between any two, for each subject."""
    rows, known = torch.arange(6), truth[:6].clone().requires_grad_()

    def gradient(logs: Tensor) -> Tensor:
        return torch.autograd.grad(logs.square().sum(), known)[0]

    def theirs(torchdiffeq) -> Tensor:
        logs = []
        for row in range(6):
            t, doses = (x[row][~x[row].isnan()] for x in (study.t[:, 1:], study.doses))
            y, now, own = torch.zeros(1, 2), 0.0, known[row : row + 1]
            for end, amount in zip([*doses.tolist(), math.inf], [*study.amounts[row, : len(doses)], 0.0], strict=True):
                inside = t[(t > now) & (t <= end)]
                times = torch.cat([torch.tensor([now]).double(), inside, torch.tensor([end] if end < t[-1] else []).double()])
                if len(times) > 1:
                    ys = torchdiffeq.odeint(lambda t, y, own=own: kinetics(t, y, own), y, times, rtol=1e-4, atol=1e-4)
                    logs.append((ys[1 : 1 + len(inside), 0, 1] / own[0, 1]).log())
                    y = ys[-1]
                y, now = y + torch.tensor([[1.0, 0.0]]) * amount, end
                if end >= t[-1]:
                    break
        return gradient(torch.cat(logs))

    beside(
        "six subjects, with the gradient", lambda: gradient(study.logs(known, rows)[~study.t[:6, 1:].T.isnan()]), theirs, 1e-2
    )


def draw(study: Study, model: Population, truth: Tensor, seen: Tensor, path) -> None:
    figure, (axis, *others) = plt.subplots(1, 4, figsize=(14, 3.6), layout="constrained", width_ratios=[2, 1, 1, 1])
    fine = torch.linspace(0, WEEK, 500, dtype=torch.float64)
    curves = study.logs(model.parameters_of(model.mean[:3]), torch.arange(3), fine).exp()
    for row in range(3):
        (line,) = axis.plot(fine[1:], curves[:, row], linewidth=1)
        axis.plot(study.t[row, 1:], seen[:, row].exp(), "o", color=line.get_color(), markersize=4)
    axis.set(xlabel="hours", ylabel="mg/l", title="three subjects: blood (points) and fits (lines)")
    found = model.parameters_of(model.mean)
    for i, other in enumerate(others):
        ends = [truth[:, i].min(), truth[:, i].max()]
        other.plot(ends, ends, color="black", linewidth=0.8)
        other.plot(truth[:, i], found[:, i], ".", color="tab:red")
        other.set(xlabel="in truth", ylabel="found", title=NAMES[i])
    save(figure, path)


if __name__ == "__main__":
    main()
