"""A compiled field with readable events, whole in one call of its library; see `engines/compiled.py`, which asks this."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import ended, recorded
from .compiled.attach import Sources
from .compiled.engine import evaluations
from .compiled.event_solve import EventSolve, Found, Log, prepare_events
from .gradients.events import moved
from .outcome import failed, solution_of
from .problem import Problem, Structure
from .request import Request
from .solution import Solution, Stats
from .solvers.events import Crossing, EventValues
from .solvers.trajectory import Trajectory

_NAME = "events"


def refusal(request: Request, most: int | None = None) -> str:
    """Why no library serves it; else what solves is ready in `request.prepared`. most: the last of so many events ends a row
    of a solve that goes on from them; None: the first does, of one that ends there."""
    problem, settings, events = request.problem, request.settings, request.events
    assert events is not None and request.compiled is not None
    if problem.empty or len(problem.t) == 1:
        return "there is nothing to solve"
    for name, asked in (("dense=True", settings.dense), ("regularizers", bool(settings.regularizers))):
        if asked:
            return f"{name} with events needs the stepper"
    if events.from_zero:
        with torch.no_grad():
            values = EventValues(events, problem, request.structure.unflatten)
            if bool((values.values(problem.start_time(False), problem.state_leaves) == 0).any()):
                return "an event function is zero at the start"
    structure, options = request.structure, request.options
    found = prepare_events(request.compiled, request.args, problem, options, structure, request.t, events, most)
    if isinstance(found, str):
        return found
    wanted = Sources(found.plan, structure, found.args, None, request.t).wanted
    if wanted and most is not None:
        return "gradients go from one event to the next"
    request.prepared[_NAME] = found, wanted
    return ""


def solve(
    request: Request, run: Callable[[Request], Solution], by_stepper: Callable[[], Solution] | None = None
) -> Solution | str:
    """To the first event, or without gradients to the last of `most`; the Solution then has those of each row one by one. run:
    solves a request without events. by_stepper: the same solve by the stepper."""
    found, wanted = request.prepared.pop(_NAME)
    trajectory, log = found.run()
    if bool((log.count < 0).any()):
        return "the value of an event function is not a number"
    if not found.trusted(log) and (reason := found.compare(log, lambda: _expected(request, by_stepper))):
        return reason
    problem = request.problem
    nfe = evaluations(request.options, trajectory.host_state(), None, problem) + (int(log.count.max()) if log.goes_on else 0)
    stats = Stats(nfe, problem.per_sample, trajectory.state, 0, problem.rows)
    failed(request, problem, trajectory, trajectory.ys, stats)
    if wanted:
        return _with_gradient(request, found, trajectory, log, stats, run)
    solution = solution_of(request, problem, trajectory.ys, trajectory, None, stats)
    _add(solution, request, found, log)
    return solution


def _add(solution: Solution, request: Request, found: EventSolve, log: Log) -> None:
    """The events of the solve. Of one that goes on behind them, all of them, the k-th of each row at k."""
    count = int(log.count.max())
    have = torch.arange(max(count, 1), device="cpu")[:, None] < log.count
    t = torch.where(have, log.t[: len(have)], torch.nan)
    index = torch.where(have, log.index[: len(have)], -1)
    leaves = found.engine.leaves(log.rows_of_y[: len(have)])
    per_sample = request.problem.per_sample
    known = have if per_sample else have[:, 0]
    y = [torch.where(known.reshape(*known.shape, *[1] * (x.dim() - known.dim())), x, torch.nan) for x in leaves]
    if not per_sample:
        t, index = t[:, 0], index[:, 0]
    if not log.goes_on:
        t, index, y = t[0], index[0], [x[0] for x in y]
        solution._event_signs = log.signs
    elif count == 0:
        t, index, y = t[:0], index[:0], [x[:0] for x in y]
    solution.event_t, solution.event_index, solution.event_y = t, index, request.structure.unflatten(y)


class _Found(EventValues):
    """Events that were found in a solve."""

    def __init__(self, request: Request, log: Log, leaves: list[Tensor]):
        assert request.events is not None
        super().__init__(request.events, request.problem, request.structure.unflatten)
        self.log, self.leaves = log, leaves

    def crossing(self, t1: Tensor, last: list[Tensor]) -> Crossing:
        """As of an `EventWatch`."""
        problem, found = self.problem, self.log.count > 0
        index = torch.where(found, self.log.index[0], -1)
        t = torch.where(found, self.log.t[0], t1)
        masks = [found.reshape(-1, *[1] * (x.dim() - 1)) if problem.per_sample else found[0] for x in last]
        y = [torch.where(mask, x, z) for mask, x, z in zip(masks, self.leaves, last, strict=True)]
        field: Any = problem.field
        rate = field.again()(problem.time_views(t.to(problem.real)[None])[0], [leaf.clone() for leaf in y])
        pace = [x.abs() for x in rate]
        return Crossing(found, index, index.clamp(min=0), self.log.signs, t, torch.ones_like(t), y, rate, pace)


def _with_gradient(
    request: Request,
    found: EventSolve,
    trajectory: Trajectory,
    log: Log,
    stats: Stats,
    run: Callable[[Request], Solution],
) -> Solution:
    """The solve to the events once more, as one to given times, from which the gradient comes."""
    watch: Any = _Found(request, log, [x[0] for x in found.engine.leaves(log.rows_of_y[:1])])
    end = ended.cut(request, watch, None, trajectory)
    problem, structure, t = replace(end.request.problem, missing=None), request.structure, end.request.t
    times = _Times(problem, t) if t.requires_grad else None
    if times is not None:
        t, leaves = t.detach(), times.move(structure.leaves, 0, -1.0)
        structure = Structure(structure.unflatten(leaves), any_shape=structure.any_shape)
    solution = run(end.request.but(events=None, problem=problem, structure=structure, t=t, given=(t, *request.given[1:])))
    solution.stats, outputs = stats, structure.flatten(solution.ys)
    if times is not None:
        at_times = [times.move([y[i] for y in outputs], i, 1.0) for i in range(1, len(outputs[0]))]
        outputs = [torch.stack([y[0], *of_leaf]) for y, *of_leaf in zip(outputs, *at_times, strict=True)]
    ended.give(solution, request, end, [_as_found(y, x, end) for y, x in zip(outputs, end.crossing.y, strict=True)])
    return solution


def _as_found(outputs: Tensor, y: Tensor, end: ended.Ended) -> Tensor:
    """The outputs of a leaf, which at the events is y as it was found, on the interpolant: there the event functions are zero,
    and other events of that time come at that time."""
    found = end.crossing.found
    rows = found.reshape(-1, *[1] * (y.dim() - 1)) if end.request.problem.per_sample else found[0]
    change = torch.zeros_like(outputs)
    change[end.place] = torch.where(rows, y - outputs.detach()[end.place], 0.0)
    return outputs + change


class _Times:
    """Times of a solve that have a gradient: the state there moves with them along the solution, as with its adjoint."""

    def __init__(self, problem: Problem, t: Tensor):
        self.problem, self.field = problem, problem.field.again()  # type: ignore[attr-defined]
        of_rows = t if t.dim() == 2 else t.expand(problem.rows, -1)
        self.t = of_rows.to(problem.device, torch.float64)

    def move(self, leaves: Sequence[Tensor], i: int, sign: float) -> list[Tensor]:
        """The state at the i-th time, or where the solve begins so much earlier as that is later: sign -1."""
        t = torch.nan_to_num(self.t[:, i])
        with torch.no_grad():
            rate = self.field(self.problem.time_views(t.detach().to(self.problem.real)[None])[0], [x.clone() for x in leaves])
        missing = self.t[:, i].isnan()
        rate = [k.masked_fill(missing.reshape(-1, *[1] * (k.dim() - 1)), 0.0) if self.problem.per_sample else k for k in rate]
        return moved(leaves, rate, sign * (t - t.detach()))


def _expected(request: Request, by_stepper: Callable[[], Solution] | None) -> Found:
    """The events as the stepper finds them."""
    field: Any = request.problem.field
    with torch.no_grad():
        if by_stepper is None:
            solution = recorded.solve(request.but(problem=replace(request.problem, field=field.again())))
        else:
            solution = by_stepper()
    rows, leaves = request.problem.rows, request.structure.flatten(solution.event_y)
    assert solution.event_t is not None and solution.event_index is not None
    t = solution.event_t.detach().reshape(-1, rows)
    sizes = [like.numel() // rows for like in request.structure.leaves]
    y = torch.cat([leaf.detach().reshape(len(t), rows, size) for leaf, size in zip(leaves, sizes, strict=True)], 2)
    return t, solution.event_index.reshape(-1, rows), y
