"""A solve by the step loops: forwards, with what its gradient needs recorded on the way, and then that gradient attached."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import ended, noise
from .gradients import adjoint, checkpoint, direct, quadrature, reversible
from .gradients.dense import DenseGradient
from .gradients.polynomials import Polynomials
from .graphed.capture import no_cast_is_kept
from .held import Captured
from .integrate import integrate
from .outcome import failed, interrupted, known_of, solution_of, stats_of
from .probe import Probe, new_recorder, probe_of
from .problem import Problem, counter_of
from .regularizers import OF_STEPS, RUNNING, StepCosts
from .request import Request
from .saving import collector_of, ends_alone, give, streams, with_every
from .sharding import is_plain
from .solution import Solution, SolverError, Stats
from .solvers.checkpoints import Checkpoints
from .solvers.collect import AtTimes, EveryStep
from .solvers.events import EventWatch
from .solvers.trajectory import Recorder, Trajectory

Solved = tuple[Trajectory, Any, StepCosts | None]


def solve(request: Request) -> Solution:
    """Raises as `odenet_cuda.solve` does."""
    with no_cast_is_kept():
        attempt = _Solve(request, probe_of(request) if request.records else None, ())
        solved = attempt.recorded()
        late = attempt.seen_late()
        if late:
            counter_of(request.problem.field).nfe = 0
            attempt = _Solve(request, Probe(request), late)
            solved = attempt.recorded()
        return attempt.finished(*solved)


class _Solve:
    """probe: None where no gradients are recorded. late: tensors that func depends on, though not at the start."""

    def __init__(self, request: Request, probe: Probe | None, late: Sequence[Tensor]):
        self.asked = request
        self.collector: AtTimes | EveryStep | None = None
        if streams(request) and not request.settings.every:
            request = request.but(problem=ends_alone(request.problem))
        self.request, self.problem, self.probe, self.late = request, request.problem, probe, late
        self.watch: EventWatch | None = None  # of the solve, if events may end it
        self.captured = [] if probe is None else [*probe.captured, *late]
        inputs = [*request.structure.leaves, request.t, *self.captured]
        may = probe is not None
        self.wanted = may and any([tensor.requires_grad for tensor in inputs])
        self.unsure = may and not self.wanted and request.params is None  # func may depend on more later
        self.gradient = request.settings.gradient if self.wanted else None
        self.pair: list[Tensor] = []  # the last state of a solve whose steps are undone
        self.kept: Captured | None = None  # those tensors, once all are known
        counter = counter_of(self.problem.field)
        counter.with_gradients = counter.with_gradients or self.unsure
        if self.gradient == "adjoint" and not all(map(is_plain, self.captured)):
            raise NotImplementedError(
                "func has parameters that are made of other tensors, such as DTensor: gradient='adjoint' would add up their "
                "gradients in its own state; use gradient='direct' or 'checkpoint'"
            )

    # ---- forwards -----------------------------------------------------------------------------------------------------

    def recorded(self) -> Solved:
        """The solve. Where its steps are made again on the way back, what func draws in one is noted if it drew at the start;
        if it begins later, the solve is made twice."""
        probe, problem = self.probe, self.problem
        if self.gradient == "reversible":
            generators = noise.states(problem.device)
            found = self._forwards(reversible.NoStates(), ())
            if noise.differ(generators, noise.states(problem.device)):
                raise NotImplementedError(reversible.NOISY)
            return found
        if self.gradient != "checkpoint":
            return self._forwards(None, ())
        grid, per_sample, device, nfe = self.request.grid, problem.per_sample, problem.device, counter_of(problem.field).nfe
        checkpoints = Checkpoints(self.request.settings.max_checkpoints, None if grid is None else len(grid[0]) - 1)
        generators = noise.states(device)
        assert probe is not None
        if probe.noisy and not per_sample:
            return self._forwards(checkpoints, probe.noisy)
        found = self._forwards(checkpoints, ())
        if not noise.differ(generators, noise.states(device)):
            return found
        if per_sample:
            raise NotImplementedError(
                "func draws random numbers: gradient='checkpoint' cannot draw those of single samples again, so with "
                "step_control='per_sample' use gradient='direct'"
            )
        if self.request.callbacks:
            raise NotImplementedError(noise.LATER_NUMBERS)
        noise.restore(generators, device)
        counter_of(problem.field).nfe = nfe
        return self._forwards(checkpoints.anew(), generators)

    def _forwards(self, checkpoints: Checkpoints | reversible.NoStates | None, noisy: noise.States) -> Solved:
        """noisy: where random generators stood before the start; then where they stand is noted before every call."""
        request = self.request
        names = [name for name in request.settings.regularizers if name in OF_STEPS]
        count = len(self.problem.state_leaves)
        step_costs = StepCosts(names, request.options.tableau, self.problem.per_sample, count) if names else None
        recorder = self._recorder(checkpoints, step_costs)
        self.watch, self.collector = ended.watch_of(request), collector_of(self.asked)
        try:
            trajectory = integrate(
                self._noted(recorder, noisy) if noisy else self.problem,
                request.options,
                callbacks=request.callbacks,
                recorder=recorder,
                start=self._start(),
                grid=request.grid,
                events=self.watch,
                resumed=request.resumed,
                lookers=[] if self.collector is None else [self.collector],
            )
        except KeyboardInterrupt as interrupt:
            until = vars(interrupt).pop("trajectory", None)
            if until is not None and self.watch is None:
                interrupt.solution = self._collected(interrupted(request, until), until)  # type: ignore[attr-defined]
            raise
        if self.gradient == "reversible":
            self.pair = [leaf.clone() for leaf in trajectory.pair or trajectory.last]
        elif checkpoints is not None:
            recorder.last = [leaf.clone() for leaf in trajectory.last[: len(trajectory.ys)]]
        return trajectory, recorder, step_costs

    def _start(self) -> Any:
        """f(t0, y0), where it is known and the solve does not go on with the slope of another."""
        resumed = self.request.resumed
        if self.probe is None:
            return None
        if resumed is None or resumed.slope is None:
            return self.probe.start
        if self.gradient not in ("direct", "checkpoint"):
            return None
        if not self.request.options.tableau.fsal:
            raise NotImplementedError(
                f"resume: method={self.request.options.method!r} goes on with the last slope of the step before, which has no "
                f"gradient={self.gradient!r} here; use gradient='adjoint' or 'quadrature', or solve without resume"
            )
        return self.probe.start

    def _recorder(self, checkpoints: Checkpoints | reversible.NoStates | None, step_costs: StepCosts | None) -> Any:
        """What the solve must keep, or None."""
        request, dense = self.request, self.request.settings.dense
        if self.gradient == "quadrature":
            return Polynomials(request.options.tableau, self.problem, request.options.adaptive, dense)
        if self.gradient != "direct" and not dense and checkpoints is None and step_costs is None:
            return None
        keep: dict[str, Any] = {"checkpoints": checkpoints, "dense": dense, "step_costs": step_costs}
        return new_recorder(request, graphs=self.gradient == "direct", t_grad=request.t.requires_grad, **keep)

    def _noted(self, recorder: Recorder, noisy: noise.States) -> Problem:
        """The problem with a field that notes where random generators stand, so that func can draw its numbers again."""
        field: Any = self.problem.field
        noted = noise.NotedField(field, self.problem.device)
        noted.drawn.append(noisy)
        recorder.drawn = noted.drawn
        return replace(self.problem, field=noted)

    def seen_late(self) -> list[Tensor]:
        """Tensors with gradients that func depends on after all, though not at its start: too little was recorded."""
        if not self.unsure or not counter_of(self.problem.field).gave_graph:
            return []
        assert self.probe is not None
        return self.probe.anywhere(self.request)

    # ---- what the user gets -------------------------------------------------------------------------------------------

    def finished(self, trajectory: Trajectory, recorder: Any, step_costs: StepCosts | None) -> Solution:
        request, problem = self.request, self.problem
        stats, n = stats_of(request, trajectory), len(trajectory.ys)
        outputs = [*trajectory.ys, *trajectory.last[n:], *([] if step_costs is None else step_costs.sums(problem))]
        try:
            has_failed = failed(request, problem, trajectory, outputs[:n], stats)
        except SolverError as error:
            self._collected(error.solution, trajectory)
            raise
        if isinstance(self.collector, EveryStep) and self.wanted:
            self.request = request = with_every(request, self.collector, recorder, trajectory)
            self.problem = problem = request.problem
            outputs[:n] = trajectory.ys
        end = None if self.watch is None else ended.cut(request, self.watch, recorder, trajectory)
        if end is not None:
            self.request, self.problem, outputs = end.request, end.request.problem, trajectory.ys
        if self.wanted:
            outputs = self._attached(recorder, outputs, trajectory, has_failed, stats)
        elif torch.is_grad_enabled() and (len(problem.t) == 1 or problem.empty):
            outputs[:n] = self._without_steps()
            stats.nfe = counter_of(problem.field).nfe
        solution = solution_of(request, problem, outputs[:n], trajectory, recorder, stats)
        if solution.interpolant is not None and self.wanted and self.kept is not None:
            common = problem, request.structure.leaves, request.t, self.kept, stats, request.params is not None
            solution.interpolant.gradient = DenseGradient(self.gradient or "", recorder, *common)
        if end is not None:
            ended.give(solution, request, end, outputs)
        elif request.events is not None:
            ended.without(request, solution)
        if not self.wanted:
            self._collected(solution, trajectory)
        names = [name for kind in (RUNNING, OF_STEPS) for name in request.settings.regularizers if name in kind]
        if request.integrand is not None:
            begin = n + sum([name in RUNNING for name in names])
            found = [outputs.pop(begin) for _ in request.integrand.like]
            solution.integrals = request.integrand.structure.unflatten(known_of(problem, trajectory, found))
        costs = dict(zip(names, outputs[n:], strict=True))
        solution.regularizers = {name: costs[name] for name in request.settings.regularizers}
        return solution

    def _collected(self, solution: Solution, trajectory: Trajectory) -> Solution:
        """With the outputs that were collected, if some were."""
        if self.collector is not None:
            give(solution, self.collector, trajectory)
        return solution

    def _attached(
        self, recorder: Any, outputs: list[Tensor], trajectory: Trajectory, has_failed: bool, stats: Stats
    ) -> list[Tensor]:
        """The outputs with a gradient for y0, t and the captured tensors."""
        request, problem, probe, counter = self.request, self.problem, self.probe, counter_of(self.problem.field)
        assert probe is not None
        captured = self.captured
        if self.gradient == "direct":
            captured = probe.in_all(request, direct.evaluations(recorder.tape), probe.closed and not self.late)
        else:
            if request.params is None and not probe.closed and not self.late:
                captured = probe.at_end(request, trajectory)
            problem.calls = probe.some_calls(request, None if has_failed else trajectory)
            stats.nfe = counter.nfe
        self.kept = Captured(captured, request.func)
        common = problem, outputs, request.structure.leaves, request.t, self.kept, stats
        if self.gradient == "direct":
            return direct.attach(recorder, *common)
        if self.gradient == "checkpoint":
            return checkpoint.attach(recorder, *common, request.params is not None)
        if self.gradient == "reversible":
            return reversible.attach(recorder, self.pair, *common, request.params is not None)
        assert request.backward is not None
        if self.gradient == "quadrature":
            return quadrature.attach(request.backward, recorder, *common)
        return adjoint.attach(request.backward, *common)

    def _without_steps(self) -> list[Tensor]:
        """The outputs of a solve to the one time it starts at, or of a state without numbers, an empty batch say. Gradients of
        the latter for y0, t, and what func depends on are zero, but there."""
        problem, structure, times = self.problem, self.request.structure, self.request.t
        if len(problem.t) == 1:
            return [leaf[None].clone() for leaf in structure.leaves]
        t = problem.start_time(False) + 0 * times.sum().to(problem.device, problem.real)
        leaves = [leaf.view_as(leaf) for leaf in structure.leaves]
        slopes = problem.field(t, leaves)
        return [
            (leaf + slope + t.reshape(-1)[:1].sum()).expand(len(problem.t), *leaf.shape).clone()
            for leaf, slope in zip(leaves, slopes, strict=True)
        ]
