"""Live tensor storage: the bytes of all distinct storages that exist at a time, whatever the allocator keeps aside."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Watch(TorchDispatchMode):
    """Sees every tensor that an operation takes or makes, and when its storage goes."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live:
            return
        self.live[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self.live.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            if isinstance(value, torch.Tensor):
                self._see(value)
        return result


def peak_live_storage(call: Callable[[], Any]) -> int:
    """The largest number of bytes of tensor storage alive at once while call() runs."""
    with _Watch() as watch:
        call()
    return watch.peak


def kept_and_peak_storage(forward: Callable[[], Any], backward: Callable[[Any], Any]) -> tuple[int, int]:
    """Bytes of tensor storage that forward() leaves alive, and the most that is alive while backward(its result) runs."""
    with _Watch() as watch:
        result = forward()
        gc.collect()  # what only cycles hold is not kept
        watch.peak = kept = watch.now
        backward(result)
    return kept, watch.peak
