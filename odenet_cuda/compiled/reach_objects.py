"""What is reached through values: containers, tensors, arrays, modules of torch and any other object."""

import collections
import enum
import functools
import random
import types
import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from . import kinds
from .kinds import CALLABLES, CONTAINERS, NUMBERS, PLAIN, PURE, WRAPPED, is_fixed, is_library_class
from .walk import MOST, Walk

Rule: TypeAlias = Callable[[Walk, Any, str], None]  # of a kind of value, which was found at this path

_NONE = object()
_RANDOM = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_UNDERSTOOD = (
    *CONTAINERS, *NUMBERS, types.SimpleNamespace, Tensor, np.ndarray, *_RANDOM, functools.partial,
    weakref.ref, *WRAPPED, types.MappingProxyType,
)  # fmt: skip
_COMMON = {Tensor, nn.Parameter, nn.Buffer, np.ndarray, *PLAIN, *_RANDOM, *WRAPPED, functools.partial, weakref.ref}
_INTERNAL = frozenset(nn.Module().__dict__) - {"training", "_parameters", "_buffers", "_modules"}
_HOOKS = [name for name in _INTERNAL if "hooks" in name and "state_dict" not in name]


def _tensor(reach: Walk, value: Tensor, path: str) -> None:
    reach.tensors[id(value)] = value


def _array(reach: Walk, value: np.ndarray, path: str) -> None:
    if value.dtype.hasobject:
        reach.refuse(f"{path} is an array of objects, whose changes cannot be seen")
    reach.arrays[id(value)] = value, path


def _generator(reach: Walk, value: Any, path: str) -> None:
    reach.generators.append(value)


def _number(reach: Walk, value: Any, path: str) -> None:
    """Of a kind of the user's: two that are equal may differ in what else they have."""
    if not isinstance(value, enum.Enum):
        reach.hidden(value, path)


def container(reach: Walk, value: Any, path: str) -> None:
    kind = type(value)
    if kind not in PLAIN and kinds.accessors_replaced(kind):
        reach.refuse(f"{path} is a {kind.__name__}, which gives its entries by code of its own")
        return
    keys: Iterable[Any] = ()
    if isinstance(value, (set, frozenset)):
        for x in value:
            if isinstance(x, enum.Enum):  # of which there is one alone
                reach.visit(x, f"{path}[...]")
            elif type(x) not in PURE:
                reach.refuse(f"{path} is a set of objects, whose changes cannot be seen")
        reach.sets.append(value)
    elif isinstance(value, (dict, types.MappingProxyType)):
        keys = list(value)
    else:
        keys = range(len(value))
    if not isinstance(value, (tuple, frozenset)):
        reach.sized.append((value, None))
        reach.containers.append((value, path))
    if len(value) > MOST:
        reach.refuse(f"{path} has {len(value)} entries, more than {MOST}")
        return
    for key in keys:
        _key(reach, key, path)
        reach.slot(value, key, value[key], f"{path}[{key!r}]" if is_fixed(key) else f"{path}[{type(key).__name__}]")
    if isinstance(value, collections.defaultdict):
        reach.slot(value, "default_factory", value.default_factory, f"{path}.default_factory", attribute=True)


def _key(reach: Walk, key: Any, path: str) -> None:
    """An entry is found again by a key that is equal; what is not, by identity or as a number, may be another object. Members
    of an enum are compared by identity, as the guards compare all keys, whatever they are equal to."""
    if type(key) is tuple:
        for part in key:
            _key(reach, part, path)
    elif not is_fixed(key):
        if type(key).__eq__ is not object.__eq__ and not isinstance(key, (Tensor, enum.Enum, *CALLABLES)):
            reach.refuse(f"{path} has a {type(key).__name__} for a key, whose changes cannot be seen")
        reach.visit(key, f"a key of {path}")


def _slice(reach: Walk, value: Any, path: str) -> None:
    names = ("start", "stop", "step") if isinstance(value, slice) else ("__origin__", "__args__")
    for name in names:
        reach.slot(value, name, getattr(value, name), f"{path}.{name}", attribute=True)


def attributes(reach: Walk, members: dict[str, Any], path: str, wanted: frozenset[str] | None, whole: bool = True) -> None:
    """Of an object: those that are wanted, or all. whole: it is put back after the reading with all it has."""
    reach.sized.append((members, wanted))
    if whole:
        reach.containers.append((members, path))
    else:
        reach.globals += [(members, name) for name in reach.names.stored]
    for name, value in list(members.items()):
        if (wanted is None or name in wanted) and not reach.counted(name, value):
            reach.slot(members, name, value, f"{path}.{name}")


def _kind(reach: Walk, value: Any, path: str) -> None:
    kind = type(value)
    reach.keep(value, "__class__", kind, path, attribute=True)
    asked = type in reach.made or "__class__" in reach.names.attributes  # which gives the class of anything
    (reach.visit if asked else reach.wait)(kind, path)


def any_object(reach: Walk, value: Any, path: str) -> None:
    kind, members = type(value), _dict_of(value)
    if kind in _COMMON:
        if members is not None and kind not in WRAPPED:
            attributes(reach, members, path, reach.wanted())
        return
    slots = {name: x for part in kind.__mro__ for name in kinds.slots_of(part) if (x := _held(part, value, name)) is not _NONE}
    empty = members is None and not slots and not isinstance(value, _UNDERSTOOD)
    if empty or kinds.hides(kind, _UNDERSTOOD):
        reach.hidden(value, path)
        return
    _kind(reach, value, path)
    whole = is_library_class(kind) or kinds.derived(kind)
    wanted = None if whole else reach.wanted()
    if members is not None:
        reach.seen[id(members)] = members
        reach.slot(value, "__dict__", members, path, attribute=True)
        attributes(reach, members, path, wanted)
    for name, held in slots.items():
        reach.slotted.append((value, name, path))
        if (wanted is None or name in wanted) and not reach.counted(name, held):
            reach.slot(value, name, held, f"{path}.{name}", attribute=True)


def _module(reach: Walk, value: nn.Module, path: str) -> None:
    if isinstance(value, torch.jit.ScriptModule):
        reach.refuse(f"{path} is a scripted module, whose changes cannot be seen")
        return
    _kind(reach, value, path)
    members = value.__dict__
    reach.seen[id(members)] = members
    reach.slot(value, "__dict__", members, path, attribute=True)
    whole = is_library_class(type(value)) or kinds.derived(type(value))
    wanted = None if whole else reach.wanted()
    placed = {"_parameters", "_buffers", "_modules", *_HOOKS}
    own = {"training", "forward", "_compiled_call_impl"}
    reach.sized.append((members, None if wanted is None else wanted | own | placed))
    reach.containers.append((members, path))
    for name in ("_parameters", "_buffers", "_modules"):
        parts = members[name]
        reach.keep(members, name, parts, path)
        reach.seen[id(parts)] = parts
        reach.sized.append((parts, None))
        reach.containers.append((parts, path))
        for key, part in parts.items():
            reach.slot(parts, key, part, f"{path}.{key}")
    for name in _HOOKS:
        if name in members and isinstance(members[name], dict) and id(members[name]) not in reach.seen:
            reach.seen[id(members[name])] = members[name]
            container(reach, members[name], f"{path}.{name}")
    for name, part in list(members.items()):
        meant = name in own or (name not in _INTERNAL and (wanted is None or name in wanted))
        private = type(value).__module__.startswith("odenet_cuda.") and name[0] == "_"
        if meant and not private and name not in placed and not reach.counted(name, part):
            reach.slot(members, name, part, f"{path}.{name}")


def _dict_of(value: Any) -> dict[str, Any] | None:
    try:
        found = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return found if isinstance(found, dict) and found is not value else None


def _held(part: type, value: Any, name: str) -> Any:
    """What a slot of a class holds, without code of the user."""
    member = vars(part).get(name)
    if not isinstance(member, types.MemberDescriptorType):
        return _NONE
    try:
        return member.__get__(value)
    except AttributeError:
        return _NONE


OBJECTS: list[tuple[Any, Rule]] = [
    (Tensor, _tensor),
    (np.ndarray, _array),
    (_RANDOM, _generator),
    (nn.Module, _module),
    ((*CONTAINERS, types.MappingProxyType), container),
    ((slice, types.GenericAlias), _slice),
    (NUMBERS, _number),
]
