"""A compiled field proves itself: before its first result is given out, its library solves beside the stepper.

What runs is the very code that solves: two steps of a given size, of the state at hand and of others near it, at the beginning,
at the end and at a time between, in a whole pack with one more lane and in a pack that is not full. The error estimate and,
where a gradient is wanted, the gradients are compared too. A library that differs by more than rounding leaves the cache, and
the stepper serves.
"""

import platform
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from ..problem import Structure
from ..version import VERSION
from . import build
from .comparison import Comparison
from .compilers import NoCompiler, Refused
from .differences import Difference, Unchecked
from .engine import Engine
from .leaks import summary
from .marks import without_hooks
from .reach import Reach
from .settled import settled
from .teams import card_of
from .writes import kept


def due(engine: Engine, args: Sequence[Any]) -> bool:
    """Whether a library of this solve has not been checked."""
    plan = engine.plan
    if any([bool(place(args).any()) for place in plan.zeros]):
        plan.trusted = set()  # what was multiplied by zero, as by a last layer before its training, has not been seen yet
    kind = engine.kind
    if kind.trusted is plan.trusted:
        return False
    if not plan.trusted.issuperset(kind.keys):
        return True
    kind.trusted = plan.trusted  # to which libraries are added alone
    return False


def check(engine: Engine, structure: Structure, args: Sequence[Any], func: Any, gradient: str, backward: Any) -> None:
    """Checks the libraries of this solve. Raises Refused for one that is wrong, Unchecked where func has no finite value here.
    It calls func with what is not the user's: no other thread may read func meanwhile."""
    plan, reach = engine.plan, Reach(func, args)
    keys = engine.kind.keys
    ways = gradient if len(keys) > 1 and keys[1] not in plan.trusted else ""
    with torch.inference_mode(False), kept(reach, plan, args), without_hooks(reach.tensors.values()):
        try:
            found = settled(engine, args, lambda seed: Comparison(engine, structure, args, func, seed).run(ways, backward))
        except NoCompiler:
            raise
        except Exception as error:  # whatever func may raise for other samples than those at hand
            raise Unchecked(f"func cannot be checked against: {summary(error)}") from error
    if found is not None:
        blamed = 1 if found.of_gradient else 0  # values are right before gradients are looked at
        reason = _report(engine, *engine.kind.wanted[blamed], found)
        plan.refused[keys[blamed]] = engine.kind.wanted[blamed][0], reason
        plan.libraries.pop(keys[blamed], None)
        plan.kinds.clear()
        if blamed:
            plan.trusted.add(keys[0])
        raise Refused(reason, quiet=True)
    plan.trusted.update(keys)
    plan.zeros = [place for place in plan.places.values() if not bool(place(args).any())]


def _report(engine: Engine, tableau: Any, target: Any, found: Difference) -> str:
    """Takes the library out of the cache and warns; why it is refused."""
    plan = engine.plan
    capability = card_of(plan.device).capability if target.team else None
    reason = f"the compiled field is wrong: {found.what} differs from func's by {found.largest:.2e}, beyond rounding"
    text = plan.source(tableau, target)
    kept = build.discard(text, capability, reason)
    warnings.warn(
        f"odenet_cuda.compile: {reason} ({found.allowed:.1e}); the stepper serves instead, so the result is right. Please "
        f"report this, with the field and: {describe(text, capability)}; {target}, {type(tableau).__name__} of "
        f"{tableau.stages} stages; {found.where}, seed 0 and 1, y0 {[list(x.shape) for x in engine.problem.leaves]}; {kept}",
        stacklevel=6,
    )
    return reason


def describe(text: str, capability: Any) -> str:
    """Versions, compiler, flags and machine."""
    command = build.command_for(text, capability)
    compiler = f"{command.version.splitlines()[0]}, {' '.join((*command.compiler, *command.flags))}"
    return (
        f"odenet_cuda {VERSION}, torch {torch.__version__}, Python {platform.python_version()} on "
        f"{platform.platform()}, {_processor()}, {compiler}"
    )


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
