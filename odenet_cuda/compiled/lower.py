"""A recorded graph becomes a program: which values are the same for all samples, which belong to one, which are sums over all.

- Uniform: does not depend on the sample: weights, their transposes, constants. Torch computes them before the solve.
- Sample: numbers of one sample, as addresses. The axis of the batch is kept with the entries that one sample has in it.
- Summed: a sum over the samples, a gradient of a uniform value. The kernel adds up; torch does what comes after, which
  must be linear; where that needs the time of a sample, the kernel does it before it adds up.

An operation that would mix samples is refused.
"""

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from .pointwise import MASKS, OF_MASKS, TEXTS, packet, power
from .program import SHIFT, Linear, Pointwise, Program, Reduce, Refs, Sum, split
from .trace import BATCHES, Recording, Unreadable, value_of


@dataclass
class Sample:
    """Addresses in the traced shape, but for the axis `batch`, which has the entries of one sample; None: no such axis."""

    refs: Refs
    batch: int | None
    mask: bool = False


@dataclass
class Uniform:
    node: fx.Node


@dataclass
class Summed:
    node: fx.Node


Value = Sample | Uniform | Summed

_LINEAR = {"view", "_unsafe_view", "reshape", "permute", "transpose", "t", "squeeze", "unsqueeze", "expand"}  # for `Summed`
_LINEAR |= {"neg", "sum", "slice", "select", "clone", "alias", "detach"}
_CREATE = {
    "full",
    "zeros",
    "ones",
    "empty",
    "full_like",
    "zeros_like",
    "ones_like",
    "new_zeros",
    "new_ones",
    "new_full",
    "empty_permuted",
}


def where(node: fx.Node) -> str:
    """The operation and the line of the user's source it comes from."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip().startswith("File")]
    lines = [line for line in lines if "/torch/" not in line and "odenet_cuda/compiled/" not in line]
    return f"{packet(node.target)}" + (f" ({lines[-1]})" if lines else "")


class Lowering:
    def __init__(self, recording: Recording, sizes: list[int], arguments: list[int]):
        """sizes: numbers of a sample in each leaf; arguments: the same of each batched argument."""
        self.recording, self.program = recording, Program()
        self.values: dict[fx.Node, Value] = {}
        self.tainted: set[int] = set()  # buffers that depend on the incoming gradient
        self.summed: dict[fx.Node, int] = {}  # node -> index among the program's sums
        self.constants: dict[fx.Node, int] = {}  # node -> buffer
        self.tuples: dict[fx.Node, list[Sample]] = {}  # operations with several results
        self.transposed: set[fx.Node] = set()  # sums that the kernel gives transposed
        self.addends: dict[fx.Node, Refs] = {}  # what one sample adds to a sum, where that was asked for
        self.sum_shapes: dict[fx.Node, list[int]] = {}
        program = self.program
        self.time = program.new("input", 1, "t")
        self.y = program.new("input", sum(sizes), "y")
        self.arguments = program.new("input", sum(arguments), "arguments")
        self.g = program.new("input", sum(sizes), "g")
        self.tainted.add(self.g)
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

    def number(self, x: Any, twin: Any, node: fx.Node) -> Any:
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
                    parts.append(np.full(size, program.literal(0.0), np.int64))
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
                kind = self.values[value] = self.add_sum(value, kind.refs.reshape(1, -1), None)
            if isinstance(kind, Sample):
                raise Unreadable(f"{where(value)}: the gradient of a tensor of func was not read")
            self.gradients.append(value if isinstance(kind, Summed) else None)  # what does not depend on g is 0
        self._keep_needed_sums()

    def _keep_needed_sums(self) -> None:
        """A field may add up over the samples for the shape alone, or for its own derivative."""
        needed = {node for node in self.gradients if node is not None}
        for node in reversed(list(self.recording.graphs[0].nodes)):
            if node in needed and node not in self.summed:
                needed |= set(node.all_input_nodes)
        kept = [node for node in self.summed if node in needed]
        self.program.sums = [self.program.sums[self.summed[node]] for node in kept]
        self.summed = {node: index for index, node in enumerate(kept)}

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
            refs = np.full(tuple(value.shape), self.program.literal(float(node.args[filled])), np.int64)  # type: ignore[arg-type]
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
                np.array(self.program.literal(float(self.number(x, twin, node))), np.int64), None, isinstance(x, bool)
            )
        raise Unreadable(f"{where(node)} has an operand {type(x).__name__}")

    def pointwise(self, node: fx.Node, text: str, operands: list[Sample], mask: bool = False) -> Sample:
        shape, batch = self.shapes(node)
        for operand in operands:
            if operand.batch is not None and (batch is None or operand.refs.ndim - operand.batch != len(shape) - batch):
                raise Unreadable(f"{where(node)} mixes samples")
        spread = [np.broadcast_to(operand.refs, shape).reshape(-1) for operand in operands]
        return Sample(self.statement(text, spread, mask).reshape(shape), batch, mask)

    def statement(self, text: str, operands: list[Refs], mask: bool = False) -> Refs:
        out = self.program.new("local", len(operands[0]), mask=mask)
        self.program.statements.append(Pointwise(out, text, operands))
        self._taint(out, operands)
        return self.program.addresses(out)

    def _taint(self, out: int, operands: list[Refs]) -> None:
        if any(self.depends(refs) for refs in operands):
            self.tainted.add(out)

    def depends(self, refs: Refs) -> bool:
        """Whether any of these numbers depends on the incoming gradient."""
        return any(int(buffer) in self.tainted for buffer in np.unique(split(refs)[0]))

    def numbers(self, node: Any) -> np.ndarray:
        """A uniform value that is known now, such as an index."""
        if not isinstance(self.values[node], Uniform):
            raise Unreadable(f"{where(node)} is computed from the state")
        known = {n: self.recording.constant(n) for n in self.recording.graphs[0].nodes if n.op == "get_attr"}
        return value_of(node, known).detach().cpu().numpy()

    def is_constant(self, refs: Refs) -> bool:
        return self.program.buffers[int(split(refs)[0].flat[0])].kind == "constant"

    def packed(self, refs: Refs) -> Refs:
        """The same numbers side by side in one buffer."""
        buffers, places = split(refs)
        ordered = (buffers == buffers[0]).all() and (np.diff(places) == 1).all() if len(refs) > 1 else True
        first = self.program.buffers[int(buffers[0])]
        if ordered and first.kind in ("local", "input") and first.name != "t":
            return refs
        return self.statement("{0}", [refs])

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
            return self._after_sum(node, name, inputs)
        if not any(isinstance(value, Sample) for value in inputs) and not (name == "expand" and batch is not None):
            if batch is not None:
                raise Unreadable(f"{where(node)} depends on the number of samples")
            return Uniform(node)
        return self._operation(node, name)

    def _operation(self, node: fx.Node, name: str) -> Value:
        from .operations import OPERATIONS

        if name in OPERATIONS:
            return OPERATIONS[name](self, node, self.twin[node])
        twin = self.twin[node]
        if name == "pow":
            return self._power(node, twin)
        if name in ("add", "sub"):
            alpha = node.kwargs.get("alpha", 1)
            sign = "+" if name == "add" else "-"
            text = f"{{0}} {sign} {{1}}" if alpha == 1 else f"{{0}} {sign} {{1}} * {{2}}"
            operands = [self.sample(x, y, node) for x, y in zip(node.args, twin.args, strict=True)]
            return self.pointwise(node, text, operands if alpha == 1 else [*operands, self.sample(alpha, alpha, node)])
        if name == "clamp":
            return self._clamp(node, twin)
        if name in TEXTS or name in MASKS:
            if name == "div" and node.kwargs.get("rounding_mode"):
                raise Unreadable(f"{where(node)} with rounding is not read")
            operands = [self.sample(x, y, node) for x, y in zip(node.args, twin.args, strict=True)]
            if any(x.mask for x in operands[name == "where" :]) and name not in OF_MASKS:
                operands = (
                    [operands[0], *map(self._number_of, operands[1:])] if name == "where" else [*map(self._number_of, operands)]
                )
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
            result = self._operation(node, name)
        self.values[place] = result
        return result

    def _number_of(self, value: Sample) -> Sample:
        """A comparison as 1 and 0."""
        if not value.mask:
            return value
        if value.refs.ndim == 0 and self.program.buffers[int(split(value.refs)[0])].kind == "literal":
            return Sample(value.refs, None)
        flat = value.refs.reshape(-1)
        one, zero = (np.full(flat.shape, self.program.literal(x), np.int64) for x in (1.0, 0.0))
        return Sample(self.statement("select({0}, {1}, {2})", [flat, one, zero]).reshape(value.refs.shape), value.batch)

    def _after_sum(self, node: fx.Node, name: str, inputs: list[Value]) -> Value:
        """Torch goes on with the sum, where only uniform values meet it; the kernel does sample by sample where others do, of
        the time alone, before it adds up. Both need the operation to be linear in the sums."""
        summed = [isinstance(value, Summed) for value in inputs]
        if name in ("mul", "mm"):
            fine = sum(summed) == 1
        elif name in ("add", "sub", "cat"):
            fine = all(summed) and not any(isinstance(x, (int, float)) for x in node.args[:2])
        elif name == "div":
            fine = isinstance(self.values[node.args[0]], Summed) and sum(summed) == 1  # type: ignore[index]
        elif name == "where":
            fine = not summed[0] and all(map(self._is_zero_or_sum, node.args[1:]))
        elif name in ("slice_scatter", "select_scatter"):
            fine = all(map(self._is_zero_or_sum, node.args[:2]))
        elif name == "_weight_norm_interface_backward":
            fine = summed == [True, False, False, False] and not any(isinstance(value, Sample) for value in inputs)
        else:
            fine = name in _LINEAR and all(summed)
        if not fine or (isinstance(node.meta["val"], Tensor) and self.shapes(node)[1] is not None):
            raise Unreadable(f"{where(node)} of a sum over samples")
        if name != "where" and not any(isinstance(value, Sample) for value in inputs):
            return Summed(node)
        if name == "mm" and node.args[0].meta["val"].shape[1] == 1:  # type: ignore[union-attr]
            operands: list[Any] = list(node.args)
            a, b = (self.addend(x) if isinstance(self.values[x], Summed) else self.sample(x, x, node).refs for x in operands)
            return self.add_sum(node, a.T, b)
        self.addends[node] = self._of_addends(node)
        return self.add_sum(node, self.addends[node].reshape(1, -1), None)

    def addend(self, node: fx.Node) -> Refs:
        """What one sample adds to a sum over samples."""
        if node not in self.addends:
            refs = self._products(self.program.sums[self.summed[node]]) if node in self.summed else self._of_addends(node)
            self.addends[node] = (refs.T if node in self.transposed else refs).reshape(self.shapes(node)[0])
        return self.addends[node]

    def _of_addends(self, node: fx.Node) -> Refs:
        """The operation of a node on what one sample adds to its operands."""
        sums = {x: self.values[x] for x in node.all_input_nodes if isinstance(self.values[x], Summed)}
        self.values.update({x: Sample(self.addend(x), None) for x in sums})
        try:
            result = self._operation(node, packet(node.target))
        finally:
            self.values.update(sums)
        assert isinstance(result, Sample)
        return result.refs

    def _products(self, s: Sum) -> Refs:
        if s.b is None:
            return self.reduce(s.a.T, False)
        rows, columns = s.a.shape[1], s.b.shape[1]
        products = [
            self.statement("{0} * {1}", [np.repeat(a, columns), np.tile(b, rows)]) for a, b in zip(s.a, s.b, strict=True)
        ]
        return self.reduce(np.stack(products, 1), False).reshape(rows, columns)

    def _is_zero_or_sum(self, x: Any) -> bool:
        if isinstance(self.values.get(x), Summed):
            return True
        return bool((self.sample(x, x, x).refs == self.program.literal(0.0)).all())

    def _created(self, node: fx.Node, name: str, shape: list[int], batch: int | None) -> Sample:
        if "full" in name:
            place = 2 if name == "new_full" else 1
            value, twin = node.args[place], self.twin[node].args[place]
            if isinstance(value, fx.Node):
                raise Unreadable(f"{where(node)} with a computed number is not read")
        else:
            value = twin = 1.0 if "ones" in name else 0.0
        mask = str(node.meta["val"].dtype) == "torch.bool"
        return Sample(np.full(shape, self.program.literal(float(self.number(value, twin, node))), np.int64), batch, mask)

    def _power(self, node: fx.Node, twin: fx.Node) -> Sample:
        x, exponent = (self.sample(a, b, node) for a, b in zip(node.args, twin.args, strict=True))
        text = power(float(node.args[1])) if isinstance(node.args[1], (int, float)) else "pow({0}, {1})"
        return self.pointwise(node, text, [x, exponent])

    def _clamp(self, node: fx.Node, twin: fx.Node) -> Sample:
        bounds = [*node.args[1:], *[None] * (3 - len(node.args))]
        bounds = [node.kwargs.get(name, bound) for name, bound in zip(("min", "max"), bounds, strict=True)]
        text, operands = "{0}", [self.sample(node.args[0], twin.args[0], node)]
        for bound, function in zip(bounds, ("maximum", "minimum"), strict=True):
            if bound is not None:
                text = f"{function}({text}, {{{len(operands)}}})"
                operands.append(self.sample(bound, bound, node))
        return self.pointwise(node, text, operands)

    # Sums over samples

    def add_sum(self, node: fx.Node, a: Refs, b: Refs | None) -> Summed:
        """a [k, rows], b [k, columns]; the result of `node` has rows x columns numbers, or rows."""
        if b is not None and self.depends(b):
            if self.depends(a):
                raise Unreadable(f"{where(node)}: a gradient that is not linear")
            self.transposed.add(node)
            a, b = b, a
        self.summed[node] = len(self.program.sums)
        self.sum_shapes[node] = list(node.meta["val"].shape)
        self.program.sums.append(Sum(a, b))
        return Summed(node)

    # Matrix products

    def matrix(self, node: fx.Node, x: Refs, weight: Refs, bias: Refs | None) -> Refs:
        """out[r] = bias[r] + sum_c weight[r, c] x[c]"""
        rows, columns = weight.shape
        buffers, places = split(weight)
        kind = self.program.buffers[int(buffers.flat[0])].kind
        row = int(places[1, 0] - places[0, 0]) if rows > 1 else 1
        column = int(places[0, 1] - places[0, 0]) if columns > 1 else 1
        regular = (buffers == buffers.flat[0]).all() and kind == "constant"
        grid = places[0, 0] + row * np.arange(rows)[:, None] + column * np.arange(columns)
        if not (regular and (grid == places).all()):
            products = self.statement("{0} * {1}", [weight.reshape(-1), np.tile(x, rows)]).reshape(rows, columns)
            out = self.reduce(products, False)
            return out if bias is None else self.statement("{0} + {1}", [out, bias])
        if not (x == x[0]).all() or columns == 1:
            x = self.packed(x)
        else:
            x = self.statement("{0}", [x])
        result = self.program.new("local", rows)
        linear = Linear(result, rows, columns, int(buffers.flat[0]), int(places[0, 0]), row, column, x, bias)
        self.program.statements.append(linear)
        self._taint(result, [x] if bias is None else [x, bias])
        return self.program.addresses(result)

    def reduce(self, operand: Refs, largest: bool) -> Refs:
        """[n, m] -> [n]"""
        if operand.shape[1] == 1:
            return operand[:, 0]
        out = self.program.new("local", len(operand))
        self.program.statements.append(Reduce(out, largest, operand))
        self._taint(out, [operand])
        return self.program.addresses(out)
