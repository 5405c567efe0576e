"""The norm of an error in plain torch, for what the error kernel does not serve: a user's norm, tolerances that are tensors, a
family that gives its error as tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import formulas
from ..problem import Problem


def write_norm(
    out: Tensor,
    problem: Problem,
    leaves: int,
    y0: Sequence[Tensor],
    y1: Sequence[Tensor],
    k: Sequence[Sequence[Tensor]],
    e: Sequence[float],
    dt: Tensor | None,
) -> None:
    """out [rows] = norm of dt sum_j e_j k_j over the first leaves, scaled by the tolerances; k: [stages][leaves], dt: [rows],
    or None for 1."""
    scaled = []
    for leaf in range(leaves):
        start, end = formulas.widened(y0[leaf]), formulas.widened(y1[leaf])
        used = [
            (formulas.widened(slopes[leaf]), weight)
            for slopes, weight in zip(k, e, strict=False)
            if weight != 0 and slopes[leaf] is not None
        ]
        factor = 1.0 if dt is None else _per_row(dt, start, problem.per_sample)
        tolerances = problem.rtol[leaf], problem.atol[leaf]
        scaled.append(formulas.scaled_error(start, end, [s for s, _ in used], [w for _, w in used], factor, *tolerances))
    if problem.norm is None:
        out.copy_(torch.stack([formulas.rms_norm(part, problem.rows) for part in scaled]).amax(0))
        return
    value = torch.as_tensor(problem.norm(scaled), dtype=torch.float64, device=out.device).detach().abs()
    if value.numel() not in (1, out.numel()):
        raise ValueError(f"norm must return {out.numel()} numbers, one a sample, got shape {list(value.shape)}")
    out.copy_(value.reshape(-1).expand_as(out))


def _per_row(value: Tensor, leaf: Tensor, per_sample: bool) -> Tensor:
    """[rows] shaped to multiply a leaf, in its real type."""
    real = value.to(leaf.dtype.to_real())
    return real.reshape(-1, *[1] * (leaf.dim() - 1)) if per_sample else real[0]
