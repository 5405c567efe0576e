"""The callbacks that are methods of func."""

import warnings
from collections.abc import Callable

from .problem import Structure, parted

CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")


def find_callbacks(func: Callable, structure: Structure, adaptive: bool, suffix: str = "") -> dict[str, Callable]:
    """The callbacks that are methods of func, by name, over leaves. Warns of those that the method cannot serve."""
    found: dict[str, Callable] = {}
    # For Dynamo of torch 2.11 an object whose attributes are another's has every attribute: the other is asked.
    owner = parted(func)[0]
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
