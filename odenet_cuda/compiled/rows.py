"""Tensors of func with one row a sample: noise that it keeps, coefficients of paths, what was made of other inputs.

They are arguments of the program, like those that func is given, behind these wherever arguments go. Where func is called for
other samples than the user's, operations of the thread that calls it get other rows instead; the tensor is left alone.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from .marks import Unreadable
from .numbers import Place

_MOST_CHOICES = 6
Choice = tuple[list[Tensor], list[int]]  # tensors of func, and which of its arguments


class Tried:
    """Choices of what has one row a sample that have been tried over several readings of one func. count: so many, in their
    order. more: whether others are left."""

    def __init__(self) -> None:
        self.count, self.more = 0, True

    def left(self, choices: Iterable[Choice]) -> Iterator[Choice]:
        """Those that are, each tried when it is given."""
        rest = list(choices)[self.count :]
        self.more = bool(rest)
        for i, choice in enumerate(rest, 1):
            self.count, self.more = self.count + 1, i < len(rest)
            yield choice


class Rows:
    """places: of the tensors."""

    def __init__(self, places: Sequence[Place] = ()):
        self.places = list(places)

    def of(self, args: Sequence[Any]) -> list[Any] | Sequence[Any]:
        """The arguments of the program."""
        return [*args, *[place(args) for place in self.places]] if self.places else args

    def kept(self, args: Sequence[Any]) -> bool:
        """Whether func still has the tensors that are among these arguments of the program."""
        return all([place(args) is x for place, x in zip(self.places, self.tensors(args), strict=True)])

    def tensors(self, args: Sequence[Any]) -> Sequence[Tensor]:
        """Those that are among these arguments of the program."""
        return args[len(args) - len(self.places) :]

    def over(self, func: Callable) -> Callable:
        """func, called with the rows behind its arguments."""
        return _OverRows(func, self.places) if self.places else func


class _OverRows:
    def __init__(self, func: Callable, places: Sequence[Place]):
        self._func, self._places = func, places

    def __call__(self, t: Tensor, y: Any, *given: Any) -> Any:
        args, rows = given[: -len(self._places)], given[-len(self._places) :]
        before = [x._version for x in rows]
        with _Instead([place(args) for place in self._places], rows):
            result = self._func(t, y, *args)
        if [x._version for x in rows] != before:
            raise Unreadable("func writes into a tensor that has one row a sample")
        return result


class _Instead(TorchFunctionMode):
    """Functions of torch, methods and attributes of tensors get these rows for those tensors."""

    def __init__(self, tensors: Sequence[Tensor], rows: Sequence[Tensor]):
        super().__init__()
        self._tensors = tensors  # so that no other gets the id of one
        self._rows = {id(x): row for x, row in zip(tensors, rows, strict=True) if x is not row}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(Tensor, lambda x: self._rows.get(id(x), x), (args, kwargs or {}))
        return func(*args, **kwargs)


def choices_of(tensors: Sequence[Tensor], batch: int) -> list[list[Tensor]]:
    """Which of the tensors that func reaches may have one row a sample, to be tried in turn. None of them comes first."""
    found = [x for x in tensors if x.dim() > 0 and x.shape[0] == batch and type(x) in (Tensor, nn.Parameter)]
    free = [x for x in found if not isinstance(x, nn.Parameter)]
    singles = [[x] for x in found] if len(found) > 1 else []
    choices = {tuple(map(id, choice)): choice for choice in ([], free, found, *singles)}
    return list(choices.values())[:_MOST_CHOICES]
