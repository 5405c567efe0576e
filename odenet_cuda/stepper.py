"""Stepper: the kernels of one step loop with their arguments bound once, over tensors.

The ops in `ops` check and unpack their arguments at every call, which costs more than a small kernel; here that is done when
buffers are bound. The same launchers run underneath, in the same order.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _C
from .ops import DTYPES, readable
from .problem import Problem
from .tableau import ButcherTableau
from .tracing import has_memory


class Stepper:
    """Buffers of a solve and the kernels on them. Every tensor bound is kept alive here until another takes its place.

    zero_base: the combinations of slopes are added to zero, not to y0.
    y0: state at the start of the step, [leaves]. y: [stages][leaves], y[0] the leaves of y0 that have stages, y[-1] the end of
    the step; the stages between share one buffer until `new_stages`. q1: ends of the quadratures. k: slopes, [stages][leaves].
    times: [stages, rows], with `views` as func sees them. rows_a: rows of the tableau after the first, the last of them y1.
    """

    def __init__(
        self,
        problem: Problem,
        tableau: ButcherTableau,
        rows_a: Sequence[Sequence[float]],
        controller: Sequence[float] = (),
        norm_leaves: int | None = None,
        zero_base: bool = False,
    ):
        self.zero_base = zero_base
        self.problem, self.tableau = problem, tableau
        self.n = len(problem.leaves) - problem.quadratures
        device, rows, leaves = problem.device, problem.rows, problem.leaves
        counted = len(leaves) if norm_leaves is None else norm_leaves
        self.kernels = _C.Stepper(
            dtypes=[DTYPES[leaf.dtype] for leaf in leaves],
            device=-1 if device.type == "cpu" else (device.index or 0),
            rows=rows,
            columns=[leaf.numel() // max(rows, 1) for leaf in leaves],
            quadratures=problem.quadratures,
            signs=problem.signs or [1.0] * len(leaves),
            a=[list(row) for row in rows_a],
            b=list(tableau.b),
            c=list(tableau.c),
            e=list(tableau.e),
            rtol=[tol if isinstance(tol, float) else 0.0 for tol in problem.rtol[:counted]],
            atol=[tol if isinstance(tol, float) else 0.0 for tol in problem.atol[:counted]],
            p=[coefficient for row in tableau.p for coefficient in row],
            degree=len(tableau.p[0]),
            controller=list(controller),
        )
        self.points = len(rows_a)
        self.y0 = [leaf.clone(memory_format=torch.contiguous_format) for leaf in leaves]
        self.k: list[list[Any]] = [[] for _ in range(tableau.stages)]
        self.times = torch.empty(tableau.stages, rows, dtype=problem.real, device=device)
        if not has_memory(self.times):
            raise TypeError(
                f"torch gives tensors of type {type(self.times).__name__} here, under a dispatch mode, and the kernels need "
                "plain ones: solve outside of that mode"
            )
        self.views = problem.time_views(self.times)
        self._other_times: tuple[Tensor, list[Tensor]] | None = None
        self.q1 = [torch.empty_like(leaf) for leaf in self.y0[self.n :]]
        start = self.y0[: self.n]
        between, end = ([torch.empty_like(leaf) for leaf in start] for _ in range(2))
        self.y = [start, *[between] * (self.points - 1), end]
        self.bind()

    def bind_state(self, state: Tensor, stops: Tensor, t: Tensor) -> None:
        workspace = state.new_zeros(self.kernels.workspace_size())
        self._state = (state, stops, t, workspace)
        self.kernels.bind_state(state.data_ptr(), stops.data_ptr(), stops.shape[1], t.data_ptr(), len(t), workspace.data_ptr())

    def new_stages(self) -> None:
        """New buffers for the stages: those before are kept by whoever recorded them."""
        self.y = [
            self.y0[: self.n],
            *([torch.empty_like(leaf) for leaf in self.y0[: self.n]] for _ in range(self.points)),
        ]
        self.bind()

    def start_at(self, leaves: Sequence[Tensor]) -> None:
        """Another state is the start of the next step, in memory of its own."""
        self.y0 = [leaf.clone(memory_format=torch.contiguous_format) for leaf in leaves]
        self.y[0] = self.y0[: self.n]
        self.bind()

    def new_times(self) -> None:
        self.times = torch.empty_like(self.times)
        self.views = self.problem.time_views(self.times)

    def turn_times(self) -> None:
        """The next step's are written elsewhere: those of this step are there until it has been decided on too."""
        if self._other_times is None:
            times = torch.empty_like(self.times)
            self._other_times = times, self.problem.time_views(times)
            self._owned.clear()
        (self.times, self.views), self._other_times = self._other_times, (self.times, self.views)
        self.kernels.bind_times(self.times.data_ptr())

    def bind(self) -> None:
        self.kernels.bind_buffers(
            [0 if self.zero_base else leaf.data_ptr() for leaf in self.y0],
            [leaf.data_ptr() for y in self.y[1:] for leaf in y],
            [leaf.data_ptr() for leaf in self.q1],
            self.times.data_ptr(),
        )
        self._owned: set[int] = set()

    def _own_storages(self) -> set[int]:
        """Addresses of the memory that the solver writes again."""
        buffers = [*(leaf for y in (*self.y[1:], self.y0) for leaf in y), self.times]
        buffers += [] if self._other_times is None else [self._other_times[0]]
        self._owned = {buffer.untyped_storage().data_ptr() for buffer in buffers}
        return self._owned

    def addresses(self, i: int) -> list[int]:
        return [0 if slope is None else slope.data_ptr() for slope in self.k[i]]

    def set_slopes(self, i: int, k: list[Any], copy_own: bool) -> list[int]:
        """Keeps the slopes of stage i and gives their addresses.

        copy_own: copy a slope that lies in a buffer of the solver (func returned an argument), which is written again.
        """
        addresses: list[int] = []
        kept: list[Any] = []  # what func returned stays as it is: a graph may hang on it
        owned = (self._owned or self._own_storages()) if copy_own else ()
        for slope in k:  # called for every slope: written out, for calls in here cost more than the tests
            if slope is None:
                kept.append(slope)
                addresses.append(0)
                continue
            if slope.is_conj() or slope.is_neg() or not slope.is_contiguous():
                slope = readable(slope)
            if copy_own and slope.untyped_storage().data_ptr() in owned:
                slope = slope.clone()
            kept.append(slope)
            addresses.append(slope.data_ptr())
        self.k[i] = kept
        return addresses

    def swap_accepted(self) -> None:
        """The step was accepted: its end is the start of the next, and its last slope the first."""
        self.swap_ends()
        self.kernels.bind_slopes(0, self.addresses(-1))
        self.k[0] = self.k[-1]

    def swap_ends(self) -> None:
        """The end of the step is the start of the next; the buffer of its start will take the next end."""
        self.kernels.swap_ends()
        end, q1 = self.y[-1], self.q1
        self.y[-1], self.q1 = self.y0[: self.n], self.y0[self.n :]
        self.y0 = [*end, *q1]
        self.y[0] = end
