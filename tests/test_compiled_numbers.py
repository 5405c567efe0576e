"""Numbers of Python that change between solves of a compiled field, and tensors that lie in the same memory or are one.

The program is run by NumPy beside func itself, as in test_compiled_guards.py: after every change it is as a fresh field would
be, or the stepper serves. Programs that serve every value are those that were read with the number as an argument."""

import collections
import copy
import dataclasses
import enum
import functools
import math
import numbers
import operator
import types
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from compiled_fields import rows
from test_compiled_guards import Y0, D, Holder, assert_fresh, number, slopes
from torch import nn

import odenet_cuda
from odenet_cuda.compiled import refusals
from odenet_cuda.compiled.leaks import Leak
from odenet_cuda.compiled.memory import has_memory
from odenet_cuda.compiled.numbers import Number, Root
from odenet_cuda.compiled.plans import Plans
from odenet_cuda.compiled.reading import Reading
from odenet_cuda.compiled.trace import Unreadable
from odenet_cuda.compiled.walk import Slot
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


# ---- numbers within what is replaced: a case yields func with args, changes something, and yields args again ----


@dataclasses.dataclass
class Config:
    k: float
    name: str = "a"
    inner: Any = None

    @property
    def twice(self):
        return 2 * self.k

    def rate(self):
        return self.k


@dataclasses.dataclass
class Other(Config):
    pass


class Pair(NamedTuple):
    k: float
    n: int = 2


@dataclasses.dataclass(frozen=True)
class Frozen:
    k: float
    name: str = "a"


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    k: float


class Classed:
    k, pair, listed = 1.0, (1.0, 2.0), [1.0]

    def __call__(self, t, y):
        return -self.k * self.pair[1] * self.listed[0] * y


STANDARD, GLOBALS = Config(5.0), [1.0, 2.0]
WITHIN = {}


def within(make):
    WITHIN[make.__name__] = make
    return make


def replacing(func, first, *others):
    """In an attribute."""
    held = Holder(c=first)
    yield (lambda t, y: func(y, held.c)), ()
    for held.c in others:
        yield ()


def giving(func, first, *others):
    """In args."""
    yield (lambda t, y, *args: func(y, *args)), first
    yield from others


def count_in(y, c):
    c["n"] += 1
    return y * c["k"] * c["n"]


def itself(k):
    x = [k]
    x.append(x)
    return x


ANY = {  # of the state and what is replaced
    "strings": (
        lambda y, c: y * c.k * (2 if c.name == "a" else 3),
        [Config(1.0), Config(2.0), Config(3.0), Config(3.0, "b"), Config(4.0, "b"), Config(5.0, None), Config(5, "b")],
    ),
    "types of numbers": (
        lambda y, c: y * (c.k if isinstance(c.k, float) else 2 * c.k) * math.copysign(1, c.inner),
        [Config(1.0, "a", 0.0), Config(2.0, "a", 0.0), Config(3.0, "a", -0.0), Config(4, "a", -0.0), Config(True, "a", 0.0)],
    ),
    "classes": (
        lambda y, c: y * c.k * (2 if isinstance(c, Other) else 3),
        [Config(1.0), Config(2.0), Config(3.0), Other(3.0), Other(4.0), Config(5.0)],
    ),
    "one that is known": (
        lambda y, c: y * c.k * (2 if c is STANDARD else 3),
        [Config(1.0), Config(2.0), Config(3.0), STANDARD, Config(5.0)],
    ),
    "keys": (
        lambda y, c: y * sum(c.values()) * (2 if "z" in c else 3),
        [{"k": 1.0}, {"k": 2.0}, {"k": 3.0}, {"k": 3.0, "z": 1.0}, {"k": 4.0, "z": 1.0}, {1: 4.0}, {True: 5.0}, {"k": 3.0}],
    ),
    "order": (
        lambda y, c: y * functools.reduce(lambda s, x: s / 2 + x, c.values(), 0.0),
        [{"a": 1.0, "b": 2.0}, {"a": 2.0, "b": 3.0}, {"a": 3.0, "b": 2.0}, {"b": 3.0, "a": 2.0}, {"b": 3.0, "a": 4.0}],
    ),
    "lengths": (
        lambda y, c: y * sum(c) * len(c),
        [[1.0], [2.0], [3.0], [3.0, 1.0], [4.0, 1.0], (4.0, 1.0), (5.0, 1.0), []],
    ),
    "nested": (
        lambda y, c: y * c.k * c.inner["k"][0] * c.inner["k"][1][0] * sum([1 for _ in range(c.inner["k"][1][1])]),
        [
            Config(a, inner={"k": [b, (c, n)]})
            for a, b, c, n in [
                (1.0, 1.0, 1.0, 3),
                (2.0, 1.0, 1.0, 3),
                (3.0, 2.0, 2.0, 3),
                (4.0, 3.0, 1.0, 4),
                (5.0, 3.0, 2.0, 4),
            ]
        ],
    ),
    "named tuples": (
        lambda y, c: y * c[0] * c.n * len(c),
        [Pair(1.0), Pair(2.0), Pair(3.0), Pair(3.0, 4), Pair(4.0, 5), Pair(5, 5)],
    ),
    "namespaces": (
        lambda y, c: y * c.k * len(vars(c)),
        [types.SimpleNamespace(**x) for x in ({"k": 1.0}, {"k": 2.0}, {"k": 3.0}, {"k": 3.0, "z": 2.0}, {"k": 4.0, "z": 3.0})],
    ),
    "made anew of it": (
        lambda y, c: y * dataclasses.replace(c, k=2 * c.k).k + c.twice,
        [Config(float(k)) for k in range(1, 5)],
    ),
    "compared by its numbers": (lambda y, c: y * (2 if c == Config(3.0) else 3), [Config(float(k)) for k in (1, 2, 3, 4)]),
    "a key": (lambda y, c: y * {Pair(3.0): 2.0}.get(c, c.k), [Pair(float(k)) for k in (1, 2, 3, 4)]),
    "counted": (count_in, [{"k": float(k), "n": 0} for k in range(1, 5)]),
    "grown": (lambda y, c: (c.append(1.0), y * c[0] * len(c))[1], [[float(k)] for k in range(1, 5)]),
    "turned": (lambda y, c: (c.reverse(), y * c[0])[1], [[float(k), k + 1.0] for k in range(1, 5)]),
    "it itself in it": (
        lambda y, c: y * c[0] * (2 if c[-1] is c else 3),
        [itself(float(k)) for k in (1, 2, 3)] + [[4.0, [4.0]]],
    ),
}
WITHIN |= {f"{name}, in an attribute": lambda name=name: replacing(ANY[name][0], *ANY[name][1]) for name in ANY}
GIVEN = ("strings", "one that is known", "lengths", "order", "named tuples", "counted")
WITHIN |= {f"{name}, in args": lambda name=name: giving(ANY[name][0], *[(x,) for x in ANY[name][1]]) for name in GIVEN}


@within
def two_that_are_one():
    held = Holder(a=[1.0], b=[2.0])
    yield (lambda t, y: y * held.a[0] * held.b[0] * (2 if held.a is held.b else 3)), ()
    for held.a, held.b in (([2.0], [3.0]), ([4.0], [3.5]), ([one := [4.0], one][0], one), ([4.0], [3.5])):
        yield ()


@within
def parts_that_are_one():
    held = Holder(a=[[1.0], [2.0]])
    yield (lambda t, y: y * held.a[0][0] * held.a[1][0] * (2 if held.a[0] is held.a[1] else 3)), ()
    for held.a in ([[2.0], [3.0]], [[4.0], [3.0]], [[5.0]] * 2, [[6.0]] * 2, [[7.0]] * 2, [[4.0], [3.0]]):
        yield ()


@within
def arguments_that_are_one():
    return giving(
        lambda y, a, b: y * a[0] * b[0] * (2 if a is b else 3),
        ([1.0], [2.0]), ([2.0], [3.0]), ([4.0], [5.0]), ([4.0],) * 2, ([4.0], [4.0]), ([5.0],) * 2, ([4.0],) * 2,
    )  # fmt: skip


@within
def arguments_that_func_holds():
    held = Holder(d=[2.0], c=Config(2.0))
    yield (
        (lambda t, y, d, c: y * d[0] * c.k * held.c.k * (2 if d is held.d else 3) * (2 if c is held.c else 3)),
        (held.d, held.c),
    )
    for d in ([2.0], held.d, [3.0], [4.0], held.d):
        yield d, held.c
        yield d, Config(2.0)
    held.c = Config(3.0)
    yield held.d, held.c
    yield [2.0], Config(4.0)
    held.c = Config(5.0)
    yield [2.0], Config(6.0)
    yield [2.0], held.c


@within
def held_by_a_method():
    first = Config(1.0)
    held = Holder(c=first, f=first.rate)
    yield (lambda t, y: y * held.c.k * held.f()), ()
    for held.c in (Config(2.0), Config(3.0), Config(4.0)):
        yield ()
    for first.k in (6.0, 7.0):
        yield ()
        held.c = first
        yield ()
        held.c = Config(3.0)
        yield ()


@within
def changed_where_it_lies():
    held = Holder(c=Config(1.0, inner={"k": [1.0, 2.0]}))
    yield (lambda t, y: y * held.c.rate() * held.c.twice * sum(held.c.inner["k"])), ()
    for held.c in (Config(2.0, inner={"k": [1.0, 3.0]}), Config(3.0, inner={"k": [2.0, 4.0]})):
        yield ()
    held.c.inner["k"][0] = 9.0
    yield ()
    held.c.inner["k"].append(9.0)
    yield ()
    held.c.k = 8.0
    yield ()
    held.c.rate = lambda: 5.0
    yield ()


@within
def of_functions():
    held = Holder(c=Config(1.0))

    def f(t, y, k=(1.0, 2.0), *, d={"a": 1.0}):  # noqa: B006
        return y * k[0] * k[1] * d["a"] * sum(listed) * held.c.twice

    listed = [1.0, 2.0]
    yield f, ()
    for k in (2.0, 3.0, 4.0):
        f.__defaults__ = ((k, 1.5),)
        yield ()
        f.__kwdefaults__ = {"d": {"a": k}}
        yield ()
        listed = [k, 2.0]
        yield ()


@within
def of_a_property():
    class Mine(Config):
        pass

    mine = dataclasses.dataclass(Mine)
    held = Holder(c=mine(1.0))
    yield (lambda t, y: y * held.c.twice), ()
    for held.c in (mine(2.0), mine(3.0)):
        yield ()
    mine.twice = property(lambda self: 7 * self.k)
    yield ()


@pytest.mark.parametrize("name", WITHIN)
def test_numbers_within(name):
    """Served as they are now, or refused."""
    steps = WITHIN[name]()
    func, args = next(steps)
    field = odenet_cuda.compile(func)
    for given in (args, *steps):
        with suppress(Unreadable):
            assert_fresh(field, given)


# ---- how often a func is read that changes at every call ----

CLASSED = Classed()
READ_TWICE = {  # by how the i-th func is made of a holder
    "a config": lambda held, i: setattr(held, "c", Config(1.0 + i)) or (lambda t, y: -held.c.k * y, ()),
    "a frozen config": lambda held, i: setattr(held, "c", Frozen(1.0 + i)) or (lambda t, y: -held.c.k * y, ()),
    "one with slots": lambda held, i: setattr(held, "c", Slotted(1.0 + i)) or (lambda t, y: -held.c.k * y, ()),
    "a slot": lambda held, i: object.__setattr__(SLOTTED, "k", 1.0 + i) or (lambda t, y: -SLOTTED.k * y, ()),
    "a list": lambda held, i: setattr(held, "c", [1.0 + i, 2.0]) or (lambda t, y: -held.c[0] * y, ()),
    "a tuple": lambda held, i: setattr(held, "c", (1.0, 2.0 + i)) or (lambda t, y: -held.c[1] * y, ()),
    "a global": lambda held, i: globals().update(GLOBALS=[1.0 + i]) or (lambda t, y: -GLOBALS[0] * y, ()),
    "a class": lambda held, i: setattr(Classed, "k", 1.0 + i) or (CLASSED, ()),
    "a tuple of a class": lambda held, i: setattr(Classed, "pair", (1.0, 2.0 + i)) or (CLASSED, ()),
    "a dict in args": lambda held, i: (lambda t, y, d: -d["k"] * y, ({"k": 1.0 + i, "n": 2},)),
    "a list in args": lambda held, i: (lambda t, y, d: -d[0] * y, ([1.0 + i],)),
    "a named tuple in args": lambda held, i: (lambda t, y, p: -p.k * y, (Pair(1.0 + i),)),
    "a config in args": lambda held, i: (lambda t, y, c: -c.k * y, (Frozen(1.0 + i),)),
}
SLOTTED = Slotted(1.0)
READ_OFTEN = {  # the same, by what changes
    "a type is asked": (
        "held.k",
        lambda held, i: setattr(held, "k", 1.0 + i) or (lambda t, y: -held.k * y if type(y) is torch.Tensor else y, ()),
    ),
    "of math": ("held.k", lambda held, i: setattr(held, "k", 1.0 + i) or (lambda t, y: -math.exp(held.k) * y, ())),
    "a function": ("held.f", lambda held, i: setattr(held, "f", lambda t: i * t) or (lambda t, y: held.f(t) * y, ())),
    "a partial": (
        "held.f",
        lambda held, i: setattr(held, "f", functools.partial(torch.mul, other=INDEX)) or (lambda t, y: held.f(y), ()),
    ),
    "a list of tensors": ("held.e", lambda held, i: setattr(held, "e", [number(1.0)]) or (lambda t, y: -held.e[0] * y, ())),
    "an object in args": ("args[0]", lambda held, i: (lambda t, y, p: -p.k * y, (Holder(k=1.0 + i),))),
    "a string": ("held.name", lambda held, i: setattr(held, "name", "a" * i) or (lambda t, y: -len(held.name) * y, ())),
    "a tensor that Python reads": (
        "what func reads",
        lambda held, i: setattr(held, "k", number(1.0 + i)) or (lambda t, y: -held.k.item() * y, ()),
    ),
    "what cannot be read": ("held.k", lambda held, i: setattr(held, "k", i) or (lambda t, y: y.mean().item() * held.k * y, ())),
}


class Count:
    def __init__(self, patch):
        self.readings, read = 0, Plans._read

        def counted(*args):
            self.readings += 1
            return read(*args)

        patch.setattr(Plans, "_read", counted)


@pytest.mark.parametrize("name", [*READ_TWICE, *READ_OFTEN])
def test_how_often_it_is_read(name, monkeypatch):
    """Twice where the numbers become arguments; else a few times, until the stepper serves and names what changes."""
    monkeypatch.setattr(refusals, "MOST_AHEAD", 3)
    count, held, served, why = Count(monkeypatch), Holder(), [], ""
    change = READ_TWICE[name] if name in READ_TWICE else READ_OFTEN[name][1]
    field = odenet_cuda.compile(change(held, 0)[0])
    for i in range(1, 8):
        args = change(held, i)[1]
        try:
            assert_fresh(field, args)
            served.append(i)
        except Unreadable as error:
            why = str(error)
    if name in READ_TWICE:
        assert count.readings == 2 and len(served) == 7
        return
    assert count.readings == 3 and "reset()" in why and READ_OFTEN[name][0] in why
    before, _ = count.readings, field.reset()
    with suppress(Unreadable):
        assert_fresh(field, args)
    assert count.readings == before + 1


@pytest.mark.parametrize("every", [1, refusals.WORTH + 1])
def test_variants_that_stay(every, monkeypatch):
    """Those that take turns are read once each; what changes seldom is read again."""
    count = Count(monkeypatch)
    functions = [lambda y, i=i: (1.0 + i) * y for i in range(3 if every == 1 else 12)]
    held = Holder(f=functions[0])
    field = odenet_cuda.compile(lambda t, y: held.f(y))
    for i in range(12 * every if every > 1 else 60):
        held.f = functions[i // every % len(functions)]
        field.plan(Structure(Y0), (), False)
    assert count.readings == len(functions)


def test_shapes_that_stay(monkeypatch):
    """Of states that are one sample each has its own program, and all of their solves are worth readings."""
    count = Count(monkeypatch)
    field = odenet_cuda.compile(lambda t, y: -y * y.sum())
    for size in range(2, 2 + refusals.MOST_AHEAD + 2):
        for _ in range(2 + refusals.WORTH):
            field.plan(Structure(torch.ones(size, dtype=D)), (), False)
    assert count.readings == refusals.MOST_AHEAD + 2


# Of a number and another: whether they are one is no property of their values.
IDENTITIES = {
    "attributes": lambda y, held: y if held.k is held.other else -y,
    "not": lambda y, held: y if held.k is not held.d["k"] else -y,
    "a variable": lambda y, held: next(y if k is held.k else -y for k in (held.other,)),
    "an operator": lambda y, held: y if operator.is_(held.k, held.other) else -y,
    "a property": lambda y, held: y if held.same is held.k else -y,
}


class Numbered(Holder):
    same = property(lambda self: self.other)


@pytest.mark.parametrize("name", IDENTITIES)
def test_numbers_that_are_one(name):
    held = Numbered(k=1.5, other=None, d={})
    field = odenet_cuda.compile(lambda t, y: IDENTITIES[name](y, held))
    for value in (1.5, 2.5, 2.5, 3.5, 1.5):
        held.k = float(str(value))
        for other in (float(str(value)), held.k, float(str(value))):
            held.other = held.d["k"] = other
            with suppress(Unreadable):
                assert_fresh(field)


def test_members_that_are_one():
    """Those of an enum, and sentinels, are no numbers."""
    held = Holder(k=1.0, mode=SAME.one, other=MODES)
    field = odenet_cuda.compile(lambda t, y: held.k * (y if held.mode is SAME.one and held.other is MODES else -y))
    for held.k in FLOATS:
        assert_fresh(field)
    assert field._latest.guards.numbers


SAME = enum.Enum("SAME", "one two")

BEFORE_BACKWARD = {
    "nothing": lambda held, given: None,
    "a number": lambda held, given: setattr(held, "k", 3.0),
    "a number of args": lambda held, given: given.update(k=3.0),
    "a tensor": lambda held, given: setattr(held, "w", number(3.0)),
    "the data of a tensor": lambda held, given: setattr(held.w, "data", number(3.0)),
    "an equal parameter": lambda held, given: setattr(held, "p", nn.Parameter(number(1.0))),
}


@pytest.mark.parametrize("name", BEFORE_BACKWARD)
def test_second_derivatives_of_what_has_changed(name, quick_compiler):
    """They need func once more, which must be as it was in the solve."""
    held, given = Holder(k=2.0, w=number(2.0), p=nn.Parameter(number(1.0))), {"k": 2.0}
    field = odenet_cuda.compile(lambda t, y, x: -y * y * held.k * held.w * held.p * x["k"])
    y0 = (Y0 / 8).requires_grad_()
    ys = odenet_cuda.solve(field, y0, [0.0, 0.5], args=(given,), method="rk4", step_size=0.25).ys
    assert field.explain() == "compiled"
    BEFORE_BACKWARD[name](held, given)
    with nullcontext() if name == "nothing" else pytest.raises(RuntimeError, match="what it gave in the solve"):
        torch.autograd.grad(ys.square().sum(), [y0, held.p], create_graph=True)


def test_replaced_config_solved(quick_compiler):
    """With gradients, as the stepper."""
    net, held = nn.Linear(3, 3, dtype=D), Holder(c=None)
    func = lambda t, y, d: torch.tanh(net(y)) * held.c.k - d["k"][0] * y  # noqa: E731
    field = odenet_cuda.compile(func)
    for i in range(4):
        held.c = Frozen(1.0 + i / 8)
        found = []
        for f in (field, func):
            ys = odenet_cuda.solve(f, Y0, [0.0, 0.5], args=({"k": (0.5 - i, 1.0)},), method="rk4", step_size=0.25).ys
            found.append([ys.detach(), *torch.autograd.grad(ys.square().sum(), list(net.parameters()))])
        assert field.explain() == "compiled"
        for x, y in zip(*found, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)  # of float64, a few steps


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


# ---- what stands for a number while func is read, in other threads ----

ASKED = [
    lambda k: (k + 1, 2 - k, k * k, k / 3, 3 // k, k % 2, 2**k, -k, abs(k), divmod(7, k), divmod(k, 2), round(k, 1)),
    lambda k: (
        math.exp(k),
        math.floor(k),
        float(k),
        int(k),
        bool(k),
        hash(k),
        repr(k),
        f"{k:.2f}",
        k == 1.5,
        k > 1,
        k in {1.5},
    ),
    lambda k: (isinstance(k, float), k.is_integer(), k.__class__, max(k, 1.0), [k, 1.0].index(k), {1.5: 2}[k], copy.copy(k)),
    lambda k: (float(np.tanh(k)), (np.ones(2) * k).tolist(), float(np.float64(2) * k), float(np.maximum(k, 2))),
    lambda k: (k * Y0).tolist() + (Y0 - k).tolist() + torch.clamp(Y0, max=k).tolist() + torch.full((2,), k).tolist(),
]


def test_other_threads_find_numbers():
    """They compute with it as with the number, and what they write there stays; func alone is given what has no value."""
    held = Holder(k=1.5)
    root = Root(Slot(vars(held), "k", False, None, "held.k"), 0, {(): None}, {})
    reading = Reading(lambda t, y: y * held.k, (), [root])
    numbers = reading.numbers
    assert numbers
    with ThreadPoolExecutor(1) as pool:
        with numbers.given(()):
            stand_in = held.k
            assert type(stand_in) is Number
            found = pool.submit(lambda: [repr(ask(held.k)) for ask in ASKED]).result()
            with pytest.raises(Leak):
                math.exp(held.k)
        assert found == [repr(ask(1.5)) for ask in ASKED]
        assert held.k == 1.5 and type(held.k) is float
        assert math.exp(stand_in) == math.exp(1.5)  # of somebody who has kept it
        with pytest.raises(Unreadable, match="writes a number"), numbers.given(()):
            pool.submit(lambda: setattr(held, "k", 2.5)).result()
    assert held.k == 2.5
