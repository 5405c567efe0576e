"""From where a solve came to, to what the user gets: its Solution, its statistics, and its failure in words."""

import math

import torch
from torch import Tensor

from .attempts import attempts_of
from .interpolant import Interpolant
from .ops import FIELDS
from .problem import Problem
from .request import Request
from .solution import Solution, Stats, raise_failure
from .solvers.trajectory import Recorder, Trajectory
from .step_control import SUCCESS


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
    status = state[FIELDS["status"]]
    problem.failed = not (status[0] == SUCCESS if len(status) == 1 else (status == SUCCESS).all())
    if not problem.failed and not problem.own:
        return False
    last = solution_of(request, problem, ys, trajectory, None, stats)
    reached = torch.from_numpy(state[FIELDS["output_end"]]).to(ys[0].device)
    missing = torch.arange(len(problem.t), device=ys[0].device)[:, None] >= reached  # [T, rows]
    problem.missing = missing
    for out in ys:
        columns = [missing.shape[1], *[1] * (out.dim() - 2)] if out.dim() > 1 else []
        out.masked_fill_(missing.reshape(-1, *columns), math.nan)
    if problem.failed and request.settings.on_failure == "raise":
        raise_failure(state, last, request.options.control.max_num_steps)
    return problem.failed


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
    )
    if request.settings.dense and recorder is not None:
        start = [y[0].clone() for y in ys]  # with a gradient, if there are no steps
        ends = problem.t[0], problem.t[-1]
        solution.interpolant = Interpolant(
            request.options.tableau, recorder.dense_steps, start, ends, unflatten, problem.per_sample
        )
        solution.attempts = attempts_of(recorder.tried, problem.per_sample)
    return solution
