"""Whether func gives on the way back what it gave in the solve.

Nobody can tell from outside what func reads: attributes, variables it closes over, elements of lists, a mode, generators. So a
way back that calls it anew calls it first where the solve did, and compares. What func only counts or keeps does not matter.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import noise
from ..problem import Problem
from ..solvers.trajectory import Evaluation

OTHER_SLOPE = (
    "func does not give what it gave in the solve, at the same t and y: gradient={!r} calls it again{}, so the gradient would "
    "be that of another solve. Something that func reads has been modified by an inplace operation or replaced since: a "
    "tensor, an attribute, a variable that it closes over, an element of a list, train() or eval(). Call backward before the "
    "change, hand what changes to func in args as a new tensor, or use gradient='direct'"
)
OTHER_EVERY_TIME = (
    "func gives something else at every call, at the same t and y: it counts its calls, draws random numbers, or adapts with "
    "each call, as spectral_norm does in training. gradient={!r} calls it again{}, so what it gives is not the gradient of the "
    "solve, only as near to it as these calls are to each other. Use gradient='direct'"
)
_ROUNDING = 1e-5  # of a slope that even float64 may lose: a part of func may be in float32, on CUDA in any order
_REPEATED = 16  # units in the last place, between two calls at once


def refuse_another(field: Any, problem: Problem, calls: Sequence[Evaluation], gradient: str, when: str = "") -> None:
    """Calls func where the solve called it. Raises RuntimeError where a slope is another, beyond rounding, and warns where func
    does not even give the same twice.

    calls: of the solve. Random numbers of torch's default generators are another matter, see `noise`: nothing is said of them
    here, and they are put back.
    """
    device = problem.device
    calls = [*calls[:1], *(call for call in calls[1:] if device.type != "cpu" or not _same_arguments(call, calls[0]))]
    t0, t1 = problem.interval
    span, cast = abs(t1 - t0) or math.inf, torch.is_autocast_enabled(device.type)
    before = noise.states(device)
    again = [_slopes(field, call) for call in calls]
    if noise.differ(before, noise.states(device)):
        noise.restore(before, device)
        return
    others = []
    for call, found in zip(calls, again, strict=True):
        for i, (x, slope) in enumerate(zip(found, call.k, strict=True)):
            if slope.numel() and not (device.type == "cpu" and torch.equal(x, slope)):
                eps = max(torch.finfo(slope.dtype).eps, torch.finfo(torch.get_autocast_dtype(device.type)).eps if cast else 0.0)
                share = max(min(1000 * eps, 4 * eps**0.5), _ROUNDING)
                # A slope may be the small difference of what is as large as y in the time of the solve.
                parts = 64 * torch.finfo(slope.dtype).eps / span * call.y[i].abs().amax() if i < len(call.y) else 0.0
                others.append((x - slope).abs().amax() > share * slope.abs().amax() + parts)
    if not others or not bool(torch.stack(others).any()):  # values that are not finite count as equal
        return
    third = [_slopes(field, call) for call in calls]
    pairs = [(x, y) for xs, ys in zip(again, third, strict=True) for x, y in zip(xs, ys, strict=True) if x.numel()]
    if any([bool((x - y).abs().amax() > _REPEATED * torch.finfo(x.dtype).eps * x.abs().amax()) for x, y in pairs]):
        noise.restore(before, device)
        warnings.warn(OTHER_EVERY_TIME.format(gradient, when), stacklevel=2)
        return
    raise RuntimeError(OTHER_SLOPE.format(gradient, when))


def _same_arguments(call: Evaluation, other: Evaluation) -> bool:
    """A solve of one call has made it at its start and late."""
    return torch.equal(call.t, other.t) and all([torch.equal(x, y) for x, y in zip(call.y, other.y, strict=True)])


def _slopes(field: Any, call: Evaluation) -> list[Tensor]:
    """Those that func gives there now, called as a way back calls it."""
    with torch.enable_grad():
        call = replace(call, t=call.t.detach().clone(), y=[leaf.detach().clone().requires_grad_() for leaf in call.y])
        k = call.again(field)
    return [slope.detach() for slope in k]
