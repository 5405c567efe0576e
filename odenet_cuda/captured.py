"""Which tensors outside of it func depends on: found in the autograd graphs of its results.

A node of autograd that stands in the graphs of two calls of func was made before the second of them: it is outside of func.
What is made inside is another object in each call. That settles what numbers of nodes cannot, for each thread counts its own.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import _get_sequence_nr
from torch.autograd.graph import Node, _engine_run_backward, get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .hooks import Task, any_quiet

UNKNOWN_TENSOR = (
    "func depends somewhere in the solve on a tensor that it does not depend on at its start, so that tensor would get no "
    "gradient: name it in adjoint_params, or use gradient='direct'. Or it required no gradient yet when func was solved: call "
    "requires_grad_() before the solve"
)
_END = 2**64  # no number is as high
_Leaf: Any = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]
Edge = tuple[Node, int]


def sequence_number() -> int:
    """That of autograd in this thread: nodes it makes from here on have this number or a higher one."""
    return _get_sequence_nr()


def edge_of(x: Tensor) -> Edge:
    """The node that takes in the gradient of x, and as which of its inputs."""
    return (x.grad_fn, x.output_nr) if x.grad_fn is not None else (get_gradient_edge(x).node, 0)


class Known:
    """Tensors at which the way back from func's results ends."""

    def __init__(self, tensors: Iterable[Tensor] = ()):
        self.tensors: dict[int, Tensor] = {}
        self.edges: dict[Edge, Tensor] = {}
        self.add(tensors)

    def add(self, tensors: Iterable[Tensor]) -> None:
        for x in tensors:
            self.tensors[id(x)] = x
            if x.grad_fn is not None:
                self.edges[x.grad_fn, x.output_nr] = x


class Walk:
    """The way back from the results of a call of func, as far as its inputs and the known tensors.

    nodes: those it passed. boundary: nodes with a number outside of `window`, not passed yet: they were made before the call,
    or inside of it by another thread. outside: nodes that are not to be passed; the edges to them are kept.
    """

    def __init__(
        self,
        outputs: Sequence[Tensor],
        inputs: Sequence[Tensor],
        known: Known,
        window: range | None,
        outside: Iterable[Node] = (),
    ):
        self.known, self.window, self.outside = known, window, set(outside)
        self.inputs = {id(x) for x in inputs}
        self.nodes: set[Node] = set()
        self.boundary: set[Node] = set()
        self.leaves: dict[Node, Tensor] = {}
        self.edges: dict[Edge, None] = {}
        self._walk([edge_of(x) for x in outputs if x.requires_grad])

    def _walk(self, waiting: list[Any]) -> None:
        nodes, edges, window = self.nodes, self.known.edges, self.window
        while waiting:
            node, index = waiting.pop()
            if node is None or node in nodes or (edges and (node, index) in edges):
                continue
            if self.outside and node in self.outside:
                self.edges[node, index] = None
            elif type(node) is _Leaf:
                leaf = node.variable
                if id(leaf) not in self.inputs and id(leaf) not in self.known.tensors:
                    self.leaves[node] = leaf
            elif window is not None and node._sequence_nr() not in window:
                self.boundary.add(node)
            else:
                nodes.add(node)
                waiting.extend(node.next_functions)

    def pass_through(self, nodes: Iterable[Node]) -> None:
        """These nodes of the boundary were made inside."""
        nodes = list(nodes)
        self.boundary.difference_update(nodes)
        self.nodes.update(nodes)
        self._walk([edge for node in nodes for edge in node.next_functions])

    def pass_all(self) -> None:
        while self.boundary:
            self.pass_through(self.boundary)

    @property
    def more(self) -> bool:
        """Whether the results depend on a tensor that is neither an input nor known."""
        return bool(self.leaves or self.boundary)

    @property
    def seen(self) -> set[Node]:
        return {*self.nodes, *self.boundary, *self.leaves}

    def __contains__(self, node: Node) -> bool:
        return node in self.nodes or node in self.boundary or node in self.leaves


class _Used(TorchDispatchMode):
    """Collects the non-leaf tensors that operations take, by their edge."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[Edge, Tensor] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and value.grad_fn is not None:
                self.found.setdefault((value.grad_fn, value.output_nr), value)
        return func(*args, **(kwargs or {}))


def outside(field: Callable[..., list[Tensor]], evaluation: Any, known: Known, since: int | None) -> list[Tensor]:
    """The tensors, not known, that func depends on at an evaluation whose graph is alive. func is called once more there.

    since: autograd's number before the evaluation; None where numbers tell nothing about func.
    """
    t, y = evaluation.t, evaluation.y
    inputs, device = [t, *y], y[0].device
    window = None if since is None else range(since, _END)
    first = Walk(evaluation.k, inputs, known, window)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad(), _Used() as used:
        begin = sequence_number()
        again = field(t, y)
    second = Walk(again, inputs, known, None if since is None else range(begin, sequence_number()))
    while True:  # what only one of them has was made inside
        lone = [[n for n in one.boundary if n not in other] for one, other in ((first, second), (second, first))]
        if not any(lone):
            break
        first.pass_through(lone[0])
        second.pass_through(lone[1])
    last = Walk(again, inputs, known, None, first.seen & second.seen)
    found = []
    for edge in last.edges:
        node: Any = edge[0]
        tensor = node.variable if type(node) is _Leaf else used.found.get(edge)
        if tensor is None:
            raise RuntimeError(
                f"func depends on an earlier result, of {node.name()}, which it uses in no operation of this thread: its "
                "gradient would be lost; hand the tensor to func in args"
            )
        found.append(tensor)
    return found


def find_captured(
    field: Callable[..., list[Tensor]], evaluations: Sequence[Any], known: Sequence[Tensor], since: int | None, closed: bool
) -> list[Tensor]:
    """`known`, and every other tensor outside of func that one of these evaluations, with their graphs, depends on.

    since: autograd's number before the first of them, None where numbers tell nothing about func. closed: the first depends
    on known leaves only; then just the last is looked at, and the rest only where that depends on more: func may branch on the
    time. func is called once more where it cannot be told from the graphs alone: a leaf that one of them alone has, say.
    """
    found = Known(known)
    window = None if since is None else range(since, _END)
    if closed:
        first, last = (Walk(e.k, [e.t, *e.y], found, window) for e in (evaluations[0], evaluations[-1]))
        alike = not last.leaves and not last.boundary
        if alike and (evaluations[0] is evaluations[-1] or first.nodes.isdisjoint(last.nodes)):
            return list(known)
    counts: Counter[Node] = Counter()
    for e in evaluations:
        counts.update(Walk(e.k, [e.t, *e.y], found, window).seen)
    for e in evaluations:
        walk = Walk(e.k, [e.t, *e.y], found, window)
        alone = len(evaluations) > 1 and any(counts[node] == 1 for node in walk.leaves)
        if alone or walk.boundary or any(counts[node] > 1 for node in walk.nodes):
            found.add(outside(field, e, found, since))
        else:
            found.add(walk.leaves.values())
    return list(found.tensors.values())


def leans_on_more(
    field: Callable[..., list[Tensor]],
    k: Sequence[Tensor],
    inputs: Sequence[Tensor],
    known: Known,
    since: int,
    chosen: bool,
) -> bool:
    """Whether a call of func on the way back leans on graphs made before it, which must then be kept from one to the next.

    inputs: t and y. known: the tensors that get gradients. chosen: by the user; else RuntimeError is raised where func's
    results depend on a tensor, outside of func and its inputs, that is not known.
    """
    walk = Walk(k, inputs, known, range(since, sequence_number()))
    earlier = bool(walk.boundary)
    if chosen:
        return earlier
    walk.pass_all()
    if walk.leaves:
        with torch.enable_grad():
            again = Walk(field(inputs[0], inputs[1:]), inputs, known, None)
        if walk.leaves.keys() & again.leaves.keys():
            raise RuntimeError(UNKNOWN_TENSOR)
    return earlier


def cut_points(captured: Sequence[Tensor]) -> list[Tensor]:
    """The captured results on whose way back lies another captured tensor: their gradient must not flow on to it twice."""
    if all(tensor.grad_fn is None for tensor in captured):
        return []
    own = {edge_of(tensor) for tensor in captured}
    cuts = []
    for tensor in captured:
        if tensor.grad_fn is None:
            continue
        waiting, seen = list(tensor.grad_fn.next_functions), set()
        while waiting:
            node, index = waiting.pop()
            if node is None or node in seen:
                continue
            if (node, index) in own:
                cuts.append(tensor)
                break
            seen.add(node)
            waiting.extend(node.next_functions)
    return cuts


def product(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    retain_graph: bool,
    create_graph: bool = False,
) -> Sequence[Tensor | None]:
    """The vector-Jacobian product for each of the inputs, None where there is none.

    This is what torch.autograd.grad calls once it has checked its arguments, which takes it 20 us; here they are right.
    """
    if any_quiet():
        with Task(outputs) as task:
            return _run(task.outputs, inputs, cotangents, retain_graph, create_graph)
    return _run(outputs, inputs, cotangents, retain_graph, create_graph)


def _run(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], retain_graph: bool, create_graph: bool
) -> Sequence[Tensor | None]:
    arguments = tuple(outputs), tuple(cotangents), retain_graph, create_graph, tuple(inputs)
    return _engine_run_backward(*arguments, allow_unreachable=True, accumulate_grad=False)


def gradients(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    cuts: Sequence[Tensor],
    retain_graph: bool,
    create_graph: bool = False,
) -> Sequence[Any]:
    """The vector-Jacobian product for each of the inputs; nothing flows back beyond the cuts."""
    if not cuts:
        return product(outputs, inputs, cotangents, retain_graph, create_graph)
    stopped: dict[int, Tensor] = {}
    with Task(outputs) as task:

        def stop(tensor: Tensor) -> Callable[[Tensor], Tensor | None]:
            def hook(grad: Tensor) -> Tensor | None:
                if not task.runs():
                    return None
                stopped[id(tensor)] = grad
                return torch.zeros_like(grad)

            return hook

        hooks = [tensor.register_hook(stop(tensor)) for tensor in cuts]
        try:
            grads = _run(task.outputs, inputs, cotangents, True, create_graph)
        finally:
            for hook in hooks:
                hook.remove()
    return [stopped.get(id(tensor), grad) for tensor, grad in zip(inputs, grads, strict=True)]
