"""What the user gave, made regular once: leaves of the state, times, tolerances, norm, and func over leaves."""

import copy
import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .captured import Known, Walk
from .ops import DTYPES, REAL
from .tracing import has_memory, refuse_traced_times, stands_for_others, written_down

_STRIDED = torch.strided


class Structure:
    """How the leaves of a state make up what the user sees: one tensor, or a nest of tuples, lists and dicts.

    any_shape: as in torchdiffeq, a slope may have the shape of its leaf with axes merged, split, or of length 1 added or left
    out, and those of a tuple may be anything that gives them one by one.
    """

    def __init__(self, state: Any, any_shape: bool = False):
        self.any_shape = any_shape
        self.single = isinstance(state, Tensor)
        leaves, self.spec = pytree.tree_flatten(state)
        if not leaves:
            raise ValueError(f"y0 must hold at least one tensor, got {state!r}")
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                raise TypeError(f"y0 must be a tensor or a tuple, list or dict of tensors, got {type(leaf).__name__} in it")
        self.leaves: list[Tensor] = leaves
        self.flat_tuple = type(state) is tuple and all(isinstance(part, Tensor) for part in state)

    def without_graph(self) -> "Structure":
        """The same, for whoever outlives the solve."""
        other = copy.copy(self)
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


def _regrouped(shape: Sequence[int], other: Sequence[int]) -> bool:
    """Whether one shape is the other with neighbouring axes merged, and axes of length 1 added or left out."""
    a, b = ({*accumulate(x, operator.mul, initial=1)} for x in (shape, other))
    return math.prod(shape) == math.prod(other) and (a <= b or b <= a)


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
        self.structure = structure if torch.compiler.is_compiling() else structure.without_graph()
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

    @property
    def tensors(self) -> list[Tensor]:
        """Those that func is known to have, which a captured graph reads where they lie."""
        func = self.func._func if isinstance(self.func, WithArguments) else self.func
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
        before = None if torch.compiler.is_compiling() or y[0].is_inference() else [x._version for x in y]
        if structure.single:
            slope = self.func(t, y[0])
            k = [slope] if isinstance(slope, Tensor) else structure.flatten(slope)
        else:
            k = structure.flatten(self.func(t, structure.unflatten(y)))
        if before is not None and before != [x._version for x in y]:
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
            if self.structure.any_shape and _regrouped(slope.shape, leaf.shape):
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


def counter_of(field: Any) -> Any:
    """The field that counts the calls of func, under those that add to it."""
    while not hasattr(field, "nfe"):
        field = field.field
    return field


def parameters_of(module: torch.nn.Module) -> list[Tensor]:
    """Also of a replica that nn.DataParallel made, whose copies of the parameters are plain attributes."""
    if not getattr(module, "_is_replica", False):
        return list(module.parameters())
    values = (x for part in module.modules() for x in vars(part).values())
    return [x for x in values if isinstance(x, Tensor) and x.requires_grad]


def own_tensors(func: Any) -> tuple[list[Tensor], bool]:
    """The tensors that func is known to have, its parameters and arguments, and whether it is a Module that has some."""
    arguments: list[Tensor] = []
    if isinstance(func, WithArguments):
        arguments = [x for x in pytree.tree_leaves(func._args) if isinstance(x, Tensor)]
        func = func._func
    parameters = parameters_of(func) if isinstance(func, torch.nn.Module) else []
    return [*parameters, *arguments], bool(parameters)


def aliased(field: Field, tensors: Sequence[Tensor]) -> tuple[Field, list[Tensor]] | None:
    """A field that has other leaves in place of these parameters and arguments of func, on the same memory, and those leaves.
    None where one of them is no parameter and no argument.

    A leaf's gradient is made on the stream on which the leaf was first used. In a captured graph that must be the graph's own,
    so these leaves are first used there.
    """
    func: Any = field.func
    args: Any = ()
    if isinstance(func, WithArguments):
        func, args = func._func, func._args
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


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Numbers of the host on the device. The host does not wait for it: they leave from pinned memory."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


@dataclass
class Problem:
    """An initial value problem over leaves.

    leaves: y0, detached, each contiguous. t: output times, strictly monotone. direction: +1 or -1. rows: 0 under joint
    control (one error ratio), else the number of samples. rtol, atol: one number or tensor a leaf. norm: the user's, of
    leaves, or None for the largest of the leaves' RMS norms. quadratures: how many of the last leaves func does not depend
    on; they have slopes but no stages. quadratures_in_norm: whether their error counts. signs: of the slopes of each leaf, -1
    where field gives them for the opposite direction of time; none: all +1. held: bool [rows], those that take no part and
    stay at t[0]. missing: after a solve in which rows failed, the outputs that they did not reach, [T, rows]. calls: after a
    solve, some of those of func, for a way back that calls it again (`Evaluation`).
    """

    field: Callable[..., list[Any]]
    leaves: list[Tensor]
    t: list[float]
    direction: float
    per_sample: bool
    rtol: list[Any]
    atol: list[Any]
    norm: Callable[[list[Tensor]], Any] | None = None
    quadratures: int = 0
    quadratures_in_norm: bool = True
    signs: list[float] | None = None
    held: Tensor | None = None
    missing: Tensor | None = None
    calls: Sequence[Any] = ()

    @property
    def state_leaves(self) -> list[Tensor]:
        """Those that func depends on."""
        return self.leaves[: len(self.leaves) - self.quadratures]

    @property
    def empty(self) -> bool:
        """Whether the state has no numbers."""
        return all([leaf.numel() == 0 for leaf in self.leaves])

    @property
    def rows(self) -> int:
        return self.leaves[0].shape[0] if self.per_sample else 1

    @property
    def device(self) -> torch.device:
        return self.leaves[0].device

    @property
    def real(self) -> torch.dtype:
        """The real type of the state: that of the times func sees."""
        return REAL[self.leaves[0].dtype]

    @property
    def fused_error(self) -> bool:
        """Whether the error kernel serves this problem: the default norm and tolerances that are numbers."""
        return self.norm is None and not any(isinstance(tol, Tensor) for tol in (*self.rtol, *self.atol))

    def start_time(self, perturb: bool) -> Tensor:
        """t[0] as func sees it; perturb: just inside."""
        return self.time_beside(0, 1.0 if perturb else 0.0)

    def time_beside(self, index: int, side: float) -> Tensor:
        """t[index] as func sees it. side: +1: just after it in the direction of the solve, -1: just before, 0: itself."""
        times = torch.full((1, self.rows), self.t[index], dtype=self.real, device="cpu")
        if side:
            times = torch.nextafter(times, torch.full_like(times, self.direction * side * math.inf))
        return self.time_views(to_device(times, self.device))[0]

    def same_time(self, x: float, y: float) -> bool:
        """Whether func sees two times as one: they may come from numbers of float32."""
        return x == y or (self.real != torch.float64 and bool(np.float32(x) == np.float32(y)))

    def time_views(self, times: Tensor) -> list[Tensor]:
        """times [stages, rows] as func sees them: 0-dimensional, or [batch, 1, ...] of the first leaf's rank."""
        if self.per_sample:
            return list(times.view(*times.shape, *[1] * (self.leaves[0].dim() - 1)).unbind(0))
        return list(times.view(-1).unbind(0))


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


def check_times(t: Any, name: str = "t") -> tuple[Tensor, list[float]]:
    """t as a one-dimensional floating tensor and as numbers. Lists of numbers are taken too."""
    values: Any = None
    if isinstance(t, (tuple, list)) and all(isinstance(x, (int, float)) for x in t):
        values = [float(x) for x in t]  # torch.compile cannot read numbers out of a tensor
        t = torch.tensor(values, dtype=torch.float64, device="cpu")
    elif isinstance(t, (tuple, list)) and any(isinstance(x, Tensor) and x.dim() == 0 for x in t):
        t = torch.stack([torch.as_tensor(x, dtype=torch.float64, device="cpu") for x in t])  # with their gradients
    elif not isinstance(t, Tensor):
        try:
            t = torch.as_tensor(t, dtype=torch.float64, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{name} must be a one-dimensional tensor of times, got {type(t).__name__}") from None
    if not t.dtype.is_floating_point:
        raise TypeError(f"{name} must be a floating tensor, got {t.dtype}")
    if t.dim() != 1 or t.numel() == 0:
        raise ValueError(f"{name} must be one-dimensional with at least one time, got shape {list(t.shape)}")
    if values is None:
        if not torch.compiler.is_compiling() and (t.is_meta or not has_memory(t)):
            what = "tensor on the meta device" if t.is_meta else type(t).__name__
            raise ValueError(f"{name} must hold numbers, got a {what}, which has none; give a list of numbers")
        if written_down():
            refuse_traced_times(t, name)
        if torch._C._functorch.is_batchedtensor(t):
            raise NotImplementedError(f"{name} must not be mapped by torch.vmap: the steps of a solve follow from numbers")
        values = t.detach().double().tolist()
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{name} must be finite, got {values}")
    steps = [b - a for a, b in pairwise(values)]
    if not (all(step > 0 for step in steps) or all(step < 0 for step in steps)):
        raise ValueError(f"{name} must be strictly increasing or decreasing, got {values}")
    return t, values


def check_tolerance(name: str, value: Any, structure: Structure) -> list[Any]:
    """One number or broadcastable tensor a leaf."""
    leaves = structure.leaves
    if isinstance(value, (tuple, list)) and not structure.single:
        if len(value) != len(leaves):
            raise ValueError(f"{name} must be one tolerance or one for each of the {len(leaves)} leaves, got {len(value)}")
        parts = list(value)
    else:
        parts = [value] * len(leaves)
    return [_check_one_tolerance(name, part, leaf) for part, leaf in zip(parts, leaves, strict=True)]


def check_zero_tolerance(problem: Problem) -> None:
    """Raises ValueError where the error test would divide by zero at the start: atol is 0, and a number of y0 too."""
    for i, (leaf, rtol, atol) in enumerate(zip(problem.leaves, problem.rtol, problem.atol, strict=True)):
        absolute = bool((atol > 0).all()) if isinstance(atol, Tensor) else atol > 0
        if not absolute and not bool((atol + rtol * leaf.abs() > 0).all()) and not bool(leaf.isnan().any()):
            raise ValueError(
                f"atol must be above 0 where y0 is 0: in leaf {i} of y0 atol + rtol * |y0| is 0, and no error is within it"
            )


def _check_one_tolerance(name: str, value: Any, leaf: Tensor) -> Any:
    if not isinstance(value, Tensor):
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}") from None
        if not (number >= 0 and math.isfinite(number)):
            raise ValueError(f"{name} must be a finite number of at least 0, got {value}")
        return number
    if value.requires_grad:
        raise ValueError(f"{name} must not require a gradient")
    if not bool((value >= 0).all()):
        raise ValueError(f"{name} must be at least 0 everywhere, got {value}")
    if value.numel() == 1:
        return float(value)
    try:
        fits = torch.broadcast_shapes(value.shape, leaf.shape) == leaf.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"{name} must broadcast against y0, {list(leaf.shape)}, got {list(value.shape)}")
    return value.to(leaf.device, torch.promote_types(leaf.dtype.to_real(), torch.float32))
