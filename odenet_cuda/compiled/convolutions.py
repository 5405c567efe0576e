"""Convolutions as products with windows of their input: what a recording has in their place."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def _places(size: Sequence[int], kernel: Sequence[int], stride: Any, dilation: Any, device: Any) -> list[Tensor]:
    """For each axis, where in the padded input the numbers of each window lie: [out, ..., kernel, ...], to be broadcast."""
    found, n = [], len(size)
    for axis in range(n):
        count = (size[axis] - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis] + 1
        first = torch.arange(count, device=device) * stride[axis]
        inside = torch.arange(kernel[axis], device=device) * dilation[axis]
        shape = [1] * (2 * n)
        shape[axis], shape[n + axis] = count, kernel[axis]
        found.append((first[:, None] + inside[None, :]).reshape(shape))
    return found


def _padding(padding: Sequence[int]) -> list[int]:
    return [x for pad in reversed(padding) for x in (pad, pad)]


class _Windows:
    """Those of one group. rows: [batch * windows, channels * kernel]."""

    def __init__(self, x: Tensor, kernel: Sequence[int], stride: Any, padding: Any, dilation: Any):
        self.n, self.padding, self.input = len(kernel), padding, x
        self.padded = torch.constant_pad_nd(x, _padding(padding))
        self.places = _places(self.padded.shape[2:], kernel, stride, dilation, x.device)
        found = torch.ops.aten.index(self.padded, [None, None, *self.places])  # [batch, channels, out..., kernel...]
        self.batch, self.out, self.columns = x.shape[0], found.shape[2 : 2 + self.n], x.shape[1] * math.prod(kernel)
        self.shape = found.shape
        order = [0, *range(2, 2 + self.n), 1, *range(2 + self.n, 2 + 2 * self.n)]
        self.rows = found.permute(order).reshape(-1, self.columns)

    def of_rows(self, rows: Tensor) -> Tensor:
        """[batch * windows, channels out] as [batch, channels out, out...]."""
        return rows.reshape(self.batch, *self.out, -1).movedim(-1, 1)

    def to_rows(self, g: Tensor) -> Tensor:
        return g.movedim(1, -1).reshape(-1, g.shape[1])

    def added(self, rows: Tensor) -> Tensor:
        """What each number of the input gets from its windows."""
        parts = rows.reshape(self.batch, *self.out, self.shape[1], *self.shape[2 + self.n :]).movedim(1 + self.n, 1)
        indices = [None, None, *self.places]
        whole = torch.ops.aten.index_put(torch.zeros_like(self.padded), indices, parts, True)
        for axis, pad in enumerate(self.padding):
            whole = whole.narrow(2 + axis, pad, self.input.shape[2 + axis])
        return whole


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any,
    transposed: bool, _: Any, groups: int,
) -> Any:  # fmt: skip
    if transposed or x.dim() != weight.dim():
        return NotImplemented
    parts = []
    for part, w in zip(x.chunk(groups, 1), weight.chunk(groups, 0), strict=True):
        windows = _Windows(part, w.shape[2:], stride, padding, dilation)
        parts.append(windows.of_rows(windows.rows @ w.reshape(len(w), -1).t()))
    out = parts[0] if groups == 1 else torch.cat(parts, 1)
    return out if bias is None else out + bias.reshape(-1, *[1] * (x.dim() - 2))


def convolution_backward(
    g: Tensor, x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any,
    transposed: bool, _: Any, groups: int, mask: Sequence[bool],
) -> Any:  # fmt: skip
    """Gradients for x, weight and bias; None where mask wants none."""
    if transposed or x.dim() != weight.dim():
        return NotImplemented
    of_x: list[Tensor] = []
    of_weight: list[Tensor] = []
    for part, w, gradient in zip(x.chunk(groups, 1), weight.chunk(groups, 0), g.chunk(groups, 1), strict=True):
        windows = _Windows(part, w.shape[2:], stride, padding, dilation)
        rows = windows.to_rows(gradient)
        of_x += [windows.added(rows @ w.reshape(len(w), -1))] if mask[0] else []
        of_weight += [(rows.t() @ windows.rows).reshape(w.shape)] if mask[1] else []
    joined = [torch.cat(parts, axis) if parts else None for parts, axis in ((of_x, 1), (of_weight, 0))]
    return *joined, g.sum([0, *range(2, g.dim())]) if mask[2] else None
