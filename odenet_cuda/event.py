"""What ends a solve besides its last time: a zero of a function of (t, y)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Event:
    """A zero of ``fn(t, y)`` along a solve; with further arguments of `solve`, of ``fn(t, y, *args)``.

    fn: gives real numbers: under joint control in any shape, the first zero of any of them counts; under per-sample control one
        a sample, [batch], and the first zero of each counts for its sample alone.
    direction: of the crossing as the solve goes on, also backwards in time: +1 rising, -1 falling, 0 either.

    A zero is seen where fn has changed its sign, or come to zero, at one of the quarters of a step; then the first in that
    quarter is located on the interpolant of the step, to a few units in the last place of the time. So two zeros within a
    quarter of a step, or one that fn only touches between its ends, can be missed: ``max_step`` narrows what can. A function
    that is zero where the solve begins has no sign there, and takes that of the first quarter at whose end it is not zero. Of
    several events the first in time counts, of several at one time the first that was given.
    """

    fn: Callable[..., Tensor]
    direction: int = 0

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise TypeError(f"fn of an Event must be callable as fn(t, y), got {type(self.fn).__name__}")
        if self.direction not in (-1, 0, 1):
            raise ValueError(f"direction of an Event must be -1, 0 or 1, got {self.direction!r}")


@dataclass(frozen=True, eq=False)
class Events:
    """Those of one solve. args: what their functions are called with after (t, y). from_zero: one that is zero where the solve
    begins ends it there."""

    events: tuple[Event, ...]
    args: tuple[Any, ...] = ()
    from_zero: bool = False


def check_events(events: "Event | Events | Sequence[Event] | None", args: Sequence[Any]) -> Events | None:
    """Raises TypeError where events are something else."""
    if events is None or isinstance(events, Events):
        return events
    given = (events,) if isinstance(events, Event) else tuple(events) if isinstance(events, (list, tuple)) else (events,)
    for event in given:
        if not isinstance(event, Event):
            raise TypeError(f"events must be an Event or a list of them, got {type(event).__name__}")
    return Events(given, tuple(args)) if given else None
