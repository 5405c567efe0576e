"""Systems I - c df/dy of a narrow pattern: the numbers are put in an order in which entries lie near the diagonal (reverse
Cuthill and McKee 1969, doi 10.1145/800195.805928), cut into blocks, each of which meets its two neighbours alone, and every
other block is eliminated at once, again and again (block cyclic reduction: Golub and Van Loan, Matrix Computations, 4.5.4).
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NARROWEST = 16  # numbers of a block: smaller ones cost as much
FEWEST = 7  # blocks, below which the matrix is factorised as a whole


@dataclass(frozen=True, eq=False)
class Blocks:
    """How n numbers are put into `count` = 2^levels - 1 blocks of `size`. place: of number i, [n]. entries: where each entry of
    the pattern lies in [count, 3, size, size], blocks left of, on and right of the diagonal."""

    count: int
    size: int
    place: Tensor
    entries: Tensor


def blocks_of(n: int, lines: Tensor, columns: Tensor) -> Blocks | None:
    """None where the pattern is too wide for that."""
    where = ordered(n, lines.tolist(), columns.tolist())
    place = torch.tensor(where, dtype=torch.int64, device=lines.device)
    below, along = place[lines], place[columns]
    width = max(int((below - along).abs().max()) if len(lines) else 0, NARROWEST)
    count = FEWEST
    while -(-n // (2 * count + 1)) >= width:
        count = 2 * count + 1
    size = -(-n // count)
    if size < width:
        return None
    row, side = below // size, along // size - below // size + 1
    entries = ((row * 3 + side) * size + below % size) * size + along % size
    return Blocks(count, size, place, entries)


def ordered(n: int, lines: Sequence[int], columns: Sequence[int]) -> list[int]:
    """The place of each number, by reverse Cuthill and McKee."""
    near: list[set[int]] = [set() for _ in range(n)]
    for i, j in zip(lines, columns, strict=True):
        if i != j:
            near[i].add(j)
            near[j].add(i)
    found: list[int] = []
    seen = [False] * n
    for start in sorted(range(n), key=lambda i: len(near[i])):
        if seen[start]:
            continue
        begin = _farthest(near, start)
        queue, seen[begin] = deque([begin]), True
        while queue:
            i = queue.popleft()
            found.append(i)
            for j in sorted(near[i], key=lambda j: len(near[j])):
                if not seen[j]:
                    seen[j] = True
                    queue.append(j)
    place = [0] * n
    for position, i in enumerate(reversed(found)):
        place[i] = position
    return place


def _farthest(near: Sequence[set[int]], start: int) -> int:
    """A number at an end of what hangs together with this one."""
    for _ in range(2):
        seen, layer = {start}, [start]
        while layer:
            last = layer
            layer = list({j for i in layer for j in near[i]} - seen)
            seen.update(layer)
        start = min(last, key=lambda j: (len(near[j]), j))
    return start


class BlockFactors:
    """Of I - c dy of each system. dy: [systems, entries] in the order of the pattern. c: [systems]."""

    def __init__(self, blocks: Blocks, dy: Tensor, c: Tensor):
        self.blocks, systems, size = blocks, len(dy), blocks.size
        matrix = dy.new_zeros(systems, blocks.count * 3 * size * size).index_copy_(1, blocks.entries, -c[:, None] * dy)
        matrix = matrix.reshape(systems, blocks.count, 3, size, size)
        matrix[:, :, 1].diagonal(dim1=-2, dim2=-1).add_(1)
        left, on, right = matrix.unbind(2)
        self.levels: list[tuple[tuple[Tensor, Tensor], Tensor, Tensor]] = []
        while True:
            factors, pivots, _ = torch.linalg.lu_factor_ex(on[:, 0::2])
            sides = torch.cat([left[:, 0::2], right[:, 0::2]], -1)
            ahead = torch.linalg.lu_solve(factors, pivots, sides)  # [systems, half, size, 2 size]
            kept = torch.cat([left[:, 1::2], right[:, 1::2]], -1)
            self.levels.append(((factors, pivots), ahead, kept))
            if on.shape[1] == 1:
                return
            below, above = left[:, 1::2], right[:, 1::2]
            before, after = ahead[:, :-1], ahead[:, 1:]
            on = on[:, 1::2] - below @ before[..., size:] - above @ after[..., :size]
            left, right = -(below @ before[..., :size]), -(above @ after[..., size:])

    def solve(self, right: Tensor) -> Tensor:
        """right: [systems, n]."""
        blocks, systems = self.blocks, len(right)
        r = right.new_zeros(systems, blocks.count * blocks.size)
        r[:, blocks.place] = right
        r = r.reshape(systems, blocks.count, blocks.size, 1)
        down = []
        for factors, _, kept in self.levels:
            y = torch.linalg.lu_solve(*factors, r[:, 0::2])
            down.append(y)
            r = r[:, 1::2] - kept @ torch.cat([y[:, :-1], y[:, 1:]], -2)
        x = down[-1]
        for (_, ahead, _), y in zip(self.levels[-2::-1], down[-2::-1], strict=True):
            ends = torch.nn.functional.pad(x, (0, 0, 0, 0, 1, 1))
            even = y - ahead @ torch.cat([ends[:, :-1], ends[:, 1:]], -2)
            x = torch.stack([even, ends[:, 1:]], 2).flatten(1, 2)[:, :-1]
        return x.reshape(systems, -1)[:, blocks.place]
