"""The start of an adaptive solve: the solver state, where steps must end, and the size of the first step, or that with which
an earlier solve would have gone on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops import FIELDS, STOPS
from ..problem import Problem, times_as_tensor, to_device
from ..step_control import SUCCESS, initial_state
from ..stepper import Stepper
from .norms import write_norm
from .trajectory import Evaluation


@dataclass(frozen=True, eq=False)
class Resumed:
    """Where another solve ended. state: of the solver, [NUM_FIELDS, rows]. slope: the first of its next step, a tensor a leaf,
    or None where it is not known."""

    state: Tensor
    slope: list[Tensor] | None


def stop_table(problem: Problem, step_t: Sequence[float], jump_t: Sequence[float]) -> np.ndarray:
    """The times inside the interval at which steps must end, in the direction of the solve, and why, float64 [2, stops]; the
    end is the last. Where rows have their own times [rows, 2, stops], those with fewer filled up with the end.

    Where func is discontinuous at t[0], that is the first: the first slope is that inside the interval. So is the last one.
    """
    if not problem.own and not step_t and not jump_t:
        return np.array([[problem.t[-1]], [STOPS["end"]]], dtype=np.float64)
    if not problem.own:
        return np.array(_stops(problem, problem.t[0], problem.t[-1], problem.direction, step_t, jump_t), dtype=np.float64)
    if not step_t and not jump_t:
        ends = problem.t[-1]
        return np.stack([ends, np.full_like(ends, STOPS["end"])], 1)[:, :, None]
    intervals = zip(problem.t[0].tolist(), problem.t[-1].tolist(), problem.direction.tolist(), strict=True)
    rows = [_stops(problem, t0, t1, direction, step_t, jump_t) for t0, t1, direction in intervals]
    most = max([len(times) for times, _ in rows], default=1)
    filled = [[part + part[-1:] * (most - len(part)) for part in row] for row in rows]
    return np.array(filled, dtype=np.float64).reshape(len(filled), 2, most)


def _stops(
    problem: Problem, t0: float, t1: float, direction: float, step_t: Sequence[float], jump_t: Sequence[float]
) -> tuple[list[float], list[int]]:
    """Those from t0 to t1: times and kinds."""
    starts, ends = ([time for time in jump_t if problem.same_time(time, t)] for t in (t0, t1))
    kinds = {time: STOPS["step"] for time in step_t}
    kinds |= {time: STOPS["jump"] for time in jump_t if time not in starts and time not in ends}
    inside = [time for time in kinds if direction * (time - t0) > 0 and direction * (t1 - time) > 0]
    inside.sort(key=lambda time: direction * time)
    times, reasons = [*inside, t1], [*(kinds[time] for time in inside), STOPS["end on jump" if ends else "end"]]
    return ([t0, *times], [STOPS["jump"], *reasons]) if starts and t1 != t0 else (times, reasons)


def starts_on_jump(problem: Problem, stops: np.ndarray) -> Any:
    """Whether func is discontinuous at t[0], by the table of stops; for each row where they have their own times."""
    if not problem.own and stops.shape[-1] == 1:  # the end alone
        return False
    return (stops[..., 0, 0] == problem.t[0]) & (stops[..., 1, 0] == STOPS["jump"])


def first_state(problem: Problem, stops: np.ndarray, on_jump: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The solver state before the first step, the table of stops, and the output times. on_jump: of `starts_on_jump`."""
    host = initial_state(problem.t[0], problem.rows, problem.direction, on_jump)
    if problem.own:
        host[FIELDS["status"], problem.t.last == 0] = SUCCESS
    state, table, t = (
        to_device(x, problem.device) for x in (torch.from_numpy(host), torch.from_numpy(stops), times_as_tensor(problem.t))
    )
    if problem.held is not None:
        state[FIELDS["status"]].masked_fill_(problem.held, SUCCESS)
    return state, table, t


def plan_first_step(
    problem: Problem,
    stepper: Stepper,
    state: Tensor,
    in_norm: int,
    size: float | None,
    slope: Callable[[Tensor, list[Tensor]], list[Tensor]],
) -> None:
    """The first step to try, given or by f(t0, y0), which lies in k[0], and by f one Euler step on: Hairer, Norsett and Wanner
    I, II.4. in_norm: how many leaves count. slope: func."""
    constants = torch.zeros(4, problem.rows, dtype=torch.float64, device=problem.device)
    norms, one = constants[:3], constants[3].fill_(1.0)

    def norm(x: list[list[Tensor]], weights: list[float], out: Tensor) -> None:
        """out [rows] = norm of sum_j weights_j x_j, scaled by the tolerances at y0; x: [states][leaves]."""
        if problem.fused_error:
            addresses = [[0 if part is None else part.data_ptr() for part in leaves] for leaves in x]
            stepper.kernels.norm(out.data_ptr(), one.data_ptr(), weights, addresses)
        else:
            write_norm(out, problem, in_norm, stepper.y0, stepper.y0, x, weights, one)

    norm([stepper.y0], [1.0], norms[0])
    norm([stepper.k[0]], [1.0], norms[1])
    if size is not None:
        stepper.kernels.first_step(norms.data_ptr(), size, 1)
        return
    stepper.kernels.first_step(norms.data_ptr(), 0.0, 0)
    stepper.kernels.euler()
    t1 = problem.time_views(state[FIELDS["step_end"]].to(problem.real)[None])[0]
    k1 = [of_leaf if of_leaf is None else of_leaf.detach() for of_leaf in slope(t1, stepper.y[1])]
    stepper.set_slopes(1, k1, True)
    norm(stepper.k[:2], [-1.0, 1.0], norms[2])
    stepper.kernels.first_step(norms.data_ptr(), 0.0, 1)


def first_slope(solver: Any) -> Evaluation:
    """f(t0, y0) of this `AdaptiveSolver`, or the slope with which the solve that it resumes would have gone on: that is not
    evaluated again, but for rows that stand on a discontinuity of func."""
    kept = None if solver.resumed is None else solver.resumed.slope
    if kept is None:
        found: Evaluation = solver.evaluate_start()
        return found
    stepper, rows = solver.stepper, solver.problem.rows
    if np.any(solver.on_jump):
        found = solver.evaluate_start()
        mask = torch.from_numpy(np.zeros(rows, dtype=bool) | solver.on_jump).to(solver.problem.device)
        kept = [torch.where(solver.mask(mask, new), new, old) for new, old in zip(found.k, kept, strict=True)]
    return Evaluation(stepper.views[0], stepper.y0[: stepper.n], kept)


def plan_resumed(stepper: Stepper, state: Tensor, resumed: Resumed) -> None:
    """The first step to try is the one with which the other solve would have gone on, and its controller goes on from what it
    remembers."""
    for name in _REMEMBERED:
        state[FIELDS[name]].copy_(resumed.state[FIELDS[name]])
    norms = torch.zeros(3, state.shape[1], dtype=torch.float64, device=state.device)
    stepper.kernels.first_step(norms.data_ptr(), 0.0, 2)


_REMEMBERED = "inverse1", "inverse2", "error_ratio", "next_size"
