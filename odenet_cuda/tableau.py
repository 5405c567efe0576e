"""ButcherTableau: the numbers of a Runge-Kutta method, checked when they are written down; StepFunction: another method."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeGuard

import numpy as np

from .ops import MAX_DEGREE, MAX_STAGES

_TOLERANCE = 1e-12  # published coefficients are rationals or decimals of 15 digits and more


@dataclass(frozen=True)
class ButcherTableau:
    """An explicit Runge-Kutta method: Y_i = y0 + dt sum_j a_ij k_j, k_i = f(t0 + c_i dt, Y_i), y1 = y0 + dt sum_j b_j k_j.

    order: order of y1. c: nodes. a: rows below the diagonal. b: weights. e: b minus the embedded weights, or empty for a
    method without an error estimate. p: the interpolant, y(t0 + theta dt) = y0 + dt sum_j b_j(theta) k_j with
    b_j(theta) = sum_d p[j][d] theta**(d + 1). p_order: its order, uniformly in theta. fsal: the last slope is f(t1, y1), with
    which the next step begins. Under step control the next step begins with the last slope in any case. terms: the rows, of
    each the numbers that are not zero, as (stage, weight). chained: each takes the slope before it alone.

    Raises ValueError where the numbers contradict each other.
    """

    order: int
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    p: tuple[tuple[float, ...], ...]
    p_order: int
    e: tuple[float, ...] = ()
    stages: int = field(init=False)
    fsal: bool = field(init=False)
    terms: list[list[tuple[int, float]]] = field(init=False, repr=False, compare=False)
    chained: bool = field(init=False, repr=False, compare=False)
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        stages = len(self.c)
        object.__setattr__(self, "stages", stages)
        last_is_b = stages > 1 and self.c[-1] == 1 and (*self.a[-1], 0) == tuple(self.b)
        object.__setattr__(self, "fsal", last_is_b)
        object.__setattr__(self, "terms", [[(j, weight) for j, weight in enumerate(row) if weight != 0] for row in self.rows])
        chained = all([[j for j, _ in row] == [i] for i, row in enumerate(self.terms)])
        object.__setattr__(self, "chained", chained)
        object.__setattr__(self, "_hash", hash((self.order, self.c, self.a, self.b, self.p, self.p_order, self.e)))
        _check(stages <= MAX_STAGES, f"c must have at most {MAX_STAGES} nodes, got {stages}")
        _check([len(row) for row in self.a] == list(range(stages)), "a must have rows of 0, 1, 2, ... numbers, one a node")
        _check(len(self.b) == stages and len(self.p) == stages, "b and p must have one entry a node")
        _check(len(self.e) in (0, stages), "e must be empty or have one entry a node")
        for i, (node, row) in enumerate(zip(self.c, self.a, strict=True)):
            _check(_close(math.fsum(row), node), f"row {i} of a must add up to c[{i}] = {node}, got {math.fsum(row)}")
        _check(_close(math.fsum(self.b), 1), f"b must add up to 1, got {math.fsum(self.b)}")
        _check(_close(math.fsum(self.e), 0), f"e must add up to 0, got {math.fsum(self.e)}")
        _check_interpolant(self.p, self.b)
        for d in range(len(self.p[0])):
            column = math.fsum(row[d] for row in self.p)
            _check(
                _close(column, float(d == 0)),
                f"the weights b_j(theta) must add up to theta, got {column} theta^{d + 1}",
            )

    def __hash__(self) -> int:  # tables of all kinds are looked up by it, at every solve
        return self._hash

    @property
    def rows(self) -> tuple[tuple[float, ...], ...]:
        """The combinations that a step computes: the stages after the first, the last of them y1."""
        return self.a[1:] if self.fsal else (*self.a[1:], self.b)

    def linear(self) -> "ButcherTableau":
        """The same method with the straight line between y0 and y1 as interpolant."""
        return replace(self, p=tuple((weight,) for weight in self.b), p_order=1)

    def cubic(self) -> "ButcherTableau":
        """The same method with the cubic Hermite interpolant; f(t1, y1) joins as a last stage where it is not one."""
        if self.fsal:
            return replace(self, p=hermite(self.b), p_order=min(3, self.order))
        b = (*self.b, 0.0)
        return ButcherTableau(
            order=self.order,
            c=(*self.c, 1.0),
            a=(*self.a, self.b),
            b=b,
            e=(*self.e, 0.0) if self.e else (),
            p=hermite(b),
            p_order=min(3, self.order),
        )


Node = tuple[float, float, tuple[float, ...]]


class StepFailed(ArithmeticError):
    """A step on a grid cannot be made. code: one of `step_control.STEP_FAILURES`. system: the first that has no end, of those
    that func falls into, or None where it is one."""

    def __init__(self, code: int, system: int | None):
        super().__init__(code, system)
        self.code, self.system = code, system


@dataclass(frozen=True)
class StepFunction:
    """A one-step method that is given as a function in torch's operations: y1 = y0 + dt sum_j b_j k_j, where k_0 = f(t0, y0),
    the last slope is f(t1, y1), and those between are whatever the step makes of func.

    step: ``step(field, t, dt, y0, k0) -> (y1, slopes, error)``, over leaves: field(t_j, y, j) gives the slopes of func, t are
    the times t0 + c_j dt as func sees them, dt is float64 [rows], slopes are k_1 to the last, [stages - 1][leaves], error is
    an estimate for each leaf, or None: that by the weights e. It computes each row alone. Gradients are autograd's, through
    it: where it differentiates func, it keeps that graph if gradients are recorded. Where it cannot be made, it raises
    `StepFailed`, or on an adaptive way gives an end that is no number, which is rejected.
    order, c, b, e, p, p_order: as in `ButcherTableau`; the step size goes by the error to the power of 1 / order.
    second: the same step, where gradients of gradients are wanted, None: `step` itself.
    takes: what its step is given besides, by name, where it is known: "tolerance", atol + rtol |y0| of each leaf; "jac", the
    user's df/dy, a function of (t, leaves), see `jacobian.linearize`; "mass", the matrix M of M dy/dt = f, [n, n]; "kept", a
    dict, what the step before left for this one, where steps are not made again.
    memory: how many slopes before k_0 it is given besides, ``past=[(dt, k), ...]``, the last first: of the steps before, each
    with the slope at its start. At first there are fewer.
    lands: it has no interpolant: its steps end at the times of outputs. Then the last slope need not be f(t1, y1).
    nodes: of quadrature over a step, (c, weight, row): the integral of g(t, y) is dt sum_i weight_i g(t0 + c_i dt, Y_i) with
    Y_i = y0 + dt sum_j row_ij k_j. Not given, they are Gauss's on the interpolant.

    Raises ValueError where the numbers contradict each other.
    """

    order: int
    c: tuple[float, ...]
    b: tuple[float, ...]
    p: tuple[tuple[float, ...], ...]
    p_order: int
    step: Callable[..., Any]
    e: tuple[float, ...] = ()
    second: Callable[..., Any] | None = None
    takes: tuple[str, ...] = ()
    memory: int = 0
    lands: bool = False
    nodes: tuple[Node, ...] = ()
    stages: int = field(init=False)
    fsal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        stages = len(self.c)
        object.__setattr__(self, "stages", stages)
        _check(2 <= stages <= MAX_STAGES, f"c must have from 2 to {MAX_STAGES} nodes, got {stages}", "StepFunction")
        _check(self.c[0] == 0 and self.c[-1] == 1, "c must begin with 0 and end with 1", "StepFunction")
        _check(len(self.b) == len(self.p) == stages, "b and p must have one entry a node", "StepFunction")
        _check(len(self.e) in (0, stages), "e must be empty or have one entry a node", "StepFunction")
        _check_interpolant(self.p, self.b, "StepFunction")
        if not self.nodes:
            object.__setattr__(self, "nodes", _gauss_nodes(self.order, self.p))

    @property
    def rows(self) -> tuple[tuple[float, ...], ...]:
        return (self.b,)

    def linear(self) -> "StepFunction":
        """The same method with the straight line between y0 and y1 as interpolant."""
        return replace(self, p=tuple((weight,) for weight in self.b), p_order=1)

    def cubic(self) -> "StepFunction":
        """The same method with the cubic Hermite interpolant."""
        return replace(self, p=hermite(self.b), p_order=min(3, self.order))


Method = ButcherTableau | StepFunction


def is_whole(method: Any) -> TypeGuard[StepFunction]:
    """Whether its steps are whole functions, which are recorded and made again as such: a type derived from StepFunction has
    steps of its own."""
    return type(method) is StepFunction


def _gauss_nodes(order: int, p: tuple[tuple[float, ...], ...]) -> tuple[Node, ...]:
    """Gauss's, exact for polynomials of twice the order less one, on the interpolant p."""
    x, w = np.polynomial.legendre.leggauss(order // 2 + 1)
    found = []
    for theta, weight in zip((x + 1) / 2, w / 2, strict=True):
        row = tuple([float(sum(a * theta ** (d + 1) for d, a in enumerate(of_slope))) for of_slope in p])
        found.append((float(theta), float(weight), row))
    return tuple(found)


def hermite(b: tuple[float, ...]) -> tuple[tuple[float, ...], ...]:
    """The cubic through y0, y1 with slopes k_0 = f(t0, y0) and k_last = f(t1, y1)."""
    last = len(b) - 1
    return tuple(
        (float(j == 0), 3 * w - 2.0 * (j == 0) - float(j == last), -2 * w + float(j == 0) + float(j == last))
        for j, w in enumerate(b)
    )


def quartic(b: tuple[float, ...], mid: tuple[float, ...]) -> tuple[tuple[float, ...], ...]:
    """The quartic through y0, y(t0 + dt/2) = y0 + dt sum_j mid_j k_j and y1 with slopes k_0 and k_last at the ends."""
    last = len(b) - 1
    rows = []
    for j, (w, m) in enumerate(zip(b, mid, strict=True)):
        f0, f1 = float(j == 0), float(j == last)
        rows.append((f0, f1 - 4 * f0 - 5 * w + 16 * m, 5 * f0 - 3 * f1 + 14 * w - 32 * m, 2 * (f1 - f0) - 8 * w + 16 * m))
    return tuple(rows)


def quadratic(b: tuple[float, ...]) -> tuple[tuple[float, ...], ...]:
    """The parabola through y0 and y1 with slope k_0 at y0: order 2 for every method of order 2."""
    return tuple((float(j == 0), w - float(j == 0)) for j, w in enumerate(b))


def _close(x: float, y: float) -> bool:
    return abs(x - y) <= _TOLERANCE * max(1.0, abs(y))


def _check(condition: bool, message: str, kind: str = "ButcherTableau") -> None:
    if not condition:
        raise ValueError(f"{kind}: {message}")


def _check_interpolant(p: tuple[tuple[float, ...], ...], b: tuple[float, ...], kind: str = "ButcherTableau") -> None:
    degree = len(p[0])
    _check(degree <= MAX_DEGREE and all(len(row) == degree for row in p), "p must have rows of one length", kind)
    for j, row in enumerate(p):
        _check(_close(math.fsum(row), b[j]), f"row {j} of p must add up to b[{j}]: the interpolant ends in y1", kind)
