"""Step size control: the constants of the controller and the layout of the solver state that the kernels work on."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .ops import FIELDS, NUM_FIELDS, STATUS

# (proportional, integral, derivative) coefficients
CONTROLLERS = {
    "I": (0.0, 1.0, 0.0),  # the classical controller: Hairer, Norsett and Wanner I, II.4
    "PI": (0.4, 0.3, 0.0),  # PI.4.7: Gustafsson 1991, doi 10.1145/210232.210242
    "PID": (1 / 18, 1 / 9, 1 / 18),  # H312PID: Soderlind 2003, doi 10.1145/641876.641877
}
STEP_CONTROLS = ("joint", "per_sample")

RUNNING, SUCCESS = STATUS["running"], STATUS["success"]
_STATUS, _ACCEPTED, _REJECTED = FIELDS["status"], FIELDS["num_accepted"], FIELDS["num_rejected"]
UNDERFLOW, NON_FINITE, MAX_NUM_STEPS = STATUS["underflow"], STATUS["non_finite"], STATUS["max_num_steps"]
OUTSIDE = STATUS["outside"]
# Of a step on a grid that cannot be made.
NOT_CONVERGED, SINGULAR, NON_FINITE_JACOBIAN = 101, 102, 103
SCIPY_FAILED = 104  # see `solvers.scipy_solver`
STEP_FAILURES = (NON_FINITE, NOT_CONVERGED, SINGULAR, NON_FINITE_JACOBIAN)


@dataclass(frozen=True)
class StepControl:
    """What decides the next step: ``dt * min(ifactor, max(floor, safety * error_ratio**(-1/order)))`` for the I controller.

    `floor` is 1 after an accepted step of the I controller and `dfactor` otherwise.
    """

    controller: str | tuple[float, float, float] = "I"
    safety: float = 0.9
    ifactor: float = 10.0
    dfactor: float = 0.2
    min_step: float = 0.0
    max_step: float = math.inf
    max_num_steps: int = 2**31 - 1

    def __post_init__(self) -> None:
        if isinstance(self.controller, str):
            if self.controller not in CONTROLLERS:
                raise ValueError(f"controller must be 'I', 'PI', 'PID' or three numbers, got {self.controller!r}")
        elif len(self.controller) != 3:
            raise ValueError(f"controller must be 'I', 'PI', 'PID' or three numbers, got {self.controller!r}")
        for name, low, high in (
            ("safety", 0.0, math.inf),
            ("ifactor", 1.0, math.inf),
            ("dfactor", 0.0, 1.0),
            ("min_step", 0.0, math.inf),
            ("max_step", 0.0, math.inf),
            ("max_num_steps", 1, math.inf),
        ):
            value = getattr(self, name)
            if not low <= value <= high or (value == 0 and name not in ("min_step",)):
                raise ValueError(f"{name} must be a number from {low} to {high}, got {value}")
        if self.min_step > self.max_step:
            raise ValueError(f"min_step must not exceed max_step, {self.max_step}, got {self.min_step}")

    def constants(self, order: int, steers: bool = False) -> list[float]:
        """The numbers of the kernels' ``Controller``, in its order. steers: the method may make a step smaller that was
        accepted."""
        p, i, d = CONTROLLERS[self.controller] if isinstance(self.controller, str) else self.controller
        plain = p == 0 and d == 0
        return [
            float(order),
            float(self.safety),
            float(self.ifactor),
            float(self.dfactor),
            (p + i + d) / order,
            -(p + 2 * d) / order,
            d / order,
            1.0 if plain and not steers else float(self.dfactor),
            float(self.min_step),
            float(self.max_step),
            float(self.max_num_steps),
        ]


def initial_state(t0: Any, rows: int, direction: Any = 1.0, on_jump: Any = False) -> np.ndarray:
    """The solver state before the first step, float64, [NUM_FIELDS, rows]: the first output is y0 itself.

    direction: of time, +1 or -1. on_jump: t0 is a discontinuity of func, and the first of the stops. Each a number, or [rows].
    """
    state = np.zeros((NUM_FIELDS, rows))
    for name, value in (("time", t0), ("step_end", t0), ("last_time", t0), ("inverse1", 1.0), ("inverse2", 1.0)):
        state[FIELDS[name]] = value
    state[FIELDS["output_begin"]] = state[FIELDS["output_end"]] = 1
    state[FIELDS["jumped"]] = state[FIELDS["next_stop"]] = on_jump
    state[FIELDS["direction"]] = direction
    return state


def succeeded(state: np.ndarray) -> bool:
    """Whether no row of this solver state [NUM_FIELDS, rows] failed."""
    if state.shape[1] == 1:
        return bool(state.item(_STATUS) == SUCCESS)  # what a reduction takes ten times as long for
    return bool((state[_STATUS] == SUCCESS).all())


def most_tried(state: np.ndarray) -> int:
    """Steps tried, of the row with the most."""
    if state.shape[1] == 1:
        return int(state.item(_ACCEPTED) + state.item(_REJECTED))
    return int((state[_ACCEPTED] + state[_REJECTED]).max())
