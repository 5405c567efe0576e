"""func over leaves, and the tensors that it is known to have."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..captured import Known, Walk
from ..tracing import has_memory, stands_for_others
from .structure import Structure, regrouped

_STRIDED = torch.strided


class Field:
    """func over leaves: counts its calls and checks what it returns.

    The tensors handed to func belong to the solver and are written again after the call; func must copy what it keeps.
    with_gradients: func is called with gradients on even where nobody keeps its graph, as torchdiffeq calls it: it may
    differentiate inside itself.
    """

    def __init__(self, func: Callable, structure: Structure):
        if not callable(func):
            raise TypeError(f"func must be callable as func(t, y), got {type(func).__name__}")
        self.func = func
        self._watched = not torch.compiler.is_compiling()  # whether versions of tensors can be read
        self.structure = structure.without_graph() if self._watched else structure
        self.with_gradients = self.gave_graph = False
        self.nfe = 0
        self._unknown = 2  # calls until it is known whether func returns one buffer
        self._first: list[Tensor] = []
        self._returns_one_buffer = False
        self._device = structure.leaves[0].get_device()

    def again(self) -> "Field":
        """The same func, counted anew: for a solve backwards."""
        field = Field(self.func, self.structure)
        field._unknown, field._first, field._returns_one_buffer = self._unknown, self._first, self._returns_one_buffer
        return field

    def slopes_are_used_up(self) -> None:
        """Promises that func is not called again before its last slopes have been used, and that nobody keeps them, as the
        derivative of a time that moves does: they need not be copied."""
        self._unknown = 0

    @property
    def tensors(self) -> list[Tensor]:
        """Those that func is known to have, which a captured graph reads where they lie."""
        func = parted(self.func)[0]
        buffers = list(func.buffers()) if isinstance(func, torch.nn.Module) else []
        return [*own_tensors(self.func)[0], *buffers]

    def __call__(self, t: Tensor, y: Sequence[Tensor], stage: int = 0) -> list[Tensor]:
        """The slopes at (t, y), each with the shape, type and device of its leaf. stage: which one of a step; not used here."""
        if self.with_gradients and not torch.is_grad_enabled():
            with torch.enable_grad():
                k = Field.__call__(self, t, y, stage)
            if not self.gave_graph and any([slope.requires_grad for slope in k]):
                self.gave_graph = Walk(k, [t, *y], Known(), None).more
            return [slope.detach() for slope in k]
        self.nfe += 1
        structure = self.structure
        watched = self._watched and not y[0].is_inference()
        before: Any = 0
        if structure.single:  # called for every slope: written out, for lists of one cost more than what is in them
            leaf = y[0]
            if watched:
                before = leaf._version
            slope = self.func(t, leaf)
            changed = watched and leaf._version != before
            k = [slope] if isinstance(slope, Tensor) else structure.flatten(slope)
        else:
            if watched:
                before = [x._version for x in y]
            k = structure.flatten(self.func(t, structure.unflatten(y)))
            changed = watched and [x._version for x in y] != before
        if changed:
            raise RuntimeError(
                "func changed y in place, which is the solver's: work on a copy, y.clone(), or return what is computed from y"
            )
        for i, leaf in enumerate(y):
            slope = k[i]
            if (
                type(slope) is not Tensor
                or slope.dtype is not leaf.dtype
                or slope.shape != leaf.shape
                or slope.get_device() != self._device
                or slope.layout is not _STRIDED
            ):
                k[i] = self._conform(slope, leaf, i)
        if self._unknown or self._returns_one_buffer:
            return self._own(k)
        return k

    def _own(self, k: list[Tensor]) -> list[Tensor]:
        """A func that writes each result into the same memory would overwrite slopes still in use. The first result is
        copied, the second tells whether func is such a one, and then every result is copied."""
        self._unknown = max(0, self._unknown - 1)
        if self._unknown == 1:
            self._first = k
        elif not self._returns_one_buffer:
            pairs = zip(self._first, k, strict=True)
            self._returns_one_buffer = any(x.numel() and x.data_ptr() == y.data_ptr() for x, y in pairs)
            self._first = []
            if not self._returns_one_buffer:
                return k
        return [slope.clone() for slope in k]

    def _conform(self, slope: Any, leaf: Tensor, i: int) -> Tensor:
        part = "" if self.structure.single else f" in leaf {i}"
        if not (type(slope) is Tensor or has_memory(slope) or stands_for_others(slope)):
            slope = slope * 1  # a tensor that another process still sends is then here
            if not has_memory(slope):
                raise TypeError(f"func must return plain tensors for y0{part}, got {type(slope).__name__}")
        if slope.device != leaf.device:
            raise ValueError(f"func must return the device of y0{part}, {leaf.device}, got {slope.device}")
        if slope.layout is not _STRIDED:
            slope = slope.to_dense()
        if slope.shape != leaf.shape:
            if self.structure.any_shape and regrouped(slope.shape, leaf.shape):
                slope = slope.reshape(leaf.shape)
            else:
                raise ValueError(f"func must return the shape of y0{part}, {list(leaf.shape)}, got {list(slope.shape)}")
        if slope.dtype.is_complex and not leaf.dtype.is_complex:
            raise ValueError(f"func must return real numbers for a real y0{part}, got {slope.dtype}")
        return slope.to(leaf.dtype)  # a field under autocast, say


class WithArguments:
    """func with more arguments after (t, y); its attributes are func's, callbacks among them."""

    def __init__(self, func: Callable, args: Sequence[Any]):
        self._func, self._args = func, tuple(args)

    def __call__(self, t: Tensor, y: Any) -> Any:
        return self._func(t, y, *self._args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._func, name)


def parted(func: Any) -> tuple[Any, tuple]:
    """func without its further arguments, and these."""
    return (func._func, func._args) if isinstance(func, WithArguments) else (func, ())


def counter_of(field: Any) -> Any:
    """The field that counts the calls of func, under those that add to it."""
    while not hasattr(field, "nfe"):
        field = field.field
    return field


def parameters_of(module: torch.nn.Module) -> list[Tensor]:
    """Also of a replica that nn.DataParallel made, whose copies of the parameters are plain attributes."""
    if not getattr(module, "_is_replica", False):
        found = _own(module)
        return list(module.parameters()) if found is None else found
    values = (x for part in module.modules() for x in vars(part).values())
    return [x for x in values if isinstance(x, Tensor) and x.requires_grad]


_Module = torch.nn.Module
_WALK = _Module.parameters, _Module.named_parameters, _Module._named_members, _Module.named_modules


def _own(module: torch.nn.Module) -> list[Tensor] | None:
    """What `Module.parameters` gives, in a third of the time; None where a Module gives others than it holds."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()
    waiting = [module]
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        kind, own = type(part), part.__dict__
        parameters, modules = own.get("_parameters"), own.get("_modules")
        if (kind.parameters, kind.named_parameters, kind._named_members, kind.named_modules) != _WALK:
            return None
        if type(parameters) is not dict or type(modules) is not dict:
            return None
        for x in parameters.values():
            if x is not None:
                found[id(x)] = x
        waiting.extend([child for child in reversed(modules.values()) if child is not None])
    return list(found.values())


def own_tensors(func: Any) -> tuple[list[Tensor], bool]:
    """The tensors that func is known to have, its parameters and arguments, and whether it is a Module that has some."""
    func, args = parted(func)
    arguments = [x for x in pytree.tree_leaves(args) if isinstance(x, Tensor)] if args else []
    parameters = parameters_of(func) if isinstance(func, torch.nn.Module) else []
    return [*parameters, *arguments], bool(parameters)


def aliased(field: Field, tensors: Sequence[Tensor]) -> tuple[Field, list[Tensor]] | None:
    """A field that has other leaves in place of these parameters and arguments of func, on the same memory, and those leaves.
    None where one of them is no parameter and no argument.

    A leaf's gradient is made on the stream on which the leaf was first used. In a captured graph that must be the graph's own,
    so these leaves are first used there.
    """
    func, args = parted(field.func)
    leaves = {id(x): x.detach().requires_grad_() for x in tensors}
    names = (
        {name: leaves[id(x)] for name, x in func.named_parameters() if id(x) in leaves}
        if isinstance(func, torch.nn.Module)
        else {}
    )
    args = pytree.tree_map(lambda x: leaves.get(id(x), x), args)
    found = {id(x) for x in (*names.values(), *pytree.tree_leaves(args))}
    if not all(id(leaf) in found for leaf in leaves.values()):
        return None
    other = field.again()
    other.func = (lambda t, y: torch.func.functional_call(func, names, (t, y, *args))) if names else with_arguments(func, args)
    return other, [leaves[id(x)] for x in tensors]


def with_arguments(func: Any, args: Any) -> Callable:
    if not isinstance(args, (tuple, list)):
        raise TypeError(f"args must be a tuple of what func is called with after (t, y), got {type(args).__name__}")
    return WithArguments(func, args) if args and callable(func) else func
