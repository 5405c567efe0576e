"""Batched gradients, `torch.autograd.grad(is_grads_batched=True)` and its kin: a backward pass for each of them.

The kernels cannot see the axis that vmap hides in a gradient, so the backward passes are made one after another outside of it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

_functorch = torch._C._functorch


def one_by_one(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """backward(ctx, *grads) of an autograd.Function, for batched gradients too."""

    @wraps(backward)
    def call(ctx: Any, *grads: Tensor | None) -> tuple:
        given = [grad for grad in grads if grad is not None]
        if any([_functorch.is_legacy_batchedtensor(grad) for grad in given]):
            level = _nesting()
            # Size 1 repeats what has no such axis: that is seen by its length.
            plain = [grad if grad is None else torch._remove_batch_dim(grad, level, 1, 0) for grad in grads]
            with _outside(level):
                found = _each(backward, ctx, plain)
            return tuple([x if x is None else torch._add_batch_dim(x, 0, level) for x in found])
        if any([_functorch.is_batchedtensor(grad) for grad in given]):
            level = _functorch.maybe_current_level() or 0
            plain = [grad if grad is None else _functorch._remove_batch_dim(grad, level, 1, 0) for grad in grads]
            with temporarily_clear_interpreter_stack():
                found = _each(backward, ctx, plain)
            return tuple([x if x is None else _functorch._add_batch_dim(x, 0, level) for x in found])
        return backward(ctx, *grads)

    return call


def _each(backward: Callable[..., tuple], ctx: Any, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The results for each entry on axis 0, in one; an axis of length 1 may count for all."""
    given = [grad for grad in grads if grad is not None]
    if any([_functorch.is_functorch_wrapped_tensor(x) or _functorch.is_legacy_batchedtensor(x) for x in given]):
        raise NotImplementedError("the backward pass of a solve serves one level of torch.vmap, got several: use a loop")
    size = max([len(grad) for grad in given])
    passes = []
    try:
        for i in range(size):
            ctx.more_to_come = i < size - 1  # what the solve kept is needed again
            passes.append(backward(ctx, *[x if x is None else x.expand(size, *x.shape[1:])[i] for x in grads]))
    finally:
        ctx.more_to_come = False
    found: list[Tensor | None] = []
    for parts in zip(*passes, strict=True):
        like = next((part for part in parts if part is not None), None)
        found.append(None if like is None else torch.stack([torch.zeros_like(like) if x is None else x for x in parts]))
    return found


def _nesting() -> int:
    """How many vmaps of the older kind we are in."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return level


@contextmanager
def _outside(level: int) -> Iterator[None]:
    """Outside of these vmaps: func may draw random numbers there."""
    for _ in range(level):
        torch._C._vmapmode_decrement_nesting()
    try:
        yield
    finally:
        for _ in range(level):
            torch._C._vmapmode_increment_nesting()
