"""What an adaptive solve that was interrupted has come to."""

from typing import Any

from ..ops import FIELDS
from .trajectory import Trajectory

# Where in a step the loop is: what is left behind can be told before the decision about it, and after it.
BETWEEN, DECIDING, DECIDED, MOVING = range(4)


def until_now(solver: Any) -> Trajectory | None:
    """The solve of this `AdaptiveSolver` up to its last accepted step, or None where that is not known."""
    if solver.phase == DECIDED:  # the step that was under way is made whole, but for what others do with it
        if solver.outputs:
            solver.stepper.kernels.dense_output(solver.outputs)
        if not solver.swaps:
            solver.family.advance()
        elif bool(solver.state[FIELDS["accept"], 0]):
            solver.family.swap()
    if solver.phase in (DECIDING, MOVING) or not solver.stepper.k[0]:
        return None
    trajectory: Trajectory = solver.trajectory()
    return trajectory
