"""Whether a difference from func stays while nobody changes what func reads."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .differences import Difference, Unsettled
from .engine import Engine
from .marks import same_bits

_TRIES = 4  # comparisons that another thread disturbs


def settled(engine: Engine, args: Sequence[Any], compare: Callable[[int], Difference | None]) -> Difference | None:
    """What compare(seed) finds for both seeds, for a field may have a kink where one trial begins; and where they differ, the
    same once more, while nobody changes what func reads. Raises Unsettled where another thread does each time."""
    found = compare(0) and compare(1)
    for _ in range(_TRIES):
        if found is None:
            return None
        before, last = _read_by(engine, args), found
        found = compare(0) and compare(1)
        alike = found is not None and found.what == last.what and not abs(found.largest - last.largest) > 0.01 * last.largest
        if alike and before is not None and _same(before, _read_by(engine, args)):
            return found
    raise Unsettled("what func reads changes while it is compared")


def _read_by(engine: Engine, args: Sequence[Any]) -> list[tuple[Tensor, int]] | None:
    """What the program is given, if what it was read with is still so: values, and how often they have been written."""
    if not engine.plan.guards.hold(args):
        return None
    tensors = [place(args) for place in engine.plan.places.values()]
    return [(x.detach().clone(), 0 if x.is_inference() else x._version) for x in tensors]


def _same(before: list[tuple[Tensor, int]], now: list[tuple[Tensor, int]] | None) -> bool:
    return now is not None and all(x[1] == y[1] and same_bits(x[0], y[0]) for x, y in zip(before, now, strict=True))
