"""The gradient of where and when an event happens: the implicit function theorem.

g(t, y(t)) = 0 holds for every y0 and every parameter p, so with the rate r = dy/dt at the event

    dt = -(g_y dy + g_p dp) / (g_t + g_y r),   dy_event = dy + r dt

where dy is the change of the state at the time of the event as it was. That may be the time of an output, which moves itself:
then these are what moves beside it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import formulas
from ..captured import Known, Walk
from ..products import real_product
from ..solvers.events import Crossing, EventWatch
from .first_only import first_only, links
from .one_by_one import one_by_one

NO_SECOND_DERIVATIVE = "the times of events and jumps have first derivatives only: for second ones solve without them"


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
    slope = slope + _along(by_y, rate, problem.rows)
    t_event, *y_event = _Implicit.apply(crossing.found, slope, tuple(rate), t0, g, *y)
    return t_event, y_event


class _Implicit(torch.autograd.Function):
    """found: rows with an event. slope: dg/dt along the solution, [rows]."""

    @staticmethod
    def forward(ctx, found, slope, rate, t, g, *y):
        ctx.found, ctx.slope, ctx.rate, ctx.links = found, slope, rate, links((t, g, *y))
        ctx.set_materialize_grads(False)
        return t.clone(), *(leaf.clone() for leaf in y)

    @staticmethod
    @one_by_one
    @first_only(NO_SECOND_DERIVATIVE)
    def backward(ctx, grad_t: Any, *grad_y: Any):
        found, slope = ctx.found, ctx.slope
        total = torch.zeros_like(slope) if grad_t is None else grad_t
        total = torch.where(found, total + _along(grad_y, ctx.rate, len(slope)), 0.0)
        by_g = torch.where(total == 0, 0.0, -total / slope)
        # Where the event function only touches zero its time has no derivative: nothing that depends on it may look as if.
        spoilt = torch.where(by_g.isfinite(), 0.0, torch.nan)
        by_y = [
            (torch.zeros_like(rate) if x is None else x) + formulas.per_row(spoilt, rate)
            for x, rate in zip(grad_y, ctx.rate, strict=True)
        ]
        return None, None, None, grad_t, by_g, *by_y


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
