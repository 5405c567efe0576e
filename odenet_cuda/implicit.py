"""Implicit Runge-Kutta methods: each stage, or all of them together, solve a system of equations. Those on a grid."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .jacobian import products
from .newton import Leaves, Newton, Rows, combined, with_graph
from .tableau import StepFunction, hermite

COSTLY = (
    32  # products that df/dy takes, from which on a step begins with that of the step before: it saves them, but iterates more
)
MOST_ITERATIONS = 100  # of Newton's method on a grid, unless max_iters says otherwise


@dataclass(frozen=True)
class ImplicitStep:
    """The step of an implicit Runge-Kutta method, k_i = f(t0 + c_i dt, y0 + dt sum_j a_ij k_j), y1 = y0 + dt sum_j b_j k_j with
    k_0 = f(t0, y0). Called as `StepFunction.step`.

    a: a row for each unknown slope, which begins with the weight of k_0. b: likewise. ends_in_y1: the last of them is the slope
    at the end of the step. max_iters: of Newton's method. adaptive: stages are solved to a part of the tolerance, and a step
    whose stages cannot be is rejected; else to rounding, and then StepFailed says so. second: gradients are differentiable.
    """

    a: Rows
    b: tuple[float, ...]
    ends_in_y1: bool
    max_iters: int = MOST_ITERATIONS
    adaptive: bool = False
    second: bool = False

    @property
    def groups(self) -> list[range]:
        """The stages that are solved together: one by one where none needs a later one."""
        count = len(self.a)
        by_one = all([not any(row[i + 2 :]) for i, row in enumerate(self.a)])
        return [range(i, i + 1) for i in range(count)] if by_one else [range(count)]

    def __call__(
        self,
        field: Callable[..., Any],
        t: list[Tensor],
        dt: Tensor,
        y0: Leaves,
        k0: Leaves,
        tolerance: Leaves | None = None,
        jac: Any = None,
        kept: dict[str, Tensor] | None = None,
    ) -> tuple[Leaves, list[Leaves], None]:
        recording = torch.is_grad_enabled()
        tolerance = tolerance if self.adaptive else None
        before = None if kept is None or recording else kept.get("dy")
        newton = Newton(field, dt.detach(), tolerance, self.max_iters, self.adaptive, jac, before)
        # On a grid from y0 itself: k0 may lead far away where f is stiff, and there is no smaller step to try.
        slopes, guess = [k0], [x.detach() if self.adaptive else torch.zeros_like(x) for x in k0]
        for group in self.groups:
            stages, times = [i + 1 for i in group], [t[i + 1] for i in group]
            base = [combined(y0, dt, self.a[i][: len(slopes)], slopes) for i in group]
            among = tuple([self.a[i][len(slopes) : len(slopes) + len(group)] for i in group])
            with torch.no_grad():
                known = [[leaf.detach() for leaf in y] for y in base]
                found = newton.solve([x.detach() for x in times], stages, known, among, [guess] * len(group))
            if recording:
                found = with_graph(field, dt, times, stages, base, among, found, self.second, jac)
            slopes += found
            guess = [leaf.detach() for leaf in found[-1]]
        if kept is not None and newton.dy is not None and products(jac, newton.dy.shape[-1]) >= COSTLY:
            kept["dy"] = newton.dy
        y1 = combined(y0, dt, self.b, slopes)
        if not self.ends_in_y1:
            slopes.append(field(t[-1], y1, len(slopes)))
        return y1, slopes[1:], None


def implicit(
    order: int,
    a: Rows,
    b: tuple[float, ...],
    e: tuple[float, ...] = (),
    p: Rows = (),
    p_order: int = 0,
    **how: Any,
) -> StepFunction:
    """The method with this tableau, rows of a whole or to the diagonal; its nodes are the sums of rows. Where the first stage
    is explicit it is k_0. p: weights of the interpolant, one row a stage; not given, it is the cubic Hermite interpolant. how:
    of `ImplicitStep`."""
    count = len(b)
    full = [(*row, *[0.0] * (count - len(row))) for row in a]
    c = [sum(row) for row in full]
    first = not any(full[0])
    rows = tuple(full[1:] if first else [(0.0, *row) for row in full])
    weights, nodes = (b, c[1:]) if first else ((0.0, *b), c)
    at_end = rows[-1] == weights and abs(nodes[-1] - 1) < 1e-12
    if at_end:
        nodes[-1] = 1.0
    step = ImplicitStep(rows, weights, at_end, **how)
    more = () if at_end else (0.0,)
    weights, error = (*weights, *more), (*(e if first or not e else (0.0, *e)), *more) if e else ()
    rows = (((0.0,) * len(weights)), *[(*row, *more) for row in rows])
    return StepFunction(
        order=order,
        c=(0.0, *nodes, *([] if at_end else [1.0])),
        b=weights,
        p=p or hermite(weights),
        p_order=p_order or min(3, order),
        step=step,
        e=error,
        second=replace(step, second=True),
        takes=("tolerance", "jac", "kept") if step.adaptive else ("jac",),
        nodes=tuple([(x, w, row) for x, w, row in zip((0.0, *nodes), weights, rows, strict=False) if w != 0]),
    )


def _gauss(stages: int) -> tuple[Rows, tuple[float, ...]]:
    """Hairer and Wanner, Solving Ordinary Differential Equations II, tables IV.5.1 and IV.5.2."""
    x = 3**0.5 / 6
    if stages == 2:
        return ((1 / 4, 1 / 4 - x), (1 / 4 + x, 1 / 4)), (1 / 2, 1 / 2)
    x = 15**0.5
    rows = (
        (5 / 36, 2 / 9 - x / 15, 5 / 36 - x / 30),
        (5 / 36 + x / 24, 2 / 9, 5 / 36 - x / 24),
        (5 / 36 + x / 30, 2 / 9 + x / 15, 5 / 36),
    )
    return rows, (5 / 18, 4 / 9, 5 / 18)


def _radau_iia_5() -> Rows:
    """The same, table IV.5.6."""
    x = 6**0.5
    return (
        ((88 - 7 * x) / 360, (296 - 169 * x) / 1800, (-2 + 3 * x) / 225),
        ((296 + 169 * x) / 1800, (88 + 7 * x) / 360, (-2 - 3 * x) / 225),
        ((16 - x) / 36, (16 + x) / 36, 1 / 9),
    )


def _on_a_grid() -> dict[str, StepFunction]:
    """SDIRK2: Alexander 1977, doi 10.1137/0714068. TR-BDF2: Bank et al. 1985, doi 10.1109/T-ED.1985.22232, as a Runge-Kutta
    method by Hosea and Shampine 1996, doi 10.1016/0168-9274(95)00115-8. Radau IIA 3: Hairer and Wanner II, table IV.5.5."""
    gamma, w, radau5 = 1 - 2**-0.5, 2**0.5 / 4, _radau_iia_5()
    return {
        "implicit_euler": implicit(1, ((1.0,),), (1.0,)),
        "implicit_midpoint": implicit(2, ((1 / 2,),), (1.0,)),
        "trapezoid": implicit(2, ((0.0,), (1 / 2, 1 / 2)), (1 / 2, 1 / 2)),
        "sdirk2": implicit(2, ((gamma,), (1 - gamma, gamma)), (1 - gamma, gamma)),
        "trbdf2": implicit(2, ((0.0,), (gamma, gamma), (w, w, gamma)), (w, w, gamma)),
        "radauIIA3": implicit(3, ((5 / 12, -1 / 12), (3 / 4, 1 / 4)), (3 / 4, 1 / 4)),
        "radauIIA5": implicit(5, radau5, radau5[-1]),
        "gl4": implicit(4, *_gauss(2)),
        "gl6": implicit(6, *_gauss(3)),
    }


IMPLICIT = _on_a_grid()
