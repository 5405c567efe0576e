"""What a solver gives back, and what it records on the way for a gradient or an interpolant."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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


Output = tuple[int, "float | Tensor", "Tensor | None"]
End = tuple[int, "Tensor | None"]


@dataclass(slots=True)
class Step:
    """One step in which a row was accepted: points 1 .. n with rows `a` of the tableau, the last being y1.

    evaluations: of points 1 .. n; None where there is none. dt: a number, or float64 [rows] per sample. accept: bool [rows],
    None for all. outputs: (index, theta, mask) of each output that fell into it; theta a number or float64 [rows], 1 for y1
    itself; mask bool [rows] or None. y0, k: the state at its start and its slopes, [stages][leaves]. ends: for t0 and for t1,
    (index of the time in the problem's t that it moves with, mask of the rows for which it does, None for all), or None where
    it is taken as given.
    """

    a: tuple[tuple[float, ...], ...]
    evaluations: Sequence[Evaluation | None]
    dt: float | Tensor
    accept: Tensor | None
    outputs: list[Output]
    y0: list[Tensor]
    k: list[list[Tensor]]
    ends: tuple[End | None, End | None]


class Recorder:
    """Keeps evaluations with their graphs, in the order in which they happened, and steps as the interpolant needs them.

    graphs: keep graphs (a gradient is wanted). dense: keep slopes (an interpolant is wanted). t_grad: times get gradients.
    """

    def __init__(
        self, tableau: ButcherTableau, t: list[float], per_sample: bool, graphs: bool, dense: bool, t_grad: bool = False
    ):
        self.tableau, self.t, self.per_sample = tableau, t, per_sample
        self.graphs, self.dense, self.t_grad = graphs, dense, t_grad
        self.tape: list[Step | Evaluation] = []
        self.dense_steps: list[DenseStep] = []
        self._mode = torch.enable_grad() if graphs else torch.no_grad()

    def evaluate(self, func: Callable[..., list[Tensor]], t: Tensor, y: list[Tensor], y_grad: bool = True) -> Evaluation:
        """Calls func. t and y must be the solver's own: they become leaves of the graph. y_grad: y needs a gradient."""
        if self.graphs and y_grad:
            for leaf in y:
                leaf.requires_grad_()
            if self.t_grad:
                t.requires_grad_()
        with self._mode:
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
        self, host: np.ndarray, evaluations: Sequence[Evaluation | None], slopes: list[list[Tensor]], y0: list[Tensor]
    ) -> None:
        """After an adaptive step, before the move to the next. host: the solver state. slopes: [stages][leaves]."""
        if self.per_sample:
            self._step_of_rows(host, evaluations, slopes, y0)
        elif host[_ACCEPT, 0]:
            t0, dt, time = (float(host[i, 0]) for i in (_LAST_TIME, _LAST_DT, _TIME))
            begin, end = int(host[_OUTPUT_BEGIN, 0]), int(host[_OUTPUT_END, 0])
            outputs: list[Output] = [(i, 1.0 if self.t[i] == time else (self.t[i] - t0) / dt, None) for i in range(begin, end)]
            starts = (0, None) if t0 == self.t[0] else None
            lands = (len(self.t) - 1, None) if time == self.t[-1] else None
            self._keep(t0, time, Step(self.tableau.rows, evaluations, dt, None, outputs, y0, list(slopes), (starts, lands)))

    def _step_of_rows(
        self, host: np.ndarray, evaluations: Sequence[Evaluation | None], slopes: list[list[Tensor]], y0: list[Tensor]
    ) -> None:
        accept = host[_ACCEPT] != 0
        if not accept.any():
            return
        to_device = lambda values: torch.from_numpy(np.array(values)).to(y0[0].device)  # noqa: E731
        t0, dt, time = host[_LAST_TIME], host[_LAST_DT], host[_TIME]
        begin, end = host[_OUTPUT_BEGIN].astype(int), host[_OUTPUT_END].astype(int)
        outputs: list[Output] = []
        for index in range(int(begin.min()), int(end.max())):
            inside = (begin <= index) & (index < end)
            if inside.any():
                theta = np.where(self.t[index] == time, 1.0, (self.t[index] - t0) / np.where(dt == 0, 1.0, dt))
                outputs.append((index, to_device(theta), to_device(inside)))
        ends = []
        for index, rows in ((0, accept & (t0 == self.t[0])), (len(self.t) - 1, accept & (time == self.t[-1]))):
            ends.append((index, to_device(rows)) if rows.any() else None)
        step = Step(
            self.tableau.rows,
            evaluations,
            to_device(dt),
            to_device(accept),
            outputs,
            y0,
            list(slopes),
            (ends[0], ends[1]),
        )
        self._keep(to_device(t0), to_device(time), step)

    def _keep(self, t0: float | Tensor, t1: float | Tensor, step: Step) -> None:
        if self.graphs:
            self.tape.append(step)
        if self.dense:
            device, leaves = step.y0[0].device, range(len(step.y0))
            ends = [torch.as_tensor(x, dtype=torch.float64, device=device).reshape(-1) for x in (t0, t1)]
            k = [[of_stage[leaf].detach() for of_stage in step.k if of_stage] for leaf in leaves]
            self.dense_steps.append(DenseStep(ends[0], ends[1], [leaf.detach() for leaf in step.y0], k, step.accept))

    def fixed_step(self, t0: float, t1: float, step: Step) -> None:
        """A step of a method on a grid."""
        self._keep(t0, t1, step)


_ACCEPT, _TIME, _LAST_TIME, _LAST_DT, _OUTPUT_BEGIN, _OUTPUT_END = (
    FIELDS[name] for name in ("accept", "time", "last_time", "last_dt", "output_begin", "output_end")
)
