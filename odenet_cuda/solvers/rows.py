"""Whether func keeps samples apart, as per-sample control needs it: they are at different times, so what one sees of another
is of another time."""

import warnings

import numpy as np
import torch

from .. import noise
from ..ops import FIELDS
from ..problem import Field, Problem
from ..step_control import SUCCESS
from ..stepper import Stepper
from ..tableau import Method

_ROUNDING = 1e4  # units in the last place, of what must not change


def warn_of_coupled(problem: Problem, stepper: Stepper, method: Method, host: np.ndarray | None) -> None:
    """After a solve. Rows that were at their end while others made the last step had the same t and y then as at the end of
    their own, so the same slopes if func keeps samples apart; where they had others, three more calls tell why. host: the
    solver state, None where the host does not see it. Warns."""
    known = method.fsal and type(problem.field) is Field
    if host is None or not known or not problem.per_sample or problem.rows < 2 or problem.own:
        return
    held = (host[FIELDS["status"]] == SUCCESS) & (host[FIELDS["accept"]] == 0)
    if not held.any() or held.all() or not all([len(stepper.k[i]) == len(stepper.y0) for i in (0, -1)]):
        return
    pairs = [(first.detach(), last.detach()) for first, last in zip(stepper.k[0], stepper.k[-1], strict=True)]
    differ = torch.stack([(a != b).reshape(problem.rows, -1).any(1) for a, b in pairs]).any(0) & torch.from_numpy(held)
    if bool(differ.any()) and _depends(int(differ.nonzero()[0]), problem, stepper):
        warnings.warn(
            "step_control='per_sample' gives each sample, a row on axis 0 of y0, its own steps, but what func gives for one "
            "depends on others, which are at other times then: ys cannot be trusted. Use step_control='joint', or, where the "
            "numbers on axis 0 are one state, give y0 an axis of samples before them: y0[None]",
            stacklevel=2,
        )


def _depends(row: int, problem: Problem, stepper: Stepper) -> bool:
    """Whether the slope of this row changes where all others are moved, and not from call to call."""
    field, t, generators = problem.field.again(), problem.time_beside(-1, 0.0), noise.states(problem.device)  # type: ignore
    y = [leaf.detach().clone() for leaf in stepper.y0]
    moved = [leaf + 0.01 * (1 + leaf.abs()) for leaf in y]
    for leaf, own in zip(moved, y, strict=True):
        leaf[row] = own[row]
    with torch.no_grad():
        calls = [field(t, [leaf.clone() for leaf in state]) for state in (y, y, moved)]
        slopes = [[k.detach()[row].clone() for k in call] for call in calls]
    noise.restore(generators, problem.device)
    for once, again, others in zip(*slopes, strict=True):
        bound = _ROUNDING * torch.finfo(once.dtype).eps * (once.abs().amax() + 1e-30)
        if bool(((once - again).abs() > bound).any()):
            return False
        if bool(((once - others).abs() > bound).any()):
            return True
    return False
