"""What is reached through code: functions with what they name, what they are wrapped in, modules of Python and classes."""

import functools
import importlib.util
import sys
import types
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import kinds
from .kinds import BARE, CALLABLES, PURE, WRAPPED, in_, is_library, is_library_class
from .reach_objects import Rule, attributes
from .scan import names_of
from .trees import parts_of
from .walk import Walk

_MAKING = {"__init__", "__new__", "__post_init__", "__init_subclass__", "__set_name__", "__reduce__", "__class_getitem__"}
_OF_CLASSES = {"__dict__", "__weakref__", "__doc__", "__module__", "__abstractmethods__", "_abc_impl", "__qualname__"}


def _function(reach: Walk, value: types.FunctionType, path: str) -> None:
    library = is_library(value.__code__.co_filename, value.__module__)
    for name in ("__code__", "__defaults__", "__kwdefaults__") if not library else ():
        reach.slot(value, name, getattr(value, name), path, attribute=True)
    for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
        reach.cells.append((cell, path, name))
        try:
            content = cell.cell_contents
        except ValueError:  # an empty cell
            continue
        if name == "__class__" and isinstance(content, type) and not reach.named(name):  # for super() alone
            reach.keep(cell, "cell_contents", content, name, attribute=True)
            reach.wait(content, name)
        elif not reach.counted(name, content):
            reach.slot(cell, "cell_contents", content, name, attribute=True)
    if value.__dict__:
        attributes(reach, value.__dict__, path, None)
    if not library:
        _code(reach, value.__code__, value.__globals__)
    else:
        _use(reach, value, value.__module__, path)


def _use(reach: Walk, value: Any, module: Any, path: str) -> None:
    """Code of a library."""
    if kinds.names_attributes(module):
        reach.everything = True
        reach.made.add(type)
    reach.everything = reach.everything or in_(value, kinds.DYNAMIC)
    if in_(value, kinds.UNSEEN):
        reach.refuse(f"func calls {path}, behind which it cannot be seen what it reads")


def _code(reach: Walk, code: types.CodeType, names: dict[str, Any]) -> None:
    found = names_of(code)
    for what in vars(found):
        getattr(reach.names, what).update(getattr(found, what))
    for name in sorted(found.globals | found.written):
        places: list[dict[str, Any]] = [names]
        if name not in names:
            reach.absent.append((names, name))
            places = [kinds.builtins_of(names)]
            if name not in places[0]:
                reach.absent.append((places[0], name))
                continue
        elif name in found.written:
            reach.globals.append((names, name))
        value = places[0][name]
        if not reach.counted(name, value):
            reach.keep(places[0], name, value, name)
            if name in found.opaque or not in_(value, kinds.BY_NAME):
                reach.visit(value, name)
    for level, module, taken in sorted(found.modules):
        _imported(reach, level, module, taken, names)
    reach.everything = reach.everything or bool(kinds.DYNAMIC_NAMES & found.attributes)
    if kinds.UNSEEN_NAMES & found.attributes:
        reach.refuse("func reads frames or files, behind which it cannot be seen what it reads")


def _imported(reach: Walk, level: int, module: str, taken: tuple[str, ...], names: dict[str, Any]) -> None:
    package = names.get("__package__") or str(names.get("__name__")).rpartition(".")[0]
    try:
        module = importlib.util.resolve_name("." * level + module, package)
    except ImportError:
        reach.refuse(f"func imports {module} from a package that is not known")
        return
    parts = module.split(".")
    for name in [".".join(parts[: i + 1]) for i in range(len(parts))] + [f"{module}.{part}" for part in taken]:
        if name in sys.modules:
            reach.slot(sys.modules, name, sys.modules[name], name)
        else:
            reach.absent.append((sys.modules, name))  # type: ignore[arg-type]


def _builtin(reach: Walk, value: Any, path: str) -> None:
    owner = getattr(value, "__self__", None)
    _use(reach, value, getattr(value, "__module__", None), path)
    if owner is not None and not isinstance(owner, types.ModuleType):
        reach.visit(owner, path)


def _method(reach: Walk, value: types.MethodType, path: str) -> None:
    reach.visit(value.__self__, path)
    reach.visit(value.__func__, path)


def _partial(reach: Walk, value: functools.partial, path: str) -> None:
    reach.visit(value.func, path)
    reach.visit(value.args, f"{path}.args")
    reach.visit(value.keywords, f"{path}.keywords")


def _reference(reach: Walk, value: weakref.ref, path: str) -> None:
    reach.visit(value(), path)


def _wrapped(reach: Walk, value: Any, path: str) -> None:
    for name in ("fget", "fset", "fdel", "__func__", "func", "__wrapped__"):
        if getattr(value, name, None) is not None:
            reach.visit(getattr(value, name), path)
    if isinstance(value, functools._lru_cache_wrapper) and not _constant(value.__wrapped__):
        reach.refuse(f"{path} keeps what it returned, though what it reads from Python may have changed since")


def _ufunc(reach: Walk, value: np.ufunc, path: str) -> None:
    if set("".join(value.types)) <= set("O->"):  # what frompyfunc makes of a function
        reach.hidden(value, path)


def _operator(reach: Walk, value: Any, path: str) -> None:
    if getattr(value, "_qualified_op_name", str(value)).split("::")[0].split(".")[0] not in ("aten", "prims", "prim"):
        reach.refuse(f"{path} is an operator of the user's, behind which it cannot be seen what it reads")


def _module_of_python(reach: Walk, value: types.ModuleType, path: str) -> None:
    """Of a library too: what the code names there may be the user's."""
    members, wanted = value.__dict__, reach.wanted()
    if is_library(None, value.__name__):
        if wanted is None:  # what code of the user sets there it names somewhere
            wanted = frozenset(reach.names.attributes)
        foreign = [name for name, x in members.items() if isinstance(x, types.ModuleType) and _foreign(x, value)]
        wanted -= frozenset(foreign)
    attributes(reach, members, path, wanted, whole=False)
    if is_library(None, value.__name__):
        return
    if type(value) is not types.ModuleType:
        reach.slot(value, "__class__", type(value), path, attribute=True)
    if "__getattr__" in members:
        reach.slot(members, "__getattr__", members["__getattr__"], f"{path}.__getattr__")


def _class(reach: Walk, value: type, path: str) -> None:
    """Attributes and methods that the code names, and those that the language calls by itself."""
    if is_library_class(value) and value in reach.made:
        _use(reach, value, value.__module__, path)
    if kinds.derived(value):
        reach.whole.update(value.__mro__)
    for part in value.__mro__:
        if part in reach.parts:
            continue
        reach.parts.add(part)
        if is_library_class(part):
            reach.owned |= kinds.names_in_methods(part) if part not in BARE and part is not Tensor else set()
            forward = vars(part).get("forward")
            if isinstance(forward, types.FunctionType) and issubclass(part, nn.Module):
                reach.slot(vars(part), "forward", forward, f"{part.__name__}.forward")
            continue
        kind = type(part)
        if not is_library_class(kind):
            reach.slot(part, "__class__", kind, part.__name__, attribute=True)
        members, whole = vars(part), part in reach.whole
        reach.classes.append(part)
        reach.sized.append((members, None if whole else reach.wanted()))
        for name, member in members.items():
            special = name.startswith("__") and (callable(member) or isinstance(member, WRAPPED))
            if name in _OF_CLASSES or (name in _MAKING and part not in reach.made):
                continue
            if (special or whole or name == "forward" or reach.named(name)) and not reach.counted(name, member):
                plain = (type(member) in PURE or parts_of(member) is not None) and getattr(part, name, None) is member
                owner = part if plain else members  # the former can be written to
                alone = kinds.refuses_changes(part, name, member)
                (reach.keep if alone else reach.slot)(owner, name, member, f"{part.__name__}.{name}", attribute=plain)
                if isinstance(member, classmethod):  # it is given the class
                    reach.made.update(value.__mro__)


def _foreign(module: types.ModuleType, owner: types.ModuleType) -> bool:
    """Whether one library has imported this other for itself."""
    return module.__name__.split(".")[0] != owner.__name__.split(".")[0] and is_library(None, module.__name__)


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


_OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
CODE: list[tuple[Any, Rule]] = [
    (types.FunctionType, _function),
    (types.MethodType, _method),
    (CALLABLES, _builtin),
    (functools.partial, _partial),
    (WRAPPED, _wrapped),
    (weakref.ref, _reference),
    (types.ModuleType, _module_of_python),
    (type, _class),
    (np.ufunc, _ufunc),
    (_OPERATORS, _operator),
]
# Whose attributes are those of their content: they are opened as such.
CONTENT_ALONE = (types.FunctionType, types.MethodType, types.ModuleType, type, *CALLABLES, np.ufunc, *_OPERATORS)
