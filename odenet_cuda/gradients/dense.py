"""The gradient of an interpolant: the times that it is asked for are taken as further outputs of the solve."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..held import Captured
from ..problem import OwnTimes, Problem, times_as_tensor
from ..solution import Stats
from ..solvers.trajectory import Output, Recorder, Step
from . import checkpoint, direct
from .first_only import End

_NONE = (
    "gradient={!r} does not reach the values of an interpolant: solve with gradient='direct' or 'checkpoint', give the times "
    "as outputs, or detach the values"
)


class DenseGradient:
    """Attaches the gradient of the solve to values at any times. chosen: as in `Watch`."""

    def __init__(
        self,
        gradient: str,
        recorder: Recorder,
        problem: Problem,
        y0: Sequence[Tensor],
        t: Tensor,
        captured: Captured,
        stats: Stats,
        chosen: bool,
    ):
        self.gradient, self.problem, self.y0, self.t = gradient, problem, list(y0), t
        self.captured, self.stats, self.chosen = captured, stats, chosen
        self.recorder = copy.copy(recorder)
        self.recorder.tape = list(recorder.tape)  # the way back of the outputs uses theirs up
        self.recorder.step_costs = None

    def __call__(self, at: Tensor, values: list[Tensor]) -> list[Tensor]:
        """values: leaves [times, *leaf.shape] at times [times] or [times, rows]."""
        if self.gradient not in ("direct", "checkpoint"):
            return list(End.apply(_NONE.format(self.gradient), len(values), *values, at, *self.y0, *self.captured.tensors))
        unknown = values[0].detach().isnan().reshape(len(at), self.problem.rows, -1).any(2)
        first, (problem, recorder) = len(self.problem.t), self._asked(at.detach(), unknown)
        known = self.t.to(at.device, torch.float64)
        if problem.own:
            columns = at.T if at.dim() == 2 else at.expand(problem.rows, len(at))
            t = torch.cat([known.expand(problem.rows, first), columns], 1)
        else:
            t = torch.cat([known, at])
        n = len(problem.state_leaves)
        ys = [torch.cat([x.new_zeros(first, *x.shape[1:]), x]) for x in values] + [x.clone() for x in problem.leaves[n:]]
        if self.gradient == "direct":
            ys = direct.attach(recorder, problem, ys, self.y0, t, self.captured, self.stats)
        else:
            ys = checkpoint.attach(recorder, problem, ys, self.y0, t, self.captured, self.stats, self.chosen)
        return [self._started(y[first:], y0, at) for y, y0 in zip(ys, self.y0, strict=False)]

    def _started(self, value: Tensor, y0: Tensor, at: Tensor) -> Tensor:
        """At the one time of a sample that has no other, its value is y0 itself."""
        if not self.problem.own or bool((self.problem.t.last > 0).all()):
            return value
        still = torch.from_numpy(self.problem.t.last == 0).to(at.device) & ~at.isnan()
        return torch.where(still.reshape(*still.shape, *[1] * (y0.dim() - 1)), y0, value)

    def _asked(self, at: Tensor, unknown: Tensor) -> tuple[Problem, Recorder]:
        """The problem with these times behind its own, and what was recorded of its steps with them as its outputs. unknown:
        values that are not there, bool [times, rows]."""
        problem, first, own = self.problem, len(self.problem.t), self.problem.own or at.dim() == 2
        times = at if at.dim() == 2 else at[:, None]
        start = torch.as_tensor(problem.t[0], dtype=torch.float64, device=at.device).reshape(-1)
        covered = torch.zeros(len(at), problem.rows, dtype=torch.bool, device=at.device)
        steps, tape = iter(self.recorder.dense_steps), []
        for entry in self.recorder.tape:
            if isinstance(entry, Step):
                theta, inside = next(steps).place(times, start)
                covered |= inside
                entry = replace(entry, outputs=_outputs(theta, inside, first, entry.accept is not None))
            tape.append(entry)
        recorder = copy.copy(self.recorder)
        recorder.tape = tape
        if own:
            table = times_as_tensor(problem.t).expand(problem.rows, first)
            t: Any = np.concatenate([table.numpy(), times.expand(-1, problem.rows).T.cpu().numpy()], 1)
            t = OwnTimes(t, problem.last_output + np.zeros(problem.rows, dtype=np.int64))
        else:
            t = [*problem.t, *at.tolist()]
        missing = None
        unknown = unknown | ~covered
        if bool(unknown.any()):
            missing = torch.cat([unknown.new_zeros(first, problem.rows), unknown])
        return replace(problem, t=t, missing=missing), recorder


def _outputs(theta: Tensor, inside: Tensor, first: int, masked: bool) -> list[Output]:
    """Those of a step at theta [times, rows]; the first of them has that index."""
    here = inside.any(1).nonzero()[:, 0].tolist()
    if not masked:
        shares = theta[here, 0].tolist()
        return [(first + i, share, None) for i, share in zip(here, shares, strict=True)]
    return [(first + i, torch.where(inside[i], theta[i], 1.0), inside[i]) for i in here]
