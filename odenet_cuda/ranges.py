"""Ranges in a profile: solve, step and backward pass, by torch.profiler, or for NVTX by torch.autograd.profiler.emit_nvtx."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch

_NONE = nullcontext()


def marked(name: str) -> AbstractContextManager[Any]:
    """What happens in it has this name in a profile; where nothing is profiled it costs nothing."""
    if not torch._C._autograd._profiler_enabled():
        return _NONE
    return torch.profiler.record_function(f"odenet_cuda.{name}")


def in_range(name: str) -> Callable[[Callable], Callable]:
    """The function, marked."""

    def wrap(function: Callable) -> Callable:
        @wraps(function)
        def call(*args: Any) -> Any:
            with marked(name):
                return function(*args)

        return call

    return wrap
