"""Integrals over time of functions of the state."""

import math

import pytest
import torch

from odenet_cuda import Event, Jump, compile, solve

D = torch.float64
Y0 = torch.tensor([[1.0, 2.0], [0.5, -1.0], [3.0, 0.2]], dtype=D)
TIGHT = {"rtol": 1e-9, "atol": 1e-11}
GRADIENTS = ("direct", "adjoint", "checkpoint", "quadrature")


def energy(t, y):
    """Of y' = -a y the integral of |y|^2 from 0 to T is |y0|^2 (1 - exp(-2 a T)) / (2 a)."""
    return y.square().sum(-1)


def exact(y0, a, t1):
    return y0.square().sum(-1) * (1 - torch.exp(-2 * a * t1)) / (2 * a)


@pytest.mark.parametrize("t1", [1.5, -0.5])
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "fehlberg2", "rk4"])
@pytest.mark.parametrize("control", ["joint", "per_sample"])
def test_closed_form(control, method, t1):
    if method == "rk4" and control == "per_sample":
        pytest.skip("a grid has no control")
    options = {"step_size": 0.01} if method == "rk4" else TIGHT if method != "fehlberg2" else {"rtol": 1e-6, "atol": 1e-8}
    solution = solve(lambda t, y: -1.3 * y, Y0, [0.0, 0.3 * t1, t1], method=method, step_control=control,
                     integrals=energy, **options)  # fmt: skip
    found = exact(Y0, torch.tensor(1.3, dtype=D), torch.tensor(t1, dtype=D))
    torch.testing.assert_close(solution.integrals, found, rtol=1e-3 if method == "fehlberg2" else 1e-7, atol=0)
    free = solve(lambda t, y: -1.3 * y, Y0, [0.0, 0.3 * t1, t1], method=method, step_control=control, **options)
    torch.testing.assert_close(solution.ys, free.ys, rtol=1e-13, atol=0)  # its error does not count


@pytest.mark.parametrize("control", ["joint", "per_sample"])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_of_a_closed_form(gradient, control):
    """By y0, by what func and by what the integrand depends on, and by the end."""
    grads = []
    for closed in (False, True):
        y0, a = Y0.clone().requires_grad_(), torch.tensor(1.3, dtype=D, requires_grad=True)
        weight, t1 = (torch.tensor(x, dtype=D, requires_grad=True) for x in (0.7, 1.5))
        if closed:
            value = weight * exact(y0, a, t1)
        else:
            value = solve(
                lambda t, y, a=a: -a * y, y0, torch.stack([torch.zeros((), dtype=D), t1]), gradient=gradient,
                step_control=control, integrals=lambda t, y, weight=weight: weight * energy(t, y), **TIGHT,
            ).integrals  # fmt: skip
        (value * torch.tensor([1.0, 2.0, 3.0], dtype=D)).sum().backward()
        grads.append([value.detach(), y0.grad, a.grad, weight.grad, t1.grad])
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
def test_gradcheck(gradient):
    def value(y0, a):
        options = {"method": "bosh3", "first_step": 0.1, "min_step": 0.1, "max_step": 0.1, "gradient": gradient}
        solution = solve(
            lambda t, y: -a * y * t, y0, [0.0, 0.5], integrals=lambda t, y: {"s": y.sin() * t, "a": a * t}, **options
        )
        return solution.integrals["s"], solution.integrals["a"], solution.ys

    inputs = [Y0.clone().requires_grad_(), torch.tensor(0.4, dtype=D, requires_grad=True)]
    assert torch.autograd.gradcheck(value, inputs)
    assert torch.autograd.gradgradcheck(value, inputs)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_shapes_beside_regularizers_and_samples_alone(gradient):
    """The state itself, and a row of several numbers, beside a regularizer; each sample as it is alone."""
    options = {"step_control": "per_sample", "regularizers": ["kinetic"], "gradient": gradient, **TIGHT}
    integrals = lambda t, y: (y, torch.stack([y, t * y], 1))  # noqa: E731
    t = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.5, math.nan], [1.0, 0.0, math.nan]], dtype=D)
    y0 = Y0.clone().requires_grad_()
    solution = solve(lambda t, y: -y, y0, t, integrals=integrals, **options)
    assert solution.integrals[1].shape == (3, 2, 2)
    torch.testing.assert_close(solution.integrals[0], solution.integrals[1][:, 0], rtol=0, atol=0)
    span = torch.tensor([2.0, 0.5, -1.0], dtype=D)[:, None]
    torch.testing.assert_close(solution.integrals[0], Y0 * (1 - torch.exp(-span)), rtol=1e-7, atol=1e-9)
    (grad,) = torch.autograd.grad(solution.integrals[0].sum(), y0, retain_graph=True)
    torch.testing.assert_close(grad, (1 - torch.exp(-span)).expand_as(Y0), rtol=1e-6, atol=1e-8)
    alone = solve(lambda t, y: -y, Y0[1:2], t[1:2, :2], integrals=integrals, **options)
    assert torch.equal(alone.integrals[1][0], solution.integrals[1][1])


def test_in_norm():
    """A wild integrand of a tame state: its error counts when that is asked for."""
    func, wild = lambda t, y: -y, lambda t, y: torch.cos(40 * t) * 40 + 0 * y.sum()
    loose, tight = (
        solve(func, Y0, [0.0, 3.0], integrals=wild, integrals_in_norm=x, rtol=1e-6, atol=1e-8) for x in (False, True)
    )
    error = [abs(float(x.integrals) - math.sin(120.0)) for x in (loose, tight)]
    assert error[1] < 1e-5 < error[0]
    assert tight.stats.num_accepted > 2 * loose.stats.num_accepted


def test_failures_args_and_engines():
    field = compile(lambda t, y, a: -a * y)
    solution = solve(field, Y0, [0.0, 1.0], args=(2.0,), integrals=lambda t, y, a: a * y, **TIGHT)
    assert solution.engine == "stepper" and "integrals" in solution.explanation["compiled"]
    torch.testing.assert_close(solution.integrals, Y0 * (1 - math.exp(-2)), rtol=1e-8, atol=1e-9)
    options = {"step_control": "per_sample", "max_num_steps": 30, "on_failure": "return"}
    kept = solve(lambda t, y: -y * torch.tensor([[0.0], [0.0], [5000.0]], dtype=D), Y0, [0.0, 1.0], integrals=energy, **options)
    assert kept.integrals.isnan().tolist() == [False, False, True]
    assert solve(lambda t, y: -y, Y0, [0.0, 1.0]).integrals is None


def test_refusals():
    refused = [
        (TypeError, "integrals must be callable", {"integrals": 3}),
        (TypeError, "must return a tensor or a nest", {"integrals": lambda t, y: 1.0}),
        (TypeError, "floating or complex", {"integrals": lambda t, y: torch.ones(2, dtype=torch.long)}),
        (ValueError, "a row for each sample", {"integrals": lambda t, y: y.sum(), "step_control": "per_sample"}),
        (ValueError, "one shape", {"integrals": lambda t, y: y if t == 0 else y[0]}),
        (ValueError, "does not go with regularizers", {"integrals_in_norm": True, "regularizers": ["kinetic"]}),
        (ValueError, "rtol and atol that are numbers", {"integrals_in_norm": True, "norm": lambda e: e.abs().max()}),
        (NotImplementedError, "explicit method", {"method": "rosenbrock23"}),
        (NotImplementedError, "integrals are not served with events", {"events": Event(lambda t, y: y[0, 0] - 0.5)}),
        (NotImplementedError, "integrals is not served where", {"jumps": Jump([0.5], lambda t, y, i: y)}),
    ]
    for error, words, options in refused:
        with pytest.raises(error, match=words):
            solve(lambda t, y: -y, Y0, [0.0, 1.0], **{"integrals": energy, **options})
    with pytest.raises(NotImplementedError, match="integrals is not served inside"):
        torch.func.vmap(lambda y: solve(lambda t, y: -y, y, [0.0, 1.0], integrals=energy).ys)(Y0)
