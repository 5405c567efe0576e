"""The adaptive step loop: try a step, decide on it, write the outputs, move on, record. How a step is computed is the family's.

All decisions are made by the kernels in the solver state, a small float64 tensor on the device of the problem. On the CPU
the loop looks into it after each step; on CUDA it runs ahead (`ahead`). Only what needs the host at every step
(discontinuities, callbacks, a tape that is thinned, `quadrature`, some families) makes it look there.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops import FIELDS, STOPS
from ..problem import Problem
from ..ranges import marked
from ..step_control import RUNNING, StepControl
from ..stepper import Stepper
from . import ahead
from .domain import domain_of
from .events import EventWatch
from .families import family_of
from .hooks import AfterStep, Callbacks, Looker, runs_ahead, some
from .interruption import BETWEEN, DECIDED, DECIDING, MOVING, until_now
from .norms import write_norm
from .rows import warn_of_coupled
from .start import Resumed, first_slope, first_state, plan_first_step, plan_resumed, starts_on_jump, stop_table
from .stiffness import StiffnessLook
from .trajectory import Evaluation, Recorder, Trajectory


class AdaptiveSolver:
    """One adaptive solve, and after `reset` another of the same kind.

    method: the data of one of `FAMILIES`. graph: where the host runs ahead, capture a "step" and replay it, or let the device
    "loop" over it. resumed: where another solve ended, from which this one goes on.
    """

    def __init__(
        self,
        problem: Problem,
        method: Any,
        control: StepControl,
        *,
        first_step: float | None = None,
        step_t: Sequence[float] = (),
        jump_t: Sequence[float] = (),
        callbacks: dict[str, Callable] | None = None,
        recorder: Recorder | None = None,
        after_step: AfterStep | None = None,
        events: EventWatch | None = None,
        resumed: Resumed | None = None,
        lookers: Sequence[Looker] = (),
        graph: str = "",
    ):
        self.problem, self.method, self.first_step = problem, method, first_step
        self.recorder: Any = recorder  # None: nothing is recorded
        self.after_step, self.events, self.resumed, self.lookers = after_step, events, resumed, lookers
        self.callbacks = Callbacks(callbacks, problem.per_sample) if callbacks else None
        device, family = problem.device, family_of(method)
        self.stop_times = step_t, jump_t
        stops = stop_table(problem, step_t, jump_t)
        self.on_jump = starts_on_jump(problem, stops)
        self.jumps = bool(jump_t) and bool((stops[..., 1, :] == STOPS["jump"]).sum() > np.sum(self.on_jump))
        self.state, self.table, self.t = first_state(problem, stops, self.on_jump)
        self.dt, self.ratio = self.state[FIELDS["dt"]], self.state[FIELDS["error_ratio"]]
        self.host_view = self.state.numpy() if device.type == "cpu" else None
        needed = self.jumps or bool(callbacks or lookers) or family.looks or (recorder is not None and not recorder.can_wait)
        self.looks = needed or not runs_ahead(device)
        self.recording = recorder is not None and recorder.slopes
        self.captures = bool(graph) and not (self.looks or self.recording or family.no_graph)
        self._held: tuple[Tensor, list[Tensor]] | None = None  # the times of a captured step, where they must outlive it
        self.loops = graph == "loop"
        self.swaps = self.looks and not problem.per_sample
        in_norm = len(problem.leaves) - (0 if problem.quadratures_in_norm else problem.quadratures)
        self.stepper = Stepper(problem, method, method.rows, control.constants(method.order, family.steers), in_norm)
        if after_step is not None:  # what a stage was evaluated at is looked at after the step
            self.stepper.new_stages()
        self.in_norm = len(problem.leaves) if problem.norm is not None else in_norm
        self.stepper.bind_state(self.state, self.table, self.t)
        kept = recorder if self.recording else None
        self.family = family(method, problem, self.stepper, self.state, kept, not self.looks and not self.recording)
        self.unseen: list[tuple[Tensor, Any]] = []  # steps that the recorder is told late, with the solver state after each
        if recorder is not None and not self.looks:
            recorder.owned = True
        self.ys = [leaf.new_empty(len(problem.t), *leaf.shape) for leaf in self.stepper.y0[: self.stepper.n]]
        self.outputs = [out.data_ptr() for out in self.ys] if len(problem.t) > 2 else []
        self.replay: Callable[[], None] | None = None  # a captured step
        self.pool: tuple[Any, ...] = ()  # whose memory it works in
        self.domain = domain_of(problem, control, method)
        self.expected = 0  # steps, by the last solve
        self.phase = BETWEEN
        self.stiffness = StiffnessLook(problem, method)

    def reset(self, problem: Problem, first_step: float | None) -> None:
        """Another problem of the same kind takes the place of the last: in the same memory, for a captured step."""
        if self.after_step is not None:
            problem = replace(problem, field=self.after_step.resume(problem.field))
        self.problem, self.first_step = problem, first_step
        with torch.no_grad():
            stops = stop_table(problem, *self.stop_times)
            self.on_jump = starts_on_jump(problem, stops)
            for own, new in zip((self.state, self.table, self.t), first_state(problem, stops, self.on_jump), strict=True):
                own.copy_(new)
            for own, leaf in zip(self.stepper.y0, problem.leaves, strict=True):
                own.copy_(leaf)

    def run(self, start: Evaluation | None = None) -> Trajectory:
        """start: f(t0, y0), where the caller already has it."""
        try:
            if not self.looks:
                return ahead.run(self, start)
            self.start(start)
            done = self.problem.own and not bool((self.state[FIELDS["status"]] == RUNNING).any())
            while not done:
                with marked("step"):
                    done = self.looked_at_step()
                self.stiffness.after_step(self)
            return self.trajectory()
        except KeyboardInterrupt as interrupt:
            interrupt.trajectory = until_now(self)  # type: ignore[attr-defined]
            raise
        finally:
            for looker in self.lookers:
                looker.end()

    def start(self, start: Evaluation | None) -> None:
        """f(t0, y0) and the first step to try."""
        problem, stepper = self.problem, self.stepper
        for out, leaf in zip(self.ys, stepper.y0, strict=False):
            out[0] = leaf
        stepper.times.copy_(problem.start_time(self.on_jump).reshape(-1))
        if start is None:
            start = first_slope(self)
        if self.recorder is not None:
            self.recorder.start(start, 0)
        k0 = [slope if slope is None else slope.detach() for slope in start.k]
        if not self.swaps:  # they are written when rows move on
            k0 = [slope if slope is None else slope.clone() for slope in k0]
        if self.replay is not None:  # which reads them where they were
            for own, new in zip(stepper.k[0], k0, strict=True):
                if own is not None:
                    own.copy_(new)
            k0 = stepper.k[0]
        stepper.kernels.bind_slopes(0, stepper.set_slopes(0, k0, not self.recording))
        if self.resumed is not None:
            plan_resumed(stepper, self.state, self.resumed)
        else:
            plan_first_step(problem, stepper, self.state, self.in_norm, self.first_step, lambda t, y: self._evaluate(t, y).k)
        self.family.begin()

    def looked_at_step(self) -> bool:
        """A step that the host looks at; whether it was the last."""
        stepper, outputs = self.stepper, self.outputs
        if self.callbacks is not None:
            self.callbacks.before(self.state, stepper.y0)
        times, evaluations, addresses = self.attempt()
        self.phase = DECIDING
        self.decide(addresses)
        self.phase = DECIDED
        if self.events is not None:
            self.events.after_step(self.state, stepper)
        host = self.host_view if self.host_view is not None else self.state.cpu().numpy()
        if self.recorder is not None:
            self.recorder.step(host, evaluations, stepper.k, stepper.y0, times)
        if self.callbacks is not None:
            self.callbacks.after(host, self.state, stepper.y0)
        if outputs and (host[FIELDS["output_begin"]] < host[FIELDS["output_end"]]).any():
            stepper.kernels.dense_output(outputs)
        if self.after_step is not None:
            self.call_after_step()
        for looker in self.lookers:
            looker.after_step(host, stepper, self.state)
        self.phase = MOVING
        if not self.swaps:
            self.advance()
        elif host[FIELDS["accept"], 0]:
            self.family.swap()
        self.phase = BETWEEN
        if self.jumps:
            self._restart(host)
        return not some(host, "status", RUNNING)

    def _step(self) -> None:
        """One step, whatever becomes of it: nothing on the host depends on that."""
        stepper = self.stepper
        times, evaluations, addresses = self.attempt()
        self.phase = DECIDING
        self.decide(addresses)
        self.phase = DECIDED
        if self.events is not None:
            self.events.after_step(self.state, stepper)
        if self.outputs:
            stepper.kernels.dense_output(self.outputs)
        if self.after_step is not None:
            self.call_after_step()
        if self.recording:
            self.unseen.append((self.state.clone(), (evaluations, list(stepper.k), stepper.y0, times)))
        self.phase = MOVING
        self.advance()
        self.phase = BETWEEN

    def trajectory(self) -> Trajectory:
        warn_of_coupled(self.problem, self.stepper, self.method, self.host_view)
        if len(self.problem.t) == 2:
            for out, leaf in zip(self.ys, self.stepper.y0, strict=False):
                out[1] = leaf
        sums = [] if self.after_step is None else self.after_step.take()
        slope = [] if self.problem.quadratures else [leaf.detach() for leaf in self.stepper.k[0]]
        call = self._call_at_end()
        return Trajectory(ys=self.ys, last=self.stepper.y0, state=self.state, sums=sums, call=call, slope=slope)

    def _call_at_end(self) -> Evaluation | None:
        """f(t1, y1), where it was the last stage, of one call for all rows."""
        stepper, problem = self.stepper, self.problem
        if not self.method.fsal or problem.per_sample or problem.quadratures or self.stop_times[1]:
            return None
        return Evaluation(self.t[-1].to(problem.real), stepper.y0, stepper.k[0])

    # ---- parts of a step ----------------------------------------------------------------------------------------------

    def attempt(self) -> tuple[Tensor, Sequence[Any], list[int]]:
        """Computes a step: its times, what the family keeps of it, and the addresses of the last slopes, which are not bound
        yet."""
        stepper, times = self.stepper, self.stepper.times
        views = stepper.views
        if self.recording:
            stepper.new_times()  # the next step's are written while these are kept
            stepper.new_stages()
        elif self.after_step is not None:
            views = self._step_views = self._times_to_keep()
        elif self.recorder is not None and self.looks:
            times = times.clone()
        evaluations, addresses = self.family.step(self.problem.field, times, views)
        return times, evaluations, addresses

    def decide(self, addresses: list[int]) -> None:
        """The error, whether the step is accepted, and the next. addresses: slopes that are not bound yet."""
        problem, stepper, error = self.problem, self.stepper, self.family.error()
        kernels = stepper.kernels
        if error is None and problem.fused_error and self.domain is None:
            kernels.error_and_step_size(addresses)
            return
        if error is None and problem.fused_error:
            kernels.error(addresses)
        else:
            kernels.quadrature(addresses)
            ends = [*stepper.y[-1], *stepper.q1]
            read: Any = (stepper.k, self.method.e, self.dt) if error is None else ([error], [1.0], None)
            write_norm(self.ratio, problem, self.in_norm, stepper.y0, ends, *read)
        estimated = self.ratio.clone() if self.family.steers else None
        if estimated is not None:
            self.family.steer(self.ratio)
        if self.domain is not None:
            self.domain.before(self.state, stepper.y[-1])
        kernels.step_size()
        if estimated is not None:
            self.ratio.copy_(estimated)
        if self.domain is not None:
            self.domain.after(self.state)

    def advance(self) -> None:
        """Rows whose step was accepted move on, on the device."""
        if self.recording:
            self._leave_behind()
        self.family.advance()

    def call_after_step(self) -> None:
        assert self.after_step is not None
        self.after_step.add(self._step_views[0], self.stepper.y0, self.state[FIELDS["accepted_dt"]])

    def _leave_behind(self) -> None:
        """What was recorded keeps its values: the next step begins in memory of its own."""
        stepper = self.stepper
        stepper.y0 = [leaf.detach().clone() for leaf in stepper.y0]
        stepper.bind()
        stepper.set_slopes(0, [slope.detach().clone() for slope in stepper.k[0]], False)
        stepper.kernels.bind_slopes(0, stepper.addresses(0))

    def _times_to_keep(self) -> list[Tensor]:
        """Those of the step, as func sees them, where the decision about it does not write the next step's: the slopes' graphs
        may have kept them."""
        stepper = self.stepper
        views = stepper.views
        if not self.captures:
            stepper.turn_times()
            return views
        if self._held is None:  # a captured step has its times in one place
            times = torch.empty_like(stepper.times)
            self._held = times, self.problem.time_views(times)
        self._held[0].copy_(stepper.times)
        return self._held[1]

    # ---- calls of func that are no stage ---------------------------------------------------------------

    def evaluate_start(self) -> Evaluation:
        """f at the time of stage 0 and the start of the step."""
        view, y0 = self.stepper.views[0], self.stepper.y0[: self.stepper.n]
        return self._evaluate(view, y0)

    def _evaluate(self, t: Tensor, y: list[Tensor]) -> Evaluation:
        if self.recording:
            return self.recorder.evaluate(self.problem.field, t, y)
        return Evaluation(t, y, self.problem.field(t, y, 0))

    def _restart(self, host: Any) -> None:
        """Rows that ended on a discontinuity of func go on with the slope on its other side."""
        jumped = (host[FIELDS["jumped"]] != 0) & (host[FIELDS["accept"]] != 0)  # in this step, not before
        if not jumped.any():
            return
        stepper = self.stepper
        evaluation = self.evaluate_start()
        mask = torch.from_numpy(jumped).to(self.problem.device)
        if self.recorder is not None:
            self.recorder.restart(evaluation, mask if self.problem.per_sample else None)
        k0 = [torch.where(self.mask(mask, new), new.detach(), old) for new, old in zip(evaluation.k, stepper.k[0], strict=True)]
        stepper.kernels.bind_slopes(0, stepper.set_slopes(0, k0, False))
        self.family.restart(mask)

    def mask(self, mask: Tensor, leaf: Tensor) -> Tensor:
        return mask.reshape(-1, *[1] * (leaf.dim() - 1)) if self.problem.per_sample else mask[0]
