"""Gradients of solves by captured graphs: that of a solve on a fixed grid and of its way back, or those of adaptive steps
(`steps.py`).

They are made when a solve is met for the second time, on memory of their own. Whoever has a solve's outputs has its graphs for
himself until the outputs' graph of autograd is gone, for the way back reads what the solve left behind.
"""

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..captured import Known, are_closed
from ..gradients import checkpoint, direct
from ..gradients.autocast import autocast_again, autocast_state
from ..gradients.failed import known_cotangents, with_nan
from ..gradients.one_by_one import one_by_one
from ..gradients.release import kept, let_go
from ..gradients.replay import save_inputs, saved_inputs, second_gradients
from ..held import Captured
from ..integrate import Grid, Options
from ..problem import Problem, aliased, counter_of
from ..products import Targets
from ..ranges import in_range
from ..solution import Stats
from ..solvers.checkpoints import Checkpoints
from ..solvers.fixed import FixedSolver, calls_on_grid
from ..solvers.trajectory import Evaluation, Recorder, Trajectory
from .capture import MET, NEVER, Busy, Fence, being_captured, graphs, warming_up
from .capture import captured as replay_of
from .loops import first_call, key_of
from .steps import GraphedSteps

# Gradients for y0 and the captured tensors, and how often func was called.
Found = tuple[list[Tensor], list[Tensor | None], int]


class GraphedSolve:
    """The graphs of a solve on a grid. captured: the tensors of func that get gradients. record(t): a recorder of the solve;
    kept(): the states that it keeps, None: the graphs of func. cast: of autocast, on the way back.

    Each has memory of its own: the way back reads what the solve left behind, and lets it go while it is captured.
    """

    def __init__(
        self,
        problem: Problem,
        options: Options,
        grid: Grid,
        captured: Sequence[Tensor],
        record: Callable[..., Recorder],
        kept: Callable[[], Checkpoints] | None,
        cast: dict[str, Any],
    ):
        func: Any = problem.field
        field, self.captured = aliased(func, captured) or (func, list(captured))
        self.own = replace(problem, field=field, leaves=[leaf.clone() for leaf in problem.leaves])
        self.record, self.kept, self.cast = record, kept, cast
        self.solver = FixedSolver(self.own, options.tableau, *grid, perturb=options.perturb, graph="step")
        self.calls = calls_on_grid(options.tableau, grid[0], problem.t, problem.direction, options.perturb)
        self.grads = [torch.zeros_like(y) for y in self.solver.ys]
        draws = torch.random.fork_rng([problem.device] if problem.device.type == "cuda" else [])
        self._replays: list[Any] = [None]
        with draws, warming_up(problem.device):
            self._solve()  # what is done once is done here
            if kept is None and not are_closed(direct.evaluations(self.recorder.tape), Known(self.captured), None):
                return
            self._walk()
        self._replays = [replay_of(self._solve, problem.device)]
        self._replays += [replay_of(self._walk, problem.device)] if self._replays[0] is not None else []

    @property
    def usable(self) -> bool:
        return None not in self._replays

    def _solve(self) -> None:
        keep: dict[str, Any] = {"graphs": True} if self.kept is None else {"checkpoints": self.kept()}
        self.recorder = self.solver.recorder = self.record(t=self.own.t, **keep)
        self.solver.solve_again()

    def _walk(self) -> None:
        with autocast_again(self.cast):
            if self.kept is None:
                y0, _, found = direct.way_back(self.recorder, self.own, Targets(self.captured), self.grads, False)
                calls = 0
            else:
                (y0, _, found), calls = checkpoint.way_back(self.recorder, self.own, self.captured, self.grads, False, False)
        self.found = y0, found, calls

    def solve(self, problem: Problem, options: Options, start: Evaluation) -> Trajectory:
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
    """Gives the graphs back when it goes. fence: behind their last use. read: tensors that they read where they lie and that
    get no gradient, with their versions."""

    def __init__(self, key: Hashable, graphed: Graphed, fence: Fence, read: Sequence[tuple[Tensor, int]]):
        self.key, self.graphed, self.fence, self._give = key, graphed, fence, graphs.give_from_anywhere
        self.read = read

    def check(self) -> None:
        """Raises RuntimeError where one was written into since."""
        for x, version in self.read:
            if x._version != version:
                raise RuntimeError(
                    f"a tensor of func, {x.dtype} {list(x.shape)}, has been modified by an inplace operation since the solve, "
                    "and its gradient by a captured graph reads it"
                )

    def __del__(self) -> None:
        self._give(self.key, self.graphed, self.fence)


def solve(
    problem: Problem,
    options: Options,
    kind: Hashable,
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
    read = [(x, x._version) for x in counter.tensors if not x.requires_grad and not x.is_inference()]
    with torch.no_grad():
        calls, start = first_call(problem, options.perturb)
        counter.nfe = called
        refusal = refusal or calls.refusal or ("func draws random numbers" if calls.random and not draws else "")
        refusal = refusal or ("a graph is being captured" if being_captured(problem.device) else "")
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        refusal = refusal or ("hooks for saved tensors are active" if hooks else "")
        if refusal:
            warnings.warn(f"cuda_graph: {refusal}; the solve goes on without a graph", stacklevel=2)
            return None
        key = ("gradient", *key_of(problem, kind, calls), tuple([x.data_ptr() for x in captured]))
        graphed, mark = graphs.take(key), graphs.mark(key)
        if graphed is None and mark != MET:
            graphs.set_mark(key, mark or MET)
            return None
        try:
            graphed = graphed or make()
            found = graphed.solve(problem, options, start) if graphed.usable else None
        except Busy:
            found = None
        if found is None or not graphed.usable:
            if graphed is not None and not graphed.usable:
                graphs.set_mark(key, NEVER)
            counter.nfe = called
            return None
        ys, last = ([leaf.detach().clone() for leaf in leaves] for leaves in (found.ys, found.last))
        state = None if found.state is None else found.state.clone()
    read = [(x, version) for x, version in read if x._version == version]  # the others func writes itself: counts, say
    return Trajectory(ys, last, state, seen=found.seen), Lease(key, graphed, Fence(problem.device), read)


def attach(
    lease: Lease,
    problem: Problem,
    ys: Sequence[Tensor],
    y0: Sequence[Tensor],
    t: Tensor,
    captured: Captured,
    stats: Stats,
) -> list[Tensor]:
    """ys, with a gradient for y0 and the captured tensors."""
    return list(_Graphed.apply((lease, captured), problem, tuple(ys), stats, len(y0), t, *y0, *captured.tensors))


class _Graphed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, how, problem, ys, stats, count, t, *tensors):
        (ctx.lease, ctx.captured), ctx.problem, ctx.stats, ctx.count = how, problem, stats, count
        ctx.autocast = autocast_state(problem.device)
        ctx.set_materialize_grads(False)
        save_inputs(ctx, t, tensors[:count])
        return ys

    @staticmethod
    @one_by_one
    @in_range("backward")
    def backward(ctx, *grad_ys):
        _ = ctx.saved_tensors  # says so where one was changed since
        lease = kept(ctx, "lease")
        grad_ys, spoilt = known_cotangents(ctx.problem, grad_ys)
        graphed, count = lease.graphed, ctx.count
        ctx.captured.check(), lease.check()
        if torch.is_grad_enabled():
            problem, captured = ctx.problem, ctx.captured.tensors
            with autocast_again(ctx.autocast), ctx.captured.again():
                inputs = saved_inputs(ctx, problem, graphed.recorder)
                again = second_gradients(graphed.recorder, problem, problem.field, inputs, captured, grad_ys)
            return None, None, None, None, None, None, *again[:count], *again[count + 1 :]
        let_go(ctx, "lease")
        with torch.no_grad():
            y0, captured, ctx.stats.nfe_backward = graphed.walk(grad_ys)
            y0, _, captured = with_nan(spoilt, ctx.problem, y0, None, captured)
            grads = [None if x is None else x.clone() for x in (*y0, *captured)]
            lease.fence = Fence(ctx.problem.device)
            return None, None, None, None, None, None, *grads
