"""Steps that can be undone: a state of two halves, of which a step moves one by what the other says, in turns.

Each such move is a shear, x_i <- keep x_i + rest x_o + dt sum_j b_j k_j, with slopes of func at the half x_o alone. Undoing it
needs the same slopes, so nothing of a step is kept for its way back but its times.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import ops
from .formulas import per_row, widened
from .formulas import stage as add_up
from .tableau import StepFunction

Leaves = list[Tensor]


@dataclass(frozen=True)
class Shear:
    """One half moves: x_into <- keep x_into + rest x_of + dt sum_j b_j k_j, k_j = f_into(t0 + c_j dt, Y_j) and
    Y_j = x_of + dt sum_l a_jl k_l, where of is the other half."""

    into: int
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    keep: float = 1.0
    rest: float = 0.0

    @property
    def used(self) -> int:
        """How many stages count for where it moves; those after them serve an error estimate."""
        return max(i for i, weight in enumerate(self.b) if weight != 0) + 1

    @property
    def of(self) -> int:
        return 1 - self.into


@dataclass(frozen=True)
class ShearStep:
    """A step of a `StepFunction` that is a sequence of shears of the halves of its leaves, called as `StepFunction.step`.

    carries: its first shear begins with the slope with which the last one of the step before ended.
    """

    shears: tuple[Shear, ...]
    carries: bool = False

    def slopes(self, field: Callable[..., Leaves], t: Tensor, halves: Sequence[Leaves], into: int) -> Leaves:
        """What moves this half, from the other one."""
        raise NotImplementedError

    def error(self, dt: Tensor, halves: list[Leaves], ends: list[Leaves], k: list[Leaves]) -> list[Tensor] | None:
        """The estimate, a tensor a leaf, or None. halves, ends: of the step. k: slopes of the first shear."""
        return None

    def __call__(
        self, field: Callable[..., Leaves], t: Sequence[Tensor], dt: Tensor, y0: Leaves, k0: Leaves
    ) -> tuple[Leaves, list[Leaves], list[Tensor] | None]:
        begin, x = in_halves(y0), in_halves(y0)
        carried = in_halves(k0)
        seen: list[list[Leaves]] = []
        last = carried
        for shear in self.shears:
            first = carried[shear.into] if self.carries and not seen else None
            k = self.stages(field, shear, t[0], t[-1], dt, x, first)
            x[shear.into] = _moved(shear, x, k, dt)
            seen.append(k)
            last = [k[-1] if half == shear.into else last[half] for half in (0, 1)]
        return [*x[0], *x[1]], [[*last[0], *last[1]]], self.error(dt, begin, x, seen[0])

    def stages(
        self,
        field: Callable[..., Leaves],
        shear: Shear,
        t0: Tensor,
        t1: Tensor,
        dt: Tensor,
        halves: Sequence[Leaves],
        first: Leaves | None = None,
    ) -> list[Leaves]:
        """The slopes of one shear, [stages][leaves]. first: that of its first stage, where it is known."""
        k: list[Leaves] = []
        for c, row in zip(shear.c, shear.a, strict=True):
            point = list(halves)
            if k:
                point[shear.of] = combined(halves[shear.of], k, row, dt)
            elif first is not None:
                k.append(first)
                continue
            k.append(self.slopes(field, node(t0, t1, c), point, shear.into))
        return k


def in_halves(leaves: Sequence[Any]) -> list[list[Any]]:
    half = len(leaves) // 2
    return [list(leaves[:half]), list(leaves[half:])]


def shears_of(method: Any) -> ShearStep | None:
    """The step of this method, if it is one that can be undone."""
    step = method.step if isinstance(method, StepFunction) else None
    return step if isinstance(step, ShearStep) else None


def node(t0: Tensor, t1: Tensor, c: float) -> Tensor:
    """t0 + c (t1 - t0), the ends themselves as they are."""
    return t0 if c == 0 else t1 if c == 1 else t0 + c * (t1 - t0)


def combined(y0: Leaves | None, k: Sequence[Leaves], weights: Sequence[float], dt: Tensor) -> Leaves:
    """y0 + dt sum_j weights_j k_j of each leaf, y0 itself without slopes. dt: [rows]. Without y0 there must be some."""
    used = [(weight, slopes) for weight, slopes in zip(weights, k, strict=False) if weight != 0]
    if not used and y0 is not None:
        return y0
    numbers, slopes = [weight for weight, _ in used], [x for _, x in used]
    if torch.is_grad_enabled():
        leaves = []
        for i, parts in enumerate(zip(*slopes, strict=True)):
            wide = [widened(x) for x in parts]
            base = None if y0 is None else widened(y0[i])
            leaves.append(add_up(base, wide, numbers, per_row(dt, wide[0])).to(parts[0].dtype))
        return leaves
    found = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in slopes[0]]
    leaf_major = [ops.readable(leaf) for of_leaf in zip(*slopes, strict=True) for leaf in of_leaf]
    ops.stage(found, [] if y0 is None else [ops.readable(leaf) for leaf in y0], leaf_major, numbers, dt)
    return found


def _moved(shear: Shear, x: Sequence[Leaves], k: Sequence[Leaves], dt: Tensor) -> Leaves:
    """The half that the shear moves, after it."""
    base = x[shear.into]
    if shear.keep != 1 or shear.rest != 0:
        base = [shear.keep * y + shear.rest * z for y, z in zip(base, x[shear.of], strict=True)]
    return combined(base, k, shear.b, dt)


def moved_back(shear: Shear, x: Sequence[Leaves], k: Sequence[Leaves], dt: Tensor) -> Leaves:
    """The half that the shear has moved, before it."""
    base = x[shear.into]
    if shear.rest != 0:
        base = [y - shear.rest * z for y, z in zip(base, x[shear.of], strict=True)]
    base = combined(base, k, [-weight for weight in shear.b], dt)
    return base if shear.keep == 1 else [y / shear.keep for y in base]
