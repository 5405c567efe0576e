"""How far two results are apart, and how far rounding may take them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .compilers import NoCompiler

_ROUNDING = 64  # units in the last place that two right answers may differ by, times the size of what was added up
_CONDITION = 16  # times what a change of the inputs by _CHANGE units brings: more than the rounding of a long sum


class Unchecked(NoCompiler):
    """Nothing could be compared: the next solve tries again."""

    quiet = True


class Unsettled(Unchecked):
    """Nothing can be said: what is compared changed meanwhile, or the solve is too short for a step of any use."""


@dataclass
class Difference:
    what: str
    largest: float
    allowed: float
    where: str
    of_gradient: bool


def distance(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> float:
    return float(torch.stack([(x.double() - y.double()).norm() for x, y in zip(xs, ys, strict=True)]).norm())


def worst_of(
    found: list[Tensor], expected: list[Tensor], again: Callable[[], list[Tensor]], eps: float, sizes: list[float]
) -> tuple[int, float, float] | None:
    """(which result, its largest difference, what was allowed) of the first that differs by more than rounding, or None. sizes:
    of what each result was added up from, if larger than itself."""
    others: list[Tensor] | None = None
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        known = y.isfinite()
        if not bool(known.any()):
            continue
        x, y = x.double(), y.double()
        difference = torch.where(known, (x - y).abs(), 0.0)  # not a number where x is none
        allowed = _ROUNDING * eps * _size(y, known).clamp(min=sizes[i])
        if bool((difference <= allowed).all()):
            continue
        others = others or again()
        changes = torch.where(known, (others[i].double() - y).abs(), 0.0).nan_to_num(nan=float("inf"))
        allowed = allowed + _CONDITION * _size(changes, known)
        wrong = ~(difference <= allowed)
        if bool(wrong.any()):
            place = int(torch.where(wrong, difference.nan_to_num(nan=float("inf")), -1.0).argmax())
            return i, float(difference.reshape(-1)[place]), float(allowed.expand_as(difference).reshape(-1)[place])
    return None


def _size(x: Tensor, known: Tensor) -> Tensor:
    """The largest over outputs and samples, of each component."""
    x = torch.where(known, x.abs(), 0.0)
    return x.amax(tuple(range(min(x.dim(), 2))), keepdim=True)
