"""Adaptive stiff methods: orders, stiff problems with known ends, systems sample by sample, gradients, and what they refuse."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from odenet_cuda import SolverError, odeint, odeint_adjoint, solve
from odenet_cuda.jacobian import linearize
from odenet_cuda.methods import STIFF

D = torch.float64
every_method = pytest.mark.parametrize("method", STIFF)
ORDERS = {"rodas5p": (5, 4), "rosenbrock23": (2, 2), "kvaerno5": (5, 4), "kvaerno3": (3, 3)}  # of a step, of its interpolant


pytestmark = pytest.mark.usefixtures("one_thread")


# ---- orders ----


def two_leaves(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """DETEST's A2 and A3, coupled so that nothing is missed, with a closed form: 1 / sqrt(t + 1) and exp(sin t)."""
    a, b = y
    return -(a**3) / 2 + (b * torch.exp(-torch.sin(t)) - 1), b * torch.cos(t) + (a * a * (t + 1) - 1)


def exact(t: Tensor) -> tuple[Tensor, Tensor]:
    return 1 / (t + 1).sqrt(), t.sin().exp()


def errors(method: str, steps: int, t: Tensor) -> float:
    size = float(t[-1]) / steps
    y0 = tuple(x[:1] for x in exact(torch.zeros(1, dtype=D)))
    found = solve(two_leaves, y0, t, method=method, first_step=size, min_step=size, max_step=size).ys
    return max(float((x[:, 0] - y).abs().max()) for x, y in zip(found, exact(t), strict=True))


@every_method
def test_order(method: str):
    """Of steps of one size, at the end; and of the interpolant, inside them."""
    end = torch.tensor([0.0, 2.0], dtype=D)
    inside = torch.linspace(0, 2, 41, dtype=D)  # no step ends on most of these
    # an output inside a step is at most of its own order, and the step's error is there too
    for t, order in zip((end, inside), ORDERS[method], strict=True):
        coarse, fine = (errors(method, steps, t) for steps in (14, 28))
        assert abs(math.log2(coarse / fine) - order) < 0.45 or math.log2(coarse / fine) > order


@every_method
def test_error_estimate_falls_with_the_tolerance(method: str):
    ends = []
    for tol in (1e-3, 1e-5):
        solution = solve(two_leaves, tuple(x[:1] for x in exact(torch.zeros(1, dtype=D))), [0.0, 2.0],
                         method=method, rtol=tol, atol=tol)  # fmt: skip
        expected = exact(torch.tensor([2.0], dtype=D))
        error = max(float((x[-1] - y).abs().max()) for x, y in zip(solution.ys, expected, strict=True))
        assert error < (50 if method == "rodas5p" else 300) * tol
        ends.append(error)
    assert ends[1] < ends[0] / 5


# ---- stiff problems, whose ends are known to more digits than float64 has ----


def rober(t: Tensor, y: Tensor, rates: Any = (0.04, 1e4, 3e7)) -> Tensor:
    a, b, c = y.unbind(-1)
    one, two, three = rates[0] * a, rates[1] * b * c, rates[2] * b * b
    return torch.stack([-one + two, one - two - three, three], -1)


def vdpol(t: Tensor, y: Tensor) -> Tensor:
    a, b = y.unbind(-1)
    return torch.stack([b, ((1 - a * a) * b - a) / 1e-6], -1)


ENDS = {
    "rober": (rober, [1.0, 0, 0], 1e11, 1e-8, [2.08334014970129423e-8, 8.33336077033478340e-14, 9.99999979166515169e-1]),
    "vdpol": (vdpol, [2.0, 0], 2.0, 1e-2, [1.70616773217046501, -8.92809701024816548e-1]),
}


@pytest.mark.parametrize("problem", ENDS)
@pytest.mark.parametrize(
    ("method", "rtol", "most"),
    [("rodas5p", 1e-5, 300), ("rosenbrock23", 1e-3, 300), ("kvaerno5", 1e-5, 300), ("kvaerno3", 1e-3, 300)],
)
def test_known_ends(problem: str, method: str, rtol: float, most: int):
    """An explicit method takes thousands of steps here, of VDPOL, or would take 10^15, of ROBER."""
    func, y0, end, ratio, expected = ENDS[problem]
    solution = solve(func, torch.tensor(y0, dtype=D), [0.0, end], method=method, rtol=rtol, atol=rtol * ratio)
    known = torch.tensor(expected, dtype=D)
    assert float(((solution.ys[-1] - known) / known).abs().max()) < (30 if method == "rodas5p" else 200) * rtol
    assert solution.stats.num_accepted + solution.stats.num_rejected < 3 * most


def test_backwards_in_time_and_float32():
    y0 = torch.tensor([1.0, 0.5])
    func = lambda t, y: torch.stack([-y[0] * 50 + y[1], -y[1]])  # noqa: E731
    there = solve(func, y0, [0.0, 0.1], method="rodas5p", rtol=1e-5, atol=1e-6)
    back = solve(func, there.ys[-1], [0.1, 0.0], method="rodas5p", rtol=1e-5, atol=1e-6)
    assert back.ys.dtype == torch.float32
    torch.testing.assert_close(back.ys[-1], y0, rtol=2e-3, atol=2e-4)


# ---- systems, sample by sample ----


class Rates(nn.Module):
    def __init__(self, samples: int):
        super().__init__()
        self.first = nn.Parameter(torch.linspace(0.03, 0.05, samples, dtype=D))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return rober(t, y, (self.first, 1e4, 3e7))


def test_samples_are_systems_of_their_own():
    """Under both controls; and a sample is what it is alone."""
    func, y0 = Rates(3), torch.tensor([[1.0, 0, 0]] * 3, dtype=D)
    assert linearize(lambda t, y, stage: [func(t, y[0])], torch.zeros((), dtype=D), [y0 + 0.1], 1).dy.shape == (3, 3, 3)
    rows = solve(func, y0, [0.0, 40.0], method="rodas5p", rtol=1e-6, atol=1e-10, step_control="per_sample")
    joint = solve(func, y0, [0.0, 40.0], method="rodas5p", rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(joint.ys, rows.ys, rtol=1e-4, atol=1e-9)
    for i in range(3):
        alone = Rates(1)
        alone.first.data[:] = func.first[i]
        found = solve(alone, y0[i : i + 1], [0.0, 40.0], method="rodas5p", rtol=1e-6, atol=1e-10, step_control="per_sample")
        torch.testing.assert_close(found.ys[-1, 0], rows.ys[-1, i], rtol=1e-12, atol=1e-14)
        assert int(found.stats.num_accepted[0]) == int(rows.stats.num_accepted[i])


@pytest.mark.parametrize("late", [False, True])
def test_samples_that_func_couples_are_one_system(late: bool):
    """Also where that shows later alone: heat flows along axis 0, which is no batch."""

    def func(t: Tensor, y: Tensor) -> Tensor:
        flow = torch.zeros_like(y)
        flow[1:] += 300 * (y[:-1] - y[1:])
        flow[:-1] += 300 * (y[1:] - y[:-1])
        return -y + (flow if not late or float(t) > 0.01 else 0 * flow)

    y0 = torch.linspace(0, 1, 12, dtype=D).reshape(6, 2)
    solution = solve(func, y0, [0.0, 0.3], method="rodas5p", rtol=1e-7, atol=1e-9)
    expected = solve(func, y0, [0.0, 0.3], method="dopri5", rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(solution.ys, expected.ys, rtol=1e-5, atol=1e-7)
    if not late:
        assert solution.stats.num_accepted < expected.stats.num_accepted / 3


def test_derivative_by_the_time_is_that_of_each_sample():
    t = torch.tensor([[0.3], [0.7]], dtype=D)
    y = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=D)
    func = lambda t, y, stage: [torch.sin(2 * t) * y[0] + t * t]  # noqa: E731
    found = linearize(func, t, [y], 2)
    torch.testing.assert_close(found.dt, 2 * torch.cos(2 * t) * y + 2 * t)
    torch.testing.assert_close(found.dy, torch.eye(2, dtype=D) * torch.sin(2 * t)[:, :, None])
    joint = linearize(func, t[0, 0], [y], 1)
    torch.testing.assert_close(joint.dt, 2 * torch.cos(2 * t[0, 0]) * y + 2 * t[0, 0])
    assert linearize(lambda t, y, stage: [-y[0]], t, [y], 2).dt is None


# ---- gradients ----


@every_method
@pytest.mark.parametrize("control", ["joint", "per_sample"])
def test_gradients_are_those_of_the_steps(method: str, control: str):
    """For y0, the times and a parameter, against differences of solves in one step, which ends where the times do."""
    t = torch.tensor([0.0, 0.13], dtype=D, requires_grad=True)
    y0 = torch.tensor([[1.0, 0.2], [0.5, 0.4]], dtype=D, requires_grad=True)
    rate = torch.tensor(30.0, dtype=D, requires_grad=True)

    def loss(y0: Tensor, t: Tensor, rate: Tensor) -> Tensor:
        func = lambda t, y: torch.stack([-rate * (y[:, 0] - torch.cos(y[:, 1])), y[:, 0] * y[:, 1] - y[:, 1]], 1)  # noqa: E731
        sizes = {"first_step": 1.0, "min_step": 1.0}
        ys = solve(func, y0, t, method=method, step_control=control, **sizes).ys
        return (ys * torch.linspace(1, 2, ys.numel(), dtype=D).reshape(ys.shape)).sum()

    assert torch.autograd.gradcheck(loss, (y0, t, rate), eps=1e-6, atol=1e-6, rtol=1e-5)


@every_method
def test_gradients_of_rates(method: str):
    """Of a stiff solve, direct, against differences."""
    func, y0 = Rates(1), torch.tensor([[1.0, 0, 0]], dtype=D)
    how = {"method": method, "rtol": 1e-6 if method == "rodas5p" else 1e-4, "atol": 1e-10}
    solve(func, y0, [0.0, 40.0], **how).ys[-1, 0, 0].backward()
    ends = []
    with torch.no_grad():
        for shift in (1e-4, -1e-4):
            func.first += shift
            ends.append(float(solve(func, y0, [0.0, 40.0], method="rodas5p", rtol=1e-10, atol=1e-14).ys[-1, 0, 0]))
            func.first -= shift
    difference = (ends[0] - ends[1]) / 2e-4
    assert float(func.first.grad) == pytest.approx(difference, rel=1e-4 if method == "rodas5p" else 2e-2)


class Mixed(nn.Module):
    def __init__(self, rate: float):
        super().__init__()
        torch.manual_seed(3)
        self.rate = rate
        self.layer = nn.Linear(2, 2).to(D)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        stiff = torch.stack([-self.rate * (y[:, 0] - torch.cos(y[:, 1] * t.reshape(-1))), y[:, 0] * y[:, 1] - y[:, 1]], 1)
        return stiff + torch.tanh(self.layer(y))


def gradients(method: str, gradient: str, rate: float = 40.0, **how: Any) -> list[Tensor]:
    """For y0, the times, of which some lie inside steps, and parameters."""
    func = Mixed(rate)
    y0 = torch.tensor([[1.0, 0.2], [0.5, 0.4], [-1.0, 3.0]], dtype=D, requires_grad=True)
    t = torch.tensor([0.0, 0.03, 0.31, 0.5], dtype=D, requires_grad=True)
    ys = solve(func, y0, t, method=method, gradient=gradient, **how).ys
    loss = (ys * torch.linspace(1, 2, ys.numel(), dtype=D).reshape(ys.shape)).sum()
    return list(torch.autograd.grad(loss, [y0, t, *func.parameters()]))


@every_method
@pytest.mark.parametrize("control", ["joint", "per_sample"])
def test_steps_made_again_have_the_same_gradient(method: str, control: str):
    """However few states are kept."""
    tol = {"rtol": 1e-5, "atol": 1e-7} if method == "rodas5p" else {"rtol": 1e-3, "atol": 1e-4}
    right = gradients(method, "direct", step_control=control, **tol)
    for most in (None, 3):
        found = gradients(method, "checkpoint", step_control=control, max_checkpoints=most, **tol)
        for x, y in zip(found, right, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


@every_method
@pytest.mark.parametrize("gradient", ["adjoint", "quadrature"])
@pytest.mark.parametrize("control", ["joint", "per_sample"])
def test_backwards_by_the_method_itself(method: str, gradient: str, control: str):
    tol, rate = 1e-7 if method == "rodas5p" else 1e-5, 4.0 if gradient == "adjoint" else 40.0  # y grows on the way back
    right = gradients("dopri5", "direct", rate, rtol=1e-10, atol=1e-11)
    found = gradients(method, gradient, rate, step_control=control, rtol=tol, atol=tol)
    for x, y in zip(found, right, strict=True):
        torch.testing.assert_close(x, y, rtol=300 * tol, atol=300 * tol)


def test_quadrature_of_rates():
    """Of ROBER, whose way back no adjoint finds: the stored solution is needed, and a stiff method for a."""
    func, y0 = Rates(1), torch.tensor([[1.0, 0, 0]], dtype=D)
    how = {"method": "rodas5p", "rtol": 1e-7, "atol": 1e-11}
    solve(func, y0, [0.0, 40.0], **how).ys[-1, 0, 0].backward()
    right = float(func.first.grad)
    func.zero_grad()
    solution = solve(func, y0, [0.0, 40.0], gradient="quadrature", **how)
    solution.ys[-1, 0, 0].backward()
    assert float(func.first.grad) == pytest.approx(right, rel=1e-4)
    assert solution.stats.nfe_backward < 3000


def test_quadrature_of_leaves_of_several_ranks():
    """Under per-sample control the time has the rank of the first leaf alone."""

    def func(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        a, b = y
        t = t.reshape(-1, 1)
        return rate * torch.sin(t) * b.sum((1, 2))[:, None] - a, torch.cos(3 * t)[:, None] * b - 0.3 * b**3

    found = []
    for how in ({"method": "dopri8"}, {"method": "rodas5p", "gradient": "quadrature", "step_control": "per_sample"}):
        rate = torch.tensor(0.7, dtype=D, requires_grad=True)
        a = torch.linspace(0.5, 1.5, 9, dtype=D).reshape(3, 3).requires_grad_()
        b = torch.linspace(-1.0, 1.0, 12, dtype=D).reshape(3, 2, 2).requires_grad_()
        solution = solve(func, (a, b), [0.0, 1.0, 2.0], rtol=1e-9, atol=1e-9, **how)
        total = sum([(leaf * torch.arange(1, 1 + leaf.numel(), dtype=D).reshape(leaf.shape)).sum() for leaf in solution.ys])
        found.append(torch.autograd.grad(total, (a, b, rate)))
    for x, y in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_adjoint_by_an_explicit_method():
    """And by the method itself, which then differentiates func twice."""
    func = nn.Linear(2, 2).double()
    field = lambda t, y: torch.tanh(func(y))  # noqa: E731
    y0, t = torch.ones(1, 2, dtype=D), torch.tensor([0.0, 1.0], dtype=D)
    how = {"method": "rodas5p", "rtol": 1e-8, "atol": 1e-10, "adjoint_params": tuple(func.parameters())}
    found = []
    for more in ({}, {"adjoint_method": "dopri5"}):
        odeint_adjoint(field, y0, t, **how, **more).sum().backward()
        found.append(func.weight.grad.clone())
        func.zero_grad()
    odeint(field, y0, t, method="rodas5p", rtol=1e-8, atol=1e-10).sum().backward()
    for grad in found:
        torch.testing.assert_close(grad, func.weight.grad, rtol=1e-5, atol=1e-7)


# ---- what ends in words ----


def test_func_without_a_graph_is_refused():
    with pytest.raises(ValueError, match="no graph by which an implicit method could differentiate it"):
        solve(lambda t, y: -y.detach(), torch.ones(2, dtype=D), [0.0, 1.0], method="rodas5p")
    ys = solve(lambda t, y: torch.full_like(y, 2.0), torch.ones(2, dtype=D), [0.0, 1.0], method="rodas5p").ys
    torch.testing.assert_close(ys[-1], torch.full((2,), 3.0, dtype=D))


@pytest.mark.parametrize("dtype", [torch.complex128, torch.bfloat16])
def test_types_that_are_refused(dtype: torch.dtype):
    with pytest.raises(NotImplementedError, match="float32 or float64"):
        solve(lambda t, y: -y, torch.ones(2, dtype=dtype), [0.0, 1.0], method="rodas5p")


@pytest.mark.parametrize("control", ["joint", "per_sample"])
def test_a_step_whose_stages_are_not_found_is_rejected(control: str):
    """Newton's method finds no end of a step as long as the first that is tried; samples that do not need it keep theirs."""
    func = lambda t, y: 40 * torch.sin(40 * y) - y  # noqa: E731
    y0 = torch.tensor([[0.02], [0.05]], dtype=D)
    how = {"method": "kvaerno5", "first_step": 0.5, "rtol": 1e-7, "atol": 1e-9, "step_control": control}
    solution = solve(func, y0, [0.0, 0.5], **how)
    right = solve(func, y0, [0.0, 0.5], method="dopri8", rtol=1e-11, atol=1e-13).ys
    torch.testing.assert_close(solution.ys, right, rtol=1e-5, atol=1e-6)
    rejected = torch.as_tensor(solution.stats.num_rejected).reshape(-1)
    assert int(rejected[0]) >= 1
    alone = solve(func, y0[:1], [0.0, 0.5], **how)
    if control == "per_sample":
        assert torch.equal(alone.ys[:, 0], solution.ys[:, 0])


@pytest.mark.parametrize("method", ["kvaerno3", "kvaerno5"])
def test_second_derivatives_of_solved_stages(method: str):
    y0 = torch.tensor([[1.0, 0.2]], dtype=D, requires_grad=True)
    t = torch.tensor([0.0, 0.05, 0.13], dtype=D, requires_grad=True)
    rate = torch.tensor(3.0, dtype=D, requires_grad=True)

    def loss(y0: Tensor, t: Tensor, rate: Tensor) -> Tensor:
        func = lambda t, y: torch.stack([-rate * (y[:, 0] - torch.cos(y[:, 1] * t)), y[:, 0] * y[:, 1] - y[:, 1]], 1)  # noqa: E731
        how = {"first_step": 1.0, "min_step": 1.0, "rtol": 1e-9, "atol": 1e-9}
        return solve(func, y0, t, method=method, **how).ys.pow(2).sum()

    assert torch.autograd.gradgradcheck(loss, (y0, t, rate), eps=1e-5, atol=1e-5, rtol=1e-5)


def test_a_state_too_wide_is_refused():
    with pytest.raises(NotImplementedError, match="up to n = 2048"):
        solve(lambda t, y: -y, torch.ones(3000), [0.0, 1.0], method="rodas5p")


@every_method
def test_a_singular_matrix_is_a_rejected_step(method: str):
    """I - gamma dt J is 0 for the first step tried, and for no other."""
    step = STIFF[method].step
    rate = 1.0 / ((step.gamma if hasattr(step, "gamma") else step.a[-1][-1]) * 0.125)
    how = {"method": method, "first_step": 0.125, "rtol": 1e-6, "atol": 1e-9}
    solution = solve(lambda t, y: rate * y, torch.ones(1, dtype=D), [0.0, 0.25], **how)
    assert solution.stats.num_rejected >= 1
    assert float(solution.ys[-1]) == pytest.approx(math.exp(rate / 4), rel=1e-3)


def test_failures_in_words():
    with pytest.raises(SolverError, match="non-finite values"):
        solve(lambda t, y: (1 - t - y * 0).sqrt() * y, torch.ones(1, dtype=D), [0.0, 2.0], method="rodas5p")
    with pytest.raises(SolverError, match="max_num_steps"):
        solve(vdpol, torch.tensor([2.0, 0], dtype=D), [0.0, 2.0], method="rodas5p", max_num_steps=5)
    found = solve(vdpol, torch.tensor([[2.0, 0], [math.nan, 0]], dtype=D), [0.0, 0.1], method="rodas5p", rtol=1e-4,
                  atol=1e-4, step_control="per_sample", on_failure="return")  # fmt: skip
    assert found.status == ["success", "non-finite values"]
    assert bool(found.ys[-1, 0].isfinite().all()) and bool(found.ys[-1, 1].isnan().all())
