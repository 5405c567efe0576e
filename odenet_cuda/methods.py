"""The methods by name."""

from typing import Any

from .rosenbrock import RODAS5P, ROSENBROCK23
from .tableau import ButcherTableau
from .tableaus import ADAPTIVE_HEUN, BOSH3, DOPRI5, DOPRI8, EULER, FEHLBERG2, HEUN2, HEUN3, MIDPOINT, RK4, TSIT5

EXPLICIT: dict[str, ButcherTableau] = {
    "dopri8": DOPRI8,
    "dopri5": DOPRI5,
    "tsit5": TSIT5,
    "bosh3": BOSH3,
    "fehlberg2": FEHLBERG2,
    "adaptive_heun": ADAPTIVE_HEUN,
}
# For stiff systems. Each is the data of a family of `solvers.families`.
STIFF: dict[str, Any] = {"rodas5p": RODAS5P, "rosenbrock23": ROSENBROCK23}
FIXED: dict[str, ButcherTableau] = {"euler": EULER, "midpoint": MIDPOINT, "heun2": HEUN2, "heun3": HEUN3, "rk4": RK4}
ADAPTIVE: dict[str, Any] = {**EXPLICIT, **STIFF}

# With each interpolant for outputs inside a step, made once: torch.compile does not follow the checks of a tableau.
INTERPOLATIONS: dict[str, dict[str, Any]] = {
    "method": {**ADAPTIVE, **FIXED},
    "linear": {name: tableau.linear() for name, tableau in (ADAPTIVE | FIXED).items()},
    "cubic": {name: tableau.cubic() for name, tableau in (ADAPTIVE | FIXED).items()},
}

# What torchdiffeq has and this package does not have yet.
ABSENT = (
    "explicit_adams",
    "implicit_adams",
    "fixed_adams",
    "implicit_euler",
    "implicit_midpoint",
    "trapezoid",
    "radauIIA3",
    "gl4",
    "radauIIA5",
    "gl6",
    "sdirk2",
    "trbdf2",
    "scipy_solver",
)


def find_method(name: str) -> Any:
    """The method called `name`. Raises NotImplementedError for a torchdiffeq method that is missing here, else ValueError."""
    tableau = ADAPTIVE.get(name) or FIXED.get(name)
    if tableau is not None:
        return tableau
    known = ", ".join([*ADAPTIVE, *FIXED])
    if name in ABSENT:
        raise NotImplementedError(f"method {name!r} is not part of this version of odenet_cuda; there are {known}")
    raise ValueError(f"method must be one of {known}; got {name!r}")
