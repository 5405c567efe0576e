"""Places that are computed, from the time or the state: where a number lies among fixed ones, what lies at a place, what a
place gets, and what order numbers have. A place is a whole number, kept as a number like others."""

from typing import Any

import numpy as np

from .lowered import Lowered
from .operations import axis_of, operation, rearranged, source_of
from .places import grid_text
from .pointwise import packet
from .program import Refs
from .trace import Unreadable
from .values import Sample, Uniform, Value, where

_MOST_SORTED = 32  # of which all pairs are compared


@operation("bucketize", "searchsorted")
def _interval(low: Lowered, node: Any, twin: Any) -> Value:
    """How many of the knots, which are in order, are less; or not larger, from the right."""
    of_knots = 0 if packet(node.target) == "searchsorted" else 1
    knots, value = node.args[of_knots], source_of(low, node, 1 - of_knots)
    if not isinstance(low.values[knots], Uniform) or knots.meta["val"].dim() != 1 or node.kwargs.get("sorter") is not None:
        raise Unreadable(f"{where(node)} among knots that are not fixed is not read")
    low.numbers(knots)  # in their order, whatever they are otherwise
    right = node.kwargs.get("right", False) or node.kwargs.get("side") == "right"
    refs, flat = low.as_sample(knots).refs, value.refs.reshape(-1)
    text = f"select({{0}} {'>' if right else '>='} {{1}}, P(T(0)), P(T(1)))"
    less = low.program.statement(text, [np.tile(refs, flat.size), np.repeat(flat, refs.size)])
    shape, batch = low.shapes(node)
    return Sample(low.program.reduce(less.reshape(flat.size, refs.size), False).reshape(shape), batch)


def looked_up(low: Lowered, table: Refs, places: Refs) -> Refs:
    """table [m, n], places [m]: table[i, places[i]]."""
    if table.shape[1] == 1:
        table = np.repeat(table, 2, 1)
    if grid_text(low.program, table) is None:
        table = low.program.statement("{0}", [table.reshape(-1)]).reshape(table.shape)
    return low.program.lookup(table, places)


def spread(low: Lowered, numbers: Refs | None, places: Refs, count: int) -> Refs:
    """numbers and places [m, k]: at [m, count] the sum of those numbers whose place it is. None: 0 to k - 1."""
    m, k = places.shape
    operands = [np.broadcast_to(x[:, None], (m, count, k)).reshape(-1) for x in (places, numbers) if x is not None]
    at, new = "{i}" if k == 1 else f"({{i}} / {k})", f"P(T({{i}} % {k}))" if numbers is None else "{1}"
    parts = low.program.statement(f"select({{0}} == P(T({at} % {count})), {new}, P(T(0)))", operands)
    return low.program.reduce(parts.reshape(m * count, k), False).reshape(m, count)


def wrapped(low: Lowered, places: Sample, count: int) -> Sample:
    """Those below 0 count from the end."""
    flat = places.refs.reshape(-1)
    refs = low.program.statement("select({0} < P(T(0)), {0} + {1}, {0})", [flat, low.program.full(flat.shape, float(count))])
    return Sample(refs.reshape(places.refs.shape), places.batch)


def taken(low: Lowered, node: Any, value: Sample, places: Sample, axis: int) -> Value:
    """value along an axis at these places, whose axes stand where that was."""
    if value.mask:
        found = taken(low, node, low.number_of(value), places, axis)
        assert isinstance(found, Sample)
        return low.mask_of(found)
    shape, batch = low.shapes(node)
    last = np.moveaxis(value.refs, axis, -1)
    ahead, behind = value.refs.shape[:axis], value.refs.shape[axis + 1 :]
    inner = places.refs.shape
    full = (*ahead, *inner, *behind)
    if list(full) != shape or (places.batch is not None and (value.batch is not None or axis + places.batch != batch)):
        raise Unreadable(f"{where(node)} mixes samples")
    table = last.reshape(*ahead, *[1] * len(inner), *behind, -1)
    table = np.broadcast_to(table, (*full, table.shape[-1])).reshape(-1, table.shape[-1])
    at = np.broadcast_to(places.refs.reshape(*inner, *[1] * len(behind)), full).reshape(-1)
    return Sample(looked_up(low, table, at).reshape(full), batch)


def put_back(low: Lowered, node: Any, value: Sample, places: Sample, source: Sample, axis: int) -> Value:
    """value, and at these places along an axis what is added there: the way back of `taken`."""
    shape, inner = low.shapes(node)[0], places.refs.shape
    full = (*shape[:axis], *inner, *shape[axis + 1 :])
    axes = list(range(axis, axis + len(inner)))
    count = shape[axis]

    def last(refs: Refs) -> Refs:
        refs = np.moveaxis(np.broadcast_to(refs, full), axes, list(range(-len(inner), 0)) if inner else [])
        return refs.reshape(-1, int(np.prod(inner)))

    at = last(places.refs.reshape(*inner, *[1] * (len(shape) - axis - 1)))
    sums = spread(low, last(source.refs), at, count)
    if places.batch is not None and value.batch is None:
        zero = (value.refs == low.program.literal(0.0)).all()
        if not zero:
            raise Unreadable(f"{where(node)} mixes samples")
        moved = np.moveaxis(sums.reshape(*shape[:axis], *shape[axis + 1 :], count), -1, axis)
        return low.sums.add(node, moved.reshape(1, -1), None)
    return _added(low, node, value, sums, axis)


def _added(low: Lowered, node: Any, value: Sample, sums: Refs, axis: int) -> Value:
    shape = low.shapes(node)[0]
    sums = np.moveaxis(sums.reshape(*shape[:axis], *shape[axis + 1 :], shape[axis]), -1, axis)
    before = np.broadcast_to(value.refs, shape)
    if (before == low.program.literal(0.0)).all():
        return rearranged(low, node, value, sums)
    total = low.program.statement("{0} + {1}", [before.reshape(-1), sums.reshape(-1)])
    return rearranged(low, node, value, total.reshape(shape))


@operation("gather")
def _gather(low: Lowered, node: Any, twin: Any) -> Value:
    value, places = source_of(low, node), source_of(low, node, 2)
    axis = axis_of(value, node.args[1], node)
    shape, batch = low.shapes(node)
    refs = low.number_of(value).refs[tuple(slice(n) if i != axis else slice(None) for i, n in enumerate(shape))]
    if value.batch != places.batch and None not in (value.batch, places.batch):
        raise Unreadable(f"{where(node)} mixes samples")
    table = np.moveaxis(refs, axis, -1)[..., None, :]
    table = np.broadcast_to(table, (*table.shape[:-2], shape[axis], table.shape[-1]))
    at = np.moveaxis(places.refs, axis, -1)
    found = looked_up(low, table.reshape(-1, table.shape[-1]), at.reshape(-1)).reshape(at.shape)
    result = Sample(np.moveaxis(found, -1, axis), batch)
    return low.mask_of(result) if value.mask else result


@operation("embedding")
def _embedding(low: Lowered, node: Any, twin: Any) -> Value:
    return taken(low, node, source_of(low, node), source_of(low, node, 1), 0)


@operation("embedding_dense_backward")
def _embedding_back(low: Lowered, node: Any, twin: Any) -> Value:
    grad, places, (count, padding, by_frequency) = source_of(low, node), source_of(low, node, 1), node.args[2:5]
    inner = places.refs.size
    if by_frequency or grad.batch is None:
        raise Unreadable(f"{where(node)} is not read")
    numbers = grad.refs.reshape(inner, -1).T  # [numbers of a row, places]
    at = np.broadcast_to(places.refs.reshape(1, -1), numbers.shape)
    sums = spread(low, numbers, at, int(count)).T
    if padding >= 0:
        sums = sums.copy()
        sums[int(padding)] = low.program.literal(0.0)
    return low.sums.add(node, sums.reshape(1, -1), None)


@operation("scatter")
def _scatter(low: Lowered, node: Any, twin: Any) -> Value:
    """Of several numbers for a place the last."""
    value, places, source = source_of(low, node), source_of(low, node, 2), source_of(low, node, 3)
    axis = axis_of(value, node.args[1], node)
    base, at, new = _rows_of(low, node, low.number_of(value), places, low.number_of(source), axis)
    count = base.shape[1]
    text = f"select({{0}} == P(T({{i}} % {count})), {{1}}, {{2}})"
    flat = base.reshape(-1)
    for j in range(at.shape[1]):
        flat = low.program.statement(text, [np.repeat(at[:, j], count), np.repeat(new[:, j], count), flat])
    shape = low.shapes(node)[0]
    moved = np.moveaxis(flat.reshape(*shape[:axis], *shape[axis + 1 :], count), -1, axis)
    return low.mask_of(Sample(moved, value.batch)) if value.mask else rearranged(low, node, value, moved)


def _rows_of(low: Lowered, node: Any, value: Sample, places: Sample, source: Sample, axis: int) -> tuple[Refs, Refs, Refs]:
    """value [m, n], places [m, k] and source [m, k] of a scatter."""
    shape = low.shapes(node)[0]
    inner = places.refs.shape
    others = [n for i, n in enumerate(shape) if i != axis]
    if node.kwargs or [n for i, n in enumerate(inner) if i != axis] != others or places.batch not in (None, value.batch):
        raise Unreadable(f"{where(node)} is not read")
    new = source.refs[tuple(map(slice, inner))] if source.refs.ndim else np.broadcast_to(source.refs, inner)
    base, at, new = (np.moveaxis(x, axis, -1) for x in (np.broadcast_to(value.refs, shape), places.refs, new))
    return base.reshape(-1, shape[axis]), at.reshape(-1, inner[axis]), new.reshape(-1, inner[axis])


@operation("scatter_add")
def _scatter_add(low: Lowered, node: Any, twin: Any) -> Value:
    value, places, source = source_of(low, node), source_of(low, node, 2), source_of(low, node, 3)
    axis = axis_of(value, node.args[1], node)
    _, at, numbers = _rows_of(low, node, value, places, source, axis)
    return _added(low, node, value, spread(low, numbers, at, low.shapes(node)[0][axis]), axis)


def _order(low: Lowered, refs: Refs, descending: bool) -> Refs:
    """[m, n]: the place of each number among its row in order; equal ones keep theirs, and what is none is the largest."""
    m, n = refs.shape
    a, b = (np.broadcast_to(x, (m, n, n)).reshape(-1) for x in (refs[:, None, :], refs[:, :, None]))  # a before b?
    more, less = ("{1} < {0}", "{0} < {1}") if not descending else ("{0} < {1}", "{1} < {0}")
    nan_a, nan_b = "({0} != {0})", "({1} != {1})"
    first, last = (nan_b, nan_a) if not descending else (nan_a, nan_b)  # of these comes the other before
    before = f"({less}) | ({first} & negate{last})"
    after = f"({more}) | ({last} & negate{first})"
    earlier = f"P(T({{i}} % {n})) < P(T({{i}} / {n} % {n}))"
    text = f"select({before}, P(T(1)), select(({after}) | negate({earlier}), P(T(0)), P(T(1))))"
    return low.program.reduce(low.program.statement(text, [a, b]).reshape(m * n, n), False).reshape(m, n)


@operation("sort", "topk")
def _sorted(low: Lowered, node: Any, twin: Any) -> Value:
    """Values and places, of so many numbers that all pairs can be compared."""
    value = low.number_of(source_of(low, node))
    given: list[Any] = list(node.args[1:])
    top = packet(node.target) == "topk"
    count = int(given.pop(0)) if top else None
    names = ("dim", "largest", "sorted") if top else ("dim", "descending")
    options = {"dim": -1, "largest": True, "descending": False} | dict(zip(names, given, strict=False)) | node.kwargs
    axis = axis_of(value, options["dim"], node)
    rows = np.moveaxis(value.refs, axis, -1)
    flat = rows.reshape(-1, rows.shape[-1])
    m, n = flat.shape
    if n > _MOST_SORTED:
        raise Unreadable(f"{where(node)} of {n} numbers, more than {_MOST_SORTED}, is not read")
    order = _order(low, flat, bool(options["largest"] if top else options["descending"]))
    places = spread(low, None, order, n)[:, : n if count is None else count]
    k = places.shape[1]
    table = np.broadcast_to(flat[:, None], (m, k, n)).reshape(-1, n)
    found = looked_up(low, table, places.reshape(-1)).reshape(m, k)
    parts = [np.moveaxis(x.reshape(*rows.shape[:-1], k), -1, axis) for x in (found, places)]
    results = []
    for refs, seen, other in zip(parts, node.meta["val"], twin.meta["val"], strict=True):
        results.append(Sample(refs, low.shape_of(seen, other, node)[1]))
    low.tuples[node] = results
    return results[0]
