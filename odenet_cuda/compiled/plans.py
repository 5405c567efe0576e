"""What has been read of a field: a few plans of each kind of state, looked up at every call, and readings where none serves."""

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from ..problem import Structure
from ..solvers.stiffness import Looks
from .leaks import line_of, summary
from .marks import Disturbed
from .plan import Plan
from .reading import Reading
from .refusals import Never, Readings, Refused
from .rows import Tried
from .trace import Unreadable

_SERVED = (torch.float32, torch.float64)
_SMALL = 64  # numbers: a batch of no more, whose samples are mixed, is read as one sample
_MOST_PLANS = 4  # kept of one kind of state: those of training and of evaluation, say
_MOST_TRIED = 4  # choices of what has one row a sample that could be recorded
_MOST_KINDS = 256  # of states, of which is kept what follows from them alone
_FLAGS = (  # of torch, which func may ask for; whether gradients or inference mode are on is left to check.py
    torch.are_deterministic_algorithms_enabled, torch.is_deterministic_algorithms_warn_only_enabled,
    torch.is_warn_always_enabled, torch.get_float32_matmul_precision,
)  # fmt: skip
LOCK = threading.RLock()  # of whoever calls func with what is not the user's
_turns = 0  # of readings that have begun and have ended


class KindOfState:
    """What follows from types and shapes alone. kinds: for which there are plans, the second of a state that is one sample;
    refusals: in words. per_sample, by_time, second: of what is asked for, see `key_of_state`."""

    def __init__(self, key: tuple, structure: Structure, on_cuda: bool):
        leaves = structure.leaves
        rows = leaves[0].shape[0] if leaves[0].dim() else -1
        of_samples = tuple([(leaf.dtype, leaf.device, leaf.shape[1:], leaf.dim(), rows == 1) for leaf in leaves])
        _, given, *rest = key
        # An argument may have one entry a sample.
        given = [(*x[1:], x[0][1:], True) if type(x) is tuple and x[0][:1] == (rows,) else x for x in given]
        kind = structure.spec, of_samples, tuple(given), *rest
        self.kinds = kind, (kind, tuple([leaf.shape for leaf in leaves]))
        self.empty = any(leaf.numel() == 0 for leaf in leaves)
        self.per_sample, self.by_time, self.second = key[3:6]
        self.refusals: list[str] = []
        if leaves[0].device.type != "cpu" and not on_cuda:
            words = f"the state is on {leaves[0].device}; compile(func, cuda=True) serves it, which no GPU has run yet"
            self.refusals.append(words)
        if len({leaf.dtype for leaf in leaves}) > 1 or leaves[0].dtype not in _SERVED:
            self.refusals.append("the state is not all float32 or all float64")


def key_of_state(
    structure: Structure, args: Sequence[Any], per_sample: bool, by_time: bool = False, second: bool = False
) -> tuple:
    """Shapes and types, by which a kind of state is found; what else a reading depends on is compared by the guards of each.
    by_time: df/dt is wanted; second: second derivatives."""
    leaves = tuple([(leaf.shape, leaf.dtype, leaf.device) for leaf in structure.leaves])
    given: Any = ()
    if args:
        given = tuple(
            [
                (x.shape, x.dtype, x.device, x.requires_grad, type(x), not vars(x))  # attributes of Python
                if isinstance(x, Tensor)
                else type(x)
                for x in args
            ]
        )
    device = torch.get_default_device() if torch._C._len_torch_function_stack() else None
    spec = None if structure.single else structure.spec
    return leaves, given, spec, per_sample, by_time, second, device, *[flag() for flag in _FLAGS]


class Plans:
    """Of one field. pure: see `compile`. kept: the last few of each kind; latest: that of the last solve. looks: whether its
    solves are due to be looked at, for stiffness."""

    def __init__(self, pure: bool = False) -> None:
        self.pure = pure
        self.looks = Looks()
        self._kinds: dict[tuple, KindOfState] = {}
        self._read_of: Callable[[Any], bool] | None = None  # whether the plans are those of a func
        self.reset()

    def reset(self) -> None:
        """Forgets what was read."""
        self.kept: dict[Any, list[Plan | Refused]] = {}
        self._readings: dict[Any, Readings] = {}  # of each kind
        self.again: dict[tuple, Any] = {}  # what solves have left for others of their kind, see again.py
        self.with_events: list[Any] = []  # what has been read together with events, the last first, see event_plan.py
        self.event_readings = Readings()
        self.latest: Plan | None = None
        self.called_first = True  # whether func is called where it is to be read after that
        self._distrust = ""  # why it is read no more, see recheck.py
        self.served: tuple[str, dict[str, str]] | None = None  # by which engine the last solve was, and who refused

    def distrust(self, reason: str) -> None:
        """The stepper serves from now on, until `reset`."""
        self.reset()
        self._distrust = reason

    @property
    def debt(self) -> int:
        """Solves that what has been read is still to serve, to be worth it; below 0: that it served besides."""
        return sum([readings.debt for readings in self._readings.values()])

    def kind(
        self,
        structure: Structure,
        args: Sequence[Any],
        per_sample: bool,
        on_cuda: bool,
        by_time: bool = False,
        second: bool = False,
    ) -> KindOfState:
        key = key_of_state(structure, args, per_sample, by_time, second)
        found = self._kinds.get(key)
        if found is None:
            if len(self._kinds) >= _MOST_KINDS:
                self._kinds.clear()
            found = self._kinds[key] = KindOfState(key, structure, on_cuda)
        return found

    def begin(self, func: Any) -> None:
        """What was read of another than this is forgotten. Raises Unreadable where it is not to be read."""
        if self._read_of is None or not self._read_of(func):
            self.reset()
            self._read_of = same_as(func)
        if self._distrust:
            raise Unreadable(self._distrust)

    def find(self, func: Any, kind: KindOfState, structure: Structure, args: Sequence[Any]) -> Plan:
        """Raises Unreadable."""
        self.begin(func)
        key, whole = kind.kinds
        readings = self._readings.get(key) or self._readings.setdefault(key, Readings())
        batch = structure.leaves[0].shape[0] if structure.leaves[0].dim() else None
        found = self._held(kind.kinds, args, readings, batch)
        if found is None:
            with LOCK, _turn():
                found = self._held(kind.kinds, args, readings, batch)  # while another thread reads, Numbers stand for numbers
                if found is None:
                    stale = [*self.kept.get(key, ()), *self.kept.get(whole, ())]
                    readings.begin(stale, args)
                    found = self._read(func, kind, structure, args, stale)
                    place = whole if isinstance(found, Refused) or found.whole else key
                    others = [plan for plan in self.kept.get(place, ()) if plan.guards.alive]
                    self.kept[place] = [found, *others[: _MOST_PLANS - 1]]
        if isinstance(found, Refused):
            raise found.error
        self.latest, found.readings = found, readings
        return found

    def _held(
        self, kinds: Sequence[Any], args: Sequence[Any], readings: Readings, batch: int | None
    ) -> "Plan | Refused | None":
        """What has been read and is so still."""
        for kind in kinds:
            for found in self.kept.get(kind, ()):
                if found.guards.hold(args, batch):
                    readings.served += 1
                    return found
        return None

    @torch.inference_mode(False)
    def _read(
        self, func: Any, kind: KindOfState, structure: Structure, args: Sequence[Any], stale: list[Any]
    ) -> Plan | Refused:
        """stale: plans that were right once; numbers that are others now become arguments of the code."""
        numbers = stale[0].guards.changed_numbers(args) if stale else ()
        found = self._read_with(func, kind, structure, args, numbers) if numbers else None
        return found if isinstance(found, Plan) else self._read_with(func, kind, structure, args, ())

    def _read_with(
        self, func: Any, kind: KindOfState, structure: Structure, args: Sequence[Any], numbers: Any
    ) -> Plan | Refused:
        leaves, per_sample = structure.leaves, kind.per_sample
        how = {"pure": self.pure, "by_time": kind.by_time, "second": kind.second}
        rows = {leaf.shape[0] if leaf.dim() else None for leaf in leaves}
        failure = Unreadable("the leaves of y0 have no common axis of samples")
        if len(rows) == 1 and None not in rows:
            found = self._read_samples(func, structure, args, numbers, per_sample, how)
            if isinstance(found, Plan):
                return found
            failure = found
        vectors = all(leaf.dim() < 2 for leaf in leaves)
        if not per_sample and (vectors or sum(leaf.numel() for leaf in leaves) <= _SMALL):
            try:
                with _in_words():
                    return Plan(func, structure, args, True, Reading(func, args, numbers, leaves[0]), **how)
            except Unreadable as error:
                if vectors:
                    failure = error
        code = getattr(getattr(func, "__func__", func), "__code__", None)
        if code is not None and 'File "' not in str(failure):  # torch keeps the lines of modules alone
            failure = type(failure)(f'{failure} (File "{code.co_filename}", line {code.co_firstlineno}, in {code.co_name})')
        try:
            with _in_words():
                again = isinstance(failure, Disturbed)
                return Refused(failure, Never() if again else Reading(func, args).guards(args))
        except Unreadable as error:
            # What cannot be compared may be gone at the next call, as a parameter that is not initialized yet.
            return Refused(error, Never())

    def _read_samples(
        self, func: Any, structure: Structure, args: Sequence[Any], numbers: Any, per_sample: bool, how: dict[str, Any]
    ) -> Plan | Unreadable:
        """As a func of samples, with the first choice of what has one row a sample that is right; else why the first that could
        be recorded is not."""
        tried, failure = Tried(), None
        for _ in range(_MOST_TRIED):
            try:
                with _in_words():
                    reading = Reading(func, args, numbers, structure.leaves[0])
                    return Plan(func, structure, args, False, reading, per_sample, **how, tried=tried)
            except Unreadable as error:
                failure = failure or error
                if not tried.count or not tried.more or isinstance(error, Disturbed):
                    break
        assert failure is not None
        return failure


def same_as(func: Any) -> Callable[[Any], bool]:
    """Whether another is this one, which is not kept alive by that."""
    if type(func) is MethodType:  # another object at every look
        owner, part = _weakly(func.__self__), func.__func__
        return lambda other: type(other) is MethodType and other.__func__ is part and other.__self__ is owner()
    reference = _weakly(func)
    return lambda other: other is reference()


def _weakly(x: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(x)
    except TypeError:
        return lambda: x


@contextmanager
def _in_words() -> Iterator[None]:
    """Whatever a reading comes upon is no reason for a solve to fail that runs without it."""
    try:
        yield
    except Unreadable:
        raise
    except Exception as error:
        raise Unreadable(f"func could not be read: {summary(error)}{line_of(error)}") from error


@contextmanager
def _turn() -> Iterator[None]:
    global _turns
    _turns += 1
    try:
        yield
    finally:
        _turns += 1


def undisturbed(run: Callable[[], Any]) -> Any:
    """run(), a solve by the stepper. Where it raises and another thread read func meanwhile, it may have met what stands in
    func's attributes for the reading alone, see numbers.py and marks.Unset: once more then, while nobody reads."""
    before = _turns
    try:
        return run()
    except Exception:
        if before % 2 == 0 and _turns == before:
            raise
    with LOCK:
        return run()
