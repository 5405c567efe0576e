"""The adjoint method (Chen et al. 2018, arXiv:1806.07366): the gradient from one more solve, backwards in time.

    dy/dt = f,   da/dt = -a^T df/dy,   dL/dtheta = -integral a^T df/dtheta dt   from t1 to t0,   a(t1) = dL/dy(t1)

The memory does not grow with the number of steps. The integral for the parameters is accumulated: f does not depend on it, so
it has slopes but no stages, and a stage whose weights b and e are both zero needs no parameter gradient at all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import noise
from ..formulas import rms_norm
from ..held import Captured
from ..integrate import Options, backward_grid, integrate
from ..ops import FIELDS, readable
from ..problem import Field, Problem, aliased
from ..products import real_product
from ..ranges import in_range
from ..solution import Solution, Stats, raise_failure
from ..tableau import is_whole
from .augmented import AugmentedField, PerSampleField, as_leaf
from .autocast import autocast_again, autocast_state
from .drift import note_drift, warn_of_drift
from .failed import known_cotangents, stand_ins, with_nan
from .first_only import first_only, links
from .of_times import TimeGradient
from .one_by_one import one_by_one
from .release import kept, let_go
from .same_func import refuse_another
from .whole_adjoint import StepIntegral, WholeField

NO_SECOND_DERIVATIVE = (
    "gradient='adjoint' gives first derivatives only: for second ones solve with gradient='direct' or 'checkpoint'"
)


@dataclass
class Adjoint:
    """How the backward solve is done.

    options, rtol, atol (one number a leaf of y): of the backward solve. seminorm: leave the parameters out of the error norm
    (Kidger et al. 2021, arXiv:2009.09457). norm: a user's norm of (t, y, a, *params), or None. callbacks: by name.
    user_options: what the autograd node shows as `adjoint_options`. chosen: the user chose the parameters, and may have
    left some out.
    """

    options: Options
    rtol: list[float]
    atol: list[float]
    seminorm: bool
    norm: Callable[[tuple], Any] | None
    callbacks: dict[str, Callable]
    user_options: dict[str, Any]
    chosen: bool


def attach(
    adjoint: Adjoint,
    problem: Problem,
    ys: Sequence[Tensor],
    y0: Sequence[Tensor],
    t: Tensor,
    params: Captured,
    stats: Stats,
) -> list[Tensor]:
    """ys, with a gradient for y0, t and params."""
    how = autocast_state(problem.device), params
    return list(_Adjoint.apply(adjoint, problem, tuple(ys), stats, how, len(y0), t, *y0, *params.tensors))


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, adjoint, problem, ys, stats, how, count, t, *tensors):
        ctx.adjoint, ctx.problem, ctx.stats, ctx.count = adjoint, problem, stats, count
        ctx.autocast, ctx.params = how
        ctx.adjoint_options, ctx.t_device = dict(adjoint.user_options), t.device
        ctx.links = links((t, *tensors))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*ys[:count])
        return ys

    @staticmethod
    @one_by_one
    @first_only(NO_SECOND_DERIVATIVE)
    @in_range("backward")
    def backward(ctx, *grad_ys):
        ys, adjoint, stats = ctx.saved_tensors, ctx.adjoint, ctx.stats
        problem, params = kept(ctx, "problem"), ctx.params
        params.check()
        grad_ys, spoilt = known_cotangents(problem, grad_ys)
        shown = ctx.adjoint_options.get("norm")
        if shown is not adjoint.user_options["norm"]:  # the user put another in its place
            if not callable(shown):
                raise TypeError(f"adjoint_options['norm'] of the result must be callable, got {shown!r}")
            adjoint = replace(adjoint, norm=shown, seminorm=False)
        with autocast_again(ctx.autocast), params.again():
            field = problem.field.again()
            refuse_another(field, problem, problem.calls, "adjoint", " backwards")
            if let_go(ctx, "problem", "params"):
                problem.calls = ()  # the norm that the node shows keeps the problem
            grad_y0, grad_t, grad_params = solve_backwards(
                adjoint, problem, field, ys, params.tensors, grad_ys, ctx.needs_input_grad[6], stats
            )
        grad_y0, grad_t, grad_params = with_nan(spoilt, problem, grad_y0, grad_t, grad_params)
        if grad_t is not None:
            grad_t = grad_t.to(ctx.t_device)
        return None, None, None, None, None, None, grad_t, *grad_y0, *grad_params


def solve_backwards(
    adjoint: Adjoint,
    problem: Problem,
    field: Any,
    ys: Sequence[Tensor],
    params: Sequence[Tensor],
    grad_outputs: Sequence[Tensor | None],
    t_grad: bool,
    stats: Stats,
) -> tuple[list[Tensor], Tensor | None, list[Tensor]]:
    """(dL/dy0, dL/dt, dL/dparams). field: of the problem, for the calls on the way back."""
    n, (grad_ys, costs) = len(problem.state_leaves), cotangents_of(problem, ys, grad_outputs)
    generators = noise.states(problem.device)
    stats.drift, stats.looks = None, []
    field, params = _for_graphs(adjoint, field, params)
    per_sample, options, tolerances = problem.per_sample, adjoint.options, (adjoint.rtol, adjoint.atol)
    augmented = augmented_field(adjoint, problem, field, params, costs)
    a: list[Tensor] = []
    integral = [as_leaf(torch.zeros_like(param)) for param in params]
    grad_t = TimeGradient(problem) if t_grad else None
    whole = isinstance(augmented, WholeField)
    apart = per_sample or whole  # the parameters' integral is no part of the state
    backward = backward_problem(adjoint, problem, augmented, 0 if apart else len(params))
    callbacks = {name: _with_all_parts(callback) for name, callback in adjoint.callbacks.items()}
    after_step = augmented if isinstance(augmented, PerSampleField) else None
    for i in range(len(problem.t) - 1, 0, -1):
        failed, others_at = stand_ins(problem, i)
        if failed is not None and others_at is None:
            continue
        y = [out[i] if others_at is None else out[i][others_at] for out in ys]
        a = [x + grad[i] for x, grad in zip(a, grad_ys, strict=True)] if a else [readable(grad[i]) for grad in grad_ys]
        if grad_t is not None:
            g = [*(grad[i] for grad in grad_ys), *costs_at(problem, costs, i)]
            grad_t.add(i, slope_product(field, problem, adjoint.options, i, y, g, others_at))
        backward.leaves = [*y, *a, *([] if apart else integral)]
        backward.t = interval_before(problem, i, others_at)
        recorder = StepIntegral(options.tableau, backward, augmented) if isinstance(augmented, WholeField) else None
        backward.held = at_rest(problem, [*a, *costs], failed) if per_sample else None
        grid = backward_grid(options, field, y, backward.t)
        trajectory = integrate(backward, options, callbacks=callbacks, after_step=after_step, grid=grid, recorder=recorder)
        state = trajectory.host_state()
        if state is not None:
            stats.nfe_backward = field.nfe
            most, reached = options.control.max_num_steps, last_state(trajectory.last[: 2 * n], problem, stats)
            raise_failure(state, reached, most, trajectory)
            if not per_sample:  # the next interval goes on with the step size this one ended with
                options = replace(options, first_step=float(state[FIELDS["proposal"], 0]))
        a, stored = trajectory.last[n : 2 * n], [out.detach()[i - 1] for out in ys]  # without the graph, which keeps `stats`
        note_drift(stats, state is None and not whole, tolerances, problem.rows, trajectory.last[:n], stored, backward.held)
        sums = trajectory.sums if recorder is None else recorder.take()
        integral = [x + y for x, y in zip(integral, sums, strict=True)] if apart else trajectory.last[2 * n :]
    a = a or [torch.zeros_like(grad[0]) for grad in grad_ys]  # there was nothing to solve
    if grad_t is not None:
        grad_t.add(0, -slope_product(field, problem, adjoint.options, 0, [out[0] for out in ys], [*a, *costs]))
    stats.nfe_backward = field.nfe
    noise.warn_of_other_numbers(generators, problem.device, "adjoint")
    warn_of_drift(stats, None if options.adaptive else min(adjoint.rtol), whole)
    grad_params = [x.to(param.dtype) for x, param in zip(integral, params, strict=True)]
    total = None if grad_t is None else grad_t.total
    return [x + grad[0] for x, grad in zip(a, grad_ys, strict=True)], total, grad_params


def cotangents_of(
    problem: Problem, ys: Sequence[Tensor], grad_outputs: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor]]:
    """Those of the outputs and of the running costs, zeros where there are none."""
    n = len(problem.state_leaves)
    outputs = [*ys, *problem.leaves[n:]]
    grads = [torch.zeros_like(y) if grad is None else grad for grad, y in zip(grad_outputs, outputs, strict=True)]
    return grads[:n], grads[n:]


def _for_graphs(adjoint: Adjoint, field: Any, params: Sequence[Tensor]) -> tuple[Any, Sequence[Tensor]]:
    """The field and its parameters by other names, where captured graphs are asked for."""
    calls = field.nfe
    field, params = (aliased(field, params) if adjoint.options.cuda_graph else None) or (field, params)
    field.nfe = calls
    return field, params


def interval_before(problem: Problem, i: int, others_at: Tensor | None = None) -> Any:
    """The times of a solve from output i to the one before; others_at: of `stand_ins`."""
    if not problem.own:
        return [problem.t[i], problem.t[i - 1]]
    rows = torch.arange(problem.rows, device="cpu") if others_at is None else others_at.cpu()
    return problem.t.between(i, i - 1, rows.numpy())


def costs_at(problem: Problem, costs: Sequence[Tensor], i: int) -> list[Tensor]:
    """The cotangents of running costs that go on to output i: all go on to the last."""
    if not problem.own:
        return list(costs) if i == problem.last_output else []
    here = torch.from_numpy(problem.last_output == i).to(problem.device)
    return [torch.where(here.reshape(-1, *[1] * (cost.dim() - 1)), cost, 0) for cost in costs]


def augmented_field(
    adjoint: Adjoint, problem: Problem, field: Any, params: Sequence[Tensor], costs: Sequence[Tensor]
) -> AugmentedField:
    tableau, like = adjoint.options.tableau, problem.state_leaves
    if is_whole(tableau):
        return WholeField(field, params, like, costs, tableau.stages, adjoint.chosen)
    if problem.per_sample:
        return PerSampleField(field, params, like, costs, tableau.b, adjoint.chosen)
    e = tableau.e if not adjoint.seminorm and tableau.e else [0.0] * tableau.stages
    needed = [
        b != 0 or w != 0 or (tableau.fsal and tableau.b[0] != 0 and i == tableau.stages - 1)
        for i, (b, w) in enumerate(zip(tableau.b, e, strict=True))
    ]
    return AugmentedField(field, params, like, costs, needed, adjoint.chosen)


def backward_problem(adjoint: Adjoint, problem: Problem, augmented: AugmentedField, quadratures: int) -> Problem:
    """That of one interval, whose state and times are still to be put in."""
    n = len(problem.state_leaves)
    return Problem(
        field=augmented,
        leaves=[],
        t=[],
        per_sample=problem.per_sample,
        rtol=[*adjoint.rtol, *adjoint.rtol, *[min(adjoint.rtol)] * quadratures],
        atol=[*adjoint.atol, *adjoint.atol, *[min(adjoint.atol)] * quadratures],
        norm=adjoint_norm(adjoint, problem, n),
        quadratures=quadratures,
        quadratures_in_norm=not adjoint.seminorm and not problem.per_sample,
        signs=None if isinstance(augmented, WholeField) else [*[1.0] * n, *[-1.0] * (n + quadratures)],
    )


def at_rest(problem: Problem, cotangents: Sequence[Tensor], failed: Tensor | None) -> Tensor:
    """Rows that need no solve back from an output: those that did not reach it or have none, and those that the loss has left
    out so far,
    whose gradient is zero."""
    rows = torch.stack([(x == 0).reshape(problem.rows, -1).all(1) for x in cotangents]).all(0)
    return rows if failed is None else rows | failed


def slope_product(
    field: Field,
    problem: Problem,
    options: Options,
    i: int,
    y: list[Tensor],
    g: list[Tensor],
    others_at: Tensor | None = None,
) -> Tensor:
    """g . f(t_i, y), and the rates of running costs if g goes on to them; at a discontinuity of func with the slope that the
    forward solve came to t_i with, or for i = 0 went from it with. One number, or [rows] where each has its own times.
    others_at: of `stand_ins`."""
    k = field(
        problem.time_beside(i, options.on_side(problem, i), others_at), [x.detach() for x in y]
    )  # their graph is not here
    k = [torch.where(x == 0, 0, slope.detach()) for x, slope in zip(g, k, strict=False)]  # of a row that failed it may be NaN
    products = [real_product(x, slope) for x, slope in zip(g, k, strict=True)]
    if problem.own:
        return torch.stack([x.reshape(problem.rows, -1).sum(1).double() for x in products]).sum(0)
    return torch.stack([x.sum() for x in products]).sum()


def adjoint_norm(adjoint: Adjoint, problem: Problem, n: int) -> Callable[[list[Tensor]], Any] | None:
    """The norm of the backward solve over its leaves (y, a, params); None: the kernels' own.

    That is torchdiffeq's: the largest of the norms of y, of a and, but for the seminorm, of each parameter.
    """
    if adjoint.norm is not None:
        return _with_all_parts_of(adjoint.norm)
    state_norm = problem.norm
    if state_norm is None:
        return None

    def norm(leaves: list[Tensor]) -> Tensor:
        values = [
            torch.as_tensor(state_norm(part), device=problem.device).double().reshape(-1)
            for part in (leaves[:n], leaves[n : 2 * n])
        ]
        if not adjoint.seminorm:
            values += [rms_norm(leaf) for leaf in leaves[2 * n :]]
        return torch.stack(values).amax(0)

    return norm


def _with_all_parts_of(user: Callable) -> Callable[[list[Tensor]], Any]:
    """A user's function of (t, y, a, *params): the part of t is always zero here, for its gradient needs no integral."""
    return lambda leaves: user((leaves[0].new_zeros(()), *leaves))


def _with_all_parts(callback: Callable) -> Callable:
    return lambda t, leaves, dt: callback(t, (leaves[0].new_zeros(()), *leaves), dt)


def last_state(leaves: list[Tensor], problem: Problem, stats: Stats) -> Solution:
    return Solution(None, problem.t, stats, leaves, device=problem.device, per_sample=problem.per_sample)
