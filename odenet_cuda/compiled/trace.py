"""A field and its vector-Jacobian product, recorded together as one graph of torch operations.

Recorded together, because autograd's saved tensors stand in a graph that was traced forward alone as constants: a field that
differentiates inside itself would then get wrong gradients. The graph is recorded at two batch sizes, so that a number that
depends on the batch is known from one that does not.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from .call import Call
from .counters import Counter, Tallies, without
from .effects import counted, made_at_first, refuse_output, refuse_results
from .leaks import Leak, Observed, Tracked, observe, summary
from .marks import Changes, Disturbed, Marks, Unreadable, Unset, same_bits
from .memory import has_memory
from .numbers import Numbers
from .reach import Reach
from .walk import Slot

Item = tuple[dict[str, Any], Any]
Given = Callable[..., AbstractContextManager[list[Any]]]  # the arguments for a call; takes what wraps tensors


@dataclass
class Recording:
    """The graphs at both batch sizes. outputs: in the graph's output, `leaves` slopes, then gradients for the leaves of the
    state, for each argument that has one number a sample, and for `wanted`, the constants that require a gradient; by_time: and
    then for the time; second: and then those of the second derivatives for all but the time, see `Call`."""

    graphs: list[fx.Graph]
    modules: list[fx.GraphModule]
    leaves: int
    batched: list[int]  # which arguments have one entry a sample
    wanted: list[Tensor]
    whole: bool  # the state has no axis of samples
    read: list[Tensor] = field(default_factory=list)  # constants whose values Python read
    written: list[Item] = field(default_factory=list)  # items that func writes before it reads them
    counted: list[Slot] = field(default_factory=list)  # where it counts
    counting: list[Tensor] = field(default_factory=list)  # with what, besides numbers
    counters: Sequence[Counter] = ()  # the former, and where its code can do no more than count
    added: list[Any] = field(default_factory=list)  # what a call adds to counters and counting, as far as it is to be counted
    by_time: bool = False
    second: bool = False

    def constant(self, node: fx.Node) -> Tensor:
        return getattr(self.modules[0], str(node.target))


def record(call: Call, args: Sequence[Any], reach: Reach, numbers: Numbers, marks: Marks, pure: bool = False) -> Recording:
    """Raises Unreadable, in words. marks: by which the caller puts back what func writes; after a first call it must not write
    anything but counters. pure: nobody minds if a compiled solve leaves undone what func writes."""
    try:
        if not pure:
            refuse_output(reach.names.globals)
        with torch.no_grad():
            known = {**reach.tensors, **{id(x): x for x in args if isinstance(x, Tensor)}}
            marks.restore()  # what a call with other arguments batched has left
            given: Given = partial(_given, args, numbers, Tallies())
            observed = _observe(call, known, given)
            if drawn := marks.drawn():
                kind = Unreadable if any(own for _, _, own in drawn) else Disturbed
                raise kind("func draws random numbers from a generator that is not torch's own")
            changes, tallies = written(marks), Tallies()
            if changes.items or changes.numbers or changes.tensors:
                again = partial(_observe_changes, call, known, partial(_given, args, numbers), marks, reach, changes)
                with made_at_first(changes, marks.restore):
                    try:
                        observed, tallies = again()
                    except Unreadable:
                        if not changes.count_rebound(marks.restore):
                            raise
                        observed, tallies = again()
            given = partial(_given, args, numbers, tallies)
            plain: Given = partial(_given, args, numbers, Tallies())
            if not pure:
                refuse_results(call, plain, changes.items, marks.restore)
            counters: list[Counter] = [*tallies.slots, *changes.counted]
            once = partial(_observe, call, known, plain)
            counts = [] if pure else counted(counters, changes.tensors, once, marks.restore)
            wanted = _wanted(observed, known)
            if any(x.requires_grad and not x.is_leaf and id(x) in known for x in observed.used.values()):
                raise Unreadable("func closes over a tensor that is itself the result of a differentiable computation")
            modules = _trace(call, given, numbers, wanted, marks, changes.items)
            for module in modules:
                if changes.tensors and not without(module, changes.tensors):
                    raise _writes(f"a tensor {list(changes.tensors[0].shape)}")
                module.graph.eliminate_dead_code(_does_more)
    except Unreadable:
        raise
    except Leak as error:
        raise Unreadable(str(error)) from error
    except Exception as error:  # whatever a user's function may raise when it is not given real numbers
        raise Unreadable(f"func could not be recorded: {summary(error)}") from error
    read, graphs = list(observed.read.values()), [module.graph for module in modules]
    left = changes.items, tallies.slots, changes.tensors
    count, whole = len(call.structure.leaves), call.whole
    return Recording(
        graphs, modules, count, call.batched, wanted, whole, read, *left, counters, counts, call.by_time, call.second
    )


@contextmanager
def _given(
    args: Sequence[Any], numbers: Numbers, tallies: Tallies, wrap: Callable[[Tensor], Tensor] | None = None
) -> Iterator[list[Any]]:
    """The arguments for a call, while what stands for numbers is in its place."""
    with numbers.given(args, wrap) as given, tallies.standing():
        yield given


def _observe(call: Call, known: dict[int, Tensor], given: Given) -> Observed:
    """A call of func, and its product, that tells what it uses."""
    observed = Observed(known)
    with given(Tracked) as args:
        field, inputs = call.field(0, args, partial(_wanted, observed, known))
        observe(field, inputs, observed)
    return observed


def _observe_changes(
    call: Call, known: dict[int, Tensor], given: Any, marks: Marks, reach: Reach, changes: Changes
) -> tuple[Observed, Tallies]:
    """What func uses where it writes that. given: of `_given` all but what stands for numbers that func counts with."""
    tallies = _tallies(changes, reach)
    return _observe_again(call, known, partial(given, tallies), marks, changes), tallies


def _observe_again(call: Call, known: dict[int, Tensor], given: Given, marks: Marks, changes: Changes) -> Observed:
    """Once more, where nothing can be read that func has not written before, nor what it counts with. marks: from before the
    first call; what was there then is there again afterwards. Raises Unreadable where func reads something of that, or writes
    anything else than at the first call."""
    _unset(marks, changes.items)
    first = next(
        path for path in (*[str(key) for _, key in changes.items], *[path for *_, path in changes.numbers], "a tensor")
    )
    try:
        observed = _observe(call, known, given)
    except Exception as error:
        if isinstance(error, Leak) and not changes.numbers:
            raise
        raise _writes(first) from error
    memory = {x.untyped_storage().data_ptr() for x in changes.tensors}
    if any(has_memory(x) and x.untyped_storage().data_ptr() in memory for x in observed.read.values()):
        raise _writes("a tensor whose values it reads")
    again = written(marks)
    items_again = {(id(items), key) for items, key in again.items}
    for items, key in changes.items:
        if (id(items), key) not in items_again:
            raise _writes(str(key))
    if len(items_again) > len(changes.items) or again.numbers or len(again.tensors) != len(changes.tensors):
        raise _writes("other things at one call than at another")
    marks.restore()
    return observed


def _unset(marks: Marks, written: list[Item]) -> None:
    marks.restore()
    for items, key in written:
        items[key] = Unset()


def written(marks: Marks) -> Changes:
    """What calls wrote. Raises Unreadable where they left other traces than those that may not matter."""
    changes = marks.changes()
    if changes.paths:
        raise _writes(changes.paths[0])
    if changes.others:
        raise Disturbed(f"{changes.others[0]} was changed while func was read")
    return changes


def _tallies(changes: Changes, reach: Reach) -> Tallies:
    """For the numbers that a call changed. Raises Unreadable where none can stand."""
    slots = {(id(slot.owner), slot.key): slot for slot in reach.slots}
    for owner, key, path in changes.numbers:
        told = type in reach.made or reach.by_identity  # what is a Tally
        if told or (id(owner), key) not in slots:
            raise _writes(path)
    return Tallies([slots[id(owner), key] for owner, key, _ in changes.numbers])


def _trace(
    call: Call, given: Given, numbers: Numbers, wanted: list[Tensor], marks: Marks, written: list[Item]
) -> list[fx.GraphModule]:
    """The recordings at both sizes. Whether an item that func writes holds nothing, None or a tensor before can be asked
    without reading it, as by `is None`: the graph must be the same with nothing to be read there, with what the user left
    there, and with what a call before left there."""
    met = numbers.met

    def trace(index: int) -> fx.GraphModule:
        with given() as args:  # after `marks` put things back: among them may be these numbers
            module = call.trace(index, args, wanted)
        if numbers.met != met:
            raise Unreadable("func does not take the same of the numbers that change at every call")
        return module

    if not written:
        return [trace(0), trace(1)]
    _unset(marks, written)
    first = trace(0)
    marks.restore()
    for _ in range(2):
        if not _same_graph(first, trace(0)):
            raise _writes(str(written[0][1]))
    return [first, trace(1)]


def _same_graph(x: fx.GraphModule, y: fx.GraphModule) -> bool:
    places: list[dict[fx.Node, int]] = [{node: i for i, node in enumerate(module.graph.nodes)} for module in (x, y)]
    if len(places[0]) != len(places[1]):
        return False
    for a, b in zip(x.graph.nodes, y.graph.nodes, strict=True):
        if a.op == b.op == "get_attr":
            constants = getattr(x, str(a.target)), getattr(y, str(b.target))
            if constants[0] is not constants[1] and not same_bits(*constants):
                return False
            continue
        given = [
            repr(fx.node.map_arg((node.args, node.kwargs), lambda n, at=at: f"%{at[n]}"))  # type: ignore[misc]
            for node, at in zip((a, b), places, strict=True)
        ]
        if a.op != b.op or a.target != b.target or given[0] != given[1]:
            return False
    return True


def _does_more(node: fx.Node) -> bool:
    """Whether an operation matters though nothing is done with its result."""
    schema = getattr(node.target, "_schema", None)
    drawn = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return node.op in ("placeholder", "output") or drawn or (schema is not None and schema.is_mutable)


def _wanted(observed: Observed, known: dict[int, Tensor]) -> list[Tensor]:
    return [x for x in observed.used.values() if x.requires_grad and x.is_leaf and id(x) in known]


def _writes(path: str) -> Unreadable:
    return Unreadable(f"func writes {path}, and may read it in its next call: it is read once a call leaves that as it was")


def value_of(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """The value of a node of the graph, from those of others."""
    if node not in values:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda x: value_of(x, values))
        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values[node]
