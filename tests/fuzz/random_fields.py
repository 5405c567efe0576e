"""Random fields as the text of a Python program, from the operations that compiled fields read."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

BATCH = 3  # of the values that are computed while the text is written
MOST = 80  # numbers of a sample in a value

_FUNCTIONAL = [
    "celu", "elu", "gelu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "logsigmoid", "mish", "relu",
    "relu6", "selu", "sigmoid", "silu", "softplus", "softshrink", "softsign", "tanh", "tanhshrink",
]  # fmt: skip
_TORCH = [
    "exp", "exp2", "expm1", "sin", "cos", "atan", "sinh", "cosh", "tanh", "asinh", "erf", "erfc", "abs", "square", "sinc",
]  # fmt: skip

# {x}: any value of shape [batch, ...]
UNARY = [f"F.{name}({{x}})" for name in _FUNCTIONAL] + [f"torch.{name}({{x}})" for name in _TORCH] + [
    "F.gelu({x}, approximate='tanh')", "F.prelu({x}, torch.tensor([0.2], dtype={x}.dtype))", "F.threshold({x}, 0.1, -0.3)",
    "F.softplus({x}, beta=3.0, threshold=2.0)", "torch.log({x}.abs() + 1)", "torch.log2({x}.abs() + 1)",
    "torch.log10({x}.abs() + 1)", "torch.log1p({x} * {x})", "torch.sqrt(1 + {x} * {x})", "torch.rsqrt(1 + {x} * {x})",
    "1 / (2 + {x} * {x})", "torch.tan(torch.tanh({x}))", "torch.asin(torch.tanh({x}) / 2)", "torch.acos(torch.tanh({x}) / 2)",
    "torch.acosh(2 + {x} * {x})", "torch.atanh(torch.tanh({x}) / 2)", "{x} * torch.sign({x})", "{x}**2", "{x}**3",
    "(1 + {x} * {x})**2.5", "(2 + {x} * {x})**-1", "(1 + {x} * {x})**0.5", "2.0**torch.tanh({x})", "{x}.clamp(-0.2, 0.4)",
    "{x}.clamp(min=-0.2)", "{x}.clamp(max=0.3)", "torch.where({x} > 0, {x}, torch.exp({x}))",
    "{x} * (({x} > 0) & ({x} < 0.5) | ~({x} > -0.5))", "torch.sin({x}).masked_fill({x} > 0.3, 0.5)", "1 - {x}", "-{x}",
    "0.3 * {x} + 0.1", "torch.logit(torch.sigmoid({x}))", "torch.rad2deg({x}) / 90", "torch.zeros_like({x}) + {x} / 2",
    "torch.ones_like({x}) - {x}", "{x} * torch.logical_not({x} > 0.2)", "torch.full_like({x}, 0.7) * {x}",
    "{x} * {x}.detach()", "{x}.clone()", "derivative(lambda z: torch.sin(z) * z, {x})",
    "derivative(lambda z: z.tanh().sum(1), {x})", "torch.round(2 * {x} + 0.03)", "torch.fmod({x} + 0.03, 0.5)",
    "torch.remainder({x} + 0.03, 0.5)",
]  # fmt: skip

# {x}, {b}: values that broadcast to the shape of {x}
BINARY = [
    "{x} + {b}", "{x} - 0.3 * {b}", "{x} * {b}", "{b} - {x}", "{x} / (2 + {b} * {b})", "torch.atan2({x}, 2 + torch.cos({b}))",
    "torch.hypot({x}, 1 + {b} * {b})", "torch.maximum({x}, {b})", "torch.minimum({x}, {b})", "torch.lerp({x}, {b}, 0.3)",
    "torch.where({x} > {b}, {x}, torch.sin({b}))", "torch.addcmul({x}, {x}, {b}, value=0.5)", "torch.add({x}, {b}, alpha=0.3)",
    "torch.addcdiv({x}, {b}, 2 + {b} * {b}, value=0.5)", "torch.logaddexp({x}, {b})", "torch.xlogy({x}, 1 + {b} * {b})",
    "(1 + {x} * {x})**torch.sin({b})", "{x} * torch.cos(3 * {b})", "{x} * torch.sigmoid({b})",
]  # fmt: skip

# {b}: a Python number
NUMBER = ["{x} + {b}", "{x} * {b}", "{b} - {x}", "{x} / (1 + {b})", "(1 + {x} * {x})**{b}", "torch.where({x} > {b}, {x}, {b})"]

# {x}: [batch, n]
VECTOR = [
    "torch.softmax({x}, -1)", "torch.log_softmax({x}, 1)", "F.layer_norm({x}, ({n},))", "F.rms_norm({x}, ({n},))",
    "{x}.flip(1) * 2", "torch.roll({x}, 1, 1) - torch.roll({x}, -1, 1)", "{x}.cumsum(1)", "(1 + {x} * {x} / 9).cumprod(1)",
    "{x} * {x}.sum(1, keepdim=True)", "{x} - {x}.mean(-1, keepdim=True)", "{x} / (1 + {x}.norm(dim=1, keepdim=True))",
    "{x} * (1 + {x} * {x} / 9).prod(1, keepdim=True)", "{x} - {x}.logsumexp(1, keepdim=True)",
    "{x} - {x}.amax(1, keepdim=True)",
    "{x} - {x}.amin(1, keepdim=True)", "{x} * {x}.var(1, unbiased=False, keepdim=True)",
    "torch.cat([{x}, {x}[:, :1] * 2], 1)", "torch.cat([torch.sin(part) for part in {x}.split([1, {n} - 1], 1)], 1)",
    "torch.cat([{x}[:, ::2], {x}[:, 1::2]], 1)", "torch.cat({x}.chunk(2, 1)[::-1], 1)", "{x}[..., -1:] * {x}",
    "{x}[:, [0, -1, 0]]", "{x}.index_select(1, torch.tensor([0, {n} - 1]))", "F.pad({x}, (1, 2), value=0.5)",
    "{x}[:, None] * torch.sin({x})[:, :2, None]", "{x}[:, :1].expand(-1, {n}) * {x}", "{x}[:, :2].repeat(1, 2)",
    "{x}.repeat_interleave(2, 1)", "torch.stack([a * b for a, b in zip({x}.unbind(1), {x}.flip(1).unbind(1))], 1)",
    "torch.cat([{x}, torch.ones_like({x}[:, :1]) * time], 1)", "{x} * torch.cos(time)", "{x} + torch.sin(3 * time) * 0.5",
    "{x}.diff(dim=1)", "torch.cat([{x}, {x}.diff(dim=1)], 1)", "F.normalize({x}, dim=-1)", "{x}[:, :, None]", "{x}[:, None, :]",
    "torch.bmm({x}[:, None, :], torch.sin({x})[:, :, None]).squeeze(-1) * {x}", "{x} @ torch.ones({n}, 2, dtype={x}.dtype)",
    "(torch.softmax({x}[:, :, None] * {x}[:, None, :], -1) @ {x}[:, :, None]).squeeze(-1)", "{x} * torch.arange({n})",
    "torch.linalg.vector_norm({x}, 1, dim=1, keepdim=True) - {x}",
    "{x} * F.cosine_similarity({x}, torch.cos({x}), -1)[:, None]", "assigned({x})", "assigned({x}.sin()) * {x}",
    "{x}.sort(1).values", "{x}.topk(2, 1).values", "{x}.cumprod(1)", "{x}.gather(1, {x}.argsort(1)[:, :2])",
    "{x}.scatter(1, {x}.argsort(1)[:, :1], 0.5)",
    "{x} * torch.bucketize({x}.detach(), torch.linspace(-3, 3, 8, dtype={x}.dtype))",
    "torch.linspace(-3, 3, 9, dtype={x}.dtype)[torch.bucketize({x}.detach(), torch.linspace(-2, 2, 8, dtype={x}.dtype))] * {x}",
    "{x}[:, (2 * time).long().reshape(()).clamp(0, 1)][:, None] * {x}",
    "F.conv1d({x}[:, None], torch.ones(2, 1, 2, dtype={x}.dtype) / 3, padding=1).flatten(1)",
]  # fmt: skip

# {x}: [batch, n, m]
MATRIX = [
    "{x}.flatten(1)", "{x}.sum(2)", "{x}.mean(1)", "{x}.transpose(1, 2)", "{x}.permute(0, 2, 1).contiguous()", "{x}.amax(2)",
    "torch.bmm({x}, {x}.transpose(1, 2))", "torch.softmax({x}, 1)", "{x} - {x}.mean((1, 2), keepdim=True)", "{x}[:, 0]",
    "{x}[:, :, -1]", "{x}.cumsum(2)", "F.layer_norm({x}, ({n}, {m}))", "{x}.reshape(-1, {n} * {m})", "{x}.norm(dim=2)",
    "torch.einsum('bij,bik->bjk', {x}, torch.tanh({x}))", "{x}.movedim(2, 1).flatten(1)", "torch.logsumexp({x}, 2)",
]  # fmt: skip

HEADER = """import torch, torch.nn.functional as F
from torch import nn
import odenet_cuda

D, g = torch.float64, torch.Generator().manual_seed({seed})

def assigned(x):
    d = torch.zeros_like(x)
    d[:, 0] = x[:, -1] ** 2
    d[:, 1:] = d[:, :1] - x[:, :-1]
    d[:, -1] *= 0.5
    return d


def derivative(f, x):
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        return torch.autograd.grad(f(x).sum(), x, create_graph=True)[0]

"""


@dataclass
class RandomField:
    """The text of a class Field, the states and arguments it is for, and how to make them."""

    text: str
    leaves: list[str]  # expressions of the state's leaves, for a batch B
    arguments: list[str]
    single: bool  # the state is a tensor, not a tuple of them
    lines: list[str] = field(default_factory=list)

    def program(self, dtype: str, batch: int) -> str:
        state = self.leaves[0] if self.single else f"({', '.join(self.leaves)},)"
        args = "".join(f"{argument}, " for argument in self.arguments)
        make = f"B = {batch}\nfunc = Field().to(torch.{dtype})\ny0, args = {state}, ({args})\n"
        if dtype == "float32":
            make += "y0, args = torch.utils._pytree.tree_map(lambda x: x.float() if torch.is_tensor(x) else x, (y0, args))\n"
        return self.text + make


class Writer:
    """Writes lines, and runs them, so that shapes are known."""

    def __init__(self, draw: Callable, leaves: list[tuple[int, ...]], arguments: list[str]):
        self.draw, self.parameters, self.lines = draw, [], []
        self.names: dict[str, Any] = {"torch": torch, "F": F, "D": torch.float64}
        exec(HEADER.format(seed=0).replace("import odenet_cuda", ""), self.names)
        self.names["self"] = type("Self", (), {})()
        self.names["time"] = torch.full((1, 1), 0.3, dtype=torch.float64)
        self.values: list[str] = []
        for i, shape in enumerate(leaves):
            self.keep(f"y{i}", torch.rand(BATCH, *shape, generator=self.names["g"], dtype=torch.float64) * 1.6 - 0.8)
        for i, text in enumerate(arguments):
            self.names["B"] = BATCH
            self.keep(f"a{i}", torch.as_tensor(eval(text, self.names), dtype=torch.float64))
        self.numbers = [f"a{i}" for i, text in enumerate(arguments) if "rand" not in text]

    def keep(self, name: str, value: Tensor) -> None:
        self.names[name] = value
        self.values.append(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.names[name].shape)

    def one(self, choices: list[Any]) -> Any:
        return choices[self.draw(st.integers(0, len(choices) - 1))]

    def parameter(self, *shape: int, scale: float = 1.0) -> str:
        name = f"self.w{len(self.parameters)}"
        makers = ["nn.Parameter({})"] * 3 + ["nn.Parameter({}, requires_grad=False)"]
        made = f"torch.randn({list(shape)}, generator=g, dtype=D) * {scale:.3g}"
        text = self.one(makers).format(made)
        self.parameters.append(f"{name} = {text}")
        setattr(self.names["self"], name[5:], eval(text, {**self.names, "nn": torch.nn}))
        return name

    def linear(self, x: str, out: int) -> str:
        """x [batch, n] -> [batch, out]."""
        n = self.shape(x)[1]
        w = self.parameter(out, n, scale=1 / math.sqrt(n))
        b = self.parameter(out, scale=0.3)
        return self.one([f"F.linear({x}, {w}, {b})", f"F.linear({x}, {w})", f"{x} @ {w}.t() + {b}", f"({w} @ {x}.t()).t()"])

    def operand(self, x: str) -> str:
        """What broadcasts to the shape of x: a value, a weight, an argument."""
        shape = self.shape(x)
        fits = [name for name in self.values if _fits(self.shape(name), shape) and name != x]
        kind = self.draw(st.integers(0, 3))
        if fits and kind > 0:
            return self.one(fits)
        return self.parameter(*self.one([shape[1:], shape[-1:], ()]), scale=0.7)

    def step(self) -> None:
        """One more line."""
        inputs = [name for name in self.values if len(self.shape(name)) in (2, 3) and self.shape(name)[0] == BATCH]
        x = inputs[-1 - min(self.draw(st.integers(0, 3)), len(inputs) - 1)]
        shape = self.shape(x)
        kind = self.draw(st.integers(0, 9))
        if kind <= 2:
            text = self.one(UNARY).format(x=x)
        elif kind <= 4:
            b = self.operand(x)
            text = self.one(NUMBER if b in self.numbers else BINARY).format(x=x, b=b)
        elif len(shape) == 3:
            text = self.one(MATRIX).format(x=x, n=shape[1], m=shape[2])
        elif kind <= 6:
            text = self.linear(x, self.draw(st.one_of(st.integers(1, 12), st.integers(1, 70))))
        else:
            text = self.one(VECTOR).format(x=x, n=shape[1])
        self.line(text)

    def line(self, text: str) -> str | None:
        try:
            value = eval(text, self.names)
        except (RuntimeError, IndexError, ValueError):  # does not fit these shapes
            return None
        bad = not isinstance(value, Tensor) or value.dtype != torch.float64 or value.numel() > BATCH * MOST or not value.numel()
        if bad or value.shape[:1] != (BATCH,) or not value.isfinite().all():
            return None
        if float(value.detach().abs().max()) > 8:
            text, value = f"torch.tanh({text})", torch.tanh(value)
        name = f"x{len(self.lines)}"
        self.lines.append(f"{name} = {text}")
        self.keep(name, value.detach())
        return name

    def slope(self, i: int) -> str:
        """The slope of leaf i, from one of the latest values."""
        leaf = f"y{i}"
        latest = [name for name in self.values[-4:] if self.shape(name)[:1] == (BATCH,)] or [leaf]
        x = self.one(latest)
        if self.shape(x) != self.shape(leaf):
            flat = x if len(self.shape(x)) == 2 else self.line(f"{x}.reshape(-1, {math.prod(self.shape(x)[1:])})")
            assert flat is not None
            x = self.line(self.linear(flat, math.prod(self.shape(leaf)[1:])))
            assert x is not None
        text = f"{x}.reshape({leaf}.shape)" if self.shape(x) != self.shape(leaf) else x
        wrap = self.one(["{x}", "torch.tanh({x})", "{x} * 0.1 - 0.2 * {y}", "torch.sin({x}) - {y}"])
        return wrap.format(x=text, y=leaf)


def _fits(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    try:
        return tuple(torch.broadcast_shapes(shape, to)) == to and (len(shape) in (0, 1) or len(shape) == len(to))
    except RuntimeError:
        return False


@st.composite
def fields(draw: Callable, lines: int = 8) -> RandomField:
    """A field of tensors or tuples of them, with and without arguments."""
    sizes = st.one_of(st.integers(1, 12), st.integers(1, 70))
    leaf = st.one_of(sizes.map(lambda n: (n,)), sizes.map(lambda n: (n,)), st.tuples(st.integers(1, 4), st.integers(1, 5)))
    shapes = draw(st.lists(leaf, min_size=1, max_size=3))
    single = len(shapes) == 1 and draw(st.booleans())
    random = "torch.rand({}, generator=g, dtype=D) * 1.6 - 0.8"
    kinds = [random.format(f"B, {shapes[0][0]}"), random.format(f"B, {shapes[0][0]}"), random.format("B, 1"), "0.7", "2"]
    kinds += [random.format(f"{shapes[0][-1]}")]
    arguments = [kinds[i] for i in draw(st.lists(st.integers(0, len(kinds) - 1), max_size=2))]
    writer = Writer(draw, shapes, arguments)
    for _ in range(draw(st.integers(1, lines))):
        writer.step()
    slopes = [writer.slope(i) for i in range(len(shapes))]
    names = ", ".join(f"y{i}" for i in range(len(shapes)))
    given = "".join(f", a{i}" for i in range(len(arguments)))
    body = [f"{names}{'' if single else ','} = y", "time = t.reshape(-1, 1)", *writer.lines]
    body.append(f"return {slopes[0]}" if single else f"return ({', '.join(slopes)},)")
    text = HEADER.format(seed=draw(st.integers(0, 5))) + "class Field(nn.Module):\n    def __init__(self):\n"
    text += "        super().__init__()\n" + "".join(f"        {line}\n" for line in writer.parameters)
    text += f"    def forward(self, t, y{given}):\n" + "".join(f"        {line}\n" for line in body) + "\n"
    leaves = [random.format(", ".join(map(str, ("B", *shape)))) for shape in shapes]
    return RandomField(text, leaves, arguments, single)
