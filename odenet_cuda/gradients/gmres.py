"""Many linear systems at once, one a row, known by their products alone."""

from collections.abc import Callable

import torch
from torch import Tensor

_LOOK = 8  # steps after which the residuals are looked at


def gmres(
    product: Callable[[Tensor], Tensor], b: Tensor, rtol: float, basis: int = 64, cycles: int = 20
) -> tuple[Tensor, Tensor]:
    """(x, |A x - b| / |b|) of A x = b for each row: GMRES, restarted after `basis` vectors (Saad and Schultz 1986, doi
    10.1137/0907058).

    b, x: [rows, n]. product: A x, which keeps rows apart. rtol: where the second, [rows], is no more in any row, it ends; it
    gives up after so many cycles, or one that made nothing better.
    """
    size = b.norm(dim=1)
    scale = torch.where(size == 0, 1.0, size)
    x, residual = torch.zeros_like(b), b
    left = residual.norm(dim=1) / scale
    for _ in range(cycles):
        if bool((left <= rtol).all()):
            break
        x = x + _cycle(product, residual, min(basis, b.shape[1]), rtol * scale)
        residual = b - product(x)
        before, left = left, residual.norm(dim=1) / scale
        if not bool((left < 0.9 * before).any()):
            break
    return x, left


def _cycle(product: Callable[[Tensor], Tensor], residual: Tensor, most: int, enough: Tensor) -> Tensor:
    """The best x in the Krylov space of the residual, of at most so many dimensions. enough: a residual, [rows]."""
    rows, n = residual.shape
    beta = residual.norm(dim=1)
    eps = torch.finfo(residual.dtype).eps
    q = residual.new_zeros(rows, most + 1, n)
    h = residual.new_zeros(rows, most + 1, most)
    q[:, 0] = residual / torch.where(beta == 0, 1.0, beta)[:, None]
    weights = residual.new_zeros(rows, 1, 1)
    for j in range(most):
        w = product(q[:, j])
        before = w.norm(dim=1)
        for _ in range(2):  # the second time what rounding has left
            part = torch.einsum("rin,rn->ri", q[:, : j + 1], w)
            w = w - torch.einsum("rin,ri->rn", q[:, : j + 1], part)
            h[:, : j + 1, j] += part
        norm = w.norm(dim=1)
        norm = torch.where(norm <= 10 * eps * before, 0.0, norm)  # the space is whole
        h[:, j + 1, j] = norm
        q[:, j + 1] = torch.where(norm == 0, 0.0, 1 / torch.where(norm == 0, 1.0, norm))[:, None] * w
        if (j + 1) % _LOOK == 0 or j + 1 == most:
            found = h[:, : j + 2, : j + 1]
            right = torch.nn.functional.pad(beta[:, None, None], (0, 0, 0, j + 1))
            weights = torch.linalg.pinv(found, rtol=10 * eps) @ right
            if bool(((found @ weights - right).norm(dim=(1, 2)) <= 0.1 * enough).all()):
                break
    return torch.einsum("rin,ri->rn", q[:, : weights.shape[1]], weights[..., 0])
