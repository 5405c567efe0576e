"""One reading of a field: what it reaches, where its tensors are found again, and the guards that come of it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .guards import Guards
from .marks import Marks, unmarked
from .memory import has_memory
from .numbers import KINDS, Numbers, Place, Root
from .reach import Reach
from .sameness import Unguarded
from .trace import Recording, Unreadable
from .trees import opened, parts_of
from .walk import Slot


class Reading:
    """roots: of numbers that become arguments of the program. Raises Unreadable where they cannot."""

    def __init__(self, func: Callable, args: Sequence[Any], roots: Sequence[Root] = (), like: Tensor | None = None):
        closed = [x for x in (root.get(args) for root in roots) if parts_of(x) is not None]
        self.reach = Reach(func, args, closed)
        if roots and "type" in self.reach.names.globals | self.reach.names.attributes:
            raise Unreadable("func asks for types, which would tell what stands for a number")
        if roots and self.reach.by_identity:
            raise Unreadable("func asks by `is`, which would tell what stands for a number")
        known = self.reach.known
        self.numbers = Numbers(self._reached(roots, args, known), args, known, None if like is None else like.device)

    def _reached(self, roots: Sequence[Root], args: Sequence[Any], known: frozenset[int]) -> list[Root]:
        """Those that func still comes upon, each there alone and apart from the others. A number is one wherever it is."""
        found: list[Root] = []
        inside = {i: 0 for i in self.reach.given}  # other containers
        for root in roots:
            x, slot = root.get(args), root.slot
            places = [s for s in self.reach.slots if slot and s.owner is slot.owner and s.key == slot.key]
            ways, parts = self.reach.met.get(id(x)), dict[int, int]()
            if slot and not places and not ways:
                continue  # it lies in another that is closed, or func comes to it no more
            writable = slot is None or (bool(places) and _writable(places[0]))
            if ways is None and not writable:
                continue
            tree = opened(x, (), known, parts)
            shared = ways not in (None, len(places) if slot else 1) or not parts.keys().isdisjoint(inside)
            if shared or not writable or tree is None or not all([tree.get(path, (None,))[0] in KINDS for path in root.paths]):
                raise Unreadable("func comes upon what holds a number that changes in several ways")
            inside |= parts
            found.append(Root(slot, root.index, root.paths, opened(x) or {}))
        return found

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

    def guards(self, args: Sequence[Any], recording: "Recording | None" = None, rows: Sequence[Place] = ()) -> Guards:
        """Ends the reading. rows: of tensors with one row a sample. Raises Unreadable where something cannot be compared at
        every call."""
        left: dict[str, Any] = {}
        if recording is not None:
            left = {name: getattr(recording, name) for name in ("written", "counted", "counting")}
        try:
            guards = Guards(self.reach, args, self.numbers, rows=rows, **left)
        except Unguarded as error:
            raise Unreadable(str(error)) from None
        if guards.refusal:
            raise Unreadable(guards.refusal)
        return guards


def _writable(slot: Slot) -> bool:
    try:
        slot.put(slot.get())
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
