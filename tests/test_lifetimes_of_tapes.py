"""What a solve keeps for its gradient lives as long as autograd's own saved tensors, and no longer."""

import gc
import weakref

import pytest
import torch
from compile_native import require_compiler
from torch import nn

import odenet_cuda
from odenet_cuda import solve

GRADIENTS = ["direct", "checkpoint", "quadrature", "adjoint", "compiled direct", "compiled adjoint"]
STEPS = 20
SPARE = 3  # states that a node may still hold: the outputs and copies of y0


@pytest.fixture(params=GRADIENTS)
def problem(request):
    """(solve it, the tensors it depends on)"""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    y0 = torch.randn(500, 4, requires_grad=True)
    kind = request.param.split()
    func = lambda t, y: net(y)  # noqa: E731
    if kind[0] == "compiled":
        func = odenet_cuda.compile(Net(net))
    options = {"rtol": 1e30, "atol": 1e30, "first_step": 1 / STEPS, "max_step": 1 / STEPS, "gradient": kind[-1]}
    return lambda: solve(func, y0, [0.0, 1.0], **options).ys[-1].square().sum(), [y0, *net.parameters()]


class Net(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, t, y):
        return self.net(y)


def live_bytes():
    """Of all tensors that Python knows, and of what autograd's own nodes save for them.

    Without the tensors that have no memory: those of torch.compile, which its caches hold on to.
    """
    gc.collect()
    tensors = {id(x): x for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter)}
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors.values()}
    return sum(storages.values())


def test_second_backward_is_refused_as_torch_does(problem):
    run, inputs = problem
    loss = run()
    torch.autograd.grad(loss, inputs)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, inputs)


def test_retain_graph_gives_the_same_as_often_as_asked(problem):
    run, inputs = problem
    loss = run()
    passes = [torch.autograd.grad(loss, inputs, retain_graph=keep) for keep in (True, True, False)]
    for other in passes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(passes[0], other, strict=True))


def test_a_loss_that_is_kept_keeps_no_tape(problem):
    run, inputs = problem
    torch.autograd.grad(run(), inputs)  # what is made once
    before = live_bytes()
    losses = []
    for _ in range(3):
        losses.append(run())
        torch.autograd.grad(losses[-1], inputs)
    assert live_bytes() - before <= len(losses) * SPARE * inputs[0].nbytes


def test_the_graphs_of_func_go_with_the_tape():
    """Each evaluation's graph dies in the backward pass, though the loss lives on."""
    seen = []

    def func(t, y):
        k = -(y * weight)
        if k.requires_grad:
            seen.append(weakref.ref(k))
        return k

    weight = torch.ones(3, requires_grad=True)
    loss = solve(func, torch.ones(2, 3), [0.0, 1.0], gradient="direct").ys[-1].sum()
    alive = lambda: sum(ref() is not None for ref in seen)  # noqa: E731
    assert alive() > 6
    loss.backward(retain_graph=True)
    assert alive() > 6
    loss.backward()
    gc.collect()
    assert alive() == 0


def test_after_an_exception_there_is_no_half_of_a_tape():
    """A backward pass that a hook broke off is not taken up in the middle."""
    weight = torch.ones(3, requires_grad=True)
    broken = [True]

    def func(t, y):
        k = -(y * weight)
        if k.requires_grad and float(t) < 0.5:
            k.register_hook(breaks)
        return k

    def breaks(grad):
        if broken[0]:
            raise ValueError("broken off")

    loss = solve(func, torch.ones(2, 3), [0.0, 1.0], gradient="direct").ys[-1].sum()
    with pytest.raises(ValueError, match="broken off"):
        loss.backward()
    broken[0] = False
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
def test_create_graph_keeps_it(gradient):
    weight = torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True)
    y0 = torch.ones(2, dtype=torch.float64)
    y1 = solve(lambda t, y: -weight * y, y0, [0.0, 1.0], gradient=gradient).ys[-1].sum()
    (first,) = torch.autograd.grad(y1, weight, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), weight, retain_graph=True)
    (again,) = torch.autograd.grad(y1, weight)
    torch.testing.assert_close(second, torch.exp(-weight).detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(again, first.detach(), rtol=1e-12, atol=0)


def test_the_memory_of_a_compiled_tape_serves_the_next():
    """Once nobody can go back along it: not while a graph is retained."""
    from odenet_cuda.compiled.tape import Tape

    device = torch.device("cpu")
    first = Tape(100_000, device)
    second, address = Tape(100_000, device), first.address
    assert second.address != address
    del first
    assert Tape(500_000, device).address != address  # too small for this one
    third = Tape(90_000, device)
    assert third.address == address and Tape(90_000, device).address not in (address, second.address)

    require_compiler()
    func = odenet_cuda.compile(lambda t, y: -y * y)
    y0 = torch.rand(40, 2, dtype=torch.float64).requires_grad_()

    def ends(start):
        return odenet_cuda.solve(func, start, [0.0, 1.0], step_control="per_sample", rtol=1e-6, atol=1e-8).ys[-1].sum()

    loss = ends(y0)
    (once,) = torch.autograd.grad(loss, y0, retain_graph=True)
    for _ in range(3):
        torch.autograd.grad(ends(y0 + 1), y0)
    (again,) = torch.autograd.grad(loss, y0)
    assert torch.equal(once, again)
