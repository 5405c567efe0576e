"""The step mathematics in plain torch: differentiable, transformable, and the oracle that the kernels are tested against.

States are single tensors here; ``dt`` is a number or a tensor that broadcasts against the state.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .ops import REAL
from .tableau import Method

Number = float | Tensor
SHORT = (torch.float16, torch.bfloat16)


def widened(x: Tensor) -> Tensor:
    """In the type in which sums are formed: 16 bits as float32."""
    return x.float() if x.dtype in SHORT else x


def per_row(value: Number, leaf: Tensor) -> Number:
    """A number, or [rows] shaped to multiply a leaf, in its real type; one row multiplies all of it."""
    if not isinstance(value, Tensor):
        return value
    value = value.to(REAL[leaf.dtype])
    return value.reshape(()) if value.numel() == 1 else value.reshape(-1, *[1] * (leaf.dim() - 1))


def of_rows(mask: Tensor, leaf: Tensor) -> Tensor:
    """bool [rows], shaped to choose rows of a leaf."""
    return mask.reshape(-1, *[1] * (leaf.dim() - 1))


def stage(y0: Tensor | None, k: Sequence[Tensor], a: Sequence[float], dt: Number) -> Tensor:
    """``y0 + dt * sum_j a[j] k[j]``."""
    total = y0
    for weight, slope in zip(a, k, strict=False):
        if weight != 0:
            factor = dt * weight
            if total is None:
                total = factor * slope
            elif isinstance(factor, Tensor):
                total = total + factor * slope
            else:
                total = torch.add(total, slope, alpha=factor)
    return torch.zeros_like(k[0]) if total is None else total


def scaled_error(
    y0: Tensor, y1: Tensor, k: Sequence[Tensor], e: Sequence[float], dt: Number, rtol: Number, atol: Number
) -> Tensor:
    """``dt * sum_j e[j] k[j] / (atol + rtol * max(|y0|, |y1|))``, elementwise."""
    size = torch.maximum(y0.abs(), y1.abs())
    # size - size is 0, but not a number where the state is infinite, whose scale would hide any error
    return (stage(None, k, e, dt) + (size - size)) / (atol + rtol * size)


def rms_norm(x: Tensor, rows: int = 1) -> Tensor:
    """``sqrt(mean |x|^2)`` of each of the rows, [rows], in float64; 0 where a row is empty."""
    if x.numel() == 0:
        return x.new_zeros(rows, dtype=torch.float64)
    return x.abs().reshape(rows, -1).double().square().mean(1).sqrt()


def interpolant_weights(tableau: Method, theta: Number) -> list[Number]:
    """``b_j(theta) = sum_d p[j][d] theta**(d + 1)`` for every slope."""
    weights: list[Number] = []
    for row in tableau.p:
        weight: Number = 0.0
        for coefficient in reversed(row):
            weight = (weight + coefficient) * theta
        weights.append(weight)
    return weights


@lru_cache(maxsize=64)
def interpolant_powers(tableau: Method, device: torch.device) -> Tensor:
    """p of the interpolant, float64 [powers, stages, 1]."""
    return torch.tensor(tableau.p, dtype=torch.float64, device=device).T.unsqueeze(-1)


def dense_output(tableau: Method, y0: Tensor, k: Sequence[Tensor], theta: Number, dt: Number) -> Tensor:
    """The interpolant of a step at ``t0 + theta dt``."""
    total = y0
    for weight, slope in zip(interpolant_weights(tableau, theta), k, strict=False):
        total = total + (dt * weight) * slope
    return total
