"""Implicit Runge-Kutta methods on a grid: orders, stiff problems, systems sample by sample, gradients, and failures in
words."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import odenet_cuda
from odenet_cuda import Event, ODEBlock, SolverError, odeint, odeint_adjoint, odeint_event, solve
from odenet_cuda.methods import IMPLICIT

D = torch.float64
ORDERS = {"implicit_euler": 1, "implicit_midpoint": 2, "trapezoid": 2, "sdirk2": 2, "trbdf2": 2, "radauIIA3": 3, "gl4": 4,
          "radauIIA5": 5, "gl6": 6}  # fmt: skip
every_method = pytest.mark.parametrize("method", ORDERS)
# One that solves its stages one by one and begins with an explicit one, one that solves them together, one without y1 as stage.
KINDS = ("trbdf2", "radauIIA3", "gl4")
every_kind = pytest.mark.parametrize("method", KINDS)

pytestmark = pytest.mark.usefixtures("one_thread")


def two_leaves(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """With a closed form: 1 / sqrt(t + 1) and exp(sin t)."""
    a, b = y
    return -(a**3) / 2 + (b * torch.exp(-torch.sin(t)) - 1), b * torch.cos(t) + (a * a * (t + 1) - 1)


def exact(t: Tensor) -> tuple[Tensor, Tensor]:
    return 1 / (t + 1).sqrt(), t.sin().exp()


def errors(method: str, steps: int, t: Tensor) -> float:
    y0 = tuple(x[:1] for x in exact(t[:1]))
    found = solve(two_leaves, y0, t, method=method, step_size=float((t[-1] - t[0]).abs()) / steps).ys
    return max(float((x[:, 0] - y).abs().max()) for x, y in zip(found, exact(t), strict=True))


# ---- orders ----


def test_all_are_there():
    assert set(ORDERS) == set(IMPLICIT)
    assert all(IMPLICIT[name].order == order for name, order in ORDERS.items())


@every_method
@pytest.mark.parametrize("backwards", [False, True])
def test_order(method: str, backwards: bool):
    """At the end, and inside steps, where the interpolant has order 3 at most."""
    ends = (2.0, 0.0) if backwards else (0.0, 2.0)
    order = ORDERS[method]
    steps = {1: (100, 200), 5: (8, 16), 6: (8, 16)}.get(order, (20, 40))
    coarse, fine = (errors(method, n, torch.tensor(ends, dtype=D)) for n in steps)
    slope = math.log2(coarse / fine)
    assert abs(slope - order) < 0.45, slope
    if not backwards:
        coarse, fine = (errors(method, n, torch.linspace(*ends, 83, dtype=D)) for n in steps)
        assert math.log2(coarse / fine) > min(3, order) - 0.3


@every_method
def test_stiff_linear_systems(method: str):
    """Prothero and Robinson's problem, where an explicit method of this step would end at 1e50. Those that damp are near."""
    func = lambda t, y: -1e6 * (y - torch.cos(t)) - torch.sin(t)  # noqa: E731
    ys = solve(func, torch.ones(1, dtype=D), [0.0, 1.0], method=method, step_size=0.1).ys
    assert float((ys[-1] - math.cos(1)).abs()) < 2e-3


def test_float32_and_complex():
    y0 = torch.tensor([1.0, 0.5])
    ys = solve(lambda t, y: -y * y, y0, [0.0, 1.0], method="radauIIA5", step_size=0.1).ys
    assert ys.dtype == torch.float32
    torch.testing.assert_close(ys[-1], y0 / (1 + y0), rtol=1e-6, atol=1e-7)
    with pytest.raises(NotImplementedError, match="float32 or float64"):
        solve(lambda t, y: 1j * y, torch.ones(1, dtype=torch.complex128), [0.0, 1.0], method="gl4")


# ---- systems, sample by sample ----


def pendula(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[:, 1], -9.0 * torch.sin(y[:, 0]) - 0.1 * y[:, 1] ** 3], 1)


@every_method
def test_a_sample_is_what_it_is_alone(method: str):
    """To the bit: one that needs more iterations does not change another."""
    y0 = torch.tensor([[0.1, 0.0], [2.0, 3.0], [1e-3, 0.2]], dtype=D)
    together = solve(pendula, y0, [0.0, 1.0], method=method, step_size=0.2).ys
    for i in range(3):
        alone = solve(pendula, y0[i : i + 1], [0.0, 1.0], method=method, step_size=0.2).ys
        assert torch.equal(alone[:, 0], together[:, i])


@every_kind
def test_samples_that_func_couples(method: str):
    """Heat along axis 0, from the start on, or at later stages alone."""

    def func(t: Tensor, y: Tensor, late: float) -> Tensor:
        flow = torch.zeros_like(y)
        flow[1:] += 30 * (y[:-1] - y[1:])
        flow[:-1] += 30 * (y[1:] - y[:-1])
        return -y + flow * (t.detach() > late)

    y0 = torch.linspace(0, 1, 8, dtype=D).reshape(4, 2)
    for late in (-1.0, 0.12):
        found = solve(lambda t, y, late=late: func(t, y, late), y0, [0.0, 0.1, 0.2], method=method, step_size=0.005).ys
        right = solve(lambda t, y, late=late: func(t, y, late), y0, [0.0, 0.1, 0.2], rtol=1e-10, atol=1e-12).ys
        torch.testing.assert_close(found, right, rtol=2e-3, atol=3e-3)


# ---- gradients ----


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(30.0, dtype=D))
        self.layer = nn.Linear(2, 2).double()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        stiff = torch.stack([-self.rate * (y[:, 0] - torch.cos(y[:, 1] * t)), y[:, 0] * y[:, 1] - y[:, 1]], 1)
        return stiff + torch.tanh(self.layer(y))


@every_method
@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
def test_gradients_are_those_of_the_steps(method: str, gradient: str):
    """For y0, every time, of which one lies inside a step, and parameters, against differences."""
    y0 = torch.tensor([[1.0, 0.2], [0.5, 0.4]], dtype=D, requires_grad=True)
    t = torch.tensor([0.0, 0.05, 0.19], dtype=D, requires_grad=True)
    rate = torch.tensor(30.0, dtype=D, requires_grad=True)

    def loss(y0: Tensor, t: Tensor, rate: Tensor) -> Tensor:
        func = lambda t, y: torch.stack([-rate * (y[:, 0] - torch.cos(y[:, 1] * t)), y[:, 0] * y[:, 1] - y[:, 1]], 1)  # noqa: E731
        ys = solve(func, y0, t, method=method, step_size=0.1, gradient=gradient).ys
        return (ys * torch.linspace(1, 2, ys.numel(), dtype=D).reshape(ys.shape)).sum()

    assert torch.autograd.gradcheck(loss, (y0, t, rate), eps=1e-6, atol=1e-7, rtol=1e-5, fast_mode=True)


@every_kind
def test_second_derivatives(method: str):
    y0 = torch.tensor([[1.0, 0.2]], dtype=D, requires_grad=True)
    t = torch.tensor([0.0, 0.05, 0.19], dtype=D, requires_grad=True)
    rate = torch.tensor(3.0, dtype=D, requires_grad=True)

    def loss(y0: Tensor, t: Tensor, rate: Tensor) -> Tensor:
        func = lambda t, y: torch.stack([-rate * (y[:, 0] - torch.cos(y[:, 1] * t)), y[:, 0] * y[:, 1] - y[:, 1]], 1)  # noqa: E731
        return solve(func, y0, t, method=method, step_size=0.1).ys.pow(2).sum()

    assert torch.autograd.gradgradcheck(loss, (y0, t, rate), eps=1e-5, atol=1e-6, rtol=1e-5)


@every_kind
@pytest.mark.parametrize("gradient", ["adjoint", "quadrature"])
@pytest.mark.parametrize("backwards", [False, True])
def test_continuous_gradients_converge_to_it(method: str, gradient: str, backwards: bool):
    """With the order of the method, and of the cubic for the stored solution."""
    torch.manual_seed(0)
    func = Field()
    func.rate.data.fill_(2.0)
    times = [0.3, 0.1, -0.2] if backwards else [0.0, 0.2, 0.5]
    distance = []
    for steps in (5, 10):
        found = []
        for name in ("direct", gradient):
            y0 = torch.tensor([[1.0, 0.2], [0.5, 0.4]], dtype=D, requires_grad=True)
            t = torch.tensor(times, dtype=D, requires_grad=True)
            how = {"step_size": 0.5 / steps} if name == gradient else {"step_size": 0.5 / 80}
            ys = solve(func, y0, t, method=method, gradient=name, **how).ys
            loss = (ys**2 * torch.arange(1, 1 + ys.numel(), dtype=D).reshape(ys.shape)).sum()
            found.append(torch.cat([x.reshape(-1) for x in torch.autograd.grad(loss, [y0, t, *func.parameters()])]))
        distance.append(float((found[0] - found[1]).abs().max() / found[0].abs().max()))
    assert distance[1] < 5e-3
    assert math.log2(distance[0] / distance[1]) > min(ORDERS[method], 3) - 0.5


def test_through_every_door():
    """odeint, odeint_adjoint and ODEBlock, whose default is the adjoint."""
    torch.manual_seed(1)
    func = Field()
    func.rate.data.fill_(2.0)
    y0, t = torch.tensor([[1.0, 0.2], [0.5, 0.4]], dtype=D), torch.linspace(0, 0.5, 41, dtype=D)
    found = []
    for ys in (
        odeint(func, y0, t, method="radauIIA5")[-1],
        odeint_adjoint(func, y0, t, method="radauIIA5")[-1],
        ODEBlock(func, t, method="radauIIA5")(y0),
    ):
        found.append(torch.cat([x.reshape(-1) for x in torch.autograd.grad(ys.square().sum(), list(func.parameters()))]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found[2], found[0], rtol=1e-6, atol=1e-8)


def test_an_adjoint_that_does_not_come_back_is_said(monkeypatch: pytest.MonkeyPatch):
    """A damped solution is lost on the way back: the state there is another, and so may be the gradient."""
    monkeypatch.setattr(odenet_cuda.gradients.drift, "_warned", False)
    y0 = torch.tensor([[1.0, 2.0]], dtype=D, requires_grad=True)
    with pytest.warns(UserWarning, match="gradient='adjoint' came back"):
        solve(lambda t, y: -50 * (y - t), y0, [0.0, 1.0], method="implicit_euler", step_size=0.1,
              gradient="adjoint").ys.sum().backward()  # fmt: skip


# ---- options ----


def test_grids_options_and_dense_output():
    y0, t = torch.ones(2, dtype=D), torch.tensor([0.0, 0.7, 1.0], dtype=D)
    func = lambda t, y: -y * t  # noqa: E731
    right = torch.exp(-t.square() / 2)
    by_grid = odeint(func, y0, t, method="gl4", options={"grid_constructor": lambda f, y, t: torch.linspace(0, 1, 41)})
    torch.testing.assert_close(by_grid[:, 0], right, rtol=1e-4, atol=1e-6)  # 0.7 by a straight line
    cubic = odeint(func, y0, t, method="gl4", options={"step_size": 0.05, "interp": "cubic", "max_iters": 30})
    torch.testing.assert_close(cubic[:, 0], right, rtol=1e-7, atol=1e-9)
    dense = solve(func, y0, [0.0, 1.0], method="gl6", step_size=0.1, dense=True).interpolant
    torch.testing.assert_close(dense(t)[:, 0], right, rtol=1e-5, atol=1e-6)
    with pytest.warns(UserWarning, match="implicit_euler: Unexpected arguments {'max_order': 3}"):
        odeint(func, y0, t, method="implicit_euler", options={"max_order": 3})
    with pytest.raises(ValueError, match="max_iters is no option of method='rk4', got 3"):
        solve(func, y0, t, method="rk4", max_iters=3)
    with pytest.raises(ValueError, match="max_iters must be a whole number of at least 1, got 0"):
        solve(func, y0, t, method="gl4", max_iters=0)
    with pytest.raises(ValueError, match="needs an adaptive method"):
        solve(func, y0, t, method="gl4", step_control="per_sample")


@every_kind
def test_perturb_sees_both_sides_of_a_jump(method: str):
    """func jumps at 0.5, where a step ends."""
    seen: list[float] = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        seen.append(float(t))
        return torch.where(t < 0.5, -1.0, 2.0) + 0 * y

    ys = odeint(func, torch.zeros(1, dtype=D), torch.tensor([0.0, 1.0], dtype=D), method=method,
                options={"step_size": 0.5, "perturb": True})  # fmt: skip
    assert float(ys[-1]) == pytest.approx(0.5, abs=1e-12)
    assert 0.0 not in seen and 0.5 not in seen and 1.0 not in seen


@every_kind
def test_events(method: str):
    """A ball that falls; the time has a gradient."""
    height = torch.tensor(10.0, dtype=D, requires_grad=True)
    func = lambda t, y: torch.stack([y[1], -9.81 + 0 * y[1]])  # noqa: E731
    y0 = torch.stack([height, torch.zeros_like(height)])
    t, _ = odeint_event(func, y0, torch.tensor(0.0, dtype=D), event_fn=lambda t, y: y[0], method=method,
                         odeint_interface=odeint, options={"step_size": 0.1, "interp": "cubic"})  # fmt: skip
    assert float(t) == pytest.approx(math.sqrt(20 / 9.81), rel=1e-9)
    (grad,) = torch.autograd.grad(t, height)
    assert float(grad) == pytest.approx(1 / math.sqrt(20 * 9.81), rel=1e-6)
    ended = solve(func, y0.detach(), [0.0, 5.0], method=method, step_size=0.1, events=Event(lambda t, y: y[0]))
    assert float(ended.event_t) == pytest.approx(float(t), rel=1e-9)


def test_callbacks_and_calls():
    class Seen(Field):
        calls = 0
        steps = 0

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            Seen.calls += 1
            return -y

        def callback_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
            Seen.steps += 1

    with torch.no_grad():
        solution = solve(Seen(), torch.ones(1, 2, dtype=D), [0.0, 1.0], method="trapezoid", step_size=0.25)
    assert Seen.steps == 4 == solution.stats.num_accepted
    assert solution.stats.nfe == Seen.calls == 1 + 4 * 2  # a matrix a step, and one iteration to see that it is solved


# ---- what ends in words ----


def fails(func: Any, message: str, y0: Any = None, **how: Any) -> SolverError:
    y0 = torch.ones(3, 1, dtype=D) if y0 is None else y0
    with pytest.raises(SolverError, match=message) as caught:
        solve(func, y0, [0.0, 0.25, 0.5], **{"method": "implicit_euler", "step_size": 0.125, **how})
    return caught.value


def test_no_convergence():
    """y = 1 + y^2 / 8 + c / 8 has no real solution for a large c."""
    c = torch.tensor([[0.0], [9.0], [0.0]], dtype=D)
    error = fails(lambda t, y: y * y + c * (t.detach() > 0.3), "no convergence.* in sample 1 at t = 0.25.*Remedy: take smaller")
    assert (error.status, error.sample, error.t, error.dt) == ("no convergence", 1, 0.25, 0.125)
    assert error.solution.stats.num_accepted == 2 and error.solution.ys[:2].isfinite().all()
    assert error.solution.ys[2].isnan().all() and torch.equal(error.y, error.solution.ys[1])
    fails(lambda t, y: torch.cos(3 * y), "in max_iters iterations", max_iters=1)


@every_kind
def test_other_failures(method: str):
    error = fails(lambda t, y: (0.3 - t).sqrt() * y, "non-finite values in state `y`.* at t = 0.25", method=method)
    assert error.status == "non-finite values" and error.sample == 0
    root = torch.tensor([[1.0], [1.0], [0.0]], dtype=D)
    error = fails(
        lambda t, y: -y.abs().sqrt(), "non-finite Jacobian.* in sample 2.*infinite at this state", root, method=method
    )
    assert error.status == "non-finite Jacobian"


def test_a_singular_matrix():
    rate = torch.tensor([[1.0], [8.0], [2.0]], dtype=D)
    error = fails(lambda t, y: rate * y, "singular matrix.* in sample 1 .*Remedy: take another step size")
    assert (error.sample, error.t) == (1, 0.0)


def test_a_failed_solve_is_given_back():
    y0 = torch.ones(3, 1, dtype=D, requires_grad=True)
    func = lambda t, y: y * y + 9.0 * (t.detach() > 0.3)  # noqa: E731
    found = solve(func, y0, [0.0, 0.25, 0.5], method="implicit_euler", step_size=0.125, on_failure="return")
    assert found.status == "no convergence" and found.ys[2].isnan().all()
    found.ys[1].sum().backward()
    right = torch.ones(3, 1, dtype=D, requires_grad=True)
    solve(func, right, [0.0, 0.25], method="implicit_euler", step_size=0.125).ys[1].sum().backward()
    torch.testing.assert_close(y0.grad, right.grad)


def test_what_is_refused():
    y0, t = torch.ones(2, dtype=D), torch.tensor([0.0, 1.0], dtype=D)
    with pytest.raises(ValueError, match="no graph by which an implicit method could differentiate"):
        solve(lambda t, y: -y.detach(), y0, t, method="gl4")
    with pytest.raises(NotImplementedError, match="up to n = 2048"):
        solve(lambda t, y: -y, torch.ones(3000), t, method="implicit_euler")
    with pytest.raises(NotImplementedError, match="no slopes for integrals"):
        solve(lambda t, y: -y, y0, t, method="gl4", regularizers=("kinetic",))
    with pytest.raises(NotImplementedError, match=r"method='gl4' decides by numbers that torch\.func transforms"):
        torch.func.grad(lambda y: solve(lambda t, y: -y, y, t, method="gl4").ys.sum())(y0)


def test_between_compiled_graphs():
    """torch.compile leaves it alone: Newton's method looks at numbers."""
    func = lambda t, y: -y * y  # noqa: E731
    run = torch.compile(lambda y: solve(func, y * 1.0, [0.0, 1.0], method="sdirk2", step_size=0.5).ys[-1] + 1, backend="eager")
    y0 = torch.ones(2, dtype=D)
    right = solve(func, y0, [0.0, 1.0], method="sdirk2", step_size=0.5).ys[-1] + 1
    torch.testing.assert_close(run(y0), right)
