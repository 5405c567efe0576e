"""A compiled field is compared with func again as it is used: the guards of a plan are good, but something that func reads will
one day not be seen, and a wrong number without a word is the worst there is.

What is compared is one step of a given size by the machine code and by the stepper, from the state, the time and the arguments
of the solve at hand, as in self_check.py: so what the code really reads, such as addresses of constants, is compared too, and
what is rounding is known from what is not. The program run by NumPy would need fewer calls of func, but in float32 it could not
tell the two apart. Nothing that the user sees is changed by it: what func writes is put back, and so are random generators.

When: at a plan's second and tenth solve, and whenever its solves since the last comparison have taken _RATIO times as long as
that one took.
"""

import threading
import time
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..problem import Structure
from .leaks import summary
from .marks import Unreadable, unmarked
from .reach import Reach
from .trace import unchanged_generators

if TYPE_CHECKING:
    from .engine import Engine
    from .field import CompiledField

_RATIO = 50  # a comparison takes 2 % of the time of the solves that it is for
_EARLY = (1, 9)  # solves after which one is due whatever it takes


class Watch:
    """The solves of a plan since it was last compared with func, by all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._early = list(_EARLY)
        self.solves = self.unseen = 0  # in all, and since it was last compared
        self.seconds = 0.0  # that the latter took
        self.cost = 0.0  # of the last comparison, in seconds

    def add(self, seconds: float, solves: int = 1) -> None:
        with self._lock:
            self.solves += solves
            self.unseen += solves
            self.seconds += seconds

    @property
    def due(self) -> bool:
        if self._early and self.solves >= self._early[0]:
            return True
        return self.seconds > _RATIO * self.cost > 0

    def compared(self, seconds: float) -> None:
        """It agreed with func, which took so long to find out."""
        with self._lock:
            self._early = [count for count in self._early if count > self.solves]
            self.unseen, self.seconds, self.cost = 0, 0.0, seconds


def recheck(field: "CompiledField", engine: "Engine", structure: Structure, args: Sequence[Any], reading: Any) -> None:
    """Compares the plan of this solve with func if that is due. Raises Unreadable where they differ, and no solve of the field
    is compiled then until `reset`, or where func cannot be called; the stepper serves this solve. reading: the lock of whoever
    calls func with what is not the user's, in any thread."""
    watch = engine.plan.watch
    if not watch.due or not reading.acquire(blocking=False):
        return
    start = time.perf_counter()
    try:
        found = _difference(engine, structure, args, field.func)
    except Exception as error:
        raise Unreadable(f"func could not be compared again: {summary(error)}") from error
    finally:
        reading.release()
    if found is None:
        watch.compared(time.perf_counter() - start)
        return
    much = f"{found.what} differs from func's by {found.largest:.2e} after a step, beyond rounding"
    reason = f"what func reads has changed unseen: {much}; call reset()"
    field.distrust(reason)
    warnings.warn(
        f"odenet_cuda.compile: something that func reads has changed since it was read, and was not seen to: {much} "
        f"({found.allowed:.1e}). The last {watch.unseen} compiled solves may be wrong. The stepper serves this one and later "
        f"ones, until field.reset(). Please report this, with the field, {engine.plan.title}, and what changed; {found.where}",
        stacklevel=5,
    )
    raise Unreadable(reason)


def _difference(engine: "Engine", structure: Structure, args: Sequence[Any], func: Any) -> Any:
    from .self_check import Comparison

    device = engine.problem.device
    with torch.inference_mode(False), torch.no_grad(), unchanged_generators(device), unmarked(Reach(func, args), hooks=False):
        for seed in (0, 1):  # func may have a kink where the step begins
            found = Comparison(engine, structure, args, func, seed).step()
            if found is None:
                break
        return found
