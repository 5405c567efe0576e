"""The callbacks that are methods of func."""

import warnings
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import nn

from .problem import Structure, parted

CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")
_NAMES = {suffix: frozenset([name + suffix for name in CALLBACKS]) for suffix in ("", "_adjoint")}
_PLAIN = nn.Module.__getattr__, nn.Module.__getattribute__


def may_have_callbacks(func: Any, suffix: str = "") -> bool:
    """Not where a Module or a function is sure to have none: that takes a while to ask by their attributes."""
    kind, names = type(func), _NAMES[suffix]
    if kind is FunctionType:
        return not names.isdisjoint(func.__dict__)
    if not isinstance(func, nn.Module) or (kind.__getattr__, kind.__getattribute__) != _PLAIN:
        return True
    own = func.__dict__
    held = own, own["_modules"], own["_parameters"], own["_buffers"]
    return not all(map(names.isdisjoint, held)) or any([hasattr(kind, name) for name in names])


def find_callbacks(func: Callable, structure: Structure, adaptive: bool, suffix: str = "") -> dict[str, Callable]:
    """The callbacks that are methods of func, by name, over leaves. Warns of those that the method cannot serve."""
    found: dict[str, Callable] = {}
    # For Dynamo of torch 2.11 an object whose attributes are another's has every attribute: the other is asked.
    owner = parted(func)[0]
    if not torch.compiler.is_compiling() and not may_have_callbacks(owner, suffix):
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
