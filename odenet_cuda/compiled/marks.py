"""What a call of func leaves behind in Python, found and put back: a reading leaves no marks."""

import pickle
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .kinds import COUNTING
from .memory import has_memory
from .reach import Reach
from .writes import MISSING, Code, Place, Watched, memory_of

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
        return all(container.get(key, MISSING) is value for key, value in before.items())
    return all(x is y for x, y in zip(container, before, strict=True))


def _other_numbers(container: Any, before: Any) -> list[int]:
    """Where a list holds other numbers now, if nothing else of it has changed."""
    if not isinstance(before, list) or len(container) != len(before):
        return []
    changed = [i for i, (old, new) in enumerate(zip(before, container, strict=True)) if old is not new]
    return changed if all([type(before[i]) is type(container[i]) and type(before[i]) in COUNTING for i in changed]) else []


@dataclass
class Changes:
    """What a call of func has written. items: of dicts, no more than tensors or None before, that hold a tensor now and may be
    written before they are read in every call. numbers: owners and keys, as of slots, with their paths, of numbers that are
    others now. counted: where numbers are that its code only counts with. tensors: written in place. paths: of all else.
    others: the paths of what another thread has written."""

    items: list[tuple[dict[str, Any], Any]] = field(default_factory=list)
    numbers: list[tuple[Any, Any, str]] = field(default_factory=list)
    counted: list[Place] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def count_rebound(self, restore: Callable[[], None]) -> bool:
        """Takes items for numbers that held one in a tensor before, and hold another tensor now. Whether there are any."""
        restore()
        held = [(items, key) for items, key in self.items if _is_one(items.get(key))]
        self.items = [(items, key) for items, key in self.items if not _is_one(items.get(key))]
        self.numbers += [(items, key, str(key)) for items, key in held]
        return bool(held)


def _is_one(x: Any) -> bool:
    return isinstance(x, Tensor) and x.numel() == 1 and not x.requires_grad


class Disturbed(Unreadable):
    """What func reads was changed by another thread while it was read: the next call reads it again."""


class _Tensor(NamedTuple):
    """A tensor as it was. memory: itself, where it lies."""

    x: Tensor
    memory: Tensor
    value: Tensor
    version: int
    requires_grad: bool
    grad: Tensor | None


class Marks:
    """All that func reaches as it was, but for torch's own generators, and what of it func has changed since. What its code
    cannot have written is another thread's, and is left alone: attributes and variables that no code stores, and tensors that
    operations elsewhere wrote into. Of lists, plain dicts and arrays nobody can tell; what has been changed of these is put
    back.

    watched: sees the operations since. Raises Unreadable where a tensor cannot be put back."""

    def __init__(self, reach: Reach, watched: Watched):
        _check_tensors(reach)
        self._reach, self._code, self._watched = reach, Code(reach), watched
        self._containers = [(x, _copy(x), path) for x, path in reach.containers]
        self._classes = [(part, dict(vars(part))) for part in reach.classes]
        places = [(Place(names, name), name, name) for names, name in reach.globals]
        places += [(Place(cell, "cell_contents"), name, f"{name} of {path}") for cell, path, name in reach.cells]
        places += [(Place(x, name, True), name, f"{path}.{name}") for x, name, path in reach.slotted]
        self._places = [(place, place.get(), name, path) for place, name, path in places]
        self._tensors = [
            _Tensor(x, x.detach(), x.detach().clone(), _version(x), x.requires_grad, x.grad if x.is_leaf else None)
            for x in reach.tensors.values()
            if has_memory(x)
        ]
        self._arrays = [(x, x.copy(), path) for x, path in reach.arrays.values()]
        self._generators = [*reach.generators, np.random.mtrand._rand, random._inst]  # type: ignore[attr-defined]
        self._states = [_state(x) for x in self._generators]

    def drawn(self) -> list[tuple[Any, Any, bool]]:
        """Generators that were drawn from besides torch's own, their states before, and whether func reaches them."""
        pairs = zip(self._generators, self._states, strict=True)
        found = [(x, state) for x, state in pairs if pickle.dumps(_state(x)) != pickle.dumps(state)]
        return [(x, state, any([x is own for own in self._reach.generators])) for x, state in found]

    def _differences(self) -> Iterator[tuple[Place, Any, Any, bool, str]]:
        """Of dicts, classes, variables and slots: where, what was there, what is, whether func may have written it, and its
        path."""
        for container, before, path in self._containers:
            if not isinstance(before, dict) or _same(container, before):
                continue
            for key in {*before, *container}:
                old, new = before.get(key, MISSING), container.get(key, MISSING)
                if old is not new:
                    yield Place(container, key), old, new, self._code.writes_item(container, key), f"{path}.{key}"
        for part, before in self._classes:
            for name in {*before, *vars(part)}:
                old, new = before.get(name, MISSING), vars(part).get(name, MISSING)
                if old is not new:
                    yield Place(part, name), old, new, self._code.writes(name), f"{part.__name__}.{name}"
        for place, old, name, path in self._places:
            new = place.get()
            if old is not new:
                yield place, old, new, self._code.writes(name), path

    def changes(self) -> Changes:
        """What func has written."""
        found = Changes()
        containers = {id(x) for x, _, _ in self._containers}
        for place, old, new, may, path in self._differences():
            if type(old) is type(new) and self._code.counts(place, old):
                found.counted.append(place)
                continue
            tensor = isinstance(new, Tensor) and (old is None or old is MISSING or isinstance(old, Tensor))
            if may and type(old) is type(new) and type(old) in COUNTING:
                found.numbers.append((place.owner, place.key, path))
            elif may and tensor and id(place.owner) in containers:
                found.items.append((place.owner, place.key))
            else:
                (found.paths if may else found.others).append(path)
        for container, before, path in self._containers:
            if isinstance(before, dict) or _same(container, before):
                continue
            numbers = _other_numbers(container, before)
            found.numbers += [(container, i, f"{path}[{i}]") for i in numbers]
            found.paths += [] if numbers else [path]
        for saved in self._tensors:
            x, path = saved.x, f"a tensor {list(saved.x.shape)}"
            if x.requires_grad != saved.requires_grad:
                (found.paths if self._code.writes("requires_grad") else found.others).append(path)
            elif self._moved(saved):
                (found.paths if self._code.writes("data") else found.others).append(path)
            elif self._overwritten(saved):
                found.tensors.append(x)
        found.paths += [path for x, value, path in self._arrays if x.tobytes() != value.tobytes()]
        return found

    def _moved(self, saved: _Tensor) -> bool:
        """Whether it was given other memory."""
        x, memory = saved.x, saved.memory
        same = has_memory(x) and x.shape == memory.shape and x.stride() == memory.stride() and x.dtype == memory.dtype
        return not (same and x.data_ptr() == memory.data_ptr())

    def _overwritten(self, saved: _Tensor) -> bool:
        """Whether func may have written into its memory: an operation of this thread did, or something that is none, as batch
        norm does, which leaves its version."""
        own = memory_of(saved.memory) in self._watched.written or _version(saved.x) == saved.version
        return own and not same_bits(saved.memory, saved.value)

    def disturbed(self) -> bool:
        """Whether another thread has written what func reaches."""
        tensors = [saved for saved in self._tensors if not self._moved(saved) and not self._overwritten(saved)]
        return bool(self.changes().others) or any([not same_bits(saved.memory, saved.value) for saved in tensors])

    def content(self, x: Tensor) -> Tensor | None:
        """What a tensor held."""
        return next((saved.value for saved in self._tensors if saved.x is x), None)

    def restore(self) -> None:
        """What func has written, and nothing else, is as it was."""
        for place, old, _, may, _ in list(self._differences()):
            if may:
                place.put(old)
        for container, before, _ in self._containers:
            if isinstance(before, dict) or _same(container, before):
                continue
            container.clear()
            container.update(before) if isinstance(before, set) else container.extend(before)
        with torch.no_grad():
            for saved in self._tensors:
                x = saved.x
                if self._moved(saved) and self._code.writes("data"):
                    x.data = saved.memory
                if self._overwritten(saved):
                    saved.memory.data.copy_(saved.value)
                if x.requires_grad != saved.requires_grad and self._code.writes("requires_grad"):
                    x.requires_grad_(saved.requires_grad)
                if x.is_leaf and x.grad is not saved.grad and self._code.writes("grad"):
                    x.grad = saved.grad
        for array, before, _ in self._arrays:
            if array.tobytes() != before.tobytes():
                array[...] = before
        for generator, state, own in self.drawn():
            if own:
                _set_state(generator, state)


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version


class Unset:
    """Stands where func writes before it reads: whatever else is done with it raises."""

    def _refuse(*args: Any, **kwargs: Any) -> Any:
        raise TypeError("func reads this before it writes it")

    __getattribute__ = __bool__ = __eq__ = __hash__ = __call__ = __len__ = __iter__ = __getitem__ = __contains__ = _refuse  # type: ignore
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __matmul__ = __rmatmul__ = (
        _refuse
    )
    __pow__ = __rpow__ = __neg__ = __lt__ = __le__ = __gt__ = __ge__ = __float__ = __int__ = __index__ = __array__ = _refuse


@contextmanager
def without_hooks(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Hooks of tensors are for gradients of the user's."""
    found = [(x, x._backward_hooks) for x in tensors if x._backward_hooks]
    for x, _ in found:
        x._backward_hooks = None
    try:
        yield
    finally:
        for x, hooks in found:
            hooks.update(x._backward_hooks or {})  # of another thread since
            x._backward_hooks = hooks


@contextmanager
def unmarked(reach: Reach, device: torch.device) -> Iterator[Marks]:
    """What func does inside is undone afterwards, where torch's own generators stood too if it has drawn from them."""
    watched = Watched()
    marks, states = Marks(reach, watched), torch.get_rng_state()
    on_cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        with without_hooks(reach.tensors.values()), watched:
            yield marks
    except Unreadable as error:
        if marks.disturbed():
            raise Disturbed(f"what func reads was changed while it was read: {error}") from error
        raise
    finally:
        marks.restore()
        if watched.drawn:
            torch.set_rng_state(states)
            if on_cuda is not None:
                torch.cuda.set_rng_state(on_cuda, device)
