"""The way back of a compiled solve: along its tape, or by the adjoint equation."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..gradients.adjoint import interval_before, slope_product
from ..gradients.drift import add_drift, warn_of_drift
from ..gradients.failed import stand_ins
from ..gradients.of_times import TimeGradient
from ..integrate import Options, backward_grid
from ..problem import OwnTimes, Problem
from ..step_control import succeeded
from .engine import Engine, as_rows, calls_of_step, evaluations
from .ways import Way

Gradients = tuple[list[Tensor], list[Tensor], list[Any], Tensor | None]  # for y0's leaves, arguments, wanted constants and t


def _sums(engine: Engine, way: Way) -> tuple[Tensor, Tensor]:
    """Where gradients of constants and arguments are added up."""
    plan, arguments = engine.plan, engine.arguments
    constants = engine.y0.new_zeros((way.chunks, plan.sums_at[1]))
    return constants, torch.zeros_like(arguments) if plan.batched else arguments


def _gradients(engine: Engine, y: Tensor, constants: Tensor, arguments: Tensor, t: Tensor | None = None) -> Gradients:
    plan = engine.plan
    parts = arguments.split(plan.argument_sizes, -1) if plan.batched else ()
    return engine.leaves(y), list(parts), plan.gradients(constants, engine.constants), t


def reverse(engine: Engine, grad_ys: list[Tensor]) -> Gradients:
    """Of the discrete solve, by its tape."""
    problem, y0 = engine.problem, engine.y0
    way = engine.kind.way(engine.plan, "reverse")
    grads = as_rows(grad_ys, engine.batch, y0, len(problem.t))
    grad_y0 = grads[0].clone()  # of samples that took no step
    constants, arguments = _sums(engine, way)
    place = y0.data_ptr()  # the first alone is read, and nothing written
    call, memory = way.begin(problem, None, engine.constants, engine.arguments, place, place, place, place)
    assert engine.tape is not None
    call.bind_tape(engine.tape.address, engine.counts.data_ptr(), engine.capacity)
    call.bind_gradients(grads.data_ptr(), grad_y0.data_ptr(), arguments.data_ptr(), constants.data_ptr(), constants.shape[1])
    way.run(call)
    way.end(memory)
    engine.nfe_backward = engine.steps * calls_of_step(engine.kind.tableau) + 1
    return _gradients(engine, grad_y0, constants, arguments)


def adjoint(engine: Engine, backward: Any, ys: Sequence[Tensor], grad_ys: Sequence[Tensor], stats: Any) -> Gradients:
    """The same by the adjoint equation, solved from each output back to the one before. backward: gradients.Adjoint."""
    problem, options = engine.problem, backward.options
    states = as_rows(ys, engine.batch, engine.y0, len(problem.t))
    stats.drift, stats.looks = None, []
    grads = as_rows(grad_ys, engine.batch, engine.y0, len(problem.t))
    way = engine.kind.way(engine.plan, engine.kind.adjoint_control(options))
    constants, arguments = _sums(engine, way)
    total, of_interval = arguments.clone(), arguments
    a, n = grads[-1], engine.state
    engine.nfe_backward = 0
    for i in range(len(problem.t) - 1, 0, -1):
        failed = None if problem.missing is None else problem.missing[i]
        if failed is not None and bool(failed.all()):
            a = grads[i - 1]
            continue
        piece = replace(
            problem,
            t=interval_before(problem, i),
            rtol=[*backward.rtol, *backward.rtol],
            atol=[*backward.atol, *backward.atol],
        )
        grid = backward_grid(options, problem.field, engine.leaves(states[i]), piece.t)
        start = torch.cat([states[i], a], 1)
        if failed is not None and bool(failed.any()):
            if piece.own:
                piece.t = OwnTimes(piece.t.table[~failed.cpu().numpy()])
            ends, host = _solve_some(engine, ~failed, way, start, piece, (constants, total))
        else:
            ends, state, _ = engine.run(way, start, piece, grid, sums=(constants, of_interval))
            host = check(engine, state, piece)
            total += of_interval
        found, stored = engine.leaves(ends[-1][:, :n].contiguous()), engine.leaves(states[i - 1])
        add_drift(stats, (backward.rtol, backward.atol), problem.rows, found, stored, failed if problem.per_sample else None)
        a = ends[-1][:, n:] + grads[i - 1]
        engine.nfe_backward += evaluations(options, host, grid, piece)
    warn_of_drift(stats, None if options.adaptive else min(backward.rtol), False)
    return _gradients(engine, a, constants, total, _of_times(engine, options, ys, grad_ys, a - grads[0]))


def _of_times(engine: Engine, options: Options, ys: Sequence[Tensor], grad_ys: Sequence[Tensor], a: Tensor) -> Tensor | None:
    """dL/dt_i = dL/dy_i . f(t_i, y_i), and at t_0, where the solve begins, -a . f. f is func itself. None if none is wanted."""
    if not engine.sources.t:
        return None
    problem, found = engine.problem, TimeGradient(engine.problem)
    field: Any = problem.field.again()  # type: ignore[attr-defined]
    for i in range(len(problem.t) - 1, -1, -1):
        failed, others = stand_ins(problem, i)
        if failed is not None and others is None:
            continue
        y = [out[i] if others is None else out[i][others] for out in ys]
        g = [grad[i] for grad in grad_ys] if i else [-leaf for leaf in engine.leaves(a)]
        found.add(i, slope_product(field, problem, options, i, y, g, others))
    engine.nfe_backward += field.nfe
    return found.total


def _solve_some(
    engine: Engine, rows: Tensor, way: Way, start: Tensor, piece: Problem, sums: tuple[Tensor, Tensor]
) -> tuple[Tensor, Any]:
    """The same as `Engine.run` and `check` for some rows, where others failed; gradients of arguments are added to sums[1]."""
    some, (constants, total) = copy.copy(engine), sums
    some.batch, some.arguments = int(rows.sum()), engine.arguments[rows]
    some.problem = replace(engine.problem, leaves=[leaf[rows] for leaf in engine.problem.leaves])
    arguments = torch.zeros_like(some.arguments)
    found, state, _ = some.run(way.of(engine.plan, some.batch), start[rows], piece, None, sums=(constants, arguments))
    host = check(some, state, piece)
    total[rows] += arguments
    ys = start.new_zeros(len(found), *start.shape)
    ys[:, rows] = found
    return ys, host


def check(engine: Engine, state: Tensor | None, problem: Problem) -> Any:
    """The solver state as a NumPy array, None without error control. Raises SolverError where the backward solve failed."""
    from ..solution import Solution, Stats, raise_failure

    if state is None:
        return None
    host = state.cpu().numpy()
    if succeeded(host):
        return host
    last = engine.leaves(engine.y_last[:, : engine.state])
    stats = Stats(0, problem.per_sample, state)
    solution = Solution(last, problem.t, stats, last, device=state.device, per_sample=problem.per_sample)
    raise_failure(host, solution, engine.options.control.max_num_steps)
    return host
