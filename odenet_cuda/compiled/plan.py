"""A plan: a field read for one kind of state, with the libraries of its solves and what torch does before and after them."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, fx

from .. import _C
from ..problem import Structure
from ..tableau import ButcherTableau
from .build import Refused
from .build import load as load_text
from .check import check_program
from .constants import Constants, Layout, sources_of
from .emit import Target, emit, kept_buffers, tap_layout
from .functions import TooLarge, functions_for
from .gradient_sums import GradientSums
from .guards import Unguarded
from .lower import Lowering
from .marks import Disturbed, Marks, same_bits
from .memory import has_memory
from .numbers import Place
from .program import Linear, Program
from .reading import Reading
from .teams import Card, Team, card_of, teams_for
from .trace import Call, Recording, Unreadable, record, value_of, written
from .values import where
from .watch import Watch

LARGEST = 1024  # numbers of a sample in one value
_ASKED = "its code asks for them"
_MOST_BYTES = 3 << 20  # of a tile's values on the stack of one thread
_MOST_LINES = 3_000  # of a text for the CPU: some 30 s of g++ 12, and minutes beyond
_MOST_CUDA_BYTES = 32 << 10  # the same of a sample on CUDA, where a thread has one; all threads of the card need as much


class Plan:
    """func read for states of one shape and type.

    whole: the state has no axis of samples; it is one sample. batched: the arguments that have one entry a sample.
    """

    def __init__(
        self,
        func: Callable,
        structure: Structure,
        args: Sequence[Any],
        whole: bool,
        reading: "Reading | None" = None,
        per_sample: bool = False,
    ):
        self.whole = whole
        leaves = structure.leaves
        first = leaves[0]
        self.dtype, self.device = first.dtype, first.device
        self.leaf_sizes = [leaf.numel() if whole else leaf[:1].numel() for leaf in leaves]
        if max(self.leaf_sizes) > LARGEST:
            raise Unreadable(f"a sample has {max(self.leaf_sizes)} numbers, more than {LARGEST}: the stepper is as fast there")
        t = torch.zeros((), dtype=first.dtype, device=first.device)
        reading = reading or Reading(func, args)
        with reading.unmarked(self.device) as marks:
            self.recording = self._record(func, structure, t, args, reading, marks)
            self.batched = self.recording.batched
            self.argument_sizes = [args[i][:1].numel() for i in self.batched]
            self.lowering = Lowering(self.recording, self.leaf_sizes, self.argument_sizes)
            self.program: Program = self.lowering.program
            self._check_size()
            self._find_constants(args, reading)
            with reading.numbers.given(args) as given:
                self._check(func, structure, t, given, per_sample)
            self._check_marks(marks)
        self.guards = reading.guards(args, self.recording)
        self._guard_tensors(args, marks)
        self._check_guards(marks)
        self.libraries: dict[Any, tuple[ButcherTableau, _C.Library]] = {}
        self.refused: dict[Any, tuple[ButcherTableau, str]] = {}  # the same of libraries that there are not, and why
        self.trusted: set[Any] = set()  # those that have been checked, see self_check.py
        self.zeros: list[Place] = []  # tensors of func that were zero then
        self.teams: dict[Any, Team] = {}
        self.watch = Watch()  # when it is compared with func again
        self.kinds: dict[Any, Any] = {}  # of its solves, see ways.py
        self.state = sum(self.leaf_sizes)
        self.title = getattr(func, "__qualname__", type(func).__name__)
        self.sums_at = tap_layout(self.program)
        self._sums: GradientSums | None = None

    def _check(self, func: Callable, structure: Structure, t: Tensor, args: Sequence[Any], per_sample: bool) -> None:
        try:
            check_program(self, func, structure, t, args, per_sample)
        except Unreadable:
            raise
        except Exception as error:  # whatever func may raise for other numbers or another number of samples
            raise Unreadable(f"func could not be checked: {type(error).__name__}: {error}") from error

    def _record(
        self, func: Callable, structure: Structure, t: Tensor, args: Sequence[Any], reading: "Reading", marks: Marks
    ) -> Recording:
        rows = 0 if self.whole else structure.leaves[0].shape[0]
        able = [
            i for i, x in enumerate(args) if isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == rows and not self.whole
        ]
        choices = [list(c) for n in range(len(able) + 1) for c in combinations(able, n)]
        choices.sort(key=lambda c: (len(c) not in (0, len(able)), len(c)))
        failure = Unreadable("")
        for batched in choices[:16]:
            try:
                return record(Call(func, structure, t, batched, self.whole), args, reading.reach, reading.numbers, marks)
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
        if self.device.type == "cuda" and numbers * self.dtype.itemsize > _MOST_CUDA_BYTES:
            raise Unreadable(f"a sample has {numbers} numbers on the way, too many for a thread on CUDA")
        self.operations = sum(
            s.rows * s.columns if isinstance(s, Linear) else self.program.buffers[s.out].size * 4
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

    def _check_marks(self, marks: Marks) -> None:
        """At the end func has written no more than in the first calls."""
        changes, known = written(marks), {(id(items), key) for items, key in self.recording.written}
        known |= {(id(slot.owner), slot.key) for slot in self.recording.counted}
        places = [*changes.items, *[number[:2] for number in changes.numbers]]
        new = [str(key) for owner, key in places if (id(owner), key) not in known]
        new += [f"a tensor {list(x.shape)}" for x in changes.tensors if all(x is not y for y in self.recording.counting)]
        if new:
            raise Unreadable(f"func writes {new[0]} at one call and not at another")

    def _check_guards(self, marks: Marks) -> None:
        """What the guards hold is what was read."""
        try:
            self._check_marks(marks)
        except Unreadable as error:
            raise Disturbed(f"what func reads was changed while it was read: {error}") from error

    def _guard_tensors(self, args: Sequence[Any], marks: Marks) -> None:
        for places in self._ties:
            self.guards.tie(places)
        for tensor, place, why in self._contents:
            try:
                self.guards.keep_content(tensor, place, why, marks.content(tensor))
            except Unguarded as error:
                raise Unreadable(str(error)) from None
        del self._found, self._contents, self._ties

    def array(self, node: fx.Node, values: dict[fx.Node, Any]) -> Tensor:
        """A constant as the program addresses it: its storage from its first number on."""
        with torch.no_grad():
            value = value_of(node, values).detach().resolve_neg()
            seen = node.meta["val"]
            if value.stride() != seen.stride():
                value = torch.empty_strided(seen.shape, seen.stride(), dtype=value.dtype, device=value.device).copy_(value)
        size = self.program.buffers[self.lowering.constants[node]].size
        return torch.as_strided(value, [size], [1], value.storage_offset())

    def constants(self, args: Sequence[Any], gradient: bool = True) -> Constants:
        """gradient: they are read again on the way back."""
        return self.layout.constants(args, gradient)

    # Gradients

    def gradients(self, sums: Tensor, constants: Constants) -> list[Tensor | None]:
        """The gradients of the wanted constants, from the sums of the kernel [chunks, grad_size]."""
        if self._sums is None:
            _, layout, size = self.sums_at
            self._sums = GradientSums(self.lowering, [begin for _, _, begin in layout], size)
        return self._sums.gradients(sums, constants)

    # Libraries

    def team(self, solves: tuple[str, ...], batch: int, card: Card, matmul: str) -> Team:
        """The first that suits so many samples on this card and whose memory holds what these kinds of solve share."""
        teams = teams_for(self.program, self.dtype.itemsize, batch, card, matmul)
        key = solves, tuple(teams)
        if key not in self.teams:
            self.teams[key] = next(team for team in teams if self._suits(solves, team))
        return self.teams[key]

    def _suits(self, solves: tuple[str, ...], team: Team) -> bool:
        try:
            for solve in solves:
                functions_for(self.program, tap_layout(self.program)[0], solve, {}, team)
        except TooLarge:
            return False
        return True

    def source(self, tableau: ButcherTableau, target: Target) -> str:
        kept = kept_buffers(self.program)
        if target.team or kept[1] * tableau.stages * 128 > _MOST_BYTES:
            kept = {}, 0
        return emit(self.program, tableau, self.leaf_sizes, f"{self.title}, {target.solve}", target, kept)

    def build(self, wanted: list[tuple[ButcherTableau, Target]]) -> None:
        """Compiles these, those that are missing side by side. Raises NoCompiler."""
        missing = [pair for pair in wanted if (id(pair[0]), pair[1]) not in self.libraries]
        if len(missing) < 2:
            for pair in missing:
                self.load(*pair)
            return
        with ThreadPoolExecutor(len(missing)) as pool:
            list(pool.map(lambda pair: self.load(*pair), missing))

    def load(self, tableau: ButcherTableau, target: Target) -> _C.Library:
        key = (id(tableau), target)
        if key in self.refused:
            raise Refused(self.refused[key][1], quiet=True)
        if key not in self.libraries:
            capability = card_of(self.device).capability if target.team else None
            text = self.source(tableau, target)
            lines = 0 if target.team else text.count("\n")
            try:
                if lines > _MOST_LINES:
                    words = f"the C++ text of its {target.solve} solve has {lines} lines, more than {_MOST_LINES}"
                    raise Refused(f"{words}: a compiler would take minutes", quiet=True)
                self.libraries[key] = tableau, load_text(text, capability)
            except Refused as error:
                self.refused[key] = tableau, str(error)
                raise
        return self.libraries[key][1]


def _itself(tensor: Tensor) -> Place:
    return lambda args: tensor
