"""One function of a program on CUDA. Where a sample has several threads, a team's groups, what is long lies in the team's
memory, [row][lane], and the groups deal its rows among themselves; what is short each thread has for itself. See
core/team.h."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .function_text import UNROLLED, FunctionText, buffers_of, operands_of
from .program import Linear, Program, Refs, Statement, split
from .teams import MATMULS, Team

_FEW_BYTES = 48 << 10  # with which four blocks of a thread a sample, whose registers are no more, fill a multiprocessor
Rows = tuple[int, int]  # of the team's memory: the first, and behind the last


def _bool(value: bool) -> str:
    return "true" if value else "false"


class Matrix(NamedTuple):
    """A matrix of constants: the buffer of the program, where it begins in it, its shape, and how far its rows lie apart."""

    buffer: int
    offset: int
    rows: int
    columns: int
    row: int

    @property
    def staged_row(self) -> int:
        """How far apart they are in the team's memory: sixteen bytes can be loaded, and neighbours lie in different banks."""
        row = -(-self.columns // 4) * 4
        return row + 4 if row % 8 == 0 else row


@dataclass
class Memory:
    """The memory of a team. staged: the matrices in it, and where they begin; behind: where they end; all in bytes. rounded:
    those of them that tensor cores alone read, and that are rounded for these once."""

    team: Team
    staged: dict[Matrix, int] = field(default_factory=dict)
    rounded: set[Matrix] = field(default_factory=set)
    behind: int = 0
    bytes: int = 0

    def stage_all(self, program: Program, layers: list[tuple[Linear, bool]]) -> bool:
        """Stages the matrices that these multiply with, by tensor cores or not, if there is room for all of them."""
        staged: dict[Matrix, int] = {}
        others, end = set(), 0
        for layer, by_warps in layers:
            matrix = self.matrix_of(program, layer)
            if matrix is None:
                continue
            others |= set() if by_warps else {matrix}
            if matrix not in staged:
                staged[matrix] = end
                end += -(-matrix.rows * matrix.staged_row * self.team.item // 16) * 16
        if end + self.bytes > self.team.memory:
            return False
        self.staged, self.behind, self.bytes, self.rounded = staged, end, end + self.bytes, set(staged) - others
        return True

    def stage_whole(self, program: Program, buffer: int) -> int | None:
        """Where all of this constant is staged, if it is small: then sixteen bytes of it are loaded at once."""
        constant = program.buffers[buffer]
        whole = Matrix(buffer, 0, 1, constant.size, constant.size)
        size = -(-constant.size * self.team.item // 16) * 16
        if whole not in self.staged and not constant.mask and self.bytes + size <= min(_FEW_BYTES, self.team.memory):
            self.staged[whole] = self.behind
            self.behind, self.bytes = self.behind + size, self.bytes + size
        return self.staged.get(whole)

    @staticmethod
    def matrix_of(program: Program, s: Linear) -> Matrix | None:
        """What it reads, as it is or transposed; None where neither its rows nor its columns are numbers in sequence."""
        buffer = program.same.get(s.weight, s.weight)
        if s.column == 1:
            return Matrix(buffer, s.offset, s.rows, s.columns, s.row)
        return Matrix(buffer, s.offset, s.columns, s.rows, s.column) if s.row == 1 else None

    def defines(self) -> str:
        team = self.team
        values: dict[str, int | str] = {"TEAM": team.lanes, "GROUPS": team.groups, "ROW": team.row, "STAGED": self.behind}
        values["TENSOR_CORE"] = MATMULS[team.matmul]
        return "#define ODENET_BLOCKS\n" + "".join(f"#define ODENET_{name} {value}\n" for name, value in values.items())

    def stage(self, program: Program, dtype: str) -> str:
        """Statements that bring the matrices there."""
        constants = [b for b, buffer in enumerate(program.buffers) if buffer.kind == "constant"]
        lines = []
        for m, at in self.staged.items():
            sizes = f"{m.rows}, {m.columns}, {m.row}, {m.staged_row}, {'TensorCore' if m in self.rounded else 'void'}"
            source = f"static_cast<const {dtype}*>(in.constants[{constants.index(m.buffer)}]) + {m.offset}"
            lines.append(f"  stage_matrix<{sizes}>({source}, {at});\n")
        return "".join(lines) + ("  Block{}.sync();\n" if lines else "")


class AloneText(FunctionText):
    """Where a sample has one thread."""

    def __init__(self, memory: Memory, program: Program, *rest: Any):
        self.memory = memory
        super().__init__(program, *rest)

    def _source(self, buffer: int, place: int) -> str:
        at = self.memory.stage_whole(self.program, buffer)
        return super()._source(buffer, place) if at is None else f"team_memory({at})"


class TeamText(FunctionText):
    """memory: of the team; the rows of the functions lie behind what is staged."""

    def __init__(self, program: Program, results: list[tuple[str, Refs]], memory: Memory):
        self.team, self.memory = memory.team, memory
        self.places: dict[int, Rows] = {}  # of the buffers that have some now
        self._written: set[Rows] = set()  # since the team met
        self._read: set[Rows] = set()
        self._own: set[int] = set()  # buffers whose rows each group wrote for itself
        self._operands: set[Rows] = set()  # of the statement that is being written
        self._readers: dict[int, int] = {}  # how many statements are still to read a buffer
        super().__init__(program, results)
        self.linkage = "ODENET_CALLED"

    def _begin(self, needed: list[Statement], results: list[tuple[str, Refs]]) -> None:
        parts = [buffers_of(operands_of(statement)) for statement in needed]
        for buffers in (*parts, buffers_of([refs for _, refs in results])):  # the results are needed to the end
            for buffer in buffers:
                self._readers[buffer] = self._readers.get(buffer, 0) + 1
        outs = {s.out for s in needed if isinstance(s, Linear) or self.program.buffers[s.out].size > UNROLLED}
        inputs = [b for b in sorted(self._readers) if self.program.buffers[b].name in ("y", "g")]
        self._shared = {*outs, *inputs}
        self.lines += ["const Block team;", "team.sync();"]  # until then some read what the last function left
        for buffer in inputs:
            b, rows = self.program.buffers[buffer], self._place(buffer)
            self.lines.append(f"const Shared<T> {b.name} = share<{b.size}>(own_{b.name}, {self._bytes(rows)});")
            self._written.add(rows)
            self._own.add(buffer)

    # The team's memory

    def _bytes(self, rows: Rows) -> int:
        return self.memory.behind + rows[0] * self.team.row * self.team.item

    def _place(self, buffer: int) -> Rows:
        """Where the first rows are free that it fits in."""
        size, begin = self.program.buffers[buffer].size, 0
        for first, last in sorted(self.places.values()):
            if first - begin >= size:
                break
            begin = max(begin, last)
        self.places[buffer] = begin, begin + size
        self.height = max(self.height, begin + size)
        return self.places[buffer]

    def _meet(self) -> None:
        self.lines.append("team.sync();")
        self._written.clear()
        self._read = set(self._operands)

    def _before(self, operands: list[Refs], dealt: bool = False) -> None:
        self._operands = {self.places[b] for b in buffers_of(operands) if b in self.places}
        unmet = {b for b in buffers_of(operands) if b in self.places and self.places[b] in self._written}
        if any(b not in self._own or not dealt or not self._keeps_groups(operands, b) for b in unmet):
            self._meet()
        self._read |= self._operands

    def _keeps_groups(self, operands: list[Refs], buffer: int) -> bool:
        """Whether each group reads those rows of the buffer alone that it has written."""
        for refs in operands:
            buffers, places = split(refs)
            turns = np.flatnonzero(buffers == buffer)
            if ((places[turns] - turns) % self.team.groups).any():
                return False
        return True

    def _after(self, statements: list[Statement]) -> None:
        self._written |= {self.places[s.out] for s in statements if s.out in self.places}
        self._own |= {s.out for s in statements if not isinstance(s, Linear) or self._lanes_of_thread(s) == 1}
        for statement in statements:
            for buffer in buffers_of(operands_of(statement)):
                self._readers[buffer] -= 1
                if self._readers[buffer] == 0:
                    self.places.pop(buffer, None)

    def _declare(self, buffer: int) -> None:
        if buffer not in self._shared:
            return super()._declare(buffer)
        b, (begin, end) = self.program.buffers[buffer], self._place(buffer)
        if any(first < end and begin < last for first, last in self._written | self._read):
            self._meet()
        kind = "bool" if b.mask else "T"
        self.lines.append(f"const Shared<{kind}> {b.name} = rows_at<{kind}>({self._bytes((begin, end))});")
        return None

    # Statements

    def _loop(self, start: int, end: int, out: int | None = None) -> str:
        if out is not None and out not in self._shared:
            return super()._loop(start, end)
        if end - start == 1:
            return f"if (const int i = {start}; is_own(i))"
        several = "ODENET_BY_FOUR " if end - start >= 4 * self.team.groups else ""
        return f"{several}for (int i = own_from({start}); i < {end}; i += kGroups)"

    def _guard(self, buffer: int, row: int) -> str:
        return f"if (is_own({row})) " if buffer in self._shared else ""

    def _copy_result(self, name: str, refs: Refs) -> None:
        self._copy(name, refs, "i / kGroups")

    @property
    def layers(self) -> list[tuple[Linear, bool]]:
        """Those of the function, and whether tensor cores compute them."""
        return [(s, self._lanes_of_thread(s) == 0) for s in self.needed if isinstance(s, Linear)]

    def _lanes_of_thread(self, s: Linear) -> int:
        """Whose results a thread computes. 1: each group has its own rows; 0: tensor cores compute them all."""
        if int(s.x[0]) >> 32 not in self._shared:
            return 1
        return 0 if self.team.uses_tensor_cores(s.rows, s.columns) else self.team.lanes_of_thread(s.rows)

    def _write_linear(self, s: Linear) -> None:
        self._declare(s.out)
        weight, x, out = self._names(s)
        lanes, start = self._lanes_of_thread(s), "T(0)"
        if s.bias is not None and len(self._segments([s.bias])) == 1 and self.program.is_constant(s.bias):
            start = f"T({self._in_loop(s.bias, 0, s.rows, 'i')})"
        elif s.bias is not None:
            start = f"{out}.at(i, lane)"
            self._copy(out, s.bias)
            if lanes != 1:
                self._meet()
        matrix = self.memory.matrix_of(self.program, s)
        row, column = s.row, s.column
        if matrix in self.memory.staged:
            weight = f"static_cast<const T*>(team_memory({self.memory.staged[matrix]}))"
            row, column = (matrix.staged_row, 1) if s.column == 1 else (1, matrix.staged_row)
        kind = f"threads<{s.rows}, {s.columns}, {row}, {column}, {lanes}, {_bool(matrix in self.memory.staged)}>"
        if lanes == 0:
            kind = f"warps<{s.rows}, {s.columns}, {row}, {column}, {_bool(matrix in self.memory.rounded)}>"
        self.lines.append(f"linear_of_{kind}({weight}, {x}, {out}, [&](int i, int lane) {{ return {start}; }});")
