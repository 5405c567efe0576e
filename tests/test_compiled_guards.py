"""What a compiled field read from Python: after every change it is as a fresh field would be, or refused in words.

The program is run by NumPy beside func itself, so that nothing is compiled but where said."""

import argparse
import array
import collections
import contextvars
import copy
import ctypes
import dataclasses
import enum
import functools
import io
import itertools
import math
import operator
import pickle
import random
import sys
import types
import weakref
from os import getenv

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compiled_fields import Net, rows
from torch import nn
from torch.nn.utils import parametrize, prune

import odenet_cuda
from odenet_cuda import ODEBlock, solve
from odenet_cuda.compiled.check import run_program
from odenet_cuda.compiled.trace import Unreadable
from odenet_cuda.problem import Structure

D = torch.float64
Y0 = rows(5, 3)
TOLERANCE = 1e-12  # of one evaluation in float64 beside another


def number(x):
    return torch.tensor(x, dtype=D)


def linear(seed=0, width=3):
    layer = nn.Linear(width, width, dtype=D)
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters()):
            parameter.copy_(rows(*parameter.shape, seed=seed + i))
    return layer


def slopes(field, t, y, args=()):
    """Those of the program that a solve would run now. Raises Unreadable where the stepper would serve."""
    plan = field.plan(Structure(y), args, False)
    batch = 1 if plan.whole else len(y)

    def flat(x):
        return x.detach().double().reshape(batch, -1).numpy()

    values = {node: place(args).detach() for node, place in plan.places.items()}
    arrays = [plan.array(node, values).numpy() for node in plan.program.constants]
    given = [flat(args[i]) for i in plan.batched]
    inputs = {
        "t": np.full((batch, 1), float(t)),
        "y": flat(y),
        "arguments": np.concatenate(given, 1) if given else np.zeros((batch, 0)),
        "g": np.ones((batch, y.numel() // batch)),
    }
    return torch.from_numpy(run_program(plan.program, inputs, arrays)[0]).reshape(y.shape)


def assert_fresh(field, args=(), y=Y0):
    """The program gives what func gives now."""
    for t in (0.0, 0.7, 2.5):
        t = torch.tensor(t, dtype=y.dtype)
        expected = field.func(t, y.clone(), *args).detach()
        torch.testing.assert_close(slopes(field, t, y, args).to(y.dtype), expected, rtol=TOLERANCE, atol=TOLERANCE)


# ---- changes between calls: a case yields the func, changes something, and yields again ----

SELF = types.ModuleType("a_users_module")
exec("k = 2.0\ndef g(y):\n    return -k * y\n", SELF.__dict__)
GLOBAL, LIST, GETTER = 2.0, [1.0, 2.0], operator.attrgetter
WEIGHT = number(1.5)
CASES = {}


def case(make):
    CASES[make.__name__] = make
    return make


class Holder:
    def __init__(self, **values):
        self.__dict__.update(values)


SCALE = Holder(k=2.0)


@case
def tensor_in_dict():
    d = {"k": number(1.0)}
    yield lambda t, y: -d["k"] * y
    d["k"] = number(2.0)
    yield


@case
def tensor_in_list():
    d = [number(1.0)]
    yield lambda t, y: -d[0] * y
    d[0] = number(2.0)
    yield
    d[:] = [number(3.0)]
    yield


@case
def tensor_in_tuple_in_list():
    d = [(number(1.0), 3.0)]
    yield lambda t, y: -d[0][0] * d[0][1] * y
    d[0] = (number(2.0), 3.0)
    yield
    d[0] = (number(2.0), 5.0)
    yield


@case
def tensor_in_object():
    h = Holder(inner=Holder(k=number(1.0)))
    yield lambda t, y: -h.inner.k * y
    h.inner.k = number(2.0)
    yield
    h.inner = Holder(k=number(3.0))
    yield


@case
def tensor_in_partial():
    d = {"w": number(1.0)}
    p = functools.partial(lambda t, y, w, d: -w * d["w"] * y, w=number(2.0), d=d)
    yield p
    d["w"] = number(2.0)
    yield
    p.keywords["w"] = number(4.0)
    yield


@case
def partial_of_partial():
    d = [1.5]
    yield functools.partial(functools.partial(lambda d, k, t, y: -k * d[0] * y, d), 2.0)
    d[0] = 2.5
    yield


@case
def closure_of_a_helper():
    k, other = number(1.0), 1.0

    def helper(y):
        return -k * other * y

    yield lambda t, y: helper(y)
    k = number(2.0)
    yield
    other = 3.0
    yield


@case
def deep_closure():
    k = 1.0

    def a():
        def b(y):
            return (lambda z: k * z)(y)

        return b

    b = a()
    yield lambda t, y: b(y)
    k = 2.0
    yield


@case
def global_number():
    global GLOBAL
    yield lambda t, y: -GLOBAL * y
    GLOBAL = 3.0
    yield
    GLOBAL = 2.0
    yield


@case
def global_tensor():
    global WEIGHT
    yield lambda t, y: -WEIGHT * y
    WEIGHT = number(0.25)
    yield


@case
def global_list():
    yield lambda t, y: -sum(LIST) * y
    LIST[0] = 7.0
    yield
    LIST.append(1.0)
    yield
    LIST[:] = [1.0, 2.0]


@case
def module_of_python():
    yield lambda t, y: -SELF.k * SELF.g(y)
    SELF.k = 3.0
    yield
    old, SELF.g = SELF.g, lambda y: y
    yield
    SELF.g, SELF.k = old, 2.0
    yield


@case
def defaults():
    def f(t, y, k=2.0, *, q=1.0):
        return -k * q * y

    yield f
    f.__defaults__ = (3.0,)
    yield
    f.__kwdefaults__["q"] = 4.0
    yield


@case
def code_of_a_function():
    def f(t, y):
        return -y

    yield f
    f.__code__ = (lambda t, y: -2 * y).__code__
    yield


@case
def attribute_of_a_function():
    def f(t, y):
        return -f.k * y

    f.k = 2.0
    yield f
    f.k = 3.0
    yield


@case
def class_attribute():
    class A:
        k = 2.0

        def f(self, t, y):
            return -self.k * y

    a = A()
    yield a.f
    A.k = 3.0
    yield
    a.k = 5.0
    yield


@case
def method_replaced():
    class A:
        def g(self, y):
            return -y

        def f(self, t, y):
            return self.g(y)

    a = A()
    yield a.f
    A.g = lambda self, y: -2 * y
    yield
    a.g = lambda y: -3 * y
    yield


@case
def inherited_method_overridden():
    class A:
        def g(self, y):
            return -y

        def f(self, t, y):
            return self.g(y)

    class B(A):
        pass

    yield B().f
    B.g = lambda self, y: -2 * y
    yield


@case
def static_class_and_property():
    class A:
        k, c = 2.0, 1.0

        @staticmethod
        def s(y):
            return -HELD.k * y

        @classmethod
        def of(cls, y):
            return cls.c * y

        @property
        def p(self):
            return self.hidden

        def f(self, t, y):
            return self.s(y) + self.of(y) * self.p

    a = A()
    a.hidden = 1.0
    yield a.f
    HELD.k = 3.0
    yield
    A.c = 4.0
    yield
    a.hidden = 0.5
    yield
    A.p = property(lambda self: 9.0)
    yield
    HELD.k = 2.0


HELD = Holder(k=2.0)


@case
def slots():
    class A:
        __slots__ = ("k", "w")

        def __call__(self, t, y):
            return -self.k * self.w * y

    a = A()
    a.k, a.w = 2.0, number(1.0)
    yield a
    a.k = 3.0
    yield
    a.w = number(2.0)
    yield


@case
def data_class():
    @dataclasses.dataclass
    class A:
        k: float
        inner: dict

        def __call__(self, t, y):
            return -self.k * self.inner["a"]["b"] * y

    a = A(2.0, {"a": {"b": 1.0}})
    yield a
    a.inner["a"]["b"] = 2.0
    yield
    a.k = 3.0
    yield


@case
def named_tuple_and_enum():
    class Kind(enum.Enum):
        ONE, TWO = 1, 2

    P = collections.namedtuple("P", "k kind")
    h = Holder(p=P(2.0, Kind.ONE))
    yield lambda t, y: -h.p.k * y if h.p.kind is Kind.ONE else y
    h.p = P(3.0, Kind.ONE)
    yield
    h.p = P(3.0, Kind.TWO)
    yield


@case
def numpy_scalars():
    h = Holder(k=np.float64(2.0), n=np.int32(2))
    yield lambda t, y: -float(h.k) * int(h.n) * y
    h.k = np.float64(3.0)
    yield
    h.n = np.int32(3)
    yield


@case
def numpy_arrays():
    a = np.array([1.0, 2.0, 3.0])
    h = Holder(a=a, zero=np.array(2.0))
    yield lambda t, y: -torch.as_tensor(h.a) * y * float(h.zero)
    a[1] = 7.0
    yield
    a[1] += 1e-9
    yield
    h.zero[...] = 3.0
    yield
    h.a = np.array([1.0, 1.0, 1.0])
    yield


@case
def numpy_from_numpy():
    a = np.array([1.0, 2.0, 3.0])
    w = torch.from_numpy(a)
    yield lambda t, y: -w * y
    a[:] = 5.0
    yield


@case
def numpy_sum():
    a = np.array([1.0, 2.0, 3.0])
    yield lambda t, y: -a.sum() * y
    a[0] = 5.0
    yield


@case
def strings_and_branches():
    h = Holder(kind="one", flag=True, none=None)

    def f(t, y):
        if h.none is not None:
            return y * h.none
        return -y if h.flag else (y if h.kind == "one" else 2 * y)

    yield f
    h.flag = False
    yield
    h.kind = "two"
    yield
    h.none = number(3.0)
    yield


@case
def sets():
    s = {1, 2}
    yield lambda t, y: -y if 3 in s else y
    s.remove(1)
    s.add(3)
    yield


@case
def lambda_in_list():
    d = [lambda y: -y]
    yield lambda t, y: d[0](y)
    d[0] = lambda y: -2 * y
    yield
    d.append(None)
    yield


@case
def callable_object():
    class A:
        def __init__(self, k):
            self.k = k

        def __call__(self, t, y):
            return -self.k * y

        def __mul__(self, y):
            return self.k * y

    a, h = A(2.0), Holder()
    h.a = a
    yield lambda t, y: h.a(t, y) + h.a * y
    a.k = 3.0
    yield
    h.a = A(5.0)
    yield
    A.__mul__ = lambda self, y: 0 * y
    yield


@case
def names_in_strings():
    h = Holder(k1=1.0, k2=2.0, which="k1")
    yield lambda t, y: -getattr(h, h.which) * y
    h.k1 = 3.0
    yield
    h.which = "k2"
    yield
    h.k2 = 0.5
    yield


@case
def vars_of_an_object():
    h = Holder(k1=1.0)
    yield lambda t, y: -sum(vars(h).values()) * y
    h.k2 = 3.0
    yield


@case
def dicts_that_grow():
    d = collections.OrderedDict(a=1.0)
    e = collections.defaultdict(lambda: 2.0, b=1.0)
    yield lambda t, y: -sum(d.values()) * e["b"] * y
    d["c"] = 2.0
    yield
    e["b"] = 3.0
    yield


@case
def attribute_that_class_has():
    class A(nn.Module):
        k = 2.0

        def forward(self, t, y):
            return -self.k * y

    a = A()
    yield a
    a.k = 3.0
    yield
    del a.k
    yield
    a.forward = lambda t, y: 7 * y
    yield


@case
def types_of_numbers():
    h = Holder(k=1)
    yield lambda t, y: -y if isinstance(h.k, bool) else (y if isinstance(h.k, float) else 2 * y)
    h.k = 1.0
    yield
    h.k = True
    yield


@case
def signed_zero_and_nan():
    h = Holder(k=0.0)
    yield lambda t, y: y * math.copysign(1.0, h.k)
    h.k = -0.0
    yield
    h.k = math.nan
    yield


@case
def global_that_appears():
    def f(t, y):
        try:
            return -APPEARS * y
        except NameError:
            return y

    yield f
    globals()["APPEARS"] = 3.0
    yield
    del globals()["APPEARS"]
    yield


@case
def builtin_shadowed():
    yield lambda t, y: y * max(1.0, 2.0)
    globals()["max"] = lambda a, b: 5.0
    yield
    del globals()["max"]


@case
def imported_inside():
    sys.modules["a_users_module"] = SELF

    def f(t, y):
        import a_users_module

        return -a_users_module.k * y

    yield f
    SELF.k = 4.0
    yield
    SELF.k = 2.0
    del sys.modules["a_users_module"]


@case
def default_dtype():
    yield lambda t, y: y * torch.tensor(0.1).to(y.dtype)
    torch.set_default_dtype(D)
    yield
    torch.set_default_dtype(torch.float32)


@case
def increments():
    class A:
        k = 1.0

        def f(self, t, y):
            return -self.k * y

    a = A()
    a.k = 1.0
    yield a.f
    for _ in range(4):
        a.k += 1.0
        yield


@case
def cached_and_decorated_helpers():
    h = Holder(k=2.0)

    def twice(f):
        @functools.wraps(f)
        def g(*args):
            return h.k * f(*args)

        return g

    @functools.lru_cache
    def table(n):
        return [1.0, 3.0][n]

    @twice
    def helper(y):
        return GLOBAL * table(1) * y

    yield lambda t, y: helper(y)
    h.k = 3.0
    yield


@case
def attrgetter_with_a_literal():
    h = Holder(k=2.0, other=1.0, which="k")
    yield lambda t, y: y * operator.attrgetter(h.which, "other")(h)[0] * GETTER(h.which, "other")(h)[0]
    h.k = 3.0
    yield


@case
def attrgetter_itemgetter_and_dicts_of_objects():
    h, d = Holder(k=2.0, w=3.0), {"a": 1.0, "b": 2.0}
    yield lambda t, y: operator.attrgetter("k")(h) * y + operator.itemgetter("a")(d) * h.__dict__["w"] * y
    h.k = 3.0
    yield
    h.w = 5.0
    yield
    d["a"] = 9.0
    yield


@case
def comprehensions_and_defaults():
    h, d = Holder(k=2.0), [1.0, 2.0]
    yield lambda t, y, h=h: sum([h.k * x * y for x in d]) + sum(x * y for x in map(lambda x: h.k + x, d))
    h.k = 3.0
    yield
    d[1] = 5.0
    yield


@case
def getattr_of_a_class():
    class A:
        def __init__(self):
            self.table = {"k": 2.0}

        def __getattr__(self, name):
            return self.table[name]

    a = A()
    yield lambda t, y: a.k * y
    a.table["k"] = 3.0
    yield
    a.k = 7.0
    yield


@case
def namespaces_and_weak_references():
    n = types.SimpleNamespace(inner=argparse.Namespace(k=2.0))
    h = Holder(k=1.0)
    r = weakref.ref(h)
    yield lambda t, y: n.inner.k * r().k * y
    n.inner.k = 3.0
    yield
    h.k = 4.0
    yield
    n.inner = argparse.Namespace(k=0.5)
    yield


@case
def tensor_of_a_class_and_of_a_view():
    w = rows(4, 3)

    class A:
        W = number(2.0)
        view = w[1:2]

        def f(self, t, y):
            return self.W * y + self.view

    yield A().f
    A.W = number(3.0)
    yield
    w.mul_(2)
    yield
    A.view = rows(1, 3, seed=3)
    yield


@case
def generators_of_parameters():
    net = linear()
    yield lambda t, y: y * sum(p.sum() for p in net.parameters()) + dict(net.named_parameters())["bias"]
    net.weight = nn.Parameter(rows(3, 3, seed=5))
    yield
    net.extra = nn.Parameter(number(2.0))
    yield


@case
def a_field_within_a_field():
    inner = odenet_cuda.compile(OneNet(k=2.0))
    yield lambda t, y: inner(t, y) * inner.func.k
    inner.func.k = 3.0
    yield
    inner.func.net = linear(7)
    yield


class Act(str, enum.Enum):
    TANH, SIN = "tanh", "sin"

    def __repr__(self):
        return "an act"


class Order(enum.IntEnum):
    FIRST, SECOND = 1, 2


class Kind(enum.Enum):
    A, B = 1.0, 2.0


@case
def enums_as_keys():
    h = Holder(act=Act.TANH, order=Order.FIRST, kind=Kind.A, kinds={Kind.A}, acts={Act.TANH: torch.tanh, Act.SIN: torch.sin})
    h.orders, h.scales = {Order.FIRST: 1.0, Order.SECOND: 2.0}, {Kind.A: 0.5, Kind.B: 0.7}

    def f(t, y):
        return h.acts[h.act](y) * h.orders[h.order] * h.scales[h.kind] * (2.0 if Kind.B in h.kinds else 1.0)

    yield f
    for name, value in (("act", Act.SIN), ("order", Order.SECOND), ("kind", Kind.B)):
        setattr(h, name, value)
        yield
    h.kinds.add(Kind.B)
    yield
    h.orders[Order.SECOND] = 3.0
    yield


@case
def the_only_key_of_a_dict():
    """It is replaced by an equal one."""
    h = Holder(table={0.0: 1.0, Order.FIRST: 2.0})
    h.one = {0.0: 0}

    def f(t, y):
        return y * sum(h.table.values()) * sum(math.copysign(1.0, key) + isinstance(key, enum.Enum) for key in h.one)

    yield f
    for key in (-0.0, 1, Order.FIRST, True):
        h.one.clear()
        h.one[key] = 0
        yield


@case
def frozen_and_replaced_instances():
    @dataclasses.dataclass(frozen=True)
    class P:
        k: float = 1.0
        w: tuple = (1.0, 2.0)

    h = Holder(p=P())
    yield lambda t, y: h.p.k * sum(h.p.w) * y
    h.p = dataclasses.replace(h.p, k=2.0)
    yield
    h.p = dataclasses.replace(h.p, w=(3.0,))
    yield


@case
def class_of_an_instance():
    class A:
        def f(self, y):
            return -y

    class B(A):
        def f(self, y):
            return 2 * y

    a = A()
    yield lambda t, y: a.f(y)
    a.__class__ = B
    yield
    a.__dict__ = {"f": lambda y: 3 * y}
    yield


# modules


class OneNet(nn.Module):
    def __init__(self, net=None, **values):
        super().__init__()
        self.net = linear() if net is None else net
        self.__dict__.update(values)

    def forward(self, t, y):
        return torch.tanh(self.net(y))


@case
def net_swapped():
    f = OneNet()
    yield f
    for seed in range(10, 14):
        f.net = linear(seed)
        yield


@case
def net_of_another_shape():
    f = OneNet()
    yield f
    f.net = nn.Sequential(linear(3), nn.Tanh(), linear(5))
    yield
    f.net[1] = nn.Sigmoid()
    yield
    f.net.append(linear(9))
    yield
    del f.net[1]
    yield


@case
def weight_replaced():
    f = OneNet()
    yield f
    f.net.weight = nn.Parameter(rows(3, 3, seed=8))
    yield
    f.net.weight.data = rows(3, 3, seed=9)
    yield
    with torch.no_grad():
        f.net.weight.mul_(2)
    yield
    f.net.bias = None
    yield
    f.net.weight.requires_grad_(False)
    yield


@case
def forward_hooks():
    f = OneNet()
    yield f
    handle = f.net.register_forward_hook(lambda module, inputs, output: 2 * output)
    yield
    other = f.register_forward_pre_hook(lambda module, inputs: (inputs[0], 3 * inputs[1]))
    yield
    handle.remove()
    yield
    other.remove()
    yield


@case
def hook_with_a_number():
    f, h = OneNet(), Holder(k=2.0)
    f.net.register_forward_hook(lambda module, inputs, output: h.k * output)
    yield f
    h.k = 3.0
    yield


@case
def global_hooks():
    yield OneNet()
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: 2 * output)
    try:
        yield
    finally:
        handle.remove()
    yield


@case
def pruned():
    f = OneNet()
    yield f
    prune.l1_unstructured(f.net, "weight", amount=0.5)
    yield
    prune.remove(f.net, "weight")
    yield


@case
def parametrized():
    class Double(nn.Module):
        def forward(self, w):
            return 2 * w

    f = OneNet()
    yield f
    parametrize.register_parametrization(f.net, "weight", Double())
    yield
    f.net.parametrizations.weight.original.data.mul_(2)
    yield
    parametrize.remove_parametrizations(f.net, "weight")
    yield


@case
def weight_norm_by_hook():
    f = OneNet(torch.nn.utils.weight_norm(linear()))
    yield f
    f.net.weight_g.data.mul_(3)
    yield
    f.net.weight_v = nn.Parameter(rows(3, 3, seed=8))
    yield


@case
def results_kept_in_attributes():
    class A(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.last, self.table = linear(), None, {}

        def forward(self, t, y):
            self.last = self.net(y)
            self.new = torch.tanh(self.last)
            return self.new + self.last

    a = A()
    yield odenet_cuda.compile(a, pure=True)
    a.net = linear(5)
    yield
    a.last = rows(2, 2)
    yield


@case
def weights_tied_and_untied():
    f = OneNet(nn.Sequential(linear(), linear(4)))
    f.net[1].weight = f.net[0].weight
    yield f
    f.net[1].weight = nn.Parameter(rows(3, 3, seed=8))
    yield
    f.net[0].weight = f.net[1].weight
    yield


@case
def tensor_by_two_names():
    w = number(2.0)
    h = Holder(w=w)
    yield lambda t, y: w * y + h.w * y
    h.w = number(3.0)
    yield


@case
def training_and_evaluation():
    f = OneNet(nn.Sequential(linear(), nn.Dropout(0.0)))
    f.eval()
    yield f
    f.net[1].p = 1.0
    yield
    f.train()
    yield
    f.eval()
    yield


@case
def lists_of_modules():
    class A(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([linear(), linear(3)])
            self.scales = nn.ParameterList([nn.Parameter(number(1.0)), nn.Parameter(number(2.0))])
            self.table = nn.ModuleDict({"a": linear(5)})

        def forward(self, t, y):
            for layer in self.layers:
                y = torch.tanh(layer(y))
            for scale in self.scales:
                y = y * scale
            return sum(layer(y) for layer in self.table.values())

    a = A()
    yield a
    a.layers.append(linear(6))
    yield
    a.layers[0] = linear(7)
    yield
    a.scales[0] = nn.Parameter(number(3.0))
    yield
    a.scales.append(nn.Parameter(number(0.5)))
    yield
    a.table["b"] = linear(8)
    yield
    del a.table["a"]
    yield


@case
def module_in_a_list():
    d = [linear()]
    yield lambda t, y: torch.tanh(d[0](y))
    d[0] = linear(4)
    yield
    d[0].weight = nn.Parameter(rows(3, 3, seed=8))
    yield


@case
def functional_call():
    net = linear()
    weights = {"weight": rows(3, 3, seed=4), "bias": rows(3, seed=5)}
    yield lambda t, y: torch.func.functional_call(net, weights, (y,))
    weights["weight"] = rows(3, 3, seed=6)
    yield
    net.weight = nn.Parameter(rows(3, 3, seed=7))
    yield


@case
def buffers_that_are_indices():
    class A(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("order", torch.tensor([0, 2, 1]))
            self.register_buffer("scale", number(2.0))

        def forward(self, t, y):
            return y[:, self.order] * self.scale

    a = A()
    yield a
    a.order.copy_(torch.tensor([1, 0, 2]))
    yield
    a.order.data.numpy()[:] = [2, 1, 0]
    yield
    a.order = torch.tensor([0, 0, 1])
    yield
    a.scale = number(4.0)
    yield


@case
def buffer_whose_value_is_read():
    class A(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("n", torch.tensor(2))
            self.register_buffer("k", number(0.5))
            self.register_buffer("w", rows(3))

        def forward(self, t, y):
            return -self.n.item() * float(self.k) * y + sum(self.w.tolist()) - self.w.numpy().max()

    a = A()
    yield a
    a.n += 1
    yield
    a.k.numpy()[...] = 0.25
    yield
    a.w.data[1] = 9.0
    yield


@case
def data_of_a_weight():
    f = OneNet()
    yield lambda t, y: F.linear(y, f.net.weight.data) + f.net.bias.detach()
    f.net.weight = nn.Parameter(rows(3, 3, seed=8))
    yield
    f.net.bias.data.add_(1.0)
    yield


@case
def copied():
    f = OneNet(k=2.0)
    yield f
    yield copy.deepcopy(f)
    f.net.weight.data.mul_(2)
    yield


# what the code reaches without naming it


def scaled(y):
    return SCALE.k * y


class Making:
    def __init__(self):
        self.k = SCALE.k

    def __call__(self, y):
        return self.k * y


class MakingToo(Making):
    @classmethod
    def of(cls):
        return cls()

    def again(self):
        return type(self)()


class OfProperty(type):
    @property
    def k(cls):
        return SCALE.k


class WithMeta(metaclass=OfProperty):
    pass


class Doubling(enum.Enum):
    ONE = 1

    def scale(self, y):
        return scaled(y)


class WholeDoubling(enum.IntEnum):
    ONE = 1

    def scale(self, y):
        return scaled(y)


class Pair(collections.namedtuple("Pair", "a b")):
    __slots__ = ()

    def scale(self, y):
        return scaled(y) * self.a


class Setting:
    def __init__(self):
        self.held = 0.0

    @property
    def p(self):
        return self.held

    @p.setter
    def p(self, y):
        self.held = scaled(y)


def with_setter():
    s = Setting()

    def f(t, y):
        s.p = y
        return s.p

    return f


def imported(text, where="a_users_package.net"):
    """The function g of a module of a package whose config has the number k, called settings.k as well."""
    package, config, net = [types.ModuleType(name) for name in ("a_users_package", "a_users_package.config", where)]
    package.__path__, package.config, config.k = [], config, SCALE
    net.__package__ = package.__name__
    sys.modules.update({module.__name__: module for module in (package, config, net)})
    exec(text, net.__dict__)
    return net.g


def lazy_module():
    module = types.ModuleType("a_lazy_module")
    module.__getattr__ = lambda name: SCALE.k
    return lambda t, y: module.k * y


def local_class():
    class Local(Making):
        pass

    return lambda t, y: Local()(y)


def pattern_of(positional):
    def by_name(t, y):
        match SCALE:
            case Holder(k=q):
                return q * y

    def by_place(t, y):
        match AT:
            case Placed(q):
                return q.k * y

    return by_place if positional else by_name


class Placed:
    __match_args__ = ("kept",)


@dataclasses.dataclass(eq=False, repr=False)
class Plain:
    held: Holder


AT, FLAT, get = Placed(), Plain(None), getattr
SPELLED, FORM = ["".join("k")], "{0.k}"

REACHED = {
    "a class by another name": lambda: (lambda h: lambda t, y: h.cls()(y))(Holder(cls=Making)),
    "a class of a closure": local_class,
    "a class that inherits": lambda: lambda t, y: MakingToo()(y),
    "a class method": lambda: (lambda h: lambda t, y: h.of()(y))(MakingToo()),
    "the type of an object": lambda: (lambda h: lambda t, y: h.again()(y))(MakingToo()),
    "a metaclass": lambda: lambda t, y: WithMeta.k * y,
    "a member of an enum": lambda: (lambda h: lambda t, y: h.m.scale(y))(Holder(m=Doubling.ONE)),
    "a member of an enum of integers": lambda: (lambda h: lambda t, y: h.m.scale(y))(Holder(m=WholeDoubling.ONE)),
    "a named tuple": lambda: (lambda h: lambda t, y: h.p.scale(y))(Holder(p=Pair(1.0, 2.0))),
    "a setter": with_setter,
    "a function for a key": lambda: (lambda d: lambda t, y: sum(w * g(y) for g, w in d.items()))({scaled: 0.5}),
    "an object for a key": lambda: (lambda d: lambda t, y: sum(w * g.k * y for g, w in d.items()))({SCALE: 0.5}),
    "a key within a key": lambda: (lambda d: lambda t, y: sum(w * g(y) for (_, g), w in d.items()))({("a", scaled): 0.5}),
    "a default of a dict": lambda: (lambda d: lambda t, y: d.default_factory()(y))(collections.defaultdict(lambda: scaled)),
    "an attribute of a partial": lambda: attributed(functools.partial(max, 1.0)),
    "an attribute of a tensor": lambda: attributed(number(1.0)),
    "a module that makes its names": lazy_module,
    "a name from a package": lambda: imported("def g(t, y):\n    from .config import k\n    return k.k * y"),
    "a module of a package": lambda: imported("def g(t, y):\n    from . import config\n    return config.k.k * y"),
    "the package": lambda: imported("def g(t, y):\n    import a_users_package.config as c\n    return c.k.k * y"),
    "a pattern by name": lambda: pattern_of(False),
    "a pattern by place": lambda: pattern_of(True),
    "attrgetter": lambda: lambda t, y: operator.attrgetter(SPELLED[0])(SCALE) * y,
    "attrgetter of attrgetter": lambda: lambda t, y: operator.attrgetter("held.k")(FLAT) * y,
    "getattr by another name": lambda: lambda t, y: get(SCALE, SPELLED[0]) * y,
    "getattr of a literal": lambda: lambda t, y: getattr(SCALE, "k", 1.0) * y,
    "getattr of a sum": lambda: lambda t, y: getattr(SCALE, "" + SPELLED[0], 1.0) * y,
    "format": lambda: lambda t, y: float(FORM.format(SCALE)) * y,
    "dataclasses": lambda: lambda t, y: dataclasses.replace(FLAT).held.k * y,
    "an attribute of a package": lambda: attributed(np, lambda t, y: np.odenet_number.k * y),
    "a decorated function": lambda: functools.wraps(scaled)(lambda t, y: scaled(y)),
}


def attributed(x, f=None):
    """x with the attribute of which func makes use."""
    x.odenet_number = SCALE
    return f or (lambda t, y: x.odenet_number.k * y)


@pytest.mark.parametrize("name", REACHED)
def test_reached(name):
    """What is found by a key, a class, an import or a method counts too. (What is written is refused.)"""
    AT.kept = FLAT.held = SCALE
    func = REACHED[name]()
    field = odenet_cuda.compile(func)
    try:
        for k in (2.0, 3.0, 5.0):
            SCALE.k = k
            try:
                assert_fresh(field)
            except Unreadable:
                assert name in ("a setter",)
    finally:
        SCALE.k = 2.0
        for module in [module for module in sys.modules if module.startswith("a_users_package")]:
            del sys.modules[module]
        vars(np).pop("odenet_number", None)


@pytest.mark.parametrize("name", ["alpha", "eps"])
def test_attributes_of_libraries_that_share_a_name(name):
    """With a local variable, and with a counter."""
    f = OneNet(nn.Sequential(linear(), nn.ELU(), nn.LayerNorm(3, dtype=D)))
    part = f.net[1] if name == "alpha" else f.net[2]

    def local(t, y):
        alpha = torch.sigmoid(y)
        eps = 1e-3
        return alpha * f.net(y) / (1 + eps)

    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.alpha, self.eps = f.net, 0, 0

        def forward(self, t, y):
            self.alpha += 1
            self.eps += 1
            return self.net(y)

    for func in (local, Counter()):
        field = odenet_cuda.compile(func)
        for value in (0.5, 0.75):
            setattr(part, name, value)
            assert_fresh(field)


def test_counters_beside_literal_names():
    """A counter stays one where hasattr, getattr and a module of a library stand beside it."""

    class Net(nn.Sequential):
        def forward(self, y):
            self.nfe += 1
            y = super().forward(y) if hasattr(self, "nfe_not") or torch.is_tensor(y) else y
            return y * getattr(self, "gain", 1.0)

    net, kept = Net(linear(), nn.Tanh()), types.SimpleNamespace(nfe=0)
    net.nfe = 0

    def func(t, y):
        kept.nfe += 1
        return net(y)

    field = odenet_cuda.compile(func)
    plan = field.plan(Structure(Y0), (), False)
    func(0.0, Y0)
    assert field.plan(Structure(Y0), (), False) is plan and kept.nfe == net.nfe == 1
    net.gain = 2.0
    assert_fresh(field)


@case
def tensor_with_an_attribute_replaced():
    f = OneNet()
    yield lambda t, y: f.net(y) * getattr(f.net.weight, "gain", 1.0)
    f.net.weight.gain = 2.0
    yield
    f.net.weight.gain = 3.0
    yield
    f.net.weight = nn.Parameter(rows(3, 3, seed=8))
    yield
    other = nn.Parameter(rows(3, 3, seed=9))
    other.gain = 4.0
    f.net.weight = other
    yield


@case
def order_of_a_set():
    s = {0, 8}
    yield lambda t, y: y * next(iter(s))
    s.clear()
    s.update((8,))
    s.add(0)
    yield


@case
def attribute_of_a_layer_that_appears():
    class Net(nn.Sequential):
        def forward(self, y):
            return super().forward(y) * getattr(self, "gain", 1.0)

    net = Net(linear(), nn.Tanh())
    yield lambda t, y: net(y)
    net.gain = 2.0
    yield


@case
def module_imported_later():
    def f(t, y):
        try:
            import a_module_to_come
        except ImportError:
            return y
        return a_module_to_come.k * y

    yield f
    sys.modules["a_module_to_come"] = module = types.ModuleType("a_module_to_come")
    module.k = 2.0
    yield
    module.k = 3.0
    yield
    del sys.modules["a_module_to_come"]


# Read with a number that changes as an argument, or refused: both are right.
STEPPER = {"signed_zero_and_nan", "training_and_evaluation"}


@pytest.mark.parametrize("name", CASES)
def test_changes(name):
    """After each change the program is that of a fresh field."""
    steps = CASES[name]()
    field = odenet_cuda.compile(next(steps))
    try:
        assert_fresh(field)
        for func in steps:
            if func is not None:
                field = odenet_cuda.compile(func)
            try:
                assert_fresh(field)
            except Unreadable:
                assert name in STEPPER
    finally:
        for _ in steps:
            pass


def test_a_guard_that_fails_keeps_few_plans():
    """Modules that were swapped are gone, and so are their plans; two that take turns are kept."""
    import gc

    f = OneNet()
    field = odenet_cuda.compile(f)
    old = weakref.ref(f.net)
    for seed in range(8):
        assert_fresh(field)
        f.net = linear(seed)
    assert_fresh(field)
    gc.collect()
    assert old() is None and sum(map(len, field._plans.kept.values())) <= 4
    plan = field.plan(Structure(Y0), (), False)
    f.train(not f.training)
    other = field.plan(Structure(Y0), (), False)
    f.train(not f.training)
    assert field.plan(Structure(Y0), (), False) is plan is not other


def test_training_never_reads_again():
    """Neither do weights that are other tensors of the same shape."""
    f = OneNet()
    field = odenet_cuda.compile(f)
    plan = field.plan(Structure(Y0), (), False)
    for seed in range(3):
        f.net.weight = nn.Parameter(rows(3, 3, seed=seed))
        f.net.bias.data = rows(3, seed=seed)
        assert field.plan(Structure(rows(9, 3)), (), False) is plan
        assert_fresh(field)


def test_another_type():
    """A module of another type than the state is no longer read; func itself raises."""
    f = OneNet()
    field = odenet_cuda.compile(f)
    assert_fresh(field)
    f.float()
    with pytest.raises(Unreadable):
        field.plan(Structure(Y0), (), False)
    assert_fresh_as_float32(field)
    f.double()
    assert_fresh(field)


def assert_fresh_as_float32(field):
    y = Y0.float()
    expected = field.func(torch.zeros(()), y).detach()
    torch.testing.assert_close(slopes(field, 0.0, y).float(), expected, rtol=1e-6, atol=1e-6)  # float32 beside float64


def test_func_replaced(compiled_quickly):
    """Of a field and of a block."""
    field = odenet_cuda.compile(lambda t, y: -y)
    assert_fresh(field)
    field.func = lambda t, y: -2 * y
    assert_fresh(field)
    block = ODEBlock(OneNet(), compile="auto")
    for func in (block.func, OneNet(linear(4))):
        block.func = func
        torch.testing.assert_close(block(Y0), ODEBlock(func, compile=False)(Y0))
        assert block.explain() == "compiled"


def test_numbers_become_arguments():
    """One that changes is compiled once more, as an argument, and then never again; with a gradient for what stands beside."""
    f = OneNet(k=1.0, n=2)
    f.forward = lambda t, y: f.net(y) * f.k**2 + f.n * t * torch.exp(-f.k * t)
    field, plans = odenet_cuda.compile(f), set()
    for i in range(6):
        f.k, f.n = 1.0 + i, 2 * i
        assert_fresh(field)
        plans.add(field.plan(Structure(Y0), (), False))
    assert len(plans) == 2


def test_numbers_that_cannot_be_arguments():
    """range(n) and math.exp(k): read anew a few times, then the stepper serves."""
    f = OneNet(k=1.0, n=2)
    f.forward = lambda t, y: sum(f.net(y) for _ in range(f.n)) * math.exp(f.k)
    field, refused = odenet_cuda.compile(f), 0
    for i in range(12):
        f.k, f.n = 1.0 + i, i + 1
        try:
            assert_fresh(field)
        except Unreadable:
            refused += 1
    assert refused >= 2


# ---- args ----

ARGS = {
    "one, one and one": ([1, 1.0, True], lambda t, y, k: -y if isinstance(k, bool) else (y if isinstance(k, float) else 2 * y)),
    "floats": ([1.0, 1.0 + 1e-9, 2.0, -3.0], lambda t, y, k: k * y),
    "zeros": ([0.0, -0.0], lambda t, y, k: y * math.copysign(1.0, k)),
    "integers": ([1, 2, 3], lambda t, y, k: k * y),
    "strings": (["a", "b"], lambda t, y, k: y if k == "a" else -y),
    "arrays": ([np.ones(3), np.ones(3) * (1 + 1e-9), np.arange(3.0)], lambda t, y, k: torch.as_tensor(k) * y),
    "types of arrays": ([np.ones(3), np.ones(3, np.float32)], lambda t, y, k: y * len(k.tobytes())),
    "lists": ([[1.0, 2.0], [1.0, 3.0], (1.0, 3.0)], lambda t, y, k: sum(k) * y * isinstance(k, list)),
    "dicts": ([{"a": [1.0]}, {"a": [2.0]}, {"b": [2.0]}], lambda t, y, k: y * k.get("a", [0.0])[0]),
    "functions": ([torch.sin, torch.cos, lambda y: -y], lambda t, y, k: k(y)),
    "modules": ([linear(1), linear(2)], lambda t, y, k: k(y)),
    "none": ([None, 1.0], lambda t, y, k: y if k is None else k * y),
    "tensors": ([number(1.0), number(2.0), rows(3), rows(5, 3), rows(5, 1), rows(1, 3)], lambda t, y, k: k * y),
    "values that are read": ([number(1.0), number(2.0), number(1.0)], lambda t, y, k: float(k) * y),
    "shared or one a sample": (
        [rows(5, 3, 3), rows(3, 3), rows(5, 3, 3, seed=3)],
        lambda t, y, k: (k @ y[:, :, None])[:, :, 0],
    ),
    "objects": ([Holder(k=1.0), Holder(k=2.0)], lambda t, y, k: k.k * y),
}


@pytest.mark.parametrize("name", ARGS)
def test_args(name):
    """By type and value, in any order and again."""
    values, func = ARGS[name]
    field = odenet_cuda.compile(func)
    for value in [*values, *values[::-1]]:
        assert_fresh(field, (value,))


def test_args_written_in_place():
    """An array, a list and an object of the user are compared by what they hold."""
    array, given, held = np.ones(3), [2.0], Holder(k=3.0)
    field = odenet_cuda.compile(lambda t, y, a, b, c: torch.as_tensor(a) * b[0] * c.k * y)
    for change in (lambda: array.fill(2.0), lambda: given.append(given.pop() + 1), lambda: setattr(held, "k", 5.0)):
        assert_fresh(field, (array, given, held))
        change()
        assert_fresh(field, (array, given, held))


@pytest.mark.parametrize("tensor", [torch.from_numpy, torch.as_tensor, lambda a: torch.as_tensor(a[::-1].copy()), np.sum])
def test_args_like_those_written_in_place(tensor):
    """What was read of an array is not what is written into it later, where another comes that is as it was."""
    field = odenet_cuda.compile(lambda t, y, a: tensor(a) * y)
    given = np.arange(3.0)
    for like in (given, np.arange(3.0)):
        assert_fresh(field, (like,))
        given *= 2
        assert_fresh(field, (given,))


class Bag(dict):
    pass


HELD_BY_ARGS = {
    "an object": ({"held": SCALE}, lambda t, y, x: x["held"].k * y),
    "deep": ([({"a": SCALE},)], lambda t, y, x: x[0][0]["a"].k * y),
    "a function": ({"f": scaled}, lambda t, y, x: x["f"](y)),
    "a key": ({SCALE: 1.0}, lambda t, y, x: sum(key.k * y for key in x)),
    "a key that is a function": ({scaled: 1.0}, lambda t, y, x: sum(key(y) for key in x)),
    "a method of a named tuple": (Pair(1.0, 2.0), lambda t, y, x: x.scale(y)),
}


@pytest.mark.parametrize("name", HELD_BY_ARGS)
def test_what_args_hold(name):
    """Objects and functions within containers, which are other containers the next time."""
    given, func = HELD_BY_ARGS[name]
    field = odenet_cuda.compile(func)
    try:
        for k in (2.0, 3.0, 5.0):
            SCALE.k = k
            assert_fresh(field, (copy.copy(given),))
    finally:
        SCALE.k = 2.0


def test_args_with_attributes():
    """Refused where they are compared by what they hold."""
    bag, tensor = Bag(a=1.0), number(2.0)
    bag.k = tensor.k = 2.0
    for value in (bag, [bag], tensor, Unit(2.0)):
        with pytest.raises(Unreadable, match="whose changes"):
            odenet_cuda.compile(lambda t, y, x: y * x.k).plan(Structure(Y0), (value,), False)
    field = odenet_cuda.compile(lambda t, y, x: y * getattr(x, "k", 1.0))
    assert_fresh(field, (number(2.0),))
    with pytest.raises(Unreadable, match="whose changes"):
        field.plan(Structure(Y0), (tensor,), False)


def test_args_refused():
    """Long arrays, and tensors within containers."""
    field = odenet_cuda.compile(lambda t, y, k: torch.as_tensor(k[0]) * y)
    for value, words in ((np.ones(20_000), "bytes"), ([number(1.0)], "tensor within")):
        with pytest.raises(Unreadable, match=words):
            field.plan(Structure(Y0), (value,), False)


# ---- values that reach Python ----

DATA = [0.0, 1.0, 2.0, 3.0]


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return SCALE.k * y

    @staticmethod
    def backward(ctx, g):
        return SCALE.k * g


@case
def autograd_functions():
    yield lambda t, y: Scaled.apply(y)
    SCALE.k = 3.0
    yield
    SCALE.k = 2.0


class Doubled(nn.Linear):
    """Its base calls what this class defines."""

    def reset_parameters(self):
        pass

    def extra(self, y):
        return SCALE.k * y

    def forward(self, y):
        return self.extra(super().forward(y))


class OfBase(collections.UserDict):
    """UserDict calls __missing__, which no code of the user names; the same for methods that are no dunder."""

    def __missing__(self, key):
        return SCALE.k

    def __getitem__(self, key):
        return super().__getitem__(key)


@case
def classes_of_libraries():
    f, d = OneNet(Doubled(3, 3, dtype=D)), OfBase()
    yield lambda t, y: f(t, y) * d["k"]
    SCALE.k = 3.0
    yield
    OfBase.__missing__ = lambda self, key: 9.0
    yield
    d["k"] = 4.0
    yield
    SCALE.k = 2.0


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        ctx.save_for_backward(y)
        return y * y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * torch.from_numpy(2 * y.numpy().mean(0))


def written(y):
    x = torch.zeros(y.shape[1:], dtype=y.dtype)
    x.copy_(y[0])
    return float(x.sum())


LEAKS = {
    "item": lambda t, y: y * t.item(),
    "float": lambda t, y: y * float(t),
    "int": lambda t, y: y * int(t),
    "bool": lambda t, y: y if bool(t < 1) else -y,
    "if": lambda t, y: y if t < 1 else -y,
    "if of the state": lambda t, y: y if (y.abs() < 5).all() else -y,
    "equal": lambda t, y: y if torch.equal(y, y) else -y,
    "allclose": lambda t, y: y if torch.allclose(y, y * 2) else -y,
    "is_nonzero": lambda t, y: y if torch.is_nonzero(t) else -y,
    "numpy": lambda t, y: y * float(np.interp(t.numpy(), DATA, DATA)),
    "detach numpy": lambda t, y: y * y.detach().numpy().mean(),
    "data numpy": lambda t, y: y * y.data.numpy().mean(),
    "asarray": lambda t, y: y * np.asarray(t),
    "array of list": lambda t, y: y * torch.from_numpy(np.array([t, t, t])),
    "__array__": lambda t, y: y * t.__array__(),
    "np.sin": lambda t, y: y * np.sin(t),
    "np.float64": lambda t, y: y * np.float64(t),
    "tolist": lambda t, y: y * t.tolist(),
    "tolist of the state": lambda t, y: y * sum(y.detach().mean(0).tolist()),
    "torch.tensor": lambda t, y: y * torch.tensor([t]),
    "torch.Tensor": lambda t, y: y * torch.Tensor([y.mean()]),
    "torch.as_tensor": lambda t, y: y * torch.as_tensor([t, t, t]),
    "new_tensor": lambda t, y: y * y.new_tensor([t]),
    "DoubleTensor": lambda t, y: y * torch.DoubleTensor([t]),
    "full": lambda t, y: y * torch.full((3,), float(t)),
    "range": lambda t, y: sum([y for _ in range(t.long() + 1)]),
    "index": lambda t, y: y * DATA[t.long()],
    "math": lambda t, y: y * math.sin(t),
    "format": lambda t, y: y * float(f"{t:.3f}"),
    "str": lambda t, y: y * len(str(y)),
    "dlpack": lambda t, y: y * np.from_dlpack(y.detach()).mean(),
    "data_ptr": lambda t, y: y * (y.data_ptr() % 7),
    "storage": lambda t, y: y * y.detach().untyped_storage()[0],
    "pickle": lambda t, y: y * len(pickle.dumps(y.detach())),
    "complex": lambda t, y: y * complex(t).real,
    "max": lambda t, y: y * max(t, torch.zeros((), dtype=D)),
    "in": lambda t, y: y if t in [torch.zeros((), dtype=D)] else -y,
    "arange": lambda t, y: y * torch.arange(float(t) + 3),
    "written into another": lambda t, y: y * written(y),
    "in a product": lambda t, y: Squared.apply(y),
    "grad": lambda t, y: y * float(torch.autograd.grad((y * y).sum(), y, create_graph=True)[0].sum()) if y.requires_grad else y,
    "of an argument": lambda t, y: y,
}


class ZeroLast(nn.Module):
    """A last layer that is zero, as flows begin."""

    def __init__(self, inner):
        super().__init__()
        self.last, self.inner = linear(), inner
        nn.init.zeros_(self.last.weight), nn.init.zeros_(self.last.bias)

    def forward(self, t, y):
        return self.last(torch.tanh(self.inner(t, y).to(y.dtype)))


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name", LEAKS)
def test_values_that_reach_python(name, zero):
    """Refused, with the line, also where a layer hides it."""
    func = ZeroLast(LEAKS[name]) if zero else LEAKS[name]
    args = ()
    if name == "of an argument":
        args = (rows(5, 1),)
        func = (
            (lambda t, y, k: last(y * float(k)))
            if zero and (last := ZeroLast(None).last)
            else lambda t, y, k: y * float(k[0, 0])
        )
    with pytest.raises(Unreadable) as raised:
        odenet_cuda.compile(func).plan(Structure(Y0), args, False)
    assert "line" in str(raised.value)


def test_a_hidden_misreading():
    """A program that is wrong behind a layer of zeros is seen with other weights."""
    from odenet_cuda.compiled.check import check_program
    from odenet_cuda.compiled.plan import Plan

    func = ZeroLast(lambda t, y: torch.sin(t + y))
    plan = Plan(func, Structure(Y0), (), False)
    for statement in plan.program.statements:
        if getattr(statement, "text", "").startswith("sin"):
            statement.text = statement.text.replace("sin", "cos")
    with pytest.raises(Unreadable, match="misread"):
        check_program(plan, func, Structure(Y0), torch.zeros((), dtype=D), ())
    assert not func.last.weight.any()


UNSEEN = {
    "globals()": lambda t, y: y * globals()["GLOBAL"],
    "eval": lambda t, y: y * eval("GLOBAL"),
    "time": lambda t, y: y * sys.maxsize,
    "iterator": lambda t, y: y * next(ITERATOR),
    "random": lambda t, y: y * random.random(),
    "numpy's random": lambda t, y: y * np.random.rand(),  # noqa: NPY002
    "a numpy generator": lambda t, y: y * GENERATOR.standard_normal(),
    "a large array": lambda t, y: y * LARGE[0],
    "a torch generator": lambda t, y: y * torch.rand(3, generator=TORCH, dtype=D),
    "gradients": lambda t, y: y if y.requires_grad else -y,
    "the mode": lambda t, y: y if torch.is_grad_enabled() else -y,
    "many samples": lambda t, y: y if y.shape[0] < 30 else -y,
    "very many samples": lambda t, y: y if y.shape[0] <= 1000 else -y,
    "few samples": lambda t, y: y if y.size(0) > 4 else -y,
    "a buffer": lambda t, y: y * STREAM.getbuffer()[0],
    "ctypes": lambda t, y: y * ctypes.c_double.from_buffer(BYTES).value,
    "an array of array": lambda t, y: y * WORDS[0],
    "a counter of itertools": lambda t, y: y * next(COUNTER),
    "a mutable number": lambda t, y: y * NUMBER.value,
    "bytearray": lambda t, y: y * BYTES[0],
    "a trained value": lambda t, y: y * TRAINED.item(),
}
UNSEEN |= {
    "getenv": lambda t, y: y * len(getenv("HOME", "")),
    "a number with attributes": lambda t, y: y * UNIT,
    "a dict that gives its own": lambda t, y: y * COMPUTED["a"],
    "bytes in a namespace": lambda t, y: y * SPACE.held[0],
    "an array of array in a sequence": lambda t, y: MODULES(y),
    "a context variable in a sequence": lambda t, y: y * MODULES[1].variable.get(),
    "what was cached": lambda t, y: cached(2) * y,
    "a key that is equal": lambda t, y: y * sum(x.k for x in KEYED),
    "a key without a name": lambda t, y: y * sum(NAMELESS.values()),
    "a function of numpy's": lambda t, y: y * float(FROMPY(2.0)),
    "an operator of the user's": lambda t, y: torch.ops.odenet_users.twice(y),
    "a file": lambda t, y: y * np.load("numbers.npy")[0],
    "torch's threads": lambda t, y: y * torch.get_num_threads(),
    "torch's seed": lambda t, y: y * torch.initial_seed(),
    "a state of torch's": lambda t, y: y * torch.get_rng_state().sum(),
    "a switch of torch's": lambda t, y: y if torch.backends.mkldnn.enabled else -y,
    "another switch": lambda t, y: y if CUDNN.deterministic else -y,
    "how numpy prints": lambda t, y: y * np.get_printoptions()["precision"],
}


class Unit(float):
    pass


class Computed(dict):
    def __getitem__(self, key):
        return 2.0


class Holding(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.variable = array.array("d", [1.0]), contextvars.ContextVar("variable", default=1.0)

    def forward(self, y):
        return y * self.words[0]


class Equal(Holder):
    def __eq__(self, other):
        return True

    def __hash__(self):
        return 1


class Nameless(Equal):
    def __repr__(self):
        raise RuntimeError("no name")


@functools.lru_cache
def cached(n):
    return SCALE.k * n


UNIT, COMPUTED, SPACE = Unit(2.0), Computed(a=1.0), types.SimpleNamespace(held=bytearray(b"ab"))
MODULES = nn.Sequential(nn.Tanh(), Holding())
KEYED, NAMELESS, FROMPY = {Equal(k=1.0): 1.0}, {Nameless(): 1.0}, np.frompyfunc(lambda x: SCALE.k * x, 1, 1)
OPERATORS = torch.library.Library("odenet_users", "DEF")
OPERATORS.define("twice(Tensor x) -> Tensor")
OPERATORS.impl("twice", lambda x: SCALE.k * x, "CompositeImplicitAutograd")
torch.ops.odenet_users.twice  # noqa: B018
ITERATOR, GENERATOR, LARGE, BYTES = iter(range(10**6)), np.random.default_rng(0), np.ones(20_000), bytearray(b"ab")
STREAM, WORDS, COUNTER, NUMBER = io.BytesIO(b"ab"), array.array("d", [2.0]), itertools.count(), ctypes.c_double(2.0)
CUDNN = torch.backends.cudnn
TORCH, TRAINED = torch.Generator().manual_seed(0), nn.Parameter(number(2.0))


@pytest.mark.parametrize("name", UNSEEN)
def test_what_cannot_be_compared(name):
    """Refused in words; what was drawn is drawn again."""
    before = states()
    with pytest.raises(Unreadable) as raised:
        odenet_cuda.compile(UNSEEN[name]).plan(Structure(Y0), (), True)
    assert len(str(raised.value)) > 20
    assert states() == before


def states():
    numpys = np.random.get_state()[1].tolist()  # noqa: NPY002
    return random.getstate(), numpys, GENERATOR.bit_generator.state, TORCH.get_state().tolist(), torch.get_rng_state().tolist()


# ---- what func writes ----


class Counting(nn.Module):
    total = 0

    def __init__(self):
        super().__init__()
        self.net, self.nfe, self.calls = linear(), 0, 0.0

    def forward(self, t, y):
        global COUNT
        self.nfe += 1
        self.calls = self.calls + 0.5
        COUNT += 1
        return self.net(y)


COUNT = 0


def test_counters():
    """What only counts is read, stays as it was, and may change from call to call."""
    func = Counting()
    field = odenet_cuda.compile(func)
    plan = field.plan(Structure(Y0), (), False)
    assert (func.nfe, func.calls, COUNT) == (0, 0.0, 0)
    for _ in range(3):
        func(0.0, Y0)
        assert field.plan(Structure(Y0), (), False) is plan


class OnClasses(nn.Module):
    n = 0

    def __init__(self, write):
        super().__init__()
        self.write = write

    def forward(self, t, y):
        OnClasses.n += 1
        SELF.count += 1
        if self.write:
            OnClasses.last = y
            SELF.last = 2.0
        return -y


def test_counters_and_results_on_classes_and_modules():
    """The first may; the second are refused; all is put back."""
    SELF.count = 0
    func = OnClasses(False)
    field = odenet_cuda.compile(func)
    plan = field.plan(Structure(Y0), (), False)
    for _ in range(3):
        func(0.0, Y0)
        assert field.plan(Structure(Y0), (), False) is plan
    with pytest.raises(Unreadable, match="writes"):
        odenet_cuda.compile(OnClasses(True)).plan(Structure(Y0), (), False)
    assert OnClasses.n == SELF.count == 3 and not hasattr(OnClasses, "last") and not hasattr(SELF, "last")


class Counted(nn.Module):
    """Counts, and looks at it."""

    def __init__(self, look):
        super().__init__()
        self.n, self.look = 0, look

    def forward(self, t, y):
        self.n += 1
        return self.look(self, y)


@pytest.mark.parametrize(
    "look",
    [
        lambda f, y: y * f.n,
        lambda f, y: y if f.n < 10**6 else -y,
        lambda f, y: y * getattr(f, "".join("n")),
        lambda f, y: y * vars(f)["n"],
    ],
)
def test_counters_that_are_looked_at(look):
    """Refused, and put back."""
    func = Counted(look)
    with pytest.raises(Unreadable, match="writes"):
        odenet_cuda.compile(func).plan(Structure(Y0), (), False)
    assert func.n == 0


class Places:
    """Something to count with in each kind of place."""

    __slots__ = ("box", "calls", "counts", "name", "slot", "stats", "tensor", "whole")
    of_class = 0

    def __init__(self):
        self.box, self.stats, self.slot, self.name = [0], {"nfe": 0, "mean": 0.0}, 0, "tanh"
        self.tensor, self.whole, self.counts = (
            torch.zeros((), dtype=D),
            torch.zeros(2, dtype=torch.int64),
            collections.Counter(),
        )
        self.counts["calls"] = 0
        self.calls = types.SimpleNamespace(n=0)

    def state(self):
        held = [*self.box, *self.stats.values(), self.slot, *self.counts.values(), self.calls.n, Places.of_class]
        return [*held, float(self.tensor), *self.whole.tolist()]


@dataclasses.dataclass(frozen=True)
class Frozen:
    rate: float = 2.0
    names: list = dataclasses.field(default_factory=list)


def in_a_list(p):
    p.box[0] += 1


def in_a_dict(p):
    p.stats["nfe"] += 1
    p.stats["mean"] = 0.9 * p.stats["mean"] + 0.1 * p.stats["nfe"]


def in_a_counter(p):
    p.counts["calls"] += 1


def in_a_slot(p):
    setattr(p, "slot", -(1 - getattr(p, "".join("slot"))))  # noqa: B010


def on_a_class(p):
    Places.of_class += 1 if vars(p.calls) else 0


def beside_vars(p):
    p.calls.n = p.calls.n + 1 if isinstance(p.calls.n, int) and "n" in vars(p.calls) else 0


def in_a_tensor(p):
    p.tensor += 1


def in_a_part_of_a_tensor(p):
    p.tensor.add_(1).mul_(0.5)
    p.whole[:1].add_(1)
    p.whole[1:].copy_(p.whole[0])
    p.whole.view(2, 1)[1] -= 1


WAYS = [in_a_list, in_a_dict, in_a_counter, in_a_slot, on_a_class, beside_vars, in_a_tensor, in_a_part_of_a_tensor]


@pytest.mark.parametrize("count", WAYS)
def test_counters_in_any_place(count):
    """Read, left as they were, any number may be there; what stands beside them is compared still."""
    p, config, layer = Places(), Frozen(), linear()

    def func(t, y):
        count(p)
        return getattr(torch, p.name)(layer(y)) * config.rate

    pure = count is in_a_part_of_a_tensor  # which adds something else at every call
    field, before = odenet_cuda.compile(func, pure=pure), p.state()
    plan = field.plan(Structure(Y0), (), False)
    assert p.state() == before
    for _ in range(3):
        func(0.0, Y0)
        assert field.plan(Structure(Y0), (), False) is plan
    assert p.state() != before
    p.name, config = "sin", Frozen(3.0)
    assert_fresh(field)


LOOKS = {
    "times": lambda p, y, n: y * n,
    "in a branch": lambda p, y, n: y if n < 10**6 else -y,
    "as a key": lambda p, y, n: y * {0: 1.0}.get(n, 2.0),
    "in a text": lambda p, y, n: y * len(f"{n}"),
    "as an index": lambda p, y, n: y * [1.0, 2.0, 3.0][min(n, 2) if n != 1 else 2],
    "as a shape": lambda p, y, n: torch.cat([y, y.new_zeros(5, n)], 1)[:, :3],
    "by another path": lambda p, y, n: y * (sum(p.box) + sum(p.stats.values()) + p.calls.n + Places.of_class + p.slot),
    "by a ratio": lambda p, y, n: y if n / 2 else -y,
    "caught": lambda p, y, n: caught(y, n),
    "of its type": lambda p, y, n: y if type(n) is int else -y,
    "as an array": lambda p, y, n: y * np.array([n]).sum(),
    "written elsewhere": lambda p, y, n: p.whole.add_(n)[0] * y,
    "by what it is": lambda p, y, n: y if n is TWENTY else -y,
    "by what it is not": lambda p, y, n: y if vars(p.calls).get("n") is not n else -y,
    "by an operator": lambda p, y, n: y if operator.is_(n, 20) else -y,
}


TWENTY = 20


def caught(y, n):
    try:
        return y * [1.0, 2.0][n]
    except Exception:
        return -y


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("count", [in_a_list, in_a_slot, on_a_class, beside_vars])
def test_counters_in_any_place_that_are_looked_at(count, look):
    p = Places()

    def func(t, y):
        count(p)
        n = {in_a_list: p.box[0], in_a_slot: p.slot, on_a_class: Places.of_class, beside_vars: p.calls.n}[count]
        return LOOKS[look](p, y, n)

    before = p.state()
    with pytest.raises(Unreadable):
        odenet_cuda.compile(func).plan(Structure(Y0), (), False)
    assert p.state() == before


TENSOR_LOOKS = {
    "times": lambda p, y: y * p.tensor,
    "a part": lambda p, y: y * p.whole.view(2, 1)[0],
    "before": lambda p, y: y * p.before,
    "written elsewhere": lambda p, y: y * torch.zeros((), dtype=D).add_(p.tensor),
    "into the slopes": lambda p, y: (y * 2).add_(p.tensor),
    "of the state": lambda p, y: (p.tensor.mul_(0.9).add_(y.detach().mean()), y)[1],
    "of a batch": lambda p, y: F.batch_norm(y, p.means, p.means + 1, training=True),
    "as a number": lambda p, y: y * p.tensor.item(),
    "in a branch": lambda p, y: y if p.tensor < 10**6 else -y,
    "as a mask": lambda p, y: torch.where(p.whole[0] > 5, y, -y),
    "in an array": lambda p, y: y * float(p.whole.numpy()[0]),
    "as an index": lambda p, y: y * torch.arange(10.0, dtype=D)[p.whole[0]],
    "by another name": lambda p, y: y * p.shared[0],
}


@pytest.mark.parametrize("look", TENSOR_LOOKS)
def test_counting_tensors_that_are_looked_at(look):
    p = types.SimpleNamespace(**{name: getattr(Places(), name) for name in ("tensor", "whole")})
    p.shared, p.means = torch.zeros(2, dtype=D), torch.zeros(3, dtype=D)
    p.tensor = p.shared[0]

    def func(t, y):
        p.before = p.tensor * 1
        in_a_part_of_a_tensor(p)
        return TENSOR_LOOKS[look](p, y)

    func(0.0, Y0)
    before = [p.tensor.clone(), p.whole.clone()]
    with pytest.raises(Unreadable):
        odenet_cuda.compile(func).plan(Structure(Y0), (), False)
    torch.testing.assert_close([p.tensor, p.whole], before, rtol=0, atol=0)


ALIASES = {
    "one tensor": lambda p, q: setattr(p, "used", p.tensor),
    "a view": lambda p, q: setattr(p, "used", p.tensor.view(3)),
    "a part": lambda p, q: setattr(p, "tensor", p.used[1:]),
    "its data": lambda p, q: setattr(p.tensor, "data", p.used.data),
    "set": lambda p, q: p.used.set_(p.tensor),
    "an argument": lambda p, q: q.__setitem__(0, p.tensor),
    "a part of an argument": lambda p, q: setattr(p, "tensor", q[0][:2]),
}


@pytest.mark.parametrize("alias", ALIASES)
def test_counting_tensors_that_come_to_lie_in_others(alias):
    """What is used lies in the memory of what func counts with from then on: it is read no more."""
    p, args = types.SimpleNamespace(tensor=torch.zeros(3, dtype=D), used=rows(3)), [rows(3)]

    def func(t, y, x):
        p.tensor.add_(1)
        return y * p.used * x

    field = odenet_cuda.compile(func)
    assert_fresh(field, args)
    p.tensor, p.used = p.tensor.clone(), p.used.clone()
    assert_fresh(field, args)
    ALIASES[alias](p, args)
    with pytest.raises(Unreadable):
        field.plan(Structure(Y0), args, False)
    p.tensor, p.used, args[0] = torch.zeros(3, dtype=D), rows(3), rows(3)
    assert_fresh(field, args)


class Noise(nn.Module):
    """FFJORD's: drawn at the first call."""

    def __init__(self):
        super().__init__()
        self.net, self.e, self.cache, self.log = linear(), None, {}, []

    def forward(self, t, y):
        if self.e is None:
            self.e = torch.randn_like(y[0])
        return self.net(y) * self.e


class ActNorm(nn.Module):
    """Its scale comes from the first data."""

    def __init__(self):
        super().__init__()
        self.scale, self.ready = nn.Parameter(torch.ones(3, dtype=D)), False
        self.register_buffer("done", torch.tensor(False))

    def forward(self, t, y):
        if not self.ready:
            self.scale.data.copy_(1 / (y.detach().std(0) + 0.1))
            self.done.fill_(True)
            self.ready = True
        return y * self.scale


class Appending(nn.Module):
    def __init__(self):
        super().__init__()
        self.log, self.last, self.table = [], None, {}

    def forward(self, t, y):
        self.log.append(t)
        self.last = y
        self.table["y"] = y
        return -y


@pytest.mark.parametrize("make", [Noise, ActNorm])
def test_a_first_call_that_writes(make, compiled_quickly):
    """The reading leaves nothing; the stepper's call makes it from the user's data; then the field is read."""
    func = make()
    field = odenet_cuda.compile(func)
    before = {name: copy.deepcopy(value) for name, value in vars(func).items() if name in ("e", "ready")}
    for _ in range(2):
        with pytest.raises(Unreadable, match="writes"):
            field.plan(Structure(Y0), (), False)
    assert before == {name: vars(func)[name] for name in before}
    assert make is not ActNorm or (not func.done and (func.scale == 1).all())
    solve(field, Y0, [0.0, 0.1], method="euler")
    # What was not there before is made by one call of func, and then the field is read; what was is the stepper's to change.
    assert field.explain() == "compiled" if make is Noise else "writes" in field.explain()
    assert_fresh(field)


def test_a_func_that_writes_always():
    """Put back each time, and after some calls not tried again."""
    func = Appending()
    field = odenet_cuda.compile(func)
    for i in range(40):
        with pytest.raises(Unreadable):
            field.plan(Structure(Y0), (), False)
        assert len(func.log) == i and (func.last is None) == (i == 0)
        func(torch.tensor(0.0), Y0)


# ---- compiled ----


def test_changes_compiled(compiled_quickly):
    """One chain of changes, solved, with gradients: as the stepper."""
    f = OneNet(k=1.0)
    f.forward = lambda t, y: torch.tanh(f.net(y)) * f.k
    field = odenet_cuda.compile(f)

    def check():
        grads = []
        for func in (field, f):
            y0 = Y0.clone().requires_grad_()
            ys = solve(func, y0, [0.0, 0.5], gradient="adjoint").ys
            grads.append([ys[-1].detach(), *torch.autograd.grad(ys.square().sum(), [y0, *f.parameters()])])
        assert field.explain() == "compiled"
        for x, y in zip(*grads, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-8)

    check()
    f.net = linear(6)
    check()
    for k in (2.0, 3.0):
        f.k = k
        check()


def test_net_is_found_by_its_path():
    """A global name of the script that no code uses is no weight."""
    net = Net()
    globals()["p"] = net.first.bias
    field = odenet_cuda.compile(lambda t, y: net(t, y))
    y = rows(4, 2)
    assert_fresh(field, (), y)
    globals()["p"] = rows(6, seed=9)
    assert_fresh(field, (), y)


def test_class_of_a_namespace_without_a_name():
    """exec in an empty namespace makes classes and functions that say they are of builtins; they are the user's."""
    names: dict = {}
    text = """
import torch
def twice(y): return 2 * y
class Field(torch.nn.Module):
    k = 0.5
    rate = property(lambda self: 0.5)
    def forward(self, t, y): return (self.k + self.rate) * twice(y)
func = Field()
"""
    exec(text, names)
    field = odenet_cuda.compile(names["func"])
    for change in ("pass", "Field.k = 0.7", "Field.rate = 0.1", "def twice(y): return 3 * y"):
        exec(change, names)
        assert_fresh(field)
