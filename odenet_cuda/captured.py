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
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

UNKNOWN_TENSOR = (
    "func depends somewhere in the solve on a tensor that it does not depend on at its start, so that tensor would get no "
    "gradient: name it in adjoint_params, or use gradient='direct'. Or it required no gradient yet when func was solved: call "
    "requires_grad_() before the solve"
)
KEPT_RESULTS = (
    "func depends on a result that it kept of an earlier call at some times, and at others not; one that it kept while the "
    "solve recorded no gradients has none: use gradient='direct'"
)
_END = 2**64  # no number is as high
Leaf: Any = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]
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
        self.nodes: dict[Node, None] = {}  # in the order in which they were met
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
            elif type(node) is Leaf:
                leaf = node.variable
                if id(leaf) not in self.inputs and id(leaf) not in self.known.tensors:
                    self.leaves[node] = leaf
            elif window is not None and node._sequence_nr() not in window:
                self.boundary.add(node)
            else:
                nodes[node] = None
                waiting.extend(node.next_functions)

    def pass_through(self, nodes: Iterable[Node]) -> None:
        """These nodes of the boundary were made inside."""
        nodes = list(nodes)
        self.boundary.difference_update(nodes)
        self.nodes.update(dict.fromkeys(nodes))
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
        again = evaluation.again(field)
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
        tensor = node.variable if type(node) is Leaf else used.found.get(edge)
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
    on known leaves only, and so may all. func is called once more where it cannot be told from the graphs alone: a leaf that
    one of them alone has, say.
    """
    found = Known(known)
    window = None if since is None else range(since, _END)
    if closed and are_closed(evaluations, found, window):
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


def are_closed(evaluations: Sequence[Any], known: Known, window: range | None) -> bool:
    """Whether each of them depends on nothing outside of func but known tensors: func may branch on the time."""
    nodes: set[Node] = set()
    for e in evaluations:
        walk = Walk(e.k, [e.t, *e.y], known, window)
        if walk.leaves or walk.boundary or not nodes.isdisjoint(walk.nodes):
            return False
        nodes.update(walk.nodes)
    return True


class Watch:
    """Calls func on the way back, and looks at what its results depend on.

    tensors: those that get gradients. chosen: by the user; then the first call alone is looked at, for graphs made before it.
    Else RuntimeError is raised where results depend on another tensor outside of func: it would get no gradient.
    keeps_graphs: func leans on graphs made before it was called, which must be kept from one call to the next.
    """

    def __init__(self, tensors: Sequence[Tensor], chosen: bool):
        self.known, self.chosen, self.keeps_graphs = Known(tensors), chosen, False
        self._looked = False
        self._leans: bool | None = None  # whether calls lean on earlier graphs
        self._kinds: set[Any] = set()  # of graphs, of calls whose further leaves were made inside
        self._leaves: set[Node] = set()  # the further leaves of the last call

    def evaluate(self, field: Callable[..., list[Tensor]], t: Tensor, y: Sequence[Tensor]) -> list[Tensor]:
        """func at leaves t and y, with its graph; to be called where gradients are recorded."""
        if self._looked:
            return field(t, y)
        since = sequence_number()
        k = field(t, y)
        self._look(field, k, [t, *y], range(since, sequence_number()))
        return k

    def _look(self, field: Callable[..., list[Tensor]], k: Sequence[Tensor], inputs: Sequence[Tensor], window: range) -> None:
        walk = Walk(k, inputs, self.known, window)
        leans = bool(walk.boundary)
        self.keeps_graphs = self.keeps_graphs or leans
        self._looked = self.chosen
        if self.chosen:
            return
        if self._leans not in (None, leans):
            raise RuntimeError(KEPT_RESULTS)
        self._leans = leans
        walk.pass_all()
        if not walk.leaves:
            return
        # A leaf that func makes is another one in each call. So the second call of each kind tells, and after it the next.
        leaves, kind = set(walk.leaves), (*map(type, walk.nodes), len(walk.leaves))
        others = self._leaves
        if kind not in self._kinds:
            others = others | Walk(field(inputs[0], inputs[1:]), inputs, self.known, None).leaves.keys()
        if leaves & others:
            raise RuntimeError(UNKNOWN_TENSOR)
        self._kinds.add(kind)
        self._leaves = leaves
