"""What was asked for by options alone: made once for equal ones, and looked up by their values, so it cannot be stale."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from .coupled import COUPLING
from .graphed.capture import MODES
from .integrate import Options, stop_times
from .interpolated import stops_of
from .methods import ADAPTIVE
from .regularizers import check_regularizers
from .shears import shears_of
from .solvers.progress import find_tqdm
from .step_control import STEP_CONTROLS, StepControl
from .tableau import ButcherTableau

GRADIENTS = ("direct", "adjoint", "checkpoint", "quadrature", "reversible")
FAILURES = ("raise", "return")
_PLAIN = frozenset({str, int, float, bool, type(None), tuple})


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
    every: int = 0  # accepted steps, of which the last is an output; 0: outputs are at given times
    by_value: bool = False  # whether it is the same object whenever the same is asked for


def settings_of(*given: Any) -> Settings:
    """Those of the options in the order of `_settings`. Raises ValueError and TypeError as `solve` does."""
    return _settings(*given) if torch.compiler.is_compiling() or not _are_plain(given) else _same_settings(*given)


def settings_by_name(**given: Any) -> Settings:
    """The same, by name; those that are not given as `solve` has them."""
    return settings_of(*[given.get(name, parameter.default) for name, parameter in _PARAMETERS.items()])


def settings_of_method(method: str, gradient: str) -> Settings:
    """Those of torchdiffeq's functions where nothing else is asked for: between steps of a grid they draw straight lines."""
    return _of_method(method, gradient) if torch.compiler.is_compiling() else _same_of_method(method, gradient)


def _of_method(method: str, gradient: str) -> Settings:
    interp = "method" if method in ADAPTIVE else "linear"
    return settings_by_name(method=method, gradient=gradient, interp=interp)


_same_of_method = lru_cache(maxsize=256)(_of_method)


def _are_plain(values: tuple) -> bool:
    """Whether they say by `==` and their types all that there is to say, those in tuples too."""
    return {*map(type, values)} <= _PLAIN and all([_are_plain(x) for x in values if type(x) is tuple and x])


def _settings(
    method: str = "dopri5",
    gradient: str = "direct",
    step_control: str = "joint",
    controller: Any = "I",
    first_step: float | None = None,
    min_step: float = 0.0,
    max_step: float = math.inf,
    max_num_steps: int = 2**31 - 1,
    safety: float = 0.9,
    ifactor: float = 10.0,
    dfactor: float = 0.2,
    step_t: Any = (),
    jump_t: Any = (),
    step_size: float | None = None,
    grid_constructor: Callable | None = None,
    perturb: bool = False,
    max_iters: int | None = None,
    max_order: int | None = None,
    solver: str | None = None,
    cuda_graph: bool | str = False,
    interp: str = "method",
    regularizers: Sequence[str] = (),
    dense: bool = False,
    on_failure: str = "raise",
    max_checkpoints: int | None = None,
    every: int | None = None,
    progress: bool = False,
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
        max_iters=max_iters,
        max_order=max_order,
        solver=solver,
        cuda_graph=_graph_mode(cuda_graph),
        interp=interp,
        progress="solve" if progress else "",
    )
    if progress:
        find_tqdm()
    _one_of("step_control", step_control, STEP_CONTROLS)
    _one_of("on_failure", on_failure, FAILURES)
    _one_of("gradient", gradient, GRADIENTS)
    _check_checkpoints(max_checkpoints, gradient)
    per_sample = step_control == "per_sample"
    if per_sample and not options.adaptive:
        raise ValueError(f"step_control='per_sample' needs an adaptive method, got {method!r}, which has no step control")
    names = check_regularizers(regularizers, options.tableau, method, gradient)
    if every is not None and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
        raise ValueError(f"every must be a whole number of at least 1, got {every!r}")
    return Settings(options, gradient, per_sample, names, bool(dense), on_failure, max_checkpoints, every or 0)


_PARAMETERS = inspect.signature(_settings).parameters


@lru_cache(maxsize=256, typed=True)
def _same_settings(*given: Any) -> Settings:
    return replace(_settings(*given), by_value=True)


def with_stops(settings: Settings, func: Any) -> Settings:
    """Those with the times at which what func interpolates is not smooth."""
    steps, jumps = stops_of(func) if settings.options.adaptive else ((), ())
    return _stopping(settings, steps, jumps) if steps or jumps else settings


@lru_cache(maxsize=256)
def _stopping(settings: Settings, steps: tuple[float, ...], jumps: tuple[float, ...]) -> Settings:
    options = settings.options
    jumps = (*options.jump_t, *(time for time in jumps if time not in options.jump_t))
    steps = tuple([time for time in dict.fromkeys((*options.step_t, *steps)) if time not in jumps])
    return replace(settings, options=replace(options, step_t=steps, jump_t=jumps))


def with_coupling(settings: Settings, adjoint: tuple[Any, Any, Any, Any]) -> Settings:
    """Those of a solve that can be undone, where that is asked for. adjoint: what was given for a backward solve. Raises
    ValueError."""
    if settings.gradient != "reversible":
        return settings
    for name, given in zip(("adjoint_method", "adjoint_rtol", "adjoint_atol"), adjoint, strict=False):
        if given is not None:
            raise ValueError(f"{name} must not be given with gradient='reversible', which solves nothing backwards")
    given = dict(adjoint[3] or {})
    own = shears_of(settings.options.tableau) is not None  # steps of the method itself can be undone
    coupling = COUPLING if own else given.pop("coupling", COUPLING)
    if given:
        names = "nothing" if own else "'coupling' alone"
        raise ValueError(f"adjoint_options may name {names} with gradient='reversible', got {next(iter(given))!r}")
    if isinstance(coupling, bool) or not isinstance(coupling, (int, float)) or not 0 < coupling <= 1:
        raise ValueError(f"adjoint_options['coupling'] must be a number in (0, 1], got {coupling!r}")
    return settings if own else _coupled(settings, float(coupling))


@lru_cache(maxsize=64, typed=True)
def _coupled(settings: Settings, coupling: float) -> Settings:
    options = settings.options
    if not isinstance(options.tableau, ButcherTableau):
        raise NotImplementedError(
            f"gradient='reversible' is not served by method={options.method!r}: use an explicit Runge-Kutta method, or "
            "gradient='checkpoint', whose memory max_checkpoints bounds"
        )
    return replace(settings, options=replace(options, coupling=coupling))


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
