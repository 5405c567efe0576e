"""The solution of parts that were solved one after the other."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .ops import FIELDS
from .problem import Structure
from .solution import Solution, Stats
from .step_control import SUCCESS


class SummedStats(Stats):
    """Of solves that were made one after the other. calls: of func between them."""

    def __init__(self, parts: Sequence[Stats], calls: int):
        self.parts, self.calls, self._per_sample = list(parts), calls, parts[0]._per_sample

    @property
    def nfe(self) -> int:  # type: ignore[override]
        return self.calls + sum([part.nfe for part in self.parts])

    @property
    def nfe_backward(self) -> int:  # type: ignore[override]
        return sum([part.nfe_backward for part in self.parts])

    @property
    def num_accepted(self) -> int | Tensor:
        return sum([part.num_accepted for part in self.parts])

    @property
    def num_rejected(self) -> int | Tensor:
        return sum([part.num_rejected for part in self.parts])

    @property
    def adjoint_drift(self) -> float | Tensor:
        drifts: list[Any] = [part.adjoint_drift for part in self.parts]
        return torch.stack(drifts).amax(0) if self._per_sample else max(drifts)


def joined(
    parts: Sequence[Solution],
    structure: Structure,
    times: Any,
    last: Sequence[Tensor],
    place: np.ndarray,
    event_place: Sequence[np.ndarray] | None,
    per_sample: bool,
    calls: int,
) -> Solution:
    """structure: of the start, and with it. times: those that were asked for. last: the leaves at the end. calls: of func
    between the parts.

    place: of each of the outputs among the start and the outputs of all parts, -1 for none, [T, rows]. event_place: of the
    event of each part among those of its row, -1 for none, [rows]; None without events.
    """
    states = [part._state for part in parts if part._state is not None]
    state, name = (states[-1].clone() if states else None), FIELDS["status"]
    for other in reversed(states[:-1]):
        assert state is not None
        state[name] = torch.where(other[name] == SUCCESS, state[name], other[name])
    start = [leaf[None] for leaf in structure.leaves]
    ys = _gathered([start, *[structure.flatten(part.ys) for part in parts]], place, per_sample)
    solution = Solution(
        structure.unflatten(ys),
        times,
        SummedStats([part.stats for part in parts], calls),
        structure.unflatten([leaf.detach() for leaf in last]),
        device=start[0].device,
        per_sample=per_sample,
        state=state,
    )
    solution.engine, solution.explanation = parts[0].engine, parts[0].explanation
    if event_place is not None:
        _add_events(solution, parts, structure, event_place, per_sample)
    return solution


def _add_events(
    solution: Solution, parts: Sequence[Solution], structure: Structure, numbers: Sequence[np.ndarray], per_sample: bool
) -> None:
    """The k-th event of each row, NaN where it had fewer."""
    place = np.full((1 + max([int(x.max()) for x in numbers]), len(numbers[0])), -1)
    for i, of_part in enumerate(numbers):
        rows = np.flatnonzero(of_part >= 0)
        place[of_part[rows], rows] = i
    t = [[part.event_t[None]] for part in parts if part.event_t is not None]
    y = [[leaf[None] for leaf in structure.flatten(part.event_y)] for part in parts]
    index = [[part.event_index[None].double()] for part in parts if part.event_index is not None]
    solution.event_t = _gathered(t, place, per_sample)[0]
    solution.event_y = structure.unflatten(_gathered(y, place, per_sample))
    found = _gathered(index, place, per_sample)[0]
    solution.event_index = torch.where(found.isnan(), -1, found).long()


def _gathered(parts: Sequence[Sequence[Tensor]], place: np.ndarray, per_sample: bool) -> list[Tensor]:
    """Entries [T, ...] of parts [W, ...], one behind the other, by their place [T, rows]; NaN for -1."""
    device, rows = parts[0][0].device, place.shape[1]
    where, missing = (torch.from_numpy(x).to(device) for x in (np.maximum(place, 0), place < 0))
    found = []
    for leaves in zip(*parts, strict=True):
        every = torch.cat(list(leaves))
        value = every[where, torch.arange(rows, device=device)] if per_sample else every[where[:, 0]]
        mask = missing if per_sample else missing[:, 0]
        found.append(value.masked_fill(mask.reshape(*mask.shape, *[1] * (value.dim() - mask.dim())), math.nan))
    return found
