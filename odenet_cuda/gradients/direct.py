"""The exact gradient of the discrete solve: the recorded steps are walked backwards with the kernels of the forward solve.

Step: Y_i = y0 + dt sum_j a_ij k_j, k_i = f(t_i, Y_i), y1 the last Y. With mu_i = dL/dY_i and kappa_i = dL/dk_i

    mu_i = J_i^T kappa_i (plus dL/dy1 for the last),   kappa_j = dt sum_{i>j} a_ij mu_i,   dL/dy0 = sum_i mu_i

and an output inside the step adds g to dL/dy0 and dt b_j(theta) g to kappa_j. Accepted steps are taken as given: where they
end depends on t only at the times of t themselves.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import formulas, ops
from ..captured import captured_tensors, earlier_results
from ..problem import Field, Problem
from ..solvers.trajectory import Evaluation, Recorder, Step

NO_SECOND_DERIVATIVE = (
    "this version of odenet_cuda gives first derivatives only: call backward or autograd.grad without create_graph=True"
)


def attach(
    recorder: Recorder, problem: Problem, ys: Sequence[Tensor], y0: Sequence[Tensor], t: Tensor, captured: Sequence[Tensor], stats: Any
) -> list[Tensor]:
    """ys, with a gradient for y0, t and the captured tensors."""
    return list(_Direct.apply(recorder, problem, tuple(ys), stats, len(y0), t, *y0, *captured))


def find_captured(field: Field, tape: Sequence[Step | Evaluation], since: int) -> list[Tensor]:
    """Every tensor outside of func, parameters and other, that an evaluation on the tape depends on."""
    found: dict[int, Tensor] = {}
    searched_earlier = False
    for evaluation in evaluations(tape):
        leaves, earlier = captured_tensors(evaluation.k, [evaluation.t, *evaluation.y], since)
        if earlier and not searched_earlier:
            searched_earlier = True
            found.update((id(tensor), tensor) for tensor in earlier_results(lambda e=evaluation: field(e.t, e.y)))
        found.update((id(tensor), tensor) for tensor in leaves)
    return list(found.values())


def evaluations(tape: Sequence[Step | Evaluation]) -> list[Evaluation]:
    flat: list[Evaluation] = []
    for entry in tape:
        flat.extend([entry] if isinstance(entry, Evaluation) else (e for e in entry.evaluations if e is not None))
    return flat


class _Direct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, recorder, problem, ys, stats, count, t, *tensors):
        ctx.recorder, ctx.problem, ctx.stats, ctx.count = recorder, problem, stats, count
        ctx.captured = tensors[count:]
        ctx.set_materialize_grads(False)
        return ys

    @staticmethod
    def backward(ctx, *grad_ys):
        if torch.is_grad_enabled():
            raise RuntimeError(NO_SECOND_DERIVATIVE)
        walk = BackwardWalk(ctx.problem, ctx.captured, grad_ys, ctx.needs_input_grad[5])
        for entry in reversed(ctx.recorder.tape):
            walk.undo(entry)
        grad_y0, grad_t, grad_captured = walk.result()
        return None, None, None, None, None, grad_t, *grad_y0, *grad_captured


class BackwardWalk:
    """Undoes the entries of a tape, last first."""

    def __init__(self, problem: Problem, captured: Sequence[Tensor], grad_ys: Sequence[Tensor | None], t_grad: bool):
        self.problem, self.captured, self.t_grad = problem, list(captured), t_grad
        self.grad_ys = [
            torch.zeros((len(problem.t), *leaf.shape), dtype=leaf.dtype, device=leaf.device) if grad is None else grad
            for grad, leaf in zip(grad_ys, problem.leaves, strict=True)
        ]
        self.lam = [torch.zeros_like(leaf) for leaf in problem.leaves]  # dL/dy where the walk has come to
        self.kappa: list[Tensor] | None = None  # dL/dk of the slope there; None: zero
        self.grad_captured: list[Tensor | None] = [None] * len(self.captured)
        self.grad_t = torch.zeros(len(problem.t), dtype=torch.float64, device=problem.device)
        self.one = torch.ones(problem.rows, dtype=torch.float64, device=problem.device)

    def undo(self, entry: Step | Evaluation) -> None:
        if isinstance(entry, Step):
            self._undo_step(entry)
        else:
            self._undo_evaluation(entry)

    def result(self) -> tuple[list[Tensor], Tensor, list[Tensor | None]]:
        grad_y0 = [lam + grad[0] for lam, grad in zip(self.lam, self.grad_ys, strict=True)]
        return grad_y0, self.grad_t, self.grad_captured

    # ---- one evaluation of func -----------------------------------------------------------------------------------

    def _vjp(self, evaluation: Evaluation, kappa: list[Tensor]) -> tuple[list[Tensor | None], Tensor | None]:
        """(dL/dY, dL/dt) of one evaluation; the captured tensors' gradients are added up on the side."""
        pairs = [(k, cot) for k, cot in zip(evaluation.k, kappa, strict=True) if k.requires_grad]
        if not pairs:
            return [None] * len(kappa), None
        inputs = [*evaluation.y, *([evaluation.t] if self.t_grad else []), *self.captured]
        grads = torch.autograd.grad(
            [k for k, _ in pairs], inputs, [cot for _, cot in pairs], allow_unused=True, retain_graph=True
        )
        n = len(evaluation.y)
        captured_grads = grads[n + self.t_grad :]
        have = [i for i, grad in enumerate(captured_grads) if grad is not None]
        old = [i for i in have if self.grad_captured[i] is not None]
        if old:
            torch._foreach_add_([self.grad_captured[i] for i in old], [captured_grads[i] for i in old])
        for i in have:
            if self.grad_captured[i] is None:
                self.grad_captured[i] = captured_grads[i].clone()
        return list(grads[:n]), grads[n] if self.t_grad else None

    def _undo_evaluation(self, evaluation: Evaluation) -> None:
        """A slope evaluated for itself: at the start, or anew beyond a discontinuity for the rows of its mask."""
        if self.kappa is None:
            return
        mask = evaluation.mask
        kappa = self.kappa if mask is None else [self._rows(mask, k) * k for k in self.kappa]
        mu, grad_t = self._vjp(evaluation, kappa)
        self.lam = [lam if m is None else lam + m for lam, m in zip(self.lam, mu, strict=True)]
        self.kappa = None if mask is None else [self._rows(~mask, k) * k for k in self.kappa]
        if grad_t is not None and evaluation.index is not None:
            self.grad_t[evaluation.index] += grad_t.sum()

    def _rows(self, per_row: Tensor, like: Tensor) -> Tensor:
        """[rows] shaped to multiply a leaf, in its real type."""
        return per_row.to(like.dtype.to_real()).reshape(-1, *[1] * (like.dim() - 1)) if like.dim() else per_row.to(like.dtype)[0]

    # ---- one step -------------------------------------------------------------------------------------------------

    def _undo_step(self, step: Step) -> None:
        points, leaves = len(step.a), len(self.problem.leaves)
        lam, kappa = self.lam, self.kappa
        held_lam = held_kappa = None
        if step.accept is not None:  # rows that were rejected passed y0 and k0 on
            held_lam = [self._rows(~step.accept, x) * x for x in lam]
            lam = [self._rows(step.accept, x) * x for x in lam]
            if kappa is not None:
                held_kappa = [self._rows(~step.accept, x) * x for x in kappa]
                kappa = [self._rows(step.accept, x) * x for x in kappa]
        base, lam, into_y0 = self._outputs(step, lam)
        # mu[leaf * slots + i] for the points i = 1 .. points; slot 0 is never read
        slots = points + 1
        mu: list[Tensor] = [lam[0]] * (slots * leaves)
        stage_t_grads: list[tuple[float, Tensor]] = []
        for i in range(points, 0, -1):
            cotangent = self._cotangent(step, i, mu, slots, base, kappa if i == points else None)
            evaluation = step.evaluations[i - 1]
            grads: Sequence[Tensor | None] = [None] * leaves
            if evaluation is not None and cotangent is not None:
                grads, grad_t = self._vjp(evaluation, cotangent)
                if grad_t is not None:
                    stage_t_grads.append((step.tableau.c[i], grad_t.reshape(-1).double()))
            for leaf in range(leaves):
                grad = grads[leaf]
                if i == points:
                    value = lam[leaf] if grad is None else lam[leaf] + grad
                else:
                    value = torch.zeros_like(lam[leaf]) if grad is None else grad
                mu[leaf * slots + i] = value
        self.kappa = self._cotangent(step, 0, mu, slots, base, None)
        self.lam = [torch.empty_like(leaf, memory_format=torch.contiguous_format) for leaf in lam]
        ops.stage(self.lam, into_y0, mu, [0.0] + [1.0] * points, self.one)
        if held_lam is not None:
            self.lam = [x + held for x, held in zip(self.lam, held_lam, strict=True)]
        if held_kappa is not None:
            self.kappa = held_kappa if self.kappa is None else [x + y for x, y in zip(self.kappa, held_kappa, strict=True)]
        if self.t_grad and (step.ends[0] or step.ends[1]):
            self._step_time_gradient(step, mu, slots, stage_t_grads)

    def _cotangent(
        self, step: Step, j: int, mu: list[Tensor], slots: int, base: list[list[Tensor]] | None, extra: list[Tensor] | None
    ) -> list[Tensor] | None:
        """kappa_j, or None where it is zero."""
        points = len(step.a)
        column = [0.0] * slots
        for i in range(j + 1, points + 1):
            column[i] = step.a[i - 1][j]
        addend = extra
        if base is not None and j < len(base):
            addend = base[j] if extra is None else [x + y for x, y in zip(extra, base[j], strict=True)]
        if not any(column):
            return addend
        kappa = [torch.empty_like(leaf, memory_format=torch.contiguous_format) for leaf in self.problem.leaves]
        ops.stage(kappa, addend or [], mu, column, step.dt)
        return kappa

    def _outputs(self, step: Step, lam: list[Tensor]) -> tuple[list[list[Tensor]] | None, list[Tensor], list[Tensor]]:
        """(what outputs add to each kappa_j, dL/dy1 with the outputs at the end, what outputs add to dL/dy0)."""
        base: list[list[Tensor]] | None = None
        into_y0: list[Tensor] = []
        for index, theta, mask in step.outputs:
            grads = [grad[index] for grad in self.grad_ys]
            if step.ends[1] is not None and step.ends[1][0] == index:  # the end of the step moves with this output: y1 itself
                at_end = step.ends[1][1]
                if at_end is None:
                    lam = [x + g for x, g in zip(lam, grads, strict=True)]
                    continue
                lam = [x + self._rows(at_end, g) * g for x, g in zip(lam, grads, strict=True)]
                continue
            inside = grads if mask is None else [self._rows(mask, g) * g for g in grads]
            self._output_time_gradient(step, index, theta, inside)
            weights = formulas.interpolant_weights(step.tableau, theta)
            if base is None:
                base = [[torch.zeros_like(g) for g in inside] for _ in weights]
                into_y0 = [torch.zeros_like(g) for g in inside]
            for into, weight in zip(base, weights, strict=True):
                factor = torch.as_tensor(weight, dtype=torch.float64, device=step.dt.device) * step.dt
                for total, g in zip(into, inside, strict=True):
                    total += self._rows(factor, g) * g
            for total, g in zip(into_y0, inside, strict=True):
                total += g
        return base, lam, into_y0

    # ---- derivatives by time --------------------------------------------------------------------------------------

    def _dot(self, g: Sequence[Tensor], x: Sequence[Tensor]) -> Tensor:
        """The inner product of two states, row by row, float64 [rows]."""
        rows = self.problem.rows
        return torch.stack([(a * b).reshape(rows, -1).double().sum(1) for a, b in zip(g, x, strict=True)]).sum(0)

    def _slopes(self, step: Step, weights: Sequence[Any]) -> list[Tensor]:
        """sum_j weights_j k_j; a weight is a number or float64 [rows]."""
        combined = []
        for y0, k in zip(step.y0, step.k, strict=True):
            shaped = [self._rows(w, y0) if isinstance(w, Tensor) else w for w in weights]
            combined.append(sum((w * slope for w, slope in zip(shaped, k, strict=False)), torch.zeros_like(y0)))
        return combined

    def _add_end(self, end: tuple[int, Tensor | None] | None, value: Tensor) -> None:
        if end is not None:
            index, mask = end
            self.grad_t[index] += (value if mask is None else value * mask).sum()

    def _output_time_gradient(self, step: Step, index: int, theta: float | Tensor, g: list[Tensor]) -> None:
        """theta = (t - t0) / dt, so an output inside a step moves with its own time and with both ends."""
        if not self.t_grad:
            return
        rates = []  # b_j'(theta)
        for row in step.tableau.p:
            rate: Any = 0.0
            for d in range(len(row) - 1, -1, -1):
                rate = rate * theta + (d + 1) * row[d]
            rates.append(rate)
        by_theta = self._dot(g, self._slopes(step, rates))
        by_dt = self._dot(g, self._slopes(step, formulas.interpolant_weights(step.tableau, theta)))
        self.grad_t[index] += by_theta.sum()
        self._add_end(step.ends[0], -(1 - theta) * by_theta - by_dt)
        self._add_end(step.ends[1], -theta * by_theta + by_dt)

    def _step_time_gradient(self, step: Step, mu: list[Tensor], slots: int, stage_t: list[tuple[float, Tensor]]) -> None:
        """A stage lies at t0 + c (t1 - t0), and dt = t1 - t0."""
        by_dt = torch.zeros_like(self.one)
        for i, row in enumerate(step.a, start=1):
            by_dt = by_dt + self._dot(mu[i::slots], self._slopes(step, row))
        if step.accept is not None:
            by_dt = by_dt * step.accept
        at_t0, at_t1 = -by_dt, by_dt
        for c, grad in stage_t:
            at_t0, at_t1 = at_t0 + (1 - c) * grad, at_t1 + c * grad
        self._add_end(step.ends[0], at_t0)
        self._add_end(step.ends[1], at_t1)
