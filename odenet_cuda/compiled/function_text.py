"""One function of a program as C++ text: loops over packs, with what has the same length in one loop."""

import re

import numpy as np

from .fused import PRODUCT, fused_text, is_added
from .places import grid_text, place_in_loop, segments
from .program import SCALARS, Contract, Linear, Lookup, Pointwise, Program, Reduce, Refs, Statement, split

UNROLLED = 8  # loops of at most so many turns are written out
INLINED = 48  # a function of fewer operations is inlined into the stages, where its numbers stay in registers


def number(x: float) -> str:
    if x != x:
        return "T(NAN)"
    if x in (float("inf"), float("-inf")):
        return f"T({'-' if x < 0 else ''}INFINITY)"
    return f"T({x!r})"


def operands_of(statement: Statement) -> list[Refs]:
    if isinstance(statement, Pointwise):
        return statement.operands
    if isinstance(statement, Reduce):
        return [statement.operand]
    if isinstance(statement, Contract):
        return [statement.a, statement.b]
    if isinstance(statement, Lookup):
        return [statement.table, statement.places]
    return [statement.x] if statement.bias is None else [statement.x, statement.bias]


def buffers_of(parts: list[Refs]) -> set[int]:
    return {int(buffer) for refs in parts for buffer in np.unique(split(refs)[0])}


def needed_for(program: Program, results: list[Refs], stop: set[int]) -> tuple[list[Statement], set[int]]:
    """The statements that compute the results from inputs and the buffers `stop`; and all buffers that are read."""
    wanted = buffers_of(results)
    needed = []
    for statement in reversed(program.statements):
        if statement.out in wanted and statement.out not in stop:
            needed.append(statement)
            wanted |= buffers_of(operands_of(statement))
    return needed[::-1], wanted


class FunctionText:
    """The body of one function that computes the results at some addresses."""

    def __init__(
        self, program: Program, results: list[tuple[str, Refs]], kept: dict[int, int] | None = None, given: bool = False
    ):
        """results: name of an array to write, and the addresses of what goes there. kept: the places of buffers that outlive
        the function, in the array `kept`; given: they have been computed before."""
        self.program, self.kept = program, kept or {}
        self.lines: list[str] = []
        stop = set(self.kept) if given else set()
        wanted = [refs for _, refs in results]
        if not given:
            wanted += [program.addresses(buffer) for buffer in self.kept]
        needed, used = needed_for(program, wanted, stop)
        self.needed = needed
        self.height = 0  # rows of a team's memory in use at once, at most
        size = sum(program.buffers[statement.out].size if isinstance(statement, Pointwise) else INLINED for statement in needed)
        self.linkage = "ODENET_HD" if size < INLINED else "ODENET_CALLED"
        self.lines += [f"const P* {program.buffers[b].name} = kept + {self.kept[b]};" for b in sorted(used & stop)]
        self._begin(needed, results)
        for buffer in self._constants(needed, results):
            place = [b for b in range(len(program.buffers)) if program.buffers[b].kind == "constant"].index(buffer)
            kind = "bool" if program.buffers[buffer].mask else "T"
            self.lines.append(
                f"const {kind}* {program.buffers[buffer].name} = static_cast<const {kind}*>({self._source(buffer, place)});"
            )
        self._emit(needed, buffers_of([refs for _, refs in results]) | set(self.kept))
        for name, refs in results:
            self._before([refs])
            self._copy_result(name, refs)

    # What is done otherwise on CUDA (team_text.py)

    def _source(self, buffer: int, place: int) -> str:
        """Of a constant: a pointer to its numbers. place: among all constants."""
        return f"in.constants[{place}]"

    def _begin(self, needed: list[Statement], results: list[tuple[str, Refs]]) -> None:
        """Before the first statement."""

    def _before(self, operands: list[Refs], dealt: bool = False) -> None:
        """Before these are read; dealt: by a loop that has a turn for each of their numbers."""

    def _after(self, statements: list[Statement]) -> None:
        """After these, which are written in one piece."""

    def _loop(self, start: int, end: int, out: int | None = None) -> str:
        """out: the buffer that is written, where every thread may have all of it."""
        return f"for (int i = {start}; i < {end}; ++i)"

    def _guard(self, buffer: int, row: int) -> str:
        """Ahead of a statement that writes this row."""
        return ""

    def _copy_result(self, name: str, refs: Refs) -> None:
        self._copy(name, refs)

    def _constants(self, needed: list[Statement], results: list[tuple[str, Refs]]) -> list[int]:
        found = {statement.weight for statement in needed if isinstance(statement, Linear)}
        refs = [r for statement in needed for r in operands_of(statement)] + [r for _, r in results]
        found |= {b for b in buffers_of(refs) if self.program.buffers[b].kind == "constant"}
        return sorted(found)

    # Operands

    def _at(self, buffer: int, index: str, place: int = 0) -> str:
        b = self.program.buffers[buffer]
        if b.kind == "literal":
            return f"P({number(b.values[place])})"
        if b.name in SCALARS:
            return b.name
        text = f"{b.name}[{index}]"
        return text if b.kind != "constant" else f"MaskOf<P>({text})" if b.mask else f"P({text})"

    def _element(self, ref: int) -> str:
        buffer, place = int(ref) >> 32, int(ref) & 0xFFFFFFFF
        return self._at(buffer, str(place), place)

    def _segments(self, operands: list[Refs]) -> list[tuple[int, int]]:
        return segments(self.program, operands)

    def _in_loop(self, refs: Refs, start: int, end: int, variable: str) -> str:
        buffer, place = int(refs[start]) >> 32, int(refs[start]) & 0xFFFFFFFF
        return self._at(buffer, place_in_loop(refs, start, end, variable), place)

    # Statements

    def _emit(self, statements: list[Statement], results: set[int]) -> None:
        readers: dict[int, list[Statement]] = {}
        for statement in statements:
            for refs in operands_of(statement):
                for buffer in np.unique(split(refs)[0]):
                    readers.setdefault(int(buffer), []).append(statement)
        group: list[Pointwise] = []
        for statement in statements:
            if isinstance(statement, Pointwise) and self._joins(group, statement):
                group.append(statement)
                continue
            self._write_group(group, readers, results)
            group = []
            if isinstance(statement, Pointwise):
                group = [statement]
                continue
            self._before(operands_of(statement))
            if isinstance(statement, Linear):
                self._write_linear(statement)
            elif isinstance(statement, Lookup):
                self._write_lookup(statement)
            else:
                self._write_sum(statement)
            self._after([statement])
        self._write_group(group, readers, results)

    def _joins(self, group: list[Pointwise], statement: Pointwise) -> bool:
        if not group:
            return False
        size = len(statement.operands[0])
        if len(group[0].operands[0]) != size:
            return False
        inside = {other.out for other in group}
        for refs in statement.operands:
            buffers = np.unique(split(refs)[0])
            if inside & set(buffers.tolist()) and not self._is_whole(refs, size):
                return False
        return True

    def _is_whole(self, refs: Refs, size: int) -> bool:
        return len(refs) == size and np.array_equal(refs, self.program.addresses(int(refs[0]) >> 32)[:size])

    def _declare(self, buffer: int) -> None:
        b = self.program.buffers[buffer]
        if buffer in self.kept:
            self.lines.append(f"P* {b.name} = kept + {self.kept[buffer]};")
            return
        self.lines.append(f"{'MaskOf<P>' if b.mask else 'P'} {b.name}[{b.size}];")

    def _write_group(self, group: list[Pointwise], readers: dict[int, list[Statement]], results: set[int]) -> None:
        if not group:
            return
        size = len(group[0].operands[0])
        inside = {statement.out for statement in group}
        self._before([refs for statement in group for refs in statement.operands], size > UNROLLED)
        members = set(map(id, group))
        stored = {out for out in inside if out in results or any(id(r) not in members for r in readers.get(out, []))}
        for out in sorted(stored):
            self._declare(out)
        inner = [x.out for x in group if x.text == PRODUCT and x.out not in stored]
        fused = {out for out in inner if is_added(readers.get(out, []), out)}
        factors: dict[str, list[str]] = {}  # of products that are a part of the sum that reads them

        def assign(statement: Pointwise, texts: list[str], index: str) -> list[str]:
            b = self.program.buffers[statement.out]
            if statement.out in fused:
                factors[f"{b.name}_"] = texts
                return []
            text = fused_text(statement.text, texts, factors) or self._fill(statement.text, texts, index)
            lines = [f"const {'MaskOf<P>' if b.mask else 'P'} {b.name}_ = {text};"]
            return [*lines, f"{b.name}[{index}] = {b.name}_;"] if statement.out in stored else lines

        def local(refs: Refs) -> str | None:
            buffer = int(refs[0]) >> 32
            return f"{self.program.buffers[buffer].name}_" if buffer in inside else None

        if size <= UNROLLED:
            for i in range(size):
                self.lines.append("{")
                for statement in group:
                    texts = [local(refs) or self._element(int(refs[i])) for refs in statement.operands]
                    self.lines += assign(statement, texts, str(i))
                self.lines.append("}")
            self._after(list(group))
            return
        outside = [refs for statement in group for refs in statement.operands if local(refs) is None]
        for start, end in self._segments(outside or [group[0].operands[0]]):
            self.lines.append(self._loop(start, end) + " {")
            for statement in group:
                texts = [local(refs) or self._in_loop(refs, start, end, "i") for refs in statement.operands]
                self.lines += assign(statement, texts, "i")
            self.lines.append("}")
        self._after(list(group))

    @staticmethod
    def _fill(text: str, operands: list[str], index: str) -> str:
        return text.format(*operands, i=index)

    def _write_sum(self, statement: Reduce | Contract) -> None:
        self._declare(statement.out)
        name, operands = self.program.buffers[statement.out].name, operands_of(statement)
        rows, columns = operands[0].shape
        first, join = "{0}", "{sum} + {0}"
        if isinstance(statement, Contract):
            first, join = PRODUCT, "fused({0}, {1}, {sum})"
        elif statement.largest:
            join = "maximum({sum}, {0})"
        grids = [grid_text(self.program, refs) for refs in operands] if rows * columns > UNROLLED else []
        if grids and None not in grids:
            texts = [self._at(*grid) for grid in grids if grid is not None]
            begin = [re.sub(r"\bj\b", "0", text) for text in texts]
            self.lines += [
                self._loop(0, rows, statement.out) + " {",
                f"P sum = {first.format(*begin)};",
                f"for (int j = 1; j < {columns}; ++j) sum = {join.format(*texts, sum='sum')};",
                f"{name}[i] = sum;",
                "}",
            ]
            return
        for i in range(rows):
            guard, out = self._guard(statement.out, i), f"{name}[{i}]"
            texts = [self._element(int(refs[i, 0])) for refs in operands]
            self.lines.append(f"{guard}{out} = {first.format(*texts)};")
            parts = [refs[i, 1:] for refs in operands]
            for start, end in self._segments(parts):
                texts = [self._in_loop(part, start, end, "j") for part in parts]
                self.lines.append(f"{guard}for (int j = {start}; j < {end}; ++j) {out} = {join.format(*texts, sum=out)};")

    def _write_lookup(self, s: Lookup) -> None:
        self._declare(s.out)
        name, grid = self.program.buffers[s.out].name, grid_text(self.program, s.table)
        assert grid is not None
        for start, end in self._segments([s.places]):
            place, table = self._in_loop(s.places, start, end, "i"), f"[&](int j) {{ return {self._at(*grid)}; }}"
            loop = self._loop(start, end, s.out)
            self.lines.append(f"{loop} {name}[i] = lookup<{s.table.shape[1]}>(P({place}), {table});")

    def _write_linear(self, s: Linear) -> None:
        self._declare(s.out)
        weight, x, out = self._names(s)
        start = "P(T(0))"
        if s.bias is not None and len(self._segments([s.bias])) == 1:
            start = self._in_loop(s.bias, 0, s.rows, "i")
        elif s.bias is not None:
            self._copy(out, s.bias)
            start = f"{out}[i]"
        sizes = f"{s.rows}, {s.columns}, {s.row}, {s.column}"
        self.lines.append(f"linear<{sizes}>({weight}, {x}, {out}, [&](int i) {{ return {start}; }});")

    def _names(self, s: Linear) -> tuple[str, str, str]:
        """Of its weights, operand and result."""
        weight, x, out = (self.program.buffers[b].name for b in (s.weight, int(s.x[0]) >> 32, s.out))
        place = int(s.x[0]) & 0xFFFFFFFF
        return f"{weight} + {s.offset}" if s.offset else weight, f"{x} + {place}" if place else x, out

    def _copy(self, name: str, refs: Refs, place: str = "i") -> None:
        """name[i] = number at refs[i]"""
        for start, end in self._segments([refs]) if len(refs) else ():
            self.lines.append(f"{self._loop(start, end)} {name}[{place}] = {self._in_loop(refs, start, end, 'i')};")

    @property
    def text(self) -> str:
        depth, lines = 2, []
        for line in self.lines:
            depth -= line.startswith("}")
            lines.append("  " * depth + line)
            depth += line.endswith("{")
        return "\n".join(lines)
