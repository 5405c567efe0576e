"""A grid with gradient="direct" in torch's own operations: autograd then records no more than func and a few sums.

On a CPU that costs less than kernels with a tape of their own, as long as the state is small. What the tape does better is
left to it.
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
_NEEDS = "needs what the kernels record"


def refusal(request: Request) -> str:
    problem, settings = request.problem, request.settings
    if request.grid is None:
        return "the method chooses its steps"
    if settings.gradient != "direct" or not request.records:
        return "no graph of torch is wanted"
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
    trajectory = Trajectory(ys, [leaf[-1].detach() for leaf in ys], None)
    return solution_of(request, ys, trajectory, None, stats_of(request, trajectory))
