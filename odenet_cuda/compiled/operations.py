"""Operations that no single expression says: those that move numbers about, sums, matrix products, and those with options."""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from .lowered import Lowered
from .pointwise import power
from .program import Refs
from .trace import Unreadable
from .values import Sample, Value, where

Operation: TypeAlias = Callable[[Lowered, Any, Any], Value]  # the node, and that of the other recording
OPERATIONS: dict[str, Operation] = {}


def operation(*names: str) -> Callable[[Operation], Operation]:
    def add(function: Operation) -> Operation:
        for name in names:
            OPERATIONS[name] = function
        return function

    return add


def source_of(low: Lowered, node: Any, place: int = 0) -> Sample:
    return low.sample(node.args[place], low.twin[node].args[place], node)


def axis_of(value: Sample, axis: Any, node: Any, extra: int = 0) -> int:
    axis = int(axis) % (value.refs.ndim + extra)
    if extra == 0 and axis == value.batch:
        raise Unreadable(f"{where(node)} takes samples apart")
    return axis


def rearranged(low: Lowered, node: Any, value: Sample, refs: Refs) -> Sample:
    shape, batch = low.shapes(node)
    if list(refs.shape) != shape:
        raise Unreadable(f"{where(node)} is not read")
    return Sample(refs, batch, value.mask)


@operation("clone", "alias", "detach", "contiguous", "lift_fresh_copy", "positive", "view_as", "_to_copy", "to")
def _same(low: Lowered, node: Any, twin: Any) -> Value:
    value = source_of(low, node)
    if node.meta["val"].dtype != node.args[0].meta["val"].dtype:
        of_mask = str(node.args[0].meta["val"].dtype) == "torch.bool"  # as a mask, or as 1 and 0
        if of_mask and node.meta["val"].dtype.is_floating_point:
            return low.number_of(value)
        raise Unreadable(f"{where(node)} changes the type to {node.meta['val'].dtype}")
    return value


@operation("view", "_unsafe_view", "reshape", "squeeze", "unsqueeze")
def _view(low: Lowered, node: Any, twin: Any) -> Value:
    value = source_of(low, node)
    return rearranged(low, node, value, value.refs.reshape(low.shapes(node)[0]))


@operation("as_strided")
def _as_strided(low: Lowered, node: Any, twin: Any) -> Value:
    """As a view in the same order: of what is contiguous, all of it, to what is."""
    x, value = node.args[0].meta["val"], node.meta["val"]
    all_of_it = x.is_contiguous() and value.is_contiguous() and x.numel() == value.numel() and len(node.args) < 4
    if not all_of_it or {source_of(low, node).batch, low.shapes(node)[1]} not in ({0}, {None}):
        raise Unreadable(f"{where(node)} is not read")
    return _view(low, node, twin)


@operation("expand")
def _expand(low: Lowered, node: Any, twin: Any) -> Value:
    value = source_of(low, node)
    return rearranged(low, node, value, np.broadcast_to(value.refs, low.shapes(node)[0]))


@operation("repeat")
def _repeat(low: Lowered, node: Any, twin: Any) -> Value:
    value, counts = source_of(low, node), list(node.args[1])
    refs = value.refs.reshape((1,) * (len(counts) - value.refs.ndim) + value.refs.shape)
    shape, batch = low.shapes(node)
    if batch is not None and refs.shape[batch] != shape[batch]:
        raise Unreadable(f"{where(node)} repeats samples")
    if batch is not None:
        counts[batch] = 1
    return rearranged(low, node, value, np.tile(refs, counts))


@operation("permute")
def _permute(low: Lowered, node: Any, twin: Any) -> Value:
    value = source_of(low, node)
    return rearranged(low, node, value, value.refs.transpose([int(axis) for axis in node.args[1]]))


@operation("transpose")
def _transpose(low: Lowered, node: Any, twin: Any) -> Value:
    value = source_of(low, node)
    return rearranged(low, node, value, value.refs.swapaxes(int(node.args[1]), int(node.args[2])))


@operation("t")
def _t(low: Lowered, node: Any, twin: Any) -> Value:
    value = source_of(low, node)
    return rearranged(low, node, value, value.refs.T)


@operation("select")
def _select(low: Lowered, node: Any, twin: Any) -> Value:
    value = source_of(low, node)
    axis = axis_of(value, node.args[1], node)
    return rearranged(low, node, value, value.refs.take(int(node.args[2]), axis))


def _range(node: Any, first: int, size: int) -> slice:
    start, end, step = (*node.args[first:], *[None] * 3)[:3]
    return slice(*slice(start, min(int(end), size) if end is not None else None, step).indices(size))


@operation("slice")
def _slice(low: Lowered, node: Any, twin: Any) -> Value:
    value = source_of(low, node)
    axis = int(node.args[1]) % value.refs.ndim if len(node.args) > 1 else 0
    if axis == value.batch:
        if low.shapes(node)[0] != list(value.refs.shape) or _range(node, 2, 1 << 40) != slice(0, 1 << 40, 1):
            raise Unreadable(f"{where(node)} takes samples apart")
        return value
    index: list[Any] = [slice(None)] * value.refs.ndim
    index[axis] = _range(node, 2, value.refs.shape[axis])
    return rearranged(low, node, value, value.refs[tuple(index)])


@operation("slice_scatter", "select_scatter")
def _scatter(low: Lowered, node: Any, twin: Any) -> Value:
    value, source = source_of(low, node), source_of(low, node, 1)
    axis = axis_of(value, node.args[2] if len(node.args) > 2 else 0, node)
    index: list[Any] = [slice(None)] * value.refs.ndim
    of_slice = "slice" in str(node.target)
    index[axis] = _range(node, 3, value.refs.shape[axis]) if of_slice else int(node.args[3])
    refs = np.broadcast_to(value.refs, low.shapes(node)[0]).copy()
    refs[tuple(index)] = source.refs
    return rearranged(low, node, value, refs)


@operation("cat")
def _cat(low: Lowered, node: Any, twin: Any) -> Value:
    parts = [low.sample(x, x, node) for x in node.args[0]]
    shape, batch = low.shapes(node)
    axis = (int(node.args[1]) if len(node.args) > 1 else 0) % len(shape)
    if axis == batch:
        raise Unreadable(f"{where(node)} puts samples together")
    refs = [part.refs for part in parts if part.refs.ndim == len(shape)]  # torch lets an empty tensor pass
    return Sample(np.concatenate(refs, axis), batch, parts[0].mask)


@operation("split", "split_with_sizes")
def _split(low: Lowered, node: Any, twin: Any) -> Value:
    value = source_of(low, node)
    axis = axis_of(value, node.args[2] if len(node.args) > 2 else 0, node)
    sizes = [part.shape[axis] for part in node.meta["val"]]
    parts = np.split(value.refs, np.cumsum(sizes)[:-1].tolist(), axis)
    low.tuples[node] = [Sample(part, value.batch, value.mask) for part in parts]
    return low.tuples[node][0]


@operation("flip")
def _flip(low: Lowered, node: Any, twin: Any) -> Value:
    value = source_of(low, node)
    axes = [axis_of(value, axis, node) for axis in node.args[1]]
    return rearranged(low, node, value, np.flip(value.refs, tuple(axes)))


@operation("roll")
def _roll(low: Lowered, node: Any, twin: Any) -> Value:
    value = source_of(low, node)
    if len(node.args) < 3:
        raise Unreadable(f"{where(node)} rolls through the samples")
    axes = [axis_of(value, axis, node) for axis in node.args[2]]
    return rearranged(low, node, value, np.roll(value.refs, tuple(node.args[1]), tuple(axes)))


@operation("constant_pad_nd")
def _pad(low: Lowered, node: Any, twin: Any) -> Value:
    value = source_of(low, node)
    pads = list(node.args[1])
    number = float(node.args[2]) if len(node.args) > 2 else 0.0
    refs = value.refs
    for i in range(0, len(pads), 2):
        axis = refs.ndim - 1 - i // 2
        if (pads[i] or pads[i + 1]) and axis == value.batch:
            raise Unreadable(f"{where(node)} adds samples")
        lengths = [list(refs.shape), list(refs.shape)]
        for j in (0, 1):
            lengths[j][axis] = max(pads[i + j], 0)
        ends = [low.program.full(length, number) for length in lengths]
        inner: list[Any] = [slice(None)] * refs.ndim
        inner[axis] = slice(max(-pads[i], 0), refs.shape[axis] - max(-pads[i + 1], 0))
        refs = np.concatenate([ends[0], refs[tuple(inner)], ends[1]], axis)
    return rearranged(low, node, value, refs)


@operation("index_select")
def _index_select(low: Lowered, node: Any, twin: Any) -> Value:
    value = source_of(low, node)
    axis = axis_of(value, node.args[1], node)
    return rearranged(low, node, value, value.refs.take(low.numbers(node.args[2]), axis))


def _places(low: Lowered, node: Any, value: Sample) -> tuple[Any, ...]:
    places = list(node.args[1]) + [None] * (value.refs.ndim - len(node.args[1]))
    if value.batch is not None and places[value.batch] is not None:
        raise Unreadable(f"{where(node)} takes samples apart")
    return tuple(slice(None) if place is None else low.numbers(place) for place in places)


@operation("index")
def _index(low: Lowered, node: Any, twin: Any) -> Value:
    value = source_of(low, node)
    return rearranged(low, node, value, value.refs[_places(low, node, value)])


@operation("index_put", "_unsafe_index_put", "_index_put_impl")
def _index_put(low: Lowered, node: Any, twin: Any) -> Value:
    value, source = source_of(low, node), source_of(low, node, 2)
    accumulate = bool(node.args[3]) if len(node.args) > 3 else False
    refs = np.broadcast_to(value.refs, low.shapes(node)[0]).reshape(-1).copy()
    targets = np.arange(refs.size).reshape(low.shapes(node)[0])[_places(low, node, value)]
    for target, new in zip(targets.reshape(-1), np.broadcast_to(source.refs, targets.shape).reshape(-1), strict=True):
        refs[target] = low.program.statement("{0} + {1}", [refs[[target]], np.array([new])])[0] if accumulate else new
    return rearranged(low, node, value, refs.reshape(low.shapes(node)[0]))


@operation("index_add")
def _index_add(low: Lowered, node: Any, twin: Any) -> Value:
    value, source = source_of(low, node), source_of(low, node, 3)
    axis = axis_of(value, node.args[1], node)
    refs = np.moveaxis(np.broadcast_to(value.refs, low.shapes(node)[0]).copy(), axis, 0)
    parts = np.moveaxis(source.refs, axis, 0)
    for place, part in zip(low.numbers(node.args[2]), parts, strict=True):
        total = low.program.statement("{0} + {1}", [refs[place].reshape(-1), part.reshape(-1)])
        refs[place] = total.reshape(refs[place].shape)
    return rearranged(low, node, value, np.moveaxis(refs, 0, axis))


@operation("scatter")
def _scatter_by_places(low: Lowered, node: Any, twin: Any) -> Value:
    """At places that are numbers of the sample."""
    value, places, source = source_of(low, node), source_of(low, node, 2), source_of(low, node, 3)
    axis = axis_of(value, node.args[1], node)
    if places.refs.shape[axis] != 1 or node.kwargs or value.batch != places.batch:
        raise Unreadable(f"{where(node)} is not read")
    refs = np.broadcast_to(value.refs, low.shapes(node)[0]).copy()
    at, new = (np.broadcast_to(x.refs, places.refs.shape).take(0, axis) for x in (places, source))
    parts = [
        low.program.statement(
            "select({0} == {1}, {2}, {3})",
            [at.reshape(-1), low.program.full([at.size], float(i)), new.reshape(-1), old.reshape(-1)],
        ).reshape(at.shape)
        for i, old in enumerate(np.moveaxis(refs, axis, 0))
    ]
    return rearranged(low, node, value, np.stack(parts, axis))


@operation("mm", "addmm")
def _mm(low: Lowered, node: Any, twin: Any) -> Value:
    first = 1 if "addmm" in str(node.target) else 0
    if node.kwargs:
        raise Unreadable(f"{where(node)} with beta or alpha is not read")
    a, b = source_of(low, node, first), source_of(low, node, first + 1)
    shape, batch = low.shapes(node)
    if a.batch == 1 and b.batch == 0 and not first:
        return low.sums.add(node, a.refs.T, b.refs)
    if (a.batch, b.batch) not in ((0, None), (None, 1), (None, None)):
        raise Unreadable(f"{where(node)} mixes samples")
    bias = np.broadcast_to(source_of(low, node).refs, shape) if first else None
    if b.batch is None and not (a.batch is None and low.program.is_constant(a.refs)):  # x [k, in], weight [in, out]
        rows = [low.program.linear(x, b.refs.T, None if bias is None else bias[i]) for i, x in enumerate(a.refs)]
        return Sample(np.stack(rows), batch)
    columns = [low.program.linear(x, a.refs, None if bias is None else bias[:, i]) for i, x in enumerate(b.refs.T)]
    return Sample(np.stack(columns, 1), batch)


@operation("bmm")
def _bmm(low: Lowered, node: Any, twin: Any) -> Value:
    a, b = source_of(low, node), source_of(low, node, 1)
    shape, batch = low.shapes(node)
    count = shape[0]
    if (a.batch, b.batch) == (2, 1) and count == 1:
        return low.sums.add(node, a.refs[0].T, b.refs[0])
    if (a.batch, b.batch) not in ((0, 0), (0, None), (None, 0), (1, None), (None, 2), (None, None)):
        raise Unreadable(f"{where(node)} mixes samples")
    left, right = (np.broadcast_to(x.refs, (count, *x.refs.shape[1:])) for x in (a, b))
    out = [
        np.stack([low.program.linear(right[i, :, column], left[i], None) for column in range(right.shape[2])], 1)
        if b.batch is not None and a.batch is None
        else np.stack([low.program.linear(left[i, row], right[i].T, None) for row in range(left.shape[1])])
        for i in range(count)
    ]
    return Sample(np.stack(out), batch)


@operation("add", "sub")
def _add(low: Lowered, node: Any, twin: Any) -> Value:
    if str(node.meta["val"].dtype) == "torch.bool":
        return low.pointwise(node, "{0} | {1}", [*map(low.mask_of, low.operands(node))], True)
    operands, alpha = [*map(low.number_of, low.operands(node))], node.kwargs.get("alpha", 1)
    sign = "+" if "add" in str(node.target) else "-"
    if alpha == 1:
        return low.pointwise(node, f"{{0}} {sign} {{1}}", operands)
    return low.pointwise(node, f"{{0}} {sign} {{1}} * {{2}}", [*operands, low.sample(alpha, alpha, node)])


@operation("pow")
def _power(low: Lowered, node: Any, twin: Any) -> Value:
    text = power(float(node.args[1])) if isinstance(node.args[1], (int, float)) else "pow({0}, {1})"
    return low.pointwise(node, text, [*map(low.number_of, low.operands(node))])


@operation("clamp")
def _clamp(low: Lowered, node: Any, twin: Any) -> Value:
    bounds = [*node.args[1:], *[None] * (3 - len(node.args))]
    bounds = [node.kwargs.get(name, bound) for name, bound in zip(("min", "max"), bounds, strict=True)]
    text, operands = "{0}", [source_of(low, node)]
    for bound, function in zip(bounds, ("maximum", "minimum"), strict=True):
        if bound is not None:
            text = f"{function}({text}, {{{len(operands)}}})"
            operands.append(low.sample(bound, bound, node))
    return low.pointwise(node, text, operands)
