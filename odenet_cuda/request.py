"""What a solve was asked for, checked and made regular once; every engine is handed this and nothing else.

What follows from options alone (`Settings`) is made once for equal options: it is looked up by their values, so it cannot be
stale. The rest, state, times and tolerances, are the numbers of one call.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from .callbacks import find_callbacks
from .compiled.field import CompiledField, compiled_field
from .gradients.adjoint import Adjoint
from .gradients.adjoint_setup import NOT_GIVEN, adjoint_setup
from .graphed.capture import MODES
from .integrate import Grid, Options, fixed_grid, stop_times
from .problem import (
    Field,
    Problem,
    Structure,
    check_samples,
    check_state,
    check_times,
    check_tolerance,
    check_zero_tolerance,
    with_arguments,
)
from .regularizers import RUNNING, CostField, check_regularizers, with_costs
from .step_control import STEP_CONTROLS, StepControl

GRADIENTS = ("direct", "adjoint", "checkpoint", "quadrature")
FAILURES = ("raise", "return")
_PLAIN = frozenset({str, int, float, bool, type(None)})  # types whose values are equal only where they mean the same


@dataclass(frozen=True, eq=False)
class Settings:
    """What was asked for by options, whatever the state. The same object for the same options, so it is compared by `is`."""

    options: Options
    gradient: str = "direct"
    per_sample: bool = False
    regularizers: tuple[str, ...] = ()
    dense: bool = False
    on_failure: str = "raise"
    max_checkpoints: int | None = None


def settings_of(*given: Any) -> Settings:
    """Those of the options in the order of `_settings`. Raises ValueError and TypeError as `solve` does."""
    if torch.compiler.is_compiling() or not all(map(_is_plain, given)):
        return _settings(*given)
    return _same_settings(*given)


def _is_plain(x: Any) -> bool:
    return type(x) in _PLAIN or (type(x) is tuple and all(map(_is_plain, x)))


def _settings(
    method: str,
    gradient: str,
    step_control: str,
    controller: Any,
    first_step: float | None,
    min_step: float,
    max_step: float,
    max_num_steps: int,
    safety: float,
    ifactor: float,
    dfactor: float,
    step_t: Any,
    jump_t: Any,
    step_size: float | None,
    grid_constructor: Callable | None,
    perturb: bool,
    cuda_graph: bool | str,
    interp: str,
    regularizers: Sequence[str],
    dense: bool,
    on_failure: str,
    max_checkpoints: int | None,
) -> Settings:
    options = Options(
        method=method,
        control=StepControl(controller, safety, ifactor, dfactor, float(min_step), float(max_step), max_num_steps),
        first_step=None if first_step is None else float(first_step),
        step_t=stop_times("step_t", step_t),
        jump_t=stop_times("jump_t", jump_t),
        step_size=None if step_size is None else float(step_size),
        grid_constructor=grid_constructor,
        perturb=perturb,
        cuda_graph=_graph_mode(cuda_graph),
        interp=interp,
    )
    _one_of("step_control", step_control, STEP_CONTROLS)
    _one_of("on_failure", on_failure, FAILURES)
    _one_of("gradient", gradient, GRADIENTS)
    _check_checkpoints(max_checkpoints, gradient)
    per_sample = step_control == "per_sample"
    if per_sample and not options.adaptive:
        raise ValueError(f"step_control='per_sample' needs an adaptive method, got {method!r}, which has no step control")
    names = check_regularizers(regularizers, options.tableau, method, gradient)
    return Settings(options, gradient, per_sample, names, bool(dense), on_failure, max_checkpoints)


_same_settings = lru_cache(maxsize=256, typed=True)(_settings)


@dataclass(eq=False)
class Request:
    """One solve as it was asked for. Nobody writes into it.

    structure: of the state, with its leaves as the user gave them. t: the times, perhaps with a gradient. params: the tensors
    that the user wants gradients for, None: all. backward: the solve of the adjoint. compiled: the compiled field that func
    is, and args its further arguments. prepared: what was made ready while engines were asked, by name.
    """

    problem: Problem
    settings: Settings
    structure: Structure
    t: Tensor
    grid: Grid | None = None
    params: Sequence[Tensor] | None = None
    backward: Adjoint | None = None
    compiled: CompiledField | None = None
    args: Sequence[Any] = ()
    prepared: dict[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> Options:
        return self.settings.options

    @property
    def func(self) -> Callable[..., Any]:
        """The user's, with its further arguments."""
        func: Callable[..., Any] = self.problem.field.func  # type: ignore[attr-defined]
        return func

    @property
    def records(self) -> bool:
        """Whether there may be gradients."""
        return torch.is_grad_enabled() and len(self.problem.t) > 1 and not self.problem.empty

    @cached_property
    def callbacks(self) -> dict[str, Callable]:
        """Those of func, by name; they are looked for, and perhaps warned of, once."""
        return find_callbacks(self.func, self.structure, self.options.adaptive)


def make_request(
    func: Callable[..., Any],
    y0: Any,
    t: Any,
    args: Sequence[Any],
    settings: Settings,
    rtol: Any,
    atol: Any,
    norm: Callable | None,
    params: Sequence[Tensor] | None,
    adjoint: tuple[Any, Any, Any, Any],
) -> Request:
    """adjoint: method, rtol, atol and options of the backward solve. Raises ValueError and TypeError as `solve` does."""
    options, per_sample = settings.options, settings.per_sample
    structure = check_state(y0)
    func = with_arguments(func, args)
    times, values = check_times(t)
    if per_sample:
        check_samples(structure)
    running = [name for name in settings.regularizers if name in RUNNING]
    of = CostField(func, structure, running, per_sample) if running else Field(func, structure)
    of.with_gradients = settings.gradient == "direct" and torch.is_grad_enabled()
    problem = Problem(
        field=of,
        leaves=[leaf.detach().contiguous() for leaf in structure.leaves],
        t=values,
        direction=-1.0 if len(values) > 1 and values[1] < values[0] else 1.0,
        per_sample=per_sample,
        rtol=check_tolerance("rtol", rtol, structure),
        atol=check_tolerance("atol", atol, structure),
        norm=None if norm is None else lambda leaves: norm(structure.unflatten(leaves[: len(structure.leaves)])),
    )
    if options.adaptive and norm is None:
        check_zero_tolerance(problem)
    if running:
        problem = with_costs(problem, running)
    grid = None
    if not options.adaptive:
        grid = fixed_grid(options, values, func, structure.unflatten(structure.leaves), times)
    backward = None
    if settings.gradient in ("adjoint", "quadrature"):
        if settings.gradient == "quadrature" and adjoint != NOT_GIVEN and (adjoint[3] or {}).get("norm") is not None:
            raise ValueError("adjoint_options['norm'] must not be given for gradient='quadrature': it solves a alone backwards")
        backward = adjoint_setup(func, problem, structure, options, *adjoint, params is not None)
    return Request(problem, settings, structure, times, grid, params, backward, *compiled_field(func))


def _check_checkpoints(limit: Any, gradient: str) -> None:
    if limit is None:
        return
    if gradient != "checkpoint":
        raise ValueError(f"max_checkpoints needs gradient='checkpoint', got gradient={gradient!r}")
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise ValueError(f"max_checkpoints must be a whole number of at least 1, got {limit!r}")


def _graph_mode(value: Any) -> str:
    if isinstance(value, str):
        _one_of("cuda_graph", value, MODES)
        return value
    return "step" if value else ""


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
