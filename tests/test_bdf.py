"""Backward differentiation formulas: their data, accuracy, steps beside scipy's, rows by themselves, gradients, refusals."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from odenet_cuda import Event, ODEBlock, SolverError, odeint, solve, steady_state, steps
from odenet_cuda.bdf import BDF, DIFFERENCES, MOST, coefficients, rescaled

D = torch.float64
pytestmark = pytest.mark.usefixtures("one_thread")
CONTROLS = ["joint", "per_sample"]
STIFF: dict[str, Any] = {"method": "bdf", "rtol": 1e-6, "atol": 1e-10}


def rober(t: Tensor, y: Tensor) -> Tensor:
    a, b, c = y.unbind(-1)
    one, two, three = 0.04 * a, 1e4 * b * c, 3e7 * b * b
    return torch.stack([two - one, one - two - three, three], -1)


def coupled(rate: float) -> Any:
    """Solved by 1 / sqrt(t + 1) and exp(sin t), to which others decay with the rate."""

    def func(t: Tensor, y: Tensor) -> Tensor:
        t = t.reshape(-1)
        a, b = y.unbind(-1)
        off = a * a * (t + 1) - 1, b * torch.exp(-torch.sin(t)) - 1
        return torch.stack([-(a**3) / 2 - rate * off[0], b * torch.cos(t) - rate * (off[1] + off[0] / 2)], -1)

    return func


def exact(t: Tensor) -> Tensor:
    return torch.stack([1 / (t + 1).sqrt(), t.sin().exp()], -1)


# ---- its data ----


def polynomial(degree: int, steps: float, at: float = 0.0) -> Tensor:
    """Backward differences of t^degree with this step, [DIFFERENCES, 1, 1]."""
    values = torch.tensor([(at - i * steps) ** degree for i in range(DIFFERENCES)], dtype=D)
    found = []
    for _ in range(DIFFERENCES):
        found.append(values[0])
        values = torch.cat([values[:-1] - values[1:], values[-1:] * 0])
    return torch.stack(found)[:, None, None]


@pytest.mark.parametrize("order", range(1, MOST + 1))
@pytest.mark.parametrize("factor", [0.2, 0.7, 3.0])
def test_differences_of_another_step(order: int, factor: float):
    """Of a polynomial of that degree they are exact."""
    for degree in range(order + 1):
        found = rescaled(polynomial(degree, 1.0), torch.tensor([order]), torch.tensor([factor], dtype=D))
        torch.testing.assert_close(found[: order + 1], polynomial(degree, factor)[: order + 1], rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("order", range(1, MOST + 1))
def test_interpolant_and_formula_of_polynomials(order: int):
    """Both are exact for the degree of the order: y(1 + theta) from the differences at 2, of points one apart."""
    theta = np.linspace(0, 1, 7)
    for degree in range(order + 1):
        values = np.array([(2.0 - i) ** degree for i in range(order + 1)])
        differences = [
            values[0],
            *[np.sum([(-1) ** i * math.comb(j, i) * values[i] for i in range(j + 1)]) for j in range(1, order + 1)],
        ]
        y = values[1] + sum(
            differences[j] * sum(a * theta ** (m + 1) for m, a in enumerate(BDF.p[j])) for j in range(1, order + 1)
        )
        np.testing.assert_allclose(y, (1 + theta) ** degree, rtol=1e-12, atol=1e-12)
        # and at the end of a step to 2 from the differences at 1: h y' = sum_j gamma_j D_j + gamma d, where d = 0
        old = polynomial(degree, 1.0, 1.0)[: order + 1].reshape(-1).numpy()
        gamma = coefficients(torch.device("cpu"))["gamma"].numpy()[: order + 1]
        assert gamma @ old == pytest.approx(degree * 2.0 ** (degree - 1), abs=1e-9)


# ---- accuracy ----


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("max_order", [2, 5])
def test_errors_follow_the_tolerance(control: str, max_order: int):
    """At the end and between; forwards and backwards in time, where the problem is not stiff."""
    for end, rate in ((2.0, 50.0), (-0.5, 0.5)):
        t = torch.linspace(0, end, 23, dtype=D)
        for tol in (1e-4, 1e-7):
            y0 = exact(torch.zeros(2, dtype=D))
            found = solve(coupled(rate), y0, t, method="bdf", rtol=tol, atol=tol, step_control=control, max_order=max_order)
            assert float((found.ys - exact(t)[:, None]).abs().max()) < (60 if max_order == 5 else 500) * tol


def test_higher_orders_take_fewer_steps():
    y0, counts = exact(torch.zeros(1, dtype=D)), []
    for order in range(1, MOST + 1):
        stats = solve(coupled(50.0), y0, [0.0, 2.0], method="bdf", rtol=1e-6, atol=1e-6, max_order=order).stats
        counts.append(stats.num_accepted)
    assert counts[0] > 5 * counts[1] > 8 * counts[4] and counts[1] > counts[2] > counts[4]


@pytest.mark.parametrize("rtol", [1e-4, 1e-7])
def test_steps_and_calls_are_those_of_scipy(rtol: float):
    """Of the same formulas: within a quarter."""
    y0 = [1.0, 0.0, 0.0]
    right = solve_ivp(lambda t, y: rober(t, torch.from_numpy(y)).numpy(), (0, 1e5), y0, "BDF", rtol=rtol, atol=1e-8 * rtol)
    found = solve(rober, torch.tensor(y0, dtype=D), [0.0, 1e5], method="bdf", rtol=rtol, atol=1e-8 * rtol)
    stats = found.stats
    assert stats.num_accepted + stats.num_rejected < 1.25 * len(right.t)
    assert stats.nfe < 1.25 * right.nfev
    known = torch.tensor([1.7865919e-2, 7.2748083e-8, 9.8213401e-1], dtype=D)
    fine = solve(rober, torch.tensor(y0, dtype=D), [0.0, 1e5], method="rodas5p", rtol=1e-9, atol=1e-17).ys[-1]
    torch.testing.assert_close(fine, known, rtol=1e-3, atol=0)
    assert float(((found.ys[-1] - fine) / fine).abs().max()) < 30 * rtol


def test_float32():
    found = solve(lambda t, y: -50 * (y - torch.cos(t)), torch.zeros(3), [0.0, 1.0], method="bdf", rtol=1e-4, atol=1e-4)
    x = (2500 * math.cos(1.0) + 50 * math.sin(1.0)) / 2501
    assert found.ys.dtype == torch.float32
    torch.testing.assert_close(found.ys[-1], torch.full((3,), x), rtol=1e-3, atol=1e-3)


# ---- rows ----


def test_a_row_is_what_it_is_alone():
    """With its own steps and order, whatever is beside it."""
    rates = torch.tensor([1.0, 30.0, 1000.0], dtype=D)[:, None]

    def func(t: Tensor, y: Tensor, rate: Tensor = rates) -> Tensor:
        return -rate * (y - torch.cos(t)) - y * y

    y0 = torch.tensor([[1.0, 0.5], [0.2, 0.1], [-0.5, 3.0]], dtype=D)
    together = solve(func, y0, [0.0, 1.0, 3.0], step_control="per_sample", **STIFF)
    assert len({int(n) for n in together.stats.num_accepted}) == 3
    for i in range(3):
        alone = solve(
            lambda t, y, i=i: func(t, y, rates[i : i + 1]), y0[i : i + 1], [0.0, 1.0, 3.0], step_control="per_sample", **STIFF
        )
        assert int(alone.stats.num_accepted[0]) == int(together.stats.num_accepted[i])
        torch.testing.assert_close(alone.ys[:, 0], together.ys[:, i], rtol=1e-12, atol=1e-14)
    fine = solve(func, y0, [0.0, 1.0, 3.0], method="rodas5p", rtol=1e-10, atol=1e-12, step_control="per_sample").ys
    torch.testing.assert_close(together.ys, fine, rtol=1e-4, atol=1e-5)


def test_one_row_is_the_same_under_both_controls():
    y0 = torch.tensor([[1.0, 0.0, 0.0]], dtype=D)
    found = [solve(rober, y0, [0.0, 40.0], step_control=control, **STIFF) for control in CONTROLS]
    torch.testing.assert_close(found[0].ys, found[1].ys, rtol=1e-12, atol=1e-16)
    assert found[0].stats.num_accepted == int(found[1].stats.num_accepted[0])


@pytest.mark.parametrize("late", [False, True])
def test_samples_that_func_couples_are_one_system(late: bool):
    """Also where that shows later alone."""

    def func(t: Tensor, y: Tensor) -> Tensor:
        flow = torch.zeros_like(y)
        flow[1:] += 300 * (y[:-1] - y[1:])
        flow[:-1] += 300 * (y[1:] - y[:-1])
        return -y + (flow if not late or float(t) > 0.01 else 0 * flow)

    y0 = torch.linspace(0, 1, 12, dtype=D).reshape(6, 2)
    found = solve(func, y0, [0.0, 0.3], **{**STIFF, "atol": 1e-7}, step_t=[0.01])
    right = solve(func, y0, [0.0, 0.3], method="dopri5", rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.ys, right.ys, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("control", CONTROLS)
def test_several_leaves_jac_and_sparsity(control: str):
    y0 = (torch.tensor([[1.0], [0.5]], dtype=D), torch.tensor([[0.2], [0.4]], dtype=D))
    func = lambda t, y: (-80 * (y[0] - y[1]), y[0] - y[1] ** 2)  # noqa: E731
    whole = lambda t, y: torch.cat(func(t, (y[:, :1], y[:, 1:])), 1)  # noqa: E731

    def jac(t: Tensor, y: Tensor) -> Tensor:
        one = torch.ones_like(y[:, 0])
        return torch.stack([torch.stack([-80 * one, 80 * one], 1), torch.stack([one, -2 * y[:, 1]], 1)], 1)

    how = {**STIFF, "step_control": control}
    one, two = solve(func, y0, [0.0, 2.0], **how).ys
    for known in ({}, {"jac": jac}, {"jac_sparsity": torch.ones(2, 2)}):
        torch.testing.assert_close(
            solve(whole, torch.cat(y0, 1), [0.0, 2.0], **how, **known).ys, torch.cat([one, two], 2), rtol=1e-5, atol=1e-8
        )


# ---- what a solve may ask for besides ----


@pytest.mark.parametrize("control", CONTROLS)
def test_jumps_stops_events_and_dense_output(control: str):
    how = {**STIFF, "step_control": control, "rtol": 1e-8, "atol": 1e-10}
    y0 = torch.ones(2, 1, dtype=D)
    jumpy = lambda t, y: torch.where(t < 1, -1.0, 2.0) * y  # noqa: E731
    ys = solve(jumpy, y0, [0.0, 2.0], jump_t=[1.0], step_t=[0.3], **how).ys
    torch.testing.assert_close(ys[-1], math.e * y0, rtol=1e-5, atol=0)
    found = solve(lambda t, y: -y, y0, [0.0, 3.0], dense=True, **how)
    t = torch.linspace(0, 3, 40, dtype=D)
    torch.testing.assert_close(found.interpolant(t)[:, :, 0], torch.exp(-t)[:, None].expand(40, 2), rtol=1e-5, atol=1e-6)
    ended = solve(lambda t, y: -y, y0, [0.0, 3.0], events=Event(lambda t, y: y[..., 0] - 0.5), **how)
    torch.testing.assert_close(
        ended.event_t.reshape(-1), torch.full_like(ended.event_t.reshape(-1), math.log(2)), rtol=1e-5, atol=0
    )


def test_resume_steps_and_rest():
    y0 = torch.tensor([1.0, 0.0, 0.0], dtype=D)
    first = solve(rober, y0, [0.0, 1.0], dense=True, **STIFF)
    second = solve(rober, None, [1.0, 40.0], resume=first, **STIFF)
    right = solve(rober, y0, [0.0, 40.0], method="rodas5p", rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(second.ys[-1], right.ys[-1], rtol=1e-4, atol=0)
    ratios = [float(step.error_ratio) for step in steps(rober, y0, 0.0, 40.0, **STIFF)]
    assert len(ratios) > 20 and max(ratios) <= 1 and len({round(x, 9) for x in ratios}) > 10
    rest = steady_state(lambda t, y: 100 * (1 - y), torch.zeros(2, dtype=D), method="bdf")
    torch.testing.assert_close(rest.y, torch.ones(2, dtype=D), rtol=1e-5, atol=1e-6)


# ---- gradients ----


class Rates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log_k = nn.Parameter(torch.zeros(2, dtype=D))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        k = torch.tensor([100.0, 1.0], dtype=D) * self.log_k.exp()
        a, b = y.unbind(-1)
        return torch.stack([-k[0] * (a - b * b), k[1] * (a - 2 * b)], -1)


@pytest.mark.parametrize("gradient", ["quadrature", "adjoint"])
@pytest.mark.parametrize("control", CONTROLS)
def test_gradients(gradient: str, control: str):
    """For y0, the times and parameters; those of a fine solve. The way back is by rodas5p."""
    found, end = [], 0.05 if gradient == "adjoint" else 1.0
    for how in (
        {"method": "bdf", "gradient": gradient, "rtol": 1e-7, "atol": 1e-9},
        {"method": "rodas5p", "rtol": 1e-9, "atol": 1e-11},
    ):
        func = Rates()
        y0 = torch.tensor([[1.0, 0.2], [0.4, 0.6]], dtype=D, requires_grad=True)
        t = torch.tensor([0.0, 0.3 * end, end], dtype=D, requires_grad=True)
        ys = solve(func, y0, t, step_control=control, **how).ys
        loss = (ys * torch.linspace(1, 2, ys.numel(), dtype=D).reshape(ys.shape)).sum()
        found.append(torch.autograd.grad(loss, [y0, t, func.log_k]))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_a_block():
    block = ODEBlock(Rates(), [0.0, 1.0], gradient="quadrature", **STIFF)
    block(torch.tensor([[1.0, 0.2]], dtype=D)).sum().backward()
    assert bool((block.func.log_k.grad != 0).all())


# ---- what ends in words ----


def test_refusals():
    y0 = torch.ones(2, dtype=D, requires_grad=True)
    func = lambda t, y: -y  # noqa: E731
    for gradient in ("direct", "checkpoint"):
        with pytest.raises(NotImplementedError, match=r"keeps no graphs.*gradient='quadrature', or 'adjoint'"):
            solve(func, y0, [0.0, 1.0], gradient=gradient, **STIFF)
    with pytest.raises(NotImplementedError, match="cannot be an adjoint_method"):
        solve(func, y0, [0.0, 1.0], gradient="adjoint", adjoint_method="bdf")
    for how, words in (
        ({"controller": "PI"}, "controller must be 'I' for method='bdf'"),
        ({"max_order": 6}, "max_order must be a whole number from 1 to 5, got 6"),
        ({"max_order": 0}, "max_order must be"),
        ({"mass": torch.eye(2)}, "mass is no option of method='bdf'"),
        ({"max_iters": 3}, "max_iters is no option of method='bdf'"),
    ):
        with pytest.raises(ValueError, match=words):
            solve(func, y0.detach(), [0.0, 1.0], **STIFF, **how)
    with pytest.raises(NotImplementedError, match="need an explicit method"):
        solve(func, y0.detach(), [0.0, 1.0], regularizers=["kinetic"], **STIFF)
    with pytest.raises(ValueError, match="no graph by which an implicit method could differentiate it"):
        solve(lambda t, y: -y.detach(), y0.detach(), [0.0, 1.0], **STIFF)
    assert odeint(func, y0.detach(), torch.tensor([0.0, 1.0]), method="bdf", options={"max_order": 2}).shape == (2, 2)


def test_failures_in_words():
    """Of one row alone."""
    with pytest.raises(SolverError, match="max_num_steps"):
        solve(rober, torch.tensor([1.0, 0, 0], dtype=D), [0.0, 1e5], max_num_steps=5, **STIFF)
    y0 = torch.tensor([[1.0, 0, 0], [math.nan, 0, 0]], dtype=D)
    found = solve(rober, y0, [0.0, 40.0], step_control="per_sample", on_failure="return", **STIFF)
    assert found.status == ["success", "non-finite values"]
    assert bool(found.ys[-1, 0].isfinite().all()) and bool(found.ys[-1, 1].isnan().all())
    with pytest.raises(SolverError):
        solve(lambda t, y: y * y, torch.ones(1, dtype=D), [0.0, 2.0], **STIFF)
