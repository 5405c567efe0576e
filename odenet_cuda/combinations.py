"""The stage kernel alone, for linear combinations of tensors that are no stages of a step."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import _C
from .ops import DTYPES


@lru_cache(maxsize=256)
def _tables(
    dtypes: tuple[torch.dtype, ...],
    device: int,
    rows: int,
    columns: tuple[int, ...],
    a: tuple[tuple[float, ...], ...],
    signs: tuple[float, ...],
) -> _C.StepperTables:
    return _C.StepperTables(
        dtypes=[DTYPES[dtype] for dtype in dtypes],
        device=device,
        rows=rows,
        columns=columns,
        quadratures=0,
        signs=signs,
        a=a,
        b=[0.0] * len(a),
        c=[0.0] * len(a),
        e=[],
        rtol=[],
        atol=[],
        p=[0.0] * len(a),
        degree=1,
        controller=[],
    )


def combinations(leaves: Sequence[Tensor], rows: int, a: tuple[tuple[float, ...], ...], signs: Sequence[float]) -> Any:
    """The stage kernel alone: stage(i) gives signs dt sum_j a[i - 1][j] k_j of each leaf, its rows on axis 0."""
    device = leaves[0].device
    return _C.Stepper(
        _tables(
            tuple([x.dtype for x in leaves]),
            -1 if device.type == "cpu" else (device.index or 0),
            rows,
            tuple([x.numel() // max(rows, 1) for x in leaves]),
            a,
            tuple(signs),
        )
    )
