"""func read for states of one shape and type: its recording, its program, and where the tensors of func are found again."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, fx

from ..problem import Structure
from .call import Call
from .constants import Layout, sources_of
from .lower import Lowering
from .marks import Marks, same_bits
from .memory import has_memory
from .numbers import Place
from .program import Contract, Linear, Program
from .reading import Reading
from .rows import Rows, Tried, choices_of
from .trace import Recording, Unreadable, record, value_of
from .values import where

LARGEST = 1024  # numbers of a sample in one value
_MOST_CHOICES = 16  # of arguments with one entry a sample
_ASKED = "its code asks for them"
_MOST_BYTES = 3 << 20  # of a tile's values on the stack of one thread
_MOST_CUDA_BYTES = 32 << 10  # the same of a sample on CUDA, where a thread has one; all threads of the card need as much


class FieldProgram:
    """whole: the state has no axis of samples; it is one sample. batched: the arguments that have one entry a sample. by_time:
    df/dt is recorded too, second: and second derivatives."""

    def __init__(
        self,
        func: Callable,
        structure: Structure,
        t: Tensor,
        args: Sequence[Any],
        whole: bool,
        reading: Reading,
        marks: Marks,
        pure: bool = False,
        by_time: bool = False,
        second: bool = False,
        tried: Tried | None = None,
    ):
        self.whole = whole
        leaves = structure.leaves
        self.dtype, self.device = t.dtype, t.device
        self.leaf_sizes = [leaf.numel() if whole else leaf[:1].numel() for leaf in leaves]
        self.state = sum(self.leaf_sizes)
        if max(self.leaf_sizes) > LARGEST:
            raise Unreadable(f"a sample has {max(self.leaf_sizes)} numbers, more than {LARGEST}: the stepper is as fast there")
        call = Call(func, structure, t, [], whole, by_time=by_time, second=second)
        self.recording = self._record(call, args, reading, marks, pure, tried or Tried())
        self.batched, args = self.recording.batched, self.rows.of(args)
        self.argument_sizes = [args[i][:1].numel() for i in self.batched]
        self.lowering = Lowering(self.recording, self.leaf_sizes, self.argument_sizes)
        self.program: Program = self.lowering.program
        self._check_size()
        self._find_constants(args, reading)

    def _record(self, call: Call, args: Sequence[Any], reading: "Reading", marks: Marks, pure: bool, tried: Tried) -> Recording:
        rows = 0 if self.whole else call.structure.leaves[0].shape[0]
        able = [
            i for i, x in enumerate(args) if isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == rows and not self.whole
        ]
        choices = [list(c) for n in range(len(able) + 1) for c in combinations(able, n)]
        choices.sort(key=lambda c: (len(c) not in (0, len(able)), len(c)))
        failure = Unreadable("")
        all_choices = [
            (tensors, batched)
            for tensors in choices_of([] if self.whole else list(reading.reach.tensors.values()), rows)
            for batched in choices[: _MOST_CHOICES // 4 if tensors else _MOST_CHOICES]
        ]
        for tensors, batched in tried.left(all_choices):
            self.rows = Rows([places[0] for x in tensors if (places := reading.places(x, args, ()))])
            given, func = self.rows.of(args), self.rows.over(call.func)
            chosen = [*batched, *range(len(args), len(given))]
            try:
                found = replace(call, func=func, batched=chosen, trained=[given[i].requires_grad for i in chosen])
                return record(found, given, reading.reach, reading.numbers, marks, pure)
            except Unreadable as error:
                failure = failure if tensors else error
        raise failure

    def _check_size(self) -> None:
        numbers = sum(buffer.size for buffer in self.program.buffers if buffer.kind == "local")
        largest = max((buffer.size for buffer in self.program.buffers if buffer.kind == "local"), default=0)
        if largest > 4 * LARGEST:
            raise Unreadable(f"a value has {largest} numbers a sample, more than {4 * LARGEST}")
        if numbers * 128 > _MOST_BYTES:
            raise Unreadable(f"a sample has {numbers} numbers on the way, too many for a thread's stack")
        if self.device.type == "cuda" and numbers * self.dtype.itemsize > _MOST_CUDA_BYTES:
            raise Unreadable(f"a sample has {numbers} numbers on the way, too many for a thread on CUDA")
        self.operations = sum(
            s.rows * s.columns
            if isinstance(s, Linear)
            else s.a.size
            if isinstance(s, Contract)
            else self.program.buffers[s.out].size * 4
            for s in self.program.statements
        )

    # Constants

    def _find_constants(self, args: Sequence[Any], reading: "Reading") -> None:
        """How each tensor of func is found again at every call: by its place, for it may be replaced."""
        self.places: dict[fx.Node, Place] = {}
        self._found: list[tuple[Tensor, Place]] = []  # outside of func
        self._ties: list[list[Place]] = []  # where each is found
        twins = [
            getattr(self.recording.modules[1], str(n.target)) for n in self.recording.graphs[1].nodes if n.op == "get_attr"
        ]
        nodes = [node for node in self.recording.graphs[0].nodes if node.op == "get_attr"]
        for node, twin in zip(nodes, twins, strict=True):
            tensor = self.recording.constant(node)
            places = reading.places(tensor, args, self.batched)
            if places:
                if has_memory(tensor) and any([n > 1 and not x for n, x in zip(tensor.shape, tensor.stride(), strict=True)]):
                    raise Unreadable(f"func uses a tensor {list(tensor.shape)} whose entries are one number in memory")
                self._found.append((tensor, places[0]))
                self._ties.append(places)
            elif tensor is twin:
                raise Unreadable(f"func uses a tensor {list(tensor.shape)} that is found by no path from func: {where(node)}")
            elif not same_bits(tensor, twin):
                raise Unreadable(f"func makes a tensor {list(tensor.shape)} of other values at every call: {where(node)}")
            if not places:  # its memory may be that of an array which is written later
                tensor = tensor.detach().clone()
                setattr(self.recording.modules[0], str(node.target), tensor)
            self.places[node] = places[0] if places else _itself(tensor)
        given = args[: len(args) - len(self.rows.places)]
        self._ties += [reading.places(x, given, ()) for x in self.rows.tensors(args)]
        counting = self.recording.counting
        self.counting: list[Place] = [(*reading.places(x, args, self.batched), _itself(x))[0] for x in counting]
        self.wanted = [(*reading.places(x, args, self.batched), _itself(x))[0] for x in self.recording.wanted]
        seen: dict[fx.Node, Any] = {node: self.recording.constant(node) for node in self.places}
        self.layout = Layout(self.program, self.places, seen, self.dtype, self.device)
        first: dict[Any, int] = {}
        for node, view in zip(self.program.constants, self.layout.views, strict=True):
            if view is not None:
                buffer = self.lowering.constants[node]
                self.program.same[buffer] = first.setdefault((view.base, view.offset), buffer)
        read = {id(x): (x, _ASKED) for x in self.recording.read}
        for node in self.lowering.known:
            for source in sources_of(node):
                read.setdefault(id(seen[source]), (seen[source], where(node)))
        self._contents = []
        for tensor, why in read.values():
            places = reading.places(tensor, args, self.batched)
            if places:
                self._contents.append((tensor, places[0], why))
                self._ties.append(places)
            elif why is _ASKED:
                raise Unreadable(f"func reads the values of a tensor {list(tensor.shape)} that is found by no path from func")
        self.outside = [tensor for tensor, _ in self._found if id(tensor) not in read]  # may hold any numbers

    def count(self, calls: int, args: Sequence[Any]) -> None:
        """Counts for func so many calls that it was spared."""
        counters, steps = self.recording.counters, self.recording.added
        if steps:
            for counter, step in zip(counters, steps, strict=False):
                counter.put(counter.get() + calls * step)
            with torch.no_grad():
                for place, step in zip(self.counting, steps[len(counters) :], strict=True):
                    place(args).add_(calls * step)

    def array(self, node: fx.Node, values: dict[fx.Node, Any]) -> Tensor:
        """A constant as the program addresses it: its storage from its first number on."""
        with torch.no_grad():
            value = value_of(node, values).detach().resolve_neg()
            seen = node.meta["val"]
            if value.stride() != seen.stride():
                value = torch.empty_strided(seen.shape, seen.stride(), dtype=value.dtype, device=value.device).copy_(value)
        size = self.program.buffers[self.lowering.constants[node]].size
        return torch.as_strided(value, [size], [1], value.storage_offset())


def _itself(tensor: Tensor) -> Place:
    return lambda args: tensor
