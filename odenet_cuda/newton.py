"""Newton's method for the stages of implicit Runge-Kutta methods, system by system, and their gradient."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .factors import Factors
from .formulas import per_row
from .jacobian import Linearized, as_leaves, flat, linearize
from .step_control import NON_FINITE, NON_FINITE_JACOBIAN, NOT_CONVERGED, SINGULAR
from .tableau import StepFailed

Rows = tuple[tuple[float, ...], ...]
Leaves = list[Tensor]

_SLOW, _SLOWER = 0.1, 0.4  # contraction of iterations from which on the matrix is made anew: to rounding, to a tolerance
_NEAR = 10.0  # times the rounding of a number: what a change to rounding is
_ENOUGH = 0.02  # of the tolerance of a step: how far its stages may be from their equations


def combined(y0: Sequence[Tensor], dt: Tensor, weights: Sequence[float], k: Sequence[Sequence[Tensor]]) -> Leaves:
    """y0 + dt sum_j weights_j k_j of each leaf. dt: float64 [rows]."""
    found = []
    for i, leaf in enumerate(y0):
        parts = [(of_stage[i], weight) for of_stage, weight in zip(k, weights, strict=False) if weight != 0]
        if parts:
            total = parts[0][0] * parts[0][1]
            for part, weight in parts[1:]:
                total = torch.add(total, part, alpha=weight)
            leaf = leaf + per_row(dt.to(leaf.dtype), leaf) * total
        found.append(leaf)
    return found


def jacobians(
    field: Callable[..., Any], times: Sequence[Tensor], points: Sequence[Leaves], rows: int, stages: Sequence[int], **how: Any
) -> list[Linearized]:
    """func beside each of the points. Where it couples samples at one of them, the state is one system at all."""
    found = [linearize(field, t, y, rows, i, by_time=False, **how) for t, y, i in zip(times, points, stages, strict=True)]
    if len({near.systems for near in found}) > 1:
        how["apart"] = False
        found = [linearize(field, t, y, rows, i, by_time=False, **how) for t, y, i in zip(times, points, stages, strict=True)]
    return found


def factorised(dy: Tensor, h: Tensor, a: Rows, known: Any = None) -> Factors:
    """I - h a_ij df/dy(Y_i) of all stages together, [systems, m n, m n]. dy: [systems, m, n, n]. a: of these stages alone. h:
    [rows]. known: of df/dy."""
    systems, m, n, _ = dy.shape
    if m == 1:
        return Factors(dy[:, 0], h.to(dy.dtype) * a[0][0], known)
    weights = dy.new_tensor(a)[None, :, :, None, None] * h.to(dy.dtype).reshape(-1, 1, 1, 1, 1)
    matrix = (weights * dy[:, :, None]).permute(0, 1, 3, 2, 4).reshape(systems, m * n, m * n)
    return Factors(matrix, matrix.new_ones(1))


def solved(factors: Factors, right: Tensor) -> Tensor:
    """right: [systems, m, n]."""
    return factors.solve(right.reshape(len(right), -1)).reshape(right.shape)


class Newton:
    """The equations k_i = f(t_i, y_i + dt sum_j a_ij k_j) of a step, for one group of stages after the other.

    The df/dy of the matrix stays from iteration to iteration, and from group to group, which are of one length, as long as
    iterations contract quickly with it: Hairer and Wanner, Solving Ordinary Differential Equations II, IV.8. Each system has
    its own, and ends by itself, so that it is what it is alone. tolerance: atol + rtol |y0| of the leaves, to a part of which
    stages are solved; None: to rounding. rejects: where a system cannot be solved its slopes become NaN; else StepFailed is
    raised. jac: see `linearize`, also a pattern. dy: to begin with, of the step before.
    """

    def __init__(
        self,
        field: Callable[..., Any],
        dt: Tensor,
        tolerance: Leaves | None,
        max_iters: int,
        rejects: bool,
        jac: Any = None,
        dy: Tensor | None = None,
    ):
        self.field, self.dt, self.rows, self.tolerance = field, dt, len(dt), tolerance
        self.max_iters, self.rejects, self.jac = max_iters, rejects, jac
        self.apart = dy is None or self.rows > 1 or len(dy) > 1
        self.dy = dy  # [systems, m, n, n]
        self.a: Rows = ()
        self.factors: Any = None

    def solve(
        self, times: Sequence[Tensor], stages: Sequence[int], base: Sequence[Leaves], a: Rows, k: list[Leaves]
    ) -> list[Leaves]:
        """The slopes. base: y_i without them. a: of these stages among themselves. k: to begin with."""
        if self.dy is not None and a != self.a:
            self.factors = factorised(self.dy, self.dt, a, self.jac)
        self.a = a
        stale: Tensor | None = None
        active: Tensor | None = None
        before: Tensor | None = None
        slow = _SLOW if self.tolerance is None else _SLOWER
        for _ in range(self.max_iters):
            points = [combined(y, self.dt, row, k) for y, row in zip(base, a, strict=True)]
            slopes, fresh = self._evaluate(times, stages, points, stale)
            if active is None or before is None or len(active) != len(slopes):
                active, before = torch.ones_like(fresh), torch.full_like(slopes[:, 0, 0], torch.inf)
            old = torch.stack([flat(of_stage, len(slopes)) for of_stage in k], 1)
            change = solved(self.factors, slopes - old)
            size = self._size(change, points)
            wild = active & ~fresh & ~(size < before)  # an old matrix led astray: from there once more with a new one
            broken = self._broken(active & ~wild, size, slopes)
            new = torch.where((active & ~wild)[:, None, None], old + change, old)
            k = [as_leaves(new[:, i], k[i]) for i in range(len(k))]
            rate = size / before
            active = active & ~broken & ~(self._ended(size, rate) & ~wild)
            if not bool(active.any()):
                return k
            stale = active & (wild | (rate > slow))  # how well a matrix does is seen by the change after its own
            before = torch.where(wild, before, size)
        return self._given_up(active, k)

    def _evaluate(
        self, times: Sequence[Tensor], stages: Sequence[int], points: Sequence[Leaves], stale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(the slopes [systems, m, n]; for which systems the matrix is that of these points). stale: whose is made anew."""
        if self.dy is not None and (stale is None or not bool(stale.any())):
            found = [self.field(t, y, i) for t, y, i in zip(times, points, stages, strict=True)]
            none = torch.zeros(len(self.dy), dtype=torch.bool, device=self.dy.device)
            return torch.stack([flat(k, len(self.dy)) for k in found], 1), none
        near = jacobians(self.field, times, points, self.rows, stages, apart=self.apart, jac=self.jac)
        dy = near[0].dy[:, None] if len(near) == 1 else torch.stack([x.dy for x in near], 1)  # a wide one is not copied
        self.apart = self.rows > 1 or near[0].systems > 1
        fresh = torch.ones(len(dy), dtype=torch.bool, device=dy.device)
        if self.dy is not None and stale is not None and self.dy.shape == dy.shape:  # else func couples samples after all
            dy, fresh = torch.where(stale[:, None, None, None], dy, self.dy), stale
        self.dy, self.factors = dy, factorised(dy, self.dt, self.a, self.jac)
        return torch.stack([x.k for x in near], 1), fresh

    def _size(self, change: Tensor, points: Sequence[Leaves]) -> Tensor:
        """That of a change of the stages, in units of what may remain, [systems]."""
        systems, h = len(change), self.dt.to(change.dtype).reshape(-1, 1, 1)
        moved = (h * change).abs()
        largest = moved.amax((1, 2))
        scale = torch.stack([largest, *[flat(y, systems).abs().amax(1) for y in points]]).amax(0)
        rounding = (_NEAR * torch.finfo(change.dtype).eps * scale).clamp_min(torch.finfo(change.dtype).tiny)
        if self.tolerance is None:
            return largest / rounding
        return (moved / torch.maximum(_ENOUGH * flat(self.tolerance, systems), rounding[:, None])[:, None]).amax((1, 2))

    def _ended(self, size: Tensor, rate: Tensor) -> Tensor:
        """Which systems are solved: the next change would be a part of this one. rate: of this to the last, 0 where it is the
        first."""
        first = rate == 0
        ended = (size <= (1e-3 if self.tolerance is not None else 1.0)) | ~first & (size <= 1)
        ended |= ~first & (rate < 0.5) & (rate / (1 - rate) * size <= 1)
        if self.tolerance is None:  # rounding in func keeps it from less
            ended |= (rate >= 0.5) & (size <= torch.finfo(size.dtype).eps ** (-1 / 3))
        return ended

    def _broken(self, active: Tensor, size: Tensor, slopes: Tensor) -> Tensor:
        """Which of them have no number; these end so, or StepFailed is raised."""
        broken = active & ~torch.isfinite(size)
        if bool(broken.any()) and not self.rejects:
            first = int(broken.nonzero()[0])
            code = NON_FINITE
            if not bool(torch.isfinite(slopes[first]).all()):
                pass
            elif self.dy is not None and not bool(torch.isfinite(self.dy[first]).all()):
                code = NON_FINITE_JACOBIAN
            elif int(self.factors.info[first]) != 0:
                code = SINGULAR
            raise StepFailed(code, first if len(size) > 1 else None)
        return broken

    def _given_up(self, active: Tensor | None, k: list[Leaves]) -> list[Leaves]:
        assert active is not None
        if not self.rejects:
            raise StepFailed(NOT_CONVERGED, int(active.nonzero()[0]) if len(active) > 1 else None)
        systems = len(active)
        lost = torch.where(active, torch.nan, 0.0)[:, None]
        return [as_leaves(flat(of_stage, systems) + lost.to(of_stage[0].dtype), of_stage) for of_stage in k]


def with_graph(
    field: Callable[..., Any],
    dt: Tensor,
    times: Sequence[Tensor],
    stages: Sequence[int],
    base: Sequence[Leaves],
    a: Rows,
    k: list[Leaves],
    second: bool,
    jac: Any = None,
) -> list[Leaves]:
    """The slopes that solve the equations, with a graph to base, dt and all that func depends on: by one more iteration, whose
    derivative is that of the implicit function theorem. second: so that its derivative has one too, by two that are recorded
    with their matrices, for each doubles the number of derivatives that are right. The values stay what they are."""
    k = [[leaf.detach() for leaf in of_stage] for of_stage in k]
    for _ in range(2 if second else 1):
        points = [combined(y, dt, row, k) for y, row in zip(base, a, strict=True)]
        near = jacobians(field, times, points, len(dt), stages, differentiable=second, jac=jac)
        with torch.set_grad_enabled(second):
            factors = factorised(torch.stack([x.dy for x in near], 1), dt, a)
        old = torch.stack([flat(of_stage, near[0].systems) for of_stage in k], 1)
        change = solved(factors, torch.stack([x.k for x in near], 1) - old)
        new = old + (change - change.detach())  # what is solved to a tolerance has the same values without a graph
        k = [as_leaves(new[:, i], k[i]) for i in range(len(k))]
    return k
