"""A mass matrix, also a singular one, and df/dy given by the user."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from odenet_cuda import Event, SolverError, odeint, solve

D = torch.float64
METHODS = ["rodas5p", "rosenbrock23"]
every_method = pytest.mark.parametrize("method", METHODS)
every_control = pytest.mark.parametrize("control", ["joint", "per_sample"])

pytestmark = pytest.mark.usefixtures("one_thread")

M = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.5], [0.3, 0.0, 1.0]], dtype=D)


def coupled(t: Tensor, y: Tensor) -> Tensor:
    a, b, c = y.unbind(-1)
    return torch.stack([-a * b + torch.sin(t.squeeze()), c - b**2, a - 30 * c], -1)


@every_method
@every_control
@pytest.mark.parametrize("ends", [[0.0, 0.4, 1.0], [1.0, 0.97]], ids=["forwards", "backwards"])
def test_a_regular_matrix(method: str, control: str, ends: list[float]):
    """As the explicit equation with its inverse."""
    y0 = torch.tensor([[1.0, 0.2, 0.1], [0.5, -0.3, 0.0]], dtype=D)
    tol = 1e-8 if method == "rodas5p" else 1e-5
    ys = solve(coupled, y0, ends, method=method, mass=M, step_control=control, rtol=tol, atol=tol).ys
    right = solve(lambda t, y: coupled(t, y) @ torch.linalg.inv(M).T, y0, ends, rtol=1e-11, atol=1e-12).ys
    torch.testing.assert_close(ys, right, rtol=200 * tol, atol=200 * tol)


def pendulum(t: Tensor, y: Tensor) -> Tensor:
    """x' = v, 0 = v + x z - cos t, 0 = z - x^2 - 1: of index 1."""
    x, v, z = y.unbind(-1)
    return torch.stack([v, v + x * z - torch.cos(t).squeeze(), z - x * x - 1], -1)


DIAGONAL = torch.diag(torch.tensor([1.0, 0.0, 0.0], dtype=D))


def eliminated(t: Tensor, x: Tensor) -> Tensor:
    return torch.cos(t) - x * (x * x + 1)


@every_method
@every_control
def test_a_singular_matrix(method: str, control: str):
    """An index-1 system, as what is left of it where the equations without a derivative are solved by hand."""
    x0 = torch.tensor([[0.3], [-0.5]], dtype=D)
    y0 = torch.cat([x0, 1 - x0 * (x0**2 + 1), x0**2 + 1], 1)
    tol = 1e-8 if method == "rodas5p" else 1e-5
    solution = solve(pendulum, y0, [0.0, 0.5, 2.0], method=method, mass=DIAGONAL, step_control=control, rtol=tol, atol=tol)
    right = solve(eliminated, x0, [0.0, 0.5, 2.0], rtol=1e-11, atol=1e-12).ys
    torch.testing.assert_close(solution.ys[..., :1], right, rtol=300 * tol, atol=300 * tol)
    torch.testing.assert_close(solution.ys[-1, :, 2:], right[-1] ** 2 + 1, rtol=300 * tol, atol=300 * tol)


def test_robertson_as_an_algebraic_system():
    """The third equation is that the sum is one; ends as of the differential one."""

    def func(t: Tensor, y: Tensor) -> Tensor:
        a, b, c = y.unbind(-1)
        return torch.stack([-0.04 * a + 1e4 * b * c, 0.04 * a - 1e4 * b * c - 3e7 * b * b, a + b + c - 1], -1)

    mass = torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=D))
    y0 = torch.tensor([1.0, 0.0, 0.0], dtype=D)
    known = torch.tensor([7.1582706871940509047e-1, 9.1855347645577639039e-6, 2.8416374574583035176e-1], dtype=D)
    for method, tol in (("rodas5p", 1e-7), ("rosenbrock23", 1e-4)):
        ys = solve(func, y0, [0.0, 40.0], method=method, mass=mass, rtol=tol, atol=tol * 1e-6).ys
        torch.testing.assert_close(ys[-1], known, rtol=100 * tol, atol=0)


@every_method
def test_order(method: str):
    """That of the method, for a system with equations without a derivative too."""
    x0 = torch.tensor([0.3], dtype=D)
    y0 = torch.cat([x0, 1 - x0 * (x0**2 + 1), x0**2 + 1])
    right = solve(eliminated, x0, [0.0, 1.0], method="dopri8", rtol=1e-13, atol=1e-14).ys[-1]
    errors = []
    for steps in (10, 20):
        forced = {"first_step": 1 / steps, "min_step": 1 / steps, "max_step": 1 / steps}
        ys = solve(pendulum, y0, [0.0, 1.0], method=method, mass=DIAGONAL, **forced).ys
        errors.append(float((ys[-1, :1] - right).abs()))
    assert math.log2(errors[0] / errors[1]) > (4.5 if method == "rodas5p" else 1.7)


@every_method
@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
def test_gradients(method: str, gradient: str):
    x0 = torch.tensor([0.3], dtype=D, requires_grad=True)
    t = torch.tensor([0.0, 0.05, 0.13], dtype=D, requires_grad=True)
    rate = torch.tensor(1.0, dtype=D, requires_grad=True)

    def loss(x0: Tensor, t: Tensor, rate: Tensor) -> Tensor:
        y0 = torch.cat([x0, torch.cos(t[:1]) - x0 * (x0**2 + 1), x0**2 + 1])

        def func(t: Tensor, y: Tensor) -> Tensor:
            return pendulum(t, y) * torch.stack([rate, torch.ones_like(rate), torch.ones_like(rate)])

        how = {"first_step": 1.0, "min_step": 1.0, "gradient": gradient}
        return solve(func, y0, t, method=method, mass=DIAGONAL, **how).ys.square().sum()

    assert torch.autograd.gradcheck(loss, (x0, t, rate), eps=1e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("mass", "error", "words"),
    [
        ([[1.0]], TypeError, r"mass must be a tensor \[n, n\], got list"),
        (torch.ones(2, 3), ValueError, r"shape \[n, n\], got torch.float32 \[2, 3\]"),
        (torch.eye(2, dtype=D), ValueError, "a row for each number of a system, got 2 for a state of 3 numbers"),
        (torch.eye(1, dtype=D), ValueError, r"mass must have shape \[3, 3\], as func falls into systems of 3 numbers"),
        (torch.eye(3) * math.nan, ValueError, "finite"),
        (torch.eye(3, requires_grad=True), ValueError, "must not require a gradient"),
    ],
    ids=str,
)
def test_wrong_matrices(mass: Any, error: type, words: str):
    with pytest.raises(error, match=words):
        solve(pendulum, torch.tensor([0.3, 0.673, 1.09], dtype=D), [0.0, 1.0], method="rodas5p", mass=mass)


def test_what_is_refused():
    y0 = torch.tensor([0.3, 0.673, 1.09], dtype=D)
    how: dict[str, Any] = {"method": "rodas5p", "mass": DIAGONAL}
    with pytest.raises(ValueError, match=r"y0 must fulfil the equations .*: there func is 0\.0?9"):
        solve(pendulum, torch.tensor([0.3, 0.673, 1.0], dtype=D), [0.0, 1.0], **how)
    for gradient in ("adjoint", "quadrature"):
        with pytest.raises(NotImplementedError, match="use gradient='direct' or 'checkpoint'"):
            solve(pendulum, y0, [0.0, 1.0], gradient=gradient, **how)
    with pytest.raises(ValueError, match="mass is no option of method='dopri5'"):
        solve(pendulum, y0, [0.0, 1.0], mass=DIAGONAL)
    with pytest.raises(NotImplementedError, match="interp='cubic'"):
        solve(pendulum, y0, [0.0, 1.0], interp="cubic", **how)
    with pytest.raises(NotImplementedError, match="events or jumps change the state"):
        solve(pendulum, y0, [0.0, 1.0], events=Event(lambda t, y: y[0], apply=lambda t, y: y), **how)
    with pytest.raises(SolverError):  # nothing determines the second number
        solve(lambda t, y: torch.stack([y[1], y[0] * 0]), torch.zeros(2, dtype=D), [0.0, 1.0], method="rodas5p",
              mass=torch.diag(torch.tensor([1.0, 0.0], dtype=D)))  # fmt: skip


# ---- df/dy given by the user ----


def rober(t: Tensor, y: Tensor) -> Tensor:
    a, b, c = y.unbind(-1)
    one, two, three = 0.04 * a, 1e4 * b * c, 3e7 * b * b
    return torch.stack([-one + two, one - two - three, three], -1)


def rober_jac(t: Tensor, y: Tensor) -> Tensor:
    a, b, c = y.unbind(-1)
    zero = torch.zeros_like(a)
    rows = [[zero - 0.04, 1e4 * c, 1e4 * b], [zero + 0.04, -1e4 * c - 6e7 * b, -1e4 * b], [zero, 6e7 * b, zero]]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


STIFF = ["rodas5p", "rosenbrock23", "kvaerno5", "kvaerno3", "implicit_euler", "radauIIA5"]


@pytest.mark.parametrize("method", STIFF)
@pytest.mark.parametrize("batch", [False, True])
def test_jac_gives_the_same_solve(method: str, batch: bool):
    """Called instead of as many products as there are numbers; func is called as often."""
    asked = []

    def jac(t: Tensor, y: Tensor) -> Tensor:
        asked.append(1)
        return rober_jac(t, y)

    y0 = torch.tensor([[1.0, 0, 0], [0.5, 0, 0.5]] if batch else [1.0, 0, 0], dtype=D)
    step = {"step_size": 0.01} if method in ("implicit_euler", "radauIIA5") else {"rtol": 1e-5, "atol": 1e-9}
    controls = ["joint", "per_sample"] if batch and "rtol" in step else ["joint"]
    for control in controls:
        found = solve(rober, y0, [0.0, 0.3], method=method, jac=jac, step_control=control, **step)
        right = solve(rober, y0, [0.0, 0.3], method=method, step_control=control, **step)
        torch.testing.assert_close(found.ys, right.ys, rtol=1e-7, atol=1e-13)
    assert asked


@pytest.mark.parametrize("method", ["kvaerno5", "implicit_euler", "rodas5p"])
def test_func_need_not_be_differentiable_with_jac(method: str):
    """Where df/dt is not needed either."""
    step = {"step_size": 0.05} if method == "implicit_euler" else {"rtol": 1e-6, "atol": 1e-8}
    how: dict[str, Any] = {"method": method, "jac": lambda t, y: torch.diag(-2 * y), **step}
    y0 = torch.tensor([1.0, 2.0], dtype=D)
    ys = solve(lambda t, y: (-y * y).detach(), y0, [0.0, 1.0], **how).ys
    torch.testing.assert_close(ys[-1], y0 / (1 + y0), rtol=0.05, atol=1e-4)
    if method == "rodas5p":
        with pytest.raises(ValueError, match=r"func depends on the time.*kvaerno5"):
            solve(lambda t, y: (-y * y * t).detach(), y0, [0.0, 1.0], **how)


@pytest.mark.parametrize("method", ["rodas5p", "kvaerno5", "gl4"])
@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "adjoint", "quadrature"])
def test_gradients_with_jac(method: str, gradient: str):
    """Are those without: where a derivative of df/dy is needed, it comes from torch. With args, which have gradients."""
    found = []
    for jac in (None, lambda t, y, rate: torch.diag_embed(-2 * rate * y)):
        y0 = torch.tensor([[1.0, 2.0]], dtype=D, requires_grad=True)
        rate = torch.tensor(0.7, dtype=D, requires_grad=True)
        step = {"step_size": 0.05} if method == "gl4" else {"rtol": 1e-7, "atol": 1e-9}
        func = lambda t, y, rate: -rate * y * y  # noqa: E731
        ys = solve(func, y0, [0.0, 1.0], args=(rate,), method=method, jac=jac, gradient=gradient, **step).ys
        found.append(torch.autograd.grad(ys[-1].sum(), [y0, rate]))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-9)


def test_a_wrong_jac_is_refused():
    y0, t = torch.tensor([[1.0, 2.0]], dtype=D), torch.tensor([0.0, 1.0], dtype=D)
    func = lambda t, y: torch.stack([-y[:, 0] * y[:, 1], y[:, 1]], 1)  # noqa: E731

    def right(t: Tensor, y: Tensor) -> Tensor:
        one = torch.ones_like(y[:, 0])
        return torch.stack([torch.stack([-y[:, 1], -y[:, 0]], 1), torch.stack([0 * one, one], 1)], 1)

    odeint(func, y0, t, method="rodas5p", options={"jac": right})
    for jac, error, words in (
        (lambda t, y: right(t, y).mT, ValueError, r"jac must give df/dy, \[..., i, j\] the derivative of slope i by number j"),
        (lambda t, y: right(t, y) * 1.1, ValueError, "jac must give df/dy"),
        (lambda t, y: right(t, y)[0, 0], ValueError, r"of shape \[1, 2, 2\] or \[2, 2\], got \[2\]"),
        (lambda t, y: 3.0, TypeError, "jac must return a tensor, got float"),
        (3, TypeError, "jac must be callable"),
    ):
        with pytest.raises(error, match=words):
            solve(func, y0, t, method="rodas5p", jac=jac)
    with pytest.raises(ValueError, match="jac is no option of method='dopri5'"):
        solve(func, y0, t, jac=right)
    with pytest.raises(ValueError, match="a state that is one tensor, got 2 leaves"):
        solve(lambda t, y: y, (y0, y0), t, method="rodas5p", jac=right)
