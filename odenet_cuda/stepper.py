"""Stepper: the kernels of one step loop with their arguments bound once, over tensors.

The ops in `ops` check and unpack their arguments at every call, which costs more than a small kernel; here that is done when
buffers are bound. The same launchers run underneath, in the same order.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import _C
from .ops import DTYPES, readable
from .problem import Problem
from .tableau import Method
from .tracing import has_memory

Rows = tuple[tuple[float, ...], ...]


@lru_cache(maxsize=256)
def _tables(
    dtypes: tuple[torch.dtype, ...],
    device: int,
    rows: int,
    columns: tuple[int, ...],
    quadratures: int,
    signs: tuple[float, ...],
    tableau: Method,
    rows_a: Rows,
    tolerances: tuple[tuple[float, ...], tuple[float, ...]],
    controller: tuple[float, ...],
) -> _C.StepperTables:
    """What the kernels are called with in all solves of a kind, checked and unpacked once."""
    return _C.StepperTables(
        dtypes=[DTYPES[dtype] for dtype in dtypes],
        device=device,
        rows=rows,
        columns=columns,
        quadratures=quadratures,
        signs=signs,
        a=rows_a,
        b=tableau.b,
        c=tableau.c,
        e=tableau.e,
        rtol=tolerances[0],
        atol=tolerances[1],
        p=[coefficient for row in tableau.p for coefficient in row],
        degree=len(tableau.p[0]),
        controller=controller,
    )


class Stepper:
    """Buffers of a solve and the kernels on them. Every tensor bound is kept alive here until another takes its place.

    zero_base: the combinations of slopes are added to zero, not to y0. apart: each stage has a buffer of its own. start, end:
    where the first step begins and ends, [leaves] and those with stages; else a copy of the problem's and a buffer.
    y0: state at the start of the step, [leaves]. y: [stages][leaves], y[0] the leaves of y0 that have stages, y[-1] the end of
    the step; the stages between share one buffer unless they are apart. q1: ends of the quadratures. k: slopes,
    [stages][leaves]. times: [stages, rows], with `views` as func sees them, of a step whose size the kernels choose: from
    `bind_state` on. rows_a: rows of the tableau after the first, the last of them y1.
    """

    times: Tensor
    views: list[Tensor]

    def __init__(
        self,
        problem: Problem,
        tableau: Method,
        rows_a: Rows,
        controller: Sequence[float] = (),
        norm_leaves: int | None = None,
        zero_base: bool = False,
        apart: bool = False,
        start: list[Tensor] | None = None,
        end: list[Tensor] | None = None,
    ):
        self.zero_base = zero_base
        self.problem, self.tableau, self.controller = problem, tableau, controller
        self.n = len(problem.leaves) - problem.quadratures
        device, rows, leaves = problem.device, problem.rows, problem.leaves
        counted = len(leaves) if norm_leaves is None else norm_leaves
        tolerances = [
            tuple([tol if isinstance(tol, float) else 0.0 for tol in tols[:counted]]) for tols in (problem.rtol, problem.atol)
        ]
        self.kernels = _C.Stepper(
            _tables(
                tuple([leaf.dtype for leaf in leaves]),
                -1 if device.type == "cpu" else (device.index or 0),
                rows,
                tuple([leaf.numel() // max(rows, 1) for leaf in leaves]),
                problem.quadratures,
                tuple(problem.signs or [1.0] * len(leaves)),
                tableau,
                rows_a,
                (tolerances[0], tolerances[1]),
                tuple(controller),
            )
        )
        self.points = len(rows_a)
        if start is None:
            start = leaves if zero_base else [leaf.clone(memory_format=torch.contiguous_format) for leaf in leaves]
        self.y0 = start
        if not has_memory(self.y0[0]):
            raise TypeError(
                f"torch gives tensors of type {type(self.y0[0]).__name__} here, under a dispatch mode, and the kernels need "
                "plain ones: solve outside of that mode"
            )
        self.k: list[list[Any]] = [[] for _ in range(tableau.stages)]
        self._times_address = 0
        self._other_times: tuple[Tensor, list[Tensor]] | None = None
        self.q1 = [torch.empty_like(leaf) for leaf in self.y0[self.n :]]
        if apart:
            self.new_stages()
            return
        first = self.y0[: self.n]
        between = [torch.empty_like(leaf) for leaf in first] if self.points > 1 else []
        self.y = [first, *[between] * (self.points - 1), end or [torch.empty_like(leaf) for leaf in first]]
        self.bind()

    def bind_state(self, state: Tensor, stops: Tensor, t: Tensor) -> None:
        self.new_times()
        self.kernels.bind_times(self._times_address)
        self._owned.clear()
        workspace = state.new_zeros(self.kernels.workspace_size())
        self._state = (state, stops, t, workspace)
        assert stops.is_contiguous() and t.is_contiguous()
        own, places = stops.dim() == 3, (stops.data_ptr(), stops.shape[-1], t.data_ptr(), t.shape[-1])
        self.kernels.bind_state(state.data_ptr(), *places, own, workspace.data_ptr())

    def new_stages(self) -> None:
        """New buffers for the stages: those before are kept by whoever recorded them."""
        self.y = [
            self.y0[: self.n],
            *([torch.empty_like(leaf) for leaf in self.y0[: self.n]] for _ in range(self.points)),
        ]
        self.bind()

    def new_times(self) -> None:
        problem = self.problem
        self.times = torch.empty(self.tableau.stages, problem.rows, dtype=problem.real, device=problem.device)
        self.views = problem.time_views(self.times)
        self._times_address = self.times.data_ptr()

    def turn_times(self) -> None:
        """The next step's are written elsewhere: those of this step are there until it has been decided on too."""
        if self._other_times is None:
            times = torch.empty_like(self.times)
            self._other_times = times, self.problem.time_views(times)
            self._owned.clear()
        (self.times, self.views), self._other_times = self._other_times, (self.times, self.views)
        self._times_address = self.times.data_ptr()
        self.kernels.bind_times(self._times_address)

    def bind(self) -> None:
        self.kernels.bind_buffers(
            [0 if self.zero_base else leaf.data_ptr() for leaf in self.y0],
            [leaf.data_ptr() for y in self.y[1:] for leaf in y],
            [leaf.data_ptr() for leaf in self.q1],
            self._times_address,
        )
        self._owned: set[int] = set()

    def bind_step(self, dt: int, end: list[Tensor]) -> None:
        """Another step of a grid, from y0 to `end`, [leaves]. dt: the address of its size."""
        self.y[-1], self.q1 = end[: self.n], end[self.n :]
        self.kernels.bind_step(dt, [leaf.data_ptr() for leaf in self.y0], [leaf.data_ptr() for leaf in end])

    def go_on(self) -> None:
        """The next step begins where this one ended."""
        self.y0 = [*self.y[-1], *self.q1]
        self.y[0] = self.y[-1]

    def own(self, buffers: Sequence[Tensor]) -> None:
        """These too are memory that the solver writes again."""
        self._own_storages()
        self._owned |= {buffer.untyped_storage().data_ptr() for buffer in buffers}

    def _own_storages(self) -> set[int]:
        """Addresses of the memory that the solver writes again."""
        buffers = [leaf for y in (*self.y[1:], self.y0) for leaf in y]
        buffers += [self.times] if self._times_address else []
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
            address = slope.data_ptr()
            # Without an offset that is also where its memory begins, which is slower to ask for.
            begins = address if not copy_own or slope.storage_offset() == 0 else slope.untyped_storage().data_ptr()
            if copy_own and begins in owned:
                slope = slope.clone()
                address = slope.data_ptr()
            kept.append(slope)
            addresses.append(address)
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
