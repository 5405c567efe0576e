"""Solves that events end or change, whole in one call of a library: forwards alone, of samples with steps of their own."""

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..callbacks import find_callbacks, may_have_callbacks
from ..event import Events
from ..integrate import Options
from ..ops import FIELDS
from ..problem import Problem, Structure
from ..solvers.trajectory import Trajectory
from ..tableau import ButcherTableau
from .build import discard
from .compilation import Compilation
from .compilers import NoCompiler
from .engine import Engine
from .event_plan import EventPlan, found_with
from .plans import LOCK
from .serve import of_options, of_torch
from .trace import Unreadable

_OUTPUT_END = FIELDS["output_end"]
_COMPARED = 2  # events of a sample: the second comes from what the first has changed
_ERRORS = 10  # of a step, by which the same solve may differ where rounding has chosen other steps
_FEW = 16  # events of a sample that there is room for at first


Found = tuple[Tensor, Tensor, Tensor]  # t and index, [K, rows], of the events of each row one by one, -1 for none; y as rows


class Log:
    """The events of a solve. t, index: [K, rows], of the k-th event of each row, and the leaves of y [K, rows, ...]; what a row
    has not, is anything. count: of each row, -1 where a value was not a number. signs: as of `Events`, at first and then at the
    last event of each row. goes_on: whether the solve does, from them."""

    def __init__(self, engine: Engine, most: int, capacity: int, signs: Tensor, goes_on: bool):
        rows, self.most, self.capacity, self.signs, self.goes_on = engine.batch, most, capacity, signs.clone(), goes_on
        self.t = torch.empty(capacity, rows, dtype=torch.float64, device="cpu")
        self.rows_of_y = engine.y0.new_empty(capacity, rows, engine.state)
        self.index = torch.empty(capacity, rows, dtype=torch.int64, device="cpu")
        self.count = torch.empty(rows, dtype=torch.int64, device="cpu")

    def bind(self, call: Any) -> None:
        places = [x.data_ptr() for x in (self.t, self.rows_of_y, self.index, self.count, self.signs)]
        call.bind_events(*places, self.capacity, self.most)


class EventSolve:
    """What serves one solve with events. most: the last of so many ends a row; None: the first, of a solve that ends there."""

    def __init__(
        self, plan: EventPlan, problem: Problem, options: Options, args: Sequence[Any], events: Events, most: int | None
    ):
        self.plan, self.args = plan, plan.rows.of(args)
        self.engine = Engine(plan, problem, options, self.args, None)
        self.most, self.goes_on = most or 1, most is not None
        unknown = torch.full((self.engine.batch, len(plan.events)), torch.nan, dtype=torch.float64, device="cpu")
        self.signs = unknown if events.signs is None else events.signs.contiguous()
        if self.engine.kind.control != "per_sample":
            raise Unreadable("events under joint control are looked at by the stepper")
        plan.build(self.engine.kind.wanted)

    def run(self) -> tuple[Trajectory, Log]:
        engine, capacity = self.engine, min(self.most, _FEW)
        start = time.perf_counter()
        while True:
            log = Log(engine, self.most, capacity, self.signs, self.goes_on)
            way = engine.kind.way(engine.plan, engine.kind.control)
            ys, state, host = engine.run(way, engine.y0, engine.problem, None, bind=log.bind)
            needed = int(log.count.max())
            if needed <= capacity:
                break
            capacity = needed
        self.plan.watch.add(time.perf_counter() - start)
        assert state is not None
        missing = torch.arange(len(ys), device=ys.device)[:, None] >= state[_OUTPUT_END]
        ys.masked_fill_(missing[:, :, None], torch.nan)
        trajectory = Trajectory(ys=engine.leaves(ys), last=engine.leaves(engine.y_last), state=state, seen=host)
        return trajectory, log

    def trusted(self, log: Log) -> bool:
        """Whether the machine code has been compared with the stepper where as much happened, and not too long ago: see
        watch.py."""
        return self.plan.compared.get(self.engine.kind.keys[0], -1) >= _happened(log) and not self.plan.watch.due

    def _tolerance(self) -> float:
        problem = self.engine.problem
        return max([float(torch.as_tensor(x, device="cpu").max()) for x in (*problem.rtol, *problem.atol)])

    def compare(self, log: Log, expected: Callable[[], Found]) -> str:
        """With what the stepper finds of the same solve: in words what differs, and then the library is used no more."""
        plan, key, start = self.plan, self.engine.kind.keys[0], time.perf_counter()
        with LOCK:
            t, index, y = expected()
        count, number = min(_COMPARED, len(t), log.capacity), (index >= 0).sum(0)
        have = torch.arange(count, device="cpu")[:, None] < log.count
        allowed = max(torch.finfo(y.dtype).eps ** 0.5, _ERRORS * self._tolerance())
        agree = log.count.clamp(max=_COMPARED) == number.clamp(max=_COMPARED)
        for k in range(count):
            same = log.index[k] == index[k]
            for ours, theirs in ((log.t[k][:, None], t[k][:, None]), (log.rows_of_y[k], y[k])):
                same &= ((ours - theirs).abs() <= allowed * (1 + theirs.abs())).all(1)
            agree &= same | ~have[k]
        if bool(agree.all()):
            plan.compared[key] = max(_happened(log), plan.compared.get(key, -1))
            plan.watch.compared(time.perf_counter() - start)
            return ""
        if 2 * int(agree.sum()) >= len(agree):  # machine code that is wrong is so for all
            return "the events of some samples are decided by rounding"
        tableau, target = self.engine.kind.wanted[0]
        reason = "the compiled field is wrong: its events differ from those of func by the stepper"
        words = discard(plan.source(tableau, target), None, reason)
        plan.refused[key] = tableau, reason
        plan.libraries.pop(key, None)
        plan.kinds.clear()
        warnings.warn(
            f"odenet_cuda.compile: {reason}, which serves instead. Please report this, with the field; {words}", stacklevel=6
        )
        return reason


def _happened(log: Log) -> int:
    """Events of the sample with the most, as far as they are compared."""
    return min(int(log.count.max()), _COMPARED)


def prepare_events(
    field: Compilation,
    args: Sequence[Any],
    problem: Problem,
    options: Options,
    structure: Structure,
    t: Tensor,
    events: Events,
    most: int | None,
) -> EventSolve | str:
    """What serves the solve, or why nothing does."""
    try:
        if not field.named:  # what is read with events keeps func alive
            return "events are compiled of fields that were compiled by name: see odenet_cuda.compile"
        if not isinstance(options.tableau, ButcherTableau) or not options.adaptive:
            return f"events between steps of method={options.method!r} are looked at by the stepper"
        if problem.device.type != "cpu":
            return "events are compiled for the CPU alone"
        if len(events.args) != len(args) or any([x is not y for x, y in zip(events.args, args, strict=True)]):
            return "events have other arguments than func"
        why = of_options(problem, options) + of_torch(t, "adjoint")
        if may_have_callbacks(field.func) and find_callbacks(field.func, structure, options.adaptive):
            why.append("callbacks of func need it")
        if why:
            return "; ".join(why)
        plan = found_with(field.plans, field.func, events.events).plan(structure, args, problem.per_sample)
        return EventSolve(plan, problem, options, args, events, most)
    except NoCompiler as error:
        return str(error)
    except Unreadable as error:
        return str(error) if problem.per_sample else f"{error}; events under joint control must have one number"
