"""df/dy and df/dt of func, sample by sample: what implicit methods solve linear systems with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOST = 2048  # numbers of one system
_SEED = 0x5EED  # of the signs by which coupled samples are found


def flat(leaves: Sequence[Tensor], systems: int) -> Tensor:
    """Leaves as [systems, numbers of one]."""
    parts = [leaf.reshape(systems, -1) for leaf in leaves]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def as_leaves(x: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The reverse of `flat`."""
    parts = x.split([leaf.numel() // len(x) for leaf in like], 1) if len(like) > 1 else [x]
    return [part.reshape(leaf.shape) for part, leaf in zip(parts, like, strict=True)]


@dataclass(frozen=True, slots=True)
class Linearized:
    """func beside (t, y). systems: how many it falls into. k: [systems, n], its slopes. dy: [systems, n, n], d f_i / d y_j of
    each. dt: [systems, n], None where func does not depend on the time, or where that was not asked for."""

    systems: int
    k: Tensor
    dy: Tensor
    dt: Tensor | None


def linearize(
    field: Callable[..., list[Tensor]],
    t: Tensor,
    y: Sequence[Tensor],
    rows: int,
    stage: int = 0,
    *,
    by_time: bool = True,
    apart: bool = True,
    differentiable: bool = True,
) -> Linearized:
    """By reverse mode: as many products as a system has numbers, each for all systems at once.

    rows: of step control. Under joint control samples on axis 0 of all leaves, which have another axis, are systems of their
    own if func does not couple them, unless `apart` is False. That is looked at every time, by one more product with random
    signs; where it does, the whole state is one system. by_time: df/dt is wanted. Where gradients are recorded k has a graph,
    and, if they are to be `differentiable`, so have dy and dt. Raises ValueError where func cannot be differentiated,
    NotImplementedError where a system has more than MOST numbers or the state is not float32 or float64.
    """
    if any([leaf.dtype not in (torch.float32, torch.float64) for leaf in y]):
        kinds = ", ".join(sorted({str(leaf.dtype).removeprefix("torch.") for leaf in y}))
        raise NotImplementedError(f"an implicit method solves systems in float32 or float64, y0 is {kinds}")
    recording = torch.is_grad_enabled()
    again = recording and differentiable
    with torch.enable_grad():
        y = [leaf if recording and leaf.requires_grad else leaf.detach().requires_grad_() for leaf in y]
        if by_time and not (recording and t.requires_grad):
            t = t.detach().requires_grad_()
        slopes = field(t, y, stage)
        systems = rows if rows > 1 else _samples(y) if apart else 1
        k = flat(slopes, systems)
        if not k.requires_grad:
            _refuse_hidden(field, t, y, k)
            return Linearized(systems, k, k.new_zeros(systems, k.shape[1], k.shape[1]), None)
        dy = _by_y(k, y, systems, again)
        if rows == 1 < systems and _coupled(k, y, dy):
            systems = 1
            k = flat(slopes, 1)
            dy = _by_y(k, y, 1, again)
        dt = _by_t(k, t, again) if by_time else None
        return Linearized(systems, k if recording else k.detach(), dy, dt)


def _samples(y: Sequence[Tensor]) -> int:
    """How many systems the state may be under joint control."""
    counts = {leaf.shape[0] if leaf.dim() > 1 else 1 for leaf in y}
    return counts.pop() if len(counts) == 1 else 1


def _by_y(k: Tensor, y: Sequence[Tensor], systems: int, recording: bool) -> Tensor:
    n = k.shape[1]
    if n > MOST:
        raise NotImplementedError(
            f"an implicit method factorises a matrix of n x n numbers for each system that func is, up to n = {MOST}: here n = "
            f"{n}. If axis 0 of y0 is a batch that func does not couple, give y0 another axis, or step_control='per_sample'"
        )
    lines = []
    for i in range(n):
        grads = torch.autograd.grad(k[:, i].sum(), y, retain_graph=True, create_graph=recording, materialize_grads=True)
        lines.append(flat(grads, systems))
    return torch.stack(lines, 1)


def _coupled(k: Tensor, y: Sequence[Tensor], dy: Tensor) -> bool:
    """Whether a slope of one sample depends on another sample, for which the lines of dy are sums over samples."""
    generator = torch.Generator("cpu").manual_seed(_SEED)
    signs = torch.randint(2, k.shape, generator=generator, dtype=torch.int8, device="cpu") * 2 - 1
    weights = signs.to(k.device, k.dtype)
    together = flat(torch.autograd.grad(k, y, weights, retain_graph=True, materialize_grads=True), len(k))
    alone = dy.detach()
    apart = (together - (weights[:, None, :] @ alone)[:, 0]).abs()
    return bool((apart > torch.finfo(k.dtype).eps ** 0.5 * alone.abs().sum(1)).any())


def _by_t(k: Tensor, t: Tensor, recording: bool) -> Tensor | None:
    """df/dt for all numbers at once: the product with w is linear in w, and this is its derivative by w."""
    w = torch.zeros_like(k, requires_grad=True)
    (product,) = torch.autograd.grad(k, t, w, retain_graph=True, create_graph=True, allow_unused=True)
    if product is None or not product.requires_grad:
        return None
    return torch.autograd.grad(product.sum(), w, create_graph=recording, retain_graph=True, materialize_grads=True)[0]


def _refuse_hidden(field: Callable[..., Any], t: Tensor, y: Sequence[Tensor], k: Tensor) -> None:
    """Where what func returns has no graph, it must not depend on y."""
    with torch.no_grad():
        step = torch.finfo(k.dtype).eps ** 0.5
        other = flat(field(t.detach(), [leaf.detach() * (1 + step) + step for leaf in y], 0), len(k))
    if not torch.equal(other, k):
        raise ValueError(
            "func depends on y, but what it returns has no graph by which an implicit method could differentiate it: write it "
            "in torch's operations, without detach() and no_grad(), or use an explicit method"
        )
