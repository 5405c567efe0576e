"""The program of a field: statements over the numbers of one sample, which the emitter writes as loops over packs.

Every number has an address: a buffer and a place in it. What only moves numbers about, slices, concatenations, transposes, is
done on addresses when the program is made and costs nothing when it runs.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

SHIFT = 32
Refs = np.ndarray  # addresses, int64: buffer << SHIFT | place


@dataclass
class Buffer:
    """name: in the emitted text. kind: "local", "constant" (the same for all samples), "literal", or an input."""

    name: str
    kind: str
    size: int
    mask: bool = False  # of comparisons, not of numbers
    values: list[float] = field(default_factory=list)  # of literals


@dataclass
class Pointwise:
    """out[i] = text of operands[.][i]"""

    out: int
    text: str
    operands: list[Refs]


@dataclass
class Reduce:
    """out[i] = the sum, or the largest, of operand[i, :]"""

    out: int
    largest: bool
    operand: Refs


@dataclass
class Linear:
    """out[r] = bias[r] + sum_c weight[offset + r row + c column] x[c]"""

    out: int
    rows: int
    columns: int
    weight: int
    offset: int
    row: int
    column: int
    x: Refs
    bias: Refs | None


Statement = Pointwise | Reduce | Linear


@dataclass
class Sum:
    """A gradient that is a sum over samples: of the outer product of a [k, rows] and b [k, columns], or of a [1, rows] alone.
    a is what depends on the gradient that comes in."""

    a: Refs
    b: Refs | None

    @property
    def size(self) -> int:
        return self.a.shape[1] * (1 if self.b is None else self.b.shape[1])


@dataclass
class Program:
    """statements in order; slopes, products [state] and argument_products [arguments]: addresses of the results."""

    buffers: list[Buffer] = field(default_factory=list)
    statements: list[Statement] = field(default_factory=list)
    constants: list[Any] = field(default_factory=list)  # graph nodes, as `Buffer.kind == "constant"` in order
    slopes: Refs = field(default_factory=lambda: np.zeros(0, np.int64))
    products: Refs = field(default_factory=lambda: np.zeros(0, np.int64))
    argument_products: Refs = field(default_factory=lambda: np.zeros(0, np.int64))
    sums: list[Sum] = field(default_factory=list)

    def new(self, kind: str, size: int, name: str = "", mask: bool = False) -> int:
        index = len(self.buffers)
        self.buffers.append(Buffer(name or f"v{index}", kind, size, mask))
        return index

    def addresses(self, buffer: int) -> Refs:
        return (np.int64(buffer) << SHIFT) + np.arange(self.buffers[buffer].size, dtype=np.int64)

    def literal(self, value: float) -> int:
        """The address of a number."""
        index = next((i for i, buffer in enumerate(self.buffers) if buffer.kind == "literal"), None)
        if index is None:
            index = self.new("literal", 0)
        buffer = self.buffers[index]
        key = [repr(x) for x in buffer.values]
        if repr(value) not in key:
            buffer.values.append(value)
            key.append(repr(value))
        return (index << SHIFT) + key.index(repr(value))


def split(refs: Refs) -> tuple[Refs, Refs]:
    """Buffers and places."""
    return refs >> SHIFT, refs & ((1 << SHIFT) - 1)
