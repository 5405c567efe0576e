"""Fields whose parameters are not plain tensors: which are refused, before anything is solved."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def _refuse(module: nn.Module, *_: Any) -> None:
    fsdp = sys.modules["torch.distributed.fsdp"]
    if isinstance(module, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)):
        raise RuntimeError(
            f"func calls {type(module).__name__}, which fully_shard or FullyShardedDataParallel has sharded: its parameters "
            "come and go at every call and would get no gradient or a wrong one. Shard the ODEBlock that holds func, or a "
            "module above"
        )


def refuse_sharded(func: Any) -> None:
    """Raises RuntimeError for a Module that holds a module sharded for itself."""
    if "torch.distributed.fsdp" in sys.modules and isinstance(func, nn.Module):
        for module in func.modules():
            _refuse(module)


@contextmanager
def no_sharded_calls() -> Iterator[None]:
    """A module sharded for itself that is called in here raises RuntimeError."""
    if "torch.distributed.fsdp" not in sys.modules:
        yield
        return
    hook = register_module_forward_pre_hook(_refuse)
    try:
        yield
    finally:
        hook.remove()


def is_plain(x: Tensor) -> bool:
    """Whether x has memory of its own, unlike a DTensor and its kin, which are made of other tensors."""
    return not is_traceable_wrapper_subclass(x)


def train_together() -> bool:
    """Whether this is one of several processes that share gradients."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
