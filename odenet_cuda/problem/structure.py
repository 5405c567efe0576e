"""The state as the user gave it, and its leaves."""

import math
import operator
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..ops import DTYPES
from ..tracing import has_memory, stands_for_others

_ONE = pytree.tree_flatten(0)[1]  # of one tensor


class Structure:
    """How the leaves of a state make up what the user sees: one tensor, or a nest of tuples, lists and dicts.

    any_shape: as in torchdiffeq, a slope may have the shape of its leaf with axes merged, split, or of length 1 added or left
    out, and those of a tuple may be anything that gives them one by one.
    """

    def __init__(self, state: Any, any_shape: bool = False):
        self.any_shape = any_shape
        self.single = isinstance(state, Tensor)
        leaves, self.spec = ([state], _ONE) if type(state) is Tensor else pytree.tree_flatten(state)
        if not leaves:
            raise ValueError(f"y0 must hold at least one tensor, got {state!r}")
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                raise TypeError(f"y0 must be a tensor or a tuple, list or dict of tensors, got {type(leaf).__name__} in it")
        self.leaves: list[Tensor] = leaves
        self.flat_tuple = type(state) is tuple and all(isinstance(part, Tensor) for part in state)

    def without_graph(self) -> "Structure":
        """The same, for whoever outlives the solve."""
        other = Structure.__new__(Structure)  # what copy.copy takes longer for
        other.__dict__.update(self.__dict__)
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor
        other.leaves = [leaf if wrapped(leaf) else leaf.detach() for leaf in self.leaves]
        return other

    def unflatten(self, leaves: Sequence[Tensor]) -> Any:
        if self.single:
            return leaves[0]
        if self.flat_tuple:
            return tuple(leaves)
        return pytree.tree_unflatten(list(leaves), self.spec)

    def flatten(self, value: Any) -> list[Tensor]:
        """The leaves of what func returned. Raises TypeError or ValueError where its structure is another."""
        if self.single:
            if isinstance(value, Tensor):
                return [value]
            raise TypeError(f"func must return a tensor, as y0 is one, got {type(value).__name__}")
        if self.any_shape and isinstance(value, (Tensor, Iterator)):
            value = tuple(value)
        if self.flat_tuple and type(value) is tuple and len(value) == len(self.leaves):
            leaves, spec = list(value), self.spec
        else:
            leaves, spec = pytree.tree_flatten(value)
        if spec != self.spec:
            try:
                leaves = list(_matched(self.spec, value))
            except ValueError:
                raise ValueError(f"func must return the structure of y0, {self.spec}, got {spec}") from None
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                raise TypeError(f"func must return tensors in the structure of y0, got {type(leaf).__name__}")
        return leaves


def _matched(spec: Any, value: Any) -> Iterator[Any]:
    """The leaves of value in the order of spec: entries of dicts by their keys, those of tuples and lists by their places.
    Raises ValueError where the structure is another."""
    if spec.is_leaf():
        yield value
        return
    kind, parts = spec.type, spec.children()
    if isinstance(kind, type) and issubclass(kind, dict):
        keys = spec.context[1] if kind is defaultdict else spec.context
        if not isinstance(value, Mapping) or set(value) != set(keys):
            raise ValueError
        value = [value[key] for key in keys]
    else:
        fields = getattr(spec.context, "_fields", ())  # of a named tuple
        if not isinstance(value, (tuple, list)) or len(value) != len(parts) or getattr(value, "_fields", fields) != fields:
            raise ValueError
    for part, of_part in zip(parts, value, strict=True):
        yield from _matched(part, of_part)


def regrouped(shape: Sequence[int], other: Sequence[int]) -> bool:
    """Whether one shape is the other with neighbouring axes merged, and axes of length 1 added or left out."""
    a, b = ({*accumulate(x, operator.mul, initial=1)} for x in (shape, other))
    return math.prod(shape) == math.prod(other) and (a <= b or b <= a)


def check_state(y0: Any) -> Structure:
    """y0: a state, or the Structure of one."""
    structure = y0 if isinstance(y0, Structure) else Structure(y0)
    first = structure.leaves[0]
    for i, leaf in enumerate(structure.leaves):
        name = "y0" if structure.single else f"leaf {i} of y0"
        if not (type(leaf) is Tensor or has_memory(leaf) or stands_for_others(leaf)):
            raise TypeError(f"{name} must be a plain tensor, got {type(leaf).__name__}")
        if leaf.layout is not torch.strided or leaf.is_nested:
            kind = "a nested one" if leaf.is_nested else leaf.layout
            raise TypeError(f"{name} must be a dense tensor, got {kind}; a field may be sparse, its state is not")
        if leaf.dtype not in DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise TypeError(f"{name} must be of one of the types {known}, got {leaf.dtype}")
        if leaf.device != first.device:
            raise ValueError(f"{name} must be on the device of the first leaf, {first.device}, got {leaf.device}")
        if leaf.device.type not in ("cpu", "cuda"):
            raise NotImplementedError(f"{name} must be on the CPU or a CUDA device, got {leaf.device}")
    return structure


def check_samples(structure: Structure) -> None:
    """Under per-sample control every leaf has the samples on axis 0."""
    sizes = []
    for i, leaf in enumerate(structure.leaves):
        if leaf.dim() == 0:
            raise ValueError(f"step_control='per_sample' needs samples on axis 0 of every leaf of y0; leaf {i} has no axis")
        sizes.append(leaf.shape[0])
    if len(set(sizes)) > 1:
        raise ValueError(f"step_control='per_sample' needs as many samples in every leaf of y0, got {sizes}")
