"""Differential equations as PyTorch layers, on fused C++/CUDA kernels."""

from importlib.metadata import version as _version

from .block import ODEBlock
from .compiled.field import CompiledField, compile
from .odeint import odeint, odeint_adjoint, odeint_dense, odeint_event
from .solution import Interpolant, Solution, SolverError, Stats
from .solve import solve

__version__ = _version("odenet-cuda")
__all__ = [
    "CompiledField",
    "Interpolant",
    "ODEBlock",
    "Solution",
    "SolverError",
    "Stats",
    "compile",
    "odeint",
    "odeint_adjoint",
    "odeint_dense",
    "odeint_event",
    "solve",
]
