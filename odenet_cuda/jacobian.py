"""df/dy and df/dt of func, sample by sample: what implicit methods solve linear systems with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .sparsity import Sparsity

Known = Callable[..., Tensor] | Sparsity | None  # what the user knows of df/dy
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
    jac: Known = None,
) -> Linearized:
    """By reverse mode: as many products as a system has numbers, each for all systems at once.

    rows: of step control. Under joint control samples on axis 0 of all leaves, which have another axis, are systems of their
    own if func does not couple them, unless `apart` is False. That is looked at every time, by one more product with random
    signs; where it does, the whole state is one system. by_time: df/dt is wanted. Where gradients are recorded k has a graph,
    and, if they are to be `differentiable`, so have dy and dt. jac: df/dy as the user gives it, [samples, n, n], or [n, n] of
    the whole state; used but where dy must have a graph; or its pattern, by which there are fewer products, and which says how
    many numbers a system has. Raises ValueError where func cannot be differentiated,
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
        pattern = jac if isinstance(jac, Sparsity) else None
        if jac is not None and not isinstance(jac, Sparsity) and not again:
            if by_time and not slopes[0].requires_grad:
                _refuse_time(field, t, y, slopes)
            return _given(jac, slopes, t, y, by_time, recording)
        systems = rows if rows > 1 else _samples(y) if apart else 1
        if pattern is not None:
            systems = sum([leaf.numel() for leaf in y]) // pattern.n
        k = flat(slopes, systems)
        if not k.requires_grad:
            _refuse_hidden(field, t, y, k)
            return Linearized(systems, k, k.new_zeros(systems, k.shape[1], k.shape[1]), None)
        dy = _by_y(k, y, systems, again) if pattern is None else _by_pattern(pattern, k, y, again)
        if pattern is None and rows == 1 < systems and _coupled(k, y, dy):
            systems = 1
            k = flat(slopes, 1)
            dy = _by_y(k, y, 1, again)
        dt = _by_t(k, t, again) if by_time else None
        return Linearized(systems, k if recording else k.detach(), dy, dt)


def products(jac: Known, n: int) -> int:
    """How many of func df/dy of n numbers takes; of the user's it is not known."""
    return n if jac is None else len(jac.directions) if isinstance(jac, Sparsity) else 0


def _given(
    jac: Callable[..., Tensor], slopes: list[Tensor], t: Tensor, y: Sequence[Tensor], by_time: bool, recording: bool
) -> Linearized:
    """With df/dy as the user gives it."""
    with torch.no_grad():
        dy = jac(t.detach(), [leaf.detach() for leaf in y])
    systems = 1 if dy.dim() == 2 else len(dy)
    k, dy, dt = flat(slopes, systems), dy.reshape(systems, *dy.shape[-2:]), None
    if by_time and k.requires_grad:
        dt = _by_t(k, t, False)
    return Linearized(systems, k if recording else k.detach(), dy, dt)


def _refuse_time(field: Callable[..., Any], t: Tensor, y: Sequence[Tensor], k: Sequence[Tensor]) -> None:
    """Where what func returns has no graph, it must not depend on the time: df/dt would be missing."""
    with torch.no_grad():
        step = torch.finfo(t.dtype).eps ** 0.5
        other = field(t.detach() * (1 + step) + step, [leaf.detach() for leaf in y], 0)
    if not all([torch.equal(a, b.detach()) for a, b in zip(other, k, strict=True)]):
        raise ValueError(
            "func depends on the time, but what it returns has no graph by which this method could differentiate it: write it "
            "in torch's operations, or use method='kvaerno5', which needs df/dy alone"
        )


def checked_jac(jac: Callable[..., Any], y0: Sequence[Tensor], rows: int) -> Callable[..., Tensor]:
    """The user's jac over leaves, with its result checked. rows: of per-sample control, else 0. Raises TypeError, ValueError
    where that is wrong, or the state has several leaves."""
    if not callable(jac):
        raise TypeError(f"jac must be callable as jac(t, y), got {type(jac).__name__}")
    if len(y0) != 1:
        raise ValueError(f"jac is served for a state that is one tensor, got {len(y0)} leaves")
    leaf, samples = y0[0], rows or _samples(y0)
    n = leaf.numel() // max(samples, 1)
    allowed = [] if leaf.dim() < 2 else [[samples, n, n]]
    if not rows:
        allowed.append([leaf.numel(), leaf.numel()])

    def call(t: Tensor, y: Sequence[Tensor]) -> Tensor:
        found = jac(t, y[0])
        if not isinstance(found, Tensor):
            raise TypeError(f"jac must return a tensor, got {type(found).__name__}")
        if list(found.shape) not in allowed:
            raise ValueError(f"jac must return df/dy of shape {' or '.join(map(str, allowed))}, got {list(found.shape)}")
        return found.to(leaf.device, leaf.dtype)

    return call


def refuse_other_jac(jac: Callable[..., Tensor], t: Tensor, y: Sequence[Tensor], k: Sequence[Tensor]) -> None:
    """k: of func, at y, perhaps with a graph. Raises ValueError where jac is not its derivative: one product tells."""
    if not k[0].requires_grad or not y[0].requires_grad:
        return
    generator = torch.Generator("cpu").manual_seed(_SEED)
    w = torch.randn(k[0].shape, generator=generator, dtype=torch.float64, device="cpu").to(k[0].device, k[0].dtype)
    (right,) = torch.autograd.grad(k[0], y[0], w, retain_graph=True, materialize_grads=True)
    with torch.no_grad():
        dy = jac(t.detach(), [y[0].detach()])
        dy = dy[None] if dy.dim() == 2 else dy
        found = (w.reshape(len(dy), 1, -1) @ dy).reshape(right.shape)
        size = (w.abs().reshape(len(dy), 1, -1) @ dy.abs()).reshape(right.shape)
        apart = (found - right).abs() > 1e-3 * (size + right.abs())
    if bool(apart.any()):
        place = tuple(int(i) for i in apart.nonzero()[0])
        raise ValueError(
            "jac must give df/dy, [..., i, j] the derivative of slope i by number j of y: at the start a product with it "
            f"is {float(found[place]):.6g} at {list(place)}, and {float(right[place]):.6g} by func itself"
        )


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


def _by_pattern(pattern: Sparsity, k: Tensor, y: Sequence[Tensor], recording: bool) -> Tensor:
    def product(v: Tensor, differentiable: bool) -> Tensor:
        grads = torch.autograd.grad(k, y, v, retain_graph=True, create_graph=differentiable, materialize_grads=True)
        return flat(grads, len(k))

    return pattern.jacobian(product, k.detach(), recording)


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
