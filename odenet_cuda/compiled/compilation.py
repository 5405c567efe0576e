"""What is compiled: a func, with all that has been read of it. By the user's `compile`, or where `set_compile` says so.

What is read of a func that nobody compiled by name is kept as long as the func lives. A func that is made anew for each solve
would be read anew each time, so no more of its code is read once that has cost more than it brought.
"""

import os
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import torch

from ..sharding import train_together
from .plans import Plans
from .refusals import MOST_AHEAD, WORTH

_MOST_KEPT = 256  # of funcs
MADE_ANEW = (
    "func is made anew for every few solves, and would be read anew each time: keep it, and hand what differs to it in args"
)


class Compilation(NamedTuple):
    """func, and what has been read of it. cuda, matmul: see `compile`. named: whether the user compiled it by name. why: what
    speaks against reading it, or ""."""

    func: Callable[..., Any]
    plans: Plans
    cuda: bool = False
    matmul: str = "float32"
    named: bool = True
    why: str = ""


class _Kept:
    """Of a func that lives, by id: of a method that of its object, and its function."""

    MOST_CODES = 1024  # of the class: func may go when the names of the module are gone, at the end of a process

    def __init__(self) -> None:
        self.plans: dict[Any, tuple[weakref.ref, Plans]] = {}
        self.debts: dict[Any, int] = {}  # of each code: solves that the readings of funcs which are gone were not worth

    def of(self, func: Any) -> tuple[Plans, str] | None:
        """Its plans, and why no more is read; None where nobody would tell when it is gone."""
        owner, part = (func.__self__, func.__func__) if type(func) is MethodType else (func, None)
        key, code = (id(owner), part), _code_of(func)
        found = self.plans.get(key)
        if found is None or found[0]() is not owner:
            try:
                reference = weakref.ref(owner, lambda _: self._gone(key, code))
            except TypeError:
                return None
            if len(self.plans) >= _MOST_KEPT:
                self.plans.clear()
            found = self.plans[key] = reference, Plans()
        return found[1], MADE_ANEW if self.debts.get(code, 0) > WORTH * (MOST_AHEAD - 1) else ""

    def _gone(self, key: Any, code: Any) -> None:
        found = self.plans.pop(key, None)
        if found is not None and (found[1].debt or code in self.debts):
            if len(self.debts) >= self.MOST_CODES:
                self.debts.clear()
            self.debts[code] = max(0, self.debts.get(code, 0) + found[1].debt)


def _code_of(func: Any) -> Any:
    """What funcs that are made anew have in common."""
    if type(func) is MethodType:
        func = func.__func__
    return getattr(func, "__code__", type(func))


_KEPT = _Kept()
_OFF = frozenset({"0", "false", "off"})


def check_compile(mode: Any, name: str = "compile") -> Any:
    if mode is not False and mode != "auto":
        raise ValueError(f"{name} must be 'auto' or False, got {mode!r}")
    return mode


def _from_environment() -> str | bool | None:
    value = os.environ.get("ODENET_COMPILE", "").lower()
    return None if not value else False if value in _OFF else check_compile(value, "ODENET_COMPILE")


_asked: str | bool | None = _from_environment()


def set_compile(mode: str | bool) -> None:
    """Whether solves compile their func: "auto", where it can be read, or False, only where that was asked for by name.

    So one line makes a program faster that calls `odeint` and `odeint_adjoint`. The first solve of a func reads and compiles
    it, which takes seconds, once on a machine as far as the cache on disk goes; later ones compare what func reads, and
    `Solution.explanation` or `ODEBlock.explain` says why a func is not compiled. One that does more than count, such as keeping
    results, is left to the stepper; see `compile`. The environment variable ODENET_COMPILE says the same, "auto" or "0". With
    neither, an `ODEBlock` compiles its func and the functions do not.

    Raises ValueError for another mode.
    """
    global _asked
    _asked = check_compile(mode)


def mode_of_blocks(given: str | bool | None) -> str | bool:
    """What an ODEBlock does that was given this."""
    if given is not None:
        return given
    return "auto" if _asked is None else _asked


def automatic(func: Any, mode: str | bool | None) -> Compilation | None:
    """mode: what this solve was asked for, None: what all are. Not while torch compiles, which could not see through it, nor
    where processes train together, whose parameters may be elsewhere by the way back."""
    if torch.compiler.is_compiling() or train_together() or (_asked if mode is None else mode) != "auto" or not callable(func):
        return None
    found = _KEPT.of(func)
    return None if found is None else Compilation(func, found[0], named=False, why=found[1])
