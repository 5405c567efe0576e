"""The gradient of an adaptive solve by captured steps: one forwards, and one that is made again and undone on the way back.

The tape holds the states at the start of the steps, as for `checkpoint`, which is what `direct` is served by too. A step on
the way back lies on memory of its own, into which state, time and size of each step of the tape are put in turn. What outputs
inside a step add to its slopes' gradients is put there too, for a second graph that takes it in.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..gradients.autocast import autocast_again
from ..gradients.backward_walk import BackwardWalk
from ..gradients.checkpoint import Recomputation, way_back
from ..integrate import Options
from ..problem import Problem, aliased, counter_of
from ..products import Targets
from ..solvers.adaptive import AdaptiveSolver
from ..solvers.checkpoints import Checkpoints
from ..solvers.trajectory import Evaluation, Recorder, Step, Trajectory
from .capture import captured as replay_of
from .capture import pool, warming_up


class GraphedSteps:
    """The graphs of adaptive solves. captured: the tensors of func that get gradients. record(t): a recorder of a solve. cast:
    of autocast, on the way back."""

    def __init__(
        self,
        problem: Problem,
        options: Options,
        captured: Sequence[Tensor],
        record: Callable[..., Recorder],
        cast: dict[str, Any],
    ):
        self.own = replace(problem, leaves=[leaf.clone() for leaf in problem.leaves])
        self.record, self.captured, self.cast = record, captured, cast
        self.recorder = record(t=problem.t, checkpoints=Checkpoints(None, None))
        common: dict[str, Any] = {"first_step": options.first_step, "step_t": options.step_t, "recorder": self.recorder}
        self.solver = AdaptiveSolver(self.own, options.tableau, options.control, graph="step", **common)
        self.solver.pool = pool(problem.device)
        self.back: StepBack | None = None

    @property
    def usable(self) -> bool:
        return self.solver.captures and (self.back is None or self.back.usable)

    def solve(self, problem: Problem, options: Options, start: Evaluation) -> Trajectory:
        self.recorder = self.solver.recorder = self.record(t=problem.t, checkpoints=Checkpoints(None, None))
        self.recorder.owned = True
        self.solver.reset(problem, options.first_step)
        counter_of(problem.field).nfe = 1  # start
        found = self.solver.run(start)
        if self.back is None and self.usable and self._steps():
            func: Any = self.own.field
            field, captured = aliased(func, self.captured) or (func, list(self.captured))
            own = replace(self.own, field=field)
            with autocast_again(self.cast):
                self.back = StepBack(own, self.recorder, self._steps()[-1], captured, self.solver.pool)
        return found

    def _steps(self) -> list[Step]:
        return [entry for entry in self.recorder.tape if isinstance(entry, Step)]

    def walk(self, grad_ys: Sequence[Tensor | None]) -> tuple[list[Tensor], list[Tensor | None], int]:
        """The gradients for y0 and for the captured tensors, and how often func was called."""
        with autocast_again(self.cast):
            if self.back is not None:
                return self.back.walk(self._steps(), grad_ys)
            # No step was ever accepted.
            (y0, _, found), calls = way_back(self.recorder, self.own, self.captured, grad_ys, False, False)
            return y0, found, calls


class StepBack:
    """One step of a tape, made again and undone, captured with and without outputs inside it.

    example: a step to begin with. Everything that is done once, such as finding a tensor that is not among the captured ones,
    is done with it. memory: that of the step forwards, which is never made at the same time.
    """

    def __init__(
        self, problem: Problem, recorder: Recorder, example: Step, captured: Sequence[Tensor], memory: tuple[Any, ...]
    ):
        tableau = recorder.tableau
        self.tableau = tableau
        self.undoing = BackwardWalk(
            problem, recorder, Targets(captured), [None] * len(problem.leaves), False, keep_graphs=False
        )
        self.again = Recomputation(problem, recorder, captured, False, False)
        self.start = self.again.start
        self.dt = torch.ones(problem.rows, dtype=torch.float64, device=problem.device)
        self.step = replace(example, times=example.times.clone(), first=example.first.clone(), dt=self.dt, k=[], evaluations=())
        if example.accept is not None:
            self.step.accept = example.accept.clone()
        self.step.ends = None, None
        zeros = lambda: [torch.zeros_like(leaf) for leaf in problem.leaves]  # noqa: E731
        self.lam, self.into_y0, self.into_slopes = zeros(), zeros(), [zeros() for _ in range(tableau.stages)]
        self.replays: dict[bool, Callable[[], None] | None] = {}
        self.usable = True
        self._put(example)
        for inside in {False, len(problem.t) > 2}:
            with warming_up(problem.device):
                self._undo(inside)
            undo = partial(self._undo, inside)
            self.replays[inside] = replay_of(undo, problem.device, memory)
            self.usable = self.usable and self.replays[inside] is not None

    def _put(self, step: Step) -> None:
        """This step is the next to be undone."""
        assert step.y0 is not None
        with torch.no_grad():
            torch._foreach_copy_([*self.start, self.step.times, self.step.first], [*step.y0, step.times, step.first])
            if isinstance(step.dt, Tensor):
                self.dt.copy_(step.dt)
            else:
                self.dt.fill_(step.dt)
            if self.step.accept is not None and step.accept is not None:
                self.step.accept.copy_(step.accept)

    def _undo(self, inside: bool) -> None:
        """inside: outputs have added to the gradients of slopes; then that of the last slope counts too."""
        walk, again = self.undoing, self.again
        self.step.outputs = [(0, 0.0, None)] if inside else []
        again.steps, again.restarts = [self.step], [[]]
        first, step = again.record(0, (self.start, None))
        assert isinstance(step, Step)
        walk.kappa = None
        walk.undo_points(step, self.lam, self.dt, *((self.into_slopes, self.into_y0) if inside else (None, None)))
        walk.sums.flush()
        walk.undo(first)
        torch._foreach_copy_(self.lam, walk.lam)

    def _take_in(self, step: Step) -> bool:
        """The gradients of outputs in the step; whether some lie inside it."""
        into_slopes, lam, into_y0 = self.undoing.outputs(step, self.lam, self.dt)
        if lam is not self.lam:
            torch._foreach_copy_(self.lam, lam)
        if into_slopes is None or into_y0 is None:
            return False
        for own, new in zip((*self.into_slopes, self.into_y0), (*into_slopes, into_y0), strict=True):
            torch._foreach_copy_(own, new)
        return True

    def walk(self, steps: Sequence[Step], grad_ys: Sequence[Tensor | None]) -> tuple[list[Tensor], list[Tensor | None], int]:
        """The gradients for y0 and for the captured tensors, and how often func was called."""
        walk, calls = self.undoing, 0
        walk.begin(grad_ys)
        torch._foreach_zero_(self.lam)
        walk.sums.clear()
        for step in reversed(steps):
            self._put(step)
            inside = bool(step.outputs) and self._take_in(step)
            replay = self.replays[inside]
            assert replay is not None
            replay()
            calls += self.tableau.stages - 1 + inside
        walk.lam = self.lam
        grad_y0, _, found = walk.result()
        return grad_y0, found, calls
