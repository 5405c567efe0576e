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

from . import indexing, lookups, matrices, reductions  # noqa: F401, which add to OPERATIONS
from .lowered import Lowered
from .operations import OPERATIONS
from .pointwise import MASKS, OF_MASKS, TEXTS, packet
from .program import SCALARS, SHIFT, Product, Refs
from .sums import Sums
from .trace import Recording, Unreadable
from .values import Sample, Summed, Uniform, Value, where
from .views import Views, writes

_CREATE = {"full", "zeros", "ones", "empty", "full_like", "zeros_like", "ones_like"}
_CREATE |= {"new_zeros", "new_ones", "new_full", "new_empty", "empty_like", "empty_permuted"}
_CREATE |= {"empty_strided", "new_empty_strided"}


class Lowering(Lowered):
    def __init__(self, recording: Recording, sizes: list[int], arguments: list[int]):
        """sizes: numbers of a sample in each leaf; arguments: the same of each batched argument."""
        super().__init__(recording)
        self.sums: Sums = Sums(self, self.operation)
        program = self.program
        self.time = program.new("input", 1, "t")
        self.y = program.new("input", sum(sizes), "y")
        self.arguments = program.new("input", sum(arguments), "arguments")
        self.g = program.new("input", sum(sizes), "g")
        program.tainted.add(self.g)
        self.v = program.new("input", sum(sizes), "v")
        self.rate = program.new("input", 1, "rate")
        self.run()

    # The walk

    def run(self) -> None:
        first, second = (list(graph.nodes) for graph in self.recording.graphs)
        if len(first) != len(second) or any(
            a.target != b.target for a, b in zip(first, second, strict=True) if a.op == "call_function"
        ):
            raise Unreadable("func does other operations for another number of samples")
        self.twin = dict(zip(first, second, strict=True))
        self.views = Views(self, first)
        places = {"y": 0, "arguments": 0, "g": 0, "v": 0}
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
            if node.op == "call_function":
                self.views.add(node)

    def _input_names(self) -> list[str]:
        n = self.recording.leaves
        tangents = [*["v"] * n, "rate"] if self.recording.second else []
        return ["t", *["y"] * n, *["arguments"] * len(self.recording.batched), *["g"] * n, *tangents]

    def _input(self, node: fx.Node, name: str, places: dict[str, int]) -> None:
        buffers = {"t": self.time, "y": self.y, "arguments": self.arguments, "g": self.g, "v": self.v, "rate": self.rate}
        buffer, (shape, batch) = buffers[name], self.shapes(node)
        if name in SCALARS:
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
                    found = self.as_sample(value)
                parts.append(np.broadcast_to(found.refs, self._shape_of(value, found)).reshape(-1))
            return np.concatenate(parts) if parts else np.zeros(0, np.int64)

        program.slopes = flat(outputs[:n], 0)
        assert len(program.slopes) == state
        size = n + m + len(self.recording.wanted)
        first, later = outputs[n : n + size], outputs[n + size :]
        if self.recording.by_time and (by_time := later.pop(0)) is not None:
            found = self.values[by_time]
            of_sample = self.sums.addend(by_time) if isinstance(found, Summed) else self.sample(by_time, by_time, node).refs
            program.time_product = of_sample.reshape(-1)
        parts = [first, later] if later else [first]
        gradients = [list(map(self._summed, part[n + m :])) for part in parts]
        sums = self.sums.keep(*gradients)
        program.product, *second = [
            Product(flat(part[:n], 0), flat(part[n : n + m], 1), of_part) for part, of_part in zip(parts, sums, strict=True)
        ]
        program.second = second[0] if second else None
        self.gradients: list[list[fx.Node | None]] = gradients  # of the first derivatives, and perhaps of the second

    def _summed(self, value: fx.Node | None) -> fx.Node | None:
        """A result that is a sum over the samples; None where it is 0, as what does not depend on g is."""
        if value is None:
            return None
        kind = self.values[value]
        if isinstance(kind, Sample) and self.recording.whole:
            kind = self.values[value] = self.sums.add(value, kind.refs.reshape(1, -1), None)
        if isinstance(kind, Sample):
            raise Unreadable(f"{where(value)}: the gradient of a tensor of func was not read")
        return value if isinstance(kind, Summed) else None

    def _sizes(self, of: int) -> list[int]:
        nodes = [node for node in self.recording.graphs[0].nodes if node.op == "placeholder"]
        names = self._input_names()
        wanted = "y" if of == 0 else "arguments"
        parts: list[Any] = [self.values[x] for x, name in zip(nodes, names, strict=True) if name == wanted]
        return [part.refs.size for part in parts]

    def _shape_of(self, node: fx.Node, value: Sample) -> tuple[int, ...]:
        return tuple(self.shapes(node)[0])

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
        if writes(node):
            return self._in_place(node, name[:-1])
        inputs = [self.values[x] for x in node.all_input_nodes]
        shape, batch = self.shapes(node) if isinstance(node.meta.get("val"), Tensor) else ([], None)
        of_shape = name in _CREATE and ("_like" in name or name.startswith("new_"))
        of_shape = of_shape and not isinstance(inputs[0], Uniform)
        if name in _CREATE and (batch is not None or of_shape or node in self.views.written):
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
            operands = self.operands(node)
            if name.startswith("bitwise") and not all(x.mask for x in operands):
                raise Unreadable(f"{where(node)} of whole numbers is not read")
            masks = len(operands) if name in OF_MASKS else int(name == "where")
            operands = [*map(self.mask_of, operands[:masks]), *map(self.number_of, operands[masks:])]
            return self.pointwise(node, TEXTS.get(name) or MASKS[name], operands, name in MASKS)
        raise Unreadable(f"{where(node)} is not read")

    def _in_place(self, node: fx.Node, name: str) -> Value:
        """An operation that writes into its first operand."""
        shape, batch = self.shapes(node)
        if name in ("copy", "fill", "zero"):
            source = self.sample(*((0.0, 0.0) if name == "zero" else (node.args[1], self.twin[node].args[1])), node)
            result: Value = Sample(np.broadcast_to(source.refs, shape), batch, source.mask)
        else:
            result = self.operation(node, name)
        if not isinstance(result, Sample):
            raise Unreadable(f"{where(node)} writes into a tensor of func")
        self.views.write(node, result)
        return result

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
