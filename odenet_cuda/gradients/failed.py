"""Gradients of a solve in which rows failed (on_failure="return") or have fewer times than others.

Outputs that a row did not reach are NaN. A loss that leaves them out has the gradient of the others; one that uses them is NaN
itself, and so are the row's gradient and all that rows share. Where a row has no time its output is NaN too, a constant: what a
loss does with it has no part in any gradient.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..problem import Problem, times_as_tensor
from ..solvers.trajectory import Evaluation, Step
from ..solvers.whole import WholeStep


def known_cotangents(problem: Problem, grad_ys: Sequence[Tensor | None]) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
    """The cotangents with zeros where an output was not reached, and for each row NaN where the loss used such an output, else
    0; None where all were reached."""
    missing = problem.missing  # [T, rows]
    if missing is None:
        return tuple(grad_ys), None
    known: list[Tensor | None] = list(grad_ys)
    lost = missing & ~times_as_tensor(problem.t).isnan().T.to(missing.device) if problem.own else missing
    used = torch.zeros(problem.rows, dtype=torch.bool, device=problem.device)
    for i in range(len(problem.state_leaves)):
        grad = grad_ys[i]
        if grad is None:
            continue
        shape = (*missing.shape, *[1] * (grad.dim() - 2)) if grad.dim() > 1 else missing.shape[:1]
        known[i] = torch.where(missing.reshape(shape), 0, grad)
        if problem.failed:
            used |= (torch.where(lost.reshape(shape), grad, 0) != 0).reshape(len(missing), problem.rows, -1).any(2).any(0)
    if not problem.failed:
        return tuple(known), None
    return tuple(known), torch.where(used, torch.nan, 0.0)


def with_nan(
    spoilt: Tensor | None, problem: Problem, grad_y0: Sequence[Any], grad_t: Any, others: Sequence[Any]
) -> tuple[list[Any], Any, list[Any]]:
    """The gradients, NaN where the loss used an output that was not reached; spoilt: of `known_cotangents`."""
    if spoilt is None:
        return list(grad_y0), grad_t, list(others)
    total = spoilt.sum()

    def of_rows(grad: Any) -> Any:
        if grad is None or not problem.per_sample:
            return None if grad is None else grad + total.to(grad.dtype)
        return grad + spoilt.reshape(-1, *[1] * (grad.dim() - 1)).to(grad.dtype)

    shared = [None if x is None else x + total.to(x.device, x.dtype) for x in others]
    if grad_t is not None:
        grad_t = of_rows(grad_t) if problem.own else grad_t + total.to(grad_t.device, grad_t.dtype)
    return [of_rows(grad) for grad in grad_y0], grad_t, shared


def stand_ins(problem: Problem, i: int) -> tuple[Tensor | None, Tensor | None]:
    """(rows that did not reach output i, for each row the one whose state func is given there: another where it did not, for
    its own may be where func gives no number); Nones where all came so far, (rows, None) where none did."""
    if problem.missing is None:
        return None, None
    failed = problem.missing[i]
    if not bool(failed.any()):
        return None, None
    if bool(failed.all()):
        return failed, None
    rows = torch.arange(problem.rows, device=problem.device)
    return failed, torch.where(failed, rows[~failed][0], rows)


def has_broken_rows(step: Step) -> bool:
    """Whether what a rejected row tried may be no number. On CUDA the host knows that of its error alone."""
    if step.broken or step.accept is None or step.accept.device.type != "cpu" or bool(step.accept.all()):
        return step.broken
    slopes = [k.detach() for evaluation in step.evaluations if evaluation is not None for k in evaluation.k]
    return bool(slopes) and not all([math.isfinite(x) for x in torch.stack(torch._foreach_norm(slopes, 1)).tolist()])


def without_others(problem: Problem, evaluation: Evaluation, cotangents: Sequence[Tensor]) -> Evaluation:
    """The evaluation with other rows in place of those without a cotangent whose slope is no number: zero times their Jacobian
    would be none either."""
    rows = problem.rows
    broken = torch.stack([~torch.isfinite(k).reshape(rows, -1).all(1) for k in evaluation.k]).any(0)
    broken &= torch.stack([(x == 0).reshape(rows, -1).all(1) for x in cotangents]).all(0)
    if not bool(broken.any()) or bool(broken.all()):
        return evaluation
    other = int((~broken).nonzero()[0])
    field: Any = problem.field
    with torch.enable_grad():
        y = [torch.where(broken.reshape(-1, *[1] * (x.dim() - 1)), x[other], x).detach() for x in evaluation.y]
        if isinstance(evaluation, WholeStep):  # of size 0, which cannot fail
            dt = 2 * len(problem.state_leaves)
            y[dt] = torch.where(broken, 0, y[dt])
        y = [leaf.requires_grad_(old.requires_grad) for leaf, old in zip(y, evaluation.y, strict=True)]
        t = evaluation.t.detach().requires_grad_(evaluation.t.requires_grad)
        other_one = replace(evaluation, t=t, y=y)
        return replace(other_one, k=other_one.again(field.again()))
