"""A recorded graph becomes a program: which values are the same for all samples, which belong to one, which are sums over all.

- Uniform: does not depend on the sample: weights, their transposes, constants. Torch computes them before the solve.
- Sample: numbers of one sample, as addresses. The axis of the batch is kept with the entries that one sample has in it.
- Summed: a sum over the samples, a gradient of a uniform value. The kernel adds up; torch does what comes after, which
  must be linear; where that needs the time of a sample, the kernel does it before it adds up.

An operation that would mix samples is refused.
"""

import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from . import reductions  # noqa: F401, which adds to OPERATIONS
from .operations import OPERATIONS
from .pointwise import MASKS, OF_MASKS, TEXTS, packet
from .program import SHIFT, Program, Refs, split
from .sums import Sums
from .trace import BATCHES, Recording, Unreadable, value_of
from .values import Sample, Summed, Uniform, Value, where

_CREATE = {"full", "zeros", "ones", "empty", "full_like", "zeros_like", "ones_like"}
_CREATE |= {"new_zeros", "new_ones", "new_full", "empty_permuted"}


class Lowering:
    def __init__(self, recording: Recording, sizes: list[int], arguments: list[int]):
        """sizes: numbers of a sample in each leaf; arguments: the same of each batched argument."""
        self.recording, self.program = recording, Program()
        self.values: dict[fx.Node, Value] = {}
        self.constants: dict[fx.Node, int] = {}  # node -> buffer
        self.tuples: dict[fx.Node, list[Sample]] = {}  # operations with several results
        self.known: list[fx.Node] = []  # uniform values that are in the program with the numbers they had
        self.sums = Sums(self)
        program = self.program
        self.time = program.new("input", 1, "t")
        self.y = program.new("input", sum(sizes), "y")
        self.arguments = program.new("input", sum(arguments), "arguments")
        self.g = program.new("input", sum(sizes), "g")
        program.tainted.add(self.g)
        self.run()

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

    # The walk

    def run(self) -> None:
        first, second = (list(graph.nodes) for graph in self.recording.graphs)
        if len(first) != len(second) or any(
            a.target != b.target for a, b in zip(first, second, strict=True) if a.op == "call_function"
        ):
            raise Unreadable("func does other operations for another number of samples")
        self.twin = dict(zip(first, second, strict=True))
        places = {"y": 0, "arguments": 0, "g": 0}
        inputs = iter(self._input_names())
        for node in first:
            if node.op == "placeholder":
                self._input(node, next(inputs), places)
            elif node.op == "get_attr":
                self.values[node] = Uniform(node)
            elif node.op == "call_function":
                self.values[node] = self._call(node)
            elif node.op == "output":
                self._results(node)

    def _input_names(self) -> list[str]:
        n = self.recording.leaves
        return ["t", *["y"] * n, *["arguments"] * len(self.recording.batched), *["g"] * n]

    def _input(self, node: fx.Node, name: str, places: dict[str, int]) -> None:
        buffer = {"t": self.time, "y": self.y, "arguments": self.arguments, "g": self.g}[name]
        shape, batch = self.shapes(node)
        if name == "t":
            self.values[node] = Sample(np.full(shape, buffer << SHIFT, np.int64), batch)
            return
        count = int(np.prod(shape))
        refs = self.program.addresses(buffer)[places[name] : places[name] + count]
        places[name] += count
        self.values[node] = Sample(refs.reshape(shape), batch)

    def _results(self, node: fx.Node) -> None:
        outputs: list[Any] = list(node.args[0])  # type: ignore[arg-type]
        n, m = self.recording.leaves, len(self.recording.batched)
        program = self.program
        state = len(program.addresses(self.y))

        def flat(values: list[Any], of: int) -> Refs:
            parts = []
            for value, size in zip(values, self._sizes(of), strict=True):
                if value is None:
                    parts.append(program.full([size], 0.0))
                    continue
                found = self.values[value]
                if not isinstance(found, Sample):
                    found = self._as_sample(value)
                parts.append(np.broadcast_to(found.refs, self._shape_of(value, found)).reshape(-1))
            return np.concatenate(parts) if parts else np.zeros(0, np.int64)

        program.slopes = flat(outputs[:n], 0)
        assert len(program.slopes) == state
        program.products = flat(outputs[n : 2 * n], 0)
        program.argument_products = flat(outputs[2 * n : 2 * n + m], 1)
        self.gradients: list[fx.Node | None] = []
        for value in outputs[2 * n + m :]:
            kind = None if value is None else self.values[value]
            if isinstance(kind, Sample) and self.recording.whole:
                kind = self.values[value] = self.sums.add(value, kind.refs.reshape(1, -1), None)
            if isinstance(kind, Sample):
                raise Unreadable(f"{where(value)}: the gradient of a tensor of func was not read")
            self.gradients.append(value if isinstance(kind, Summed) else None)  # what does not depend on g is 0
        self.sums.keep(self.gradients)

    def _sizes(self, of: int) -> list[int]:
        nodes = [node for node in self.recording.graphs[0].nodes if node.op == "placeholder"]
        names = self._input_names()
        wanted = "y" if of == 0 else "arguments"
        parts: list[Any] = [self.values[x] for x, name in zip(nodes, names, strict=True) if name == wanted]
        return [part.refs.size for part in parts]

    def _shape_of(self, node: fx.Node, value: Sample) -> tuple[int, ...]:
        return tuple(self.shapes(node)[0])

    # Values

    def _as_sample(self, node: fx.Node) -> Sample:
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
                return self._as_sample(x)
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

    def numbers(self, node: Any) -> np.ndarray:
        """A uniform value that is known now, such as an index."""
        if not isinstance(self.values[node], Uniform):
            raise Unreadable(f"{where(node)} is computed from the state")
        self.known.append(node)
        known = {n: self.recording.constant(n) for n in self.recording.graphs[0].nodes if n.op == "get_attr"}
        return value_of(node, known).detach().cpu().numpy()

    # Operations

    def _call(self, node: fx.Node) -> Value:
        name = packet(node.target)
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise Unreadable(f"{where(node)} draws random numbers")
        if node.target is operator.getitem:
            parts = self.tuples.get(node.args[0])  # type: ignore[arg-type]
            if parts is None:
                return Summed(node) if isinstance(self.values[node.args[0]], Summed) else Uniform(node)  # type: ignore[index]
            return parts[int(node.args[1])]  # type: ignore[arg-type]
        if name.endswith("_") and not name.startswith("_"):
            return self._in_place(node, name[:-1])
        inputs = [self.values[x] for x in node.all_input_nodes]
        shape, batch = self.shapes(node) if isinstance(node.meta.get("val"), Tensor) else ([], None)
        of_shape = name in _CREATE and ("_like" in name or name.startswith("new_"))
        if name in _CREATE and (batch is not None or (of_shape and not isinstance(inputs[0], Uniform))):
            return self._created(node, name, shape, batch)
        if any(isinstance(value, Summed) for value in inputs):
            return self.sums.after(node, name, inputs)
        if not any(isinstance(value, Sample) for value in inputs) and not (name == "expand" and batch is not None):
            if batch is not None:
                raise Unreadable(f"{where(node)} depends on the number of samples")
            return Uniform(node)
        return self.operation(node, name)

    def operation(self, node: fx.Node, name: str) -> Value:
        if name in OPERATIONS:
            return OPERATIONS[name](self, node, self.twin[node])
        if name in TEXTS or name in MASKS:
            if name == "div" and node.kwargs.get("rounding_mode"):
                raise Unreadable(f"{where(node)} with rounding is not read")
            operands = self.operands(node)
            if name.startswith("bitwise") and not all(x.mask for x in operands):
                raise Unreadable(f"{where(node)} of whole numbers is not read")
            masks = len(operands) if name in OF_MASKS else int(name == "where")
            operands = [*map(self.mask_of, operands[:masks]), *map(self.number_of, operands[masks:])]
            return self.pointwise(node, TEXTS.get(name) or MASKS[name], operands, name in MASKS)
        raise Unreadable(f"{where(node)} is not read")

    def _in_place(self, node: fx.Node, name: str) -> Value:
        """An operation that writes into its first operand, which no other value may be a view of; `check` would see it."""
        place = node.args[0]
        assert isinstance(place, fx.Node)
        if not isinstance(self.values[place], Sample):
            raise Unreadable(f"{where(node)} writes into a tensor of func")
        if name == "copy":
            shape, batch = self.shapes(node)
            source = self.sample(node.args[1], self.twin[node].args[1], node)
            result: Value = Sample(np.broadcast_to(source.refs, shape), batch, source.mask)
        else:
            result = self.operation(node, name)
        self.values[place] = result
        return result

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

    def _created(self, node: fx.Node, name: str, shape: list[int], batch: int | None) -> Sample:
        if "full" in name:
            place = 2 if name == "new_full" else 1
            value, twin = node.args[place], self.twin[node].args[place]
            if isinstance(value, fx.Node):
                raise Unreadable(f"{where(node)} with a computed number is not read")
        else:
            value = twin = 1.0 if "ones" in name else 0.0
        mask = str(node.meta["val"].dtype) == "torch.bool"
        return Sample(self.program.full(shape, float(self.same_number(value, twin, node))), batch, mask)
