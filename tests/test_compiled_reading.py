"""What compile(field) can read: the program of a field, run by NumPy, beside autograd. Nothing is compiled but where said."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compiled_fields import Flow, Net, assert_same, compare_gradients, lorenz, rows
from hypothesis import given
from hypothesis import strategies as st
from test_cuda_compile import CSRC
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import odenet_cuda
from odenet_cuda import solve
from odenet_cuda.compiled import build
from odenet_cuda.compiled import plan as plan_of_a_field
from odenet_cuda.compiled.check import run_program
from odenet_cuda.compiled.emit import SOLVES, Target
from odenet_cuda.compiled.plan import Plan
from odenet_cuda.compiled.trace import Unreadable
from odenet_cuda.methods import find_method
from odenet_cuda.problem import Structure

D = torch.float64
Y0 = rows(5, 4)
VECTOR, OTHER = rows(4, seed=1), rows(4, seed=2)
SQUARE, WIDE, TALL = rows(4, 4, seed=1), rows(4, 6, seed=1), rows(6, 4, seed=2)
CUBE, KERNEL = rows(4, 4, 4, seed=1), rows(1, 1, 3, seed=1)


def read(func, y0=Y0, args=(), whole=False) -> Plan:
    """The plan; its own check compares the program with func, values and vector-Jacobian products."""
    return Plan(func, Structure(y0), args, whole=whole)


# ---- activations and the like ----

ACTIVATIONS = {
    name: getattr(F, name)
    for name in (
        "celu", "elu", "gelu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "logsigmoid", "mish", "relu",
        "relu6", "selu", "sigmoid", "silu", "softplus", "softshrink", "softsign", "tanh", "tanhshrink",
    )
} | {
    "gelu tanh": lambda y: F.gelu(y, approximate="tanh"),
    "glu": lambda y: torch.cat([F.glu(y), F.glu(-y)], -1),
    "prelu": lambda y: F.prelu(y, torch.tensor([0.2], dtype=y.dtype)),
    "threshold": lambda y: F.threshold(y, 0.1, -0.3),
    "softplus of beta": lambda y: F.softplus(y, beta=3.0, threshold=2.0),
    "softmax": lambda y: F.softmax(y, -1),
    "softmin": lambda y: F.softmin(y, -1),
    "log_softmax": lambda y: F.log_softmax(y, -1),
    "normalize": lambda y: F.normalize(y, dim=-1),
    "layer_norm": lambda y: F.layer_norm(y, (4,)),
    "rms_norm": lambda y: F.rms_norm(y, (4,)),
    "linear": lambda y: F.linear(y, SQUARE, OTHER),
    "bilinear": lambda y: F.bilinear(y, torch.sin(y), CUBE),
    "cosine_similarity": lambda y: y * F.cosine_similarity(y, torch.cos(y), -1)[:, None],
    "dropout of 0": lambda y: F.dropout(y, 0.0, training=False),
}  # fmt: skip

FUNCTIONS = {
    "exp": torch.exp, "exp2": torch.exp2, "expm1": torch.expm1, "log": lambda y: torch.log(y.abs() + 1),
    "log2": lambda y: torch.log2(y.abs() + 1), "log10": lambda y: torch.log10(y.abs() + 1),
    "log1p": lambda y: torch.log1p(y * y),
    "sqrt": lambda y: torch.sqrt(1 + y * y), "rsqrt": lambda y: torch.rsqrt(1 + y * y), "reciprocal": lambda y: 1 / (2 + y * y),
    "sin": torch.sin, "cos": torch.cos, "tan": lambda y: torch.tan(y / 2), "asin": lambda y: torch.asin(torch.tanh(y) / 2),
    "acos": lambda y: torch.acos(torch.tanh(y) / 2), "atan": torch.atan, "atan2": lambda y: torch.atan2(y, 2 + torch.cos(y)),
    "sinh": torch.sinh, "cosh": torch.cosh, "tanh": torch.tanh, "asinh": torch.asinh, "acosh": lambda y: torch.acosh(2 + y * y),
    "atanh": lambda y: torch.atanh(torch.tanh(y) / 2), "erf": torch.erf, "erfc": torch.erfc, "abs": torch.abs,
    "sign": lambda y: y * torch.sign(y), "floor": lambda y: y - torch.floor(3 * y), "ceil": lambda y: y * torch.ceil(3 * y),
    "square": torch.square, "pow 2": lambda y: y**2, "pow 3": lambda y: y**3, "pow 2.5": lambda y: (1 + y * y) ** 2.5,
    "pow -1": lambda y: (2 + y * y) ** -1, "pow of tensors": lambda y: (1 + y * y) ** torch.sin(y), "2 ** y": lambda y: 2.0**y,
    "hypot": lambda y: torch.hypot(y, 1 + y * y), "maximum": lambda y: torch.maximum(y, y.flip(-1) / 2),
    "minimum": lambda y: torch.minimum(y, torch.zeros_like(y)), "clamp": lambda y: y.clamp(-0.2, 0.4),
    "clamp min": lambda y: y.clamp(min=-0.2), "clamp of tensors": lambda y: y.clamp(-y.abs() / 2, torch.ones_like(y) * 0.3),
    "where": lambda y: torch.where(y > 0, y, torch.exp(y)), "masks": lambda y: y * ((y > 0) & (y < 0.5) | ~(y > -0.5)),
    "eq": lambda y: torch.where(y == y, y, 0.0), "lerp": lambda y: torch.lerp(y, torch.sin(y), 0.3),
    "addcmul": lambda y: torch.addcmul(y, y, torch.sin(y), value=0.5), "rsub": lambda y: 1 - y,
    "addcdiv": lambda y: torch.addcdiv(y, y, 2 + y * y, value=0.5), "logaddexp": lambda y: torch.logaddexp(y, 2 * y),
    "sinc": lambda y: torch.sinc(y + 3), "xlogy": lambda y: torch.xlogy(y, 1 + y * y),
    "rad2deg": lambda y: torch.rad2deg(y) / 90,
    "masked_fill": lambda y: torch.sin(y).masked_fill(y > 0.3, 0.5), "logit": lambda y: torch.logit(torch.sigmoid(y)),
}  # fmt: skip


def of_halves(y):
    return y[:, :2], y[:, 2:]


SHAPES = {
    "cat": lambda y: torch.cat([y[:, 2:], y[:, :2] * 2], 1),
    "stack": lambda y: torch.stack([y[:, 1], y[:, 0], y[:, 3], -y[:, 2]], 1),
    "unbind": lambda y: torch.stack([a * b for a, b in zip(y.unbind(1), y.flip(1).unbind(1), strict=True)], 1),
    "split": lambda y: torch.cat([torch.sin(x) for x in y.split([1, 3], 1)], 1),
    "chunk": lambda y: torch.cat(y.chunk(2, 1)[::-1], 1),
    "slices": lambda y: torch.cat([y[:, ::2], y[:, 1::2]], 1),
    "ellipsis": lambda y: torch.cat([y[..., :1], y[..., -3:]], -1),
    "index of a list": lambda y: y[:, [2, 0, 1, 0]] * y,
    "index of a tensor": lambda y: y.index_select(1, torch.tensor([3, 3, 0, 1])) * y,
    "gather": lambda y: y * y[:, torch.tensor([1, 2, 3, 0])],
    "flip": lambda y: y.flip(1) * 2,
    "roll": lambda y: torch.roll(y, 1, 1) - torch.roll(y, -1, 1),
    "pad": lambda y: F.pad(y[:, 1:3], (1, 1)) + F.pad(y, (-1, 1), value=0.5),
    "reshape": lambda y: y.reshape(-1, 2, 2).transpose(1, 2).reshape(-1, 4) * y,
    "view and permute": lambda y: y.view(y.shape[0], 2, 2).permute(0, 2, 1).contiguous().view(-1, 4),
    "unsqueeze": lambda y: (y.unsqueeze(1) * y.unsqueeze(2)).sum(1),
    "expand": lambda y: y[:, :1].expand(-1, 4) * y,
    "repeat": lambda y: y[:, :2].repeat(1, 2) * y,
    "repeat_interleave": lambda y: y[:, :2].repeat_interleave(2, 1) * y,
    "tile": lambda y: torch.tile(y[:, :2], (1, 2)),
    "squeeze": lambda y: y[:, None].squeeze(1),
    "flatten": lambda y: y.view(-1, 2, 2).flatten(1),
    "movedim": lambda y: y.view(-1, 2, 2).movedim(2, 1).flatten(1),
    "cumsum": lambda y: y.cumsum(1),
    "cumprod": lambda y: (1 + y * y).cumprod(1) / 9,
    "sum": lambda y: y * y.sum(1, keepdim=True),
    "sum of all but samples": lambda y: y * y.view(-1, 2, 2).sum((1, 2))[:, None],
    "mean": lambda y: y - y.mean(-1, keepdim=True),
    "prod": lambda y: y * (1 + y * y).prod(1, keepdim=True),
    "norm": lambda y: y / (1 + y.norm(dim=1, keepdim=True)),
    "norm of order 1": lambda y: y / (1 + torch.linalg.vector_norm(y, 1, dim=1, keepdim=True)),
    "var": lambda y: y * y.var(1, keepdim=True),
    "var of the population": lambda y: y * y.var(1, unbiased=False, keepdim=True),
    "std": lambda y: y * torch.std(y, 1, keepdim=True),
    "var_mean": lambda y: y * sum(torch.var_mean(y, 1, keepdim=True)),
    "logsumexp": lambda y: y - y.logsumexp(1, keepdim=True),
    "amax": lambda y: y - y.amax(1, keepdim=True),
    "amin": lambda y: y - y.amin(1, keepdim=True),
    "max": lambda y: y - y.max(1, keepdim=True).values,
    "min of parts": lambda y: y * y.view(-1, 2, 2).min(2)[0].repeat(1, 2),
    "einsum": lambda y: torch.einsum("bi,ij,bj->bi", y, SQUARE, y),
    "einsum of a tensor": lambda y: torch.einsum("bi,ijk,bj->bk", y, CUBE, torch.sin(y)),
    "matmul": lambda y: torch.tanh(y @ WIDE) @ TALL,
    "matrix first": lambda y: (SQUARE @ y.t()).t(),
    "bmm": lambda y: torch.bmm(y.view(-1, 2, 2), torch.sin(y).view(-1, 2, 2)).reshape(-1, 4),
    "baddbmm": lambda y: torch.bmm(y[:, None, :], y[:, :, None]).squeeze(-1) * y,
    "outer": lambda y: (y[:, :, None] * y[:, None, :]) @ VECTOR,
    "dot": lambda y: y * (y * VECTOR).sum(-1, keepdim=True),
    "cross": lambda y: torch.cat([torch.cross(y[:, :3], torch.sin(y[:, :3]), dim=1), y[:, 3:]], 1),
    "attention": lambda y: (torch.softmax(y[:, :, None] * y[:, None, :], -1) @ y[:, :, None]).squeeze(-1),
    "diagonal": lambda y: torch.diagonal(y[:, :, None] * y[:, None, :], dim1=1, dim2=2),
    "diff": lambda y: torch.cat([y.diff(dim=1), y[:, :1]], 1),
    "tril": lambda y: ((y[:, :, None] * y[:, None, :]) * torch.tril(torch.ones(4, 4, dtype=y.dtype))).sum(-1),
    "zeros_like": lambda y: torch.zeros_like(y),
    "constant": lambda y: torch.ones(4, dtype=y.dtype).expand_as(y),
    "new_zeros": lambda y: torch.cat([y[:, :2], y.new_zeros(y.shape[0], 2)], 1),
    "full": lambda y: y * torch.full((y.shape[0], 1), 0.3, dtype=y.dtype),
    "arange": lambda y: y * torch.arange(4, dtype=y.dtype),
    "linspace": lambda y: y * torch.linspace(0, 1, 4, dtype=y.dtype),
    "conv1d": lambda y: F.conv1d(y[:, None], KERNEL, padding=1)[:, 0],
}  # fmt: skip

MAY_REFUSE = {
    "conv1d",
    "tril",
    "diagonal",
    "matrix first",
    "bilinear",
    "sinc",
    "xlogy",
    "gather",
    "prelu",
    "cumprod",
}  # not promised


def check_function(name, y0):
    function = {**ACTIVATIONS, **FUNCTIONS, **SHAPES}[name]
    try:
        plan = read(lambda t, y: function(y), y0)
    except Unreadable:
        if name not in MAY_REFUSE:
            raise
        return
    assert len(plan.program.slopes) == 4


@pytest.mark.parametrize("name", [*ACTIVATIONS, *FUNCTIONS, *SHAPES])
def test_functions(name):
    """Every one is read, with its derivative; what is not promised is refused in words."""
    check_function(name, Y0)


@pytest.mark.parametrize(
    "name", ["elu", "gelu", "softplus", "softmax", "layer_norm", "pow 2.5", "norm", "var", "where", "cumsum"]
)
def test_functions_of_float32(name):
    """A few in the other type."""
    check_function(name, Y0.float())


NONE, BIAS = torch.zeros(0, 4, dtype=D), rows(4, seed=5)
EMPTY = {
    "mm": lambda y: y[:, :0] @ NONE,
    "addmm": lambda y: torch.addmm(BIAS, y[:, :0], NONE),
    "linear": lambda y: F.linear(y[:, :0], NONE.t(), BIAS),
    "mv": lambda y: (y[:, :0] @ NONE[:, 0])[:, None],
    "bmm": lambda y: (y[:, None, :0] @ y[:, :0, None])[:, 0],
    "of no result": lambda y: (y @ NONE.t()).sum(1, keepdim=True),
    "einsum": lambda y: torch.einsum("bi,ij->bj", y[:, :0], NONE),
    "outer": lambda y: torch.einsum("bi,bj->bij", y[:, :0], y).sum((1, 2))[:, None],
    "mean of parts": lambda y: torch.cat([y[:, :0], y], 1).sum(1, keepdim=True),
}


@pytest.mark.parametrize("name", EMPTY)
def test_products_over_empty_axes(name):
    """They are zero, and so is what comes of them."""
    read(lambda t, y: EMPTY[name](y) - y)


TIMES = {
    "times a scalar": lambda t, y: y * t,
    "sin": lambda t, y: y + torch.sin(2 * t),
    "full": lambda t, y: y * torch.ones_like(y[:, :1]) * t,
    "concatenated": lambda t, y: torch.cat([y[:, :3], torch.ones_like(y[:, :1]) * t], 1),
    "expanded": lambda t, y: torch.cat([y[:, :3], t.expand(y.shape[0], 1)], 1) if t.dim() == 0 else y,
    "in a vector": lambda t, y: y * torch.stack([t, t * t, torch.cos(t), torch.exp(t)]).reshape(-1)[:4] if t.dim() == 0 else y,
    "reshaped": lambda t, y: y * t.reshape(1, 1) if t.dim() == 0 else y,
    "compared": lambda t, y: torch.where(t < 0.2, y, -y),
    "to a power": lambda t, y: y * (1 + t) ** 2.5,
    "alone": lambda t, y: torch.zeros_like(y) + t,
}


@pytest.mark.parametrize("name", TIMES)
def test_time(name):
    """As a number, as a column, in comparisons."""
    read(TIMES[name])


# ---- modules ----


class Concat(nn.Module):
    def __init__(self, width: int, out: int):
        super().__init__()
        self.layer = nn.Linear(width + 1, out)

    def forward(self, t, y):
        return self.layer(torch.cat([torch.ones_like(y[:, :1]) * t, y], 1))


class Hyper(nn.Module):
    """Weights made from time."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.net, self.shape = nn.Linear(1, width * out + out), (out, width)

    def forward(self, t, y):
        numbers = self.net(t.reshape(1, 1)).reshape(-1)
        out, width = self.shape
        return F.linear(y, numbers[: out * width].view(out, width), numbers[out * width :])


class ConcatSquash(nn.Module):
    """The layer of FFJORD: linear layers of the time alone beside one of the state."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.layer, self.gate, self.bias = nn.Linear(width, out), nn.Linear(1, out), nn.Linear(1, out, bias=False)

    def forward(self, t, y):
        return self.layer(y) * torch.sigmoid(self.gate(t.reshape(-1, 1))) + self.bias(t.reshape(-1, 1))


class Embedded(nn.Module):
    """Layers of the time alone, with what happens between them to a sum over samples on the way back."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.layer = nn.Linear(width, out)
        self.net = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, out), nn.Softplus())

    def forward(self, t, y):
        embedded = self.net(t.reshape(-1, 1))
        return self.layer(y) + embedded[:, :1] - embedded * y.sum(1, keepdim=True) / 4


class Layers(nn.Module):
    def __init__(self, kind: type[nn.Module]):
        super().__init__()
        self.first, self.second = kind(4, 6), kind(6, 4)

    def forward(self, t, y):
        return self.second(t, torch.tanh(self.first(t, y)))


class Of(nn.Module):
    """A module that does not know of time."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, t, y):
        return self.module(y)


class Attention(nn.Module):
    """Over the parts of the state."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(2, 1, batch_first=True)

    def forward(self, t, y):
        x = y.reshape(-1, 2, 2)
        return self.attention(x, x, x, need_weights=False)[0].flatten(1)


def weight_norm():
    return Of(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))


def spectral_norm():
    return Of(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)).eval())


MODULES = {
    "Concat": lambda: Layers(Concat),
    "ConcatSquash": lambda: Layers(ConcatSquash),
    "Embedded": lambda: Layers(Embedded),
    "Hyper": lambda: Layers(Hyper),
    "Sequential": lambda: Of(nn.Sequential(nn.Linear(4, 6), nn.ELU(), nn.LayerNorm(6), nn.Linear(6, 4), nn.Softplus())),
    "no bias": lambda: Of(nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 4, bias=False))),
    "PReLU": lambda: Of(nn.Sequential(nn.Linear(4, 4), nn.PReLU())),
    "LayerNorm": lambda: Of(nn.LayerNorm(4)),
    "RMSNorm": lambda: Of(nn.RMSNorm(4)),
    "Dropout in eval": lambda: Of(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))).eval(),
    "Identity": lambda: Of(nn.Identity()),
    "GroupNorm": lambda: Of(nn.GroupNorm(2, 4)),
    "GroupNorm of channels": lambda: Of(nn.Sequential(nn.Unflatten(1, (2, 2)), nn.GroupNorm(2, 2, affine=False), nn.Flatten())),
    "BatchNorm in eval": lambda: Of(nn.BatchNorm1d(4)).eval(),
    "attention": Attention,
    "orthogonal": lambda: Of(nn.utils.parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="cayley")),
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
}


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


@pytest.mark.parametrize("name", MODULES)
def test_modules(name):
    """They are read with a gradient for each parameter."""
    module = seeded(MODULES[name]).to(D)
    plan = read(module)
    own = [p for p in module.parameters() if p.requires_grad]
    assert {id(p) for p in map(lambda place: place(()), plan.wanted)} == {id(p) for p in own}


@pytest.mark.parametrize("control", ["joint", "per_sample"])
@pytest.mark.parametrize("name", ["weight_norm", "ConcatSquash", "Embedded", "Hyper"])
def test_modules_compiled(name, control, compiled_quickly):
    """Gradients for parameters beside the stepper's: sums over samples, and what torch and the kernel make of them."""
    if name == "Hyper" and control == "per_sample":
        pytest.skip("its weights would differ from sample to sample, which the stepper does not serve")
    module = seeded(MODULES[name]).to(D)
    compare_gradients(module, Y0 / 2, [0.0, 0.3], 1e-9, step_control=control, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_flows(detached, weighted):
    """torch.autograd.grad inside."""
    read(Flow(detached, weighted), rows(5, 3))


def test_functional_derivatives():
    """torch.func inside the field is read, or refused in words."""

    def divergence(t, y):
        def row(z):
            return torch.sin(z) * z.sum()

        jacobian = torch.func.vmap(torch.func.jacrev(row))(y)
        return y * jacobian.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)

    field = odenet_cuda.compile(divergence)
    with torch.no_grad():
        try:
            read(divergence)
        except Unreadable as error:
            assert str(error)
        assert field.explain() == "not solved yet"


def test_in_place():
    """Writes into tensors that func made itself: the program is right, or refused."""

    def into_slices(t, y):
        out = torch.zeros_like(y)
        out[:, :2] = y[:, 2:] * 2
        out[:, 2:] -= torch.sin(y[:, :2])
        return out

    def added(t, y):
        out = y * 2
        out += torch.sin(y)
        out.mul_(0.5)
        return out

    def after_a_view(t, y):
        out = y * 2
        part = out[:, :2]
        out.add_(1.0)
        return torch.cat([part, out[:, 2:]], 1)

    for func in (into_slices, added, after_a_view):
        try:
            read(func)
        except Unreadable as error:
            assert str(error), func.__name__


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_ranks_of_the_state(rank):
    """[batch], [batch, n], and more axes."""
    y0 = rows(5, *[2] * (rank - 1))
    plan = read(lambda t, y: -y * torch.cos(t) + y.sin(), y0)
    assert len(plan.program.slopes) == 2 ** (rank - 1)


@pytest.mark.parametrize("batch", [1, 2, 7, 11, 77])
def test_batches_of_the_recordings(batch):
    """Batches and widths that are those of the recordings are no other than any."""
    for width in (1, 7, 11):
        read(lambda t, y: torch.tanh(y) - y.sum(1, keepdim=True), rows(batch, width))


def test_arguments():
    """Which have one row a sample follows from the field, not from the number of rows."""
    w, p = rows(5, 5, seed=1), rows(5, 1, seed=2)
    plan = read(lambda t, y, w, p: (y @ w) * p, rows(5, 5), (w, p))
    assert plan.batched in ([1], [0, 1]) and len(plan.argument_sizes) == len(plan.batched)
    plan = read(lorenz, rows(5, 3), (rows(5, 3, seed=1),))
    assert plan.batched == [0] and plan.argument_sizes == [3]
    plan = read(lambda t, y, n, w: y * n + w, Y0, (3, rows(4)))
    assert plan.batched == []


def test_state_is_one_sample():
    """whole: no axis of samples, and samples may be mixed."""
    plan = read(lambda t, y: y - y.mean(0), whole=True)
    assert len(plan.program.slopes) == 20
    read(lambda t, y: torch.fft.ifft(torch.fft.fft(y)).real if y.dim() == 9 else y.roll(1, 0), rows(6), whole=True)


MIXES = {
    "mean": lambda t, y: y - y.mean(0),
    "sum": lambda t, y: y / y.sum(0),
    "sum of all": lambda t, y: y * y.sum(),
    "max": lambda t, y: y - y.amax(0),
    "softmax": lambda t, y: y.softmax(0),
    "cumsum": lambda t, y: y.cumsum(0),
    "flip": lambda t, y: y.flip(0),
    "roll": lambda t, y: y.roll(1, 0),
    "roll of all": lambda t, y: y.roll(1),
    "first": lambda t, y: y * y[0],
    "last": lambda t, y: y * y[-1:],
    "gram": lambda t, y: (y @ y.t()) @ y,
    "covariance": lambda t, y: y @ (y.t() @ y),
    "norm": lambda t, y: y / y.norm(),
    "var": lambda t, y: y * y.var(0),
    "shape": lambda t, y: y * y.shape[0],
    "reshape": lambda t, y: y.t().reshape(-1, 4),
    "diff": lambda t, y: torch.cat([y[1:], y[:1]], 0),
    "batch_norm": lambda t, y: F.batch_norm(y, None, None, training=True),
    "index": lambda t, y: y[torch.arange(y.shape[0] - 1, -1, -1)],
}


@pytest.mark.parametrize("name", MIXES)
def test_samples_that_are_mixed(name):
    """Every way for a sample to see another is refused."""
    with pytest.raises(Unreadable):
        read(MIXES[name], rows(6, 4))


UNREADABLE = {
    "rand": lambda t, y: y * torch.rand_like(y),
    "rand of the features": lambda t, y: y * torch.rand(4, dtype=y.dtype),
    "dropout": lambda t, y: F.dropout(y, 0.5),
    "item": lambda t, y: y * t.item(),
    "branch": lambda t, y: y if (y > 0).all() else -y,
    "median": lambda t, y: y * y.median(1, keepdim=True).values,
    "sort of many": lambda t, y: y.repeat(1, 10).sort(1).values[:, : y.shape[1]],
    "argmax": lambda t, y: y * y.argmax(1, keepdim=True),
    "nonzero": lambda t, y: y * len(y[y > 0]),
    "numpy": lambda t, y: torch.as_tensor(y.detach().numpy()),
    "solve": lambda t, y: torch.linalg.solve(y.view(-1, 2, 2), y.view(-1, 2, 2)).flatten(1),
    "fft": lambda t, y: torch.fft.fft(y).real,
    "dtype": lambda t, y: y.float().to(y.dtype) * 2,
    "shape": lambda t, y: y[:, :2],
    "raises": lambda t, y: 1 / 0,
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable(name):
    """Refused in words, whatever func raises; torch's random state is left alone."""
    state = torch.get_rng_state()
    with pytest.raises(Unreadable) as raised:
        read(UNREADABLE[name])
    assert len(str(raised.value)) > 10
    assert torch.equal(torch.get_rng_state(), state)


def test_reading_leaves_modules_alone():
    """Parameters, their gradients, buffers and the training mode are as before."""
    module = Of(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))).to(D)
    read(Of(nn.Linear(4, 4)).to(D))
    before = copy.deepcopy(module.state_dict())
    for whole in (False, True):
        try:
            read(module, whole=whole)
        except Unreadable as error:
            assert str(error)
        for name, value in module.state_dict().items():
            assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in module.parameters()) and module.training


# ---- what func keeps ----


class Kept(nn.Module):
    """Keeps y; asks what was kept before, without reading it."""

    def __init__(self, ask):
        super().__init__()
        self.ask = ask

    def forward(self, t, y):
        asked = self.ask(self)
        self.prev = y
        return -y if asked else -3 * y


MISSING = object()


def put(func, value):
    func.__dict__.pop("prev", None)
    if value is not MISSING:
        func.prev = value


ASKED = {
    "is None": lambda f: hasattr(f, "prev") and f.prev is None,
    "type is None's": lambda f: hasattr(f, "prev") and type(f.prev) is type(None),
    "type is a tensor's": lambda f: hasattr(f, "prev") and type(f.prev) is torch.Tensor,
    "isinstance": lambda f: hasattr(f, "prev") and isinstance(f.prev, torch.Tensor),
    "hasattr": lambda f: hasattr(f, "prev"),
    "in": lambda f: "prev" in f.__dict__,
    "getattr": lambda f: getattr(f, "prev", None) is None,
    "identity": lambda f: getattr(f, "prev", None) is f.weight,
    "nothing": lambda f: True,
}


@pytest.mark.parametrize("asked", ASKED)
def test_asked_for_what_is_kept(asked):
    """Whether a tensor is there, None or nothing is found out without reading it. What the stepper's next call would find is
    another thing than the first: refused, unless it makes no difference; and read anew where the user changes it."""
    func = Kept(ASKED[asked])
    func.weight = VECTOR
    field = odenet_cuda.compile(func, pure=True)
    for value in (MISSING, None, OTHER, VECTOR, None):
        put(func, value)
        expected = [float((func(None, Y0) / Y0).mean()) for _ in range(2)]
        put(func, value)
        try:
            plan = field.plan(Structure(Y0), (), False)
        except Unreadable as error:
            assert "writes" in str(error)
            continue
        assert abs(expected[0] - expected[1]) < 1e-12, value
        inputs = {"t": np.zeros((5, 1)), "y": Y0.numpy(), "arguments": np.zeros((5, 0)), "g": Y0.numpy()}
        inputs |= {"v": Y0.numpy(), "rate": np.zeros((5, 1))}
        slope = run_program(plan.program, inputs, [])[0]
        assert np.abs(slope - expected[0] * Y0.numpy()).max() < 1e-12


def test_kept_and_not_asked_for():
    """What func only writes is no reason to refuse, nor to read anew where it holds another tensor."""
    func = Kept(lambda f: True)
    field = odenet_cuda.compile(func, pure=True)
    plans = []
    for value in (Y0, OTHER, None, None):
        func.prev = value
        plans.append(field.plan(Structure(Y0), (), False))
    assert plans[0] is plans[1] and plans[1] is not plans[2] and plans[2] is plans[3]


# ---- what no reading understands ----


def strange(kind):
    """Tensors that lie otherwise in memory, or not at all."""
    return {
        "sparse": lambda: torch.eye(4, dtype=D).to_sparse(),
        "quantized": lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        "meta": lambda: torch.empty(4, device="meta"),
        "conjugated": lambda: torch.ones(4, dtype=torch.complex128).conj(),
        "negated": lambda: torch.ones(4, dtype=torch.complex128).conj().imag,
        "uninitialized": lambda: nn.LazyLinear(4, dtype=D).weight,
        "large": lambda: torch.ones(1).expand(1 << 30),
        "empty": lambda: torch.empty(0, 4),
    }[kind]()


STRANGE = ("sparse", "quantized", "nested", "jagged", "meta", "conjugated", "negated", "uninitialized", "large")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [*STRANGE, "empty"])
def test_strange_tensors(kind):
    """Reached, asked for or only there: refused in words; one without numbers is no trouble."""
    x = strange(kind)
    for func in (lambda t, y: -y if x is not None else y, lambda t, y: -y * len({"x": x})):
        field = odenet_cuda.compile(func)
        if kind == "empty":
            field.plan(Structure(Y0), (), False)
            continue
        with pytest.raises(Unreadable, match=r"func (reaches|could not be read)|whose changes cannot be seen"):
            field.plan(Structure(Y0), (), False)


def test_initialized_by_the_first_call():
    """A lazy layer that is initialized is no longer refused."""
    layer = nn.LazyLinear(4, dtype=D)
    field = odenet_cuda.compile(lambda t, y: layer(y))
    with pytest.raises(Unreadable):
        field.plan(Structure(Y0), (), False)
    assert isinstance(layer, nn.LazyLinear)
    layer(Y0)
    field.plan(Structure(Y0), (), False)


class NoRepr:
    def __repr__(self):
        raise RuntimeError("no repr")


def test_a_reading_that_raises():
    """Whatever it comes upon, the stepper serves."""
    key = NoRepr()
    table = {key: 2.0}
    field = odenet_cuda.compile(lambda t, y: -y * table[key])
    ys = solve(field, Y0, [0.0, 1.0], method="euler").ys
    assert (ys[-1] + Y0).abs().max() < 1e-12


# ---- what surrounds a solve ----


class Twice(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out * 2 if func is torch.sin else out


class TwiceBelow(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return torch.mul(out, 2) if func is torch.ops.aten.sin.default else out


@pytest.mark.parametrize("mode", [Twice, TwiceBelow, torch.autograd.detect_anomaly], ids=["function", "dispatch", "anomaly"])
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_modes_of_torch(mode):
    """The stepper serves where others see the operations of func."""
    field = odenet_cuda.compile(lambda t, y: torch.sin(y) * (2 if torch.is_anomaly_enabled() else 1))
    with mode():
        ys = solve(field, Y0, [0.0, 1.0], method="euler").ys
        assert "is on" in field.explain()
    assert (ys[-1] - Y0 - 2 * torch.sin(Y0)).abs().max() < 1e-12


FLAGS = {
    "deterministic": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    "warnings": (torch.is_warn_always_enabled, torch.set_warn_always),
    "precision": (
        lambda: torch.get_float32_matmul_precision() == "high",
        lambda on: torch.set_float32_matmul_precision("high" if on else "highest"),
    ),
}


@pytest.mark.parametrize("flag", FLAGS)
def test_flags_of_torch(flag):
    """Another flag is another plan."""
    ask, put = FLAGS[flag]
    field = odenet_cuda.compile(lambda t, y: torch.sin(y) if ask() else torch.cos(y))
    texts = []
    try:
        for on in (False, True, False):
            put(on)
            texts.append([s.text for s in field.plan(Structure(Y0), (), False).program.statements])
    finally:
        put(False)
    assert texts[0] == texts[2] != texts[1] and any("sin" in text for text in texts[1])


def test_inference_mode_asked_for():
    """No recording can be made in it, so a func that asks for it is refused, wherever it is solved first."""
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        field = odenet_cuda.compile(lambda t, y: y if torch.is_inference_mode_enabled() else 2 * y)
        with mode(), pytest.raises(Unreadable, match="no gradient is wanted"):
            field.plan(Structure(Y0), (), False)
        field = odenet_cuda.compile(lambda t, y: 2 * y)
        with mode():
            field.plan(Structure(Y0), (), False)


TIMES_OF_SAMPLES = {
    "sum": (lambda t, y: -y * (1 + t.sum()), False),
    "dim": (lambda t, y: -y * (1 + t.dim()), False),
    "numel": (lambda t, y: -y * t.numel(), False),
    "item": (lambda t, y: torch.cat([y[:, :3], t.reshape(1, 1).expand(len(y), 1)], 1), False),
    "product": (lambda t, y: -y * (1 + t), True),
    "column": (lambda t, y: torch.cat([y[:, :3], t.expand(len(y), 1)], 1), True),
}


@pytest.mark.parametrize("name", TIMES_OF_SAMPLES)
def test_times_of_samples(name):
    """Under per-sample control func is given one time a sample, and what it does with that is compared too."""
    func, right = TIMES_OF_SAMPLES[name]
    field = odenet_cuda.compile(func)
    field.plan(Structure(Y0), (), False)
    if right:
        field.plan(Structure(Y0), (), True)
        return
    with pytest.raises(Unreadable, match="a time for each sample"):
        field.plan(Structure(Y0), (), True)


# ---- random modules ----

LAYERS = (
    "linear", "tanh", "relu", "softplus", "gelu", "silu", "elu", "sin", "layer_norm", "softmax", "scale", "time", "concat time",
    "square", "residual", "halves", "flip", "roll", "cumsum", "gate", "matrix twice", "divide", "max", "norm",
)  # fmt: skip


class Random(nn.Module):
    """Layers drawn from LAYERS over a state of some width."""

    def __init__(self, width: int, layers: list[tuple[str, int]]):
        super().__init__()
        self.kinds = [kind for kind, _ in layers]
        self.inner = nn.ModuleList()
        size = width
        for kind, out in layers:
            if kind == "linear":
                self.inner.append(nn.Linear(size, out))
                size = out
            elif kind == "concat time":
                self.inner.append(nn.Linear(size + 1, out))
                size = out
            elif kind == "layer_norm":
                self.inner.append(nn.LayerNorm(size))
            elif kind in ("gate", "matrix twice"):
                self.inner.append(nn.Linear(size, size))
            elif kind == "scale":
                self.inner.append(nn.ParameterList([nn.Parameter(torch.randn(size)), nn.Parameter(torch.randn(()))]))
            else:
                self.inner.append(nn.Identity())
        self.last = nn.Linear(size, width)

    def forward(self, t, y):
        x = y
        for kind, layer in zip(self.kinds, self.inner, strict=True):
            x = self.step(kind, layer, t, x)
        return torch.tanh(self.last(x))

    def step(self, kind, layer, t, x):
        if kind in ("linear", "layer_norm"):
            return layer(x)
        if kind in ("tanh", "relu", "sin", "softplus", "gelu", "silu", "elu"):
            return getattr(torch, kind, None)(x) if hasattr(torch, kind) else getattr(F, kind)(x)
        return {
            "softmax": lambda: torch.softmax(x, -1),
            "scale": lambda: x * layer[0] + layer[1] if kind == "scale" else x,
            "time": lambda: x * torch.cos(t),
            "concat time": lambda: layer(torch.cat([x, torch.ones_like(x[:, :1]) * t], 1)),
            "square": lambda: torch.tanh(x) ** 2,
            "residual": lambda: x + torch.sin(x) / 2,
            "halves": lambda: torch.cat([x[:, x.shape[1] // 2 :], -x[:, : x.shape[1] // 2]], 1),
            "flip": lambda: x * x.flip(1) / (1 + x * x),
            "roll": lambda: x - torch.roll(x, 1, 1),
            "cumsum": lambda: x.cumsum(1) / x.shape[1],
            "gate": lambda: x * torch.sigmoid(layer(x)),
            "matrix twice": lambda: torch.sin(x @ layer.weight) @ layer.weight.t() + layer.bias,
            "divide": lambda: x / (1 + x.abs().sum(1, keepdim=True)),
            "max": lambda: torch.maximum(x, x.mean(1, keepdim=True)),
            "norm": lambda: x / (1 + x.norm(dim=1, keepdim=True)),
        }[kind]()


@st.composite
def random_modules(draw):
    width = draw(st.integers(1, 8))
    kinds = draw(st.lists(st.tuples(st.sampled_from(LAYERS), st.integers(1, 8)), min_size=1, max_size=6))
    with torch.random.fork_rng():
        torch.manual_seed(draw(st.integers(0, 10**6)))
        return width, Random(width, kinds).to(D)


@given(drawn=random_modules())
def test_random_modules(drawn):
    """A few layers of any kind after each other."""
    width, module = drawn
    plan = read(module, rows(3, width))
    assert len(plan.wanted) == len(list(module.parameters()))


CHOSEN = [
    (3, ["linear", "tanh", "layer_norm", "gate"]),
    (4, ["concat time", "softplus", "scale", "matrix twice"]),
    (5, ["linear", "softmax", "residual", "roll", "norm"]),
    (8, ["scale", "flip", "divide", "max", "linear", "silu"]),
]


@pytest.mark.parametrize("case", range(len(CHOSEN)))
def test_random_modules_compiled(case):
    """Four of them compiled: values, steps and gradients as the stepper's."""
    width, kinds = CHOSEN[case]
    module = seeded(lambda: Random(width, [(kind, 3 + i) for i, kind in enumerate(kinds)])).to(D)
    field = odenet_cuda.compile(module)
    options = {"step_control": "per_sample", "rtol": 1e-6, "atol": 1e-6}
    found, expected = (solve(f, rows(40, width), [0.0, 0.4, 1.0], **options) for f in (field, module))
    assert field.explain() == "compiled"
    assert_same(found, expected, 1e-9)
    compare_gradients(module, rows(40, width), [0.0, 0.4, 1.0], 1e-8, **options)


# ---- the text ----


@pytest.mark.parametrize("method", ["dopri5", "rk4", "euler"])
@pytest.mark.parametrize("solve_kind", SOLVES)
def test_text(solve_kind, method):
    """It includes the core alone, no header of torch, and is the same every time."""
    texts = []
    for _ in range(2):
        plan = read(Net(), rows(5, 2))
        texts.append(plan.source(find_method(method), Target("double", "pack", solve_kind)))
    assert texts[0] == texts[1]
    included = [line.split()[1].strip('"<>') for line in texts[0].splitlines() if line.startswith("#include")]
    assert included and all(name.startswith("core/") for name in included)
    assert "torch/" not in texts[0] and "ATen" not in texts[0]


def test_core_needs_no_torch():
    """Nor do the headers that the text includes."""
    for header in sorted((CSRC / "core").glob("*.h")):
        for line in header.read_text().splitlines():
            assert not (line.startswith("#include") and any(word in line for word in ("torch", "ATen", "c10"))), header.name


def test_math_of_the_check():
    """A program that is wrong in one number is refused: the check sees a wrong slope, product and second derivative."""
    net = Net()
    plan = plan_of_a_field.Plan(net, Structure(rows(5, 2)), (), False, by_time=True, second=True)
    from odenet_cuda.compiled.check import check_program

    structure, t = Structure(rows(5, 2)), torch.zeros((), dtype=D)
    check_program(plan, net, structure, t, ())
    assert plan.program.second is not None
    for owner, name in ((plan.program, "slopes"), (plan.program.product, "state"), (plan.program.second, "state")):
        right = getattr(owner, name)
        setattr(owner, name, right[::-1].copy())
        with pytest.raises(Unreadable, match="misread"):
            check_program(plan, net, structure, t, ())
        setattr(owner, name, right)


def test_texts_that_take_minutes_to_compile(monkeypatch):
    """As of attention over many numbers, which are written out one by one: in words, and the stepper serves."""
    field, y0 = odenet_cuda.compile(lambda t, y: torch.tanh(y).prod(1, keepdim=True) - y), rows(2, 7)
    plan, target = field.plan(Structure(y0), (), False), Target("double", "pack", "reverse")
    monkeypatch.setattr(plan_of_a_field, "_MOST_LINES", 20)
    with pytest.raises(build.Refused, match="lines, more than 20"):
        plan.load(find_method("rk4"), target)
    found, expected = (odenet_cuda.odeint(f, y0, torch.tensor([0.0, 0.1]), method="rk4") for f in (field, field.func))
    assert "lines, more than 20" in field.explain()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
