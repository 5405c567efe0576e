"""The way back through a step that was recorded as a whole: one vector-Jacobian product gives all that it depends on."""

from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from ..formulas import per_row
from ..solvers.trajectory import Step
from ..solvers.whole import WholeStep


def undo_whole(
    walk: Any,
    whole: WholeStep,
    step: Step,
    lam: list[Tensor],
    base: list[list[Tensor]] | None,
    into_y0: list[Tensor] | None,
) -> None:
    """As `BackwardWalk.undo_points`, whose arguments these are."""
    n, stages = walk.n, walk.tableau.stages
    kappa = walk.kappa or [torch.zeros_like(x) for x in lam]
    passed: list[Tensor] | None = None
    if step.accept is not None:  # rows that were rejected passed y0 and k0 on
        passed = [per_row(~step.accept, x) * x for x in (*lam, *kappa)]
        lam, kappa = ([per_row(step.accept, x) * x for x in state] for state in (lam, kappa))
    by_k = base or [[torch.zeros_like(x) for x in lam] for _ in range(stages)]
    by_k[-1] = [x + y for x, y in zip(by_k[-1], kappa, strict=True)]
    grads, by_times = walk._vjp(whole, [x for state in (lam, *by_k[1:]) for x in state])
    found = [torch.zeros_like(x) if grad is None else grad for grad, x in zip(grads, whole.y, strict=True)]
    for also in ([*(into_y0 or ()), *by_k[0]], passed or ()):
        begin = 2 * n - len(also)
        found[begin : 2 * n] = [x + y for x, y in zip(found[begin : 2 * n], also, strict=True)]
    if walk.tableau.memory:
        _add_older(walk, found)
    walk.lam, walk.kappa = found[:n], found[n : 2 * n]
    if walk.t_grad:
        by_dt = found[2 * n]
        at_t0, at_t1 = -by_dt, by_dt
        for c, grad in zip(walk.tableau.c, () if by_times is None else by_times.double(), strict=False):
            at_t0, at_t1 = at_t0 + (1 - c) * grad, at_t1 + c * grad
        walk._add_end(step.ends[0], at_t0)
        walk._add_end(step.ends[1], at_t1)


def _add_older(walk: Any, found: list[Tensor]) -> None:
    """What the steps after this one, which remembered it, give to its size and first slope; and what it gives to those before.
    walk.older: of steps from here backwards, the gradients for (size, first slope), as in `WholeStep.y`."""
    n, pending = walk.n, walk.older
    own = [[found[i], *found[i + 1 : i + 1 + n]] for i in range(2 * n + 1, len(found), n + 1)]
    if pending:
        by_dt, *by_k = pending[0]
        found[2 * n] = found[2 * n] + by_dt
        found[n : 2 * n] = [x + y for x, y in zip(found[n : 2 * n], by_k, strict=True)]
    both = zip_longest(own, pending[1:], fillvalue=None)
    walk.older = [x if y is None else y if x is None else [a + b for a, b in zip(x, y, strict=True)] for x, y in both]
