"""Events: where they are found, what can be missed, and their gradients, against closed forms."""

import math

import pytest
import torch
from problems import ADAPTIVE_METHODS, FIXED_METHODS
from torch import nn

import odenet_cuda
from odenet_cuda import Event, SolverError, odeint, odeint_adjoint, odeint_event, solve, until_event
from odenet_cuda.solvers import adaptive

D = torch.float64
ROUNDING = 2e-14  # a few units in the last place of the times and states here
LOCATED = 1e-8  # by methods at rtol = atol = 1e-10
FIRST_ORDER = 1e-8  # of gradients, where the solution is exact
GRADIENTS = ("direct", "checkpoint", "adjoint", "quadrature")
G = 9.8


class Ball(nn.Module):
    """h'' = -g, which ends on the floor: t = t0 + sqrt(2 (h - floor) / g) if it starts at rest."""

    def __init__(self):
        super().__init__()
        self.g = nn.Parameter(torch.tensor(G, dtype=D))
        self.floor = nn.Parameter(torch.tensor(0.2, dtype=D))

    def forward(self, t, y):
        return torch.stack([y[..., 1], -self.g.expand_as(y[..., 1])], -1)

    def hit(self, t, y):
        return y[..., 0] - self.floor


def clock(t, y):
    """y = t: every method is exact."""
    return torch.ones_like(y)


def turning(t, y):
    """(cos, -sin) turns about the origin with period 2 pi."""
    return torch.stack([y[..., 1], -y[..., 0]], -1)


def zero(**kwargs):
    return torch.zeros(1, dtype=D, **kwargs)


# ---- where they are found ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["forwards", "backwards"])
@pytest.mark.parametrize("method", [*ADAPTIVE_METHODS, *FIXED_METHODS])
def test_every_method_finds_it(method, sign):
    """The first sign change ends the solve, in either direction of time; there the interpolant's value is zero to rounding."""
    y0 = torch.tensor([1.0, 0.0], dtype=D)
    low = method in ("euler", "midpoint", "heun2", "fehlberg2", "adaptive_heun")
    options = {"step_size": 0.01, "interp": "cubic"} if method in FIXED_METHODS else {}
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if low else {"rtol": 1e-10, "atol": 1e-10}
    t = torch.tensor([0.0, sign], dtype=D)
    event_t, ys = odeint(turning, y0, t, event_fn=lambda t, y: y[0], method=method, options=options, **tolerance)
    assert abs(float(event_t) - sign * math.pi / 2) < (0.02 if method == "euler" else 1e-3 if low else LOCATED)
    assert ys.shape == (2, 2) and torch.equal(ys[0], y0)
    assert abs(float(ys[1, 0])) < ROUNDING


def test_located_to_rounding():
    """Whatever the size of the step, and where the function is discontinuous, which bisection alone can follow."""
    for first_step in (0.1, 3.0, 100.0):
        for fn in (lambda t, y: y - 2.3, lambda t, y: (y - 2.3) ** 3, lambda t, y: (y > 2.3).double() - 0.5):
            solution = solve(clock, zero(), [0.0, 200.0], first_step=first_step, events=Event(fn))
            assert abs(float(solution.event_t) - 2.3) < 1e-5 if fn(0, torch.tensor(2.301)) < 1e-8 else ROUNDING
            assert solution.event_index == 0
    solution = solve(clock, zero(), [0.0, 200.0], events=Event(lambda t, y: t - 2.3))  # a function of time alone
    assert abs(float(solution.event_t) - 2.3) < ROUNDING


def test_float32():
    event_t, ys = odeint_event(clock, torch.zeros(1), torch.tensor(0.0), event_fn=lambda t, y: y - 2.3)
    assert event_t.dtype == torch.float32 and ys.dtype == torch.float32
    assert abs(float(event_t) - 2.3) < 1e-6


def test_first_of_any_element():
    """Joint control: the first change of sign of any number, also of several functions; of two at one time the first given."""
    y0 = torch.zeros(3, dtype=D)
    levels = torch.tensor([3.0, 1.5, 2.0], dtype=D)
    event_t, _ = odeint(clock, y0, torch.tensor([0.0, 1.0]), event_fn=lambda t, y: y - levels)
    assert abs(float(event_t) - 1.5) < 1e-6
    events = [Event(lambda t, y, level=level: y[0] - level) for level in (2.0, 1.2, 1.2)]
    solution = solve(clock, y0, [0.0, 9.0], first_step=8.0, events=events)
    assert abs(float(solution.event_t) - 1.2) < ROUNDING and solution.event_index == 1


def test_direction():
    """+1 counts rising zeros as the solve goes on, -1 falling ones, also backwards in time."""
    y0 = torch.tensor([0.0, 1.0], dtype=D)  # sin t
    for direction, at in ((1, 2), (-1, 1), (0, 1)):
        for sign in (1.0, -1.0):
            y = y0 * torch.tensor([1.0, sign], dtype=D)
            event = Event(lambda t, y: y[0], direction)
            solution = solve(turning, y, [0.0, 20.0 * sign], rtol=1e-10, atol=1e-10, events=event)
            assert abs(float(solution.event_t) - sign * at * math.pi) < LOCATED


def test_start_on_zero():
    """In odeint it ends the solve at once, as in torchdiffeq; in solve the function has no sign until it has left zero."""
    t = torch.tensor([0.5, 1.0], dtype=D)
    y0 = torch.tensor([0.0, 1.0], dtype=D)
    for function, kwargs in ((odeint, {}), (odeint_adjoint, {"adjoint_params": ()})):
        event_t, ys = function(turning, y0, t, event_fn=lambda t, y: y[0], **kwargs)
        assert float(event_t) == 0.5 and torch.equal(ys[1], y0)
    event_t, _ = odeint(turning, y0, t, event_fn=lambda t, y: y[0], method="rk4", options={"step_size": 0.1})
    assert float(event_t) == 0.5
    solution = solve(turning, y0, [0.5, 9.0], rtol=1e-10, atol=1e-10, events=Event(lambda t, y: y[0]))
    assert abs(float(solution.event_t) - 0.5 - math.pi) < LOCATED


def test_start_on_zero_has_gradients():
    """The event stays at the start as the start moves, and moves off it as the function does."""
    t0, level = torch.tensor(0.5, dtype=D, requires_grad=True), torch.tensor(1.0, dtype=D, requires_grad=True)
    for function, kwargs in ((odeint, {}), (odeint_adjoint, {"adjoint_params": ()})):
        y0 = torch.ones(1, dtype=D, requires_grad=True)
        event_t, ys = odeint_event(clock, y0, t0, event_fn=lambda t, y: y - level, odeint_interface=function, **kwargs)
        found = torch.autograd.grad(event_t + 2 * ys[1].sum(), [t0, y0, level])
        for x, exact in zip(found, (1.0, -1.0, 3.0), strict=True):  # t = t0 + level - y0, y = level
            assert abs(float(x) - exact) < FIRST_ORDER


def test_two_roots_in_a_step():
    """They are seen where the function has its other sign at a quarter of the step; else max_step makes it seen."""
    window = lambda middle: Event(lambda t, y: (y - middle).abs() - 0.2)  # noqa: E731
    options = {"first_step": 4.0, "events": window(3.1)}
    assert abs(float(solve(clock, zero(), [0.0, 4.0], **options).event_t) - 2.9) < ROUNDING
    options["events"] = window(3.5)
    assert solve(clock, zero(), [0.0, 4.0], **options).event_index == -1
    assert abs(float(solve(clock, zero(), [0.0, 4.0], **options, max_step=1.0).event_t) - 3.3) < ROUNDING


def test_grazing():
    """A zero that is only touched counts where the step is looked at, and else not."""
    touch = lambda at: Event(lambda t, y: (t - at) ** 2)  # noqa: E731
    assert abs(float(solve(clock, zero(), [0.0, 4.0], first_step=4.0, events=touch(3.0)).event_t) - 3.0) < ROUNDING
    assert solve(clock, zero(), [0.0, 4.0], first_step=4.0, events=touch(2.9)).event_index == -1


def test_at_the_very_end():
    """An event at the last time is one, there to the bit."""
    solution = solve(clock, zero(), [0.0, 0.1, 0.7], events=Event(lambda t, y: t - 0.7))
    assert solution.event_index == 0 and float(solution.event_t) == 0.7
    torch.testing.assert_close(solution.ys[:, 0], solution.t, rtol=0, atol=ROUNDING)


def test_none():
    solution = solve(clock, zero(), [0.0, 1.0], events=[Event(lambda t, y: y - 2), Event(lambda t, y: y + 1)])
    assert solution.event_index == -1 and solution.event_t.isnan() and solution.event_y.isnan().all()
    assert solution.status == "success" and torch.isfinite(solution.ys).all()
    for y0, t in ((zero(), [0.0]), (torch.zeros(0, dtype=D), [0.0, 1.0])):
        solution = solve(clock, y0, t, events=Event(lambda t, y: t - 2))
        assert solution.event_index == -1 and solution.event_t.isnan()


def test_odeint_says_that_none_comes(monkeypatch):
    with pytest.raises(SolverError, match="no event"):  # the steps grow to the end of the numbers
        odeint(lambda t, y: 0 * y, torch.ones(1, dtype=D), torch.tensor([0.0, 1.0]), event_fn=lambda t, y: y + 1)
    monkeypatch.setattr(until_event, "MOST_GRID_STEPS", 200)
    with pytest.raises(SolverError, match=r"no event.* to 20"):
        options = {"step_size": 0.1}
        odeint(clock, zero(), torch.tensor([0.0, 1.0]), event_fn=lambda t, y: y + 1, method="euler", options=options)
    with pytest.raises(SolverError, match="max_num_steps exceeded"):
        y0, options = torch.tensor([1.0, 0.0], dtype=D), {"max_num_steps": 50}
        odeint(turning, y0, torch.tensor([0.0, 1.0]), event_fn=lambda t, y: y[0] + 2, options=options)


def test_outputs_around_it():
    """Those before the event are as without it, those after it are NaN, also one that lies in the same step."""
    y0, t = torch.tensor([1.0, 0.0], dtype=D), [0.0, 0.5, 1.5, 1.6, 4.0]
    for method, options in (("dopri5", {}), ("dopri8", {}), ("rk4", {"step_size": 0.3, "interp": "cubic"})):
        event = Event(lambda t, y: y[0])
        without = solve(turning, y0, t, method=method, **options)
        solution = solve(turning, y0, t, method=method, events=event, dense=True, **options)
        torch.testing.assert_close(solution.ys[:3], without.ys[:3], rtol=0, atol=1e-14)
        assert solution.ys[3:].isnan().all()
        assert solution.t.tolist() == t and torch.equal(solution.y_last, solution.event_y)
        at = float(solution.event_t)
        torch.testing.assert_close(solution.interpolant(at), solution.event_y, rtol=0, atol=1e-12)
        with pytest.raises(ValueError, match="t must lie in"):
            solution.interpolant(1.6)


# ---- what is refused ----------------------------------------------------------------------------------------------------


def test_refusals():
    y0, t = torch.zeros(4, 2, dtype=D), [0.0, 1.0]
    for events, error, words in (
        (lambda t, y: y, TypeError, "events must be of type Event"),
        (Event(lambda t, y: 1.0), TypeError, "must return a tensor of real numbers, got float"),
        (Event(lambda t, y: torch.zeros(0)), ValueError, "at least one number"),
        (Event(lambda t, y: y[0, 0].log() - 1), ValueError, r"not a number at the start|not a number between"),
        (Event(lambda t, y: (0.5 - t).sqrt()), ValueError, "not a number between t = 0"),
        (Event(lambda t, y: (t - 0.5).sqrt()), ValueError, "not a number at the start"),
        (Event(lambda t, y: (t - 2).sqrt()), ValueError, "not a number at the start"),
    ):
        with pytest.raises(error, match=words):
            solve(lambda t, y: y * 0 - 1, y0, t, events=events)
    with pytest.raises(ValueError, match=r"one number a sample, \[4\], got shape \[4, 4\]"):
        solve(clock, y0, t, step_control="per_sample", events=Event(lambda t, y: y[:, 0] - t))
    with pytest.raises(NotImplementedError, match="regularizers are not served with events"):
        solve(clock, y0, t, regularizers=("kinetic",), events=Event(lambda t, y: y - 2))
    with pytest.raises(ValueError, match="direction of an Event"):
        Event(lambda t, y: y, 2)
    with pytest.raises(TypeError, match="fn of an Event must be callable"):
        Event(3.0)
    with pytest.raises(ValueError, match="t must hold two times with event_fn"):
        odeint(clock, zero(), torch.tensor([0.0, 1.0, 2.0]), event_fn=lambda t, y: y)
    with pytest.raises(ValueError, match="needs step_size"):
        odeint(clock, zero(), torch.tensor([0.0, 1.0]), event_fn=lambda t, y: y - 1, method="rk4")
    with pytest.raises(NotImplementedError, match=r"events are not served inside torch\.func"):
        torch.func.grad(lambda y: solve(clock, y, t, events=Event(lambda t, y: y - 2)).ys.sum())(zero())


def test_engines_say_why_not():
    field = odenet_cuda.compile(lambda t, y: -y)
    solution = solve(field, torch.ones(3, 1, dtype=D), [0.0, 1.0], events=Event(lambda t, y: y - 0.5))
    assert solution.engine == "stepper" and "joint control" in solution.explanation["compiled"]
    assert abs(float(solution.event_t) - math.log(2)) < 1e-6


# ---- gradients ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "rk4"])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_of_a_ball(gradient, method):
    """Of the time, and the speed there, for height, start, gravity and floor; with an output before the event in the loss."""
    ball, options = Ball(), {"step_size": 0.05} if method == "rk4" else {}
    t = torch.tensor([0.3, 0.9, 5.0], dtype=D, requires_grad=True)
    height = torch.tensor(10.0, dtype=D, requires_grad=True)
    y0 = torch.stack([height, torch.zeros((), dtype=D)])
    event = Event(ball.hit)
    solution = solve(ball, y0, t, gradient=gradient, method=method, rtol=1e-10, atol=1e-10, events=event, **options)
    loss = solution.event_t + 0.5 * solution.event_y[1] + 2 * solution.ys[1, 0]
    found = torch.autograd.grad(loss, [height, ball.g, ball.floor, t])
    g, fall = G, math.sqrt(2 * 9.8 / G)
    by_h = 1 / (g * fall)  # of the time; the speed is -g times it
    exact = by_h - 0.5 / fall + 2, -fall / (2 * g) - 0.5 * fall / 2 - 0.36, -by_h + 0.5 / fall
    for x, value in zip(found, exact, strict=False):
        assert abs(float(x) - value) < FIRST_ORDER
    by_t = torch.tensor([1 + 2 * g * 0.6, -2 * g * 0.6, 0.0], dtype=D)
    torch.testing.assert_close(found[3], by_t, rtol=0, atol=1e-7)


def test_gradient_on_a_grid_is_that_of_the_discrete_solve():
    """Also with a coarse grid and linear interpolation: what finite differences of the solve give."""

    def run(y0, rate):
        func = lambda t, y: rate * torch.stack([y[1], -y[0] + 0.1 * y[0] ** 3])  # noqa: E731
        event_t, ys = odeint(
            func, y0, torch.tensor([0.0, 1.0], dtype=D), event_fn=lambda t, y: y[0] - 0.1 * t * rate, method="heun3",
            options={"step_size": 0.3},
        )  # fmt: skip
        return event_t + ys[1, 1] ** 2

    y0, rate = torch.tensor([1.0, 0.2], dtype=D), torch.tensor(1.1, dtype=D)
    assert torch.autograd.gradcheck(run, (y0.requires_grad_(), rate.requires_grad_()), rtol=1e-6)


@pytest.mark.parametrize("function", [odeint, odeint_adjoint], ids=["odeint", "odeint_adjoint"])
def test_odeint_event(function):
    """Of torchdiffeq's names and shapes; backwards in time too, for tuples, and with gradients inside event_fn."""
    level = torch.tensor(0.5, dtype=D, requires_grad=True)
    y0 = (torch.tensor([1.0], dtype=D, requires_grad=True), torch.zeros(2, dtype=D))
    func = lambda t, y: (-y[0], torch.ones_like(y[1]))  # noqa: E731
    kwargs = {"adjoint_params": ()} if function is odeint_adjoint else {}
    for reverse, target in ((False, level), (True, 4 * level)):
        t0 = torch.tensor(2.0, dtype=D, requires_grad=True)
        event_t, (x, clock_there) = odeint_event(
            func, y0, t0, event_fn=lambda t, y, target=target: y[0] - target, reverse_time=reverse, rtol=1e-11, atol=1e-11,
            odeint_interface=function, **kwargs,
        )  # fmt: skip
        assert event_t.shape == () and x.shape == (2, 1) and clock_there.shape == (2, 2)
        assert abs(float(event_t.detach()) - 2 + math.log(float(target.detach()))) < LOCATED
        by_t0, by_y, by_level = torch.autograd.grad(event_t + clock_there[1].sum() + x[1], [t0, y0[0], level])
        scale = float(target.detach()) / 0.5
        for found, exact in ((by_t0, 1.0), (by_y, 3.0), (by_level, -3.0 / 0.5 + scale)):
            assert abs(float(found) - exact) < 1e-7
    assert float(odeint_event(clock, zero(), 0.0, event_fn=lambda t, y: y - 1)[0]) == pytest.approx(1.0)


def test_first_derivatives_only():
    ball = Ball()
    y0 = torch.tensor([1.0, 0.0], dtype=D, requires_grad=True)
    event_t, _ = odeint_event(ball, y0, 0.0, event_fn=ball.hit)
    (first,) = torch.autograd.grad(event_t, y0, create_graph=True)  # as programs write that mean retain_graph
    assert torch.equal(first, torch.autograd.grad(event_t, y0)[0])
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(first.sum(), y0)


def test_gradients_without_a_graph_are_not_asked_for():
    with torch.no_grad():
        event_t, ys = odeint_event(Ball(), torch.tensor([1.0, 0.0], dtype=D), 0.0, event_fn=Ball().hit)
    assert not event_t.requires_grad and not ys.requires_grad


# ---- each sample its own ------------------------------------------------------------------------------------------------


def fallen(heights, **kwargs):
    """Balls from these heights at rest until they hit the floor."""
    ball = Ball()
    heights = heights.clone().requires_grad_()
    y0 = torch.stack([heights, torch.zeros_like(heights)], 1)
    t = torch.tensor([0.0, 0.4, 1.0, 1.5], dtype=D)
    events = Event(ball.hit, -1)
    solution = solve(ball, y0, t, step_control="per_sample", rtol=1e-9, atol=1e-9, events=events, **kwargs)
    return ball, heights, solution


HEIGHTS = torch.tensor([0.3, 1.0, 5.0, 30.0, 2.0], dtype=D)  # the fourth does not come down in time


def test_each_sample_ends_at_its_own():
    _, _, solution = fallen(HEIGHTS)
    exact = torch.sqrt(2 * (HEIGHTS - 0.2) / G)
    down = exact < 1.5
    assert solution.event_index.tolist() == [0, 0, 0, -1, 0] and solution.status == ["success"] * 5
    torch.testing.assert_close(solution.event_t[down], exact[down], rtol=0, atol=ROUNDING)
    torch.testing.assert_close(solution.event_y[down, 0], torch.full((4,), 0.2, dtype=D), rtol=0, atol=ROUNDING)
    assert solution.event_t[~down].isnan().all() and solution.event_y[~down].isnan().all()
    at = torch.tensor([0.0, 0.4, 1.0, 1.5], dtype=D)[:, None]
    known = HEIGHTS - G / 2 * at**2
    torch.testing.assert_close(solution.ys[..., 0], known.masked_fill(at > exact, math.nan), equal_nan=True)


def test_samples_do_not_depend_on_others():
    """Each as it is alone, to the bit."""
    _, _, together = fallen(HEIGHTS)
    for i in range(len(HEIGHTS)):
        _, _, alone = fallen(HEIGHTS[i : i + 1])
        torch.testing.assert_close(alone.event_t[0], together.event_t[i], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(alone.event_y[0], together.event_y[i], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_of_samples(gradient):
    ball, heights, solution = fallen(HEIGHTS, gradient=gradient)
    down = solution.event_index == 0
    loss = (solution.event_t + 0.5 * solution.event_y[:, 1])[down].sum() + 2 * solution.ys[1, 1:, 0].sum()
    by_h, by_g, by_floor = torch.autograd.grad(loss, [heights, ball.g, ball.floor])
    fall = torch.sqrt(2 * (HEIGHTS - 0.2) / G)
    of_time = torch.where(down, 1 / (G * fall), 0)
    exact = of_time * (1 - 0.5 * G) + torch.tensor([0.0, 2, 2, 2, 2], dtype=D)
    torch.testing.assert_close(by_h, exact, rtol=0, atol=FIRST_ORDER)
    assert abs(float(by_floor) + float((of_time * (1 - 0.5 * G)).sum())) < FIRST_ORDER
    exact_g = torch.where(down, -fall / (2 * G) - 0.25 * fall, 0).sum() - 4 * 0.16
    assert abs(float(by_g - exact_g)) < FIRST_ORDER


def test_interpolant_ends_with_each_sample():
    _, _, solution = fallen(HEIGHTS, dense=True)
    t = torch.linspace(0, 1.5, 16, dtype=D)
    exact = (HEIGHTS - G / 2 * t[:, None] ** 2).masked_fill(t[:, None] > torch.sqrt(2 * (HEIGHTS - 0.2) / G), math.nan)
    torch.testing.assert_close(solution.interpolant(t)[..., 0], exact, equal_nan=True, rtol=1e-8, atol=1e-8)


def test_beside_samples_that_fail():
    """An event ends its sample whatever becomes of others."""
    func = lambda t, y: torch.where(y < 0, -y * y, torch.ones_like(y))  # noqa: E731
    y0 = torch.tensor([[1.0], [-1e3], [2.0]], dtype=D, requires_grad=True)
    event = Event(lambda t, y: y[:, 0] - 2.5)
    options = {"step_control": "per_sample", "on_failure": "return", "max_num_steps": 200}
    solution = solve(func, y0, [0.0, 1.0, 2.0], events=event, **options)
    assert solution.event_index.tolist() == [0, -1, 0] and solution.status[1] != "success"
    torch.testing.assert_close(solution.event_t[[0, 2]], torch.tensor([1.5, 0.5], dtype=D))
    (grad,) = torch.autograd.grad(solution.event_t[[0, 2]].sum() + solution.ys[1, 0].sum(), y0)
    torch.testing.assert_close(grad, torch.tensor([[0.0], [0.0], [-1.0]], dtype=D))


def test_where_the_host_runs_ahead(monkeypatch):
    """On the way that it goes on CUDA the same is found."""
    found = []
    for ahead in (False, True):
        monkeypatch.setattr(adaptive, "runs_ahead", lambda device, ahead=ahead: ahead)
        ball, heights, solution = fallen(HEIGHTS)
        loss = solution.event_t[solution.event_index == 0].sum()
        found.append([solution.event_t, solution.event_y, solution.ys, *torch.autograd.grad(loss, [heights, ball.g])])
        joint = solve(turning, torch.tensor([1.0, 0.0], dtype=D), [0.0, 9.0], events=Event(lambda t, y: y[0]))
        found[-1] += [joint.event_t, joint.event_y]
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
def test_on_a_gpu():
    found = []
    for device in ("cpu", "cuda"):
        ball = Ball().to(device)
        y0 = torch.stack([HEIGHTS, torch.zeros_like(HEIGHTS)], 1).to(device)
        event = Event(ball.hit, -1)
        solution = solve(ball, y0, [0.0, 0.4, 1.0, 1.5], step_control="per_sample", events=event)
        (by_g,) = torch.autograd.grad(solution.event_t[solution.event_index == 0].sum(), ball.g)
        found.append([x.cpu() for x in (solution.event_t, solution.event_y, solution.ys, by_g)])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-9, equal_nan=True)
