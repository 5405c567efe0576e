"""leapfrog and yoshida4: orders, energy, calls, that they are symplectic and undone, gradients in every way, and refusals."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from odenet_cuda import Separable, odeint, odeint_adjoint, solve

D = torch.float64
METHODS = ["leapfrog", "yoshida4"]
ORDER = {"leapfrog": 2, "yoshida4": 4}
FORCES = {"leapfrog": 1, "yoshida4": 3}  # in a step
GRADIENTS = ["direct", "checkpoint", "reversible"]
ROUNDING = 1e-11
Q0 = torch.tensor([[1.0, 0.2], [0.3, -0.4], [0.0, 2.0]], dtype=D)
P0 = torch.tensor([[0.1, 0.0], [-0.5, 0.3], [0.2, 0.1]], dtype=D)
TIMES = torch.tensor([0.0, 0.4, 1.5], dtype=D)


class Force(nn.Module):
    """-sin(q) with a weight, that turns with the time. calls: how often."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.3, 0.7], dtype=D))
        self.calls = 0

    def forward(self, t, q):
        self.calls += 1
        return -torch.sin(q) * self.weight * (1 + 0.3 * torch.sin(2 * t))


def both(force):
    """The same field as one function and in its two parts."""
    return {"one": lambda t, y: (2 * y[1], force(t, y[0])), "parts": Separable(lambda p: 2 * p, force)}


def by_hand(method, force, q, p, nodes):
    """Velocity Verlet as in the textbooks, and Yoshida's three of them."""
    w = 1 / (2 - 2 ** (1 / 3))
    ys = [torch.stack([q, p])]
    for t0, t1 in pairwise(nodes):
        t = t0
        for share in [1.0] if method == "leapfrog" else [w, 1 - 2 * w, w]:
            h = share * (t1 - t0)
            p = p + h / 2 * force(t, q)
            q = q + h * 2 * p
            t = t + h
            p = p + h / 2 * force(t, q)
        ys.append(torch.stack([q, p]))
    return torch.stack(ys)


def loss(q, p):
    return (q * torch.cos(torch.arange(q.numel(), dtype=D).reshape(q.shape))).sum() + (p[-1] ** 2).sum()


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", ["one", "parts"])
@pytest.mark.parametrize("method", METHODS)
def test_values_and_gradients_by_hand(method, name, gradient):
    """Forwards and backwards in time, for the state, the times and what the force depends on."""
    for times in (TIMES, TIMES.flip(0)):
        force, found = Force(), []
        for way in ("solve", "hand"):
            q0, p0, t = (x.clone().requires_grad_() for x in (Q0, P0, times))
            if way == "solve":
                q, p = solve(both(force)[name], (q0, p0), t, method=method, gradient=gradient).ys
            else:
                q, p = by_hand(method, force, q0, p0, t).unbind(1)
            found.append((q, p, *torch.autograd.grad(loss(q, p), (q0, p0, t, force.weight))))
        for x, y in zip(*found, strict=True):
            torch.testing.assert_close(x, y, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("method", METHODS)
def test_order(method):
    force = Force()
    options = {"method": "dopri8", "rtol": 1e-12, "atol": 1e-12}
    exact = solve(both(force)["one"], (Q0, P0), TIMES, **options).ys[0][-1]
    errors = []
    for steps in (20, 40, 80):
        q = solve(both(force)["parts"], (Q0, P0), [0.0, 1.5], method=method, step_size=1.5 / steps).ys[0][-1]
        errors.append(float((q - exact).detach().abs().max()))
    for coarse, fine in pairwise(errors):
        assert 2 ** ORDER[method] * 0.85 < coarse / fine < 2 ** ORDER[method] * 1.25


@pytest.mark.parametrize(("method", "most"), [("leapfrog", 3e-3), ("yoshida4", 1e-5)])
def test_the_energy_of_a_pendulum_is_kept(method, most):
    """Over 1,500 periods: it goes to and fro, and does not drift; rk4 loses more with as many forces."""
    pendulum = Separable(lambda p: p, lambda t, q: -torch.sin(q))
    steps, size = 12000, 0.1
    t = torch.linspace(0.0, steps * size, 121, dtype=D)
    with torch.no_grad():
        q, p = solve(pendulum, (torch.ones(1, dtype=D), torch.zeros(1, dtype=D)), t, method=method, step_size=size).ys
    energy = p**2 / 2 - torch.cos(q)
    error = (energy - energy[0]).abs().reshape(-1)
    assert error.max() < most
    assert error[-40:].max() < 1.5 * error[1:41].max()


@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_symplectic(method):
    """Its Jacobian M fulfils M^T J M = J: the sum of dq dp stays."""

    def step(y):
        q, p = solve(both(Force())["parts"], (y[:2], y[2:]), [0.0, 0.5], method=method).ys
        return torch.cat([q[-1], p[-1]])

    jacobian = torch.autograd.functional.jacobian(step, torch.tensor([0.3, -0.8, 0.5, 0.1], dtype=D))
    j = torch.zeros(4, 4, dtype=D)
    j[:2, 2:], j[2:, :2] = torch.eye(2), -torch.eye(2)
    torch.testing.assert_close(jacobian.T @ j @ jacobian, j, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_calls_the_force_once_for_each_kick(method):
    force = Force()
    solution = solve(both(force)["parts"], (Q0, P0), [0.0, 1.0], method=method, step_size=0.1)
    assert solution.stats.nfe == force.calls == 10 * FORCES[method] + 1
    assert solution.stats.num_accepted == 10
    whole = solve(both(force)["one"], (Q0, P0), [0.0, 1.0], method=method, step_size=0.1)
    assert whole.stats.nfe == 10 * 2 * FORCES[method] + 1  # a velocity is one more
    for x, y in zip(solution.ys, whole.ys, strict=True):
        torch.testing.assert_close(x, y, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("method", METHODS)
def test_back_and_forth(method):
    """A solve backwards ends where the one forwards began."""
    field = both(Force())["parts"]
    there = solve(field, (Q0, P0), [0.0, 2.0], method=method, step_size=0.125)
    back = solve(field, there.y_last, [2.0, 0.0], method=method, step_size=0.125)
    for x, y in zip(back.y_last, (Q0, P0), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-13)


def test_reversible_keeps_no_state_and_tells_how_it_came_back():
    q0 = Q0.clone().requires_grad_()
    options = {"method": "leapfrog", "step_size": 0.01, "gradient": "reversible", "rtol": 0.0, "atol": 1.0}
    solution = solve(both(Force())["parts"], (q0, P0 + 1), [0.0, 2.0], **options)
    node = solution.ys[0].grad_fn
    assert all(entry.k == [] for entry in node.recorder.tape)
    assert all(getattr(entry, "y0", None) is None for entry in node.recorder.tape)
    solution.ys[0][-1].sum().backward()
    assert 0 < solution.stats.adjoint_drift < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_finite_differences(method):
    force = Force()

    def outputs(q, p, t, weight):
        parts = Separable(lambda p, w: 2 * p, lambda t, q, w: -torch.sin(q) * w * torch.cos(t))
        return solve(parts, (q, p), t, args=(weight,), method=method, gradient="reversible").ys

    inputs = [x.detach().clone().requires_grad_() for x in (Q0, P0, TIMES, force.weight)]
    assert torch.autograd.gradcheck(outputs, inputs, atol=1e-7)


def test_outputs_between_nodes_are_nodes():
    t = [0.0, 0.25, 0.3, 1.0]
    solution = solve(both(Force())["one"], (Q0, P0), t, method="leapfrog", step_size=0.1)
    assert solution.stats.num_accepted == 11
    alone = solve(both(Force())["one"], (Q0, P0), [0.0, 0.1, 0.2, 0.25], method="leapfrog")
    torch.testing.assert_close(solution.ys[0][1], alone.ys[0][-1], rtol=ROUNDING, atol=ROUNDING)


def test_front_doors():
    force = Force()
    expected = solve(both(force)["parts"], (Q0, P0), TIMES, method="leapfrog", step_size=0.1).ys
    found = odeint(both(force)["parts"], (Q0, P0), TIMES, method="leapfrog", options={"step_size": 0.1})
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    names = [name for name, _ in both(force)["parts"].named_parameters()]
    assert names == ["force.weight"]


MIXED = {
    "dq": lambda t, y: (y[1] + y[0] ** 2, -y[0]),
    "dp": lambda t, y: (y[1], -y[0] - 0.1 * y[1]),
}


@pytest.mark.parametrize("name", MIXED)
def test_a_field_that_mixes_its_halves_is_refused(name):
    """At zero, where the first derivative of the mixed term is zero too."""
    zero = torch.zeros(2, dtype=D)
    with pytest.raises(ValueError, match=f"func must be separable for method='leapfrog'.*{name} changed"):
        solve(MIXED[name], (zero, zero), [0.0, 1.0], method="leapfrog")


def test_refusals():
    field = both(Force())["parts"]
    for y0, words in (
        (Q0, r"y0 must be a tuple \(q, p\)"),
        ((Q0, P0, P0), "tuple of 3"),
        ((Q0, P0[:2]), "of one shape"),
    ):
        with pytest.raises(ValueError, match=words):
            solve(field, y0, [0.0, 1.0], method="leapfrog")
    y0 = Q0.clone().requires_grad_(), P0
    for options, words in (
        ({"gradient": "quadrature"}, "gradient='quadrature' not served with method='leapfrog'"),
        ({"gradient": "adjoint"}, "use gradient='reversible'"),
        ({"dense": True}, "dense=True not served"),
    ):
        with pytest.raises(NotImplementedError, match=words):
            solve(field, y0, [0.0, 1.0], method="leapfrog", **options)
    with pytest.raises(ValueError, match="needs an adaptive method"):
        solve(field, y0, [0.0, 1.0], method="leapfrog", step_control="per_sample")
    with pytest.raises(ValueError, match="adjoint_options may name nothing"):
        solve(field, y0, [0.0, 1.0], method="leapfrog", gradient="reversible", adjoint_options={"coupling": 0.9})
    with pytest.raises(TypeError, match="force must be callable"):
        Separable(lambda p: p, 1.0)
    with pytest.raises(NotImplementedError, match="'leapfrog' is not served inside"):
        torch.func.jvp(lambda q: solve(field, (q, P0), [0.0, 1.0], method="leapfrog").ys[0], (Q0,), (Q0,))


def test_the_adjoint_by_another_method():
    force = Force()
    y0 = Q0.clone().requires_grad_(), P0
    options = {"method": "leapfrog", "options": {"step_size": 0.02}}
    q, _ = odeint_adjoint(both(force)["parts"], y0, TIMES, adjoint_method="rk4", adjoint_options={"step_size": 0.02}, **options)
    (found,) = torch.autograd.grad(q[-1].sum(), y0[0])
    (expected,) = torch.autograd.grad(odeint(both(force)["parts"], y0, TIMES, **options)[0][-1].sum(), y0[0])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
