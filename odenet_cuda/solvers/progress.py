"""How far a solve has come, on the terminal: a `Looker`, by tqdm, which is an extra."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..ops import FIELDS
from ..problem import Problem

_EVERY = 0.1  # seconds from one look to the next: what is written costs more than a small step


def find_tqdm() -> Any:
    """Raises ImportError where it is not installed."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError("progress=True needs tqdm, which is not installed: pip install odenet-cuda[progress]") from None
    return tqdm


class Progress:
    """label: what it is that goes on. Of samples with steps of their own it shows the one with the longest way left."""

    def __init__(self, problem: Problem, label: str):
        rows = np.zeros(problem.rows)
        self.t0, self.t1 = (np.ravel(problem.t[i]) + rows for i in (0, -1))
        self.bar = find_tqdm()(
            total=100, desc=label, unit="%", bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}{postfix}"
        )
        self.shown, self.steps, self.ended = 0.0, 0, False
        self.last: Any = None

    def after_step(self, host: np.ndarray, stepper: Any, state: Tensor) -> None:
        counts = (int(host[FIELDS[name]].max()) for name in ("num_accepted", "num_rejected"))
        self._look(host[FIELDS["time"]], host[FIELDS["last_dt"]], *counts)

    def _look(self, t: Any, dt: Any, accepted: int, rejected: int) -> None:
        self.last = t, dt, accepted, rejected
        now = time.monotonic()
        if now - self.shown >= _EVERY:
            self.shown = now
            self._show()

    def _show(self) -> None:
        t, dt, accepted, rejected = self.last
        way = self.t1 - self.t0
        done = np.where(way == 0, 1.0, (t - self.t0) / np.where(way == 0, 1.0, way))
        row = int(done.argmin())
        self.bar.n = 100 * float(done[row])
        where = f"t={t[row]:.6g} dt={dt[row]:.3g}"
        self.bar.set_postfix_str(f"{where} steps={accepted} rejected={rejected}", refresh=True)

    def end(self) -> None:
        """Shows where it is, once."""
        if not self.ended and self.last is not None:
            self._show()
        self.ended = True
        self.bar.close()

    def on_grid(self, callbacks: dict[str, Callable] | None) -> dict[str, Callable]:
        """The callbacks of a solve on a grid, whose steps are so seen as they begin."""
        others = callbacks or {}
        user = others.get("callback_step")

        def callback(t: Tensor, y: Sequence[Tensor], dt: Tensor) -> None:
            if user is not None:
                user(t, y, dt)
            at, size = (np.ravel(x.detach().cpu().numpy()) if isinstance(x, Tensor) else np.ravel(x) for x in (t, dt))
            self.steps += 1
            self._look(at + size, size, self.steps, 0)  # before it is made: those of a grid are not rejected

        return {**others, "callback_step": callback}
