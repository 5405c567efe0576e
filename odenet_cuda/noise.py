"""Random numbers that func draws: where their generators stood, so that a step made again draws the same."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .problem import Field

States = tuple[Tensor, ...]

OTHER_STEP = (
    "gradient='checkpoint' made a step of the solve again, and it ended elsewhere: func does not give the same for the same "
    "t and y. Torch's default generators were put back; numbers of a torch.Generator of func's own, of NumPy or of Python are "
    "not, nor is what func counts or keeps from call to call, and its module may have changed since the solve, or something "
    "else that func reads has been modified by an inplace operation or replaced. Use gradient='direct', or draw the numbers "
    "before the solve"
)
OTHER_NUMBERS = (
    "func draws random numbers at every call: gradient={!r} calls it again backwards, with other numbers than in the solve, so "
    "what it gives is not the gradient of the solve. Use gradient='direct' or 'checkpoint', or draw the numbers once a solve"
)
LATER_NUMBERS = (
    "func draws random numbers, but none at the start: gradient='checkpoint' would solve twice, and call its callbacks "
    "twice; use gradient='direct'"
)
_ROUNDING = 1e-5  # of a step's change that even float64 may lose: a part of func may be in float32, on CUDA in any order


def states(device: torch.device) -> States:
    """Of the generators of the CPU and of the device."""
    host = torch.get_rng_state()
    return (host, torch.cuda.get_rng_state(device)) if device.type == "cuda" else (host,)


def restore(saved: States, device: torch.device) -> None:
    torch.set_rng_state(saved[0])
    if len(saved) > 1:
        torch.cuda.set_rng_state(saved[1], device)


def differ(x: States, y: States) -> bool:
    return not all(torch.equal(a, b) for a, b in zip(x, y, strict=True))


def rounding(leaves: Sequence[Tensor]) -> list[tuple[float, float]]:
    """For each leaf how far the end of a step may be from that of the same step: shares of its change, and of its size."""
    device = leaves[0].device.type
    cast = torch.finfo(torch.get_autocast_dtype(device)).eps if torch.is_autocast_enabled(device) else 0.0
    eps = [torch.finfo(leaf.dtype).eps for leaf in leaves]
    return [(max(4 * max(e, cast) ** 0.5, _ROUNDING), 64 * e) for e in eps]


def beyond_rounding(y0: Tensor, y1: Tensor, other: Tensor, shares: tuple[float, float]) -> Tensor:
    """Whether two ends of a step from y0 differ by more than rounding, bool []; values that are not finite count as equal."""
    if y0.numel() == 0:
        return torch.zeros((), dtype=torch.bool, device=y0.device)
    change, size, difference = ((other - y0).abs().amax(), other.abs().amax(), (y1 - other).abs().amax())
    return difference > shares[0] * change + shares[1] * size


def warn_of_other_numbers(before: States, device: torch.device, gradient: str) -> None:
    """before: where generators stood before a solve backwards."""
    if differ(before, states(device)):
        warnings.warn(OTHER_NUMBERS.format(gradient), stacklevel=2)


class NotedField:
    """func over leaves, for a solve: notes in `drawn` where the generators stood before each call."""

    def __init__(self, field: Field, device: torch.device):
        self.field, self.device = field, device
        self.drawn: list[States] = []

    def __call__(self, t: Tensor, y: Sequence[Tensor], stage: int = 0) -> list[Any]:
        self.drawn.append(states(self.device))
        return self.field(t, y, stage)
