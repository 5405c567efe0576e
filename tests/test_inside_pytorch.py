"""A block among the rest of PyTorch: mixed precision, hooks, repeated calls, threads, fork, buffers and shared parameters."""

import copy
import multiprocessing
import threading

import pytest
import torch
from torch import nn

from odenet_cuda import ODEBlock, solve

GRADIENTS = ["direct", "adjoint", "checkpoint", "quadrature"]
METHODS = {"dopri5": {"rtol": 1e-6, "atol": 1e-6}, "rk4": {"method": "rk4", "step_size": 0.25}}
LOW = {torch.float16: 2e-2, torch.bfloat16: 6e-2}  # what a gradient of a small network in this type errs by
X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


class Field(nn.Module):
    """Two layers and a buffer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.inner, self.outer = nn.Linear(3, 16), nn.Linear(16, 3)
        self.register_buffer("scale", torch.full((3,), 0.5))

    def forward(self, t, y):
        return self.scale * self.outer(torch.tanh(self.inner(y))) * torch.cos(t)


def gradients(block, x=X):
    return torch.autograd.grad(block(x).square().sum(), list(block.parameters()))


def assert_near(found, expected, share):
    """Within a share of the largest element."""
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=share * float(y.abs().max()))


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("low", LOW, ids=["float16", "bfloat16"])
def test_autocast(low, method, gradient):
    """Layers in 16 bits, the state in float32, gradients in the parameters' type."""
    options = {"rtol": 1e-2, "atol": 1e-2} if method == "dopri5" else METHODS[method]
    block = ODEBlock(Field(), gradient=gradient, **options)
    expected = gradients(block)
    with torch.autocast("cpu", dtype=low):
        out = block(X)
    assert out.dtype == torch.float32
    found = torch.autograd.grad(out.square().sum(), list(block.parameters()))
    assert all(x.dtype == torch.float32 for x in found)
    assert_near(found, expected, LOW[low])


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_grad_scaler(gradient):
    """Scaled losses give scaled gradients, a step is taken, and one that overflows is skipped."""
    block = ODEBlock(Field(), gradient=gradient, method="rk4", step_size=0.25)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    expected = [p - 0.1 * g for p, g in zip(block.parameters(), gradients(block), strict=True)]
    with torch.autocast("cpu", dtype=torch.float16):
        loss = block(X).square().sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_near(list(block.parameters()), expected, 1e-2)
    before = [p.detach().clone() for p in block.parameters()]
    optimizer.zero_grad()
    scaler.scale(block(X).square().sum() * torch.tensor(float("inf"))).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(before, block.parameters(), strict=True)) and scaler.get_scale() < 1024.0


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("method", METHODS)
def test_two_calls_before_a_backward_pass(method, gradient):
    """A block called twice, and one call used in two losses: gradients add up."""
    block = ODEBlock(Field(), gradient=gradient, **METHODS[method])
    parts = [torch.autograd.grad(block(x).square().sum(), list(block.parameters())) for x in (X, 2 * X)]
    first, second = block(X), block(2 * X)
    second.square().sum().backward(retain_graph=True)
    first.square().sum().backward()
    for p, a, b in zip(block.parameters(), *parts, strict=True):
        torch.testing.assert_close(p.grad, a + b)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_hooks(gradient):
    """Hooks of the output, of parameters and of the module run once a backward pass, and may change the gradient."""
    block = ODEBlock(Field(), gradient=gradient, **METHODS["rk4"])
    expected, calls = gradients(block), []
    block.register_forward_hook(lambda module, args, out: calls.append("forward"))
    block.register_full_backward_hook(lambda module, grad_input, grad_output: calls.append("backward"))
    for p in block.parameters():
        p.register_post_accumulate_grad_hook(lambda p: calls.append("parameter"))
    out = block(X.clone().requires_grad_())
    out.register_hook(lambda grad: 2 * grad)
    out.square().sum().backward()
    assert calls.count("forward") == calls.count("backward") == 1 and calls.count("parameter") == 4
    for p, grad in zip(block.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, 2 * grad)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_output_may_be_written_into(gradient):
    """An activation in place after the block changes nothing that the backward pass needs."""
    block = ODEBlock(Field(), gradient=gradient, **METHODS["rk4"])
    plain, in_place = nn.Sequential(block, nn.ReLU()), nn.Sequential(block, nn.ReLU(inplace=True))
    for x, y in zip(gradients(plain), gradients(in_place), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_frozen_and_shared_parameters(gradient):
    """A frozen layer gets nothing; a layer that is also used outside gets both parts."""
    block = ODEBlock(Field(), gradient=gradient, **METHODS["rk4"])
    block.func.inner.requires_grad_(False)
    alone = torch.autograd.grad(block(X).square().sum(), list(block.func.outer.parameters()))
    hidden = torch.ones(6, 16)
    outside = torch.autograd.grad(block.func.outer(hidden).sum(), list(block.func.outer.parameters()))
    (block(X).square().sum() + block.func.outer(hidden).sum()).backward()
    assert all(p.grad is None for p in block.func.inner.parameters())
    for p, a, b in zip(block.func.outer.parameters(), alone, outside, strict=True):
        torch.testing.assert_close(p.grad, a + b)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_two_threads_with_one_block(gradient):
    """Forward and backward passes at the same time give what they give alone."""
    block = ODEBlock(Field(), gradient=gradient, **METHODS["dopri5"])
    inputs = [X, -X]
    expected = [gradients(block, x) for x in inputs]
    wrong = []

    def work(i):
        for _ in range(10):
            if not all(torch.equal(x, y) for x, y in zip(gradients(block, inputs[i]), expected[i], strict=True)):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _in_child(queue, block):
    torch.set_num_threads(1)
    queue.put(block(X).detach().numpy())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fork():
    """A forked process solves, as workers of a data loader do."""
    block = ODEBlock(Field(), **METHODS["rk4"])
    expected = block(X).detach()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue, block))
    child.start()
    try:
        found = torch.from_numpy(queue.get(timeout=60))
    finally:
        child.join(timeout=10)
        child.kill()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_no_grad_keeps_nothing(gradient):
    """Neither a graph nor the states of steps, whatever the gradient would need."""
    with torch.no_grad():
        solution = solve(Field(), X, [0.0, 1.0], gradient=gradient, rtol=1e-6, atol=1e-6)
    assert solution.ys.grad_fn is None


def test_dropout_in_training_and_evaluation():
    """In evaluation a field with dropout is a function; in training checkpoint gives the gradient of the noise drawn."""
    block = ODEBlock(nn.Module(), method="rk4", step_size=0.25, gradient="checkpoint")
    field = Field()
    block.func = nn.ModuleList([field, nn.Dropout(0.5)])
    block.func.forward = lambda t, y: block.func[1](field(t, y))
    other = copy.copy(block)
    other.gradient = "direct"
    torch.manual_seed(0)
    found = gradients(block)
    torch.manual_seed(0)
    for x, y in zip(found, gradients(other), strict=True):
        torch.testing.assert_close(x, y)
    block.eval()
    assert torch.equal(block(X), block(X))
