"""The backward solve of the adjoint as the user asked for it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..callbacks import find_callbacks
from ..formulas import rms_norm
from ..integrate import Options, refuse, stop_times
from ..landing import lands
from ..problem import Problem, Structure, check_tolerance
from ..solvers.families import family_of
from ..solvers.scipy_solver import ScipyMethod
from ..step_control import StepControl
from .adjoint import Adjoint

NOT_GIVEN = (None, None, None, None)  # method, rtol, atol, options


def adjoint_setup(
    func: Callable,
    problem: Problem,
    structure: Structure,
    options: Options,
    method: str | None,
    rtol: Any,
    atol: Any,
    given: dict[str, Any] | None,
    chosen: bool,
) -> Adjoint:
    """The backward solve as the user asked for it; what is not given is as forward, but for the norm."""
    given = dict(given or {})
    norm = given.pop("norm", None)
    if norm is not None and norm != "seminorm" and not callable(norm):
        raise ValueError(f"adjoint_options['norm'] must be 'seminorm' or callable, got {norm!r}")
    other = getattr(options.tableau, "backward", None)  # of one that cannot go backwards itself
    if other is not None and method in (None, options.method):
        solver = given.pop("solver", None) if isinstance(options.tableau, ScipyMethod) else None
        method = other if solver is None else ScipyMethod(solver).backward
    same = method is None and not given and not torch.compiler.is_compiling()
    backward = options.backwards if same else _options(options, method, given)
    if problem.per_sample and not backward.adaptive:
        raise ValueError(f"step_control='per_sample' needs an adaptive adjoint_method, got {backward.method!r}")
    if backward.adaptive and torch.is_grad_enabled():
        refuse(backward, family_of(backward.tableau).no_way_back)
    if lands(backward.tableau):
        raise NotImplementedError(
            f"method={backward.method!r} does not solve the adjoint, whose state has no halves: use gradient='reversible', "
            "'checkpoint' or 'direct', or an adjoint_method such as 'rk4'"
        )
    tolerances = []
    for name, value, forward in (("adjoint_rtol", rtol, problem.rtol), ("adjoint_atol", atol, problem.atol)):
        parts = forward[: len(structure.leaves)] if value is None else check_tolerance(name, value, structure)
        if any(isinstance(part, Tensor) for part in parts):
            raise ValueError(
                f"{name} must be a number or one for each leaf for the adjoint; give it beside a tensor {name[8:]}"
            )
        tolerances.append(parts)
    callbacks = find_callbacks(func, structure, backward.adaptive, "_adjoint")
    shown = norm if callable(norm) else shown_norm(problem, norm == "seminorm")
    return Adjoint(
        options=backward,
        rtol=tolerances[0],
        atol=tolerances[1],
        seminorm=norm == "seminorm",
        norm=norm if callable(norm) else None,
        callbacks=callbacks,
        user_options={**given, "norm": shown},
        chosen=chosen,
    )


def _options(options: Options, method: str | None, given: dict[str, Any]) -> Options:
    """The forward options with another method, and with what was given in their place."""
    kept = method in (None, options.method)
    merged: dict[str, Any] = dict(
        method=method or options.method,
        first_step=options.first_step,
        step_t=options.step_t,
        jump_t=options.jump_t,
        step_size=options.step_size,
        grid_constructor=options.grid_constructor,
        perturb=options.perturb,
        max_iters=options.max_iters if kept else None,
        max_order=options.max_order if kept else None,
        cuda_graph=options.cuda_graph,
        interp="method",
        progress="backward" if options.progress else "",
    )
    control: dict[str, Any] = {name: getattr(options.control, name) for name in StepControl.__dataclass_fields__}
    for name, value in given.items():
        if name in control:
            control[name] = value
        elif name in ("step_t", "jump_t"):
            merged[name] = stop_times(name, value)
        elif name in merged and name != "method":
            merged[name] = value
        else:
            raise ValueError(f"adjoint_options must name options of solve or 'norm', got {name!r}")
    return Options(control=StepControl(**control), **merged)


def shown_norm(problem: Problem, seminorm: bool) -> Callable[[tuple], Tensor]:
    """The norm of the backward solve as a function of (t, y, adjoint, *params), as torchdiffeq's autograd node shows it."""
    n = len(problem.state_leaves)

    def norm(parts: tuple) -> Tensor:
        t, *leaves = parts
        values = [t.abs().double().reshape(())]
        for part in (leaves[:n], leaves[n : 2 * n]):
            values += [problem.norm(part)] if problem.norm is not None else [rms_norm(leaf)[0] for leaf in part]
        if not seminorm:
            values += [rms_norm(leaf)[0] for leaf in leaves[2 * n :]]
        return torch.stack([torch.as_tensor(value, device=problem.device).double() for value in values]).amax()

    return norm
