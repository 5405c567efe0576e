"""Symplectic methods for a state (q, p) with dq/dt = v(t, p) and dp/dt = F(t, q): kicks of p and drifts of q in turns.

A step is undone by the same kicks and drifts backwards, so `gradient="reversible"` keeps no state of it. Source: Hairer, Lubich
and Wanner, Geometric Numerical Integration, I.1.4 and II.4.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from . import noise
from .problem import Field, Problem, Structure, counter_of, parted
from .shears import Leaves, Shear, ShearStep, in_halves, shears_of
from .tableau import StepFunction

_ROUNDING = 1e3  # units in the last place, of what must not change


class Separable(nn.Module):
    """func(t, (q, p)) -> (velocity(p), force(t, q)), whose parts a symplectic method calls alone: one force a step by leapfrog.

    velocity: dq/dt of p, in the structure and shape of q. force: dp/dt of (t, q), in that of p. Modules or functions; further
    arguments of `solve` come after these.

    >>> import torch
    >>> from odenet_cuda import Separable, solve
    >>> pendulum = Separable(lambda p: p, lambda t, q: -torch.sin(q))
    >>> q, p = solve(pendulum, (torch.ones(1), torch.zeros(1)), [0.0, 1.0], method="leapfrog", step_size=0.01).ys
    >>> round(float(q[-1]), 4)
    0.6001
    """

    def __init__(self, velocity: Callable[..., Any], force: Callable[..., Any]):
        super().__init__()
        for name, part in (("velocity", velocity), ("force", force)):
            if isinstance(part, type) or not callable(part):
                raise TypeError(f"{name} must be callable, got {part!r}")
        self.velocity, self.force = velocity, force

    def forward(self, t: Tensor, y: Any, *args: Any) -> tuple[Any, Any]:
        q, p = y
        return self.velocity(p, *args), self.force(t, q, *args)


@dataclass(frozen=True)
class SymplecticStep(ShearStep):
    """Half 0 is q, half 1 is p."""

    def slopes(self, field: Callable[..., Leaves], t: Tensor, halves: Sequence[Leaves], into: int) -> Leaves:
        parts = _parts_of(counter_of(field))
        if parts is not None:
            return parts(t, halves[1 - into], into)
        return in_halves(field(t, [*halves[0], *halves[1]]))[into]


class _Parts:
    """The two functions of a `Separable` over leaves; calls of the force count."""

    def __init__(self, field: Any, func: Separable, args: Sequence[Any]):
        q, p = field.structure.unflatten(field.structure.leaves)
        self.field = field
        self.of = (
            Field(lambda t, p: func.velocity(p, *args), Structure(p)),
            Field(lambda t, q: func.force(t, q, *args), Structure(q)),
        )

    def __call__(self, t: Tensor, leaves: Leaves, into: int) -> Leaves:
        part = self.of[into]
        part.with_gradients = self.field.with_gradients
        k = part(t, leaves)
        self.field.gave_graph = self.field.gave_graph or part.gave_graph
        self.field.nfe += into
        return k


def _parts_of(field: Any) -> _Parts | None:
    if not hasattr(field, "parts"):
        func, args = parted(field.func)
        field.parts = _Parts(field, func, args) if isinstance(func, Separable) else None
    found: _Parts | None = field.parts
    return found


def _composed(order: int, sizes: Sequence[float]) -> StepFunction:
    """Steps of these shares, each half a kick, a drift and half a kick; kicks that meet are one."""
    drifts = tuple(sizes)
    kicks = (drifts[0] / 2, *[(a + b) / 2 for a, b in pairwise(drifts)], drifts[-1] / 2)
    at_kicks = (0.0, *list(accumulate(drifts))[:-1], 1.0)
    at_drifts = list(accumulate(kicks))[:-1]
    shears = [Shear(1, (0.0,), ((),), (kicks[0],))]
    for drift, between, kick, at in zip(drifts, at_drifts, kicks[1:], at_kicks[1:], strict=True):
        shears += [Shear(0, (between,), ((),), (drift,)), Shear(1, (at,), ((),), (kick,))]
    ends = {"c": (0.0, 1.0), "b": (0.0, 1.0), "p": ((0.0,), (1.0,)), "p_order": 1}
    step = SymplecticStep(tuple(shears), carries=True)
    return StepFunction(order=order, step=step, lands=True, **ends)  # type: ignore[arg-type]


_OUTER = 1 / (2 - 2 ** (1 / 3))
LEAPFROG = _composed(2, (1.0,))  # also called velocity Verlet: Verlet 1967, doi 10.1103/PhysRev.159.98
YOSHIDA4 = _composed(4, (_OUTER, 1 - 2 * _OUTER, _OUTER))  # Yoshida 1990, doi 10.1016/0375-9601(90)90092-3
SYMPLECTIC = {"leapfrog": LEAPFROG, "yoshida4": YOSHIDA4}


def is_symplectic(method: Any) -> bool:
    return isinstance(shears_of(method), SymplecticStep)


def check_separable(problem: Problem, structure: Structure, method: str) -> None:
    """Raises ValueError where the state is no pair, or func mixes its halves: dq may not change where q is moved, nor dp where
    p is. Func is called three times for it, but a `Separable` not at all."""
    field: Any = counter_of(problem.field)
    state = structure.unflatten(structure.leaves)
    rule = f"y0 must be a tuple (q, p) of states of one shape for method={method!r}"
    if not isinstance(state, (tuple, list)) or len(state) != 2:
        got = f"{type(state).__name__} of {len(state)}" if isinstance(state, (tuple, list, dict)) else type(state).__name__
        raise ValueError(f"{rule}, got {got}")
    shapes = [[(leaf.shape, leaf.dtype) for leaf in Structure(part).leaves] for part in state]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{rule}, got " + " and ".join(str([list(shape) for shape, _ in part]) for part in shapes))
    if isinstance(parted(field.func)[0], Separable) or problem.empty:
        return
    field, generators = field.again(), noise.states(problem.device)
    with torch.no_grad():
        t, y = problem.start_time(False), [leaf.clone() for leaf in problem.leaves]
        generator = torch.Generator("cpu").manual_seed(0)
        moved = []
        for leaf in y:
            by = torch.rand(leaf.shape, generator=generator, dtype=torch.float64, device="cpu").to(leaf.device, leaf.dtype)
            moved.append(leaf + 0.1 * (1 + leaf.abs()) * (by + 0.1))
        k = in_halves(field(t, y))
        for half, name, other in ((0, "dq", "q"), (1, "dp", "p")):
            point = in_halves(y)
            point[half] = in_halves(moved)[half]
            _refuse_mixed(k[half], in_halves(field(t, [*point[0], *point[1]]))[half], name, other, method)
    noise.restore(generators, problem.device)


def _refuse_mixed(k: Leaves, other: Leaves, name: str, moved: str, method: str) -> None:
    for x, y in zip(k, other, strict=True):
        change = torch.where(torch.isfinite(x) & torch.isfinite(y), (x - y).abs(), 0)
        bound = _ROUNDING * torch.finfo(x.dtype).eps * torch.where(torch.isfinite(x), x.abs(), 0).amax()
        if bool((change > bound).any()):
            raise ValueError(
                f"func must be separable for method={method!r}, dq of t and p alone and dp of t and q alone, but {name} "
                f"changed by {float(change.amax()):.3g} where {moved} alone was moved: use an explicit method, or gl4 or gl6, "
                "which are symplectic for every Hamiltonian"
            )
