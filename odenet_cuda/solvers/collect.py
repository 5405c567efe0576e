"""Outputs that are taken from the steps on the host as they are made: what a function makes of the solution at given times, and
the ends of every n-th accepted step."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..ops import FIELDS
from ..problem import Problem, times_as_tensor, to_device

Keep = Callable[[Tensor, list[Tensor]], list[Tensor]]  # of (t as func sees it, leaves): tensors in memory of their own


def as_seen(problem: Problem, t: np.ndarray) -> Tensor:
    """Times of the rows, [rows], as func sees them."""
    return problem.time_views(to_device(torch.from_numpy(t), problem.device).to(problem.real)[None])[0]


class Table:
    """Outputs [T, ...] of rows that come to each at a step of their own; NaN where they have not."""

    def __init__(self, per_sample: bool):
        self.per_sample, self.entries = per_sample, list[tuple[np.ndarray, np.ndarray, list[Tensor]]]()

    def add(self, index: np.ndarray, rows: np.ndarray, values: list[Tensor]) -> None:
        """The rows, bool [rows], have come to their outputs of these indices, [rows]. values: of all rows, leaves."""
        self.entries.append((index.copy(), rows.copy(), values))

    def leaves(self, length: int) -> list[Tensor]:
        first = self.entries[0][2]
        out = [torch.full((length, *x.shape), torch.nan, dtype=x.dtype, device=x.device) for x in first]
        for index, rows, values in self.entries:
            where = np.flatnonzero(rows)
            if not self.per_sample:
                for of_leaf, value in zip(out, values, strict=True):
                    of_leaf[int(index[0])] = value
                continue
            i, j = (torch.from_numpy(x).to(first[0].device) for x in (index[where], where))
            for of_leaf, value in zip(out, values, strict=True):
                of_leaf[i, j] = value[j]
        return out


class AtTimes:
    """What `keep` makes of the solution at the times of the problem; the states themselves are not kept. A `Looker`."""

    def __init__(self, problem: Problem, tableau: Any, keep: Keep):
        self.problem, self.keep, self.degree = problem, keep, len(tableau.p[0])
        self.weights = [w for row in tableau.p for w in row]
        self.t = np.broadcast_to(times_as_tensor(problem.t).numpy(), (problem.rows, len(problem.t)))
        self.table = Table(problem.per_sample)
        start = [leaf.clone() for leaf in problem.state_leaves]
        first, every = np.zeros(problem.rows, dtype=np.int64), np.ones(problem.rows, dtype=bool)
        self.table.add(first, every, keep(as_seen(problem, self.t[:, 0].copy()), start))
        self.next = first + 1

    def after_step(self, host: np.ndarray, stepper: Any, state: Tensor) -> None:
        problem, n, rows = self.problem, len(self.problem.state_leaves), np.arange(self.problem.rows)
        moved, time, direction = host[FIELDS["accept"]] != 0, host[FIELDS["time"]], host[FIELDS["direction"]]
        while True:
            index = np.minimum(self.next, self.t.shape[1] - 1)
            t = self.t[rows, index]
            here = moved & (self.next < self.t.shape[1]) & (direction * (time - t) >= 0)
            if not here.any():
                return
            y = [leaf.detach().clone()[None] for leaf in stepper.y0[:n]]
            one = state.clone()
            one[FIELDS["output_begin"]] = 0
            one[FIELDS["output_end"]] = to_device(torch.from_numpy(here.astype(np.float64)), state.device)
            at = to_device(torch.from_numpy(t[:, None].copy() if problem.per_sample else t), state.device)
            k = [of_stage[leaf].detach() for leaf in range(n) for of_stage in stepper.k]
            starts, ends = ([leaf.detach() for leaf in leaves[:n]] for leaves in (stepper.y0, stepper.y[-1]))
            ops.dense_output(y, starts, ends, k, self.weights, self.degree, one, at)
            self.table.add(self.next, here, self.keep(as_seen(problem, np.where(here, t, time)), [leaf[0] for leaf in y]))
            self.next = self.next + here
            # steps are counted from one output to the next
            state[FIELDS["steps_since_output"]].masked_fill_(to_device(torch.from_numpy(here), state.device), 0.0)

    def end(self) -> None:
        pass

    def outputs(self, last: Sequence[Tensor], state: np.ndarray) -> tuple[list[Tensor], Any]:
        """(leaves, their times)"""
        return self.table.leaves(len(self.problem.t)), self.problem.t


class EveryStep:
    """The start, the ends of every n-th accepted step of each row, and its last time. A `Looker`."""

    def __init__(self, problem: Problem, every: int, keep: Keep):
        self.problem, self.every, self.keep = problem, every, keep
        self.t1 = np.ravel(problem.t[-1]) + np.zeros(problem.rows)
        self.table, self.count = Table(problem.per_sample), np.zeros(problem.rows, dtype=np.int64)
        t0 = np.ravel(problem.t[0]) + np.zeros(problem.rows)
        self.times: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._add(t0, np.ones(problem.rows, dtype=bool), [leaf.clone() for leaf in problem.state_leaves])

    def _add(self, time: np.ndarray, rows: np.ndarray, leaves: list[Tensor]) -> None:
        self.times.append((self.count.copy(), rows, time.copy()))
        self.table.add(self.count, rows, self.keep(as_seen(self.problem, time), leaves))
        self.count = self.count + rows

    def after_step(self, host: np.ndarray, stepper: Any, state: Tensor) -> None:
        accepted, time = host[FIELDS["num_accepted"]], host[FIELDS["time"]]
        here = (host[FIELDS["accept"]] != 0) & (accepted % self.every == 0) & (time != self.t1)
        if here.any():
            self._add(time, here, [leaf.detach().clone() for leaf in stepper.y[-1]])

    def end(self) -> None:
        pass

    def outputs(self, last: Sequence[Tensor], state: np.ndarray) -> tuple[list[Tensor], Any]:
        """(leaves, their times, float64 [rows, T], NaN where a row has fewer). last: the leaves at the end. A row that failed
        has its last time, without an output."""
        going = self.t1 != self.times[0][2]
        there = going & (state[FIELDS["time"]] == self.t1)
        if there.any():
            self._add(self.t1, there, [leaf.detach().clone() for leaf in last])
        length = self.count + (going & ~there)
        times = np.full((self.problem.rows, int(length.max())), np.nan)
        for index, rows, time in self.times:
            times[np.flatnonzero(rows), index[rows]] = time[rows]
        short = np.flatnonzero(going & ~there)
        times[short, length[short] - 1] = self.t1[short]
        return self.table.leaves(times.shape[1]), times
