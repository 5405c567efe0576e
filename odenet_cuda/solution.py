"""What a solve gives back: Solution, its statistics, and the exception of a failed solve."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Generic

import numpy as np
import torch
from torch import Tensor

from .attempts import Attempts
from .interpolant import Interpolant, State
from .ops import FIELDS
from .printing import facts, table
from .problem import OwnTimes, times_as_tensor, to_device
from .step_control import (
    MAX_NUM_STEPS,
    NON_FINITE,
    NON_FINITE_JACOBIAN,
    NOT_CONVERGED,
    OUTSIDE,
    RUNNING,
    SCIPY_FAILED,
    SINGULAR,
    STEP_FAILURES,
    SUCCESS,
    UNDERFLOW,
)

STATUS_WORDS = {
    RUNNING: "interrupted",
    SUCCESS: "success",
    UNDERFLOW: "underflow in dt",
    NON_FINITE: "non-finite values",
    MAX_NUM_STEPS: "max_num_steps exceeded",
    OUTSIDE: "outside the domain of valid",
    NOT_CONVERGED: "no convergence",
    SINGULAR: "singular matrix",
    NON_FINITE_JACOBIAN: "non-finite Jacobian",
    SCIPY_FAILED: "scipy failed",
}
_BEGINNINGS = {
    NON_FINITE: "non-finite values in state `y`: the state or its slope is infinite or not a number",
    NOT_CONVERGED: "no convergence: Newton's method did not solve the stages of the step in max_iters iterations",
    SINGULAR: "singular matrix: I - dt a df/dy of Newton's method has no inverse",
    NON_FINITE_JACOBIAN: "non-finite Jacobian: df/dy of func is infinite or not a number",
}
_REMEDIES = {
    UNDERFLOW: "the error test cannot be met however small the step: loosen rtol and atol, solve in float64, give the "
    "discontinuities of func in jump_t, or set min_step",
    NON_FINITE: "look for overflow or a division by zero in func near this time, and at the initial state; where atol is 0, a "
    "number that is 0 has no tolerance, in the backward solve of an adjoint too: give an atol above 0",
    MAX_NUM_STEPS: "raise max_num_steps, loosen rtol and atol, or use an output in between; a problem this expensive for an "
    "explicit method is often stiff",
    OUTSIDE: "the solution itself leaves the domain here: look at func and y0, tighten rtol and atol, or let valid allow for "
    "the error of a step (y > -atol for y > 0)",
    NOT_CONVERGED: "take smaller steps (step_size, or more times in t), raise max_iters, or use an adaptive method for stiff "
    "systems, such as rodas5p",
    SINGULAR: "take another step size (step_size): the equations of a step of this one have no solution, or many",
    NON_FINITE_JACOBIAN: "look in func for a derivative that is infinite at this state, such as that of a root at zero, or for "
    "a division of zero by zero",
    SCIPY_FAILED: "loosen rtol and atol, take another solver in options, or a method of this package, such as rodas5p",
}


class SolverError(AssertionError):
    """A solve that could not be finished.

    status: ``"underflow in dt"``, ``"non-finite values"``, ``"max_num_steps exceeded"``, ``"outside the domain of valid"``,
    ``"scipy failed"``, or of an implicit method on a grid ``"no convergence"``, ``"singular matrix"``, ``"non-finite
    Jacobian"``.
    sample: index of the first row that failed, or None under joint control; of an implicit method on a grid the sample whose
    equations they are, or None where func couples samples. t, dt: time reached and last step tried. y: the last accepted
    state, as the user gave it. solution: everything known, with NaN where an output was not reached.
    """

    def __init__(self, message: str, *, status: str, sample: int | None, t: float, dt: float, solution: "Solution"):
        super().__init__(message)
        self.status, self.sample, self.t, self.dt, self.solution = status, sample, t, dt, solution
        self.y = solution.y_last


class Stats:
    """Counts of a solve. They are written where the solve ran and read when asked for.

    nfe: calls of func. num_accepted, num_rejected: steps; an int under joint control, an int64 tensor [batch] per sample.
    nfe_backward: calls of func in the last backward pass through this solve; 0 before one.
    adjoint_drift: how far the adjoint's backward solve came back from the stored outputs, at most, as a multiple of its
        tolerance, and that of "reversible" from y0; a float, or float64 [batch] per sample. Far above 1 its gradient cannot be
        trusted; 0 without such a solve.
    """

    def __init__(self, nfe: int, per_sample: bool, state: Tensor | None = None, steps: int = 0, rows: int = 1):
        """state: of the solver, None on a grid: then every row took so many steps."""
        self.nfe = nfe
        self.nfe_backward = 0
        self.drift: Tensor | None = None  # [rows]
        self.looks: list[Callable[[], None]] = []  # that are still to be added to it
        self._per_sample, self._state, self._steps, self._rows = per_sample, state, steps, rows

    @property
    def num_accepted(self) -> int | Tensor:
        return self._count("num_accepted", self._steps)

    @property
    def num_rejected(self) -> int | Tensor:
        return self._count("num_rejected", 0)

    @property
    def adjoint_drift(self) -> float | Tensor:
        with torch.no_grad():
            while self.looks:
                self.looks.pop()()
        if self.drift is None:
            device = None if self._state is None else self._state.device
            return torch.zeros(self._rows, dtype=torch.float64, device=device) if self._per_sample else 0.0
        return self.drift if self._per_sample else float(self.drift[0])

    def _count(self, name: str, on_grid: int) -> int | Tensor:
        if self._state is None:
            return torch.full((self._rows,), on_grid, device="cpu") if self._per_sample else on_grid
        counts = self._state[FIELDS[name]]
        return counts.long() if self._per_sample else int(counts[0])

    def __repr__(self) -> str:
        return (
            f"Stats(nfe={self.nfe}, num_accepted={self.num_accepted}, num_rejected={self.num_rejected}, "
            f"nfe_backward={self.nfe_backward})"
        )


class Solution(Generic[State]):
    """The result of `solve`.

    ys: the state at every t, in the structure of y0, each leaf [len(t), *leaf.shape]. t: the times, float64; [batch, T] where
    each sample has its own, and ys [T, batch, ...] is NaN where t is.
    stats: see `Stats`. interpolant: with ``dense=True`` a callable, see `Interpolant`; else None. y_last: the last accepted
    state; it differs from ``ys[-1]`` only where the solve failed. regularizers: what `solve` was asked for, by name, numbers
    with gradients, under per-sample control one a sample. integrals: with ``integrals`` their values from the first to the
    last time, in the structure of what that gives, NaN of samples that failed.
    event_t, event_y, event_index: with ``events`` when the first of them happened, the state there, and which it was, of each
    sample under per-sample control; NaN, NaN and -1 where none did, and ``ys`` is NaN after it. Where the solve goes on after
    events they have the events on axis 0, and the state is that before its change.
    engine: which one served, "transformed", "compiled", "graphed", "plain" or "stepper". explanation: why each that was asked
    before it did not, by its name.
    attempts: with ``dense=True`` of an adaptive solve every step that was tried, see `Attempts`; else None.

    t_last: the time of y_last, where the solve ended, failed, or was interrupted: from there ``solve(..., resume=solution)``
    goes on, to the times that `times_ahead` gives.
    """

    def __init__(
        self,
        ys: State,
        times: Any,
        stats: Stats,
        y_last: State,
        *,
        device: torch.device,
        per_sample: bool = False,
        state: Tensor | None = None,
        interpolant: Interpolant[State] | None = None,
        slope: Sequence[Tensor] = (),
    ):
        """times: on this device, once asked for. state: of the solver, None on a grid. slope: the first of the next step."""
        self.ys, self.stats, self.y_last, self.interpolant, self.per_sample = ys, stats, y_last, interpolant, per_sample
        self.regularizers: dict[str, Tensor] = {}
        self.integrals: Any = None
        self.attempts: Attempts | None = None
        self.event_t: Tensor | None = None
        self.event_y: State | None = None
        self.event_index: Tensor | None = None
        self._event_signs: Tensor | None = None  # see `Events`, of a solve that ends at its event
        self._at_event: tuple[Tensor, list[Tensor]] | None = None  # t, y of rows with one, as if t were given
        self.engine, self.explanation = "", {}  # type: str, dict[str, str]
        self._times, self._device, self._state = times, device, state
        self._t: Tensor | None = None
        self.saved = False  # whether ys are what save makes of them
        self.method = ""  # by which it was solved, where it was one solve
        self._slope = list(slope) or None

    @property
    def own_times(self) -> bool:
        """Whether each sample has its own."""
        return isinstance(self._times, OwnTimes)

    @property
    def t(self) -> Tensor:
        if self._t is None:
            self._t = to_device(times_as_tensor(self._times), self._device)
        return self._t

    @property
    def t_last(self) -> Tensor:
        """Float64, 0-dimensional, under per-sample control [batch]."""
        if self._state is not None:
            t = self._state[FIELDS["time"]].clone()
        elif self.own_times:
            t = to_device(torch.from_numpy(self._times[-1].copy()), self._device)
        else:
            t = self.t[-1:].expand(len(torch.utils._pytree.tree_leaves(self.y_last)[0]) if self.per_sample else 1).clone()
        if self.event_t is not None and self._event_signs is not None and self.event_t.dim() < 2:
            at = self.event_t.detach().reshape(-1)
            t = torch.where(at.isnan(), t, at)
        return t if self.per_sample else t[0]

    def times_ahead(self, t: Any) -> Tensor:
        """The times of a solve that goes on from here: t_last, then those of t that lie ahead of it, float64 [T]; under
        per-sample control [batch, T], with NaN at the end where a sample has fewer.

        t: [T] or [batch, T], strictly monotone in the direction of this solve. Raises ValueError where this was no adaptive
        solve.
        """
        if self._state is None:
            raise ValueError("times_ahead needs a Solution of an adaptive solve: one on a grid ended at its last time")
        last, direction = (x.cpu().reshape(-1, 1) for x in (self.t_last, self._state[FIELDS["direction"]]))
        given = torch.as_tensor(t, dtype=torch.float64, device="cpu").detach()
        ahead = direction * (given - last) > 0  # [rows, T]
        order = (~ahead).to(torch.int8).sort(dim=1, stable=True).indices[:, : int(ahead.sum(1).max())]
        times = given.expand(len(last), -1).gather(1, order).masked_fill(~ahead.gather(1, order), math.nan)
        times = torch.cat([last, times], 1)
        return times if self.per_sample else times[0]

    @property
    def status(self) -> str | list[str]:
        """``"success"`` or why the solve ended early; a list with one entry a sample under per-sample control."""
        if self._state is None:
            return "success"
        words = [STATUS_WORDS[int(code)] for code in self._state[FIELDS["status"]].tolist()]
        return words if self.per_sample else words[0]

    def plot(self, sample: int = 0, components: Sequence[int] | None = None) -> Any:
        """A figure of the state over time, and, after ``dense=True``, of the steps: their sizes, error ratios and rejections.

        sample: which row of axis 0, where the state has more than one axis. components: which of its numbers, at most eight
        unless given. Returns a matplotlib Figure, which a notebook shows and ``savefig`` writes. Raises ImportError without
        matplotlib, and ValueError where there is no such sample or component.
        """
        from .plot import plot

        return plot(self, sample, components)

    def plot_phase(self, x: int = 0, y: int = 1, samples: Sequence[int] | None = None) -> Any:
        """A figure of one number of the state over another. samples: rows of axis 0, at most 64 unless given. See `plot`."""
        from .plot import plot_phase

        return plot_phase(self, x, y, samples)

    def __repr__(self) -> str:
        return f"Solution({', '.join(f'{name}={words}' for name, words in facts(self).items())})"

    def _repr_html_(self) -> str:
        """For notebooks."""
        return table("Solution", facts(self))


def raise_failure(state: np.ndarray, solution: Solution, max_num_steps: int, trajectory: Any = None) -> None:
    """Raises SolverError if a row of this solver state [NUM_FIELDS, rows] failed. trajectory: of the solve, where it may
    know more. No frame keeps the exception, whose traceback keeps the frames: func would be gone with the garbage collector
    only."""
    status = state[FIELDS["status"]]
    failed = np.flatnonzero(status != SUCCESS)
    if len(failed) == 0:
        return
    row = int(failed[0])
    code = int(status[row])
    t, dt = float(state[FIELDS["time"], row]), float(state[FIELDS["last_dt"], row])
    sample = row if solution.per_sample else getattr(trajectory, "system", None)
    if code == UNDERFLOW:
        start = f"underflow in dt {state[FIELDS['proposal'], row]:.3g}"
    elif code == OUTSIDE:
        start = f"outside the domain of valid: every step ends there, down to dt {abs(dt):.3g}"
    elif code in STEP_FAILURES:
        start = _BEGINNINGS[code]
    elif code == SCIPY_FAILED:
        start = trajectory.words
    else:
        start = f"max_num_steps exceeded ({max_num_steps}>={max_num_steps})"
    where = f"at t = {t:.9g}, last step tried {dt:.3g}"
    if sample is not None:
        count = f" of {len(status)} ({len(failed)} failed)" if solution.per_sample else ""
        where = f"in sample {sample}{count} {where}"
    message = f"{start}; {where}. Remedy: {_REMEDIES[code]}. The last accepted state is in `y` of this exception."
    raise SolverError(message, status=STATUS_WORDS[code], sample=sample, t=t, dt=dt, solution=solution)
