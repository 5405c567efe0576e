"""The domain that a solution may not leave: a step that ends outside is rejected and halved, whatever its error.

Nothing in here waits for the device, but what the user's function does itself.
"""

from typing import Any

import torch
from torch import Tensor

from ..ops import FIELDS
from ..problem import Problem
from ..step_control import NON_FINITE, OUTSIDE, RUNNING, UNDERFLOW, StepControl


def inside(problem: Problem, leaves: list[Tensor]) -> Tensor:
    """What the user's function says of a state, bool [rows]. Raises TypeError and ValueError where that is something else."""
    assert problem.valid is not None
    with torch.no_grad():
        found = problem.valid(leaves)
    rows = problem.rows
    if isinstance(found, bool):
        found = torch.tensor(found, device=problem.device)
    if not isinstance(found, Tensor) or found.dtype is not torch.bool:
        kind = found.dtype if isinstance(found, Tensor) else type(found).__name__
        raise TypeError(f"valid must return bool, or a tensor of it, got {kind}")
    if found.numel() != rows or (problem.per_sample and found.shape[:1] != (rows,)):
        rule = f"one truth value for each sample, [{rows}]" if problem.per_sample else "one truth value for the whole state"
        raise ValueError(f"valid must return {rule}, got shape {list(found.shape)}")
    return found.to(problem.device).reshape(rows)


def check_start(problem: Problem) -> None:
    """Raises ValueError where the solve begins outside."""
    found = inside(problem, [leaf.clone() for leaf in problem.state_leaves])
    if not bool(found.all()):
        where = f": sample {int((~found).nonzero()[0])} does not" if problem.per_sample else ""
        raise ValueError(f"y0 must lie in the domain of valid, for a step cannot be shortened to nothing{where}")


class Domain:
    """Looks at the end of each step before the decision about it."""

    def __init__(self, problem: Problem, control: StepControl, order: int):
        self.problem, self.min_step = problem, control.min_step
        # Of this error ratio the controller makes a half.
        self.halving = max((2 * control.safety) ** order, 1 + 1e-12)
        self.outside = torch.zeros(problem.rows, dtype=torch.bool, device=problem.device)

    def before(self, state: Tensor, end: list[Tensor]) -> None:
        """state: with the error ratio of the step. A step of the least size is not accepted either."""
        ratio, dt, proposal = (state[FIELDS[name]] for name in ("error_ratio", "dt", "proposal"))
        running = state[FIELDS["status"]] == RUNNING
        self.outside = ~inside(self.problem, [leaf.detach() for leaf in end]) & running
        least = (dt.abs() <= self.min_step) | ((proposal <= self.min_step) & (self.min_step > 0))
        wanted = torch.where(least, torch.inf, ratio.clamp(min=self.halving))
        ratio.copy_(torch.where(self.outside & ~ratio.isnan(), wanted, ratio))

    def after(self, state: Tensor) -> None:
        """Rows that ended because no step is small enough are told from others."""
        status = state[FIELDS["status"]]
        failed = (status == UNDERFLOW) | (status == NON_FINITE)
        status.masked_fill_(failed & self.outside, float(OUTSIDE))


def domain_of(problem: Problem, control: StepControl, method: Any) -> Domain | None:
    return None if problem.valid is None else Domain(problem, control, method.order)
