"""When a plan is compared with func again: at its second and tenth solve, and whenever its solves since the last comparison
have taken _RATIO times as long as that one took; where func could not be called, after 2, 4, 8 more solves and so on. And at
the first solves of another number of samples, which func may ask for."""

import threading

_RATIO = 50  # a comparison takes 2 % of the time of the solves that it is for
_EARLY = (1, 9)  # solves after which one is due whatever it takes
_SIZES = 8  # numbers of samples, at the first solve of which one is due


class Watch:
    """The solves of a plan since it was last compared with func, by all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._early = list(_EARLY)
        self.solves = self.unseen = 0  # in all, and since it was last compared
        self.seconds = 0.0  # that the latter took
        self.cost = 0.0  # of the last comparison, in seconds
        self._failures = self._rest = 0  # in a row, and how many solves there must be before it is tried again
        self._sizes = set[int]()  # numbers of samples of its solves

    def add(self, seconds: float, solves: int = 1) -> None:
        with self._lock:
            self.solves += solves
            self.unseen += solves
            self.seconds += seconds

    @property
    def due(self) -> bool:
        if self.solves < self._rest:
            return False
        if self._early and self.solves >= self._early[0]:
            return True
        return self.seconds > _RATIO * self.cost > 0

    def due_with(self, batch: int) -> bool:
        """Whether one is due at a solve of so many samples."""
        new = batch not in self._sizes and len(self._sizes) < _SIZES
        with self._lock:
            self._sizes.update([batch] if new else [])
        return self.due or (new and self.solves > 0)

    def compared(self, seconds: float) -> None:
        """It agreed with func, which took so long to find out."""
        with self._lock:
            self._early = [count for count in self._early if count > self.solves]
            self.unseen, self.seconds, self.cost = 0, 0.0, seconds
            self._failures = self._rest = 0

    def failed(self) -> None:
        """It could not be compared."""
        with self._lock:
            self._failures += 1
            self._rest = self.solves + 2**self._failures
