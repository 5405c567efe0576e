"""What func counts with: numbers and tensors that it changes at every call and that its results do not depend on.

A number is proved to be one by a stand-in that can be added to and multiplied, and is an error for whatever else is asked of
it: where a call of func succeeds with it, func takes the same way whatever the number is, and no tensor takes it up. A tensor
is proved to be one in the graph: nothing that is computed of it reaches the output, and Python has not read it. By induction
over the calls, the results are the same however often func was called before. Counters are therefore no part of the guards,
but for the type of a number. What a call adds to each is found by calls, and a compiled solve adds it as often as it takes the
place of a call.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from .kinds import COUNTING
from .leaks import Leak
from .memory import has_memory
from .numbers import Number
from .walk import Slot


class Tally:
    """A number of which nobody can ask more than its type."""

    __slots__ = ("_value",)
    __array_ufunc__ = None  # NumPy leaves it alone

    def __init__(self, value: Any):
        self._value = value

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # type: ignore[override]
        """What isinstance asks for; it is guarded."""
        return type(self._value)

    def _leak(self, *args: Any, **kwargs: Any) -> Any:
        raise Leak("func reads a number that it changes")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise Leak("a number that func changes meets a tensor")

    def __getattr__(self, name: str) -> Any:
        if hasattr(self._value, name):
            self._leak()
        raise AttributeError(name)

    def __neg__(self) -> "Tally":
        return Tally(-self._value)


def _compute(op: Callable, reflected: bool) -> Callable:
    """No sum, difference or product of these raises for some numbers, or is of another type."""

    def method(self: Tally, other: Any) -> Any:
        if type(other) not in (Tally, Number, bool, *COUNTING):
            self._leak()
        x, y = self._value, other._value if type(other) in (Tally, Number) else other
        return Tally(op(y, x) if reflected else op(x, y))

    return method


for _op in (operator.add, operator.sub, operator.mul):
    setattr(Tally, f"__{_op.__name__}__", _compute(_op, False))
    setattr(Tally, f"__r{_op.__name__}__", _compute(_op, True))
for _name in (
    *("truediv", "floordiv", "mod", "pow", "divmod", "matmul", "lshift", "rshift", "and", "or", "xor"),
    *("rtruediv", "rfloordiv", "rmod", "rpow", "rdivmod", "rmatmul", "rlshift", "rrshift", "rand", "ror", "rxor"),
    *("eq", "ne", "lt", "le", "gt", "ge", "pos", "abs", "invert", "round", "floor", "ceil", "trunc"),
    *("bool", "int", "float", "complex", "index", "hash", "repr", "str", "format", "reduce_ex", "array", "dir", "sizeof"),
):
    setattr(Tally, f"__{_name}__", Tally._leak)


class Tallies:
    """A Tally in each of these places, while func is called to be recorded."""

    def __init__(self, slots: Sequence[Slot] = ()):
        self.slots = list(slots)

    @contextmanager
    def standing(self) -> Iterator[None]:
        """Raises Leak where func leaves something else there than a number."""
        before = [slot.get() for slot in self.slots]
        try:
            for slot, value in zip(self.slots, before, strict=True):
                slot.put(Tally(value))
            yield
            for slot, value in zip(self.slots, before, strict=True):
                kinds = (Tally,) if isinstance(value, Tensor) else (Tally, *COUNTING)
                if type(slot.get()) not in kinds:
                    raise Leak(f"func keeps a {type(slot.get()).__name__} in {slot.path}, where a number was")
        finally:
            for slot, value in zip(self.slots, before, strict=True):
                slot.put(value)


class Counter(Protocol):
    """Where a number is that func counts with: a Slot, or a `writes.Place`."""

    def get(self) -> Any: ...
    def put(self, value: Any, /) -> None: ...


def added(
    slots: Sequence[Counter], tensors: Sequence[Tensor], call: Callable[[], Any], restore: Callable[[], None]
) -> list[Any] | None:
    """What a call of func adds to each number and tensor, or None where that is not the same whatever is there. restore():
    afterwards what was there before."""
    found: list[list[Any]] = []
    for begin in (0, 64, 1000):
        for slot in slots:
            value = slot.get()
            slot.put(torch.full_like(value, begin) if isinstance(value, Tensor) else type(value)(begin))
        for x in tensors:
            x.fill_(begin)
        call()
        found.append([slot.get() - begin for slot in slots] + [x.detach().clone().sub_(begin) for x in tensors])
        restore()
    first, *others = found
    return first if all([_equal(x, y) for other in others for x, y in zip(first, other, strict=True)]) else None


def _equal(x: Any, y: Any) -> bool:
    """But for rounding."""
    if isinstance(x, Tensor):
        return torch.allclose(x.double(), y.double(), rtol=1e-3, atol=1e-3)
    return bool(abs(x - y) <= 1e-9 * (1 + abs(x)))


def without(module: fx.GraphModule, tensors: Sequence[Tensor]) -> bool:
    """Takes what is computed of these tensors out of the graph, where it is written into them alone. Whether that is so: not
    where the output, or what is written elsewhere, depends on them, or where they are changed by no operation of the graph. Nor
    where they take up the state: the running mean of a batch norm is for later, when it is no counter."""
    moving: set[fx.Node] = set()  # what depends on the time, the state or arguments
    memory = {x.untyped_storage().data_ptr() for x in tensors}
    tainted: dict[fx.Node, set[int]] = {}  # the memory of these that a node may be a view of
    written: set[int] = set()
    for node in module.graph.nodes:
        if node.op == "get_attr":
            x = getattr(module, str(node.target))
            if isinstance(x, Tensor) and has_memory(x) and x.untyped_storage().data_ptr() in memory:
                tainted[node] = {x.untyped_storage().data_ptr()}
            continue
        if node.op == "placeholder" or not moving.isdisjoint(node.all_input_nodes):
            moving.add(node)
        found = [x for x in node.all_input_nodes if x in tainted]
        if not found:
            continue
        if node.op != "call_function" or node in moving:
            return False
        schema = getattr(node.target, "_schema", None)
        for argument, x in zip(schema.arguments, node.args, strict=False) if schema is not None else ():
            if argument.alias_info is not None and argument.alias_info.is_write:
                if x not in tainted:
                    return False
                written |= tainted[x]
        tainted[node] = set().union(*[tainted[x] for x in found])
    if not memory <= written:
        return False
    for node in reversed(tainted):
        module.graph.erase_node(node)
    return True
