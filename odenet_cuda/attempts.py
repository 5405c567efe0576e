"""Every step that an adaptive solve tried."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .ops import FIELDS

# Of the solver state, for each step: what `attempts_of` reads.
TOLD = [FIELDS[name] for name in ("last_time", "last_dt", "error_ratio", "accept", "num_accepted", "num_rejected")]


class Attempts(NamedTuple):
    """In the order in which they were tried; each [N] under joint control, [N, batch] per sample, on the CPU.

    t, dt: where the step began, and its size, below 0 backwards in time; float64. error_ratio: the estimated error over the
    tolerance, at most 1 where the step was accepted (or of ``min_step``); float64. accepted: bool. A sample that had ended
    while others went on has NaN, and False.
    """

    t: Tensor
    dt: Tensor
    error_ratio: Tensor
    accepted: Tensor


def attempts_of(tried: Sequence[np.ndarray], per_sample: bool) -> Attempts | None:
    """tried: the fields of `TOLD` after each step, [6, rows]. None where no step was."""
    if not tried:
        return None
    t, dt, ratio, accepted, *counts = np.stack(tried, 1)  # [N, rows]
    total = counts[0] + counts[1]
    ran = np.diff(total, axis=0, prepend=np.zeros_like(total[:1])) > 0
    found = [np.where(ran, x, np.nan) for x in (t, dt, ratio)] + [ran & (accepted != 0)]
    return Attempts(*[torch.from_numpy(x if per_sample else x[:, 0]) for x in found])
