"""What func depends on: found by the call with which a solve that records begins, and by calls in and after it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import noise
from .captured import Known, Walk, find_captured, outside, sequence_number
from .gradients.direct import evaluations
from .integrate import integrate
from .problem import own_tensors
from .request import Request
from .sharding import no_sharded_calls, refuse_sharded
from .solvers.trajectory import Evaluation, Recorder, Trajectory
from .tableau import StepFunction


def new_recorder(request: Request, **keep: Any) -> Recorder:
    """keep: see `Recorder`."""
    tableau, problem = request.options.tableau, request.problem
    carried = isinstance(tableau, StepFunction) or (request.options.adaptive and not tableau.fsal)
    return Recorder(tableau, problem.t, problem.per_sample, len(problem.state_leaves), carried=carried, **keep)


def probe_of(request: Request) -> "Probe":
    """That of the request: func is called once, whoever asks."""
    found: Probe | None = request.prepared.get("probe")
    if found is None:
        found = request.prepared["probe"] = Probe(request)
    return found


class Probe:
    """f(t0, y0) with its graph, and the tensors outside of func that get gradients.

    start: that call, with graphs where gradient="direct" goes on from them. captured: those tensors, as far as the start
    shows them. closed: whether func can have no others. noisy: where random generators stood before the call, if func draws
    numbers and the way back must draw them again. The request keeps it, so it does not keep the request. Raises
    NotImplementedError where func has sharded parameters.
    """

    def __init__(self, request: Request):
        problem, params = request.problem, request.params
        refuse_sharded(request.func)
        self.known: list[Tensor] = []  # the captured tensors that are sure to be outside of func
        self.noisy: noise.States = ()
        t_grad = request.t.requires_grad
        t0 = problem.time_beside(0, request.options.on_side(problem, 0))
        recorder = new_recorder(request, graphs=params is None, t_grad=t_grad)
        y_grad = t_grad or any([leaf.requires_grad for leaf in request.structure.leaves])
        generators = noise.states(problem.device) if request.settings.gradient == "checkpoint" else ()
        self.since: int | None = sequence_number()  # None where numbers of autograd tell nothing about func
        with no_sharded_calls():
            first = recorder.evaluate(problem.field, t0, [leaf.detach().clone() for leaf in problem.state_leaves], y_grad)
        if noise.differ(generators, noise.states(problem.device) if generators else ()):
            self.noisy = generators
        self.first, self.start = first, first
        if request.settings.gradient != "direct" or params is not None:
            self.start = Evaluation(first.t, first.y, [slope.detach() for slope in first.k])
        if params is not None:
            self.captured, self.closed = [param for param in params if param.requires_grad], True
            return
        self._look(request, range(self.since, sequence_number()))

    def _look(self, request: Request, window: range) -> None:
        """window: the numbers of autograd that nodes made in the first call have."""
        first, field = self.first, request.problem.field
        own, is_module = own_tensors(request.func)
        known = Known([x for x in own if x.requires_grad])
        walk = Walk(first.k, [first.t, *first.y], known, window)
        found = list(walk.leaves.values())
        if walk.boundary:
            found = outside(field, first, known, self.since)
            known.add(found)
            if all([x.grad_fn is None for x in found]):  # made inside, by another thread
                self.since = None
        self.known, self.closed = list(known.tensors.values()), is_module and not found
        self.captured = [*self.known, *(x for x in found if id(x) not in known.tensors)]

    def anywhere(self, request: Request) -> list[Tensor]:
        """What func depends on at any of the evaluations of a solve that keeps all their graphs."""
        recorder = new_recorder(request, graphs=True)
        with no_sharded_calls():
            integrate(request.problem, request.options, recorder=recorder, grid=request.grid)
        return find_captured(request.problem.field, evaluations(recorder.tape), [], None, False)

    def at_end(self, request: Request, trajectory: Trajectory) -> list[Tensor]:
        """What func depends on at the start or at the end: it may branch on the time."""
        problem = request.problem
        recorder = new_recorder(request, graphs=True)
        y = [leaf.detach().clone() for leaf in trajectory.last[: len(problem.state_leaves)]]
        with no_sharded_calls():
            end = recorder.evaluate(problem.field, problem.time_beside(-1, 0.0), y)
        return find_captured(problem.field, [self.first, end], self.known, self.since, False)

    def in_all(self, request: Request, calls: Sequence[Evaluation], closed: bool) -> list[Tensor]:
        """What func depends on at these evaluations, which keep their graphs. closed: no others are known."""
        return find_captured(request.problem.field, calls, self.known, self.since, closed)

    def some_calls(self, request: Request, trajectory: Trajectory | None) -> list[Evaluation]:
        """What func gave at the start and late in the solve: there, for where t or y is zero it may not show what it reads.
        trajectory: None where the solve failed."""
        problem = request.problem
        start = Evaluation(self.start.t.detach(), self.start.y, self.start.k)
        last = None if trajectory is None else trajectory.call
        if trajectory is None or last is self.start or (last is None and request.settings.gradient == "checkpoint"):
            return [start]
        if last is not None:
            return [start, last.copy()]
        t1 = problem.time_beside(-1, request.options.on_side(problem, -1))
        y = [leaf.detach().clone() for leaf in trajectory.last[: len(problem.state_leaves)]]
        with torch.no_grad(), no_sharded_calls():
            return [start, Evaluation(t1, y, problem.field(t1, y))]
