"""tsit5 where func is not stiff and rodas5p where it is, as one method of which each row makes its steps by one or the other.

Both have order 5. The slopes of a step lie side by side, and those of the method that did not make it are zero, so the same
weights read them all: k_0 = f(t0, y0), the seven of tsit5, the eight of rodas5p, and f(t1, y1).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .formulas import of_rows
from .rosenbrock import RODAS5P
from .shears import Leaves, combined
from .tableau import StepFunction
from .tableaus import TSIT5

_EXPLICIT, _STIFF = TSIT5.stages, RODAS5P.stages - 2  # slopes of each
_LAST = 1 + _EXPLICIT + _STIFF
Slopes = list[Leaves]


def explicit_step(
    field: Callable[..., Leaves], t: Sequence[Tensor], dt: Tensor, y0: Leaves, k0: Leaves
) -> tuple[Leaves, Slopes]:
    """(y1, the slopes of tsit5)."""
    k, y = [k0], y0
    for i in range(1, _EXPLICIT):
        y = combined(y0, k, TSIT5.a[i], dt)
        k.append(field(t[1 + i], y, i))
    return y, k


def stiff_step(
    field: Callable[..., Leaves], t: Sequence[Tensor], dt: Tensor, y0: Leaves, k0: Leaves, jac: Any
) -> tuple[Leaves, Slopes]:
    """(y1, those of rodas5p with f(t1, y1))."""
    times = [t[0], *t[1 + _EXPLICIT : _LAST], t[_LAST]]
    y1, k, _ = RODAS5P.step(field, times, dt, y0, k0, jac=jac)
    return y1, k


@dataclass(frozen=True, eq=False)
class AutoStep:
    """stiff: whether steps are by rodas5p; of each row, bool [rows], where rows differ. Then both methods make a step of all
    rows, of size zero for those of the other. Called as `StepFunction.step`."""

    stiff: bool | Tensor

    def __call__(
        self, field: Callable[..., Leaves], t: Sequence[Tensor], dt: Tensor, y0: Leaves, k0: Leaves, jac: Any = None
    ) -> tuple[Leaves, Slopes, None]:
        zeros = [torch.zeros_like(leaf) for leaf in y0]
        if self.stiff is False:
            y1, k = explicit_step(field, t, dt, y0, k0)
            return y1, [*k, *[zeros] * _STIFF, k[-1]], None
        if self.stiff is True:
            y1, k = stiff_step(field, t, dt, y0, k0, jac)
            return y1, [*[zeros] * _EXPLICIT, *k], None
        stiff: Any = self.stiff
        chosen = lambda x, y: [torch.where(of_rows(stiff, a), a, b) for a, b in zip(x, y, strict=True)]  # noqa: E731
        y_a, k_a = explicit_step(field, t, torch.where(stiff, 0.0, dt), y0, k0)
        y_b, k_b = stiff_step(field, t, torch.where(stiff, dt, 0.0), y0, k0, jac)
        slopes = [*[chosen(zeros, k) for k in k_a], *[chosen(k, zeros) for k in k_b[:-1]], chosen(k_b[-1], k_a[-1])]
        return chosen(y_b, y_a), slopes, None


@dataclass(frozen=True)
class AutoMethod(StepFunction):
    """The method of the family `solvers.auto`. backward: the method of an adjoint's solve, unless another is asked for."""

    backward: str = "rodas5p"

    def by(self, stiff: bool | Tensor) -> "AutoMethod":
        """Where these rows are stiff."""
        return _by(self, stiff) if isinstance(stiff, bool) else replace(self, step=AutoStep(stiff))


@lru_cache(maxsize=16)
def _by(method: AutoMethod, stiff: bool) -> AutoMethod:
    return replace(method, step=AutoStep(stiff))


def stiffness_of(k: Sequence[Leaves], dt: Tensor) -> Tensor:
    """dt |lambda| of each row, [rows], from the two slopes of tsit5 at t1: how much they differ, beside how far apart the
    points are at which they were taken (Hairer and Wanner II, IV.2, for dopri5). k: of tsit5."""
    points = combined(None, k, [b - a for b, a in zip(TSIT5.b, (*TSIT5.a[-2], 0.0, 0.0), strict=True)], torch.ones_like(dt))
    squares: Any = lambda x: [leaf.reshape(len(dt), -1).double().square().sum(1) for leaf in x]  # noqa: E731
    norm: Any = lambda x: torch.stack(squares(x)).sum(0).sqrt()  # noqa: E731
    change = norm([a - b for a, b in zip(k[-1], k[-2], strict=True)])
    return change / norm(points).clamp_min(torch.finfo(torch.float64).tiny)


def _auto() -> AutoMethod:
    none = (0.0,) * max(len(TSIT5.p[0]), len(RODAS5P.p[0]))
    rows = [(*row, *none[len(row) :]) for row in (*TSIT5.p, *RODAS5P.p[1:-1])]
    return AutoMethod(
        order=TSIT5.order,
        c=(0.0, *TSIT5.c, *RODAS5P.c[1:-1], 1.0),
        b=(0.0, *TSIT5.b, *RODAS5P.b[1:-1], 0.0),
        e=(0.0, *TSIT5.e, *RODAS5P.e[1:-1], 0.0),
        p=(none, *rows, none),
        p_order=min(TSIT5.p_order, RODAS5P.p_order),
        step=AutoStep(False),
        takes=("jac",),
    )


AUTO = _auto()
