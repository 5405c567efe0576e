"""Solves of a compiled field: the whole of one, forwards or backwards, in a call of its library."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _C
from ..integrate import Grid, Options, fixed_grid
from ..ops import FIELDS, NUM_FIELDS
from ..problem import Problem
from ..solvers.adaptive import stop_table
from ..solvers.fixed import outputs_of_steps
from ..solvers.trajectory import Trajectory
from ..step_control import StepControl
from ..tableau import ButcherTableau
from .emit import Target
from .plan import Plan

_MOST_CHUNKS = 64  # partial sums of gradients, whatever the number of threads, so that a sum has one order
_MEETING = 1e-4  # seconds of work that a second thread is worth, where threads meet after every step
_SLICE = 0.05  # seconds a call may take, about: between two, Python sees an interrupt


class Engine:
    """One problem and the plan of its field. values: see `Plan.constants`."""

    def __init__(self, plan: Plan, problem: Problem, options: Options, args: Sequence[Any], grid: Grid | None):
        self.plan, self.problem, self.options, self.grid = plan, problem, options, grid
        self.tableau: ButcherTableau = options.tableau
        self.batch = 1 if plan.whole else problem.leaves[0].shape[0]
        self.state = sum(plan.leaf_sizes)
        self.constants = plan.constants(args)
        self.arguments = _rows([args[i].detach() for i in plan.batched], self.batch, problem.leaves[0])
        self.control = "grid" if not options.adaptive else "per_sample" if problem.per_sample else "joint"
        self.tape: Tensor | None = None
        self.sources: Any = None

    def target(self, solve: str) -> Target:
        one = self.batch == 1 and not self.problem.per_sample
        return Target("float" if self.plan.dtype == torch.float32 else "double", "one" if one else "pack", solve)

    def build(self, gradient: str, backward: Any) -> None:
        """Compiles what the solve and its backward pass need, side by side. Raises NoCompiler."""
        wanted = [(self.tableau, self.target(self.control))]
        if self.sources.wanted and gradient == "adjoint":
            wanted.append((backward.options.tableau, self.target(self.adjoint_control(backward.options))))
        elif self.sources.wanted:
            wanted.append((self.tableau, self.target("reverse")))
        self.plan.build(wanted)

    def adjoint_control(self, options: Options) -> str:
        return "adjoint_" + ("grid" if not options.adaptive else "per_sample" if self.problem.per_sample else "joint")

    # Forwards

    def solve(self, keep: bool) -> Trajectory:
        """keep: the steps, for `reverse`."""
        self.y0 = _rows(self.problem.leaves, self.batch, self.problem.leaves[0])
        solved = self._solve(self.control, self.y0, self.problem, self.options, self.tableau, self.grid, keep)
        self.ys, state = solved
        return Trajectory(ys=self._leaves(self.ys), last=self._leaves(self.y_last), state=state)

    def _leaves(self, rows: Tensor) -> list[Tensor]:
        """[..., batch, state] as leaves [..., *leaf.shape]."""
        ahead = rows.shape[:-2]
        leaves = self.problem.leaves
        if len(leaves) == 1:
            return [rows.view([*ahead, *leaves[0].shape])]
        parts = rows.split(self.plan.leaf_sizes, -1)
        return [part.reshape([*ahead, *leaf.shape]) for part, leaf in zip(parts, leaves, strict=True)]

    def _solve(
        self,
        solve: str,
        y0: Tensor,
        problem: Problem,
        options: Options,
        tableau: ButcherTableau,
        grid: Grid | None,
        keep: bool = False,
        gradients: tuple[Tensor, Tensor, int] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The outputs [len(t), batch, columns] and the solver state."""
        target = self.target(solve)
        library = self.plan.load(tableau, target)
        batch, columns = y0.shape
        rows = batch if problem.per_sample else 1
        times, kinds = stop_table(problem, options.step_t, options.jump_t)
        stops = np.array([times, kinds], np.float64)
        t = np.array(problem.t)
        state = torch.zeros(NUM_FIELDS, rows, dtype=torch.float64)
        ys, self.y_last = y0.new_empty(len(t), batch, columns), torch.empty_like(y0)
        tiles = -(-batch // library.lanes)
        leaves = len(self.plan.leaf_sizes) * (columns // self.state)
        kept = torch.empty(tiles * library.tile_bytes, dtype=torch.uint8)
        sums = np.zeros(tiles * 3 * leaves)
        control: StepControl = options.control
        call = _C.Call(
            y0=y0.data_ptr(),
            arguments=self.arguments.data_ptr(),
            constants=self.constants.addresses,
            rtol=list(problem.rtol),
            atol=list(problem.atol),
            state=state.data_ptr(),
            stops=stops.ctypes.data,
            num_stops=len(times),
            t=t.ctypes.data,
            num_outputs=len(t),
            rows=rows,
            controller=control.constants(tableau.order, problem.direction),
            first_step=options.first_step or 0.0,
            ys=ys.data_ptr(),
            y_last=self.y_last.data_ptr(),
            batch=batch,
        )
        grain = 1
        if solve.endswith("joint"):  # tiles meet after every step, which is short
            of_tile = self._seconds(columns) * library.lanes * (gradients[2] if gradients is not None else 1)
            grain = max(1, int(_MEETING / of_tile))
        call.bind_tiles(kept.data_ptr(), sums.ctypes.data, grain)
        if grid is not None:
            nodes = np.array(grid[0])
            call.bind_nodes(nodes.ctypes.data, len(nodes))
        if gradients is not None:
            constants, arguments, chunk = gradients
            call.bind_gradients(0, 0, arguments.data_ptr(), constants.data_ptr(), constants.shape[1], chunk)
        if keep:
            counts = np.zeros(tiles, np.int64)
            key = (tableau, solve, batch)
            capacity = len(grid[0]) - 1 if grid is not None else self.plan.steps.get(key, 32)
            while True:
                self.tape = torch.empty(tiles * capacity * library.record_bytes, dtype=torch.uint8)
                call.bind_tape(self.tape.data_ptr(), counts.ctypes.data, capacity)
                self._run(library, call, batch, columns)
                needed = int(counts.max())
                self.plan.steps[key] = needed + needed // 8 + 2
                if needed <= capacity:
                    break
                capacity = needed
            self.counts, self.capacity = counts, capacity
        else:
            self._run(library, call, batch, columns)
        return ys, (state if grid is None else None)

    def _run(self, library: _C.Library, call: _C.Call, batch: int, columns: int) -> None:
        cost = self._seconds(columns) * (batch + library.lanes)
        begun, steps = 0, max(1, int(_SLICE / cost))
        while True:
            call.plan(begun, steps)
            start = time.perf_counter()
            if library.run(call) == 0:
                return
            begun += steps
            taken = time.perf_counter() - start
            steps = max(1, min(2 * steps, int(steps * _SLICE / taken)) if taken > 0 else 2 * steps)

    def _seconds(self, columns: int) -> float:
        """About what a step of one sample takes."""
        return 1e-10 * (self.plan.operations + 20 * columns) * self.tableau.stages

    # Backwards

    def _chunks(self, lanes: int) -> tuple[int, int]:
        """How many chunks, and how many tiles in each."""
        tiles = -(-self.batch // lanes)
        chunk = -(-tiles // _MOST_CHUNKS)
        return -(-tiles // chunk), chunk

    def _sums(self, lanes: int) -> tuple[Tensor, Tensor, int]:
        """Where gradients of constants and arguments are added up, and how many tiles add to one row of the former."""
        chunks, chunk = self._chunks(lanes)
        size = self.plan.sums_at[2]
        return self.y0.new_zeros(chunks, size), torch.zeros_like(self.arguments), chunk

    def _gradients(self, y: Tensor, constants: Tensor, arguments: Tensor) -> tuple[list[Tensor], list[Tensor], list[Any]]:
        parts = arguments.split(self.plan.argument_sizes, -1) if self.plan.batched else ()
        return self._leaves(y), list(parts), self.plan.gradients(constants.sum(0), self.constants)

    def reverse(self, grad_ys: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Any]]:
        """Gradients for y0, arguments and wanted constants: of the discrete solve, by its tape."""
        library = self.plan.load(self.tableau, self.target("reverse"))
        problem = self.problem
        grads = _rows(grad_ys, self.batch, self.y0, len(problem.t))
        grad_y0 = torch.empty_like(self.y0)
        constants, arguments, chunk = self._sums(library.lanes)
        t = np.array(problem.t)
        tiles = -(-self.batch // library.lanes)
        kept = torch.empty(tiles * library.tile_bytes, dtype=torch.uint8)
        nothing = np.zeros((2, 1))
        call = _C.Call(
            y0=self.y0.data_ptr(),
            arguments=self.arguments.data_ptr(),
            constants=self.constants.addresses,
            rtol=[],
            atol=[],
            state=0,
            stops=nothing.ctypes.data,
            num_stops=1,
            t=t.ctypes.data,
            num_outputs=len(t),
            rows=1,
            controller=self.options.control.constants(self.tableau.order, problem.direction),
            first_step=0.0,
            ys=0,
            y_last=0,
            batch=self.batch,
        )
        assert self.tape is not None
        call.bind_tiles(kept.data_ptr(), 0, 1)
        call.bind_tape(self.tape.data_ptr(), self.counts.ctypes.data, self.capacity)
        size = constants.shape[1]
        call.bind_gradients(grads.data_ptr(), grad_y0.data_ptr(), arguments.data_ptr(), constants.data_ptr(), size, chunk)
        self._run(library, call, self.batch, 4 * self.state)
        self.nfe_backward = int(self.counts.max()) * (self.tableau.stages - 1) + 1
        return self._gradients(grad_y0, constants, arguments)

    def adjoint(self, backward: Any, grad_ys: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Any]]:
        """The same by the adjoint equation, solved from each output back to the one before. backward: gradients.Adjoint."""
        problem, options = self.problem, backward.options
        grads = _rows(grad_ys, self.batch, self.y0, len(problem.t))
        solve = self.adjoint_control(options)
        constants, arguments, chunk = self._sums(self.plan.load(options.tableau, self.target(solve)).lanes)
        total, of_interval = torch.zeros_like(arguments), arguments
        a, n = grads[-1], self.state
        self.nfe_backward = 0
        for i in range(len(problem.t) - 1, 0, -1):
            piece = replace(
                problem,
                t=[problem.t[i], problem.t[i - 1]],
                direction=-problem.direction,
                rtol=[*backward.rtol, *backward.rtol],
                atol=[*backward.atol, *backward.atol],
            )
            grid = None if options.adaptive else fixed_grid(options, piece.t)
            start = torch.cat([self.ys[i], a], 1)
            ys, state = self._solve(
                solve, start, piece, options, options.tableau, grid, gradients=(constants, of_interval, chunk)
            )
            self.check(state, piece)
            total += of_interval
            a = ys[-1][:, n:] + grads[i - 1]
            self.nfe_backward += evaluations(options, state, grid, piece)
        return self._gradients(a, constants, total)

    def check(self, state: Tensor | None, problem: Problem) -> None:
        """Raises SolverError where the backward solve failed."""
        from ..solution import Solution, Stats, failure

        if state is None:
            return
        counts = state[FIELDS["num_accepted"]], state[FIELDS["num_rejected"]]
        last = self._leaves(self.y_last[:, : self.state])
        t = torch.tensor(problem.t, dtype=torch.float64)
        solution = Solution(last, t, Stats(0, *counts, problem.per_sample), last, None, problem.per_sample)
        error = failure(state.numpy(), solution, self.options.control.max_num_steps)
        if error is not None:
            raise error


def evaluations(options: Options, state: Tensor | None, grid: Grid | None, problem: Problem) -> int:
    """Calls of func that such a solve takes."""
    tableau = options.tableau
    if state is not None:
        host = state.numpy()
        tried = host[FIELDS["num_accepted"]] + host[FIELDS["num_rejected"]]
        tries = int(tried[0] if len(tried) == 1 else tried.max())
        jumps = sum(min(problem.t[0], problem.t[-1]) < jump < max(problem.t[0], problem.t[-1]) for jump in options.jump_t)
        return tries * (tableau.stages - 1) + (1 if options.first_step else 2) + jumps
    assert grid is not None
    count, points, last = 0, len(tableau.rows), len(grid[0]) - 2
    for step, outputs in enumerate(outputs_of_steps(grid[0], problem.t, problem.direction)):
        inside = any(problem.t[index] != grid[0][step + 1] for index, _, _ in outputs)
        count += step == 0 or not tableau.fsal
        count += min(points, tableau.stages) - 1
        count += points < tableau.stages and (inside or step < last)
    return count


def _rows(leaves: Sequence[Tensor], batch: int, like: Tensor, ahead: int | None = None) -> Tensor:
    """Leaves [ahead, *leaf.shape] as one [ahead, batch, columns], of the type of `like`."""
    shape = [batch] if ahead is None else [ahead, batch]
    if not leaves:
        return like.new_zeros(*shape, 0)
    parts = [leaf.detach().reshape(*shape, -1) for leaf in leaves]
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, -1)
