"""Numbers of Python that change between solves of a compiled field, and tensors that lie in the same memory or are one.

The program is run by NumPy beside func itself, as in test_compiled_guards.py: after every change it is as a fresh field would
be, or the stepper serves. Programs that serve every value are those that were read with the number as an argument."""

import collections
import enum
import functools
import math
import numbers
import operator
import weakref
from contextlib import suppress

import numpy as np
import pytest
import torch
from compiled_fields import rows
from test_compiled_guards import Y0, D, Holder, assert_fresh, number, slopes
from torch import nn

import odenet_cuda
from odenet_cuda.compiled.memory import has_memory
from odenet_cuda.compiled.trace import Unreadable
from odenet_cuda.problem import Structure

INDEX, SCALE, HALF = torch.tensor([1]), number(2.0), torch.tensor(0.1)  # an int64, a float64, a float32
MODES, TABLE = {10, 20}, {0: 5.0}
FLOATS, WHOLE = [0.5, 0.25, 0.1, -1.5, 0.0], [1, 2, 3, 10, 0, -1]


def swallowed(k):
    try:
        return float(k)
    except Exception:
        return 1.0


# By func of the state, the time and k; those of the first kind are read twice and serve all values.
ARGUMENTS = {
    "a factor": (lambda y, t, k: -k * y, FLOATS),
    "whole": (lambda y, t, k: -k * y + k, WHOLE),
    "a quotient of whole numbers": (lambda y, t, k: -y * (k / 3), WHOLE),
    "a quotient of one by it": (lambda y, t, k: -y * (1 / (k + 0.5)), WHOLE),
    "a large power": (lambda y, t, k: -y * (k**21 * 1e-20), WHOLE),
    "a difference that cancels": (lambda y, t, k: y * ((k + 1e8) - 1e8), FLOATS),
    "remainders": (lambda y, t, k: -y * (k // 3) - 0.1 * y * (k % -3) + y * (k & 1) + y * (k << 2), WHOLE),
    "rounded": (lambda y, t, k: -y * round(k, 1) + y * round(k), [2.3, 2.4, 2.675, 0.25, 0.35, 2.5]),
    "floor and ceiling": (lambda y, t, k: -y * math.floor(k) + math.ceil(k) - abs(k) + math.trunc(k), FLOATS),
    "beside the time": (lambda y, t, k: y * torch.exp(-k * t) + torch.stack([k * t, t + k, 1 - k * t]), FLOATS),
    "by float32": (lambda y, t, k: y * (k * HALF) + HALF - k, FLOATS),
    "in torch's functions": (lambda y, t, k: torch.where(y > k, y.clamp(max=2.0) * k, torch.sub(y, k)), FLOATS),
    "a power of the state": (lambda y, t, k: torch.sigmoid(y) ** k - k ** torch.tanh(y), [0.5, 2.0, 3.0, 0.25, 1.0]),
    "NumPy's": (lambda y, t, k: -k * y * (1 - k), [np.float64(x) for x in (0.5, 0.25, 0.1)]),
    "given on": (lambda y, t, k: functools.reduce(operator.mul, [k, 2, y, k]), FLOATS),
    "a mask": (lambda y, t, k: y + (y > 0).to(y.dtype) * k, FLOATS),
    "below the largest": (lambda y, t, k: y * k, [1, 2, 2**53, -(2**53)]),
}
# What may be read anew for every value, or refused.
OTHERS = {
    "in a set": (lambda y, t, k: -y * (3.0 if k in MODES else 1.0), [1, 2, 10, 11, 20]),
    "a key": (lambda y, t, k: -y * TABLE.get(k, 2.0), [3, 4, 0, 1]),
    "a key within": (lambda y, t, k: -y * {(3, 1): 5.0}.get((k, 1), 2.0), [1, 2, 3, 4]),
    "in a set of tuples": (lambda y, t, k: -y * (2 if (k, 0) in {(10, 0)} else 1), [1, 2, 10]),
    "in a set, computed": (lambda y, t, k: -y * (3.0 if 2 * k + 1 in {21, 41} else 1.0), [1, 2, 10, 11, 20]),
    "in a list": (lambda y, t, k: -y * (3.0 if k in [10, 20] else 1.0), [1, 2, 10, 11]),
    "isinstance of a class": (lambda y, t, k: -y * (min(k, 1.0) if isinstance(k, float) else k), [0.5, 0.25, 1.5]),
    "isinstance of a tensor": (
        lambda y, t, k: -y * (k if isinstance(k, torch.Tensor) else torch.tensor(k, dtype=torch.float32)),
        [0.5, 0.25, 0.1],
    ),
    "isinstance of an abstract class": (lambda y, t, k: -y * (min(k, 1) if isinstance(k, numbers.Real) else k), FLOATS),
    "its type": (lambda y, t, k: -y * (min(k, 1.0) if type(k) is float else k), [0.5, 0.25, 1.5]),
    "its class": (lambda y, t, k: -y * (min(k, 1.0) if k.__class__ is float else k), [0.5, 0.25, 1.5]),
    "a method": (lambda y, t, k: -y * (2.0 if k.is_integer() else k), [0.5, 0.25, 1.0]),
    "a method that it may have": (lambda y, t, k: -y * (2.0 if hasattr(k, "is_integer") else k), [0.5, 0.25, 1.0]),
    "an error that is caught": (lambda y, t, k: -y * swallowed(k), [0.5, 0.25, 1.0]),
    "a comparison": (lambda y, t, k: -y if k > 0.3 else y, FLOATS),
    "matched": (lambda y, t, k: -y * int(f"{k:.0f}"), [0.5, 3.25, 1.0]),
    "of math": (lambda y, t, k: -y * math.exp(k), [0.5, 0.25, 1.0]),
    "a loop": (lambda y, t, k: -y * len(range(k)), [1, 2, 3]),
    "an index": (lambda y, t, k: y * y[:, k : k + 1], [0, 1, 2]),
    "NumPy's functions": (lambda y, t, k: -y * float(np.tanh(k)) * np.ones(1)[0] * k, [0.5, 0.25, 1.0]),
    "a tensor made of it": (lambda y, t, k: -y * torch.tensor([k, 1.0, k], dtype=D), [0.5, 0.25, 1.0]),
    "a whole tensor": (lambda y, t, k: -y * (INDEX * k) / (INDEX / k), [1, 2, 3]),
    "beside whole tensors": (lambda y, t, k: -y * (INDEX / k), [0.5, 0.7, 0.3]),
    "a mask that is counted": (lambda y, t, k: y * ((y > 0) * k), [0.5, 0.1, 0.3]),
    "a quotient by zero": (lambda y, t, k: -y / (1 + abs(1 / k)), [2.0, 3.0, 0.0, 1.0]),
    "a root of a negative number": (lambda y, t, k: -y * k**0.5, [4.0, 9.0, -1.0, 2.0]),
    "a power that becomes a fraction": (lambda y, t, k: -y * (2**k), [1, 2, -1, 3]),
    "beyond float64": (lambda y, t, k: y * (k % 7), [1, 2, 2**62 + 1, 2**70, 10**400]),
    "too large for float64": (lambda y, t, k: y * (1e-20 * y * k), [1, 2, 2**53 + 1, 2**62 + 1, 2**70]),
    "an overflow": (lambda y, t, k: y * (10.0**k), [1, 2, 3, 400]),
    "other types": (lambda y, t, k: y * (k / 2), [1, 2, 3.0, True, np.float64(0.1), np.float32(0.1), np.int64(3)]),
    "of an enumeration": (lambda y, t, k: y * k * len(k.name), list(enum.IntEnum("E", "one two three"))),
    "of bits": (lambda y, t, k: y * ~k, [1, 2, 3]),
}


def compare(func, values, fresh):
    """With the number in an attribute and in args."""
    held = Holder(k=values[0])
    fields = [
        odenet_cuda.compile(lambda t, y: func(y, t, held.k)),
        odenet_cuda.compile(lambda t, y, k: func(y, t, k)),
    ]
    for value in [*values, values[1]]:
        held.k = value
        for field, args in zip(fields, ((), (value,)), strict=True):
            fresh(field, args)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(name):
    """One program for the first value and one for all others."""
    plans = collections.defaultdict(set)

    def fresh(field, args):
        assert_fresh(field, args)
        plans[field].add(field._latest)

    compare(*ARGUMENTS[name], fresh)
    assert all(len(found) == 2 for found in plans.values())


@pytest.mark.parametrize("name", OTHERS)
def test_what_numbers_are_asked(name):
    """Where func takes another way for another number it is read anew; where Python raises, so does func in the stepper."""

    def fresh(field, args):
        try:
            assert_fresh(field, args)
        except Unreadable:
            pass
        except (ZeroDivisionError, OverflowError, RuntimeError):  # func's own, and the stepper raises it too
            with pytest.raises(Unreadable):
                slopes(field, 0.0, Y0, args)

    compare(*OTHERS[name], fresh)


def test_numbers_in_float32():
    """Python computes in float64 there too: what cancels is not lost."""
    held = Holder(k=0.999)
    field, y = odenet_cuda.compile(lambda t, y: -y * (1 - held.k) + (held.k * t) * y), Y0.float()
    for k in (0.999, 0.9999, 0.99999):
        held.k = k
        expected = field.func(torch.tensor(0.0), y)
        torch.testing.assert_close(slopes(field, 0.0, y).float(), expected, rtol=1e-6, atol=0)  # of float32


# ---- one tensor at several places ----


class Weighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(number([1.0, 2.0, 3.0]))

    def forward(self, t, y, *others):
        return functools.reduce(lambda x, w: x + torch.sin(w * y), others, -self.w * y)


OTHER = number([3.0, 1.0, 0.5])
PLACES = {
    "an argument is the weight": lambda w: [(w,), (OTHER,), (w,)],
    "an argument is its memory": lambda w: [(w.detach(),), (OTHER,), (w.data,)],
    "two arguments are one": lambda w: [(OTHER, OTHER), (OTHER, OTHER.clone()), (OTHER, OTHER)],
    "two were two": lambda w: [(OTHER, OTHER.clone()), (OTHER, OTHER)],
    "all three": lambda w: [(w, w), (w, OTHER), (OTHER, w), (OTHER, OTHER)],
    "two and their memory": lambda w: [(w, w.detach()), (w.detach(), OTHER), (OTHER, w)],
}


@pytest.mark.parametrize("name", PLACES)
def test_one_tensor_at_several_places(name):
    """The values, and which tensors get a gradient."""
    func = Weighted()
    field = odenet_cuda.compile(func)
    for args in PLACES[name](func.w):
        assert_fresh(field, args)
        wanted = [place(args) for place in field._latest.wanted]
        assert any(x is func.w for x in wanted) and all(x.requires_grad for x in wanted)


def test_memory_of_several_tensors():
    """What only .data gives is taken for the one tensor that has this memory; where several have, the stepper serves."""
    held = Holder(old=None, w=nn.Parameter(number([1.0, 2.0, 3.0])))
    held.old = held.w.data
    field = odenet_cuda.compile(lambda t, y: -held.w.data * y + 0 * held.old)
    for old in (held.old, number([1.0, 1.0, 1.0])):
        held.old = old
        with suppress(Unreadable):
            assert_fresh(field)
    held.w = nn.Parameter(number([5.0, 2.0, 3.0]))
    assert_fresh(field)


# ---- values that are read, of tensors that share memory or have none ----

FLAT = number([1.0, 2.0, 3.0])


def of_storage(order, read):
    flat = FLAT.clone()
    views = {"a": flat[0:1], "b": flat[1:2], "whole": flat, "pair": flat[:2]}
    held = Holder(**{name: views[name] for name in order})
    func = {
        "a": lambda t, y: -float(held.a) * y + 0 * held.b,
        "b": lambda t, y: -float(held.b) * y + 0 * held.a,
        "sum": lambda t, y: -float(held.whole.sum()) * y + 0 * held.a,
        "part": lambda t, y: -float(held.pair[1]) * y + 0 * held.a,
    }[read]
    return func, flat


@pytest.mark.parametrize("read", ["a", "b", "sum", "part"])
@pytest.mark.parametrize("order", [("a", "b", "whole", "pair"), ("whole", "pair", "b", "a"), ("b", "pair", "a", "whole")])
def test_shared_storage(order, read):
    func, flat = of_storage(order, read)
    field = odenet_cuda.compile(func)
    for i in (0, 1, 2):
        flat[i] += 1.5
        with suppress(Unreadable):  # numbers that torch computes of what is read
            assert_fresh(field)


def lengths(read):
    index = torch.tensor([1])
    held = Holder(index=index, get=index.item, reference=weakref.ref(index))
    func = {
        "tensor_split": lambda t, y: torch.cat([p.sum(1, keepdim=True) * i for i, p in enumerate(held.index_split(y))] * 2, 1),
        "bound": lambda t, y: -y * held.get(),
        "weak": lambda t, y: -y * held.reference().item(),
        "narrow": lambda t, y: y * y.narrow(1, held.index[0], 1),
        "repeat": lambda t, y: y * torch.repeat_interleave(y[:, :1], held.index, 1).sum(1, keepdim=True),
    }[read]
    held.index_split = lambda y: (*torch.tensor_split(torch.cat([y, y], 1), held.index, 1), y[:, :1])
    return func, index


@pytest.mark.parametrize("read", ["tensor_split", "bound", "weak", "narrow", "repeat"])
def test_whole_numbers_that_are_read(read):
    func, index = lengths(read)
    field = odenet_cuda.compile(func)
    for value in (1, 2):
        index[0] = value
        with suppress(Unreadable):
            assert_fresh(field)


COMPLEX = torch.complex(rows(3), rows(3, seed=1))
LATER = {
    "negated": [COMPLEX.imag, COMPLEX.conj().imag, COMPLEX.imag.clone(), rows(3)],
    "negated first": [COMPLEX.conj().imag, COMPLEX.imag, COMPLEX.conj().imag],
    "other strides": [rows(3), rows(3, 3)[:, 1], rows(1).expand(3)],
    "of one number": [rows(1).expand(3), rows(3), rows(1).expand(3)],
    "other shapes": [rows(3), rows(3).reshape(1, 3), rows(1)],
}


@pytest.mark.parametrize("name", LATER)
@pytest.mark.parametrize("by_data", [False, True])
def test_another_tensor(name, by_data):
    held = Holder(w=LATER[name][0])
    field = odenet_cuda.compile(lambda t, y: -y * held.w * len(held.w))
    for other in LATER[name]:
        if by_data:
            held.w.data = other
        else:
            held.w = other
        with suppress(Unreadable):
            assert_fresh(field)


def test_shape_of_a_tensor_that_is_not_used():
    """Python reads the shape alone."""
    held = Holder(table=nn.Parameter(rows(3)))
    field = odenet_cuda.compile(lambda t, y: -y * len(held.table))
    for rows_now in (3, 7, 1):
        held.table.data = rows(rows_now)
        assert_fresh(field)


def test_sparse():
    """Made dense inside: right, or served by the stepper."""
    held = Holder(L=torch.eye(3, dtype=D).to_sparse())
    field = odenet_cuda.compile(lambda t, y: -y @ held.L.to_dense())
    for change in (lambda: None, lambda: setattr(held, "L", (2 * torch.eye(3, dtype=D)).to_sparse()), lambda: held.L.mul_(3)):
        change()
        with suppress(Unreadable):
            assert_fresh(field)


# ---- the order of what code goes through ----


def pop_and_append(d):
    d["a"] = d.pop("a")


ORDERED = {
    "dict": (dict, pop_and_append),
    "OrderedDict": (collections.OrderedDict, lambda d: d.move_to_end("a")),
    "ModuleDict": (nn.ModuleDict, pop_and_append),
    "its modules": (
        nn.ModuleDict,
        lambda d: d._modules.move_to_end("a") if hasattr(d._modules, "move_to_end") else pop_and_append(d),
    ),
}


class Times(nn.Module):
    def forward(self, y):
        return 2 * y


@pytest.mark.parametrize("name", ORDERED)
def test_order(name):
    make, change = ORDERED[name]
    layers = make({"a": Times(), "b": nn.Tanh(), "c": Times()})
    field = odenet_cuda.compile(lambda t, y: functools.reduce(lambda y, f: f(y), layers.values(), y))
    args = odenet_cuda.compile(lambda t, y, layers: functools.reduce(lambda y, f: f(y), layers.values(), y))
    for _ in range(3):
        assert_fresh(field)
        assert_fresh(args, (dict(layers.items()),))
        change(layers)


def test_order_stays():
    """Items that are put in again in the same order change nothing."""
    layers = {"a": Times(), "b": nn.Tanh()}
    field = odenet_cuda.compile(lambda t, y: functools.reduce(lambda y, f: f(y), layers.values(), y))
    plan = field.plan(Structure(Y0), (), False)
    for name in ("a", "b"):
        layers[name] = layers.pop(name)
    assert field.plan(Structure(Y0), (), False) is plan


# ---- which tensors are plain memory ----

UNUSUAL = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "conjugated": COMPLEX.conj,
    "negated": lambda: COMPLEX.conj().imag,
    "quantized": lambda: torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "lazy": lambda: nn.LazyLinear(3).weight,
    "meta": lambda: torch.empty(3, device="meta"),
    "empty": lambda: torch.empty(0),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", UNUSUAL)
def test_has_memory(name):
    assert not has_memory(UNUSUAL[name]())
    assert all(map(has_memory, (Y0, nn.Parameter(Y0), Y0.t(), Y0[1:], COMPLEX)))
