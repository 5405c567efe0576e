"""Operations that no single expression says: those that move numbers about, sums, matrix products, and those with options."""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from .lowered import Lowered
from .pointwise import TEXTS, power
from .program import Refs
from .trace import Unreadable
from .values import Sample, Value, where

Operation: TypeAlias = Callable[[Lowered, Any, Any], Value]  # the node, and that of the other recording
OPERATIONS: dict[str, Operation] = {}
WHOLE = ("torch.int64", "torch.int32")


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
    before, after = node.args[0].meta["val"].dtype, node.meta["val"].dtype
    if before == after:
        return value
    whole, whole_before = str(after) in WHOLE, str(before) in WHOLE
    if str(after) == "torch.bool":
        return low.mask_of(value)
    if whole and before.is_floating_point:
        return low.pointwise(node, TEXTS["trunc"], [value])
    if str(before) == "torch.bool" and (whole or after.is_floating_point):
        return low.number_of(value)  # as 1 and 0
    if whole_before and (whole or after.is_floating_point):
        return value
    raise Unreadable(f"{where(node)} changes the type to {after}")


@operation("copy")
def _copy(low: Lowered, node: Any, twin: Any) -> Value:
    """Of the second, in the shape of the first."""
    value = source_of(low, node, 1)
    if node.meta["val"].dtype != node.args[1].meta["val"].dtype:
        raise Unreadable(f"{where(node)} changes the type to {node.meta['val'].dtype}")
    return Sample(np.broadcast_to(value.refs, low.shapes(node)[0]), low.shapes(node)[1], value.mask)


@operation("view", "_unsafe_view", "reshape", "squeeze", "unsqueeze")
def _view(low: Lowered, node: Any, twin: Any) -> Value:
    value = source_of(low, node)
    return rearranged(low, node, value, value.refs.reshape(low.shapes(node)[0]))


@operation("as_strided")
def _as_strided(low: Lowered, node: Any, twin: Any) -> Value:
    """Of what lies in memory sample after sample, without gaps."""
    x, source = node.args[0].meta["val"], source_of(low, node)
    shape, batch = low.shapes(node)
    _, _, strides, offset = (*node.args, 0)[:4]
    size = source.refs.size  # of a sample
    in_rows = x.is_contiguous() and source.batch in (None, 0) and (source.batch is None) == (batch is None)
    if not in_rows or [*node.args[2:]] != [*twin.args[2:]]:
        raise Unreadable(f"{where(node)} is not read")
    places = np.full(shape, int(offset), np.int64)
    for axis, stride in enumerate(strides):
        if axis == batch and shape[axis] * stride != size:
            raise Unreadable(f"{where(node)} mixes samples")
        places = places + (np.arange(shape[axis]) * stride).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    if places.size and not 0 <= places.min() <= places.max() < size:
        raise Unreadable(f"{where(node)} mixes samples")
    return rearranged(low, node, source, source.refs.reshape(-1)[places])


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


def _diagonal_of(value: Sample, arguments: tuple[Any, ...], node: Any) -> tuple[Refs, Refs]:
    """The places of a diagonal, as one axis after the others, and all of them."""
    given: tuple[Any, ...] = (*arguments, *(0, 0, 1)[len(arguments) :])
    offset, first, second = given
    axes = [axis_of(value, axis, node) for axis in (first, second)]
    places = np.arange(value.refs.size).reshape(value.refs.shape)
    return np.diagonal(places, int(offset), *axes), places


@operation("diagonal")
def _diagonal(low: Lowered, node: Any, twin: Any) -> Value:
    value = source_of(low, node)
    return rearranged(low, node, value, value.refs.reshape(-1)[_diagonal_of(value, node.args[1:], node)[0]])


@operation("diagonal_scatter")
def _diagonal_scatter(low: Lowered, node: Any, twin: Any) -> Value:
    value, source = source_of(low, node), source_of(low, node, 1)
    refs = np.broadcast_to(value.refs, low.shapes(node)[0]).reshape(-1).copy()
    places, every = _diagonal_of(Sample(refs.reshape(low.shapes(node)[0]), value.batch), node.args[2:], node)
    refs[places.reshape(-1)] = np.broadcast_to(source.refs, places.shape).reshape(-1)
    return rearranged(low, node, value, refs[every])


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


@operation("add", "sub")
def _add(low: Lowered, node: Any, twin: Any) -> Value:
    if str(node.meta["val"].dtype) == "torch.bool":
        return low.pointwise(node, "{0} | {1}", [*map(low.mask_of, low.operands(node))], True)
    operands, alpha = [*map(low.number_of, low.operands(node))], node.kwargs.get("alpha", 1)
    sign = "+" if "add" in str(node.target) else "-"
    if alpha == 1 and sign == "+":
        return low.added(node, *operands)
    if alpha == 1:
        return low.pointwise(node, f"{{0}} {sign} {{1}}", operands)
    return low.pointwise(node, f"{{0}} {sign} {{1}} * {{2}}", [*operands, low.sample(alpha, alpha, node)])


@operation("round")
def _round(low: Lowered, node: Any, twin: Any) -> Value:
    if node.kwargs or len(node.args) > 1:
        raise Unreadable(f"{where(node)} to decimals is not read")
    return low.pointwise(node, "rint({0})", [*map(low.number_of, low.operands(node))])


@operation("div", "true_divide")
def _divide(low: Lowered, node: Any, twin: Any) -> Value:
    texts = {None: "{0} / {1}", "floor": "floor_divide({0}, {1})", "trunc": f"({TEXTS['trunc']})".replace("{0}", "({0} / {1})")}
    return low.pointwise(node, texts[node.kwargs.get("rounding_mode")], [*map(low.number_of, low.operands(node))])


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
