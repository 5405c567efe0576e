"""Predators and prey fitted to noisy counts, from 64 first guesses at once.

    python examples/lotka_volterra.py [--short] [--compare] [--out demo_results]

Each guess of the four rates is a sample with a step size of its own; one solve and one gradient serve all. Guesses that end in
another minimum show how much luck one start would have been. The rates are fitted in their logarithms.
"""

import torch
from gallery import beside, options, plt, progress, save
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

import odenet_cuda
from odenet_cuda import solve

RATES = torch.tensor([1.1, 0.4, 0.4, 0.1], dtype=torch.float64)  # growth, hunted, death, fed
START = torch.tensor([10.0, 5.0], dtype=torch.float64)
TIMES = torch.linspace(0, 15, 31, dtype=torch.float64)
NOISE, GUESSES = 0.1, 64
TOLERANCES = {"rtol": 1e-6, "atol": 1e-6}


def populations(t: Tensor, y: Tensor, rates: Tensor) -> Tensor:
    growth, hunted, death, fed = rates.split(1, 1)
    prey, predators = y[:, :1], y[:, 1:]
    return torch.cat([prey * (growth - hunted * predators), predators * (fed * prey - death)], 1)


FIELD = odenet_cuda.compile(populations)


def paths(log_rates: Tensor, t: Tensor = TIMES, field=FIELD) -> Tensor:
    """[T, guesses, 2]."""
    y0 = START.expand(len(log_rates), 2)
    return solve(field, y0, t, args=(log_rates.exp(),), step_control="per_sample", gradient="checkpoint", **TOLERANCES).ys


def misfit(ys: Tensor, seen: Tensor) -> Tensor:
    """[guesses]: the mean squared error of the logarithms; counts err by a part of themselves."""
    return (ys.clamp_min(1e-6).log() - seen.log()[:, None]).square().mean((0, 2))


def main() -> None:
    arguments = options(__doc__)
    truth = RATES.log()[None]
    with torch.no_grad():
        seen = paths(truth)[:, 0] * torch.exp(NOISE * torch.randn(len(TIMES), 2, dtype=torch.float64))
    guesses = (truth + 0.4 * torch.randn(GUESSES, 4, dtype=torch.float64)).requires_grad_()
    first = guesses.detach().clone()
    optimiser = torch.optim.Adam([guesses], 0.03)
    steps = 5 if arguments.short else 400
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    history = []
    bar = progress(range(steps), "rates")
    for _ in bar:
        loss = misfit(paths(guesses), seen)
        optimiser.zero_grad()
        loss.sum().backward()
        optimiser.step()
        schedule.step()
        history.append(loss.detach().clone())
        bar.set_postfix_str(f"best {history[-1].min().item():.4f}, median {history[-1].median().item():.4f}", refresh=False)
    best = int(history[-1].argmin())
    found = guesses.detach()[best].exp()
    good = int((history[-1] < 1.05 * history[-1].min()).sum())
    print(f"served by: {FIELD.explain()}; {good} of {GUESSES} guesses within 5 % of the best misfit")
    for name, value, true in zip(("growth", "hunted", "death", "fed"), found.tolist(), RATES.tolist(), strict=True):
        print(f"{name}: {value:.4f}, in truth {true}")
    if arguments.compare:
        compare(first.requires_grad_(), seen)
    with torch.no_grad():
        draw(first.detach(), guesses.detach(), best, seen, torch.stack(history), arguments.out / "lotka_volterra.png")


def compare(guesses: Tensor, seen: Tensor) -> None:
    def theirs(torchdiffeq) -> Tensor:
        rates, y0 = guesses.exp(), START.expand(GUESSES, 2)
        ys = torchdiffeq.odeint(lambda t, y: populations(t, y, rates), y0, TIMES, **TOLERANCES)
        return torch.autograd.grad(misfit(ys, seen).sum(), guesses)[0]

    def ours() -> Tensor:
        return torch.autograd.grad(misfit(paths(guesses), seen).sum(), guesses)[0]

    beside(f"{GUESSES} fits, a step with its gradient", ours, theirs, 1e-3)


def draw(first: Tensor, last: Tensor, best: int, seen: Tensor, history: Tensor, path) -> None:
    figure, (axis, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained", width_ratios=[2, 1, 1])
    fine = torch.linspace(0, float(TIMES[-1]), 300, dtype=torch.float64)
    for i, name in enumerate(("prey", "predators")):
        (line,) = axis.plot(fine, paths(last[best : best + 1], fine)[:, 0, i], label=name)
        axis.plot(TIMES, seen[:, i], "o", color=line.get_color(), markersize=3)
    axis.set(xlabel="t", title="counts (points) and the best fit (lines)")
    axis.legend(fontsize=8)
    middle.semilogy(history, color="tab:blue", linewidth=0.5, alpha=0.5)
    middle.set(xlabel="step", title=f"misfit of {GUESSES} guesses")
    for state, color, name in ((first, "tab:gray", "first"), (last, "tab:red", "fitted")):
        right.loglog(state.exp()[:, 0], state.exp()[:, 1], ".", color=color, label=name)
    right.plot(*RATES[:2], "k+", markersize=12, label="truth")
    right.set(xlabel="growth", ylabel="hunted", title="two of the four rates")
    for axis in (right.xaxis, right.yaxis):
        axis.set_minor_formatter(NullFormatter())
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
    right.legend(fontsize=8)
    save(figure, path)


if __name__ == "__main__":
    main()
