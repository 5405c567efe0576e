"""The family of `auto`: each row makes its steps by tsit5 until it has turned out to be stiff, and by rodas5p until that ends.

Stiff is a row of which fifteen accepted steps have had dt |lambda| near the end of tsit5's interval of stability, never six in
succession of them without (Hairer and Wanner II, IV.2). It is so no more where steps of rodas5p, whose size the tolerance
chooses, would be inside it: the cheaper method can then make the same steps (Petzold 1983, doi 10.1137/0904010). For that the
eigenvalue comes from a few steps of the power method, now and then.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..auto import AutoMethod, stiffness_of
from ..ops import FIELDS
from ..problem import Problem, counter_of
from ..step_control import RUNNING
from ..stepper import Stepper
from ..tableaus import TSIT5
from .stiffness import PRODUCTS, largest, stable_until
from .trajectory import Recorder
from .whole import WholeStep, WholeSteps

STIFF_STEPS, OTHERS = 15, 6
NEAR, INSIDE = 0.9, 0.7  # shares of the interval of stability
EVERY = 10  # accepted steps of rodas5p between two looks


class AutoSteps(WholeSteps):
    """See `families.Family`. stiff: bool [rows], on the host, as are the counts."""

    no_way_back: ClassVar[str] = "cannot be an adjoint_method: give 'rodas5p', the default, or another"
    method: Any

    def __init__(
        self, method: AutoMethod, problem: Problem, stepper: Stepper, state: Tensor, recorder: Recorder | None, ahead: bool
    ):
        super().__init__(method, problem, stepper, state, recorder, ahead)
        self.auto, self.state = method, state
        self.limit = stable_until(TSIT5)
        self.stiff, self.near, self.others, self.since = (torch.zeros(problem.rows, dtype=x, device="cpu") for x in _COUNTS)
        move, swap = self.advance, self.swap
        self.advance, self.swap = lambda: self._moving(move), lambda: self._moving(swap)

    @staticmethod
    def refusal(problem: Problem, recorder: Any) -> str:
        if any([leaf.dtype not in (torch.float32, torch.float64) for leaf in problem.leaves]):
            return "solves systems where func is stiff, in float32 or float64: use an explicit method for other types"
        return WholeSteps.refusal(problem, recorder)

    def step(self, field: Callable[..., Any], times: Tensor, views: list[Tensor]) -> tuple[Sequence[Any], list[int]]:
        running = (self.state[FIELDS["status"]] == RUNNING).cpu()
        stiff = self.stiff[running]
        if bool(stiff.any()) and not bool(stiff.all()):
            self.method = self.auto.by(self.stiff.to(self.problem.device))
        else:
            self.method = self.auto.by(bool(stiff.any()))
        evaluations, addresses = super().step(field, times, views)
        # Also where no graph is kept it is noted which method made the step.
        return evaluations or [WholeStep(times, [], [], method=self.method, problem=self.problem)], addresses

    def _moving(self, move: Callable[[], None]) -> None:
        """Looks at the step, which is there until rows move on."""
        state, size = self.state, None
        accepted = (state[FIELDS["accept"]] != 0).cpu()
        if bool((accepted & ~self.stiff).any()):
            k = [[slope.detach() for slope in of_stage] for of_stage in self.stepper.k[1 : 1 + TSIT5.stages]]
            size = stiffness_of(k, state[FIELDS["last_dt"]]).cpu()
        move()
        explicit, implicit = accepted & ~self.stiff, accepted & self.stiff
        if size is not None:
            near = explicit & (size > NEAR * self.limit)
            self.others = torch.where(near, 0, self.others + explicit.long())
            self.near = torch.where(self.others >= OTHERS, 0, self.near + near.long())
        self.since += implicit.long()
        due = implicit & (self.since >= EVERY)
        calm = due & self._calm() if bool(due.any()) else due
        self.since.masked_fill_(due, 0)
        self.stiff = (self.stiff | (self.near >= STIFF_STEPS)) & ~calm
        self.near.masked_fill_(self.stiff | calm, 0)

    def _calm(self) -> Tensor:
        """Whether tsit5 would be stable with the steps that rodas5p makes, bool [rows]."""
        state, y = self.state, [leaf.detach() for leaf in self.stepper.y0]
        rate, _ = largest(self.problem, state[FIELDS["time"]].cpu(), y)
        counter_of(self.problem.field).nfe += PRODUCTS + 1
        dt = state[FIELDS["last_dt"]].abs().cpu()
        return dt * torch.from_numpy(rate) < INSIDE * self.limit


_COUNTS = torch.bool, torch.int64, torch.int64, torch.int64
