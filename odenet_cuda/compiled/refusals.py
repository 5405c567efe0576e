"""When func is not read: what a reading that failed leaves, and how many readings the solves that they serve are worth."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .trace import Unreadable

MOST_AHEAD = 8  # readings before the solves that they serve
WORTH = 8  # solves that are served by what has been read, for one reading


class Never:
    """The guards of what is to be read anew at the next call."""

    alive = True

    def hold(self, args: Sequence[Any], batch: int | None = None) -> bool:
        return False

    def changed_numbers(self, args: Sequence[Any]) -> list[Any]:
        return []

    def changed(self, args: Sequence[Any]) -> str:
        return ""


@dataclass
class Refused:
    """Why func could not be read, as long as the guards hold."""

    error: Unreadable
    guards: Any


class Readings:
    """Of one kind of state. A reading takes as long as many solves, and seconds where it brings a text to be compiled: where
    something changes from call to call that is no argument of the code, each would serve one solve alone."""

    def __init__(self) -> None:
        self.served = 0  # solves by what has been read, of whatever shape, since the last reading
        self._ahead = 0  # in solves
        self._why = ""

    @property
    def debt(self) -> int:
        return self._ahead - self.served

    def begin(self, stale: Sequence[Any], args: Sequence[Any], why: str = "") -> None:
        """Counts one. stale: what has been read, the last first, none of which serves this call. why: in words, where it is
        known what changes. Raises Unreadable."""
        self._ahead, self.served = max(0, self._ahead - self.served), 0
        if self._ahead > WORTH * (MOST_AHEAD - 1):
            what = stale[0].guards.changed(args) if stale and not self._why else ""
            what = f"{what}, which func reads from Python," if what else "what func reads from Python"
            self._why = self._why or why or f"{what} changes from call to call, and would be read anew each time; call reset()"
            raise Unreadable(self._why)
        self._ahead, self._why = self._ahead + WORTH, ""
