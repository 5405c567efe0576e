"""An adaptive loop that runs ahead of the device: it looks late, so that the host never waits.

Steps past the end find a held state. What a gradient needs of the steps, of rejected ones too, is kept and looked at after the
solve. A step may be captured and replayed, for nothing on the host depends on it.
"""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ..graphed.capture import Busy, Watch, being_captured, captured, repeated
from ..ops import FIELDS
from ..problem import counter_of
from ..ranges import marked
from ..step_control import most_tried
from .trajectory import Evaluation, Trajectory


def run(solver: Any, start: Evaluation | None) -> Trajectory:
    """The solve of this `AdaptiveSolver`."""
    if being_captured(solver.problem.device):
        raise RuntimeError(
            "an adaptive solve cannot be part of a CUDA graph that the caller captures: the host must learn of its end; "
            "capture a solve on a grid (step_size), or leave it to cuda_graph=True"
        )
    solver.start(start)
    counter = counter_of(solver.problem.field)
    called, steps = counter.nfe, 0
    watch = Watch(solver.state[FIELDS["status"]], solver.expected, on_device=solver.state.is_cuda)
    ended = False
    while not ended:
        with marked("step"):
            before = _before_step(solver) if solver.recorder is not None and not solver.recording else None
            if solver.replay is not None:
                solver.replay()
            else:
                solver._step()
            if before is not None:
                solver.unseen.append((solver.state.clone(), before))
        steps += 1
        ended = watch.ended_now() if solver.loops and solver.replay is not None else watch.ended(steps)
        if not ended and solver.captures and solver.replay is None:  # after a step in which what func does once is done
            with suppress(Busy):
                _capture(solver)
    *hosts, host = torch.stack([*[state for state, _ in solver.unseen], solver.state]).cpu().numpy()  # the one wait
    for seen_state, (_, seen) in zip(hosts, solver.unseen, strict=True):
        solver.recorder.step(seen_state, *seen)
    solver.unseen = []
    solver.expected = most_tried(host)
    calls = solver.family.calls + (0 if solver.after_step is None else solver.after_step.calls)
    counter.nfe = called + solver.expected * calls  # steps past the end do not count
    trajectory: Trajectory = solver.trajectory()
    trajectory.seen = host
    return trajectory


def _capture(solver: Any) -> None:
    solver.replay = repeated(solver._step, solver.state[FIELDS["status"]]) if solver.loops else None
    solver.loops = solver.replay is not None
    if solver.replay is None:
        solver.replay = captured(solver._step, solver.problem.device, solver.pool)
    solver.captures = solver.replay is not None


def _before_step(solver: Any) -> tuple[list[Any], list[list[Tensor]], list[Tensor], Tensor]:
    """What the recorder keeps of a step that it is not told the slopes of."""
    stepper = solver.stepper
    slopes = [[slope.clone() for slope in stepper.k[0]]] if solver.recorder.carried else []
    return [], slopes, [leaf.clone() for leaf in stepper.y0], stepper.times.clone()
