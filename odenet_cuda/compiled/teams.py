"""The team that solves a compiled field on CUDA: how many samples a block of threads has, and how many threads a sample has.

Fields of few operations have a thread a sample, whose numbers lie in registers. In wider ones every sample has several, so that
the layers of a few samples fill a block, and small batches fill the card. See core/team.h.
"""

import functools
from dataclasses import dataclass

import torch

from .program import Linear, Program

THREADS = 256  # of a block whose samples have several each
LANES = (32, 16, 8)  # samples of such a block
ALONE = (128, 64, 32)  # of one whose samples have one thread each
_WIDE = 1024  # products in a layer from which a sample has several threads, however many samples there are
_NARROW = 64  # and below which it never has
_BUSY = 64  # samples for each multiprocessor that keep it busy with a thread each
MATMULS = {"float32": "void", "tf32": "Tf32", "bf16": "Bf16"}  # to what operands are rounded -> core/tensor_core.h


@dataclass(frozen=True)
class Card:
    """What a team is chosen for. memory: bytes that the threads of a block can share."""

    capability: tuple[int, int]
    multiprocessors: int
    memory: int


H100 = Card((9, 0), 132, 227 << 10)


@functools.cache
def card_of(device: torch.device) -> Card:
    found = torch.cuda.get_device_properties(device)
    return Card((found.major, found.minor), found.multi_processor_count, found.shared_memory_per_block_optin)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Team:
    """lanes: samples of a block. groups: threads of a sample. item: bytes of a number. memory: at most, in bytes."""

    lanes: int
    groups: int
    matmul: str
    item: int
    memory: int

    @property
    def row(self) -> int:
        """Numbers between two rows of the team's memory: so many that the loads of tensor cores meet no bank twice."""
        return self.lanes + 8 if self.matmul != "float32" and self.lanes % 16 == 0 else self.lanes

    @property
    def slabs(self) -> int:
        """Bytes of the two slabs in core/team_layers.h."""
        return 2 * (16 if self.groups == 1 else 64) * (self.lanes + 4) * self.item

    @property
    def sums(self) -> int:
        """Bytes in which its threads add up; Block::add in core/team.h."""
        return 8 * self.lanes * self.groups

    def lanes_of_thread(self, rows: int) -> int:
        """Of how many samples a thread has results of a layer with so many rows, so that what it loads serves several."""
        return min(self.lanes, 4 if rows >= 8 * self.groups else 2 if rows >= 4 * self.groups else 1)

    def fits_twice(self, size: int) -> bool:
        """Whether a multiprocessor has memory for two blocks of so many bytes, and of many threads a sample; 1 KB of each
        it keeps for itself."""
        return self.groups > 1 and 2 * (size + 1024) <= self.memory + 1024

    def uses_tensor_cores(self, rows: int, columns: int) -> bool:
        return self.matmul != "float32" and rows >= 16 and columns >= 8


def teams_for(program: Program, item: int, batch: int, card: Card, matmul: str) -> list[Team]:
    """The best first. The last needs no memory for its rows."""
    products = max((s.rows * s.columns for s in program.statements if isinstance(s, Linear)), default=0)
    alone = Team(_filling(ALONE, batch, card)[0], 1, "float32", item, card.memory)
    few = batch <= _BUSY * card.multiprocessors
    if products < _NARROW or (products < _WIDE and not few):
        return [alone]
    matmul = matmul if item == 4 and card.capability >= (8, 0) else "float32"
    lanes = _filling(LANES, batch, card)
    return [*(Team(n, THREADS // n, matmul, item, card.memory) for n in lanes), alone]


def _filling(lanes: tuple[int, ...], batch: int, card: Card) -> tuple[int, ...]:
    """Those with which every multiprocessor has a block; the last, if there are none."""
    return tuple(n for n in lanes if n * card.multiprocessors <= batch) or lanes[-1:]
