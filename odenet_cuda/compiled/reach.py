"""What the Python code of a field can reach: a walk from func over functions, modules, objects and containers.

Everything found has a slot: the place, such as an attribute or a global name that the code uses, where it is found again. Of
the user's objects, attributes that no code names are left out. Code of the standard library, of torch and of installed packages
is taken as it is; the objects they make are walked whole.
"""

import abc
import collections
import enum
import functools
import importlib.util
import random
import sys
import types
import typing
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import kinds
from .kinds import CONTAINERS, NUMBERS, PLAIN, PURE, in_, is_fixed, is_library, is_library_class
from .scan import Names, names_of

MOST = 5_000  # slots
LARGEST_ARRAY = 1 << 16  # bytes that are compared at every call

_BARE = {object, nn.Module, abc.ABC, typing.Generic, typing.Protocol, enum.Enum, *CONTAINERS}  # bases that call no other names
_MAKING = {"__init__", "__new__", "__post_init__", "__init_subclass__", "__set_name__", "__reduce__", "__class_getitem__"}
_OF_CLASSES = {"__dict__", "__weakref__", "__doc__", "__module__", "__abstractmethods__", "_abc_impl", "__qualname__"}
_RANDOM = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_CALLABLES = (types.BuiltinFunctionType, types.MethodWrapperType)
_WRAPPED = (property, staticmethod, classmethod, functools.cached_property, functools._lru_cache_wrapper)
_UNDERSTOOD = (
    *CONTAINERS, *NUMBERS, types.SimpleNamespace, Tensor, np.ndarray, *_RANDOM, functools.partial,
    weakref.ref, *_WRAPPED, types.MappingProxyType,
)  # fmt: skip
_INTERNAL = frozenset(nn.Module().__dict__) - {"training", "_parameters", "_buffers", "_modules"}
_HOOKS = [name for name in _INTERNAL if "hooks" in name and "state_dict" not in name]
_GLOBAL_HOOKS = [
    value
    for name, value in vars(nn.modules.module).items()
    if name.startswith("_global_") and "hooks" in name and isinstance(value, dict)
]


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
    """The walk from func, and from what args hold besides tensors and numbers. refusal: why it cannot be trusted, or "".

    What the code names is known only when all of it has been seen: the walk begins anew until it finds no more names."""

    def __init__(self, func: Callable, args: Sequence[Any] = ()):
        self.names = Names()
        self.everything = False  # the code names attributes that cannot be seen
        self.made: set[type] = set()  # classes that the code may call, with their bases
        self.whole: set[type] = set()  # of whose objects library code may use what no code of the user names
        self.owned: set[str] = set()  # attributes that library code may read
        while True:
            before = self._known()
            self._begin()
            self._visit(func, "func")
            for i, x in enumerate(args):
                self._argument(x, f"args[{i}]")
            while self._waiting and len(self.slots) < MOST:
                self._open(*self._waiting.pop())
            if self._known() == before:
                break
        if len(self.slots) >= MOST:
            self.refuse(f"func reaches more than {MOST} values of Python")
        for hooks in _GLOBAL_HOOKS:
            self._container(hooks, "torch's global hooks")

    def _known(self) -> tuple[int, ...]:
        sets = (*vars(self.names).values(), self.made, self.whole, self.owned)
        return (self.everything, *[len(part) for part in sets])

    def _begin(self) -> None:
        self.slots: list[Slot] = []
        self.sized: list[tuple[Any, frozenset[str] | None]] = []  # containers, and of an object's the keys that matter if new
        self.absent: list[tuple[dict[str, Any], str]] = []  # global names that do not exist
        self.containers: list[tuple[Any, str]] = []
        self.globals: list[tuple[dict[str, Any], str]] = []  # that the code writes
        self.cells: list[tuple[Any, str, str]] = []
        self.slotted: list[tuple[Any, str, str]] = []
        self.classes: list[type] = []
        self.tensors: dict[int, Tensor] = {}
        self.arrays: dict[int, tuple[np.ndarray, str]] = {}
        self.generators: list[Any] = []
        self.sets: list[Any] = []
        self.refusal = ""
        self._seen: dict[int, Any] = {}  # kept alive, so that no other object gets the id of one
        self._parts: set[type] = set()  # classes and their bases
        self._given: dict[int, Any] = {}  # containers of args
        self._waiting: list[tuple[Any, str]] = []

    def refuse(self, why: str) -> None:
        self.refusal = self.refusal or why

    def _hidden(self, value: Any, path: str) -> None:
        self.refuse(f"{path} is a {type(value).__name__}, whose changes cannot be seen")

    def _visit(self, value: Any, path: str) -> None:
        if isinstance(value, type):
            self.made.update(value.__mro__)
        self._wait(value, path)

    def _wait(self, value: Any, path: str) -> None:
        if id(value) not in self._seen and not is_fixed(value):
            self._seen[id(value)] = value
            self._waiting.append((value, path))

    def _slot(self, owner: Any, key: Any, value: Any, path: str, attribute: bool = False) -> None:
        self.slots.append(Slot(owner, key, attribute, value, path))
        self._visit(value, path)

    def _named(self, name: str) -> bool:
        return self.everything or name in self.names.attributes

    def _counted(self, name: Any, value: Any) -> bool:
        """Whether the code only counts with this name, so that its number is nowhere in the program."""
        counts = type(value) in (int, float) and not self.everything
        return counts and name in self.names.stored and name not in self.names.read and name not in self.owned

    def _open(self, value: Any, path: str) -> None:
        """Of anything: what it consists of by its kind, and then the attributes that it has as any object."""
        kind = type(value)
        own = isinstance(value, (type, types.FunctionType, *_CALLABLES))
        module = value.__name__ if isinstance(value, types.ModuleType) else getattr(value if own else kind, "__module__", None)
        if root := kinds.impure(module):
            self.refuse(f"func uses {path} of the module {root}, whose values change from call to call")
        for base, method in _KINDS:
            if issubclass(kind, base):
                method(self, value, path)
                break
        if not issubclass(kind, _WITHOUT):
            self._object(value, path)

    def _argument(self, value: Any, path: str) -> None:
        """Numbers, tensors and what containers hold are compared by value: the next solve may be given others."""
        kind = type(value)
        if isinstance(value, CONTAINERS):
            if id(value) in self._given:
                return
            self._given[id(value)] = value
            if kind not in PLAIN:
                self._visit(kind, path)
                if not isinstance(value, tuple) or hasattr(value, "__dict__") or kinds.accessors_replaced(kind):
                    self._hidden(value, path)
                    return
            for part in (*value.keys(), *value.values()) if isinstance(value, dict) else value:
                self._argument(part, f"{path}[...]")
        elif isinstance(value, Tensor):
            if not is_library_class(kind) or any(map(self._named, vars(value))):
                self.refuse(f"{path} is a tensor with attributes of Python, whose changes cannot be seen")
        elif kind is not np.ndarray:
            self._visit(value, path)

    # Values

    def _tensor(self, value: Tensor, path: str) -> None:
        self.tensors[id(value)] = value

    def _array(self, value: np.ndarray, path: str) -> None:
        if value.dtype.hasobject:
            self.refuse(f"{path} is an array of objects, whose changes cannot be seen")
        self.arrays[id(value)] = value, path

    def _generator(self, value: Any, path: str) -> None:
        self.generators.append(value)

    def _number(self, value: Any, path: str) -> None:
        """Of a kind of the user's: two that are equal may differ in what else they have."""
        if not isinstance(value, enum.Enum):
            self._hidden(value, path)

    def _container(self, value: Any, path: str) -> None:
        kind = type(value)
        if kind not in PLAIN and kinds.accessors_replaced(kind):
            self.refuse(f"{path} is a {kind.__name__}, which gives its entries by code of its own")
            return
        keys: Iterable[Any] = ()
        if isinstance(value, (set, frozenset)):
            if not all(type(x) in PURE for x in value):
                self.refuse(f"{path} is a set of objects, whose changes cannot be seen")
            self.sets.append(value)
        elif isinstance(value, (dict, types.MappingProxyType)):
            keys = list(value)
        else:
            keys = range(len(value))
        if not isinstance(value, (tuple, frozenset)):
            self.sized.append((value, None))
            self.containers.append((value, path))
        if len(value) > MOST:
            self.refuse(f"{path} has {len(value)} entries, more than {MOST}")
            return
        for key in keys:
            self._key(key, path)
            self._slot(value, key, value[key], f"{path}[{key!r}]" if is_fixed(key) else f"{path}[{type(key).__name__}]")
        if isinstance(value, collections.defaultdict):
            self._slot(value, "default_factory", value.default_factory, f"{path}.default_factory", attribute=True)

    def _key(self, key: Any, path: str) -> None:
        """An entry is found again by a key that is equal; what is not, by identity or as a number, may be another object."""
        if type(key) is tuple:
            for part in key:
                self._key(part, path)
        elif not is_fixed(key):
            if type(key).__eq__ is not object.__eq__ and not isinstance(key, (Tensor, *_CALLABLES)):
                self.refuse(f"{path} has a {type(key).__name__} for a key, whose changes cannot be seen")
            self._visit(key, f"a key of {path}")

    def _slice(self, value: Any, path: str) -> None:
        names = ("start", "stop", "step") if isinstance(value, slice) else ("__origin__", "__args__")
        for name in names:
            self._slot(value, name, getattr(value, name), f"{path}.{name}", attribute=True)

    # Code

    def _function(self, value: types.FunctionType, path: str) -> None:
        library = is_library(value.__code__.co_filename, value.__module__)
        for name in ("__code__", "__defaults__", "__kwdefaults__") if not library else ():
            self._slot(value, name, getattr(value, name), path, attribute=True)
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            self.cells.append((cell, path, name))
            try:
                content = cell.cell_contents
            except ValueError:  # an empty cell
                continue
            if name == "__class__" and isinstance(content, type) and not self._named(name):  # for super() alone
                self.slots.append(Slot(cell, "cell_contents", True, content, name))
                self._wait(content, name)
            elif not self._counted(name, content):
                self._slot(cell, "cell_contents", content, name, attribute=True)
        if value.__dict__:
            self._attributes(value.__dict__, path, None)
        if not library:
            self._code(value.__code__, value.__globals__)
        else:
            self._use(value, value.__module__, path)

    def _use(self, value: Any, module: Any, path: str) -> None:
        """Code of a library."""
        if kinds.names_attributes(module):
            self.everything = True
            self.made.add(type)
        self.everything = self.everything or in_(value, kinds.DYNAMIC)
        if in_(value, kinds.UNSEEN):
            self.refuse(f"func calls {path}, behind which it cannot be seen what it reads")

    def _code(self, code: types.CodeType, names: dict[str, Any]) -> None:
        found = names_of(code)
        for what in vars(found):
            getattr(self.names, what).update(getattr(found, what))
        for name in sorted(found.globals | found.written):
            places: list[dict[str, Any]] = [names]
            if name not in names:
                self.absent.append((names, name))
                places = [kinds.builtins_of(names)]
                if name not in places[0]:
                    self.absent.append((places[0], name))
                    continue
            elif name in found.written:
                self.globals.append((names, name))
            value = places[0][name]
            if not self._counted(name, value):
                self.slots.append(Slot(places[0], name, False, value, name))
                if name in found.opaque or not in_(value, kinds.DYNAMIC):
                    self._visit(value, name)
        for level, module, taken in sorted(found.modules):
            self._imported(level, module, taken, names)
        self.everything = self.everything or bool(kinds.DYNAMIC_NAMES & found.attributes)
        if kinds.UNSEEN_NAMES & found.attributes:
            self.refuse("func reads frames or files, behind which it cannot be seen what it reads")

    def _imported(self, level: int, module: str, taken: tuple[str, ...], names: dict[str, Any]) -> None:
        package = names.get("__package__") or str(names.get("__name__")).rpartition(".")[0]
        try:
            module = importlib.util.resolve_name("." * level + module, package)
        except ImportError:
            self.refuse(f"func imports {module} from a package that is not known")
            return
        parts = module.split(".")
        for name in [".".join(parts[: i + 1]) for i in range(len(parts))] + [f"{module}.{part}" for part in taken]:
            if name in sys.modules:
                self._slot(sys.modules, name, sys.modules[name], name)
            else:
                self.absent.append((sys.modules, name))  # type: ignore[arg-type]

    def _builtin(self, value: Any, path: str) -> None:
        owner = getattr(value, "__self__", None)
        self._use(value, getattr(value, "__module__", None), path)
        if owner is not None and not isinstance(owner, types.ModuleType):
            self._visit(owner, path)

    def _method(self, value: types.MethodType, path: str) -> None:
        self._visit(value.__self__, path)
        self._visit(value.__func__, path)

    def _partial(self, value: functools.partial, path: str) -> None:
        self._visit(value.func, path)
        self._visit(value.args, f"{path}.args")
        self._visit(value.keywords, f"{path}.keywords")

    def _reference(self, value: weakref.ref, path: str) -> None:
        self._visit(value(), path)

    def _wrapped(self, value: Any, path: str) -> None:
        for name in ("fget", "fset", "fdel", "__func__", "func", "__wrapped__"):
            if getattr(value, name, None) is not None:
                self._visit(getattr(value, name), path)
        if isinstance(value, functools._lru_cache_wrapper) and not _constant(value.__wrapped__):
            self.refuse(f"{path} keeps what it returned, though what it reads from Python may have changed since")

    def _ufunc(self, value: np.ufunc, path: str) -> None:
        if set("".join(value.types)) <= set("O->"):  # what frompyfunc makes of a function
            self._hidden(value, path)

    def _operator(self, value: Any, path: str) -> None:
        if getattr(value, "_qualified_op_name", str(value)).split("::")[0].split(".")[0] not in ("aten", "prims", "prim"):
            self.refuse(f"{path} is an operator of the user's, behind which it cannot be seen what it reads")

    def _module_of_python(self, value: types.ModuleType, path: str) -> None:
        """Of a library too: what the code names there may be the user's."""
        members, wanted = value.__dict__, self._names_of_attributes()
        if is_library(None, value.__name__):
            if wanted is None:  # what code of the user sets there it names somewhere
                wanted = frozenset(self.names.attributes)
            foreign = [name for name, x in members.items() if isinstance(x, types.ModuleType) and _foreign(x, value)]
            wanted -= frozenset(foreign)
        self._attributes(members, path, wanted, whole=False)
        if is_library(None, value.__name__):
            return
        if type(value) is not types.ModuleType:
            self._slot(value, "__class__", type(value), path, attribute=True)
        if "__getattr__" in members:
            self._slot(members, "__getattr__", members["__getattr__"], f"{path}.__getattr__")

    def _class(self, value: type, path: str) -> None:
        """Attributes and methods that the code names, and those that the language calls by itself."""
        if is_library_class(value) and value in self.made:
            self._use(value, value.__module__, path)
        if self._derived(value):
            self.whole.update(value.__mro__)
        for part in value.__mro__:
            if part in self._parts:
                continue
            self._parts.add(part)
            if is_library_class(part):
                self.owned |= kinds.names_in_methods(part) if part not in _BARE and part is not Tensor else set()
                forward = vars(part).get("forward")
                if isinstance(forward, types.FunctionType) and issubclass(part, nn.Module):
                    self._slot(vars(part), "forward", forward, f"{part.__name__}.forward")
                continue
            kind = type(part)
            if not is_library_class(kind):
                self._slot(part, "__class__", kind, part.__name__, attribute=True)
            members, whole = vars(part), part in self.whole
            self.classes.append(part)
            self.sized.append((members, None if whole else self._names_of_attributes()))
            for name, member in members.items():
                special = name.startswith("__") and (callable(member) or isinstance(member, _WRAPPED))
                if name in _OF_CLASSES or (name in _MAKING and part not in self.made):
                    continue
                if (special or whole or name == "forward" or self._named(name)) and not self._counted(name, member):
                    self._slot(members, name, member, f"{part.__name__}.{name}")
                    if isinstance(member, classmethod):  # it is given the class
                        self.made.update(value.__mro__)

    def _derived(self, kind: type) -> bool:
        """Whether library code may call what this class of the user defines by names that the user's code does not have."""
        return any(part not in _BARE and is_library_class(part) for part in kind.__mro__)

    # Objects

    def _names_of_attributes(self) -> frozenset[str] | None:
        return None if self.everything else frozenset(self.names.attributes)

    def _attributes(self, members: dict[str, Any], path: str, wanted: frozenset[str] | None, whole: bool = True) -> None:
        """Of an object: those that are wanted, or all. whole: it is put back after the reading with all it has."""
        self.sized.append((members, wanted))
        if whole:
            self.containers.append((members, path))
        else:
            self.globals += [(members, name) for name in self.names.stored]
        for name, value in list(members.items()):
            if (wanted is None or name in wanted) and not self._counted(name, value):
                self._slot(members, name, value, f"{path}.{name}")

    def _kind(self, value: Any, path: str) -> None:
        kind = type(value)
        self.slots.append(Slot(value, "__class__", True, kind, path))
        asked = type in self.made or "__class__" in self.names.attributes  # which gives the class of anything
        (self._visit if asked else self._wait)(kind, path)

    def _object(self, value: Any, path: str) -> None:
        kind, members = type(value), _dict_of(value)
        if kind in _COMMON:
            if members is not None and kind not in _WRAPPED:
                self._attributes(members, path, self._names_of_attributes())
            return
        slots = {
            name: x for part in kind.__mro__ for name in kinds.slots_of(part) if (x := _held(part, value, name)) is not _NONE
        }
        empty = members is None and not slots and not isinstance(value, _UNDERSTOOD)
        if empty or kinds.hides(kind, _UNDERSTOOD):
            self._hidden(value, path)
            return
        self._kind(value, path)
        whole = is_library_class(kind) or self._derived(kind)
        wanted = None if whole else self._names_of_attributes()
        if members is not None:
            self._seen[id(members)] = members
            self._slot(value, "__dict__", members, path, attribute=True)
            self._attributes(members, path, wanted)
        for name, held in slots.items():
            self.slotted.append((value, name, path))
            if (wanted is None or name in wanted) and not self._counted(name, held):
                self._slot(value, name, held, f"{path}.{name}", attribute=True)

    def _module(self, value: nn.Module, path: str) -> None:
        if isinstance(value, torch.jit.ScriptModule):
            self.refuse(f"{path} is a scripted module, whose changes cannot be seen")
            return
        self._kind(value, path)
        members = value.__dict__
        self._seen[id(members)] = members
        self._slot(value, "__dict__", members, path, attribute=True)
        whole = is_library_class(type(value)) or self._derived(type(value))
        wanted = None if whole else self._names_of_attributes()
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
                self._slot(parts, key, part, f"{path}.{key}")
        for name in _HOOKS:
            if name in members and isinstance(members[name], dict) and id(members[name]) not in self._seen:
                self._seen[id(members[name])] = members[name]
                self._container(members[name], f"{path}.{name}")
        for name, part in list(members.items()):
            meant = name in own or (name not in _INTERNAL and (wanted is None or name in wanted))
            private = type(value).__module__.startswith("odenet_cuda.") and name[0] == "_"
            if meant and not private and name not in placed and not self._counted(name, part):
                self._slot(members, name, part, f"{path}.{name}")


def _dict_of(value: Any) -> dict[str, Any] | None:
    try:
        found = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return found if isinstance(found, dict) and found is not value else None


def _foreign(module: types.ModuleType, owner: types.ModuleType) -> bool:
    """Whether one library has imported this other for itself."""
    return module.__name__.split(".")[0] != owner.__name__.split(".")[0] and is_library(None, module.__name__)


def _held(part: type, value: Any, name: str) -> Any:
    """What a slot of a class holds, without code of the user."""
    member = vars(part).get(name)
    if not isinstance(member, types.MemberDescriptorType):
        return _NONE
    try:
        return member.__get__(value)
    except AttributeError:
        return _NONE


def _constant(function: Any) -> bool:
    """Whether a function reads nothing but its arguments, builtins and modules of libraries."""
    if not isinstance(function, types.FunctionType):
        return False
    if is_library(function.__code__.co_filename, function.__module__):
        return True
    found, names = names_of(function.__code__), function.__globals__
    used = [names[name] for name in found.globals if name in names]
    modules = [x for x in used if isinstance(x, types.ModuleType) and is_library(None, x.__name__)]
    known = all(any(hasattr(x, name) for x in modules) for name in found.attributes)
    return known and len(modules) == len(used) and not (function.__closure__ or found.modules or found.written)


_NONE = object()
_OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
# Whose attributes are those of their content: they are opened as such.
_WITHOUT = (
    nn.Module,
    types.FunctionType,
    types.MethodType,
    types.ModuleType,
    type,
    *_CALLABLES,
    types.GenericAlias,
    slice,
    np.ufunc,
    *_OPERATORS,
)
_COMMON = {Tensor, nn.Parameter, nn.Buffer, np.ndarray, *PLAIN, *_RANDOM, *_WRAPPED, functools.partial, weakref.ref}
_KINDS: list[tuple[Any, Callable[[Reach, Any, str], None]]] = [
    (Tensor, Reach._tensor),
    (np.ndarray, Reach._array),
    (_RANDOM, Reach._generator),
    (nn.Module, Reach._module),
    (types.FunctionType, Reach._function),
    (types.MethodType, Reach._method),
    (_CALLABLES, Reach._builtin),
    (functools.partial, Reach._partial),
    (_WRAPPED, Reach._wrapped),
    (weakref.ref, Reach._reference),
    (types.ModuleType, Reach._module_of_python),
    (type, Reach._class),
    ((*CONTAINERS, types.MappingProxyType), Reach._container),
    ((slice, types.GenericAlias), Reach._slice),
    (np.ufunc, Reach._ufunc),
    (_OPERATORS, Reach._operator),
    (NUMBERS, Reach._number),
]
