"""What a solver gives back, and what it records on the way for a gradient or an interpolant."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..attempts import TOLD
from ..interpolant import DenseStep
from ..ops import FIELDS
from ..problem import OwnTimes, to_device
from ..tableau import Method


@dataclass
class Trajectory:
    """ys: outputs, a leaf [len(t), ...]. last: the last accepted state. state: the solver state, None without error control.
    sums: what was added up after the steps. call: of func, late in the solve, where its numbers are still there: in memory that
    the next solve may write. steps: taken on a grid, 0 for all. system: that of a step on a grid that failed, see `StepFailed`.
    words: why it failed, where no code says so. seen: the state as a NumPy array, once the host has waited. slope: with which
    the next step would begin, a tensor a leaf; none where it is not known. pair: the last states of a scheme of two."""

    ys: list[Tensor]
    last: list[Tensor]
    state: Tensor | None
    sums: Sequence[Tensor] = ()
    call: "Evaluation | None" = None
    steps: int = 0
    system: int | None = None
    words: str = ""
    seen: Any = None
    slope: Sequence[Tensor] = ()
    pair: Sequence[Tensor] = ()

    def host_state(self) -> Any:
        """The state as a NumPy array; None without one. The host waits for the device once."""
        if self.seen is None and self.state is not None:
            self.seen = self.state.cpu().numpy()
        return self.seen


@dataclass(slots=True)
class Evaluation:
    """One call of func: k = f(t, y); where its graph is kept, y and t are leaves of it. y and k are empty where only what
    was done is kept, not its values.

    mask: rows it counts for, None for all. end: what t moves with, see `Step`. noise: where random generators stood before it.
    """

    t: Tensor
    y: list[Tensor]
    k: list[Tensor]
    mask: Tensor | None = None
    end: "End | None" = None
    noise: Any = None

    def again(self, field: Callable[..., list[Tensor]]) -> list[Tensor]:
        """What it gives now, by this field, with a graph where gradients are recorded."""
        return field(self.t, self.y)

    def copy(self) -> "Evaluation":
        """The values, in memory of their own."""
        t, *leaves = [x.detach().clone() for x in (self.t, *self.y, *self.k)]
        return Evaluation(t, leaves[: len(self.y)], leaves[len(self.y) :])


Index = int | Tensor  # of a time in the problem's t: a number, or of each row, int64 [rows]
Output = tuple[Index, "float | Tensor", "Tensor | None"]
End = tuple[Index, "Tensor | None"]


@dataclass(slots=True)
class Step:
    """One step in which a row was accepted: points 1 .. n with the rows of the tableau, the last being y1.

    times: [stages, rows], at which func was called; first: [rows], at which it gave the first slope, perhaps in an earlier
    step. dt: a number, or float64 [rows] per sample. accept: bool [rows], None for all. outputs: (index, theta, mask) of each
    output that fell into it; theta a number or float64 [rows], 1 for y1 itself; mask bool [rows] or None. ends: for t0 and for
    t1, (index of the time in the problem's t that it moves with, mask of the rows for which it does, None for all), or None
    where it is taken as given.

    y0: the state at its start, or None where it is not kept. k: its slopes, [stages][leaves]; without graphs the first alone,
    and none where func gives it from y0. evaluations: of points 1 .. n, None where there is none, or the one of a step that
    is recorded as a whole; empty without graphs.
    noise: where random generators stood before the first slope and before that of point 1, where func draws numbers.
    method: that made it, where not all steps are by that of the solve.
    broken: whether the error of a row that was rejected is no number.
    """

    times: Tensor
    first: Tensor
    dt: float | Tensor
    accept: Tensor | None
    outputs: list[Output]
    ends: tuple[End | None, End | None]
    y0: list[Tensor] | None
    k: list[list[Tensor]]
    evaluations: Sequence[Evaluation | None] = ()
    noise: Any = None
    method: Any = None
    broken: bool = False

    def ends_on(self, index: Index) -> bool:
        """Whether an output is the end of the step itself, which moves with its time."""
        end = self.ends[1]
        if end is None:
            return False
        return end[0] is index if isinstance(index, Tensor) or isinstance(end[0], Tensor) else end[0] == index

    def each_output(self) -> Iterator[tuple[int, "float | Tensor", "Tensor | None", bool]]:
        """Its outputs, one number at a time, and whether they are the end of the step."""
        for index, theta, mask in self.outputs:
            if not isinstance(index, Tensor):
                yield index, theta, mask, self.ends_on(index)
                continue
            assert mask is not None
            for i in index[mask].unique().tolist():
                yield i, theta, mask & (index == i), self.ends_on(index)


class Recorder:
    """Keeps what a gradient or an interpolant needs, in the order in which it happened.

    leaves: of the state; those after them are quadratures. graphs: keep evaluations with their graphs. checkpoints: keep the
    states at the start of steps, as many as it allows, and what was done between. dense: keep slopes (an interpolant is
    wanted). t_grad: times get gradients. carried: a step begins with the last slope of the step before even where that is not
    f at its start. step_costs: added up over the steps. drawn: a list in which func's calls note their random generators.
    last: the state that the solve came to, with which steps made again are compared.
    """

    def __init__(
        self,
        tableau: Method,
        t: Any,
        per_sample: bool,
        leaves: int,
        *,
        graphs: bool = False,
        checkpoints: Any = None,
        dense: bool = False,
        t_grad: bool = False,
        carried: bool = False,
        step_costs: Any = None,
        drawn: list[Any] | None = None,
    ):
        self.drawn, self._first_noise = drawn, None
        self.last: list[Tensor] | None = None
        self.leaves, self.step_costs = leaves, step_costs
        self.tableau, self.t, self.per_sample = tableau, t, per_sample
        self.graphs, self.checkpoints, self.dense, self.t_grad, self.carried = graphs, checkpoints, dense, t_grad, carried
        self.slopes = graphs or dense or step_costs is not None  # whether the slopes and stages of a step must outlive it
        self.every_slope = dense  # whether that at the end of the last step is needed too
        self.tape: list[Step | Evaluation] = []
        self.dense_steps: list[DenseStep] = []
        self.tried: list[np.ndarray] = []  # what `Attempts` tells of each step that was tried, where dense
        self._first: Any = None
        self._mode = torch.enable_grad() if graphs else torch.no_grad()
        self.owned = False  # the states that it is handed are its own: nobody writes into them
        self.at_once = False  # it uses slopes of a step that the next step overwrites

    @property
    def can_wait(self) -> bool:
        """Whether it may be told of the steps after the solve, and need not forget some on the way."""
        return not self.at_once and self.drawn is None and (self.checkpoints is None or self.checkpoints.limit is None)

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
        """A first slope. index: of the time in the problem's t that its time moves with, or None."""
        self._first = evaluation.t.detach().reshape(-1).clone()
        self._keep_evaluation(evaluation, None, None if index is None else (index, None))

    def restart(self, evaluation: Evaluation, mask: Tensor | None) -> None:
        """A first slope for the rows of the mask, beyond a discontinuity."""
        t = evaluation.t.detach().reshape(-1).clone()  # the solver writes its times again
        self._first = t if mask is None else torch.where(mask, t, self._first)
        self._keep_evaluation(evaluation, mask, None)

    def _keep_evaluation(self, evaluation: Evaluation, mask: Tensor | None, end: End | None) -> None:
        if self.graphs:
            evaluation.mask, evaluation.end = mask, end
            self.tape.append(evaluation)
        elif self.checkpoints is not None:
            if self.drawn:
                self._first_noise = self.drawn[-1]
                self.drawn.clear()
            self.tape.append(Evaluation(evaluation.t.detach().clone(), [], [], mask, end, self._first_noise))

    def step(
        self,
        host: np.ndarray,
        evaluations: Sequence[Evaluation | None],
        slopes: list[list[Tensor]],
        y0: list[Tensor],
        times: Tensor,
    ) -> None:
        """After an adaptive step, before the move to the next. host: the solver state. slopes: [stages][leaves]."""
        if self.drawn and not host[_ACCEPT, 0]:
            self.drawn.clear()
        if self.dense:
            self.tried.append(host[TOLD])
        if self.per_sample:
            self._step_of_rows(host, evaluations, slopes, y0, times)
        elif host[_ACCEPT, 0]:
            t0, dt, time = (float(host[i, 0]) for i in (_LAST_TIME, _LAST_DT, _TIME))
            begin, end = int(host[_OUTPUT_BEGIN, 0]), int(host[_OUTPUT_END, 0])
            outputs: list[Output] = [(i, 1.0 if self.t[i] == time else (self.t[i] - t0) / dt, None) for i in range(begin, end)]
            starts = (0, None) if t0 == self.t[0] else None
            lands = (len(self.t) - 1, None) if time == self.t[-1] else None
            self._keep(t0, time, Step(times, self._first, dt, None, outputs, (starts, lands), y0, slopes, evaluations))
            self._first = times[-1]

    def _step_of_rows(
        self,
        host: np.ndarray,
        evaluations: Sequence[Evaluation | None],
        slopes: list[list[Tensor]],
        y0: list[Tensor],
        times: Tensor,
    ) -> None:
        accept = host[_ACCEPT] != 0
        if not accept.any():
            return
        sent = lambda values: to_device(torch.from_numpy(np.array(values)), y0[0].device)  # noqa: E731
        t0, dt, time = host[_LAST_TIME], host[_LAST_DT], host[_TIME]
        starts, lands = accept & (t0 == self.t[0]), accept & (time == self.t[-1])
        outputs: list[Output] = [
            (index if isinstance(index, int) else sent(index), sent(theta), sent(inside))
            for index, theta, inside in self._outputs_inside(host, lands)
        ]
        begins: End | None = (0, sent(starts)) if starts.any() else None
        ends: End | None = None
        if lands.any():
            ends = sent(self.t.last) if isinstance(self.t, OwnTimes) else len(self.t) - 1, sent(lands)
            outputs.append((ends[0], 1.0, ends[1]))
        rows = sent(accept)
        step = Step(times, self._first, sent(dt), rows, outputs, (begins, ends), y0, slopes, evaluations)
        step.broken = not np.isfinite(host[_RATIO][~accept]).all()
        self._keep(sent(t0), sent(time), step)
        self._first = torch.where(rows, times[-1], self._first)

    def _outputs_inside(self, host: np.ndarray, lands: np.ndarray) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:
        """The first output in the step of each row, the second, and so on: (index, theta, mask), without the last outputs of
        rows that land on them."""
        t0, dt, time = host[_LAST_TIME], host[_LAST_DT], host[_TIME]
        begin, end = host[_OUTPUT_BEGIN].astype(np.int64), host[_OUTPUT_END].astype(np.int64) - lands
        rows = np.arange(len(begin))
        for place in range(int((end - begin).max())):
            index = begin + place
            inside = index < end
            index = np.where(inside, index, 0)
            t = self.t.table[rows, index] if isinstance(self.t, OwnTimes) else np.asarray(self.t)[index]
            theta = np.where(inside & (t != time), (t - t0) / np.where(dt == 0, 1.0, dt), 1.0)
            first = int(index[inside][0])
            yield first if (index[inside] == first).all() else index, theta, inside

    def fixed_step(self, t0: float, t1: float, step: Step) -> None:
        """A step of a method on a grid."""
        step.first = self._first
        self._keep(t0, t1, step)
        self._first = step.times[-1]

    def _keep(self, t0: float | Tensor, t1: float | Tensor, step: Step) -> None:
        assert step.y0 is not None
        if self.dense:
            device, leaves = step.y0[0].device, range(self.leaves)
            ends = [torch.as_tensor(x, dtype=torch.float64, device=device).reshape(-1) for x in (t0, t1)]
            k = [[of_stage[leaf].detach() for of_stage in step.k if of_stage] for leaf in leaves]
            self.dense_steps.append(DenseStep(ends[0], ends[1], [step.y0[leaf].detach() for leaf in leaves], k, step.accept))
        if self.step_costs is not None:
            self.step_costs.add(step)
        if self.graphs:
            step.k = list(step.k)
            self.tape.append(step)
        elif self.checkpoints is not None:
            step.method = getattr(step.evaluations[0], "method", None) if step.evaluations else None
            step.evaluations = ()
            if self.drawn is not None:
                calls, inside = len(self.drawn), self.tableau.stages - 1
                step.noise = self._first_noise, self.drawn[max(0, calls - inside)] if self.drawn and inside else None
                self._first_noise = self.drawn[-1] if self.drawn else None
                self.drawn.clear()
            keep = self.checkpoints.add(step)
            own = torch.detach if self.owned else lambda leaf: leaf.detach().clone()
            step.k = [[own(leaf) for leaf in step.k[0]]] if keep and self.carried else []
            step.y0 = [own(leaf) for leaf in step.y0] if keep else None
            self.tape.append(step)


_ACCEPT, _RATIO, _TIME, _LAST_TIME, _LAST_DT, _OUTPUT_BEGIN, _OUTPUT_END = (
    FIELDS[name] for name in ("accept", "error_ratio", "time", "last_time", "last_dt", "output_begin", "output_end")
)
