"""Adaptive Runge-Kutta methods: the step loop.

All decisions are made by the kernels in the solver state, a small float64 tensor on the device of the problem. On the CPU
the loop looks into it after each step; on CUDA it runs ahead: it looks late, so that the host never waits, and steps past the
end find a held state. What a gradient needs of the steps, of rejected ones too, is kept and looked at after the solve. Only
what needs the host at every step (discontinuities, callbacks, a tape that is thinned, `quadrature`) makes it look there.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .. import formulas
from ..graphed.capture import Busy, Watch, being_captured, captured, repeated
from ..ops import FIELDS, STOPS
from ..problem import Problem, counter_of, to_device
from ..ranges import marked
from ..step_control import RUNNING, SUCCESS, StepControl, initial_state
from ..stepper import Stepper
from ..tableau import ButcherTableau
from .trajectory import Evaluation, Recorder, Trajectory


class AfterStep(Protocol):
    """Adds something up over the steps. calls: of func, that it makes for each. refusal: why no graph can hold it, or ""."""

    @property
    def calls(self) -> int: ...
    @property
    def refusal(self) -> str: ...

    def add(self, t0: Tensor, y0: list[Tensor], dt: Tensor) -> None:
        """After a step, before the move to the next. t0: as func sees it. dt: [rows], 0 where the step was not accepted."""

    def take(self) -> list[Tensor]:
        """The sums, which begin anew."""

    def resume(self, field: Any) -> Any:
        """The field of another solve that the same captured step makes: itself, for it adds up where it did, but as that
        other one calls func."""


def some(host: np.ndarray, name: str, value: int) -> bool:
    """Whether the field of the solver state has this value in some row."""
    row = host[FIELDS[name]]
    return row[0] == value if len(row) == 1 else bool((row == value).any())


def runs_ahead(device: torch.device) -> bool:
    """Whether the host may be ahead of what it knows there."""
    return device.type == "cuda"


class AdaptiveSolver:
    """One adaptive solve, and after `reset` another of the same kind.

    graph: where the host runs ahead, capture a "step" and replay it, or let the device "loop" over it.
    """

    def __init__(
        self,
        problem: Problem,
        tableau: ButcherTableau,
        control: StepControl,
        *,
        first_step: float | None = None,
        step_t: Sequence[float] = (),
        jump_t: Sequence[float] = (),
        callbacks: dict[str, Callable] | None = None,
        recorder: Recorder | None = None,
        after_step: AfterStep | None = None,
        graph: str = "",
    ):
        self.problem, self.tableau, self.first_step = problem, tableau, first_step
        self.recorder: Any = recorder  # None: nothing is recorded
        self.after_step, self.callbacks = after_step, callbacks or {}
        device = problem.device
        self.stop_times = step_t, jump_t
        self.state, self.table, self.t = self._numbers(problem)
        self.jumps = STOPS["jump"] in stop_table(problem, step_t, jump_t)[1][self.starts_on_jump :]
        self.dt, self.ratio = self.state[FIELDS["dt"]], self.state[FIELDS["error_ratio"]]
        self.host_view = self.state.numpy() if device.type == "cpu" else None
        needed = self.jumps or bool(self.callbacks) or (recorder is not None and not recorder.can_wait)
        self.looks = needed or not runs_ahead(device)
        self.recording = recorder is not None and recorder.slopes
        self.captures = bool(graph) and not self.looks and not self.recording
        self.stages_ahead = not self.looks and not self.recording  # the end of a step makes the next one's first stage
        self._held: tuple[Tensor, list[Tensor]] | None = None  # the times of a captured step, where they must outlive it
        self.loops = graph == "loop"
        self.swaps = self.looks and not problem.per_sample
        in_norm = len(problem.leaves) - (0 if problem.quadratures_in_norm else problem.quadratures)
        self.stepper = Stepper(problem, tableau, tableau.rows, control.constants(tableau.order, problem.direction), in_norm)
        if after_step is not None:  # what a stage was evaluated at is looked at after the step
            self.stepper.new_stages()
        self.in_norm = len(problem.leaves) if problem.norm is not None else in_norm
        self.stepper.bind_state(self.state, self.table, self.t)
        self.unseen: list[tuple[Tensor, Any]] = []  # steps that the recorder is told late, with the solver state after each
        if recorder is not None and not self.looks:
            recorder.owned = True
        self.ys = [leaf.new_empty(len(problem.t), *leaf.shape) for leaf in self.stepper.y0[: self.stepper.n]]
        self.outputs = [out.data_ptr() for out in self.ys] if len(problem.t) > 2 else []
        self.replay: Callable[[], None] | None = None  # a captured step
        self.pool: tuple[Any, ...] = ()  # whose memory it works in
        self.expected = 0  # steps, by the last solve

    def _numbers(self, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
        """The solver state before the first step, the stops and the output times."""
        times, kinds = stop_table(problem, *self.stop_times)
        stops, t = (torch.from_numpy(np.array(x, dtype=np.float64)) for x in ([times, kinds], problem.t))
        self.starts_on_jump = times[0] == problem.t[0]
        state = torch.from_numpy(initial_state(problem.t[0], problem.rows, self.starts_on_jump))
        state = to_device(state, problem.device)
        if problem.held is not None:
            state[FIELDS["status"]].masked_fill_(problem.held, SUCCESS)
        return state, to_device(stops, problem.device), to_device(t, problem.device)

    def run(self, start: Evaluation | None = None) -> Trajectory:
        """start: f(t0, y0), where the caller already has it."""
        if not self.looks:
            return self._run_ahead(start)
        self._start(start)
        done = False
        while not done:
            with marked("step"):
                done = self._looked_at_step()
        return self._trajectory()

    def _looked_at_step(self) -> bool:
        """A step that the host looks at; whether it was the last."""
        stepper, kernels, outputs = self.stepper, self.stepper.kernels, self.outputs
        if self.callbacks:
            self._call("callback_step", "time", "dt")
        times, evaluations, addresses = self._points()
        self._decide(addresses)
        host = self.host_view if self.host_view is not None else self.state.cpu().numpy()
        if self.recorder is not None:
            self.recorder.step(host, evaluations, stepper.k, stepper.y0, times)
        if self.callbacks:
            self._called_after(host)
        if outputs and (host[FIELDS["output_begin"]] < host[FIELDS["output_end"]]).any():
            kernels.dense_output(outputs)
        if self.after_step is not None:
            self._call_after_step()
        self._advance(host)
        if self.jumps:
            self._restart(host)
        return not some(host, "status", RUNNING)

    def _trajectory(self) -> Trajectory:
        if len(self.problem.t) == 2:
            for out, leaf in zip(self.ys, self.stepper.y0, strict=False):
                out[1] = leaf
        sums = [] if self.after_step is None else self.after_step.take()
        return Trajectory(ys=self.ys, last=self.stepper.y0, state=self.state, sums=sums, call=self._call_at_end())

    def _call_at_end(self) -> Evaluation | None:
        """f(t1, y1), where it was the last stage, of one call for all rows."""
        stepper, problem = self.stepper, self.problem
        if not self.tableau.fsal or problem.per_sample or problem.quadratures or self.stop_times[1]:
            return None
        return Evaluation(self.t[-1].to(problem.real), stepper.y0, stepper.k[0])

    # ---- ahead of the device ------------------------------------------------------------------------------------------

    def reset(self, problem: Problem, first_step: float | None) -> None:
        """Another problem of the same kind takes the place of the last: in the same memory, for a captured step."""
        if self.after_step is not None:
            problem = replace(problem, field=self.after_step.resume(problem.field))
        self.problem, self.first_step = problem, first_step
        with torch.no_grad():
            for own, new in zip((self.state, self.table, self.t), self._numbers(problem), strict=True):
                own.copy_(new)
            for own, leaf in zip(self.stepper.y0, problem.leaves, strict=True):
                own.copy_(leaf)

    def _run_ahead(self, start: Evaluation | None) -> Trajectory:
        if being_captured(self.problem.device):
            raise RuntimeError(
                "an adaptive solve cannot be part of a CUDA graph that the caller captures: the host must learn of its end; "
                "capture a solve on a grid (step_size), or leave it to cuda_graph=True"
            )
        self._start(start)
        if self.stages_ahead:
            self.stepper.kernels.stage(1, [])
        counter = counter_of(self.problem.field)
        called, steps = counter.nfe, 0
        watch = Watch(self.state[FIELDS["status"]], self.expected, on_device=self.state.is_cuda)
        ended = False
        while not ended:
            with marked("step"):
                before = self._before_step() if self.recorder is not None and not self.recording else None
                if self.replay is not None:
                    self.replay()
                else:
                    self._step()
                if before is not None:
                    self.unseen.append((self.state.clone(), before))
            steps += 1
            ended = watch.ended_now() if self.loops and self.replay is not None else watch.ended(steps)
            if not ended and self.captures and self.replay is None:  # after a step in which what func does once is done
                with suppress(Busy):
                    self._capture()
        *hosts, host = torch.stack([*[state for state, _ in self.unseen], self.state]).cpu().numpy()  # the one wait
        for seen_state, (_, seen) in zip(hosts, self.unseen, strict=True):
            self.recorder.step(seen_state, *seen)
        self.unseen = []
        self.expected = int((host[FIELDS["num_accepted"]] + host[FIELDS["num_rejected"]]).max())
        calls = self.tableau.stages - 1 + (0 if self.after_step is None else self.after_step.calls)
        counter.nfe = called + self.expected * calls  # steps past the end do not count
        trajectory = self._trajectory()
        trajectory.seen = host
        return trajectory

    def _capture(self) -> None:
        self.replay = repeated(self._step, self.state[FIELDS["status"]]) if self.loops else None
        self.loops = self.replay is not None
        if self.replay is None:
            self.replay = captured(self._step, self.problem.device, self.pool)
        self.captures = self.replay is not None

    def _step(self) -> None:
        """One step, whatever becomes of it: nothing on the host depends on that."""
        stepper, kernels = self.stepper, self.stepper.kernels
        times, evaluations, addresses = self._points()
        self._decide(addresses)
        if self.outputs:
            kernels.dense_output(self.outputs)
        if self.after_step is not None:
            self._call_after_step()
        if self.recording:
            self.unseen.append((self.state.clone(), (evaluations, list(stepper.k), stepper.y0, times)))
            self._leave_behind()
        if self.stages_ahead:
            kernels.advance_and_stage()
        else:
            kernels.advance()

    def _before_step(self) -> tuple[list[Evaluation | None], list[list[Tensor]], list[Tensor], Tensor]:
        """What the recorder keeps of a step that it is not told the slopes of."""
        stepper = self.stepper
        slopes = [[slope.clone() for slope in stepper.k[0]]] if self.recorder.carried else []
        return [], slopes, [leaf.clone() for leaf in stepper.y0], stepper.times.clone()

    # ---- parts of a step ----------------------------------------------------------------------------------------------

    def _points(self) -> tuple[Tensor, list[Evaluation | None], list[int]]:
        """All points of a step: their times, the evaluations where they are recorded, and the addresses of the last slopes,
        which are not bound yet."""
        stepper, kernels = self.stepper, self.stepper.kernels
        views, times = stepper.views, stepper.times
        evaluations: list[Evaluation | None] = []
        if self.recording:
            stepper.new_times()  # the next step's are written while these are kept
            stepper.new_stages()
            addresses: list[int] = []
            for i in range(1, self.tableau.stages):
                kernels.stage(i, addresses)
                evaluation = self.recorder.evaluate(self.problem.field, views[i], stepper.y[i])
                evaluations.append(evaluation)
                addresses = stepper.set_slopes(i, evaluation.k, False)
        else:
            if self.recorder is not None and self.looks:
                times = times.clone()
            addresses = self._stages()
        if not self.tableau.fsal:  # y1 is no stage: the next step begins with the slope of the last, which lies beside it
            kernels.stage(len(self.tableau.rows), addresses)
            evaluations.append(None)
            addresses = []
        return times, evaluations, addresses

    def _leave_behind(self) -> None:
        """What was recorded keeps its values: the next step begins in memory of its own."""
        stepper = self.stepper
        stepper.y0 = [leaf.detach().clone() for leaf in stepper.y0]
        stepper.bind()
        stepper.set_slopes(0, [slope.detach().clone() for slope in stepper.k[0]], False)
        stepper.kernels.bind_slopes(0, stepper.addresses(0))

    def _stages(self) -> list[int]:
        """All slopes, without graphs; the addresses of the last, which are not bound yet."""
        stepper, kernels, views, field = self.stepper, self.stepper.kernels, self.stepper.views, self.problem.field
        if self.after_step is not None:
            views = self._step_views = self._times_to_keep()
        addresses: list[int] = []
        for i in range(1, self.tableau.stages):
            if i > 1 or not self.stages_ahead:
                kernels.stage(i, addresses)
            addresses = stepper.set_slopes(i, field(views[i], stepper.y[i], i), True)
        return addresses

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

    def _decide(self, addresses: list[int]) -> None:
        """The error, whether the step is accepted, and the next. addresses: slopes that are not bound yet."""
        stepper, kernels = self.stepper, self.stepper.kernels
        if self.problem.fused_error:
            kernels.error_and_step_size(addresses)
            return
        kernels.quadrature(addresses)
        ends = [*stepper.y[len(self.tableau.rows)], *stepper.q1]
        self._norm(stepper.y0, ends, stepper.k, self.tableau.e, self.dt, self.ratio)
        kernels.step_size()

    # ---- start --------------------------------------------------------------------------------------------------------

    def _start(self, start: Evaluation | None) -> None:
        """f(t0, y0) and the first step to try."""
        problem, stepper = self.problem, self.stepper
        for out, leaf in zip(self.ys, stepper.y0, strict=False):
            out[0] = leaf
        stepper.times.copy_(problem.start_time(self.starts_on_jump).reshape(-1))
        if start is None:
            start = self._evaluate_start()
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
        constants = torch.zeros(4, problem.rows, dtype=torch.float64, device=problem.device)
        norms, one = constants[:3], constants[3].fill_(1.0)
        self._norm_at_start([stepper.y0], [1.0], one, norms[0])
        self._norm_at_start([stepper.k[0]], [1.0], one, norms[1])
        if self.first_step is not None:
            stepper.kernels.first_step(norms.data_ptr(), self.first_step, 1)
            return
        stepper.kernels.first_step(norms.data_ptr(), 0.0, 0)
        stepper.kernels.euler()
        t1 = problem.time_views(self.state[FIELDS["step_end"]].to(problem.real)[None])[0]
        k1 = [slope if slope is None else slope.detach() for slope in self._evaluate(t1, stepper.y[1]).k]
        stepper.set_slopes(1, k1, True)
        self._norm_at_start(stepper.k[:2], [-1.0, 1.0], one, norms[2])
        stepper.kernels.first_step(norms.data_ptr(), 0.0, 1)

    def _evaluate_start(self) -> Evaluation:
        """f at the time of stage 0 and the start of the step."""
        view, y0 = self.stepper.views[0], self.stepper.y0[: self.stepper.n]
        return self._evaluate(view, y0)

    def _evaluate(self, t: Tensor, y: list[Tensor]) -> Evaluation:
        """f at a point that is no stage of a step."""
        if self.recording:
            return self.recorder.evaluate(self.problem.field, t, y)
        return Evaluation(t, y, self.problem.field(t, y, 0))

    def _per_row(self, value: Tensor, leaf: Tensor) -> Tensor:
        """[rows] shaped to multiply a leaf, in its real type."""
        real = value.to(leaf.dtype.to_real())
        return real.reshape(-1, *[1] * (leaf.dim() - 1)) if self.problem.per_sample else real[0]

    def _norm_at_start(self, x: list[list[Tensor]], weights: list[float], one: Tensor, out: Tensor) -> None:
        """out [rows] = norm of sum_j weights_j x_j, scaled by the tolerances at y0; x: [states][leaves]."""
        stepper = self.stepper
        if self.problem.fused_error:
            addresses = [[0 if part is None else part.data_ptr() for part in leaves] for leaves in x]
            stepper.kernels.norm(out.data_ptr(), one.data_ptr(), weights, addresses)
        else:
            self._norm(stepper.y0, stepper.y0, x, weights, one, out)

    def _norm(
        self,
        y0: list[Tensor],
        y1: list[Tensor],
        k: Sequence[Sequence[Tensor]],
        e: Sequence[float],
        dt: Tensor,
        out: Tensor,
    ) -> None:
        """What the error kernel does not serve: out [rows] = norm of dt sum_j e_j k_j, scaled; k: [stages][leaves]."""
        problem = self.problem
        scaled = []
        for leaf in range(self.in_norm):
            start, end = formulas.widened(y0[leaf]), formulas.widened(y1[leaf])
            slopes = [k[j][leaf] for j in range(len(e))]
            used = [
                (formulas.widened(slope), weight)
                for slope, weight in zip(slopes, e, strict=True)
                if weight != 0 and slope is not None
            ]
            factor = self._per_row(dt, start)
            tolerances = problem.rtol[leaf], problem.atol[leaf]
            scaled.append(formulas.scaled_error(start, end, [s for s, _ in used], [w for _, w in used], factor, *tolerances))
        if problem.norm is None:
            out.copy_(torch.stack([formulas.rms_norm(part, problem.rows) for part in scaled]).amax(0))
            return
        value = torch.as_tensor(problem.norm(scaled), dtype=torch.float64, device=out.device).detach().abs()
        if value.numel() not in (1, out.numel()):
            raise ValueError(f"norm must return {out.numel()} numbers, one a sample, got shape {list(value.shape)}")
        out.copy_(value.reshape(-1).expand_as(out))

    # ---- between steps ------------------------------------------------------------------------------------------------

    def _advance(self, host: np.ndarray | None) -> None:
        """Accepted rows move on: by exchanging buffers where the host knows the one decision, else on the device."""
        stepper = self.stepper
        if self.swaps:
            if host is not None and host[FIELDS["accept"], 0]:
                stepper.swap_accepted()
            return
        if self.recording:
            self._leave_behind()
        stepper.kernels.advance()

    def _restart(self, host: Any) -> None:
        """Rows that ended on a discontinuity of func go on with the slope on its other side."""
        jumped = (host[FIELDS["jumped"]] != 0) & (host[FIELDS["accept"]] != 0)  # in this step, not before
        if not jumped.any():
            return
        stepper = self.stepper
        evaluation = self._evaluate_start()
        mask = torch.from_numpy(jumped).to(self.problem.device)
        if self.recorder is not None:
            self.recorder.restart(evaluation, mask if self.problem.per_sample else None)
        k0 = [
            torch.where(self._mask(mask, new), new.detach(), old) for new, old in zip(evaluation.k, stepper.k[0], strict=True)
        ]
        stepper.kernels.bind_slopes(0, stepper.set_slopes(0, k0, False))

    def _call_after_step(self) -> None:
        assert self.after_step is not None
        self.after_step.add(self._step_views[0], self.stepper.y0, self.state[FIELDS["accepted_dt"]])

    def _mask(self, mask: Tensor, leaf: Tensor) -> Tensor:
        return mask.reshape(-1, *[1] * (leaf.dim() - 1)) if self.problem.per_sample else mask[0]

    def _called_after(self, host: Any) -> None:
        for name, accepted in (("callback_accept_step", 1), ("callback_reject_step", 0)):
            if some(host, "accept", accepted):
                self._call(name, "last_time", "last_dt")

    def _call(self, name: str, field_t: str, field_dt: str) -> None:
        callback = self.callbacks.get(name)
        if callback is not None:
            t, dt = self.state[FIELDS[field_t]].clone(), self.state[FIELDS[field_dt]].abs()
            if not self.problem.per_sample:
                t, dt = t[0], dt[0]
            callback(t, [leaf.clone() for leaf in self.stepper.y0], dt)


def stop_table(problem: Problem, step_t: Sequence[float], jump_t: Sequence[float]) -> tuple[list[float], list[int]]:
    """The times inside the interval at which steps must end, in the direction of the solve, and why; the end is the last.

    Where func is discontinuous at t[0], that is the first: the first slope is that inside the interval. So is the last one.
    """
    t0, t1, direction = problem.t[0], problem.t[-1], problem.direction
    starts, ends = ([time for time in jump_t if problem.same_time(time, t)] for t in (t0, t1))
    kinds = {time: STOPS["step"] for time in step_t}
    kinds |= {time: STOPS["jump"] for time in jump_t if time not in starts and time not in ends}
    inside = [time for time in kinds if direction * (time - t0) > 0 and direction * (t1 - time) > 0]
    inside.sort(key=lambda time: direction * time)
    times, reasons = [*inside, t1], [*(kinds[time] for time in inside), STOPS["end on jump" if ends else "end"]]
    return ([t0, *times], [STOPS["jump"], *reasons]) if starts else (times, reasons)
