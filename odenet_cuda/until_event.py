"""odeint with event_fn: a solve that only an event ends."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .event import Event, Events
from .methods import ADAPTIVE
from .problem import Structure, check_times
from .solution import Solution, SolverError

MOST_STEPS = 100_000  # of an adaptive method from the start to the event, unless max_num_steps says otherwise
MOST_GRID_STEPS = 20_000  # of a method on a grid
_FIRST_STEPS = 64  # that are planned at once on a grid; then twice as many, and so on


def until_event(
    run: Callable[..., Solution], event_fn: Callable, state: Structure, t: Any, method: str, options: dict[str, Any]
) -> tuple[Tensor, Any]:
    """(event_t, solution), the latter [2, ...] a leaf: the start and the event. run: `solve` with all but the state, the times
    and the events. options: of the solve, by name.

    Raises ValueError where t does not hold two times, the start and one that tells the direction, or a method on a grid has no
    step_size; SolverError where no event comes.
    """
    t, times = check_times(t)
    if len(times) != 2:
        raise ValueError(f"t must hold two times with event_fn, the start and one that tells the direction, got {len(times)}")
    direction = math.copysign(1.0, times[1] - times[0])
    events = Events((Event(event_fn),), from_zero=True)
    if method in ADAPTIVE:
        far = direction * torch.finfo(state.leaves[0].dtype.to_real()).max / 2
        limit = options.get("max_num_steps", MOST_STEPS)
        far_on = torch.cat([t[:1].double(), t.new_tensor([far], dtype=torch.float64)])
        solution = run(state, far_on, events=events, max_num_steps=limit)
    else:
        solution = _on_grid(run, events, state, t[0], direction, options.get("step_size"), method)
    assert solution.event_t is not None  # of a solve with events
    if options.get("on_failure") != "return":
        _refuse_none(solution)
    found = state.flatten(solution.event_y)
    ys = [torch.stack([leaf.to(y.dtype), y]) for leaf, y in zip(state.leaves, found, strict=True)]
    return solution.event_t.to(t.device, t.dtype), state.unflatten(ys)


def _on_grid(
    run: Callable[..., Solution],
    events: Events,
    state: Structure,
    t0: Tensor,
    direction: float,
    step_size: float | None,
    method: str,
) -> Solution:
    """One solve after the other, for nobody knows the last step beforehand."""
    if step_size is None:
        raise ValueError(f"event_fn with method={method!r}, which does not choose its steps, needs step_size in options")
    done, count = 0, _FIRST_STEPS
    while True:
        ends = torch.tensor([done, done + count], dtype=torch.float64, device=t0.device)
        solution = run(state, t0.double() + direction * step_size * ends, events=events)
        done += count
        count = min(2 * count, MOST_GRID_STEPS - done)
        assert solution.event_index is not None
        if count == 0 or int(solution.event_index) >= 0:
            return solution
        last = [leaf[-1] for leaf in state.flatten(solution.ys)]
        state, events = Structure(state.unflatten(last), any_shape=state.any_shape), replace(events, from_zero=False)


def _refuse_none(solution: Solution) -> None:
    assert solution.event_index is not None
    missing = solution.event_index.reshape(-1).lt(0)
    if bool(missing.any()):
        sample = int(missing.nonzero()[0]) if solution.per_sample else None
        where = "" if sample is None else f" in sample {sample}"
        t0, t1 = float(solution.t[0]), float(solution.t[-1])
        raise SolverError(
            f"no event{where}: event_fn has not changed its sign from t = {t0:.9g} to {t1:.9g}. Remedy: look at its sign at "
            "the start and along the solution; solve(..., events=) takes a last time, and event_index = -1 says that none came",
            status="no event",
            sample=sample,
            t=t1,
            dt=math.nan,
            solution=solution,
        )
