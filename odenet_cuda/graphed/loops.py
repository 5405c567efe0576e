"""Solves by a captured graph: which earlier solve had the same, and what it leaves behind.

An adaptive solver captures one step, a fixed one its whole solve: its steps are known beforehand. Either is kept and takes the
next solve of its kind, see `reset` of the solvers.
"""

import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

from ..problem import Problem, counter_of
from ..sharding import is_plain
from ..solvers.trajectory import Evaluation, Trajectory
from .calls import Calls
from .capture import NEVER, Fence, being_captured, graphs, no_cast_is_kept


@dataclass
class Kind:
    """What a solve by a graph is besides its problem.

    key: what else its steps depend on. reset: what `reset` of a solver takes. perturb: func is first called just inside the
    interval. mode: one of `capture.MODES`. refusal: why this solve has no graph, or "".
    """

    key: Hashable
    reset: tuple[Any, ...]
    perturb: bool
    mode: str
    refusal: str


def first_call(problem: Problem, perturb: bool) -> tuple[Calls, Evaluation]:
    """func at the start, and what it did there: a solve whose func did the same has the same graph."""
    y0 = [leaf.clone() for leaf in problem.state_leaves]
    time = problem.start_time(perturb)
    calls = Calls([time, *y0])
    with no_cast_is_kept(), calls:
        k = problem.field(time, y0, 0)
    calls.returned(k)
    return calls, Evaluation(time, y0, k)


def key_of(problem: Problem, kind: Hashable, calls: Calls) -> tuple[Hashable, ...]:
    """Equal for solves that have the same graph. kind: what else its steps depend on."""
    shapes = tuple([(leaf.shape, leaf.dtype) for leaf in problem.leaves])
    tolerances = *problem.rtol, *problem.atol, problem.quadratures, problem.quadratures_in_norm, *(problem.signs or ())
    cast = torch.is_autocast_enabled(problem.device.type), torch.get_autocast_dtype(problem.device.type)
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), cast, kernels_of_torch()
    # Not all that reads a tensor is an operation of torch, and the adjoint has gradients of some in order.
    field: Any = problem.field
    places = tuple([(x.data_ptr(), x.shape, x.stride(), x.dtype) for x in field.tensors if is_plain(x)])
    rest = problem.per_sample, tolerances, modes, calls.key, places
    return kind, problem.device, shapes, len(problem.t), *rest


def kernels_of_torch() -> tuple[Hashable, ...]:
    """Settings by which torch chooses them."""
    cudnn: Any = torch.backends.cudnn
    precision = torch.backends.cuda.matmul.fp32_precision, cudnn.conv.fp32_precision
    return *precision, torch.are_deterministic_algorithms_enabled(), cudnn.enabled, cudnn.benchmark, cudnn.deterministic


def solve_by_graph(problem: Problem, kind: Kind, make: Callable[..., Any], called: bool) -> Trajectory:
    """The solve by a captured graph, of an earlier solve where one did the same.

    make: a new solver; graph: what it captures. called: func was called at the start before; that it is here once more does
    not count.
    """
    calls, start = first_call(problem, kind.perturb)
    refusal = kind.refusal or calls.refusal or ("a graph is being captured" if being_captured(problem.device) else "")
    if refusal:
        warnings.warn(f"cuda_graph: {refusal}; the solve goes on without a graph", stacklevel=2)
        found = make().run(start)
        counter_of(problem.field).nfe -= called
        return found
    mode = kind.mode
    if mode == "loop" and calls.random:
        mode = "step"
        warnings.warn("cuda_graph='loop': func draws random numbers; each step is replayed from the host", stacklevel=2)
    key = (mode, *key_of(problem, kind.key, calls))
    solver = graphs.take(key)
    if solver is None:
        solver = make() if graphs.mark(key) == NEVER else make(graph=mode)
    else:
        solver.reset(*kind.reset)
    wanted = solver.captures
    found = solver.run(start)
    counter_of(problem.field).nfe -= called
    ys, last, slope = ([leaf.clone() for leaf in leaves] for leaves in (found.ys, found.last, found.slope))
    state = None if found.state is None else found.state.clone()
    call = None if found.call is None or problem.quadratures else found.call.copy()
    if solver.captures:
        graphs.give(key, solver, Fence(problem.device))
    elif wanted:
        graphs.set_mark(key, NEVER)
    return Trajectory(ys=ys, last=last, state=state, sums=found.sums, call=call, seen=found.seen, slope=slope)
