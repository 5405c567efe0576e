"""Explicit Runge-Kutta methods on a grid that is known beforehand."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .. import formulas, ops
from ..problem import Problem
from ..solution import DenseStep
from ..tableau import ButcherTableau
from .trajectory import Evaluation, Recorder, Step, Trajectory


def uniform_grid(t: list[float], step_size: float) -> list[float]:
    """t[0], t[0] + step_size, ... up to t[-1], where the last step may be shorter."""
    span = t[-1] - t[0]
    count = max(1, math.ceil(abs(span) / step_size * (1 - 1e-12)))
    direction = math.copysign(1.0, span)
    return [*(t[0] + direction * step_size * i for i in range(count)), t[-1]]


def stage_times(grid: list[float], tableau: ButcherTableau, real: torch.dtype, perturb: bool) -> np.ndarray:
    """Times at which the stages are evaluated, [steps, stages]; with `perturb` those at the ends of a step lie just inside."""
    nodes = np.asarray(grid)
    t0, t1 = nodes[:-1, None], nodes[1:, None]
    c = np.asarray(tableau.c)[None, :]
    times = np.where(c == 1, t1, t0 + c * (t1 - t0)).astype(np.float32 if real == torch.float32 else np.float64)
    if perturb:
        t0, t1 = t0.astype(times.dtype), t1.astype(times.dtype)
        times = np.where(c == 0, np.nextafter(t0, t1), np.where(c == 1, np.nextafter(t1, t0), times))
    return times


class FixedSolver:
    """One solve on the grid `nodes`, which begins at t[0] and ends at t[-1]. `run` may be called once.

    moves_with: for each node the index of the output time that it moves with, or None where it is taken as given.
    """

    def __init__(
        self,
        problem: Problem,
        tableau: ButcherTableau,
        nodes: list[float],
        moves_with: list[int | None],
        *,
        perturb: bool = False,
        callbacks: dict[str, Callable] | None = None,
        recorder: Recorder | None = None,
    ):
        self.problem, self.tableau, self.nodes, self.moves_with = problem, tableau, nodes, moves_with
        self.perturb, self.recorder = perturb, recorder
        self.callback = (callbacks or {}).get("callback_step")
        self.state_leaves = len(problem.leaves) - problem.quadratures
        # Rows of the stages after the first, the last of them y1.
        self.rows = tableau.a[1:] if tableau.fsal else (*tableau.a[1:], tableau.b)

    def _evaluate(self, i: int, t: Tensor, y: list[Tensor]):
        """(slopes, what the recorder keeps)"""
        if self.recorder is not None:
            evaluation = self.recorder.evaluate(self.problem.field, t, y)
            return evaluation.slopes, evaluation
        return self.problem.field(t, y, i), None

    def run(self, start: Evaluation | None = None) -> Trajectory:
        """start: f(t0, y0), where the caller already has it."""
        problem, tableau, n = self.problem, self.tableau, self.state_leaves
        device, nodes, t = problem.device, self.nodes, problem.t
        dts = torch.tensor(np.diff(nodes), dtype=torch.float64, device=device)
        times = torch.from_numpy(stage_times(nodes, tableau, problem.real, self.perturb)).to(device)
        y0 = [leaf.contiguous() for leaf in problem.leaves]
        ys = [leaf.new_empty(len(t), *leaf.shape) for leaf in y0[:n]]
        for out, leaf in zip(ys, y0, strict=False):
            out[0] = leaf
        output, last_k = 1, None
        stages = tableau.stages
        for step, (t0, t1) in enumerate(zip(nodes[:-1], nodes[1:], strict=True)):
            dt, stage_t = dts[step : step + 1], times[step].unbind(0)
            if self.callback is not None:
                self.callback(dts.new_tensor(t0), [leaf.clone() for leaf in y0], dts.new_tensor(abs(t1 - t0)))
            first = output
            while output < len(t) and problem.direction * (t1 - t[output]) >= 0:
                output += 1
            landed = output - 1 if output > first and t[output - 1] == t1 else None
            # The end of the step is written into the output that it is, unless a graph will hold it: outputs share a version.
            write_there = landed is not None and self.recorder is None
            inside = [(index, (t[index] - t0) / (t1 - t0)) for index in range(first, output) if t[index] != t1]
            slots: list[Tensor] = [y0[0]] * (stages * len(y0))
            evaluations = []
            if last_k is not None and not self.perturb:
                k = last_k
            else:
                k, started = (start.slopes, start) if start is not None else self._evaluate(0, stage_t[0], y0[:n])
                if self.recorder is not None:
                    self.recorder.start(started, self.moves_with[step])
            self._keep(slots, 0, k)
            start = last_k = None
            for i, row in enumerate(self.rows, start=1):
                last = i == len(self.rows)
                y = [out[landed] for out in ys] if last and write_there else [torch.empty_like(leaf) for leaf in y0[:n]]
                ops.stage(y, y0[:n], slots[: n * stages], row, dt)
                evaluation = None
                needed = i < len(self.rows) or inside or step + 2 < len(nodes)
                if i < stages and (needed or self.recorder is not None and self.recorder.dense):
                    k, evaluation = self._evaluate(i, stage_t[i], y)
                    self._keep(slots, i, k)
                    last_k = k if i + 1 == stages and tableau.fsal else None
                evaluations.append(evaluation)
            for index, theta in inside:
                weights = formulas.interpolant_weights(tableau, theta)
                ops.stage([out[index] for out in ys], y0[:n], slots[: n * stages], weights, dt)
            quadrature = [torch.empty_like(leaf) for leaf in y0[n:]]
            if quadrature:
                ops.stage(quadrature, y0[n:], slots[n * stages :], tableau.b, dt)
            if landed is not None and not write_there:
                for out, leaf in zip(ys, y, strict=True):
                    out[landed] = leaf
            if self.recorder is not None:
                outputs = inside if landed is None else [*inside, (landed, 1.0)]
                self._record(step, evaluations, slots, y0, dt, outputs)
            y0 = [*y, *quadrature]
        return Trajectory(ys=ys, last=y0, state=None)

    def _keep(self, slots: list[Tensor], i: int, k: list[Tensor | None]) -> None:
        for leaf, slope in enumerate(k):
            if slope is None:
                continue
            slots[leaf * self.tableau.stages + i] = slope

    def _record(self, step, evaluations, slots, y0, dt, outputs) -> None:
        stages = self.tableau.stages
        recorder = self.recorder
        t0, t1 = self.nodes[step], self.nodes[step + 1]
        k = [slots[leaf * stages : (leaf + 1) * stages] for leaf in range(len(y0))]
        if recorder.dense:
            recorder.dense_steps.append(DenseStep(dt.new_tensor([t0]), dt.new_tensor([t1]), y0, k, None))
        if recorder.graphs:
            ends = tuple(None if i is None else (i, None) for i in self.moves_with[step : step + 2])
            recorder.tape.append(
                Step(
                    tableau=self.tableau,
                    a=self.rows,
                    evaluations=evaluations,
                    dt=dt,
                    accept=None,
                    outputs=[(index, theta, None) for index, theta in outputs],
                    y0=y0,
                    k=k,
                    ends=ends,
                )
            )
