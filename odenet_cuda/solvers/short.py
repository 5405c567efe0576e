"""A short grid in torch's own operations.

On a CPU they cost less than kernels whose buffers and tables are first to be made.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..formulas import SHORT
from ..problem import Problem
from ..tableau import ButcherTableau
from .fixed import Plan, plan_of, stage_times
from .trajectory import Evaluation, Trajectory

MOST = 1 << 14  # numbers of a state: beyond, passes over memory cost more than calls
_FEW = 40  # calls of func: with more, and without a gradient, what the kernels need at the start is made up for


def is_short(tableau: ButcherTableau, nodes: Sequence[float]) -> bool:
    return (len(nodes) - 1) * tableau.stages <= _FEW


def serves(problem: Problem, tableau: Any, nodes: Sequence[float]) -> bool:
    """Whether a solve of which nothing is recorded is better done so."""
    if not isinstance(tableau, ButcherTableau) or not is_short(tableau, nodes) or problem.device.type != "cpu":
        return False
    if torch._C._is_any_autocast_enabled() or any([leaf.dtype in SHORT for leaf in problem.leaves]):
        return False
    return sum([leaf.numel() for leaf in problem.state_leaves]) <= MOST


def solve(problem: Problem, tableau: ButcherTableau, nodes: list[float], perturb: bool, start: Evaluation | None) -> Trajectory:
    """What `FixedSolver` gives, but for rounding."""
    plan = plan_of(nodes, problem.t, problem.direction, tableau)
    times = stage_times(plan, tableau, problem.real, problem.direction if perturb else 0.0)
    y0 = [leaf.detach() for leaf in problem.leaves]  # func may ask for gradients of what it is given
    steps = Steps(plan, tableau, perturb, problem.field, problem.signs, problem.quadratures)
    states, last = steps.take(times, y0, start)
    n = 0 if problem.signs is not None else len(problem.state_leaves)  # of a solve backwards nobody asks for outputs
    return Trajectory([torch.stack([state[leaf] for state in states]) for leaf in range(n)], last, None, call=steps.call)


class Steps:
    """The steps of a plan, in as few operations as there are numbers in the tableau. signs, quadratures: see `Problem`.

    call: the last of func.
    """

    def __init__(
        self,
        plan: Plan,
        tableau: ButcherTableau,
        perturb: bool,
        func: Callable[..., list[Any]],
        signs: Sequence[float] | None = None,
        quadratures: int = 0,
    ):
        self.plan, self.tableau, self.func, self.quadratures = plan, tableau, func, quadratures
        self.fsal = tableau.fsal and not perturb
        self.signs = signs
        self.call: Evaluation | None = None

    def take(self, times: Tensor, y0: list[Tensor], start: Evaluation | None = None) -> tuple[list[list[Tensor]], list[Tensor]]:
        """(the states at the times of outputs, y0 first; the last). times: of all stages. start: the first call, if known."""
        plan, tableau, stages = self.plan, self.tableau, self.tableau.stages
        rows, points, last = tableau.terms, len(tableau.rows), len(plan.outputs) - 1
        self.leaves = len(y0) - self.quadratures  # that func depends on
        views, y, slopes = times.unbind(0), y0, []
        states = [y]
        if start is not None:
            self.call, slopes = start, [start.k]
        for step, dt in enumerate(plan.dts):
            first, inside, point = step * stages, plan.inside[step], y
            if not slopes:
                slopes.append(self._slopes(views[first], y, 0))
            for i, row in enumerate(rows, 1):
                point = self._combined(y, slopes, row, dt, i == points)
                if i < stages and (i < points or inside or step < last):
                    slopes.append(self._slopes(views[first + i], point, i))
            weights = dict(inside)
            for place in range(len(plan.outputs[step])):
                between = weights.get(place)
                states.append(point if between is None else self._combined(y, slopes, list(enumerate(between)), dt, False))
            y, slopes = point, [slopes[-1]] if self.fsal and len(slopes) == stages else []
        return states, y

    def _slopes(self, t: Tensor, y: list[Tensor], stage: int) -> list[Any]:
        if self.quadratures:
            y = y[: self.leaves]
        k = self.func(t, y, stage)
        self.call = Evaluation(t, y, k)
        return k

    def _combined(
        self, y0: list[Tensor], k: list[list[Any]], row: list[tuple[int, float]], dt: float, end: bool
    ) -> list[Tensor]:
        """y0 + dt sum_j a_j k_j, of quadratures at the end of a step alone."""
        point = []
        for leaf in range(len(y0) if end else self.leaves):
            x, factor = y0[leaf], dt if self.signs is None else dt * self.signs[leaf]
            for j, weight in row:
                if weight != 0:
                    x = torch.add(x, k[j][leaf], alpha=factor * weight)
            point.append(x)
        return point
