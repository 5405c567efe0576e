"""The exact gradient of a discrete solve whose steps can be undone: the states come back from the last one, and none is kept.

A step is a sequence of shears (`shears`). On the way back the slopes of a shear are computed once more, with their graphs, at
the half that it has left as it was. They undo it, and give its vector-Jacobian product: with g = dL/dx_into, mu_i = dL/dY_i and
kappa_i = dL/dk_i

    kappa_j = dt (b_j g + sum_{i>j} a_ij mu_i),   mu_i = J_i^T kappa_i,   dL/dx_of += rest g + sum_i mu_i,   g <- keep g

Steps are taken as given; one that ends on an output moves with its time, and so does the next, and a uniform grid with t[0].
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import noise
from ..captured import Watch
from ..formulas import of_rows
from ..held import Captured
from ..problem import Problem
from ..products import Targets, gradients, real_product
from ..ranges import in_range
from ..shears import Leaves, Shear, combined, in_halves, moved_back, node, shears_of
from ..solution import Stats
from ..solvers.trajectory import Evaluation, Recorder, Step
from .accumulator import Accumulator
from .autocast import autocast_again, autocast_state
from .drift import add_drift, warn_of_drift
from .failed import known_cotangents, with_nan, without_others
from .first_only import first_only, links
from .of_times import TimeGradient
from .one_by_one import one_by_one
from .release import kept, let_go
from .same_func import refuse_another

_FIRST = "gradient='reversible' gives first derivatives only: for second ones solve with gradient='direct' or 'checkpoint'"
NOISY = (
    "func draws random numbers, which gradient='reversible' cannot draw again on its way back: use gradient='direct' or "
    "'checkpoint', or draw the numbers once a solve"
)


class NoStates:
    """In the place of `Checkpoints`: of a step its numbers are kept alone."""

    limit = None

    def add(self, step: Any) -> bool:
        return False


def attach(
    recorder: Recorder,
    pair: Sequence[Tensor],
    problem: Problem,
    ys: Sequence[Tensor],
    y0: Sequence[Tensor],
    t: Tensor,
    captured: Captured,
    stats: Stats,
    chosen: bool,
) -> list[Tensor]:
    """ys, with a gradient for y0, t and the captured tensors. pair: the last state, of all halves. chosen: as in `Watch`."""
    ends = list(pair), [leaf.clone() for leaf in problem.leaves]
    how = autocast_state(problem.device), chosen, captured
    return list(_Reversible.apply(recorder, ends, problem, tuple(ys), stats, how, len(y0), t, *y0, *captured.tensors))


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx, recorder, ends, problem, ys, stats, how, count, t, *tensors):
        ctx.recorder, ctx.ends, ctx.problem, ctx.stats, ctx.count, ctx.t_device = (
            recorder,
            ends,
            problem,
            stats,
            count,
            t.device,
        )
        ctx.autocast, ctx.chosen, ctx.captured = how
        ctx.links = links((t, *tensors))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*[x for x in (t, *tensors[:count]) if x.requires_grad])
        return ys

    @staticmethod
    @one_by_one
    @first_only(_FIRST)
    @in_range("backward")
    def backward(ctx, *grad_ys):
        problem, t_grad = ctx.problem, ctx.needs_input_grad[7]
        _ = ctx.saved_tensors  # says so where one was changed since
        recorder, stats, captured, ends = kept(ctx, "recorder"), ctx.stats, ctx.captured, ctx.ends
        captured.check()
        grad_ys, spoilt = known_cotangents(problem, grad_ys)
        let_go(ctx, "recorder", "captured", "problem", "ends")
        with autocast_again(ctx.autocast), captured.again():
            walk = ReversibleWalk(problem, recorder, captured.tensors, grad_ys, t_grad, ctx.chosen)
            refuse_another(walk.field, problem, problem.calls, "reversible", " backwards")
            walk.field.nfe = 0
            generators = noise.states(problem.device)
            walk.undo_all(*ends)
            stats.nfe_backward = walk.field.nfe
            noise.warn_of_other_numbers(generators, problem.device, "reversible")
        walk.add_drift(stats, ends[1])
        grad_y0, grad_t, others = with_nan(spoilt, problem, *walk.result())
        return None, None, None, None, None, None, None, grad_t.to(ctx.t_device), *grad_y0, *others


class ReversibleWalk:
    """Undoes the steps of a tape, last first. x: the halves of the state where it has come to; g: dL/dx."""

    def __init__(
        self,
        problem: Problem,
        recorder: Recorder,
        captured: Sequence[Tensor],
        grad_ys: Sequence[Tensor | None],
        t_grad: bool,
        chosen: bool,
    ):
        field: Any = problem.field
        step = shears_of(recorder.tableau)
        assert step is not None
        self.problem, self.step, self.tape, self.t_grad = problem, step, recorder.tape, t_grad
        self.field, self.n = field.again(), len(problem.leaves)
        self.targets, self.watch = Targets(captured), Watch(captured, chosen)
        self.sums = Accumulator(captured, max(len(shear.b) for shear in step.shears), problem.device)
        self.grad_ys = grad_ys
        self.grad_t = TimeGradient(problem)
        self.at_t0 = torch.zeros(problem.rows, dtype=torch.float64, device=problem.device)  # of the step after, by its start
        self.after = torch.full((problem.rows,), torch.nan, dtype=problem.real, device=problem.device)  # where that one begins
        self.end_slope: Leaves = []  # at the end of this one
        self.careful = problem.per_sample and problem.failed  # what is no number may belong to rows without a part
        self.x: list[Leaves] = []
        self.g: list[Leaves] = []

    def undo_all(self, last: Sequence[Tensor], y0: Sequence[Tensor]) -> None:
        self.x = in_halves(last)
        self.g = in_halves([torch.zeros_like(leaf) for leaf in last])
        for entry in reversed(self.tape):
            if isinstance(entry, Step):
                self._undo(entry)
                self.sums.flush()
        self._add_time(0, self.at_t0)

    def result(self) -> tuple[list[Tensor], Tensor, list[Tensor | None]]:
        """The gradients for y0, t and the captured tensors."""
        flat = [*self.g[0], *self.g[1]]
        if len(flat) > self.n:  # both states begin with y0
            flat = [a + b for a, b in zip(*self.g, strict=True)]
        first = [g if grad is None else g + grad[0] for g, grad in zip(flat, self.grad_ys, strict=False)]
        return first, self.grad_t.total, self.sums.results()

    def add_drift(self, stats: Stats, y0: Sequence[Tensor]) -> None:
        """How far from y0 the walk has come, of rows with a gradient, and a warning where that is far."""
        problem, found = self.problem, [*self.x[0], *self.x[1]][: self.n]
        numbers = [
            [tol if isinstance(tol, float) else float(tol.min()) for tol in tols] for tols in (problem.rtol, problem.atol)
        ]
        without = [(leaf == 0).reshape(problem.rows, -1).all(1) for half in self.g for leaf in half]
        add_drift(stats, (numbers[0], numbers[1]), problem.rows, found, y0, torch.stack(without).all(0))
        adaptive = any(isinstance(entry, Step) and isinstance(entry.dt, Tensor) for entry in self.tape)
        warn_of_drift(stats, None if adaptive else numbers[0][0], True, "reversible")

    # ---- one step -----------------------------------------------------------------------------------------------------

    def _undo(self, step: Step) -> None:
        problem, accept = self.problem, step.accept
        dt = step.dt
        if not isinstance(dt, Tensor):
            dt = torch.full((1,), dt, dtype=torch.float64, device=problem.device)
        if accept is not None:  # others stay where they are: what they tried may have been no number
            dt = torch.where(accept, dt, 0.0)
        self._add_outputs(step)
        views = problem.time_views(step.times)
        t0, t1 = views[0], views[-1]
        at_t0, at_t1 = torch.zeros_like(self.at_t0), torch.zeros_like(self.at_t0)
        for shear in reversed(self.step.shears):
            by_dt, by_nodes = self._undo_shear(shear, t0, t1, dt, accept)
            at_t0, at_t1 = at_t0 - by_dt, at_t1 + by_dt
            for c, grad in by_nodes:
                at_t0, at_t1 = at_t0 + (1 - c) * grad, at_t1 + c * grad
        if self.t_grad:
            ends = [(index, mask) for index, _, mask in step.outputs]
            for index, mask in ends or ([step.ends[1]] if step.ends[1] else []):
                value = self.at_t0 + at_t1
                if not step.ends_on(index):
                    value = self._beside_jump(step, index, value)
                self._add_time(index, value if mask is None else torch.where(mask, value, 0.0))
            self.at_t0 = at_t0 if accept is None else torch.where(accept, at_t0, self.at_t0)
            self.after = step.times[0] if accept is None else torch.where(accept, step.times[0], self.after)

    def _beside_jump(self, step: Step, index: Any, value: Tensor) -> Tensor:
        """dL/dt of an output inside the interval. Where it lies on a discontinuity of func, which stays there, that of the
        output alone: the step after does not begin where this one ends. Else value, with which both move."""
        grads, slopes = [], []
        for grad, slope in zip(self.grad_ys, self.end_slope, strict=False):
            if grad is not None:
                place = (index, torch.arange(len(index), device=index.device)) if isinstance(index, Tensor) else index
                grads.append(grad[place])
                slopes.append(slope)
        alone = self._dot(grads, slopes) if grads else torch.zeros_like(value)
        return torch.where(step.times[-1] != self.after, alone, value)

    def _add_outputs(self, step: Step) -> None:
        """Those at the end of the step: it has no others."""
        for index, _, mask in step.outputs:
            place = (index, torch.arange(len(index), device=index.device)) if isinstance(index, Tensor) else index
            for i, grad in enumerate(self.grad_ys):
                if grad is not None:
                    half, leaf = divmod(i, len(self.g[0]))
                    part = grad[place] if mask is None else torch.where(of_rows(mask, grad[place]), grad[place], 0)
                    self.g[half][leaf] = self.g[half][leaf] + part

    def _add_time(self, index: Any, value: Tensor) -> None:
        if self.t_grad:
            self.grad_t.add(index, value)

    # ---- one shear ----------------------------------------------------------------------------------------------------

    def _undo_shear(
        self, shear: Shear, t0: Tensor, t1: Tensor, dt: Tensor, accept: Tensor | None
    ) -> tuple[Tensor, list[tuple[float, Tensor]]]:
        """The gradient by the size of the step, and those by the times of the stages, [rows]."""
        x, into, of = self.x, shear.into, shear.of
        calls = self._stages(shear, t0, t1, dt)
        k = [[slope.detach() for slope in call.k] for call in calls]
        if shear is self.step.shears[-1]:
            self.end_slope = k[0]
        before = moved_back(shear, x, k, dt)
        g = self.g[into] if accept is None else [torch.where(of_rows(accept, leaf), leaf, 0) for leaf in self.g[into]]
        mu, by_nodes = self._products(shear, calls, g, dt)
        back = combined(self.g[of], mu, (1.0,) * len(mu), torch.ones_like(dt))
        if shear.rest:
            back = [a + shear.rest * b for a, b in zip(back, g, strict=True)]
        by_dt = self._by_dt(shear, k, g, mu) if self.t_grad else torch.zeros_like(dt)
        kept_g = [shear.keep * leaf for leaf in g] if shear.keep != 1 else g
        if accept is not None:
            before = [torch.where(of_rows(accept, a), a, b) for a, b in zip(before, x[into], strict=True)]
            kept_g = [torch.where(of_rows(accept, a), a, b) for a, b in zip(kept_g, self.g[into], strict=True)]
        self.x[into], self.g[into], self.g[of] = before, kept_g, back
        return by_dt, by_nodes

    def _stages(self, shear: Shear, t0: Tensor, t1: Tensor, dt: Tensor) -> list[Evaluation]:
        """The calls of func of one shear, with their graphs."""
        step, calls = self.step, list[Evaluation]()
        for c, row in zip(shear.c[: shear.used], shear.a, strict=False):
            point = [leaf.detach() for leaf in combined(self.x[shear.of], [call.k for call in calls], row, dt)]
            y = [leaf.clone().requires_grad_() for leaf in point]
            t = node(t0, t1, c).detach().clone().requires_grad_(self.t_grad)

            def slopes(t: Tensor, y: Sequence[Tensor]) -> Leaves:
                halves = list(self.x)
                halves[shear.of] = list(y)
                return step.slopes(self.field, t, halves, shear.into)

            with torch.enable_grad():
                calls.append(Evaluation(t, y, self.watch.evaluate(slopes, t, y)))
        return calls

    def _products(
        self, shear: Shear, calls: list[Evaluation], g: Leaves, dt: Tensor
    ) -> tuple[list[Leaves], list[tuple[float, Tensor]]]:
        """mu, [stages][leaves], and the gradients by the times of the stages."""
        mu: list[Leaves] = []  # from the last stage down
        by_nodes: list[tuple[float, Tensor]] = []
        for j in range(len(calls) - 1, -1, -1):
            weights = [shear.b[j], *[shear.a[i][j] for i in range(len(calls) - 1, j, -1)]]
            if not any(weights):
                mu.append([torch.zeros_like(leaf) for leaf in calls[j].y])
                continue
            kappa = combined(None, [g, *mu], weights, dt)
            found, by_t = self._vjp(calls[j], kappa)
            mu.append(found)
            if by_t is not None:
                by_nodes.append((shear.c[j], by_t.reshape(-1).double()))
        return mu[::-1], by_nodes

    def _vjp(self, call: Evaluation, kappa: Leaves) -> tuple[Leaves, Tensor | None]:
        if self.careful:
            call = without_others(self.problem, call, kappa)
        used = [(k, cotangent) for k, cotangent in zip(call.k, kappa, strict=True) if k.requires_grad]
        if not used:
            return [torch.zeros_like(leaf) for leaf in call.y], None
        outputs, cotangents = zip(*used, strict=True)
        inputs = [*call.y, *([call.t] if self.t_grad else [])]
        grads = gradients(outputs, inputs, cotangents, self.targets, self.watch.keeps_graphs)
        n = len(call.y)
        if self.targets.tensors:
            self.sums.add(grads[len(inputs) :])
        found = [torch.zeros_like(y) if grad is None else grad for y, grad in zip(call.y, grads, strict=False)]
        return found, grads[n] if self.t_grad else None

    def _by_dt(self, shear: Shear, k: list[Leaves], g: Leaves, mu: list[Leaves]) -> Tensor:
        one = torch.ones_like(self.at_t0)
        total = self._dot(g, combined(None, k, shear.b, one))
        for grads, row in zip(mu, shear.a, strict=False):
            if any(row):
                total = total + self._dot(grads, combined(None, k, row, one))
        return total

    def _dot(self, g: Sequence[Tensor], x: Sequence[Tensor]) -> Tensor:
        """The real inner product of two states, row by row, float64 [rows]."""
        rows = self.problem.rows
        return torch.stack([real_product(a, b).reshape(rows, -1).sum(1) for a, b in zip(g, x, strict=True)]).sum(0)
