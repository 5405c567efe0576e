"""Which tensors outside of it func depends on: found in the autograd graph of one of its results."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves


def captured_tensors(outputs: Sequence[Tensor], inputs: Sequence[Tensor], since: int) -> tuple[list[Tensor], bool]:
    """Leaf tensors that `outputs` depend on, `inputs` left out, and whether they depend on earlier results as well.

    since: the sequence number of autograd when func was called; a node from before is an earlier result, not a leaf.
    """
    own = {id(tensor) for tensor in inputs}
    found: dict[int, Tensor] = {}
    earlier = False
    seen = set()
    waiting = [tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None]
    for tensor in outputs:
        if tensor.grad_fn is None and tensor.requires_grad and id(tensor) not in own:
            found[id(tensor)] = tensor
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            if id(leaf) not in own:
                found[id(leaf)] = leaf
        elif node._sequence_nr() < since:
            earlier = True
        else:
            waiting.extend(next_node for next_node, _ in node.next_functions if next_node is not None)
    return list(found.values()), earlier


def refuse_unknown(outputs: Sequence[Tensor], inputs: Sequence[Tensor], since: int, known: Sequence[Tensor]) -> None:
    """Raises RuntimeError where func's results depend on a tensor, outside of func and its inputs, that is not known."""
    found, earlier = captured_tensors(outputs, inputs, since)
    ids = {id(tensor) for tensor in known}
    if any(id(tensor) not in ids for tensor in found) or (earlier and all(tensor.is_leaf for tensor in known)):
        raise RuntimeError(
            "func depends somewhere in the solve on a tensor that it does not depend on at its start, so that tensor would get "
            "no gradient: name it in adjoint_params, or use gradient='direct'"
        )


def cut_points(captured: Sequence[Tensor]) -> list[Tensor]:
    """The captured results on whose way back lies another captured tensor: their gradient must not flow on to it twice."""
    own = {id(tensor) for tensor in captured} | {id(tensor.grad_fn) for tensor in captured if tensor.grad_fn is not None}
    cuts = []
    for tensor in captured:
        if tensor.grad_fn is None:
            continue
        waiting, seen = [node for node, _ in tensor.grad_fn.next_functions], set()
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if id(node) in own or id(getattr(node, "variable", None)) in own:
                cuts.append(tensor)
                break
            waiting.extend(next_node for next_node, _ in node.next_functions)
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

    def stop(tensor: Tensor) -> Callable[[Tensor], Tensor]:
        def hook(grad: Tensor) -> Tensor:
            stopped[id(tensor)] = grad
            return torch.zeros_like(grad)

        return hook

    hooks = [tensor.register_hook(stop(tensor)) for tensor in cuts]
    try:
        grads = product(outputs, inputs, cotangents, True, create_graph)
    finally:
        for hook in hooks:
            hook.remove()
    return [stopped.get(id(tensor), grad) for tensor, grad in zip(inputs, grads, strict=True)]


class _EarlierResults(TorchDispatchMode):
    """Collects the non-leaf tensors from before `since` that operations take part in."""

    def __init__(self, since: int):
        super().__init__()
        self.since = since
        self.found: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and value.grad_fn is not None and value.grad_fn._sequence_nr() < self.since:
                self.found.setdefault(id(value), value)
        return func(*args, **(kwargs or {}))


def earlier_results(func: Callable[[], Any], since: int) -> list[Tensor]:
    """The non-leaf tensors from before `since` that func() uses; it is called once, with gradients on."""
    with torch.enable_grad(), _EarlierResults(since) as mode:
        func()
    return list(mode.found.values())


def sequence_number() -> int:
    """Autograd's sequence number now: nodes made from here on have this number or a higher one. Gradients must be on."""
    with _disable_current_modes():  # it is none of func's operations
        probe = torch.ones((), requires_grad=True, device="cpu") * 1
    node = probe.grad_fn
    assert node is not None, "gradients must be on"
    return node._sequence_nr() + 1
