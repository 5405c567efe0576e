"""Operations with indices: those that are known now, and of the state where they choose by comparisons."""

from typing import Any

import numpy as np

from .lookups import put_back, taken, wrapped
from .lowered import Lowered
from .operations import axis_of, operation, rearranged, source_of
from .trace import Unreadable
from .values import Sample, Uniform, Value, where


@operation("index_select")
def _index_select(low: Lowered, node: Any, twin: Any) -> Value:
    value = source_of(low, node)
    axis = axis_of(value, node.args[1], node)
    if computed(low, node.args[2]):
        return taken(low, node, value, source_of(low, node, 2), axis)
    return rearranged(low, node, value, value.refs.take(low.numbers(node.args[2]), axis))


def _places(low: Lowered, node: Any, value: Sample) -> tuple[Any, ...]:
    places = list(node.args[1]) + [None] * (value.refs.ndim - len(node.args[1]))
    if value.batch is not None and places[value.batch] is not None:
        raise Unreadable(f"{where(node)} takes samples apart")
    return tuple(slice(None) if place is None else low.numbers(place) for place in places)


def computed(low: Lowered, places: Any) -> bool:
    """Whether these depend on the time, the state or arguments."""
    return not isinstance(low.values[places], Uniform)


def _computed_place(low: Lowered, node: Any, value: Sample) -> tuple[int, Sample] | None:
    """An axis and the places along it, if that is all that is indexed by."""
    given = [(axis, places) for axis, places in enumerate(node.args[1]) if places is not None]
    if not any([computed(low, places) for _, places in given]):
        return None
    axis, places = given[0]
    found = low.sample(places, places, node)
    if len(given) > 1 or found.mask or axis == value.batch:
        raise Unreadable(f"{where(node)} by several places, or masks, that are computed is not read")
    return axis, found


@operation("index")
def _index(low: Lowered, node: Any, twin: Any) -> Value:
    value = source_of(low, node)
    if (found := _computed_place(low, node, value)) is not None:
        axis, places = found
        return taken(low, node, value, wrapped(low, places, value.refs.shape[axis]), axis)
    return rearranged(low, node, value, value.refs[_places(low, node, value)])


@operation("index_put", "_unsafe_index_put", "_index_put_impl")
def _index_put(low: Lowered, node: Any, twin: Any) -> Value:
    value, source = source_of(low, node), source_of(low, node, 2)
    accumulate = bool(node.args[3]) if len(node.args) > 3 else False
    if (found := _computed_place(low, node, value)) is not None:
        axis, places = found
        if not accumulate:
            raise Unreadable(f"{where(node)} at places that are computed is not read")
        return put_back(low, node, value, wrapped(low, places, low.shapes(node)[0][axis]), source, axis)
    refs = np.broadcast_to(value.refs, low.shapes(node)[0]).reshape(-1).copy()
    targets = np.arange(refs.size).reshape(low.shapes(node)[0])[_places(low, node, value)]
    targets, new = targets.reshape(-1), np.broadcast_to(source.refs, targets.shape).reshape(-1)
    if not accumulate:
        refs[targets] = new
    for chosen in _rounds(targets) if accumulate else ():
        refs[targets[chosen]] = low.program.statement("{0} + {1}", [refs[targets[chosen]], new[chosen]])
    return rearranged(low, node, value, refs.reshape(low.shapes(node)[0]))


def _rounds(targets: np.ndarray) -> list[np.ndarray]:
    """The places of all first targets, of all second ones and so on: in each every target is another."""
    seen, turns = dict[int, int](), np.zeros(len(targets), np.int64)
    for place, target in enumerate(targets.tolist()):
        turns[place] = seen.get(target, 0)
        seen[target] = turns[place] + 1
    return [np.flatnonzero(turns == turn) for turn in range(int(turns.max(initial=-1)) + 1)]


@operation("index_add")
def _index_add(low: Lowered, node: Any, twin: Any) -> Value:
    value, source = source_of(low, node), source_of(low, node, 3)
    axis = axis_of(value, node.args[1], node)
    if computed(low, node.args[2]):
        return put_back(low, node, value, source_of(low, node, 2), source, axis)
    refs = np.moveaxis(np.broadcast_to(value.refs, low.shapes(node)[0]).copy(), axis, 0)
    parts = np.moveaxis(source.refs, axis, 0)
    for place, part in zip(low.numbers(node.args[2]), parts, strict=True):
        total = low.program.statement("{0} + {1}", [refs[place].reshape(-1), part.reshape(-1)])
        refs[place] = total.reshape(refs[place].shape)
    return rearranged(low, node, value, np.moveaxis(refs, 0, axis))
