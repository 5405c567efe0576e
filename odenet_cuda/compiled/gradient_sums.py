"""From the sums over samples, which the kernels give, to the gradients of tensors: torch does what comes after a sum.

Mostly that only moves numbers about, as a transpose does: then a gradient is a view of the sums, known once and for all.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .lower import Lowering
from .pointwise import packet
from .trace import value_of

_MOVES = {"view", "_unsafe_view", "reshape", "permute", "transpose", "t", "squeeze", "unsqueeze", "alias", "detach", "clone"}
_MOVES |= {"slice", "select"}


@dataclass
class _Strided:
    """A gradient that is so much of the sums. copied: another is made of the same numbers."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    copied: bool


class GradientSums:
    """begins: where each sum of the program begins."""

    def __init__(self, lowering: Lowering, begins: list[int], size: int):
        self._lowering, self._begins = lowering, begins
        numbers, known = torch.arange(size, device="cpu"), set[int]()
        self._strided: list[_Strided | None] = []
        self._nodes = [node for nodes in lowering.gradients for node in nodes]
        for node in self._nodes:
            found = None if node is None else self._as_strided(node, numbers, known)
            self._strided.append(found)
        pairs = zip(self._nodes, self._strided, strict=True)
        self._views = all([node is None or found is not None for node, found in pairs])

    def _as_strided(self, node: fx.Node, numbers: Tensor, known: set[int]) -> _Strided | None:
        """known: the numbers of earlier gradients."""
        index, source = self._lowering.sums.index, node
        while source not in index:
            if len(source.all_input_nodes) != 1 or str(packet(source.target)) not in _MOVES:
                return None
            source = source.all_input_nodes[0]
        with torch.no_grad():
            places = value_of(node, self._parts(numbers, [source]))
        first = places.reshape(-1)[:1].tolist()
        if not first:
            return None
        stride = tuple([int(places.select(d, 1).reshape(-1)[0]) - first[0] if n > 1 else 1 for d, n in enumerate(places.shape)])
        if any(step < 0 for step in stride) or not torch.equal(numbers.as_strided(places.shape, stride, first[0]), places):
            return None
        here = set(places.reshape(-1).tolist())
        copied = not here.isdisjoint(known) or len(here) < places.numel()
        known |= here
        return _Strided(places.shape, stride, first[0], copied)

    def _parts(self, sums: Tensor, nodes: Any) -> dict[fx.Node, Tensor]:
        """The sums of these nodes, from all of them in a row."""
        program, summed = self._lowering.program, self._lowering.sums
        found: dict[fx.Node, Tensor] = {}
        for node in nodes:
            s, begin = program.sums[summed.index[node]], self._begins[summed.index[node]]
            part = sums[begin : begin + s.size]
            if s.b is not None:
                part = part.view(s.a.shape[1], s.b.shape[1])
                part = part.t() if node in summed.transposed else part
            part = part.reshape(summed.shapes[node])
            stride = node.meta["val"].stride()  # which views of it rely on
            if part.stride() != stride:
                part = part.new_empty_strided(part.shape, stride).copy_(part)
            found[node] = part
        return found

    def gradients(self, sums: Tensor, constants: Any) -> list[Tensor | None]:
        """Of the wanted constants. sums: [chunks, size]."""
        flat = sums[0] if len(sums) == 1 else sums.sum(0)
        if not self._views:
            values = {**constants.values, **self._parts(flat, self._lowering.sums.index)}
            return self._together([None if node is None else value_of(node, values) for node in self._nodes])
        found: list[Tensor | None] = []
        for x in self._strided:
            if x is None:
                found.append(None)
                continue
            part = flat.as_strided(x.shape, x.stride, x.offset)
            found.append(part.clone() if x.copied else part)
        return self._together(found)

    def _together(self, found: list[Tensor | None]) -> list[Tensor | None]:
        """With those of second derivatives added to the others."""
        if len(self._lowering.gradients) == 1:
            return found
        half = len(found) // 2
        return [x if y is None else y if x is None else x + y for x, y in zip(found[:half], found[half:], strict=True)]
