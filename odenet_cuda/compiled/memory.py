"""Which tensors are plain: numbers side by side in memory, that can be copied, compared and addressed."""

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.parameter import is_lazy


def has_memory(x: Tensor) -> bool:
    """Whether x has an address where its numbers lie as they are. Without: sparse, quantized, nested, lazy, empty and meta
    tensors, views that are yet to be conjugated or negated, and subclasses that see their operations."""
    if is_lazy(x) or type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__ or is_functorch_wrapped_tensor(x):
        return False
    if x.layout is not torch.strided or x.is_nested or x.is_quantized or x.device.type == "meta":
        return False
    return not x.is_conj() and not x.is_neg() and x.numel() > 0 and x.data_ptr() != 0
