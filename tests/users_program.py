"""A user's program, as a type checker sees it: test_types.py. Imported, but not run."""

from typing import assert_type

import torch
from torch import Tensor

import odenet_cuda
from odenet_cuda import (
    Event,
    Interpolant,
    ODEBlock,
    Solution,
    Stats,
    odeint,
    odeint_adjoint,
    odeint_dense,
    odeint_event,
    solve,
    steady_state,
    steps,
)


def func(t: Tensor, y: Tensor) -> Tensor:
    return -y


def pair(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return y[1], y[0]


def program() -> None:
    y0, t = torch.ones(2, 3), torch.linspace(0.0, 1.0, 5)
    both = y0, y0

    assert_type(odeint(func, y0, t), Tensor)
    assert_type(odeint(pair, both, t, method="tsit5"), tuple[Tensor, Tensor])
    assert_type(odeint(func, y0, t, event_fn=func), tuple[Tensor, Tensor])
    assert_type(odeint_adjoint(func, {"y": y0}, t, adjoint_params=()), dict[str, Tensor])
    assert_type(odeint_event(pair, both, 0.0, event_fn=func), tuple[Tensor, tuple[Tensor, Tensor]])
    assert_type(odeint_dense(func, y0, 0.0, 1.0), Interpolant[Tensor])
    assert_type(odeint_dense(func, y0, 0.0, 1.0)(0.5), Tensor)

    solution = solve(func, y0, [0.0, 1.0], step_control="per_sample", dense=True, events=Event(func))
    assert_type(solution, Solution[Tensor])
    assert_type(solution.ys, Tensor)
    assert_type(solution.t, Tensor)
    assert_type(solution.y_last, Tensor)
    assert_type(solution.event_t, Tensor | None)
    assert_type(solution.event_y, Tensor | None)
    assert_type(solution.interpolant, Interpolant[Tensor] | None)
    assert_type(solution.status, str | list[str])
    assert_type(solution.regularizers, dict[str, Tensor])
    assert_type(solution.engine, str)
    assert_type(solution.explanation, dict[str, str])
    assert_type(solution.stats, Stats)
    assert_type(solution.stats.nfe, int)
    assert_type(solution.stats.num_accepted, int | Tensor)
    if solution.attempts is not None:
        assert_type(solution.attempts.error_ratio, Tensor)
    assert_type(solve(pair, both, t).ys, tuple[Tensor, Tensor])
    assert_type(solve(func, None, solution.times_ahead([2.0]), resume=solution), Solution[Tensor])
    assert_type(steady_state(pair, both).y, tuple[Tensor, Tensor])
    for step in steps(func, y0, 0.0):
        assert_type(step.y1, Tensor)
        assert_type(step.interpolant(0.5), Tensor)

    field = odenet_cuda.compile(func)
    assert_type(field, odenet_cuda.CompiledField)
    assert_type(field.explain(), str)
    block = ODEBlock(field, method="dopri5", max_step=0.1)
    assert_type(block.nfe_forward, int)
    assert_type(block.stats, Stats | None)
    assert_type(block.explain(), str)

    odeint(func, y0)  # type: ignore[call-overload]  # times are missing
    solve(func, y0, t, mehtod="rk4")  # type: ignore[call-arg]  # a slip
