"""Inputs that were sampled in time, as a function of the time for use in func."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from .problem import check_times

KINDS = ("linear", "cubic", "hold")


class Interpolated(nn.Module):
    """A function of time through values at given times: ``u = Interpolated(times, values)``, and ``u(t)`` in func.

    times: [T], at least two, strictly increasing, in units of t; numbers or a tensor without a gradient.
    values: [T, ...], real or complex; a Parameter is one of this module's; gradients go to them.
    kind: "linear"; "cubic", the natural spline (second derivatives are continuous, and zero at the ends); "hold", the value at
        the last time that is not after t.
    per_sample: values are [T, batch, ...], each sample's own at common times. Else all samples have the same.

    Called with t as func gets it: a 0-dimensional tensor gives values.shape[1:]; one of shape [batch, 1, ...], as under
    per-sample control, gives [batch, ...], each sample at its own time. Before the first time and after the last nothing is
    known: there the result is NaN, so a solve that goes there fails in words.

    Where the function is not smooth a solve must step to: an adaptive solve whose func is a Module with this one somewhere in
    it does so by itself, with the times inside its span as `step_t` ("linear") or `jump_t` ("hold"). For another func give
    ``jump_t=u.jump_t`` and ``step_t=u.step_t``.

    Raises ValueError and TypeError for wrong arguments.
    """

    times: Tensor
    values: Tensor
    curvature: Tensor | None

    def __init__(self, times: Any, values: Tensor, kind: str = "linear", per_sample: bool = False):
        super().__init__()
        found, numbers = check_times(times, "times")
        if len(numbers) < 2 or numbers[1] < numbers[0]:
            raise ValueError(f"times must hold at least two, in increasing order, got {numbers[:4]}")
        if found.requires_grad:
            raise ValueError("times must not require a gradient: solves step to them as to numbers")
        if not isinstance(values, Tensor) or not (values.is_floating_point() or values.is_complex()):
            got = values.dtype if isinstance(values, Tensor) else type(values).__name__
            raise TypeError(f"values must be a floating or complex tensor, got {got}")
        if values.dim() < 1 + per_sample or len(values) != len(numbers):
            shape = f"[{len(numbers)}, {'batch, ' if per_sample else ''}...]"
            raise ValueError(f"values must have shape {shape}, got {list(values.shape)}")
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
        self.kind, self.per_sample = kind, bool(per_sample)
        self.knots = tuple(numbers)
        # Not in the state dict: a solve steps to the knots, which are numbers.
        exact = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        self.register_buffer("times", exact.to(values.device), persistent=False)
        curvature = _natural(exact) if kind == "cubic" else None
        self.register_buffer("curvature", None if curvature is None else curvature.to(values.device), persistent=False)
        if isinstance(values, nn.Parameter):
            self.values = values
        else:
            self.register_buffer("values", values)
        _alive.add(self)

    @property
    def step_t(self) -> tuple[float, ...]:
        """Times to which a solve must step, for the slope changes there."""
        return self.knots if self.kind == "linear" else ()

    @property
    def jump_t(self) -> tuple[float, ...]:
        """Times at which it jumps."""
        return self.knots[1:] if self.kind == "hold" else ()

    def forward(self, t: Tensor) -> Tensor:
        values, times = self.values, self.times
        at = t.reshape(-1).double()  # [1] or [batch]
        place = torch.searchsorted(times, at.detach(), right=True) - 1
        last = len(times) - (1 if self.kind == "hold" else 2)
        place = place.clamp(0, last)
        slack = torch.finfo(t.dtype).eps * times.abs()  # an end may come as the type of t writes it
        inside = (at >= times[0] - slack[0]) & (at <= times[-1] + slack[-1])
        low = self._at(values, place, t)
        if self.kind == "hold":
            found = low
        else:
            high, size = self._at(values, place + 1, t), times[place + 1] - times[place]
            b = self._weights((at - times[place]) / size, low)
            found = torch.lerp(low, high, b.to(low.dtype))
            if self.curvature is not None:
                a, h = 1 - b, self._weights(size, low)
                bend = (a**3 - a) * self._curvature(place, t) + (b**3 - b) * self._curvature(place + 1, t)
                found = found + bend * h * h / 6
        found = torch.where(self._weights(inside, low), found, torch.nan)
        return found if t.dim() else found[0]

    def _at(self, values: Tensor, place: Tensor, t: Tensor) -> Tensor:
        """The values at these places, [1, ...] or [batch, ...]."""
        if self.per_sample and t.dim():
            return values[place, torch.arange(len(place), device=place.device)]
        return values.index_select(0, place)

    def _curvature(self, place: Tensor, t: Tensor) -> Tensor:
        """The second derivatives there: sums over all values."""
        assert self.curvature is not None
        rows = self.curvature[place].to(self.values.dtype)  # [1 or batch, T]
        if self.per_sample and t.dim():
            return torch.einsum("bt,tb...->b...", rows, self.values)
        return torch.tensordot(rows, self.values, 1)

    def _weights(self, x: Tensor, like: Tensor) -> Tensor:
        """[1] or [batch], shaped to multiply values, in their real type."""
        x = x if x.dtype == torch.bool else x.to(like.dtype.to_real())
        return x.reshape(-1, *[1] * (like.dim() - 1))

    def extra_repr(self) -> str:
        times = f"{len(self.knots)} times from {self.knots[0]} to {self.knots[-1]}"
        return f"{times}, kind={self.kind!r}, per_sample={self.per_sample}"


def _natural(times: Tensor) -> Tensor:
    """[T, T]: times values, the second derivatives of the natural cubic spline (de Boor, A Practical Guide to Splines, IV)."""
    count, h = len(times), times.diff()
    matrix = torch.eye(count, dtype=torch.float64, device="cpu")
    right = torch.zeros(count, count, dtype=torch.float64, device="cpu")
    for i in range(1, count - 1):
        matrix[i, i - 1], matrix[i, i], matrix[i, i + 1] = h[i - 1] / 6, (h[i - 1] + h[i]) / 3, h[i] / 6
        right[i, i - 1], right[i, i], right[i, i + 1] = 1 / h[i - 1], -1 / h[i - 1] - 1 / h[i], 1 / h[i]
    return torch.linalg.solve(matrix, right)


_alive: "weakref.WeakSet[Interpolated]" = weakref.WeakSet()


def stops_of(func: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """step_t and jump_t of the Interpolated in a Module; nothing is walked through while there is none at all."""
    if not _alive or not isinstance(func, nn.Module):
        return (), ()
    found = [module for module in func.modules() if isinstance(module, Interpolated)]
    steps = dict.fromkeys(time for module in found for time in module.step_t)
    jumps = dict.fromkeys(time for module in found for time in module.jump_t)
    return tuple(time for time in steps if time not in jumps), tuple(jumps)
