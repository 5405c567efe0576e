"""What programs import from `torchdiffeq._impl`, where this package stands in for it: names of methods, norms, parameters.

Its solver classes are no part of this package. Whoever imports one is told so. Imports here are absolute: this file is loaded
as `torchdiffeq._impl` too.
"""

import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import odenet_cuda
from odenet_cuda.methods import ADAPTIVE, ON_GRID
from odenet_cuda.problem.field import parameters_of

__path__: list[str] = []  # a package, whose modules are made below

_OTHERS = (
    "adaptive_heun", "bosh3", "dopri5", "dopri8", "event_handling", "fehlberg2", "fixed_adams", "fixed_grid",
    "fixed_grid_implicit", "interp", "rk_common", "scipy_wrapper", "solvers", "tsit5",
)  # fmt: skip


class Method:
    """Stands in `SOLVERS` for a solver class."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"odenet_cuda has no solver class for {self.name!r}: solve by odenet_cuda.odeint(func, y0, t, method={self.name!r})"
        )

    def __repr__(self) -> str:
        return f"<method {self.name!r} of odenet_cuda>"


def rms_norm(x: Tensor) -> Tensor:
    return x.abs().square().mean().sqrt()


def linf_norm(x: Tensor) -> Tensor:
    return x.abs().amax()


def zero_norm(x: Tensor) -> float:
    return 0.0


def mixed_norm(parts: tuple[Tensor, ...]) -> Any:
    return max(map(rms_norm, parts)) if parts else 0.0


def find_parameters(module: torch.nn.Module) -> list[Tensor]:
    """What `odeint_adjoint` gives gradients to where it is given no adjoint_params."""
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    return parameters_of(module)


def flat_to_shape(x: Tensor, length: tuple[int, ...], shapes: list[torch.Size]) -> tuple[Tensor, ...]:
    """The parts of a state from its numbers on the last axis."""
    parts = x.split([shape.numel() for shape in shapes], -1)
    return tuple([part.reshape(*length, *shape) for part, shape in zip(parts, shapes, strict=True)])


SOLVERS = {name: Method(name) for name in (*ADAPTIVE, *ON_GRID)}
_norms = {"_rms_norm": rms_norm, "_linf_norm": linf_norm, "_zero_norm": zero_norm, "_mixed_norm": mixed_norm}
_functions = {name: getattr(odenet_cuda, name) for name in ("odeint", "odeint_dense", "odeint_event")}
_KNOWN: dict[str, dict[str, Any]] = {
    "odeint": {"SOLVERS": SOLVERS, "_flat_to_shape": flat_to_shape, **_functions},
    "adjoint": {
        "SOLVERS": SOLVERS,
        "find_parameters": find_parameters,
        "odeint": odenet_cuda.odeint,
        "odeint_adjoint": odenet_cuda.odeint_adjoint,
    },
    "misc": {"_flat_to_shape": flat_to_shape, **_norms},
    **{name: {} for name in _OTHERS},
}


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(
            f"{self.__name__}.{name} is an inner part of torchdiffeq that odenet_cuda, which stands in for it here, does not "
            "have: keep torchdiffeq itself for this import, or use odenet_cuda.odeint, odeint_adjoint and solve"
        )


for _name, _content in _KNOWN.items():
    _module = _Module(f"{__name__}.{_name}")
    _module.__dict__.update(_content)
    sys.modules[_module.__name__] = _module
    globals()[_name] = _module
for _name in ("odeint", "odeint_adjoint", "odeint_dense", "odeint_event"):  # functions hide modules, as there
    globals()[_name] = getattr(odenet_cuda, _name)
