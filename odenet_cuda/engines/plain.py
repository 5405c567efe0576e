"""A small grid in torch's own operations.

On a CPU they cost less than kernels whose buffers and tables are first to be made, as long as state and grid are small; with
gradient="direct" autograd then records no more than func and a few sums. What the kernels and their tape do better is left to
them.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import plain
from ..captured import Leaf
from ..formulas import SHORT
from ..outcome import solution_of, stats_of
from ..problem import Field
from ..ranges import marked
from ..request import Request
from ..sharding import train_together
from ..solution import Solution
from ..solvers.short import MOST, is_short
from ..solvers.trajectory import Trajectory
from ..tableau import ButcherTableau

NAME = "plain"
_ASKED = "cuda_graph", "dense=True", "regularizers", "every", "progress", "events", "integrals", "adjoint_params", "callbacks"
_ROUNDED = "there are numbers of 16 bits, whose gradients torch would add up in 16 bits"


def refusal(request: Request) -> str:
    problem, settings = request.problem, request.settings
    options, records = settings.options, request.records
    if request.grid is None:
        return "the method chooses its steps"
    if not isinstance(options.tableau, ButcherTableau):
        return "the method is no explicit Runge-Kutta method"
    if len(problem.t) == 1 or problem.empty:
        return "there is nothing to solve"
    if not records and not is_short(options.tableau, request.grid[0]):
        return "nothing is recorded, in many steps"
    if records and settings.gradient != "direct":
        return f"gradient={settings.gradient!r} is no graph of torch"
    if problem.device.type != "cpu":
        return "the state is not on the CPU"
    given = request.events is not None, request.integrals is not None, request.params is not None
    asked = (
        options.cuda_graph,
        settings.dense,
        settings.regularizers,
        settings.every,
        options.progress,
        *given,
        request.callbacks,
    )
    if any(asked):
        return f"{next(name for name, needed in zip(_ASKED, asked, strict=True) if needed)} needs what the kernels record"
    if sum([leaf.numel() for leaf in problem.leaves]) > MOST:
        return f"the state has more than {MOST} numbers"
    if any([leaf.dtype in SHORT for leaf in problem.leaves]) or torch._C._is_any_autocast_enabled():
        return _ROUNDED
    # a parameter that func happens not to use has a gradient of zeros there, which DDP waits for
    if train_together():
        return "processes train together"
    return ""


def solve(request: Request) -> Solution | str:
    """Where a gradient is recorded, the first call of func shows what it depends on."""
    options, field = request.options, request.problem.field
    inside = options.step_size is not None or options.grid_constructor is not None  # outputs may lie within a step
    # Of a time that moves the derivative is a slope, which is kept for it.
    if options.tableau.chained and not inside and not request.t.requires_grad:
        field.slopes_are_used_up()  # type: ignore[attr-defined]
    found = _record(request) if request.records else _solve(request, field)
    if isinstance(found, str):
        return found
    ys, last = found
    trajectory = Trajectory(ys, [leaf.detach() for leaf in last], None)
    return solution_of(request, request.problem, ys, trajectory, None, stats_of(request, trajectory))


def _solve(request: Request, field: Any) -> tuple[list[Tensor], list[Tensor]]:
    problem, options = request.problem, request.options
    assert request.grid is not None
    # Views: func may ask for gradients of what it is given, and the user's tensors are not to show it.
    y0 = [leaf.view_as(leaf) for leaf in request.structure.leaves] if request.records else problem.leaves
    with marked("solve"):
        return plain.solve_on_grid(problem, options.tableau, *request.grid, options.perturb, field, y0, request.t)


def _record(request: Request) -> tuple[list[Tensor], list[Tensor]] | str:
    """The outputs with their graph, or why the tape of the kernels is to be preferred."""
    field: Any = request.problem.field
    assert request.grid is not None
    looked = _Looked(field, request.options.tableau.stages * (len(request.grid[0]) - 1))
    try:
        ys, last = _solve(request, looked)
    except _Rounded:
        field.nfe = 0
        return _ROUNDED
    needed = request.t.requires_grad or any([leaf.requires_grad for leaf in request.structure.leaves])
    if not needed and not _leads_beyond(ys, looked.given):  # func asked for gradients of what it was given, for itself
        ys = [y.detach() for y in ys]
    return ys, last


class _Rounded(Exception):
    """func depends on numbers of 16 bits."""


class _Looked:
    """func over leaves, whose first result is looked at. given: the leaves of autograd that func was handed, by id."""

    def __init__(self, field: Field, calls: int):
        self.field = field
        self.given: dict[int, Tensor] = {}
        self._first = calls > 1  # of one there is nothing to add up

    def __call__(self, t: Tensor, y: Sequence[Tensor], stage: int = 0) -> list[Tensor]:
        self.given |= {id(x): x for x in (t, *y) if x.grad_fn is None}
        k = self.field(t, y, stage)
        if self._first:
            self._first = False
            if any(map(_is_short, _nodes(k))):
                raise _Rounded
        return k


def _is_short(node: Any) -> bool:
    """Whether it takes in a gradient of 16 bits."""
    if type(node) is Leaf:
        return node.variable.dtype in SHORT
    return any([data.dtype in SHORT for data in node._input_metadata])


def _nodes(outputs: Sequence[Tensor]) -> Iterable[Any]:
    """Those of the graph of these tensors, each once."""
    found = dict.fromkeys([x.grad_fn for x in outputs if x.grad_fn is not None])
    waiting = list(found)
    while waiting:
        for other, _ in waiting.pop().next_functions:
            if other is not None and other not in found:
                found[other] = None
                waiting.append(other)
    return found


def _leads_beyond(ys: Sequence[Tensor], given: dict[int, Tensor]) -> bool:
    """Whether the outputs have a gradient for something else than these."""
    leaves = (node.variable for node in _nodes(ys) if hasattr(node, "variable"))
    return any(id(x) not in given for x in leaves)
