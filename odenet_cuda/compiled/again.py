"""A solve of a compiled field like one before it: what follows from its kind is there, and only what may differ is looked at.

A kind is all that the solve was asked for but the numbers of its state and arguments, and its times where the method chooses
its steps, by value, and what torch says of itself.
What func reads is compared by the guards of its plan, as at every solve; whatever else is not as it was, or not as plain as
mostly, is left to `serve.py`, which asks for everything.
"""

from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..callbacks import may_have_callbacks
from ..gradients.adjoint_setup import NOT_GIVEN
from ..problem import Problem, Structure, check_times
from ..tracing import torch_is_plain
from .attach import Sources
from .compilation import Compilation
from .engine import Engine
from .marks import Unreadable
from .plans import key_of_state, same_as

_PLAIN = frozenset({Tensor, nn.Parameter})
_NUMBERS = frozenset({float, int})
_MOST_KEPT = 32  # of one field
_MOST_TIMES = 4096


def key_of(request: Any) -> tuple | None:
    """The kind of this solve; None where it is not known by values alone."""
    times, rtol, atol, norm, adjoint = request.given
    settings, structure = request.settings, request.structure
    if not settings.by_value or norm is not None or adjoint != NOT_GIVEN:
        return None
    if type(rtol) not in _NUMBERS or type(atol) not in _NUMBERS or atol == 0 or not torch_is_plain():
        return None
    for leaf in structure.leaves:
        if type(leaf) not in _PLAIN or leaf.is_nested:
            return None
    if isinstance(times, Tensor):
        if type(times) not in _PLAIN or times.requires_grad or times.numel() > _MOST_TIMES:
            return None
        kind: Any = times.dtype, times.shape
    elif type(times) in (list, tuple) and {*map(type, times)} <= _NUMBERS:
        kind = len(times)
    else:
        return None
    t = b""
    if not settings.options.adaptive:
        values = (times if times.dim() == 1 else times.reshape(-1)).tolist() if isinstance(times, Tensor) else times
        t = array("d", values).tobytes()  # there are two zeros
    state = key_of_state(structure, request.args, settings.per_sample)
    return *state, structure.any_shape, settings, kind, t, rtol, atol, torch.is_grad_enabled()


class Again:
    """What a solve leaves for others of its kind: nothing of its state, and nothing that func was given."""

    def __init__(self, func: Any, engine: Engine, backward: Any):
        self._same, self._wanted = same_as(func), engine.sources.wanted
        self._engine = engine.without_numbers()
        # Of the adjoint's norm, which nobody asks for here, hangs the state.
        self._engine.backward = None if backward is None else replace(backward, user_options={})
        self._problem = {**vars(engine.problem), "leaves": [], "field": None}
        self._new_times = engine.options.adaptive

    def engine(
        self, field: Compilation, structure: Structure, args: Sequence[Any], chosen: Sequence[Tensor] | None, t: Any
    ) -> Engine | None:
        """Of a solve of this kind, if nothing has changed. t: its times, as they were given."""
        like, func = self._engine, field.func
        plan, kind = like.plan, like.kind
        trusted = kind.trusted is plan.trusted and not plan.zeros and not plan.watch.due
        if not trusted or not self._same(func) or may_have_callbacks(func) or not plan.guards.hold(args, like.batch):
            return None
        args = plan.rows.of(args)
        sources = Sources(plan, structure, args, chosen)
        if sources.wanted != self._wanted:
            return None
        plan.readings.served += 1
        field.plans.latest = plan
        problem = Problem.__new__(Problem)
        problem.__dict__.update(self._problem)
        problem.leaves = [leaf.detach().contiguous() for leaf in structure.leaves]
        if self._new_times:
            _, problem.t = check_times(t, batch=len(problem.leaves[0]) if problem.per_sample else None)
            if problem.own and not problem.t.last.any():
                return None
        try:
            return like.again(problem, args, sources)
        except Unreadable:  # whole numbers that are too large
            return None


def again(
    field: Compilation, kind: tuple | None, structure: Structure, args: Sequence[Any], chosen: Sequence[Tensor] | None, t: Any
) -> Engine | None:
    """The engine of a solve of this kind, where one before left what it needs and nothing has changed."""
    found = None if kind is None else field.plans.again.get(kind)
    return None if found is None else found.engine(field, structure, args, chosen, t)


def keep(field: Compilation, kind: tuple | None, engine: Engine, backward: Any) -> None:
    """Leaves what solves of this kind need, for the next."""
    if kind is not None:
        kept = field.plans.again
        if len(kept) >= _MOST_KEPT:
            kept.clear()
        kept[kind] = Again(field.func, engine, backward)
