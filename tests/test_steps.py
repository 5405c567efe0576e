"""Accepted steps, one by one."""

import itertools
import math

import pytest
import torch

from odenet_cuda import SolverError, solve, steps

Y0 = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.5, -1.0]], dtype=torch.float64)


def oscillator(t, y):
    return torch.stack([y[..., 1], 3 * (1 - y[..., 0] ** 2) * y[..., 1] - y[..., 0]], -1)


@pytest.mark.parametrize("t1", [2.0, -0.5])
@pytest.mark.parametrize("method", ["dopri5", "fehlberg2"])
@pytest.mark.parametrize("control", ["joint", "per_sample"])
def test_they_are_those_of_solve(control, method, t1):
    """One begins where the last ended, the last ends with solve, and its interpolant is solve's."""
    options = {"step_control": control, "method": method, "rtol": 1e-5, "atol": 1e-6}
    found = list(steps(oscillator, Y0, 0.0, t1, **options))
    solution = solve(oscillator, Y0, [0.0, t1], dense=True, **options)
    assert torch.equal(found[0].y0, Y0) and torch.equal(found[-1].y1, solution.y_last)
    for step, following in itertools.pairwise(found):
        assert torch.equal(step.y1, following.y0) and torch.equal(step.t1, following.t0)
    assert torch.equal(sum(step.accept.long() for step in found), torch.as_tensor(solution.stats.num_accepted))
    for step in found[:: max(1, len(found) // 5)]:
        torch.testing.assert_close(step.t0 + step.dt, step.t1, rtol=0, atol=1e-15)
        assert (step.error_ratio[step.accept] <= 1).all()
        middle = (step.t0 + step.t1) / 2
        if control == "joint":
            assert torch.equal(step.interpolant(middle), solution.interpolant(middle))
            torch.testing.assert_close(step.interpolant(step.t1), step.y1, rtol=1e-13, atol=1e-14)
        else:
            inside, all_of_it = (x.interpolant(middle[:, None], per_sample=True)[0] for x in (step, solution))
            assert torch.equal(inside[step.accept], all_of_it[step.accept])


def test_lazily_and_for_ever():
    calls = 0

    def func(t, y):
        nonlocal calls
        calls += 1
        return -y

    iterator = steps(func, torch.ones(1), 0.0)
    assert calls == 0
    next(iterator)
    after_one = calls
    assert 0 < after_one < 10
    last = next(step for step in iterator if step.t1 > 5)
    assert calls > after_one
    torch.testing.assert_close(last.y1, torch.exp(-last.t1).float().reshape(1), rtol=1e-4, atol=1e-6)
    back = next(step for step in steps(func, torch.ones(1), 0.0, -math.inf) if step.t1 < -1)
    torch.testing.assert_close(back.y1, torch.exp(-back.t1).float().reshape(1), rtol=1e-4, atol=1e-6)


def test_grad_mode_is_left_alone():
    y0 = torch.ones(1, requires_grad=True)
    for step in itertools.islice(steps(lambda t, y: -y, y0, 0.0), 3):
        assert torch.is_grad_enabled() and not step.y1.requires_grad


def test_structures_times_of_samples_and_resume():
    func = lambda t, y: (-y[0], y[1])  # noqa: E731
    y0 = (torch.ones(2, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64))
    start = torch.tensor([0.0, 0.5], dtype=torch.float64)
    *_, last = steps(func, y0, start, 1.0, step_control="per_sample")
    assert last.t1.tolist() == [1.0, 1.0]
    torch.testing.assert_close(last.y1[0], torch.exp(start - 1), rtol=1e-6, atol=1e-8)
    with torch.no_grad():
        before, long = (solve(func, y0, t, step_t=[1.0]) for t in ([0.0, 1.0], [0.0, 2.0]))
    *_, last = steps(func, None, 1.0, 2.0, resume=before)
    assert torch.equal(last.y1[1], long.y_last[1])


def test_failures_and_refusals():
    with pytest.raises(SolverError, match="max_num_steps"):
        list(steps(oscillator, Y0, 0.0, 5.0, max_num_steps=5))
    with pytest.raises(SolverError, match="non-finite"):
        list(steps(lambda t, y: y * math.nan, Y0, 0.0, 5.0))
    with pytest.raises(ValueError, match="method must be adaptive"):
        steps(oscillator, Y0, 0.0, 1.0, method="rk4")
    with pytest.raises(ValueError, match="strictly increasing or decreasing"):
        steps(oscillator, Y0, 0.0, 0.0)
    with pytest.raises(ValueError, match="rtol"):
        steps(oscillator, Y0, 0.0, 1.0, rtol=-1.0)
    with pytest.raises(ValueError, match="at least one number"):
        steps(oscillator, torch.ones(0), 0.0, 1.0)
