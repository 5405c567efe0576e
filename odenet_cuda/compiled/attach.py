"""The gradient of a compiled solve."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..gradients.failed import known_cotangents, with_nan
from ..gradients.first_only import first_only, links
from ..gradients.one_by_one import one_by_one
from ..gradients.release import kept, let_go
from ..gradients.same_func import OTHER_SLOPE
from ..problem import Structure
from ..ranges import in_range
from .engine import Engine
from .plan import Plan
from .reverse import adjoint, reverse


class Sources:
    """The tensors that get gradients: the leaves of y0, the arguments with one entry a sample, and constants of func.

    chosen: those that may besides y0 and the times, None: all. idle: how many of these func does not depend on; they come after
    the others and get zeros. t: whether the times come last.
    """

    def __init__(
        self,
        plan: Plan,
        structure: Structure,
        args: Sequence[Any],
        chosen: Sequence[Tensor] | None = None,
        t: Tensor | None = None,
    ):
        self.all: list[Tensor] = []
        self.trained: list[Tensor] = []
        self.idle = 0
        if torch.is_grad_enabled():
            self.trained = [place(args) for place in plan.wanted]
            found = [*(args[i] for i in plan.batched), *self.trained]
            if chosen is not None:
                wanted, known = {id(x) for x in chosen}, {id(x) for x in found}
                idle = {id(x): x for x in chosen if x.requires_grad and id(x) not in known}
                found = [*(x if id(x) in wanted else x.detach() for x in found), *idle.values()]
                self.idle = len(idle)
            self.all = [*structure.leaves, *found]
        self.t = t is not None and t.requires_grad and torch.is_grad_enabled()
        if t is not None and self.t:
            self.all.append(t)
        self.wanted = any([x.requires_grad for x in self.all])


def attach(
    engine: Engine, gradient: str, backward: Any, ys: list[Tensor], stats: Any, again: Callable[[], list[Tensor]]
) -> list[Tensor]:
    """ys with a gradient for y0, arguments and what func depends on. again(): the outputs once more by the stepper, with a
    gradient that has one itself."""
    outputs = tuple([y.detach() if y._is_view() else y for y in ys])  # so that they may be written into
    return list(_Compiled.apply(engine, (gradient, backward, stats, again), outputs, *engine.sources.all))


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, engine, how, ys, *tensors):
        ctx.engine, ctx.how, ctx.count, ctx.links = engine, how, len(tensors), links(tensors)
        frozen = engine.constants.besides(tensors)  # the backward pass reads it too, where it lies
        outputs = ys if how[0] == "adjoint" else ()  # which it goes on from; they belong to the user too
        ctx.save_for_backward(*tensors, *outputs, *frozen)
        return ys

    @staticmethod
    @one_by_one
    @in_range("backward")
    def backward(ctx, *grad_ys):
        if torch.is_grad_enabled() and ctx.how[0] != "adjoint":
            return _by_stepper(ctx, *grad_ys)
        return _by_kernel(ctx, *grad_ys)


def _kept(ctx: Any, grad_ys: Sequence[Tensor | None]) -> tuple[Engine, Sequence[Tensor], Sequence[Tensor | None], Any]:
    """The engine, the saved tensors, the gradients with zeros for those that are not known, and where these spoil others."""
    saved = ctx.saved_tensors  # says so where one was changed since, a frozen one too
    engine = kept(ctx, "engine")
    grad_ys, spoilt = known_cotangents(engine.problem, grad_ys)
    let_go(ctx, "engine")
    return engine, saved, grad_ys, spoilt


def _by_stepper(ctx: Any, *grad_ys: Tensor | None) -> tuple:
    """With create_graph: the stepper's gradient has one itself."""
    gradient, _, _, again = ctx.how
    engine, saved, cotangents, _ = _kept(ctx, grad_ys)
    if not engine.unchanged():
        raise RuntimeError(OTHER_SLOPE.format(gradient, " where the gradient has one itself"))
    wanted = [(i, tensor) for i, tensor in enumerate(saved[: ctx.count]) if tensor.requires_grad]
    sources = [tensor for _, tensor in wanted]
    grads = torch.autograd.grad(again(), sources, cotangents, create_graph=True, allow_unused=True)
    found: list[Any] = [None] * ctx.count
    for (i, _), grad in zip(wanted, grads, strict=True):
        found[i] = grad
    return None, None, None, *found


@first_only("gradient='adjoint' has no second derivative; use gradient='direct' or 'checkpoint', which have")
def _by_kernel(ctx: Any, *grad_ys: Tensor | None) -> tuple:
    gradient, backward, stats, _ = ctx.how
    engine, saved, cotangents, spoilt = _kept(ctx, grad_ys)
    tensors, ys = saved[: ctx.count], saved[ctx.count : ctx.count + len(grad_ys)]
    start = time.perf_counter()
    with torch.no_grad():
        gys: list[Any] = list(cotangents)
        parts = adjoint(engine, backward, ys, gys, stats) if gradient == "adjoint" else reverse(engine, gys)
        y0, t, others = with_nan(spoilt, engine.problem, parts[0], parts[3], [*parts[1], *parts[2]])
    stats.nfe_backward = engine.nfe_backward
    if gradient != "direct":  # there torch goes back along func's own graph
        engine.plan.count(engine.nfe_backward, engine.args)
    engine.plan.watch.add(time.perf_counter() - start, solves=0)
    idle = tensors[len(y0) + len(others) :][: engine.sources.idle]
    flat = [*y0, *others, *map(torch.zeros_like, idle), *([t.to(tensors[-1])] if t is not None else [])]
    shaped = [g if g is None or g.shape == x.shape else g.reshape(x.shape) for g, x in zip(flat, tensors, strict=True)]
    return None, None, None, *shaped
