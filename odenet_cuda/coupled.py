"""Any explicit Runge-Kutta method as one that can be undone: two states, coupled, each moved by an increment at the other.

With psi_h(t, x) the increment of a step of size h from (t, x), and a coupling l in (0, 1],

    y1 = l y0 + (1 - l) z0 + psi_h(t0, z0),    z1 = z0 - psi_-h(t1, y1),

z = y at the start: McCallum and Foster 2024, arXiv:2410.11648. Its order is that of the method. It is undone by

    z0 = z1 + psi_-h(t1, y1),    y0 = (y1 - (1 - l) z0 - psi_h(t0, z0)) / l.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .problem import Problem
from .shears import Leaves, Shear, ShearStep, combined, shears_of
from .solvers.trajectory import Evaluation, Trajectory
from .tableau import ButcherTableau, StepFunction

COUPLING = 0.999
_APART = 0.5  # of the size of y: more than the error of a coarse grid
_ROUNDING = 8  # units in the last place, which are no sign of a distance


@dataclass(frozen=True)
class CoupledStep(ShearStep):
    """e: the error weights of the method, none without an estimate."""

    e: tuple[float, ...] = ()

    def slopes(self, field: Callable[..., Leaves], t: Tensor, halves: Sequence[Leaves], into: int) -> Leaves:
        return field(t, halves[1 - into])

    def error(self, dt: Tensor, halves: list[Leaves], ends: list[Leaves], k: list[Leaves]) -> list[Tensor] | None:
        """That of the method, or what the step adds to the distance of the two states where that is more: where they leave each
        other, which no estimate of one increment shows, steps become smaller."""
        if not self.e:
            return None
        worst = []
        for own, y0, z0, y1, z1 in zip(combined(None, k, self.e, dt), *halves, *ends, strict=True):
            added = (y1 - z1) - self.shears[0].keep * (y0 - z0)
            larger = added.abs() > torch.maximum(own.abs(), _ROUNDING * torch.finfo(y1.dtype).eps * y1.abs())
            worst.append(torch.where(larger, added, own))
        return [*worst, *worst]


@lru_cache(maxsize=64)
def coupled(tableau: ButcherTableau, coupling: float) -> StepFunction:
    """The coupled method of this one. Its steps end at the times of outputs."""
    used = max(i for i, weight in enumerate(tableau.b) if weight != 0) + 1
    first = len(tableau.b) if tableau.e else used
    forwards = Shear(0, tableau.c[:first], tableau.a[:first], tableau.b[:first], coupling, 1 - coupling)
    nodes = tuple([1 - c for c in tableau.c[:used]])
    rows = tuple([tuple([-weight for weight in row]) for row in tableau.a[:used]])
    step = CoupledStep((forwards, Shear(1, nodes, rows, tableau.b[:used])), e=tableau.e)
    ends = {"c": (0.0, 1.0), "b": (0.0, 1.0), "p": ((0.0,), (1.0,)), "p_order": 1}
    return StepFunction(order=tableau.order, step=step, lands=True, **ends)  # type: ignore[arg-type]


def is_coupled(method: Any) -> bool:
    return isinstance(shears_of(method), CoupledStep)


class _Pair:
    """func over the leaves of both states, of which it sees y, or over those of one."""

    def __init__(self, field: Callable[..., Leaves], n: int):
        self.field, self.n = field, n

    def __call__(self, t: Tensor, y: Sequence[Tensor], stage: int = 0) -> Leaves:
        k = self.field(t, y[: self.n], stage)
        return k if len(y) == self.n else [*k, *k]


def couple(problem: Problem) -> Problem:
    """The problem of both states."""
    n, valid = len(problem.leaves), problem.valid
    return replace(
        problem,
        field=_Pair(problem.field, n),
        leaves=[*problem.leaves, *problem.leaves],
        rtol=[*problem.rtol, *problem.rtol],
        atol=[*problem.atol, *problem.atol],
        valid=None if valid is None else lambda leaves: valid(leaves[:n]),
    )


def doubled(start: Evaluation | None) -> Evaluation | None:
    """f(t0, y0) of both states."""
    return None if start is None else replace(start, y=[*start.y, *start.y], k=[*start.k, *start.k])


def of_one(callbacks: dict[str, Callable] | None, n: int) -> dict[str, Callable] | None:
    """Callbacks that see y."""

    def seeing(callback: Callable) -> Callable:
        return lambda t, y, dt: callback(t, y[:n], dt)

    return {name: seeing(callback) for name, callback in callbacks.items()} if callbacks else callbacks


def uncoupled(trajectory: Trajectory, n: int) -> Trajectory:
    """That of y; the last state of both besides. On a grid a warning where they have left each other."""
    if trajectory.state is None:
        _warn_apart(trajectory.last[:n], trajectory.last[n:])
    pair = [leaf.clone() for leaf in trajectory.last]
    return replace(trajectory, ys=trajectory.ys[:n], last=trajectory.last[:n], slope=(), call=None, pair=pair)


def _warn_apart(y: Sequence[Tensor], z: Sequence[Tensor]) -> None:
    """On a grid nothing holds the two states together."""
    norm = torch.linalg.vector_norm
    ratios = torch.stack([norm(a - b).double() / norm(a).double().clamp_min(1e-300) for a, b in zip(y, z, strict=True)])
    ratio = float(ratios.amax())
    if not ratio <= _APART:
        warnings.warn(
            f"the two states of gradient='reversible' ended {ratio:.3g} times their size apart, so ys cannot be trusted: where "
            "func contracts, their distance grows with every step of the grid. Use a smaller step_size or an adaptive method, "
            "a smaller adjoint_options={'coupling': 0.99}, or gradient='checkpoint', whose memory max_checkpoints bounds",
            stacklevel=2,
        )
