"""The accepted steps of a solve, one by one, as they are asked for."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .gradients.adjoint_setup import NOT_GIVEN
from .graphed.capture import no_cast_is_kept
from .integrate import refuse
from .interpolant import Interpolant
from .ops import FIELDS
from .outcome import failed, stats_of
from .request import Request, settings_of
from .resume import check_resume
from .solution import Solution
from .solvers.adaptive import AdaptiveSolver
from .solvers.families import family_of
from .solvers.hooks import some
from .solvers.trajectory import Recorder
from .step_control import RUNNING


@dataclass(frozen=True, eq=False)
class AcceptedStep:
    """One step, from y0 at t0 to y1 at t1 = t0 + dt. Its tensors are its own: nothing writes into them afterwards.

    t0, t1, dt: float64, 0-dimensional; under per-sample control [batch]. y0, y1: states in the structure of that of the solve.
    error_ratio: as it was accepted, at most 1 (with min_step more), float64 as t0. accept: bool, True; under per-sample
    control [batch], the samples whose step this is: others have dt = 0, or a step that was rejected, and stay at y0 = y1.
    interpolant: the solution within the step, see `Interpolant`.
    """

    t0: Tensor
    t1: Tensor
    y0: Any
    y1: Any
    dt: Tensor
    error_ratio: Tensor
    accept: Tensor
    interpolant: Interpolant


def steps(
    func: Callable[..., Any],
    y0: Any,
    t0: Any,
    t1: float | None = None,
    *,
    args: Sequence[Any] = (),
    method: str = "dopri5",
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    step_control: str = "joint",
    controller: str | tuple[float, float, float] = "I",
    first_step: float | None = None,
    min_step: float = 0.0,
    max_step: float = math.inf,
    max_num_steps: int = 2**31 - 1,
    safety: float = 0.9,
    ifactor: float = 10.0,
    dfactor: float = 0.2,
    step_t: Any = (),
    jump_t: Any = (),
    interp: str = "method",
    norm: Callable | None = None,
    valid: Callable[[Any], Any] | None = None,
    resume: Solution | None = None,
) -> Iterator[AcceptedStep]:
    """Yields each accepted step of dy/dt = func(t, y), y(t0) = y0, as it is made: func is not called before one is asked for.

    t0: a number. t1: the last time, at which the steps end; None: they go on for ever, forwards in time, and -inf: backwards.
    The other arguments are those of `solve`; the method must be adaptive. There are no gradients, and on CUDA the host waits
    for each step. resume: a Solution with whose next step this begins; t0 is then its t_last.

    Raises ValueError and TypeError for wrong arguments at once; SolverError where the next step fails.

    >>> import torch
    >>> from odenet_cuda import steps
    >>> for step in steps(lambda t, y: -y, torch.ones(1), 0.0):
    ...     if step.y1 < 0.5:
    ...         break
    >>> bool(step.y0 >= 0.5)
    True
    """
    settings = settings_of(
        method, "direct", step_control, controller, first_step, min_step, max_step, max_num_steps, safety, ifactor, dfactor,
        step_t, jump_t, None, None, False, False, interp, (), True, "raise", None,
    )  # fmt: skip
    if not settings.options.adaptive:
        raise ValueError(f"method must be adaptive for steps, got {method!r}: its steps are the times of its grid")
    if resume is not None:
        check_resume(resume)
        y0 = resume.y_last if y0 is None else y0
    with torch.no_grad():
        t = t0 if t1 is not None and math.isfinite(t1) and isinstance(t0, (int, float)) else None
        times = [t, t1] if t is not None else _times(t0, t1)
        request = Request(func, y0, times, args, settings, rtol, atol, norm, None, NOT_GIVEN, False, None, resume, valid)
        refuse(request.options, family_of(request.options.tableau).refusal(request.problem, None))
        if request.problem.empty:
            raise ValueError("y0 must hold at least one number for steps")
    return _each(request)


def _times(t0: Any, t1: float | None) -> Tensor:
    """Both, as far apart as func can be told."""
    start = torch.as_tensor(t0, dtype=torch.float64, device="cpu").detach()
    far = torch.finfo(torch.float32).max / 2
    end = far if t1 is None else max(-far, min(far, float(t1)))
    return torch.stack([start, torch.full_like(start, end)], -1)


class _Host:
    """Keeps the solver state as the host sees it after a step."""

    seen: Any = None

    def after_step(self, host: np.ndarray, stepper: Any, state: Tensor) -> None:
        self.seen = host

    def end(self) -> None:
        pass


def _each(request: Request) -> Iterator[AcceptedStep]:
    problem, options, host = request.problem, request.options, _Host()
    recorder = Recorder(options.tableau, problem.t, problem.per_sample, len(problem.state_leaves), dense=True)
    places: dict[str, Any] = {"first_step": options.first_step, "step_t": options.step_t, "jump_t": options.jump_t}
    with torch.no_grad(), no_cast_is_kept():
        solver = AdaptiveSolver(
            problem, options.tableau, options.control, recorder=recorder, lookers=[host], resumed=request.resumed, **places
        )
        solver.start(None)
    running = bool((solver.state[FIELDS["status"]] == RUNNING).any())
    while running:
        with torch.no_grad(), no_cast_is_kept():
            solver.looked_at_step()
            found = _step(request, solver, recorder, host.seen)
            running = some(host.seen, "status", RUNNING)
        if found is not None:
            yield found
    trajectory = solver.trajectory()
    failed(request, problem, trajectory, trajectory.ys, stats_of(request, trajectory))


def _step(request: Request, solver: AdaptiveSolver, recorder: Recorder, host: np.ndarray) -> AcceptedStep | None:
    """The step that was just made, None where it was rejected."""
    if not recorder.dense_steps:
        return None
    step = recorder.dense_steps.pop()
    per_sample, state, unflatten = request.problem.per_sample, solver.state, request.structure.unflatten
    moved = host[FIELDS["accept"]] != 0  # others stay where they are
    ends: tuple[Any, Any] = np.where(moved, host[FIELDS["last_time"]], host[FIELDS["time"]]), host[FIELDS["time"]].copy()
    if not per_sample:
        ends = float(ends[0][0]), float(ends[1][0])
    interpolant = Interpolant(recorder.tableau, [step], step.y0, ends, unflatten, per_sample)
    t0, t1, dt, ratio = [state[FIELDS[name]].clone() for name in ("last_time", "time", "accepted_dt", "error_ratio")]
    accept = torch.ones_like(t0, dtype=torch.bool) if step.accept is None else step.accept
    t0, t1, dt, ratio, accept = [x if per_sample else x[0] for x in (torch.where(accept, t0, t1), t1, dt, ratio, accept)]
    y1 = [leaf.detach() for leaf in solver.stepper.y0[: len(step.y0)]]
    return AcceptedStep(t0, t1, unflatten(step.y0), unflatten(y1), dt, ratio, accept, interpolant)
