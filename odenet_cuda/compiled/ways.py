"""What follows from the kind of a solve, made once and kept with the plan: libraries, and of a call all but its numbers.

Nothing of the state or of func is in here: a `Kind` belongs to one plan, which the guards keep true, and is looked up by all
that it was made from. What is kept besides is made anew where it no longer fits, so that threads can share it.
"""

import time
from array import array
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _C
from ..integrate import Grid, Options
from ..problem import Problem, to_device
from ..solvers.start import stop_table
from ..tableau import Method, StepFunction
from .emit import Target
from .plan import Plan
from .teams import Card

_MOST_CHUNKS = 64  # partial sums of gradients, whatever the number of threads, so that a sum has one order
_FEW_CHUNKS, _LONG = 16, 8  # and no fewer than so many, unless each has so many tiles
_MOST_BLOCKS = 1024  # the same on CUDA, as long as they fit in
_SUM_BYTES = 256 << 20
_MEETING = 1e-4  # seconds of work that a second thread is worth, where threads meet after every step
_LANES = 128  # of a multiprocessor
_SLOWER = 10  # than a core of the CPU is one of them
_SLICE = 0.05  # seconds a call may take, about: between two, Python sees an interrupt
_MOST_KEPT = 1 << 20  # bytes of a way's memory on the CPU that the next solve may use again


class Kind:
    """A kind of solve of a plan, which it does not keep. gradient: "" where none is wanted; backward: the options of the
    adjoint's solve, or None.

    wanted: the methods and targets of the libraries that it needs; trusted: the set of `Plan.trusted` in which they all were.
    like: another of the plan, whose targets this one has: it solves other samples by the same libraries.
    """

    def __init__(
        self,
        plan: Plan,
        options: Options,
        batch: int,
        per_sample: bool,
        card: Card | None,
        matmul: str = "float32",
        gradient: str = "",
        backward: Options | None = None,
        like: "Kind | None" = None,
    ):
        self.options, self.batch, self.per_sample = options, batch, per_sample
        self.card, self.matmul, self.backward = card, matmul, backward
        # A sample alone has a step of its own whatever the control.
        self._apart: bool = like._apart if like is not None else per_sample or (batch == 1 and card is None)
        self.control = _control(options, self._apart)
        self.tableau: Method = options.tableau
        self.taped = gradient not in ("", "adjoint")
        self.wanted: list[tuple[Method, Target]] = []
        self._targets: dict[str, Target] = {}
        if like is not None:
            self._targets = like._targets
        else:
            solves = [(options, self.control)]
            if backward is not None:
                solves.append((backward, self.adjoint_control(backward)))
            elif gradient:
                solves.append((options, "reverse"))
            self._targets = {solve: self._target(plan, solve) for _, solve in solves}
            self.wanted = [(x.tableau, self._targets[solve]) for x, solve in solves]
        self.keys = [(id(tableau), target) for tableau, target in self.wanted]
        self.trusted: Any = None
        self.no_arguments = torch.zeros(batch, 0, dtype=plan.dtype, device=plan.device)
        self._ways: dict[str, Way] = {}

    def adjoint_control(self, options: Options) -> str:
        return "adjoint_" + _control(options, self._apart)

    def _target(self, plan: Plan, solve: str) -> Target:
        dtype = "float" if plan.dtype == torch.float32 else "double"
        if self.card is None:
            return Target(dtype, "one" if self.batch == 1 else "pack", solve)
        taped = self.taped and solve in (self.control, "reverse")  # the tape is written and read by the same threads
        solves = (self.control, "reverse") if taped else (solve,)
        implicit = solve in (self.control, "reverse") and isinstance(self.tableau, StepFunction)
        return Target(dtype, "one", solve, plan.team(solves, self.batch, self.card, self.matmul, implicit))

    def way(self, plan: Plan, solve: str) -> "Way":
        """One of its solves: what control is, "reverse", or what adjoint_control gives. Raises NoCompiler."""
        found = self._ways.get(solve)
        if found is None:
            options = self.options if self.backward is None or not solve.startswith("adjoint") else self.backward
            library = plan.load(options.tableau, self._targets[solve])
            before = self.way(plan, self.control) if solve == "reverse" else None
            found = Way(plan, solve, library, options, self.batch, self.per_sample, self.card, self.taped, before)
            self._ways[solve] = found
        return found


def _control(options: Options, per_sample: bool) -> str:
    return "grid" if not options.adaptive else "per_sample" if per_sample else "joint"


class Way:
    """One of a kind's solves: by a method, forwards or backwards, of so many samples.

    columns: numbers of a sample in its state. chunk: how many tiles add to one sum of gradients; chunks: how many sums there
    are. On CUDA each is the work of one block, and those of joint control all run at once. places: where tiles are kept; under
    per-sample control a chunk of samples goes through one of them, or on CUDA through a team of them.
    taped: a tape is kept. before: of "reverse", the solve whose tape it reads.
    """

    def __init__(
        self,
        plan: Plan,
        solve: str,
        library: _C.Library,
        options: Options,
        batch: int,
        per_sample: bool,
        card: Card | None,
        taped: bool = False,
        before: "Way | None" = None,
    ):
        self.solve, self.library, self.options, self.batch, self.card = solve, library, options, batch, card
        self.rows, self._per_sample = batch if solve.endswith("per_sample") else 1, per_sample
        self.longest = 32  # how many steps the last solve took, and some more
        self.device, self.on_card = plan.device, card is not None
        state = plan.state
        self.columns = 2 * state if solve.startswith("adjoint") else state
        self._controller = options.tableau.order, options.control
        joint = solve.endswith("joint")
        # Those of a last team that is not full included.
        tiles = -(-batch // (library.lanes * library.team)) * library.team
        backwards = solve not in ("grid", "per_sample", "joint")
        self.places = tiles
        if solve.endswith("per_sample"):
            self.chunks, self.chunk = self._shared(tiles, plan.sums_at[1], backwards or taped)
            self.places = self.chunks * library.team
        elif before is not None and before.solve == "per_sample":
            self.chunks, self.chunk, self.places = before.chunks, library.team, before.places
        elif backwards or (joint and self.on_card):
            self.chunks, self.chunk = self._divided(tiles, plan.sums_at[1], joint)
        else:
            self.chunks, self.chunk = 0, library.team
        self.records = self.places * library.groups
        seconds = 1e-10 * (plan.operations + 20 * self.columns) * options.tableau.stages  # of a step of one sample, about
        self.grain = 1
        if joint:  # tiles meet after every step, which is short
            self.grain = max(1, int(_MEETING / (seconds * library.lanes * self.chunk)))
        seconds = 1e-10 * (plan.operations + 20 * (4 * state if solve == "reverse" else self.columns)) * options.tableau.stages
        # How many samples are solved one after the other, as it were; of a card, whose lanes are slower, about.
        samples = min(self.places * library.lanes, batch)
        turns = samples + library.lanes if card is None else _SLOWER * -(-batch // (_LANES * card.multiprocessors))
        self._steps = max(1, int(_SLICE / (seconds * turns)))
        leaves = len(plan.leaf_sizes) * (self.columns // state)
        self._sums_at = -(-self.records * library.tile_bytes // 64) * 64
        self._bytes = self._sums_at + (8 * 2 * tiles * 3 * leaves if joint else 0)
        self._free: list[Tensor] = []  # of so many bytes
        self._numbers: tuple[Any, Any, _C.SolveCall] | None = None

    @property
    def _index(self) -> int:
        return -1 if self.device.type == "cpu" else self.device.index or 0

    def _divided(self, tiles: int, size: int, joint: bool) -> tuple[int, int]:
        team = self.library.team
        most = max(1, min(_MOST_BLOCKS, _SUM_BYTES // (8 * size + 1))) if self.on_card else _MOST_CHUNKS
        if joint and self.on_card:
            most = min(most, self.library.resident(self._index))
        chunk = -(-tiles // (team * most)) * team
        return -(-tiles // chunk), chunk

    def _shared(self, tiles: int, size: int, summed: bool) -> tuple[int, int]:
        """Chunks of samples whose lanes take the next when one ends. summed: they add to sums, or their steps are recorded for
        that, so that the number of threads decides nothing."""
        if self.on_card:  # as many blocks as run at once
            most = min(_MOST_BLOCKS, _SUM_BYTES // (8 * size + 1)) if summed else self.batch
            chunk = max(self.library.team, -(-self.batch // max(1, min(most, self.library.resident(self._index)))))
            return -(-self.batch // chunk), chunk
        if summed:
            chunk = max(-(-tiles // _MOST_CHUNKS), min(_LONG, tiles // _FEW_CHUNKS), 1)
        else:
            threads = torch.get_num_threads()
            chunk = max(1, tiles // (4 * threads) if threads > 1 else tiles)
        return -(-tiles // chunk), chunk

    def of(self, plan: Plan, batch: int) -> "Way":
        """The same for so many samples."""
        return Way(plan, self.solve, self.library, self.options, batch, self._per_sample, self.card)

    # A call

    def _call(self, problem: Problem, grid: Grid | None, stream: int) -> tuple[_C.SolveCall, Any]:
        """A call for the times and tolerances of this problem, and what it points to, to be kept alive."""
        nodes: Sequence[float] = () if grid is None else grid[0]
        # As bytes: there are two zeros.
        t: Any = problem.t.table if problem.own else array("d", problem.t)
        numbers = problem.own, t.tobytes(), array("d", nodes).tobytes(), [*problem.rtol, *problem.atol], stream
        last = self._numbers
        if last is not None and last[0] == numbers:
            return last[2], last[1]
        stops = (self.options.step_t, self.options.jump_t) if grid is None else ((), ())
        ends = stop_table(problem, *stops)
        parts = [np.ravel(x) for x in (t, ends, problem.rtol, problem.atol, nodes)]
        filled = torch.from_numpy(np.concatenate(parts, dtype=np.float64) + 0.0)  # the stepper's zeros have no sign
        table = to_device(filled, self.device)
        places = [table.data_ptr() + 8 * place for place in accumulate(map(len, parts), initial=0)]
        order, control = self._controller
        call = _C.SolveCall(
            t=places[0],
            num_outputs=len(problem.t),
            stops=places[1],
            num_stops=ends.shape[-1],
            own=problem.own,
            rtol=places[2],
            atol=places[3],
            nodes=places[4],
            num_nodes=len(nodes),
            rows=self.rows,
            controller=control.constants(order),
            first_step=self.options.first_step or 0.0,
            batch=self.batch,
            chunk=self.chunk,
            places=self.places,
            grain=self.grain,
        )
        self._numbers = numbers, table, call
        return call, table

    def tensor(self, numbers: Sequence[Any], dtype: torch.dtype) -> Tensor:
        return to_device(torch.tensor(numbers, dtype=dtype, device="cpu"), self.device)

    def begin(
        self, problem: Problem, grid: Grid | None, constants: Any, arguments: Tensor, y0: int, ys: int, last: int, state: int
    ) -> tuple[_C.SolveCall, Any]:
        """The call of a solve, and what it points to. Numbers are addresses."""
        # What another stream of the device has written may not be there yet.
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.on_card and self.device.type == "cuda" else 0
        call, numbers = self._call(problem, grid, stream)
        table = constants.table(self.tensor, stream)
        memory = self._memory()
        tiles = memory.data_ptr()
        call = call.on(y0, ys, last, state, arguments.data_ptr(), table.data_ptr(), tiles, tiles + self._sums_at)
        return call, (memory, numbers, table, arguments)

    def _memory(self) -> Tensor:
        with suppress(IndexError):  # another thread may be faster
            return self._free.pop()
        return torch.empty(self._bytes, dtype=torch.uint8, device=self.device)

    def run(self, call: _C.SolveCall) -> None:
        """To the end."""
        begun, steps = 0, self._steps
        while True:
            call.plan(begun, steps)
            start = time.perf_counter()
            if self._left(call) == 0:
                break
            begun += steps
            taken = time.perf_counter() - start
            steps = max(1, min(2 * steps, int(steps * _SLICE / taken)) if taken > 0 else 2 * steps)

    def end(self, kept: Any) -> None:
        """The memory of a call that will not run again may be that of another."""
        if not self.on_card and self._bytes <= _MOST_KEPT and not self._free:
            self._free.append(kept[0])

    def _left(self, call: _C.SolveCall) -> int:
        """Goes on with the solve; how much of it is left."""
        if not self.on_card:
            return self.library.run(call)
        left = torch.zeros(2, dtype=torch.int64, device=self.device)
        self.library.launch(call, self._index, left.data_ptr())
        return int(left[0])
