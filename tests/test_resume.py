"""A solve that goes on from where another ended takes the steps of one long solve."""

import math

import pytest
import torch

from odenet_cuda import Event, Jump, SolverError, compile, solve

Y0 = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.5, -1.0]], dtype=torch.float64)
METHODS = ("dopri5", "fehlberg2", "dopri8")
OPTIONS = {"rtol": 1e-5, "atol": 1e-6}


class Counted:
    """van der Pol's oscillator, which counts its calls and may be interrupted."""

    def __init__(self, interrupt: int = -1):
        self.calls, self.interrupt = 0, interrupt

    def __call__(self, t, y):
        self.calls += 1
        if self.calls == self.interrupt:
            raise KeyboardInterrupt
        return torch.stack([y[..., 1], 3 * (1 - y[..., 0] ** 2) * y[..., 1] - y[..., 0]], -1)


def succeeded(solution):
    return all(word == "success" for word in ([solution.status] if isinstance(solution.status, str) else solution.status))


@pytest.mark.parametrize("direction", [1.0, -0.3])
@pytest.mark.parametrize("controller", ["I", "PID"])
@pytest.mark.parametrize("control", ["joint", "per_sample"])
@pytest.mark.parametrize("method", METHODS)
def test_as_one_long_solve(method, control, controller, direction):
    """The same numbers to the bit, and under joint control as many calls of func in all."""
    options = {**OPTIONS, "method": method, "step_control": control, "controller": controller}
    first, rest = [0.0, direction], [direction, 2 * direction, 3 * direction]
    whole, parts = Counted(), Counted()
    with torch.no_grad():
        long = solve(whole, Y0, [0.0, *rest], step_t=[direction], **options)
        before = solve(parts, Y0, first, **options)
        after = solve(parts, None, rest, resume=before, **options)
    assert torch.equal(after.ys, long.ys[1:])
    for name in ("num_accepted", "num_rejected"):
        counts = [torch.as_tensor(getattr(x.stats, name)) for x in (before, after, long)]
        assert torch.equal(counts[0] + counts[1], counts[2])
    assert control == "per_sample" or parts.calls == whole.calls == before.stats.nfe + after.stats.nfe


def test_a_step_given_as_a_function():
    """Rosenbrock's steps go on like the others."""
    options = {"method": "rosenbrock23", "rtol": 1e-3, "atol": 1e-4}
    with torch.no_grad():
        long = solve(Counted(), Y0, [0.0, 0.5, 1.0], step_t=[0.5], **options)
        before = solve(Counted(), Y0, [0.0, 0.5], **options)
        after = solve(Counted(), None, [0.5, 1.0], resume=before, **options)
    assert torch.equal(after.ys, long.ys[1:])


@pytest.mark.parametrize("control", ["joint", "per_sample"])
@pytest.mark.parametrize("method", METHODS)
def test_after_max_num_steps(method, control):
    """A few steps at a time, until all samples are there: the steps of one solve."""
    options = {**OPTIONS, "method": method, "step_control": control}
    whole, parts = Counted(), Counted()
    with torch.no_grad():
        long = solve(whole, Y0, [0.0, 1.0, 2.0], **options)
        part = solve(parts, Y0, [0.0, 1.0, 2.0], max_num_steps=5, on_failure="return", **options)
        rounds = 1
        while not succeeded(part):
            t = part.times_ahead([1.0, 2.0])
            part = solve(parts, None, t, resume=part, max_num_steps=5, on_failure="return", **options)
            rounds += 1
    assert rounds > 1
    assert torch.equal(part.y_last, long.y_last)
    assert control == "per_sample" or parts.calls == whole.calls


def test_after_a_solver_error():
    with torch.no_grad():
        with pytest.raises(SolverError) as caught:
            solve(Counted(), Y0, [0.0, 1.0], max_num_steps=9, **OPTIONS)
        kept = caught.value.solution
        assert float(kept.t_last) == caught.value.t and torch.equal(kept.y_last, caught.value.y)
        rest = solve(Counted(), kept.y_last, kept.times_ahead([0.0, 1.0]), resume=kept, **OPTIONS)
        assert torch.equal(rest.ys[-1], solve(Counted(), Y0, [0.0, 1.0], **OPTIONS).ys[-1])


@pytest.mark.parametrize("recorded", [False, True], ids=["", "recorded"])
@pytest.mark.parametrize("control", ["joint", "per_sample"])
def test_after_an_interruption(control, recorded):
    """What was interrupted in the middle of a step goes on with that step; outputs that it had stay, others are NaN."""
    options = {**OPTIONS, "step_control": control}
    y0, times = Y0.clone().requires_grad_(recorded), [0.0, 0.1, 1.5, 2.0]
    with pytest.raises(KeyboardInterrupt) as caught:
        solve(Counted(interrupt=100), y0, times, **options)
    kept = caught.value.solution
    words = [kept.status] if control == "joint" else kept.status
    assert set(words) == {"interrupted"} and "interrupted" in repr(kept)
    with torch.no_grad():
        long = solve(Counted(), Y0, times, **options)
        rest = solve(Counted(), None, kept.times_ahead(times), resume=kept, **options)
    missing = kept.ys.isnan()
    assert torch.equal(kept.ys[~missing], long.ys[~missing]) and missing[3].all() and not missing[:2].any()
    assert not kept.ys.requires_grad
    assert torch.equal(rest.y_last, long.y_last)


def test_an_interrupted_event_function():
    """Between two decisions nothing is lost: the step that was decided on counts."""
    calls = 0

    def norm(error):
        nonlocal calls
        calls += 1
        if calls == 30:
            raise KeyboardInterrupt
        return error.square().mean().sqrt()

    with torch.no_grad():
        with pytest.raises(KeyboardInterrupt) as caught:
            solve(Counted(), Y0, [0.0, 2.0], norm=norm, **OPTIONS)
        assert not hasattr(caught.value, "solution")  # in the decision itself: nobody knows whether it was made
        with pytest.raises(KeyboardInterrupt) as caught:
            solve(Counted(interrupt=50), Y0, [0.0, 2.0], jumps=Jump([0.5], lambda t, y, i: y + 1), **OPTIONS)
        assert not hasattr(caught.value, "solution")


@pytest.mark.parametrize("control", ["joint", "per_sample"])
def test_from_a_discontinuity(control):
    """func jumps where the first solve ends: the slope is that beyond it."""

    def func(t, y):
        return torch.where(t < 1, -y, 2 * y)

    options = {"step_control": control, "rtol": 1e-10, "atol": 1e-12, "jump_t": [1.0]}
    with torch.no_grad():
        before = solve(func, Y0, [0.0, 1.0], **options)
        after = solve(func, None, [1.0, 1.5], resume=before, **options)
        long = solve(func, Y0, [0.0, 1.0, 1.5], **options)
    assert torch.equal(after.ys[-1], long.ys[-1])
    torch.testing.assert_close(after.ys[-1], Y0 * math.exp(0.0), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("control", ["joint", "per_sample"])
@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "adjoint", "quadrature"])
def test_gradients_go_on_through_y0(gradient, control):
    """With y0 = ys[-1] the gradient of both is that of the long solve."""
    options = {"gradient": gradient, "step_control": control, "rtol": 1e-8, "atol": 1e-9}
    found = []
    for split in (False, True):
        y0, a = Y0.clone().requires_grad_(), torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
        func = lambda t, y, a=a: torch.stack([y[..., 1], -a * y[..., 0]], -1)  # noqa: E731
        if split:
            before = solve(func, y0, [0.0, 0.5], **options)
            y1 = solve(func, before.ys[-1], [0.5, 1.0], resume=before, **options).ys[-1]
        else:
            y1 = solve(func, y0, [0.0, 0.5, 1.0], step_t=[0.5], **options).ys[-1]
        y1.square().sum().backward()
        found.append((y1.detach(), y0.grad, a.grad))
    assert torch.equal(found[0][0], found[1][0])
    exact = 1e-12 if gradient in ("direct", "checkpoint") else 1e-6
    for x, y in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(x, y, rtol=exact, atol=exact)


def test_a_compiled_field_says_that_the_stepper_serves():
    field = compile(lambda t, y: -y)
    with torch.no_grad():
        before = solve(field, Y0, [0.0, 1.0], rtol=1e-9, atol=1e-10)
        after = solve(field, None, [1.0, 2.0], resume=before, rtol=1e-9, atol=1e-10)
    assert after.engine == "stepper" and "resume" in after.explanation["compiled"]
    torch.testing.assert_close(after.ys[-1], Y0 * math.exp(-2), rtol=1e-8, atol=1e-9)


def test_tuples_and_own_times():
    """Each sample goes on from its own time, in its own direction."""
    t = torch.tensor([[0.0, 1.0], [0.0, -0.5], [0.0, math.nan]], dtype=torch.float64)
    func = lambda t, y: {"a": -y["a"], "b": t[:, 0] * y["b"]}  # noqa: E731
    y0 = {"a": Y0, "b": Y0[:, 0]}
    options = {"step_control": "per_sample", "rtol": 1e-9, "atol": 1e-10}
    with torch.no_grad():
        before = solve(func, y0, t, **options)
        assert before.t_last.tolist() == [1.0, -0.5, 0.0]
        ahead = before.times_ahead(torch.tensor([[2.0], [-1.0], [math.nan]]))
        after = solve(func, None, ahead, resume=before, **options)
    exact = torch.exp(-torch.tensor([2.0, -1.0, 0.0], dtype=torch.float64))[:, None] * Y0
    torch.testing.assert_close(after.y_last["a"], exact, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(
        after.y_last["b"], Y0[:, 0] * torch.exp(ahead[:, -1].nan_to_num() ** 2 / 2), rtol=1e-7, atol=1e-8
    )


def test_times_ahead():
    solution = solve(lambda t, y: -y, Y0, [0.0, 1.0])
    assert solution.times_ahead([0.0, 0.5, 1.0, 1.5, 2.0]).tolist() == [1.0, 1.5, 2.0]
    assert solution.times_ahead([0.5]).tolist() == [1.0]
    with pytest.raises(ValueError, match="adaptive"):
        solve(lambda t, y: -y, Y0, [0.0, 1.0], method="rk4").times_ahead([2.0])


def decay(t, y):
    return -y


def test_refusals():
    done = solve(decay, Y0, [0.0, 1.0])
    rows = solve(decay, Y0, [0.0, 1.0], step_control="per_sample")
    grid = solve(decay, Y0, [0.0, 1.0], method="rk4")
    refused = [
        (TypeError, "resume must be a Solution", {"resume": 3}),
        (ValueError, "t must begin where resume ended, at 1.0", {"t": [0.5, 2.0]}),
        (ValueError, "in the direction of resume", {"t": [1.0, 0.5]}),
        (ValueError, "method must be that of resume", {"method": "tsit5"}),
        (ValueError, "needs an adaptive method", {"method": "rk4"}),
        (ValueError, "step_control must be that", {"step_control": "per_sample"}),
        (ValueError, "first_step", {"first_step": 0.1}),
        (ValueError, "y0 must be the state", {"y0": Y0}),
        (
            ValueError,
            "for sample 1",
            {"resume": rows, "y0": rows.y_last, "step_control": "per_sample", "t": [[1.0, 2], [1.5, 2], [1, 2]]},
        ),
        (ValueError, "no step size", {"resume": grid}),
        (ValueError, "no event", {"resume": solve(decay, Y0, [0.0, 9.0], events=Event(lambda t, y: y[0, 0] - 1))}),
        (NotImplementedError, "jumps", {"jumps": Jump([1.5], lambda t, y, i: y)}),
    ]
    for error, words, changed in refused:
        call = {"y0": None, "t": [1.0, 2.0], "resume": done, **changed}
        if isinstance(call["t"][0], list):
            call["t"] = torch.tensor(call["t"], dtype=torch.float64)
        with pytest.raises(error, match=words):
            solve(decay, **call)
    failed = solve(lambda t, y: y * math.nan, Y0, [0.0, 1.0], on_failure="return")
    with pytest.raises(ValueError, match="failed for good: non-finite"):
        solve(decay, None, [0.0, 1.0], resume=failed)
    carried = {"method": "fehlberg2", "gradient": "direct"}
    before = solve(decay, Y0, [0.0, 1.0], **carried)
    with pytest.raises(NotImplementedError, match="last slope of the step before"):
        solve(decay, before.y_last.requires_grad_(), [1.0, 2.0], resume=before, **carried)
    with pytest.raises(NotImplementedError, match="resume is not served inside"):
        torch.func.vmap(lambda y: solve(decay, y, [1.0, 2.0], resume=done).ys)(Y0)
