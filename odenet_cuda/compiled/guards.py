"""What a plan has read from Python, compared at every call: all of it must be found again, by its path, as it was.

Identity is compared for objects, modules and functions; type and value for numbers and strings; content for small arrays and
for tensors whose values Python read. Tensors of the graph may be replaced by others of their shape and type.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from operator import attrgetter, getitem, is_
from typing import Any

import torch
from torch import Tensor

from .. import _C
from .kinds import NUMBERS
from .marks import same_bits
from .memory import has_memory
from .numbers import KINDS, Numbers, Place, Root
from .reach import Reach
from .sameness import Unguarded, frozen, same_number
from .trees import has_any, numbers_changed, opened
from .walk import LARGEST_ARRAY, Slot
from .writes import memory_of

_meta = attrgetter("requires_grad", "dtype", "shape", "device", "__class__")  # of a tensor


class Guards:
    """All that a reading saw. `hold` says whether it is still so, in some microseconds."""

    def __init__(
        self,
        reach: Reach,
        args: Sequence[Any],
        numbers: Numbers,
        written: Sequence[tuple[Any, Any]] = (),
        counted: Sequence[Slot] = (),
        counting: Sequence[Tensor] = (),
        rows: Sequence[Place] = (),
    ):
        """written: items that func writes before it reads them; it may ask what kind of thing they hold. counted: where it only
        counts, with any number of this type; counting: tensors with which it does, whose memory nothing else may have.
        rows: of tensors that may be replaced by others, with one row for each sample of a solve."""
        self.numbers, self._by_identity = numbers, reach.by_identity
        self._dead: list[Any] = []  # objects that are gone, which come back no more
        self._gone: list[Any] = []  # tensors
        given = {(id(root.slot.owner), root.slot.key) for root in numbers.roots if root.slot is not None}
        given |= {(id(owner), key) for owner, key in written}
        of_samples = [place(args) for place in rows]
        self._rows = [(place, _meta_of_rows(x)) for place, x in zip(rows, of_samples, strict=True)]
        given |= {(id(slot.owner), slot.key) for slot in reach.slots if any([slot.value is x for x in of_samples])}
        # a global name may be in many functions
        once = {(id(slot.owner), slot.key, slot.attribute): slot for slot in reach.slots}
        slots = [slot for key, slot in once.items() if key[:2] not in given]
        items, attributes = [slot for slot in slots if not slot.attribute], [slot for slot in slots if slot.attribute]
        values = [slot.value for slot in (*items, *attributes)]
        self._owners, self._keys = [slot.owner for slot in items], [slot.key for slot in items]
        self._objects, self._names = [_reference(slot.owner) for slot in attributes], [slot.key for slot in attributes]
        places = {(id(slot.owner), slot.key) for slot in counted}
        self._counted = {i for i, slot in enumerate((*items, *attributes)) if (id(slot.owner), slot.key) in places}
        self._paths = [slot.path for slot in (*items, *attributes)]
        self._trees = {i: tree for i, value in enumerate(values) if (tree := opened(value)) and has_any(tree, KINDS)}
        self._counting = [i for i, value in enumerate(values) if any([value is x for x in counting])]
        for slot in slots:  # the places alone are kept: a plan keeps nothing alive that func has let go
            slot.value = None
        self._ids = [id(value) for value in values]
        self._kept = [self._hold(value) for value in values]
        self._metas = {i: _meta(value) for i, value in enumerate(values) if isinstance(value, Tensor)}
        self._tensors, self._tensor_metas = list(self._metas), list(self._metas.values())
        metas = [self._metas.get(i) for i in range(len(values))]
        self._named = {i for i in self._metas if vars(values[i])}  # with attributes of Python, which another may not have
        self._keep_containers(reach)
        found = self._owners, self._keys, self._objects, self._names, self._ids, metas
        self._lists = *found, self._sized, self._lengths, self._ordered, self._order  # see csrc/guards.cpp
        self._absent = reach.absent
        self._sets = [(x, list(map(frozen, x))) for x in reach.sets]  # in order, which func may go by
        self._dtype = torch.get_default_dtype()
        self._known = reach.known
        self._others = [i for i, x in enumerate(args) if not isinstance(x, Tensor) and not numbers.has(i)]
        seen: dict[int, int] = {}
        numbers.opened(args, seen)
        self._args = self._frozen(args, seen)
        self._given = {i: tree for i in self._others if (tree := opened(args[i])) is not None}
        self._keep_arrays(reach)
        self._ties: list[tuple[Place, Place]] = []
        self._contents: list[tuple[Place, Tensor]] = []
        self._written = list(written)
        self._kinds_before = self._kinds(args)
        self._look()

    def _keep_arrays(self, reach: Reach) -> None:
        self._arrays: list[tuple[Any, bytes, Any]] = []
        self.refusal = ""
        for array, path in reach.arrays.values():
            if array.nbytes > LARGEST_ARRAY:
                self.refusal = f"{path} is an array of {array.nbytes} bytes, more than {LARGEST_ARRAY}: make it a tensor"
            else:
                self._arrays.append((weakref.ref(array, self._dead.append), array.tobytes(), (array.shape, array.dtype)))

    def _keep_containers(self, reach: Reach) -> None:
        """Their lengths, and the keys of dicts in order."""
        self._sized = [container for container, _ in reach.sized]
        self._lengths = [len(container) for container in self._sized]
        self._wanted = [(wanted, frozenset(container) if wanted is not None else None) for container, wanted in reach.sized]
        whole = [x for x, wanted in reach.sized if wanted is None and isinstance(x, dict)]
        self._ordered = [x for x in whole if len(x) > 1 or any([type(key) is not str for key in x])]
        self._order = list(chain.from_iterable(self._ordered))

    def _look(self) -> None:
        """Whether there is anything besides the lists."""
        self._more = any(map(bool, (self._absent, self._arrays, self._sets, self._written, self._others, self.numbers)))
        self._more = self._more or bool(self._ties or self._contents)

    def _hold(self, value: Any) -> Any:
        """Keeps it, weakly where that is possible: a plan keeps no module alive."""
        try:
            return weakref.ref(value, (self._gone if isinstance(value, Tensor) else self._dead).append)
        except TypeError:
            return value

    # What a recording adds

    def tie(self, places: Sequence[Place]) -> None:
        """One tensor is found at all of these: the program cannot tell them apart."""
        self._ties += [(places[0], other) for other in places[1:]]
        self._look()

    def keep_content(self, tensor: Tensor, place: Place, why: str, content: Tensor | None = None) -> None:
        """content: as it was read. Raises Unguarded where it is too large to be compared at every call, or is trained."""
        if tensor.requires_grad:
            raise Unguarded(
                f"func reads the values of a tensor {list(tensor.shape)} that requires a gradient into Python: {why}"
            )
        if not has_memory(tensor):
            raise Unguarded(f"func reads the values of a tensor {list(tensor.shape)} that are not plainly in memory: {why}")
        if tensor.numel() * tensor.element_size() > LARGEST_ARRAY:
            raise Unguarded(f"func reads the values of a tensor {list(tensor.shape)} into Python, which is too large: {why}")
        self._contents.append((place, tensor.detach().clone() if content is None else content))
        self._look()

    @property
    def alive(self) -> bool:
        """Whether all objects that a plan was read with still exist."""
        return not self._dead

    # At every call

    def hold(self, args: Sequence[Any], batch: int | None = None) -> bool:
        """batch: how many samples there are, where that is asked."""
        if self._dead or (self._rows and not self._rows_hold(args, batch)):
            return False
        if not self._gone and not self._counting and _C.unchanged(self._lists):
            return torch.get_default_dtype() is self._dtype if not self._more else self._holds_besides(args)
        return self._takes_over(args)

    def _takes_over(self, args: Sequence[Any]) -> bool:
        """The same where something is another thing now, which may be as good."""
        try:
            values = list(self._values())
            ids = list(map(id, values))
            if (ids != self._ids or self._gone) and self._changes(values):
                return False
            if list(map(len, self._sized)) != self._lengths and not self._grown():
                return False
            if not all(map(is_, chain.from_iterable(self._ordered), self._order)):
                return False
            if list(map(_meta, map(values.__getitem__, self._tensors))) != self._tensor_metas:
                return False
            if self._counting and self._share(values, args):
                return False
            return self._rest(args)
        except Exception:  # something is not where it was, or the user's objects cannot be asked
            return False

    def _rows_hold(self, args: Sequence[Any], batch: int | None) -> bool:
        try:
            found = [(place(args), meta) for place, meta in self._rows]
            return all([_meta_of_rows(x) == meta and batch in (None, len(x)) for x, meta in found])
        except Exception:
            return False

    def _values(self) -> Iterator[Any]:
        objects = [reference() for reference in self._objects]
        return chain(map(getitem, self._owners, self._keys), map(getattr, objects, self._names))

    def _share(self, values: list[Any], args: Sequence[Any]) -> bool:
        """Whether what func counts with lies in the memory of something else: that changes with it then."""
        others = [values[i] for i in self._tensors if i not in self._counting]
        others += [x for x in args if isinstance(x, Tensor)]
        counting = {memory_of(values[i]) for i in self._counting}
        return any([memory_of(x) in counting for x in others if has_memory(x)])

    def _holds_besides(self, args: Sequence[Any]) -> bool:
        try:
            return self._rest(args)
        except Exception:
            return False

    def _rest(self, args: Sequence[Any]) -> bool:
        """What most fields have none of."""
        if self._ties and any([place(args) is not other(args) for place, other in self._ties]):
            return False
        if self._absent and any([name in names for names, name in self._absent]):
            return False
        if self._written and self._kinds(args) != self._kinds_before:
            return False
        for reference, content, kind in self._arrays:
            array = reference()
            if (array.shape, array.dtype) != kind or array.tobytes() != content:
                return False
        if self._sets and any([list(map(frozen, x)) != before for x, before in self._sets]):
            return False
        if self._contents and not all([same_bits(place(args), before) for place, before in self._contents]):
            return False
        seen: dict[int, int] = {}
        if self.numbers and not self.numbers.hold(args, seen):
            return False
        if self._others and self._frozen(args, seen) != self._args:
            return False
        return torch.get_default_dtype() is self._dtype

    def _frozen(self, args: Sequence[Any], seen: dict[int, int]) -> list[Any]:
        return [frozen(args[i], self._known, seen) for i in self._others]

    def _kinds(self, args: Sequence[Any]) -> list[Any]:
        """Of the items that func writes: nothing, or a type, and whether it is a tensor that func finds elsewhere too."""
        held = [(items[key],) if key in items else () for items, key in self._written]
        known = {*self._ids, *map(id, args)}
        return [[(type(x), isinstance(x, Tensor) and id(x) in known) for x in value] for value in held]

    def _changes(self, values: list[Any]) -> bool:
        """Whether a slot holds something else now. Equal numbers, and tensors of the same kind, are taken over."""
        changed = [i for i, value in enumerate(values) if self._is_other(i, value)]
        if not changed:
            self._gone.clear()
        return bool(changed)

    def _is_other(self, i: int, value: Any) -> bool:
        if id(value) == self._ids[i] and not (i in self._metas and self._kept[i]() is not value):
            return False
        if i in self._metas:
            same = isinstance(value, Tensor) and _meta(value) == self._metas[i] and not (vars(value) or i in self._named)
        elif i in self._counted:
            same = type(value) is type(self._kept[i])
        else:
            same = isinstance(value, NUMBERS) and not self._by_identity and same_number(self._kept[i], value)
        if same:
            self._ids[i], self._kept[i] = id(value), self._hold(value)
        return not same

    def _grown(self) -> bool:
        """Whether containers changed in size only by attributes that no code names."""
        for place, (container, length) in enumerate(zip(self._sized, self._lengths, strict=True)):
            wanted, before = self._wanted[place]
            if len(container) != length:
                if wanted is None or before is None or (set(container) ^ before) & wanted:
                    return False
                self._lengths[place], self._wanted[place] = len(container), (wanted, frozenset(container))
        return True

    # What changed

    def changed(self, args: Sequence[Any]) -> str:
        """The path of something that does not hold, or "" where that is not known."""
        with suppress(Exception):
            seen: dict[int, int] = {}
            self.numbers.opened(args, seen)
            now = self._frozen(args, seen)
            return next(f"args[{i}]" for i, x, before in zip(self._others, now, self._args, strict=True) if x != before)
        return next((path for i, path in enumerate(self._paths) if self._differs(i)), "")

    def _differs(self, i: int) -> bool:
        try:
            value, kept = self._slot(i).get(), self._kept[i]
            dead = i in self._trees and isinstance(kept, weakref.ref) and kept() is not value  # another has its address
            return dead or self._is_other(i, value)
        except Exception:
            return True

    def changed_numbers(self, args: Sequence[Any]) -> list[Root]:
        """Of the program, and where there are others now and all else is as it was."""
        roots = [Root(root.slot, root.index, dict(root.paths), root.before) for root in self.numbers.roots]
        roots += [Root(self._slot(i), 0, {}, tree) for i, tree in self._trees.items() if self._differs(i)]
        roots += [Root(None, i, {}, tree) for i, tree in self._given.items()]
        for root in roots:
            try:
                root.paths |= dict.fromkeys(numbers_changed(root.before, opened(root.get(args)), KINDS))
            except Exception:  # it is gone
                root.paths.clear()
        return [root for root in roots if root.paths]

    def _slot(self, i: int) -> Slot:
        n = len(self._owners)
        owner = self._owners[i] if i < n else self._objects[i - n]()
        return Slot(owner, self._keys[i] if i < n else self._names[i - n], i >= n, None, self._paths[i])


def _meta_of_rows(x: Tensor) -> tuple[Any, ...]:
    return x.requires_grad, x.dtype, x.shape[1:], x.dim(), x.device, x.__class__, not vars(x)


def _reference(x: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(x)
    except TypeError:
        return lambda: x
