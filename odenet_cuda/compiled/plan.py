"""A plan: a field read for one kind of state, with the libraries of its solves and what torch does before and after them."""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .. import _C
from ..problem import Structure
from ..tableau import ButcherTableau
from .build import load
from .check import check_program
from .emit import Target, emit, tap_layout
from .lower import Lowering, Uniform
from .program import Linear, Program
from .trace import Recording, Unreadable, record, sample_rows

LARGEST = 1024  # numbers of a sample in one value
_MOST_BYTES = 3 << 20  # of a tile's values on the stack of one thread


class Plan:
    """func read for states of one shape and type.

    whole: the state has no axis of samples; it is one sample. batched: the arguments that have one entry a sample.
    """

    def __init__(self, func: Callable, structure: Structure, args: Sequence[Any], whole: bool):
        self.whole = whole
        leaves = structure.leaves
        first = leaves[0]
        self.dtype, self.args_count = first.dtype, len(args)
        self.leaf_sizes = [leaf.numel() if whole else leaf[:1].numel() for leaf in leaves]
        if max(self.leaf_sizes) > LARGEST:
            raise Unreadable(f"a sample has {max(self.leaf_sizes)} numbers, more than {LARGEST}: the stepper is as fast there")
        t = torch.zeros((), dtype=first.dtype)
        self.recording = self._record(func, structure, t, args)
        self.batched = self.recording.batched
        self.argument_sizes = [args[i][:1].numel() for i in self.batched]
        self.lowering = Lowering(self.recording, self.leaf_sizes, self.argument_sizes)
        self.program: Program = self.lowering.program
        self._check_size()
        check_program(self, func, structure, t, args)
        self._find_constants(func, args)
        self.libraries: dict[Any, _C.Library] = {}
        self.steps: dict[Any, int] = {}  # how many the last solve of a kind took
        self.title = getattr(func, "__qualname__", type(func).__name__)
        self.sums_at = tap_layout(self.program)
        self._after = self._nodes_after()

    def _record(self, func: Callable, structure: Structure, t: Tensor, args: Sequence[Any]) -> Recording:
        rows = 0 if self.whole else structure.leaves[0].shape[0]
        able = [i for i, x in enumerate(args) if isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == rows and not self.whole]
        choices = [list(c) for n in range(len(able) + 1) for c in combinations(able, n)]
        choices.sort(key=lambda c: (len(c) not in (0, len(able)), len(c)))
        failure = Unreadable("")
        for batched in choices[:16]:
            try:
                return record(func, structure, t, args, batched, self.whole)
            except Unreadable as error:
                failure = error
        raise failure

    def _check_size(self) -> None:
        numbers = sum(buffer.size for buffer in self.program.buffers if buffer.kind == "local")
        largest = max((buffer.size for buffer in self.program.buffers if buffer.kind == "local"), default=0)
        if largest > 4 * LARGEST:
            raise Unreadable(f"a value has {largest} numbers a sample, more than {4 * LARGEST}")
        if numbers * 128 > _MOST_BYTES:
            raise Unreadable(f"a sample has {numbers} numbers on the way, too many for a thread's stack")
        self.operations = sum(
            s.rows * s.columns if isinstance(s, Linear) else self.program.buffers[s.out].size * 4 for s in self.program.statements
        )

    # Constants

    def _find_constants(self, func: Callable, args: Sequence[Any]) -> None:
        """How each tensor of func is found again at every call: by its place, for it may be replaced."""
        self.places: dict[fx.Node, Callable[[Sequence[Any]], Tensor]] = {}
        graph = self.recording.graphs[0]
        for node in graph.nodes:
            if node.op == "get_attr":
                self.places[node] = _place(self.recording.constant(node), func, args)
        self.wanted = [_place(tensor, func, args) for tensor in self.recording.wanted]
        needed = set(self.program.constants)
        for node in reversed(list(graph.nodes)):
            if node in needed:
                needed |= set(node.all_input_nodes)
        self._before = [node for node in graph.nodes if node in needed and node.op == "call_function"]

    def constants(self, args: Sequence[Any]) -> dict[fx.Node, Any]:
        """Every uniform value that the kernels read, and those on the way to it."""
        values: dict[fx.Node, Any] = {node: place(args) for node, place in self.places.items()}
        with torch.no_grad():
            for node in self._before:
                values[node] = _apply(node, values)
        return values

    def arrays(self, values: dict[fx.Node, Any]) -> list[Tensor]:
        """The constants as the kernels read them: laid out as when they were recorded."""
        arrays = []
        for node in self.program.constants:
            seen, value = node.meta["val"], values[node].detach()
            if value.stride() != seen.stride() or value.dtype != seen.dtype:
                laid_out = torch.empty_strided(seen.shape, seen.stride(), dtype=seen.dtype)
                value = laid_out.copy_(value)
            arrays.append(value)
        return arrays

    # Gradients

    def _nodes_after(self) -> list[fx.Node]:
        needed = {node for node in self.lowering.gradients if node is not None}
        order = []
        for node in reversed(list(self.recording.graphs[0].nodes)):
            if node in needed and node.op == "call_function" and node not in self.lowering.summed:
                order.append(node)
                needed |= set(node.all_input_nodes)
        return order[::-1]

    def gradients(self, sums: Tensor, values: dict[fx.Node, Any]) -> list[Tensor | None]:
        """The gradients of the wanted constants, from the sums of the kernel [grad_size]."""
        values = dict(values)
        _, layout, _ = self.sums_at
        shapes = self.lowering.sum_shapes
        for node, index in self.lowering.summed.items():
            s, begin = self.program.sums[index], layout[index][2]
            part = sums[begin : begin + s.size]
            if s.b is not None:
                part = part.view(s.a.shape[1], s.b.shape[1])
                part = part.t() if node in self.lowering.transposed else part
            values[node] = part.reshape(shapes[node])
        for node in self._after:
            if node not in values:
                values[node] = _apply(node, values)
        return [None if node is None else values[node] for node in self.lowering.gradients]

    # Libraries

    def source(self, tableau: ButcherTableau, target: Target) -> str:
        return emit(self.program, tableau, self.leaf_sizes, f"{self.title}, {target.solve}", target)

    def library(self, tableau: ButcherTableau, target: Target) -> _C.Library:
        key = (tableau, target)
        if key not in self.libraries:
            self.libraries[key] = load(self.source(tableau, target))
        return self.libraries[key]


def _apply(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    def known(x: fx.Node) -> Any:
        if x not in values:
            values[x] = _apply(x, values)
        return values[x]

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), known)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _place(tensor: Tensor, func: Any, args: Sequence[Any]) -> Callable[[Sequence[Any]], Tensor]:
    for i, x in enumerate(args):
        if x is tensor:
            return lambda args, i=i: args[i]
    modules = list(func.modules()) if isinstance(func, nn.Module) else []
    owners: list[dict[str, Any]] = []
    for module in modules:
        owners += [module._parameters, module._buffers, module.__dict__]
    function = getattr(func, "__func__", func)
    for name in ("__globals__",):
        owners.append(getattr(function, name, {}))
    if not modules:
        owners.append(getattr(func, "__dict__", {}))
        owners.append(getattr(getattr(func, "__self__", None), "__dict__", {}))
    for owner in owners:
        for name, value in owner.items():
            if value is tensor:
                return lambda args, owner=owner, name=name: owner[name]
    for cell in getattr(function, "__closure__", None) or ():
        try:
            value = cell.cell_contents
        except ValueError:  # an empty cell
            continue
        if value is tensor:
            return lambda args, cell=cell: cell.cell_contents
        if isinstance(value, nn.Module):
            found = _place(tensor, value, ())
            if found((), ) is tensor:
                return found
    return lambda args: tensor


__all__ = ["Plan", "Uniform", "np", "pytree", "sample_rows"]
