"""Solves of a compiled field: the whole of one, forwards, in a call of its library. The way back: see reverse.py."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..integrate import Grid, Options
from ..ops import FIELDS, NUM_FIELDS
from ..problem import Problem
from ..ranges import marked
from ..rosenbrock import rosenbrock_of
from ..solvers.fixed import calls_on_grid
from ..solvers.trajectory import Trajectory
from ..step_control import most_tried
from ..tableau import Method
from .marks import Unreadable, same_bits
from .plan import Plan
from .tape import Tape
from .teams import card_of
from .ways import Kind, Way

_MOST_KINDS = 32  # of solves, kept with a plan


_PLAIN = {str, int, float, bool, type(None)}


def by_value(options: Options | None) -> Any:
    """Something equal for options that are made anew for every solve and say the same; else what is like itself alone."""
    if options is None:
        return None
    own = [value for name, value in vars(options).items() if name not in ("tableau", "backwards")]  # which follow from the rest
    values = [*vars(options.control).values(), *own, *options.step_t, *options.jump_t]
    plain = all([type(x) in _PLAIN for x in values if type(x) is not tuple and x is not options.control])
    return options if plain and type(options.control.controller) is str else object()


def on_cuda(device: torch.device) -> bool:
    """Whether solves there run the CUDA text."""
    return device.type == "cuda"


class Engine:
    """One problem and the plan of its field.

    wanted: whether a gradient is; gradient, backward: how, and the adjoint's options. like: another of the plan, whose
    libraries this one uses.
    """

    sources: Any = None
    backward: Any = None  # gradients.Adjoint, where that is how
    tape: Tape | None = None
    kind: Kind
    nfe_backward = 0
    called = 0  # of the calls of func that this solve takes the place of, those that were made
    begun = 0.0  # when the solve began, for recheck.py; 0: it is none of the user's

    def __init__(
        self,
        plan: Plan,
        problem: Problem,
        options: Options,
        args: Sequence[Any],
        grid: Grid | None,
        matmul: str = "float32",
        gradient: str = "",
        backward: Options | None = None,
        like: "Engine | None" = None,
    ):
        self.plan, self.options, self.grid, self.matmul = plan, options, grid, matmul
        self.batch = 1 if plan.whole else problem.leaves[0].shape[0]
        self.state = plan.state
        self.cuda = on_cuda(plan.device)
        self.wanted = bool(gradient)
        self.kind = self._kind(problem.per_sample, gradient, backward, None if like is None else like.kind)
        self._take(problem, args)

    def _take(self, problem: Problem, args: Sequence[Any]) -> None:
        """The numbers of this solve."""
        plan, first = self.plan, problem.leaves[0]
        self.problem, self.args = problem, args
        self.constants = plan.constants(args, self.wanted)
        self.y0 = as_rows(problem.leaves, self.batch, first)
        self.arguments = self.kind.no_arguments
        if plan.batched:
            self.arguments = as_rows([_numbers(args[i].detach(), first.dtype) for i in plan.batched], self.batch, first)

    def without_numbers(self) -> "Engine":
        """What is the same in all solves of its kind."""
        other = Engine.__new__(Engine)
        numbers = ("problem", "args", "constants", "y0", "arguments", "sources", "begun")
        other.__dict__.update({name: x for name, x in vars(self).items() if name not in numbers})
        return other

    def again(self, problem: Problem, args: Sequence[Any], sources: Any) -> "Engine":
        """Another of this kind."""
        other = Engine.__new__(Engine)
        other.__dict__.update(self.__dict__)
        other.sources = sources
        other._take(problem, args)
        other.begun = time.perf_counter()
        return other

    def _kind(self, per_sample: bool, gradient: str, backward: Options | None, like: Kind | None) -> Kind:
        """One that is kept, for options are the same object wherever they have the same values: see request.Settings."""
        plan = self.plan
        key = id(self.options), self.batch, per_sample, self.matmul, gradient, by_value(backward)
        found = plan.kinds.get(key) if like is None else None
        if found is None:
            card = card_of(plan.device) if self.cuda else None
            found = Kind(plan, self.options, self.batch, per_sample, card, self.matmul, gradient, backward, like)
            if like is None:
                if len(plan.kinds) >= _MOST_KINDS:
                    plan.kinds.clear()
                plan.kinds[key] = found
        return found

    def unchanged(self) -> bool:
        """Whether func reads now what it read in the solve, as far as that is not known from the versions of tensors."""
        plan, args = self.plan, self.args
        if not plan.guards.hold(args) or not plan.rows.kept(args):
            return False
        if any([place(args) is not x for place, x in zip(plan.wanted, self.sources.trained, strict=True)]):
            return False
        values = self.constants.values
        return all([same_bits(place(args).detach(), values[node]) for node, place in plan.places.items()])

    def solve(self, keep: bool) -> Trajectory:
        """keep: the steps, for the way back."""
        problem = self.problem
        with marked("solve"):
            way = self.kind.way(self.plan, self.kind.control)
            ys, state, host = self.run(way, self.y0, problem, self.grid, keep=keep)
        if self.begun:
            self.plan.watch.add(time.perf_counter() - self.begun)
        return Trajectory(ys=self.leaves(ys), last=self.leaves(self.y_last), state=state, seen=host)

    def leaves(self, rows: Tensor) -> list[Tensor]:
        """[..., batch, state] as leaves [..., *leaf.shape]."""
        leaves = self.problem.leaves
        if len(leaves) == 1:
            shape = leaves[0].shape
            return [rows if len(shape) == 2 and not self.plan.whole else rows.view([*rows.shape[:-2], *shape])]
        ahead = rows.shape[:-2]
        parts = rows.split(self.plan.leaf_sizes, -1)
        return [part.reshape([*ahead, *leaf.shape]) for part, leaf in zip(parts, leaves, strict=True)]

    def run(
        self,
        way: Way,
        y0: Tensor,
        problem: Problem,
        grid: Grid | None,
        keep: bool = False,
        sums: tuple[Tensor, Tensor] | None = None,
        bind: Callable[[Any], None] | None = None,
    ) -> tuple[Tensor, Tensor | None, Any]:
        """The outputs [len(t), batch, columns], the solver state, and the same as a NumPy array where the host has it. sums:
        where gradients of constants [chunks, size] and arguments are added up. bind: is handed the call."""
        batch, columns = y0.shape
        host = None
        if self.cuda:
            state = torch.zeros(NUM_FIELDS, way.rows, dtype=torch.float64, device=y0.device)
        else:
            host = np.zeros((NUM_FIELDS, way.rows))
            state = torch.from_numpy(host)
        ys, y_last = y0.new_empty((len(problem.t), batch, columns)), torch.empty_like(y0)
        addresses = y0.data_ptr(), ys.data_ptr(), y_last.data_ptr(), state.data_ptr()
        call, memory = way.begin(problem, grid, self.constants, self.arguments, *addresses)
        if sums is not None:
            constants, arguments = sums
            call.bind_gradients(0, 0, arguments.data_ptr(), constants.data_ptr(), constants.shape[1])
        if bind is not None:
            bind(call)
        if keep:
            self._run_and_keep(way, call, grid)
            if way.solve == "per_sample":  # a record has steps of several samples
                self.steps = int(state[FIELDS["num_accepted"]].max())
        else:
            way.run(call)
        way.end(memory)
        self.y_last = y_last
        return ys, None if grid is not None else state, None if grid is not None else host

    def _run_and_keep(self, way: Way, call: Any, grid: Grid | None) -> None:
        counts = torch.zeros(way.records, dtype=torch.int64, device=self.y0.device)
        capacity = len(grid[0]) - 1 if grid is not None else way.longest
        while True:
            self.tape = None  # which did not suffice
            self.tape = Tape(way.records * capacity * way.library.record_bytes, counts.device)
            call.bind_tape(self.tape.address, counts.data_ptr(), capacity)
            way.run(call)
            needed = int(counts[0]) if way.records == 1 else int(counts.max())
            way.longest = needed + needed // 8 + 2
            if needed <= capacity:
                break
            capacity = needed
        self.counts, self.capacity, self.steps = counts, capacity, needed


def _numbers(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Those of an argument as the kernels have them. Raises Unreadable where they have them not."""
    if x.dtype == dtype:
        return x
    if x.is_floating_point() and torch.promote_types(x.dtype, dtype) != dtype:
        raise Unreadable(f"an argument has numbers of {x.dtype}")
    if not x.is_floating_point() and bool((x.double().abs() > 2 / torch.finfo(dtype).eps).any()):
        raise Unreadable(f"an argument of whole numbers has larger ones than {dtype} tells apart")
    return x.to(dtype)


def evaluations(options: Options, host: Any, grid: Grid | None, problem: Problem) -> int:
    """Calls of func that such a solve takes. host: its state as a NumPy array."""
    tableau = options.tableau
    if host is not None:
        jumps = 0
        if options.jump_t:
            low, high = np.minimum(problem.t[0], problem.t[-1]), np.maximum(problem.t[0], problem.t[-1])
            jumps = sum(bool(np.any((low < jump) & (jump < high))) for jump in options.jump_t)
        return most_tried(host) * calls_of_step(tableau) + (1 if options.first_step else 2) + jumps
    assert grid is not None
    return calls_on_grid(tableau, grid[0], problem.t, problem.direction, options.perturb)


def calls_of_step(tableau: Method) -> int:
    """Of func, after the first slope of a solve."""
    step = rosenbrock_of(tableau)
    return tableau.stages - 1 if step is None else step.calls


def as_rows(leaves: Sequence[Tensor], batch: int, like: Tensor, ahead: int | None = None) -> Tensor:
    """Leaves [ahead, *leaf.shape] as one [ahead, batch, columns], of the type of `like`."""
    shape = [batch] if ahead is None else [ahead, batch]
    if len(leaves) == 1:
        only = leaves[0]
        if only.dim() == len(shape) + 1 and only.shape[len(shape) - 1] == batch and not only.requires_grad:
            return only.contiguous()
    if not leaves:
        return like.new_zeros(*shape, 0)
    parts = [leaf.detach().reshape(*shape, -1) for leaf in leaves]
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, -1)
