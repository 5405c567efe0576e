"""Recorded steps once more in plain torch: differentiable as often as func is, forwards and backwards, and open to transforms.

Steps are taken as given; where they end depends on t only at the times of t themselves.
"""

from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from .. import noise
from ..plain import Func, Shifts, dense_output, difference_of, stage, sum_of
from ..problem import Problem, times_as_tensor
from ..products import Targets, gradients
from ..solvers.trajectory import Evaluation, Recorder, Step
from ..solvers.whole import arguments, whole_of
from ..tableau import Method, StepFunction

SECOND = " for second derivatives"


def save_inputs(ctx: Any, t: Tensor, y0: Sequence[Tensor]) -> None:
    """For `second_gradients`. Those without a gradient are known besides, and the user may write into his."""
    ctx.saved = [x.requires_grad for x in (t, *y0)]
    ctx.save_for_backward(*compress((t, *y0), ctx.saved))


def saved_inputs(ctx: Any, problem: Problem, recorder: Recorder) -> list[Tensor]:
    """y0 and t."""
    first = next(entry.y0 for entry in recorder.tape if isinstance(entry, Step)) or ()
    known = [times_as_tensor(problem.t), *(leaf.detach() for leaf in first)]
    saved = iter(ctx.saved_tensors)
    t, *y0 = [next(saved) if with_grad else x for x, with_grad in zip(known, ctx.saved, strict=False)]
    return [*y0, t]


def second_gradients(
    recorder: Recorder,
    problem: Problem,
    func: Func,
    y0_and_t: Sequence[Tensor],
    captured: Sequence[Tensor],
    grad_ys: Sequence[Tensor | None],
) -> Sequence[Tensor | None]:
    """The gradients by y0, t and the captured tensors with a graph of their own."""
    if recorder.step_costs is not None:
        raise RuntimeError("regularizers 'error' and 'stiffness' have first derivatives only: solve without create_graph=True")
    with torch.enable_grad():
        # Other names for y0 and t: what lies behind them is no part of the solve.
        inputs = [x.view_as(x) if x.requires_grad else x for x in y0_and_t]
        generators = noise.states(problem.device)
        ys = replay(recorder.tape, recorder.tableau, problem, func, inputs[:-1], inputs[-1])
        if noise.differ(generators, noise.states(problem.device)):
            raise RuntimeError("func draws random numbers, and second derivatives would need it to draw the same again")
        used = [(y, grad) for y, grad in zip(ys, grad_ys, strict=True) if grad is not None and y.requires_grad]
        wanted = [*inputs, *captured]
        positions = [i for i, x in enumerate(wanted) if x.requires_grad]
        sources = [wanted[i] for i in positions]
        found: list[Tensor | None] = [None] * len(wanted)
        if used and sources:
            outputs, cotangents = zip(*used, strict=True)
            for i, grad in zip(positions, gradients(outputs, [], cotangents, Targets(sources), True, True), strict=True):
                found[i] = grad
    return found


def replay(
    tape: Sequence[Step | Evaluation],
    tableau: Method,
    problem: Problem,
    func: Func,
    y0: Sequence[Tensor],
    t: Tensor,
) -> list[Tensor]:
    """The outputs of the solve that left this tape, each leaf [len(t), ...], then its quadratures."""
    n = len(y0)
    y = [*y0, *(leaf.detach() for leaf in problem.leaves[n:])]
    k = y  # where the solve has come to, and the slope there
    ys: list[list[Any]] = [[leaf, *[None] * (len(problem.t) - 1)] for leaf in y]
    past: list[Any] = []  # see `StepFunction`
    shifts = Shifts(problem, t)
    last = max([-1, *[i for i, entry in enumerate(tape) if isinstance(entry, Step)]])
    for position, entry in enumerate(tape):
        if isinstance(entry, Evaluation):
            found = func(shifts.moved(entry.t.detach(), shifts.of(entry.end)), y[:n])
            k = found if entry.mask is None else [_where(entry.mask, new, old) for new, old in zip(found, k, strict=True)]
            continue
        at_t0, at_t1 = shifts.of(entry.ends[0]), shifts.of(entry.ends[1])
        dt = sum_of(entry.dt, difference_of(at_t1, at_t0))
        views, slopes, point = problem.time_views(entry.times.detach()), [k], y
        whole = whole_of(entry)
        if whole is not None or isinstance(tableau, StepFunction):
            method: Any = entry.method or tableau if whole is None else whole.method
            ends = [(None if at_t0 is None else (1 - c) * at_t0, None if at_t1 is None else c * at_t1) for c in tableau.c]
            views = [shifts.moved(view, sum_of(*end)) for view, end in zip(views, ends, strict=True)]
            rows = torch.as_tensor(dt, dtype=torch.float64, device=problem.device).reshape(-1)
            more = arguments(method, problem, y, past)
            point, further, _ = (method.second or method.step)(func, views, rows, y, k, **more)
            past = [(rows, k), *past][: method.memory]
            slopes += further
        else:
            for i, row in enumerate(tableau.rows, 1):
                point = [stage(leaf, [of[j] for of in slopes], row, dt) for j, leaf in enumerate(y)]
                if i < tableau.stages and (i < len(tableau.rows) or entry.outputs or position < last):
                    c = tableau.c[i]
                    shift = sum_of(None if at_t0 is None else (1 - c) * at_t0, None if at_t1 is None else c * at_t1)
                    slopes.append(func(shifts.moved(views[i], shift), point[:n]))
        for index, theta, mask, lands in entry.each_output():
            if lands:
                values = point
            else:
                inside = sum_of(theta * entry.dt, difference_of(shifts.of((index, None)), at_t0))
                share = inside / (torch.where(dt == 0, 1.0, dt) if isinstance(dt, Tensor) else dt)  # 0: a row that never moved
                values = [dense_output(tableau, leaf, [of[j] for of in slopes], share, dt) for j, leaf in enumerate(y)]
            for of_leaf, value in zip(ys, values, strict=True):
                held = of_leaf[index]
                of_leaf[index] = value if mask is None or held is None else _where(mask, value, held)
        if entry.accept is None:
            y, k = point, slopes[-1]
        else:
            y = [_where(entry.accept, new, old) for new, old in zip(point, y, strict=True)]
            k = [_where(entry.accept, new, old) for new, old in zip(slopes[-1], k, strict=True)]
    outputs = [torch.stack([y[i] if part is None else part for part in parts]) for i, parts in enumerate(ys[:n])]
    return [*outputs, *y[n:]]


def _where(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(mask.reshape(-1, *[1] * (new.dim() - 1)), new, old)
