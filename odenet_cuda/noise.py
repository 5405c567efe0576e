"""Random numbers that func draws: where their generators stood, so that a step made again draws the same."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .problem import Field

States = tuple[Tensor, ...]


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


class NotedField:
    """func over leaves, for a solve: notes in `drawn` where the generators stood before each call."""

    def __init__(self, field: Field, device: torch.device):
        self.field, self.device = field, device
        self.drawn: list[States] = []

    def __call__(self, t: Tensor, y: Sequence[Tensor], stage: int = 0) -> list[Any]:
        self.drawn.append(states(self.device))
        return self.field(t, y, stage)
