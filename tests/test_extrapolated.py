"""Methods of two steps with one call a step, in their own formulas, and on diffusions with closed forms."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from odenet_cuda import odeint, odeint_adjoint, solve

D = torch.float64
METHODS = ["ab2", "dpmpp_2m"]
MEANS, SPREAD, SHARES = torch.tensor([-1.5, 0.5, 2.0], dtype=D), 0.3, torch.tensor([0.2, 0.5, 0.3], dtype=D)
every_method = pytest.mark.parametrize("method", METHODS)

pytestmark = pytest.mark.usefixtures("one_thread")


def denoised(x: Tensor, sigma: Tensor) -> Tensor:
    """The mean of the data given x = data + sigma noise, data from a mixture of three Gaussians."""
    variance = SPREAD**2 + sigma**2
    shares = torch.softmax(SHARES.log() - (x[..., None] - MEANS) ** 2 / (2 * variance), -1)
    return (shares * (MEANS + SPREAD**2 / variance * (x[..., None] - MEANS))).sum(-1)


def mixture(s: Tensor, u: Tensor) -> Tensor:
    """du/ds for u = x / sigma, s = 1 / sigma."""
    return denoised(u / s, 1 / s)


def karras(steps: int, high: float = 20.0, low: float = 0.1, rho: float = 7.0) -> Tensor:
    """Karras et al. 2022 (arXiv:2206.00364), equation 5, from high to low."""
    place = torch.linspace(0, 1, steps + 1, dtype=D)
    return (high ** (1 / rho) + place * (low ** (1 / rho) - high ** (1 / rho))) ** rho


NOISE = 20.0 * torch.linspace(-2, 2, 9, dtype=D)


def test_is_the_published_sampler():
    """Algorithm 2 of Lu et al. in x and lambda = -log sigma."""
    sigmas = karras(8)
    x, last, h_last = NOISE, None, None
    for sigma, after in pairwise(sigmas):
        now, h = denoised(x, sigma), torch.log(sigma / after)
        better = now if last is None else (1 + h / (2 * h_last)) * now - h / (2 * h_last) * last
        x, last, h_last = after / sigma * x - torch.expm1(-h) * better, now, h
    us = odeint(mixture, NOISE / sigmas[0], 1 / sigmas, method="dpmpp_2m")
    torch.testing.assert_close(us[-1] * sigmas[-1], x, rtol=1e-12, atol=1e-12)


def test_is_the_published_formula_of_two_steps():
    t, y = torch.tensor([0.0, 0.1, 0.4, 0.5], dtype=D), torch.ones(1, dtype=D)
    rate = lambda t, y: torch.sin(3 * t) * y  # noqa: E731
    expected, last = [y], None
    for i in range(3):
        dt, k = t[i + 1] - t[i], rate(t[i], expected[-1])
        slope = k if last is None else k + dt / (t[i] - t[i - 1]) / 2 * (k - last)
        expected, last = [*expected, expected[-1] + dt * slope], k
    solution = solve(rate, y, t, method="ab2")
    torch.testing.assert_close(solution.ys, torch.stack(expected), rtol=1e-14, atol=1e-14)
    assert solution.stats.nfe == 4  # a step each, and the slope at the end


@every_method
@pytest.mark.parametrize("backwards", [False, True])
def test_order(method: str, backwards: bool):
    """On a diffusion, from noise to data and back, against tight dopri8."""
    errors = []
    for steps in (64, 128, 256):
        s = 1 / karras(steps)
        s = s.flip(0) if backwards else s
        u0 = torch.linspace(-2, 2, 9, dtype=D) * (20 if backwards else 1)
        ends = s[[0, -1]]
        right = odeint(mixture, u0, ends, method="dopri8", rtol=1e-12, atol=1e-12)[-1]
        errors.append(((odeint(mixture, u0, s, method=method)[-1] - right).abs().max() / right.abs().max()).item())
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert all(1.8 < order < 2.5 for order in orders), (errors, orders)


@every_method
def test_order_inside_steps(method: str):
    errors = []
    for steps in (64, 128, 256):
        t = torch.linspace(1, 3, 2 * steps + 1, dtype=D)
        found = odeint(mixture, NOISE / 20, t, method=method, options={"step_size": 2 / steps})[1::2]
        errors.append((found - odeint(mixture, NOISE / 20, t, rtol=1e-11, atol=1e-11)[1::2]).abs().max().item())
    assert all(1.8 < math.log2(a / b) < 2.5 for a, b in pairwise(errors)), errors


def test_one_gaussian_in_few_steps():
    """x(sigma) of a single Gaussian is known; eight calls come within 3 % of it, Euler's are four times as far."""
    spread = 0.5

    def one(s: Tensor, u: Tensor) -> Tensor:
        return spread**2 / (spread**2 + s**-2) * u / s

    sigmas = karras(8)
    right = NOISE * torch.sqrt((spread**2 + sigmas[-1] ** 2) / (spread**2 + sigmas[0] ** 2))
    found = [odeint(one, NOISE / sigmas[0], 1 / sigmas, method=m)[-1] * sigmas[-1] for m in ("dpmpp_2m", "euler")]
    far = [float((x - right).abs().max() / right.abs().max()) for x in found]
    assert far[0] < 0.03 and far[1] > 4 * far[0], far


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 2).to(D)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.layer(y)) * t


@every_method
def test_gradients(method: str):
    """Of the discrete solve: for the state, every time and the parameters, by differences."""
    func, y0 = Net(), torch.tensor([[1.0, -0.5], [0.2, 0.7]], dtype=D, requires_grad=True)
    t = torch.tensor([0.5, 0.7, 1.0, 1.6], dtype=D, requires_grad=True)
    weights = torch.linspace(1, 2, 16, dtype=D).view(4, 2, 2)

    def loss(y0: Tensor, t: Tensor, *_: Tensor) -> Tensor:
        return (solve(func, y0, t, method=method).ys * weights).sum()

    torch.autograd.gradcheck(loss, (y0, t, *func.parameters()))


@every_method
def test_gradients_by_the_adjoint(method: str):
    """Of the equation: they come together with those of the discrete solve at order 2."""
    func, y0 = Net(), torch.tensor([[1.0, -0.5]], dtype=D, requires_grad=True)
    t, found = torch.tensor([0.5, 1.5], dtype=D), []
    for run in (odeint_adjoint, odeint):
        ys = run(func, y0, t, method=method, options={"step_size": 1 / 256})
        found.append(torch.autograd.grad(ys[-1].square().sum(), [y0, *func.parameters()]))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@every_method
def test_samples_are_apart(method: str):
    s = 1 / karras(6)
    both = odeint(mixture, NOISE / 20, s, method=method)
    assert torch.equal(odeint(mixture, NOISE[2:5] / 20, s, method=method), both[:, 2:5])


@pytest.mark.parametrize("t", [[0.0, 1.0], [1.0, 0.5, -0.5]])
def test_times_that_have_no_logarithm(t: list[float]):
    with pytest.raises(ValueError, match=r"t of method='dpmpp_2m' must be positive, it is alpha / sigma; got -?0"):
        solve(mixture, NOISE, t, method="dpmpp_2m")
