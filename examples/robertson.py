"""Stiff kinetics: the three rates of Robertson's reaction, over nine orders of magnitude, fitted to concentrations.

    python examples/robertson.py [--short] [--compare] [--out demo_results]

A -> B, B + B -> C + B, B + C -> A + C. An explicit method would take millions of steps; `rodas5p` takes some tens. The rates
are fitted in their logarithms by L-BFGS, with gradients of the discrete solve. B is never above 4e-5 and is weighted by that.
"""

import torch
from gallery import beside, options, plt, progress, save
from torch import Tensor

import odenet_cuda
from odenet_cuda import solve

RATES = torch.tensor([0.04, 3e7, 1e4], dtype=torch.float64)
START = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
SCALE = torch.tensor([1.0, 4e-5, 1.0], dtype=torch.float64)
NOISE = 0.01  # of the scale
OPTIONS = {"method": "rodas5p", "rtol": 1e-5, "atol": 1e-9}
COMPARED = 0.3  # the span, in seconds, of what an explicit method is asked for


def kinetics(t: Tensor, y: Tensor, log_rates: Tensor) -> Tensor:
    k1, k2, k3 = log_rates.exp()
    a, b, c = y.unbind(-1)
    forward, pair, back = k1 * a, k2 * b * b, k3 * b * c
    return torch.stack([back - forward, forward - back - pair, pair], -1)


FIELD = odenet_cuda.compile(kinetics)  # a solve and its gradient in one call each


def concentrations(log_rates: Tensor, t: Tensor) -> Tensor:
    """[T, 3]."""
    return solve(FIELD, START, t, args=(log_rates,), **OPTIONS).ys


def main() -> None:
    arguments = options(__doc__)
    last, count = (2, 6) if arguments.short else (5, 25)
    t = torch.cat([torch.zeros(1), torch.logspace(-4, last, count)]).double()
    truth = RATES.log()
    with torch.no_grad():
        exact = concentrations(truth, t)
    seen = exact + NOISE * SCALE * torch.randn_like(exact)
    guess = (truth + torch.tensor([0.7, -1.0, 0.8], dtype=torch.float64)).requires_grad_()
    optimiser = torch.optim.LBFGS([guess], lr=0.5, max_iter=1, history_size=6)
    losses = []

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = ((concentrations(guess, t) - seen) / SCALE).square().mean()
        loss.backward()
        return loss

    bar = progress(range(2 if arguments.short else 30), "rates")
    for _ in bar:
        losses.append(optimiser.step(closure).item())
        bar.set_postfix_str(f"loss {losses[-1]:.2e}")
    print(f"{solve(FIELD, START, t, args=(guess.detach(),), **OPTIONS).stats}")
    for name, value, true in zip(("k1", "k2", "k3"), guess.detach().exp().tolist(), RATES.tolist(), strict=True):
        print(f"{name}: {value:.4g}, in truth {true:g}")
    if arguments.compare:
        compare(truth.clone().requires_grad_())
    with torch.no_grad():
        draw(guess.detach(), seen, t, losses, arguments.out / "robertson.png")


def compare(log_rates: Tensor) -> None:
    """Over a short span: the explicit methods of torchdiffeq need steps of a millisecond however long they go on."""
    t = torch.tensor([0.0, COMPARED], dtype=torch.float64)

    def ours() -> Tensor:
        return torch.autograd.grad(concentrations(log_rates, t)[-1, 0], log_rates)[0]

    def theirs(torchdiffeq) -> Tensor:
        ys = torchdiffeq.odeint(lambda t, y: kinetics(t, y, log_rates), START, t, rtol=1e-5, atol=1e-9)
        return torch.autograd.grad(ys[-1, 0], log_rates)[0]

    beside(f"{COMPARED} s of the reaction, with the gradient", ours, theirs, 1e-2, runs=3)


def draw(guess: Tensor, seen: Tensor, t: Tensor, losses: list[float], path) -> None:
    figure, (axis, other) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", width_ratios=[2, 1])
    fine = torch.cat([torch.zeros(1, dtype=torch.float64), torch.logspace(-4, float(t[-1].log10()), 200, dtype=torch.float64)])
    ys = concentrations(guess, fine)
    for i, name in enumerate(("A", "B, in 4e-5", "C")):
        (line,) = axis.semilogx(fine[1:], ys[1:, i] / SCALE[i], label=name)
        axis.semilogx(t[1:], seen[1:, i] / SCALE[i], "o", color=line.get_color(), markersize=4)
    axis.set(xlabel="seconds", title="concentrations: seen (points) and fitted (lines)")
    axis.legend()
    other.semilogy(losses)
    other.axhline(NOISE**2, color="#555555", linestyle="--", linewidth=0.8)
    other.set(xlabel="step of L-BFGS", title="squared error; dashed: the noise")
    save(figure, path)


if __name__ == "__main__":
    main()
