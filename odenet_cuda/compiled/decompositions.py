"""What operations of torch are made of, by which they are replaced in a recording."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions, get_decompositions

from .convolutions import convolution, convolution_backward

_aten = torch.ops.aten
_DECOMPOSED = [
    _aten.addcdiv, _aten.addcmul, _aten.celu, _aten.elu, _aten.elu_backward, _aten.gelu, _aten.gelu_backward,
    _aten.glu, _aten.glu_backward, _aten.hardsigmoid, _aten.hardsigmoid_backward, _aten.hardswish,
    _aten.hardswish_backward, _aten.hardtanh, _aten.hardtanh_backward, _aten.leaky_relu, _aten.leaky_relu_backward,
    _aten.lerp, _aten.log_sigmoid_backward, _aten.log_sigmoid_forward, _aten.logit, _aten.mish, _aten.mish_backward,
    _aten.native_layer_norm, _aten.native_layer_norm_backward, _aten.rsub, _aten.sigmoid_backward, _aten.silu,
    _aten.silu_backward, _aten.softplus, _aten.softplus_backward, _aten.tanh_backward, _aten.threshold,
    _aten.threshold_backward, _aten._softmax, _aten._softmax_backward_data, _aten._log_softmax,
    _aten._log_softmax_backward_data, _aten.stack, _aten.unbind, _aten.select_backward,
    _aten.slice_backward, _aten.mv, _aten.dot, _aten.addmv, _aten.norm, _aten.logsumexp, _aten.native_group_norm,
    _aten.native_group_norm_backward, _aten.native_batch_norm, _aten.native_batch_norm_backward,
]  # fmt: skip

_SLICE_BACKWARD = get_decompositions([_aten.slice_backward])[_aten.slice_backward.default]

# Read as they are, not decomposed.
_READ = ("var", "var_mean", "cumsum", "cumprod", "index_select", "roll", "split", "split_with_sizes")


@cache
def decompositions() -> dict[Any, Callable]:
    table = {**core_aten_decompositions(), **get_decompositions(_DECOMPOSED)}
    for name in _READ:
        for overload in getattr(_aten, name).overloads():
            table.pop(getattr(getattr(_aten, name), overload), None)
    table[_aten.hardsigmoid_backward.default] = _hardsigmoid_backward
    table[_aten.select_backward.default] = _select_backward
    table[_aten.slice_backward.default] = _slice_backward
    table[_aten._efficientzerotensor.default] = torch.zeros  # of some second derivatives
    table[_aten.convolution.default] = convolution
    table[_aten.convolution_backward.default] = convolution_backward
    return table


def _among_zeros(grad: Tensor, sizes: list[int], dim: int, begin: int) -> Tensor:
    """grad from there on along an axis, and zeros around it: addresses, where torch's decomposition chooses by masks."""
    dim = dim % len(sizes)
    after = sizes[dim] - begin - grad.shape[dim]
    shapes = [[*grad.shape[:dim], n, *grad.shape[dim + 1 :]] for n in (begin, after)]
    zeros = [torch.full(shape, 0.0, dtype=grad.dtype, device=grad.device) for shape in shapes]
    return torch.cat([x for x in (zeros[0], grad, zeros[1]) if x.shape[dim] > 0], dim)


def _select_backward(grad: Tensor, sizes: list[int], dim: int, index: int) -> Tensor:
    dim = dim % len(sizes)
    return _among_zeros(grad.unsqueeze(dim), sizes, dim, index % sizes[dim])


def _slice_backward(grad: Tensor, sizes: list[int], dim: int, start: int, end: int, step: int) -> Tensor:
    if step == 1 and grad.numel() > 0:
        size = sizes[dim % len(sizes)]
        begin = min(max(start + size if start < 0 else start, 0), size)
        return _among_zeros(grad, sizes, dim, begin)
    return _SLICE_BACKWARD(grad, sizes, dim, start, end, step)


def _hardsigmoid_backward(grad: Tensor, x: Tensor) -> Tensor:
    """As torch computes it, with a sixth of float32 in float64 too, which its own decomposition does not know."""
    one = torch.ones((), dtype=x.dtype, device="cpu")
    with torch._C._DisableTorchDispatch():
        slope = float(_aten.hardsigmoid_backward(one, torch.zeros_like(one)))
    return torch.where((x > -3.0) & (x < 3.0), grad * slope, 0.0)
