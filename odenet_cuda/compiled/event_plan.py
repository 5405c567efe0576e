"""A field read together with its event functions and what they change: one program, whose slopes those of func come first in.

Event functions are often made anew for every solve, as lambdas are. What was read of others serves them, where they are alike:
of the same code, with the same things in their closures and defaults.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from ..event import Event
from ..problem import Structure
from ..tableau import Method
from .emit import Target, emit
from .function_text import FunctionText
from .functions import Function
from .plan import Plan
from .plans import Plans
from .refusals import MOST_AHEAD
from .trace import Unreadable
from .watch import Watch

_MOST = MOST_AHEAD  # sets of event functions, the latest, that are kept of a field
MADE_ANEW = (
    "the event functions are others from call to call: keep them, and hand what differs to them in args; or call reset()"
)
_HEAD = "const SolveCall& in, const P& t, const P* y, const P* arguments"


class WithEvents:
    """What is read of a func with these events. func: of both, see `together`."""

    def __init__(self, func: Callable, events: Sequence[Event]):
        self.events = tuple(events)
        self.func = together(func, [event.fn for event in events], [event.apply for event in events if event.apply])
        self.plans = Plans()

    def are(self, events: Sequence[Event]) -> bool:
        """Whether it is what would be read with these."""
        return len(events) == len(self.events) and all(
            [
                (x.direction, x.terminal) == (y.direction, y.terminal) and alike(x.fn, y.fn) and alike(x.apply, y.apply)
                for x, y in zip(events, self.events, strict=True)
            ]
        )

    def plan(self, structure: Structure, args: Sequence[Any], per_sample: bool) -> "EventPlan":
        """Raises Unreadable."""
        y = structure.unflatten(structure.leaves)
        first = structure.leaves[0]
        batch = first.shape[:1] if per_sample else ()
        numbers = [first.new_zeros(batch) for _ in self.events]
        state = Structure((y, numbers, [y for event in self.events if event.apply]), any_shape=True)
        kind = self.plans.kind(state, args, per_sample, on_cuda=False)
        if kind.refusals:
            raise Unreadable("; ".join(kind.refusals))
        plan = self.plans.find(self.func, kind, state, args)
        if plan.with_events is None:
            plan.with_events = EventPlan(plan, self.events, len(structure.leaves))
        return plan.with_events


def together(func: Callable, functions: Sequence[Callable], changes: Sequence[Callable]) -> Callable:
    """A func of the state (y, values, changed states)."""

    def both(t: Any, state: Any, *args: Any) -> Any:
        y, numbers, _ = state
        slopes, t = func(t, y, *args), _of_samples(t, y, numbers[0])
        values = [_as_one(fn(t, y, *args), like) for fn, like in zip(functions, numbers, strict=True)]
        return slopes, values, [_in_shape(change(t, y, *args), y) for change in changes]

    return both


def _of_samples(t: Any, y: Any, like: Any) -> Any:
    """The time as the stepper has it: of the rank of y where each sample has one, also where func is read with one for all."""
    if t.dim() or not like.dim():
        return t
    return t.expand(len(like), *[1] * (pytree.tree_leaves(y)[0].dim() - 1))


def _in_shape(state: Any, y: Any) -> Any:
    """A changed state, which takes no other shape: the stepper says so in words."""
    shapes = [[x.shape for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)] for tree in (state, y)]
    if shapes[0] != shapes[1]:
        raise Unreadable(f"apply of an event gives shapes {shapes[0]} for {shapes[1]}")
    return state


def _as_one(value: Any, like: Any) -> Any:
    """One number a sample, whatever axes of length 1 come with it."""
    return value.reshape(like.shape) if value.shape[: like.dim()] == like.shape else value


def found_with(plans: Plans, func: Callable, events: Sequence[Event]) -> WithEvents:
    """plans: of func. Raises Unreadable."""
    plans.begin(func)
    kept = plans.with_events
    found = next((x for x in kept if x.are(events)), None)
    if found is None:
        plans.event_readings.begin((), (), MADE_ANEW)
        found = WithEvents(func, events)
    else:
        plans.event_readings.served += 1
    kept[:] = [found, *[x for x in kept if x is not found][: _MOST - 1]]
    return found


def alike(x: Any, y: Any) -> bool:
    """Whether two functions do the same wherever they are called."""
    if x is y:
        return True
    if type(x) is MethodType and type(y) is MethodType:
        return x.__func__ is y.__func__ and x.__self__ is y.__self__
    if type(x) is not FunctionType or type(y) is not FunctionType:
        return False
    if x.__code__ is not y.__code__ or x.__globals__ is not y.__globals__ or x.__dict__ or y.__dict__:
        return False
    parts = [(*(f.__defaults__ or ()), *(f.__kwdefaults__ or {}).items(), *map(_content, f.__closure__ or ())) for f in (x, y)]
    return len(parts[0]) == len(parts[1]) and all([_same(a, b) for a, b in zip(*parts, strict=True)])


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return cell


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and type(a) in (int, float, bool, str) and repr(a) == repr(b)) or alike(a, b)


class EventPlan(Plan):
    """A plan of func with its events, for solves of the state alone."""

    def __init__(self, plan: Plan, events: Sequence[Event], leaves: int):
        self.__dict__.update({**plan.__dict__, "with_events": None})
        if plan.recording.counters or plan.recording.counting:
            raise Unreadable("func or an event function counts its calls")
        self.events = tuple(events)
        self.leaf_sizes = plan.leaf_sizes[:leaves]
        self.state = sum(self.leaf_sizes)
        slopes, begin = plan.program.slopes, self.state
        self._values, begin = slopes[begin : begin + len(events)], begin + len(events)
        changing = [e for e, event in enumerate(events) if event.apply]
        self._changes = dict(zip(changing, slopes[begin:].reshape(len(changing), self.state), strict=True))  # by event
        self.program = replace(plan.program, slopes=slopes[: self.state])
        self.libraries, self.refused, self.kinds = {}, {}, {}
        self.compared: dict[Any, int] = {}  # of each library: how many events of a sample, see event_solve.py
        self.watch = Watch()

    def source(self, tableau: Method, target: Target) -> str:
        more = [Function("event_values", f"{_HEAD}, P* values, P*", self._text("values", self._values))]
        more += [Function(f"apply_{e}", f"{_HEAD}, P* to, P*", self._text("to", x)) for e, x in self._changes.items()]
        return emit(self.program, tableau, self.leaf_sizes, f"{self.title}, events", target, ({}, 0), more, self._members())

    def _text(self, name: str, results: Any) -> FunctionText:
        return FunctionText(self.program, [(name, results)])

    def _members(self) -> str:
        calls = "".join([f"    if constexpr (e == {e}) apply_{e}(in, t, y, arguments, to, to);\n" for e in self._changes])
        return (
            f"  static constexpr int events = {len(self.events)};\n"
            + _of_each("int direction", [str(event.direction) for event in self.events])
            + _of_each("bool ends", [str(not event.goes_on).lower() for event in self.events])
            + _of_each("bool applies", [str(e in self._changes).lower() for e in range(len(self.events))])
            + f"  template <int e, class P>\n  ODENET_HD static void apply({_HEAD}, P* to) {{\n{calls}  }}\n"
        )


def _of_each(head: str, values: Sequence[str]) -> str:
    """A constant of each event as C++ text."""
    lines = "".join([f"    if (e == {e}) return {value};\n" for e, value in enumerate(values)])
    return f"  ODENET_HD static constexpr {head}(int e) {{\n{lines}    return 0;\n  }}\n"
