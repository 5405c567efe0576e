"""An initial value problem over leaves."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops import REAL


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Numbers of the host on the device. The host does not wait for it: they leave from pinned memory."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


@dataclass
class Problem:
    """An initial value problem over leaves.

    leaves: y0, detached, each contiguous. t: output times, strictly monotone. direction: +1 or -1. rows: 0 under joint
    control (one error ratio), else the number of samples. rtol, atol: one number or tensor a leaf. norm: the user's, of
    leaves, or None for the largest of the leaves' RMS norms. quadratures: how many of the last leaves func does not depend
    on; they have slopes but no stages. quadratures_in_norm: whether their error counts. signs: of the slopes of each leaf, -1
    where field gives them for the opposite direction of time; none: all +1. held: bool [rows], those that take no part and
    stay at t[0]. missing: after a solve in which rows failed, the outputs that they did not reach, [T, rows]. calls: after a
    solve, some of those of func, for a way back that calls it again (`Evaluation`).
    """

    field: Callable[..., list[Any]]
    leaves: list[Tensor]
    t: list[float]
    direction: float
    per_sample: bool
    rtol: list[Any]
    atol: list[Any]
    norm: Callable[[list[Tensor]], Any] | None = None
    quadratures: int = 0
    quadratures_in_norm: bool = True
    signs: list[float] | None = None
    held: Tensor | None = None
    missing: Tensor | None = None
    calls: Sequence[Any] = ()

    @property
    def state_leaves(self) -> list[Tensor]:
        """Those that func depends on."""
        return self.leaves[: len(self.leaves) - self.quadratures]

    @property
    def empty(self) -> bool:
        """Whether the state has no numbers."""
        return all([leaf.numel() == 0 for leaf in self.leaves])

    @property
    def rows(self) -> int:
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

    def start_time(self, perturb: bool) -> Tensor:
        """t[0] as func sees it; perturb: just inside."""
        return self.time_beside(0, 1.0 if perturb else 0.0)

    def time_beside(self, index: int, side: float) -> Tensor:
        """t[index] as func sees it. side: +1: just after it in the direction of the solve, -1: just before, 0: itself."""
        times = torch.full((1, self.rows), self.t[index], dtype=self.real, device="cpu")
        if side:
            times = torch.nextafter(times, torch.full_like(times, self.direction * side * math.inf))
        return self.time_views(to_device(times, self.device))[0]

    def same_time(self, x: float, y: float) -> bool:
        """Whether func sees two times as one: they may come from numbers of float32."""
        return x == y or (self.real != torch.float64 and bool(np.float32(x) == np.float32(y)))

    def time_views(self, times: Tensor) -> list[Tensor]:
        """times [stages, rows] as func sees them: 0-dimensional, or [batch, 1, ...] of the first leaf's rank."""
        if self.per_sample:
            return list(times.view(*times.shape, *[1] * (self.leaves[0].dim() - 1)).unbind(0))
        return list(times.view(-1).unbind(0))
