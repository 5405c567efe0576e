"""What func does besides giving slopes, and whether a compiled solve, in which its Python does not run, can do it too.

A count is added to by as many calls as the solve takes the place of. What func keeps of its results, for a regularizer say,
would stay as it was, so such a func is refused unless it was compiled as pure; what it makes of its weights alone, such as a
weight that a hook computes of others, is the same at every call.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .counters import Counter, added
from .marks import Changes, Unreadable, same_bits

_UNDONE = "which a compiled solve does not do: compile(func, pure=True) where nobody minds"


class FirstCall(Unreadable):
    """func makes something at its first call, such as noise, and keeps it: once it has been called, it may be read."""


@contextmanager
def made_at_first(changes: Changes, restore: Callable[[], None]) -> Iterator[None]:
    """Raises FirstCall for Unreadable where there was nothing in the items that func has written. What has a gradient is none:
    that comes from the call that made it."""
    made = not any([owner[key].requires_grad for owner, key in changes.items])
    try:
        yield
    except Unreadable as error:
        restore()
        if made and changes.items and all([owner.get(key) is None for owner, key in changes.items]):
            raise FirstCall(str(error)) from error
        raise


_SAYS = frozenset({"print", "open", "input", "breakpoint"})


def refuse_output(named: Iterable[str]) -> None:
    """Raises Unreadable where func's code names what reaches the user by another way than its result."""
    for name in sorted(_SAYS & frozenset(named)):
        raise Unreadable(f"func calls {name}, {_UNDONE}")


def counted(
    slots: Sequence[Counter], tensors: Sequence[Tensor], call: Callable[[], Any], restore: Callable[[], None]
) -> list[Any]:
    """What a call adds to each number and tensor that func counts with. Raises Unreadable where it does something else."""
    if not slots and not tensors:
        return []
    found = added(slots, tensors, call, restore)
    if found is None:
        what = f"writes a tensor {list(tensors[0].shape)}" if tensors else "changes a number"
        raise Unreadable(f"func {what} at every call, and not by adding the same, {_UNDONE}")
    return found


def refuse_results(call: Any, given: Callable, items: Sequence[tuple[dict, Any]], restore: Callable[[], None]) -> None:
    """Raises Unreadable where func keeps something that depends on the time or the state. call, given: of trace.py."""
    if not items:
        return
    found: list[list[Any]] = []
    for index in range(2):
        with given() as args:
            field, inputs = call.field(index, args, list)
            field(*inputs)
        found.append([owner.get(key) for owner, key in items])
        restore()
    for (_, key), x, y in zip(items, *found, strict=True):
        tensors = isinstance(x, Tensor) and isinstance(y, Tensor)
        if not (x is y or (tensors and x.shape == y.shape and same_bits(x.detach(), y.detach()))):
            raise Unreadable(f"func keeps results in {str(key)!r}, {_UNDONE}")
