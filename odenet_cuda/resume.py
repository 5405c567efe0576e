"""Where a solution ended, as the place from which another solve goes on."""

from typing import Any

import numpy as np
import torch

from .ops import FIELDS
from .problem import Problem, Structure
from .solution import STATUS_WORDS, Solution
from .solvers.start import Resumed
from .step_control import MAX_NUM_STEPS, RUNNING, SUCCESS

_GOES_ON = (RUNNING, SUCCESS, MAX_NUM_STEPS)


def check_resume(resume: Any) -> None:
    """Raises TypeError and ValueError where it is no Solution that could be gone on from at all."""
    if not isinstance(resume, Solution):
        raise TypeError(f"resume must be a Solution of solve, got {type(resume).__name__}")
    if resume._state is None or not resume.method:
        raise ValueError(
            "resume must be a Solution of one adaptive solve that has taken steps: one on a grid, or one whose state jumps and "
            "events changed, has no step size to go on with; solve from its y_last"
        )
    if resume.event_index is not None and bool((resume.event_index >= 0).any()):
        raise ValueError("resume must be a Solution that no event has ended: solve from its event_y")


def resumed_from(
    resume: Solution, problem: Problem, structure: Structure, method: str, first_step: float | None, adaptive: bool
) -> Resumed:
    """Raises ValueError where the solve is none that could have gone on from there."""
    _check_kind(resume, problem, method, first_step, adaptive)
    state = resume._state
    assert state is not None
    leaves = structure.flatten(resume.y_last)
    for i, (leaf, last) in enumerate(zip(problem.state_leaves, leaves, strict=True)):
        if (
            leaf.shape != last.shape
            or leaf.dtype is not last.dtype
            or leaf.device != last.device
            or not torch.equal(leaf, last)
        ):
            raise ValueError(
                f"y0 must be the state that resume ended with, its y_last, or None; leaf {i} is another, of shape "
                f"{list(leaf.shape)} and {leaf.dtype} on {leaf.device}"
            )
    host = state.cpu().numpy()
    time, size = host[FIELDS["time"]], host[FIELDS["next_size"]]
    size = np.where(size > 0, size, host[FIELDS["proposal"]])
    start, end = (np.ravel(problem.t[i]) + np.zeros(len(time)) for i in (0, -1))
    going, towards = start != end, np.ravel(problem.direction) + np.zeros(len(time))
    _refuse(
        problem, start != time, lambda i: f"t must begin where resume ended, at {float(time[i])!r}, got {float(start[i])!r}"
    )
    wrong = going & (towards != host[FIELDS["direction"]])
    _refuse(problem, wrong, lambda i: f"t must go on in the direction of resume, got {start[i]} to {end[i]}")
    status = host[FIELDS["status"]]
    wrong = going & ~np.isin(status, _GOES_ON)
    _refuse(problem, wrong, lambda i: f"resume has failed for good: {STATUS_WORDS[int(status[i])]}")
    _refuse(problem, going & ~(size > 0), lambda i: "resume has tried no step yet: solve without resume")
    state = state.clone()
    state[FIELDS["next_size"]] = torch.from_numpy(size).to(state.device)
    return Resumed(state, None if problem.quadratures else resume._slope)


def _check_kind(resume: Solution, problem: Problem, method: str, first_step: float | None, adaptive: bool) -> None:
    if not adaptive:
        raise ValueError(
            f"resume needs an adaptive method, got {method!r}, which has no step size to go on with: solve from y_last"
        )
    if method == "auto":
        raise ValueError("resume needs a method that keeps nothing of its steps but the last, got 'auto': solve from y_last")
    if method != resume.method:
        raise ValueError(f"method must be that of resume, {resume.method!r}, got {method!r}")
    if problem.per_sample != resume.per_sample:
        asked, had = ("per_sample" if x else "joint" for x in (problem.per_sample, resume.per_sample))
        raise ValueError(f"step_control must be that of resume, {had!r}, got {asked!r}")
    if first_step is not None:
        raise ValueError(f"first_step must not be given with resume, which goes on with its own, got {first_step}")


def _refuse(problem: Problem, wrong: np.ndarray, message: Any) -> None:
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(message(row) + (f" for sample {row}" if problem.per_sample else ""))
