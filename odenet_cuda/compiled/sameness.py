"""When two things of Python are the same to func."""

from collections.abc import Container
from typing import Any

import numpy as np
from torch import Tensor

from .kinds import CONTAINERS, PURE
from .walk import LARGEST_ARRAY


class Unguarded(Exception):
    """Something that cannot be compared at every call; in words."""


def same_number(x: Any, y: Any) -> bool:
    """1, 1.0 and True are three, and so are 0.0 and -0.0; a NaN is like itself. Members of an enum are so alone."""
    if type(x) is not type(y) or type(x) not in PURE:
        return x is y
    return x is y or (repr(x) == repr(y) if not isinstance(x, np.generic) else x.tobytes() == y.tobytes())


def frozen(x: Any, known: Container[int] = (), seen: dict[int, int] | None = None) -> Any:
    """An argument as something to be compared by. known, seen: of containers and arrays, as for `trees.opened`."""
    if seen is not None and isinstance(x, (np.ndarray, *CONTAINERS)):  # func may ask by `is`
        if id(x) in seen:
            return "again", seen[id(x)]
        seen[id(x)] = len(seen)
        return id(x) in known and id(x), _content(x, known, seen)
    return _content(x, known, seen)


def _content(x: Any, known: Container[int], seen: dict[int, int] | None) -> Any:
    if isinstance(x, np.ndarray):
        if x.dtype.hasobject or x.nbytes > LARGEST_ARRAY:
            raise Unguarded(
                f"args holds an array of {x.nbytes} bytes, more than {LARGEST_ARRAY}, or of objects; give it as a tensor"
            )
        return np.ndarray, x.dtype.str, x.shape, x.tobytes()
    if isinstance(x, np.generic):
        return type(x), x.tobytes()
    if type(x) in PURE:
        return type(x), repr(x)
    if isinstance(x, Tensor):
        raise Unguarded("args holds a tensor within a list or dict; give it as an argument of its own")
    if isinstance(x, dict):
        return type(x), tuple([(frozen(key), frozen(value, known, seen)) for key, value in x.items()])
    if isinstance(x, CONTAINERS):
        return type(x), tuple([frozen(part, known, seen) for part in x])
    return Same(x)


class Same:
    """An object that is like itself alone."""

    def __init__(self, x: Any):
        self.x = x

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Same) and other.x is self.x

    def __hash__(self) -> int:
        return object.__hash__(self.x)
