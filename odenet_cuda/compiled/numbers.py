"""Python's numbers that change from call to call: Python computes with them at every call, and the program gets the results.

They are found by their path: alone, or within what is replaced as a whole, such as a config object or a dict of args. In a
recording a `Number` stands for each, and a copy for what holds some. What Python computes of them is kept as a list of steps,
which is gone through again with the numbers of a later call. Where one meets a tensor, its value there is an argument of the
program: a tensor without axes of that tensor's type, as torch takes Python's numbers. Whatever else is asked of one, by which
func might take another way for another number, is a leak.
"""

import math
import operator
import threading
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import is_not
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from .leaks import Leak
from .marks import Unreadable
from .trees import Path, Tree, follow, opened, replaced
from .walk import Slot

_modes = torch._C._len_torch_dispatch_stack
Place = Callable[[Sequence[Any]], Any]  # where a value is found, given the arguments of a solve
_LARGEST = 2**53  # whole numbers up to this are numbers of float64
_MOST = 1_000  # steps
KINDS = (int, float, np.float64)
# Operations of torch, with or without underscores, that take a number where they take a tensor, and give the same then.
_WITH_TENSORS = {
    *("add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "truediv", "pow"),
    *("radd", "rsub", "rmul", "rdiv", "rtruediv", "rpow", "iadd", "isub", "imul", "idiv", "itruediv"),
    *("gt", "ge", "lt", "le", "eq", "ne", "greater", "greater_equal", "less", "less_equal", "not_equal"),
    *("where", "clamp", "clamp_min", "clamp_max", "clip"),
}


def is_number(x: Any) -> bool:
    return type(x) in KINDS


@dataclass
class Root:
    """Where numbers that change are found: in a slot of func, or in an argument where there is none. They are that itself, or
    lie in it at these paths. before: what all of it was."""

    slot: Slot | None
    index: int
    paths: dict[Path, None]
    before: Tree

    def get(self, args: Sequence[Any]) -> Any:
        return args[self.index] if self.slot is None else self.slot.get()

    def put(self, value: Any, args: list[Any]) -> None:
        if self.slot is None:
            args[self.index] = value
        else:
            self.slot.put(value)


class Number:
    """A number whose value nobody can ask for but other threads than the one that reads func: it stands in the user's own
    attributes meanwhile, and to them it is as the number itself."""

    __slots__ = ("_index", "_numbers", "_value")

    def __init__(self, numbers: "Numbers", index: int, value: Any):
        self._numbers, self._index, self._value = numbers, index, value

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        if not self._numbers.read_here:
            return getattr(ufunc, method)(*map(plain, inputs), **kwargs)
        op = _OF_NUMPY.get(ufunc.__name__)
        if op is None or method != "__call__" or kwargs or not all(type(x) in (Number, *KINDS) for x in inputs):
            return self._leak()
        return self._numbers.apply(op, inputs)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", str(func)), kwargs or {}
        if not any(x._numbers.read_here for x in tree_leaves((args, kwargs)) if type(x) is Number):
            args, kwargs = tree_map_only(Number, plain, (args, kwargs))
            return func(*args, **kwargs)
        tensors = [x for x in (*args, *kwargs.values()) if type(x) is not Number and isinstance(x, Tensor)]
        if name.strip("_") not in _WITH_TENSORS or not tensors:
            raise Leak(f"torch.{name} is given a number that changes")

        def beside(x: Any) -> Any:
            return x._numbers.leaf(x._index, x._value, tensors) if type(x) is Number else x

        return func(*map(beside, args), **{key: beside(x) for key, x in kwargs.items()})

    def _leak(self, *args: Any, **kwargs: Any) -> Any:
        raise Leak("func reads a number that changes")

    def __getattr__(self, name: str) -> Any:
        if not self._numbers.read_here:
            return getattr(self._value, name)
        if hasattr(self._value, name):
            self._leak()
        raise AttributeError(name)

    def __round__(self, digits: Any = None) -> Any:
        operands = [self] if digits is None else [self, digits]
        return self._numbers.apply(round, operands) if self._numbers.read_here else round(*map(plain, operands))

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # type: ignore[override]
        """What isinstance asks for."""
        if not self._numbers.read_here:
            return type(self._value)
        return self._leak() if self._numbers.watched else Number


def plain(x: Any) -> Any:
    return x._value if type(x) is Number else x


def _compute(op: Callable, reflected: bool) -> Callable:
    def method(self: Number, other: Any) -> Any:
        if not self._numbers.read_here:
            return op(plain(other), self._value) if reflected else op(self._value, plain(other))
        if type(other) is not Number and type(other) not in (*KINDS, bool):
            return NotImplemented
        return self._numbers.apply(op, [other, self] if reflected else [self, other])

    return method


def _compare(op: Callable) -> Callable:
    """With a tensor it is an operation of torch."""

    def method(self: Number, other: Any) -> Any:
        if not self._numbers.read_here:
            return op(self._value, plain(other))
        return NotImplemented if type(other) is not Number and isinstance(other, Tensor) else self._leak()

    return method


def _one(op: Callable) -> Callable:
    return lambda self: self._numbers.apply(op, [self]) if self._numbers.read_here else op(self._value)


def _leaks(op: Callable) -> Callable:
    def method(self: Number, *args: Any) -> Any:
        return self._leak() if self._numbers.read_here else op(self._value, *map(plain, args))

    return method


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"):
    setattr(Number, f"__{_name}__", _compute(getattr(operator, f"__{_name}__"), False))
    setattr(Number, f"__r{_name}__", _compute(getattr(operator, f"__{_name}__"), True))
for _op in (operator.neg, operator.pos, operator.abs, operator.invert, math.floor, math.ceil, math.trunc):
    setattr(Number, f"__{_op.__name__}__", _one(_op))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Number, f"__{_name}__", _compare(getattr(operator, _name)))
_ASKED: list[Any] = [bool, int, float, complex, operator.index, hash, repr, str, format, divmod]
for _op in _ASKED:
    setattr(Number, f"__{_op.__name__}__", _leaks(_op))
Number.__rdivmod__ = _leaks(lambda x, y: divmod(y, x))  # type: ignore[attr-defined]
Number.__reduce_ex__ = _leaks(lambda x, protocol: x.__reduce_ex__(protocol))  # type: ignore[method-assign]
_OF_NUMPY = {"add": operator.add, "subtract": operator.sub, "multiply": operator.mul, "divide": operator.truediv}
_OF_NUMPY |= {"power": operator.pow, "floor_divide": operator.floordiv, "remainder": operator.mod}


class Numbers:
    """known: ids of what is no part of the roots, but reached by func besides."""

    def __init__(self, roots: Sequence[Root] = (), args: Sequence[Any] = (), known: Container[int] = (), device: Any = None):
        self.roots, self._others, self._device = list(roots), known, device
        self._kept = self.opened(args)
        self._values = list(self._parts(args))
        places = [_place_of(root, path) for root in roots for path in root.paths]
        self._steps: list[tuple[Callable, list[int] | None]] = [(place, None) for place in places]
        self._known: dict[Any, int] = {}  # where each step stands
        self._leaves: dict[Any, tuple[Tensor, list[int], type]] = {}  # a tensor, the steps to it, the type of the last
        self._wrap: Callable[[Tensor], Tensor] | None = None
        self._reader = 0  # the thread that reads func with these
        self.met: set[Any] = set()  # the leaves that func took when it was given these numbers last

    def __bool__(self) -> bool:
        return bool(self.roots)

    def has(self, index: int) -> bool:
        """Whether there are some in this argument."""
        return any([root.slot is None and root.index == index for root in self.roots])

    @property
    def watched(self) -> bool:
        return self._wrap is not None

    @property
    def read_here(self) -> bool:
        """Whether this thread reads func with them. On CUDA autograd has threads of its own, with the modes of the reader."""
        if threading.get_ident() == self._reader:
            return True
        return self._reader != 0 and self._device is not None and self._device.type != "cpu" and _modes() > 0

    # In a recording

    @contextmanager
    def given(self, args: Sequence[Any], wrap: Callable[[Tensor], Tensor] | None = None) -> Iterator[list[Any]]:
        """The arguments with a Number for each number; in attributes they stand inside alone. wrap: of tensors, where func is
        watched; it may not ask what a number is then."""
        given, self._wrap, self.met, self._reader = list(args), wrap, set(), threading.get_ident()
        numbers = [Number(self, i, value) for i, value in enumerate(self._values)]
        rest = iter(numbers)
        before: list[tuple[Root, Any, Any]] = []
        try:
            for root in self.roots:
                value = root.get(args)
                x = replaced(value, {path: next(rest) for path in root.paths}, self._others)
                before.append((root, x, value))
                root.put(x, given)
            shape = self.opened(given)
            yield given
            if self.opened(given) != shape or any(map(is_not, self._parts(given), numbers)):
                raise Unreadable("func writes a number that changes, or what holds it")
        finally:
            for root, x, value in reversed(before):  # there may be two ways to one place
                if root.get(given) is x:  # not what another thread has written there since
                    root.put(value, given)
            self._wrap, self._reader = None, 0

    def opened(self, args: Sequence[Any], seen: dict[int, int] | None = None) -> list[Tree | None]:
        """What the roots hold besides these numbers, of which the types remain. seen: as for `trees.opened`."""
        seen = {} if seen is None else seen
        return [opened(root.get(args), root.paths, self._others, seen) for root in self.roots]

    def _parts(self, args: Sequence[Any]) -> Iterator[Any]:
        return (follow(root.get(args), path) for root in self.roots for path in root.paths)

    def apply(self, op: Callable, operands: Sequence[Any]) -> Number:
        """Raises whatever Python raises for these numbers, and Leak where the result is no number."""
        indices = [x._index if type(x) is Number else self._literal(x) for x in operands]
        value = op(*[x._value if type(x) is Number else x for x in operands])
        if type(value) not in KINDS:
            raise Leak(f"func computes a {type(value).__name__} of a number that changes")
        return Number(self, self._step((op, *indices), op, indices), value)

    def _literal(self, x: Any) -> int:
        return self._step((type(x), repr(x)), lambda args: x, None)

    def _step(self, key: Any, op: Callable, operands: list[int] | None) -> int:
        if key not in self._known:
            if len(self._steps) >= _MOST:
                raise Leak(f"func computes more than {_MOST} values of numbers that change")
            self._known[key] = len(self._steps)
            self._steps.append((op, operands))
        return self._known[key]

    def leaf(self, index: int, value: Any, tensors: Sequence[Tensor]) -> Tensor:
        """A number as torch takes it beside these tensors."""
        if type(value) is int and abs(value) > _LARGEST:
            raise Leak(f"a whole number that changes must be at most 2**53, got {value}")
        dtype = _dtype_beside(value, tensors)
        if (index, dtype) not in self._leaves:
            tensor = torch.tensor(float(value), dtype=dtype, device=self._device)
            self._leaves[index, dtype] = tensor, self._needed(index), type(value)
        self.met.add((index, dtype))
        tensor = self._leaves[index, dtype][0]
        return tensor if self._wrap is None else self._wrap(tensor)

    def _needed(self, index: int) -> list[int]:
        """The steps that lead to this one, in order."""
        found: set[int] = set()
        waiting = [index]
        while waiting:
            i = waiting.pop()
            if i not in found:
                found.add(i)
                waiting += self._steps[i][1] or ()
        return sorted(found)

    # At every call

    def place(self, tensor: Tensor) -> Place | None:
        for found, needed, _ in self._leaves.values():
            if found is tensor:
                return self._place_of(needed, found.dtype)
        return None

    def _place_of(self, needed: list[int], dtype: torch.dtype) -> Place:
        return lambda args: torch.tensor(float(self._value(needed, args)), dtype=dtype, device=self._device)

    def _value(self, needed: list[int], args: Sequence[Any]) -> Any:
        values: dict[int, Any] = {}
        for i in needed:
            op, operands = self._steps[i]
            values[i] = op(args) if operands is None else op(*[values[j] for j in operands])
        return values[needed[-1]]

    def hold(self, args: Sequence[Any], seen: dict[int, int] | None = None) -> bool:
        """Whether all are numbers of the same type still, and so is what is computed of them, and nothing but these is other
        than it was. Raises what Python raises."""
        if self.opened(args, seen) != self._kept:
            return False
        for _, needed, kind in self._leaves.values():
            value = self._value(needed, args)
            if type(value) is not kind or (kind is int and not -_LARGEST <= value <= _LARGEST):  # type: ignore[operator]
                return False
        return True


def _place_of(root: Root, path: Path) -> Place:
    return lambda args: follow(root.get(args), path)


def _dtype_beside(value: Any, tensors: Sequence[Tensor]) -> torch.dtype:
    """In which torch computes with this number and these tensors."""
    kinds = {x.dtype for x in tensors if x.is_floating_point() or x.is_complex()}
    if not kinds and type(value) is not int:
        kinds = {torch.get_default_dtype()}
    if len(kinds) != 1 or not kinds <= {torch.float32, torch.float64}:
        raise Leak(f"a number that changes meets tensors of {[str(x.dtype) for x in tensors]}")
    return kinds.pop()
