"""The gradient of where and when an event happens: the implicit function theorem.

g(t, y(t)) = 0 holds for every y0 and every parameter p, so with the rate r = dy/dt at the event

    dt = -(g_y dy + g_p dp) / (g_t + g_y r),   dy_event = dy + r dt

where dy is the change of the state at the time of the event as it was. That may be the time of an output, which moves itself:
then these are what moves beside it.

Where the divisor, the rate of g along the solution, is zero or not finite the time has no derivative: g only touches zero, or
is constant but for jumps. That is an error where a gradient comes to such a time, and none where it does not.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..captured import Known, Walk
from ..products import real_product
from ..solvers.events import Crossing, EventWatch
from .first_only import first_only, links
from .one_by_one import one_by_one

NO_SECOND_DERIVATIVE = "the times of events and jumps have first derivatives only: for second ones solve without them"
_ROUNDING = 16  # units in the last place of the terms of a sum, within which it may be zero


def attach(
    watch: EventWatch, crossing: Crossing, t0: Tensor, y: Sequence[Tensor], rate: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """(t [rows], y) of the events, which move with all that t0, y and the event functions depend on.

    t0: [rows], the time of the event as it was; it may move with a time of an output. y: the leaves there. rate: dy/dt there.
    """
    problem = watch.problem
    with torch.enable_grad():
        t = t0.to(problem.real) if t0.requires_grad else t0.detach().to(problem.real).requires_grad_()
        leaves = [leaf.view_as(leaf) if leaf.requires_grad else leaf.detach().requires_grad_() for leaf in y]
        g = watch.values(problem.time_views(t[None])[0], leaves).gather(1, crossing.column[:, None])[:, 0]
        if not any([x.requires_grad for x in (t0, *y)]) and not Walk([g], [t, *leaves], Known(), None).more:
            return t0, list(y)
        grads: Sequence[Tensor | None] = [None] * (1 + len(leaves))
        if g.requires_grad:
            grads = torch.autograd.grad(g.sum(), [t, *leaves], retain_graph=True, allow_unused=True)
    by_t, *by_y = grads
    slope = torch.zeros_like(crossing.t) if by_t is None else by_t.double()
    sizes = [None if x is None else x.abs() for x in by_y]
    terms = slope.abs() + _along(sizes, crossing.pace, problem.rows)
    slope = slope + _along(by_y, rate, problem.rows)
    small = slope.abs() <= _ROUNDING * torch.finfo(problem.real).eps * terms
    lost = crossing.found & (small | ~slope.isfinite())
    t_event, *y_event = _Implicit.apply(_Times(crossing, slope, lost, problem.per_sample), tuple(rate), t0, g, *y)
    return t_event, y_event


class _Times:
    """Those of events. slope: dg/dt along the solution, [rows]. lost: rows where it is none to divide by."""

    def __init__(self, crossing: Crossing, slope: Tensor, lost: Tensor, per_sample: bool):
        self.found, self.slope, self.per_sample = crossing.found, slope, per_sample
        self.lost = (lost, crossing.t, crossing.index) if bool(lost.any()) else None

    def refuse(self, total: Tensor) -> None:
        """Raises RuntimeError where a gradient comes to a time that has none. total: that of each time, [rows]."""
        if self.lost is None:
            return
        lost, t, index = self.lost
        used = lost & (total != 0)
        if not bool(used.any()):
            return
        row = int(used.nonzero()[0])
        sample = f" in sample {row}" if self.per_sample else ""
        rate = float(self.slope[row])
        raise RuntimeError(
            f"the time of event {int(index[row])}{sample}, t = {float(t[row]):.9g}, has no derivative: along the solution its "
            f"function changes there at a rate of {rate:.3g}, zero within rounding or not finite: it only touches zero, or is "
            "constant but for jumps. Remedy: a function that passes through zero (y - 1 for torch.sign(y - 1)), or leave this "
            "time, and the state there, out of the loss"
        )


class _Implicit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, times, rate, t, g, *y):
        ctx.times, ctx.rate, ctx.links = times, rate, links((t, g, *y))
        ctx.set_materialize_grads(False)
        return t.clone(), *(leaf.clone() for leaf in y)

    @staticmethod
    @one_by_one
    @first_only(NO_SECOND_DERIVATIVE)
    def backward(ctx, grad_t: Any, *grad_y: Any):
        times = ctx.times
        total = torch.zeros_like(times.slope) if grad_t is None else grad_t
        total = torch.where(times.found, total + _along(grad_y, ctx.rate, len(times.slope)), 0.0)
        times.refuse(total)
        return None, None, grad_t, torch.where(total == 0, 0.0, -total / times.slope), *grad_y


def moved(y: Sequence[Tensor], rate: Sequence[Tensor], shift: Tensor) -> list[Tensor]:
    """The leaves y, which move with a time: shift is zero, but for its gradient, [rows]; rate: dy/dt there."""
    return list(_Moved.apply(len(shift), tuple(rate), shift, *y))


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, rate, shift, *y):
        ctx.rows, ctx.rate, ctx.links = rows, rate, links((shift, *y))
        ctx.set_materialize_grads(False)
        return tuple([leaf.clone() for leaf in y])

    @staticmethod
    @one_by_one
    @first_only(NO_SECOND_DERIVATIVE)
    def backward(ctx, *grad_y: Any):
        return None, None, _along(grad_y, ctx.rate, ctx.rows), *grad_y


def _along(grad_y: Sequence[Tensor | None], rate: Sequence[Tensor], rows: int) -> Any:
    """The product of a cotangent with a rate, [rows]."""
    products = [real_product(g, r).reshape(rows, -1).sum(1) for g, r in zip(grad_y, rate, strict=True) if g is not None]
    return torch.stack(products).sum(0) if products else 0.0
