"""Adams methods on a grid: weights, orders, gradients, and what they say."""

import math
import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import odenet_cuda
from odenet_cuda import ODEBlock, odeint, odeint_adjoint, solve
from odenet_cuda.adams import _weights

D = torch.float64
METHODS = ["explicit_adams", "implicit_adams", "fixed_adams"]
every_method = pytest.mark.parametrize("method", METHODS)

pytestmark = pytest.mark.usefixtures("one_thread")


def two_leaves(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """With a closed form: 1 / sqrt(t + 1) and exp(sin t)."""
    a, b = y
    return -(a**3) / 2 + (b * torch.exp(-torch.sin(t)) - 1), b * torch.cos(t) + (a * a * (t + 1) - 1)


def exact(t: Tensor) -> tuple[Tensor, Tensor]:
    return 1 / (t + 1).sqrt(), t.sin().exp()


def error(method: str, t: Tensor, **options: Any) -> float:
    y0 = tuple(x[:1] for x in exact(t[:1]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = odeint(two_leaves, y0, t, method=method, rtol=1e-14, atol=1e-14, options=options)
    return max(float((x[:, 0] - y).abs().max()) for x, y in zip(found, exact(t), strict=True))


# ---- numbers ----


def test_weights():
    """The known ones of equal steps, and exact for polynomials on any nodes."""
    explicit, implicit = [55, -59, 37, -9], [9, 19, -5, 1]
    np.testing.assert_allclose(_weights(-torch.arange(4, dtype=D)).numpy() * 24, explicit, rtol=1e-14)
    np.testing.assert_allclose(_weights(1 - torch.arange(4, dtype=D)).numpy() * 24, implicit, rtol=1e-14)
    nodes = -torch.tensor([0, 0.3, 1.7, 2.0, 3.1, 4.5, 5, 6.2, 7.7, 8, 9.1, 10.4], dtype=D)
    weights = _weights(nodes)
    for power in range(12):
        terms = weights * nodes**power
        assert float(terms.sum()) == pytest.approx(1 / (power + 1), abs=1e-13 * float(terms.abs().sum()))


@pytest.mark.parametrize(("method", "order"), [("explicit_adams", 4), ("implicit_adams", 5), ("fixed_adams", 5)])
@pytest.mark.parametrize("grid", ["equal", "other", "backwards"])
def test_order(method: str, order: int, grid: str):
    """That of the steps with which they begin, on grids of any steps; and beyond, errors are small."""
    errors = []
    for steps in (40, 80, 160):
        x = torch.linspace(0, 1, steps + 1, dtype=D)
        t = {"equal": 2 * x, "other": 2 * x + 0.1 * torch.sin(8 * x), "backwards": 2 - 2 * x}[grid]
        errors.append(error(method, t, max_iters=40, max_order=5 if method == "explicit_adams" else 8))
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) > order - 0.7
    assert errors[-1] < 1e-6


def test_max_order():
    """More slopes are more exact; and its bounds."""
    t = torch.linspace(0, 2, 81, dtype=D)
    errors = [error("implicit_adams", t, max_order=order) for order in (4, 12)]
    assert errors[1] < errors[0]
    with pytest.warns(UserWarning, match="max_order is below 4, so every step is one of rk4"):
        low = odeint(lambda t, y: -y, torch.ones(1, dtype=D), t, method="explicit_adams", options={"max_order": 3})
    torch.testing.assert_close(low, odeint(lambda t, y: -y, torch.ones(1, dtype=D), t, method="rk4"), rtol=1e-14, atol=0)
    with pytest.raises(ValueError, match="max_order must be at most 12, got 13"):
        solve(lambda t, y: -y, torch.ones(1), t, method="explicit_adams", max_order=13)
    with pytest.raises(ValueError, match="max_order is no option of method='gl4', got 5"):
        solve(lambda t, y: -y, torch.ones(1), t, method="gl4", max_order=5)


def test_calls():
    class Counted(nn.Module):
        calls = 0

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            Counted.calls += 1
            return -y

    with torch.no_grad():
        solution = solve(Counted(), torch.ones(3), [0.0, 1.0], method="explicit_adams", step_size=0.1)
    assert Counted.calls == solution.stats.nfe == 1 + 2 * 4 + 8  # one a step after those with which it begins


def test_float32_complex_and_outputs_inside():
    t = torch.tensor([0.0, 0.33, 1.0], dtype=D)
    for dtype in (torch.float32, torch.complex64, torch.complex128):
        y0 = torch.tensor([1.0, 0.5], dtype=dtype)
        found = odeint(lambda t, y: -y * t, y0, t, method="implicit_adams", options={"step_size": 0.02, "interp": "cubic"})
        assert found.dtype == dtype
        right = y0 * torch.exp(-t.square() / 2)[:, None].to(dtype)
        torch.testing.assert_close(found, right, rtol=1e-5 if dtype is not torch.complex128 else 1e-7, atol=1e-7)


def test_a_corrector_that_does_not_converge_is_said():
    """By its own atol: torchdiffeq's takes rtol for both."""
    func = lambda t, y: -3 * y  # noqa: E731
    t = torch.linspace(0, 3, 31, dtype=D)
    how = {"method": "implicit_adams", "rtol": 1e-3}
    with pytest.warns(UserWarning, match=r"did not converge at t = 0\.[1-9].*take smaller steps, raise max_iters"):
        odeint(func, torch.ones(1, dtype=D), t, **how, atol=1e-13, options={"max_iters": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        odeint(func, torch.ones(1, dtype=D), t, **how, atol=1e-3)


# ---- gradients ----


def field(rate: Tensor) -> Any:
    return lambda t, y: torch.stack([-rate * (y[:, 0] - torch.cos(y[:, 1] * t)), y[:, 0] * y[:, 1] - y[:, 1]], 1)


@pytest.mark.parametrize("method", METHODS[:2])
def test_gradients_are_those_of_the_steps(method: str):
    """For y0, a parameter, and the times, which are the grid: the weights of the slopes move with them."""
    y0 = torch.tensor([[1.0, 0.2], [0.5, 0.4]], dtype=D, requires_grad=True)
    t = torch.tensor([0.0, 0.1, 0.23, 0.3, 0.45, 0.5, 0.62], dtype=D, requires_grad=True)
    rate = torch.tensor(3.0, dtype=D, requires_grad=True)

    def loss(y0: Tensor, t: Tensor, rate: Tensor, **how: Any) -> Tensor:
        ys = solve(field(rate), y0, t, method=method, atol=1e-30, rtol=1e-30, max_iters=3, **how).ys
        return (ys * torch.linspace(1, 2, ys.numel(), dtype=D).reshape(ys.shape)).sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.autograd.gradcheck(loss, (y0, t, rate), eps=1e-6, atol=1e-7, rtol=1e-6)
        assert torch.autograd.gradgradcheck(loss, (y0, t, rate), eps=1e-6, atol=1e-6, rtol=1e-5)
        on_grid = lambda *args: loss(*args, step_size=0.09)  # noqa: E731
        assert torch.autograd.gradcheck(on_grid, (y0, t, rate), eps=1e-6, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS[:2])
@pytest.mark.parametrize("gradient", ["adjoint", "quadrature"])
@pytest.mark.parametrize("backwards", [False, True])
def test_continuous_gradients(method: str, gradient: str, backwards: bool):
    distances = []
    for steps in (20, 40):
        found = []
        for name, size in (("direct", 0.002), (gradient, 0.5 / steps)):
            layer = nn.Linear(2, 2).double()
            layer.weight.data = torch.tensor([[0.3, -1.0], [0.5, 0.2]], dtype=D)
            layer.bias.data = torch.tensor([0.1, -0.2], dtype=D)
            y0 = torch.tensor([[1.0, 0.2], [0.5, 0.4]], dtype=D, requires_grad=True)
            t = torch.tensor([0.5, 0.2, 0.0] if backwards else [0.0, 0.2, 0.5], dtype=D, requires_grad=True)
            func = lambda t, y, layer=layer: torch.tanh(layer(y)) * (1 + t)  # noqa: E731
            ys = solve(func, y0, t, method=method, gradient=name, step_size=size, max_order=5).ys
            found.append(torch.autograd.grad(ys.square().sum(), [y0, t, *layer.parameters()]))
        distances.append(max(float((x - y).abs().max()) for x, y in zip(*found, strict=True)))
    assert distances[1] < 1e-5 and (distances[1] < 1e-10 or math.log2(distances[0] / distances[1]) > 3)


def test_doors_and_refusals():
    torch.manual_seed(0)
    func = ODEBlock(nn.Linear(2, 2), [0.0, 1.0]).func
    module = type("Net", (nn.Module,), {"forward": lambda self, t, y: torch.tanh(func(y))})()
    module.layer = func
    y0, t = torch.ones(3, 2), torch.linspace(0, 1, 21)
    ys = odeint_adjoint(module, y0, t, method="implicit_adams", options={"max_order": 6})
    right = odeint(module, y0, t, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(ys, right, rtol=1e-4, atol=1e-5)
    block = ODEBlock(module, t, method="fixed_adams")
    block(y0).sum().backward()
    assert func.weight.grad.abs().sum() > 0
    with pytest.raises(NotImplementedError, match="use gradient='direct'"):
        solve(module, y0, t, method="explicit_adams", gradient="checkpoint")
    assert odenet_cuda.solve(module, y0, t, method="explicit_adams").engine == "stepper"
