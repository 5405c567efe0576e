"""Factors of the matrices that implicit methods solve linear systems with."""

from typing import Any

import torch
from torch import Tensor

from .blocks import BlockFactors
from .sparsity import Sparsity

_EXACT = 1e-3  # of the root of rounding: what a solution by blocks, which exchanges no lines between them, may leave over
_SEED = 0x5EED


class Factors:
    """Of M - c dy of each system; M: the mass matrix, or I. dy: [systems, n, n]. c: [systems] or [1]. known: of df/dy; by a
    narrow pattern the systems are solved in blocks, where no gradients are recorded, but those in which that is not exact.
    info: above 0 where a matrix is singular, [systems]."""

    def __init__(self, dy: Tensor, c: Tensor, known: Any = None, mass: Tensor | None = None):
        self.blocks: BlockFactors | None = None
        self.factors: Tensor | None = None
        c = c.to(dy.dtype).expand(len(dy))
        if isinstance(known, Sparsity) and known.blocks is not None and mass is None and not torch.is_grad_enabled():
            self.blocks = BlockFactors(known.blocks, dy.reshape(len(dy), -1)[:, known.places], c)
            self.info = torch.zeros(len(dy), dtype=torch.int32, device=dy.device)
            self.whole = self._inexact(dy, c)  # which are not solved by blocks
            if not bool(self.whole.any()):
                return
            dy, c = dy[self.whole], c[self.whole]
        one = torch.eye(dy.shape[-1], dtype=dy.dtype, device=dy.device) if mass is None else mass
        self.factors, self.pivots, info = torch.linalg.lu_factor_ex(one - c[:, None, None] * dy)
        if self.blocks is None:
            self.info = info

    def renewed(self, which: Tensor, dy: Tensor, c: Tensor, known: Any = None) -> "Factors":
        """With those of these systems, bool [systems], made anew. dy, c: of all."""
        if self.factors is None or self.blocks is not None or bool(which.all()):
            return Factors(dy, c, known)
        found = Factors(dy[which], c[which])
        assert found.factors is not None
        self.factors[which], self.pivots[which], self.info[which] = found.factors, found.pivots, found.info
        return self

    def _inexact(self, dy: Tensor, c: Tensor) -> Tensor:
        """By one solution."""
        assert self.blocks is not None
        generator = torch.Generator("cpu").manual_seed(_SEED)
        b = torch.randn(dy.shape[-1], generator=generator, dtype=torch.float64, device="cpu").to(dy.device, dy.dtype)
        b = b.expand(len(dy), -1)
        x = self.blocks.solve(b)
        left = (x - c[:, None] * (dy @ x[:, :, None])[:, :, 0] - b).abs().amax(1)
        return ~(left <= _EXACT * torch.finfo(dy.dtype).eps ** 0.5 * (b.abs().amax(1) + x.abs().amax(1)))

    def solve(self, right: Tensor) -> Tensor:
        """right: [systems, n]."""
        if self.blocks is None:
            assert self.factors is not None
            return torch.linalg.lu_solve(self.factors, self.pivots, right[:, :, None])[:, :, 0]
        x = self.blocks.solve(right)
        if self.factors is not None:
            x[self.whole] = torch.linalg.lu_solve(self.factors, self.pivots, right[self.whole][:, :, None])[:, :, 0]
        return x
