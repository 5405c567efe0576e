"""Dense output: the solution at any time, for all samples or at times of each, with the gradient of the solve."""

import math

import pytest
import torch
from torch import nn

from odenet_cuda import odeint, odeint_dense, solve

D = torch.float64
TOLERANCES = {"rtol": 1e-8, "atol": 1e-8, "compile": False}
ROUNDING = 1e-12
START = torch.tensor([[1.0, 0.5], [2.0, -1.0], [0.3, 0.4]], dtype=D)
SPANS = torch.tensor([[0.0, 1.0, 2.0], [2.0, -1.0, math.nan], [0.5, math.nan, math.nan]], dtype=D)
INSIDE = torch.tensor(
    [[0.0, 0.3, 0.3, 1.99, 2.0], [1.5, 2.0, -1.0, 0.1, math.nan], [0.5, math.nan, 0.5, math.nan, 0.5]], dtype=D
)


class Turn(nn.Module):
    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(1.3, dtype=D))

    def forward(self, t, y):
        return self.rate * torch.stack([y[..., 1], -y[..., 0] * y[..., 1] ** 2 - 0.2 * y[..., 0]], -1) * torch.cos(0.3 * t)


def grads(values, inputs):
    weights = torch.cos(torch.arange(values.numel(), dtype=D)).reshape(values.shape)
    return torch.autograd.grad(torch.where(values.isnan(), 0, weights * values * values).sum(), inputs)


@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="joint"),
        pytest.param({"step_control": "per_sample"}, id="per-sample"),
        pytest.param({"method": "rk4", "step_size": 0.13}, id="grid"),
        pytest.param({"jump_t": [0.4]}, id="jumps"),
    ],
)
def test_values_and_gradients_are_those_of_outputs(options, gradient):
    """Many times in one call, unsorted and some twice: as outputs of the solve at these times, and for t too."""
    options = {**TOLERANCES, "gradient": gradient, **options}
    inside = torch.tensor([0.9, 0.2, 0.2, 1.7, 0.55], dtype=D)
    found = []
    for dense in (True, False):
        func, y0, ends = Turn(), START.clone().requires_grad_(), torch.tensor([0.0, 2.0], dtype=D, requires_grad=True)
        wanted = inside.clone().requires_grad_()
        if dense:
            solution = solve(func, y0, ends, dense=True, **options)
            ys = solution.interpolant(wanted.reshape(1, 5))[0]
            assert bool(grads(solution.ys, y0)[0].isfinite().all())  # the tape is not used up
        else:
            t = torch.cat([ends[:1], *(wanted[[i]] for i in (1, 4, 0, 3)), ends[1:]])
            ys = solve(func, y0, t, **options).ys[[3, 1, 1, 4, 2]]
        found.append((ys, *grads(ys, [y0, func.rate, ends, wanted])))
    (values, *first), (expected, *second) = found
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-9)
    for i, (x, y) in enumerate(zip(first, second, strict=True)):
        if i == 3:  # the second time that is twice has a gradient of its own
            x, y = torch.stack([x[0], x[1] + x[2], x[3], x[4]]), torch.stack([y[0], y[1] + y[2], y[3], y[4]])
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
@pytest.mark.parametrize("own", [False, True], ids=["common", "own"])
def test_times_of_each_sample(own, gradient):
    """[batch, T], after a solve with times for all and after one with times of each: each row as alone."""
    options = {**TOLERANCES, "gradient": gradient, "step_control": "per_sample", "dense": True}
    rows, t, inside = (3, SPANS, INSIDE) if own else (2, torch.tensor([0.0, 2.0], dtype=D), INSIDE[:2].clamp(min=0))
    found = []
    for alone in (False, True):
        func, y0 = Turn(), START[:rows].clone().requires_grad_()
        t_own, wanted = t.clone().requires_grad_(), inside.clone().requires_grad_()
        if alone:
            parts = []
            for i in range(rows):
                ends = t_own[i][~t[i].isnan()] if own else t_own
                interpolant = solve(func, y0[i : i + 1], ends, **options).interpolant
                part = interpolant(wanted[i].nan_to_num(float(t[i, 0] if own else t[0])))[:, 0]
                parts.append(torch.where(wanted[i].isnan()[:, None], math.nan, part))
            values = torch.stack(parts, 1)
        else:
            values = solve(func, y0, t_own, **options).interpolant(wanted, per_sample=True)
        found.append((values, *grads(values, [y0, func.rate, t_own, wanted])))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=ROUNDING, atol=ROUNDING, equal_nan=True)


def test_second_derivatives():
    """By t twice is the derivative of the slope; mixed with y0 too."""
    y0, t = START.clone().requires_grad_(), torch.tensor([0.7, 1.9], dtype=D, requires_grad=True)
    options = {"rtol": 1e-11, "atol": 1e-11, "compile": False}
    interpolant = solve(lambda t, y: -2 * y, y0, [0.0, 2.0], dense=True, **options).interpolant
    (by_t,) = torch.autograd.grad(interpolant(t).sum(), t, create_graph=True)
    by_y0, twice = torch.autograd.grad(by_t.sum(), [y0, t])
    decay = torch.exp(-2 * t.detach())
    torch.testing.assert_close(twice, 4 * decay * START.sum(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(by_y0, (-2 * decay).sum().expand(3, 2), rtol=1e-5, atol=1e-5)


def test_time_alone_has_a_gradient():
    """Of a solve in which nothing has: the slope."""
    t = torch.tensor([0.0, 0.3, 1.0], dtype=D, requires_grad=True)
    y0 = torch.tensor([1.0], dtype=D)
    interpolant = solve(lambda t, y: -y, y0, [0.0, 1.0], rtol=1e-10, atol=1e-10, dense=True).interpolant
    (grad,) = torch.autograd.grad(interpolant(t).sum(), t)
    torch.testing.assert_close(grad, -torch.exp(-t.detach()), rtol=1e-6, atol=1e-6)


def test_odeint_dense_has_gradients():
    """As odeint at the same times; without gradients under no_grad."""
    func, y0 = Turn(), START[0].clone().requires_grad_()
    interpolant = odeint_dense(func, y0, 0.0, 2.0)
    expected = odeint(func, y0, torch.tensor([0.0, 0.7, 2.0], dtype=D))
    for x, y in zip(grads(interpolant(0.7), [y0, func.rate]), grads(expected[1], [y0, func.rate]), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        assert not odeint_dense(func, y0, 0.0, 2.0)(0.7).requires_grad


@pytest.mark.parametrize("gradient", ["adjoint", "quadrature"])
def test_a_gradient_that_does_not_get_there_says_so(gradient):
    """The values are there; whoever asks for their gradient is told."""
    values = solve(Turn(), START, [0.0, 1.0], gradient=gradient, dense=True, **TOLERANCES).interpolant(0.5)
    expected = solve(Turn(), START, [0.0, 1.0], dense=True, **TOLERANCES).interpolant(0.5)
    torch.testing.assert_close(values, expected, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="does not reach the values of an interpolant"):
        values.sum().backward()


def test_beyond_the_end():
    """Refused in words that name the sample; NaN where a sample that failed did not get."""
    own = solve(Turn(), START, SPANS, step_control="per_sample", dense=True, **TOLERANCES).interpolant
    with pytest.raises(ValueError, match=r"t must lie in \[-1.0, 2.0\] for sample 1, .* got -1.5"):
        own(torch.tensor([[0.5], [-1.5], [0.5]]), per_sample=True)
    with pytest.raises(ValueError, match=r"t must lie in \[0.5, 0.5\] for sample 2, .* got 0.7"):
        own(0.7)
    assert own(0.5).shape == (3, 2)
    with pytest.raises(ValueError, match=r"t must have shape \[3, T\], got shape \[2, 1\]"):
        own(torch.zeros(2, 1), per_sample=True)
    joint = solve(Turn(), START, [0.0, 1.0], dense=True, **TOLERANCES).interpolant
    with pytest.raises(ValueError, match="per_sample needs step_control='per_sample'"):
        joint(torch.zeros(3, 1), per_sample=True)
    with pytest.raises(ValueError, match=r"t must lie in \[0.0, 1.0\], .* got 1.5"):
        joint([0.5, 1.5])
    y0 = torch.tensor([[0.5], [2.0]], dtype=D)  # the second is infinite at 0.5
    failed = solve(lambda t, y: y * y, y0, [0.0, 1.0], step_control="per_sample", dense=True, on_failure="return", **TOLERANCES)
    values = failed.interpolant([0.25, 0.75])[..., 0]
    torch.testing.assert_close(values[:, 0], 1 / (2 - torch.tensor([0.25, 0.75], dtype=D)), rtol=1e-6, atol=1e-6)
    assert bool(values[1, 1].isnan()) and abs(float(values[0, 1]) - 4.0) < 1e-5
