"""Integrals over time of functions of (t, y), solved along with the state as quadratures."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .problem import Problem, Structure


class Integrand:
    """``integrals(t, y)`` over leaves, with the structure of what it gives, learnt by one call at the start.

    Raises TypeError and ValueError where that is no tensor of numbers, or no nest of them, or has no row for each sample.
    """

    def __init__(self, func: Callable[..., Any], problem: Problem, unflatten: Callable[[Sequence[Tensor]], Any]):
        if not callable(func):
            raise TypeError(f"integrals must be callable as integrals(t, y), got {type(func).__name__}")
        self.func, self.unflatten = func, unflatten
        with torch.no_grad():
            first = func(problem.start_time(False), unflatten([leaf.clone() for leaf in problem.state_leaves]))
        try:
            self.structure = Structure(first).without_graph()
        except (TypeError, ValueError):
            raise TypeError(f"integrals must return a tensor or a nest of them, got {type(first).__name__}") from None
        self.like: list[Tensor] = []
        for leaf in self.structure.leaves:
            if not (leaf.is_floating_point() or leaf.is_complex()):
                raise TypeError(f"integrals must return floating or complex numbers, got {leaf.dtype}")
            if problem.per_sample and leaf.shape[:1] != (problem.rows,):
                raise ValueError(
                    f"integrals must return a row for each sample, [{problem.rows}, ...], got shape {list(leaf.shape)}"
                )
            if leaf.device != problem.device:
                raise ValueError(f"integrals must return the device of y0, {problem.device}, got {leaf.device}")
            self.like.append(torch.empty_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32)))

    def rates(self, t: Tensor, y: Sequence[Tensor]) -> list[Tensor]:
        """The leaves of its value, in memory of their own."""
        found = self.structure.flatten(self.func(t, self.unflatten(list(y))))
        for leaf, like in zip(found, self.like, strict=True):
            if leaf.shape != like.shape:
                raise ValueError(f"integrals must return one shape, {list(like.shape)} as at the start, got {list(leaf.shape)}")
        return [leaf.to(like.dtype, copy=True).contiguous() for leaf, like in zip(found, self.like, strict=True)]


def with_quadratures(problem: Problem, like: Sequence[Tensor], in_norm: bool) -> Problem:
    """The problem with these integrals from 0 on as its last leaves. in_norm: their errors count, by the tolerances of the
    first leaf. Raises ValueError where those are no numbers, or the norm is the user's."""
    rtol, atol = (problem.rtol[0], problem.atol[0]) if in_norm else (0.0, 1.0)
    if in_norm and (isinstance(rtol, Tensor) or isinstance(atol, Tensor) or problem.norm is not None):
        raise ValueError("integrals_in_norm needs rtol and atol that are numbers, and no norm of the user")
    return replace(
        problem,
        leaves=[*problem.leaves, *[torch.zeros_like(x) for x in like]],
        rtol=[*problem.rtol, *[rtol] * len(like)],
        atol=[*problem.atol, *[atol] * len(like)],
        quadratures=problem.quadratures + len(like),
        quadratures_in_norm=in_norm,
    )
