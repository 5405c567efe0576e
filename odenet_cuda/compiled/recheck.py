"""A compiled field is compared with func again as it is used: the guards of a plan are good, but something that func reads will
one day not be seen, and a wrong number without a word is the worst there is.

What is compared is one step of a given size by the machine code and by the stepper, from the state, the time and the arguments
of the solve at hand, as in comparison.py: so what the code really reads, such as addresses of constants, is compared too, and
what is rounding is known from what is not. The program run by NumPy would need fewer calls of func, but in float32 it could not
tell the two apart.

Nothing that the user sees is changed by it: what the reading found func to write is put back, and nothing else is touched, for
another thread may write it. Two threads that both have func write there meet as they do without this: a count of calls may
miss some. What else func writes is found by the guards afterwards, and what it writes into tensors by the operations.

When: see watch.py.
"""

import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from ..problem import Structure
from .comparison import Comparison
from .compilation import Compilation
from .differences import Unsettled
from .engine import Engine
from .leaks import summary
from .marks import Unreadable
from .memory import has_memory
from .reach import Reach
from .settled import settled
from .writes import Watched, kept, memory_of


def recheck(field: Compilation, engine: Engine, structure: Structure, args: Sequence[Any], reading: Any) -> None:
    """Compares the plan of this solve with func if that is due. Raises Unreadable where they differ, and no solve of the field
    is compiled then until `reset`; and where func cannot be called or has changed what it reads: the stepper serves this solve,
    so that the user meets what it raises. reading: the lock of whoever calls func with what is not the user's."""
    watch = engine.plan.watch
    if not watch.due_with(engine.batch) or not reading.acquire(blocking=False):
        return
    start = time.perf_counter()
    try:
        found = _difference(engine, structure, args, field.func)
    except Unsettled:
        watch.failed()
        return
    except Exception as error:
        watch.failed()
        raise Unreadable(f"func could not be compared again: {summary(error)}") from error
    finally:
        reading.release()
    if not found:
        watch.compared(time.perf_counter() - start)
        if not engine.plan.guards.hold(args):
            raise Unreadable("what func reads has changed while it was compared again")
        return
    reason = f"what func reads has changed unseen: {found}; call reset()"
    field.plans.distrust(reason)
    warnings.warn(
        f"odenet_cuda.compile: something that func reads has changed since it was read, and was not seen to: {found}. The last "
        f"{watch.unseen} compiled solves may be wrong. The stepper serves this one and later ones, until field.reset(). Please "
        f"report this, with the field, {engine.plan.title}, and what changed",
        stacklevel=5,
    )
    raise Unreadable(reason)


def _difference(engine: Engine, structure: Structure, args: Sequence[Any], func: Any) -> str:
    """In words, or "": of the values, or a tensor that func writes into, which it did not when it was read."""
    reach, watched = Reach(func, args), Watched()
    with torch.inference_mode(False), torch.no_grad(), kept(reach, engine.plan, args):
        found = settled(engine, args, lambda seed: Comparison(engine, structure, args, func, seed).step(watched))
    if found is not None:
        much = f"{found.what} differs from func's by {found.largest:.2e} after a step, beyond rounding"
        return f"{much} ({found.allowed:.1e}), {found.where}"
    watched.written -= {memory_of(place(args)) for place in engine.plan.counting}
    overwritten = [x for x in reach.tensors.values() if has_memory(x) and memory_of(x) in watched.written]
    return f"func writes a tensor {list(overwritten[0].shape)}" if overwritten else ""
