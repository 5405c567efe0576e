"""A readable func, whole in one call of its own library, and so its gradient."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from .. import compiled_events, recorded
from ..compiled.again import again, keep, key_of
from ..compiled.attach import attach
from ..compiled.engine import evaluations
from ..compiled.serve import prepare
from ..outcome import failed
from ..problem import times_as_tensor
from ..request import Request
from ..solution import Solution, Stats

NAME = "compiled"


def refusal(request: Request, most: int | None = None) -> str:
    """Why func is not solved so; else what it needs is ready in `request.prepared`. most: see `compiled_events`."""
    field = request.compiled
    if field is None:
        return "func is no compiled field: see odenet_cuda.compile"
    if any([given is not None for given in request.system]):
        return "jac, jac_sparsity and mass are no part of what is compiled"
    if request.valid is not None:
        return "valid: what is compiled rejects steps by their error alone"
    if request.integrals is not None:
        return "integrals are no part of what is compiled"
    if request.save is not None or request.settings.every:
        return "save and every: what is compiled writes states at given times"
    if request.options.progress:
        return "progress: what is compiled tells of no step"
    if request.resume is not None:
        return "resume: what is compiled begins every solve anew"
    if request.events is not None:
        return compiled_events.refusal(request, most)
    kind = key_of(request)
    chosen = None if request.settings.gradient == "direct" else request.params
    engine = again(field, kind, request.structure, request.args, chosen, request.given[0])
    if engine is not None:
        # What is asked for later, as on the way back, is asked of the times as they are now.
        request.given = times_as_tensor(engine.problem.t) if engine.problem.own else engine.problem.t, *request.given[1:]
        request.prepared[NAME] = engine
        return ""
    problem, settings, options, backward = request.problem, request.settings, request.options, request.backward
    needs = {
        "dense=True": settings.dense,
        "regularizers": bool(settings.regularizers),
        f"gradient={settings.gradient!r}": settings.gradient in ("quadrature", "reversible"),
        "max_checkpoints": settings.max_checkpoints is not None,
        "a norm of the adjoint": backward is not None and backward.norm is not None,
        "a callback of the adjoint": backward is not None and bool(backward.callbacks),
    }
    asked = [name for name, needed in needs.items() if needed]
    gradient, structure, grid = settings.gradient, request.structure, request.grid
    found = prepare(field, request.args, problem, options, structure, request.t, grid, gradient, backward, asked, chosen)
    if isinstance(found, str):
        return found
    keep(field, kind, found, backward)
    request.prepared[NAME] = found
    return ""


def solve(request: Request) -> Solution | str:
    if request.events is not None:
        return compiled_events.solve(request, alone)
    engine, gradient = request.prepared.pop(NAME), request.settings.gradient
    problem, grid, wanted = engine.problem, engine.grid, engine.sources.wanted
    trajectory = engine.solve(keep=wanted and gradient != "adjoint")
    nfe = evaluations(request.options, trajectory.host_state(), grid, problem)
    engine.plan.count(nfe - engine.called, engine.args)
    steps = 0 if grid is None else len(grid[0]) - 1
    stats = Stats(nfe, problem.per_sample, trajectory.state, steps, problem.rows)
    outputs = trajectory.ys
    failed(request, problem, trajectory, outputs, stats)
    if wanted:
        outputs = attach(engine, gradient, engine.backward, outputs, stats, lambda: _by_stepper(request))
    unflatten, state = request.structure.unflatten, trajectory.state
    last = unflatten(trajectory.last)
    solution = Solution(
        unflatten(outputs), problem.t, stats, last, device=problem.device, per_sample=problem.per_sample, state=state
    )
    solution.method = request.options.method
    return solution


def alone(request: Request) -> Solution:
    """By this engine, or by the stepper."""
    found = "" if refusal(request) else solve(request)
    return recorded.solve(request) if isinstance(found, str) else found


def _by_stepper(request: Request) -> list[Tensor]:
    """The outputs once more, with a gradient that has one itself."""
    field: Any = request.problem.field
    problem = replace(request.problem, field=field.again())
    settings = replace(request.settings, gradient="direct")
    return request.structure.flatten(recorded.solve(request.but(problem=problem, settings=settings)).ys)
