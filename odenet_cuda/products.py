"""Vector-Jacobian products of single calls of func. They run nothing that lies outside of func, and no hooks there."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, _engine_run_backward

from .captured import Edge, edge_of
from .hooks import Task, any_quiet


class Targets:
    """Tensors outside of func that products give gradients for.

    edges: where their gradients go in, as noted at the solve, if a tensor may have been changed since; None: as it is now.
    upstream: the place in `tensors` of those that lie on the way back of another one. Autograd would go there through what made
    the other one, at every call.
    """

    def __init__(self, tensors: Sequence[Tensor], edges: Sequence[Any] | None = None):
        self.tensors = list(tensors)
        self.inputs: list[Any] = self.tensors
        self.own: dict[Any, int] = {}
        self.upstream: dict[Any, int] = {}
        if edges is not None:
            self.inputs = [GradientEdge(node, i) for node, i in edges]
            made = [node for node, _ in edges if not is_leaf(node)]
        else:
            made = [x.grad_fn for x in tensors if x.grad_fn is not None]
        if made:
            own = [edge_of(x) for x in tensors] if edges is None else edges
            self.own = {edge: i for i, edge in enumerate(own)}
            self.upstream = {edge: self.own[edge] for edge in _behind(self.own)}


NOTHING = Targets(())


def is_leaf(node: Any) -> bool:
    return type(node) is torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]


def _behind(own: dict[Edge, int]) -> set[Edge]:
    """Those of these edges that lie on the way back of one of them."""
    made = {node for node, _ in own if not is_leaf(node)}
    found: set[Edge] = set()
    seen: set[Node] = set()
    waiting = [edge for node in made for edge in node.next_functions]
    most = len(own) - (1 if len(made) == 1 else 0)  # one alone does not lie behind itself
    while waiting and len(found) < most:
        edge: Any = waiting.pop()
        if edge in own:
            found.add(edge)
        if edge[0] is not None and edge[0] not in seen:
            seen.add(edge[0])
            waiting.extend(edge[0].next_functions)
    return found


def product(
    outputs: Sequence[Tensor],
    inputs: Sequence[Any],
    cotangents: Sequence[Tensor],
    retain_graph: bool,
    create_graph: bool = False,
) -> Sequence[Tensor | None]:
    """The vector-Jacobian product for each of the inputs, tensors or their edges, None where there is none.

    This is what torch.autograd.grad calls once it has checked its arguments, which takes it 20 us; here they are right.
    """
    if any_quiet():
        with Task(outputs) as task:
            return _run(task.outputs, inputs, cotangents, retain_graph, create_graph)
    return _run(outputs, inputs, cotangents, retain_graph, create_graph)


def _run(
    outputs: Sequence[Any], inputs: Sequence[Any], cotangents: Sequence[Tensor], retain_graph: bool, create_graph: bool
) -> Sequence[Tensor | None]:
    if not inputs:  # the engine would take it as a wish for all leaves
        return ()
    arguments = tuple(outputs), tuple(cotangents), retain_graph, create_graph, tuple(inputs)
    return _engine_run_backward(*arguments, allow_unreachable=True, accumulate_grad=False)


def gradients(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    targets: Targets,
    retain_graph: bool,
    create_graph: bool = False,
) -> Sequence[Any]:
    """The vector-Jacobian product for each of the inputs, leaves, and then of the targets."""
    upstream = targets.upstream
    if not upstream:
        return product(outputs, [*inputs, *targets.inputs], cotangents, retain_graph, create_graph)
    # The engine is asked for the rest alone, so that it stops there, and for what goes into func's own nodes at the border to
    # those upstream. Then these nodes give the rest.
    positions = set(upstream.values())
    rest = [i for i in range(len(targets.tensors)) if i not in positions]
    border = _border(outputs, targets)
    sizes = [len(node._input_metadata) for node in border]
    ends = [GradientEdge(node, i) for node, size in zip(border, sizes, strict=True) for i in range(size)]
    asked = [*inputs, *(targets.inputs[i] for i in rest), *ends]
    got = list(product(outputs, asked, cotangents, True, create_graph))
    sums: list[Any] = [None] * len(targets.tensors)
    for i, grad in zip(rest, got[len(inputs) :], strict=False):
        sums[i] = grad

    def add(edge: Any, grad: Tensor | None) -> None:
        i = upstream.get(edge)
        if i is not None and grad is not None:
            sums[i] = grad if sums[i] is None else sums[i] + grad

    for output, cotangent in zip(outputs, cotangents, strict=True):
        add(edge_of(output), cotangent)
    begin = len(inputs) + len(rest)
    with torch.set_grad_enabled(create_graph):
        for node, size in zip(border, sizes, strict=True):
            grads = got[begin : begin + size]
            begin += size
            if any(grad is not None for grad in grads):
                for edge, part in zip(node.next_functions, _passed(node, grads, create_graph), strict=True):
                    add(edge, part)
    return [*got[: len(inputs)], *sums]


def _border(outputs: Sequence[Tensor], targets: Targets) -> list[Any]:
    """The nodes of func that give a gradient for a tensor upstream themselves."""
    own, upstream = targets.own, targets.upstream
    found: dict[Any, None] = {}
    seen = set()
    waiting = [edge_of(x) for x in outputs]
    waiting = [edge for edge in waiting if edge not in own]
    while waiting:
        node: Any = waiting.pop()[0]
        if node is None or node in seen:
            continue
        seen.add(node)
        for edge in node.next_functions:
            if edge in upstream:
                found[node] = None
            if edge not in own:
                waiting.append(edge)
    return list(found)


def _taken(grad: Tensor, node: Any, i: int) -> Tensor:
    """A gradient as the engine hands it to this node: a formula leaves sums over broadcast axes, and conversions, to it."""
    taken = node._input_metadata[i]
    if grad.shape != taken.shape:
        grad = grad.sum_to_size(taken.shape)
    if grad.is_complex() and not taken.dtype.is_complex:
        grad = grad.real
    return grad.to(taken.device, taken.dtype)


class _Passed(Exception):
    """A node has been run, and no more is to be."""


def _passed(node: Any, grads: Sequence[Tensor | None], create_graph: bool) -> Sequence[Tensor | None]:
    """What this node alone makes of the gradients of its outputs, for each of its inputs."""
    if callable(node):
        found = node(*grads)
        parts = zip(found if isinstance(found, tuple) else (found,), node.next_functions, strict=True)
        return [None if x is None or end is None else _taken(x, end, i) for x, (end, i) in parts]
    # That of an autograd.Function is run by the engine alone, which is stopped behind it. Hooks of the outputs have had these.
    passed: list[Tensor | None] = []

    def take(by_inputs: Sequence[Tensor | None], _: Any) -> None:
        passed.extend(by_inputs)
        raise _Passed

    handles = [node.register_prehook(lambda _: tuple(grads)), node.register_hook(take)]
    roots = [(GradientEdge(node, i), grad) for i, grad in enumerate(grads) if grad is not None]
    inputs = [GradientEdge(end, i) for end, i in node.next_functions if end is not None]
    try:
        _run([edge for edge, _ in roots], inputs, [grad for _, grad in roots], True, create_graph)
    except _Passed:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return passed


def real_product(g: Tensor, x: Tensor) -> Tensor:
    """Elementwise, float64; of complex numbers the real part of conj(g) x: a gradient g means dL = Re(conj(g) dx)."""
    if not g.dtype.is_complex:
        return g.double() * x.double()
    return (torch.view_as_real(g.resolve_conj()).double() * torch.view_as_real(x.resolve_conj()).double()).sum(-1)
