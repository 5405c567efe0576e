"""Which states of a solve are kept, so that every step can be made again on the way back: at most a given number of them.

Where the number of steps is known beforehand the states are those of the binomial schedule, which needs the fewest steps
made again (Griewank and Walther 2000, Algorithm 799, doi 10.1145/347837.347846). Where it is not, every state is kept until
there is no room, then every second, every fourth and so on; the way back goes through the gaps by the binomial schedule.
"""

from math import comb
from typing import Any


def binomial_split(steps: int, slots: int) -> int:
    """After how many of `steps` the next state is kept, with `slots` for it, for those after it and for the first.

    With s slots and every step made again at most r times, C(s + r, s) steps can be undone.
    """
    if slots < 2:
        raise ValueError(f"slots must be at least 2, got {slots}")
    repeats = 0
    while comb(slots + repeats, slots) < steps:
        repeats += 1
    before = comb(slots + repeats - 2, slots) if repeats >= 2 else 1
    return max(before, steps - comb(slots - 1 + repeats, slots - 1), 1)


def binomial_schedule(steps: int, slots: int) -> list[int]:
    """The steps before which the state is kept on the way forward."""
    kept = [0]
    while len(kept) < slots and steps - kept[-1] > 1:
        kept.append(kept[-1] + binomial_split(steps - kept[-1], slots - len(kept) + 1))
    return kept


class Checkpoints:
    """Tells for each step of a solve whether the state before it is kept, and forgets states where there is no room left.

    limit: how many states may be kept at a time, None for all. steps: their number where it is known.
    """

    def __init__(self, limit: int | None, steps: int | None = None):
        self.limit, self.count, self.stride = limit, 0, 1
        self.kept: list[tuple[int, Any]] = []
        self.schedule = None if limit is None or steps is None else set(binomial_schedule(steps, limit))

    def add(self, step: Any) -> bool:
        """Whether the state before this step, the next one, is kept."""
        index, self.count = self.count, self.count + 1
        if self.limit is None:
            return True
        if self.schedule is not None:
            return index in self.schedule
        if index % self.stride:
            return False
        if len(self.kept) == self.limit:
            self.stride *= 2
            for number, old in self.kept:
                if number % self.stride:
                    old.y0, old.k = None, []
            self.kept = [(number, old) for number, old in self.kept if number % self.stride == 0]
            if index % self.stride:
                return False
        self.kept.append((index, step))
        return True
