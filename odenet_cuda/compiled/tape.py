"""The memory of tapes. On the CPU that of earlier ones serves the next: memory that the system gives anew costs more to be
written for the first time than a solve does to compute what is written.
"""

from contextlib import suppress

import torch

_MOST = 256 << 20  # bytes that are kept
_MOST_TAPES = 4
_LARGER = 2  # times as large as what is asked for, a kept one may be
_kept: list[torch.Tensor] = []  # the latest last; by operations that no other thread comes between


class Tape:
    """So many bytes. They go to the next when nobody holds this object any more."""

    def __init__(self, size: int, device: torch.device):
        self._memory = _taken(size) if device.type == "cpu" else None
        if self._memory is None:
            self._memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.address = self._memory.data_ptr()

    def __del__(self) -> None:
        memory = getattr(self, "_memory", None)
        if memory is None or _kept is None or memory.device.type != "cpu":  # at the end of Python there is no list any more
            return
        _kept.append(memory)
        with suppress(IndexError):
            while len(_kept) > _MOST_TAPES or sum([x.numel() for x in _kept]) > _MOST:
                _kept.pop(0)


def _taken(size: int) -> torch.Tensor | None:
    """A kept one that suits, the latest."""
    found, others = None, []
    with suppress(IndexError):
        while found is None:
            memory = _kept.pop()
            if size <= memory.numel() <= _LARGER * size:
                found = memory
            else:
                others.append(memory)
    _kept.extend(reversed(others))
    return found
