"""Gradients of solves by captured graphs: that of a solve on a fixed grid and of its way back, or those of adaptive steps
(`graphed_steps.py`).

They are made when a solve is met for the second time, on memory of their own. Whoever has a solve's outputs has its graphs for
himself until the outputs' graph of autograd is gone, for the way back reads what the solve left behind.
"""

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..cuda_graph import Fence, being_captured, graphs, pool
from ..cuda_graph import captured as replay_of
from ..integrate import Grid, Options
from ..problem import Problem, counter_of
from ..ranges import in_range
from ..solution import Stats
from ..solvers.by_graph import first_call, key_of
from ..solvers.fixed import FixedSolver, calls_on_grid
from ..solvers.trajectory import Evaluation, Recorder, Trajectory
from .autocast import autocast_state
from .graphed_steps import GraphedSteps
from .replay import second_gradients

Found = tuple[
    list[Tensor], list[Tensor | None], int
]  # gradients for y0 and the captured tensors, and how often func was called
WayBack = Callable[[Recorder, list[Tensor]], Found]  # (what the solve left behind, the outputs' gradients)
_ONCE = object()  # a solve that was met once


class GraphedSolve:
    """The graphs of a solve on a grid. new_recorder: of what the way back needs."""

    def __init__(self, problem: Problem, options: Options, grid: Grid, new_recorder: Callable[[], Recorder], way_back: WayBack):
        own = replace(problem, leaves=[leaf.clone() for leaf in problem.leaves])
        self.new_recorder, self.way_back = new_recorder, way_back
        self.solver = FixedSolver(own, options.tableau, *grid, perturb=options.perturb, graph="step")
        self.calls = calls_on_grid(options.tableau, grid[0], problem.t, problem.direction, options.perturb)
        self.grads = [torch.zeros_like(y) for y in self.solver.ys]
        with torch.random.fork_rng([problem.device] if problem.device.type == "cuda" else []):
            self._solve()  # what is done once is done here
            self._walk()
        memory = pool(problem.device)
        self._replays = [replay_of(self._solve, problem.device, memory)]
        self._replays += [replay_of(self._walk, problem.device, memory)] if self._replays[0] is not None else []

    @property
    def usable(self) -> bool:
        return None not in self._replays

    def _solve(self) -> None:
        self.recorder = self.solver.recorder = self.new_recorder()
        self.solver.solve_again()

    def _walk(self) -> None:
        self.found = self.way_back(self.recorder, self.grads)

    def solve(self, problem: Problem, start: Evaluation) -> Trajectory:
        """start: is made again in the graph."""
        for own, leaf in zip(self.solver.initial, problem.leaves, strict=True):
            own.copy_(leaf)
        self._replay(0)
        counter_of(problem.field).nfe = self.calls
        return Trajectory(self.solver.ys, self.solver.stepper.y0, None)

    def _replay(self, which: int) -> None:
        replay = self._replays[which]
        assert replay is not None
        replay()

    def walk(self, grad_ys: Sequence[Tensor | None]) -> Found:
        for own, grad in zip(self.grads, grad_ys, strict=True):
            own.zero_() if grad is None else own.copy_(grad)
        self._replay(1)
        return self.found


Graphed = GraphedSolve | GraphedSteps


class Lease:
    """Gives the graphs back when it goes. fence: behind their last use."""

    def __init__(self, key: Hashable, graphed: Graphed, fence: Fence):
        self.key, self.graphed, self.fence, self._give = key, graphed, fence, graphs.give_from_anywhere

    def __del__(self) -> None:
        self._give(self.key, self.graphed, self.fence)


def solve(
    problem: Problem,
    kind: Hashable,
    perturb: bool,
    make: Callable[[], Graphed],
    captured: Sequence[Tensor],
    refusal: str,
    draws: bool,
) -> tuple[Trajectory, Lease] | None:
    """The solve, and the graphs that its way back needs (`attach`); or None where it is to be done without graphs: if it is met
    for the first time, or cannot be captured, which is said in words.

    kind: what its steps depend on besides the problem. captured: the tensors outside of func that get gradients. draws: func
    may draw random numbers.
    """
    counter = counter_of(problem.field)
    called = counter.nfe
    with torch.no_grad():
        calls, start = first_call(problem, perturb)
        counter.nfe = called
        refusal = refusal or calls.refusal or ("func draws random numbers" if calls.random and not draws else "")
        refusal = refusal or ("a graph is being captured" if being_captured(problem.device) else "")
        if refusal:
            warnings.warn(f"cuda_graph: {refusal}; the solve goes on without a graph", stacklevel=2)
            return None
        places = tuple([(x.data_ptr(), x.shape, x.stride(), x.dtype) for x in captured])
        key = ("gradient", *key_of(problem, kind, calls), places)
        graphed = graphs.take(key)
        if graphed is None:
            graphs.give(key, _ONCE, Fence(problem.device))
            return None
        found = None
        if graphed is _ONCE:
            graphed = make()
            found = graphed.solve(problem, start) if graphed.usable else None
            if not graphed.usable:
                counter.nfe = called
                return None
        found = found or graphed.solve(problem, start)
        ys, last = ([leaf.detach().clone() for leaf in leaves] for leaves in (found.ys, found.last))
        state = None if found.state is None else found.state.clone()
    return Trajectory(ys, last, state), Lease(key, graphed, Fence(problem.device))


def attach(
    lease: Lease,
    problem: Problem,
    ys: Sequence[Tensor],
    y0: Sequence[Tensor],
    t: Tensor,
    captured: Sequence[Tensor],
    stats: Stats,
) -> list[Tensor]:
    """ys, with a gradient for y0 and the captured tensors."""
    return list(_Graphed.apply(lease, problem, tuple(ys), stats, len(y0), t, *y0, *captured))


class _Graphed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, lease, problem, ys, stats, count, t, *tensors):
        ctx.lease, ctx.problem, ctx.stats, ctx.count = lease, problem, stats, count
        ctx.autocast = autocast_state(problem.device)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(t, *tensors)
        return ys

    @staticmethod
    @in_range("backward")
    def backward(ctx, *grad_ys):
        graphed, count = ctx.lease.graphed, ctx.count
        t, *tensors = ctx.saved_tensors  # says so where one was changed since
        if torch.is_grad_enabled():
            problem, y0, captured = ctx.problem, tensors[:count], tensors[count:]
            with torch.autocast(**ctx.autocast):
                again = second_gradients(graphed.recorder, problem, problem.field, y0, t, captured, grad_ys)
            return None, None, None, None, None, None, *again[:count], *again[count + 1 :]
        with torch.no_grad():
            y0, captured, ctx.stats.nfe_backward = graphed.walk(grad_ys)
            grads = [None if x is None else x.clone() for x in (*y0, *captured)]
            ctx.lease.fence = Fence(ctx.problem.device)
            return None, None, None, None, None, None, *grads
