"""stats.adjoint_drift: how far the adjoint's backward solve came back from the states of the solve."""

import warnings

import pytest
import torch
from torch import nn

import odenet_cuda
from odenet_cuda import solve
from odenet_cuda.gradients import drift

ORDINARY = 100  # multiples of the tolerance, in a training


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(drift, "_warned", False)


def lorenz(t, y):
    a, b, c = y.unbind(-1)
    return torch.stack([10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c], -1)


def lorenz_stats(func=lorenz, **options):
    y0 = torch.tensor([[1.0, 1.0, 1.0], [2.0, 3.0, 20.0]], dtype=torch.float64, requires_grad=True)
    solution = solve(func, y0, [0.0, 1.0], rtol=1e-9, atol=1e-9, gradient="adjoint", **options)
    solution.ys[-1].sum().backward()
    return solution.stats


@pytest.mark.parametrize("step_control", ["joint", "per_sample"])
def test_chaos_is_said_once(step_control):
    with pytest.warns(UserWarning, match="quadrature.*stats.adjoint_drift"):
        stats = lorenz_stats(step_control=step_control)
    assert float(torch.as_tensor(stats.adjoint_drift).max()) > drift._TRUSTED
    if step_control == "per_sample":
        assert stats.adjoint_drift.shape == (2,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lorenz_stats(step_control=step_control)


def test_compiled():
    with pytest.warns(UserWarning, match="adjoint_drift"):
        stats = lorenz_stats(odenet_cuda.compile(lorenz), step_control="per_sample")
    assert (stats.adjoint_drift > drift._TRUSTED).all()


@pytest.mark.parametrize("tol", [1e-3, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_training_is_not_warned(tol, dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 4)).to(dtype)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    x = torch.randn(16, 4, dtype=dtype)
    largest = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            solution = solve(lambda t, y: net(y), x, [0.0, 0.5, 1.0], rtol=tol, atol=tol, gradient="adjoint")
            optimizer.zero_grad()
            (solution.ys[-1] - 2 * x.roll(1, 1)).square().mean().backward()
            optimizer.step()
            largest = max(largest, solution.stats.adjoint_drift)
    assert 0 < largest < ORDINARY


def test_it_is_the_distance_in_tolerances():
    """One step of Euler forwards and back: y0 (1 - h)(1 + h) for y0."""
    y0 = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    solution = solve(lambda t, y: -y, y0, [0.0, 0.1], method="euler", rtol=1e-2, atol=1e-3, gradient="adjoint")
    assert solution.stats.adjoint_drift == 0
    solution.ys[-1].sum().backward()
    with torch.no_grad():
        solution.ys.zero_()  # the user's: what is asked for later is of the solve
    assert solution.stats.adjoint_drift == pytest.approx(2 * 0.1**2 / (1e-3 + 1e-2 * 2), rel=1e-9)


def test_other_gradients_have_none():
    y0 = torch.ones(2, requires_grad=True)
    for gradient in ("direct", "checkpoint", "quadrature"):
        solution = solve(lambda t, y: -y, y0, [0.0, 1.0], gradient=gradient)
        solution.ys[-1].sum().backward()
        assert solution.stats.adjoint_drift == 0
