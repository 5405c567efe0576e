"""Values of Python that are made of numbers and strings: themselves, or plain containers and records of such, in which each is
found by its path. Of a replaced one, such as a config object made anew for every call, the numbers can be told from the rest.

Records are what compares by value: named tuples, dataclasses and namespaces. An object that is known besides, or is met twice,
stands for itself, so that whatever `is` would tell of two is told here.
"""

import argparse
import types
from collections import OrderedDict
from collections.abc import Container, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from . import kinds
from .kinds import PURE

Path = tuple[tuple[bool, Any], ...]  # the steps to a part: whether it is an attribute, and its name or key
Tree = dict[Path, Any]  # of each part its kind and the names of its own parts, or its value

_MOST, _DEEPEST = 1_000, 20  # parts, and within one another
_ALONE = {*PURE, torch.dtype, torch.device}  # what is like all that reads the same
_NAMESPACES = (types.SimpleNamespace, argparse.Namespace)


def opened(x: Any, free: Container[Path] = (), known: Container[int] = (), seen: dict[int, int] | None = None) -> Tree | None:
    """free: paths where only the kind matters. known: ids of what stands for itself. seen: of other trees that go with this.
    None where there is anything else in it."""
    if () in free:  # a number alone
        return {(): type(x)}
    tree: Tree = {}
    return tree if _open(x, (), tree, free, known, {} if seen is None else seen) else None


def _open(x: Any, path: Path, tree: Tree, free: Container[Path], known: Container[int], seen: dict[int, int]) -> bool:
    kind = type(x)
    if path in free:
        tree[path] = kind
    elif kind in _ALONE:
        tree[path] = _exactly(x)
    elif id(x) in known:
        if kind in (dict, OrderedDict):  # of an object, whose attributes are not all compared
            return False
        tree[path] = "known", id(x)
    elif id(x) in seen:
        tree[path] = "again", seen[id(x)]
    else:
        parts = parts_of(x)
        if parts is None or len(tree) + len(parts.keys) > _MOST or len(path) == _DEEPEST:
            return False
        seen[id(x)] = len(seen)
        tree[path] = kind, parts.names()
        paths = [(*path, (parts.attributes, key)) for key in parts.keys]
        return all(_open(part, at, tree, free, known, seen) for at, part in zip(paths, parts.values, strict=True))
    return True


def _exactly(x: Any) -> Any:
    return (type(x), x.tobytes()) if isinstance(x, np.generic) else (type(x), repr(x))


class Parts(NamedTuple):
    """Those of one container or record. attributes: whether the keys are names of such."""

    attributes: bool
    keys: Sequence[Any]
    values: Iterable[Any]

    def names(self) -> Any:
        """The keys in order, as they are compared."""
        keys = self.keys
        return keys if isinstance(keys, range) else [key if type(key) is str else _exactly(key) for key in keys]


def parts_of(x: Any) -> Parts | None:
    kind = type(x)
    if kind in (list, tuple) or (issubclass(kind, tuple) and "_fields" in vars(kind) and not kind.__dictoffset__):
        return Parts(False, range(len(x)), tuple.__iter__(x) if issubclass(kind, tuple) else x)
    if kind in (dict, OrderedDict):
        return Parts(False, list(x), x.values()) if all([type(key) in PURE for key in x]) else None
    if _is_record(kind):
        members = _members(x)
        return Parts(True, list(members), members.values())
    return None


def _is_record(kind: type) -> bool:
    """One whose objects have no identity that Python would go by, as by a hash."""
    by_value = kind.__hash__ is not object.__hash__ and kind.__eq__ is not object.__eq__
    named = "__dataclass_fields__" in vars(kind) or kind in _NAMESPACES
    return by_value and named and not _hides(kind)


@lru_cache(maxsize=256)
def _hides(kind: Any) -> bool:
    return kinds.hides(kind, (types.SimpleNamespace,)) or hasattr(kind, "__del__")


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
        x = _members(x)[key] if attribute else tuple.__getitem__(x, key) if isinstance(x, tuple) else x[key]
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
    found = parts_of(x) or Parts(False, (), ())
    paths = [(*path, (found.attributes, key)) for key in found.keys]
    parts = (_replace(part, at, others, known, done) for at, part in zip(paths, found.values, strict=True))
    if issubclass(kind, tuple):
        return done.setdefault(id(x), tuple.__new__(kind, parts))
    base = object if not issubclass(kind, (list, dict, types.SimpleNamespace)) else kind
    new = done[id(x)] = base.__new__(kind)
    if kind is list:
        new.extend(parts)
        return new
    slots = _slots(kind)
    for key, part in zip(found.keys, parts, strict=True):
        if not found.attributes:
            new[key] = part
        elif key in slots:
            slots[key].__set__(new, part)
        else:
            object.__getattribute__(new, "__dict__")[key] = part
    return new


def kinds_in(x: Any) -> set[type]:
    """The types of containers and records in it."""
    return {value[0] for value in (opened(x) or {}).values() if isinstance(value[1], (range, list))}
