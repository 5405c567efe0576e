"""Backward passes that have no backward pass: with create_graph=True they give their gradients, and whoever differentiates
these, by whatever they depend on, is told so in words."""

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def first_only(words: str) -> Callable[[Callable[..., tuple]], Callable[..., tuple]]:
    """For backward(ctx, *grads) of an autograd.Function whose forward has set ctx.links to `links` of its inputs. words: of
    the RuntimeError that a second derivative raises."""

    def wrapped(backward: Callable[..., tuple]) -> Callable[..., tuple]:
        @wraps(backward)
        def call(ctx: Any, *grads: Tensor | None) -> tuple:
            if not torch.is_grad_enabled():
                return backward(ctx, *grads)
            with torch.no_grad():
                found = backward(ctx, *[grad if grad is None else grad.detach() for grad in grads])
            gradients = [x for x in found if x is not None]
            ends = iter(End.apply(words, len(gradients), *gradients, *ctx.links, *links(grads)))
            return tuple([x if x is None else next(ends) for x in found])

        return call

    return wrapped


def links(tensors: Iterable[Any]) -> list[Tensor]:
    """Those that have a gradient: what the gradients of a pass depend on."""
    return [x for x in tensors if isinstance(x, Tensor) and x.requires_grad]


class End(torch.autograd.Function):
    """The first `count` tensors themselves, where they have no gradient for the rest: RuntimeError, in these words."""

    @staticmethod
    def forward(ctx, words, count, *tensors):
        ctx.words = words
        return tuple([x.clone() for x in tensors[:count]])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(ctx.words)
