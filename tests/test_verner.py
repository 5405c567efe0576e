"""vern7 and vern9 in solves; their coefficients are held against the order conditions in test_methods.py."""

import math

import pytest
import torch
from compile_native import require_compiler
from torch import nn

import odenet_cuda
from odenet_cuda import solve

D = torch.float64
METHODS = ["vern7", "vern9"]
ORDER = {"vern7": 7, "vern9": 9}
Y0 = torch.tensor([0.5, 0.0, 0.0, 3**0.5], dtype=D)  # of an orbit of eccentricity 0.5 and period 2 pi


def orbit(t, y):
    r, v = y[..., :2], y[..., 2:]
    return torch.cat([v, -r / r.norm(dim=-1, keepdim=True) ** 3], -1)


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 2)).double()

    def forward(self, t, y):
        return self.layers(y) * torch.cos(3 * t)


@pytest.mark.parametrize("control", ["joint", "per_sample"])
@pytest.mark.parametrize("method", METHODS)
def test_an_orbit_comes_back(method, control):
    """After a period, forwards and backwards in time, at a tolerance near rounding."""
    y0 = Y0.expand(3, 4)
    for end in (2 * math.pi, -2 * math.pi):
        solution = solve(orbit, y0, [0.0, end], method=method, rtol=1e-12, atol=1e-12, step_control=control)
        assert (solution.ys[-1] - y0).abs().max() < 3e-10


def test_fewer_evaluations_than_dopri8_at_a_tight_tolerance():
    counts, errors = {}, {}
    for method in ("dopri5", "dopri8", "vern9"):
        solution = solve(orbit, Y0, [0.0, 2 * math.pi], method=method, rtol=1e-12, atol=1e-12)
        counts[method], errors[method] = solution.stats.nfe, (solution.ys[-1] - Y0).abs().max()
    assert counts["vern9"] < counts["dopri8"] < counts["dopri5"] / 2
    assert errors["vern9"] < 1e-10


@pytest.mark.parametrize("method", METHODS)
def test_order(method):
    """By steps of one size each: with no error control the error falls by 2^order where they are halved."""
    errors = []
    for steps in (12, 24) if method == "vern7" else (8, 16):
        size = 1.5 / steps
        options = {"first_step": size, "max_step": size, "min_step": size, "rtol": 1.0, "atol": 1.0}
        ends = solve(lambda t, y: y * torch.cos(4 * t), torch.ones(1, dtype=D), [0.0, 1.5], method=method, **options)
        assert ends.stats.num_accepted in (steps, steps + 1)
        errors.append(float((ends.ys[-1] - math.exp(math.sin(6.0) / 4)).abs()))
    assert ORDER[method] - 0.7 < math.log2(errors[0] / errors[1]) < ORDER[method] + 1.5


@pytest.mark.parametrize("gradient", ["checkpoint", "adjoint", "quadrature", "reversible"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients(method, gradient):
    """Of all that there is, as by the graphs that direct keeps."""
    grads = []
    for name in ("direct", gradient):
        func, y0 = Field(), torch.tensor([[0.3, -0.8], [1.1, 0.4]], dtype=D, requires_grad=True)
        t = torch.tensor([0.0, 1.0, 1.3], dtype=D, requires_grad=True)
        ys = solve(func, y0, t, method=method, rtol=1e-10, atol=1e-10, gradient=name).ys
        grads.append(torch.autograd.grad((ys**2).sum(), (y0, t, *func.parameters())))
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_outputs_inside_steps_and_at_their_ends(method):
    """The interpolant is of lower order than the method; step_t makes outputs the ends of steps."""
    t = torch.linspace(0, 2 * math.pi, 12, dtype=D)
    exact = solve(orbit, Y0, t, method="dopri8", rtol=1e-13, atol=1e-13, step_t=t[1:-1]).ys
    options = {"method": method, "rtol": 1e-11, "atol": 1e-11}
    inside = (solve(orbit, Y0, t, **options).ys - exact).abs().amax(1)
    ends = (solve(orbit, Y0, t, step_t=t[1:-1], **options).ys - exact).abs().amax(1)
    assert ends.max() < 2e-10 and ends.max() < inside.max() < 2e-9


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("method", METHODS)
def test_compiled(method):
    require_compiler()
    field = odenet_cuda.compile(Field())
    y0 = torch.tensor([[0.3, -0.8], [1.1, 0.4]], dtype=D)
    options = {"method": method, "rtol": 1e-9, "atol": 1e-9}
    with torch.no_grad():
        found = solve(field, y0, [0.0, 1.0, 2.0], **options)
        expected = solve(field, y0, [0.0, 1.0, 2.0], compile=False, **options)
    assert found.engine == "compiled", found.explanation
    torch.testing.assert_close(found.ys, expected.ys, rtol=1e-9, atol=1e-9)
