"""Adams methods on a grid: the integral of the polynomial through the slopes of the last steps."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .formulas import per_row
from .newton import Leaves, combined
from .tableau import StepFunction, hermite
from .tableaus import RK4

MOST, FEWEST = 12, 4  # orders; below, a step is one of rk4


@dataclass(frozen=True)
class AdamsStep:
    """The step of an Adams method on any grid (Hairer, Norsett and Wanner I, III.1 and III.5): y1 = y0 + the integral over the
    step of the polynomial through the slopes at its start and at those of the steps before. Called as `StepFunction.step`.

    max_order: one more than the slopes used at most. As long as there are fewer than three, a step is one of rk4, the 3/8 rule.
    implicit: this is the predictor; the corrector's polynomial goes through the slope at the end too, for which it is iterated
    until it moves by less than the tolerance, or max_iters times, which is warned of.
    """

    implicit: bool
    max_order: int = MOST
    max_iters: int = 4

    def __post_init__(self) -> None:
        if self.max_order > MOST:
            raise ValueError(f"max_order must be at most {MOST}, got {self.max_order}")
        if self.max_order < FEWEST:
            warnings.warn(f"max_order is below {FEWEST}, so every step is one of rk4", stacklevel=5)

    def __call__(
        self,
        field: Callable[..., Any],
        t: list[Tensor],
        dt: Tensor,
        y0: Leaves,
        k0: Leaves,
        past: Sequence[tuple[Tensor, Leaves]] = (),
        tolerance: Leaves | None = None,
    ) -> tuple[Leaves, list[Leaves], None]:
        past = past[: max(0, self.max_order - 2)]
        if len(past) < FEWEST - 2:
            increment = self._rk4(field, t, dt, y0, k0)
        else:
            behind = torch.stack([size.reshape(()) for size, _ in past]).cumsum(0) / dt
            nodes, k = torch.cat([torch.zeros_like(dt), -behind]), [k0, *[slopes for _, slopes in past]]
            increment = _summed(_weights(nodes), k)
            if self.implicit:
                increment = self._corrected(field, t, dt, y0, nodes, k, increment, tolerance)
        y1 = combined(y0, dt, (1.0,), [increment])
        return y1, [increment, increment, increment, field(t[-1], y1, 4)], None

    def _rk4(self, field: Callable[..., Any], t: list[Tensor], dt: Tensor, y0: Leaves, k0: Leaves) -> Leaves:
        k = [k0]
        for i in range(1, RK4.stages):
            k.append(field(t[i], combined(y0, dt, RK4.a[i], k), i))
        return _summed(RK4.b, k)

    def _corrected(
        self,
        field: Callable[..., Any],
        t: list[Tensor],
        dt: Tensor,
        y0: Leaves,
        nodes: Tensor,
        k: list[Leaves],
        increment: Leaves,
        tolerance: Leaves | None,
    ) -> Leaves:
        weights = _weights(torch.cat([torch.ones_like(dt), nodes]))
        known = _summed(weights[1:], k)
        for _ in range(self.max_iters):
            slope = field(t[3], combined(y0, dt, (1.0,), [increment]), 3)
            last = increment
            increment = [torch.add(x, weights[0].to(s.dtype) * s) for x, s in zip(known, slope, strict=True)]
            if tolerance is not None and _moved_little(last, increment, dt, tolerance):
                return increment
        if tolerance is not None:
            warnings.warn(
                f"implicit_adams: functional iteration did not converge at t = {float(t[0].detach()):.9g}, step "
                f"{float(dt.detach()):.3g}, so the solution may be incorrect: take smaller steps, raise max_iters, or use an "
                "implicit method for stiff systems",
                stacklevel=2,
            )
        return increment


def _summed(weights: Any, k: Sequence[Leaves]) -> Leaves:
    """sum_j weights_j k_j of each leaf. weights: numbers or a tensor."""
    found = []
    for i, first in enumerate(k[0]):
        numbers = [w.to(first.dtype) if isinstance(w, Tensor) else w for w in weights]
        total = first * numbers[0]
        for weight, of_stage in zip(numbers[1:], k[1:], strict=True):
            total = total + weight * of_stage[i]
        found.append(total)
    return found


def _moved_little(old: Leaves, new: Leaves, dt: Tensor, tolerance: Leaves) -> bool:
    with torch.no_grad():
        ratios = [
            (per_row(dt, x) * (x - y)).abs().div(tol).amax() if x.numel() else x.real.new_zeros(())
            for x, y, tol in zip(old, new, tolerance, strict=True)
        ]
        return bool(torch.stack([ratio.double() for ratio in ratios]).amax() < 1)


@lru_cache(maxsize=8)
def _gauss(device: torch.device) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [0, 1], exact for the polynomials of all orders here."""
    x, w = np.polynomial.legendre.leggauss(MOST // 2 + 1)
    return (torch.tensor(x + 1, device=device) / 2)[:, None, None], torch.tensor(w, device=device) / 2


def _weights(nodes: Tensor) -> Tensor:
    """The integrals over [0, 1] of the Lagrange polynomials of these nodes, float64 [m]. They are differentiable, for the sizes
    of steps may have gradients."""
    x, w = _gauss(nodes.device)
    own = torch.eye(len(nodes), dtype=torch.bool, device=nodes.device)
    below = torch.where(own, 1.0, nodes[:, None] - nodes[None])
    return w @ (torch.where(own, 1.0, x - nodes) / below).prod(-1)


def _adams(implicit: bool) -> StepFunction:
    """The increment of a step is its slope 3; it comes three times, for rk4 evaluates func at their times."""
    b = (0.0, 0.0, 0.0, 1.0, 0.0)
    return StepFunction(
        order=5 if implicit else 4,
        c=(*RK4.c, 1.0),
        b=b,
        p=hermite(b),
        p_order=3,
        step=AdamsStep(implicit),
        takes=("tolerance",) if implicit else (),
        memory=MOST - 2,
    )


_IMPLICIT = _adams(True)
MULTISTEP = {"explicit_adams": _adams(False), "implicit_adams": _IMPLICIT, "fixed_adams": _IMPLICIT}
