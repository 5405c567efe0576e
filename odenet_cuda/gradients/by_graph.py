"""Gradients of solves on a fixed grid by two captured graphs: the solve, and its way back.

Both are made when a solve is met for the second time, on memory of their own. Whoever has a solve's outputs has its graphs for
himself until the outputs' graph of autograd is gone, for the way back reads what the solve left behind.
"""

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..cuda_graph import Fence, being_captured, graphs
from ..cuda_graph import captured as replay_of
from ..integrate import Grid, Options
from ..problem import Problem, counter_of
from ..ranges import in_range
from ..solvers.by_graph import first_call, key_of
from ..solvers.fixed import FixedSolver, calls_on_grid
from ..solvers.trajectory import Recorder, Trajectory
from .autocast import autocast_state
from .replay import second_gradients

Found = tuple[list[Tensor], list[Tensor | None]]  # gradients for y0 and for the captured tensors
WayBack = Callable[[Recorder, list[Tensor]], Found]  # (what the solve left behind, the outputs' gradients)
_ONCE = object()  # a solve that was met once


class GraphedSolve:
    """The graphs of one solve. new_recorder: of what the way back needs."""

    def __init__(self, problem: Problem, options: Options, grid: Grid, new_recorder: Callable[[], Recorder], way_back: WayBack):
        self.initial = [leaf.clone() for leaf in problem.leaves]
        self.problem = replace(problem, leaves=self.initial)
        self.new_recorder, self.way_back = new_recorder, way_back
        self.solver = FixedSolver(self.problem, options.tableau, *grid, perturb=options.perturb, graph="step")
        self.grads = [torch.zeros_like(y) for y in self.solver.ys]
        self.found: Found = [], []
        with torch.random.fork_rng([problem.device] if problem.device.type == "cuda" else []):
            self._solve()  # what is done once is done here
            self._walk()
        self.solve = replay_of(self._solve, problem.device)
        self.walk = replay_of(self._walk, problem.device) if self.solve is not None else None

    def _solve(self) -> None:
        self.recorder = self.solver.recorder = self.new_recorder()
        self.solver.solve_again()

    def _walk(self) -> None:
        self.found = self.way_back(self.recorder, self.grads)

    def start_at(self, leaves: Sequence[Tensor]) -> None:
        for own, leaf in zip(self.solver.initial, leaves, strict=True):
            own.copy_(leaf)


class Lease:
    """Gives the graphs back when it goes. fence: behind their last use."""

    def __init__(self, key: Hashable, graphed: GraphedSolve, fence: Fence):
        self.key, self.graphed, self.fence, self._give = key, graphed, fence, graphs.give_from_anywhere

    def __del__(self) -> None:
        self._give(self.key, self.graphed, self.fence)


def solve(
    problem: Problem,
    options: Options,
    grid: Grid,
    kind: Hashable,
    new_recorder: Callable[[], Recorder],
    way_back: WayBack,
    y0: Sequence[Tensor],
    t: Tensor,
    captured: Sequence[Tensor],
    refusal: str,
    draws: bool,
) -> Trajectory | None:
    """The solve with its gradient, or None where it is to be done without graphs: if it is met for the first time, or cannot be
    captured, which is said in words.

    kind: what its steps depend on besides the problem, the options and the grid. captured: the tensors outside of func that get
    gradients. draws: func may draw random numbers.
    """
    counter = counter_of(problem.field)
    called = counter.nfe
    with torch.no_grad():
        calls, _ = first_call(problem, options.perturb)
        counter.nfe = called
        refusal = refusal or calls.refusal or ("func draws random numbers" if calls.random and not draws else "")
        refusal = refusal or ("a graph is being captured" if being_captured(problem.device) else "")
        if refusal:
            warnings.warn(f"cuda_graph: {refusal}; the solve goes on without a graph", stacklevel=2)
            return None
        places = tuple([(x.data_ptr(), x.shape, x.stride(), x.dtype) for x in captured])
        key = ("gradient", kind, *key_of(problem, (options, tuple(grid[0]), tuple(problem.t)), calls), places)
        graphed = graphs.take(key)
        if graphed is None:
            graphs.give(key, _ONCE, Fence(problem.device))
            return None
        if graphed is _ONCE:
            graphed = GraphedSolve(problem, options, grid, new_recorder, way_back)
            if graphed.solve is None or graphed.walk is None:
                return None
        graphed.start_at(problem.leaves)
        graphed.solve()
        counter.nfe = calls_on_grid(options.tableau, grid[0], problem.t, problem.direction, options.perturb)
        ys, last = ([leaf.detach().clone() for leaf in leaves] for leaves in (graphed.solver.ys, graphed.solver.stepper.y0))
    lease = Lease(key, graphed, Fence(problem.device))
    return Trajectory(list(_Graphed.apply(lease, problem, tuple(ys), len(y0), t, *y0, *captured)), last, None)


class _Graphed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, lease, problem, ys, count, t, *tensors):
        ctx.lease, ctx.problem, ctx.count = lease, problem, count
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
            return None, None, None, None, None, *again[:count], *again[count + 1 :]
        with torch.no_grad():
            for own, grad in zip(graphed.grads, grad_ys, strict=True):
                own.zero_() if grad is None else own.copy_(grad)
            graphed.walk()
            y0, captured = graphed.found
            grads = [None if x is None else x.clone() for x in (*y0, *captured)]
            ctx.lease.fence = Fence(ctx.problem.device)
            return None, None, None, None, None, *grads
