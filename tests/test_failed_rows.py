"""Gradients with on_failure="return": rows that failed and that the loss leaves out leave the others as they are."""

import math

import pytest
import torch

import odenet_cuda
from odenet_cuda import solve

GRADIENTS = ["direct", "checkpoint", "adjoint", "quadrature"]
TIMES = [0.0, 0.25, 0.6, 1.0]  # row 1 blows up at t = 0.4
OPTIONS = {"rtol": 1e-8, "atol": 1e-8, "on_failure": "return", "max_num_steps": 500}
RTOL = 1e-5  # of the adjoints at this tolerance


def start():
    return torch.tensor([[0.5], [2.5], [0.2]], dtype=torch.float64, requires_grad=True)


def blow_up(rate):
    """y' = rate y^2, y = y0 / (1 - rate y0 t)"""
    return lambda t, y: rate * y * y


def exact(rate, y0, t):
    return y0 / (1 - rate * y0 * t)


def gradients(gradient, loss, control="per_sample", func=blow_up, rows=slice(None), **options):
    rate = torch.ones((), dtype=torch.float64, requires_grad=True)
    y0 = start()
    t = torch.tensor(TIMES, dtype=torch.float64, requires_grad=True)
    solution = solve(func(rate), y0[rows], t, gradient=gradient, step_control=control, **{**OPTIONS, **options})
    return torch.autograd.grad(loss(solution.ys), (y0, rate, t), allow_unused=True), solution


def expected(loss):
    rate = torch.ones((), dtype=torch.float64, requires_grad=True)
    y0 = start()
    t = torch.tensor(TIMES, dtype=torch.float64, requires_grad=True)
    ys = torch.stack([exact(rate, y0, time - t[0]) for time in t])
    return torch.autograd.grad(loss(ys), (y0, rate, t), allow_unused=True)


def reached(ys):
    """Leaves out what was not reached, and takes in what row 1 reached."""
    return ys[-1, [0, 2]].sum() + 2 * ys[1].sum()


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("loss", [reached, lambda ys: ys[:, [0, 2]].sum()], ids=["reached", "other rows"])
def test_what_the_loss_leaves_out_has_no_part(gradient, loss):
    found, solution = gradients(gradient, loss)
    assert [word == "success" for word in solution.status] == [True, False, True]
    for x, y in zip(found, expected(loss), strict=True):
        torch.testing.assert_close(x, y, rtol=RTOL, atol=1e-8)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_what_the_loss_uses_is_nan(gradient):
    (grad_y0, grad_rate, grad_t), _ = gradients(gradient, lambda ys: ys[-1].sum())
    good = expected(lambda ys: ys[-1, [0, 2]].sum())[0]
    assert grad_y0[1].isnan().all() and grad_rate.isnan() and grad_t.isnan().all()
    torch.testing.assert_close(grad_y0[[0, 2]], good[[0, 2]], rtol=RTOL, atol=1e-8)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_joint_control(gradient):
    """There all rows end with the first that fails."""
    loss = lambda ys: ys[:2].sum()  # noqa: E731
    found, solution = gradients(gradient, loss, control="joint")
    assert solution.status != "success"
    for x, y in zip(found, expected(loss), strict=True):
        torch.testing.assert_close(x, y, rtol=RTOL, atol=1e-8)
    spoilt, _ = gradients(gradient, lambda ys: ys.sum(), control="joint")
    assert all(x.isnan().all() for x in spoilt)


def not_a_number(rate):
    """As blow_up, but row 1 ends at once: the square root of a negative number, whose derivative is none either."""

    def func(t, y):
        return rate * torch.where(y > 2, torch.sqrt(2 - y), y * y)

    return func


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_row_that_is_never_a_number(gradient):
    loss = lambda ys: ys[:, [0, 2]].sum()  # noqa: E731
    found, solution = gradients(gradient, loss, func=not_a_number)
    assert solution.status[1] == "non-finite values"
    for x, y in zip(found, expected(loss), strict=True):
        torch.testing.assert_close(x, y, rtol=RTOL, atol=1e-8)


def test_a_row_without_a_cotangent_is_not_solved_back():
    """The way back of row 1 would blow up: y' = -rate y^2 from a state near zero has a pole in the past."""
    rate = torch.ones((), dtype=torch.float64, requires_grad=True)
    y0 = torch.tensor([[1.0], [1e9]], dtype=torch.float64, requires_grad=True)
    options = {"gradient": "adjoint", "step_control": "per_sample", "rtol": 1e-6, "atol": 1e-6, "max_num_steps": 300}
    ys = solve(lambda t, y: -rate * y * y, y0, [0.0, 1.0], **options).ys
    grad_y0, grad_rate = torch.autograd.grad(ys[-1, 0].sum(), (y0, rate))
    assert grad_y0[1] == 0 and math.isclose(grad_y0[0], 0.25, rel_tol=1e-4)
    assert math.isclose(grad_rate, -0.25, rel_tol=1e-4)


class Compilable(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rate = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, t, y):
        return self.rate * y * y


@pytest.mark.parametrize("gradient", ["direct", "adjoint"])
def test_compiled(gradient):
    net, y0 = Compilable(), start()
    solution = solve(odenet_cuda.compile(net), y0, TIMES, gradient=gradient, step_control="per_sample", **OPTIONS)
    assert [word == "success" for word in solution.status] == [True, False, True]
    found = torch.autograd.grad(reached(solution.ys), (y0, net.rate), retain_graph=True)
    for x, y in zip(found, expected(reached)[:2], strict=True):
        torch.testing.assert_close(x, y, rtol=RTOL, atol=1e-8)
    grad_y0, grad_rate = torch.autograd.grad(solution.ys.sum(), (y0, net.rate))
    assert grad_y0[1].isnan().all() and grad_rate.isnan() and grad_y0[[0, 2]].isfinite().all()


# ---- rows that were rejected, with what is no number ----


@pytest.mark.parametrize("method", ["dopri5", "vern7", "rodas5p", "kvaerno5", "auto"])
@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "quadrature"])
def test_a_rejected_row_that_overflows(method, gradient):
    """It is tried again, while another was accepted in that step: what it tried then has no part in any gradient."""
    found = []
    for samples in ((0, 1, 2), (0,), (1,), (2,)):
        rate = torch.tensor(1.1, dtype=torch.float64, requires_grad=True)
        y0 = torch.tensor([[9.0], [0.3], [-0.2]], dtype=torch.float64)[list(samples)].requires_grad_()
        t = torch.tensor([0.0, 0.1, 0.5], dtype=torch.float64, requires_grad=True)
        how = {"first_step": 0.25, "rtol": 1e-4, "atol": 1e-4, "step_control": "per_sample"}
        func = lambda t, y, rate=rate: 0.1 * torch.sin(t) - rate * y**9  # noqa: E731
        solution = solve(func, y0, t, method=method, gradient=gradient, **how)
        assert bool(solution.ys.isfinite().all()) and (0 not in samples or int(solution.stats.num_rejected[0]) > 3)
        found.append(torch.autograd.grad(solution.ys.sum(), (y0, rate, t)))
    together, alone = found[0], found[1:]
    torch.testing.assert_close(together[0], torch.cat([x[0] for x in alone]), rtol=1e-4, atol=1e-5)
    for i in (1, 2):
        torch.testing.assert_close(together[i], sum([x[i] for x in alone]), rtol=1e-4, atol=1e-5)
