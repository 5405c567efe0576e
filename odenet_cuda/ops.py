"""The kernels: one typed wrapper and one fake kernel per op, and the only place that calls ``torch.ops.odenet_cuda``.

Conventions, the same for every op:

- Ops write into tensors that the caller owns, return ``None`` and raise the version counter of what they wrote, so that
  autograd notices when a tensor it saved is overwritten. They have no gradient of their own; solves do.
- A list holds the leaves of a state, every tensor of a leaf has the leaf's shape, dtype (one of ``DTYPES``) and device.
- 16-bit types are summed in float32 and rounded once. A complex number counts by its modulus.
- Slopes ``k`` come leaf-major: ``k[leaf * slots + j]``; slots without a coefficient are not read.
- ``rows`` is 1 under joint control, else the number of samples on axis 0 of every leaf.
- What is read may be strided; what is written must be contiguous. Nothing is checked twice: the kernels raise
  ``ValueError``, naming argument, rule and value, before anything is written.
"""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

try:
    from . import _C
except ImportError:
    if find_spec(f"{__package__}._C") is not None:  # something else is wrong with it
        raise
    raise ImportError(
        f"{Path(__file__).parent} holds the sources of odenet_cuda, without its built extension. If the package is installed, "
        "run python in another folder; to use it from this one: pip install --no-build-isolation -e ."
    ) from None

__all__ = ["advance", "dense_output", "error", "first_step", "stage", "step_size"]

if os.environ.get("ODENET_CPU"):
    _C.choose_level(os.environ["ODENET_CPU"])

_ops = torch.ops.odenet_cuda
_stage = _ops.stage.default
_error = _ops.error.default
_step_size = _ops.step_size.default
_first_step = _ops.first_step.default
_dense_output = _ops.dense_output.default
_advance = _ops.advance.default

FIELDS: dict[str, int] = _C.fields
NUM_FIELDS: int = _C.num_fields
STATUS: dict[str, int] = _C.status
STOPS: dict[str, int] = _C.stops
DTYPES: dict[torch.dtype, int] = {getattr(torch, name): number for name, number in _C.dtypes.items()}
REAL: dict[torch.dtype, torch.dtype] = {dtype: dtype.to_real() for dtype in DTYPES}
MAX_STAGES: int = _C.max_stages
MAX_DEGREE: int = _C.max_degree


def readable(x: Tensor) -> Tensor:
    """x as the kernels read it from its address: contiguous, without a conjugation or negation that is still to be done."""
    if x.is_conj() or x.is_neg():
        x = x.resolve_conj().resolve_neg()
    return x if x.is_contiguous() else x.contiguous()


def _written(tensors: Sequence[Tensor]) -> None:
    if tensors and not tensors[0].is_inference():  # tensors of inference mode have no version counter
        increment_version(tensors)


def stage(y: Sequence[Tensor], y0: Sequence[Tensor], k: Sequence[Tensor], a: Sequence[float], dt: Tensor) -> None:
    """``y = y0 + dt * sum_j a[j] k[j]``, leaf by leaf.

    y: written. y0: base, or ``[]`` for zero. k: slopes, leaf-major. a: coefficients, at most 17. dt: float64, [rows].
    """
    _stage(y, y0, k, a, dt)
    _written(y)


def error(
    ratio: Tensor,
    y0: Sequence[Tensor],
    y1: Sequence[Tensor],
    k: Sequence[Tensor],
    e: Sequence[float],
    dt: Tensor,
    rtol: Sequence[float],
    atol: Sequence[float],
) -> None:
    """``ratio = max over leaves of rms(dt * sum_j e[j] k[j] / (atol + rtol * max(|y0|, |y1|)))``, row by row.

    ratio: float64, [rows], written. rtol, atol: one number a leaf. Source: Hairer, Norsett and Wanner I, eq. II.4.11.
    """
    _error(ratio, y0, y1, k, e, dt, rtol, atol)
    _written((ratio,))


def step_size(state: Tensor, times: Tensor, stops: Tensor, t: Tensor, c: Sequence[float], controller: Sequence[float]) -> None:
    """Accepts or rejects the step just tried, row by row, and plans the next one and its stage times.

    state: float64, [NUM_FIELDS, rows], read and written. times: [stages, rows] in the real type of the solved state,
    written. stops: float64, [2, num_stops], where steps must end and why. t: float64, [num_outputs]. c: nodes of the
    tableau. controller: the numbers of ``step_control.Controller``.
    """
    _step_size(state, times, stops, t, c, controller)
    _written((state, times))


def first_step(
    state: Tensor,
    times: Tensor,
    norms: Tensor,
    stops: Tensor,
    t: Tensor,
    c: Sequence[float],
    controller: Sequence[float],
    size: float,
    phase: int,
) -> None:
    """Plans the first step: as given (size > 0), or after Hairer, Norsett and Wanner I, II.4, in the phases 0 and 1. Phase 2
    plans one of the size in the field "next_size", with which a solve goes on.

    norms: float64, [3, rows]: of y0, of f0 and (phase 1) of f1 - f0, scaled by the tolerance.
    """
    _first_step(state, times, norms, stops, t, c, controller, size, phase)
    _written((state, times))


def dense_output(
    ys: Sequence[Tensor],
    y0: Sequence[Tensor],
    y1: Sequence[Tensor],
    k: Sequence[Tensor],
    p: Sequence[float],
    degree: int,
    state: Tensor,
    t: Tensor,
) -> None:
    """Writes the outputs that fell into the step just accepted, from the interpolant of the step.

    ys: [num_outputs, ...] a leaf, written where outputs fall. p: [stages, degree], flattened: the weight of slope j is
    ``sum_d p[j, d] theta**(d + 1)``. An output at the end of the step is ``y1`` itself.
    """
    _dense_output(ys, y0, y1, k, p, degree, state, t)
    _written(ys)


def advance(y0: Sequence[Tensor], k0: Sequence[Tensor], y1: Sequence[Tensor], k1: Sequence[Tensor], accept: Tensor) -> None:
    """``y0 <- y1`` and ``k0 <- k1`` in the rows where ``accept`` (float64, [rows]) is not 0."""
    _advance(y0, k0, y1, k1, accept)
    _written((*y0, *k0))


def _fake(*_args: object) -> None:
    """Every op writes into its arguments and returns nothing: on fake tensors there is nothing left to do."""


for _name in __all__:
    torch.library.register_fake(f"odenet_cuda::{_name}", _fake)
