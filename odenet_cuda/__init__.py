"""Differential equations as PyTorch layers, on fused C++/CUDA kernels."""

from importlib import import_module
from typing import Any

from .attempts import Attempts
from .block import ODEBlock
from .compiled.compilation import set_compile
from .compiled.field import CompiledField, compile
from .event import Event, Jump
from .interpolant import Interpolant
from .interpolated import Interpolated
from .odeint import odeint, odeint_adjoint, odeint_dense, odeint_event
from .solution import Solution, SolverError, Stats
from .solve import solve
from .steady_state import SteadyState, steady_state
from .steps import AcceptedStep, steps
from .symplectic import Separable
from .version import VERSION

__version__ = VERSION
__all__ = [
    "AcceptedStep",
    "Attempts",
    "CompiledField",
    "Event",
    "Interpolant",
    "Interpolated",
    "Jump",
    "ODEBlock",
    "Separable",
    "Solution",
    "SolverError",
    "Stats",
    "SteadyState",
    "compile",
    "odeint",
    "odeint_adjoint",
    "odeint_dense",
    "odeint_event",
    "set_compile",
    "solve",
    "steady_state",
    "steps",
]


def __getattr__(name: str) -> Any:
    """``torchdiffeq._impl`` without an import of its own, where this package stands in for torchdiffeq."""
    if name == "_impl":
        return import_module("._impl", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
