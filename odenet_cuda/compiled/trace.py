"""A field and its vector-Jacobian product, recorded together as one graph of torch operations.

Recorded together, because autograd's saved tensors stand in a graph that was traced forward alone as constants: a field that
differentiates inside itself would then get wrong gradients. The graph is recorded at two batch sizes, so that a number that
depends on the batch is known from one that does not.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._decomp import core_aten_decompositions, get_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

from ..problem import Structure

BATCHES = (7, 11)  # of the two recordings

_aten = torch.ops.aten
_DECOMPOSED = [
    _aten.addcdiv, _aten.addcmul, _aten.celu, _aten.elu, _aten.elu_backward, _aten.gelu, _aten.gelu_backward,
    _aten.glu, _aten.glu_backward, _aten.hardsigmoid, _aten.hardsigmoid_backward, _aten.hardswish,
    _aten.hardswish_backward, _aten.hardtanh, _aten.hardtanh_backward, _aten.leaky_relu, _aten.leaky_relu_backward,
    _aten.lerp, _aten.log_sigmoid_backward, _aten.log_sigmoid_forward, _aten.logit, _aten.mish, _aten.mish_backward,
    _aten.native_layer_norm, _aten.native_layer_norm_backward, _aten.rsub, _aten.sigmoid_backward, _aten.silu,
    _aten.silu_backward, _aten.softplus, _aten.softplus_backward, _aten.tanh_backward, _aten.threshold,
    _aten.threshold_backward, _aten._softmax, _aten._softmax_backward_data, _aten._log_softmax,
    _aten._log_softmax_backward_data, _aten.stack, _aten.unbind, _aten.select_backward,
    _aten.slice_backward, _aten.mv, _aten.dot, _aten.addmv, _aten.norm, _aten.logsumexp,
]  # fmt: skip

# Read as they are, not decomposed.
_READ = ("var", "var_mean", "cumsum", "cumprod", "index_select", "roll", "split", "split_with_sizes")


class Unreadable(Exception):
    """A field that cannot be compiled; the words say which operation, and where in the source."""


@dataclass
class Recording:
    """The graphs at both batch sizes. outputs: in the graph's output, `leaves` slopes, then gradients for the leaves of the
    state, for each argument that has one number a sample, and for `wanted`, the constants that require a gradient."""

    graphs: list[fx.Graph]
    modules: list[fx.GraphModule]
    leaves: int
    batched: list[int]  # which arguments have one entry a sample
    wanted: list[Tensor]
    whole: bool  # the state has no axis of samples

    def constant(self, node: fx.Node) -> Tensor:
        return getattr(self.modules[0], str(node.target))


def record(func: Callable, structure: Structure, t: Tensor, args: Sequence[Any], batched: list[int], whole: bool) -> Recording:
    """whole: the state has no axis of samples, it is one sample. Raises Unreadable, in words."""
    try:
        with torch.no_grad(), unchanged_generators(t.device), unchanged_buffers(func):
            batches = (0,) if whole else BATCHES
            wanted = _wanted(_trace(func, structure, t, args, batched, batches[0], None))
            modules = [_trace(func, structure, t, args, batched, batch, wanted) for batch in batches]
    except Unreadable:
        raise
    except Exception as error:  # whatever a user's function may raise when it is not given real numbers
        words = str(error).strip().splitlines() or [""]
        raise Unreadable(f"func could not be recorded: {type(error).__name__}: {words[0]}") from error
    modules = [modules[0], modules[-1]]
    return Recording([module.graph for module in modules], modules, len(structure.leaves), batched, wanted, whole)


def unchanged_generators(device: torch.device) -> AbstractContextManager:
    """Random generators stand afterwards where they stood before."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextmanager
def unchanged_buffers(func: Any) -> Iterator[None]:
    """What the field writes into its buffers while it is read is undone."""
    buffers = list(func.buffers()) if isinstance(func, nn.Module) else []
    before = [(buffer, buffer.detach().clone()) for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                if not torch.equal(buffer, value):  # batch norm writes without raising the version
                    buffer.copy_(value)


def sample_rows(x: Tensor, batch: int) -> Tensor:
    """`batch` rows of x, repeated as needed; 0: x itself."""
    if batch == 0:
        return x.detach()
    return x.detach()[torch.arange(batch, device=x.device) % x.shape[0]]


def _wanted(module: fx.GraphModule) -> list[Tensor]:
    found: dict[int, Tensor] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = getattr(module, str(node.target))
            if isinstance(value, Tensor) and value.requires_grad:
                if not value.is_leaf:
                    raise Unreadable("func closes over a tensor that is itself the result of a differentiable computation")
                found[id(value)] = value
    return list(found.values())


def _trace(
    func: Callable, structure: Structure, t: Tensor, args: Sequence[Any], batched: list[int], batch: int, wanted: Any
) -> fx.GraphModule:
    leaves = [sample_rows(leaf, batch) for leaf in structure.leaves]
    samples = [sample_rows(args[i], batch) for i in batched]
    cotangents = [torch.randn_like(leaf) for leaf in leaves]
    n, m = len(leaves), len(samples)

    def field(t: Tensor, *inputs: Tensor) -> Any:
        with torch.enable_grad():
            inputs = tuple(x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs)
            given = list(args)
            for i, place in enumerate(batched):
                given[place] = inputs[n + i]
            slopes = structure.flatten(func(t, structure.unflatten(inputs[:n]), *given))
            for slope, leaf in zip(slopes, leaves, strict=True):
                if slope.shape != leaf.shape or slope.dtype != leaf.dtype:
                    raise Unreadable(f"func returned {slope.dtype} {list(slope.shape)} for {leaf.dtype} {list(leaf.shape)}")
            if wanted is None:
                return [slope.detach() for slope in slopes]
            sources = [*inputs[: n + m], *wanted]
            if any(slope.requires_grad for slope in slopes):
                used = [(slope, g) for slope, g in zip(slopes, inputs[n + m :], strict=True) if slope.requires_grad]
                grads = torch.autograd.grad([x for x, _ in used], sources, [g for _, g in used], allow_unused=True)
            else:
                grads = (None,) * len(sources)  # type: ignore[assignment]
        return [*(slope.detach() for slope in slopes), *grads]

    inputs = [*leaves, *samples, *cotangents]
    return make_fx(field, decomposition_table=_decompositions(), record_stack_traces=True)(t, *inputs)


@cache
def _decompositions() -> dict[Any, Callable]:
    """What operations are made of, by which they are replaced in a recording."""
    table = {**core_aten_decompositions(), **get_decompositions(_DECOMPOSED)}
    for name in _READ:
        for overload in getattr(_aten, name).overloads():
            table.pop(getattr(getattr(_aten, name), overload), None)
    return table


def value_of(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """The value of a node of the graph, from those of others."""
    if node not in values:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda x: value_of(x, values))
        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values[node]
