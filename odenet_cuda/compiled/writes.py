"""What func writes: places of Python, and the memory that operations of the thread that calls it write into."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import CellType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .memory import has_memory
from .reach import REGISTRATION, Reach

MISSING = object()
_PARTS = ("_parameters", "_buffers", "_modules")
_SETTERS = {"setattr", "delattr", "register_buffer", "register_parameter", "register_module", "add_module", "load_state_dict"}


class Place(NamedTuple):
    """Of one value: an item of a dict, an attribute of a class, a slot of an object, or what a cell holds."""

    owner: Any
    key: Any
    slot: bool = False

    def get(self) -> Any:
        if self.slot:
            return getattr(self.owner, self.key, MISSING)
        if isinstance(self.owner, CellType):
            return content(self.owner)
        return (vars(self.owner) if isinstance(self.owner, type) else self.owner).get(self.key, MISSING)

    def put(self, value: Any) -> None:
        if self.slot:
            object.__delattr__(self.owner, self.key) if value is MISSING else object.__setattr__(self.owner, self.key, value)
        elif isinstance(self.owner, (type, CellType)):
            delattr(self.owner, self.key) if value is MISSING else setattr(self.owner, self.key, value)
        elif value is MISSING:
            self.owner.pop(self.key, None)
        else:
            self.owner[self.key] = value


def content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return MISSING


class Code:
    """What the code that reach has seen may write. What it does not is written by another thread."""

    def __init__(self, reach: Reach):
        self._reach = reach
        names = reach.names
        parts = {name for slot in reach.slots if slot.key in _PARTS for name in slot.value}
        hooks = [path for x, path in reach.containers if len(x) > 0 and "hooks" in path.rpartition(".")[2]]
        if not parts & names.stored:  # torch leaves a hook of registration behind where an export has failed
            hooks = [path for path in hooks if path != REGISTRATION]
        self._any = reach.everything or bool(hooks) or bool(_SETTERS & (names.globals | names.attributes))
        self._stored = names.stored | reach.owned
        self._stored |= {"grad"} if {"backward", "zero_grad"} & names.attributes else set()
        self._stored |= {"requires_grad"} if "requires_grad_" in names.attributes else set()
        self._read_cells = {id(slot.owner) for slot in reach.slots if slot.attribute}
        self._named = {id(slot.value) for slot in reach.slots if slot.key == "__dict__" or slot.key in _PARTS}

    def writes(self, name: str) -> bool:
        """Whether an attribute or a variable of this name is stored anywhere."""
        return self._any or name in self._stored

    def writes_item(self, container: Any, key: Any) -> bool:
        """Of a dict of attributes its code names the key; of any other container it need not."""
        return id(container) not in self._named or self.writes(key)

    def counts(self, place: Place, value: Any) -> bool:
        """Whether the code only counts there, so that this value is nowhere in the program."""
        if isinstance(place.owner, CellType) and not place.slot:
            return type(value) in (int, float) and id(place.owner) not in self._read_cells
        return self._reach.counted(place.key, value)


@contextmanager
def kept(reach: Reach, plan: Any, args: Sequence[Any]) -> Iterator[None]:
    """What func is known to write is put back afterwards: the items that it writes before it reads them, and what it counts.
    Nothing else is looked at."""
    recording = plan.recording
    code, names = Code(reach), reach.names.stored
    places = [Place(x, name) for x, _ in reach.containers if isinstance(x, dict) for name in names if name in x]
    places += [Place(part, name) for part in reach.classes for name in names if name in vars(part)]
    places += [Place(names, name) for names, name in reach.globals]
    places += [Place(cell, "cell_contents") for cell, *_ in reach.cells]
    places += [Place(x, name, True) for x, name, _ in reach.slotted]
    saved = [(place, value) for place in places if code.counts(place, value := place.get())]
    saved += [(place, place.get()) for place in (Place(items, key) for items, key in recording.written)]
    counted = [(slot, slot.get()) for slot in recording.counted]
    tensors = [(x, x.detach().clone()) for x in (place(args) for place in plan.counting)]
    try:
        yield
    finally:
        for place, value in saved:
            if place.get() is not value:
                place.put(value)
        for slot, value in counted:
            if slot.get() is not value:
                slot.put(value)
        with torch.no_grad():
            for x, value in tensors:
                x.detach().copy_(value)


class Watched(TorchDispatchMode):
    """While it is on: written, the memory that operations of this thread write into; drawn, whether they draw from torch's own
    random generators."""

    def __init__(self) -> None:
        super().__init__()
        self.written: set[int] = set()
        self.drawn = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.written |= {memory_of(x) for x in written_by(func, args, kwargs)}
        self.drawn = self.drawn or (torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None)
        return func(*args, **kwargs)


def written_by(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors with memory that an operation writes into."""
    found = []
    for i, argument in enumerate(func._schema.arguments if func._schema.is_mutable else ()):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[i] if i < len(args) else kwargs.get(argument.name)
            found += [x for x in tree_leaves(given) if isinstance(x, Tensor) and has_memory(x)]
    return found


def memory_of(x: Tensor) -> int:
    return x.untyped_storage()._cdata
