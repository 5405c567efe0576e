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
from ..captured import Watch
from ..formulas import rms_norm
from ..held import Captured
from ..integrate import Options, backward_grid, integrate
from ..ops import FIELDS, readable
from ..problem import Field, Problem, aliased
from ..products import NOTHING, Targets, gradients
from ..ranges import in_range
from ..solution import Solution, Stats, raise_failure
from .accumulator import SHORT, Accumulator, combinations
from .autocast import autocast_state
from .direct import real_product
from .drift import add_drift, warn_of_drift
from .failed import known_cotangents, stand_ins, with_nan
from .one_by_one import one_by_one
from .release import kept, let_go
from .same_func import refuse_another

NO_SECOND_DERIVATIVE = (
    "gradient='adjoint' gives first derivatives only: for create_graph=True solve with gradient='direct' or 'checkpoint'"
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
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*ys[:count])
        return ys

    @staticmethod
    @one_by_one
    @in_range("backward")
    def backward(ctx, *grad_ys):
        if torch.is_grad_enabled():
            raise RuntimeError(NO_SECOND_DERIVATIVE)
        ys, adjoint, stats = ctx.saved_tensors, ctx.adjoint, ctx.stats
        problem, params = kept(ctx, "problem"), ctx.params
        params.check()
        grad_ys, spoilt = known_cotangents(problem, grad_ys)
        shown = ctx.adjoint_options.get("norm")
        if shown is not adjoint.user_options["norm"]:  # the user put another in its place
            if not callable(shown):
                raise TypeError(f"adjoint_options['norm'] of the result must be callable, got {shown!r}")
            adjoint = replace(adjoint, norm=shown, seminorm=False)
        with torch.autocast(**ctx.autocast), params.again():
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


class AugmentedField:
    """Slopes of (y, a) and of the parameters' integral, from one call of func and one vector-Jacobian product.

    Those of a and of the integral are given as a^T df/dy and a^T df/dtheta: the problem's signs turn them round.
    """

    def __init__(
        self,
        field: Field,
        params: Sequence[Tensor],
        like: Sequence[Tensor],
        costs: Sequence[Tensor],
        quadrature_stages: Sequence[bool],
        chosen: bool,
    ):
        self.costs = list(costs)  # cotangents of the running costs
        self.field, self.targets, self.quadrature_stages = field, Targets(params), quadrature_stages
        self.leaves, self.watch = len(like), Watch(params, chosen)
        # Where func does not depend on something.
        self.zeros = [*(torch.zeros_like(x) for x in like), *(_as_leaf(torch.zeros_like(x)) for x in params)]
        self.convert = any(x.dtype in SHORT for x in params)
        self.none: list[Tensor | None] = [None] * len(self.params)
        self.recording = torch.enable_grad()

    @property
    def params(self) -> list[Tensor]:
        return self.targets.tensors

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.field.tensors, *self.params]

    def __call__(self, t: Tensor, state: Sequence[Tensor], stage: int) -> list[Tensor | None]:
        n, with_params = self.leaves, self.quadrature_stages[stage]
        y = state[:n]
        k = self.evaluate(t, y)
        grads = self.product(k, [*state[n:], *self.costs], y, self.targets if with_params else NOTHING, False)
        if self.convert:
            grads = [*grads[:n], *(grad if grad is None else _as_leaf(grad) for grad in grads[n:])]
        slopes: list[Tensor | None] = [slope.detach() for slope in k[:n]]
        slopes += [zero if grad is None else grad for grad, zero in zip(grads, self.zeros, strict=False)]
        if not with_params:
            slopes.extend(self.none)
        return slopes

    def evaluate(self, t: Tensor, y: Sequence[Tensor]) -> list[Tensor]:
        """func with its graph; y are the solver's own buffers and become its leaves."""
        for leaf in y:
            leaf.requires_grad_()
        with self.recording:
            return self.watch.evaluate(self.field, t, y)

    def product(
        self, k: list[Tensor], a: Sequence[Tensor], inputs: Sequence[Tensor], targets: Targets, keep_graph: bool
    ) -> Sequence[Tensor | None]:
        """a^T dk/dinputs, and then by the targets"""
        if not all([slope.requires_grad for slope in k]):
            a = [cotangent for slope, cotangent in zip(k, a, strict=True) if slope.requires_grad]
            k = [slope for slope in k if slope.requires_grad]
            if not k:
                return [None] * (len(inputs) + len(targets.tensors))
        return gradients(k, inputs, a, targets, keep_graph or self.watch.keeps_graphs)


class PerSampleField(AugmentedField):
    """The same where every sample has its own steps: which rows a step counts for, and how much, is known only after it.

    So the stages, each in a buffer of its own, keep their graphs to the end of the step, and the parameters' integral takes
    dt * b_j * accept of each row then. The slope of the first stage may stem from an earlier step: it is evaluated again.
    """

    def __init__(
        self,
        field: Field,
        params: Sequence[Tensor],
        like: Sequence[Tensor],
        costs: Sequence[Tensor],
        b: Sequence[float],
        chosen: bool,
    ):
        super().__init__(field, params, like, costs, [False] * len(b), chosen)
        self.b, self.none = b, []
        self.sums = Accumulator(params, len(b), like[0].device)
        self.kept: dict[int, tuple[list[Tensor], Sequence[Tensor]]] = {}
        if not params:
            return
        self.costs = [readable(cost) for cost in self.costs]
        shapes = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (*like, *self.costs)]
        self.cotangents = {i: [*map(torch.empty_like, shapes)] for i, weight in enumerate(b) if weight != 0}
        leaves = [leaf for of_stage in self.cotangents.values() for leaf in of_stage]
        signs = [-b[i] for i, of_stage in self.cotangents.items() for _ in of_stage]
        self.kernels = combinations(leaves, len(like[0]), [[1.0]], signs)
        self.kernels.bind_buffers([0] * len(leaves), [leaf.data_ptr() for leaf in leaves], [], 0)

    def __call__(self, t: Tensor, state: Sequence[Tensor], stage: int) -> list[Tensor | None]:
        n = self.leaves
        y, a = state[:n], state[n:]
        k = self.evaluate(t, y)
        keep = stage != 0 and self.b[stage] != 0 and bool(self.params)
        grads = self.product(k, [*a, *self.costs], y, NOTHING, keep)
        if keep:
            self.kept[stage] = k, a
        slopes = [zero if grad is None else grad for grad, zero in zip(grads, self.zeros, strict=False)]
        return [*(slope.detach() for slope in k[:n]), *slopes]

    @property
    def calls(self) -> int:
        return int(bool(self.params) and self.b[0] != 0)

    @property
    def refusal(self) -> str:
        return "parameters of 16 bits, or on another device" if self.sums.others else ""

    def resume(self, field: Any) -> "PerSampleField":
        self.field, self.targets, self.watch = field.field, field.targets, field.watch
        return self

    def add(self, t0: Tensor, y0: Sequence[Tensor], dt: Tensor) -> None:
        if not self.params:
            return
        if self.b[0] != 0:
            self.kept[0] = self.evaluate(t0, y0[: self.leaves]), y0[self.leaves :]
        self.kernels.bind_dt(dt.data_ptr())
        self.kernels.stage(1, [x.data_ptr() for stage in self.cotangents for x in (*self.kept[stage][1], *self.costs)])
        for stage, (k, _) in self.kept.items():
            self.sums.add(self.product(k, self.cotangents[stage], (), self.targets, False))
        self.sums.flush()
        self.kept.clear()

    def take(self) -> list[Tensor]:
        totals = zip(self.sums.totals, self.params, strict=True)
        found = [torch.zeros_like(_as_leaf(x)) if total is None else total.clone() for total, x in totals]
        self.sums.clear()
        return found


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
    n = len(problem.state_leaves)
    outputs = [*ys, *problem.leaves[n:]]
    grads = [torch.zeros_like(y) if grad is None else grad for grad, y in zip(grad_outputs, outputs, strict=True)]
    grad_ys, costs = grads[:n], grads[n:]
    tableau = adjoint.options.tableau
    generators = noise.states(problem.device)
    stats.drift = None
    calls = field.nfe
    others = aliased(field, params) if adjoint.options.cuda_graph else None
    field, params = others or (field, params)
    field.nfe = calls
    in_norm = not adjoint.seminorm and not problem.per_sample
    per_sample = problem.per_sample
    if per_sample:
        augmented: AugmentedField = PerSampleField(field, params, problem.state_leaves, costs, tableau.b, adjoint.chosen)
    else:
        e = tableau.e if in_norm and tableau.e else [0.0] * tableau.stages
        needed = [
            b != 0 or w != 0 or (tableau.fsal and tableau.b[0] != 0 and i == tableau.stages - 1)
            for i, (b, w) in enumerate(zip(tableau.b, e, strict=True))
        ]
        augmented = AugmentedField(field, params, problem.state_leaves, costs, needed, adjoint.chosen)
    a = [torch.zeros_like(y[0]) for y in ys]
    integral = [_as_leaf(torch.zeros_like(param)) for param in params]
    grad_t = torch.zeros(len(problem.t), dtype=torch.float64, device=problem.device) if t_grad else None
    options = adjoint.options
    quadratures = 0 if per_sample else len(params)
    backward = Problem(
        field=augmented,
        leaves=[],
        t=[],
        direction=-problem.direction,
        per_sample=per_sample,
        rtol=[*adjoint.rtol, *adjoint.rtol, *[min(adjoint.rtol)] * quadratures],
        atol=[*adjoint.atol, *adjoint.atol, *[min(adjoint.atol)] * quadratures],
        norm=adjoint_norm(adjoint, problem, n),
        quadratures=quadratures,
        quadratures_in_norm=in_norm,
        signs=[*[1.0] * n, *[-1.0] * (n + quadratures)],
    )
    callbacks = {name: _with_all_parts(callback) for name, callback in adjoint.callbacks.items()}
    after_step = augmented if isinstance(augmented, PerSampleField) else None
    for i in range(len(problem.t) - 1, 0, -1):
        failed, others_at = stand_ins(problem, i)
        if failed is not None and others_at is None:
            continue
        y = [out[i] if others_at is None else out[i][others_at] for out in ys]
        a = [x + grad[i] for x, grad in zip(a, grad_ys, strict=True)]
        if grad_t is not None:
            g = [*(grad[i] for grad in grad_ys), *(costs if i == len(problem.t) - 1 else ())]
            grad_t[i] = slope_product(field, problem, adjoint.options, i, y, g)
        backward.leaves = [*y, *a, *([] if per_sample else integral)]
        backward.t = [problem.t[i], problem.t[i - 1]]
        backward.held = at_rest(problem, [*a, *costs], failed) if per_sample else None
        grid = backward_grid(options, field, y, backward.t)
        trajectory = integrate(backward, options, callbacks=callbacks, after_step=after_step, grid=grid)
        state = trajectory.host_state()
        if state is not None:
            stats.nfe_backward = field.nfe
            raise_failure(state, last_state(trajectory.last[: 2 * n], problem, stats), options.control.max_num_steps)
            if not per_sample:  # the next interval goes on with the step size this one ended with
                options = replace(options, first_step=float(state[FIELDS["proposal"], 0]))
        a = trajectory.last[n : 2 * n]
        add_drift(stats, adjoint, problem, trajectory.last[:n], [out[i - 1] for out in ys], backward.held)
        integral = [x + y for x, y in zip(integral, trajectory.sums, strict=True)] if per_sample else trajectory.last[2 * n :]
    if grad_t is not None:
        grad_t[0] = -slope_product(field, problem, adjoint.options, 0, [out[0] for out in ys], [*a, *costs])
    stats.nfe_backward = field.nfe
    noise.warn_of_other_numbers(generators, problem.device, "adjoint")
    warn_of_drift(stats, options.adaptive)
    grad_params = [x.to(param.dtype) for x, param in zip(integral, params, strict=True)]
    return [x + grad[0] for x, grad in zip(a, grad_ys, strict=True)], grad_t, grad_params


def at_rest(problem: Problem, cotangents: Sequence[Tensor], failed: Tensor | None) -> Tensor:
    """Rows that need no solve back from an output: those that did not reach it, and those that the loss has left out so far,
    whose gradient is zero."""
    rows = torch.stack([(x == 0).reshape(problem.rows, -1).all(1) for x in cotangents]).all(0)
    return rows if failed is None else rows | failed


def _as_leaf(x: Tensor) -> Tensor:
    """A parameter's gradient as it is added up over the steps: 16 bits as float32."""
    return x.float() if x.dtype in SHORT else x


def slope_product(field: Field, problem: Problem, options: Options, i: int, y: list[Tensor], g: list[Tensor]) -> Tensor:
    """g . f(t_i, y), and the rates of running costs if g goes on to them; at a discontinuity of func with the slope that the
    forward solve came to t_i with, or for i = 0 went from it with."""
    k = field(problem.time_beside(i, options.on_side(problem, i)), [x.detach() for x in y])  # their graph is not here
    k = [torch.where(x == 0, 0, slope.detach()) for x, slope in zip(g, k, strict=False)]  # of a row that failed it may be NaN
    return torch.stack([real_product(x, slope).sum() for x, slope in zip(g, k, strict=True)]).sum()


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
