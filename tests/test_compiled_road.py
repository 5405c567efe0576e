"""The road that most people come by: `odeint_adjoint` of a compiled field, its default parameters and chosen ones."""

import pytest
import torch
from compile_native import require_compiler
from compiled_fields import rows
from torch import nn

import odenet_cuda
from odenet_cuda import odeint_adjoint, solve

D = torch.float64
T = torch.tensor([0.0, 0.3, 1.0], dtype=D)
SOLVED = {"rtol": 1e-9, "atol": 1e-9}
AGREE = {"rtol": 1e-6, "atol": 1e-6}  # the steps of the way back differ: here the parameters are not in its error norm


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 4, dtype=D), nn.Linear(4, 2, dtype=D)
        self.unused = nn.Parameter(torch.ones(3, dtype=D))
        for i, p in enumerate(self.parameters()):
            p.data = rows(*p.shape, seed=i)
        self.second.bias.requires_grad_(False)

    def forward(self, t, y):
        return torch.sin(t) * self.second(torch.tanh(self.first(y)))


@pytest.fixture(autouse=True)
def quickly_compiled(monkeypatch):
    require_compiler()
    monkeypatch.setenv("ODENET_CXXFLAGS", "-O0")


def gradients(func, sources, solver=odeint_adjoint, **options):
    y0 = rows(5, 2).requires_grad_()
    ys = solver(func, y0, T, **{**SOLVED, **options})
    ys = ys if isinstance(ys, torch.Tensor) else ys.ys
    return torch.autograd.grad(ys.square().sum(), [y0, *sources], allow_unused=True)


def assert_agree(found, expected):
    """The steps of a tape give nothing for what is chosen and not used, all else zeros."""
    for x, y in zip(found, expected, strict=True):
        assert x is not None or y is None
        if x is not None:
            torch.testing.assert_close(x, torch.zeros_like(x) if y is None else y, **AGREE)


OPTIONS = {"all": {}, "seminorm": {"adjoint_options": {"norm": "seminorm"}}, "grid": {"method": "rk4"}}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_odeint_adjoint_is_compiled(options):
    """As by the stepper; an unused parameter has zeros, a frozen one nothing. Three times: the last finds what is kept."""
    net = Net()
    field = odenet_cuda.compile(net)
    trained = [p for p in net.parameters() if p.requires_grad]
    expected = gradients(net, trained, **options)
    for _ in range(3):
        found = gradients(field, trained, **options)
        assert field.explain() == "compiled"
        assert_agree(found, expected)
        assert any(x is not None and x.shape == (3,) and not x.any() for x in found)


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
def test_chosen_parameters_alone_get_gradients(gradient):
    """Others get none, whatever was chosen before; a tensor that func is not made of gets zeros."""
    net, other = Net(), torch.ones(2, dtype=D, requires_grad=True)
    field = odenet_cuda.compile(net)
    sources = [*(p for p in net.parameters() if p.requires_grad), other]
    for chosen in ([net.first.weight], [other, net.second.weight, net.second.bias], [], [net.first.weight]):
        options = {"gradient": gradient, "adjoint_params": chosen, "solver": solve}
        found, expected = (gradients(func, sources, **options) for func in (field, net))
        assert field.explain() == "compiled"
        assert_agree(found, expected)


def test_chosen_arguments():
    """An argument with one entry a sample, and one for all, are parameters if they are chosen."""
    a, k = rows(5, 2, seed=1).requires_grad_(), torch.tensor(0.5, dtype=D, requires_grad=True)
    func = lambda t, y, a, k: torch.tanh(a * y) - k * y  # noqa: E731
    field = odenet_cuda.compile(func)
    for chosen in ([a], [k], [a, k], []):
        options = {"gradient": "adjoint", "args": (a, k), "adjoint_params": chosen, "solver": solve}
        found, expected = (gradients(f, [a, k], **options) for f in (field, func))
        assert field.explain() == "compiled"
        assert_agree(found, expected)


def test_a_parameter_that_is_not_chosen_may_not_change_before_the_way_back():
    """The backward solve reads it too."""
    net = Net()
    field = odenet_cuda.compile(net)
    y0 = rows(5, 2).requires_grad_()
    ys = odeint_adjoint(field, y0, T, adjoint_params=(net.first.weight,), **SOLVED)
    with torch.no_grad():
        net.second.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ys.sum().backward()


@pytest.mark.parametrize("options", [*OPTIONS.values(), {"step_control": "per_sample"}, {"jump_t": [0.3]}], ids=str)
def test_gradients_for_the_times(options):
    """And for all else beside them; func is called for them, and counts."""
    net = Net()
    field = odenet_cuda.compile(net)
    trained = [p for p in net.parameters() if p.requires_grad]
    found = []
    for func in (field, field, net):
        t, y0 = T.clone().requires_grad_(), rows(5, 2).requires_grad_()
        adjoint = {"gradient": "adjoint", "adjoint_params": trained}
        ys = solve(func, y0, t, **{**SOLVED, **adjoint, **options}).ys
        found.append(torch.autograd.grad(ys.square().sum(), [t, y0, *trained]))
        assert func is net or field.explain() == "compiled"
    assert_agree(found[0], found[2])
    assert_agree(found[1], found[2])


def test_gradients_for_the_times_of_rows_that_failed():
    """An output that was not reached has no part in them."""
    field = odenet_cuda.compile(lambda t, y: y * y)
    options = {"step_control": "per_sample", "on_failure": "return", "max_num_steps": 60, "gradient": "adjoint", "rtol": 1e-6}
    found = []
    for func in (field, field.func):
        t = torch.tensor([0.0, 0.1, 1.0], dtype=D, requires_grad=True)
        ys = solve(func, torch.tensor([[0.1], [5.0], [0.2]], dtype=D), t, **options, atol=1e-6).ys
        found.append(torch.autograd.grad(ys.nan_to_num().sum(), t)[0])
    assert field.explain() == "compiled" and found[0].isfinite().all()
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
