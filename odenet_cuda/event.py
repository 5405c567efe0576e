"""What ends a solve besides its last time, or changes the state on its way: zeros of functions of (t, y), and known times."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .problem import check_times


@dataclass(frozen=True)
class Event:
    """A zero of ``fn(t, y)`` along a solve; with further arguments of `solve`, of ``fn(t, y, *args)``.

    fn: gives real numbers: under joint control in any shape, the first zero of any of them counts; under per-sample control one
        a sample, [batch], and the first zero of each counts for its sample alone.
    direction: of the crossing as the solve goes on, also backwards in time: +1 rising, -1 falling, 0 either.
    terminal: it ends the solve, of its sample under per-sample control. False: it is noted, and the solve goes on.
    apply: ``apply(t, y)``, or ``apply(t, y, *args)``, gives the state with which the solve goes on instead. It is given all
        samples and counts for those with the event. t is as func sees it, and has a gradient.

    A zero is seen where fn has changed its sign, or come to zero, at one of the quarters of a step; then the first in that
    quarter is located on the interpolant of the step, to a few units in the last place of the time. So two zeros within a
    quarter of a step, or one that fn only touches between its ends, can be missed: ``max_step`` narrows what can. A function
    that is zero where the solve begins, or whose own event has just been, has no sign there, and takes that of the first
    quarter at whose end it is not zero.

    Of several events the first in time counts. Those at one time happen one after the other in the order in which they were
    given, as far as none of them ends the solve; not those whose function has its sign of before again, after what the others
    have changed. Times are one where they differ by less than 64 units in the last place, of the time in the state's type.

    The time of an event, and the state there, have first derivatives where fn passes through zero. Where it only touches zero
    or jumps they have none: RuntimeError where a gradient comes to them.

    Where func is a compiled field, fn and apply are read with it, if they can be.
    """

    fn: Callable[..., Tensor]
    direction: int = 0
    terminal: bool = True
    apply: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        for name, value in (("fn", self.fn), ("apply", self.apply)):
            if not callable(value) and (name == "fn" or value is not None):
                raise TypeError(f"{name} of an Event must be callable as {name}(t, y), got {type(value).__name__}")
        if self.direction not in (-1, 0, 1):
            raise ValueError(f"direction of an Event must be -1, 0 or 1, got {self.direction!r}")

    @property
    def goes_on(self) -> bool:
        """Whether the solve does after it."""
        return self.apply is not None or not self.terminal


@dataclass(frozen=True)
class Jump:
    """A change of the state at known times: a dose, a measurement.

    times: [J], or [batch, J] under per-sample control with NaN where a sample has fewer; increasing in the direction of the
        solve, none before its start; those at its end and later do not count. They may require a gradient.
    apply: ``apply(t, y, i)``, or ``apply(t, y, i, *args)``, gives the state with which the solve goes on. i: which of the times
        it is, int64, a number, or [batch]. It is given all samples and counts for those that jump. t is as func sees it.

    Outputs at the time of a jump are those before it.
    """

    times: Any
    apply: Callable[..., Any]

    def __post_init__(self) -> None:
        if not callable(self.apply):
            raise TypeError(f"apply of a Jump must be callable as apply(t, y, i), got {type(self.apply).__name__}")

    def table(self, rows: int, per_sample: bool) -> Tensor:
        """The times as float64 [rows, J] with their gradients. Raises ValueError and TypeError as for t."""
        t, _ = check_times(self.times, "times of a Jump", rows if per_sample else None)
        return (t if t.dim() == 2 else t.expand(rows, -1)).double()


@dataclass(frozen=True, eq=False)
class Events:
    """Those of one solve. args: what their functions are called with after (t, y). from_zero: one that is zero where the solve
    begins ends it there. signs: with which the values begin, float64 [rows, values], NaN: that which they have there; None
    for all."""

    events: tuple[Event, ...]
    args: tuple[Any, ...] = ()
    from_zero: bool = False
    signs: Tensor | None = None


def check_events(events: "Event | Events | Sequence[Event] | None", args: Sequence[Any]) -> Events | None:
    """Raises TypeError where events are something else."""
    if events is None or isinstance(events, Events):
        return events
    given = _all_of(Event, "events", events)
    return Events(given, tuple(args)) if given else None


def check_jumps(jumps: "Jump | Sequence[Jump] | None") -> tuple[Jump, ...]:
    """Raises TypeError where jumps are something else."""
    return () if jumps is None else _all_of(Jump, "jumps", jumps)


def _all_of(kind: Any, name: str, given: Any) -> tuple[Any, ...]:
    found = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    for x in found:
        if not isinstance(x, kind):
            raise TypeError(f"{name} must be of type {kind.__name__}, or a list of such, got {type(x).__name__}")
    return found


def applied(result: Any, name: str, flatten: Callable[[Any], list[Tensor]], like: Sequence[Tensor]) -> list[Tensor]:
    """The leaves of a changed state. Raises ValueError where they are not like those before."""
    leaves = flatten(result)
    for i, (leaf, before) in enumerate(zip(leaves, like, strict=True)):
        if leaf.shape != before.shape or leaf.device != before.device or leaf.is_complex() != before.is_complex():
            raise ValueError(
                f"{name} must return the state in the shape, on the device and of the kind that it was given, "
                f"{list(before.shape)}, {before.device}, {before.dtype}, got {list(leaf.shape)}, {leaf.device}, {leaf.dtype} "
                f"in leaf {i}"
            )
    return [leaf.to(before.dtype) for leaf, before in zip(leaves, like, strict=True)]


def chosen(rows: Tensor, new: Sequence[Tensor], old: Sequence[Tensor]) -> list[Tensor]:
    """The leaves of new in these rows, bool [rows]; of all where there is one row that stands for the whole state, bool []."""
    masks = [rows.reshape(-1, *[1] * (x.dim() - 1)) if rows.dim() else rows for x in new]
    return [torch.where(mask, x, y) for mask, x, y in zip(masks, new, old, strict=True)]
