"""Families of methods: how a step is computed. The loops know nothing of it, and a method belongs to one by the type of its
data. A new family is a file with that type and its steps, and a line in `FAMILIES`.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor

from ..auto import AutoMethod
from ..problem import Problem
from ..stepper import Stepper
from ..tableau import ButcherTableau
from .auto import AutoSteps
from .bdf import BdfMethod, BdfSteps
from .explicit import ExplicitSteps
from .scipy_solver import ScipyMethod, ScipySteps
from .trajectory import Recorder
from .whole import StepFunction, WholeSteps


class Family(Protocol):
    """The steps of one solve, in the buffers of its stepper.

    A step begins at y0 with the slope k[0], which is f there, or the last slope of the step before. It leaves its end in y[-1]
    and its slopes in k[1:], whose times are t0 + c dt. The method's data says how they are read: y1 is y0 + dt sum_j b_j k_j,
    the error dt sum_j e_j k_j, an output inside the step y0 + dt sum_j b_j(theta) k_j. They need not be slopes of func: any
    tensors of which that holds.

    calls: of func, in a step. looks: the host must see how each step went. no_way_back, no_graph: why the backward solve of an
    adjoint cannot use it, and why no captured graph can hold its steps, or "". steers: it chooses the size of steps itself.
    """

    calls: int
    looks: ClassVar[bool]
    steers: ClassVar[bool]
    no_way_back: ClassVar[str]
    no_graph: ClassVar[str]

    def __init__(self, method: Any, problem: Problem, stepper: Stepper, state: Tensor, recorder: Recorder | None, ahead: bool):
        """state: the solver state, see `ops.FIELDS`. recorder: where what a step was made of must outlive it. ahead: the host
        runs ahead and nothing is recorded."""

    @staticmethod
    def refusal(problem: Problem, recorder: Any) -> str:
        """Why it cannot serve this solve, in words that go on after the method's name, or ""."""
        ...

    def begin(self) -> None:
        """Before the first step: y0, k[0], the times and the size of the step are there."""

    def step(self, field: Callable[..., Any], times: Tensor, views: list[Tensor]) -> tuple[Sequence[Any], list[int]]:
        """A step is tried. times: [stages, rows], with `views` as func sees them. Returns what a gradient needs of it, see
        `trajectory.Step.evaluations`, and the addresses of the last slopes, for whoever launches next to bind; [] if bound."""
        ...

    def error(self) -> list[Tensor] | None:
        """The estimate for the step just tried, a tensor a leaf, or None where it is that by the weights e."""
        ...

    def steer(self, ratio: Tensor) -> None:
        """Asked where it steers: puts in place of the error over the tolerance, [rows], that by which the I controller of order
        1 does what it chooses, above 1 for a step that is rejected."""

    def advance(self) -> None:
        """Rows move on where they were accepted, on the device: y0 and k[0], and what the family carries along."""

    def swap(self) -> None:
        """The same where the host knows that the only row was."""

    def restart(self, rows: Tensor) -> None:
        """k[0] of these rows, bool [rows], is new: they are beyond a discontinuity of func."""


FAMILIES: dict[type, Any] = {
    ButcherTableau: ExplicitSteps,
    StepFunction: WholeSteps,
    BdfMethod: BdfSteps,
    ScipyMethod: ScipySteps,
    AutoMethod: AutoSteps,
}


def family_of(method: Any) -> type[Family]:
    family: type[Family] = FAMILIES[type(method)]
    return family
