"""What a field may read from Python, and the ways in which it may be another at the next call: as lines of a program."""

from dataclasses import dataclass

HEADER = """import functools, math, types
import numpy as np, torch, torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
import odenet_cuda

D = torch.float64
torch.manual_seed(0)

"""


@dataclass(frozen=True)
class Source:
    """term: of the slope of y [batch, 3]. Where it reads from: lines at the top, in the function around the class, in __init__.
    changes: statements. reads: a tensor that may require a gradient. @ stands for a number that tells sources apart."""

    term: str
    changes: tuple[str, ...]
    init: str = ""
    closure: str = ""
    top: str = ""
    reads: tuple[str, ...] = ()


def _values(place: str) -> tuple[str, ...]:
    """Statements that make a number another one, or another kind of it."""
    return tuple(f"{place} = {value}" for value in ("0.9", "0.9 + 1e-6", "1", "1.0", "True", "torch.tensor(0.3, dtype=D)"))


def _tensors(place: str) -> tuple[str, ...]:
    """The same of a tensor."""
    return (
        f"{place} = torch.tensor([0.3, 0.6, 0.9], dtype=D)",
        f"{place} = torch.tensor(0.7, dtype=D)",
        f"{place} = torch.tensor([[0.2, 0.4, 0.8]], dtype=D, requires_grad=True)",
        f"{place}.data.mul_(1.5)",
        f"{place} = {place}.detach().clone()",
        f"{place} = {place}.detach().requires_grad_()",
        f"{place} = {place}.detach().float()",
    )


_LINEAR = (
    "func.net@ = nn.Linear(3, 3).double()",
    "func.net@.weight.data.mul_(1.5)",
    "func.net@.weight.data = torch.ones(3, 3, dtype=D) / 3",
    "func.net@.weight = nn.Parameter(torch.eye(3, dtype=D))",
    "func.net@.bias = None",
    "func.net@.requires_grad_(False)",
    "func.net@.requires_grad_(True)",
    "func.net@.weight.requires_grad_(not func.net@.weight.requires_grad)",
    "func.net@.load_state_dict(nn.Linear(3, 3).double().state_dict(), strict=False)",
    "func.net@.register_forward_hook(lambda module, args, out: 2 * out)",
    "func.net@.register_forward_pre_hook(lambda module, args: (args[0] / 2,))",
    "func.net@.weight.register_hook(lambda g: g / 2) if func.net@.weight.requires_grad else None",
    "func.net@._forward_hooks.clear()",
    "func.net@.register_full_backward_hook(lambda module, gin, gout: (gin[0] / 2,))",
    "prune.l1_unstructured(func.net@, 'weight', 3)",
    "parametrizations.weight_norm(func.net@)",
    "func.net@.forward = lambda x: 2 * x",
    "func.net@ = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()",
    "func.net@ = nn.Identity()",
    "func.net@.__class__ = type('Twice', (nn.Linear,), {'forward': lambda self, x: 2 * F.linear(x, self.weight, self.bias)})",
    "nn.init.zeros_(func.net@.weight)",
)

_OBJECT = "types.SimpleNamespace(k=0.4, w=torch.tensor(0.6, dtype=D))"
_HELPER = "def helper@(y, k=0.5):\n    return k * torch.sin(y)\n"

SOURCES = (
    Source("self.k@ * y", _values("func.k@"), init="self.k@ = 0.5"),
    Source("torch.sin(self.net@(y))", _LINEAR, init="self.net@ = nn.Linear(3, 3).double()"),
    Source("self.net@(torch.sin(y))", _LINEAR, init="self.net@ = nn.Linear(3, 3).double(); nn.init.zeros_(self.net@.weight)"),
    Source("self.w@.to(y) * y", _tensors("func.w@"), init="self.w@ = torch.tensor(0.5, dtype=D)", reads=("func.w@",)),
    Source("self.b@ * y", ("func.b@ = torch.tensor(0.8, dtype=D)", "func.b@.mul_(2)", "func.b@ = None or func.b@.clone()"),
           init="self.register_buffer('b@', torch.tensor(0.5, dtype=D))"),
    Source("self.list@[0].to(y) * y", _tensors("func.list@[0]"), init="self.list@ = [torch.tensor(0.5, dtype=D)]",
           reads=("func.list@[0]",)),
    Source("sum(self.list@) * y", ("func.list@.append(0.4)", "func.list@[0] = 0.2", "func.list@ = [0.1, 0.3]"),
           init="self.list@ = [0.5]"),
    Source("len(self.list@) * y", ("func.list@.append(0)", "func.list@ = []"), init="self.list@ = [1]"),
    Source("self.dict@['k'] * y", _values("func.dict@['k']"), init="self.dict@ = {'k': 0.5}"),
    Source("self.dict@['a']['w'].to(y) * y", _tensors("func.dict@['a']['w']"),
           init="self.dict@ = {'a': {'w': torch.tensor(0.5, dtype=D)}}", reads=("func.dict@['a']['w']",)),
    Source("self.object@.k * y + self.object@.w.to(y)",
           (*_values("func.object@.k"), *_tensors("func.object@.w"), "func.object@ = types.SimpleNamespace(k=1, w=y0[0])"),
           init=f"self.object@ = {_OBJECT}", reads=("func.object@.w",)),
    Source("torch.as_tensor(self.array@).to(y)[40:43] * y",
           ("func.array@[41] += 1e-3", "func.array@ = func.array@ * 2", "func.array@[40] = 0", "func.array@.fill(0.1)"),
           init="self.array@ = np.linspace(0, 1, 2000)"),
    Source("float(self.array@[1]) * y", ("func.array@[1] = 0.7", "func.array@ = np.ones(3)", "func.array@[1] += 1e-6"),
           init="self.array@ = np.zeros(3) + 0.2"),
    Source("self.tuple@[1] * y", ("func.tuple@ = (0, 0.9)", "func.tuple@ = (0, 1)", "func.tuple@ = (0, True)"),
           init="self.tuple@ = (0, 0.5)"),
    Source("self.partial@(y)", ("func.partial@ = functools.partial(torch.mul, 0.9)", "func.partial@ = torch.cos",
           "func.partial@.args[0].mul_(2) if hasattr(func.partial@, 'args') and torch.is_tensor(func.partial@.args[0]) else 0"),
           init="self.partial@ = functools.partial(torch.mul, torch.tensor(0.5, dtype=D))"),
    Source("getattr(torch, self.name@)(y)", ("func.name@ = 'cos'", "func.name@ = 'tanh'", "func.name@ = 'exp'"),
           init="self.name@ = 'sin'"),
    Source("(torch.sin(y) if self.switch@ else torch.cos(y))", ("func.switch@ = not func.switch@", "func.switch@ = 0"),
           init="self.switch@ = True"),
    Source("(2 * y if self.training else y)", ("func.train()", "func.eval()")),
    Source("self.drop@(y)", ("func.eval()", "func.drop@.p = 0.0", "func.drop@ = nn.Tanh()"),
           init="self.drop@ = nn.Dropout(0.0)"),
    Source("self.norm@(y)", ("func.norm@.running_mean.add_(0.5)", "func.norm@.running_var.mul_(2)", "func.norm@.eps = 0.5",
           "func.norm@.eval()"), init="self.norm@ = nn.BatchNorm1d(3).double().eval()"),
    Source("sum(m(y) for m in self.many@)", ("func.many@[0], func.many@[1] = func.many@[1], func.many@[0]",
           "func.many@.append(nn.Linear(3, 3).double())", "func.many@[1] = nn.Sigmoid()", "del func.many@[0]"),
           init="self.many@ = nn.ModuleList([nn.Linear(3, 3).double(), nn.Tanh()])"),
    Source("sum(w for w in self.pl@) * y", ("func.pl@.append(torch.ones((), dtype=D))", "func.pl@[0] = nn.Parameter(y0[0, 0])"),
           init="self.pl@ = nn.ParameterList([torch.tensor(0.5, dtype=D)])"),
    Source("self.property@ * y", ("func._p@ = 0.9", "type(func).property@ = 0.2", "func._p@ = 1"),
           init="self._p@ = 0.5; type(self).property@ = property(lambda s: s._p@)"),
    Source("self.classy@ * y", ("type(func).classy@ = 0.8", "func.classy@ = 0.1"), init="type(self).classy@ = 0.5"),
    Source("k@ * y", _values("closure('k@').cell_contents"), closure="k@ = 0.5"),
    Source("w@.to(y) * y", _tensors("closure('w@').cell_contents"), closure="w@ = torch.tensor(0.5, dtype=D)",
           reads=("closure('w@').cell_contents",)),
    Source("inner@(y)", ("closure('inner@').cell_contents = torch.cos", "cells['d@']['k'] = 0.9"),
           closure="d@ = {'k': 0.5}; inner@ = lambda y: d@['k'] * y; cells['d@'] = d@"),
    Source("outer@(y)", ("cells['outer@'](torch.tensor(0.9, dtype=D))",),
           closure="outer@, cells['outer@'] = counter(torch.tensor(0.5, dtype=D))"),
    Source("G@ * y", _values("G@"), top="G@ = 0.5"),
    Source("G@.to(y) * y", _tensors("G@"), top="G@ = torch.tensor(0.5, dtype=D)", reads=("G@",)),
    Source("G@['k'] * y", _values("G@['k']"), top="G@ = {'k': 0.5}"),
    Source("torch.tanh(G@(y))", ("G@ = nn.Linear(3, 3).double()", "G@.weight.data.mul_(2)", "G@.requires_grad_(False)",
           "G@.register_forward_hook(lambda m, a, out: 3 * out)"), top="G@ = nn.Linear(3, 3).double()", reads=("G@.weight",)),
    Source("helper@(y)", ("helper@.__defaults__ = (0.9,)", "helper@ = torch.cos",
           "helper@.__code__ = (lambda y, k=0: y * y).__code__"), top=_HELPER),
    Source("level@() * y", ("H@ = 0.9", "H@ = 1"), top="H@ = 0.5\ndef level@():\n    return H@\n"),
    Source("args[0] * y", (*_values("args[0]"), "args[0] = y0[:, :1] * 2", "args[0] = y0[0] * 2", "args[0] = np.float64(0.3)",
           "args[0] = torch.ones(3, dtype=D).requires_grad_()", "args[0] = y0.detach().clone()", "args[0] = 0.3 - 1e-9")),
    Source("float(args[0] if not hasattr(args[0], 'mean') else args[0].mean()) * y", _values("args[0]")),
    Source("torch.as_tensor(args[1], dtype=y.dtype)[600:603] * y", ("args[1] = args[1] * 2", "args[1][601] = 3.0",
           "args[1][600:603] *= 1 + 1e-6", "args[1] = np.ones(2000)")),
    Source("args[2]['k'] * y", _values("args[2]['k']")),
    Source("math.sin(float(t) * 3) * y", ()),
    Source("float(np.interp(t.detach().numpy(), [0, 0.3, 1], [0.0, 0.0, 1.0])) * y", ()),
    Source("self.net@(torch.tensor([[float(t), t.item(), t.tolist()]], dtype=y.dtype)) * y", _LINEAR[1:3],
           init="self.net@ = nn.Linear(3, 3).double(); nn.init.zeros_(self.net@.weight); nn.init.zeros_(self.net@.bias)"),
    Source("y.detach().mean(1, keepdim=True).tolist()[0][0] * y", ()),
    Source("self.noise(y, 'e@')", ("func.e@ = None",), init="self.e@ = None"),
)  # fmt: skip

STATES = (
    "y0 = torch.linspace(-1, 1, 15, dtype=D).view(5, 3)",
    "y0 = torch.linspace(-1, 0.5, 3, dtype=D).view(1, 3)",
    "y0 = torch.linspace(-1, 0.5, 21, dtype=D).view(7, 3)",
    "func.float(); y0 = y0.float()",
    "func.double(); y0 = y0.double()",
    "compiled = odenet_cuda.compile(func)",
)


def program(sources: list[Source], wrap: str) -> str:
    """The text that defines func, compiled, y0 and args."""

    def lines(name: str, indent: int) -> str:
        found = [getattr(source, name).replace("@", str(i)) for i, source in enumerate(sources)]
        return "".join(" " * indent + line + "\n" for text in found for line in text.splitlines())

    terms = " + ".join(source.term.replace("@", str(i)) for i, source in enumerate(sources))
    return f"""{HEADER}{lines("top", 0)}
cells = {{}}
def counter(k):
    def inner(y):
        return k * y
    def put(value):
        nonlocal k
        k = value
    return inner, put

def make():
{lines("closure", 4)}
    class Field(nn.Module):
        def __init__(self):
            super().__init__()
{lines("init", 12)}
        def noise(self, y, name):
            if getattr(self, name) is None:
                setattr(self, name, y.detach() / 2)
            return getattr(self, name)[:1] * y
        def forward(self, t, y, *args):
            return -0.3 * y + {terms}
    return Field()

func = make()
def closure(name):
    forward = type(func).forward
    return dict(zip(forward.__code__.co_freevars, forward.__closure__))[name]

solved = {wrap}
compiled = odenet_cuda.compile(solved)
y0 = torch.linspace(-1, 1, 15, dtype=D).view(5, 3)
args = [0.5, np.linspace(0, 1, 2000), {{'k': 0.5}}]
"""
