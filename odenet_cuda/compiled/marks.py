"""What a call of func leaves behind in Python, found and put back: a reading leaves no marks."""

import pickle
import random
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CellType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .kinds import COUNTING
from .memory import has_memory
from .reach import Reach

_MISSING = object()
_MOST_BYTES = 256 << 20  # of tensors and arrays that a reading copies


class Unreadable(Exception):
    """A field that cannot be compiled; the words say which operation, and where in the source."""


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Not of tensors without memory of their own, whose numbers are not looked at."""
    if not (has_memory(x) and has_memory(y)):
        return _empty(x) and _empty(y) and x.shape == y.shape and x.dtype == y.dtype and x.device == y.device
    if x.shape != y.shape or x.dtype != y.dtype or x.device != y.device:
        return False
    return torch.equal(*[part.detach().reshape(-1).contiguous().view(torch.uint8) for part in (x, y)])


def _empty(x: Tensor) -> bool:
    """Whether this is a tensor without numbers; there is nothing of it to be changed."""
    return type(x).__torch_dispatch__ is Tensor.__torch_dispatch__ and not is_lazy(x) and not x.is_nested and x.numel() == 0


def _check_tensors(reach: Reach) -> None:
    """Raises Unreadable where a call could change what cannot be put back, or what is not worth a copy."""
    size = sum(x.nbytes for x, _ in reach.arrays.values())
    for x in reach.tensors.values():
        if has_memory(x):
            size += x.numel() * x.element_size()
        elif not _empty(x):
            raise Unreadable(f"func reaches a tensor that is {_kind(x)}, whose changes cannot be seen")
    if size > _MOST_BYTES:
        raise Unreadable(f"func reaches tensors and arrays of {size >> 20} MB, more than {_MOST_BYTES >> 20}")


def _kind(x: Tensor) -> str:
    if is_lazy(x):
        return "not initialized yet"
    kinds = {"quantized": x.is_quantized, "nested": x.is_nested, "a view to be conjugated": x.is_conj()}
    kinds |= {
        "a view to be negated": x.is_neg(),
        "on meta": x.device.type == "meta",
        str(x.layout): x.layout is not torch.strided,
    }
    return next((name for name, found in kinds.items() if found), f"a {type(x).__name__}")


def _state(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def _copy(container: Any) -> Any:
    return dict(container) if hasattr(container, "items") else set(container) if isinstance(container, set) else list(container)


def _same(container: Any, before: Any) -> bool:
    if len(container) != len(before):
        return False
    if isinstance(before, set):
        return container == before
    if isinstance(before, dict):
        return all(container.get(key, _MISSING) is value for key, value in before.items())
    return all(x is y for x, y in zip(container, before, strict=True))


@dataclass
class Changes:
    """What a call of func has written. items: of dicts, no more than tensors or None before, that hold a tensor now and may be
    written before they are read in every call. numbers: owners and keys, as of slots, with their paths, of numbers that are
    others now. tensors: written in place. paths: of all else."""

    items: list[tuple[dict[str, Any], Any]] = field(default_factory=list)
    numbers: list[tuple[Any, Any, str]] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)


class Marks:
    """All that func reaches as it was, but for torch's own generators.

    hooks: those of tensors are off meanwhile. Raises Unreadable where a tensor cannot be put back.
    """

    def __init__(self, reach: Reach, hooks: bool = True):
        _check_tensors(reach)
        self._reach = reach
        self._containers = [(x, _copy(x), path) for x, path in reach.containers]
        self._dicts = {id(x) for x, _ in reach.containers if isinstance(x, dict)}
        self._globals = [(names, name, names.get(name, _MISSING)) for names, name in reach.globals]
        self._cells = [(cell, _content(cell), path) for cell, path in reach.cells]
        self._classes = [(part, dict(vars(part))) for part in reach.classes]
        self._slotted = [(x, name, getattr(x, name), path) for x, name, path in reach.slotted]
        self._tensors = [
            (x, x.detach().clone(), x.requires_grad, x.grad if x.is_leaf else None)
            for x in reach.tensors.values()
            if has_memory(x)
        ]
        self._arrays = [(x, x.copy(), path) for x, path in reach.arrays.values()]
        self._hooks = [(x, x._backward_hooks) for x in reach.tensors.values() if hooks and x._backward_hooks]
        for x, _ in self._hooks:  # they are for gradients of the user's
            x._backward_hooks = None
        self._generators = [*reach.generators, np.random.mtrand._rand, random._inst]  # type: ignore[attr-defined]
        self._states = [_state(x) for x in self._generators]

    def random(self) -> bool:
        """Whether numbers were drawn that the recording cannot see."""
        now = [pickle.dumps(_state(x)) for x in self._generators]
        return now != [pickle.dumps(state) for state in self._states]

    def changes(self) -> Changes:
        """What func has written besides what it only counts with by its code."""
        found = Changes()
        for owner, key, old, new, path in self._differences():
            if self._counted(owner, key, old, new):
                continue
            if type(old) is type(new) and type(old) in COUNTING:
                found.numbers.append((owner, key, path))
            elif id(owner) in self._dicts and isinstance(new, Tensor) and _may_hold_tensor(old):
                found.items.append((owner, key))
            else:
                found.paths.append(path)
        for x, value, requires_grad, _ in self._tensors:
            if x.requires_grad != requires_grad or x.shape != value.shape or x.dtype != value.dtype:
                found.paths.append(f"a tensor {list(x.shape)}")
            elif not same_bits(x, value):
                found.tensors.append(x)
        found.paths += [path for x, value, path in self._arrays if x.tobytes() != value.tobytes()]
        return found

    def _differences(self) -> Iterator[tuple[Any, Any, Any, Any, str]]:
        """Of all but tensors and arrays: owner and key as slots have them, what was there and what is, and the path."""
        for container, before, path in self._containers:
            if _same(container, before):
                continue
            if isinstance(before, dict):
                for key in {*before, *container}:
                    yield container, key, before.get(key, _MISSING), container.get(key, _MISSING), f"{path}.{key}"
            elif isinstance(before, list) and len(container) == len(before):
                for i, (old, new) in enumerate(zip(before, container, strict=True)):
                    yield container, i, old, new, f"{path}[{i}]"
            else:
                yield container, None, before, container, path
        for names, name, old in self._globals:
            yield names, name, old, names.get(name, _MISSING), name
        for part, before in self._classes:
            for name in {*before, *vars(part)}:
                yield part, name, before.get(name, _MISSING), vars(part).get(name, _MISSING), f"{part.__name__}.{name}"
        for cell, old, path in self._cells:
            yield cell, "cell_contents", old, _content(cell), f"a variable that {path} closes over"
        for x, name, old, path in self._slotted:
            yield x, name, old, getattr(x, name, _MISSING), f"{path}.{name}"

    def _counted(self, owner: Any, key: Any, old: Any, new: Any) -> bool:
        if old is new:
            return True
        if isinstance(owner, CellType):
            return isinstance(old, COUNTING) and all(slot.owner is not owner for slot in self._reach.slots)
        return type(old) is type(new) and self._reach.counted(key, old)

    def restore(self) -> None:
        for container, before, _ in self._containers:
            if _same(container, before):
                continue
            if isinstance(before, dict):
                kind = OrderedDict if isinstance(container, OrderedDict) else dict  # a Counter adds in its `update`
                for key in [key for key in container if key not in before]:
                    kind.__delitem__(container, key)
                for key, value in before.items():
                    kind.__setitem__(container, key, value)
            elif isinstance(before, set):
                container.clear()
                container.update(before)
            else:
                container.clear()
                container.extend(before)
        for names, name, old in self._globals:
            if old is _MISSING:
                names.pop(name, None)
            else:
                names[name] = old
        for part, before in self._classes:
            for name in {*before, *vars(part)}:
                if name not in before:
                    delattr(part, name)
                elif vars(part).get(name, _MISSING) is not before[name]:
                    setattr(part, name, before[name])
        for cell, old, _ in self._cells:
            if _content(cell) is not old:
                if old is _MISSING:
                    del cell.cell_contents
                else:
                    cell.cell_contents = old
        for x, name, old, _ in self._slotted:
            if getattr(x, name, _MISSING) is not old:
                object.__setattr__(x, name, old)
        with torch.no_grad():
            for x, value, requires_grad, grad in self._tensors:
                if not same_bits(x, value):  # batch norm writes without raising the version
                    if x.shape == value.shape and x.dtype == value.dtype:
                        x.data.copy_(value)
                    else:
                        x.data = value
                if x.requires_grad != requires_grad:
                    x.requires_grad_(requires_grad)
                if x.is_leaf and x.grad is not grad:
                    x.grad = grad
        for array, content, _ in self._arrays:
            if array.tobytes() != content.tobytes():
                array[...] = content
        for x, hooks in self._hooks:
            x._backward_hooks = hooks
        for generator, state in zip(self._generators, self._states, strict=True):
            _set_state(generator, state)


class Unset:
    """Stands where func writes before it reads: whatever else is done with it raises."""

    def _refuse(*args: Any, **kwargs: Any) -> Any:
        raise TypeError("func reads this before it writes it")

    __getattribute__ = __bool__ = __eq__ = __hash__ = __call__ = __len__ = __iter__ = __getitem__ = __contains__ = _refuse  # type: ignore
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __matmul__ = __rmatmul__ = (
        _refuse
    )
    __pow__ = __rpow__ = __neg__ = __lt__ = __le__ = __gt__ = __ge__ = __float__ = __int__ = __index__ = __array__ = _refuse


def _may_hold_tensor(x: Any) -> bool:
    return x is None or x is _MISSING or isinstance(x, Tensor)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return _MISSING


@contextmanager
def unmarked(reach: Reach, hooks: bool = True) -> Iterator[Marks]:
    """What is done inside is undone afterwards. hooks: as for Marks."""
    marks = Marks(reach, hooks)
    try:
        yield marks
    finally:
        marks.restore()
