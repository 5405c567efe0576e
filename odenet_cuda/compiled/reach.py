"""What the Python code of a field can reach: a walk from func over functions, modules, objects and containers.

Everything found has a slot: the place, such as an attribute or a global name that the code uses, where it is found again. Of
the user's objects, attributes that no code names are left out. Code of the standard library, of torch and of installed packages
is taken as it is; the objects they make are walked whole.
"""

import abc
import builtins
import collections
import datetime
import decimal
import enum
import functools
import os
import random
import re
import sys
import sysconfig
import types
import typing
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .scan import Names, is_library, names_of

MOST = 5_000  # slots
LARGEST_ARRAY = 1 << 16  # bytes that are compared at every call

NUMBERS = (bool, int, float, complex, str, bytes, type(None), np.generic)
_FIXED = (
    *NUMBERS, range, slice, type(...), type(NotImplemented), torch.dtype, torch.device, torch.layout, torch.memory_format,
    np.dtype, np.ufunc, types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType,
    types.ClassMethodDescriptorType, types.GetSetDescriptorType, types.MemberDescriptorType, types.MethodWrapperType,
    types.CodeType, re.Pattern, enum.Enum, decimal.Decimal,
    datetime.date, datetime.time, datetime.timedelta, types.GenericAlias, torch.Size,
)  # fmt: skip
_CONTAINERS = (dict, list, tuple, set, frozenset, collections.deque)
_PLAIN = {*_CONTAINERS, collections.OrderedDict, collections.defaultdict, types.MappingProxyType, torch.Size}
_DYNAMIC = {"getattr", "setattr", "delattr", "vars", "dir"}  # globals with which code names attributes that cannot be seen
_UNSEEN = {"globals", "eval", "exec", "compile", "__import__", "open", "input"}
_IMPURE = {
    "os",
    "time",
    "datetime",
    "secrets",
    "uuid",
    "sys",
    "socket",
    "subprocess",
    "contextvars",
    "gc",
    "inspect",
    "importlib",
}
_BARE = {object, nn.Module, abc.ABC, typing.Generic, typing.Protocol, enum.Enum, *_CONTAINERS}  # bases that call no other names
_MAKING = ("__init__", "__new__", "__post_init__", "__init_subclass__", "__set_name__", "__reduce__", "__class_getitem__")
_RANDOM = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_INTERNAL = frozenset(nn.Module().__dict__) - {"training", "_parameters", "_buffers", "_modules"}
_HOOKS = [name for name in _INTERNAL if "hooks" in name and "state_dict" not in name]
_GLOBAL_HOOKS = [
    value
    for name, value in vars(nn.modules.module).items()
    if name.startswith("_global_") and "hooks" in name and isinstance(value, dict)
]
_MADE_BY_CLASS = 1 << 9  # of the flags of a type
_FOLDERS = {sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
_FOLDERS |= {os.path.dirname(str(module.__file__)) for module in (torch, np)} | {str(Path(__file__).parents[1])}
_PACKAGES = tuple([folder + os.sep for folder in _FOLDERS])


@dataclass(eq=False)
class Slot:
    """Where a value is found: owner[key], or getattr(owner, key)."""

    owner: Any
    key: Any
    attribute: bool
    value: Any
    path: str

    def get(self) -> Any:
        return getattr(self.owner, self.key) if self.attribute else self.owner[self.key]

    def set(self, value: Any) -> None:
        """Raises TypeError, AttributeError where nothing can be written there."""
        if self.attribute:
            setattr(self.owner, self.key, value)
        else:
            self.owner[self.key] = value


class Reach:
    """The walk from func, and from what args hold besides tensors and numbers. refusal: why it cannot be trusted, or ""."""

    def __init__(self, func: Callable, args: Sequence[Any] = ()):
        self.names = Names()
        self.everything = False  # the code names attributes that cannot be seen
        while True:
            before = self._known()
            self._begin()
            self._visit(func, "func", True)
            for i, x in enumerate(args):
                if not isinstance(x, (Tensor, np.ndarray, *NUMBERS, *_CONTAINERS)):
                    self._visit(x, f"args[{i}]", True)
            while self._waiting and len(self.slots) < MOST:
                self._open(*self._waiting.pop())
            if self._known() == before:
                break
        if len(self.slots) >= MOST:
            self.refuse(f"func reaches more than {MOST} values of Python")
        for hooks in _GLOBAL_HOOKS:
            self._open(hooks, "torch's global hooks", True)

    def _known(self) -> tuple[int, ...]:
        return (self.everything, *[len(part) for part in vars(self.names).values()])

    def _begin(self) -> None:
        self.slots: list[Slot] = []
        self.sized: list[tuple[Any, frozenset[str] | None]] = []  # containers, and of an object's the keys that matter if new
        self.absent: list[tuple[dict[str, Any], str]] = []  # global names that do not exist
        self.containers: list[tuple[Any, str]] = []
        self.globals: list[tuple[dict[str, Any], str]] = []  # that the code writes
        self.cells: list[tuple[Any, str]] = []
        self.slotted: list[tuple[Any, str, str]] = []
        self.classes: list[type] = []
        self.tensors: dict[int, Tensor] = {}
        self.arrays: dict[int, tuple[np.ndarray, str]] = {}
        self.generators: list[Any] = []
        self.sets: list[Any] = []
        self.refusal = ""
        self._seen: dict[int, Any] = {}  # kept alive, so that no other object gets the id of one
        self._waiting: list[tuple[Any, str, bool]] = []

    def refuse(self, why: str) -> None:
        self.refusal = self.refusal or why

    def _visit(self, value: Any, path: str, strict: bool) -> None:
        if id(value) not in self._seen and not (isinstance(value, _FIXED) and not isinstance(value, types.BuiltinFunctionType)):
            self._seen[id(value)] = value
            self._waiting.append((value, path, strict))

    def _slot(self, owner: Any, key: Any, value: Any, path: str, strict: bool, attribute: bool = False) -> None:
        self.slots.append(Slot(owner, key, attribute, value, path))
        self._visit(value, path, strict)

    def _named(self, name: str) -> bool:
        return self.everything or name in self.names.attributes

    def _counted(self, name: Any, value: Any) -> bool:
        """Whether the code only counts with this name, so that its number is nowhere in the program."""
        counts = isinstance(value, (int, float)) and not isinstance(value, bool)
        return counts and not self.everything and name in self.names.stored and name not in self.names.read

    def _open(self, value: Any, path: str, strict: bool) -> None:
        for kind, method in _KINDS:
            if isinstance(value, kind):
                return method(self, value, path, strict)
        return self._object(value, path, strict)

    # Values

    def _tensor(self, value: Tensor, path: str, strict: bool) -> None:
        self.tensors[id(value)] = value

    def _array(self, value: np.ndarray, path: str, strict: bool) -> None:
        if value.dtype.hasobject:
            self.refuse(f"{path} is an array of objects, whose changes cannot be seen")
        self.arrays[id(value)] = value, path

    def _generator(self, value: Any, path: str, strict: bool) -> None:
        self.generators.append(value)

    def _container(self, value: Any, path: str, strict: bool) -> None:
        if isinstance(value, (set, frozenset)):
            if not all(isinstance(x, NUMBERS) for x in value):
                self.refuse(f"{path} is a set of objects, whose changes cannot be seen")
            self.sets.append(value)
            items: Any = ()
        elif isinstance(value, (dict, types.MappingProxyType)):
            items = value.items()
        else:
            items = enumerate(value)
        if not isinstance(value, (tuple, frozenset)):
            self.sized.append((value, None))
            self.containers.append((value, path))
        if len(value) > MOST:
            self.refuse(f"{path} has {len(value)} entries, more than {MOST}")
            return
        for key, item in items:
            self._slot(value, key, item, f"{path}[{key!r}]", strict)
        if type(value) not in _PLAIN and (hasattr(value, "__dict__") or not isinstance(value, tuple)):
            self._object(value, path, strict)

    # Code

    def _function(self, value: types.FunctionType, path: str, strict: bool) -> None:
        library = self._of_library(value.__code__.co_filename, value.__module__)
        strict = strict and not library
        for name in ("__code__", "__defaults__", "__kwdefaults__") if not library else ():
            self._slot(value, name, getattr(value, name), path, strict, attribute=True)
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            self.cells.append((cell, path))
            try:
                content = cell.cell_contents
            except ValueError:  # an empty cell
                continue
            if not self._counted(name, content):
                self._slot(cell, "cell_contents", content, name, strict, attribute=True)
        if value.__dict__:
            self._attributes(value.__dict__, path, strict, None)
        if not library:
            self._code(value.__code__, value.__globals__)

    def _code(self, code: types.CodeType, names: dict[str, Any]) -> None:
        found = names_of(code)
        for what in vars(found):
            getattr(self.names, what).update(getattr(found, what))
        for name in sorted(found.globals | found.written):
            if name not in names:
                self.absent.append((names, name))
                self.everything = self.everything or name in _DYNAMIC
                if name in _UNSEEN and hasattr(builtins, name):
                    self.refuse(f"func calls {name}, behind which it cannot be seen what it reads")
                continue
            if name in found.written:
                self.globals.append((names, name))
            if not self._counted(name, names[name]):
                self._slot(names, name, names[name], name, True)
        for name in sorted(found.modules):
            if name in sys.modules:
                self._slot(sys.modules, name, sys.modules[name], name, True)
        self.everything = self.everything or bool(
            {"__dict__", "__getattribute__", "attrgetter", "methodcaller"} & found.attributes
        )
        if {"f_globals", "f_locals", "_getframe", "currentframe"} & found.attributes:
            self.refuse("func reads the frames of its callers, behind which it cannot be seen what it reads")

    @staticmethod
    def _of_library(file: str | None, module: str | None) -> bool:
        """By the file that it stands in; what has none, such as generated code, by its module."""
        if file is not None and module == "builtins":  # which a namespace without a name takes for its own
            return False
        if file is None or file.startswith("<"):
            file = getattr(sys.modules.get(str(module)), "__file__", None)
        return is_library(module) if file is None else file.startswith(_PACKAGES)

    @classmethod
    def _class_of_library(cls, kind: type) -> bool:
        if kind.__module__ == "builtins":  # the same
            return not kind.__flags__ & _MADE_BY_CLASS
        return cls._of_library(None, kind.__module__)

    def _builtin(self, value: Any, path: str, strict: bool) -> None:
        owner = getattr(value, "__self__", None)
        root = str(getattr(value, "__module__", None)).split(".")[0]
        if root in _IMPURE and strict:
            self.refuse(f"func uses {path} of the module {root}, whose values change from call to call")
        elif owner is not None and not isinstance(owner, types.ModuleType):
            self._visit(owner, path, strict)

    def _method(self, value: types.MethodType, path: str, strict: bool) -> None:
        self._visit(value.__self__, path, strict)
        self._visit(value.__func__, path, strict)

    def _partial(self, value: functools.partial, path: str, strict: bool) -> None:
        self._visit(value.func, path, strict)
        self._visit(value.args, f"{path}.args", strict)
        self._visit(value.keywords, f"{path}.keywords", strict)

    def _reference(self, value: weakref.ref, path: str, strict: bool) -> None:
        self._visit(value(), path, strict)

    def _wrapped(self, value: Any, path: str, strict: bool) -> None:
        for name in ("fget", "__func__", "func", "__wrapped__"):
            if getattr(value, name, None) is not None:
                self._visit(getattr(value, name), path, strict)

    def _module_of_python(self, value: types.ModuleType, path: str, strict: bool) -> None:
        if value.__name__.split(".")[0] in _IMPURE:
            self.refuse(f"func uses the module {value.__name__}, whose values change from call to call")
        if self._of_library(None, value.__name__):
            return
        self._attributes(value.__dict__, path, strict, self._names_of_attributes(), whole=False)

    def _class(self, value: type, path: str, strict: bool) -> None:
        """Attributes and methods that the code names, and those that the language calls by itself."""
        for part in value.__mro__:
            if self._class_of_library(part):
                forward = vars(part).get("forward")
                if isinstance(forward, types.FunctionType) and issubclass(part, nn.Module):
                    self._slot(vars(part), "forward", forward, f"{part.__name__}.forward", strict)
                continue
            members, whole = vars(part), self._derived(value)
            self.classes.append(part)
            self.sized.append((members, None if whole else self._names_of_attributes()))
            for name, member in members.items():
                special = name.startswith("__") and callable(member)
                if name in ("__dict__", "__weakref__", "__doc__", "__module__", "__abstractmethods__", "_abc_impl"):
                    continue
                if name in _MAKING and part.__name__ not in self.names.globals | self.names.attributes:
                    continue
                if (special or whole or name == "forward" or self._named(name)) and not self._counted(name, member):
                    self._slot(members, name, member, f"{part.__name__}.{name}", strict)

    def _derived(self, kind: type) -> bool:
        """Whether library code may call what this class of the user defines by names that the user's code does not have."""
        return any(part not in _BARE and self._class_of_library(part) for part in kind.__mro__)

    # Objects

    def _names_of_attributes(self) -> frozenset[str] | None:
        return None if self.everything else frozenset(self.names.attributes)

    def _attributes(
        self, members: dict[str, Any], path: str, strict: bool, wanted: frozenset[str] | None, whole: bool = True
    ) -> None:
        """Of an object: those that are wanted, or all. whole: it is put back after the reading with all it has."""
        self.sized.append((members, wanted))
        if whole:
            self.containers.append((members, path))
        else:
            self.globals += [(members, name) for name in self.names.stored]
        for name, value in list(members.items()):
            if (wanted is None or name in wanted) and not self._counted(name, value):
                self._slot(members, name, value, f"{path}.{name}", strict)

    def _object(self, value: Any, path: str, strict: bool) -> None:
        kind = type(value)
        if kind.__module__.startswith(("torch._ops", "torch._C", "torch.jit", "logging")):
            return
        library = self._class_of_library(kind)
        members = getattr(value, "__dict__", None)
        slots = [name for part in kind.__mro__ for name in _slots_of(part) if hasattr(value, name)]
        if not isinstance(members, dict) and not slots and not isinstance(value, _CONTAINERS):
            if strict:
                self.refuse(f"{path} is a {kind.__name__}, whose changes cannot be seen")
            return
        if (strict and _hides(kind)) or kind.__module__.split(".")[0] in ("_thread", "threading"):
            self.refuse(f"{path} is a {kind.__name__}, whose changes cannot be seen")
        strict = strict and not library
        self._slot(value, "__class__", kind, path, strict, attribute=True)
        wanted = None if library or self._derived(kind) else self._names_of_attributes()
        if isinstance(members, dict):
            if members is not value:
                self._seen[id(members)] = members
                self._slot(value, "__dict__", members, path, strict, attribute=True)
            self._attributes(members, path, strict, wanted)
        for name in slots:
            self.slotted.append((value, name, path))
            if (wanted is None or name in wanted) and not self._counted(name, getattr(value, name)):
                self._slot(value, name, getattr(value, name), f"{path}.{name}", strict, attribute=True)

    def _module(self, value: nn.Module, path: str, strict: bool) -> None:
        if isinstance(value, torch.jit.ScriptModule):
            self.refuse(f"{path} is a scripted module, whose changes cannot be seen")
            return
        library = self._class_of_library(type(value))
        strict = strict and not library
        self._slot(value, "__class__", type(value), path, strict, attribute=True)
        members = value.__dict__
        self._seen[id(members)] = members
        self._slot(value, "__dict__", members, path, strict, attribute=True)
        whole = library or self._derived(type(value))
        wanted = frozenset(set(members) - _INTERNAL) if whole else self._names_of_attributes()
        placed = {"_parameters", "_buffers", "_modules", *_HOOKS}
        own = {"training", "forward", "_compiled_call_impl"}
        self.sized.append((members, None if wanted is None else wanted | own | placed))
        self.containers.append((members, path))
        for name in ("_parameters", "_buffers", "_modules"):
            parts = members[name]
            self.slots.append(Slot(members, name, False, parts, path))
            self._seen[id(parts)] = parts
            self.sized.append((parts, None))
            self.containers.append((parts, path))
            for key, part in parts.items():
                self._slot(parts, key, part, f"{path}.{key}", strict)
        for name in _HOOKS:
            if name in members and isinstance(members[name], dict) and id(members[name]) not in self._seen:
                self._seen[id(members[name])] = members[name]
                self._container(members[name], f"{path}.{name}", strict)
        for name, part in list(members.items()):
            meant = name in own or (name not in _INTERNAL and (wanted is None or name in wanted))
            private = type(value).__module__.startswith("odenet_cuda.") and name[0] == "_"
            if meant and not private and name not in placed and not self._counted(name, part):
                self._slot(members, name, part, f"{path}.{name}", strict)


def _hides(kind: type) -> bool:
    """Whether its objects hold something besides attributes and entries: a base that is written in C."""
    plain = (*_CONTAINERS, *NUMBERS, BaseException, types.SimpleNamespace)
    bases = [part for part in kind.__mro__ if part is not object and not issubclass(part, plain)]
    return any(not part.__flags__ & _MADE_BY_CLASS or part.__module__.lstrip("_") in ("io", "ctypes") for part in bases)


def _slots_of(part: type) -> list[str]:
    names = vars(part).get("__slots__", ())
    names = [names] if isinstance(names, str) else list(names)
    return [
        f"_{part.__name__.lstrip('_')}{name}" if name.startswith("__") and not name.endswith("__") else name
        for name in names
        if name not in ("__dict__", "__weakref__")
    ]


_KINDS: list[tuple[Any, Callable[[Reach, Any, str, bool], None]]] = [
    (Tensor, Reach._tensor),
    (np.ndarray, Reach._array),
    (_RANDOM, Reach._generator),
    (nn.Module, Reach._module),
    (types.FunctionType, Reach._function),
    (types.MethodType, Reach._method),
    ((types.BuiltinFunctionType, types.MethodWrapperType), Reach._builtin),
    (functools.partial, Reach._partial),
    ((property, staticmethod, classmethod, functools.cached_property, functools._lru_cache_wrapper), Reach._wrapped),
    (weakref.ref, Reach._reference),
    (types.ModuleType, Reach._module_of_python),
    (type, Reach._class),
    ((*_CONTAINERS, types.MappingProxyType), Reach._container),
]
