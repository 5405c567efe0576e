"""Inside torch.func transforms, forward-mode derivatives and what writes operations down: plain torch, through which these see.

Derivatives are those of the discrete solve.
"""

from dataclasses import replace

from .. import recorded, transforms
from ..callbacks import find_callbacks
from ..landing import lands
from ..outcome import failed, solution_of, stats_of
from ..problem import Field, check_state
from ..request import Request
from ..solution import Solution
from ..solvers.trajectory import Trajectory
from ..tableau import ButcherTableau
from ..tracing import ADAPTIVE, stands_for_others, written_down

NAME = "transformed"


def refusal(request: Request) -> str:
    return "" if transforms.active() or _traced(request) else "no transform of torch is active"


def _traced(request: Request) -> bool:
    return written_down() or any([stands_for_others(leaf) for leaf in request.structure.leaves])


def solve(request: Request) -> Solution:
    """Raises NotImplementedError where a transform cannot see through what was asked for."""
    asked = {"resume": request.resume, "valid": request.valid, "integrals": request.integrals}
    for name, given in {**asked, "every": request.settings.every or None}.items():
        if given is not None:
            raise NotImplementedError(f"{name} is not served inside torch.func transforms, forward mode and torch.compile")
    problem, settings, options, structure = request.problem, request.settings, request.options, request.structure
    if options.adaptive and _traced(request):
        raise NotImplementedError(ADAPTIVE)
    if lands(options.tableau):
        how = "gradient='reversible'" if options.coupling else f"method={options.method!r}"
        raise NotImplementedError(f"{how} is not served inside torch.func transforms, forward mode and torch.compile")
    explicit = isinstance(options.tableau, ButcherTableau)
    if not (explicit or (options.adaptive and transforms.under_vmap())):
        raise NotImplementedError(
            f"method={options.method!r} decides by numbers that torch.func transforms, forward mode and tracing hide: use an "
            "explicit method there"
        )
    callbacks = find_callbacks(request.func, structure, options.adaptive)
    needs = {
        "dense=True is": settings.dense,
        "callbacks of func are": callbacks,
        "regularizers are": settings.regularizers,
        "events are": request.events is not None,
    }
    what = next((name for name, needed in needs.items() if needed), "")
    if what:
        raise NotImplementedError(f"{what} not served inside torch.func transforms, forward mode and torch.compile")
    if options.adaptive and transforms.under_vmap():
        return _mapped(request)
    if options.adaptive:
        ys, trajectory, nfe = transforms.solve_on_found_steps(problem, options, request.func, structure, request.t)
    else:
        assert request.grid is not None
        ys, nfe = transforms.solve_on_grid(problem, options, request.func, structure, request.t, request.grid)
        trajectory = Trajectory(ys, [leaf[-1].detach().clone() for leaf in ys], None)
    problem.field.nfe = nfe  # type: ignore[attr-defined]
    stats = stats_of(request, trajectory)
    failed(request, problem, trajectory, ys, stats)
    return solution_of(request, problem, ys, trajectory, None, stats)


def _mapped(request: Request) -> Solution:
    """An adaptive solve under torch.vmap: the mapped axis is that of the samples under per-sample control."""
    problem = request.problem
    if problem.per_sample or problem.norm is not None:
        what = "step_control='per_sample'" if problem.per_sample else "norm"
        raise NotImplementedError(
            f"{what} is not served under torch.vmap over an adaptive solve; give the samples as one batch"
        )
    rows = transforms.Rows(request.func, request.structure)
    with rows.outside():
        structure = check_state(rows.y0)
        leaves = [leaf.detach().contiguous() for leaf in structure.leaves]
        mapped = replace(problem, field=Field(rows, structure), leaves=leaves, per_sample=True)
        settings = replace(request.settings, gradient="direct", per_sample=True)
        solution = recorded.solve(request.but(problem=mapped, func=rows, settings=settings, structure=structure, params=None))
    solution.ys, solution.y_last = rows.mapped(solution.ys, 1), rows.mapped(solution.y_last, 0)
    return solution
