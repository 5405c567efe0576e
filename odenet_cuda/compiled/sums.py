"""Sums over the samples: the gradients of what is the same for all of them, which the kernel adds up.

Torch does what comes after the sum, so that must be linear. Where it needs the time of a sample, the kernel does it with what
the sample adds, before it adds up.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, fx

from .lowered import Lowered, SumTable
from .pointwise import packet
from .program import Refs, Sum
from .trace import Unreadable
from .values import Sample, Summed, Value, where

# Linear in the first operand, whatever the others are.
_LINEAR = {"view", "_unsafe_view", "reshape", "permute", "transpose", "t", "squeeze", "unsqueeze", "expand"}
_LINEAR |= {"neg", "sum", "slice", "select", "clone", "alias", "detach", "tril", "triu", "flip", "diagonal", "diagonal_copy"}
_LINEAR |= {"constant_pad_nd", "diag_embed"}
_LINEAR_IN = {"linalg_solve_triangular": 1, "linalg_lu_solve": 2}  # in this operand, where the others are no sums


class Sums(SumTable):
    """What comes after a sum. operation: the reading of one operation of samples."""

    def __init__(self, lowered: Lowered, operation: Callable[[fx.Node, str], Value]):
        super().__init__(lowered.program)
        self.lowered, self._operation = lowered, operation
        self._addends: dict[fx.Node, Refs] = {}

    def after(self, node: fx.Node, name: str, inputs: list[Value]) -> Value:
        """An operation with sums among its operands."""
        low, operands = self.lowered, list[Any](node.args)
        batched = isinstance(node.meta["val"], Tensor) and low.shapes(node)[1] is not None
        if batched or not self._is_linear(name, operands, inputs):
            raise Unreadable(f"{where(node)} of a sum over samples")
        if not any(isinstance(value, Sample) for value in inputs):
            return Summed(node)
        if name == "mm" and operands[0].meta["val"].shape[1] == 1:
            a, b = (self.addend(x) if self.has(x) else low.sample(x, x, node).refs for x in operands)
            return self.add(node, a.T, b)
        self._addends[node] = self._of_addends(node)
        return self.add(node, self._addends[node].reshape(1, -1), None)

    def _is_linear(self, name: str, operands: list[Any], inputs: list[Value]) -> bool:
        """In the sums alone, whatever else is among the operands."""
        summed = [isinstance(value, Summed) for value in inputs]
        if name in ("mul", "mm", "bmm"):
            return sum(summed) == 1
        if name in _LINEAR_IN:
            return sum(summed) == 1 and self.has(operands[_LINEAR_IN[name]])
        if name == "cat":
            return all(map(self._is_zero_or_sum, operands[0]))
        if name in ("add", "sub"):
            return all(summed) and not any(isinstance(x, (int, float)) for x in operands[:2])
        if name == "div":
            return self.has(operands[0]) and sum(summed) == 1
        if name == "where":
            return not summed[0] and all(map(self._is_zero_or_sum, operands[1:]))
        if name in ("slice_scatter", "select_scatter"):
            return all(map(self._is_zero_or_sum, operands[:2]))
        if name == "_weight_norm_interface_backward":
            return summed == [True, False, False, False] and not any(isinstance(value, Sample) for value in inputs)
        return name in _LINEAR and all(summed)

    def has(self, x: Any) -> bool:
        return isinstance(self.lowered.values.get(x), Summed)

    def _is_zero_or_sum(self, x: Any) -> bool:
        return self.has(x) or bool((self.lowered.sample(x, x, x).refs == self.program.literal(0.0)).all())

    def addend(self, node: fx.Node) -> Refs:
        """What one sample adds to a sum."""
        if node not in self._addends:
            refs = self._products(self.program.sums[self.index[node]]) if node in self.index else self._of_addends(node)
            self._addends[node] = (refs.T if node in self.transposed else refs).reshape(self.lowered.shapes(node)[0])
        return self._addends[node]

    def _of_addends(self, node: fx.Node) -> Refs:
        """The operation of a node on what one sample adds to its operands."""
        values = self.lowered.values
        sums = {x: values[x] for x in node.all_input_nodes if self.has(x)}
        values.update({x: Sample(self.addend(x), None) for x in sums})
        try:
            result = self._operation(node, packet(node.target))
        finally:
            values.update(sums)
        assert isinstance(result, Sample)
        return result.refs

    def _products(self, s: Sum) -> Refs:
        program = self.program
        if s.b is None:
            return program.reduce(s.a.T, False)
        rows, columns = s.a.shape[1], s.b.shape[1]
        products = [
            program.statement("{0} * {1}", [np.repeat(a, columns), np.tile(b, rows)]) for a, b in zip(s.a, s.b, strict=True)
        ]
        return program.reduce(np.stack(products, 1), False).reshape(rows, columns)

    def keep(self, *results: list[fx.Node | None]) -> list[list[Sum]]:
        """Only the sums that these results need, each list its own, which are given back: a field may add up over the samples
        for the shape alone, or for its own derivative."""
        kept: list[fx.Node] = []
        found = []
        for of_one in results:
            needed = {node for node in of_one if node is not None}
            for node in reversed(list(self.lowered.recording.graphs[0].nodes)):
                if node in needed and node not in self.index:
                    needed |= set(node.all_input_nodes)
            own = [node for node in self.index if node in needed]
            if shared := next((node for node in own if node in kept), None):
                raise Unreadable(f"{where(shared)}: a sum over samples is in first and in second derivatives")
            kept += own
            found.append([self.program.sums[self.index[node]] for node in own])
        self.program.sums = [s for of_one in found for s in of_one]
        self.index = {node: index for index, node in enumerate(kept)}
        return found
