"""One reading of a field: what it reaches, where its tensors are found again, and the guards that come of it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .guards import Guards, Numbers, Place, Unguarded, is_number
from .marks import Marks, unmarked
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
        self.numbers = Numbers(slots, [i for i in numbers[1] if is_number(args[i])], args, like)

    def unmarked(self) -> AbstractContextManager[Marks]:
        if self.reach.refusal:
            raise Unreadable(self.reach.refusal)
        return unmarked(self.reach)

    def place(self, tensor: Tensor, args: Sequence[Any]) -> Place | None:
        """Where this tensor is found again, or another that has the same memory; None if nowhere."""
        number = self.numbers.place(tensor)
        if number is not None:
            return number
        for i, x in enumerate(args):
            if x is tensor or (isinstance(x, Tensor) and _lies_as(tensor, x)):
                return _argument(i)
        slot = self._slot_of(self.original(tensor))
        return None if slot is None else _of(slot)

    def original(self, tensor: Tensor) -> Tensor:
        """The tensor that func reaches which this one is, or whose memory it has, as what .data gives."""
        if id(tensor) in self.reach.tensors or tensor.layout is not torch.strided or not tensor.numel():
            return tensor
        return next((x for x in self.reach.tensors.values() if _lies_as(tensor, x)), tensor)

    def _slot_of(self, tensor: Tensor) -> Slot | None:
        return next((slot for slot in self.reach.slots if slot.value is tensor), None)

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
        slot.set(slot.value)
    except (TypeError, AttributeError, ValueError):
        return False
    return slot.key != "__class__"


def _lies_as(x: Tensor, y: Tensor) -> bool:
    if y.layout is not torch.strided or x.device != y.device or x.dtype != y.dtype or (y.requires_grad and x.requires_grad):
        return False
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()


def _argument(i: int) -> Place:
    return lambda args: args[i]


def _of(slot: Slot) -> Place:
    owner, key = slot.owner, slot.key
    return (lambda args: getattr(owner, key)) if slot.attribute else (lambda args: owner[key])
