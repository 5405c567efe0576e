"""Solves of a compiled field: the whole of one, forwards or backwards, in a call of its library."""

import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _C
from ..gradients.drift import add_drift, warn_of_drift
from ..integrate import Grid, Options, backward_grid
from ..ops import FIELDS, NUM_FIELDS
from ..problem import Problem, to_device
from ..ranges import marked
from ..solvers.adaptive import stop_table
from ..solvers.fixed import calls_on_grid
from ..solvers.trajectory import Trajectory
from ..tableau import ButcherTableau
from .emit import Target
from .marks import same_bits
from .plan import Plan
from .teams import card_of

_MOST_CHUNKS = 64  # partial sums of gradients, whatever the number of threads, so that a sum has one order
_MOST_BLOCKS = 1024  # the same on CUDA, as long as they fit in
_SUM_BYTES = 256 << 20
_MEETING = 1e-4  # seconds of work that a second thread is worth, where threads meet after every step
_LANES = 128  # of a multiprocessor
_SLOWER = 10  # than a core of the CPU is one of them
_SLICE = 0.05  # seconds a call may take, about: between two, Python sees an interrupt


def on_cuda(device: torch.device) -> bool:
    """Whether solves there run the CUDA text."""
    return device.type == "cuda"


class Engine:
    """One problem and the plan of its field."""

    def __init__(
        self,
        plan: Plan,
        problem: Problem,
        options: Options,
        args: Sequence[Any],
        grid: Grid | None,
        matmul: str = "float32",
        like: "Engine | None" = None,
    ):
        """like: another of the plan, whose libraries this one uses."""
        self.like = like
        self.wanted: list[tuple[ButcherTableau, Target]] = []  # what the solve and its backward pass need
        self.plan, self.problem, self.options, self.grid, self.args = plan, problem, options, grid, args
        self.tableau: ButcherTableau = options.tableau
        self.batch = 1 if plan.whole else problem.leaves[0].shape[0]
        self.state = sum(plan.leaf_sizes)
        self.constants = plan.constants(args)
        self.arguments = _rows([args[i].detach() for i in plan.batched], self.batch, problem.leaves[0])
        self.control = "grid" if not options.adaptive else "per_sample" if problem.per_sample else "joint"
        self.cuda = on_cuda(problem.device)
        self.card = card_of(problem.device) if self.cuda else None
        self.matmul, self.taped = matmul, False
        self._device = -1 if problem.device.type == "cpu" else problem.device.index or 0
        self.tape: Tensor | None = None
        self.sources: Any = None
        self.begun = 0.0  # when the solve began, for recheck.py; 0: it is none of the user's

    def unchanged(self) -> bool:
        """Whether func reads now what it read in the solve, as far as that is not known from the versions of tensors."""
        plan, args = self.plan, self.args
        if not plan.guards.hold(args):
            return False
        trained = self.sources.all[len(self.sources.all) - len(plan.wanted) :]
        if any([place(args) is not x for place, x in zip(plan.wanted, trained, strict=True)]):
            return False
        values = self.constants.values
        return all([same_bits(place(args).detach(), values[node]) for node, place in plan.places.items()])

    def target(self, solve: str) -> Target:
        if self.like is not None:
            return self.like.target(solve)
        one = self.batch == 1 and not self.problem.per_sample
        dtype = "float" if self.plan.dtype == torch.float32 else "double"
        if self.card is None:
            return Target(dtype, "one" if one else "pack", solve)
        taped = self.taped and solve in (self.control, "reverse")  # the tape is written and read by the same threads
        solves = (self.control, "reverse") if taped else (solve,)
        return Target(dtype, "one", solve, self.plan.team(solves, self.batch, self.card, self.matmul))

    def build(self, gradient: str, backward: Any) -> None:
        """Compiles what the solve and its backward pass need, side by side. Raises NoCompiler."""
        self.wanted = [(self.tableau, self.target(self.control))]
        if self.sources.wanted and gradient == "adjoint":
            self.wanted.append((backward.options.tableau, self.target(self.adjoint_control(backward.options))))
        elif self.sources.wanted:
            self.taped = True
            self.wanted = [(self.tableau, self.target(solve)) for solve in (self.control, "reverse")]
        self.plan.build(self.wanted)

    def adjoint_control(self, options: Options) -> str:
        return "adjoint_" + ("grid" if not options.adaptive else "per_sample" if self.problem.per_sample else "joint")

    # A call of a library

    def _new(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.problem.device)

    def _tiles(self, library: _C.Library) -> int:
        """How many there are, those of a last team that is not full included."""
        return -(-self.batch // (library.lanes * library.team)) * library.team

    def _chunks(self, library: _C.Library, joint: bool) -> tuple[int, int]:
        """How many sums of gradients there are, and how many tiles add to each. On CUDA each is the work of one block, and
        those of joint control all run at once."""
        tiles, team = self._tiles(library), library.team
        most = max(1, min(_MOST_BLOCKS, _SUM_BYTES // (8 * self.plan.sums_at[2] + 1))) if self.cuda else _MOST_CHUNKS
        if joint and self.cuda:
            most = min(most, library.resident(self._device))
        chunk = -(-tiles // (team * most)) * team
        return -(-tiles // chunk), chunk

    def _call(
        self,
        library: _C.Library,
        problem: Problem,
        options: Options,
        columns: int,
        chunk: int,
        joint: bool,
        grid: Grid | None,
        tensors: dict[str, Tensor],
    ) -> tuple[_C.SolveCall, list[Tensor]]:
        """A call with those tensors, and all that it points to, to be kept alive. columns: numbers of a sample in its state."""
        stops = (options.step_t, options.jump_t) if grid is None else ((), ())
        times, kinds = stop_table(problem, *stops)
        addresses = np.array(self.constants.addresses, np.int64).view(np.float64)
        parts: list[Any] = [problem.t, times, kinds, problem.rtol, problem.atol, addresses, () if grid is None else grid[0]]
        table = to_device(torch.from_numpy(np.concatenate([np.asarray(part, np.float64) for part in parts])), problem.device)
        places = [table.data_ptr() + 8 * place for place in accumulate(map(len, parts), initial=0)]
        tiles, leaves = self._tiles(library), len(self.plan.leaf_sizes) * (columns // self.state)
        kept = self._new(tiles * library.groups * library.tile_bytes, dtype=torch.uint8)
        sums = self._new(2 * tiles * 3 * leaves if joint else 0)
        grain = 1
        if joint:  # tiles meet after every step, which is short
            grain = max(1, int(_MEETING / (self._seconds(columns) * library.lanes * chunk)))
        call = _C.SolveCall(
            t=places[0],
            num_outputs=len(problem.t),
            stops=places[1],
            num_stops=len(times),
            rtol=places[3],
            atol=places[4],
            constants=places[5],
            nodes=places[6],
            num_nodes=0 if grid is None else len(grid[0]),
            rows=self.batch if problem.per_sample else 1,
            controller=options.control.constants(options.tableau.order, problem.direction),
            first_step=options.first_step or 0.0,
            arguments=self.arguments.data_ptr(),
            tiles=kept.data_ptr(),
            sums=sums.data_ptr(),
            batch=self.batch,
            chunk=chunk,
            grain=grain,
            **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        )
        return call, [table, kept, sums, *tensors.values()]

    def _run(self, library: _C.Library, call: _C.SolveCall, columns: int) -> None:
        cost = self._seconds(columns) * self._turns(library)
        begun, steps = 0, max(1, int(_SLICE / cost))
        while True:
            call.plan(begun, steps)
            start = time.perf_counter()
            if self._left(library, call) == 0:
                return
            begun += steps
            taken = time.perf_counter() - start
            steps = max(1, min(2 * steps, int(steps * _SLICE / taken)) if taken > 0 else 2 * steps)

    def _left(self, library: _C.Library, call: _C.SolveCall) -> int:
        """Goes on with the solve; how much of it is left."""
        if not self.cuda:
            return library.run(call)
        left = torch.zeros(2, dtype=torch.int64, device=self.problem.device)
        library.launch(call, self._device, left.data_ptr())
        return int(left[0])

    def _turns(self, library: _C.Library) -> float:
        """How many samples are solved one after the other, as it were; of a card, whose lanes are slower, about."""
        if self.card is None:
            return self.batch + library.lanes
        return _SLOWER * -(-self.batch // (_LANES * self.card.multiprocessors))

    def _seconds(self, columns: int) -> float:
        """About what a step of one sample takes."""
        return 1e-10 * (self.plan.operations + 20 * columns) * self.tableau.stages

    # Forwards

    def solve(self, keep: bool) -> Trajectory:
        """keep: the steps, for `reverse`."""
        self.y0 = _rows(self.problem.leaves, self.batch, self.problem.leaves[0])
        with marked("solve"):
            ys, state = self._solve(self.control, self.y0, self.problem, self.options, self.grid, keep)
        if self.begun:
            self.plan.watch.add(time.perf_counter() - self.begun)
        return Trajectory(ys=self._leaves(ys), last=self._leaves(self.y_last), state=state)

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
        grid: Grid | None,
        keep: bool = False,
        sums: tuple[Tensor, Tensor, int] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The outputs [len(t), batch, columns] and the solver state. sums: see `_sums`."""
        tableau: ButcherTableau = options.tableau
        library, joint = self.plan.load(tableau, self.target(solve)), solve.endswith("joint")
        batch, columns = y0.shape
        state = torch.zeros(NUM_FIELDS, batch if problem.per_sample else 1, dtype=torch.float64, device=y0.device)
        ys, self.y_last = y0.new_empty(len(problem.t), batch, columns), torch.empty_like(y0)
        chunk = sums[2] if sums is not None else self._chunks(library, True)[1] if joint and self.cuda else library.team
        tensors = {"y0": y0, "ys": ys, "y_last": self.y_last, "state": state}
        call, kept = self._call(library, problem, options, columns, chunk, joint, grid, tensors)
        if sums is not None:
            constants, arguments, _ = sums
            call.bind_gradients(0, 0, arguments.data_ptr(), constants.data_ptr(), constants.shape[1])
        if keep:
            tiles = self._tiles(library)
            counts = torch.zeros(tiles * library.groups, dtype=torch.int64, device=y0.device)
            key = (tableau, solve, batch)
            capacity = len(grid[0]) - 1 if grid is not None else self.plan.steps.get(key, 32)
            while True:
                self.tape = self._new(len(counts) * capacity * library.record_bytes, dtype=torch.uint8)
                call.bind_tape(self.tape.data_ptr(), counts.data_ptr(), capacity)
                self._run(library, call, columns)
                needed = int(counts.max())
                self.plan.steps[key] = needed + needed // 8 + 2
                if needed <= capacity:
                    break
                capacity = needed
            self.counts, self.capacity, self.steps = counts, capacity, needed
        else:
            self._run(library, call, columns)
        del kept
        return ys, (state if grid is None else None)

    # Backwards

    def _sums(self, library: _C.Library, joint: bool) -> tuple[Tensor, Tensor, int]:
        """Where gradients of constants and arguments are added up, and how many tiles add to one row of the former."""
        chunks, chunk = self._chunks(library, joint)
        return self.y0.new_zeros(chunks, self.plan.sums_at[2]), torch.zeros_like(self.arguments), chunk

    def _gradients(self, y: Tensor, constants: Tensor, arguments: Tensor) -> tuple[list[Tensor], list[Tensor], list[Any]]:
        parts = arguments.split(self.plan.argument_sizes, -1) if self.plan.batched else ()
        return self._leaves(y), list(parts), self.plan.gradients(constants.sum(0), self.constants)

    def reverse(self, grad_ys: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Any]]:
        """Gradients for y0, arguments and wanted constants: of the discrete solve, by its tape."""
        library = self.plan.load(self.tableau, self.target("reverse"))
        problem = self.problem
        grads = _rows(grad_ys, self.batch, self.y0, len(problem.t))
        grad_y0 = torch.empty_like(self.y0)
        constants, arguments, chunk = self._sums(library, False)
        tensors = {name: self.y0 for name in ("y0", "ys", "y_last", "state")}  # the first alone is read, and nothing written
        call, kept = self._call(library, problem, self.options, self.state, chunk, False, None, tensors)
        assert self.tape is not None
        call.bind_tape(self.tape.data_ptr(), self.counts.data_ptr(), self.capacity)
        call.bind_gradients(
            grads.data_ptr(), grad_y0.data_ptr(), arguments.data_ptr(), constants.data_ptr(), constants.shape[1]
        )
        self._run(library, call, 4 * self.state)
        del kept
        self.nfe_backward = self.steps * (self.tableau.stages - 1) + 1
        return self._gradients(grad_y0, constants, arguments)

    def adjoint(
        self, backward: Any, ys: Sequence[Tensor], grad_ys: Sequence[Tensor], stats: Any
    ) -> tuple[list[Tensor], list[Tensor], list[Any]]:
        """The same by the adjoint equation, solved from each output back to the one before. backward: gradients.Adjoint."""
        problem, options = self.problem, backward.options
        states = _rows(ys, self.batch, self.y0, len(problem.t))
        stats.drift = None
        grads = _rows(grad_ys, self.batch, self.y0, len(problem.t))
        solve = self.adjoint_control(options)
        library = self.plan.load(options.tableau, self.target(solve))
        constants, arguments, chunk = self._sums(library, solve.endswith("joint"))
        total, of_interval = torch.zeros_like(arguments), arguments
        a, n = grads[-1], self.state
        self.nfe_backward = 0
        for i in range(len(problem.t) - 1, 0, -1):
            failed = None if problem.missing is None else problem.missing[i]
            if failed is not None and bool(failed.all()):
                a = grads[i - 1]
                continue
            piece = replace(
                problem,
                t=[problem.t[i], problem.t[i - 1]],
                direction=-problem.direction,
                rtol=[*backward.rtol, *backward.rtol],
                atol=[*backward.atol, *backward.atol],
            )
            grid = backward_grid(options, problem.field, self._leaves(states[i]), piece.t)
            start = torch.cat([states[i], a], 1)
            if failed is not None and bool(failed.any()):
                ends, host = self._solve_some(~failed, solve, start, piece, options, (constants, total, chunk))
            else:
                ends, state = self._solve(solve, start, piece, options, grid, sums=(constants, of_interval, chunk))
                host = self.check(state, piece)
                total += of_interval
            found, stored = self._leaves(ends[-1][:, :n].contiguous()), self._leaves(states[i - 1])
            add_drift(stats, backward, problem, found, stored, failed if problem.per_sample else None)
            a = ends[-1][:, n:] + grads[i - 1]
            self.nfe_backward += evaluations(options, host, grid, piece)
        warn_of_drift(stats, options.adaptive)
        return self._gradients(a, constants, total)

    def _solve_some(
        self, rows: Tensor, solve: str, start: Tensor, piece: Problem, options: Options, sums: tuple[Tensor, Tensor, int]
    ) -> tuple[Tensor, Any]:
        """The same as `_solve` and `check` for some rows, where others failed; gradients of arguments are added to sums[1]."""
        some, (constants, total, chunk) = copy.copy(self), sums
        some.batch, some.arguments = int(rows.sum()), self.arguments[rows]
        some.problem = replace(self.problem, leaves=[leaf[rows] for leaf in self.problem.leaves])
        arguments = torch.zeros_like(some.arguments)
        found, state = some._solve(solve, start[rows], piece, options, None, sums=(constants, arguments, chunk))
        host = some.check(state, piece)
        total[rows] += arguments
        ys = start.new_zeros(len(found), *start.shape)
        ys[:, rows] = found
        return ys, host

    def check(self, state: Tensor | None, problem: Problem) -> Any:
        """The solver state as a NumPy array, None without error control. Raises SolverError where the backward solve failed."""
        from ..solution import Solution, Stats, raise_failure

        if state is None:
            return None
        host = state.cpu().numpy()
        last = self._leaves(self.y_last[:, : self.state])
        stats = Stats(0, problem.per_sample, state)
        solution = Solution(last, problem.t, stats, last, device=state.device, per_sample=problem.per_sample)
        raise_failure(host, solution, self.options.control.max_num_steps)
        return host


def evaluations(options: Options, host: Any, grid: Grid | None, problem: Problem) -> int:
    """Calls of func that such a solve takes. host: its state as a NumPy array."""
    tableau = options.tableau
    if host is not None:
        tried = host[FIELDS["num_accepted"]] + host[FIELDS["num_rejected"]]
        tries = int(tried[0] if len(tried) == 1 else tried.max())
        jumps = sum(min(problem.t[0], problem.t[-1]) < jump < max(problem.t[0], problem.t[-1]) for jump in options.jump_t)
        return tries * (tableau.stages - 1) + (1 if options.first_step else 2) + jumps
    assert grid is not None
    return calls_on_grid(tableau, grid[0], problem.t, problem.direction, options.perturb)


def _rows(leaves: Sequence[Tensor], batch: int, like: Tensor, ahead: int | None = None) -> Tensor:
    """Leaves [ahead, *leaf.shape] as one [ahead, batch, columns], of the type of `like`."""
    shape = [batch] if ahead is None else [ahead, batch]
    if not leaves:
        return like.new_zeros(*shape, 0)
    parts = [leaf.detach().reshape(*shape, -1) for leaf in leaves]
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, -1)
