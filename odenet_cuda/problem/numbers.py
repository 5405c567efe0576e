"""Times and tolerances, checked."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..tracing import has_memory, refuse_traced_times, torch_is_plain, written_down
from .initial_value import Problem
from .structure import Structure
from .times import OwnTimes


def check_times(t: Any, name: str = "t", batch: int | None = None) -> tuple[Tensor, Any]:
    """t as a floating tensor, one-dimensional, and as numbers. Lists of numbers are taken too. batch: the number of samples
    that may have times of their own, in a tensor [batch, T], which gives `OwnTimes`; None: they may not."""
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
    own = t.dim() == 2 and batch is not None
    if not own and (t.dim() != 1 or t.numel() == 0):
        hint = "; times of each sample, [batch, T], need step_control='per_sample'" if t.dim() == 2 and name == "t" else ""
        raise ValueError(f"{name} must be one-dimensional with at least one time, got shape {list(t.shape)}{hint}")
    if values is None:
        if not torch.compiler.is_compiling() and (t.is_meta or not has_memory(t)):
            what = "tensor on the meta device" if t.is_meta else type(t).__name__
            raise ValueError(f"{name} must hold numbers, got a {what}, which has none; give a list of numbers")
        if written_down():
            refuse_traced_times(t, name)
        if torch._C._functorch.is_batchedtensor(t):
            raise NotImplementedError(f"{name} must not be mapped by torch.vmap: the steps of a solve follow from numbers")
        if own:
            return t, _own_times(t, name, batch)
        values = t.tolist()
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{name} must be finite, got {values}")
    steps = [b - a for a, b in pairwise(values)]
    if steps and not (min(steps) > 0 or max(steps) < 0):
        raise ValueError(f"{name} must be strictly increasing or decreasing, got {values}")
    return t, values


def _own_times(t: Tensor, name: str, batch: int | None) -> OwnTimes:
    """Those of a tensor [batch, T]."""
    if t.shape[0] != batch or t.shape[1] == 0:
        raise ValueError(f"{name} must have shape [{batch}, T], a row of times for each sample, got {list(t.shape)}")
    t = t.detach().double().cpu()
    table = t.contiguous().numpy() if torch_is_plain() else np.array(t.tolist())
    missing = np.isnan(table)

    def refuse(wrong: np.ndarray, rule: str) -> None:
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(f"{name} {rule}, got {table[row].tolist()} in row {row}")

    refuse(missing[:, 0], "must not begin with NaN: the first time is that of y0")
    refuse((missing[:, :-1] & ~missing[:, 1:]).any(1), "must hold NaN after the last time of a row alone")
    refuse(np.isinf(table).any(1), "must be finite, or NaN after the last time of a row")
    steps = np.diff(table)
    up, down = ((sign * steps > 0) | missing[:, 1:] for sign in (1, -1))
    refuse(~up.all(1) & ~down.all(1), "must be strictly increasing or decreasing in every row")
    return OwnTimes(table)


def check_tolerance(name: str, value: Any, structure: Structure) -> list[Any]:
    """One number or broadcastable tensor a leaf."""
    leaves = structure.leaves
    if type(value) is float and 0 <= value < math.inf:
        return [value] * len(leaves)
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
