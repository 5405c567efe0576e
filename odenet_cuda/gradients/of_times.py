"""The gradient of the times, added up one by one."""

import torch
from torch import Tensor

from ..problem import Problem
from ..solvers.trajectory import Index


class TimeGradient:
    """total: dL/dt, float64 [T], or [rows, T] where each row has its own times."""

    def __init__(self, problem: Problem):
        self._own = problem.own
        shape = (problem.rows, len(problem.t)) if problem.own else (len(problem.t),)
        self.total = torch.zeros(shape, dtype=torch.float64, device=problem.device)

    def add(self, index: Index, value: Tensor) -> None:
        """value: by the time of that index, [rows], or one number for all rows."""
        if not isinstance(index, Tensor):
            self.total[..., index] += value if self._own else value.sum()
        elif self._own:
            self.total.scatter_add_(1, index[:, None], value[:, None])
        else:
            self.total.index_add_(0, index, value)
