"""The family of explicit Runge-Kutta methods: stage after stage, each from the slopes before it, by the kernels."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor

from ..problem import Problem
from ..stepper import Stepper
from ..tableau import ButcherTableau
from .trajectory import Evaluation, Recorder


class ExplicitSteps:
    """Steps of an explicit method; see `families.Family`.

    ahead: nothing on the host depends on a step, and the kernel that ends one makes the first stage of the next too.
    """

    looks: ClassVar[bool] = False
    steers: ClassVar[bool] = False
    no_way_back: ClassVar[str] = ""
    no_graph: ClassVar[str] = ""

    def __init__(
        self, tableau: ButcherTableau, problem: Problem, stepper: Stepper, state: Tensor, recorder: Recorder | None, ahead: bool
    ):
        self.tableau, self.stepper, self.recorder, self.ahead = tableau, stepper, recorder, ahead
        self.calls = tableau.stages - 1
        self.stages = range(1, tableau.stages)
        # Where y1 is no stage, the next step begins with the slope of the last one, which lies beside it.
        self.end = 0 if tableau.fsal else len(tableau.rows)
        self.advance: Callable[[], None] = stepper.kernels.advance_and_stage if ahead else stepper.kernels.advance
        self.swap: Callable[[], None] = stepper.swap_accepted

    @staticmethod
    def refusal(problem: Problem, recorder: Any) -> str:
        return ""

    def begin(self) -> None:
        if self.ahead:
            self.stepper.kernels.stage(1, [])

    def step(self, field: Callable[..., Any], times: Tensor, views: list[Tensor]) -> tuple[Sequence[Any], list[int]]:
        if self.recorder is not None:
            return self._recorded(field, views, self.recorder)
        stepper, ahead = self.stepper, self.ahead
        kernels, addresses = stepper.kernels, list[int]()
        for i in self.stages:
            if i > 1 or not ahead:
                kernels.stage(i, addresses)
            addresses = stepper.set_slopes(i, field(views[i], stepper.y[i], i), True)
        if not self.end:
            return (), addresses
        kernels.stage(self.end, addresses)
        return (), []

    def _recorded(
        self, field: Callable[..., Any], views: list[Tensor], recorder: Recorder
    ) -> tuple[list[Evaluation | None], list[int]]:
        stepper, addresses = self.stepper, list[int]()
        evaluations: list[Evaluation | None] = []
        for i in self.stages:
            stepper.kernels.stage(i, addresses)
            evaluation = recorder.evaluate(field, views[i], stepper.y[i])
            evaluations.append(evaluation)
            addresses = stepper.set_slopes(i, evaluation.k, False)
        if not self.end:
            return evaluations, addresses
        stepper.kernels.stage(self.end, addresses)
        return [*evaluations, None], []

    def error(self) -> list[Tensor] | None:
        return None

    def restart(self, rows: Tensor) -> None:
        pass
