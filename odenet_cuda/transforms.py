"""Solves inside torch.func transforms, forward-mode derivatives and torch.compile: their steps are taken in plain torch.

The kernels cannot see through what these wrap around tensors. A method on a grid is replayed whole in plain torch. An adaptive
method first finds its steps by a solve on the plain values, and is replayed on them. Under `torch.vmap` an adaptive solve
maps to the rows of per-sample control.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch._functorch.pyfunctorch import (
    VmapInterpreter,
    retrieve_all_functorch_interpreters,
    temporarily_clear_interpreter_stack,
    temporarily_restore_interpreter_stack,
)
from torch.autograd import forward_ad

from . import plain
from .gradients.replay import replay
from .integrate import Grid, Options, integrate
from .problem import Field, Problem, Structure
from .solvers.checkpoints import Checkpoints
from .solvers.trajectory import Recorder, Trajectory

Function = TypeVar("Function", bound=Callable[..., Any])
_functorch = torch._C._functorch
_BATCHED = (
    "torch.vmap over an adaptive solve cannot be combined with other transforms around or inside of it; give the samples as "
    "one batch with step_control='per_sample', or use a method on a grid"
)


def active() -> bool:
    """Whether tensors may be wrapped, or carry tangents, which the kernels would not see."""
    return torch.compiler.is_compiling() or forward_ad._current_level >= 0 or _functorch.maybe_current_level() is not None


def _compiler_watches() -> bool:
    """Whether torch.compile would trace the calls made from here: it has given up on this frame, but not on those within."""
    return torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None


def between_graphs(adaptive: Callable[..., bool]) -> Callable[[Function], Function]:
    """For functions that torch.compile must not look into where `adaptive` says so of their arguments."""

    def decorate(function: Function) -> Function:
        # As torch.compiler.disable, which loads the compiler at once: that takes longer than all the rest of an import.
        outside: Any = _disable_dynamo(function)
        outside._torchdynamo_disable = True
        outside._torchdynamo_disable_msg = "an adaptive solve chooses its steps by their values, so it runs between two graphs"

        @wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if (torch.compiler.is_compiling() or _compiler_watches()) and adaptive(*args, **kwargs):
                return outside(*args, **kwargs)
            return function(*args, **kwargs)

        return cast(Function, wrapper)

    return decorate


class PlainField(Field):
    """func over leaves, for tensors whose memory may not be looked at."""

    def _own(self, k: list[Tensor]) -> list[Tensor]:
        return k


class Values:
    """func on plain values, called inside the transforms: what it closed over may be wrapped, so its result is unwrapped."""

    def __init__(self, func: Callable, structure: Structure, transforms: list[Any]):
        self.func, self.structure, self.transforms = func, structure, transforms

    def __call__(self, t: Tensor, y: Any) -> Any:
        with temporarily_restore_interpreter_stack(self.transforms):
            slopes = self.structure.flatten(self.func(t, y))
        return self.structure.unflatten([values(slope) for slope in slopes])


def values(x: Tensor) -> Tensor:
    """x without wrappers, tangent and graph; to be called outside of the transforms, which would wrap the result."""
    while _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_batchedtensor(x):
            raise NotImplementedError(_BATCHED)
        x = _functorch.get_unwrapped(x)
    return forward_ad.unpack_dual(x).primal.detach() if forward_ad._current_level >= 0 else x.detach()


def solve_on_grid(
    problem: Problem, options: Options, func: Callable, structure: Structure, t: Tensor, grid: Grid
) -> tuple[list[Tensor], int]:
    """(outputs, calls of func) of a method on a grid."""
    field = PlainField(func, structure)
    ys, _ = plain.solve_on_grid(problem, options.tableau, *grid, options.perturb, field, structure.leaves, t)
    return ys, field.nfe


def solve_on_found_steps(
    problem: Problem, options: Options, func: Callable, structure: Structure, t: Tensor
) -> tuple[list[Tensor], Trajectory, int]:
    """(outputs, trajectory on the plain values, calls of func) of an adaptive method."""
    tableau = options.tableau
    recorder = Recorder(
        tableau, problem.t, problem.per_sample, len(problem.leaves), checkpoints=Checkpoints(1), carried=not tableau.fsal
    )
    with temporarily_clear_interpreter_stack() as stack:
        finder = Field(Values(func, structure, stack), structure)
        on_values = replace(problem, field=finder, leaves=[values(leaf).contiguous() for leaf in structure.leaves])
        trajectory = integrate(on_values, options, recorder=recorder)
        trajectory.host_state()  # here, where tensors are plain
    field = PlainField(func, structure)
    ys = replay(recorder.tape, tableau, problem, field, structure.leaves, t)
    return ys, trajectory, finder.nfe + field.nfe


class Rows:
    """func under torch.vmap as one of rows, called outside of it: the mapped axis becomes axis 0 of every leaf."""

    def __init__(self, func: Callable, structure: Structure):
        outer: list[Any] = retrieve_all_functorch_interpreters()
        interpreter = outer.pop()
        if outer or forward_ad._current_level >= 0:
            raise NotImplementedError(_BATCHED)
        self.func, self.level, self.size, self.structure = func, interpreter.level(), interpreter.batch_size(), structure
        self.y0 = structure.unflatten([self._physical(leaf) for leaf in structure.leaves])

    def __call__(self, t: Tensor, y: Any) -> Any:
        with temporarily_restore_interpreter_stack(self.stack):
            wrapped = [_functorch._add_batch_dim(leaf, 0, self.level) for leaf in self._flatten(y)]
            k = self.func(_functorch._add_batch_dim(t.reshape(-1), 0, self.level), self.structure.unflatten(wrapped))
            return self.structure.unflatten([self._physical(slope) for slope in self.structure.flatten(k)])

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Without the transform, but in calls of func."""
        with temporarily_clear_interpreter_stack() as self.stack:
            yield

    def mapped(self, state: Any, axis: int) -> Any:
        """A state whose rows lie on this axis, as the transform sees it."""
        return self.structure.unflatten([_functorch._add_batch_dim(leaf, axis, self.level) for leaf in self._flatten(state)])

    def _flatten(self, state: Any) -> list[Tensor]:
        return [state] if self.structure.single else self.structure.flatten(state)

    def _physical(self, x: Tensor) -> Tensor:
        """x with the mapped axis in front, where it is not wrapped repeated."""
        if not _functorch.is_batchedtensor(x):
            if _functorch.is_functorch_wrapped_tensor(x):
                raise NotImplementedError(_BATCHED)
            return x.expand(self.size, *x.shape)
        x = _functorch.get_unwrapped(x).movedim(_functorch.maybe_get_bdim(x), 0)
        if _functorch.is_functorch_wrapped_tensor(x):
            raise NotImplementedError(_BATCHED)
        return x


def under_vmap() -> bool:
    """Whether the innermost transform is torch.vmap."""
    if _functorch.maybe_current_level() is None:
        return False
    return isinstance(retrieve_all_functorch_interpreters()[-1], VmapInterpreter)
