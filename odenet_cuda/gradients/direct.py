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

from ..held import Captured
from ..problem import Problem
from ..products import Targets
from ..ranges import in_range
from ..solvers.trajectory import Evaluation, Recorder, Step
from .autocast import autocast_again, autocast_state
from .backward_walk import BackwardWalk
from .failed import known_cotangents, with_nan
from .one_by_one import one_by_one
from .release import kept, let_go
from .replay import SECOND, save_inputs, saved_inputs, second_gradients
from .same_func import refuse_another


def attach(
    recorder: Recorder,
    problem: Problem,
    ys: Sequence[Tensor],
    y0: Sequence[Tensor],
    t: Tensor,
    captured: Captured,
    stats: Any,
) -> list[Tensor]:
    """ys, with a gradient for y0, t and the captured tensors."""
    return list(_Direct.apply(recorder, problem, tuple(ys), captured, len(y0), t, *y0, *captured.tensors))


def evaluations(tape: Sequence[Step | Evaluation]) -> list[Evaluation]:
    flat: list[Evaluation] = []
    for entry in tape:
        flat.extend([entry] if isinstance(entry, Evaluation) else (e for e in entry.evaluations if e is not None))
    return flat


class _Direct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, recorder, problem, ys, captured, count, t, *tensors):
        ctx.recorder, ctx.problem, ctx.count, ctx.t_device = recorder, problem, count, t.device
        ctx.autocast = autocast_state(problem.device)
        ctx.captured = captured
        ctx.set_materialize_grads(False)
        save_inputs(ctx, t, tensors[:count])
        return ys

    @staticmethod
    @one_by_one
    @in_range("backward")
    def backward(ctx, *grad_ys):
        _ = ctx.saved_tensors  # says so where one was changed since
        recorder, problem, captured = kept(ctx, "recorder"), ctx.problem, ctx.captured
        grad_ys, spoilt = known_cotangents(problem, grad_ys)
        if torch.is_grad_enabled():
            captured.check()
            with autocast_again(ctx.autocast), captured.again():
                calls = evaluations([recorder.tape[0], *recorder.tape[-1:]])
                refuse_another(problem.field.again(), problem, [calls[0], calls[-1]], "direct", SECOND)
                inputs = saved_inputs(ctx, problem, recorder)
                found = second_gradients(recorder, problem, problem.field, inputs, captured.tensors, grad_ys)
            parts = found[: ctx.count], found[ctx.count], found[ctx.count + 1 :]
            grad_y0, grad_t, others = with_nan(spoilt, problem, *parts)
            return None, None, None, None, None, grad_t, *grad_y0, *others
        keep = not let_go(ctx, "recorder", "captured", "problem")
        tensors = captured.tensors
        targets = Targets(tensors, ctx.next_functions[-len(tensors) :] if tensors else ())
        with captured.again():
            grads = way_back(recorder, problem, targets, grad_ys, ctx.needs_input_grad[5], keep)
        grad_y0, grad_t, grad_captured = with_nan(spoilt, problem, *grads)
        return None, None, None, None, None, grad_t.to(ctx.t_device), *grad_y0, *grad_captured


def way_back(
    recorder: Recorder,
    problem: Problem,
    captured: Targets,
    grad_ys: Sequence[Tensor | None],
    t_grad: bool,
    keep: bool = True,
) -> tuple[list[Tensor], Tensor, list[Tensor | None]]:
    """The gradients for y0, t and the captured tensors. keep: the tape stays; else each entry goes when it is undone."""
    walk = BackwardWalk(problem, recorder, captured, grad_ys, t_grad)
    tape = list(recorder.tape) if keep else recorder.tape
    while tape:
        walk.undo(tape.pop())
    return walk.result()
