"""df/dy of a known pattern of zeros, from a few products: columns that share no line, or lines that share no column, come in
one product with the sum of their directions (Curtis, Powell and Reid 1974, doi 10.1093/imamat/13.1.117).
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .blocks import Blocks, blocks_of

MOST = 8192  # numbers of one system
NARROW_FROM = 128  # numbers, from which on systems of a narrow pattern are solved in blocks
_SEED = 0x5EED  # of the directions by which a wrong pattern is found


class Sparsity:
    """The pattern of df/dy, [n, n], coloured.

    lines, columns: of its entries, [entries]; places: in [n * n]. by_lines: products are with lines, v^T J, else with columns,
    J v, each of which takes two of the former. colour: of each entry, the product that it comes from. directions: [products,
    n]. blocks: by which systems with it are solved, None where it is too wide.
    """

    def __init__(self, pattern: Tensor):
        """pattern: bool [n, n], on the device of the state."""
        self.n = len(pattern)
        self.lines, self.columns = pattern.nonzero(as_tuple=True)
        self.places = self.lines * self.n + self.columns
        lines, columns = self.lines.tolist(), self.columns.tolist()
        of_lines, of_columns = coloured(self.n, lines, columns), coloured(self.n, columns, lines)
        self.by_lines = max(of_lines, default=0) <= 2 * max(of_columns, default=0)
        colours = torch.tensor(of_lines if self.by_lines else of_columns, dtype=torch.int64, device=pattern.device)
        self.colour = colours[self.lines if self.by_lines else self.columns]
        products = torch.arange(int(colours.max()) + 1 if self.n else 0, device=pattern.device)
        self.directions = products[:, None] == colours

    def jacobian(self, product: Callable[[Tensor, bool], Tensor], like: Tensor, differentiable: bool) -> Tensor:
        """df/dy, [systems, n, n]. product: v^T J of all systems for v [systems, n], with a graph to v and to all that J depends
        on where its second argument says so. like: slopes, [systems, n]. Raises ValueError where the pattern misses entries."""
        found = []
        push = None if self.by_lines else _along_columns(product, like)
        for direction in self.directions.to(like.dtype):
            v = direction.expand_as(like)
            found.append(product(v, differentiable) if push is None else push(v, differentiable))
        systems = len(like)
        entries = torch.stack(found, 0)[self.colour, :, self.columns if self.by_lines else self.lines]  # [entries, systems]
        dy = like.new_zeros(systems, self.n * self.n).index_copy_(1, self.places, entries.T)
        dy = dy.reshape(systems, self.n, self.n)
        self._check(product, entries.detach().T, like)
        return dy

    @cached_property
    def blocks(self) -> Blocks | None:
        return blocks_of(self.n, self.lines, self.columns) if self.n >= NARROW_FROM else None

    def _check(self, product: Callable[[Tensor, bool], Tensor], entries: Tensor, like: Tensor) -> None:
        """By one more product, with random numbers, others for each system: a func that couples systems is found so too."""
        generator = torch.Generator("cpu").manual_seed(_SEED)
        w = torch.rand(like.shape, generator=generator, dtype=torch.float64, device="cpu").to(like.device, like.dtype) + 0.5
        right = product(w, False).detach()
        parts = w[:, self.lines] * entries  # [systems, entries]
        found, size = [torch.zeros_like(like).index_add(1, self.columns, x) for x in (parts, parts.abs())]
        apart = (found - right).abs() > torch.finfo(like.dtype).eps ** 0.5 * (size + right.abs())
        if bool(apart.any()):
            system, column = apart.nonzero()[0].tolist()
            alone = (
                "" if len(like) == 1 else f", or func couples system {system} with others, whose pattern is of the whole state"
            )
            raise ValueError(
                f"jac_sparsity must be True wherever df/dy may be other than 0: column {column} of df/dy has entries outside "
                f"of it, which add up to {float((right - found)[apart][0]):.3g} in a product{alone}"
            )

    @property
    def transposed(self) -> "Sparsity":
        """Of the adjoint's systems."""
        pattern = torch.zeros(self.n, self.n, dtype=torch.bool, device=self.lines.device)
        pattern[self.columns, self.lines] = True
        return Sparsity(pattern)


def _along_columns(product: Callable[[Tensor, bool], Tensor], like: Tensor) -> Callable[[Tensor, bool], Tensor]:
    """J v, as the derivative by w of (w^T J) v, which is linear in w."""
    with torch.enable_grad():
        w = torch.zeros_like(like, requires_grad=True)
        pulled = product(w, True)

    def push(v: Tensor, differentiable: bool) -> Tensor:
        if not pulled.requires_grad:
            return torch.zeros_like(like)
        (found,) = torch.autograd.grad(pulled, w, v, retain_graph=True, create_graph=differentiable, materialize_grads=True)
        return found

    return push


def coloured(n: int, of: Sequence[int], other: Sequence[int]) -> list[int]:
    """A colour for each of n lines, so that no two of one colour meet in a column; of, other: the line and the column of each
    entry. Greedy, those with the most entries first."""
    meets: list[list[int]] = [[] for _ in range(n)]
    for line, column in zip(of, other, strict=True):
        meets[line].append(column)
    taken, colours = [0] * n, [0] * n  # taken: the colours that meet in a column, as bits
    for line in sorted(range(n), key=lambda line: -len(meets[line])):
        used = 0
        for column in meets[line]:
            used |= taken[column]
        colours[line] = (~used & (used + 1)).bit_length() - 1
        for column in meets[line]:
            taken[column] |= 1 << colours[line]
    return colours


def checked_sparsity(given: Any, y0: Sequence[Tensor], rows: int) -> Sparsity:
    """The pattern that the user gave. rows: of per-sample control, else 0. Raises TypeError, ValueError where it is wrong."""
    if not isinstance(given, Tensor):
        raise TypeError(f"jac_sparsity must be a tensor [n, n], dense or sparse, got {type(given).__name__}")
    if given.dim() != 2 or given.shape[0] != given.shape[1]:
        raise ValueError(f"jac_sparsity must have shape [n, n], got {list(given.shape)}")
    if given.is_complex() or given.requires_grad:
        raise ValueError(f"jac_sparsity must be a pattern of bool, or of real numbers without a gradient, got {given.dtype}")
    numbers, n = sum([leaf.numel() for leaf in y0]), len(given)
    samples = {leaf.shape[0] for leaf in y0 if leaf.dim() > 1} if all([leaf.dim() > 1 for leaf in y0]) else set()
    allowed = {numbers // max(rows, 1)} if rows else {numbers, *[numbers // max(count, 1) for count in samples]}
    if n not in allowed:
        sizes = " or ".join([f"[{size}, {size}]" for size in sorted(allowed)])
        raise ValueError(f"jac_sparsity must have shape {sizes}, a line for each number of a system, got {list(given.shape)}")
    if n > MOST:
        raise NotImplementedError(f"jac_sparsity is served for systems of up to n = {MOST} numbers, got n = {n}")
    dense = given.detach().to_dense() if given.layout != torch.strided else given.detach()
    return Sparsity((dense != 0).to(y0[0].device))
