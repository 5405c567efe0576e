"""The solution at any time, from the steps of a solve."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from . import formulas
from .tableau import Method

State = TypeVar("State")  # the structure of y0: a tensor, or a tuple, list, dict or nest of them


@dataclass
class DenseStep:
    """One accepted step as the interpolant needs it; t0, t1 [rows]; y0, k a leaf; accept [rows] or None for all."""

    t0: Tensor
    t1: Tensor
    y0: list[Tensor]
    k: list[list[Tensor]]
    accept: Tensor | None

    def place(self, t: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """(theta, whether it lies in the step) of times [times, rows]; start: of the solve, where its first step begins."""
        dt = self.t1 - self.t0
        theta = (t - self.t0) / torch.where(dt == 0, 1.0, dt)
        inside = ((theta > 0) | ((theta == 0) & (self.t0 == start))) & (theta <= 1)
        return theta, inside if self.accept is None else inside & self.accept


class Interpolant(Generic[State]):
    """The solution at any time between the first and the last output: ``interpolant(t)``.

    t: a number or a tensor of any shape, times at which the state of all samples is given, in the structure of y0, each leaf
    [*t.shape, *leaf.shape]. per_sample: t [batch, T] has times of each sample, after a solve with per-sample control, and
    leaves are [T, batch, ...], NaN where t is.

    Exact at the ends of steps and of the method's interpolation order between; NaN where a sample that failed did not get. The
    ends of the interval may come as float32 writes them. Differentiable by t, and after gradient="direct" and "checkpoint" by
    all that the solve has gradients for, as its outputs are. Raises ValueError outside the interval.
    """

    def __init__(
        self,
        tableau: Method,
        steps: list[DenseStep],
        y0: list[Tensor],
        ends: tuple[Any, Any],
        unflatten: Callable[[list[Tensor]], State],
        per_sample: bool = False,
    ):
        """ends: numbers, or float64 arrays [rows] where each has its own."""
        self.tableau, self.steps, self._y0, self._unflatten, self._per_sample = tableau, steps, y0, unflatten, per_sample
        self.t0, self.t1 = ends
        self._start, end = (torch.as_tensor(x, dtype=torch.float64, device=y0[0].device).reshape(-1) for x in ends)
        self._low, self._high = torch.minimum(self._start, end), torch.maximum(self._start, end)
        self._events: Tensor | None = None  # where events have ended the rows, [rows]
        self.gradient: Callable[[Tensor, list[Tensor]], list[Tensor]] | None = None  # attaches that of the solve to values

    def __call__(self, t: float | Tensor, per_sample: bool = False) -> State:
        wanted = torch.as_tensor(t, dtype=torch.float64, device=self._y0[0].device)
        if per_sample:
            rows = len(self._y0[0]) if self._per_sample else 0
            if not self._per_sample or wanted.dim() != 2 or len(wanted) != rows:
                rule = f"t must have shape [{rows}, T]" if self._per_sample else "per_sample needs step_control='per_sample'"
                raise ValueError(f"{rule}, got shape {list(wanted.shape)}")
        at = wanted.T if per_sample else wanted.reshape(-1)
        at = self._checked(at, t.dtype if isinstance(t, Tensor) else torch.float64, per_sample)
        by_solve = torch.is_grad_enabled() and self.gradient is not None and at.numel() > 0
        with torch.set_grad_enabled(torch.is_grad_enabled() and not by_solve):
            leaves = self._at(at)
        if by_solve and self.gradient is not None:
            leaves = self.gradient(at, leaves)
        if not per_sample:
            leaves = [leaf.reshape((*wanted.shape, *leaf.shape[1:])) for leaf in leaves]
        return self._unflatten(leaves)

    def end(self, t: Tensor) -> None:
        """Events have ended the solve there, [rows]: beyond, samples are NaN, and under joint control times are refused."""
        if self._per_sample:
            self._events = t
            return
        self.t1 = float(t[0])
        self._low, self._high = torch.minimum(self._start, t), torch.maximum(self._start, t)

    def _checked(self, t: Tensor, dtype: torch.dtype, per_sample: bool) -> Tensor:
        """t [times] or [times, rows] within the interval, whose ends may come as float32, or the type of t, writes them."""
        kind = dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32
        low, high = self._low, self._high
        x = t.detach() if per_sample else t.detach()[:, None]
        good = ((x >= low) | (x.to(kind) == low.to(kind))) & ((x <= high) | (x.to(kind) == high.to(kind)))
        if per_sample:
            good |= x.isnan()
        if not bool(good.all()):
            row = int((~good).any(0).nonzero()[0])
            where = f"in [{float(low[row])}, {float(high[row])}]" + (f" for sample {row}" if len(low) > 1 else "")
            wrong = float(x[~good[:, row], min(row, x.shape[1] - 1)][0])
            raise ValueError(f"t must lie {where}, where the solution is known, got {wrong}")
        return t.clamp(low, high) if t.dim() == 2 or len(low) == 1 else t[:, None].clamp(low, high)

    def _at(self, t: Tensor) -> list[Tensor]:
        """Leaves [times, *leaf.shape]; t: [times] or [times, rows]."""
        t = t if t.dim() == 2 else t[:, None]
        starts = t.detach() == self._start
        leaves = [torch.where(_rows(starts, y0), y0, math.nan).expand(len(t), *y0.shape).clone() for y0 in self._y0]
        for index in self._steps_with(t.detach().reshape(-1)):
            self._fill(self.steps[index], t, leaves)
        if self._events is not None:
            beyond = (t.detach() - self._start).abs() > (self._events - self._start).abs()
            leaves = [leaf.masked_fill(_rows(beyond, y0), math.nan) for leaf, y0 in zip(leaves, self._y0, strict=True)]
        return leaves

    def _steps_with(self, t: Tensor) -> list[int]:
        """Those in which one of the times lies, for any row."""
        if not self.steps:
            return []
        t, (low, high) = t.sort().values, self._ends
        return (torch.searchsorted(t, low) < torch.searchsorted(t, high, right=True)).nonzero()[:, 0].tolist()

    @cached_property
    def _ends(self) -> tuple[Tensor, Tensor]:
        """The least and the greatest time of each step, over the rows in which it was accepted."""
        ends = torch.stack([torch.stack([step.t0, step.t1]) for step in self.steps])  # [steps, 2, rows]
        low, high = ends.amin(1), ends.amax(1)
        if self.steps[0].accept is not None:
            accept = torch.stack([step.accept for step in self.steps if step.accept is not None])
            low, high = low.where(accept, math.inf), high.where(accept, -math.inf)
        return low.amin(1), high.amax(1)

    def _fill(self, step: DenseStep, t: Tensor, leaves: list[Tensor]) -> None:
        theta, inside = step.place(t, self._start)
        times = inside.any(1).nonzero()[:, 0]
        if len(times) == 0:
            return
        theta = torch.where(inside, theta, 1.0)[times]
        for leaf, y0, k in zip(leaves, step.y0, step.k, strict=True):
            dt = (step.t1 - step.t0).reshape([-1, *[1] * (y0.dim() - 1)] if y0.dim() else [])
            y0, k = formulas.widened(y0), [formulas.widened(slope) for slope in k]
            real = y0.dtype.to_real()
            value = formulas.dense_output(self.tableau, y0, k, _rows(theta, y0).to(real), dt.to(real))
            leaf[times] = torch.where(_rows(inside[times], y0), value.to(leaf.dtype), leaf[times])


def _rows(x: Tensor, leaf: Tensor) -> Tensor:
    """[times, rows] shaped to go with a leaf that has an axis of times in front."""
    return x.reshape(len(x), *([x.shape[1], *[1] * (leaf.dim() - 1)] if leaf.dim() else []))
