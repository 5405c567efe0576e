"""The methods by name."""

from dataclasses import replace
from functools import lru_cache
from typing import Any

from .adams import MULTISTEP
from .auto import AUTO
from .bdf import BDF, BdfMethod
from .extrapolated import EXTRAPOLATED
from .implicit import IMPLICIT
from .kvaerno import KVAERNO3, KVAERNO5
from .rosenbrock import RODAS5P, ROSENBROCK23
from .solvers.scipy_solver import ScipyMethod
from .symplectic import SYMPLECTIC
from .tableau import ButcherTableau, StepFunction
from .tableaus import ADAPTIVE_HEUN, BOSH3, DOPRI5, DOPRI8, EULER, FEHLBERG2, HEUN2, HEUN3, MIDPOINT, RK4, TSIT5
from .verner import VERN7, VERN9

EXPLICIT: dict[str, ButcherTableau] = {
    "dopri8": DOPRI8,
    "vern9": VERN9,
    "vern7": VERN7,
    "dopri5": DOPRI5,
    "tsit5": TSIT5,
    "bosh3": BOSH3,
    "fehlberg2": FEHLBERG2,
    "adaptive_heun": ADAPTIVE_HEUN,
}
# For stiff systems. Each is the data of a family of `solvers.families`.
STIFF: dict[str, Any] = {"rodas5p": RODAS5P, "rosenbrock23": ROSENBROCK23, "kvaerno5": KVAERNO5, "kvaerno3": KVAERNO3}
FIXED: dict[str, ButcherTableau] = {"euler": EULER, "midpoint": MIDPOINT, "heun2": HEUN2, "heun3": HEUN3, "rk4": RK4}
ADAPTIVE: dict[str, Any] = {**EXPLICIT, **STIFF, "bdf": BDF, "auto": AUTO, "scipy_solver": ScipyMethod()}
STEPPED: dict[str, Any] = {**IMPLICIT, **MULTISTEP, **SYMPLECTIC, **EXTRAPOLATED}  # on a grid, each step one function
ON_GRID: dict[str, Any] = {**FIXED, **STEPPED}

# With each interpolant for outputs inside a step, made once: torch.compile does not follow the checks of a tableau.
INTERPOLATIONS: dict[str, dict[str, Any]] = {
    "method": {**ADAPTIVE, **ON_GRID},
    "linear": {name: tableau.linear() for name, tableau in (ADAPTIVE | ON_GRID).items()},
    "cubic": {name: tableau.cubic() for name, tableau in (ADAPTIVE | ON_GRID).items()},
}


def on_host(name: str) -> bool:
    """Whether steps by this method depend on numbers that the host must look at, so that no compiler can write them down."""
    return name in ADAPTIVE or name in STEPPED


def adjusted(method: Any, name: str, options: tuple[tuple[str, Any], ...]) -> Any:
    """The method with these options in place of its own. Raises ValueError where one is wrong, or the method has no such."""
    return _adjusted(method, name, options) if options else method  # torch.compile warns of calls of a cached function


@lru_cache(maxsize=64)
def _adjusted(method: Any, name: str, options: tuple[tuple[str, Any], ...]) -> Any:
    if isinstance(method, ScipyMethod) and [key for key, _ in options] == ["solver"]:
        return ScipyMethod(options[0][1])
    if isinstance(method, BdfMethod) and [key for key, _ in options] == ["max_order"]:
        return replace(method, max_order=options[0][1])
    for key, value in options:
        if not isinstance(method, StepFunction) or not hasattr(method.step, key) or name in ADAPTIVE:
            raise ValueError(f"{key} is no option of method={name!r}, got {value!r}")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{key} must be a whole number of at least 1, got {value!r}")
    second = None if method.second is None else replace(method.second, **dict(options))
    return replace(method, step=replace(method.step, **dict(options)), second=second)


def find_method(name: str) -> Any:
    """The method called `name`. Raises ValueError where there is none."""
    found = ADAPTIVE.get(name) or ON_GRID.get(name)
    if found is None:
        raise ValueError(f"method must be one of {', '.join([*ADAPTIVE, *ON_GRID])}; got {name!r}")
    return found
