"""Events at one time, and times of events without a derivative, by both engines."""

import math

import pytest
import torch

from odenet_cuda import Event, compile, odeint, odeint_adjoint, odeint_event, solve

D = torch.float64
TOGETHER = {D: 1e-13, torch.float32: 2e-5}  # how far apart events at one time may be
SAMPLES = {"step_control": "per_sample"}
GRADIENTS = ("direct", "checkpoint", "adjoint", "quadrature")
pytestmark = pytest.mark.usefixtures("quick_compiler")
ENGINES = pytest.mark.parametrize("engine", ["stepper", "compiled"])


def growing(t, y, p):
    """y = y0 exp(p t)."""
    return p * y


def flying(t, y):
    """Of places and speeds along two axes, [batch, 4], without forces."""
    return torch.cat([y[:, 2:], torch.zeros_like(y[:, 2:])], 1)


def solved(engine, func, *args, **kwargs):
    solution = solve(compile(func) if engine == "compiled" else func, *args, **{**SAMPLES, **kwargs})
    assert solution.engine == engine, solution.explanation
    return solution


# ---- times without a derivative ---------------------------------------------------------------------------------------

JUMPS = {
    "sign": lambda t, y, p: torch.sign(y[:, 0] - 1),
    "step": lambda t, y, p: (y[:, 0] > 1).to(y) - 0.5,
    "detached": lambda t, y, p: y[:, 0].detach() - 1,
}


@ENGINES
@pytest.mark.parametrize("gradient", GRADIENTS[:3])
def test_a_gradient_through_a_time_without_derivative_is_an_error(engine, gradient):
    """Of whichever function, in the row that it is of; not where only the state at other times is used."""
    for name in JUMPS if engine == "stepper" else ("step",):
        y0 = torch.tensor([[0.5], [9.0], [0.25]], dtype=D, requires_grad=True)
        p = torch.tensor(2.0, dtype=D, requires_grad=True)
        events = [Event(lambda t, y, p: y[:, 0] + 5), Event(JUMPS[name])]
        solution = solved(engine, growing, y0, [0.0, 0.1, 5.0], args=(p,), events=events, gradient=gradient)
        assert solution.event_index.tolist() == [1, -1, 1]
        for loss in (solution.event_t[2], solution.event_t[[0, 2]].sum(), solution.event_y[2].sum()):
            with pytest.raises(RuntimeError, match=r"event 1 in sample [02], t = 0\.\d*, has no derivative: .* of 0, .*Remedy"):
                torch.autograd.grad(loss, [p, y0], retain_graph=True)
        (by_y,) = torch.autograd.grad(solution.ys[1].sum(), y0)
        torch.testing.assert_close(by_y, torch.full((3, 1), math.exp(0.2), dtype=D), rtol=1e-6, atol=0)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_one_sample_without_does_not_harm_others(gradient):
    """Those of the others are as if it were not there."""
    y0 = torch.tensor([[0.5], [0.4], [0.25]], dtype=D, requires_grad=True)
    p = torch.tensor(2.0, dtype=D, requires_grad=True)
    flat = torch.tensor([False, True, False])
    event = Event(lambda t, y, p: torch.where(flat, torch.sign(y[:, 0] - 1), y[:, 0] - 1))
    options = {"args": (p,), "events": event, "gradient": gradient, "rtol": 1e-10, "atol": 1e-10}
    solution = solve(growing, y0, [0.0, 5.0], **SAMPLES, **options)
    by_p, by_y = torch.autograd.grad(solution.event_t[~flat].sum(), [p, y0], retain_graph=True)
    starts = y0.detach()[~flat]
    torch.testing.assert_close(by_y[~flat], -1 / (2 * starts), rtol=1e-7, atol=0)
    assert by_y[1] == 0 and abs(float(by_p - starts.log().sum() / 4)) < 1e-7
    with pytest.raises(RuntimeError, match="in sample 1"):
        torch.autograd.grad(solution.event_t.sum(), p)


def test_a_touch():
    """A zero that is only touched, and is seen at a quarter of the step."""
    y0 = torch.ones(1, dtype=D, requires_grad=True)
    for fn in (lambda t, y: y * (t - 1) ** 2, lambda t, y: (t - 1).abs() + 0 * y):
        solution = solve(lambda t, y: 0 * y, y0, [0.0, 2.0], first_step=2.0, events=Event(fn))
        assert solution.event_t.item() == 1
        with pytest.raises(RuntimeError, match="has no derivative"):
            torch.autograd.grad(solution.event_t, y0)


def test_a_rate_that_is_zero_but_for_rounding():
    """The sum of the state stays as it is, but for rounding: by that a time is not to be divided."""
    y0 = torch.ones(3, dtype=D, requires_grad=True)
    rates = torch.tensor([0.1, 0.2, -0.3], dtype=D)
    assert 0 < abs(rates.sum()) < 1e-15
    jump = Event(lambda t, y: y.sum() - y.detach().sum() + torch.where(t < 0.7, 1.0, -1.0))
    solution = solve(lambda t, y: rates * torch.cos(t) + 0 * y, y0, [0.0, 2.0], events=jump)
    with pytest.raises(RuntimeError, match="zero within rounding"):
        torch.autograd.grad(solution.event_t, y0)


@pytest.mark.parametrize("function", [odeint, odeint_adjoint])
def test_of_odeint(function):
    y0 = torch.ones(1, dtype=D, requires_grad=True)
    more = {"adjoint_params": ()} if function is odeint_adjoint else {}
    event_t, ys = odeint_event(
        lambda t, y: y, y0, 0.0, event_fn=lambda t, y: torch.sign(y - 3), odeint_interface=function, **more
    )
    for loss in (event_t, ys[1].sum()):
        with pytest.raises(RuntimeError, match=r"event 0, t = 1\.09861\d*, has no derivative"):
            torch.autograd.grad(loss, y0, retain_graph=True)
    with torch.no_grad():
        event_t, _ = odeint_event(lambda t, y: y, y0, 0.0, event_fn=lambda t, y: torch.sign(y - 3))
        assert abs(float(event_t) - math.log(3)) < 1e-6


@ENGINES
def test_an_event_that_is_only_noted_moves_nothing(engine):
    """What comes after it has the gradient that it has without it, whether or not its time has one."""
    y0 = torch.tensor([[0.5], [0.25]], dtype=D, requires_grad=True)
    p = torch.tensor(1.0, dtype=D, requires_grad=True)
    events = [Event(JUMPS["step"], terminal=False), Event(lambda t, y, p: y[:, 0] - 2, terminal=False)]
    options = {"args": (p,), "events": events, "gradient": "adjoint", "rtol": 1e-9, "atol": 1e-9}
    solution = solved(engine, growing, y0, [0.0, 4.0], **options)
    assert solution.event_index.T.tolist() == [[0, 1], [0, 1]]
    by_p, by_y = torch.autograd.grad(solution.ys[-1].sum(), [p, y0], retain_graph=True)
    torch.testing.assert_close(by_y, torch.full((2, 1), math.exp(4), dtype=D), rtol=1e-7, atol=0)
    assert abs(float(by_p) / (4 * 0.75 * math.exp(4)) - 1) < 1e-7
    (by_y,) = torch.autograd.grad(solution.event_t[1].sum(), y0, retain_graph=True)  # the second has one
    torch.testing.assert_close(by_y, -1 / y0.detach(), rtol=1e-7, atol=0)
    with pytest.raises(RuntimeError, match="event 0"):
        torch.autograd.grad(solution.event_t[0, 1], y0)


# ---- several at one time ------------------------------------------------------------------------------------------------

ALIKE = [  # that are zero at y = 1, but for rounding
    lambda t, y, p: y[:, 0] - 1,
    lambda t, y, p: 3 * y[:, 0] - 3,
    lambda t, y, p: y[:, 0] ** 2 - 1,
    lambda t, y, p: torch.exp(y[:, 0]) - math.e,
    lambda t, y, p: torch.log(y[:, 0]),
]


@ENGINES
@pytest.mark.parametrize("dtype", TOGETHER, ids=str)
def test_all_of_one_time_in_the_order_given(engine, dtype):
    y0 = torch.linspace(0.05, 0.95, 48, dtype=dtype)[:, None]
    p = torch.linspace(1.3, 0.3, 48, dtype=dtype)[:, None]
    for order in ((0, 1, 2, 3, 4), (3, 1, 4, 2, 0)) if engine == "stepper" else ((4, 2, 3, 0, 1),):
        for sign in (1, -1):
            events = [Event(ALIKE[i], terminal=False) for i in order]
            solution = solved(engine, growing, y0, [0.0, sign * 20.0], args=(sign * p,), events=events)
            assert solution.event_index.T.tolist() == [list(range(5))] * 48
            t = solution.event_t * sign
            assert (t.diff(dim=0) >= 0).all() and ((t[-1] - t[0]) / t[0]).max() < TOGETHER[dtype]


@ENGINES
def test_of_those_that_end_the_solve_the_first_given(engine):
    """One ahead of it that does not is noted at the same time; one behind it is none."""
    y0, p = torch.linspace(0.05, 0.95, 48, dtype=D)[:, None], torch.tensor(0.7, dtype=D)
    kinds = [Event(ALIKE[2], terminal=False), Event(ALIKE[4]), Event(ALIKE[0], terminal=False), Event(ALIKE[3])]
    solution = solved(engine, growing, y0, [0.0, 20.0], args=(p,), events=kinds)
    assert solution.event_index.T.tolist() == [[0, 1]] * 48
    solution = solved(engine, growing, y0, [0.0, 20.0], args=(p,), events=[Event(ALIKE[4]), Event(ALIKE[1])])
    assert solution.event_index.tolist() == [0] * 48


def test_under_joint_control():
    """Numbers of one function, and then the next function, count as events of their own."""
    y0 = torch.linspace(0.05, 0.95, 12, dtype=D)[:, None]
    for start in y0:
        events = [Event(lambda t, y, p: torch.stack([y**2 - 1, y - 1]), terminal=False), Event(lambda t, y, p: 3 * y - 3)]
        solution = solve(growing, start, [0.0, 20.0], args=(0.7,), events=events)
        assert solution.event_index.tolist() == [0, 0, 1]


@ENGINES
def test_into_a_corner(engine):
    """A ball that meets two walls at once is thrown back by both, from wherever it comes; its path back is known."""
    angles = torch.linspace(0.1, 1.4, 40, dtype=D)
    speed = torch.stack([angles.cos(), angles.sin()], 1)
    at = torch.linspace(0.3, 3.0, 40, dtype=D)[:, None]
    y0 = torch.cat([-speed * at, speed], 1).requires_grad_()
    turned = [torch.tensor([1.0, 1, -1, 1], dtype=D), torch.tensor([1.0, 1, 1, -1], dtype=D)]
    walls = [Event(lambda t, y, i=i: 1.7 * y[:, i], 1, apply=lambda t, y, i=i: y * turned[i].to(y)) for i in (0, 1)]
    gradient = {"gradient": "adjoint"}
    solution = solved(engine, flying, y0, [0.0, 4.0], events=walls, **gradient)
    assert solution.event_index.T.tolist() == [[0, 1]] * 40
    torch.testing.assert_close(solution.event_t, at.T.expand(2, -1), rtol=1e-12, atol=0)
    torch.testing.assert_close(solution.ys[-1], torch.cat([-speed * (4 - at), -speed], 1), rtol=0, atol=1e-11)
    # Each coordinate comes back alone: x = -(x0 + vx t), at t = 4.
    (by_y,) = torch.autograd.grad(solution.ys[-1, :, 0].sum(), y0)
    torch.testing.assert_close(by_y, torch.tensor([[-1.0, 0, -4, 0]], dtype=D).expand(40, -1), rtol=0, atol=1e-8)


@ENGINES
def test_what_the_first_takes_back_is_no_event(engine):
    """Of two at one time the first moves the state to where the other has its sign of before."""
    y0, p = torch.linspace(0.05, 0.95, 48, dtype=D)[:, None], torch.tensor(0.7, dtype=D)
    back = Event(ALIKE[1], apply=lambda t, y, p: 0.5 * y)
    solution = solved(engine, growing, y0, [0.0, 6.0], args=(p,), events=[back, Event(ALIKE[0])], max_events=3)
    assert (solution.event_index == 0).sum() > 48 and (solution.event_index <= 0).all()
    again = solved(engine, growing, y0, [0.0, 6.0], args=(p,), events=[Event(ALIKE[0]), back], max_events=3)
    assert again.event_index.max() == 0  # that ends it


# ---- functions of time alone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_functions_of_time_alone(rank):
    """In whatever shape they give one number a sample."""
    y0, at = torch.ones(3, *[2] * (rank - 1), dtype=D, requires_grad=True), torch.tensor(1.25, dtype=D, requires_grad=True)
    flat = [
        Event(lambda t, y, at: t - at),
        Event(lambda t, y, at: (t - at).reshape(-1)),
        Event(lambda t, y, at: torch.sin(t[(slice(None), *[0] * (rank - 1))] - at)),
    ]
    func = lambda t, y, at: -y  # noqa: E731
    field = compile(func)
    for events in (flat if rank == 2 else flat[:1], flat):
        solution = solve(field, y0, [0.0, 4.0], args=(at,), events=events, **SAMPLES)
        assert solution.engine == "compiled" and solution.event_index.tolist() == [0] * 3
        torch.testing.assert_close(solution.event_t.detach(), torch.full((3,), 1.25, dtype=D), rtol=1e-14, atol=0)
        by_at, by_y = torch.autograd.grad(solution.event_t.sum() + solution.event_y.sum(), [at, y0])
        assert abs(float(by_at) - (3 - math.exp(-1.25) * y0.numel())) < 1e-5
        torch.testing.assert_close(by_y, torch.full_like(by_y, math.exp(-1.25)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("gradient", ["direct", "adjoint"])
def test_the_state_at_an_event_has_its_zero_with_gradients_too(gradient):
    """To rounding, not to the tolerance of the solve: so what comes at one time does, and no event comes twice."""
    y0 = torch.linspace(0.05, 0.95, 40, dtype=D)[:, None].requires_grad_()
    p = torch.linspace(1.3, 0.3, 40, dtype=D)[:, None]
    events = [Event(ALIKE[1], terminal=False), Event(ALIKE[0], terminal=False)]
    options = {"args": (p,), "method": "bosh3", "rtol": 1e-3, "atol": 1e-3, "gradient": gradient}
    solution = solved("compiled", growing, y0, [0.0, 11.0], events=events, **options)
    assert solution.event_index.T.tolist() == [[0, 1]] * 40
    assert ((solution.event_t[1] - solution.event_t[0]) / solution.event_t[0]).max() < TOGETHER[D]
    torch.testing.assert_close(solution.event_y.detach(), torch.ones(2, 40, 1, dtype=D), rtol=0, atol=1e-13)
    (by_y,) = torch.autograd.grad(solution.event_t.sum(), y0)
    torch.testing.assert_close(by_y, -2 / (p * y0.detach()), rtol=0.05, atol=0)
