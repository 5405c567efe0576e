"""A plan: a field read for one kind of state, with the libraries of its solves and what torch does before and after them."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..problem import Structure
from ..tableau import Method, StepFunction
from .build import load as load_text
from .check import check_program
from .compilers import Refused
from .constants import Constants
from .emit import Target, emit, kept_buffers
from .field_program import FieldProgram
from .functions import TooLarge, functions_for
from .gradient_sums import GradientSums
from .marks import Disturbed, Marks
from .numbers import Place
from .reading import Reading
from .refusals import Readings
from .rows import Tried
from .sameness import Unguarded
from .teams import Card, Team, card_of, teams_for
from .trace import Unreadable, written
from .watch import Watch

_MOST_BYTES = 3 << 20  # of a tile's values on the stack of one thread
_MOST_LINES = 3_000  # of a text for the CPU: some 30 s of g++ 12, and minutes beyond


class Plan(FieldProgram):
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
        pure: bool = False,
        by_time: bool = False,
        second: bool = False,
        tried: Tried | None = None,
    ):
        reading = reading or Reading(func, args)
        t = torch.zeros((), dtype=structure.leaves[0].dtype, device=structure.leaves[0].device)
        with reading.unmarked(t.device) as marks:
            super().__init__(func, structure, t, args, whole, reading, marks, pure, by_time, second, tried)
            with reading.numbers.given(args) as given:
                self._check(self.rows.over(func), structure, t, self.rows.of(given), per_sample)
            self._check_marks(marks)
        self.guards = reading.guards(args, self.recording, self.rows.places)
        self._guard_tensors(args, marks)
        self._check_guards(marks)
        self.libraries: dict[Any, tuple[Method, _C.Library]] = {}
        self.refused: dict[Any, tuple[Method, str]] = {}  # the same of libraries that there are not, and why
        self.trusted: set[Any] = set()  # those that have been checked, see self_check.py
        self.zeros: list[Place] = []  # tensors of func that were zero then
        self.teams: dict[Any, Team] = {}
        self.readings = Readings()  # of its kind of state
        self.watch = Watch()  # when it is compared with func again
        self.kinds: dict[Any, Any] = {}  # of its solves, see ways.py
        self.with_events: Any = None  # the plan of solves with the events that func was read with, see event_plan.py
        self.title = getattr(func, "__qualname__", type(func).__name__)
        self.sums_at = self.program.sums_at()
        self._sums: GradientSums | None = None

    def _check(self, func: Callable, structure: Structure, t: Tensor, args: Sequence[Any], per_sample: bool) -> None:
        try:
            check_program(self, func, structure, t, args, per_sample)
        except Unreadable:
            raise
        except Exception as error:  # whatever func may raise for other numbers or another number of samples
            raise Unreadable(f"func could not be checked: {type(error).__name__}: {error}") from error

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

    def constants(self, args: Sequence[Any], gradient: bool = True) -> Constants:
        """gradient: they are read again on the way back."""
        return self.layout.constants(args, gradient)

    # Gradients

    def gradients(self, sums: Tensor, constants: Constants) -> list[Tensor | None]:
        """The gradients of the wanted constants, from the sums of the kernel [chunks, grad_size]."""
        if self._sums is None:
            self._sums = GradientSums(self.lowering, *self.sums_at)
        return self._sums.gradients(sums, constants)

    # Libraries

    def team(self, solves: tuple[str, ...], batch: int, card: Card, matmul: str, implicit: bool = False) -> Team:
        """The first that suits so many samples on this card and whose memory holds what these kinds of solve share. implicit:
        these are solves by a method that needs rows of df/dy."""
        teams = teams_for(self.program, self.dtype.itemsize, batch, card, matmul)
        key = solves, tuple(teams), implicit
        if key not in self.teams:
            self.teams[key] = next(team for team in teams if self._suits(solves, team, implicit))
        return self.teams[key]

    def _suits(self, solves: tuple[str, ...], team: Team, implicit: bool) -> bool:
        try:
            for solve in solves:
                functions_for(self.program, solve, {}, team, implicit)
        except TooLarge:
            return False
        return True

    def source(self, tableau: Method, target: Target) -> str:
        kept = kept_buffers(self.program)
        implicit = isinstance(tableau, StepFunction)
        if target.team or implicit or kept[1] * tableau.stages * 128 > _MOST_BYTES:
            kept = {}, 0
        return emit(self.program, tableau, self.leaf_sizes, f"{self.title}, {target.solve}", target, kept)

    def build(self, wanted: list[tuple[Method, Target]]) -> None:
        """Compiles these, those that are missing side by side. Raises NoCompiler."""
        missing = [pair for pair in wanted if (id(pair[0]), pair[1]) not in self.libraries]
        if len(missing) < 2:
            for pair in missing:
                self.load(*pair)
            return
        with ThreadPoolExecutor(len(missing)) as pool:
            list(pool.map(lambda pair: self.load(*pair), missing))

    def load(self, tableau: Method, target: Target) -> _C.Library:
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
