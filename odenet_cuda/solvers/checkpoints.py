"""Which states of a solve are kept, so that every step can be made again on the way back: at most a given number of them.

Where the number of steps is known beforehand the states are those of the binomial schedule, which needs the fewest steps
made again (Griewank and Walther 2000, Algorithm 799, doi 10.1145/347837.347846). Where it is not, every state is kept until
there is no room, then every second, every fourth and so on; the way back goes through the gaps by the binomial schedule.
"""

from functools import cache, lru_cache
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


@lru_cache(maxsize=65536)
def steps_again(steps: int, slots: int) -> int:
    """How many steps are made again to undo `steps` by the binomial schedule."""
    if steps <= 1:
        return 0
    if slots < 2:
        return steps * (steps - 1) // 2
    split = binomial_split(steps, slots)
    return split + steps_again(steps - split, slots - 1) + steps_again(split, slots)


def best_subset(held: list[int], steps: int, slots: int) -> set[int]:
    """Which of the states that are held to keep, so that the fewest steps are made again: a slot let go serves in the gaps."""

    @cache
    def best(i: int, place: int) -> tuple[int, tuple[int, ...]]:
        """Of held[i], which is kept as the place-th, and those after it: (steps made again, the indices kept)."""
        ways: list[tuple[int, tuple[int, ...]]] = [(steps_again(steps - held[i], slots - place), (held[i],))]
        if slots - place > 1:
            for j in range(i + 1, len(held)):
                rest, kept = best(j, place + 1)
                ways.append((rest + steps_again(held[j] - held[i], slots - place), (held[i], *kept)))
        return min(ways)

    return set(best(0, 0)[1]) if held else set()


class Checkpoints:
    """Tells for each step of a solve whether the state before it is kept, and forgets states where there is no room left.

    limit: how many states may be kept at a time, None for all. steps: their number where it is known.
    """

    def __init__(self, limit: int | None, steps: int | None = None):
        self.limit, self.count, self.stride = limit, 0, 1
        self.kept: list[tuple[int, Any]] = []
        self.steps = steps
        self.schedule = None if limit is None or steps is None else set(binomial_schedule(steps, limit))

    def anew(self) -> "Checkpoints":
        """The same for another solve."""
        return Checkpoints(self.limit, self.steps)

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
