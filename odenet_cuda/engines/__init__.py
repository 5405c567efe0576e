"""The ways to run a solve, one file each, in the order in which they are asked.

An engine has a NAME and two verbs: ``refusal(request)`` says in words why it does not serve this one, or "", and
``solve(request)`` does, or says why not after all, where that is known by a try alone. No engine knows another. What several
need lies below them: `recorded.py`, `outcome.py`, `probe.py`.
"""

from collections.abc import Callable
from typing import Protocol

from .. import compiled_events
from ..request import Request
from ..saving import saved
from ..solution import Solution, SolverError
from . import compiled, graphed, plain, stepper, transformed


class Engine(Protocol):
    @property
    def NAME(self) -> str: ...
    def refusal(self, request: Request, /) -> str: ...
    def solve(self, request: Request, /) -> Solution | str: ...


ENGINES: tuple[Engine, ...] = (transformed, compiled, graphed, plain, stepper)


def serve(request: Request) -> Solution:
    """By the first engine that does not refuse. The Solution says which, and what each before it answered."""
    refusals: dict[str, str] = {}
    for engine in ENGINES:
        refusal = engine.refusal(request)
        if not refusal:
            if request.compiled is not None:
                request.compiled.plans.served = engine.NAME, refusals  # now, for func may raise
            try:
                found = engine.solve(request)
            except SolverError as error:
                _save(request, error.solution)
                raise
            if not isinstance(found, str):
                found.engine, found.explanation = engine.NAME, refusals
                _save(request, found)
                return found
            refusal = found
        refusals[engine.NAME] = refusal
    raise AssertionError("the stepper serves what the others refuse")


def serve_events(request: Request, most: int, by_stepper: Callable[[], Solution]) -> Solution | None:
    """A solve that goes on from its events, in one call, if something serves it so. most: the last of so many events ends a
    row. by_stepper: gives the same solve by the stepper."""
    if request.compiled is None or not transformed.refusal(request) or compiled.refusal(request, most):
        return None
    request.compiled.plans.served = compiled.NAME, {}
    found = compiled_events.solve(request, compiled.alone, by_stepper)
    if isinstance(found, str):
        return None
    found.engine = compiled.NAME
    return found


def _save(request: Request, solution: Solution) -> None:
    """The outputs as they were asked for, where the engine has given states."""
    if request.save is not None and not solution.saved:
        saved(solution, request.save, request.settings.per_sample, request.t)
