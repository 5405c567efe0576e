"""What a solver gives back, and what it records on the way for a gradient or an interpolant."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..ops import FIELDS
from ..solution import DenseStep
from ..tableau import ButcherTableau


@dataclass
class Trajectory:
    """ys: outputs, a leaf [len(t), ...]. last: the last accepted state. state: the solver state, None without error control."""

    ys: list[Tensor]
    last: list[Tensor]
    state: Tensor | None


@dataclass(slots=True)
class Evaluation:
    """One call of func with its graph: k = f(t, y), y and t leaves of the graph.

    mask: rows it counts for, None for all. index: of the time in the problem's t that t moves with, or None.
    """

    t: Tensor
    y: list[Tensor]
    k: list[Tensor]
    mask: Tensor | None = None
    index: int | None = None

    @property
    def slopes(self) -> list[Tensor]:
        return [slope.detach() for slope in self.k]


@dataclass(slots=True)
class Step:
    """One step in which a row was accepted: points 1 .. n with rows `a` of the tableau, the last being y1.

    evaluations: of points 1 .. n; None where there is none. dt: float64 [rows]. accept: bool [rows], None for all.
    outputs: (index, theta, mask) of each output that fell into it; theta a number or float64 [rows], 1 for y1 itself;
    mask bool [rows] or None. k, y0: values for derivatives by time. ends: for t0 and for t1, (index of the time in the problem's
    t that it moves with, mask of the rows for which it does, None for all), or None where it is taken as given.
    """

    tableau: ButcherTableau
    a: tuple[tuple[float, ...], ...]
    evaluations: list[Evaluation | None]
    dt: Tensor
    accept: Tensor | None
    outputs: list[tuple[int, float | Tensor, Tensor | None]]
    y0: list[Tensor]
    k: list[list[Tensor]]
    ends: tuple[tuple[int, Tensor | None] | None, tuple[int, Tensor | None] | None]


@dataclass
class Recorder:
    """Keeps evaluations with their graphs, in the order in which they happened, and steps as the interpolant needs them.

    graphs: keep graphs (a gradient is wanted). dense: keep slopes (an interpolant is wanted). t_grad: times get gradients.
    """

    tableau: ButcherTableau
    t: list[float]
    per_sample: bool
    graphs: bool
    dense: bool
    t_grad: bool = False
    tape: list[Step | Evaluation] = field(default_factory=list)
    dense_steps: list[DenseStep] = field(default_factory=list)

    def evaluate(self, func: Callable[..., list[Tensor]], t: Tensor, y: list[Tensor]) -> Evaluation:
        if not self.graphs:
            with torch.no_grad():
                return Evaluation(t, y, func(t, y))
        t = t.detach()
        y = [leaf.detach().requires_grad_() for leaf in y]
        if self.t_grad:
            t.requires_grad_()
        with torch.enable_grad():
            return Evaluation(t, y, func(t, y))

    def start(self, evaluation: Evaluation, index: int | None) -> None:
        if self.graphs:
            evaluation.index = index
            self.tape.append(evaluation)

    def restart(self, evaluation: Evaluation, mask: Tensor | None) -> None:
        if self.graphs:
            evaluation.mask = mask
            self.tape.append(evaluation)

    def step(
        self, host: np.ndarray, evaluations: list[Evaluation | None], slopes: list[list[Tensor]], y0: list[Tensor]
    ) -> None:
        """After an adaptive step, before the move to the next. host: the solver state. slopes: [stages][leaves]."""
        accept = host[FIELDS["accept"]] != 0
        if not accept.any():
            return
        device = y0[0].device
        mask = torch.from_numpy(accept).to(device) if self.per_sample else None
        t0, dt, t1 = (torch.from_numpy(host[FIELDS[name]].copy()).to(device) for name in ("last_time", "last_dt", "time"))
        k = [[of_stage[leaf].detach() for of_stage in slopes] for leaf in range(len(y0))]
        if self.dense:
            self.dense_steps.append(DenseStep(t0, t1, list(y0), k, mask))
        if not self.graphs:
            return
        starts = accept & (host[FIELDS["last_time"]] == self.t[0])
        lands = accept & (host[FIELDS["time"]] == self.t[-1])
        self.tape.append(
            Step(
                tableau=self.tableau,
                a=self.tableau.a[1:],
                evaluations=evaluations,
                dt=dt,
                accept=mask,
                outputs=self._outputs(host, device),
                y0=list(y0),
                k=k,
                ends=(self._end(0, starts, device), self._end(len(self.t) - 1, lands, device)),
            )
        )

    def _end(self, index: int, rows: np.ndarray, device: torch.device) -> tuple[int, Tensor | None] | None:
        if not rows.any():
            return None
        return index, torch.from_numpy(rows).to(device) if self.per_sample else None

    def _outputs(self, host: np.ndarray, device: torch.device) -> list[tuple[int, float | Tensor, Tensor | None]]:
        begin, end = host[FIELDS["output_begin"]].astype(int), host[FIELDS["output_end"]].astype(int)
        time, t0, dt = (host[FIELDS[name]] for name in ("time", "last_time", "last_dt"))
        outputs: list[tuple[int, float | Tensor, Tensor | None]] = []
        for index in range(int(begin.min()), int(end.max())):
            inside = (begin <= index) & (index < end)
            if not inside.any():
                continue
            safe = np.where(dt == 0, 1.0, dt)
            theta = np.where(self.t[index] == time, 1.0, (self.t[index] - t0) / safe)
            if self.per_sample:
                outputs.append((index, torch.from_numpy(theta).to(device), torch.from_numpy(inside).to(device)))
            else:
                outputs.append((index, float(theta[0]), None))
        return outputs
