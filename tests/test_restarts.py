"""Solves whose state changes on the way, at events and at known times, against closed forms."""

import math

import pytest
import torch

import odenet_cuda
from odenet_cuda import Event, Jump, solve

D = torch.float64
ROUNDING = 1e-13
GRADIENT = 1e-10  # of solutions that every method has exactly
TOLERANCE = 1e-8  # of solves at rtol = atol = 1e-11
GRADIENTS = ("direct", "checkpoint", "adjoint", "quadrature")
TIMES = torch.tensor([0.0, 0.5, 2.0, 3.0], dtype=D)


class Balls:
    """h'' = -g, which the floor sends back at `kept` times the speed."""

    def __init__(self, heights, kept=0.9, g=9.8):
        self.heights = heights.clone().requires_grad_()
        self.kept, self.g = (torch.tensor(x, dtype=D, requires_grad=True) for x in (kept, g))
        self.wanted = [self.heights, self.kept, self.g]

    def __call__(self, t, y):
        return torch.stack([y[..., 1], -self.g.expand_as(y[..., 1])], -1)

    def bounce(self, t, y):
        return torch.stack([torch.zeros_like(y[..., 0]), -self.kept * y[..., 1]], -1)

    def solve(self, t=TIMES, **kwargs):
        y0 = torch.stack([self.heights, torch.zeros_like(self.heights)], -1)
        events = Event(lambda t, y: y[..., 0], -1, apply=self.bounce)
        return solve(self, y0, t, rtol=1e-9, atol=1e-9, events=events, **kwargs)

    def exact(self, t):
        """(the times of the bounces, the height at t) of each ball."""
        found = []
        for height in self.heights.reshape(-1):
            at, speed, times = torch.zeros((), dtype=D), torch.sqrt(2 * self.g * height), []
            fall = torch.sqrt(2 * height / self.g)
            while at + fall <= t:
                at, speed = at + fall, speed * self.kept
                times.append(at)
                fall = 2 * speed / self.g
            left = t - at
            y = speed * left - self.g * left**2 / 2 if times else height - self.g * left**2 / 2
            found.append((times, y))
        return found


HEIGHTS = torch.tensor([1.0, 0.2, 3.0, 100.0], dtype=D)  # the last one does not come down


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_balls_bounce_each_for_itself(gradient):
    """Times, heights and their gradients by height, restitution and gravity."""
    balls = Balls(HEIGHTS)
    solution = balls.solve(step_control="per_sample", gradient=gradient)
    for j, t in enumerate(TIMES):
        for i, (times, y) in enumerate(balls.exact(t)):
            assert abs(float((solution.ys[j, i, 0] - y).detach())) < ROUNDING
            if j == len(TIMES) - 1:
                k = len(times)
                assert (solution.event_index[:k, i] == 0).all() and (solution.event_index[k:, i] == -1).all()
                torch.testing.assert_close(
                    solution.event_t[:k, i], torch.stack(times) if k else torch.zeros(0, dtype=D), rtol=0, atol=ROUNDING
                )
                assert solution.event_t[k:, i].isnan().all() and solution.event_y[k:, i].isnan().all()
    found = torch.autograd.grad(solution.ys[1:, :, 0].sum() + solution.event_t[0, :3].sum(), balls.wanted)
    loss = sum(y for t in TIMES[1:] for _, y in balls.exact(t)) + sum(x[0][0] for x in balls.exact(TIMES[-1])[:3])
    for x, exact in zip(found, torch.autograd.grad(loss, balls.wanted), strict=True):
        torch.testing.assert_close(x, exact, rtol=GRADIENT, atol=GRADIENT)


@pytest.mark.parametrize(("method", "options"), [("dopri5", {}), ("bosh3", {}), ("rk4", {"step_size": 0.25})])
def test_one_ball_under_joint_control(method, options):
    balls = Balls(torch.tensor(1.0, dtype=D))
    solution = balls.solve(method=method, **options)
    times, y = balls.exact(TIMES[-1])[0]
    assert solution.event_t.shape == solution.event_index.shape == (len(times),)
    torch.testing.assert_close(solution.event_t, torch.stack(times), rtol=0, atol=ROUNDING)
    found, exact = (torch.autograd.grad(x, balls.wanted) for x in (solution.ys[-1, 0], y))
    torch.testing.assert_close(found, exact, rtol=GRADIENT, atol=GRADIENT)


def test_samples_do_not_depend_on_others():
    together = Balls(HEIGHTS).solve(step_control="per_sample")
    for i in range(len(HEIGHTS)):
        alone = Balls(HEIGHTS[i : i + 1]).solve(step_control="per_sample")
        assert torch.equal(alone.ys[:, 0], together.ys[:, i])
        count = len(alone.event_t)
        assert torch.equal(alone.event_t[:, 0].nan_to_num(), together.event_t[:count, i].nan_to_num())


def test_max_events():
    """The last of them ends its sample: outputs after it are NaN."""
    solution = Balls(HEIGHTS).solve(step_control="per_sample", max_events=2)
    assert solution.event_t.shape == (2, 4)
    exact = [times for times, _ in Balls(HEIGHTS).exact(TIMES[-1])]
    ends = torch.stack([times[1] if len(times) > 1 else torch.tensor(9.0) for times in exact])
    assert torch.equal(solution.ys[..., 0].isnan(), TIMES[:, None] > ends)
    with pytest.raises(ValueError, match="max_events must be a whole number"):
        Balls(HEIGHTS).solve(step_control="per_sample", max_events=0)


def turning(t, y):
    return torch.stack([y[..., 1], -y[..., 0]], -1)


def test_events_that_are_noted_and_one_that_ends():
    """terminal=False goes on with the state as it was, so the solution is that without events."""
    y0, t = torch.tensor([[1.0, 0.0], [0.5, 0.0]], dtype=D), [0.0, 2.0, 5.0, 8.0]
    notes = Event(lambda t, y: y[:, 0], terminal=False)
    ends = Event(lambda t, y: y[:, 1] - 0.9, 1)
    options = {"step_control": "per_sample", "rtol": 1e-11, "atol": 1e-11}
    solution = solve(turning, y0, t, events=[notes, ends], **options)
    expected = torch.tensor([[0.5, 0.5], [math.nan, 1.5], [math.nan, 2.5]], dtype=D) * math.pi
    expected[1, 0] = math.pi + math.asin(0.9)  # the first comes to 0.9 of its speed, the second never does
    torch.testing.assert_close(solution.event_t, expected, rtol=0, atol=TOLERANCE, equal_nan=True)
    assert solution.event_index.T.tolist() == [[0, 1, -1], [0, 0, 0]]
    without = solve(turning, y0, t, **options).ys
    torch.testing.assert_close(solution.ys[:, 1], without[:, 1], rtol=0, atol=TOLERANCE)
    assert solution.ys[2:, 0].isnan().all()


def test_each_event_has_its_own_change():
    """A point between two walls, of which one is soft, backwards in time too."""
    walls = [
        Event(lambda t, y: y[0] - 1, apply=lambda t, y: torch.stack([y[0], -y[1]])),
        Event(lambda t, y: y[0] + 1, apply=lambda t, y: torch.stack([y[0], -0.5 * y[1]])),
    ]
    func = lambda t, y: torch.stack([y[1], 0 * y[1]])  # noqa: E731
    for sign in (1.0, -1.0):
        y0 = torch.tensor([0.0, sign], dtype=D)
        solution = solve(func, y0, [0.0, 6.0 * sign], events=walls)
        assert solution.event_index.tolist() == [0, 1]
        torch.testing.assert_close(solution.event_t * sign, torch.tensor([1.0, 3.0], dtype=D))
        assert abs(float(solution.ys[-1, 0]) - 0.5) < ROUNDING


def test_gradient_of_a_reset_against_finite_differences():
    """The derivative jumps at an event (the saltation term): a nonlinear oscillator, whose reset has parameters."""

    def run(y0, level, share):
        func = lambda t, y: torch.stack([y[1], (1 - y[0] ** 2) * y[1] - y[0] + 0.1 * t])  # noqa: E731
        event = Event(lambda t, y: y[0] - level * (1 + 0.1 * t), 1, apply=lambda t, y: share * y + 0.05 * t)
        solution = solve(func, y0, [0.0, 1.5, 4.0], method="rk4", step_size=0.1, interp="cubic", events=event)
        assert len(solution.event_t) >= 2
        return solution.ys[1:].square().sum() + solution.event_t.sum() + solution.event_y.sum()

    given = [torch.tensor(x, dtype=D, requires_grad=True) for x in ([0.2, 1.0], 0.5, 0.4)]
    assert torch.autograd.gradcheck(run, given, rtol=1e-6)


# ---- known times ----------------------------------------------------------------------------------------------------------


def level_after(doses, amounts, rate, t):
    """Of y' = -rate y, y(0) = 0: doses that were given before t count."""
    return sum(a * torch.exp(-rate * (t - at)) for at, a in zip(doses, amounts, strict=True) if at < t)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_doses_of_each_subject(gradient):
    """Own dose times, amounts and observation times: values, and gradients by all of them and the rates."""
    nan = math.nan
    doses = torch.tensor([[0.0, 1.0, 2.5], [0.5, nan, nan], [0.25, 3.0, 9.0], [0.1, 0.2, 0.3]], dtype=D, requires_grad=True)
    amounts = torch.tensor([[1.0, 2.0, 0.5], [3.0, nan, nan], [1.0, 4.0, 5.0], [1.0, 1.0, 1.0]], dtype=D, requires_grad=True)
    seen = torch.tensor([[0.0, 1.0, 1.5, 4.0], [0.0, 2.0, nan, nan], [0.0, 2.0, 3.5, nan], [0.0, 0.25, 0.3, 2.0]], dtype=D)
    seen, rates = seen.requires_grad_(), torch.tensor([0.3, 1.0, 0.5, 2.0], dtype=D, requires_grad=True)
    wanted = [amounts, doses, rates, seen]
    give = Jump(doses, lambda t, y, i: y + amounts.gather(1, i[:, None]).nan_to_num())
    solution = solve(
        lambda t, y: -rates[:, None] * y, torch.zeros(4, 1, dtype=D), seen, step_control="per_sample", gradient=gradient,
        jumps=give, rtol=1e-11, atol=1e-11,
    )  # fmt: skip
    loss = exact = torch.zeros((), dtype=D)
    for row in range(4):
        for j in range(1, 4):
            t = seen[row, j]
            if t.isnan():
                assert solution.ys[j, row].isnan().all()
                continue
            value = level_after(doses[row], amounts[row], rates[row], t)
            assert abs(float((solution.ys[j, row, 0] - value).detach())) < TOLERANCE
            weight = 1.0 + 0.5 * j + row
            loss, exact = loss + weight * solution.ys[j, row, 0], exact + weight * value
    for x, y in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(exact, wanted), strict=True):
        torch.testing.assert_close(x.nan_to_num(), y.nan_to_num(), rtol=TOLERANCE, atol=TOLERANCE)


def test_joint_jumps():
    """Outputs at the time of a jump are those before it; jumps at the start count, those at and after the end do not."""
    amounts = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=D)
    jump = Jump([0.0, 1.0, 2.0, 3.0], lambda t, y, i: y + amounts[i] + 0 * t)
    solution = solve(lambda t, y: 0 * y, torch.zeros(1, dtype=D), [0.0, 0.5, 1.0, 1.5, 2.0], jumps=jump)
    assert solution.ys[:, 0].tolist() == [0.0, 1.0, 1.0, 3.0, 3.0]
    assert solution.event_t is None and solution.status == "success"
    back = Jump([1.5, 0.5], lambda t, y, i: 10 * y + 1)
    solution = solve(lambda t, y: 0 * y, torch.zeros(1, dtype=D), [2.0, 1.0, 0.0], jumps=[back], method="euler")
    assert solution.ys[:, 0].tolist() == [0.0, 1.0, 11.0]


def test_an_infusion_and_a_threshold():
    """Jumps and events together: a rate is switched on and off, and each sample is emptied when it is full."""
    switch = Jump([[1.0, 3.0], [2.0, 3.0]], lambda t, y, i: torch.stack([y[:, 0], 1.0 - i.double()], 1))
    empty = Event(lambda t, y: y[:, 0] - 0.75, 1, apply=lambda t, y: torch.stack([0 * y[:, 0], y[:, 1]], 1))
    func = lambda t, y: torch.stack([y[:, 1], 0 * y[:, 1]], 1)  # noqa: E731
    y0 = torch.zeros(2, 2, dtype=D)
    switch = Jump(torch.tensor(switch.times, dtype=D), switch.apply)
    solution = solve(func, y0, [0.0, 2.0, 4.0], step_control="per_sample", jumps=switch, events=empty)
    torch.testing.assert_close(solution.event_t, torch.tensor([[1.75, 2.75], [2.5, math.nan]], dtype=D), equal_nan=True)
    torch.testing.assert_close(solution.ys[:, :, 0], torch.tensor([[0.0, 0.0], [0.25, 0.0], [0.5, 0.25]], dtype=D))


def test_statistics_are_those_of_all_parts():
    calls = 0

    def func(t, y):
        nonlocal calls
        calls += 1
        return -y

    y0 = torch.ones(2, 1, dtype=D, requires_grad=True)
    jump = Jump([0.5, 0.75], lambda t, y, i: y + 1)
    solution = solve(func, y0, [0.0, 1.0], jumps=jump, gradient="adjoint", step_control="per_sample")
    assert solution.stats.nfe == calls and solution.stats.num_accepted.shape == (2,)
    before = calls
    solution.ys.sum().backward()
    assert solution.stats.nfe_backward == calls - before


def test_a_sample_that_fails_on_the_way():
    """The others go on; its outputs are NaN from there."""
    func = lambda t, y: torch.where(y < 0, -y * y, torch.ones_like(y))  # noqa: E731
    y0 = torch.tensor([[1.0], [2.0]], dtype=D)
    jump = Jump([0.5], lambda t, y, i: torch.where(y > 2, -1e3, y))
    options = {"step_control": "per_sample", "on_failure": "return", "max_num_steps": 200}
    solution = solve(func, y0, [0.0, 0.25, 1.0], jumps=jump, **options)
    assert solution.status[0] == "success" and solution.status[1] != "success"
    torch.testing.assert_close(
        solution.ys[..., 0], torch.tensor([[1.0, 2.0], [1.25, 2.25], [2.0, math.nan]], dtype=D), equal_nan=True
    )


def test_without_steps():
    jump = Jump([0.5], lambda t, y, i: y + 1)
    assert torch.equal(solve(turning, torch.ones(2, dtype=D), [0.0], jumps=jump).ys, torch.ones(1, 2, dtype=D))
    assert solve(turning, torch.ones(0, 2, dtype=D), [0.0, 1.0], jumps=jump, step_control="per_sample").ys.shape == (2, 0, 2)


def test_refusals():
    y0, t = torch.ones(3, 2, dtype=D), [0.0, 1.0]
    keep = lambda t, y, i: y  # noqa: E731
    for jumps, error, words in (
        (lambda t, y: y, TypeError, "jumps must be of type Jump"),
        (Jump([-0.5], keep), ValueError, "none before its start"),
        (Jump([0.5, 0.25, 0.75], keep), ValueError, "strictly increasing or decreasing"),
        (Jump([0.5, 0.25], keep), ValueError, "must follow one another in the direction of the solve"),
        (Jump([0.5], lambda t, y, i: y[0]), ValueError, r"must return the state in the shape.*\[3, 2\].*got \[2\]"),
        (Jump([0.5], lambda t, y, i: (y, y)), TypeError, "must return a tensor"),
    ):
        with pytest.raises(error, match=words):
            solve(turning, y0, t, jumps=jumps)
    for name, value in (("dense", True), ("regularizers", ("kinetic",))):
        with pytest.raises(NotImplementedError, match="not served where events or jumps change the state"):
            solve(turning, y0, t, jumps=Jump([0.5], keep), **{name: value})
    with pytest.raises(TypeError, match="apply of an Event must be callable"):
        Event(lambda t, y: y, apply=3)
    assert odenet_cuda.Jump is Jump
