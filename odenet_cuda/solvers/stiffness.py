"""Whether the steps of an explicit method are as small as they are because func is stiff: then words say so, once.

Looked at when a solve has already taken many steps, and then ever more rarely, so the usual solve pays nothing. The largest
eigenvalue of df/dy comes from a few steps of the power method on differences of func (Sommeijer, Shampine and Verwer 1998, doi
10.1016/S0377-0427(97)00219-7, section 3.3); it stands for stiffness where it is a decay, and dt times it lies near the end of
the method's interval of stability, where the tolerance does not hold the step back, but the stability does.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import noise
from ..formulas import per_row
from ..ops import FIELDS
from ..problem import Problem, counter_of
from ..step_control import RUNNING, most_tried
from ..tableau import ButcherTableau

FIRST_LOOK = 2000  # steps tried
PRODUCTS = 8  # of the power method
_SHARE = 0.6  # of the interval of stability, beyond which it is what bounds the step
_DECAY = -0.8  # cosine between a direction and its image: a decay
_warned = False


@lru_cache(maxsize=16)
def stable_until(tableau: ButcherTableau) -> float:
    """The largest x up to which the method damps y' = -x y / dt, each step beginning with the last slope of the one before."""
    x = 0.0
    while x < 100 and max(abs(np.linalg.eigvals(_step_of(tableau, x)))) <= 1 + 1e-9:
        x += 0.01
    return x


def _step_of(tableau: ButcherTableau, x: float) -> np.ndarray:
    """What a step makes of (y, dt k_0)."""
    columns = []
    for y, k0 in ((1.0, 0.0), (0.0, 1.0)):
        k = [k0]
        for row in tableau.a[1:]:
            k.append(-x * (y + sum(weight * slope for weight, slope in zip(row, k, strict=True))))
        columns.append((y + sum(weight * slope for weight, slope in zip(tableau.b, k, strict=True)), k[-1]))
    return np.array(columns).T


class StiffnessLook:
    """Looks on at the steps of one solve."""

    def __init__(self, problem: Problem, method: Any):
        explicit = isinstance(method, ButcherTableau) and problem.signs is None and not problem.quadratures
        self.next = FIRST_LOOK if explicit and not problem.empty else 0  # 0: never
        self.tried = 0

    def after_step(self, solver: Any) -> None:
        """solver: an `AdaptiveSolver`, after a step."""
        self.tried += 1
        if self.tried != self.next:
            return
        self.next = 0 if _warned else 2 * self.next
        if self.next:
            state, y = solver.state.cpu().numpy(), solver.stepper.y0
            look(solver.problem, solver.method, state, y, state[FIELDS["status"]] == RUNNING, state[FIELDS["last_dt"]])


class Looks:
    """When to look at the solves of one func, ever more rarely: a look may cost as much as thousands of compiled steps."""

    def __init__(self) -> None:
        self.steps = self.seen = 0  # of the solves of many; when they were last looked at

    def due(self, tried: int) -> bool:
        if _warned or tried < FIRST_LOOK:
            return False
        self.steps += tried
        if self.steps < 2 * self.seen:
            return False
        self.seen = self.steps
        return True


def look_after(find: Callable[[], Problem], method: Any, state: np.ndarray, last: Sequence[Tensor], looks: Looks) -> None:
    """After a solve that nobody looked at. find: gives the problem, with its field. state: of the solver, on the host."""
    if not looks.due(most_tried(state)):
        return
    tried = state[FIELDS["num_accepted"]] + state[FIELDS["num_rejected"]]
    problem = find()
    if not StiffnessLook(problem, method).next:
        return
    steps = np.abs(state[FIELDS["next_size"]]) * state[FIELDS["direction"]]  # the last one may have been cut to end in time
    look(problem, method, state, last, tried >= FIRST_LOOK, steps)


def look(
    problem: Problem, method: ButcherTableau, state: np.ndarray, y: Sequence[Tensor], rows: np.ndarray, dt: np.ndarray
) -> None:
    """rows: bool [rows], those to look at. dt: of a step of each."""
    global _warned
    t, y = state[FIELDS["time"]], [leaf.detach() for leaf in y]
    if not all([bool(torch.isfinite(leaf).all()) for leaf in y]) or any([leaf.is_complex() for leaf in y]):
        return
    rate, cosine = largest(problem, torch.from_numpy(t.copy()), y)
    size, limit = np.abs(dt) * rate, stable_until(method)
    found = rows & (cosine * np.sign(dt) < _DECAY) & (size > _SHARE * limit)
    if not found.any():
        return
    _warned = True
    row = int(found.argmax())
    where = f" in sample {row}" if problem.per_sample else ""
    tried = int((state[FIELDS["num_accepted"]] + state[FIELDS["num_rejected"]])[row])
    warnings.warn(
        f"func is stiff{where}: after {tried} steps, at t = {t[row]:.6g}, an explicit method takes steps of {abs(dt[row]):.3g}"
        f", because it is not stable with longer ones (dt |lambda| = {size[row]:.2g} of at most {limit:.2g}), not because the "
        "tolerance asks for them. Use a method for stiff systems: method='rodas5p', or 'kvaerno5'. This is said once",
        stacklevel=2,
    )


@torch.no_grad()
def largest(problem: Problem, t: Tensor, y: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """(|lambda|; the cosine between the last direction and its image), [rows]. The calls count for nothing."""
    counter, generators, rows = counter_of(problem.field), noise.states(problem.device), problem.rows
    called = counter.nfe
    view = problem.time_views(t.to(problem.device, problem.real)[None])[0]
    slopes: Any = lambda x: [k.detach().double() for k in problem.field(view, x, 0)]  # noqa: E731
    norm: Any = lambda x: torch.stack([leaf.reshape(rows, -1).square().sum(1) for leaf in x]).sum(0).sqrt()  # noqa: E731
    scaled: Any = lambda x, by: [per_row(by, leaf) * leaf for leaf in x]  # noqa: E731
    wide = [leaf.double() for leaf in y]
    k = slopes([leaf.clone() for leaf in y])
    generator = torch.Generator("cpu").manual_seed(0)
    v = [torch.randn(leaf.shape, generator=generator, dtype=torch.float64, device="cpu").to(leaf.device) for leaf in y]
    eps = max([torch.finfo(leaf.dtype).eps for leaf in y]) ** 0.5
    shift = eps * norm(wide).clamp_min(eps)
    for _ in range(PRODUCTS):
        v = scaled(v, 1 / norm(v).clamp_min(torch.finfo(torch.float64).tiny))
        moved = [(leaf + step).to(own.dtype) for leaf, step, own in zip(wide, scaled(v, shift), y, strict=True)]
        w = scaled([x - z for x, z in zip(slopes(moved), k, strict=True)], 1 / shift)
        rate = norm(w)
        dot = torch.stack([(a * b).reshape(rows, -1).sum(1) for a, b in zip(v, w, strict=True)]).sum(0)
        v = w
    counter.nfe = called
    noise.restore(generators, problem.device)
    return rate.cpu().numpy(), (dot / rate.clamp_min(torch.finfo(torch.float64).tiny)).cpu().numpy()
