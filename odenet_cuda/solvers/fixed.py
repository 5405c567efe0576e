"""Explicit Runge-Kutta methods on a grid that is known beforehand."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import formulas, ops
from ..graphed.capture import captured
from ..problem import Problem, counter_of, to_device
from ..ranges import marked
from ..stepper import Stepper
from ..tableau import ButcherTableau
from .trajectory import Evaluation, Output, Recorder, Step, Trajectory


def uniform_grid(t: list[float], step_size: float) -> list[float]:
    """t[0], t[0] + step_size, ... up to t[-1], where the last step may be shorter."""
    span = t[-1] - t[0]
    count = max(1, math.ceil(abs(span) / step_size * (1 - 1e-12)))
    direction = math.copysign(1.0, span)
    step = direction * step_size
    return [*[t[0] + step * i for i in range(count)], t[-1]]  # torch.compile goes through here, and knows no array's list


def stage_times(grid: list[float], tableau: ButcherTableau, real: torch.dtype, perturb: bool) -> Tensor:
    """Times at which the stages are evaluated, [steps, stages]; with `perturb` those at the ends of a step lie just inside."""
    nodes = np.asarray(grid)
    t0, t1 = nodes[:-1, None], nodes[1:, None]
    c = np.asarray(tableau.c)[None, :]
    times = torch.from_numpy(np.where(c == 1, t1, t0 + c * (t1 - t0))).to(real)
    if perturb:
        beyond = torch.full_like(times, math.copysign(math.inf, grid[-1] - grid[0]))
        later, earlier = torch.nextafter(times, beyond), torch.nextafter(times, -beyond)
        times = torch.where(torch.from_numpy(c == 0), later, torch.where(torch.from_numpy(c == 1), earlier, times))
    return times


def outputs_of_steps(nodes: list[float], t: list[float], direction: float) -> list[list[Output]]:
    """For each step of the grid the outputs that fall into it; the last may be its end."""
    outputs: list[list[Output]] = []
    output = 1
    for t0, t1 in pairwise(nodes):
        first = output
        while output < len(t) and direction * (t1 - t[output]) >= 0:
            output += 1
        outputs.append([(i, 1.0 if t[i] == t1 else (t[i] - t0) / (t1 - t0), None) for i in range(first, output)])
    return outputs


def calls_on_grid(tableau: ButcherTableau, nodes: list[float], t: list[float], direction: float, perturb: bool) -> int:
    """Calls of func that a solve on this grid takes."""
    points, steps = len(tableau.rows), len(nodes) - 1
    count = (1 if tableau.fsal and not perturb else steps) + steps * (min(points, tableau.stages) - 1)
    if points < tableau.stages:  # a slope at the end of each step, of the last where an output lies inside it
        inside = len(t) > 2 and direction * (t[-2] - nodes[-2]) > 0
        count += steps - 1 + inside
    return count


class FixedSolver:
    """A solve on the grid `nodes`, which begins at t[0] and ends at t[-1], and after `reset` another of the same kind.

    moves_with: for each node the index of the output time that it moves with, or None where it is taken as given. graph, if
    not empty: the second solve and those after it are one captured graph, for nothing on the host depends on a step.
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
        graph: str = "",
    ):
        self.problem, self.tableau, self.nodes, self.moves_with = problem, tableau, nodes, moves_with
        self.perturb = perturb
        self.recorder: Any = recorder  # None: nothing is recorded
        self.callback = (callbacks or {}).get("callback_step")
        self.rows = tableau.rows
        self.stepper = Stepper(problem, tableau, self.rows)
        self.dts, self.times = self._numbers(problem, nodes)
        self.ys = [leaf.new_empty(len(problem.t), *leaf.shape) for leaf in self.stepper.y0[: self.stepper.n]]
        self.captures = bool(graph)
        self.replay: Callable[[], None] | None = None  # a captured solve
        self.initial = [leaf.clone() for leaf in self.stepper.y0] if graph else []
        self.calls = 0  # of func in a solve, the first not counted
        self.call: Evaluation | None = None  # the last

    def _numbers(self, problem: Problem, nodes: list[float]) -> tuple[Tensor, Tensor]:
        """The sizes of the steps, and the times of their stages."""
        times = stage_times(nodes, self.tableau, problem.real, self.perturb)
        dts = torch.from_numpy(np.diff(nodes))
        return to_device(dts, problem.device), to_device(times, problem.device)

    def run(self, start: Evaluation | None = None) -> Trajectory:
        """start: f(t0, y0), where the caller already has it."""
        if not self.captures:
            self._solve(start)
            return Trajectory(ys=self.ys, last=self.stepper.y0, state=None, call=self.call)
        counter = counter_of(self.problem.field)
        called = counter.nfe
        if self.calls and self.replay is None:  # the solve before was not captured: what func does once is done
            self.replay = captured(self.solve_again, self.problem.device)
            self.captures = self.replay is not None
        if self.replay is None:
            self.solve_again(start)
            self.calls = counter.nfe - called
        else:
            self.replay()
            counter.nfe = called + self.calls
        return Trajectory(ys=self.ys, last=self.stepper.y0, state=None, call=self.call)

    def reset(self, problem: Problem, nodes: list[float]) -> None:
        """Another problem of the same kind takes the place of the last: in the same memory, for a captured solve. Its outputs
        must lie in the same places of the same steps."""
        self.problem, self.nodes = problem, nodes
        for own, new in zip((self.dts, self.times), self._numbers(problem, nodes), strict=True):
            own.copy_(new)
        for own, leaf in zip(self.initial, problem.leaves, strict=True):
            own.copy_(leaf)

    def solve_again(self, start: Evaluation | None = None) -> None:
        """The solve from `initial` on, as often as wanted; only the outputs lie where they lay."""
        self.stepper.start_at(self.initial)
        self._solve(start)

    def _solve(self, start: Evaluation | None) -> None:
        problem, stepper, kernels, recording = (
            self.problem,
            self.stepper,
            self.stepper.kernels,
            self.recorder is not None and self.recorder.slopes,
        )
        nodes, t, stages, fsal = self.nodes, problem.t, self.tableau.stages, self.tableau.fsal and not self.perturb
        dts, times, ys = self.dts, self.times, self.ys
        for out, leaf in zip(ys, stepper.y0, strict=False):
            out[0] = leaf
        every_slope = self.recorder is not None and self.recorder.every_slope
        outputs = outputs_of_steps(nodes, t, problem.direction)
        last_step, last_slope = len(nodes) - 2, None
        for step, (t0, t1) in enumerate(pairwise(nodes)):
            with marked("step"):
                kernels.bind_dt(dts.data_ptr() + 8 * step)
                views = times[step].unbind(0)
                if self.callback is not None:
                    self.callback(dts.new_tensor(t0), [leaf.clone() for leaf in stepper.y0], dts.new_tensor(abs(t1 - t0)))
                if recording:
                    stepper.new_stages()
                landed = next((index for index, theta, _ in outputs[step] if theta == 1.0), None)
                inside = [(index, float(theta)) for index, theta, _ in outputs[step] if index != landed]
                if last_slope is None:
                    first_slope = start or self._evaluate(0, views[0], stepper.y0[: stepper.n])
                    start = None
                    if self.recorder is not None:
                        self.recorder.start(first_slope, self.moves_with[step])
                    last_slope, self.call = first_slope.k, first_slope
                kernels.bind_slopes(0, stepper.set_slopes(0, last_slope, not recording))
                last_slope = None
                evaluations: list[Evaluation | None] = []
                addresses: list[int] = []
                for i in range(1, len(self.rows) + 1):
                    kernels.stage(i, addresses)
                    # The slope at the end of the step serves the next step and outputs inside this one.
                    if i < stages and (i < len(self.rows) or inside or step < last_step or every_slope):
                        self.call = evaluation = self._evaluate(i, views[i], stepper.y[i])
                        evaluations.append(evaluation)
                        addresses = stepper.set_slopes(i, evaluation.k, not recording)
                        last_slope = stepper.k[i] if fsal and i == stages - 1 else None
                    else:
                        evaluations.append(None)
                        addresses = []
                kernels.quadrature(addresses if len(self.rows) < stages else [])
                self._write_outputs(ys, inside, dts[step : step + 1])
                if landed is not None:
                    for out, leaf in zip(ys, stepper.y[-1], strict=True):
                        out[landed] = leaf
                if self.recorder is not None:
                    self._record(step, times[step], evaluations, outputs[step])
                stepper.swap_ends()

    def _evaluate(self, i: int, t: Tensor, y: list[Tensor]) -> Evaluation:
        if self.recorder is not None and self.recorder.slopes:
            return self.recorder.evaluate(self.problem.field, t, y)
        return Evaluation(t, y, self.problem.field(t, y, i))

    def _slopes(self) -> list[list[Tensor]]:
        """[leaves][stages], without graphs; a stage that was not evaluated has none and no weight."""
        stepper = self.stepper
        return [[of_stage[leaf].detach() for of_stage in stepper.k if of_stage] for leaf in range(len(stepper.y0))]

    def _write_outputs(self, ys: list[Tensor], inside: list[tuple[int, float]], dt: Tensor) -> None:
        if not inside:
            return
        y0, slopes = self.stepper.y0[: self.stepper.n], self._slopes()[: self.stepper.n]
        flat = [slope for of_leaf in slopes for slope in of_leaf]
        for index, theta in inside:
            ops.stage(
                [out[index] for out in ys], y0, flat, [float(w) for w in formulas.interpolant_weights(self.tableau, theta)], dt
            )

    def _record(self, step: int, times: Tensor, evaluations: list[Evaluation | None], outputs: list[Output]) -> None:
        t0, t1 = self.nodes[step : step + 2]
        ends = [None if index is None else (index, None) for index in self.moves_with[step : step + 2]]
        y0, k, column = self.stepper.y0, self.stepper.k, times[:, None]
        done = Step(column, column[0], t1 - t0, None, outputs, (ends[0], ends[1]), y0, k, evaluations)
        self.recorder.fixed_step(t0, t1, done)
