"""Operations over axes: sums, moments, norms, products, largest and smallest numbers, and what is added up in order."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .lowered import Lowered
from .operations import axis_of, operation, rearranged, source_of
from .pointwise import packet
from .program import Refs
from .trace import Unreadable
from .values import Sample, Value, where


def _split_axes(value: Sample, axes: Any) -> tuple[Refs, list[int]]:
    """[kept..., reduced] and the reduced axes."""
    rank = value.refs.ndim
    reduced = sorted(int(axis) % rank for axis in axes) if axes else list(range(rank))
    kept = [axis for axis in range(rank) if axis not in reduced]
    count = int(np.prod([value.refs.shape[axis] for axis in kept]))
    number = int(np.prod([value.refs.shape[axis] for axis in reduced]))
    return value.refs.transpose([*kept, *reduced]).reshape(count, number), reduced


def _of_one_sample(value: Sample, axes: Any, node: Any) -> Refs:
    """[kept..., reduced], where samples are kept apart."""
    refs, reduced = _split_axes(value, axes)
    if value.batch in reduced:
        raise Unreadable(f"{where(node)} mixes samples")
    return refs


def _several(low: Lowered, node: Any, twin: Any, parts: Sequence[Refs]) -> Value:
    """The results of an operation that has several."""
    results = []
    for refs, seen, other in zip(parts, node.meta["val"], twin.meta["val"], strict=True):
        shape, batch = low.shape_of(seen, other, node)
        results.append(Sample(refs.reshape(shape), batch))
    low.tuples[node] = results
    return results[0]


@operation("sum", "mean")
def _sum(low: Lowered, node: Any, twin: Any) -> Value:
    value = low.number_of(source_of(low, node))
    refs, reduced = _split_axes(value, node.args[1] if len(node.args) > 1 else None)
    mean = "mean" in str(node.target)
    if value.batch in reduced:
        if mean:
            raise Unreadable(f"{where(node)} is a mean over samples")
        return low.sums.add(node, low.program.reduce(refs, False)[None], None)
    total = low.program.reduce(refs, False)
    if mean:
        total = low.program.statement("{0} * {1}", [total, low.program.full([len(total)], 1 / refs.shape[1])])
    shape, batch = low.shapes(node)
    return Sample(total.reshape(shape), batch)


def _moments(low: Lowered, node: Any, value: Sample) -> tuple[Refs, Refs]:
    """Mean and variance over the axes of node."""
    arguments = dict(zip(("dim", "correction", "keepdim"), node.args[1:], strict=False)) | node.kwargs
    refs = _of_one_sample(value, arguments.get("dim"), node)
    count = refs.shape[1]
    correction = arguments.get("correction", 1)
    left = count - (1 if correction is None or correction is True else int(correction))
    if left <= 0:
        raise Unreadable(f"{where(node)} has no number left to divide by")

    def scaled(x: Refs, factor: float) -> Refs:
        return low.program.statement("{0} * {1}", [x, low.program.full([len(x)], factor)])

    mean = scaled(low.program.reduce(refs, False), 1 / count)
    squares = low.program.statement("({0} - {1}) * ({0} - {1})", [refs.reshape(-1), np.repeat(mean, count)])
    return mean, scaled(low.program.reduce(squares.reshape(refs.shape), False), 1 / left)


@operation("var")
def _var(low: Lowered, node: Any, twin: Any) -> Value:
    shape, batch = low.shapes(node)
    return Sample(_moments(low, node, source_of(low, node))[1].reshape(shape), batch)


@operation("var_mean")
def _var_mean(low: Lowered, node: Any, twin: Any) -> Value:
    mean, variance = _moments(low, node, source_of(low, node))
    return _several(low, node, twin, (variance, mean))


@operation("linalg_vector_norm")
def _norm(low: Lowered, node: Any, twin: Any) -> Value:
    value = source_of(low, node)
    order = float(node.args[1]) if len(node.args) > 1 else 2.0
    if order not in (1.0, 2.0):
        raise Unreadable(f"{where(node)} of order {order} is not read")
    refs = _of_one_sample(value, node.args[2] if len(node.args) > 2 else None, node)
    parts = low.program.statement("{0} * {0}" if order == 2 else "abs({0})", [refs.reshape(-1)]).reshape(refs.shape)
    total = low.program.reduce(parts, False)
    shape, batch = low.shapes(node)
    return Sample((low.program.statement("sqrt({0})", [total]) if order == 2 else total).reshape(shape), batch)


@operation("cumsum", "cumprod")
def _cumulative(low: Lowered, node: Any, twin: Any) -> Value:
    value = low.number_of(source_of(low, node))
    axis = axis_of(value, node.args[1], node)
    text = "{0} + {1}" if "cumsum" in str(node.target) else "{0} * {1}"
    moved = np.moveaxis(value.refs, axis, 0)
    rows = [moved[0].reshape(-1)]
    for row in moved[1:]:
        rows.append(low.program.statement(text, [rows[-1], row.reshape(-1)]))
    return rearranged(low, node, value, np.moveaxis(np.stack(rows).reshape(moved.shape), 0, axis))


@operation("amax", "amin", "any", "all")
def _extreme(low: Lowered, node: Any, twin: Any) -> Value:
    value = low.number_of(source_of(low, node))
    name, axes = packet(node.target), node.args[1] if len(node.args) > 1 else None
    if name in ("any", "all"):
        value = low.number_of(low.mask_of(value))
    refs = _of_one_sample(value, [axes] if isinstance(axes, int) else axes, node)
    shape, batch = low.shapes(node)
    if name in ("amin", "all"):
        refs = low.program.statement("-{0}", [refs.reshape(-1)]).reshape(refs.shape)
        refs = low.program.statement("-{0}", [low.program.reduce(refs, True)])
        return Sample(refs.reshape(shape), batch)
    return Sample(low.program.reduce(refs, True).reshape(shape), batch)


@operation("max", "min")
def _selected(low: Lowered, node: Any, twin: Any) -> Value:
    """Values, and the first places where they are found, as numbers."""
    value = low.number_of(source_of(low, node))
    if len(node.args) < 2 or not isinstance(node.args[1], int):
        raise Unreadable(f"{where(node)} is not read")
    refs = _of_one_sample(value, [node.args[1]], node)
    sign = "" if packet(node.target) == "max" else "-"
    turned = low.program.statement(f"{sign}{{0}}", [refs.reshape(-1)]).reshape(refs.shape)
    best = low.program.reduce(turned, True)
    count, places = refs.shape[1], low.program.full(best.shape, float(refs.shape[1] - 1))
    for i in reversed(range(count - 1)):
        here = low.program.full(best.shape, float(i))
        places = low.program.statement("select({0} == {1}, {2}, {3})", [turned[:, i], best, here, places])
    best = low.program.statement(f"{sign}{{0}}", [best])
    return _several(low, node, twin, (best, places))


@operation("prod")
def _product(low: Lowered, node: Any, twin: Any) -> Value:
    value = low.number_of(source_of(low, node))
    refs = _of_one_sample(value, [node.args[1]] if len(node.args) > 1 else None, node)
    result = refs[:, 0]
    for i in range(1, refs.shape[1]):
        result = low.program.statement("{0} * {1}", [result, refs[:, i]])
    shape, batch = low.shapes(node)
    return Sample(result.reshape(shape), batch)
