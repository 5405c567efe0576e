"""What a solve gives as its outputs: values of a function of them, and which they are."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .landing import lands
from .ops import FIELDS
from .problem import OwnTimes, Problem, Structure
from .request import Request
from .solution import Solution
from .solvers.collect import AtTimes, EveryStep
from .solvers.trajectory import Recorder, Step, Trajectory
from .step_control import SUCCESS


class Save:
    """``save(t, y)`` over leaves, with the structure of what it gives, learnt at its first call."""

    def __init__(self, func: Callable[..., Any], unflatten: Callable[[Sequence[Tensor]], Any], rows: int | None):
        """rows: of samples that it gives one row each, None under joint control."""
        self.func, self.unflatten, self.rows = func, unflatten, rows
        self.structure: Structure | None = None

    def __call__(self, t: Tensor, leaves: list[Tensor]) -> list[Tensor]:
        found = self.func(t, self.unflatten(leaves))
        if self.structure is None:
            self.structure = self._checked(found)
        given = self.structure.flatten(found)
        for leaf, first in zip(given, self.structure.leaves, strict=True):
            if leaf.shape != first.shape or leaf.dtype is not first.dtype:
                had, got = (f"{list(x.shape)} of {x.dtype}" for x in (first, leaf))
                raise ValueError(f"save must return one shape and type at all outputs, {had} at the first, got {got}")
        return [leaf if torch.is_grad_enabled() else leaf.clone() for leaf in given]

    def _checked(self, found: Any) -> Structure:
        try:
            structure = Structure(found).without_graph()
        except (TypeError, ValueError):
            raise TypeError(f"save must return a tensor or a nest of them, got {type(found).__name__}") from None
        for leaf in structure.leaves:
            if not (leaf.is_floating_point() or leaf.is_complex()):
                raise TypeError(f"save must return floating or complex numbers, got {leaf.dtype}")
            if self.rows is not None and leaf.shape[:1] != (self.rows,):
                raise ValueError(f"save must return a row for each sample, [{self.rows}, ...], got shape {list(leaf.shape)}")
        return structure


def saved(solution: Solution, func: Callable[..., Any], per_sample: bool, t: Tensor | None = None) -> None:
    """The outputs of a solution become what save makes of them, with gradients. t: their times, perhaps with a gradient."""
    leaves, spec = pytree.tree_flatten(solution.ys)
    times = solution.t if t is None or t.shape != solution.t.shape else t
    times = times.to(leaves[0].device, leaves[0].dtype.to_real())
    save = Save(func, lambda parts: pytree.tree_unflatten(parts, spec), leaves[0].shape[1] if per_sample else None)
    found = []
    for i in range(len(leaves[0])):
        at = times[..., i]
        if per_sample:
            at = at.expand(leaves[0].shape[1]).reshape(-1, *[1] * (leaves[0].dim() - 2))
        found.append(save(at, [leaf[i] for leaf in leaves]))
    assert save.structure is not None
    solution.ys = save.structure.unflatten([torch.stack(parts) for parts in zip(*found, strict=True)])


def streams(request: Request) -> bool:
    """Whether what is saved is made of the steps as they come, and the states are not kept."""
    alone = request.save is not None and not torch.is_grad_enabled() and request.events is None
    alone = alone and not lands(request.options.tableau)
    return alone and request.options.adaptive and not request.problem.empty and len(request.problem.t) > 1


def collector_of(request: Request) -> AtTimes | EveryStep | None:
    """What takes the outputs from the steps, None where they are written by the solve itself. Raises ValueError and
    NotImplementedError where they cannot be taken so."""
    problem, every, save = request.problem, request.settings.every, request.save
    if every:
        if not request.options.adaptive:
            raise ValueError(f"every needs an adaptive method, got {request.options.method!r}: give the times of its grid as t")
        if len(problem.t) != 2:
            raise ValueError(f"t must hold two times with every, the first and the last, got {len(problem.t)}")
        if request.events is not None:
            raise NotImplementedError("every is not served with events: give the times of outputs as t")
    keep: Any = lambda t, leaves: leaves  # noqa: E731
    saves = streams(request)
    if saves and save is not None:
        keep = Save(save, request.structure.unflatten, problem.rows if problem.per_sample else None)
    if every and not problem.empty:
        return EveryStep(problem, every, keep)
    return AtTimes(problem, request.options.tableau, keep) if saves else None


def ends_alone(problem: Problem) -> Problem:
    """The same with its first and last time as outputs."""
    if not problem.own:
        return replace(problem, t=[problem.t[0], problem.t[-1]])
    table = np.stack([problem.t[0], np.where(problem.t.last > 0, problem.t[-1], np.nan)], 1)
    return replace(problem, t=OwnTimes(table))


def give(solution: Solution, collector: AtTimes | EveryStep, trajectory: Trajectory) -> None:
    """The solution of a solve without gradients gets what was collected."""
    leaves, times = collector.outputs(trajectory.last, trajectory.host_state())
    keep: Any = collector.keep
    problem, flat = collector.problem, not isinstance(keep, Save)
    structure = None if flat else keep.structure
    if isinstance(collector, EveryStep):
        times = OwnTimes(times) if problem.per_sample else times[0].tolist()
    unflatten = problem.field.structure.unflatten if structure is None else structure.unflatten  # type: ignore[attr-defined]
    solution.ys, solution._times, solution._t, solution.saved = unflatten(leaves), times, None, not flat


def with_every(request: Request, collector: EveryStep, recorder: Recorder | None, trajectory: Trajectory) -> Request:
    """The request of a solve whose outputs are those that were collected, which the trajectory and what was recorded then have:
    their times are taken as given, but for the first and the last."""
    problem, state = request.problem, trajectory.host_state()
    trajectory.ys, times = collector.outputs(trajectory.last, state)
    missing = np.isnan(times).T.copy()
    last = (~np.isnan(times)).sum(1) - 1
    lost = (state[FIELDS["status"]] != SUCCESS) & (state[FIELDS["time"]] != collector.t1)
    missing[last[lost], np.flatnonzero(lost)] = True
    t: Any = OwnTimes(times) if problem.per_sample else times[0].tolist()
    mask = torch.from_numpy(missing).to(problem.device)
    if recorder is not None:
        index = torch.from_numpy(last).to(problem.device) if problem.per_sample else int(last[0])
        _renumber(recorder.tape, collector.every, index)
    given = request.t if request.t.dim() == 2 else request.t.expand(problem.rows, -1)
    moving = torch.from_numpy(times).to(given.device, torch.float64)
    moving[:, 0] = given[:, 0]
    at = torch.from_numpy(last).to(given.device)[:, None]
    ends = given.double().gather(1, (~given.detach().isnan()).sum(1, keepdim=True) - 1)
    moving = moving.scatter(1, at, ends)
    return request.but(
        problem=replace(problem, t=t, missing=mask if missing.any() else None), t=moving if problem.per_sample else moving[0]
    )


def _renumber(tape: Sequence[Any], every: int, last: int | Tensor) -> None:
    """The outputs of the steps of a tape are the ends of every n-th and the last. last: the index of the latter, or [rows]."""
    count: Any = 0
    index: Any = 0
    for step in tape:
        if not isinstance(step, Step):
            continue
        end, outputs = step.ends[1], list[Any]()
        lands = False if end is None else True if end[1] is None else end[1]
        if step.accept is None:
            count += 1
            if count % every == 0 and not lands:
                index += 1
                outputs.append((index, 1.0, None))
        else:
            count = count + step.accept.long()
            here = step.accept & (count % every == 0)
            here = here if lands is False else here & ~lands
            index = index + here.long()
            if bool(here.any()):
                outputs.append((index, torch.ones_like(step.dt), here))  # type: ignore[arg-type]
        if end is not None:
            step.ends = step.ends[0], (last, end[1])
            outputs.append((last, 1.0, end[1]))
        step.outputs = outputs
