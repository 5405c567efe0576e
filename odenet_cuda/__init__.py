"""Differential equations as PyTorch layers, on fused C++/CUDA kernels."""

from importlib.metadata import version as _version

from .solution import Interpolant, Solution, SolverError, Stats
from .solve import solve

__version__ = _version("odenet-cuda")
__all__ = ["Interpolant", "Solution", "SolverError", "Stats", "solve"]
