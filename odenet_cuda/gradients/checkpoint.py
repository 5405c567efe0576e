"""The exact gradient of the discrete solve from the states at the start of its steps: each step is made again on the way back.

The solve keeps no graphs, so forwards it is as fast as without a gradient; backwards func is called once more for every slope.
Where fewer states are kept than there are steps, those between are made again first (`solvers.checkpoints`). The steps are
undone by the walk of the direct gradient; both give the same numbers up to rounding.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import noise
from ..captured import Watch
from ..formulas import of_rows
from ..held import Captured
from ..problem import Problem
from ..products import Targets
from ..ranges import in_range
from ..solution import Stats
from ..solvers.checkpoints import best_subset, binomial_split
from ..solvers.trajectory import Evaluation, Recorder, Step
from ..solvers.whole import WholeStep, mapped
from ..stepper import Stepper
from ..tableau import StepFunction
from .autocast import autocast_again, autocast_state
from .backward_walk import BackwardWalk
from .failed import known_cotangents, with_nan
from .one_by_one import one_by_one
from .release import kept, let_go
from .replay import SECOND, save_inputs, saved_inputs, second_gradients
from .same_func import refuse_another

_FEW = 32  # states, of which the best may be looked for; with more the gaps between are short, and the search is not
State = tuple[list[Tensor], "list[Tensor] | None"]  # at the start of a step, and its first slope where that is carried


def attach(
    recorder: Recorder,
    problem: Problem,
    ys: Sequence[Tensor],
    y0: Sequence[Tensor],
    t: Tensor,
    captured: Captured,
    stats: Stats,
    chosen: bool,
) -> list[Tensor]:
    """ys, with a gradient for y0, t and the captured tensors. chosen: as in `Watch`."""
    how = autocast_state(problem.device), chosen, captured
    return list(_Checkpoint.apply(recorder, problem, tuple(ys), stats, how, len(y0), t, *y0, *captured.tensors))


class _Checkpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, recorder, problem, ys, stats, how, count, t, *tensors):
        ctx.recorder, ctx.problem, ctx.stats, ctx.count, ctx.t_device = recorder, problem, stats, count, t.device
        ctx.autocast, ctx.chosen, ctx.captured = how
        ctx.set_materialize_grads(False)
        save_inputs(ctx, t, tensors[:count])
        return ys

    @staticmethod
    @one_by_one
    @in_range("backward")
    def backward(ctx, *grad_ys):
        problem, count, t_grad = ctx.problem, ctx.count, ctx.needs_input_grad[6]
        _ = ctx.saved_tensors  # says so where one was changed since
        recorder, stats, captured = kept(ctx, "recorder"), ctx.stats, ctx.captured
        captured.check()
        grad_ys, spoilt = known_cotangents(problem, grad_ys)
        if torch.is_grad_enabled():
            with autocast_again(ctx.autocast), captured.again():
                refuse_another(problem.field.again(), problem, problem.calls, "checkpoint", SECOND)
                inputs = saved_inputs(ctx, problem, recorder)
                found = second_gradients(recorder, problem, problem.field, inputs, captured.tensors, grad_ys)
            grad_y0, grad_t, others = with_nan(spoilt, problem, found[:count], found[count], found[count + 1 :])
            return None, None, None, None, None, None, grad_t, *grad_y0, *others
        let_go(ctx, "recorder", "captured", "problem")
        with autocast_again(ctx.autocast), captured.again():
            grads, stats.nfe_backward = way_back(recorder, problem, captured.tensors, grad_ys, t_grad, ctx.chosen)
        grad_y0, grad_t, grad_captured = with_nan(spoilt, problem, *grads)
        return None, None, None, None, None, None, grad_t.to(ctx.t_device), *grad_y0, *grad_captured


def way_back(
    recorder: Any,
    problem: Problem,
    captured: Sequence[Tensor],
    grad_ys: Sequence[Tensor | None],
    t_grad: bool,
    chosen: bool,
) -> tuple[tuple[list[Tensor], Any, list[Tensor | None]], int]:
    """The gradients for y0, t and the captured tensors, and how often func was called. chosen: as in `Watch`."""
    walk = BackwardWalk(problem, recorder, Targets(captured), grad_ys, t_grad, keep_graphs=False)
    again = Recomputation(problem, recorder, captured, chosen, t_grad)
    with again.generators():
        undo_all(again, walk, recorder.checkpoints.limit)
    again.refuse_others()
    return walk.result(), again.field.nfe


class Recomputation:
    """Makes the steps of a tape again. chosen: as in `Watch`."""

    def __init__(self, problem: Problem, recorder: Recorder, captured: Sequence[Tensor], chosen: bool, t_grad: bool):
        forward: Any = problem.field
        self.problem, self.tableau, self.carried = problem, recorder.tableau, recorder.carried
        self.field, self.n = forward.again(), len(problem.state_leaves)
        self.watch = Watch(captured, chosen)
        self.step_costs = recorder.step_costs
        self.stepper = Stepper(problem, self.tableau, self.tableau.rows)
        self.stepper.new_stages()
        self.start = self.stepper.y0  # where the state at the start of a step is put: nothing is bound anew for a step
        shape = [problem.rows, *[1] * (problem.leaves[0].dim() - 1)] if problem.per_sample else []
        self.as_seen: list[int] = shape  # a time as func sees it
        self.recorder = Recorder(self.tableau, problem.t, problem.per_sample, self.n, graphs=True, t_grad=t_grad)
        self.expected = recorder.last  # the state that the next step to be recorded came to; another is refused
        self._rounding = noise.rounding(problem.leaves)
        self._others: list[Tensor] = []  # on CUDA, whether steps ended elsewhere
        self.steps: list[Step] = []
        self.restarts: list[list[Evaluation]] = []  # before each step, first slopes that are not carried
        waiting: list[Evaluation] = []
        for entry in recorder.tape:
            if isinstance(entry, Step):
                self.steps.append(entry)
                self.restarts.append(waiting)
                waiting = []
            else:
                waiting.append(entry)

    def advance(self, begin: int, end: int, state: State) -> State:
        """The state before step `end` from that before step `begin`."""
        stepper, kernels, field = self.stepper, self.stepper.kernels, self.field
        y, k = state
        with torch.no_grad():
            for step, restarts in zip(self.steps[begin:end], self.restarts[begin:end], strict=True):
                y = self._put(y)
                self._draw(step.noise, 0)
                if not self.carried:
                    k = field(step.first.reshape(self.as_seen), y[: self.n])
                for restart in restarts if self.carried else ():
                    self._draw((restart.noise,), 0)
                    k = self._replaced(k, field(restart.t, y[: self.n]), restart.mask)
                if isinstance(self.tableau, StepFunction):
                    method, given = step.method or self.tableau, self._whole(step, y, k)
                    found = mapped(method, self.problem, self.field, step.times, given)[0]
                    y = [self._rows(step, new, old) for new, old in zip(found, y, strict=False)]
                    k = [self._rows(step, new, old) for new, old in zip(found[-self.n :], k or (), strict=True)]
                    continue
                views = self._begin(step, k)
                self._draw(step.noise, 1)
                addresses: list[int] = []
                for i in range(1, len(self.tableau.rows) + 1):
                    kernels.stage(i, addresses)
                    addresses = []
                    if i < (self.tableau.stages if self.carried else len(self.tableau.rows)):
                        addresses = stepper.set_slopes(i, field(views[i], stepper.y[i]), True)
                y = [*(self._rows(step, new, old) for new, old in zip(stepper.y[-1], y, strict=False)), *y[self.n :]]
                if self.carried and k is not None:
                    k = [self._rows(step, new, old) for new, old in zip(stepper.k[-1], k, strict=True)]
        return y, k

    def record(self, index: int, state: State) -> list[Step | Evaluation]:
        """The entries of the tape that end with step `index`, with their graphs."""
        step, (y, k), stepper, kernels = self.steps[index], state, self.stepper, self.stepper.kernels
        y = self._put(y)
        entries: list[Step | Evaluation] = []
        if not self.carried:
            self._draw(step.noise, 0)
            first = self._evaluate(step.first.reshape(self.as_seen), y[: self.n])
            first.end = step.ends[0]
            entries.append(first)
            k = first.k
        for restart in self.restarts[index] if self.carried else ():
            self._draw((restart.noise,), 0)
            evaluation = self._evaluate(restart.t.detach(), y[: self.n])
            evaluation.mask, evaluation.end = restart.mask, restart.end
            entries.append(evaluation)
            k = self._replaced(k, evaluation.k, restart.mask)
        if isinstance(self.tableau, StepFunction):
            return [*entries, self._record_whole(step, y, k)]
        views, points = self._begin(step, k), len(self.tableau.rows)
        self._draw(step.noise, 1)
        evaluations: list[Evaluation | None] = []
        addresses: list[int] = []
        for i in range(1, points + 1):
            if i == self.tableau.stages or (i == points and not _inside(step) and self.step_costs is None):
                if self.expected is not None:
                    kernels.stage(i, addresses)
                stepper.k[i:] = [[] for _ in stepper.k[i:]]
                evaluations.append(None)
                break
            kernels.stage(i, addresses)
            evaluation = self._evaluate(views[i], stepper.y[i])
            evaluations.append(evaluation)
            addresses = stepper.set_slopes(i, evaluation.k, True)
        if self.expected is not None:
            self._compare(step, y, self.expected)
        done = Step(step.times, step.first, self.dt, step.accept, step.outputs, step.ends, y, list(stepper.k), evaluations)
        return [*entries, done]

    def _whole(self, step: Step, y: list[Tensor], k: Any) -> list[Tensor]:
        """What a step that is one function begins with, see `WholeStep`."""
        self._begin(step, k)
        return [leaf.detach().clone() for leaf in (*y, *k, self.dt)]

    def _record_whole(self, step: Step, y: list[Tensor], k: Any) -> Step:
        problem, n, begin = self.problem, self.n, self._whole(step, y, k)
        method: Any = step.method or self.tableau

        def call(t: Tensor, y: Sequence[Tensor]) -> list[Tensor]:
            return self.watch.evaluate(lambda t, y: mapped(method, problem, self.field, t, y)[0], t, y)

        found = self.recorder.evaluate(call, step.times.detach().clone(), begin)
        whole = WholeStep(found.t, found.y, found.k, method=method, problem=problem)
        slopes = [begin[n : 2 * n], *[found.k[i : i + n] for i in range(n, len(found.k), n)]]
        if self.expected is not None:
            self.stepper.y[-1] = [leaf.detach() for leaf in found.k[:n]]
            self._compare(step, y, self.expected)
        return Step(step.times, step.first, self.dt, step.accept, step.outputs, step.ends, y, slopes, [whole])

    def _compare(self, step: Step, y0: list[Tensor], expected: list[Tensor]) -> None:
        """Whether the step made again ended where it did."""
        with torch.no_grad():
            ends = self.stepper.y[-1]
            if step.accept is not None:
                ends = [torch.where(of_rows(step.accept, end), end, y) for end, y in zip(ends, y0, strict=False)]
            on_host = self.problem.device.type == "cpu"
            for y, end, other, rounding in zip(y0, ends, expected, self._rounding, strict=False):
                if not (on_host and torch.equal(end, other)):
                    self._others.append(noise.beyond_rounding(y, end, other, rounding))
            if on_host:
                self.refuse_others()

    def refuse_others(self) -> None:
        """Raises RuntimeError where a step made again ended elsewhere."""
        if self._others and bool(torch.stack(self._others).any()):
            raise RuntimeError(noise.OTHER_STEP)
        self._others.clear()

    def generators(self) -> Any:
        """Random generators stand afterwards where they stood before, if func draws numbers."""
        device = self.problem.device
        noisy = any(step.noise is not None for step in self.steps)
        return torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=noisy)

    def _draw(self, saved: Any, which: int) -> None:
        """From here on func draws what it drew then."""
        if saved is not None and saved[which] is not None:
            noise.restore(saved[which], self.problem.device)

    def _put(self, y: list[Tensor]) -> list[Tensor]:
        """The solver's own start of the step, with this state in it. Whatever was made from the last one is used up."""
        with torch.no_grad():
            for own, leaf in zip(self.start, y, strict=True):
                own.copy_(leaf)
        return self.start

    def _begin(self, step: Step, k: Any) -> list[Tensor]:
        """Binds the size and first slope of a step; gives the times of its stages as func sees them."""
        stepper, kernels = self.stepper, self.stepper.kernels
        self.dt = _rows_of(step.dt, self.problem)
        if step.accept is not None:  # the others stay where they are: what they tried may have been no number
            self.dt = torch.where(step.accept, self.dt, 0.0)
        kernels.bind_dt(self.dt.data_ptr())
        kernels.bind_slopes(0, stepper.set_slopes(0, k, True))
        return self.problem.time_views(step.times)

    def _evaluate(self, t: Tensor, y: list[Tensor]) -> Evaluation:
        return self.recorder.evaluate(lambda t, y: self.watch.evaluate(self.field, t, y), t, y)

    def _replaced(self, old: Any, new: list[Tensor], mask: Tensor | None) -> list[Tensor]:
        if mask is None:
            return new
        return [torch.where(of_rows(mask, b), b.detach(), a) for a, b in zip(old, new, strict=True)]

    def _rows(self, step: Step, new: Tensor, old: Tensor) -> Tensor:
        """A copy of new where the step was accepted, else old."""
        return new.clone() if step.accept is None else torch.where(of_rows(step.accept, new), new, old)


def _inside(step: Step) -> bool:
    """Whether an output lies inside the step: then the slope at its end counts."""
    return not all([step.ends_on(index) for index, _, _ in step.outputs])


def _rows_of(dt: float | Tensor, problem: Problem) -> Tensor:
    """float64 [rows]"""
    return dt if isinstance(dt, Tensor) else torch.full((1,), dt, dtype=torch.float64, device=problem.device)


def undo_all(again: Recomputation, walk: BackwardWalk, limit: int | None) -> None:
    """Undoes all steps, last first, with at most `limit` states at a time."""
    steps, end = again.steps, len(again.steps)
    held: list[tuple[int, State]] = []
    for index, step in enumerate(steps):
        if step.y0 is not None:
            held.append((index, (step.y0, step.k[0] if step.k else None)))
    if limit is not None and limit <= _FEW and len(held) < end:
        kept = best_subset([index for index, _ in held], end, limit)
        for index, _ in held:
            if index not in kept:
                steps[index].y0, steps[index].k = None, []
        held = [(index, state) for index, state in held if index in kept]
    while held:
        begin, state = held[-1]
        if end - begin == 1:
            held.pop()
            if limit is not None and begin > 0:  # room for others; a second pass makes it again
                steps[begin].y0, steps[begin].k = None, []
        elif limit is not None and len(held) < limit:
            middle = begin + binomial_split(end - begin, limit - len(held) + 1)
            held.append((middle, again.advance(begin, middle, state)))
            continue
        else:
            state = again.advance(begin, end - 1, state)
        end -= 1
        entries = again.record(end, state)
        walk.keep_graphs = again.watch.keeps_graphs
        for entry in reversed(entries):
            walk.undo(entry)
        if again.expected is not None:
            again.expected = state[0]
