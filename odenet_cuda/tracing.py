"""Whether the operations of a solve are being written down, as by `torch.jit.trace` or `make_fx`, or done on tensors without
numbers. The kernels are no operations that these would see, so such solves are made in plain torch, or refused.
"""

import torch
from torch import _C, Tensor, nn
from torch.autograd import forward_ad

_KINDS = torch._C._TorchDispatchModeKey
_INPUTS = ("prim::Param", "prim::TracedAttr", "prim::GetAttr")

ADAPTIVE = (
    "an adaptive solve chooses its steps by their values, so it cannot be written down by torch.jit.trace, make_fx or "
    "torch.export, nor made on fake tensors: use a method on a grid, such as method='rk4' with a step_size"
)
_TIMES = (
    "must be numbers where a solve is written down by torch.jit.trace or make_fx, for its steps become constants: this depends "
    "on an input, a parameter or a buffer of what is traced; give a list of numbers"
)


def written_down() -> bool:
    """Whether a tracer follows the operations, or they are done on fake tensors. Modes of users that count or print operations
    are none of these: they see func's."""
    if torch.compiler.is_compiling():  # which has ways of its own
        return False
    if torch._C._get_tracing_state() is not None:
        return True
    if torch._C._len_torch_dispatch_stack() == 0:
        return False
    return any([torch._C._get_dispatch_mode(kind) is not None for kind in (_KINDS.PROXY, _KINDS.FAKE, _KINDS.FUNCTIONAL)])


def torch_is_plain() -> bool:
    """Whether no transform, mode, tracer or autocast sees torch's operations or changes them now."""
    return not (
        _C._len_torch_dispatch_stack()
        or _C._len_torch_function_stack()
        or _C._is_any_autocast_enabled()
        or _C._functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
        or _C._get_tracing_state() is not None
        or torch.is_anomaly_enabled()
        or torch.compiler.is_compiling()
    )


def has_memory(x: Tensor) -> bool:
    """Whether the numbers of x lie at its address, unlike those of a subclass that answers for its operations itself."""
    return type(x).__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl


def stands_for_others(x: Tensor) -> bool:
    """Whether x is one of the tensors without numbers with which torch traces."""
    return type(x).__module__.startswith("torch._subclasses.")


def refuse_traced_times(t: Tensor, name: str) -> None:
    """Raises NotImplementedError where the times would differ in another call of what is traced."""
    if isinstance(t, nn.Parameter) or t.requires_grad:
        raise NotImplementedError(f"{name} {_TIMES}")
    if torch._C._get_tracing_state() is not None:
        waiting = [torch._C._get_value_trace(t).node()]  # type: ignore[attr-defined]
        seen = set()
        while waiting:
            node = waiting.pop()
            if node.kind() in _INPUTS:
                raise NotImplementedError(f"{name} {_TIMES}")
            if node not in seen:
                seen.add(node)
                waiting += [value.node() for value in node.inputs()]
    mode = torch._C._get_dispatch_mode(_KINDS.PROXY)
    if mode is not None:
        from torch.fx.experimental.proxy_tensor import get_proxy_slot

        slot = get_proxy_slot(t, mode.tracer, None)
        nodes, found = ([] if slot is None else [slot.proxy.node]), set()
        while nodes:
            entry = nodes.pop()
            if entry.op == "placeholder":
                raise NotImplementedError(f"{name} {_TIMES}")
            if entry not in found:
                found.add(entry)
                nodes += entry.all_input_nodes
