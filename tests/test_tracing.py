"""Solves that a tracer writes down, or that are made on fake tensors: as they are, or refused, never something else."""

import pytest
import torch
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_function
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

import odenet_cuda
from odenet_cuda import ODEBlock, odeint, odeint_adjoint, solve

# What the tracer of torch.jit says of numbers that are constants.
pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
X, OTHER = torch.linspace(-1, 1, 12).view(4, 3), torch.linspace(2, -1, 12).view(4, 3)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 3)

    def forward(self, t, y):
        return torch.tanh(self.layer(y)) * torch.cos(t)


pytestmark = pytest.mark.usefixtures("compiled_quickly")  # it is not the machine code that is tried here

FUNC = Network().requires_grad_(False)  # torch.jit.trace keeps no weights of a function that require a gradient
GRID = {"method": "rk4", "step_size": 0.25}
CALLS = {
    "block": lambda method: ODEBlock(Network(), **method),
    "block, direct": lambda method: ODEBlock(Network(), gradient="direct", **method),
    "block, compiled": lambda method: ODEBlock(Network(), compile="auto", **method),
    "solve": lambda method: lambda y: solve(FUNC, y, [0.0, 1.0], **method).ys[-1],
    "compiled": lambda method: lambda y: solve(odenet_cuda.compile(FUNC), y, [0.0, 1.0], **method).ys[-1],
    "odeint": lambda method: lambda y: odeint(FUNC, y, torch.tensor([0.0, 1.0]), method=method["method"])[-1],
    "odeint_adjoint": lambda method: lambda y: odeint_adjoint(FUNC, y, torch.linspace(0, 1, 4), method=method["method"])[-1],
}
TRACERS = {
    "jit": lambda function: torch.jit.trace(function, X, check_trace=False),
    "make_fx": lambda function: make_fx(function)(X),
    "export": lambda function: torch.export.export(function, (X,), strict=False).module(),
    "aot_function": lambda function: aot_function(function, lambda module, _: module),
    "make_fx, fake": lambda function: make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(X),
}


def call(name: str, method: dict, tracer: str):
    function = CALLS[name](method)
    if tracer == "export" and not isinstance(function, nn.Module):
        pytest.skip("torch.export takes modules")
    return function


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("tracer", ["jit", "make_fx", "export"])
@pytest.mark.parametrize("name", CALLS)
def test_grids_are_traced(name, tracer, grad):
    """What was traced gives for other inputs what the solve gives."""
    function = call(name, GRID, tracer)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(TRACERS[tracer](function)(OTHER), function(OTHER))


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("name", CALLS)
def test_adaptive_methods_are_refused(name, tracer):
    """In words: their steps follow from numbers, or there are none for the times."""
    function = call(name, {"method": "dopri5"}, tracer)
    with pytest.raises((NotImplementedError, ValueError), match=r"an adaptive solve chooses its steps|t must hold numbers"):
        TRACERS[tracer](function)(OTHER)


def test_a_traced_block_learns():
    """Its gradients are the block's, and it sees later weights."""
    block = ODEBlock(Network(), **GRID)
    traced = torch.jit.trace(block, X)
    with torch.no_grad():
        block.func.layer.weight.mul_(2)
    torch.testing.assert_close(traced(OTHER), block(OTHER))
    expected = torch.autograd.grad(ODEBlock(block.func, gradient="direct", **GRID)(OTHER).sum(), list(block.parameters()))
    torch.testing.assert_close(torch.autograd.grad(traced(OTHER).sum(), list(traced.parameters())), expected)


class Times(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.func, self.kind = Network(), kind
        if kind == "parameter":
            self.t = nn.Parameter(torch.tensor([0.0, 1.0]))
        else:
            self.register_buffer("t", torch.tensor([0.0, 1.0]))

    def forward(self, y, t):
        t = {"input": t, "result of an input": t * 2, "parameter": self.t, "buffer": self.t}[self.kind]
        return odeint(self.func, y, t, method="rk4")[-1]


@pytest.mark.parametrize("tracer", ["jit", "make_fx"])
@pytest.mark.parametrize("kind", ["input", "result of an input", "parameter", "buffer"])
def test_times_that_would_be_frozen(kind, tracer):
    """Times become constants of what is traced, so they may not depend on what can change."""
    module, t = Times(kind), torch.tensor([0.0, 1.0])
    if (tracer, kind) == ("make_fx", "buffer"):
        pytest.skip("make_fx makes constants of all buffers itself")
    with pytest.raises(NotImplementedError, match="t must be numbers where a solve is written down"):
        torch.jit.trace(module, (X, t)) if tracer == "jit" else make_fx(module)(X, t)


def test_fake_tensors():
    """The shapes of a solve on a grid are known without its numbers."""
    block = ODEBlock(Network(), return_all=True, **GRID)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert block(mode.from_tensor(X)).shape == (2, 4, 3)


@pytest.mark.parametrize("method", [GRID, {"method": "dopri5"}])
def test_flops_are_counted(method):
    """A mode that counts sees every call of func, and those of the backward pass."""
    y0 = X.clone().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        solution = solve(Network(), y0, [0.0, 1.0], **method)
    assert counter.get_total_flops() == solution.stats.nfe * 2 * 4 * 3 * 3
    with FlopCounterMode(display=False) as counter:
        solution.ys[-1].sum().backward()
    assert counter.get_total_flops() > 0


class Wrapped(Tensor):
    """A tensor that has another and no memory of its own."""

    @staticmethod
    def __new__(cls, inner):
        outer = Tensor._make_wrapper_subclass(cls, inner.size(), dtype=inner.dtype, device=inner.device)
        outer.inner = inner
        return outer

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return wrapped(func, args, kwargs)


def wrapped(func, args, kwargs):
    args, kwargs = tree_map(lambda x: x.inner if isinstance(x, Wrapped) else x, (args, kwargs or {}))
    return tree_map(lambda x: Wrapped(x) if isinstance(x, Tensor) else x, func(*args, **kwargs))


class Wrapping(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return wrapped(func, args, kwargs)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_tensors_without_memory(method):
    """Their address, which is 0, is not read."""
    with pytest.raises(TypeError, match="y0 must be a plain tensor, got Wrapped"):
        solve(lambda t, y: -y, Wrapped(X), [0.0, 1.0], method=method)
    with pytest.raises(TypeError, match="func must return plain tensors for y0, got Wrapped"):
        solve(lambda t, y: Wrapped(-y), X, [0.0, 1.0], method=method)
    with pytest.raises(TypeError, match="plain"), Wrapping():
        solve(lambda t, y: -y, X, [0.0, 1.0], method=method)
