"""Solves whose state changes on the way: one solve after the other, each from where an event or a jump has left its rows.

Each begins at times of each row and with a state that move with what came before, so the gradient of the whole is that of its
parts by the chain rule, with the jump of the derivative at an event (the saltation term) in it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .event import Events, Jump, applied, chosen
from .gradients.events import moved
from .joined import joined
from .ops import FIELDS
from .problem import Field, OwnTimes, Structure, check_samples, check_state, check_times, with_arguments
from .settings import Settings
from .solution import Solution
from .step_control import SUCCESS

Run = Callable[[Any, Any, Events | None], Solution]


def goes_on(events: Events | None, jumps: Sequence[Jump]) -> bool:
    """Whether a solve changes its state on the way."""
    return bool(jumps) or (events is not None and any([event.goes_on for event in events.events]))


def in_segments(
    run: Run,
    at_once: Callable[[Any, Callable[[Run], Solution]], Solution | None],
    func: Callable,
    y0: Any,
    t: Any,
    args: Sequence[Any],
    events: Events | None,
    jumps: Sequence[Jump],
    max_events: Any,
    settings: Settings,
    refused: Sequence[tuple[str, bool]] = (),
) -> Solution:
    """run: solves from a state at times, until events. at_once: the whole, if something serves
    it so, which is handed how a run makes it. refused: what else is not served, and whether it is asked for. Raises
    ValueError, TypeError and NotImplementedError as `solve` does."""
    if not isinstance(max_events, int) or isinstance(max_events, bool) or max_events < 1:
        raise ValueError(f"max_events must be a whole number of at least 1, got {max_events!r}")
    for name, asked in (("dense=True", settings.dense), ("regularizers", settings.regularizers), *refused):
        if asked:
            raise NotImplementedError(f"{name} is not served where events or jumps change the state")
    structure = check_state(y0)
    if settings.per_sample:
        check_samples(structure)
    if all([leaf.numel() == 0 for leaf in structure.leaves]):
        return run(structure, t, events)  # there is nothing to change

    def by(run: Run) -> Solution:
        field = Field(with_arguments(func, args), structure)
        return _Segments(run, field, structure, t, args, events, jumps, max_events, settings.per_sample).solve()

    found = at_once(structure, by)
    return by(run) if found is None else found


class _Segments:
    """One such solve.

    Rows are samples under per-sample control, else the state is one row. Numbers on the host tell where each row is; tensors
    beside them have the gradients.
    """

    def __init__(
        self,
        run: Run,
        field: Field,
        structure: Structure,
        t: Any,
        args: Sequence[Any],
        events: Events | None,
        jumps: Sequence[Jump],
        max_events: int,
        per_sample: bool,
    ):
        self.run, self.field, self.structure, self.args = run, field, structure, tuple(args)
        self.events, self.jumps = events, jumps
        self.max_events, self.per_sample = max_events, per_sample
        self.y: list[Tensor] = list(structure.leaves)
        self.device = self.y[0].device
        self.rows = rows = self.y[0].shape[0] if per_sample else 1
        self.asked, values = check_times(t, batch=rows if per_sample else None)
        self.times = values
        moving = self.asked.double()
        self.t = moving if isinstance(values, OwnTimes) else moving.expand(rows, -1)  # [rows, T]
        self.table = self.t.detach().cpu().numpy()
        self.count = (~np.isnan(self.table)).sum(1)
        row = np.arange(rows)
        self.end = self.table[row, self.count - 1]
        self.direction = np.where(self.end < self.table[:, 0], -1.0, 1.0)
        self.now, self.at = self.t[:, 0], self.table[:, 0].copy()  # where each row is
        self.going = self.at != self.end
        self.tables = [jump.table(rows, per_sample) for jump in jumps]  # [rows, J]
        self.next_jump = [np.zeros(rows, dtype=np.int64) for _ in jumps]
        self.now_of = np.full(rows, -1)  # which of the jumps `now` moves with, -1: with none
        self._check_jumps()
        self.happened = np.zeros(rows, dtype=np.int64)  # events of each row
        self.place = np.where(np.arange(self.table.shape[1])[:, None] == 0, 0, -1).repeat(rows, 1)  # of outputs in parts
        self.event_place: list[np.ndarray] = []  # of the events of each segment: which one of its row, -1 for none
        self.parts: list[Solution] = []
        self.lengths = [1]  # of the outputs of each, behind the start

    def solve(self) -> Solution:
        while True:
            self._jump()
            if self.parts and not self.going.any():
                where = self.place, self.event_place if self.events is not None else None
                return joined(self.parts, self.structure, self.times, self.y, *where, self.per_sample, self.field.nfe)
            self._segment()

    # ---- jumps ------------------------------------------------------------------------------------------------------------

    def _check_jumps(self) -> None:
        for table in self.tables:
            numbers = table.detach().cpu().numpy()
            early = self.direction[:, None] * (numbers - self.at[:, None]) < 0
            steps = self.direction[:, None] * np.diff(numbers) < 0
            if early.any() or steps.any():
                row = int((early.any(1) | steps.any(1)).argmax())
                raise ValueError(
                    f"times of a Jump must follow one another in the direction of the solve, none before its start, "
                    f"{self.at[row]:.9g}, got {numbers[row].tolist()}"
                )

    def _upcoming(self, which: int) -> np.ndarray:
        """The next time of a jump of each row, NaN without one."""
        numbers, index = self.tables[which].detach().cpu().numpy(), self.next_jump[which]
        beyond = index >= numbers.shape[1]
        return np.where(beyond, math.nan, numbers[np.arange(self.rows), np.where(beyond, 0, index)])

    def _jump(self) -> None:
        """Rows change at the jumps that they have come to."""
        for which, jump in enumerate(self.jumps):
            while True:
                here = self.going & (self._upcoming(which) == self.at)
                if not here.any():
                    break
                last = self.tables[which].shape[1] - 1
                index = torch.from_numpy(np.minimum(self.next_jump[which], last))
                i = index.to(self.device) if self.per_sample else index[0].to(self.device)
                self._move_to(which, here, index)
                state = self.structure.unflatten(self.y)
                self._change(here, jump.apply(self._time(), state, i, *self.args), "apply of a Jump")
                self.next_jump[which] += here

    def _move_to(self, which: int, here: np.ndarray, index: Tensor) -> None:
        """From here on these rows are where they are because a jump is, not because an output is, or the start: the state
        before it moves with that. index: of the time of the jump, [rows]."""
        table, other = self.tables[which], here & (self.now_of != which)
        if torch.is_grad_enabled() and (table.requires_grad or self.now.requires_grad) and other.any():
            t = table.gather(1, index.to(table.device)[:, None])[:, 0].to(self.now.device)
            now = torch.where(torch.from_numpy(other).to(self.now.device), t, self.now)
            with torch.no_grad():
                rate = self.field(self._time(), [leaf.detach().clone() for leaf in self.y])
            self.y = moved(self.y, rate, (now - self.now).to(self.device))
            self.now = now
        self.now_of[here] = which

    def _time(self) -> Tensor:
        """Where the rows are as func sees it."""
        real = self.y[0].dtype.to_real()
        t = self.now.to(self.device, real)
        return t.reshape(-1, *[1] * (self.y[0].dim() - 1)) if self.per_sample else t[0]

    def _mask(self, rows: np.ndarray) -> Tensor:
        mask = torch.from_numpy(rows).to(self.device)
        return mask if self.per_sample else mask[0]

    def _change(self, rows: np.ndarray, state: Any, name: str) -> None:
        self.y = chosen(self._mask(rows), applied(state, name, self.structure.flatten, self.y), self.y)

    # ---- one segment ------------------------------------------------------------------------------------------------------

    def _segment(self) -> None:
        """Every row goes on to its next jump, to its end, or to an event."""
        times, first, inside, stops = self._times_ahead()
        state: Any = Structure(self.structure.unflatten(self.y), any_shape=self.structure.any_shape)
        part = self.run(state, times if self.per_sample else times[0][~times[0].isnan()], self.events)
        self._note_outputs(part, first, inside, times.shape[1])
        found, index, ok = self._outcome(part)
        before = self.y
        last, now = self._last_of(part, times)
        if part.event_t is not None:
            last, now = self._at_events(part, found, index, last, now)
        self.y = chosen(self._mask(ok), last, [leaf.detach() for leaf in before])
        self._arrive(now, ok)
        self.now_of = np.where(found, -1, stops)
        self.going = self.going & ok & (self.at != self.end)
        self._after_events(found & ok, index, part._event_signs)

    def _times_ahead(self) -> tuple[Tensor, np.ndarray, np.ndarray, np.ndarray]:
        """(the times of the segment [rows, W] from where each row is, NaN where it has fewer; the first output ahead of each;
        those of its outputs that lie in it, [rows, T]; which of the jumps its last time is that is none of them, or -1)."""
        ahead = self.direction[:, None] * (self.table - self.at[:, None]) > 0
        first = np.where(ahead.any(1), ahead.argmax(1), self.count)
        stop, which = self._next_stop()
        until = self.direction[:, None] * self.table <= np.where(which < 0, math.inf, self.direction * stop)[:, None]
        inside = ahead & until & self.going[:, None]
        number = inside.sum(1)
        row = np.arange(self.rows)
        extra = (which >= 0) & ((number == 0) | (self.table[row, np.clip(first + number - 1, 0, None)] != stop))
        pool = [self.now.to(self.t.device)[:, None], self.t]
        for i, table in enumerate(self.tables):
            column = torch.from_numpy(np.minimum(self.next_jump[i], table.shape[1] - 1))[:, None]
            pool.append(table.to(self.t.device).gather(1, column.to(self.t.device)))
        width = int((1 + number + extra).max())
        index = np.zeros((self.rows, width), dtype=np.int64)
        valid = np.arange(width) < (1 + number + extra)[:, None]
        index[:, 1:] = 1 + first[:, None] + np.arange(width - 1)
        index[row[extra], 1 + number[extra]] = 1 + self.table.shape[1] + which[extra]
        index = np.where(valid, index, 0)
        times = torch.cat(pool, 1).gather(1, torch.from_numpy(index).to(self.t.device))
        times = torch.where(torch.from_numpy(valid).to(self.t.device), times, math.nan)
        return times, first, inside, np.where(extra, which, -1)

    def _next_stop(self) -> tuple[np.ndarray, np.ndarray]:
        """(the next time of a jump of each row, of which jump: -1 where none comes until its end)."""
        if not self.jumps:
            return np.full(self.rows, math.nan), np.full(self.rows, -1)
        upcoming = np.stack([self._upcoming(which) for which in range(len(self.jumps))])
        signed = self.direction * upcoming
        signed = np.where(self.going & (signed <= self.direction * self.end), signed, math.inf)
        which, row = signed.argmin(0), np.arange(self.rows)
        none = np.isinf(signed[which, row])
        return np.where(none, math.nan, upcoming[which, row]), np.where(none, -1, which)

    def _note_outputs(self, part: Solution, first: np.ndarray, inside: np.ndarray, width: int) -> None:
        """Which outputs lie in this segment, and where. inside: those no later than the next jump, [rows, T]."""
        at_event = np.full(self.rows, math.nan) if part.event_t is None else part.event_t.detach().reshape(-1).cpu().numpy()
        reached = inside & ~(self.direction[:, None] * (self.table - at_event[:, None]) > 0)
        place = sum(self.lengths) + 1 + np.arange(self.table.shape[1]) - first[:, None]
        self.place = np.where(reached.T, place.T, self.place)
        self.parts.append(part)
        self.lengths.append(width)

    def _outcome(self, part: Solution) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(rows with an event, which one, rows that did not fail)."""
        none = np.full(self.rows, -1)
        index = none if part.event_index is None else part.event_index.reshape(-1).cpu().numpy()
        ok = np.ones(self.rows, dtype=bool)
        if part._state is not None:
            ok = (part._state[FIELDS["status"]] == SUCCESS).cpu().numpy()
        return (index >= 0) & self.going, index, ok

    def _last_of(self, part: Solution, times: Tensor) -> tuple[list[Tensor], Tensor]:
        """The state at the last time of each row, and the times."""
        ys = self.structure.flatten(part.ys)
        place = (~times.detach().isnan()).sum(1) - 1
        now = times.gather(1, place[:, None])[:, 0]
        if not self.per_sample:
            return [leaf[-1] for leaf in ys], now
        return [leaf[place.to(self.device), torch.arange(self.rows, device=self.device)] for leaf in ys], now

    def _at_events(
        self, part: Solution, found: np.ndarray, index: np.ndarray, last: list[Tensor], now: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """The same, of rows with an event those there. Where it changes nothing the solve goes on as if it were not: nothing
        that comes later moves with its time."""
        assert self.events is not None and part.event_t is not None
        changes = np.array([event.apply is not None for event in self.events.events])[index]
        t, y = part.event_t.reshape(-1), self.structure.flatten(part.event_y)
        for rows, t_of, y_of in ((found, *(part._at_event or (t, y))), (found & changes, t, y)):
            last = chosen(self._mask(rows), y_of, last)
            now = torch.where(torch.from_numpy(rows).to(now.device), t_of.to(now.device), now)
        return last, now

    def _arrive(self, now: Tensor, ok: np.ndarray) -> None:
        """Where the rows are now."""
        moved = self.going & ok
        self.now = torch.where(torch.from_numpy(moved).to(now.device), now, self.now.to(now.device))
        self.at = self.now.detach().cpu().numpy().copy()

    def _after_events(self, found: np.ndarray, index: np.ndarray, signs: Tensor | None) -> None:
        """Rows with an event end or go on from a changed state. signs: see `Crossing`."""
        self.event_place.append(np.where(found, self.happened, -1))
        self.happened = self.happened + found
        if self.events is None:
            return
        over = found & (self.happened >= self.max_events)
        for k, event in enumerate(self.events.events):
            here = found & (index == k)
            if not event.goes_on:
                over = over | here
            elif event.apply is not None and (here & self.going & ~over).any():
                state = event.apply(self._time(), self.structure.unflatten(self.y), *self.args)
                self._change(here & self.going & ~over, state, f"apply of event {k}")
        self.going = self.going & ~over
        if signs is not None:
            signs = torch.where(self._mask(found).reshape(-1, 1), signs, math.nan)
        self.events = replace(self.events, from_zero=False, signs=signs)
