"""Values of Python that are made of numbers and strings: themselves, or plain containers and records of such, in which each is
found by its path. Of a replaced one, such as a config object made anew for every call, the numbers can be told from the rest.

Records are what compares by value: named tuples, dataclasses and namespaces. An object that is known besides, or is met twice,
stands for itself, so that whatever `is` would tell of two is told here.
"""

import argparse
import types
from collections import OrderedDict
from collections.abc import Container, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from . import kinds
from .kinds import PURE

Path = tuple[tuple[bool, Any], ...]  # the steps to a part: whether it is an attribute, and its name or key
Tree = dict[Path, Any]  # of each part its kind and the names of its own parts, or its value

_MOST = 1_000  # parts
_ALONE = {*PURE, torch.dtype, torch.device}  # what is like all that reads the same
_NAMESPACES = (types.SimpleNamespace, argparse.Namespace)


def opened(x: Any, free: Container[Path] = (), known: Container[int] = (), seen: dict[int, int] | None = None) -> Tree | None:
    """free: paths where only the kind matters. known: ids of what stands for itself. seen: of other trees that go with this.
    None where there is anything else in it."""
    tree: Tree = {}
    return tree if _open(x, (), tree, free, known, {} if seen is None else seen) else None


def _open(x: Any, path: Path, tree: Tree, free: Container[Path], known: Container[int], seen: dict[int, int]) -> bool:
    kind = type(x)
    if path in free:
        tree[path] = kind
    elif kind in _ALONE:
        tree[path] = _exactly(x)
    elif id(x) in known:
        tree[path] = "known", id(x)
    elif id(x) in seen:
        tree[path] = "again", seen[id(x)]
    else:
        parts = parts_of(x)
        if parts is None or len(tree) + len(parts) > _MOST:
            return False
        seen[id(x)] = len(seen)
        tree[path] = kind, tuple([(attribute, _exactly(key)) for attribute, key in parts])  # in order
        return all(_open(part, (*path, step), tree, free, known, seen) for step, part in parts.items())
    return True


def _exactly(x: Any) -> Any:
    return (type(x), x.tobytes()) if isinstance(x, np.generic) else (type(x), repr(x))


def parts_of(x: Any) -> dict[tuple[bool, Any], Any] | None:
    """Those of a container or record that is understood; an empty dict of one that is empty."""
    kind = type(x)
    if kind in (list, tuple):
        return {(False, i): part for i, part in enumerate(x)}
    if kind in (dict, OrderedDict):
        return {(False, key): part for key, part in x.items()} if all([type(key) in PURE for key in x]) else None
    if hasattr(kind, "__del__"):
        return None
    if issubclass(kind, tuple):
        plain = kind.__base__ is tuple and not kind.__dictoffset__ and not kinds.accessors_replaced(kind)
        return {(False, i): part for i, part in enumerate(tuple.__iter__(x))} if plain else None
    return {(True, name): part for name, part in _members(x).items()} if _is_record(kind) else None


def _is_record(kind: type) -> bool:
    """One whose objects have no identity that Python would go by, as by a hash."""
    by_value = kind.__hash__ is not object.__hash__ and kind.__eq__ is not object.__eq__
    named = "__dataclass_fields__" in vars(kind) or kind in _NAMESPACES
    return by_value and named and not _hides(kind)


@lru_cache(maxsize=256)
def _hides(kind: Any) -> bool:
    return kinds.hides(kind, (types.SimpleNamespace,))


def _members(x: Any) -> Mapping[str, Any]:
    """Attributes of the object alone, without code of the user."""
    kind: Any = type(x)
    slots = _slots(kind)
    members = object.__getattribute__(x, "__dict__") if kind.__dictoffset__ else {}
    for name, slot in slots.items():
        try:
            members = {**members, name: slot.__get__(x)}
        except AttributeError:  # nothing in it
            continue
    return members


@lru_cache(maxsize=256)
def _slots(kind: Any) -> dict[str, Any]:
    found = {name: vars(part).get(name) for part in kind.__mro__ for name in kinds.slots_of(part)}
    return {name: slot for name, slot in found.items() if isinstance(slot, types.MemberDescriptorType)}


def follow(x: Any, path: Path) -> Any:
    """The part of x at this path."""
    for attribute, key in path:
        x = _members(x)[key] if attribute else x[key]
    return x


def numbers_changed(before: Tree, now: Tree | None, types: Container[type]) -> list[Path]:
    """Where the two differ, if that is in numbers of the same type alone; else nothing."""
    if now is None or before.keys() != now.keys():
        return []
    changed = [path for path, value in now.items() if value != before[path]]
    alike = all([now[path][0] is before[path][0] and now[path][0] in types for path in changed])
    return changed if alike else []


def has_any(tree: Tree, types: Container[type]) -> bool:
    """Whether there is a value of one of these types."""
    return any([value[0] in types for value in tree.values()])


def replaced(x: Any, parts: Mapping[Path, Any], known: Container[int]) -> Any:
    """x with others at these paths, of new containers and records but for those that are known."""
    return _replace(x, (), parts, known, {})


def _replace(x: Any, path: Path, others: Mapping[Path, Any], known: Container[int], done: dict[int, Any]) -> Any:
    kind: Any = type(x)
    if path in others:
        return others[path]
    if kind in _ALONE or id(x) in known:
        return x
    if id(x) in done:
        return done[id(x)]
    found = parts_of(x) or {}
    if issubclass(kind, tuple):
        parts = [_replace(part, (*path, step), others, known, done) for step, part in found.items()]
        return done.setdefault(id(x), tuple.__new__(kind, parts))
    base = object if not issubclass(kind, (list, dict, types.SimpleNamespace)) else kind
    new = done[id(x)] = base.__new__(kind)
    for (attribute, key), part in found.items():
        part = _replace(part, (*path, (attribute, key)), others, known, done)
        if not attribute:
            new.append(part) if kind is list else new.__setitem__(key, part)
        elif (slot := _slots(kind).get(key)) is not None:
            slot.__set__(new, part)
        else:
            object.__getattribute__(new, "__dict__")[key] = part
    return new


def kinds_in(x: Any) -> set[type]:
    """The types of containers and records in it."""
    return {value[0] for value in (opened(x) or {}).values() if isinstance(value[1], tuple)}
