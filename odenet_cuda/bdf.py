"""Backward differentiation formulas of orders 1 to 5 in the form of numerical differentiation formulas, on backward differences
of a quasi-constant step: Shampine and Reichelt 1997, doi 10.1137/S1064827594276424, section 2.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from .tableau import hermite

MOST = 5  # the highest order
DIFFERENCES = MOST + 3  # kept: y, those of orders up to MOST, and two more for the estimates
_KAPPA = np.array([0.0, -0.1850, -1 / 9, -0.0823, -0.0415, 0.0, 0.0])  # what the formulas add to BDF, for smaller errors
_GAMMA = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, MOST + 2))])


@dataclass(frozen=True)
class BdfMethod:
    """A formula of variable order: sum_j gamma_j D_j / alpha + d / alpha = dt f(t1, y1) / alpha in terms of the backward
    differences D_j, j = 0, ..., order, of y0 and the d = y1 - sum_j D_j that is solved for.

    In `tableau`'s terms k_j, j = 1, ..., 5, is the difference j at the end of the step over dt, and k_6 the slope there; so y1
    is y0 + dt k_1, and the interpolant the polynomial through the last points. order: of the first step.
    """

    max_order: int = MOST
    p: tuple[tuple[float, ...], ...] = ()
    p_order: int = 1
    order: ClassVar[int] = 1
    c: ClassVar[tuple[float, ...]] = (0.0, *[1.0] * (MOST + 1))
    b: ClassVar[tuple[float, ...]] = (0.0, 1.0, *[0.0] * MOST)
    e: ClassVar[tuple[float, ...]] = ()
    stages: ClassVar[int] = MOST + 2
    fsal: ClassVar[bool] = True
    rows: ClassVar[tuple[tuple[float, ...], ...]] = ((0.0, 1.0, *[0.0] * MOST),)
    takes: ClassVar[tuple[str, ...]] = ("jac",)
    memory: ClassVar[int] = 0
    backward: ClassVar[str] = "rodas5p"  # the method that solves the adjoint's equation

    def __post_init__(self) -> None:
        if isinstance(self.max_order, bool) or not isinstance(self.max_order, int) or not 1 <= self.max_order <= MOST:
            raise ValueError(f"max_order must be a whole number from 1 to {MOST}, got {self.max_order!r}")

    def linear(self) -> "BdfMethod":
        """The same method with the straight line between y0 and y1 as interpolant."""
        return replace(self, p=tuple([(weight,) for weight in self.b]), p_order=1)

    def cubic(self) -> "BdfMethod":
        """The same method with the cubic Hermite interpolant."""
        return replace(self, p=hermite(self.b), p_order=1)


def _interpolant() -> tuple[tuple[float, ...], ...]:
    """Of the difference j: prod_m (theta - 1 + m) / (m + 1), m = 0, ..., j - 1, less its value at 0; powers of theta from 1."""
    rows = [(0.0,) * MOST]
    for j in range(1, MOST + 1):
        polynomial = np.poly1d([1.0])
        for m in range(j):
            polynomial = polynomial * np.poly1d([1 / (m + 1), (m - 1) / (m + 1)])
        powers = polynomial.coeffs[::-1]
        rows.append(tuple([float(x) for x in powers[1:]] + [0.0] * (MOST - j)))
    return (*rows, (0.0,) * MOST)


@lru_cache(maxsize=16)
def coefficients(device: torch.device) -> dict[str, Tensor]:
    """By order, float64 [MOST + 2]: alpha, and error, of d in the estimate; gamma of the differences, [DIFFERENCES]."""
    order = np.arange(MOST + 2)
    found = {"alpha": (1 - _KAPPA) * _GAMMA, "error": _KAPPA * _GAMMA + 1 / (order + 1)}
    found["gamma"] = np.concatenate([_GAMMA[: MOST + 1], np.zeros(DIFFERENCES - MOST - 1)])
    return {name: torch.tensor(x, dtype=torch.float64, device=device) for name, x in found.items()}


def rescaled(differences: Tensor, order: Tensor, factor: Tensor) -> Tensor:
    """Those of a step `factor` times as long, through the same polynomial. differences: [DIFFERENCES, systems, n]; order and
    factor: [systems] or [1]. Of those beyond the order nothing changes."""
    device, size = differences.device, MOST + 1
    index = torch.arange(size, dtype=torch.float64, device=device)
    i, j = index[:, None], index[None, :]

    def table(by: Tensor) -> Tensor:  # [rows, size, size]
        steps = (i - 1 - by[:, None, None] * j) / i.clamp_min(1)
        inside = torch.where((i == 0) | (j == 0), (i == 0).double(), steps)
        return inside.cumprod(1)

    both = table(factor) @ table(torch.ones_like(factor))  # [rows, old, new]
    used = index <= order[:, None]
    both = torch.where(used[:, :, None] & used[:, None, :], both, torch.eye(size, dtype=torch.float64, device=device))
    both = both.to(differences.dtype).expand(differences.shape[1], size, size)
    return torch.cat([torch.einsum("sij,isn->jsn", both, differences[:size]), differences[size:]])


BDF = BdfMethod(p=_interpolant())
