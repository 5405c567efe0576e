"""Sums of gradients over the evaluations of func."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..combinations import combinations
from ..formulas import SHORT
from ..ops import DTYPES, readable
from ..sharding import is_plain

_KEPT_BYTES = 1 << 20  # of gradients that wait to be added; where they are more, a pass for each list costs little


class Accumulator:
    """results()[i]: the sum of all gradients of tensors[i], None where there was none.

    Up to `slots` lists of gradients wait and are added in one pass of the stage kernel, with weights of one; their values must
    stay until `flush`. A sparse gradient is made dense. Gradients of 16 bits are added up in float32, and those of tensors on
    another device or without memory of their own, one by one.
    """

    def __init__(self, tensors: Sequence[Tensor], slots: int, device: torch.device):
        self.totals: list[Any] = [None] * len(tensors)
        self.dtypes = [x.dtype for x in tensors]
        fits = [x.dtype in DTYPES and x.dtype not in SHORT and x.device == device and is_plain(x) for x in tensors]
        self.fused = [i for i, fit in enumerate(fits) if fit]
        self.others = [i for i, fit in enumerate(fits) if not fit]
        if not self.fused:
            return
        self.sums = [torch.empty_like(tensors[i], memory_format=torch.contiguous_format) for i in self.fused]
        self.slots = max(1, min(slots, _KEPT_BYTES // max(sum(x.nbytes for x in self.sums), 1)))
        self.kept: list[list[Tensor]] = []
        self.without = set(self.fused)  # no gradient so far
        self.one = torch.ones(1, dtype=torch.float64, device=device)
        self.kernels = combinations(self.sums, 1, tuple([(1.0,) * (i + 1) for i in range(self.slots)]), [1.0] * len(self.sums))
        self.kernels.bind_dt(self.one.data_ptr())
        self._bind()

    def _bind(self) -> None:
        """A total with nothing in it yet is taken as zero."""
        sums = [x.data_ptr() for x in self.sums]
        bases = [0 if self.totals[i] is None else address for i, address in zip(self.fused, sums, strict=True)]
        self.kernels.bind_buffers(bases, sums * self.slots, [], 0)

    def add(self, grads: Sequence[Tensor | None]) -> None:
        for i in self.others:
            grad = grads[i]
            if grad is not None:
                grad = grad.float() if grad.dtype in SHORT else grad
                self.totals[i] = grad.clone() if self.totals[i] is None else self.totals[i] + grad
        if not self.fused:
            return
        kept, addresses = [], []
        for slot, i in enumerate(self.fused):
            grad = grads[i]
            if grad is None:
                grad = torch.zeros_like(self.sums[slot])
            elif grad.layout is not torch.strided:
                grad = grad.to_dense()
            if grad.is_conj() or grad.is_neg() or not grad.is_contiguous():
                grad = readable(grad)
            kept.append(grad)
            addresses.append(grad.data_ptr())
        if self.without:
            self.without -= {i for i in self.fused if grads[i] is not None}
        self.kernels.bind_slopes(len(self.kept), addresses)
        self.kept.append(kept)
        if len(self.kept) == self.slots:
            self.flush()

    def clear(self) -> None:
        """The sums begin anew, where they lie: also those of a captured step."""
        for i in self.others:
            self.totals[i] = None
        for slot, i in enumerate(self.fused):
            if self.totals[i] is not None:
                self.sums[slot].zero_()

    def results(self) -> list[Any]:
        """The sums in the tensors' own types."""
        return [None if x is None else x.to(dtype) for x, dtype in zip(self.totals, self.dtypes, strict=True)]

    def flush(self) -> None:
        """Adds what waits."""
        if not self.fused or not self.kept:
            return
        self.kernels.stage(len(self.kept), [])
        self.kept.clear()
        first = [slot for slot, i in enumerate(self.fused) if self.totals[i] is None and i not in self.without]
        for slot in first:
            self.totals[self.fused[slot]] = self.sums[slot]
        if first:
            self._bind()
