"""The uniform values of a solve as the kernels read them: addresses of tensors of func, or of what is computed from them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .. import _C
from .memory import has_memory
from .numbers import Place
from .program import Program
from .trace import value_of


@dataclass
class View:
    """A constant that is a view of a tensor of func: it is read where that lies."""

    base: fx.Node
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int  # from the first number of the base, in bytes


def view_of(node: fx.Node, value: Tensor, seen: dict[fx.Node, Any], dtype: torch.dtype, device: torch.device) -> View | None:
    if value.dtype not in (dtype, torch.bool) or value.device != device or not has_memory(value):
        return None
    for base in sources_of(node):
        tensor = seen[base]
        if not has_memory(tensor):
            continue
        same = tensor.untyped_storage().data_ptr() == value.untyped_storage().data_ptr() and tensor.dtype == value.dtype
        if same and value.stride() == node.meta["val"].stride():
            return View(base, tensor.shape, tensor.stride(), tensor.dtype, value.data_ptr() - tensor.data_ptr())
    return None


def sources_of(node: fx.Node) -> list[fx.Node]:
    return [node] if node.op == "get_attr" else [base for x in node.all_input_nodes for base in sources_of(x)]


class Layout:
    """Where the constants of a program are found at every call. places: of the tensors of func; views: of each constant, which
    of them it lies in."""

    def __init__(
        self, program: Program, places: dict[fx.Node, Place], seen: dict[fx.Node, Any], dtype: torch.dtype, device: torch.device
    ):
        self.nodes, self.places, self.dtype, self.device = program.constants, places, dtype, device
        with torch.no_grad():
            self.views = [view_of(node, value_of(node, seen), seen, dtype, device) for node in self.nodes]
        found = [view for view in self.views if view is not None]
        order = {node: i for i, node in enumerate(places)}
        self._getters = list(places.values())
        self._bases = [order[view.base] for view in found]
        # As `_C.addresses` compares them. Where all numbers lie in a row, a stride that counts nothing may be any.
        self._asked = tuple([(x.shape, x.stride, x.dtype, device, x.offset, seen[x.base].is_contiguous()) for x in found])
        self._in_place = len(found) == len(self.nodes)
        self.table: tuple[Any, Tensor] | None = None

    def constants(self, args: Sequence[Any], gradient: bool) -> "Constants":
        """gradient: they are read again on the way back."""
        bases: list[Any] = [place(args) for place in self._getters]
        tensors = [base.detach() for base in bases] if gradient or not self._in_place else bases
        addresses = _C.addresses([tensors[i] for i in self._bases], self._asked) if self._in_place else None
        if addresses is not None:
            return Constants(self, addresses, bases, tensors, ())
        # Whoever gives a parameter other memory after the solve leaves this one as it was.
        tensors = [base.detach() for base in bases]
        values = dict(zip(self.places, tensors, strict=True))
        found, kept = list[int](), list[Tensor]()
        for node, view in zip(self.nodes, self.views, strict=True):
            if view is not None:
                base = values[view.base]
                same = base.shape == view.shape and base.stride() == view.stride and base.dtype == view.dtype
                if same and base.device == self.device and not base.is_neg():
                    found.append(base.data_ptr() + view.offset)
                    continue
            kept.append(self._copy(node, values))
            found.append(kept[-1].data_ptr())
        return Constants(self, tuple(found), bases, tensors, kept)

    def _copy(self, node: fx.Node, values: dict[fx.Node, Any]) -> Tensor:
        seen = node.meta["val"]
        with torch.no_grad():
            value = value_of(node, values).detach().resolve_neg()
        if value.shape != seen.shape:
            raise ValueError(f"a tensor of func must keep its shape, {list(seen.shape)}, got {list(value.shape)}; call reset()")
        dtype = torch.bool if seen.dtype == torch.bool else self.dtype
        if value.stride() != seen.stride() or value.dtype != dtype or value.device != self.device:
            value = torch.empty_strided(seen.shape, seen.stride(), dtype=dtype, device=self.device).copy_(value)
        return value


class Constants:
    """Those of one solve. Keeps alive what they point to. bases: the tensors of func; tensors: these, or detached; kept: what
    was computed from them."""

    def __init__(
        self,
        layout: Layout,
        addresses: tuple[int, ...],
        bases: list[Tensor],
        tensors: list[Tensor],
        kept: Sequence[Tensor],
    ):
        self.layout, self.addresses, self.bases, self.tensors, self._kept = layout, addresses, bases, tensors, kept

    def table(self, make: Callable[[Sequence[int], torch.dtype], Tensor], stream: int) -> Tensor:
        """The addresses where the kernels read them; those of the last solve are there still. make(numbers, dtype): a tensor
        there. stream: of CUDA, on which it is written."""
        key, last = (self.addresses, stream), self.layout.table
        if last is None or last[0] != key:
            self.layout.table = last = key, make(self.addresses, torch.int64)
        return last[1]

    @property
    def values(self) -> dict[fx.Node, Any]:
        return dict(zip(self.layout.places, self.tensors, strict=True))

    def besides(self, known: Sequence[Tensor]) -> list[Tensor]:
        """The tensors that the kernels read but these."""
        ids = set(map(id, known))
        return [x for base, x in zip(self.bases, self.tensors, strict=True) if id(base) not in ids and not x.is_inference()]
