"""Whether the adjoint's backward solve came back to where the forward solve was.

It solves y once more, backwards, which is unstable where the forward solve is stable: the gradient is then that of another
trajectory. At each earlier output both are known (Gholami, Keutzer and Biros 2019, arXiv:1902.10298).
"""

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import formulas
from ..solution import Stats

_TRUSTED = 1e3  # multiples of the tolerance
_FAR = 0.05  # of a state, on a grid
_ROUNDING = 64  # units in the last place, of rounding over a solve: where they are more than the tolerance, they count
_WIDE = {torch.complex64: torch.complex128, torch.complex128: torch.complex128}
_WIDE |= {dtype: torch.float64 for dtype in (torch.float32, torch.float64)}
_FEW = 1024  # numbers of a state
_warned = False


def add_drift(
    stats: Stats,
    tolerances: tuple[Sequence[float], Sequence[float]],
    rows: int,
    found: Sequence[Tensor],
    stored: Sequence[Tensor],
    held: Tensor | None = None,
) -> None:
    """Takes in the states at an earlier output, of the backward solve and of the forward one. tolerances: rtol and atol of the
    former. held: rows without it."""
    ratios = []
    for x, y, rtol, atol in zip(found, stored, *tolerances, strict=True):
        eps = _ROUNDING * torch.finfo(y.dtype).eps
        x, y = formulas.widened(x), formulas.widened(y)
        if held is not None:
            y = torch.where(held.reshape(-1, *[1] * (y.dim() - 1)), x, y)  # they may have no number there
        size = y.abs()
        least = eps * size.amax() + atol if eps > rtol and size.numel() else atol
        z = (x - y) / (size * max(rtol, eps) + least)
        if atol == 0:  # 0 / 0 is no error
            z = torch.nan_to_num(z)
        columns = max(1, z.numel() // max(1, rows))
        ratios.append(torch.linalg.vector_norm(z.reshape(rows, -1), dim=1, dtype=_WIDE[z.dtype]) * columns**-0.5)
    ratio = ratios[0] if len(ratios) == 1 else torch.stack(ratios).amax(0)
    if held is not None:
        ratio = ratio.masked_fill(held, 0.0)
    stats.drift = ratio if stats.drift is None else torch.maximum(stats.drift, ratio)


def note_drift(stats: Stats, on_grid: bool, *given: Any) -> None:
    """As `add_drift`; of few numbers on a grid when somebody asks for it, for it would take a tenth of the time."""
    tolerances, rows, found, stored, held = given
    if on_grid and sum([x.numel() for x in found]) <= _FEW:
        stored = [y.clone() for y in stored]  # the outputs are the user's, who may write into them
        stats.looks.append(partial(add_drift, stats, tolerances, rows, found, stored, held))
    else:
        add_drift(stats, *given)


def warn_of_drift(stats: Stats, rtol: float | None, waited: bool, gradient: str = "adjoint") -> None:
    """One warning in the life of the process, where the backward solve was asked for a tolerance, or on a grid came back far
    away. rtol: of a solve on a grid, None: it was asked for one. waited: the host has waited for its end in any case, so
    reading the drift costs nothing."""
    global _warned
    if _warned or stats.drift is None or not (rtol is None or waited):
        return
    largest = float(stats.drift.amax())
    if not largest <= (_TRUSTED if rtol is None else max(_TRUSTED, _FAR / max(rtol, 1e-16))):
        _warned = True
        warnings.warn(
            f"gradient={gradient!r} came back {largest:.3g} times its tolerance away from the states of the solve: its "
            "gradient may be that of another trajectory: use gradient='checkpoint' or 'direct', or for the adjoint "
            "'quadrature' or outputs at more times. Solution.stats.adjoint_drift tells it for every solve; this is said once",
            stacklevel=2,
        )
