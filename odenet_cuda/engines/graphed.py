"""On CUDA, the solve and its way back by captured graphs, where gradient is "direct" or "checkpoint".

Solves whose gradient needs nothing of their steps are captured by the step loops themselves, see `integrate`.
"""

from functools import partial
from typing import Any

from torch import Tensor

from ..formulas import SHORT
from ..gradients.autocast import autocast_state
from ..graphed import way_back
from ..graphed.capture import no_cast_is_kept
from ..graphed.steps import GraphedSteps
from ..held import Captured
from ..integrate import MOST_CAPTURED, adaptive_kind
from ..outcome import failed, solution_of, stats_of
from ..probe import probe_of
from ..request import Request
from ..solution import Solution
from ..solvers.checkpoints import Checkpoints
from ..solvers.families import family_of
from ..solvers.fixed import calls_on_grid
from ..solvers.hooks import runs_ahead
from ..solvers.trajectory import Recorder

NAME = "graphed"


def refusal(request: Request) -> str:
    """What stands against graphs is warned of too, for the user asked for them."""
    gradient = request.settings.gradient
    if not request.options.cuda_graph:
        return "cuda_graph is off"
    if not runs_ahead(request.problem.device):
        return "the state is not on CUDA"
    if request.events is not None:
        return "no graph holds events"
    if request.settings.every or request.options.progress:
        return "no graph holds every or progress"
    if request.resume is not None or request.valid is not None:
        return "no graph holds resume or valid"
    if gradient not in ("direct", "checkpoint") or not request.records:
        return "the gradient needs nothing of the steps: their loops have graphs of their own"
    return ""


def solve(request: Request) -> Solution | str:
    with no_cast_is_kept():
        probe = probe_of(request)
        inputs: list[Tensor] = [*request.structure.leaves, request.t, *probe.captured]
        if not any([x.requires_grad for x in inputs]):
            return "nothing requires a gradient: the loops have graphs of their own"
        found = _solve(request)
    if found is None:
        return "it is met for the first time, or cannot be captured"
    trajectory, lease = found
    stats, outputs = stats_of(request, trajectory), trajectory.ys
    failed(request, request.problem, trajectory, outputs, stats)
    kept = Captured(probe_of(request).captured, request.func)
    outputs = way_back.attach(lease, request.problem, outputs, request.structure.leaves, request.t, kept, stats)
    return solution_of(request, request.problem, outputs, trajectory, None, stats)


def _reason(request: Request, calls: int) -> str:
    """Why no graph can hold this solve and its way back, or "". calls: of func, on a grid."""
    problem, settings, options, grid = request.problem, request.settings, request.options, request.grid
    probe, alone = probe_of(request), family_of(options.tableau).no_graph
    refusals = {
        "dense=True": settings.dense,
        "regularizers": bool(settings.regularizers),
        "integrals": request.integrals is not None,
        "callbacks of func": bool(request.callbacks),
        "a gradient for t": request.t.requires_grad,
        "times of each sample": problem.own,
        "adjoint_params": request.params is not None,
        "func is no module that depends on its parameters alone": not probe.closed,
        f"the grid takes {calls} calls of func, a graph at most {MOST_CAPTURED}": calls > MOST_CAPTURED,
        "max_checkpoints": grid is None and settings.max_checkpoints is not None,
        "jump_t": bool(options.jump_t),
        "a norm of the user, or tolerances that are tensors": grid is None and not problem.fused_error,
        f"{options.method} begins a step with the last slope of the step before": grid is None and not options.tableau.fsal,
        f"{options.method} {alone}": bool(alone),
        "parameters of 16 bits": grid is None and any([x.dtype in SHORT for x in probe.captured]),
    }
    return next((name for name, refused in refusals.items() if refused), "")


def _solve(request: Request) -> Any:
    """(trajectory, lease of the graphs); None where it is to be done without."""
    problem, options, grid, captured = request.problem, request.options, request.grid, probe_of(request).captured
    calls = 0 if grid is None else calls_on_grid(options.tableau, grid[0], problem.t, problem.direction, options.perturb)
    # What is kept with the graphs holds nothing of this solve but numbers.
    carried = options.adaptive and not options.tableau.fsal
    leaves = len(problem.state_leaves)
    record = partial(Recorder, options.tableau, per_sample=problem.per_sample, leaves=leaves, carried=carried)
    cast = autocast_state(problem.device)
    gradient, limit = request.settings.gradient, request.settings.max_checkpoints
    if grid is None:
        kind: Any = "steps", adaptive_kind(problem, options).key
        make: Any = lambda: GraphedSteps(problem, options, captured, record, cast)  # noqa: E731
    else:
        if gradient == "direct":
            cast["enabled"] = False  # products are made as func was called
        kind = gradient, limit, options, tuple(grid[0]), tuple(problem.t)
        kept = partial(Checkpoints, limit, len(grid[0]) - 1) if gradient == "checkpoint" else None
        make = lambda: way_back.GraphedSolve(problem, options, grid, captured, record, kept, cast)  # noqa: E731
    draws = gradient == "direct" and grid is not None
    return way_back.solve(problem, options, kind, make, captured, _reason(request, calls), draws)
