"""Values that lie in one memory: what an operation writes into one of them is read in all.

Of each view it is known where its numbers lie among those of what it is a view of, by the operation that made it, applied to
places instead of values. Only graphs that write are looked at.
"""

from typing import Any

import numpy as np
from torch import fx

from .lowered import Lowered
from .operations import OPERATIONS
from .pointwise import packet
from .program import Refs
from .trace import Unreadable
from .values import Sample, where

_VIEWS = {"view", "squeeze", "unsqueeze", "as_strided", "expand", "permute", "transpose", "t", "select", "slice"}
_VIEWS |= {"alias", "detach", "view_as", "diagonal"}


def writes(node: fx.Node) -> bool:
    name = packet(node.target)
    return node.op == "call_function" and name.endswith("_") and not name.startswith("_")


def _root(node: Any) -> Any:
    while node.op == "call_function" and (packet(node.target) in _VIEWS or writes(node)):
        node = node.args[0]
    return node


class Views:
    """written: the nodes whose memory is written, by whatever view."""

    def __init__(self, low: Lowered, nodes: list[fx.Node]):
        self._low = low
        self.written = {_root(node.args[0]) for node in nodes if writes(node)}
        self._places: dict[fx.Node, Refs] = {}  # of each that lies in such memory

    def add(self, node: fx.Node) -> None:
        """After a value was read."""
        if not self.written:
            return
        low, name, value = self._low, packet(node.target), self._low.values[node]
        if not isinstance(value, Sample):
            return
        if node in self.written:
            self._places[node] = np.arange(value.refs.size).reshape(value.refs.shape)
        elif writes(node) and node.args[0] in self._places:
            self._places[node] = self._places[node.args[0]]  # type: ignore[index]
        elif name in _VIEWS and node.args[0] in self._places:
            source: Any = node.args[0]
            own = low.values[source]
            assert isinstance(own, Sample)
            low.values[source] = Sample(self._places[source], own.batch, own.mask)
            try:
                found = OPERATIONS[name](low, node, low.twin[node])
            finally:
                low.values[source] = own
            assert isinstance(found, Sample)
            self._places[node] = found.refs

    def write(self, node: fx.Node, value: Sample) -> None:
        """Into the first operand of a node."""
        low, place = self._low, node.args[0]
        root = _root(place)
        before = low.values.get(root)
        if root.op == "placeholder":
            raise Unreadable(f"{where(node)} changes the state, the time or an argument in place")
        if not isinstance(before, Sample) or place not in self._places:
            raise Unreadable(f"{where(node)} writes into a tensor of func")
        if before.mask != value.mask:
            raise Unreadable(f"{where(node)} is not read")
        refs = before.refs.reshape(-1).copy()
        at = self._places[place]  # type: ignore[index]
        refs[at.reshape(-1)] = np.broadcast_to(value.refs, at.shape).reshape(-1)
        for other, places in self._places.items():
            old = low.values[other]
            if _root(other) is root and isinstance(old, Sample):
                low.values[other] = Sample(refs[places], old.batch, old.mask)
