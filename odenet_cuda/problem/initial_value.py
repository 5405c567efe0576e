"""An initial value problem over leaves."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops import REAL
from .times import OwnTimes


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Numbers of the host on the device. The host does not wait for it: they leave from pinned memory."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


@dataclass
class Problem:
    """An initial value problem over leaves.

    leaves: y0, detached, each contiguous. t: output times, strictly monotone: numbers, or `OwnTimes`. rtol, atol: one number or
    tensor a leaf. norm: the user's, of leaves, or None for the largest of the leaves' RMS norms. valid:
    the user's, of state leaves, whether a step may end there. quadratures: how many of the
    last leaves func does not depend on; they have slopes but no stages. quadratures_in_norm: whether their error counts. signs:
    of the slopes of each leaf, -1 where field gives them for the opposite direction of time; none: all +1. held: bool [rows],
    those that take no part and stay at t[0]. missing: after a solve, the outputs that rows did not reach or have no time for,
    [T, rows], None if there are none. failed: rows failed. calls: after a solve, some of those of func, for a way back that
    calls it again (`Evaluation`). jac, mass: as in `StepFunction.takes`; jac may be
    the pattern of df/dy, a `sparsity.Sparsity`.
    """

    field: Callable[..., list[Any]]
    leaves: list[Tensor]
    t: Any
    per_sample: bool
    rtol: list[Any]
    atol: list[Any]
    norm: Callable[[list[Tensor]], Any] | None = None
    valid: Callable[[list[Tensor]], Any] | None = None
    quadratures: int = 0
    quadratures_in_norm: bool = True
    signs: list[float] | None = None
    held: Tensor | None = None
    missing: Tensor | None = None
    failed: bool = False
    calls: Sequence[Any] = ()
    jac: Any = None
    mass: Tensor | None = None

    @property
    def state_leaves(self) -> list[Tensor]:
        """Those that func depends on."""
        return self.leaves[: len(self.leaves) - self.quadratures]

    @property
    def empty(self) -> bool:
        """Whether the state has no numbers."""
        return all([leaf.numel() == 0 for leaf in self.leaves])

    @property
    def own(self) -> bool:
        """Whether each row has times of its own."""
        return isinstance(self.t, OwnTimes)

    @property
    def direction(self) -> Any:
        """+1: time increases, -1: it decreases; [rows] where each has its own times."""
        if self.own:
            return self.t.direction
        return -1.0 if len(self.t) > 1 and self.t[1] < self.t[0] else 1.0

    @property
    def interval(self) -> tuple[float, float]:
        """The first and the last time: of the row with the longest way where each has its own."""
        if not self.own:
            return self.t[0], self.t[-1]
        t0, t1 = self.t[0], self.t[-1]
        longest = int(np.abs(t1 - t0).argmax())
        return float(t0[longest]), float(t1[longest])

    @property
    def last_output(self) -> Any:
        """The index of the last output; [rows] where each has its own times."""
        return self.t.last if self.own else len(self.t) - 1

    @property
    def last_outputs(self) -> Any:
        """Where outputs [T, rows, ...] hold the last of every row."""
        if not self.own:
            return -1
        return torch.from_numpy(self.t.last).to(self.device), torch.arange(self.rows, device=self.device)

    @property
    def rows(self) -> int:
        """How many there are that have steps of their own: samples, or 1 under joint control."""
        return self.leaves[0].shape[0] if self.per_sample else 1

    @property
    def device(self) -> torch.device:
        return self.leaves[0].device

    @property
    def real(self) -> torch.dtype:
        """The real type of the state: that of the times func sees."""
        return REAL[self.leaves[0].dtype]

    @property
    def fused_error(self) -> bool:
        """Whether the error kernel serves this problem: the default norm and tolerances that are numbers."""
        return self.norm is None and not any(isinstance(tol, Tensor) for tol in (*self.rtol, *self.atol))

    def start_time(self, perturb: Any) -> Tensor:
        """t[0] as func sees it; perturb: just inside, perhaps of some rows."""
        return self.time_beside(0, perturb * 1.0)

    def time_beside(self, index: int, side: Any, rows: Tensor | None = None) -> Tensor:
        """t[index] as func sees it. side: +1: just after it in the direction of the solve, -1: just before, 0: itself; or one a
        row. rows: for each row the one whose time it gets, where it may have none itself."""
        if self.device.type == "cpu" and not self.own and isinstance(side, float) and side == 0:
            shape = (self.rows, *[1] * (self.leaves[0].dim() - 1)) if self.per_sample else ()
            return torch.full(shape, self.t[index], dtype=self.real, device="cpu")
        time, direction = self.t[index], self.direction
        if self.own:
            side = np.zeros_like(time) + side
            if rows is not None:
                time, side, direction = (x[rows.cpu().numpy()] for x in (time, side, direction))
            times = torch.from_numpy(time).to(self.real)[None]
        else:
            times = torch.full((1, self.rows), time, dtype=self.real, device="cpu")
        if np.any(side):
            directions, sides = (torch.as_tensor(x, dtype=self.real, device="cpu") for x in (direction, side))
            beside = torch.nextafter(times, torch.full_like(times, math.inf) * directions * sides)
            times = torch.where(sides == 0, times, beside)
        return self.time_views(to_device(times, self.device))[0]

    def same_time(self, x: Any, y: Any) -> Any:
        """Whether func sees two times as one: they may come from numbers of float32. Of arrays, for each."""
        return x == y if self.real == torch.float64 else np.float32(x) == np.float32(y)

    def time_views(self, times: Tensor) -> list[Tensor]:
        """times [stages, rows] as func sees them: 0-dimensional, or [batch, 1, ...] of the first leaf's rank."""
        if self.per_sample:
            return list(times.view(*times.shape, *[1] * (self.leaves[0].dim() - 1)).unbind(0))
        return list(times.view(-1).unbind(0))
