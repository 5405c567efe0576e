"""Steps that end outside of a domain are rejected and halved."""

import pytest
import torch

from odenet_cuda import SolverError, compile, solve, steps

D = torch.float64
LOOSE = {"rtol": 1e-1, "atol": 1.0, "first_step": 8.0}  # at which a step overshoots


def decay(t, y):
    return -y


def positive(y):
    return (y > 0).all()


def all_positive(y):
    return (y > 0).all(1)


VALID = {"joint": positive, "per_sample": all_positive}
Y0 = torch.tensor([[1.0, 2.0], [0.3, 5.0], [4.0, 0.1]], dtype=D)


@pytest.mark.parametrize("t1", [20.0, -20.0])
@pytest.mark.parametrize("method", ["bosh3", "dopri5", "rosenbrock23"])
@pytest.mark.parametrize("control", ["joint", "per_sample"])
def test_no_accepted_step_ends_outside(control, method, t1):
    func = decay if t1 > 0 else lambda t, y: y
    options = {"method": method, "step_control": control, **LOOSE}
    # a domain whose edge the loose steps cross: around the exact solution
    inside = lambda y: ((y > 0) & (y < 6)).all(1) if control == "per_sample" else ((y > 0) & (y < 6)).all()  # noqa: E731
    found = list(steps(func, Y0, 0.0, t1, valid=inside, **options))
    assert all(bool(inside(step.y1).all()) for step in found)
    solution = solve(func, Y0, [0.0, t1], valid=inside, **options)
    assert torch.equal(solution.ys[-1], found[-1].y1)
    free = solve(func, Y0, [0.0, t1], **options)
    if method == "bosh3":
        assert torch.as_tensor(solution.stats.num_rejected > free.stats.num_rejected).any()


def test_halved_and_counted():
    """At which sizes steps are tried: 8, 4, 2, 1 until the end of one is positive."""
    tried = []

    class Func(torch.nn.Module):
        def forward(self, t, y):
            return -y

        def callback_step(self, t, y, dt):
            tried.append(float(dt))

    y0 = torch.ones(1, dtype=D)
    solution = solve(Func(), y0, [0.0, 10.0], method="bosh3", rtol=0.0, atol=1e9, first_step=8.0, max_step=8.0, valid=positive)
    assert tried[:3] == pytest.approx([8.0, 4.0, 2.0], rel=1e-12)
    assert solution.stats.num_rejected >= 2 and solution.stats.num_accepted + solution.stats.num_rejected == len(tried)


def test_where_nothing_is_rejected_nothing_changes():
    for control in VALID:
        options = {"step_control": control, "rtol": 1e-8, "atol": 1e-10}
        guarded, free = (solve(decay, Y0, [0.0, 1.0, 2.0], valid=valid, **options) for valid in (VALID[control], None))
        assert torch.equal(guarded.ys, free.ys)


@pytest.mark.parametrize("control", ["joint", "per_sample"])
@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "adjoint", "quadrature"])
def test_gradients(gradient, control):
    """Of the steps that were accepted: direct and checkpoint by finite differences, others near the closed form."""
    rate = torch.tensor(1.0, dtype=D, requires_grad=True)
    y0 = Y0.clone().requires_grad_()
    options = {"gradient": gradient, "step_control": control, "valid": VALID[control]}
    tight = {"rtol": 1e-9, "atol": 1e-10, "first_step": 10.0}
    ys = solve(lambda t, y: -rate * y, y0, [0.0, 12.0], **options, **tight).ys
    ys[-1].sum().backward()
    exact = torch.exp(torch.tensor(-12.0, dtype=D))
    torch.testing.assert_close(y0.grad, exact.expand_as(Y0), rtol=1e-3, atol=1e-8)
    torch.testing.assert_close(rate.grad, -12 * exact * Y0.sum(), rtol=1e-3, atol=1e-6)


def test_samples_are_alone():
    options = {"step_control": "per_sample", "valid": all_positive, "method": "bosh3", **LOOSE}
    ys = solve(decay, Y0, [0.0, 20.0], **options).ys[-1]
    for i in range(3):
        assert torch.equal(solve(decay, Y0[i : i + 1], [0.0, 20.0], **options).ys[-1], ys[i : i + 1])


@pytest.mark.parametrize("limits", [{}, {"min_step": 1e-3}], ids=["", "min_step"])
@pytest.mark.parametrize("control", ["joint", "per_sample"])
def test_a_solution_that_leaves(control, limits):
    """y = y0 - t leaves the domain at t = 0.1, in sample 2 alone; the others go on."""
    func = lambda t, y: -torch.ones_like(y) * (y < 1)  # noqa: E731
    y0 = torch.tensor([[2.0], [3.0], [0.1]], dtype=D)
    options = {"step_control": control, "valid": VALID[control], "rtol": 1e-6, "atol": 1e-6, **limits}
    with pytest.raises(SolverError, match=r"outside the domain of valid.*Remedy: the solution itself leaves") as caught:
        solve(func, y0, [0.0, 1.0], **options)
    assert caught.value.status == "outside the domain of valid"
    assert caught.value.sample == (2 if control == "per_sample" else None)
    assert caught.value.t == pytest.approx(0.1, abs=2e-3 if limits else 1e-9) and bool((caught.value.y > 0).all())
    kept = solve(func, y0, [0.0, 1.0], on_failure="return", **options)
    if control == "per_sample":
        assert kept.status == ["success", "success", "outside the domain of valid"]
        assert kept.ys[-1, :2].eq(y0[:2]).all() and kept.ys[-1, 2].isnan().all()


def test_structures_and_engines():
    field = compile(decay)
    solution = solve(field, Y0, [0.0, 1.0], valid=positive)
    assert solution.engine == "stepper" and "valid" in solution.explanation["compiled"]
    y0 = {"a": Y0, "b": Y0 + 1}
    solution = solve(lambda t, y: {"a": -y["a"], "b": y["a"]}, y0, [0.0, 1.0], valid=lambda y: bool((y["a"] > 0).all()))
    torch.testing.assert_close(solution.ys["b"][-1], Y0 * (1 - torch.exp(-torch.ones((), dtype=D))) + Y0 + 1)


def test_refusals():
    refused = [
        (ValueError, "y0 must lie in the domain of valid", {"valid": lambda y: False}),
        (TypeError, "valid must be callable", {"valid": 3}),
        (TypeError, "valid must return bool", {"valid": lambda y: y.sum()}),
        (ValueError, "one truth value for the whole state", {"valid": lambda y: y > 0}),
        (ValueError, "for each sample, \\[3\\]", {"valid": positive, "step_control": "per_sample"}),
        (ValueError, "sample 1 does not", {"valid": lambda y: y[:, 1] < 4, "step_control": "per_sample"}),
        (ValueError, "adaptive method", {"valid": positive, "method": "rk4"}),
    ]
    for error, words, options in refused:
        with pytest.raises(error, match=words):
            solve(decay, Y0, [0.0, 1.0], **options)
    with pytest.raises(NotImplementedError, match="valid is not served inside"):
        torch.func.vmap(lambda y: solve(decay, y, [0.0, 1.0], valid=positive).ys)(Y0)
