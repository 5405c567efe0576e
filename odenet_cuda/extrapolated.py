"""Methods of two steps, with one call of func a step: the slope is extrapolated from this step's and the last one's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .formulas import per_row
from .newton import Leaves
from .tableau import StepFunction, hermite


@dataclass(frozen=True)
class ExtrapolatedStep:
    """y1 = y0 + dt (k0 + (k0 - k) / (2 r)), k the slope at the start of the step before, and r the size of that step by the
    size of this one; the first step is one of Euler. Called as `StepFunction.step`.

    log: sizes are those of log t, else those of t, which is the method of Adams and Bashforth on any grid (Hairer, Norsett and
    Wanner I, III.5). With log this is DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2) for t = alpha / sigma,
    y = x / sigma and dy/dt = the prediction of the data: its lambda is log t, and its exponential integrator is a step in t.
    """

    log: bool

    def __call__(
        self,
        field: Callable[..., Any],
        t: list[Tensor],
        dt: Tensor,
        y0: Leaves,
        k0: Leaves,
        past: Sequence[tuple[Tensor, Leaves]] = (),
    ) -> tuple[Leaves, list[Leaves], None]:
        slope = k0
        if past:
            size, k = past[0]
            weight = self._weight(t[0].double().reshape(-1)[:1] if self.log else dt, size, dt)
            slope = [torch.add(x, per_row(weight, x) * (x - y)) for x, y in zip(k0, k, strict=True)]
        y1 = [torch.add(y, per_row(dt, y) * x) for y, x in zip(y0, slope, strict=True)]
        return y1, [slope, field(t[-1], y1, 2)], None

    def _weight(self, t0: Tensor, last: Tensor, dt: Tensor) -> Tensor:
        """1 / (2 r)."""
        if not self.log:
            return dt / (2 * last)
        return torch.log1p(dt / t0) / (-2 * torch.log1p(-last / t0))

    def check(self, nodes: list[float]) -> None:
        if self.log and min(nodes) <= 0:
            raise ValueError(f"t of method='dpmpp_2m' must be positive, it is alpha / sigma; got {min(nodes)}")


def _extrapolated(log: bool) -> StepFunction:
    b = (0.0, 1.0, 0.0)
    return StepFunction(order=2, c=(0.0, 1.0, 1.0), b=b, p=hermite(b), p_order=2, step=ExtrapolatedStep(log), memory=1)


EXTRAPOLATED = {"ab2": _extrapolated(False), "dpmpp_2m": _extrapolated(True)}
