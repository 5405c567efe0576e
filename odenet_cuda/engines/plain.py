"""A small grid in torch's own operations.

On a CPU they cost less than kernels whose buffers and tables are first to be made, as long as state and grid are small; with
gradient="direct" autograd then records no more than func and a few sums. What the kernels and their tape do better is left to
them.
"""

from typing import Any

import torch

from .. import plain
from ..gradients.accumulator import SHORT
from ..outcome import solution_of, stats_of
from ..problem import own_tensors
from ..request import Request
from ..solution import Solution
from ..solvers.trajectory import Trajectory

NAME = "plain"
_MOST = 1 << 14  # numbers of a state: beyond, passes over memory cost more than calls
_FEW = 40  # calls of func: with more, and without a gradient, what the kernels need at the start is made up for
_NEEDS = "needs what the kernels record"


def refusal(request: Request) -> str:
    problem, settings = request.problem, request.settings
    if request.grid is None:
        return "the method chooses its steps"
    if len(problem.t) == 1 or problem.empty:
        return "there is nothing to solve"
    if not request.records and (len(request.grid[0]) - 1) * request.options.tableau.stages > _FEW:
        return "nothing is recorded, in many steps"
    if request.records and settings.gradient != "direct":
        return f"gradient={settings.gradient!r} is no graph of torch"
    if problem.device.type != "cpu":
        return "the state is not on the CPU"
    needs = {
        "cuda_graph": bool(request.options.cuda_graph),
        "dense=True": settings.dense,
        "regularizers": bool(settings.regularizers),
        "adjoint_params": request.params is not None,
        "callbacks of func": bool(request.callbacks),
    }
    for name, needed in needs.items():
        if needed:
            return f"{name} {_NEEDS}"
    if sum([leaf.numel() for leaf in problem.leaves]) > _MOST:
        return f"the state has more than {_MOST} numbers"
    # torch would round each sum of their gradients to 16 bits
    if any([x.dtype in SHORT for x in (*problem.leaves, *own_tensors(request.func)[0])]) or torch._C._is_any_autocast_enabled():
        return "there are numbers of 16 bits"
    # a parameter that func happens not to use has a gradient of zeros there, which DDP waits for
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "processes train together"
    return ""


def solve(request: Request) -> Solution:
    problem, structure, options = request.problem, request.structure, request.options
    assert request.grid is not None
    field: Any = problem.field
    # Views: func may ask for gradients of what it is given, and the user's tensors are not to show it.
    y0 = [leaf.view_as(leaf) for leaf in structure.leaves]
    ys = plain.solve_on_grid(problem, options.tableau, *request.grid, options.perturb, field, y0, request.t)
    trajectory = Trajectory(ys, [leaf[-1].detach().clone() for leaf in ys], None)
    return solution_of(request, ys, trajectory, None, stats_of(request, trajectory))
