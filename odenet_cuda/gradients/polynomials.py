"""The solution as it was stored for `gradient="quadrature"`: one polynomial a step, found by its time."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import formulas, ops
from ..problem import Problem
from ..solvers.trajectory import Recorder, Step
from ..tableau import Method


@dataclass
class Piece:
    """The solution within one step: y(t0 + theta dt) = y0 + dt sum_d theta**(d + 1) q[d]; dt, t0 [rows], q [degree][leaves]."""

    t0: Tensor
    dt: Tensor
    y0: list[Tensor]
    q: list[list[Tensor]]
    accept: Tensor | None


class Polynomials(Recorder):
    """Keeps the solution as one polynomial a step."""

    def __init__(self, tableau: Method, problem: Problem, adaptive: bool, dense: bool):
        super().__init__(tableau, problem.t, problem.per_sample, len(problem.state_leaves), dense=dense)
        self.problem, self.pieces = problem, list[Piece]()
        self.slopes = dense or not adaptive  # a method on a grid leaves out slopes that nobody asks for
        self.every_slope = self.at_once = True
        self.degree = len(tableau.p[0])
        self.one = torch.ones(problem.rows, dtype=torch.float64, device=problem.device)
        self.starts: list[float] = []
        self.stacked: Stacked | None = None

    def _keep(self, t0: float | Tensor, t1: float | Tensor, step: Step) -> None:
        super()._keep(t0, t1, step)
        assert step.y0 is not None
        start, end = (torch.as_tensor(t, dtype=torch.float64, device=self.one.device).reshape(-1) for t in (t0, t1))
        state = step.y0[: self.leaves]
        k = [of_stage[leaf].detach() for leaf in range(self.leaves) for of_stage in step.k]
        q = [[torch.empty_like(leaf) for leaf in state] for _ in range(self.degree)]
        for d, of_power in enumerate(q):
            ops.stage(of_power, [], k, [row[d] for row in self.tableau.p], self.one)
        y0 = [leaf.detach().clone() for leaf in state]
        self.pieces.append(Piece(start, end - start, y0, q, step.accept))
        if not self.per_sample:
            self.starts.append(self.problem.direction * float(t0))

    def cuts(self, start: Tensor, dt: Tensor) -> list[Any]:
        """Where between `start` and `start + dt`, [rows], 0 to 1, a step of the solution begins, both ends included: numbers,
        or [rows] per sample, where a row with fewer steps has ones at the end."""
        if not self.per_sample:
            t0, size = float(start), float(dt)
            ends = sorted((self.problem.direction * t0, self.problem.direction * (t0 + size)))
            inside = self.starts[bisect_right(self.starts, ends[0]) : bisect_left(self.starts, ends[1])]
            return [0.0, *sorted((self.problem.direction * x - t0) / size for x in inside), 1.0]
        return self._cuts_of_rows(start, dt)

    def _cuts_of_rows(self, start: Tensor, dt: Tensor) -> list[Any]:
        stacked = self._stack()
        begins, direction = stacked.begins, stacked.direction
        ends = torch.stack([direction * start, direction * (start + dt)])
        first = torch.searchsorted(begins, ends.amin(0)[:, None], right=True)
        last = torch.searchsorted(begins, ends.amax(0)[:, None])
        index = first + torch.arange(max(0, int((last - first).max())), device=start.device)
        inside = direction[..., None] * begins.gather(1, index.clamp(max=begins.shape[1] - 1))
        theta = (inside - start[:, None]) / torch.where(dt == 0, 1.0, dt)[:, None]
        theta = torch.where(index < last, theta, 1.0).sort(1).values
        return [torch.zeros_like(start), *theta.unbind(1), torch.ones_like(start)]

    def at(self, t: Tensor, rate: bool = False) -> list[Tensor]:
        """y, or its rate, at a time as func sees it."""
        return self._rows_at(t.reshape(-1).double(), rate) if self.per_sample else self._at(float(t), rate)

    def _at(self, t: float, rate: bool) -> list[Tensor]:
        index = max(bisect_right(self.starts, self.problem.direction * t) - 1, 0)
        piece = self.pieces[index]
        theta = (t - self.problem.direction * self.starts[index]) / float(piece.dt)
        y = [torch.empty_like(leaf) for leaf in piece.y0]
        q = [of_power[leaf] for leaf in range(len(y)) for of_power in piece.q]
        if rate:
            ops.stage(y, [], q, [(d + 1) * theta**d for d in range(self.degree)], self.one)
            return y
        ops.stage(y, piece.y0, q, [theta ** (d + 1) for d in range(self.degree)], piece.dt)
        return y

    def _stack(self) -> "Stacked":
        """The pieces of all steps, one behind the other; they are kept so from then on."""
        if self.stacked is None:
            self.stacked = Stacked(self.pieces, self.problem.direction)
            for piece in self.pieces:
                piece.y0, piece.q = [], []
        return self.stacked

    def _rows_at(self, t: Tensor, rate: bool) -> list[Tensor]:
        """Each row at its own time, from the step in which it then was."""
        stacked = self._stack()
        which, rows = stacked.step_at(t), torch.arange(len(t), device=t.device)
        dt = stacked.dt[which, rows]
        theta = (t - stacked.t0[which, rows]) / torch.where(dt == 0, 1.0, dt)
        y = []
        for leaf, start in enumerate(stacked.y0):
            value = formulas.widened(start[which, rows])
            if rate:
                value = torch.zeros_like(value)
            for d in range(self.degree):
                weight = formulas.per_row((d + 1) * theta**d if rate else dt * theta ** (d + 1), value)
                value = value + weight * formulas.widened(stacked.q[d][leaf][which, rows])
            y.append(value.to(start.dtype))
        return y


class Stacked:
    """Pieces one behind the other: t0, dt [steps, rows], y0 [leaves] and q [degree][leaves] with two such axes in front.

    begins: for each row the starts of its own steps in the direction of the solve, ascending, then infinity, [rows, steps].
    """

    def __init__(self, pieces: Sequence[Piece], direction: Any):
        leaves, degree = range(len(pieces[0].y0)), range(len(pieces[0].q))
        self.t0, self.dt = (torch.stack([getattr(piece, name) for piece in pieces]) for name in ("t0", "dt"))
        self.y0 = [torch.stack([piece.y0[leaf] for piece in pieces]) for leaf in leaves]
        self.q = [[torch.stack([piece.q[d][leaf] for piece in pieces]) for leaf in leaves] for d in degree]
        accept = torch.stack([torch.ones_like(p.t0, dtype=torch.bool) if p.accept is None else p.accept for p in pieces])
        direction = self.direction = torch.as_tensor(direction, dtype=torch.float64, device=accept.device)
        self._steps = (~accept).sort(dim=0, stable=True).indices.T.contiguous()  # its own come first
        self._counts = accept.sum(0)
        begins = (direction * self.t0).T.gather(1, self._steps)
        beyond = torch.arange(len(pieces), device=begins.device) >= self._counts[:, None]
        self.begins = begins.masked_fill(beyond, torch.inf).contiguous()

    def step_at(self, t: Tensor) -> Tensor:
        """For each row the step in which it was at its time t; where two meet, the earlier."""
        found = torch.searchsorted(self.begins, (self.direction * t)[:, None])[:, 0] - 1
        found = torch.minimum(found, self._counts - 1).clamp(min=0)
        return self._steps.gather(1, found[:, None])[:, 0]
