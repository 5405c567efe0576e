"""Differential equations with exact solutions, for the tests."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ADAPTIVE_METHODS = ("dopri8", "dopri5", "tsit5", "bosh3", "fehlberg2", "adaptive_heun")
FIXED_METHODS = ("euler", "midpoint", "heun2", "heun3", "rk4")
ORDERS = dict(zip((*ADAPTIVE_METHODS, *FIXED_METHODS), (8, 5, 5, 3, 2, 2, 1, 2, 2, 3, 4), strict=True))


@dataclass(frozen=True)
class ExactProblem:
    """dy/dt = func(t, y). y0: the state at t0. exact: times [T] -> states [T, *y0.shape]; it holds before t0 too."""

    name: str
    func: Callable[[Tensor, Tensor], Tensor]
    y0: Tensor
    exact: Callable[[Tensor], Tensor]
    t0: float = 0.0


def column(t: Tensor, y0: Tensor) -> Tensor:
    """t [T] shaped to broadcast against [T, *y0.shape]."""
    return t.double().reshape(-1, *[1] * y0.dim())


def decay() -> ExactProblem:
    """y' = -y."""
    y0 = torch.tensor([1.0, 0.5, -2.0], dtype=torch.float64)
    return ExactProblem("decay", lambda t, y: -y, y0, lambda t: y0 * torch.exp(-column(t, y0)))


def oscillator() -> ExactProblem:
    """x' = 2 v, v' = -2 x."""
    y0 = torch.tensor([1.0, 0.0], dtype=torch.float64)
    turn = torch.tensor([[0.0, 2.0], [-2.0, 0.0]], dtype=torch.float64)

    def exact(t: Tensor) -> Tensor:
        return torch.stack([torch.cos(2 * t.double()), -torch.sin(2 * t.double())], dim=1)

    return ExactProblem("oscillator", lambda t, y: turn @ y, y0, exact)


def logistic() -> ExactProblem:
    """y' = y (1 - y)."""
    y0 = torch.tensor([[0.1, 0.4], [0.8, 0.95]], dtype=torch.float64)

    def exact(t: Tensor) -> Tensor:
        return y0 / (y0 + (1 - y0) * torch.exp(-column(t, y0)))

    return ExactProblem("logistic", lambda t, y: y * (1 - y), y0, exact)


def cosine() -> ExactProblem:
    """y' = y cos t, which depends on t."""
    y0 = torch.tensor([1.0, 2.0], dtype=torch.float64)
    return ExactProblem("cosine", lambda t, y: y * torch.cos(t), y0, lambda t: y0 * torch.exp(torch.sin(column(t, y0))))


def linear_system() -> ExactProblem:
    """y' = A y, solved by the matrix exponential."""
    matrix = torch.tensor([[-0.1, 2.0], [-2.0, -0.3]], dtype=torch.float64)
    y0 = torch.tensor([2.0, -1.0], dtype=torch.float64)

    def exact(t: Tensor) -> Tensor:
        return torch.linalg.matrix_exp(t.double()[:, None, None] * matrix) @ y0

    return ExactProblem("linear_system", lambda t, y: matrix @ y, y0, exact)


PROBLEMS = {problem.name: problem for problem in (decay(), oscillator(), logistic(), cosine(), linear_system())}


class VanDerPol:
    """x'' = mu (1 - x^2) x' - x for the rows of y [batch, 2], with mu [batch, 1]."""

    def __init__(self, mu: Tensor):
        self.mu = mu

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        x, v = y[:, :1], y[:, 1:]
        return torch.cat([v, self.mu * (1 - x * x) * v - x], dim=1)

    def row(self, i: int) -> "VanDerPol":
        """The field of one row alone."""
        return VanDerPol(self.mu[i : i + 1])


class Recording:
    """A field that counts its calls and keeps the times it saw, and copies of the states if asked to."""

    def __init__(self, func: Callable[[Tensor, Any], Any]):
        self.func, self.nfe = func, 0
        self.times: list[float] = []
        self.seen: list[Tensor] = []

    def __call__(self, t: Tensor, y: Any) -> Any:
        self.nfe += 1
        self.times.extend(t.detach().double().reshape(-1).tolist())
        self.seen.append(t.detach().clone())
        return self.func(t, y)
