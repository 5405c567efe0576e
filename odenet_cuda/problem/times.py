"""Output times that each row has of its own."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor


class OwnTimes(Sequence[np.ndarray]):
    """Times of each row: entry i is the i-th of every row, float64 [rows], NaN where a row has fewer; entry -1 is the last that
    each row has.

    table: the same as [rows, most times], filled up with NaN at the end. last: the index of the last time of each row, [rows].
    """

    def __init__(self, table: np.ndarray, last: np.ndarray | None = None):
        self.table = table
        self.last: np.ndarray = (~np.isnan(table)).sum(1) - 1 if last is None else last

    @cached_property
    def direction(self) -> np.ndarray:
        """+1 or -1, [rows]."""
        return np.where(self[-1] < self[0], -1.0, 1.0)

    def __len__(self) -> int:
        return self.table.shape[1]

    def __getitem__(self, i: Any) -> Any:
        return self.table[np.arange(len(self.table)), self.last] if i == -1 else self.table[:, i]

    def between(self, i: int, j: int, rows: np.ndarray) -> "OwnTimes":
        """From entry i to entry j. rows: for each row the one whose times these are."""
        return OwnTimes(self.table[rows][:, [i, j]])


def times_as_tensor(t: Any) -> Tensor:
    """Times of a problem as float64 [T], or [rows, T], on the CPU."""
    if isinstance(t, OwnTimes):
        return torch.from_numpy(t.table)
    return torch.tensor(t, dtype=torch.float64, device="cpu")
