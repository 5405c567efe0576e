"""The entries of a tape undone, last first, with the kernels of a forward step."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from ..formulas import interpolant_powers, interpolant_weights, per_row
from ..problem import Problem
from ..products import Targets, gradients, real_product
from ..ranges import marked
from ..solvers.trajectory import End, Evaluation, Index, Recorder, Step
from ..solvers.whole import whole_of
from ..stepper import Rows, Stepper
from .accumulator import Accumulator
from .failed import has_broken_rows, without_others
from .of_times import TimeGradient
from .whole import undo_whole


@lru_cache(maxsize=64)
def transposed(a: Rows) -> Rows:
    """The rows of the tableau that a step backwards goes by, see `BackwardWalk`. a: the rows of the forward step."""
    points = len(a)
    columns = [
        tuple([a[i - 1][j] if i > j and j < len(a[i - 1]) else 0.0 for i in range(points, 0, -1)])
        for j in range(points - 1, -1, -1)
    ]
    return (*columns, (1.0,) * points)


class BackwardWalk:
    """Undoes the entries of a tape, last first.

    The kernels are those of a forward step with the tableau transposed: "stage" m gives kappa_j of point j = points - m from
    the mu of the points above it, in slots from the last point down, and one more row, with dt = 1, gives dL/dy0.
    """

    def __init__(
        self,
        problem: Problem,
        recorder: Recorder,
        captured: Targets,
        grad_outputs: Sequence[Tensor | None],
        t_grad: bool,
        keep_graphs: bool = True,
    ):
        tableau, a = recorder.tableau, recorder.tableau.rows
        self.problem, self.tableau, self.captured, self.t_grad = problem, tableau, captured, t_grad
        self.failed = problem.per_sample and problem.failed
        self.careful = self.failed  # what is no number may belong to rows without a part
        self.leaves, self.n, self.points = len(problem.leaves), len(problem.state_leaves), len(a)
        self.keep_graphs, self.step_costs = keep_graphs, recorder.step_costs
        self.begin(grad_outputs)
        self.sums = Accumulator(captured.tensors, max(len(a), 1), problem.device)
        self.grad_t = TimeGradient(problem)
        self.one = torch.ones(problem.rows, dtype=torch.float64, device=problem.device)
        # Two, by turns: what a step leaves in the buffers of one is read while the next step writes those of the other.
        flat, rows = replace(problem, quadratures=0), transposed(a)
        self.steppers = [Stepper(flat, tableau, rows, zero_base=True, apart=True) for _ in range(2)]

    def begin(self, grad_outputs: Sequence[Tensor | None]) -> None:
        """At the end of the tape."""
        problem = self.problem
        self.grad_ys = []
        for i, leaf in enumerate(problem.leaves):
            grad = grad_outputs[i]
            if grad is None or i >= self.n:
                zeros = torch.zeros((len(problem.t), *leaf.shape), dtype=leaf.dtype, device=leaf.device)
                if grad is not None:  # a running cost is an output at the end alone
                    zeros[problem.last_outputs] = grad
                grad = zeros
            self.grad_ys.append(grad)
        none = torch.zeros(problem.rows if problem.per_sample else (), device=problem.device)
        self.grad_costs = [none if grad is None else grad for grad in grad_outputs[self.leaves :]]
        self.lam = [torch.zeros_like(leaf) for leaf in problem.leaves]  # dL/dy where the walk has come to
        self.kappa: list[Tensor] | None = None  # dL/dk of the slope there; None: zero
        self.older: list[list[Tensor]] = []  # see `whole.undo_whole`

    def undo(self, entry: Step | Evaluation) -> None:
        with marked("step backwards"):
            if isinstance(entry, Step):
                self._undo_step(entry)
            else:
                self._undo_evaluation(entry)
            self.sums.flush()  # before buffers are written again that a gradient may be

    def result(self) -> tuple[list[Tensor], Tensor, list[Tensor | None]]:
        grad_y0 = [lam + grad[0] for lam, grad in zip(self.lam, self.grad_ys, strict=True)]
        return grad_y0[: self.n], self.grad_t.total, self.sums.results()

    # ---- one evaluation of func ---------------------------------------------------------------------------------------

    def _vjp(self, evaluation: Evaluation, kappa: list[Tensor]) -> tuple[Sequence[Tensor | None], Tensor | None]:
        """(dL/dY, dL/dt) of one evaluation; the captured tensors' gradients are added up on the side."""
        if self.careful:
            evaluation = without_others(self.problem, evaluation, kappa)
        outputs = evaluation.k
        if not all([k.requires_grad for k in outputs]):
            kappa = [cotangent for k, cotangent in zip(outputs, kappa, strict=True) if k.requires_grad]
            outputs = [k for k in outputs if k.requires_grad]
            if not outputs:
                return [None] * self.leaves, None
        # The first evaluation has no gradient for y0 where none is wanted, but func may differentiate by a part of it itself.
        wanted = [leaf.requires_grad for leaf in evaluation.y]
        t_grad = self.t_grad and evaluation.t.requires_grad  # not where times of an interpolant alone have one
        inputs = [*compress(evaluation.y, wanted), *([evaluation.t] if t_grad else [])]
        grads = gradients(outputs, inputs, kappa, self.captured, self.keep_graphs)
        n = sum(wanted)
        by_y = iter(grads[:n])
        if self.captured.tensors:
            self.sums.add(grads[n + t_grad :])
        found = [next(by_y) if needed else None for needed in wanted]
        return [*found, *[None] * (self.leaves - self.n)], grads[n] if t_grad else None

    def _undo_evaluation(self, evaluation: Evaluation) -> None:
        """A slope evaluated for itself: at the start, or anew beyond a discontinuity for the rows of its mask."""
        if self.kappa is None:
            return
        mask = evaluation.mask
        kappa = self.kappa if mask is None else [per_row(mask, k) * k for k in self.kappa]
        mu, grad_t = self._vjp(evaluation, kappa)
        self.lam = [lam if m is None else lam + m for lam, m in zip(self.lam, mu, strict=True)]
        self.kappa = None if mask is None else [per_row(~mask, k) * k for k in self.kappa]
        if grad_t is not None:
            self._add_end(evaluation.end, grad_t.reshape(-1).double())

    # ---- one step -----------------------------------------------------------------------------------------------------

    def _undo_step(self, step: Step) -> None:
        dt = step.dt if isinstance(step.dt, Tensor) else torch.full_like(self.one, step.dt)
        self.careful = self.failed or has_broken_rows(step)
        base, lam, into_y0 = self.outputs(step, self.lam, dt) if step.outputs else (None, self.lam, None)
        if (whole := whole_of(step)) is None:
            self.undo_points(step, lam, dt, base, into_y0)
        else:
            undo_whole(self, whole, step, lam, base, into_y0)

    def undo_points(
        self,
        step: Step,
        lam: list[Tensor],
        dt: Tensor,
        base: list[list[Tensor]] | None,
        into_y0: list[Tensor] | None,
    ) -> None:
        """lam: dL/dy1 with the outputs at the end. dt: float64 [rows]. base and into_y0: what outputs inside the step add to
        each kappa_j and to dL/dy0."""
        points, kappa = self.points, self.kappa
        lam, held_lam = self._apart(step, lam)
        kappa, held_kappa = (None, None) if kappa is None else self._apart(step, kappa)
        by_ends: dict[int, list[Tensor]] = {}
        if self.grad_costs:
            base, by_ends, costs_by_dt = self._costs(step, base)
        stepper = self.steppers[0]
        kernels = stepper.kernels
        self.steppers.reverse()
        kernels.bind_dt(dt.data_ptr())
        if base is not None and points < len(base):
            kappa = base[points] if kappa is None else [x + y for x, y in zip(kappa, base[points], strict=True)]
        mu: list[list[Tensor]] = []  # from the last point down
        stage_t: list[tuple[float, Tensor]] = []
        addresses: list[int] = []
        for m in range(points + 1):
            j = points - m
            if m > 0:
                # The slope that the next step began with is that of the last point that has one.
                carried = kappa if m == 1 and step.evaluations[points - 1] is None else None
                kernels.stage(m, addresses)
                kappa = stepper.y[m]
                if carried is not None:
                    torch._foreach_add_(kappa, carried)
                if base is not None and j < len(base):
                    torch._foreach_add_(kappa, base[j])
            if j == 0:
                break
            mu.append(self._mu(step, j, kappa, lam if m == 0 else None, by_ends.get(j, ()), stage_t))
            addresses = stepper.set_slopes(m, mu[-1], False)
        # All mu are in their slots; the row of ones gives dL/dy0.
        kernels.bind_dt(self.one.data_ptr())
        kernels.stage(points + 1, [])
        self.kappa, self.lam = stepper.y[points], stepper.y[points + 1]
        if into_y0 is not None:
            torch._foreach_add_(self.lam, into_y0)
        if held_lam is not None:
            torch._foreach_add_(self.lam, held_lam)
        if held_kappa is not None:
            torch._foreach_add_(self.kappa, held_kappa)
        if self.t_grad and (step.ends[0] or step.ends[1]):
            self._step_time_gradient(step, mu, stage_t)
            if self.grad_costs:
                self._add_end(step.ends[0], -costs_by_dt)
                self._add_end(step.ends[1], costs_by_dt)

    def _apart(self, step: Step, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor] | None]:
        """What belongs to the accepted rows, and to those that were rejected, which passed y0 and k0 on."""
        if step.accept is None:
            return x, None
        return [per_row(step.accept, part) * part for part in x], [per_row(~step.accept, part) * part for part in x]

    def _mu(
        self,
        step: Step,
        j: int,
        kappa: list[Tensor] | None,
        lam: list[Tensor] | None,
        more: Sequence[Tensor],
        stage_t: list[tuple[float, Tensor]],
    ) -> list[Tensor]:
        """dL/dY of point j, from kappa of its slope. lam: dL/dy1, for the last. more: what else it gets, a leaf. stage_t: takes
        its time's gradient."""
        evaluation = step.evaluations[j - 1]
        grads: Sequence[Any] = [None] * self.leaves
        if evaluation is not None and kappa is not None:
            grads, grad_t = self._vjp(evaluation, kappa)
            if grad_t is not None:
                stage_t.append((self.tableau.c[j], grad_t.reshape(-1).double()))
        if lam is not None:
            mu = [x if grad is None else x + grad for x, grad in zip(lam, grads, strict=True)]
        else:
            mu = [torch.zeros_like(x) if grad is None else grad for x, grad in zip(self.lam, grads, strict=True)]
        for leaf, grad in enumerate(more):
            mu[leaf] = mu[leaf] + grad
        return mu

    def outputs(
        self, step: Step, lam: list[Tensor], dt: Tensor
    ) -> tuple[list[list[Tensor]] | None, list[Tensor], list[Tensor] | None]:
        """(what outputs add to each kappa_j, dL/dy1 with the outputs at the end, what outputs add to dL/dy0)."""
        base: list[list[Tensor]] | None = None
        into_y0: list[Tensor] | None = None
        for index, theta, mask in step.outputs:
            place = (index, torch.arange(len(index), device=index.device)) if isinstance(index, Tensor) else index
            grads = [grad[place] for grad in self.grad_ys]
            if mask is not None:
                grads = [per_row(mask, g) * g for g in grads]
            if step.ends_on(index):  # the end of the step moves with this output: it is y1 itself
                lam = [x + g for x, g in zip(lam, grads, strict=True)]
                continue
            if self.t_grad:
                self._output_time_gradient(step, index, theta, grads)
            if base is None or into_y0 is None:
                base = [[torch.zeros_like(g) for g in grads] for _ in self.tableau.p]
                into_y0 = [torch.zeros_like(g) for g in grads]
            self._add_output(base, theta, dt, grads)
            torch._foreach_add_(into_y0, grads)
        return base, lam, into_y0

    def _add_output(self, base: list[list[Tensor]], theta: float | Tensor, dt: Tensor, g: list[Tensor]) -> None:
        """b_j(theta) dt g to each of base, in few operations: a step may have many outputs. theta: of all rows, or [rows]."""
        if isinstance(theta, Tensor):
            factors = torch.zeros_like(theta)
            for power in reversed(interpolant_powers(self.tableau, theta.device)):
                factors = (factors + power) * theta
            for into, factor in zip(base, factors * dt, strict=True):
                torch._foreach_add_(into, [per_row(factor, x) * x for x in g])
            return
        weights = [float(w) for w in interpolant_weights(self.tableau, theta)]
        for of_leaf, x in zip(zip(*base, strict=True), g, strict=True):
            size: Any = per_row(dt, x)
            torch._foreach_addcmul_(of_leaf, [x] * len(base), [size.expand_as(x)] * len(base), weights)

    def _costs(self, step: Step, base: list[list[Tensor]] | None) -> tuple[list[list[Tensor]], dict[int, list[Tensor]], Tensor]:
        """(base with what the costs of the step add to each kappa_j, what they add to the mu of points, their part by dt)."""
        by_k, by_ends, by_dt = self.step_costs.gradients(step, self.grad_costs)
        if base is None:
            base = [[torch.zeros_like(leaf) for leaf in self.problem.leaves] for _ in by_k]
        for into, grads in zip(base, by_k, strict=True):
            for total, grad in zip(into, grads, strict=False):
                if grad is not None:
                    total += grad
        return base, by_ends, by_dt

    # ---- derivatives by time --------------------------------------------------------------------------------------

    def _dot(self, g: Sequence[Tensor], x: Sequence[Tensor]) -> Tensor:
        """The real inner product of two states, row by row, float64 [rows]."""
        rows = self.problem.rows
        if self.careful:
            x = [torch.where(a == 0, 0, b) for a, b in zip(g, x, strict=True)]
        return torch.stack([real_product(a, b).reshape(rows, -1).sum(1) for a, b in zip(g, x, strict=True)]).sum(0)

    def _slopes(self, step: Step, weights: Sequence[Any]) -> list[Tensor]:
        """sum_j weights_j k_j; a weight is a number or float64 [rows]."""
        combined = []
        for leaf, y0 in enumerate(step.y0 or ()):
            total = torch.zeros_like(y0)
            for weight, of_stage in zip(weights, step.k, strict=False):
                if of_stage:
                    total += per_row(weight, y0) * of_stage[leaf].detach()
            combined.append(total)
        return combined

    def _add_end(self, end: End | None, value: Tensor) -> None:
        if end is not None:
            self.grad_t.add(end[0], value if end[1] is None else value * end[1])

    def _output_time_gradient(self, step: Step, index: Index, theta: float | Tensor, g: list[Tensor]) -> None:
        """theta = (t - t0) / dt, so an output inside a step moves with its own time and with both ends."""
        rates = []  # b_j'(theta)
        for row in self.tableau.p:
            rate: Any = 0.0
            for d in range(len(row) - 1, -1, -1):
                rate = rate * theta + (d + 1) * row[d]
            rates.append(rate)
        by_theta = self._dot(g, self._slopes(step, rates))
        by_dt = self._dot(g, self._slopes(step, interpolant_weights(self.tableau, theta)))
        self.grad_t.add(index, by_theta)
        self._add_end(step.ends[0], -(1 - theta) * by_theta - by_dt)
        self._add_end(step.ends[1], -theta * by_theta + by_dt)

    def _step_time_gradient(self, step: Step, mu: list[list[Tensor]], stage_t: list[tuple[float, Tensor]]) -> None:
        """A stage lies at t0 + c (t1 - t0), and dt = t1 - t0. mu: from the last point down."""
        by_dt = torch.zeros_like(self.one)
        for row, of_point in zip(reversed(self.tableau.rows), mu, strict=True):
            by_dt = by_dt + self._dot(of_point, self._slopes(step, row))
        if step.accept is not None:
            by_dt = by_dt * step.accept
        at_t0, at_t1 = -by_dt, by_dt
        for c, grad in stage_t:
            at_t0, at_t1 = at_t0 + (1 - c) * grad, at_t1 + c * grad
        self._add_end(step.ends[0], at_t0)
        self._add_end(step.ends[1], at_t1)
