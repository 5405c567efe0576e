"""One reading of a field: what it reaches, where its tensors are found again, and the guards that come of it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .guards import Guards, Unguarded
from .marks import Marks, unmarked
from .memory import has_memory
from .numbers import Numbers, Place, is_number
from .reach import Reach, Slot
from .trace import Unreadable


class Reading:
    """numbers: owners with keys, and places in args, of numbers that become arguments of the program."""

    def __init__(
        self,
        func: Callable,
        args: Sequence[Any],
        numbers: tuple[Sequence[tuple[Any, Any]], Sequence[int]] = ((), ()),
        like: Tensor | None = None,
    ):
        self.reach = Reach(func, args)
        wanted = {(id(owner), key) for owner, key in numbers[0]}
        slots = [s for s in self.reach.slots if (id(s.owner), s.key) in wanted and is_number(s.value) and _writable(s)]
        places = [i for i in numbers[1] if is_number(args[i])]
        if "type" in self.reach.names.globals | self.reach.names.attributes:  # it would tell what stands for a number
            slots, places = [], []
        self.numbers = Numbers(slots, places, args, None if like is None else like.device)

    def unmarked(self, device: torch.device) -> AbstractContextManager[Marks]:
        if self.reach.refusal:
            raise Unreadable(self.reach.refusal)
        return unmarked(self.reach, device)

    def places(self, tensor: Tensor, args: Sequence[Any], batched: Sequence[int]) -> list[Place]:
        """All where this tensor is found again, or the one that has its memory, such as that of which it is the .data. batched:
        of which args func is given others in a recording. Raises Unreadable where it might be one of several."""
        number = self.numbers.place(tensor)
        if number is not None:
            return [number]
        shared = [(i, x) for i, x in enumerate(args) if isinstance(x, Tensor) and i not in batched]
        known = {**self.reach.tensors, **{id(x): x for _, x in shared}}
        if id(tensor) not in known:
            found = [x for x in known.values() if _lies_as(tensor, x)]
            if len(found) > 1:
                raise Unreadable(f"func uses the memory of a tensor {list(tensor.shape)} that several tensors have")
            tensor = found[0] if found else tensor
        slots = [_of(slot) for slot in self.reach.slots if slot.value is tensor]
        return slots + [_argument(i) for i, x in shared if x is tensor]

    def guards(self, args: Sequence[Any], written: Sequence[tuple[Any, Any]] = ()) -> Guards:
        """Ends the reading. Raises Unreadable where something cannot be compared at every call."""
        try:
            guards = Guards(self.reach, args, self.numbers, written)
        except Unguarded as error:
            raise Unreadable(str(error)) from None
        if guards.refusal:
            raise Unreadable(guards.refusal)
        return guards


def _writable(slot: Slot) -> bool:
    try:
        slot.set(slot.get())
    except (TypeError, AttributeError, ValueError):
        return False
    return slot.key != "__class__"


def _lies_as(x: Tensor, y: Tensor) -> bool:
    if not has_memory(x) or not has_memory(y) or x.device != y.device or x.dtype != y.dtype:
        return False
    if y.requires_grad and x.requires_grad:
        return False
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()


def _argument(i: int) -> Place:
    return lambda args: args[i]


def _of(slot: Slot) -> Place:
    owner, key = slot.owner, slot.key
    return (lambda args: getattr(owner, key)) if slot.attribute else (lambda args: owner[key])
