"""The family of methods whose step is one function in torch's operations, recorded and differentiated as a whole."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..captured import Known, Walk
from ..mass import check_consistent
from ..ops import FIELDS
from ..problem import Problem, counter_of
from ..stepper import Stepper
from ..tableau import StepFunction
from .trajectory import Evaluation, Recorder, Step


@dataclass(slots=True)
class WholeStep(Evaluation):
    """A step as one evaluation of what it maps: t are the times of its slopes, y the leaves of y0, those of k[0] and dt
    [rows], then dt and the leaves of the first slope of each step before it that it remembers, the last first; k are the leaves
    of y1 and of all further slopes."""

    method: Any = None  # a StepFunction, or what else has its `step`
    problem: Any = None

    def again(self, field: Callable[..., Any]) -> list[Tensor]:
        return mapped(self.method, self.problem, field, self.t, self.y)[0]


def whole_of(step: Step) -> WholeStep | None:
    """The record of a step that was recorded as a whole."""
    first = step.evaluations[0] if step.evaluations else None
    return first if isinstance(first, WholeStep) else None


def mapped(
    method: StepFunction,
    problem: Problem,
    field: Callable[..., Any],
    times: Tensor,
    y: Sequence[Tensor],
    kept: dict[str, Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor] | None]:
    """(k of a `WholeStep` at these times and y, the error). kept: what a step leaves to the next, where it need not be made
    again."""
    n = len(problem.state_leaves)
    past = [(y[i], list(y[i + 1 : i + 1 + n])) for i in range(2 * n + 1, len(y), n + 1)]
    more = arguments(method, problem, y[:n], past)
    if kept is not None:
        more["kept"] = kept
    y1, slopes, error = method.step(field, problem.time_views(times), y[2 * n], list(y[:n]), list(y[n : 2 * n]), **more)
    return [*y1, *(leaf for of_slope in slopes for leaf in of_slope)], error


def arguments(method: StepFunction, problem: Problem, y0: Sequence[Tensor], past: Sequence[Any]) -> dict[str, Any]:
    """What its step is given by name."""
    more: dict[str, Any] = {"past": past} if method.memory else {}
    if "tolerance" in method.takes:
        parts = zip(y0, problem.rtol, problem.atol, strict=False)
        more["tolerance"] = [(atol + rtol * leaf.detach().abs()).expand_as(leaf) for leaf, rtol, atol in parts]
    for name in ("jac", "mass"):
        if getattr(problem, name) is not None:
            more[name] = getattr(problem, name)
    return more


def _noted(field: Any) -> Callable[..., list[Tensor]]:
    """The field, which notes whether func depends on tensors with gradients, as it does itself where none are recorded: in here
    calls record them to differentiate func."""
    counter = counter_of(field)
    if not counter.with_gradients:
        return field  # type: ignore[no-any-return]

    def call(t: Tensor, y: Sequence[Tensor], stage: int = 0) -> list[Tensor]:
        k: list[Tensor] = field(t, y, stage)
        if not counter.gave_graph and any([slope.requires_grad for slope in k]):
            counter.gave_graph = Walk(k, [t, *y], Known(), None).more
        return k

    call.field = field  # type: ignore[attr-defined]
    return call


def without_stages(problem: Problem, recorder: Any) -> str:
    """What a family without stages of func does not serve, as `families.Family.refusal` says it."""
    if problem.quadratures:
        return "has no slopes for integrals: they and the regularizers 'kinetic' and 'jacobian' need an explicit method"
    if recorder is not None and recorder.step_costs is not None:
        return "has no stages: the regularizers 'error' and 'stiffness' need an explicit method"
    return ""


class WholeSteps:
    """Steps of a `StepFunction`; see `families.Family`."""

    looks: ClassVar[bool] = True  # what the function does on the host may depend on the step
    steers: ClassVar[bool] = False
    no_way_back: ClassVar[str] = ""
    no_graph: ClassVar[str] = "decides on the host"

    def __init__(
        self, method: StepFunction, problem: Problem, stepper: Stepper, state: Tensor, recorder: Recorder | None, ahead: bool
    ):
        self.method, self.problem, self.stepper, self.recorder = method, problem, stepper, recorder
        self.calls = 0  # counted as they are made
        self.advance, self.swap = stepper.kernels.advance, stepper.swap_accepted
        self._error: list[Tensor] | None = None
        makes_again = recorder is not None and (recorder.graphs or recorder.checkpoints is not None)
        self.kept: dict[str, Tensor] | None = {} if "kept" in method.takes and not makes_again else None
        self.past: list[Tensor] = []  # as in `WholeStep.y`
        self.dt = state[FIELDS["dt"]]

    @staticmethod
    def refusal(problem: Problem, recorder: Any) -> str:
        if words := without_stages(problem, recorder):
            return words
        if recorder is not None and recorder.checkpoints is not None and recorder.tableau.memory:
            return "needs the steps before one to make it again, unlike gradient='checkpoint': use gradient='direct'"
        return ""

    def begin(self) -> None:
        if self.kept is not None:
            self.kept.clear()
        if self.problem.mass is not None:
            check_consistent(self.problem, self.stepper.k[0])

    def step(self, field: Callable[..., Any], times: Tensor, views: list[Tensor]) -> tuple[Sequence[Any], list[int]]:
        """The solver's buffers hold copies of what the function gave: a graph may hang on that."""
        stepper, n, recorder = self.stepper, self.stepper.n, self.recorder
        y = [leaf.detach() for leaf in (*stepper.y0, *stepper.k[0])] + [self.dt.clone()]
        y += [x.detach() for x in self.past]
        evaluations: list[Evaluation] = []
        if recorder is not None and recorder.graphs:
            found = recorder.evaluate(lambda t, y: self._mapped(field, t, y), times.detach(), y)
            evaluations = [WholeStep(found.t, found.y, found.k, method=self.method, problem=self.problem)]
            k = found.k
        else:
            k = self._mapped(_noted(field), times, y, self.kept)
        with torch.no_grad():
            for own, leaf in zip(stepper.y[-1], k[:n], strict=True):
                own.copy_(leaf)
        addresses: list[int] = []
        for j in range(1, self.method.stages):
            stepper.kernels.bind_slopes(j - 1, addresses)
            addresses = stepper.set_slopes(j, k[n * j : n * (j + 1)], recorder is None)
        if self.method.memory:
            kept = [slope.detach().clone() for slope in stepper.k[0]]
            self.past = [self.dt.clone(), *kept, *self.past][: self.method.memory * (n + 1)]
        return evaluations, addresses

    def _mapped(
        self, field: Callable[..., Any], times: Tensor, y: Sequence[Tensor], kept: dict[str, Tensor] | None = None
    ) -> list[Tensor]:
        k, self._error = mapped(self.method, self.problem, field, times, y, kept)
        return k

    def error(self) -> list[Tensor] | None:
        return self._error

    def restart(self, rows: Tensor) -> None:
        pass
