"""Adaptive Runge-Kutta methods: the step loop.

All decisions are made by the kernels in the solver state, a small float64 tensor on the device of the problem. On the CPU
the loop looks into it after each step; on CUDA it looks late, so that the host never waits, and steps past the end find a
held state. Only what needs the host at every step (recording for a gradient, discontinuities, callbacks) makes it look there.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import formulas, ops
from ..ops import FIELDS, STOPS
from ..problem import Problem
from ..step_control import RUNNING, StepControl, initial_state
from ..tableau import ButcherTableau
from .trajectory import Evaluation, Recorder, Trajectory

_POLL_SHARE = 10  # on CUDA the host looks at most a tenth of the steps taken late


def _some(host: np.ndarray, name: str, value: int) -> bool:
    """Whether the field has this value in some row."""
    row = host[FIELDS[name]]
    return row[0] == value if len(row) == 1 else bool((row == value).any())


class AdaptiveSolver:
    """One adaptive solve. `run` may be called once."""

    def __init__(
        self,
        problem: Problem,
        tableau: ButcherTableau,
        control: StepControl,
        *,
        first_step: float | None = None,
        step_t: list[float] = (),
        jump_t: list[float] = (),
        callbacks: dict[str, Callable] | None = None,
        recorder: Recorder | None = None,
        after_step: Callable[[Tensor, list[Tensor], Tensor, Tensor], None] | None = None,
    ):
        self.problem, self.tableau, self.control = problem, tableau, control
        self.recorder, self.after_step = recorder, after_step
        self.callbacks = callbacks or {}
        self.first_step = first_step
        device, rows = problem.device, problem.rows
        self.state_leaves = len(problem.leaves) - problem.quadratures
        kinds = {time: STOPS["step"] for time in step_t} | {time: STOPS["jump"] for time in jump_t}
        stops = sorted(
            (time for time in kinds if problem.direction * (time - problem.t[0]) > 0
             and problem.direction * (problem.t[-1] - time) > 0),
            key=lambda time: problem.direction * time,
        )
        stop_table = [[*stops, problem.t[-1]], [*(float(kinds[time]) for time in stops), float(STOPS["end"])]]
        self.jumps = STOPS["jump"] in stop_table[1]
        self.stops = torch.tensor(stop_table, dtype=torch.float64, device=device)
        self.t = torch.tensor(problem.t, dtype=torch.float64, device=device)
        self.state = torch.from_numpy(initial_state(problem.t[0], rows)).to(device)
        self.dt, self.ratio = self.state[FIELDS["dt"]], self.state[FIELDS["error_ratio"]]
        self.accept = self.state[FIELDS["accept"]]
        self.c = list(tableau.c)
        self.constants = control.constants(tableau.order, problem.direction)
        self.flat_p = [coefficient for row in tableau.p for coefficient in row]
        self.degree = len(tableau.p[0])
        on_cpu = device.type == "cpu"
        self.host_view = self.state.numpy() if on_cpu else None
        self.looks = on_cpu or recorder is not None or self.jumps or bool(self.callbacks)
        # Buffers are used again in every step, unless what is recorded must outlive it.
        self.fresh = recorder is not None
        self.reserved: set[int] = set()

    # ---- buffers ------------------------------------------------------------------------------------------------------

    def _new_state(self) -> list[Tensor]:
        return [torch.empty_like(leaf, memory_format=torch.contiguous_format) for leaf in self.y0[: self.state_leaves]]

    def _allocate(self) -> None:
        stages, leaves = self.tableau.stages, self.problem.leaves
        self.y0 = [leaf.clone(memory_format=torch.contiguous_format) for leaf in leaves]
        self.stage_y = [self.y0[: self.state_leaves], *(self._new_state() for _ in range(stages - 1))]
        self.q1 = [torch.empty_like(leaf) for leaf in self.y0[self.state_leaves :]]
        self.times = torch.empty(stages, self.problem.rows, dtype=self.problem.real, device=self.problem.device)
        self.time_views = self.problem.time_views(self.times)
        self.slopes: list[Tensor] = [self.y0[0]] * (stages * len(leaves))
        self.reserved = {leaf.untyped_storage().data_ptr() for y in (*self.stage_y, self.y0) for leaf in y}

    def _keep(self, i: int, k: list[Tensor | None]) -> None:
        """Puts the slopes of stage i into their slots, copied where their memory will be written again."""
        stages = self.tableau.stages
        for leaf, slope in enumerate(k):
            if slope is None:
                continue
            if not self.fresh and slope.untyped_storage().data_ptr() in self.reserved:
                slope = slope.clone()
            self.slopes[leaf * stages + i] = slope

    # ---- pieces of the loop -------------------------------------------------------------------------------------------

    def _evaluate(self, i: int, t: Tensor, y: list[Tensor]) -> Evaluation | None:
        """Calls func at stage i and keeps its slopes."""
        if self.recorder is None:
            k = self.problem.field(t, y, i)
            self._keep(i, k)
            return None
        evaluation = self.recorder.evaluate(self.problem.field, t, y)
        self._keep(i, evaluation.slopes)
        return evaluation

    def _norm(self, y0: list[Tensor], y1: list[Tensor], k: list[Tensor], e: list[float], dt: Tensor, out: Tensor) -> None:
        """out [rows] = norm of dt sum_j e_j k_j, scaled by the tolerances."""
        problem = self.problem
        if not problem.quadratures_in_norm and problem.norm is None:
            n = self.state_leaves
            y0, y1, k = y0[:n], y1[:n], k[: n * (len(k) // len(y0))]
        if problem.fused_error:
            ops.error(out, y0, y1, k, e, dt, problem.rtol[: len(y0)], problem.atol[: len(y0)])
            return
        slots = len(k) // len(y0)
        scaled = []
        for leaf, (start, end, rtol, atol) in enumerate(zip(y0, y1, problem.rtol, problem.atol, strict=False)):
            factor = dt.to(problem.real).reshape(-1, *[1] * (start.dim() - 1)) if problem.per_sample else dt[0].to(problem.real)
            slopes = k[leaf * slots : leaf * slots + len(e)]
            scaled.append(formulas.scaled_error(start, end, slopes, e, factor, rtol, atol))
        if problem.norm is None:
            out.copy_(torch.stack([formulas.rms_norm(part, problem.rows) for part in scaled]).amax(0))
        else:
            value = torch.as_tensor(problem.norm(scaled), dtype=torch.float64, device=out.device).abs()
            if value.numel() not in (1, out.numel()):
                raise ValueError(f"norm must return {out.numel()} numbers, one a sample, got shape {list(value.shape)}")
            out.copy_(value.reshape(-1).expand_as(out))

    def _start(self, start: Evaluation | None) -> None:
        """f(t0, y0) and the first step to try."""
        problem, tableau = self.problem, self.tableau
        state_y = self.y0[: self.state_leaves]
        self.times.fill_(problem.t[0])
        if start is None:
            start = self._evaluate(0, self.time_views[0], state_y)
        else:
            self._keep(0, [slope.clone() for slope in start.slopes])
        if self.recorder is not None:
            self.recorder.start(start, 0)
        slopes = self.slopes[:: tableau.stages]
        norms = torch.zeros(3, problem.rows, dtype=torch.float64, device=problem.device)
        one = torch.ones(problem.rows, dtype=torch.float64, device=problem.device)
        self._norm(self.y0, self.y0, self.y0, [1.0], one, norms[0])
        self._norm(self.y0, self.y0, slopes, [1.0], one, norms[1])
        arguments = (self.stops, self.t, self.c, self.constants)
        if self.first_step is not None:
            ops.first_step(self.state, self.times, norms, *arguments, self.first_step, 1)
            return
        ops.first_step(self.state, self.times, norms, *arguments, 0.0, 0)
        y1 = self.stage_y[1]
        ops.stage(y1, state_y, slopes[: self.state_leaves], [1.0], self.dt)
        end = self.state[FIELDS["step_end"]].to(problem.real)
        view = problem.time_views(end[None])[0]
        k1 = problem.field(view, y1, 0)
        difference = [slope for pair in zip(slopes, k1, strict=True) for slope in pair]
        self._norm(self.y0, self.y0, difference, [-1.0, 1.0], one, norms[2])
        ops.first_step(self.state, self.times, norms, *arguments, 0.0, 1)

    def _call(self, name: str, field_t: str, field_dt: str) -> None:
        callback = self.callbacks.get(name)
        if callback is not None:
            t, dt = self.state[FIELDS[field_t]].clone(), self.state[FIELDS[field_dt]].abs()
            if not self.problem.per_sample:
                t, dt = t[0], dt[0]
            callback(t, [leaf.clone() for leaf in self.y0], dt)

    def _restart(self, host: np.ndarray) -> None:
        """Rows that ended on a discontinuity of func go on with the slope on its other side."""
        if not _some(host, "jumped", 1):
            return
        jumped = host[FIELDS["jumped"]] != 0
        stages = self.tableau.stages
        before = self.slopes[::stages]
        evaluation = self._evaluate(0, self.time_views[0], self.y0[: self.state_leaves])
        if evaluation is not None:
            self.recorder.restart(evaluation, torch.from_numpy(jumped) if self.problem.per_sample else None)
        mask = torch.from_numpy(jumped).to(self.problem.device)
        for leaf, old in enumerate(before):
            new = self.slopes[leaf * stages]
            mask_of_leaf = mask.reshape(-1, *[1] * (old.dim() - 1)) if self.problem.per_sample else mask[0]
            self.slopes[leaf * stages] = torch.where(mask_of_leaf, new, old)

    def _advance(self, host: np.ndarray | None) -> None:
        """Accepted rows move on: by exchanging buffers where the host knows the one decision, else on the device."""
        stages, last = self.tableau.stages, self.tableau.stages - 1
        y1 = [*self.stage_y[last], *self.q1]
        if host is not None and not self.problem.per_sample:
            if host[FIELDS["accept"], 0]:
                if self.fresh:
                    self.y0 = y1
                else:
                    self.stage_y[last], self.q1 = self.y0[: self.state_leaves], self.y0[self.state_leaves :]
                    self.y0 = y1
                for leaf in range(len(y1)):
                    self.slopes[leaf * stages] = self.slopes[leaf * stages + last]
            return
        if self.fresh:
            self.y0 = [leaf.clone() for leaf in self.y0]
        k0 = self.slopes[::stages]
        if self.fresh or any(not slope.is_contiguous() for slope in k0):
            k0 = [slope.clone(memory_format=torch.contiguous_format) for slope in k0]
            for leaf, slope in enumerate(k0):
                self.slopes[leaf * stages] = slope
        ops.advance(self.y0, k0, y1, self.slopes[last::stages], self.accept)

    # ---- the loop -----------------------------------------------------------------------------------------------------

    def run(self, start: Evaluation | None = None) -> Trajectory:
        """start: f(t0, y0), where the caller already has it."""
        problem, tableau, stages = self.problem, self.tableau, self.tableau.stages
        self._allocate()
        ys = [leaf.new_empty(len(problem.t), *leaf.shape) for leaf in self.y0[: self.state_leaves]]
        for out, leaf in zip(ys, self.y0, strict=False):
            out[0] = leaf
        interior = len(problem.t) > 2
        self._start(start)
        steps, look_at = 0, 1
        while True:
            if self.callbacks:
                self._call("callback_step", "time", "dt")
            if self.fresh:
                self.stage_y = [self.y0[: self.state_leaves], *(self._new_state() for _ in range(stages - 1))]
                times = self.time_views
                self.times = torch.empty_like(self.times)
                self.time_views = problem.time_views(self.times)
            else:
                times = self.time_views
            evaluations: list[Any] = []
            state_y = self.y0[: self.state_leaves] if problem.quadratures else self.y0
            state_slopes = self.slopes[: self.state_leaves * stages] if problem.quadratures else self.slopes
            for i in range(1, stages):
                ops.stage(self.stage_y[i], state_y, state_slopes, tableau.a[i], self.dt)
                evaluations.append(self._evaluate(i, times[i], self.stage_y[i]))
                if problem.quadratures:
                    state_slopes = self.slopes[: self.state_leaves * stages]
            if problem.quadratures:
                ops.stage(self.q1, self.y0[self.state_leaves :], self.slopes[self.state_leaves * stages :], tableau.b, self.dt)
            y1 = [*self.stage_y[-1], *self.q1] if problem.quadratures else self.stage_y[-1]
            self._norm(self.y0, y1, self.slopes, tableau.e, self.dt, self.ratio)
            ops.step_size(self.state, self.times, self.stops, self.t, self.c, self.constants)
            steps += 1
            host, done = None, False
            if self.looks:
                host = self.host_view if self.host_view is not None else self.state.cpu().numpy()
                done = not _some(host, "status", RUNNING)
            elif steps >= look_at:
                look_at = steps + max(1, steps // _POLL_SHARE)
                done = not bool((self.state[FIELDS["status"]] == RUNNING).any())
            if self.recorder is not None:
                self.recorder.step(host, evaluations, self.slopes, self.y0, stages)
            if self.callbacks:
                for name, wanted in (("callback_accept_step", 1), ("callback_reject_step", 0)):
                    if _some(host, "accept", wanted):
                        self._call(name, "last_time", "last_dt")
            self._finish_step(ys, y1, host, interior)
            if done:
                break
        return self._finish(ys)

    def _finish_step(self, ys: list[Tensor], y1: list[Tensor], host: np.ndarray | None, interior: bool) -> None:
        """Outputs, the hook of the adjoint, and the move to the next step."""
        if interior and (host is None or (host[FIELDS["output_begin"]] < host[FIELDS["output_end"]]).any()):
            n = self.state_leaves
            ops.dense_output(
                ys, self.y0[:n], y1[:n], self.slopes[: n * self.tableau.stages], self.flat_p, self.degree, self.state, self.t
            )
        if self.after_step is not None:
            t0 = self.problem.time_views(self.state[FIELDS["last_time"]].to(self.problem.real)[None])[0]
            self.after_step(t0, self.y0, self.accept, self.state[FIELDS["last_dt"]])
        self._advance(host)
        if self.jumps:
            self._restart(host)

    def _finish(self, ys: list[Tensor]) -> Trajectory:
        if len(self.problem.t) == 2:
            for out, leaf in zip(ys, self.y0, strict=False):
                out[1] = leaf
        return Trajectory(ys=ys, last=self.y0, state=self.state)
