"""Events of a solve: seen after each step, held with it, and located on its interpolant after the solve, all rows together.

Nothing in here waits for the device before the solve has ended.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import formulas, ops
from ..combinations import combinations
from ..event import Events
from ..ops import FIELDS
from ..problem import Problem, to_device
from ..step_control import SUCCESS
from .hooks import runs_ahead

PARTS = 4  # of a step, at whose ends event functions are looked at
TOGETHER = 64  # units in the last place of the time, that events are apart at most which are at one time


@dataclass
class Crossing:
    """Where each row ended: at its event, or, where none was found, at its last time.

    found: bool [rows]. index: of the event, -1 without one, [rows]. column: of its value, see `EventWatch.values`, [rows].
    signs: with which the solve goes on from there, see `Events`.
    t: float64 [rows]. theta: float64 [rows], within the step, 1 at its end. y: the leaves there. rate: dy/dt of the
    interpolant there, in leaves. pace: the sizes of the terms of which it is the sum.
    """

    found: Tensor
    index: Tensor
    column: Tensor
    signs: Tensor
    t: Tensor
    theta: Tensor
    y: list[Tensor]
    rate: list[Tensor]
    pace: list[Tensor]


class EventValues:
    """Event functions over leaves. unflatten: gives the state as the user sees it. counts: of the values that each gives a
    row."""

    def __init__(self, events: Events, problem: Problem, unflatten: Callable[[Sequence[Tensor]], Any]):
        self.events, self.problem, self.unflatten = events, problem, unflatten
        self.counts: list[int] = []

    def values(self, t: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        """Those of all event functions, float64 [rows, values]. t: as func sees it."""
        y = self.unflatten(list(leaves))
        columns = [self._checked(i, event.fn(t, y, *self.events.args)) for i, event in enumerate(self.events.events)]
        self.counts = [column.shape[1] for column in columns]
        return columns[0] if len(columns) == 1 else torch.cat(columns, 1)

    def _checked(self, i: int, value: Any) -> Tensor:
        problem = self.problem
        if not isinstance(value, Tensor) or value.is_complex():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"the function of event {i} must return a tensor of real numbers, got {kind}")
        rows = problem.rows
        if problem.per_sample and (value.numel() != rows or value.shape[:1] != (rows,)):
            raise ValueError(
                f"the function of event {i} must return one number a sample, [{rows}], got shape {list(value.shape)}; t is of "
                f"y's rank, [{rows}, 1, ...]"
            )
        if value.numel() == 0:
            raise ValueError(f"the function of event {i} must return at least one number, got shape {list(value.shape)}")
        value = value if value.dim() == 2 and len(value) == rows else value.reshape(rows, -1)
        return (
            value
            if value.dtype is torch.float64 and value.device == problem.device
            else value.to(problem.device, torch.float64)
        )


class EventWatch(EventValues):
    """Looks at event functions after each step and holds each row that crosses with its step.

    held: bool [rows], those with an event.
    """

    def __init__(self, events: Events, problem: Problem, tableau: Any, unflatten: Callable[[Sequence[Tensor]], Any]):
        super().__init__(events, problem, unflatten)
        self.tableau = tableau
        self.n, rows, device = len(problem.state_leaves), problem.rows, problem.device
        ends = [(i + 1) / PARTS for i in range(PARTS)]
        self.looks = torch.tensor(ends, dtype=torch.float64, device=device)[:, None]
        self.held = torch.zeros(rows, dtype=torch.bool, device=device)
        self.undefined = torch.zeros_like(self.held)
        self.point = [torch.empty_like(leaf) for leaf in problem.state_leaves]
        weights = [tuple([float(w) for w in formulas.interpolant_weights(tableau, theta)]) for theta in ends]
        weights += weights[-1:] * (len(weights[0]) - PARTS)  # the kernel wants as many rows as there are slopes
        self.kernels = combinations(self.point, rows, tuple(weights), [1.0] * self.n)
        self.places = [leaf.data_ptr() for leaf in self.point] * len(weights)
        self.t0, self.t1, self.dt = (torch.zeros(rows, dtype=torch.float64, device=device) for _ in range(3))
        self.low, self.high = (torch.ones(rows, dtype=torch.float64, device=device) for _ in range(2))
        self.kept: list[Tensor] = []  # of the step of each row: the leaves of y0, then the slopes of each leaf
        with torch.no_grad():
            self.signs = _signs(self.values(problem.start_time(False), problem.state_leaves))  # [rows, values]
        if events.signs is not None:
            self.signs = torch.where(events.signs.isnan(), self.signs, events.signs)
        if bool(self.signs.isnan().any()):
            raise ValueError("an event function is not a number at the start")
        self.before = self.signs
        self.waits = (self.signs == 0).any(1) & events.from_zero  # rows that end where they begin
        self.some_wait = bool(self.waits.any())
        repeated = [[event.direction] * count for event, count in zip(events.events, self.counts, strict=True)]
        self.directions = self.signs.new_tensor([x for of_event in repeated for x in of_event])

    # ---- during the solve -----------------------------------------------------------------------------------------------

    def after_step(self, state: Tensor, stepper: Any) -> None:
        """After the decision about a step: rows that an event ends in it take no other."""
        t0, t1, dt = (state[FIELDS[name]] for name in ("last_time", "time", "accepted_dt"))
        rows = self.look(t0, t1, dt, stepper.y0, stepper.k)
        if rows is not None:
            state[FIELDS["status"]].masked_fill_(rows, SUCCESS)
            state[FIELDS["dt"]].masked_fill_(rows, 0.0)
            state[FIELDS["step_end"]].copy_(torch.where(rows, t1, state[FIELDS["step_end"]]))

    def ended(self, ends: Sequence[float], stepper: Any) -> bool:
        """Whether an event ends the solve in this step of a grid."""
        t0, t1 = (to_device(torch.tensor([t], dtype=torch.float64, device="cpu"), self.problem.device) for t in ends)
        rows = self.look(t0, t1, t1 - t0, stepper.y0, stepper.k)
        return rows is not None and bool(rows.any())

    def look(self, t0: Tensor, t1: Tensor, dt: Tensor, y0: Sequence[Tensor], k: Sequence[Sequence[Tensor]]) -> Tensor | None:
        """After a step: bool [rows], those that an event ends in it, or None if the host knows of none.

        t0, t1: float64 [rows], of the step. dt: its size, 0 where it was not accepted. y0: leaves. k: [stages][leaves].
        """
        problem = self.problem
        kernels = self.kernels
        kernels.bind_buffers([leaf.data_ptr() for leaf in y0[: self.n]], self.places, [], 0)
        kernels.bind_dt(dt.data_ptr())
        for j, of_stage in enumerate(k):
            kernels.bind_slopes(j, [slope.data_ptr() for slope in of_stage])
        times = problem.time_views((t0 + self.looks * dt).to(problem.real))
        found = []
        for i, t in enumerate(times, 1):
            kernels.stage(i, [])
            found.append(_signs(self.values(t, self.point)))  # not the values, which may be a view of the point
        signs = torch.stack(found)
        on_host = not runs_ahead(signs.device)
        if on_host and not self.some_wait and torch.equal(signs, self.signs.expand_as(signs)):
            return None
        crossed = self._crossed(signs, (dt != 0) & ~self.held)
        if on_host and not bool(crossed.any()):
            return None
        start, slopes = y0[: self.n], [of_stage[leaf] for leaf in range(self.n) for of_stage in k if of_stage]
        self._hold(crossed, (t0, t1, dt), [x.detach() for x in (*start, *slopes)])
        return crossed

    def _crossed(self, signs: Tensor, running: Tensor) -> Tensor:
        """Rows in which an event function crosses zero, with the part of the step and the signs before it. signs: after each
        part, [parts, rows, values]. running: rows that took a step."""
        every = torch.cat([self.signs[None], signs])
        places = torch.arange(len(every), device=signs.device).reshape(-1, 1, 1)
        last = every.gather(0, torch.where(every == 0, 0, places).cummax(0).values)  # that are not zero, if there were some
        before, undefined = last[:-1], signs.isnan()
        wanted = (self.directions == 0) | (self.directions == -before)
        new = (((before != 0) & (signs != before) & wanted) | undefined).any(2)  # [parts, rows]
        part = new.int().argmax(0)
        crossed = (new.any(0) | self.waits) & running
        self.undefined |= crossed & undefined.any(2).any(0)
        low = part / PARTS
        self.low, self.high = (
            torch.where(crossed, torch.where(self.waits, 0.0, x).double(), old)
            for x, old in ((low, self.low), (low + 1 / PARTS, self.high))
        )
        chosen = before.gather(0, part[None, :, None].expand(1, *self.signs.shape))[0]
        self.before = torch.where(crossed[:, None], chosen, self.before)
        self.signs = torch.where(running[:, None], last[-1], self.signs)
        return crossed

    def _hold(self, rows: Tensor, times: tuple[Tensor, Tensor, Tensor], parts: list[Tensor]) -> None:
        self.held |= rows
        self.t0, self.t1, self.dt = (
            torch.where(rows, new, old) for new, old in zip(times, (self.t0, self.t1, self.dt), strict=True)
        )
        if not self.kept:
            self.kept = [torch.zeros_like(part, memory_format=torch.contiguous_format) for part in parts]
        ops.advance(self.kept, self.kept, parts, parts, rows.double())

    # ---- after the solve ------------------------------------------------------------------------------------------------

    def crossing(self, t1: Tensor, last: Sequence[Tensor]) -> Crossing:
        """t1: float64 [rows], the times that rows have come to, with the state there."""
        held = self.held
        if bool(self.undefined.any()):
            self._refuse_undefined()
        self.t0, self.t1 = (torch.where(held, time, t1) for time in (self.t0, self.t1))
        self.start = list(last[: self.n])
        if self.kept:
            masks = [held.reshape(-1, *[1] * (leaf.dim() - 1)) if self.problem.per_sample else held[0] for leaf in self.start]
            self.start = [torch.where(*parts) for parts in zip(masks, self.kept, self.start, strict=False)]
        self.powers = self._polynomials()
        theta, together = self._root()
        values = self._oriented(theta)
        if bool(self.undefined.any()):
            self._refuse_undefined()
        hit = (values <= 0) | (self._wanted(self._values(self.t0 + (theta + together) * self.dt, theta + together)) <= 0)
        column = torch.where(hit.any(1), hit.int().argmax(1), values.argmin(1))
        signs = torch.where(hit, self.before, math.nan)
        signs = torch.where((self.before == 0) & (theta <= together)[:, None], 0.0, signs)
        signs = signs.scatter(1, column[:, None], 0.0)
        event_of = torch.tensor([i for i, count in enumerate(self.counts) for _ in range(count)], device=held.device)
        index = torch.where(held, event_of[column], -1)
        rate, pace = self._rate(theta, self.powers), self._rate(theta, [[x.abs() for x in q] for q in self.powers])
        return Crossing(held, index, column, signs, self._time(theta), theta, self._state(theta), rate, pace)

    def _refuse_undefined(self) -> None:
        row = int(self.undefined.nonzero()[0])
        sample = f" of sample {row}" if self.problem.per_sample else ""
        low, high = sorted((float(self.t0[row]), float(self.t1[row])))
        raise ValueError(f"an event function{sample} is not a number between t = {low:.9g} and {high:.9g}")

    def _polynomials(self) -> list[list[Tensor]]:
        """q [degree][leaves] with y(t0 + theta dt) = y0 + dt sum_d theta**(d + 1) q[d]."""
        if not self.kept:
            return []
        one, slopes = torch.ones_like(self.dt), self.kept[self.n :]
        powers = [[torch.empty_like(leaf) for leaf in self.start] for _ in self.tableau.p[0]]
        for d, of_power in enumerate(powers):
            ops.stage(of_power, [], slopes, [row[d] for row in self.tableau.p], one)
        return powers

    def _time(self, theta: Tensor) -> Tensor:
        t = self.t0 + theta * self.dt
        beyond = torch.sign(self.dt) * (t - self.t1) > 0
        return torch.where(beyond | (theta == 1), self.t1, t)

    def _state(self, theta: Tensor) -> list[Tensor]:
        return _sum(self.start, [self.dt * theta ** (d + 1) for d in range(len(self.powers))], self.powers)

    def _rate(self, theta: Tensor, powers: list[list[Tensor]]) -> list[Tensor]:
        zero = [torch.zeros_like(leaf) for leaf in (powers[0] if powers else self.start)]
        return _sum(zero, [(d + 1) * theta**d for d in range(len(powers))], powers)

    def _oriented(self, theta: Tensor) -> Tensor:
        """The values [rows, values], positive before the crossing and not after; infinite where none of them can count."""
        values = self._values(self._time(theta), theta)
        self.undefined |= values.isnan().any(1) & self.held
        return self._wanted(values)

    def _values(self, t: Tensor, theta: Tensor) -> Tensor:
        return self.values(self.problem.time_views(t.to(self.problem.real)[None])[0], self._state(theta))

    def _wanted(self, values: Tensor) -> Tensor:
        """These, as `_oriented` says."""
        wanted = (self.before != 0) & ((self.directions == 0) | (self.directions == -self.before))
        wanted = torch.where(self.waits[:, None], self.before == 0, wanted)
        return torch.where(wanted, self.before * values, math.inf)

    def _root(self) -> tuple[Tensor, Tensor]:
        """The first theta in the part of each row's step at which a value has crossed, by the method of interpolation,
        truncation and projection: as few halvings as bisection at worst (Oliveira and Takahashi 2021, doi 10.1145/3423597).
        With it, how far behind it others are at the same time."""
        low, high = self.low.clone(), self.high.clone()
        eps = torch.finfo(self.problem.real).eps
        ulp = eps * torch.maximum(self.t0.abs(), self.t1.abs()) / torch.where(self.dt == 0, 1.0, self.dt).abs()
        tolerance = ulp.clamp(min=2.0**-53, max=0.5)
        at_low, at_high = (self._oriented(x).amin(1) for x in (low, high))
        at_low, at_high = at_low.clamp(min=0), at_high.clamp(max=0)  # as seen in the solve, whatever rounding says here
        width = high - low
        most = torch.ceil(torch.log2(width / (2 * tolerance)).clamp(min=0)) + 1
        slack, scale = tolerance * 2**most, 0.2 / torch.where(width == 0, 1.0, width)
        for _ in range(int(most.max()) + 1):
            size = high - low
            active = size > 2 * tolerance
            if not bool(active.any()):
                break
            middle = (low + high) / 2
            secant = (high * at_low - low * at_high) / (at_low - at_high)
            secant = torch.where(secant.isfinite(), secant, middle)
            side = torch.sign(middle - secant)
            shift = torch.maximum(scale * size**2, tolerance)  # else x may be an end, of which nothing more is to be learned
            inner = torch.where(shift <= (middle - secant).abs(), secant + side * shift, middle)
            room = slack - size / 2
            x = torch.where((inner - middle).abs() <= room, inner, middle - side * room)
            x = torch.where(active, x, high)
            value = self._oriented(x).amin(1)
            before = active & (value > 0)
            after = active & ~before
            low, at_low = torch.where(before, x, low), torch.where(before, value, at_low)
            high, at_high = torch.where(after, x, high), torch.where(after, value, at_high)
            slack = slack / 2
        return high, (TOGETHER * tolerance).clamp(max=1 / TOGETHER)


def _signs(values: Tensor) -> Tensor:
    """-1, 0 or 1, and NaN of NaN, of which torch.sign makes 0."""
    return torch.where(values.isnan(), values, values.sign())


def _sum(start: list[Tensor], weights: list[Tensor], powers: list[list[Tensor]]) -> list[Tensor]:
    """The leaves start + sum_d weights[d] powers[d]. weights: [rows] each."""
    found = []
    for i, leaf in enumerate(start):
        value = formulas.widened(leaf)
        for weight, of_power in zip(weights, powers, strict=True):
            value = value + formulas.per_row(weight, value) * formulas.widened(of_power[i])
        found.append(value.to(leaf.dtype))
    return found
