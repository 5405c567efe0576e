"""A solve that events have ended, as a solve to them: the times of each row are those before its event, and that of the event.

So every gradient treats the state there as it treats outputs at given times. How the times of events depend on the rest comes
after it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .gradients.events import attach
from .ops import FIELDS
from .problem import OwnTimes, to_device
from .request import Request
from .solution import Solution
from .solvers.events import Crossing, EventWatch
from .solvers.trajectory import End, Index, Step, Trajectory


@dataclass
class Ended:
    """How a solve ended. request: of the solve to the events. place: in its outputs, of the last of each row. beyond: which of
    the times that were asked for lie after the event, bool [rows, T]."""

    request: Request
    watch: EventWatch
    crossing: Crossing
    place: Any
    beyond: Tensor


def watch_of(request: Request) -> EventWatch | None:
    """None without events. Raises NotImplementedError for what they are not served with."""
    problem, settings = request.problem, request.settings
    if request.events is None or len(problem.t) == 1 or problem.empty:
        return None
    if settings.regularizers or request.integrals is not None:
        what = "integrals" if request.integrals is not None else "regularizers"
        raise NotImplementedError(f"{what} are not served with events: a running cost is known at the ends of steps alone")
    return EventWatch(request.events, problem, request.options.tableau, request.structure.unflatten)


def cut(request: Request, watch: EventWatch, recorder: Any, trajectory: Trajectory) -> Ended:
    """The solve to the events, whose outputs the trajectory then has."""
    problem, state, device = request.problem, trajectory.state, request.problem.device
    given = problem.t.table if problem.own else np.asarray(problem.t)[None].repeat(problem.rows, 0)  # [rows, T]
    t1 = to_device(torch.from_numpy(given[:, -1].copy()), device) if state is None else state[FIELDS["time"]]
    with torch.no_grad():
        crossing = watch.crossing(t1, trajectory.last)
    found, at, rows = crossing.found.cpu().numpy(), crossing.t.cpu().numpy(), np.arange(problem.rows)
    beyond = found[:, None] & (np.reshape(problem.direction, (-1, 1)) * (given - at[:, None]) > 0)
    kept = ~np.isnan(given) & ~beyond
    count = kept.sum(1)
    added = found & (given[rows, count - 1] != at)  # else the event is an output already
    last = count - 1 + added
    table = np.full((len(rows), given.shape[1] + 1), math.nan)
    table[:, :-1][kept] = given[kept]
    table[rows[added], last[added]] = at[added]
    table = table[:, : int(last.max()) + 1]
    sent = lambda x: to_device(torch.from_numpy(np.ascontiguousarray(x)), device)  # noqa: E731
    place = (sent(last), sent(rows)) if problem.per_sample else int(last[0])
    missing = _missing(problem.missing, table, last, rows, added)
    t = OwnTimes(table) if problem.per_sample else table[0].tolist()
    to_events = replace(problem, t=t, missing=sent(missing) if missing.any() else None)
    trajectory.ys = [
        _with_event(y, end, place, sent(missing), sent(added), problem.per_sample)
        for y, end in zip(trajectory.ys, crossing.y, strict=True)
    ]
    trajectory.last, trajectory.call = crossing.y, None
    after = sent(beyond)
    if recorder is not None:
        _move_outputs(recorder.tape, after, place, crossing.theta, sent(added), problem.per_sample)
    times = _as_given(request.t, problem.own, kept, table)
    return Ended(request.but(problem=to_events, t=times if problem.per_sample else times[0]), watch, crossing, place, after)


def _missing(before: Tensor | None, table: np.ndarray, last: np.ndarray, rows: np.ndarray, added: np.ndarray) -> np.ndarray:
    """Outputs [T, rows] that were not reached, or whose time is NaN."""
    missing = np.isnan(table).T
    if before is not None:
        most = min(len(before), len(missing))
        missing[:most] |= before[:most].cpu().numpy()
        missing[last[added], rows[added]] = False
    return missing


def _with_event(y: Tensor, end: Tensor, place: Any, missing: Tensor, added: Tensor, per_sample: bool) -> Tensor:
    """Outputs [T, ...] with the events among them, NaN where they are missing."""
    out = y.new_full((len(missing), *y.shape[1:]), math.nan)
    out[: len(y)] = y[: len(missing)]
    out.masked_fill_(missing.reshape(*missing.shape, *[1] * (y.dim() - 2)) if y.dim() > 1 else missing[:, 0], math.nan)
    here = added.reshape(-1, *[1] * (end.dim() - 1)) if per_sample else added[0]
    out[place] = torch.where(here, end, out[place])
    return out


def _as_given(t: Tensor, own: bool, kept: np.ndarray, table: np.ndarray) -> Tensor:
    """The times [rows, T] of a table, those of the user with their gradients."""
    width = table.shape[1]
    padded = np.pad(kept, ((0, 0), (0, 1)))[:, :width]
    source = t if own else t.expand(len(table), -1)
    source = torch.cat([source, source[:, -1:].detach()], 1)[:, :width]
    chosen, others = (torch.from_numpy(x).to(t.device) for x in (padded, table))
    return torch.where(chosen, source, others.to(t.dtype))


def _move_outputs(tape: Sequence[Any], beyond: Tensor, place: Any, theta: Tensor, added: Tensor, per_sample: bool) -> None:
    """Outputs after the event, which lie in the last step of each row, are none any more; the event is one."""
    left = torch.ones_like(added)
    for step in reversed(tape):
        if not isinstance(step, Step):
            continue
        rows = left if step.accept is None else left & step.accept
        if not bool(rows.any()):
            continue
        end = None if step.ends[1] is None else _reached(*step.ends[1], beyond)
        outputs = []
        for index, at, mask in step.outputs:
            lands = step.ends_on(index) and step.ends[1] is not None and mask is step.ends[1][1]
            reached = end if lands else _reached(index, mask, beyond)
            if reached is not None:
                outputs.append((reached[0], at, reached[1]))
        step.ends = step.ends[0], end
        if per_sample and bool((rows & added).any()):
            outputs.append((place[0], theta, rows & added))
        elif not per_sample and bool(added[0]):
            outputs.append((place, float(theta[0]), None))
        step.outputs = outputs
        left = left & ~rows
        if not bool(left.any()):
            return


def _reached(index: Index, mask: Tensor | None, beyond: Tensor) -> End | None:
    """Index and mask without rows whose output of this index lies after the event; None where no row is left."""
    if not isinstance(index, Tensor):
        lost = beyond[:, index]
        if not bool(lost.any()):
            return index, mask
        mask = ~lost if mask is None else mask & ~lost
        return (index, mask) if bool(mask.any()) else None
    mask = ~beyond.gather(1, index[:, None])[:, 0] & (True if mask is None else mask)
    return (torch.where(mask, index, 0), mask) if bool(mask.any()) else None


def give(solution: Solution, request: Request, ended: Ended, outputs: Sequence[Tensor]) -> None:
    """The solution of the request from that of the solve to its events. outputs: of that, with their gradients."""
    asked, crossing, place = request.problem, ended.crossing, ended.place
    unflatten, found = request.structure.unflatten, crossing.found
    solution.ys = unflatten([_as_asked(y, ended.beyond.T) for y in outputs])
    y = [leaf[place] for leaf in outputs]
    t = ended.request.t.to(found.device, torch.float64)
    t = t.gather(1, place[0][:, None])[:, 0] if asked.per_sample else t[place : place + 1]
    t = crossing.t + (t - t.detach())
    solution._at_event = t, y
    if torch.is_grad_enabled():
        rate = crossing.rate
        if request.settings.gradient in ("adjoint", "quadrature") and any([leaf.requires_grad for leaf in y]):
            with torch.no_grad():  # their gradients are of the differential equation, not of its interpolant
                rate = asked.field(asked.time_views(crossing.t.to(asked.real)[None])[0], [leaf.detach().clone() for leaf in y])
        t, y = attach(ended.watch, crossing, t, y, rate)
    t = torch.where(found, t, math.nan)
    solution.event_t, solution.event_index = (t, crossing.index) if asked.per_sample else (t[0], crossing.index[0])
    solution._event_signs = crossing.signs
    of_rows = [found.reshape(-1, *[1] * (leaf.dim() - 1)) if asked.per_sample else found[0] for leaf in y]
    solution.event_y = unflatten([torch.where(rows, leaf, math.nan) for rows, leaf in zip(of_rows, y, strict=True)])
    if solution.interpolant is not None:
        solution.interpolant.end(crossing.t)


def _as_asked(y: Tensor, beyond: Tensor) -> Tensor:
    """Outputs at the times that were asked for, NaN after the events. beyond: bool [T, rows]."""
    lacking = max(0, len(beyond) - len(y))
    y = torch.cat([y, y.new_full((lacking, *y.shape[1:]), math.nan)])[: len(beyond)]
    return y.masked_fill(beyond.reshape(*beyond.shape, *[1] * (y.dim() - 2)) if y.dim() > 1 else beyond[:, 0], math.nan)


def without(request: Request, solution: Solution) -> None:
    """Of a solve without steps: no event."""
    rows, device, per_sample = request.problem.rows, request.problem.device, request.problem.per_sample
    t, index = torch.full((rows,), math.nan, dtype=torch.float64, device=device), torch.full((rows,), -1, device=device)
    solution.event_t, solution.event_index = (t, index) if per_sample else (t[0], index[0])
    solution.event_y = request.structure.unflatten([torch.full_like(leaf, math.nan) for leaf in request.problem.state_leaves])
