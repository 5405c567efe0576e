"""What a solve gives back: Solution, its statistics and interpolant, and the exception of a failed solve."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import formulas
from .ops import FIELDS
from .problem import times_as_tensor, to_device
from .step_control import MAX_NUM_STEPS, NON_FINITE, SUCCESS, UNDERFLOW
from .tableau import ButcherTableau

STATUS_WORDS = {
    SUCCESS: "success",
    UNDERFLOW: "underflow in dt",
    NON_FINITE: "non-finite values",
    MAX_NUM_STEPS: "max_num_steps exceeded",
}
_REMEDIES = {
    UNDERFLOW: "the error test cannot be met however small the step: loosen rtol and atol, solve in float64, give the "
    "discontinuities of func in jump_t, or set min_step",
    NON_FINITE: "look for overflow or a division by zero in func near this time, and at the initial state; where atol is 0, a "
    "number that is 0 has no tolerance, in the backward solve of an adjoint too: give an atol above 0",
    MAX_NUM_STEPS: "raise max_num_steps, loosen rtol and atol, or use an output in between; a problem this expensive for an "
    "explicit method is often stiff",
}


class SolverError(AssertionError):
    """A solve that could not be finished.

    status: ``"underflow in dt"``, ``"non-finite values"`` or ``"max_num_steps exceeded"``. sample: index of the first row
    that failed, or None under joint control. t, dt: time reached and last step tried. y: the last accepted state, as the
    user gave it. solution: everything known, with NaN where an output was not reached.
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
        tolerance; a float, or float64 [batch] per sample. Far above 1 its gradient cannot be trusted; 0 without such a solve.
    """

    def __init__(self, nfe: int, per_sample: bool, state: Tensor | None = None, steps: int = 0, rows: int = 1):
        """state: of the solver, None on a grid: then every row took so many steps."""
        self.nfe = nfe
        self.nfe_backward = 0
        self.drift: Tensor | None = None  # [rows]
        self._per_sample, self._state, self._steps, self._rows = per_sample, state, steps, rows

    @property
    def num_accepted(self) -> int | Tensor:
        return self._count("num_accepted", self._steps)

    @property
    def num_rejected(self) -> int | Tensor:
        return self._count("num_rejected", 0)

    @property
    def adjoint_drift(self) -> float | Tensor:
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


class Solution:
    """The result of `solve`.

    ys: the state at every t, in the structure of y0, each leaf [len(t), *leaf.shape]. t: the times, float64; [batch, T] where
    each sample has its own, and ys [T, batch, ...] is NaN where t is.
    stats: see `Stats`. interpolant: with ``dense=True`` a callable, see `Interpolant`; else None. y_last: the last accepted
    state; it differs from ``ys[-1]`` only where the solve failed. regularizers: what `solve` was asked for, by name, numbers
    with gradients, under per-sample control one a sample. event_t, event_y, event_index: with ``events`` when the first of them
    happened, the state there, and which it was, of each sample under per-sample control; NaN, NaN and -1 where none did, and
    ``ys`` is NaN after it. engine: which one served, "transformed", "compiled", "graphed",
    "plain" or "stepper". explanation: why each that was asked before it did not, by its name.
    """

    def __init__(
        self,
        ys: Any,
        times: Any,
        stats: Stats,
        y_last: Any,
        *,
        device: torch.device,
        per_sample: bool = False,
        state: Tensor | None = None,
        interpolant: "Interpolant | None" = None,
    ):
        """times: on this device, once asked for. state: of the solver, None on a grid."""
        self.ys, self.stats, self.y_last, self.interpolant, self.per_sample = ys, stats, y_last, interpolant, per_sample
        self.regularizers: dict[str, Tensor] = {}
        self.event_t: Tensor | None = None
        self.event_y: Any = None
        self.event_index: Tensor | None = None
        self.engine, self.explanation = "", {}  # type: str, dict[str, str]
        self._times, self._device, self._state = times, device, state
        self._t: Tensor | None = None

    @property
    def t(self) -> Tensor:
        if self._t is None:
            self._t = to_device(times_as_tensor(self._times), self._device)
        return self._t

    @property
    def status(self) -> str | list[str]:
        """``"success"`` or why the solve ended early; a list with one entry a sample under per-sample control."""
        if self._state is None:
            return "success"
        words = [STATUS_WORDS[int(code)] for code in self._state[FIELDS["status"]].tolist()]
        return words if self.per_sample else words[0]

    def __repr__(self) -> str:
        return f"Solution(status={self.status!r}, engine={self.engine!r}, {self.stats}, ys={self.ys})"


def raise_failure(state: np.ndarray, solution: Solution, max_num_steps: int) -> None:
    """Raises SolverError if a row of this solver state [NUM_FIELDS, rows] failed. No frame keeps the exception, whose traceback
    keeps the frames: func would be gone with the garbage collector only."""
    status = state[FIELDS["status"]]
    failed = np.flatnonzero(status != SUCCESS)
    if len(failed) == 0:
        return
    row = int(failed[0])
    code = int(status[row])
    t, dt = float(state[FIELDS["time"], row]), float(state[FIELDS["last_dt"], row])
    sample = row if solution.per_sample else None
    if code == UNDERFLOW:
        start = f"underflow in dt {state[FIELDS['proposal'], row]:.3g}"
    elif code == NON_FINITE:
        start = "non-finite values in state `y`: the state or its slope is infinite or not a number"
    else:
        start = f"max_num_steps exceeded ({max_num_steps}>={max_num_steps})"
    where = f"at t = {t:.9g}, last step tried {dt:.3g}"
    if sample is not None:
        where = f"in sample {sample} of {len(status)} ({len(failed)} failed) {where}"
    message = f"{start}; {where}. Remedy: {_REMEDIES[code]}. The last accepted state is in `y` of this exception."
    raise SolverError(message, status=STATUS_WORDS[code], sample=sample, t=t, dt=dt, solution=solution)


@dataclass
class DenseStep:
    """One accepted step as the interpolant needs it; t0, t1 [rows]; y0, k a leaf; accept [rows] or None for all."""

    t0: Tensor
    t1: Tensor
    y0: list[Tensor]
    k: list[list[Tensor]]
    accept: Tensor | None


class Interpolant:
    """The solution at any time between the first and the last output: ``interpolant(t)``.

    t: a number or a tensor of any shape, float. Returns the state in the structure of y0, each leaf
    [*t.shape, *leaf.shape], detached, exact at the ends of steps and of the method's interpolation order between. The ends of
    the interval may come as float32 writes them. Raises ValueError outside the interval.
    """

    def __init__(
        self,
        tableau: ButcherTableau,
        steps: list[DenseStep],
        y0: list[Tensor],
        ends: tuple[float, float],
        unflatten: Callable[[list[Tensor]], Any],
    ):
        self.tableau, self.steps, self._y0, self._unflatten = tableau, steps, y0, unflatten
        self.t0, self.t1 = ends
        self.row_ends: Tensor | None = None  # where events have ended the rows, [rows]

    def __call__(self, t: float | Tensor) -> Any:
        with torch.no_grad():
            wanted = torch.as_tensor(t, dtype=torch.float64, device=self._y0[0].device)
            low, high = min(self.t0, self.t1), max(self.t0, self.t1)
            # An end may come as float32, or the type of t, writes it.
            kind = t.dtype if isinstance(t, Tensor) and t.dtype in (torch.float16, torch.bfloat16) else torch.float32
            written, ends = (x.to(kind) for x in (wanted, wanted.new_tensor([low, high])))
            if not bool((((wanted >= low) | (written == ends[0])) & ((wanted <= high) | (written == ends[1]))).all()):
                raise ValueError(f"t must lie in [{low}, {high}], where the solution is known, got {t}")
            flat = wanted.reshape(-1).clamp(low, high)
            leaves = [y0.expand(len(flat), *y0.shape).clone() for y0 in self._y0]
            for index in self._steps_with(flat):
                self._fill(self.steps[index], flat, leaves)
            if self.row_ends is not None:
                self._end(self.row_ends, flat, leaves)
            return self._unflatten([leaf.reshape((*wanted.shape, *leaf.shape[1:])) for leaf in leaves])

    def _end(self, ends: Tensor, t: Tensor, leaves: list[Tensor]) -> None:
        """Nothing is known of rows after the events that ended them."""
        beyond = (t[:, None] - ends) * math.copysign(1.0, self.t1 - self.t0) > 0  # [times, rows]
        for leaf in leaves:
            leaf.masked_fill_(
                beyond.reshape(*beyond.shape, *[1] * (leaf.dim() - 2)) if leaf.dim() > 1 else beyond[:, 0], math.nan
            )

    def _steps_with(self, t: Tensor) -> list[int]:
        """Those in which one of the times lies, for any row."""
        if not self.steps:
            return []
        t, (low, high) = t.sort().values, self._ends
        return (torch.searchsorted(t, low) < torch.searchsorted(t, high, right=True)).nonzero()[:, 0].tolist()

    @cached_property
    def _ends(self) -> tuple[Tensor, Tensor]:
        """The least and the greatest time of each step, over the rows in which it was accepted."""
        ends = torch.stack([torch.stack([step.t0, step.t1]) for step in self.steps])  # [steps, 2, rows]
        low, high = ends.amin(1), ends.amax(1)
        if self.steps[0].accept is not None:
            accept = torch.stack([step.accept for step in self.steps if step.accept is not None])
            low, high = low.where(accept, math.inf), high.where(accept, -math.inf)
        return low.amin(1), high.amax(1)

    def _fill(self, step: DenseStep, t: Tensor, leaves: list[Tensor]) -> None:
        dt = step.t1 - step.t0  # [rows]
        theta = (t[:, None] - step.t0) / dt  # [times, rows]
        inside = (theta > 0) & (theta <= 1)
        if step.accept is not None:
            inside &= step.accept
        times = inside.any(1).nonzero()[:, 0]
        if len(times) == 0:
            return
        for leaf, y0, k in zip(leaves, step.y0, step.k, strict=True):
            columns = [theta.shape[1], *[1] * (y0.dim() - 1)] if y0.dim() else []
            y0, k = formulas.widened(y0), [formulas.widened(slope) for slope in k]
            real = y0.dtype.to_real()
            value = formulas.dense_output(
                self.tableau, y0, k, theta[times].reshape(-1, *columns).to(real), dt.reshape(columns).to(real)
            )
            leaf[times] = torch.where(inside[times].reshape(-1, *columns), value.to(leaf.dtype), leaf[times])
