"""Whether func gives on the way back what it gave in the solve.

Nobody can tell from outside what func reads: attributes, variables it closes over, elements of lists, a mode, generators. So a
way back that calls it anew calls it first where the solve did, and compares. What func only counts or keeps does not matter.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import noise
from ..problem import Problem
from ..solvers.trajectory import Evaluation

OTHER_SLOPE = (
    "func does not give what it gave in the solve, at the same t and y: gradient={!r} calls it again{}, so the gradient would "
    "be that of another solve. Something that func reads has been modified by an inplace operation or replaced since (a tensor, "
    "an attribute, a variable that it closes over, an element of a list, train() or eval()), or it draws random numbers other "
    "than those of torch's default generators, or counts its calls. Call backward before the change, hand what changes to func "
    "in args as a new tensor, or use gradient='direct'"
)
_ROUNDING = 1e-5  # of a slope that even float64 may lose: a part of func may be in float32, on CUDA in any order


def refuse_another(field: Any, problem: Problem, calls: Sequence[Evaluation], gradient: str, when: str = "") -> None:
    """Calls func where the solve called it. Raises RuntimeError where a slope is another, beyond rounding.

    calls: of the solve. Random numbers of torch's default generators are another matter, see `noise`: nothing is said of them
    here, and they are put back.
    """
    device = problem.device
    others: list[Tensor] = []
    for call in calls:
        before = noise.states(device)
        y = [leaf.detach().clone().requires_grad_() for leaf in call.y]
        with torch.enable_grad():
            k = field(call.t.detach().clone(), y)
        if noise.differ(before, noise.states(device)):
            noise.restore(before, device)
            return
        with torch.no_grad():
            for i, (found, slope) in enumerate(zip(k, call.k, strict=True)):
                if slope.numel() and not (device.type == "cpu" and torch.equal(found, slope)):
                    others.append(_beyond_rounding(found, slope, y[i] if i < len(y) else None, problem))
    if others and bool(torch.stack(others).any()):
        raise RuntimeError(OTHER_SLOPE.format(gradient, when))


def _beyond_rounding(found: Tensor, slope: Tensor, y: Tensor | None, problem: Problem) -> Tensor:
    """bool []. A slope may be the small difference of what is as large as y in the time of the solve; values that are not
    finite count as equal."""
    kind, eps = problem.device.type, torch.finfo(slope.dtype).eps
    cast = torch.finfo(torch.get_autocast_dtype(kind)).eps if torch.is_autocast_enabled(kind) else 0.0
    share = max(min(1000 * max(eps, cast), 4 * max(eps, cast) ** 0.5), _ROUNDING)
    allowed = share * slope.abs().amax()
    if y is not None:
        allowed = allowed + 64 * eps / abs(problem.t[-1] - problem.t[0]) * y.abs().amax()
    return (found - slope).abs().amax() > allowed
