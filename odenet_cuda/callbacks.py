"""The callbacks that are methods of func."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .problem import Structure, parted

CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")
_NAMES = {suffix: frozenset([name + suffix for name in CALLBACKS]) for suffix in ("", "_adjoint")}


def _has_none(owner: Any, names: frozenset[str]) -> bool:
    """Whether a look at its class and its own attributes shows that it has no callbacks; to ask a Module for what it has not
    takes it ten times as long."""
    kind = type(owner)
    if getattr(kind, "__getattr__", None) is not nn.Module.__getattr__ or torch.compiler.is_compiling():
        return False
    by_itself = not (names.isdisjoint(owner.__dict__) and names.isdisjoint(owner._modules))
    return not by_itself and not any([hasattr(kind, name) for name in names])


def find_callbacks(func: Callable, structure: Structure, adaptive: bool, suffix: str = "") -> dict[str, Callable]:
    """The callbacks that are methods of func, by name, over leaves. Warns of those that the method cannot serve."""
    found: dict[str, Callable] = {}
    # For Dynamo of torch 2.11 an object whose attributes are another's has every attribute: the other is asked.
    owner = parted(func)[0]
    if _has_none(owner, _NAMES[suffix]):
        return found
    for name in CALLBACKS:
        callback = getattr(owner, name + suffix, None)
        if callback is None:
            continue
        if not adaptive and name != "callback_step":
            warnings.warn(f"a method without step control does not support callbacks {{{name + suffix!r}}}", stacklevel=4)
        elif suffix:
            found[name] = callback
        else:
            found[name] = lambda t, leaves, dt, call=callback: call(t, structure.unflatten(leaves), dt)
    return found
