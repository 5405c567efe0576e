"""What a call of func does: whether it can be captured in a CUDA graph, and whether another does the same."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..sharding import is_plain

# Operations whose result the host must wait for, or whose shape depends on values.
_WAITING = (
    "_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "unique_consecutive", "unique_dim", "is_nonzero",
    "equal", "bincount", "histc", "repeat_interleave", "_linalg_check_errors",
)  # fmt: skip
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")  # by masks they wait


class Calls(TorchDispatchMode):
    """The operations of a call of func. own: tensors that the solver gives it, by name; they lie elsewhere in another solve.

    refusal: why the call cannot be captured, or "". random: whether it draws numbers. key: equal for calls that do the same
    on the same memory, and return the same of it.
    """

    def __init__(self, own: Sequence[Tensor]):
        super().__init__()
        self.refusal, self.random = "", False
        self._own = {tensor.untyped_storage().data_ptr(): place for place, tensor in enumerate(own)}
        self._device = own[0].device.type
        self._made: dict[int, int] = {}
        self._alive: list[Tensor] = []  # so that no other tensor gets the id of one
        self._calls: list[Hashable] = []

    @property
    def key(self) -> Hashable:
        return tuple(self._calls)

    def returned(self, slopes: Sequence[Tensor | None]) -> None:
        """What the call gave, which ends the key. What it made may go: kept, its graph would be a part of later ones."""
        self._calls.append(tuple([None if slope is None else self._tensor(slope) for slope in slopes]))
        self._alive.clear()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.random = self.random or torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
        self._calls.append((str(func), self._described(args), self._described(kwargs)))
        results = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
        for tensor in results:
            self._made.setdefault(id(tensor), len(self._alive))
            self._alive.append(tensor)
        self._look(func, [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)], results)
        return out

    def _described(self, value: Any) -> Hashable:
        leaves, spec = pytree.tree_flatten(value)
        return str(spec), tuple([self._tensor(x) if isinstance(x, Tensor) else repr(x) for x in leaves])

    def _tensor(self, x: Tensor) -> Hashable:
        if id(x) in self._made:
            return self._made[id(x)]
        if x.device.type == "meta" or x.layout is not torch.strided or not is_plain(x):
            return type(x).__name__, tuple(x.shape)
        if x.device.type == "cpu" and self._device != "cpu" and x.dim() == 0:
            return x.item()  # a kernel is launched with the number itself
        storage = x.untyped_storage().data_ptr()
        place: Hashable = ("own", self._own[storage]) if storage in self._own else ("at", storage)
        return place, x.storage_offset(), tuple(x.shape), x.stride(), str(x.dtype), str(x.device)

    def _look(self, func: Any, inputs: list[Tensor], results: list[Tensor]) -> None:
        name = str(getattr(func, "overloadpacket", func)).removeprefix("aten.")
        devices = {x.device.type for x in (*inputs, *results) if x.dim() > 0 or x.device.type != "cpu"}
        if self.refusal:
            return
        if not all([is_plain(x) and x.layout is torch.strided for x in (*inputs, *results)]):
            self.refusal = f"func works on tensors that are sparse or made of others, {name}"
        elif name in _INDEXING and any([x.dtype in (torch.bool, torch.uint8) for x in inputs[1:]]):
            self.refusal = f"func waits for the device, {name} by a mask"
        elif name in _WAITING:
            self.refusal = f"func waits for the device, {name}"
        elif len(devices) > 1:
            self.refusal = f"func copies between the host and the device, {name}"
