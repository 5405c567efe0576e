"""One solve with what surrounds it: which tensors get gradients, what is recorded, failure, and the Solution."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import noise, transforms
from .callbacks import find_callbacks
from .captured import Known, Walk, find_captured, outside, sequence_number
from .compiled.attach import attach as attach_compiled
from .compiled.engine import Engine, evaluations
from .gradients import adjoint as adjoint_gradient
from .gradients import by_graph
from .gradients import checkpoint as checkpoint_gradient
from .gradients import direct as direct_gradient
from .gradients import quadrature as quadrature_gradient
from .gradients.accumulator import SHORT
from .gradients.autocast import autocast_state
from .gradients.graphed_steps import GraphedSteps
from .held import Captured
from .integrate import MOST_CAPTURED, Grid, Options, adaptive_kind, integrate
from .ops import FIELDS
from .problem import Field, Problem, Structure, check_state, counter_of, own_tensors, to_device
from .regularizers import OF_STEPS, RUNNING, StepCosts
from .sharding import is_plain, no_sharded_calls, refuse_sharded
from .solution import Interpolant, Solution, Stats, raise_failure
from .solvers.adaptive import runs_ahead
from .solvers.checkpoints import Checkpoints
from .solvers.fixed import calls_on_grid
from .solvers.trajectory import Evaluation, Recorder, Trajectory
from .step_control import SUCCESS


class Job:
    """One solve with what surrounds it: which tensors get gradients, recording, failure, and the Solution."""

    def __init__(
        self,
        problem: Problem,
        options: Options,
        structure: Structure,
        t: Tensor,
        dense: bool,
        grid: Grid | None,
        regularizers: Sequence[str] = (),
    ):
        self.problem, self.options, self.structure, self.t, self.dense = problem, options, structure, t, dense
        self.grid, self.regularizers = grid, regularizers
        self.field: Any = problem.field
        self.known: list[Tensor] = []  # the captured tensors that are sure to be outside of func
        self.first: Any = None  # f(t0, y0) with its graph, where that is still needed at the end
        self.since: int | None = None  # the number of autograd before it; None where numbers tell nothing about func
        self.noisy: noise.States = ()  # where random generators stood before the first slope, if func draws numbers

    def _step_costs(self) -> StepCosts | None:
        names = [name for name in self.regularizers if name in OF_STEPS]
        count = len(self.problem.state_leaves)
        return StepCosts(names, self.options.tableau, self.problem.per_sample, count) if names else None

    def run(
        self,
        gradient: str,
        backward: Any,
        checkpoints: Checkpoints | None,
        params: Sequence[Tensor] | None,
        on_failure: str,
        late: Sequence[Tensor] = (),
    ) -> Solution:
        """late: tensors that func depends on, though not at the start."""
        empty = all(leaf.numel() == 0 for leaf in self.problem.leaves)
        wanted = torch.is_grad_enabled() and len(self.problem.t) > 1 and not empty
        if wanted:
            refuse_sharded(self.field.func)
        start, captured, closed = self._probe(gradient, params) if wanted else (None, [], True)
        captured = [*captured, *late]
        inputs = [*self.structure.leaves, self.t, *captured]
        counter, again = counter_of(self.field), (gradient, backward, checkpoints, params, on_failure)
        unsure = wanted and params is None  # func may depend on more later
        wanted = wanted and any(tensor.requires_grad for tensor in inputs)
        unsure = unsure and not wanted
        counter.with_gradients = counter.with_gradients or unsure
        if wanted and gradient == "adjoint" and not all(map(is_plain, captured)):
            raise NotImplementedError(
                "func has parameters that are made of other tensors, such as DTensor: gradient='adjoint' would add up their "
                "gradients in its own state; use gradient='direct' or 'checkpoint'"
            )
        if wanted and self.options.cuda_graph and gradient in ("direct", "checkpoint"):
            replayed = self._by_graph(gradient, checkpoints, captured, closed, params is not None)
            if replayed is not None:
                return self._replayed(*replayed, captured, on_failure)
        checkpoints = checkpoints if wanted else None
        solve = partial(self._solve, gradient if wanted else None, start)
        trajectory, recorder, step_costs = (
            solve(checkpoints, self.noisy) if checkpoints is None else self._redrawn(solve, checkpoints)
        )
        if unsure and counter.gave_graph and (late := self._captured_anywhere()):
            counter.nfe = 0
            return self.run(*again, late)
        stats = self._stats(trajectory)
        n = len(trajectory.ys)
        outputs = [*trajectory.ys, *trajectory.last[n:], *([] if step_costs is None else step_costs.sums(self.problem))]
        failed = self._failed(trajectory, outputs[:n], stats, on_failure)
        if wanted and gradient == "direct":
            calls = direct_gradient.evaluations(recorder.tape)
            captured = find_captured(self.field, calls, self.known, self.since, closed and not late)
        elif wanted and params is None and not closed and not late:
            captured = self._captured_at_end(trajectory)
            stats.nfe = self.field.nfe
        if wanted:
            if gradient != "direct":
                assert start is not None
                self.problem.calls = self._some_calls(start, None if failed else trajectory, gradient)
                stats.nfe = self.field.nfe
            outputs = self._attach(gradient, backward, recorder, outputs, captured, stats, params is not None)
        elif len(self.problem.t) == 1 and torch.is_grad_enabled():
            outputs[:n] = [leaf[None].clone() for leaf in self.structure.leaves]
        elif empty and torch.is_grad_enabled():
            outputs[:n] = self._of_no_numbers()
            stats.nfe = self.field.nfe
        solution = self._solution(outputs[:n], trajectory, recorder, stats)
        names = [name for kind in (RUNNING, OF_STEPS) for name in self.regularizers if name in kind]
        costs = dict(zip(names, outputs[n:], strict=True))
        solution.regularizers = {name: costs[name] for name in self.regularizers}
        return solution

    def _solve(
        self, gradient: str | None, start: Evaluation | None, checkpoints: Checkpoints | None, noisy: noise.States
    ) -> tuple[Trajectory, Any, StepCosts | None]:
        """noisy: where random generators stood before `start`; then where they stand is noted before every call."""
        step_costs = self._step_costs()
        recorder = self._recorder_for(gradient, checkpoints, step_costs)
        trajectory = integrate(
            self._noted(recorder, noisy) if noisy else self.problem,
            self.options,
            callbacks=find_callbacks(self.field.func, self.structure, self.options.adaptive),
            recorder=recorder,
            start=start,
            grid=self.grid,
        )
        if checkpoints is not None:
            recorder.last = [leaf.clone() for leaf in trajectory.last[: len(trajectory.ys)]]
        return trajectory, recorder, step_costs

    def _redrawn(self, solve: Any, checkpoints: Checkpoints) -> tuple[Trajectory, Any, StepCosts | None]:
        """A solve whose steps are made again on the way back. What func draws in one is noted if it drew at the start; if it
        begins later, the solve is made twice."""
        per_sample, device, nfe = self.problem.per_sample, self.problem.device, self.field.nfe
        generators = noise.states(device)
        if self.noisy and not per_sample:
            return solve(checkpoints, self.noisy)
        found = solve(checkpoints, ())
        if not noise.differ(generators, noise.states(device)):
            return found
        if per_sample:
            raise NotImplementedError(
                "func draws random numbers: gradient='checkpoint' cannot draw those of single samples again, so with "
                "step_control='per_sample' use gradient='direct'"
            )
        if find_callbacks(self.field.func, self.structure, self.options.adaptive):
            raise NotImplementedError(noise.LATER_NUMBERS)
        noise.restore(generators, device)
        self.field.nfe = nfe
        return solve(checkpoints.anew(), generators)

    def _of_no_numbers(self) -> list[Tensor]:
        """The outputs of a state without numbers, an empty batch say. Their gradients for y0, t, and what func depends on are
        zero, but there."""
        t = self.problem.start_time(False) + 0 * self.t.sum().to(self.problem.device, self.problem.real)
        leaves = [leaf.view_as(leaf) for leaf in self.structure.leaves]
        slopes = self.field(t, leaves)
        return [
            (leaf + slope + t.reshape(-1)[:1].sum()).expand(len(self.t), *leaf.shape).clone()
            for leaf, slope in zip(leaves, slopes, strict=True)
        ]

    def _replayed(self, trajectory: Trajectory, lease: by_graph.Lease, captured: Sequence[Tensor], on_failure: str) -> Solution:
        """The solution of a solve by graphs."""
        stats, outputs = self._stats(trajectory), trajectory.ys
        self._failed(trajectory, outputs, stats, on_failure)
        kept = Captured(captured, self.field.func)
        outputs = by_graph.attach(lease, self.problem, outputs, self.structure.leaves, self.t, kept, stats)
        return self._solution(outputs, trajectory, None, stats)

    def _by_graph(
        self, gradient: str, checkpoints: Checkpoints | None, captured: Sequence[Tensor], closed: bool, chosen: bool
    ) -> tuple[Trajectory, by_graph.Lease] | None:
        """A solve whose gradient is by captured graphs; None where it is to be done without."""
        problem, options, grid = self.problem, self.options, self.grid
        if not runs_ahead(problem.device):
            return None
        calls = 0 if grid is None else calls_on_grid(options.tableau, grid[0], problem.t, problem.direction, options.perturb)
        limit = None if checkpoints is None else checkpoints.limit
        refusals = {
            "dense=True": self.dense,
            "regularizers": bool(self.regularizers),
            "callbacks of func": bool(find_callbacks(self.field.func, self.structure, options.adaptive)),
            "a gradient for t": self.t.requires_grad,
            "adjoint_params": chosen,
            "func is no module that depends on its parameters alone": not closed,
            f"the grid takes {calls} calls of func, a graph at most {MOST_CAPTURED}": calls > MOST_CAPTURED,
            "max_checkpoints": grid is None and limit is not None,
            "jump_t": bool(options.jump_t),
            "a norm of the user, or tolerances that are tensors": grid is None and not problem.fused_error,
            f"{options.method} begins a step with the last slope of the step before": grid is None and not options.tableau.fsal,
            "parameters of 16 bits": grid is None and any(x.dtype in SHORT for x in captured),
        }
        refusal = next((name for name, refused in refusals.items() if refused), "")
        # What is kept with the graphs holds nothing of this solve but numbers.
        record = partial(
            Recorder, options.tableau, per_sample=problem.per_sample, leaves=len(problem.state_leaves), carried=self._carried
        )
        cast = autocast_state(problem.device)
        if grid is None:
            kind: Any = "steps", adaptive_kind(problem, options).key
            make: Any = lambda: GraphedSteps(problem, options, captured, record, cast)  # noqa: E731
        else:
            if gradient == "direct":
                cast["enabled"] = False  # products are made as func was called
            kind = gradient, limit, options, tuple(grid[0]), tuple(problem.t)
            kept = partial(Checkpoints, limit, len(grid[0]) - 1) if checkpoints is not None else None
            make = lambda: by_graph.GraphedSolve(problem, options, grid, captured, record, kept, cast)  # noqa: E731
        draws = gradient == "direct" and grid is not None
        return by_graph.solve(problem, options, kind, make, captured, refusal, draws)

    def run_compiled(self, engine: Engine, gradient: str, backward: Any, on_failure: str) -> Solution:
        """The solve by a compiled field."""
        problem, options = self.problem, self.options
        wanted = engine.sources.wanted
        trajectory = engine.solve(keep=wanted and gradient != "adjoint")
        self.field.nfe = evaluations(options, trajectory.host_state(), self.grid, problem)
        stats = self._stats(trajectory)
        outputs = trajectory.ys
        self._failed(trajectory, outputs, stats, on_failure)
        if wanted:
            outputs = attach_compiled(engine, gradient, backward, outputs, stats, lambda: self._again(on_failure))
        return self._solution(outputs, trajectory, None, stats)

    def _again(self, on_failure: str) -> list[Tensor]:
        """The outputs once more by the stepper, with a gradient that has one itself."""
        problem = replace(self.problem, field=self.field.again())
        job = Job(problem, self.options, self.structure, self.t, False, self.grid)
        return self.structure.flatten(job.run("direct", None, None, None, on_failure).ys)

    def _recorder_for(self, gradient: str | None, checkpoints: Checkpoints | None, step_costs: StepCosts | None) -> Any:
        """What the solve must keep, or None. gradient: None where none is wanted."""
        if gradient == "quadrature":
            return quadrature_gradient.Polynomials(self.options.tableau, self.problem, self.options.adaptive, self.dense)
        if gradient != "direct" and not self.dense and checkpoints is None and step_costs is None:
            return None
        keep: dict[str, Any] = {"checkpoints": checkpoints, "dense": self.dense, "step_costs": step_costs}
        return self._recorder(graphs=gradient == "direct", t_grad=self.t.requires_grad, **keep)

    def _noted(self, recorder: Recorder, noisy: noise.States) -> Problem:
        """The problem with a field that notes where random generators stand, so that func can draw its numbers again."""
        field = noise.NotedField(self.field, self.problem.device)
        field.drawn.append(noisy)
        recorder.drawn = field.drawn
        return replace(self.problem, field=field)

    def _attach(
        self,
        gradient: str,
        backward: Any,
        recorder: Any,
        outputs: list[Tensor],
        captured: Sequence[Tensor],
        stats: Stats,
        chosen: bool,
    ) -> list[Tensor]:
        """The outputs with a gradient for y0, t and the captured tensors. chosen: these, by the user."""
        kept = Captured(captured, self.field.func)
        common = self.problem, outputs, self.structure.leaves, self.t, kept, stats
        if gradient == "direct":
            return direct_gradient.attach(recorder, *common)
        if gradient == "checkpoint":
            return checkpoint_gradient.attach(recorder, *common, chosen)
        if gradient == "quadrature":
            return quadrature_gradient.attach(backward, recorder, *common)
        return adjoint_gradient.attach(backward, *common)

    def run_transformed(self, on_failure: str) -> Solution:
        """Inside torch.func transforms, forward mode or torch.compile; derivatives are those of the discrete solve."""
        problem, options, structure = self.problem, self.options, self.structure
        callbacks = find_callbacks(self.field.func, structure, options.adaptive)
        if self.dense or callbacks or self.regularizers:
            what = "dense=True is" if self.dense else "callbacks of func are" if callbacks else "regularizers are"
            raise NotImplementedError(f"{what} not served inside torch.func transforms, forward mode and torch.compile")
        if options.adaptive and transforms.under_vmap():
            return self._run_mapped(on_failure)
        if options.adaptive:
            ys, trajectory, nfe = transforms.solve_on_found_steps(problem, options, self.field.func, structure, self.t)
        else:
            assert self.grid is not None
            ys, nfe = transforms.solve_on_grid(problem, options, self.field.func, structure, self.t, self.grid)
            trajectory = Trajectory(ys, [leaf[-1].detach() for leaf in ys], None)
        self.field.nfe = nfe
        stats = self._stats(trajectory)
        self._failed(trajectory, ys, stats, on_failure)
        return self._solution(ys, trajectory, None, stats)

    def _run_mapped(self, on_failure: str) -> Solution:
        """An adaptive solve under torch.vmap: the mapped axis is that of the samples under per-sample control."""
        problem = self.problem
        if problem.per_sample or problem.norm is not None:
            what = "step_control='per_sample'" if problem.per_sample else "norm"
            raise NotImplementedError(
                f"{what} is not served under torch.vmap over an adaptive solve; give the samples as one batch"
            )
        rows = transforms.Rows(self.field.func, self.structure)
        with rows.outside():
            structure = check_state(rows.y0)
            leaves = [leaf.detach().contiguous() for leaf in structure.leaves]
            mapped = replace(problem, field=Field(rows, structure), leaves=leaves, per_sample=True)
            solution = Job(mapped, self.options, structure, self.t, False, None).run("direct", None, None, None, on_failure)
        solution.ys, solution.y_last = rows.mapped(solution.ys, 1), rows.mapped(solution.y_last, 0)
        return solution

    def _probe(self, gradient: str, params: Sequence[Tensor] | None) -> tuple[Evaluation | None, list[Tensor], bool]:
        """f(t0, y0) with its graph, the tensors outside of func that get gradients, and whether func can have no others."""
        params_wanted = [param for param in params or () if param.requires_grad]
        problem = self.problem
        t0 = problem.time_beside(0, self.options.on_side(problem, 0))
        recorder = self._recorder(graphs=params is None, t_grad=self.t.requires_grad)
        y_grad = self.t.requires_grad or any(leaf.requires_grad for leaf in self.structure.leaves)
        generators = noise.states(problem.device) if gradient == "checkpoint" else ()
        self.since = sequence_number()
        with no_sharded_calls():
            start = recorder.evaluate(self.field, t0, [leaf.detach().clone() for leaf in problem.state_leaves], y_grad)
        if noise.differ(generators, noise.states(problem.device) if generators else ()):
            self.noisy = generators
        if params is not None:
            return Evaluation(start.t, start.y, [slope.detach() for slope in start.k]), params_wanted, True
        window = range(self.since, sequence_number())
        own, is_module = own_tensors(self.field.func)
        known = Known(x for x in own if x.requires_grad)
        walk = Walk(start.k, [start.t, *start.y], known, window)
        found = list(walk.leaves.values())
        if walk.boundary:
            found = outside(self.field, start, known, self.since)
            known.add(found)
            if all(x.grad_fn is None for x in found):  # made inside, by another thread
                self.since = None
        self.known, closed = list(known.tensors.values()), is_module and not found
        captured = [*self.known, *(x for x in found if id(x) not in known.tensors)]
        if gradient != "direct":
            self.first = start
            start = Evaluation(start.t, start.y, [slope.detach() for slope in start.k])
        return start, captured, closed

    @property
    def _carried(self) -> bool:
        return self.options.adaptive and not self.options.tableau.fsal

    def _recorder(self, **keep: Any) -> Recorder:
        tableau, problem = self.options.tableau, self.problem
        return Recorder(tableau, problem.t, problem.per_sample, len(problem.state_leaves), carried=self._carried, **keep)

    def _captured_anywhere(self) -> list[Tensor]:
        """What func depends on at any of the evaluations of a solve that keeps all their graphs."""
        recorder = self._recorder(graphs=True)
        with no_sharded_calls():
            integrate(self.problem, self.options, recorder=recorder, grid=self.grid)
        return find_captured(self.field, direct_gradient.evaluations(recorder.tape), [], None, False)

    def _captured_at_end(self, trajectory: Trajectory) -> list[Tensor]:
        """What func depends on at the start or at the end: it may branch on the time."""
        problem = self.problem
        times = torch.full((1, problem.rows), problem.t[-1], dtype=problem.real, device=problem.device)
        recorder = self._recorder(graphs=True)
        y = [leaf.detach().clone() for leaf in trajectory.last[: len(problem.state_leaves)]]
        with no_sharded_calls():
            end = recorder.evaluate(self.field, problem.time_views(times)[0], y)
        return find_captured(self.field, [self.first, end], self.known, self.since, False)

    def _some_calls(self, start: Evaluation, trajectory: Trajectory | None, gradient: str) -> list[Evaluation]:
        """What func gave at the start and late in the solve: there, for where t or y is zero it may not show what it reads.
        trajectory: None where the solve failed."""
        start = Evaluation(start.t.detach(), start.y, start.k)
        if trajectory is None or (trajectory.call is None and gradient == "checkpoint"):
            return [start]
        if trajectory.call is not None:
            return [start, trajectory.call.copy()]
        problem = self.problem
        t1 = problem.time_beside(len(problem.t) - 1, self.options.on_side(problem, len(problem.t) - 1))
        y = [leaf.detach().clone() for leaf in trajectory.last[: len(problem.state_leaves)]]
        with torch.no_grad(), no_sharded_calls():
            return [start, Evaluation(t1, y, self.field(t1, y))]

    def _stats(self, trajectory: Trajectory) -> Stats:
        state = trajectory.state
        if state is not None:
            counts = state[FIELDS["num_accepted"]], state[FIELDS["num_rejected"]]
        else:
            rows = self.problem.rows
            steps = len(self.grid[0]) - 1 if self.grid is not None and self.problem.leaves[0].numel() else 0
            counts = torch.full((rows,), steps, device="cpu"), torch.zeros(rows, dtype=torch.int64, device="cpu")
        return Stats(self.field.nfe, *counts, self.problem.per_sample)

    def _failed(self, trajectory: Trajectory, ys: list[Tensor], stats: Stats, on_failure: str) -> bool:
        """Whether the solve failed. That is raised, or outputs that were not reached become NaN."""
        state = trajectory.host_state()
        if state is None:
            return False
        status = state[FIELDS["status"]]
        if status[0] == SUCCESS if len(status) == 1 else (status == SUCCESS).all():
            return False
        last = self._solution(ys, trajectory, None, stats)
        reached = torch.from_numpy(state[FIELDS["output_end"]]).to(ys[0].device)
        missing = torch.arange(len(self.problem.t), device=ys[0].device)[:, None] >= reached  # [T, rows]
        self.problem.missing = missing
        for out in ys:
            columns = [missing.shape[1], *[1] * (out.dim() - 2)] if out.dim() > 1 else []
            out.masked_fill_(missing.reshape(-1, *columns), math.nan)
        if on_failure == "raise":
            raise_failure(state, last, self.options.control.max_num_steps)
        return True

    def _solution(self, ys: list[Tensor], trajectory: Trajectory, recorder: Recorder | None, stats: Stats) -> Solution:
        interpolant = None
        t = self.t.detach()
        if t.dtype != torch.float64 or t.device != self.problem.device:
            t = to_device(torch.tensor(self.problem.t, dtype=torch.float64, device="cpu"), self.problem.device)
        if self.dense and recorder is not None:
            interpolant = Interpolant(
                self.options.tableau,
                recorder.dense_steps,
                [x.clone() for x in self.problem.state_leaves],
                t,
                self.structure.unflatten,
            )
        return Solution(
            ys=self.structure.unflatten(ys),
            t=t,
            stats=stats,
            y_last=self.structure.unflatten([leaf.detach() for leaf in trajectory.last[: len(ys)]]),
            interpolant=interpolant,
            per_sample=self.problem.per_sample,
            _state=trajectory.state,
        )
