"""What of Python is taken as it is: values that never change, code of libraries; and what cannot be seen through."""

import abc
import builtins
import collections
import dataclasses
import datetime
import decimal
import enum
import functools
import logging
import operator
import os
import re
import sys
import sysconfig
import types
import typing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .scan import names_of

NUMBERS = (bool, int, float, complex, str, bytes, type(None), np.generic)
COUNTING = (int, float)  # exact types of what func may count with
CONTAINERS = (dict, list, tuple, set, frozenset, collections.deque)
CALLABLES = (types.BuiltinFunctionType, types.MethodWrapperType)
WRAPPED = (property, staticmethod, classmethod, functools.cached_property, functools._lru_cache_wrapper)
BARE = {object, nn.Module, abc.ABC, typing.Generic, typing.Protocol, enum.Enum, *CONTAINERS}  # bases that call no other names
PLAIN = {*CONTAINERS, collections.OrderedDict, collections.defaultdict, types.MappingProxyType, torch.Size}


def _and_derived(kind: type) -> set[type]:
    parts: list[type] = kind.__subclasses__()
    return {kind}.union(*[_and_derived(part) for part in parts if part not in (np.void, np.object_)])


# By the exact type: what a user derives from one of these may have attributes and methods.
PURE = {bool, int, float, complex, str, bytes, type(None), *_and_derived(np.generic)}
FIXED = {
    *PURE, range, type(...), type(NotImplemented), torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size,
    torch.finfo, torch.iinfo, np.finfo, np.iinfo, *_and_derived(np.dtype), type(np.sum), types.MethodDescriptorType,
    types.WrapperDescriptorType, types.ClassMethodDescriptorType, types.GetSetDescriptorType, types.MemberDescriptorType,
    types.CodeType, re.Pattern, decimal.Decimal, datetime.date, datetime.time, datetime.datetime, datetime.timedelta,
    type(vars(collections.namedtuple("_", "x"))["x"]), object, type(dataclasses.MISSING), logging.Logger, logging.RootLogger,
    torch.jit.ScriptFunction,
}  # fmt: skip

# Code that names attributes which cannot be seen in the code of the user: all of them then count.
BY_NAME = [getattr, setattr, delattr, hasattr]  # the second argument says which
DYNAMIC = [
    *BY_NAME, vars, dir, operator.attrgetter, operator.methodcaller, object.__getattribute__,
    dataclasses.asdict, dataclasses.astuple, dataclasses.replace, dataclasses.fields, dataclasses.dataclass,
    dataclasses.make_dataclass,
]  # fmt: skip
DYNAMIC_NAMES = {
    "__dict__",
    "__getattribute__",
    "attrgetter",
    "methodcaller",
    "format",
    "format_map",
    "__match_args__",
    "__replace__",
}
# Functions of these name no attributes of the user's objects by themselves.
_QUIET = {
    "torch", "numpy", "scipy", "einops", "opt_einsum", "functorch", "odenet_cuda", "torchdiffeq", "builtins", "math", "cmath",
    "functools", "itertools", "collections", "operator", "typing", "abc", "enum", "contextlib", "types", "random",
    "dataclasses", "warnings", "logging", "numbers", "re", "string", "statistics", "decimal", "fractions", "argparse",
    "weakref",
}  # fmt: skip

# What gives other values from call to call, or values from elsewhere.
UNSEEN = [
    globals, locals, eval, exec, compile, __import__, open, input, id, torch.load, np.load, np.fromfile, np.loadtxt,
    torch.get_num_threads, torch.get_num_interop_threads, torch.initial_seed, torch.get_rng_state,
    np.get_printoptions, np.geterr,
]  # fmt: skip
UNSEEN_NAMES = {"f_globals", "f_locals", "_getframe", "currentframe", "read_text", "read_bytes", "__subclasses__"}
_IMPURE = {
    "os", "posix", "nt", "time", "datetime", "secrets", "uuid", "sys", "socket", "subprocess", "contextvars", "gc", "inspect",
    "importlib", "io", "shutil", "tempfile", "glob", "platform", "ctypes", "threading", "thread", "multiprocessing", "asyncio",
}  # fmt: skip

_FOLDERS = {sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
_FOLDERS |= {os.path.dirname(str(module.__file__)) for module in (torch, np)} | {str(Path(__file__).parents[1])}
_PACKAGES = tuple([folder + os.sep for folder in _FOLDERS])
_MADE_BY_CLASS = 1 << 9  # of the flags of a type


def is_fixed(value: Any) -> bool:
    """Whether nothing of it, and nothing that it refers to, ever changes."""
    return type(value) in FIXED


def in_(value: Any, among: list[Any]) -> bool:
    return any(value is x for x in among)


@functools.lru_cache(maxsize=4096)
def is_library(file: str | None, module: str | None) -> bool:
    """Whether code is of the standard library, torch or an installed package: by the file that it stands in, and what has none,
    such as generated code and modules in C, by the module or the package of that."""
    if file is not None and module == "builtins":  # which a namespace without a name takes for its own
        return False
    if file is None or file.startswith("<"):
        root = str(module).split(".")[0]
        files = [getattr(sys.modules.get(name), "__file__", None) for name in (str(module), root)]
        file = next((x for x in files if isinstance(x, str)), None)
        if file is None:
            return root != "__main__" and (root in sys.builtin_module_names or root in sys.stdlib_module_names)
    return file.startswith(_PACKAGES)


def is_library_class(kind: type) -> bool:
    if kind.__module__ == "builtins":  # which a class of a namespace without a name says too
        return not kind.__flags__ & _MADE_BY_CLASS
    return is_library(None, kind.__module__)


def derived(kind: type) -> bool:
    """Whether library code may call what this class of the user defines by names that the user's code does not have."""
    return any(part not in BARE and is_library_class(part) for part in kind.__mro__)


def impure(module: Any) -> str:
    """The root of this module of the standard library, or part of torch, if its values change from call to call."""
    if str(module).startswith("torch.backends"):  # switches
        return "torch.backends"
    root = str(module).split(".")[0].lstrip("_")
    return root if root in _IMPURE and is_library(None, str(module)) else ""


def names_attributes(module: Any) -> bool:
    """Whether functions of this library may name attributes of what they are given, as those of dataclasses do."""
    return is_library(None, str(module)) and str(module).split(".")[0].lstrip("_") not in _QUIET


def builtins_of(names: dict[str, Any]) -> dict[str, Any]:
    """Where code with these globals finds what is no global."""
    found = names.get("__builtins__", builtins)
    return found if isinstance(found, dict) else vars(found)


def refuses_changes(part: type, name: str, member: Any) -> bool:
    """Whether this is what dataclasses put into a frozen class, which lets them do that alone, so that attributes cannot be
    set: it names nothing, and asks `type` of nothing but the object."""
    frozen = getattr(vars(part).get("__dataclass_params__"), "frozen", False) and name in ("__setattr__", "__delattr__")
    return frozen and isinstance(member, types.FunctionType) and member.__code__.co_filename == "<string>"


def names_in_methods(kind: type) -> set[str]:
    """The attributes that the code of a class of a library names."""
    members = [getattr(x, "__func__", getattr(x, "fget", x)) for x in vars(kind).values()]
    return set().union(*[names_of(x.__code__).attributes for x in members if isinstance(x, types.FunctionType)])


def accessors_replaced(kind: type) -> bool:
    """Whether a kind of container gives its entries by code of its own."""
    base = next(part for part in kind.__mro__ if part in PLAIN or part in CONTAINERS)
    names = ("__len__", "__getitem__", "__iter__", "__contains__", "keys", "values", "items", "get")
    return any(getattr(kind, name, None) is not getattr(base, name, None) for name in names)


def hides(kind: type, understood: tuple[type, ...]) -> bool:
    """Whether its objects have memory besides attributes, slots and what is understood: a base that is written in C."""
    for part in kind.__mro__:
        if part is object or any(issubclass(part, x) or issubclass(x, part) for x in understood):
            continue
        base = part.__base__ or object
        words = len(slots_of(part)) + ("__dict__" in vars(part)) + ("__weakref__" in vars(part))
        more = part.__basicsize__ - base.__basicsize__ > 8 * words or part.__itemsize__ > base.__itemsize__
        if more or not part.__flags__ & _MADE_BY_CLASS:
            return True
    return False


def slots_of(part: type) -> list[str]:
    names = vars(part).get("__slots__", ())
    names = [names] if isinstance(names, str) else list(names)
    return [
        f"_{part.__name__.lstrip('_')}{name}" if name.startswith("__") and not name.endswith("__") else name
        for name in names
        if name not in ("__dict__", "__weakref__")
    ]
