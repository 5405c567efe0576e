"""The program of a field: statements over the numbers of one sample, which the emitter writes as loops over packs.

Every number has an address: a buffer and a place in it. What only moves numbers about, slices, concatenations, transposes, is
done on addresses when the program is made and costs nothing when it runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SHIFT = 32
SCALARS = ("t", "rate")  # inputs of one number, which are no arrays
_FEW, _WIDE = 4, 256  # layers that are written one by one: no more, or such as have so many weights
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
    """out[i] = text of operands[.][i]; {i} stands for i in it"""

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


@dataclass
class Lookup:
    """out[i] = table[i, places[i]]; not a number where that is none of them"""

    out: int
    table: Refs
    places: Refs


@dataclass
class Contract:
    """out[i] = sum_j a[i, j] b[i, j]"""

    out: int
    a: Refs
    b: Refs


Statement = Pointwise | Reduce | Contract | Lookup | Linear


@dataclass
class Sum:
    """A gradient that is a sum over samples: of the outer product of a [k, rows] and b [k, columns], or of a [1, rows] alone.
    a is what depends on the gradient that comes in."""

    a: Refs
    b: Refs | None

    @property
    def size(self) -> int:
        return self.a.shape[1] * (1 if self.b is None else self.b.shape[1])


def _none() -> Refs:
    return np.zeros(0, np.int64)


@dataclass
class Product:
    """What an incoming gradient becomes. state [state], arguments [arguments]: addresses; sums: those over samples."""

    state: Refs = field(default_factory=_none)
    arguments: Refs = field(default_factory=_none)
    sums: list[Sum] = field(default_factory=list)

    def layout(self, begin: int = 0) -> tuple[Refs, list[tuple[int, int, int]], int]:
        """What it hands out for gradients: addresses; for each sum the places of a and b and of its result, the first of which
        is `begin`; and the end of these. What two sums have in common is handed out once."""
        parts: list[Refs] = []
        places: dict[bytes, int] = {}

        def place_of(refs: Refs) -> int:
            key = refs.tobytes()
            if key not in places:
                places[key] = sum(part.size for part in parts)
                parts.append(refs)
            return places[key]

        layout, result = [], begin
        for s in self.sums:
            layout.append((place_of(s.a.reshape(-1)), -1 if s.b is None else place_of(s.b.reshape(-1)), result))
            result += s.size
        return np.concatenate([*parts, self.arguments]), layout, result


@dataclass
class Program:
    """statements in order; slopes and time_product [1], or none where it is zero: addresses of results. product: by the first
    derivatives; second: by the second ones, for tangents, None where they were not asked for. sums: of both."""

    buffers: list[Buffer] = field(default_factory=list)
    statements: list[Statement] = field(default_factory=list)
    constants: list[Any] = field(default_factory=list)  # graph nodes, as `Buffer.kind == "constant"` in order
    slopes: Refs = field(default_factory=_none)
    product: Product = field(default_factory=Product)
    second: Product | None = None
    time_product: Refs = field(default_factory=_none)
    sums: list[Sum] = field(default_factory=list)
    same: dict[int, int] = field(default_factory=dict)  # constants that are views of the same numbers -> the first of them
    tainted: set[int] = field(default_factory=set)  # buffers that depend on the incoming gradient

    def sums_at(self) -> tuple[list[int], int]:
        """The places of the results of all sums, and their end."""
        _, layout, end = self.product.layout()
        if self.second is not None:
            _, more, end = self.second.layout(end)
            layout = [*layout, *more]
        return [begin for _, _, begin in layout], end

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

    def full(self, shape: Sequence[int], value: float) -> Refs:
        """The address of a number, as often as the shape says."""
        return np.full(tuple(shape), self.literal(value), np.int64)

    def statement(self, text: str, operands: list[Refs], mask: bool = False) -> Refs:
        out = self.new("local", len(operands[0]), mask=mask)
        self.statements.append(Pointwise(out, text, operands))
        self._taint(out, operands)
        return self.addresses(out)

    def _taint(self, out: int, operands: list[Refs]) -> None:
        if any(self.depends(refs) for refs in operands):
            self.tainted.add(out)

    def depends(self, refs: Refs) -> bool:
        """Whether any of these numbers depends on the incoming gradient."""
        return any(int(buffer) in self.tainted for buffer in np.unique(split(refs)[0]))

    def of_gradient(self, refs: Refs) -> np.ndarray:
        """Which of these numbers depend on the incoming gradient."""
        return np.isin(split(refs)[0], list(self.tainted))

    def is_constant(self, refs: Refs) -> bool:
        return self.buffers[int(split(refs)[0].flat[0])].kind == "constant"

    def packed(self, refs: Refs) -> Refs:
        """The same numbers side by side in one buffer."""
        buffers, places = split(refs)
        ordered = (buffers == buffers[0]).all() and (np.diff(places) == 1).all() if len(refs) > 1 else True
        first = self.buffers[int(buffers[0])]
        if ordered and first.kind in ("local", "input") and first.name not in SCALARS:
            return refs
        return self.statement("{0}", [refs])

    def is_matrix(self, refs: Refs) -> bool:
        """Whether these [rows, columns] lie evenly in one constant."""
        buffers, places = split(refs)
        if (buffers != buffers.flat[0]).any() or self.buffers[int(buffers.flat[0])].kind != "constant":
            return False
        row, column = self._steps(places)
        grid = places[0, 0] + row * np.arange(len(refs))[:, None] + column * np.arange(refs.shape[1])
        return bool((grid == places).all())

    @staticmethod
    def _steps(places: Refs) -> tuple[int, int]:
        rows, columns = places.shape
        row = int(places[1, 0] - places[0, 0]) if rows > 1 else 1
        return row, int(places[0, 1] - places[0, 0]) if columns > 1 else 1

    def matmul(self, a: Refs, b: Refs, bias: Refs | None = None) -> Refs:
        """a [n, rows, k], b [n, k, columns], bias [rows, columns]: the products, [n, rows, columns]."""
        columns = np.swapaxes(b, 1, 2)
        if a.size == 0 or b.size == 0:
            shape = *a.shape[:2], b.shape[2]
            return self.full(shape, 0.0) if bias is None else np.broadcast_to(bias, shape)
        by_row = self.is_matrix(columns[0])
        if by_row or self.is_matrix(a[0]):
            left, right = (a, columns) if by_row else (columns, a)
            if left.shape[0] * left.shape[1] <= _FEW or right.shape[1] * right.shape[2] >= _WIDE:
                added = None if bias is None else bias if by_row else bias.T
                out = np.array([self._layers(x, w, added) for x, w in zip(left, right, strict=True)])
                return out if by_row else np.swapaxes(out, 1, 2)
        product = self.contract(a[:, :, None], columns[:, None])
        if bias is None:
            return product
        return self.statement("{0} + {1}", [product.reshape(-1), bias.reshape(-1)]).reshape(product.shape)

    def _layers(self, rows: Refs, weight: Refs, bias: Refs | None) -> Refs:
        return np.array([self.linear(x, weight, None if bias is None else bias[i]) for i, x in enumerate(rows)])

    def linear(self, x: Refs, weight: Refs, bias: Refs | None) -> Refs:
        """out[r] = bias[r] + sum_c weight[r, c] x[c]"""
        rows, columns = weight.shape
        if not self.is_matrix(weight):
            out = self.contract(weight, x)
            return out if bias is None else self.statement("{0} + {1}", [out, bias])
        buffers, places = split(weight)
        row, column = self._steps(places)
        x = self.packed(x) if not (x == x[0]).all() or columns == 1 else self.statement("{0}", [x])
        result = self.new("local", rows)
        linear = Linear(result, rows, columns, int(buffers.flat[0]), int(places[0, 0]), row, column, x, bias)
        self.statements.append(linear)
        self._taint(result, [x] if bias is None else [x, bias])
        return self.addresses(result)

    def contract(self, a: Refs, b: Refs) -> Refs:
        """The products of a and b, broadcast, summed over the last axis."""
        if a.shape[-1] == 0:
            return self.full(np.broadcast_shapes(a.shape, b.shape)[:-1], 0.0)
        a, b = np.broadcast_arrays(self._together(a), self._together(b))
        shape, columns = a.shape[:-1], a.shape[-1]
        a, b = a.reshape(-1, columns), b.reshape(-1, columns)
        if columns == 1:
            return self.statement("{0} * {1}", [a[:, 0], b[:, 0]]).reshape(shape)
        out = self.new("local", len(a))
        self.statements.append(Contract(out, a, b))
        self._taint(out, [a, b])
        return self.addresses(out).reshape(shape)

    def _together(self, refs: Refs) -> Refs:
        """The same numbers in one buffer, in the order in which they are met."""
        if len(np.unique(split(refs)[0])) == 1:
            return refs
        found, first, places = np.unique(refs, return_index=True, return_inverse=True)
        order = np.argsort(first)
        turns = np.empty_like(order)
        turns[order] = np.arange(len(order))
        return self.packed(found[order])[turns[places.reshape(refs.shape)]]

    def lookup(self, table: Refs, places: Refs) -> Refs:
        out = self.new("local", len(table))
        self.statements.append(Lookup(out, table, places))
        self._taint(out, [table, places])
        return self.addresses(out)

    def reduce(self, operand: Refs, largest: bool) -> Refs:
        """[n, m] -> [n]"""
        if operand.shape[1] == 1:
            return operand[:, 0]
        if len(operand) == 0 or (operand.shape[1] == 0 and not largest):
            return self.full((len(operand),), 0.0)
        out = self.new("local", len(operand))
        self.statements.append(Reduce(out, largest, operand))
        self._taint(out, [operand])
        return self.addresses(out)


def split(refs: Refs) -> tuple[Refs, Refs]:
    """Buffers and places."""
    return refs >> SHIFT, refs & ((1 << SHIFT) - 1)
