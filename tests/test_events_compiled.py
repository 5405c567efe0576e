"""Events in compiled solves: the stepper's, to rounding, in one call; and whatever cannot be so is left to the stepper."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import odenet_cuda
from odenet_cuda import Event, odeint, odeint_event, solve
from odenet_cuda.compiled import event_plan
from odenet_cuda.compiled.event_plan import EventPlan, alike

pytestmark = pytest.mark.usefixtures("needs_compiler", "quickly")
D = torch.float64
TIGHT: Any = dict(rtol=1e-9, atol=1e-9, step_control="per_sample")


@pytest.fixture(scope="module")
def needs_compiler() -> None:
    from odenet_cuda.compiled.build import find_compiler

    find_compiler()


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled is not optimised: that takes time."""
    monkeypatch.setenv("ODENET_CXXFLAGS", "-O0")


class Ball(nn.Module):
    """Falls through air that is thicker below."""

    def __init__(self, dtype: torch.dtype = D):
        super().__init__()
        self.drag = nn.Parameter(torch.tensor(0.1, dtype=dtype))
        self.floor = nn.Parameter(torch.tensor(0.2, dtype=dtype))

    def forward(self, t: Tensor, y: Tensor, bounce: Tensor) -> Tensor:
        height, speed = y[:, 0], y[:, 1]
        return torch.stack([speed, -9.8 - self.drag * speed * speed.abs() * torch.exp(-height)], 1)

    def hit(self, t: Tensor, y: Tensor, bounce: Tensor) -> Tensor:
        return y[:, 0] - self.floor

    def top(self, t: Tensor, y: Tensor, bounce: Tensor) -> Tensor:
        return y[:, 1:]  # [rows, 1]

    def thrown_back(self, t: Tensor, y: Tensor, bounce: Tensor) -> Tensor:
        return torch.stack([y[:, 0], -bounce * y[:, 1]], 1)


def start(rows: int, dtype: torch.dtype = D) -> tuple[Tensor, Tensor]:
    height = torch.linspace(0.5, 3.0, rows, dtype=dtype)
    return torch.stack([height, torch.linspace(-1, 1, rows, dtype=dtype)], 1), torch.linspace(0.4, 0.9, rows, dtype=dtype)


def both(func: Any, y0: Any, t: Any, **how: Any) -> tuple[Any, Any]:
    """By the compiled field, and by the stepper."""
    field = odenet_cuda.compile(func)
    ours, theirs = solve(field, y0, t, **how), solve(func, y0, t, **how)
    assert ours.engine == "compiled" and theirs.engine == "stepper", field.explain()
    return ours, theirs


def assert_same(ours: Any, theirs: Any, tolerance: float = 1e-10) -> None:
    """Events, outputs and counts."""
    assert torch.equal(ours.event_index, theirs.event_index)
    for name in ("event_t", "event_y", "ys"):
        a, b = (getattr(x, name).detach() for x in (ours, theirs))
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True, msg=name)
    assert torch.equal(torch.as_tensor(ours.stats.num_accepted), torch.as_tensor(theirs.stats.num_accepted))


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("dtype", [D, torch.float32])
def test_as_by_the_stepper(dtype: torch.dtype, backwards: bool):
    """The first of each row, and all of them with what they change, among outputs; forwards and backwards in time."""
    ball, (y0, bounce) = Ball(dtype), start(21, dtype)
    sign = -1.0 if backwards else 1.0
    if backwards:  # where drag makes faster
        ball.drag.data.zero_()
        y0 = y0 * torch.tensor([1.0, -1.0], dtype=dtype)
    how: Any = {**TIGHT, "args": (bounce,)} if dtype is D else {**TIGHT, "rtol": 1e-5, "atol": 1e-5, "args": (bounce,)}
    tolerance = 1e-10 if dtype is D else 2e-3
    t = [sign * x for x in (0.0, 0.3, 0.31, 2.0, 4.0)]
    first = Event(ball.hit, -1)
    hits = [Event(ball.top, -1, terminal=False), Event(ball.hit, -1, apply=ball.thrown_back)]
    with torch.no_grad():
        for events in (first, hits):
            for max_events in (9, 5):
                ours, theirs = both(ball, y0, t, events=events, max_events=max_events, **how)
                if dtype is D:
                    assert_same(ours, theirs, tolerance)
                assert bool((ours.event_index >= -1).all()) and bool((ours.event_t[ours.event_index >= 0] * sign > 0).all())
                torch.testing.assert_close(ours.event_t, theirs.event_t, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert len(ours.event_t) == 5


def test_samples_do_not_depend_on_others():
    """Each as it is alone, to the bit, and whatever the number of threads."""
    ball, (y0, bounce) = Ball(), start(70)
    field, event = odenet_cuda.compile(ball), Event(ball.hit, -1, apply=ball.thrown_back)
    solved: Any = lambda rows: solve(field, y0[rows], [0.0, 3.0], args=(bounce[rows],), events=event, **TIGHT)  # noqa: E731
    with torch.no_grad():
        together = solved(slice(None))
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            again = solved(slice(None))
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(again.event_t.nan_to_num(9), together.event_t.nan_to_num(9))
        for i in range(0, 70, 9):
            alone = solved(slice(i, i + 1))
            assert alone.engine == "compiled"
            count = len(alone.event_t)
            for name in ("event_t", "event_y"):
                found, expected = getattr(alone, name)[:, 0], getattr(together, name)[:count, i]
                assert torch.equal(found.nan_to_num(9), expected.nan_to_num(9))
            assert bool((together.event_index[count:, i] == -1).all())


@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "adjoint"])
def test_gradients(gradient: str):
    """For the start, args, and parameters of func, event function and change."""
    ball, (y0, bounce) = Ball(), start(9)
    found = []
    for func in (odenet_cuda.compile(ball), ball):
        y, b = y0.clone().requires_grad_(), bounce.clone().requires_grad_()
        event = Event(ball.hit, -1, apply=ball.thrown_back)
        solution = solve(func, y, [0.0, 1.0, 3.0], args=(b,), events=event, max_events=4, gradient=gradient, **TIGHT)
        assert solution.engine == ("compiled" if func is not ball else "stepper"), solution.explanation
        loss = (
            solution.event_t.nan_to_num().sum() + solution.event_y.nan_to_num().square().sum() + solution.ys.nan_to_num().sum()
        )
        found.append(torch.autograd.grad(loss, [y, b, ball.drag, ball.floor]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_odeint_with_event_fn():
    """One sample under joint control is compiled; one that begins on a zero is left to the stepper, and several are."""
    field = odenet_cuda.compile(lambda t, y: torch.stack([y[1], -y[0]]))
    y0, t = torch.tensor([1.0, 0.0], dtype=D), torch.tensor([0.0, 1.0], dtype=D)
    y0.requires_grad_()
    at, ys = odeint(field, y0, t, event_fn=lambda t, y: y[0], rtol=1e-10, atol=1e-10)
    assert field.explain() == "compiled" and abs(float(at) - math.pi / 2) < 1e-8 and abs(float(ys[1, 0])) < 1e-8
    (by_y0,) = torch.autograd.grad(at, y0)
    torch.testing.assert_close(by_y0, torch.tensor([0.0, 1.0], dtype=D), rtol=0, atol=1e-6)
    at, _ = odeint_event(field, y0.detach(), 0.0, event_fn=lambda t, y: y[0], reverse_time=True)
    assert abs(float(at) + math.pi / 2) < 1e-6
    at, _ = odeint(field, y0.detach(), t, event_fn=lambda t, y: y[1])
    assert float(at) == 0.0 and "zero at the start" in field.explain()


def test_own_times_and_no_events():
    """Rows with their own grids; one that meets no event has -1 and NaN, and all its outputs."""
    field, t = (
        odenet_cuda.compile(lambda t, y: torch.ones_like(y)),
        torch.tensor([[0.0, 1.0, 4.0], [0.0, 2.0, math.nan]], dtype=D),
    )
    solution = solve(field, torch.zeros(2, 1, dtype=D), t, events=Event(lambda t, y: y[:, 0] - 3), **TIGHT)
    assert solution.engine == "compiled" and solution.event_index.tolist() == [0, -1]
    torch.testing.assert_close(solution.event_t, torch.tensor([3.0, math.nan], dtype=D), equal_nan=True)
    torch.testing.assert_close(solution.ys[:2, :, 0], torch.tensor([[0.0, 0.0], [1.0, 2.0]], dtype=D))
    assert solution.ys[2].isnan().all()
    onwards = Event(lambda t, y: y[:, 0] - 7, terminal=False)
    solution = solve(field, torch.zeros(2, 1, dtype=D), t, events=onwards, **TIGHT)
    assert solution.engine == "compiled" and solution.event_t.shape == (0, 2)


def test_more_events_than_there_is_room_for():
    field = odenet_cuda.compile(lambda t, y: torch.stack([y[:, 1], -y[:, 0]], 1))
    y0 = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=D)
    with torch.no_grad():
        solution = solve(field, y0, [0.0, 200.0], events=Event(lambda t, y: y[:, 0], terminal=False), **TIGHT)
    assert solution.engine == "compiled"
    number = torch.arange(63, dtype=D)
    expected = torch.stack([(number + 0.5) * math.pi, (number + 1) * math.pi], 1)
    torch.testing.assert_close(solution.event_t[:63], expected, rtol=0, atol=1e-5)


def test_what_is_no_number_is_said_in_words():
    field = odenet_cuda.compile(lambda t, y: -torch.ones_like(y))
    for fn in (lambda t, y: y[:, 0].sqrt() + 1, lambda t, y: (y[:, 0] - 2).sqrt()):
        with pytest.raises(ValueError, match="not a number"):
            solve(field, torch.ones(2, 1, dtype=D), [0.0, 3.0], events=Event(fn), **TIGHT)


def test_functions_made_anew_are_read_once():
    """Where they are alike; what differs in a closure is read anew, as far as what was read serves as many solves."""

    def event(level: float) -> Event:
        return Event(lambda t, y: y[:, 0] - level)

    field, y0 = odenet_cuda.compile(lambda t, y: torch.ones_like(y)), torch.zeros(2, 1, dtype=D)
    for _ in range(3):
        solution = solve(field, y0, [0.0, 20.0], events=event(2.0), **TIGHT)
        assert solution.engine == "compiled" and float(solution.event_t[0]) == pytest.approx(2.0)
    assert len(field._plans.with_events) == 1
    engines = []
    for level in range(3, 13):
        solution = solve(field, y0, [0.0, 20.0], events=event(float(level)), **TIGHT)
        assert float(solution.event_t[0]) == pytest.approx(level)
        engines.append(solution.engine)
    assert engines == ["compiled"] * 7 + ["stepper"] * 3 and event_plan.MADE_ANEW in field.explain()
    for _ in range(16):
        solve(field, y0, [0.0, 20.0], events=event(9.0), **TIGHT)
    assert field.explain() == "compiled" and len(field._plans.with_events) == 8
    solution = solve(field, y0, [0.0, 20.0], events=event(5.5), **TIGHT)  # in place of the one that was used longest ago
    assert solution.engine == "compiled" and float(solution.event_t[0]) == pytest.approx(5.5)
    assert len(field._plans.with_events) == 8 and not any(x.are([event(2.0)]) for x in field._plans.with_events)


def test_what_they_read_may_change():
    """Attributes and parameters of what the functions come from are compared at every call."""

    class Wall(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.at, self.shift = 2.0, nn.Parameter(torch.zeros((), dtype=D))

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return y[:, 0] - self.at - self.shift

    wall, field = Wall(), odenet_cuda.compile(lambda t, y: torch.ones_like(y))
    found = []
    for at, shift in ((2.0, 0.0), (3.0, 0.0), (3.0, 0.5)):
        wall.at = at
        with torch.no_grad():
            wall.shift.fill_(shift)
            solution = solve(field, torch.zeros(1, 1, dtype=D), [0.0, 9.0], events=Event(wall), **TIGHT)
        assert solution.engine == "compiled"
        found.append(float(solution.event_t[0]))
    assert found == pytest.approx([2.0, 3.0, 3.5])


def test_alike():
    def made(x: Any, y: Any = 1.0) -> Any:
        return lambda t, z, w=y: z - x - w

    shared = torch.ones(1)
    assert alike(made(1), made(1)) and alike(made(shared), made(shared)) and alike(made(made(2)), made(made(2)))
    assert not alike(made(1), made(1.0)) and not alike(made(0.0), made(-0.0)) and not alike(made(1), made(1, 2))
    assert not alike(made(torch.ones(1)), made(torch.ones(1))) and not alike(made(1), lambda t, z: z)
    ball = Ball()
    assert alike(ball.hit, ball.hit) and not alike(ball.hit, ball.top) and not alike(ball.hit, Ball().hit)


def test_a_solve_without_events_says_nothing_of_their_code(monkeypatch: pytest.MonkeyPatch):
    """The stepper is asked again by the first solve that has one event, and by the first that has two."""
    asked: list[int] = []
    expected = odenet_cuda.compiled_events._expected
    monkeypatch.setattr(odenet_cuda.compiled_events, "_expected", lambda *x: (asked.append(1), expected(*x))[1])
    field = odenet_cuda.compile(lambda t, y: torch.ones_like(y))
    event = Event(lambda t, y: y[:, 0] - 1, apply=lambda t, y: 0 * y)
    found = []
    with torch.no_grad():
        for end in (0.5, 0.6, 1.5, 1.6, 2.5, 2.6, 9.5):
            solution = solve(field, torch.zeros(2, 1, dtype=D), [0.0, end], events=event, **TIGHT)
            assert solution.engine == "compiled" and len(solution.event_t) == int(end)
            found.append(len(asked))
            asked.clear()
    assert found[0] == found[2] == found[4] == 1 and sum(found) <= 4  # the second solve of a plan is compared in any case


@pytest.mark.parametrize("wrong", ["event_values", "apply_0"])
def test_wrong_machine_code_gives_no_number(monkeypatch: pytest.MonkeyPatch, wrong: str):
    """A library whose events or changes are not func's is found out by its first solve, and the stepper serves."""
    source = EventPlan.source

    def spoilt(self: EventPlan, *args: Any) -> str:
        text = source(self, *args)
        place = text.index(f"static void {wrong}(")
        return text[:place] + text[place:].replace("y[0]", "(y[0] + P(T(0.125)))").replace("y[1]", "(y[1] * P(T(0.75)))")

    monkeypatch.setattr(EventPlan, "source", spoilt)
    field = odenet_cuda.compile(lambda t, y: torch.stack([y[:, 1], torch.full_like(y[:, 1], -10.0)], 1))
    event = Event(lambda t, y: y[:, 0], -1, apply=lambda t, y: torch.stack([y[:, 0], -y[:, 1]], 1))
    y0 = torch.tensor([[1.25, 0.0]], dtype=D)
    for _ in range(2):
        with torch.no_grad(), pytest.warns(UserWarning, match="its events differ") if not _ else torch.no_grad():
            solution = solve(field, y0, [0.0, 2.0], events=event, **TIGHT)
        torch.testing.assert_close(solution.event_t[:, 0], torch.tensor([0.5, 1.5], dtype=D), rtol=0, atol=1e-7)
        assert solution.engine == "stepper"


def test_one_event_of_a_solve_that_goes_on():
    """max_events=1: in the shapes of a solve that goes on, [K, rows], with and without gradients, also where there is none."""

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.ones_like(y)

    for level, count in ((1.0, 1), (9.0, 0)):
        event = Event(lambda t, y, level=level: y[:, 0] - level, terminal=False)
        for gradient in (False, True):
            y0 = torch.zeros(2, 1, dtype=D, requires_grad=gradient)
            field = odenet_cuda.compile(func)
            ours, theirs = (solve(f, y0, [0.0, 2.0], events=event, max_events=1, **TIGHT) for f in (field, func))
            assert gradient or ours.engine == "compiled"
            assert_same(ours, theirs)
            assert ours.event_t.shape == (count, 2) and ours.event_y.shape == (count, 2, 1)


def test_an_event_in_the_last_step_allowed():
    """The steps are counted from the last event on, in which the last one allowed may end."""
    turn = Event(lambda t, y: y[:, 0], apply=lambda t, y: torch.stack([y[:, 0] + 0.5, -y[:, 1]], 1))
    y0 = torch.stack([torch.linspace(0.2, 2.0, 12, dtype=D), torch.full((12,), -1.0, dtype=D)], 1)
    field: Any = lambda t, y: torch.stack([y[:, 1], torch.sin(9 * y[:, 0])], 1)  # noqa: E731
    compiled = odenet_cuda.compile(field)
    how: Any = {**TIGHT, "events": turn, "max_events": 4, "on_failure": "return"}
    with torch.no_grad():
        for most in range(4, 30, 3):
            ours, theirs = (solve(f, y0, [0.0, 2.0], max_num_steps=most, **how) for f in (compiled, field))
            assert ours.engine == "compiled"
            assert_same(ours, theirs)


def test_change_of_another_shape():
    """Refused also where the first solve came to no event."""
    field, event = (
        odenet_cuda.compile(lambda t, y: torch.ones_like(y)),
        Event(lambda t, y: y[:, 0] - 3, apply=lambda t, y: y[:, :, None]),
    )
    solve(field, torch.zeros(2, 1, dtype=D), [0.0, 1.0], events=event, **TIGHT)
    with pytest.raises(ValueError, match="apply of event 0 must return the state in the shape"):
        solve(field, torch.zeros(2, 1, dtype=D), [0.0, 4.0], events=event, **TIGHT)
