"""ODEBlock: a layer like any other."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from odenet_cuda import ODEBlock, solve

SOLVED = 1e-6  # of a solve at 1e-9
TIGHT = {"rtol": 1e-9, "atol": 1e-9}
BFLOAT16 = 0.05  # bfloat16 has eight bits


class Field(nn.Module):
    """A small field that depends on t and keeps what it sees."""

    def __init__(self, width: int = 3):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(width, 8), nn.Linear(8, width)
        self.seen: list = []

    def forward(self, t, y):
        self.seen.append((t.dtype, y.dtype, torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        return self.outer(torch.tanh(self.inner(y))) * torch.cos(t)


class Decay(nn.Module):
    """y' = -rate y."""

    def __init__(self, rate: float = 0.5):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(rate, dtype=torch.float64))

    def forward(self, t, y):
        return -self.rate * y


X = torch.linspace(-1.0, 1.0, 12).reshape(4, 3)


def test_in_a_sequential():
    """Between other layers: the output is that of the parts, and every parameter gets its gradient."""
    block = ODEBlock(Field(), **TIGHT)
    model = nn.Sequential(nn.Linear(3, 3), block, nn.Linear(3, 2)).double()
    x = X.double()
    out = model(x)
    middle = solve(block.func, model[0](x), [0.0, 1.0], method="dopri8", rtol=1e-12, atol=1e-12).ys[-1]
    torch.testing.assert_close(out, model[2](middle), rtol=SOLVED, atol=SOLVED)
    out.square().sum().backward()
    found = [parameter.grad for parameter in model.parameters()]
    expected = torch.autograd.grad(model[2](middle).square().sum(), list(model.parameters()))
    for mine, true in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, true, rtol=SOLVED, atol=SOLVED)


def test_values_and_times():
    """From t[0] to t[-1], whichever way they go; with return_all every state."""
    y0 = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    torch.testing.assert_close(ODEBlock(Decay(), **TIGHT)(y0), y0 * math.exp(-0.5), rtol=SOLVED, atol=0)
    torch.testing.assert_close(ODEBlock(Decay(), [2.0, 0.5], **TIGHT)(y0), y0 * math.exp(0.75), rtol=SOLVED, atol=0)
    t = torch.tensor([0.0, 0.5, 1.0, 3.0])
    every = ODEBlock(Decay(), t, return_all=True, **TIGHT)(y0)
    torch.testing.assert_close(every, y0 * torch.exp(-t.double() / 2)[:, None, None], rtol=SOLVED, atol=0)
    torch.testing.assert_close(ODEBlock(Decay(), t, **TIGHT)(y0), every[-1], rtol=0, atol=0)


def test_devices(device):
    """On every device, by the times it was made with."""
    block = ODEBlock(Field(), return_all=True, **{**TIGHT, "rtol": 1e-5, "atol": 1e-5})
    expected = block(X)
    moved = copy.deepcopy(block).to(device)
    torch.testing.assert_close(moved(X.to(device)).cpu(), expected, rtol=1e-4, atol=1e-4)


def test_options_are_those_of_solve():
    """What solve takes by name is handed on, per-sample control and fixed methods included."""
    y0 = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    euler = ODEBlock(Decay(), method="euler", step_size=0.25)
    torch.testing.assert_close(euler(y0), y0 * (1 - 0.125) ** 4)
    assert euler.nfe_forward == 4
    block = ODEBlock(Decay(), step_control="per_sample", max_step=0.125)
    block(y0)
    assert block.stats.num_accepted.shape == (2,) and (block.stats.num_accepted >= 8).all()


def test_state_dict():
    """The keys are those of func under "func."; loading one gives the other's output."""
    one, other = ODEBlock(Field()), ODEBlock(Field())
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    assert list(one.state_dict()) == ["func.inner.weight", "func.inner.bias", "func.outer.weight", "func.outer.bias"]
    assert not torch.equal(one(X), other(X))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(X), other(X))
    assert next(iter(ODEBlock(Field(), nn.Parameter(torch.tensor([0.0, 1.0]))).state_dict())) == "t"


@pytest.mark.parametrize("called", [False, True], ids=["new", "after a call"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how, called):
    """A copy gives the same output, shares no weights and knows nothing of the last call."""
    block = ODEBlock(Decay(), [0.0, 0.5, 1.0], rtol=1e-7, max_step=0.25, return_all=True)
    y0 = torch.ones(2, 1, dtype=torch.float64, requires_grad=True)
    expected = block(y0).detach()
    if not called:
        block = ODEBlock(Decay(), [0.0, 0.5, 1.0], rtol=1e-7, max_step=0.25, return_all=True)
    if how == "deepcopy":
        twin = copy.deepcopy(block)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(block))
    else:
        file = io.BytesIO()
        torch.save(block, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert twin.nfe_forward == 0 and twin.stats is None
    assert torch.equal(twin(y0), expected)
    with torch.no_grad():
        twin.func.rate.fill_(3.0)
    assert torch.equal(block(y0), expected) and not torch.equal(twin(y0), expected)


def test_times_stay_float64():
    """Casting the model casts weights, not times: the end 1/3 is not rounded, though half has ten bits."""
    third = 1 / 3
    block = ODEBlock(Decay(), [0.0, third], **TIGHT).half().double()
    assert block.t.dtype == torch.float64 and block.t.tolist() == [0.0, third]
    y0 = torch.ones(1, 1, dtype=torch.float64)
    torch.testing.assert_close(block(y0), torch.full_like(y0, math.exp(-third / 2)), rtol=1e-8, atol=0)
    assert list(block.buffers()) == []


def test_casting():
    """.to(torch.float64) solves in float64, and func sees times of that type."""
    block = ODEBlock(Field(), **TIGHT).to(torch.float64)
    out = block(X.double())
    assert out.dtype == torch.float64
    assert {(t, y) for t, y, _, _ in block.func.seen} == {(torch.float64, torch.float64)}
    low = ODEBlock(Field(), rtol=1e-5, atol=1e-5)(X)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gradient", ["direct", "adjoint", "checkpoint", "quadrature"])
def test_half_precision(gradient):
    """A block made float16 gives float16, near what it gives in float32, and float16 gradients."""
    block = ODEBlock(Field(), rtol=1e-2, atol=1e-2, gradient=gradient)
    expected = block(X)
    half = block.half()
    found = half(X.half())
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)
    found.sum().backward()
    assert all(param.grad.dtype == torch.float16 and param.grad.isfinite().all() for param in half.parameters())


@pytest.mark.parametrize("gradient", ["direct", "adjoint", "checkpoint", "quadrature"])
def test_counts(gradient):
    """nfe_forward and nfe_backward are the calls of func in the last forward and backward pass."""
    block = ODEBlock(Field(), gradient=gradient)
    assert block.nfe_forward == block.nfe_backward == 0
    for _ in range(2):
        block.func.seen.clear()
        out = block(X)
        forward = len(block.func.seen)
        assert block.nfe_forward == forward > 0 and block.nfe_backward == 0
        out.sum().backward()
        assert block.nfe_backward == len(block.func.seen) - forward
        assert (block.nfe_backward > 0) == (gradient != "direct")
    assert block.stats.nfe == block.nfe_forward


def test_tuple_states():
    """A tuple comes in and a tuple goes out."""
    block = ODEBlock(lambda t, y: (y[1], -y[0]), [0.0, 0.5, 1.0], **TIGHT)
    y0 = (torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    x, v = block(y0)
    torch.testing.assert_close(x, torch.full((2,), math.cos(1.0), dtype=torch.float64), rtol=0, atol=SOLVED)
    torch.testing.assert_close(v, torch.full((2,), -math.sin(1.0), dtype=torch.float64), rtol=0, atol=SOLVED)
    block.return_all = True
    assert [leaf.shape for leaf in block(y0)] == [(3, 2), (3, 2)]


@pytest.mark.parametrize("gradient", ["direct", "adjoint", "checkpoint", "quadrature"])
def test_times_that_are_learned(gradient):
    """A Parameter for t is a parameter of the layer: d y(t1)/dt1 = -rate y(t1) and the opposite for t0."""
    block = ODEBlock(Decay(), nn.Parameter(torch.tensor([0.0, 0.8], dtype=torch.float64)), gradient=gradient, **TIGHT)
    assert [name for name, _ in block.named_parameters()] == ["t", "func.rate"]
    block(torch.ones(1, 1, dtype=torch.float64)).sum().backward()
    end = math.exp(-0.4)
    expected = torch.tensor([0.5 * end, -0.5 * end], dtype=torch.float64)
    torch.testing.assert_close(block.t.grad, expected, rtol=SOLVED, atol=SOLVED)
    torch.testing.assert_close(block.func.rate.grad, torch.tensor(-0.8 * end).double(), rtol=SOLVED, atol=SOLVED)
    with torch.no_grad():
        block.t.copy_(torch.tensor([0.0, 2.0]))
    torch.testing.assert_close(block(torch.ones(1, 1).double()).item(), math.exp(-1.0), rtol=SOLVED, atol=0)


def test_direct_and_adjoint_agree():
    """Both gradients, by the input and the weights, to the tolerance of the solves."""
    found = []
    for gradient in ("direct", "adjoint"):
        block = ODEBlock(Field(), gradient=gradient, **TIGHT).double()
        x = X.double().requires_grad_()
        found.append(torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()]))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=SOLVED, atol=SOLVED)


def test_train_and_eval_reach_func():
    """The mode of the layer is that of func: dropout acts in one and not in the other."""

    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(1.0)

        def forward(self, t, y):
            return self.drop(-y)

    block = ODEBlock(Dropped(), **TIGHT)
    y0 = torch.ones(2, 1, dtype=torch.float64)
    assert block.training and torch.equal(block(y0), y0)
    torch.testing.assert_close(block.eval()(y0), y0 * math.exp(-1), rtol=SOLVED, atol=0)
    assert not block.func.training


def test_repr():
    """The settings can be read off, and func is shown as the part it is."""
    shown = repr(ODEBlock(Decay(), method="tsit5", rtol=1e-4))
    assert "t=[0.0, 1.0], method='tsit5', rtol=0.0001, atol=0.001, gradient='adjoint', step_control='joint'" in shown
    assert "(func): Decay()" in shown
    assert "t=9 times from 0.0 to 2.0" in repr(ODEBlock(Decay(), torch.linspace(0, 2, 9)))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: ODEBlock(Decay), TypeError, "func must be an instance that is callable"),
        (lambda: ODEBlock(3.0), TypeError, "func must be an instance that is callable"),
        (lambda: ODEBlock(Decay(), [0.0]), ValueError, "t must hold at least two times"),
        (lambda: ODEBlock(Decay(), [0.0, 0.0])(X), ValueError, "t must be strictly increasing or decreasing"),
    ],
    ids=["class", "number", "one time", "repeated time"],
)
def test_bad_arguments(make, error, words):
    """Bad arguments are named."""
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize("step_control", ["joint", "per_sample"])
@pytest.mark.parametrize("gradient", ["direct", "adjoint", "checkpoint", "quadrature"])
def test_autocast(gradient, step_control):
    """Under autocast func works in bfloat16 on a float32 state; so does the backward pass of the adjoint."""
    block = ODEBlock(Field(), gradient=gradient, step_control=step_control, rtol=1e-2, atol=1e-2)
    x = X.clone().requires_grad_()
    wanted = [x, *block.parameters()]
    expected_out = block(x)
    expected = torch.autograd.grad(expected_out.square().sum(), wanted)
    block.func.seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = block(x)
    assert out.dtype == torch.float32
    forward = len(block.func.seen)
    found = torch.autograd.grad(out.square().sum(), wanted)
    assert all(autocast for _, _, autocast, _ in block.func.seen)
    assert {y for _, y, _, _ in block.func.seen} == {torch.float32}
    assert (len(block.func.seen) > forward) == (gradient != "direct")
    torch.testing.assert_close(out, expected_out, rtol=BFLOAT16, atol=BFLOAT16)
    assert not torch.equal(out, expected_out)
    for mine, true in zip(found, expected, strict=True):
        assert mine.dtype == true.dtype
        torch.testing.assert_close(mine, true, rtol=BFLOAT16, atol=BFLOAT16 * float(true.abs().max()))


def test_backward_inside_of_autocast():
    """A forward pass outside of autocast has a backward pass outside of it, though that is called inside."""
    block = ODEBlock(Field(), gradient="adjoint")
    out = block(X)
    block.func.seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out.sum().backward()
    assert block.func.seen and not any(autocast for _, _, autocast, _ in block.func.seen)
