"""Methods given as step functions on a grid that is known beforehand: each step is one function in torch's operations."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..ops import FIELDS, NUM_FIELDS
from ..problem import Problem, to_device
from ..ranges import marked
from ..step_control import initial_state
from ..stepper import Stepper
from ..tableau import StepFailed, StepFunction
from .events import EventWatch
from .fixed import plan_of, stage_times
from .trajectory import Evaluation, Output, Recorder, Step, Trajectory
from .whole import WholeSteps


class SteppedSolver:
    """A solve on the grid `nodes`, as `FixedSolver`, whose arguments these are; but no graph holds it. A step that cannot be
    made ends it: then the trajectory has a solver state that says so."""

    def __init__(
        self,
        problem: Problem,
        method: StepFunction,
        nodes: list[float],
        moves_with: list[int | None],
        *,
        perturb: bool = False,
        callbacks: dict[str, Callable] | None = None,
        recorder: Recorder | None = None,
        events: EventWatch | None = None,
    ):
        if check := getattr(method.step, "check", None):
            check(nodes)
        self.problem, self.method, self.nodes, self.moves_with = problem, method, nodes, moves_with
        self.perturb, self.events = perturb, events
        self.recorder: Any = recorder  # None: nothing is recorded
        self.recording = recorder is not None and recorder.slopes
        self.callback = (callbacks or {}).get("callback_step")
        self.plan = plan_of(nodes, problem.t, problem.direction, method)
        self.dts = to_device(torch.tensor(self.plan.dts, dtype=torch.float64, device="cpu"), problem.device)
        times = stage_times(self.plan, method, problem.real, problem.direction if perturb else 0.0)
        self.times = to_device(times, problem.device).reshape(-1, method.stages, 1)
        self.stepper = Stepper(problem, method, method.rows)
        state = torch.zeros(NUM_FIELDS, problem.rows, dtype=torch.float64, device=problem.device)
        self.dt = state[FIELDS["dt"]]
        self.family = WholeSteps(method, problem, self.stepper, state, recorder if self.recording else None, False)
        n = len(problem.state_leaves)
        self.ys = [leaf.new_empty(len(problem.t), *leaf.shape) for leaf in problem.leaves[:n]]

    def run(self, start: Evaluation | None = None) -> Trajectory:
        """start: f(t0, y0), where the caller already has it."""
        for out, leaf in zip(self.ys, self.stepper.y0, strict=True):
            out[0] = leaf
        slope: list[Any] = []
        last, failure, steps = None, None, len(self.plan.outputs)
        for step in range(steps):
            with marked("step"):
                if not slope:
                    last = self._start(step, start)
                    start, slope = None, self.stepper.k[0]
                if self.callback is not None:
                    self._call_back(step)
                try:
                    self._step(step)
                except StepFailed as error:
                    failure, steps = error, step
                    break
                ended = self.events is not None and self.events.ended(self.nodes[step : step + 2], self.stepper)
                self._go_on()
                slope = [] if self.perturb else self.stepper.k[0]
                if ended:
                    steps = step + 1
                    break
        state = None if failure is None else self._failed(steps, failure)
        y = [leaf.clone() for leaf in self.stepper.y0]
        call = (
            last
            if failure is not None or self.perturb or self.method.lands
            else Evaluation(self.times[-1, -1, 0], y, list(self.stepper.k[0]))
        )
        system = None if failure is None else failure.system
        return Trajectory(ys=self.ys, last=y, state=state, call=call, steps=steps, system=system)

    def _start(self, step: int, start: Evaluation | None) -> Evaluation:
        """The first slope, of the whole grid or of this step."""
        stepper = self.stepper
        if start is None:
            view = self.problem.time_views(self.times[step])[0]
            y = [leaf.clone() for leaf in stepper.y0]
            if self.recording:
                start = self.recorder.evaluate(self.problem.field, view, y)
            else:
                start = Evaluation(view, y, self.problem.field(view, y, 0))
        if self.recorder is not None:
            self.recorder.start(start, self.moves_with[step])
        stepper.set_slopes(0, [slope.detach() for slope in start.k], not self.recording)
        return start

    def _step(self, step: int) -> None:
        stepper, times = self.stepper, self.times[step]
        if self.recording:
            times = times.clone()
            stepper.new_stages()
        self.dt.copy_(self.dts[step])
        evaluations, _ = self.family.step(self.problem.field, times, self.problem.time_views(times))
        self._write_outputs(step)
        if self.recorder is not None:
            t0, t1 = self.nodes[step : step + 2]
            begin, end = [None if index is None else (index, None) for index in self.moves_with[step : step + 2]]
            outputs: list[Output] = self.plan.outputs[step]
            done = Step(times, times[0], t1 - t0, None, outputs, (begin, end), stepper.y0, stepper.k, evaluations)
            self.recorder.fixed_step(t0, t1, done)

    def _write_outputs(self, step: int) -> None:
        stepper, leaves = self.stepper, range(len(self.ys))
        outputs, landed = self.plan.outputs[step], self.plan.landed[step]
        slopes = [of_stage[leaf].detach() for leaf in leaves for of_stage in stepper.k]
        for place, weights in self.plan.inside[step]:
            at = [out[outputs[place][0]] for out in self.ys]
            ops.stage(at, stepper.y0, slopes, weights, self.dts[step : step + 1])
        if landed >= 0:
            for out, leaf in zip(self.ys, stepper.y[-1], strict=True):
                out[outputs[landed][0]] = leaf

    def _go_on(self) -> None:
        stepper = self.stepper
        if self.recording:
            stepper.y0 = [leaf.detach().clone() for leaf in stepper.y[-1]]
            stepper.k[0] = [slope.detach() for slope in stepper.k[-1]]
        else:
            stepper.swap_ends()
            stepper.k[0] = stepper.k[-1]

    def _call_back(self, step: int) -> None:
        t0, t1 = self.nodes[step : step + 2]
        t, dt = (self.dts.new_tensor(x) for x in (t0, abs(t1 - t0)))
        assert self.callback is not None
        self.callback(t, [leaf.clone() for leaf in self.stepper.y0], dt)

    def _failed(self, steps: int, failure: StepFailed) -> Tensor:
        """The solver state of a solve that ended after so many steps."""
        problem, t0, t1 = self.problem, *self.nodes[steps : steps + 2]
        state = initial_state(t0, problem.rows, problem.direction)
        reached = next((i for i, t in enumerate(problem.t) if problem.direction * (t - t0) > 0), len(problem.t))
        for name, value in (("status", failure.code), ("last_dt", t1 - t0), ("num_accepted", steps), ("output_end", reached)):
            state[FIELDS[name]] = value
        return to_device(torch.from_numpy(np.ascontiguousarray(state)), problem.device)
