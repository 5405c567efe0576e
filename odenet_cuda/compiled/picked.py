"""What torch does by way of Python in a tensor's place, done by an operation instead: it can be recorded then."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_WHOLE = (torch.int64, torch.int32)


class Picked(TorchFunctionMode):
    """x[..., i, :] where i is a tensor of one whole number: torch would ask for that number."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") == "__getitem__" and len(args) == 2 and isinstance(args[0], Tensor):
            found = _pick(*args)
            if found is not None:
                return found
        return func(*args, **(kwargs or {}))


def _pick(x: Tensor, index: Any) -> Tensor | None:
    items = index if type(index) is tuple else (index,)
    at = [i for i, item in enumerate(items) if isinstance(item, Tensor)]
    kinds = (Tensor, slice, type(None), type(...), int)
    if len(at) != 1 or not all([isinstance(item, kinds) and type(item) is not bool for item in items]):
        return None
    place = items[at[0]]
    if place.dim() > 0 or place.dtype not in _WHOLE:
        return None
    used = sum([not (item is None or item is ...) for item in items])
    before = [x.dim() - used if item is ... else 0 if type(item) is int else 1 for item in items[: at[0]]]
    axis, rest = sum(before), x[(*items[: at[0]], slice(None), *items[at[0] + 1 :])]
    place = torch.where(place < 0, place + rest.shape[axis], place)
    return rest.index_select(axis, place.reshape(1)).squeeze(axis)
