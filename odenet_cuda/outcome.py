"""From where a solve came to, to what the user gets: its Solution, its statistics, and its failure in words."""

import math
from typing import Any

import torch
from torch import Tensor

from .attempts import attempts_of
from .interpolant import Interpolant
from .ops import FIELDS
from .problem import Problem
from .request import Request
from .solution import Solution, Stats, raise_failure
from .solvers.stiffness import Looks, look_after
from .solvers.trajectory import Recorder, Trajectory
from .step_control import SUCCESS, succeeded


def stats_of(request: Request, trajectory: Trajectory) -> Stats:
    problem = request.problem
    nfe: int = problem.field.nfe  # type: ignore[attr-defined]
    steps = len(request.grid[0]) - 1 if request.grid is not None and problem.leaves[0].numel() else 0
    return Stats(nfe, problem.per_sample, trajectory.state, trajectory.steps or steps, problem.rows)


def failed(request: Request, problem: Problem, trajectory: Trajectory, ys: list[Tensor], stats: Stats) -> bool:
    """Whether the solve failed. Then outputs that were not reached become NaN, or, where the user wants that, SolverError is
    raised. Those for which a row has no time become NaN in any case."""
    state = trajectory.host_state()
    if state is None:
        return False
    # What one solve of a compiled field leaves for the next holds no func.
    whole = lambda: problem if problem.field is not None else request.problem  # noqa: E731
    looks = Looks() if request.compiled is None else request.compiled.plans.looks
    look_after(whole, request.options.tableau, state, trajectory.last[: len(ys)], looks)
    problem.failed = not succeeded(state)
    if not problem.failed and not problem.own:
        return False
    last = solution_of(request, problem, ys, trajectory, None, stats)
    _mark_missing(problem, state, ys)
    if problem.failed and request.settings.on_failure == "raise":
        raise_failure(state, last, request.options.control.max_num_steps, trajectory)
    return problem.failed


def _mark_missing(problem: Problem, state: Any, ys: list[Tensor]) -> None:
    """Outputs that were not reached become NaN."""
    reached = torch.from_numpy(state[FIELDS["output_end"]]).to(ys[0].device)
    missing = torch.arange(len(problem.t), device=ys[0].device)[:, None] >= reached  # [T, rows]
    problem.missing = missing
    for out in ys:
        columns = [missing.shape[1], *[1] * (out.dim() - 2)] if out.dim() > 1 else []
        out.masked_fill_(missing.reshape(-1, *columns), math.nan)


def known_of(problem: Problem, trajectory: Trajectory, values: list[Tensor]) -> list[Tensor]:
    """Values at the end of the solve, NaN of the rows that failed."""
    state = trajectory.host_state()
    if not problem.failed or state is None:
        return values
    lost = torch.from_numpy(state[FIELDS["status"]] != SUCCESS).to(values[0].device)
    masks = [lost.reshape(-1, *[1] * (x.dim() - 1)) if problem.per_sample else lost[0] for x in values]
    return [torch.where(mask, math.nan, x) for mask, x in zip(masks, values, strict=True)]


def interrupted(request: Request, trajectory: Trajectory) -> Solution:
    """What a solve had come to when it was interrupted, without gradients."""
    ys = [leaf.detach() for leaf in trajectory.ys]
    _mark_missing(request.problem, trajectory.host_state(), ys)
    solution = solution_of(request, request.problem, ys, trajectory, None, stats_of(request, trajectory))
    solution.engine = "stepper"
    return solution


def solution_of(
    request: Request,
    problem: Problem,
    ys: list[Tensor],
    trajectory: Trajectory,
    recorder: Recorder | None,
    stats: Stats,
) -> Solution:
    unflatten = request.structure.unflatten
    solution = Solution(
        unflatten(ys),
        problem.t,
        stats,
        unflatten([leaf.detach() for leaf in trajectory.last[: len(ys)]]),
        device=problem.device,
        per_sample=problem.per_sample,
        state=trajectory.state,
        slope=trajectory.slope,
    )
    solution.method = request.options.method
    if request.settings.dense and recorder is not None:
        start = [y[0].clone() for y in ys]  # with a gradient, if there are no steps
        ends = problem.t[0], problem.t[-1]
        solution.interpolant = Interpolant(
            request.options.tableau, recorder.dense_steps, start, ends, unflatten, problem.per_sample
        )
        solution.attempts = attempts_of(recorder.tried, problem.per_sample)
    return solution
