"""Where systems come to rest, and gradients by the implicit function theorem."""

import math

import pytest
import torch
from torch import nn

from odenet_cuda import SolverError, steady_state
from odenet_cuda.gradients.gmres import gmres

D = torch.float64
TIGHT = {"rtol": 1e-8, "atol": 1e-10}


def gene(t, y, production, decay):
    """A gene that represses itself, and its protein."""
    m, p = y.unbind(-1)
    return torch.stack([production / (1 + p**2) - decay * m, m - p], -1)


@pytest.mark.parametrize("control", ["joint", "per_sample"])
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3", "rosenbrock23"])
def test_a_root_in_closed_form(method, control):
    """p (1 + p^2) = production / decay, here 10: p = 2; func is there within its tolerance."""
    y0 = torch.tensor([[0.0, 0.0], [5.0, 1.0], [1.0, 9.0]], dtype=D)
    low = method in ("bosh3", "rosenbrock23")
    tolerances = {"rtol": 1e-4, "atol": 1e-6} if low else TIGHT
    found = steady_state(gene, y0, (torch.tensor(10.0, dtype=D), torch.tensor(1.0, dtype=D)), method=method,
                         step_control=control, **tolerances)  # fmt: skip
    torch.testing.assert_close(found.y, torch.full_like(y0, 2.0), rtol=1e-3 if low else 1e-7, atol=0)
    assert (found.residual <= 1).all() and found.t.shape == (() if control == "joint" else (3,)) and (found.t > 0).all()
    assert found.stats.nfe > 0 and not found.y.requires_grad


@pytest.mark.parametrize("control", ["joint", "per_sample"])
def test_gradient_in_closed_form(control):
    """dp/dc = 1 / (1 + 3 p^2) for c = production / decay; samples with parameters of their own."""
    c = torch.tensor([2.0, 10.0, 30.0], dtype=D, requires_grad=True)
    decay = torch.tensor(1.0, dtype=D, requires_grad=True)
    y0 = torch.zeros(3, 2, dtype=D, requires_grad=True)
    found = steady_state(gene, y0, (c, decay), step_control=control, **TIGHT)
    weight = torch.tensor([1.0, 2.0, -1.0], dtype=D)
    (found.y[:, 1] * weight).sum().backward()
    p = found.y[:, 1].detach()
    expected = weight / (1 + 3 * p**2)
    torch.testing.assert_close(c.grad, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(decay.grad, -(expected * c.detach()).sum(), rtol=1e-6, atol=0)
    assert y0.grad is None


def test_gradcheck_of_a_structure_and_a_module():
    """Against finite differences, by parameters of a module and by args, of a state of two parts."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.linspace(-0.4, 0.5, 9, dtype=D).reshape(3, 3))

        def forward(self, t, y, b):
            return {"a": torch.tanh(y["a"] @ self.w) + b - y["a"], "b": y["a"].sum(1) - 2 * y["b"]}

    net, b = Net(), torch.linspace(-1, 1, 6, dtype=D).reshape(2, 3).requires_grad_()
    y0 = {"a": torch.zeros(2, 3, dtype=D), "b": torch.zeros(2, dtype=D)}

    def value(w, b):
        y = steady_state(lambda t, y, b: torch.func.functional_call(net, {"w": w}, (t, y, b)), y0, (b,), **TIGHT).y
        return y["a"], y["b"]

    assert torch.autograd.gradcheck(value, (net.w, b), eps=1e-5, atol=1e-5)


def test_samples_are_alone():
    c, y0 = torch.tensor([2.0, 10.0, 30.0], dtype=D), torch.zeros(3, 2, dtype=D)
    together = steady_state(gene, y0, (c, torch.tensor(1.0)), **TIGHT)
    alone = steady_state(gene, y0[1:2], (c[1:2], torch.tensor(1.0)), **TIGHT)
    assert torch.equal(alone.y[0], together.y[1]) and torch.equal(alone.t[0], together.t[1])


def test_float32():
    c = torch.tensor(10.0, requires_grad=True)
    found = steady_state(gene, torch.zeros(1, 2), (c, torch.tensor(1.0)), rtol=1e-5, atol=1e-6)
    found.y[0, 1].backward()
    torch.testing.assert_close(found.y, torch.full((1, 2), 2.0), rtol=1e-4, atol=0)
    torch.testing.assert_close(c.grad, torch.tensor(1 / 13), rtol=1e-3, atol=0)


def test_gmres():
    """Rows of other sizes and spectra at once, one of them zero; a singular one says how far it is."""
    torch.manual_seed(0)
    a = torch.randn(4, 30, 30, dtype=D) + 8 * torch.eye(30, dtype=D)
    b = torch.randn(4, 30, dtype=D) * torch.tensor([1e-6, 1.0, 1e6, 0.0], dtype=D)[:, None]
    x, left = gmres(lambda v: torch.einsum("rij,rj->ri", a, v), b, 1e-12, basis=12)
    torch.testing.assert_close(x, torch.linalg.solve(a, b), rtol=1e-9, atol=1e-12)
    assert (left <= 1e-12).all()
    a[1, 0] = 0
    x, left = gmres(lambda v: torch.einsum("rij,rj->ri", a, v), b, 1e-12)
    assert left[1] > 1e-2 and (left[[0, 2, 3]] <= 1e-12).all()


def test_what_does_not_settle():
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=D)
    rates = torch.tensor([[0.0], [1.0]], dtype=D)
    func = lambda t, y: rates * (y @ turn) - (1 - rates) * y  # noqa: E731
    y0 = torch.ones(2, 2, dtype=D)
    with pytest.raises(SolverError, match=r"not settle in sample 1 of 2 \(1 do not\).*Remedy: a larger max_time") as caught:
        steady_state(func, y0, max_time=40.0)
    assert caught.value.status == "not settled" and caught.value.sample == 1 and caught.value.t == 40.0
    assert caught.value.y.shape == (2, 2)
    with pytest.raises(SolverError, match="max_num_steps"):
        steady_state(func, y0, max_num_steps=50)
    with pytest.raises(SolverError, match="non-finite"):
        steady_state(lambda t, y: y * math.nan, y0)


def test_a_conserved_quantity_has_no_gradient():
    """x + y is conserved, and where it ends depends on where it began."""
    k = torch.tensor(2.0, dtype=D, requires_grad=True)
    func = lambda t, y: torch.stack([y[:, 1] - k * y[:, 0], k * y[:, 0] - y[:, 1]], 1)  # noqa: E731
    found = steady_state(func, torch.ones(1, 2, dtype=D))
    torch.testing.assert_close(found.y, torch.tensor([[2 / 3, 4 / 3]], dtype=D), rtol=1e-5, atol=0)
    with pytest.raises(RuntimeError, match="df/dy is singular"):
        found.y[0, 0].backward()


def test_refusals():
    y0 = torch.ones(2, 2, dtype=D)
    decay = lambda t, y: -y  # noqa: E731
    for options, words in (
        ({"rtol": -1.0}, "rtol must be"),
        ({"max_time": 0.0}, "max_time must be"),
        ({"method": "rk4"}, "method must be adaptive and end"),
        ({"method": "fehlberg2"}, "method must be adaptive and end"),
        ({"valid": lambda y: (y > 2).all(1)}, "domain of valid"),
    ):
        with pytest.raises(ValueError, match=words):
            steady_state(decay, y0, **options)
    with pytest.raises(NotImplementedError, match="transforms"):
        torch.func.vmap(lambda y: steady_state(decay, y).y)(y0)
    w = torch.tensor(1.0, dtype=D, requires_grad=True)
    with pytest.raises(NotImplementedError, match="complex"):
        steady_state(lambda t, y: w - y, torch.ones(1, 1, dtype=torch.complex128))


def test_a_state_of_one_axis_is_one_system():
    """Three numbers that exchange and keep their sum: taken for samples, each would come to rest somewhere else."""

    def exchange(t, y):
        return torch.stack([y[1] - y[0], y[0] - 2 * y[1] + y[2], y[1] - y[2]])

    found = steady_state(exchange, torch.tensor([5.0, 1.0, 0.0], dtype=D), **TIGHT)
    torch.testing.assert_close(found.y, torch.full((3,), 2.0, dtype=D), rtol=1e-7, atol=0)
    assert found.t.shape == () and steady_state(lambda t, y: 1 - y, torch.zeros(2, 1), rtol=1e-4).t.shape == (2,)
    assert steady_state(lambda t, y: 1 - y, torch.zeros((), dtype=D)).y.item() == pytest.approx(1, abs=1e-5)
