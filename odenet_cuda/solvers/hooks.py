"""What others have a say in, or look at, after each step of the adaptive loop."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..ops import FIELDS


class AfterStep(Protocol):
    """Adds something up over the steps. calls: of func, that it makes for each. refusal: why no graph can hold it, or ""."""

    @property
    def calls(self) -> int: ...
    @property
    def refusal(self) -> str: ...

    def add(self, t0: Tensor, y0: list[Tensor], dt: Tensor) -> None:
        """After a step, before the move to the next. t0: as func sees it. dt: [rows], 0 where the step was not accepted."""

    def take(self) -> list[Tensor]:
        """The sums, which begin anew."""

    def resume(self, field: Any) -> Any:
        """The field of another solve that the same captured step makes: itself, for it adds up where it did, but as that
        other one calls func."""


class Looker(Protocol):
    """Looks at each step on the host, which so waits for it on CUDA too."""

    def after_step(self, host: np.ndarray, stepper: Any, state: Tensor) -> None:
        """After the decision about a step, before the move to the next. host: the solver state, [NUM_FIELDS, rows]."""

    def end(self) -> None:
        """The solve is over, or was interrupted."""


def some(host: np.ndarray, name: str, value: int) -> bool:
    """Whether the field of the solver state has this value in some row."""
    row = host[FIELDS[name]]
    return row[0] == value if len(row) == 1 else bool((row == value).any())


def runs_ahead(device: torch.device) -> bool:
    """Whether the host may be ahead of what it knows there."""
    return device.type == "cuda"


class Callbacks:
    """Those of func around each step, by name."""

    def __init__(self, named: dict[str, Callable], per_sample: bool):
        self.named, self.per_sample = named, per_sample

    def before(self, state: Tensor, y0: Sequence[Tensor]) -> None:
        self._call("callback_step", "time", "dt", state, y0)

    def after(self, host: np.ndarray, state: Tensor, y0: Sequence[Tensor]) -> None:
        for name, accepted in (("callback_accept_step", 1), ("callback_reject_step", 0)):
            if some(host, "accept", accepted):
                self._call(name, "last_time", "last_dt", state, y0)

    def _call(self, name: str, field_t: str, field_dt: str, state: Tensor, y0: Sequence[Tensor]) -> None:
        callback = self.named.get(name)
        if callback is not None:
            t, dt = state[FIELDS[field_t]].clone(), state[FIELDS[field_dt]].abs()
            if not self.per_sample:
                t, dt = t[0], dt[0]
            callback(t, [leaf.clone() for leaf in y0], dt)
