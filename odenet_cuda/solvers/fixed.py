"""Explicit Runge-Kutta methods on a grid that is known beforehand."""

import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import formulas, ops
from ..graphed.capture import captured
from ..problem import Problem, counter_of, to_device
from ..ranges import marked
from ..stepper import Stepper
from ..tableau import ButcherTableau, Method
from .events import EventWatch
from .trajectory import Evaluation, Output, Recorder, Step, Trajectory


def uniform_grid(t: list[float], step_size: float) -> list[float]:
    """t[0], t[0] + step_size, ... up to t[-1], where the last step may be shorter."""
    span = t[-1] - t[0]
    count = max(1, math.ceil(abs(span) / step_size * (1 - 1e-12)))
    direction = math.copysign(1.0, span)
    step = direction * step_size
    return [*[t[0] + step * i for i in range(count)], t[-1]]  # torch.compile goes through here, and knows no array's list


@dataclass(frozen=True, slots=True)
class Plan:
    """What is known of all steps of a grid before it is solved on.

    dts: [steps]. times: of all stages, [steps * stages], float64; rounded: float32. outputs: of each step, in order, as (index,
    theta, None). landed: of each step the place among them of the one at its end, -1 without one. inside: of each the places of
    the others, with their weights in the interpolant.
    """

    dts: list[float]
    times: np.ndarray
    rounded: np.ndarray
    outputs: list[list[Output]]
    landed: list[int]
    inside: list[list[tuple[int, list[float]]]]


def plan_of(nodes: list[float], t: list[float], direction: float, tableau: Method) -> Plan:
    """The plan of a grid; of the last short ones it is there already."""
    if len(nodes) + len(t) > _SHORT or torch.compiler.is_compiling():
        return _make_plan(nodes, t, direction, tableau)
    return _kept_plan(array("d", nodes).tobytes(), array("d", t).tobytes(), direction, tableau)


_SHORT = 2048  # times in a plan that is kept


@lru_cache(maxsize=32)
def _kept_plan(nodes: bytes, t: bytes, direction: float, tableau: Method) -> Plan:
    """By the bits of the numbers, for -0.0 is not 0.0 to func."""
    return _make_plan(np.frombuffer(nodes).tolist(), np.frombuffer(t).tolist(), direction, tableau)


def _make_plan(nodes: list[float], t: list[float], direction: float, tableau: Method) -> Plan:
    outputs = outputs_of_steps(nodes, t, direction)
    landed, inside = [], []
    for of_step in outputs:
        at_end = next((i for i, output in enumerate(of_step) if output[1] == 1.0), -1)
        others = [(i, output[1]) for i, output in enumerate(of_step) if i != at_end]
        landed.append(at_end)
        inside.append([(i, [float(w) for w in formulas.interpolant_weights(tableau, theta)]) for i, theta in others])
    grid, c = np.asarray(nodes), np.asarray(tableau.c)[None, :]
    t0, t1 = grid[:-1, None], grid[1:, None]
    dts = [t1 - t0 for t0, t1 in pairwise(nodes)]
    times = np.where(c == 1, t1, t0 + c * (t1 - t0)).reshape(-1)
    return Plan(dts, times, times.astype(np.float32), outputs, landed, inside)


def stage_times(plan: Plan, tableau: Method, real: torch.dtype, beside: float) -> Tensor:
    """Times at which the stages are evaluated, [steps * stages], in memory of their own. beside: the direction of the solve
    where those at the ends of a step lie just inside, else 0."""
    exact = real is not torch.float32 or torch.compiler.is_compiling()
    times = torch.from_numpy(plan.times if exact else plan.rounded).to(real, copy=True)
    if beside:
        c, beyond = np.tile(tableau.c, len(plan.dts)), torch.full_like(times, math.copysign(math.inf, beside))
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
        events: EventWatch | None = None,
        graph: str = "",
    ):
        self.problem, self.tableau, self.nodes, self.moves_with = problem, tableau, nodes, moves_with
        self.perturb = perturb
        self.recorder: Any = recorder  # None: nothing is recorded
        self.events, self.steps = events, 0  # the steps until one
        self.callback = (callbacks or {}).get("callback_step")
        self.rows = tableau.rows
        self.plan, self.dts, self.times = self._numbers(problem, nodes)
        n = len(problem.state_leaves)
        self.ys = [
            torch.empty(len(problem.t), *leaf.shape, dtype=leaf.dtype, device=leaf.device) for leaf in problem.leaves[:n]
        ]
        self.stepper: Stepper  # of the last solve
        self.captures = bool(graph)
        self.replay: Callable[[], None] | None = None  # a captured solve
        self.initial = [leaf.clone() for leaf in problem.leaves] if graph else []
        self.calls = 0  # of func in a solve, the first not counted
        self.call: Evaluation | None = None  # the last

    def _numbers(self, problem: Problem, nodes: list[float]) -> tuple[Plan, Tensor, Tensor]:
        """What is known of the steps; their sizes, and the times of their stages."""
        plan = plan_of(nodes, problem.t, problem.direction, self.tableau)
        times = stage_times(plan, self.tableau, problem.real, problem.direction if self.perturb else 0.0)
        return plan, to_device(torch.from_numpy(np.array(plan.dts)), problem.device), to_device(times, problem.device)

    def run(self, start: Evaluation | None = None) -> Trajectory:
        """start: f(t0, y0), where the caller already has it."""
        if not self.captures:
            self._solve(self.problem.leaves, start)
            return self._trajectory()
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
        return self._trajectory()

    def _trajectory(self) -> Trajectory:
        return Trajectory(ys=self.ys, last=self.stepper.y0, state=None, call=self.call, steps=self.steps)

    def reset(self, problem: Problem, nodes: list[float]) -> None:
        """Another problem of the same kind takes the place of the last: in the same memory, for a captured solve. Its outputs
        must lie in the same places of the same steps."""
        self.problem, self.nodes = problem, nodes
        self.plan, *numbers = self._numbers(problem, nodes)
        for own, new in zip((self.dts, self.times), numbers, strict=True):
            own.copy_(new)
        for own, leaf in zip(self.initial, problem.leaves, strict=True):
            own.copy_(leaf)

    def solve_again(self, start: Evaluation | None = None) -> None:
        """The solve from `initial` on, as often as wanted; only the outputs lie where they lay."""
        self._solve(self.initial, start)

    def _solve(self, leaves: list[Tensor], start: Evaluation | None) -> None:
        problem, plan, recorder = self.problem, self.plan, self.recorder
        recording = recorder is not None and recorder.slopes
        stages, points, fsal = self.tableau.stages, len(self.rows), self.tableau.fsal and not self.perturb
        every_slope = self.events is not None or (recorder is not None and recorder.every_slope)
        addresses: list[int] = []
        last_step = len(plan.outputs) - 1
        places, times = self._places(), self._views()
        stepper = self._begin(leaves, next(places), recording)
        kernels = stepper.kernels
        for step, outputs in enumerate(plan.outputs):
            with marked("step"):
                at, views, landed, inside = [next(places) for _ in outputs], next(times), plan.landed[step], plan.inside[step]
                if self.callback is not None:
                    self._call_back(self.callback, step)
                self._bind_step(step, at[landed] if landed >= 0 else None, recording)
                if addresses:  # the last slope of the step before
                    stepper.k[0] = stepper.k[-1]
                else:
                    self.call, start = start or self._evaluate(0, views[0], stepper.y0[: stepper.n]), None
                    if recorder is not None:
                        recorder.start(self.call, self.moves_with[step])
                    addresses = stepper.set_slopes(0, self.call.k, not recording)
                evaluations: list[Evaluation | None] = []
                for i in range(1, points + 1):
                    kernels.stage(i, addresses)
                    # The slope at the end of the step serves the next step and outputs inside this one.
                    if i < stages and (i < points or inside or step < last_step or every_slope):
                        self.call = evaluation = self._evaluate(i, views[i], stepper.y[i])
                        evaluations.append(evaluation)
                        addresses = stepper.set_slopes(i, evaluation.k, not recording)
                    else:
                        evaluations.append(None)
                        addresses = []
                if problem.quadratures:
                    kernels.quadrature(addresses)
                if inside:
                    self._write_outputs([(at[i], weights) for i, weights in inside], self.dts[step : step + 1])
                if recording and landed >= 0:
                    _copy(at[landed], stepper.y[-1])
                if recorder is not None:
                    self._record(step, evaluations, outputs)
                ended = self.events is not None and self.events.ended(self.nodes[step : step + 2], stepper)
                self._go_on(recording)
                if ended:
                    self.steps = step + 1
                    break
                addresses = addresses if fsal else []
        if not recording:  # the outputs are the user's
            stepper.y0 = [leaf.clone() for leaf in stepper.y0]

    # ---- where things lie ---------------------------------------------------------------------------------------------

    def _places(self) -> Iterator[list[Tensor]]:
        """Where the outputs lie, one after the other."""
        return map(list, zip(*map(_entries, self.ys), strict=True))

    def _views(self) -> Iterator[tuple[Tensor, ...]]:
        """The times of each step's stages, as func sees them."""
        return zip(*[_entries(self.times)] * self.tableau.stages, strict=True)

    def _begin(self, leaves: list[Tensor], place: list[Tensor], recording: bool) -> Stepper:
        """At the start, of which `place` is the output. Where nobody keeps the states, those at the times of outputs are
        written where the outputs lie, and those of other nodes, and of quadratures, into two buffers by turns."""
        problem, n = self.problem, len(place)
        _copy(place, leaves)
        if recording:
            start = [leaf.clone(memory_format=torch.contiguous_format) for leaf in leaves]
            self.stepper = Stepper(problem, self.tableau, self.rows, start=start, apart=True)
            return self.stepper
        quadratures = [leaf.clone() for leaf in leaves[n:]]
        between = [[torch.empty_like(leaf) for leaf in place] for _ in range(2)] if -1 in self.plan.landed else [place, place]
        self.stepper = stepper = Stepper(problem, self.tableau, self.rows, start=[*place, *quadratures], end=between[0])
        self.between, self.quadratures = between, [stepper.q1, quadratures]
        if between[1] is not place:
            stepper.own(between[1])
        return stepper

    def _bind_step(self, step: int, place: list[Tensor] | None, recording: bool) -> None:
        """place: of the output at the end of the step, None without one."""
        stepper, dt = self.stepper, self.dts.data_ptr() + 8 * step
        if not recording:
            stepper.bind_step(dt, [*(place or self.between[step % 2]), *self.quadratures[step % 2]])
            return
        if step:
            stepper.new_stages()
        stepper.kernels.bind_dt(dt)

    def _go_on(self, recording: bool) -> None:
        if recording:
            self.stepper.swap_ends()
        else:
            self.stepper.go_on()

    # ---- parts of a step ----------------------------------------------------------------------------------------------

    def _evaluate(self, i: int, t: Tensor, y: list[Tensor]) -> Evaluation:
        if self.recorder is not None and self.recorder.slopes:
            return self.recorder.evaluate(self.problem.field, t, y)
        return Evaluation(t, y, self.problem.field(t, y, i))

    def _call_back(self, callback: Callable, step: int) -> None:
        t0, t1 = self.nodes[step : step + 2]
        t, dt = (self.dts.new_tensor(x) for x in (t0, abs(t1 - t0)))
        callback(t, [leaf.clone() for leaf in self.stepper.y0], dt)

    def _write_outputs(self, inside: list[tuple[list[Tensor], list[float]]], dt: Tensor) -> None:
        """inside: where each of them lies, and its weights."""
        stepper = self.stepper
        # A stage that was not evaluated has no slope and no weight.
        slopes = [of_stage[leaf].detach() for leaf in range(stepper.n) for of_stage in stepper.k if of_stage]
        for place, weights in inside:
            ops.stage(place, stepper.y0[: stepper.n], slopes, weights, dt)

    def _record(self, step: int, evaluations: list[Evaluation | None], outputs: list[Output]) -> None:
        t0, t1 = self.nodes[step : step + 2]
        ends = [None if index is None else (index, None) for index in self.moves_with[step : step + 2]]
        y0, k, stages = self.stepper.y0, self.stepper.k, self.tableau.stages
        column = self.times[step * stages : (step + 1) * stages, None]
        done = Step(column, column[0], t1 - t0, None, outputs, (ends[0], ends[1]), y0, k, evaluations)
        self.recorder.fixed_step(t0, t1, done)


def _entries(x: Tensor) -> Iterator[Tensor]:
    """Views of x[0], x[1], ...: of a long x a part at a time."""
    parts = (x,) if len(x) <= _CHUNK else x.split(_CHUNK)
    return chain.from_iterable(map(torch.unbind, parts))


_CHUNK = 1024


def _copy(places: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
    for place, leaf in zip(places, leaves, strict=False):
        place.copy_(leaf)
