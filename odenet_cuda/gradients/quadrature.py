"""The adjoint on the stored solution: a alone is solved backwards, and the parameters' integral is a Gauss quadrature.

    da/dt = -a^T df/dy(t, y(t))   backwards,   dL/dtheta = sum over its steps of |dt| sum_m w_m a^T df/dtheta(t_m, y(t_m))

y(t) is the interpolant of the forward solve, kept as the polynomial of each step, so y is not solved again and no stage needs a
product with the parameters. Memory grows with the steps times the state (Kim et al. 2021, arXiv:2103.15341, section on
quadrature adjoints; Golub and Welsch 1969, doi 10.1090/S0025-5718-69-99647-1 for the nodes).
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import formulas, noise, ops
from ..captured import Watch
from ..held import Captured
from ..integrate import backward_grid, integrate
from ..ops import FIELDS
from ..problem import Field, Problem
from ..products import NOTHING, Targets, gradients
from ..ranges import in_range
from ..solution import Stats, raise_failure
from ..solvers.trajectory import Recorder, Step
from ..sparsity import Sparsity
from ..tableau import Method, is_whole
from .accumulator import Accumulator
from .adjoint import Adjoint, at_rest, costs_at, cotangents_of, interval_before, last_state, slope_product
from .autocast import autocast_again, autocast_state
from .failed import known_cotangents, stand_ins, with_nan
from .first_only import first_only, links
from .of_times import TimeGradient
from .one_by_one import one_by_one
from .polynomials import Polynomials
from .release import kept, let_go
from .same_func import refuse_another

NO_SECOND_DERIVATIVE = (
    "gradient='quadrature' gives first derivatives only: for second ones solve with gradient='direct' or 'checkpoint'"
)


def attach(
    adjoint: Adjoint,
    solution: Polynomials,
    problem: Problem,
    ys: Sequence[Tensor],
    y0: Sequence[Tensor],
    t: Tensor,
    params: Captured,
    stats: Stats,
) -> list[Tensor]:
    """ys, with a gradient for y0, t and params."""
    how = adjoint, solution, stats, autocast_state(problem.device), params
    return list(_Quadrature.apply(how, problem, tuple(ys), len(y0), t, *y0, *params.tensors))


class _Quadrature(torch.autograd.Function):
    @staticmethod
    def forward(ctx, how, problem, ys, count, t, *tensors):
        ctx.how, ctx.problem, ctx.count, ctx.t_device = how, problem, count, t.device
        ctx.links = links((t, *tensors))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*ys[:count])
        return ys

    @staticmethod
    @one_by_one
    @first_only(NO_SECOND_DERIVATIVE)
    @in_range("backward")
    def backward(ctx, *grad_ys):
        ys, problem = ctx.saved_tensors, ctx.problem
        adjoint, solution, stats, autocast, params = kept(ctx, "how")
        params.check()
        grad_ys, spoilt = known_cotangents(problem, grad_ys)
        with autocast_again(autocast), params.again():
            field = problem.field.again()
            refuse_another(field, problem, problem.calls, "quadrature", " backwards")
            let_go(ctx, "how", "problem")
            grad_y0, grad_t, grad_params = solve_backwards(
                adjoint, solution, problem, field, ys, params.tensors, grad_ys, ctx.needs_input_grad[4], stats
            )
        grad_y0, grad_t, grad_params = with_nan(spoilt, problem, grad_y0, grad_t, grad_params)
        if grad_t is not None:
            grad_t = grad_t.to(ctx.t_device)
        return None, None, None, None, grad_t, *grad_y0, *grad_params


class AdjointField:
    """a^T df/dy on the stored solution; the problem's signs turn it round. whole: -a^T df/dy, with a graph where gradients are
    recorded, for methods that differentiate it."""

    def __init__(
        self,
        field: Field,
        solution: Polynomials,
        params: Sequence[Tensor],
        costs: Sequence[Tensor],
        chosen: bool,
        whole: bool = False,
    ):
        self.whole = whole
        self.costs = costs  # cotangents of the running costs
        self.field, self.solution, self.params = field, solution, Targets(params)
        self.watch = Watch(params, chosen)
        self.others_at: Tensor | None = None  # as given by `stand_ins`

    def __call__(self, t: Tensor, a: Sequence[Tensor], stage: int = 0) -> list[Tensor]:
        k, y = self.evaluate(t)
        if self.whole:
            return self._with_graph(k, [*a, *self.costs], y)
        grads = self.product(k, [*a, *self.costs], y, NOTHING)
        return [torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(grads, y, strict=True)]

    def _with_graph(self, k: list[Tensor], a: Sequence[Tensor], y: list[Tensor]) -> list[Tensor]:
        recording = torch.is_grad_enabled()
        with torch.enable_grad():
            used = [(slope, cotangent) for slope, cotangent in zip(k, a, strict=True) if slope.requires_grad]
            found: Sequence[Any] = [None] * len(y)
            if used:
                outputs, cotangents = zip(*used, strict=True)
                found = gradients(outputs, y, cotangents, NOTHING, recording or self.watch.keeps_graphs, recording)
        return [torch.zeros_like(leaf) if grad is None else -grad for grad, leaf in zip(found, y, strict=True)]

    def evaluate(self, t: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        found = self.solution.at(t.detach())
        if self.whole and t.requires_grad:  # its value does not move, but it has its rate
            shift = t - t.detach()
            rates = self.solution.at(t.detach(), rate=True)
            found = [y + formulas.per_row(shift, y) * rate for y, rate in zip(found, rates, strict=True)]
        if self.others_at is not None:
            found = [leaf[self.others_at] for leaf in found]
        y = [leaf if leaf.requires_grad else leaf.requires_grad_() for leaf in found]
        with torch.enable_grad():
            if self.whole and t.requires_grad:  # y has a graph that is not func's; other calls are looked at
                return self.field(t, y), y
            return self.watch.evaluate(self.field, t, y), y

    def product(
        self, k: list[Tensor], a: Sequence[Tensor], inputs: Sequence[Tensor], targets: Targets
    ) -> Sequence[Tensor | None]:
        used = [(slope, cotangent) for slope, cotangent in zip(k, a, strict=True) if slope.requires_grad]
        if not used:
            return [None] * (len(inputs) + len(targets.tensors))
        outputs, cotangents = zip(*used, strict=True)
        return gradients(outputs, inputs, cotangents, targets, self.watch.keeps_graphs)


class ParameterQuadrature(Recorder):
    """Adds the integral over each backward step by Gauss's rule, exact for polynomials of twice the method's order less one.

    A backward step may be longer than steps of the solution: where df/dy is small, it follows nothing of func. So it is cut
    where those begin, for they follow func as closely as the tolerance asks for.
    """

    def __init__(self, tableau: Method, backward: Problem, field: AdjointField, params: Sequence[Tensor]):
        super().__init__(tableau, backward.t, backward.per_sample, len(backward.leaves))
        self.problem, self.field, self.params = backward, field, params
        self.sign = 1.0 if field.whole else -1.0  # of the slopes
        self.every_slope = self.at_once = True
        nodes, weights = np.polynomial.legendre.leggauss(tableau.order // 2 + 1)
        self.nodes, self.weights = [float(x + 1) / 2 for x in nodes], [float(w) / 2 for w in weights]
        self.sums = Accumulator(params, len(nodes), backward.device)

    def _keep(self, t0: float | Tensor, t1: float | Tensor, step: Step) -> None:
        if not self.params:
            return
        assert step.y0 is not None
        problem = self.problem
        start, end = (torch.as_tensor(t, dtype=torch.float64, device=problem.device).reshape(-1) for t in (t0, t1))
        dt = end - start
        k = [of_stage[leaf].detach() for leaf in range(self.leaves) for of_stage in step.k]
        if step.accept is not None:  # what others tried may be no number
            k = [torch.where(formulas.of_rows(step.accept, x), x, 0) for x in k]
        for low, high in pairwise(self.field.solution.cuts(start, dt)):
            for node, share in zip(self.nodes, self.weights, strict=True):
                theta = low + node * (high - low)
                a = self._adjoint_at(theta, step, k, dt)
                part = -share * (high - low) * (dt if step.accept is None else dt * step.accept)
                cotangents = [formulas.per_row(part, x) * x for x in (*a, *self.field.costs)]
                t = problem.time_views((start + theta * dt).to(problem.real)[None])[0]
                slopes, _ = self.field.evaluate(t)
                self.sums.add(self.field.product(slopes, cotangents, (), self.field.params))
        self.sums.flush()

    def _adjoint_at(self, theta: float | Tensor, step: Step, k: list[Tensor], dt: Tensor) -> list[Tensor]:
        """The adjoint inside a backward step. k: slopes, leaf by leaf."""
        weights = formulas.interpolant_weights(self.tableau, theta)
        y0 = [leaf.detach() for leaf in step.y0 or ()]
        if not isinstance(theta, Tensor):
            a = [torch.empty_like(leaf) for leaf in y0]
            ops.stage(a, y0, k, [self.sign * float(w) for w in weights], dt)
            return a
        a, of_leaf = [], len(k) // len(y0)
        for i, leaf in enumerate(y0):
            value = formulas.widened(leaf)
            for w, slope in zip(weights, k[i * of_leaf : (i + 1) * of_leaf], strict=True):
                value = value + self.sign * formulas.per_row(dt * w, value) * formulas.widened(slope)
            a.append(value.to(leaf.dtype))
        return a


def solve_backwards(
    adjoint: Adjoint,
    solution: Polynomials,
    problem: Problem,
    field: Any,
    ys: Sequence[Tensor],
    params: Sequence[Tensor],
    grad_outputs: Sequence[Tensor | None],
    t_grad: bool,
    stats: Stats,
) -> tuple[list[Tensor], Tensor | None, list[Tensor]]:
    """(dL/dy0, dL/dt, dL/dparams). field: of the problem, for the calls on the way back."""
    grad_ys, costs = cotangents_of(problem, ys, grad_outputs)
    generators = noise.states(problem.device)
    options = adjoint.options
    whole = is_whole(options.tableau)
    on_solution = AdjointField(field, solution, params, costs, adjoint.chosen, whole)
    backward = Problem(
        field=on_solution,
        leaves=(a := [torch.zeros_like(leaf) for leaf in problem.state_leaves]),
        t=[],
        per_sample=problem.per_sample,
        rtol=adjoint.rtol,
        atol=adjoint.atol,
        norm=problem.norm,
        signs=None if whole else [-1.0] * len(a),
        jac=problem.jac.transposed if whole and isinstance(problem.jac, Sparsity) else None,
    )
    recorder = ParameterQuadrature(options.tableau, backward, on_solution, params)
    recorder.slopes = not options.adaptive
    grad_t = TimeGradient(problem) if t_grad else None
    for i in range(len(problem.t) - 1, 0, -1):
        failed, on_solution.others_at = stand_ins(problem, i)
        if failed is not None and on_solution.others_at is None:
            continue
        y = [out[i] if failed is None else out[i][on_solution.others_at] for out in ys]
        if grad_t is not None:
            g = [*(grad[i] for grad in grad_ys), *costs_at(problem, costs, i)]
            grad_t.add(i, slope_product(field, problem, adjoint.options, i, y, g, on_solution.others_at))
        backward.leaves = [x + grad[i] for x, grad in zip(a, grad_ys, strict=True)]
        backward.t = recorder.t = interval_before(problem, i, on_solution.others_at)
        backward.held = at_rest(problem, [*backward.leaves, *costs], failed) if problem.per_sample else None
        grid = backward_grid(options, field, y, backward.t)
        trajectory = integrate(backward, options, callbacks=adjoint.callbacks, recorder=recorder, grid=grid)
        state = trajectory.host_state()
        if state is not None:
            stats.nfe_backward = field.nfe
            raise_failure(state, last_state(trajectory.last, problem, stats), options.control.max_num_steps, trajectory)
            if not problem.per_sample:
                options = replace(options, first_step=float(state[FIELDS["proposal"], 0]))
        a = trajectory.last
    if grad_t is not None:
        grad_t.add(0, -slope_product(field, problem, adjoint.options, 0, [out[0] for out in ys], [*a, *costs]))
    stats.nfe_backward = field.nfe
    noise.warn_of_other_numbers(generators, problem.device, "quadrature")
    found = recorder.sums.results()
    grad_params = [torch.zeros_like(x) if grad is None else grad for x, grad in zip(params, found, strict=True)]
    total = None if grad_t is None else grad_t.total
    return [x + grad[0] for x, grad in zip(a, grad_ys, strict=True)], total, grad_params
