"""The values of a recorded graph as far as it has been lowered, and what the reading of an operation asks of them."""

from typing import Any

import numpy as np
from torch import Tensor, fx

from .call import BATCHES
from .pointwise import packet
from .program import SHIFT, Program, Refs, Sum, split
from .trace import Recording, Unreadable, value_of
from .values import Sample, Summed, Uniform, Value, where


class SumTable:
    """The sums over samples. index: of each node among those of the program; transposed: those that the kernel gives
    transposed."""

    def __init__(self, program: Program):
        self.program = program
        self.index: dict[fx.Node, int] = {}
        self.transposed: set[fx.Node] = set()
        self.shapes: dict[fx.Node, list[int]] = {}

    def add(self, node: fx.Node, a: Refs, b: Refs | None) -> Summed:
        """a [k, rows], b [k, columns]; the result of `node` has rows x columns numbers, or rows."""
        if b is not None and self.program.depends(b):
            if self.program.depends(a):
                raise Unreadable(f"{where(node)}: a gradient that is not linear")
            self.transposed.add(node)
            a, b = b, a
        self.index[node] = len(self.program.sums)
        self.shapes[node] = list(node.meta["val"].shape)
        self.program.sums.append(Sum(a, b))
        return Summed(node)


class Lowered:
    def __init__(self, recording: Recording):
        self.recording, self.program = recording, Program()
        self.values: dict[fx.Node, Value] = {}
        self.twin: dict[fx.Node, fx.Node] = {}  # of each node that of the other recording
        self.constants: dict[fx.Node, int] = {}  # node -> buffer
        self.tuples: dict[fx.Node, list[Sample]] = {}  # operations with several results
        self.known: list[fx.Node] = []  # uniform values that are in the program with the numbers they had
        self.sums = SumTable(self.program)

    # Shapes

    def shapes(self, node: fx.Node) -> tuple[list[int], int | None]:
        """The shape of one sample, and the axis of the batch in it."""
        return self.shape_of(node.meta["val"], self.twin[node].meta["val"], node)

    def shape_of(self, value: Tensor, twin: Tensor, node: fx.Node) -> tuple[list[int], int | None]:
        first, second = list(value.shape), list(twin.shape)
        batch = None
        for axis, (a, b) in enumerate(zip(first, second, strict=True)):
            if a == b:
                continue
            if batch is not None or a % BATCHES[0] or a * BATCHES[1] != b * BATCHES[0]:
                raise Unreadable(f"{where(node)} mixes samples")
            batch = axis
            first[axis] = a // BATCHES[0]
        return first, batch

    def same_number(self, x: Any, twin: Any, node: fx.Node) -> Any:
        if x != twin and not (x != x and twin != twin):
            raise Unreadable(f"{where(node)} depends on the number of samples")
        return x

    # Values

    def as_sample(self, node: fx.Node) -> Sample:
        """A uniform value as addresses of a constant."""
        value = node.meta["val"]
        filled = {"scalar_tensor": 0, "full": 1}.get(packet(node.target))
        if filled is not None and isinstance(node.args[filled], (int, float)) and self.shapes(node)[1] is None:
            refs = self.program.full(value.shape, float(node.args[filled]))  # type: ignore[arg-type]
            return Sample(refs, None, str(value.dtype) == "torch.bool")
        if value.dtype.is_complex or not (value.dtype.is_floating_point or str(value.dtype) in ("torch.bool", "torch.int64")):
            raise Unreadable(f"{where(node)} has numbers of type {value.dtype}")
        if self.shapes(node)[1] is not None:
            raise Unreadable(f"{where(node)}: a tensor of func has one entry a sample; give it in args")
        if value.numel() == 0:
            return Sample(self.program.full(value.shape, 0.0), None, str(value.dtype) == "torch.bool")
        if node not in self.constants:
            extent = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True)) + 1
            buffer = self.program.new("constant", extent, f"w{len(self.constants)}", str(value.dtype) == "torch.bool")
            self.constants[node] = buffer
            self.program.constants.append(node)
        places = np.zeros(tuple(value.shape), np.int64)
        for axis, stride in enumerate(value.stride()):
            shape = [1] * value.dim()
            shape[axis] = -1
            places = places + (np.arange(value.shape[axis]) * stride).reshape(shape)
        return Sample((np.int64(self.constants[node]) << SHIFT) + places, None, str(value.dtype) == "torch.bool")

    def sample(self, x: Any, twin: Any, node: fx.Node) -> Sample:
        if isinstance(x, fx.Node):
            value = self.values[x]
            if isinstance(value, Sample):
                return value
            if isinstance(value, Uniform):
                return self.as_sample(x)
            raise Unreadable(f"{where(node)} of a sum over samples")
        if isinstance(x, (bool, int, float)):
            return Sample(
                np.array(self.program.literal(float(self.same_number(x, twin, node))), np.int64), None, isinstance(x, bool)
            )
        raise Unreadable(f"{where(node)} has an operand {type(x).__name__}")

    def operands(self, node: fx.Node) -> list[Sample]:
        return [self.sample(x, y, node) for x, y in zip(node.args, self.twin[node].args, strict=True)]

    def pointwise(self, node: fx.Node, text: str, operands: list[Sample], mask: bool = False) -> Sample:
        shape, batch = self.shapes(node)
        for operand in operands:
            if operand.batch is not None and (batch is None or operand.refs.ndim - operand.batch != len(shape) - batch):
                raise Unreadable(f"{where(node)} mixes samples")
        spread = [np.broadcast_to(operand.refs, shape).reshape(-1) for operand in operands]
        return Sample(self.program.statement(text, spread, mask).reshape(shape), batch, mask)

    def added(self, node: fx.Node, a: Sample, b: Sample) -> Sample:
        """a + b, of which incoming gradients that meet zeros, as those of slices do, are no sums."""
        shape, batch = self.shapes(node)
        zero, (x, y) = self.program.literal(0.0), (np.broadcast_to(z.refs, shape).reshape(-1) for z in (a, b))
        gradient = [self.program.of_gradient(z) | (z == zero) for z in (x, y)]
        none = ((x == zero) & gradient[1]) | ((y == zero) & gradient[0])
        if not none.any():
            return self.pointwise(node, "{0} + {1}", [a, b])
        found = np.where(x == zero, y, x)
        if not none.all():
            found[~none] = self.program.statement("{0} + {1}", [x[~none], y[~none]])
        return Sample(found.reshape(shape), batch)

    def numbers(self, node: Any) -> np.ndarray:
        """A uniform value that is known now, such as an index."""
        if not isinstance(self.values[node], Uniform):
            raise Unreadable(f"{where(node)} is computed from the state")
        self.known.append(node)
        known = {n: self.recording.constant(n) for n in self.recording.graphs[0].nodes if n.op == "get_attr"}
        return value_of(node, known).detach().cpu().clone().numpy()

    def _is_literal(self, value: Sample) -> bool:
        """Whether these are numbers that are known now. Masks, some of which are, are not read."""
        kinds = {self.program.buffers[int(buffer)].kind == "literal" for buffer in np.unique(split(value.refs)[0])}
        if value.mask and len(kinds) > 1:
            raise Unreadable("comparisons put together with constant ones are not read")
        return True in kinds

    def mask_of(self, value: Sample) -> Sample:
        """Numbers as whether they are not 0."""
        if value.mask and not self._is_literal(value):
            return value
        flat = value.refs.reshape(-1)
        refs = self.program.statement("{0} != {1}", [flat, self.program.full(flat.shape, 0.0)], True)
        return Sample(refs.reshape(value.refs.shape), value.batch, True)

    def number_of(self, value: Sample) -> Sample:
        """A comparison as 1 and 0."""
        if not value.mask:
            return value
        if self._is_literal(value):
            return Sample(value.refs, value.batch)
        flat = value.refs.reshape(-1)
        one, zero = (self.program.full(flat.shape, x) for x in (1.0, 0.0))
        return Sample(self.program.statement("select({0}, {1}, {2})", [flat, one, zero]).reshape(value.refs.shape), value.batch)
