"""A solve on a grid in torch's own operations, and the parts that steps made again share with it.

Autograd records it as it records any other program: differentiable as often as func is, forwards and backwards, and open to
transforms.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import formulas
from .formulas import SHORT
from .problem import Problem, to_device
from .solvers.fixed import plan_of, stage_times
from .solvers.short import Steps
from .solvers.trajectory import End
from .tableau import ButcherTableau, Method

Func = Callable[..., list[Tensor]]


def solve_on_grid(
    problem: Problem,
    tableau: ButcherTableau,
    nodes: list[float],
    moves_with: list[int | None],
    perturb: bool,
    func: Func,
    y0: Sequence[Tensor],
    t: Tensor,
) -> tuple[list[Tensor], list[Tensor]]:
    """(the outputs, each leaf [len(t), ...]; the last state, in memory of its own). t: output times, perhaps with a gradient.
    moves_with: see `FixedSolver`."""
    plan = plan_of(nodes, problem.t, problem.direction, tableau)
    times = to_device(stage_times(plan, tableau, problem.real, problem.direction if perturb else 0.0), problem.device)
    shifts = Shifts(problem, t)
    if shifts.zeros is None and not any([leaf.dtype in SHORT for leaf in y0]):
        states, y = Steps(plan, tableau, perturb, func).take(times, list(y0))
        return [torch.stack(leaf) for leaf in zip(*states, strict=True)], y
    stages, points, fsal = tableau.stages, len(tableau.rows), tableau.fsal and not perturb
    y, slope, last = list(y0), None, len(nodes) - 2
    ys: list[list[Tensor]] = [[leaf] for leaf in y]
    for step, (t0, t1) in enumerate(pairwise(nodes)):
        at_t0, at_t1 = (shifts.of(None if index is None else (index, None)) for index in moves_with[step : step + 2])
        dt, move = t1 - t0, difference_of(at_t1, at_t0)
        views = times[step * stages : (step + 1) * stages].unbind(0)
        if slope is None:
            slope = func(shifts.moved(views[0], at_t0), y)
        slopes, point, outputs = [slope], y, plan.outputs[step]
        inside = [x for x in outputs if x[1] != 1.0 or (shifts.zeros is not None and moves_with[step + 1] != x[0])]
        for i, row in enumerate(tableau.rows, 1):
            point = [combined(leaf, [of[j] for of in slopes], row, dt, _times(move, row)) for j, leaf in enumerate(y)]
            if i < stages and (i < points or inside or step < last):
                c = tableau.c[i]
                shift = sum_of(None if at_t0 is None else (1 - c) * at_t0, None if at_t1 is None else c * at_t1)
                slopes.append(func(shifts.moved(views[i], shift), point))
        for output in outputs:
            values = point
            if output in inside:
                index, theta, _ = output
                base, weights = (point, []) if theta == 1.0 else (y, formulas.interpolant_weights(tableau, theta))
                moves = moves_inside(tableau, theta, dt, move, difference_of(shifts.of((index, None)), at_t0))
                values = [combined(leaf, [of[j] for of in slopes], weights, dt, moves) for j, leaf in enumerate(base)]
            for of_leaf, value in zip(ys, values, strict=True):
                of_leaf.append(value)
        y, slope = point, slopes[-1] if fsal and len(slopes) == stages else None
    return [torch.stack(of_leaf) for of_leaf in ys], y


class Shifts:
    """Zeros that move with t: what is added to a recorded time so that it has its derivative."""

    def __init__(self, problem: Problem, t: Tensor):
        self.problem, self.real = problem, problem.real
        self.zeros: Tensor | None = None
        if t.requires_grad or _has_tangent(t):
            t = t.to(problem.device, torch.float64)
            if problem.own:
                t = torch.nan_to_num(t)
            self.zeros = t - t.detach()

    def of(self, end: End | None) -> Tensor | None:
        if end is None or self.zeros is None:
            return None
        index, mask = end
        if isinstance(index, Tensor):
            shift = self.zeros.gather(1, index[:, None])[:, 0] if self.problem.own else self.zeros[index]
        else:
            shift = self.zeros[:, index] if self.problem.own else self.zeros[index]
        return shift.expand(self.problem.rows) if mask is None else shift * mask

    def moved(self, t: Tensor, shift: Tensor | None) -> Tensor:
        return t if shift is None else t + shift.reshape(t.shape).to(self.real)


def _has_tangent(t: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    return torch.autograd.forward_ad._current_level >= 0 or torch._C._functorch.is_functorch_wrapped_tensor(t)


def sum_of(x: Any, y: Any) -> Any:
    """None is nothing."""
    return y if x is None else x if y is None else x + y


def difference_of(x: Any, y: Any) -> Any:
    return x if y is None else -y if x is None else x - y


def combined(y0: Tensor, k: Sequence[Tensor], row: Sequence[Any], dt: float, moves: Sequence[Any]) -> Tensor:
    """y0 + dt sum_j row_j k_j, to the bit as without the moves: zeros, one for each slope, with the derivatives that the
    weights have by t. None: it does not move."""
    total = stage(y0, k, row, dt)
    for weight, slope in zip(moves, k, strict=False):
        if weight is not None:
            wide = formulas.widened(slope)
            total = (formulas.widened(total) + formulas.per_row(weight, wide) * wide).to(y0.dtype)
    return total


def _times(move: Tensor | None, row: Sequence[float]) -> list[Tensor | None]:
    return [None if move is None or weight == 0 else move * weight for weight in row]


def moves_inside(tableau: Method, theta: Any, dt: float, move: Tensor | None, part: Tensor | None) -> Sequence[Tensor | None]:
    """As `combined` takes them, of an output at t0 + theta dt. move, part: zeros that move as dt, and as theta dt."""
    if move is None and part is None:
        return ()
    whole = sum_of(dt, move)
    weights = [whole * weight for weight in formulas.interpolant_weights(tableau, sum_of(theta * dt, part) / whole)]
    return [weight - weight.detach() if isinstance(weight, Tensor) else None for weight in weights]


def stage(y0: Tensor, k: Sequence[Tensor], a: Sequence[float], dt: Any) -> Tensor:
    """As `formulas.stage`, with sums of 16 bits in float32. dt: a number, or [rows]."""
    wide = formulas.widened(y0)
    return formulas.stage(wide, [formulas.widened(x) for x in k], a, formulas.per_row(dt, wide)).to(y0.dtype)


def dense_output(tableau: Method, y0: Tensor, k: Sequence[Tensor], theta: Any, dt: Any) -> Tensor:
    """As `formulas.dense_output`, likewise."""
    wide = formulas.widened(y0)
    k = [formulas.widened(x) for x in k]
    return formulas.dense_output(tableau, wide, k, formulas.per_row(theta, wide), formulas.per_row(dt, wide)).to(y0.dtype)
