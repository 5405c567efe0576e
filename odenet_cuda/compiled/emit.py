"""A program and a method as C++ text: one struct `Equation`, and the entry points that run a solve of it.

The same text is compiled for the CPU, where P is a pack of lanes, and for CUDA, where P is a number and every thread a lane.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..tableau import ButcherTableau
from .program import Linear, Pointwise, Program, Reduce, Refs, Statement, split

UNROLLED = 8  # loops of at most so many turns are written out
INLINED = 48  # a function of fewer operations is inlined into the stages, where its numbers stay in registers

SOLVES = ("per_sample", "joint", "grid", "adjoint_per_sample", "adjoint_joint", "adjoint_grid", "reverse")


@dataclass(frozen=True)
class Target:
    """What is compiled. dtype: "float" or "double". lanes: "pack", or "one" for a single sample. solve: one of SOLVES.
    cuda: a kernel instead of a function."""

    dtype: str
    lanes: str
    solve: str
    cuda: bool = False


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


def kept_buffers(program: Program, tainted: set[int]) -> tuple[dict[int, int], int]:
    """What the way back needs of the way there: buffers that do not depend on the incoming gradient, with their places."""
    taps, _, _ = tap_layout(program)
    stop = {b for b, buffer in enumerate(program.buffers) if buffer.kind == "local" and not buffer.mask} - tainted
    _, used = needed_for(program, [program.products, taps], stop)
    places, size = {}, 0
    for b in sorted(used & stop):
        places[b] = size
        size += program.buffers[b].size
    return places, size


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
        size = sum(program.buffers[statement.out].size if isinstance(statement, Pointwise) else INLINED for statement in needed)
        self.linkage = "ODENET_HD" if size < INLINED else "ODENET_CALLED"
        self.lines += [f"const P* {program.buffers[b].name} = kept + {self.kept[b]};" for b in sorted(used & stop)]
        for buffer in self._constants(needed, results):
            place = [b for b in range(len(program.buffers)) if program.buffers[b].kind == "constant"].index(buffer)
            kind = "bool" if program.buffers[buffer].mask else "T"
            self.lines.append(
                f"const {kind}* {program.buffers[buffer].name} = static_cast<const {kind}*>(in.constants[{place}]);"
            )
        self._emit(needed, buffers_of([refs for _, refs in results]) | set(self.kept))
        for name, refs in results:
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
        if b.name == "t":
            return "t"
        text = f"{b.name}[{index}]"
        return text if b.kind != "constant" or b.mask else f"P({text})"

    def _element(self, ref: int) -> str:
        buffer, place = int(ref) >> 32, int(ref) & 0xFFFFFFFF
        return self._at(buffer, str(place), place)

    @staticmethod
    def _index(base: int, stride: int, variable: str) -> str:
        if stride == 0:
            return str(base)
        step = variable if stride == 1 else f"{stride} * {variable}"
        return step if base == 0 else f"{base} + {step}"

    def _segments(self, operands: list[Refs]) -> list[tuple[int, int]]:
        """Ranges in which every operand lies in one buffer at even distances."""
        count = len(operands[0])
        breaks = {0, count}
        for refs in operands:
            buffers, places = split(refs)
            start = 0
            while start < count:
                end = start + 1
                if end < count and buffers[end] == buffers[start]:
                    stride = places[end] - places[start]
                    same = (buffers[start + 1 :] == buffers[start]) & (np.diff(places[start:]) == stride)
                    stops = np.flatnonzero(~same)
                    end = start + 1 + (int(stops[0]) if len(stops) else count - start - 1)
                    literal = self.program.buffers[int(buffers[start])].kind == "literal"
                    if literal and stride != 0:
                        end = start + 1
                breaks.add(end)
                start = end
        edges = sorted(breaks)
        return list(zip(edges[:-1], edges[1:], strict=True))

    def _in_loop(self, refs: Refs, start: int, end: int, variable: str) -> str:
        buffer, place = int(refs[start]) >> 32, int(refs[start]) & 0xFFFFFFFF
        stride = (int(refs[start + 1]) & 0xFFFFFFFF) - place if end - start > 1 else 0
        return self._at(buffer, self._index(place - stride * start, stride, variable), place)

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
            elif isinstance(statement, Reduce):
                self._write_reduce(statement)
            else:
                self._write_linear(statement)
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
        return bool((refs == self.program.addresses(int(refs[0]) >> 32)[:size]).all()) if len(refs) == size else False

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
        members = set(map(id, group))
        stored = {out for out in inside if out in results or any(id(r) not in members for r in readers.get(out, []))}
        for out in sorted(stored):
            self._declare(out)

        def assign(statement: Pointwise, texts: list[str], index: str) -> list[str]:
            b = self.program.buffers[statement.out]
            lines = [f"const {'MaskOf<P>' if b.mask else 'P'} {b.name}_ = {self._fill(statement.text, texts)};"]
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
            return
        outside = [refs for statement in group for refs in statement.operands if local(refs) is None]
        for start, end in self._segments(outside or [group[0].operands[0]]):
            self.lines.append(f"for (int i = {start}; i < {end}; ++i) {{")
            for statement in group:
                texts = [local(refs) or self._in_loop(refs, start, end, "i") for refs in statement.operands]
                self.lines += assign(statement, texts, "i")
            self.lines.append("}")

    @staticmethod
    def _fill(text: str, operands: list[str]) -> str:
        return text.format(*operands)

    def _write_reduce(self, statement: Reduce) -> None:
        self._declare(statement.out)
        name = self.program.buffers[statement.out].name
        join = "maximum({0}, {1})" if statement.largest else "{0} + {1}"
        rows, columns = statement.operand.shape
        buffers, places = split(statement.operand)
        row = int(places[1, 0] - places[0, 0]) if rows > 1 else 0
        column = int(places[0, 1] - places[0, 0])
        grid = places[0, 0] + row * np.arange(rows)[:, None] + column * np.arange(columns)
        if rows * columns > UNROLLED and (buffers == buffers[0, 0]).all() and (grid == places).all():
            base = int(places[0, 0])
            index = self._index(base, row, "i")
            rest = f"{index} + {self._index(0, column, 'j')}" if column else index
            first, other = self._at(int(buffers[0, 0]), index, base), self._at(int(buffers[0, 0]), rest, base)
            self.lines += [
                f"for (int i = 0; i < {rows}; ++i) {{",
                f"P sum = {first};",
                f"for (int j = 1; j < {columns}; ++j) sum = {join.format('sum', other)};",
                f"{name}[i] = sum;",
                "}",
            ]
            return
        for i in range(rows):
            text = self._element(int(statement.operand[i, 0]))
            self.lines.append(f"{name}[{i}] = {text};")
            for start, end in self._segments([statement.operand[i, 1:]]):
                other = self._in_loop(statement.operand[i, 1:], start, end, "j")
                self.lines.append(f"for (int j = {start}; j < {end}; ++j) {name}[{i}] = {join.format(f'{name}[{i}]', other)};")

    def _write_linear(self, s: Linear) -> None:
        self._declare(s.out)
        out, weight = self.program.buffers[s.out].name, self.program.buffers[s.weight].name
        if s.bias is None:
            self.lines.append(f"for (int i = 0; i < {s.rows}; ++i) {out}[i] = P(T(0));")
        else:
            self._copy(out, s.bias)
        x = f"{self.program.buffers[int(s.x[0]) >> 32].name} + {int(s.x[0]) & 0xFFFFFFFF}".removesuffix(" + 0")
        offset = f" + {s.offset}" if s.offset else ""
        self.lines.append(f"linear<{s.rows}, {s.columns}, {s.row}, {s.column}>({weight}{offset}, {x}, {out});")

    def _copy(self, name: str, refs: Refs) -> None:
        """name[i] = number at refs[i]"""
        if len(refs) == 0:
            return
        for start, end in self._segments([refs]):
            if end - start == 1:
                self.lines.append(f"{name}[{start}] = {self._element(int(refs[start]))};")
            else:
                self.lines.append(f"for (int i = {start}; i < {end}; ++i) {name}[i] = {self._in_loop(refs, start, end, 'i')};")

    @property
    def text(self) -> str:
        depth, lines = 2, []
        for line in self.lines:
            depth -= line.startswith("}")
            lines.append("  " * depth + line)
            depth += line.endswith("{")
        return "\n".join(lines)


def tap_layout(program: Program) -> tuple[Refs, list[tuple[int, int, int]], int]:
    """What the product hands out for gradients: addresses; for each sum the places of a and b and of its result."""
    parts, layout, place, result = [], [], 0, 0
    for s in program.sums:
        b = np.zeros(0, np.int64) if s.b is None else s.b.reshape(-1)
        layout.append((place, place + s.a.size, result))
        parts += [s.a.reshape(-1), b]
        place += s.a.size + b.size
        result += s.size
    parts.append(program.argument_products)
    return np.concatenate(parts), layout, result


def _accumulate(program: Program) -> str:
    taps, layout, _ = tap_layout(program)
    lines = []
    for s, (a, b, result) in zip(program.sums, layout, strict=True):
        rows = s.a.shape[1]
        for k in range(s.a.shape[0]):
            if s.b is None:
                lines.append(f"    column_sums<{rows}, steps, {a + k * rows}>(taps, weight, sums + {result});")
            else:
                columns = s.b.shape[1]
                places = f"{a + k * rows}, {b + k * columns}"
                lines.append(f"    outer_sums<{rows}, {columns}, steps, {places}>(taps, weight, sums + {result});")
    if count := len(program.argument_products):
        lines.append(f"    lane_sums<{count}, steps, {len(taps) - count}>(taps, weight, arguments);")
    return "\n".join(lines)


def _table(name: str, arguments: str, entries: list[tuple[str, float]]) -> str:
    lines = [f"    if ({condition}) return {value!r};" for condition, value in entries if value != 0]
    return f"  ODENET_HD static constexpr double {name}({arguments}) {{\n" + "\n".join(lines) + "\n    return 0;\n  }\n"


def _method(tableau: ButcherTableau) -> str:
    s = tableau.stages
    a = [(f"i == {i} && j == {j}", tableau.a[i][j]) for i in range(s) for j in range(i)]
    p = [(f"j == {j} && d == {d}", tableau.p[j][d]) for j in range(s) for d in range(len(tableau.p[0]))]
    one = {name: [(f"j == {j}", values[j]) for j in range(s)] for name, values in (("b", tableau.b), ("c", tableau.c))}
    one["e"] = [(f"j == {j}", tableau.e[j]) for j in range(s)] if tableau.e else []
    return (
        f"  static constexpr int stages = {s}, degree = {len(tableau.p[0])};\n"
        f"  static constexpr bool fsal = {'true' if tableau.fsal else 'false'};\n"
        + _table("a", "int i, int j", a)
        + "".join(_table(name, "int j", entries) for name, entries in one.items())
        + _table("p", "int j, int d", p)
    )


def emit(
    program: Program,
    tableau: ButcherTableau,
    leaf_sizes: list[int],
    title: str,
    target: Target,
    kept: tuple[dict[int, int], int],
) -> str:
    """The text of one library. kept: see `kept_buffers`; empty: the way back computes the field again."""
    backward = target.solve not in ("per_sample", "joint", "grid")
    state, arguments = sum(leaf_sizes), len(program.argument_products)
    taps, _, _ = tap_layout(program)
    ends = [(f"i == {i}", float(end)) for i, end in enumerate(np.cumsum(leaf_sizes).tolist())]
    leaf_end = "".join(f"    if ({condition}) return {int(value)};\n" for condition, value in ends)
    head = "const SolveCall& in, const P& t, const P* y, const P* arguments"
    unused = "(void)in, (void)t, (void)y, (void)arguments;"
    slope, gradient = [("dy", program.slopes)], [("gy", program.products), ("taps", taps)]
    functions = [("field", f"{head}, P* dy, P*", unused, FunctionText(program, slope))]
    with_g = f"{unused} (void)g, (void)taps;"
    if target.solve == "reverse":
        text = FunctionText(program, gradient)
        functions.append(("product", f"{head}, const P* g, P* gy, P* taps", with_g, text))
        places = kept[0]
        text = FunctionText(program, slope, places)
        functions.append(("field_and_keep", f"{head}, P* dy, P* kept", f"{unused} (void)kept;", text))
        text = FunctionText(program, gradient, places, given=True)
        functions.append(
            ("product_of_kept", f"{head}, const P* g, const P* kept, P* gy, P* taps", f"{with_g} (void)kept;", text)
        )
    elif backward:
        text = FunctionText(program, [*slope, *gradient])
        functions.append(("slope_and_product", f"{head}, const P* g, P* dy, P* gy, P* taps", with_g, text))
    bodies = "".join(
        f"\n  template <class P>\n  {text.linkage} static void {name}({given}) {{\n    using T = Number<P>;\n    {marks}\n"
        f"{text.text}\n  }}\n"
        for name, given, marks, text in functions
    )
    if backward:
        bodies += (
            "\n  template <int steps, class P, int N, class T>\n"
            "  ODENET_HD static void accumulate(const P (*taps)[N], const P* weight, T* sums, P* arguments) {\n"
            f"    (void)taps, (void)weight, (void)sums, (void)arguments;\n{_accumulate(program)}\n  }}\n"
        )
    return (
        f"// {title}\n"
        f'#include "core/{"backward" if backward else "solve"}.h"\n#include "core/layers.h"\n\n'
        "namespace odenet {\nnamespace ODENET_LEVEL {\n\n"
        "struct Equation {\n"
        f"  static constexpr int state = {state}, arguments = {arguments}, leaves = {len(leaf_sizes)}, taps = 0;\n"
        f"  static constexpr int taps_of_product = {len(taps)}, kept = {kept[1]};\n"
        f"  ODENET_HD static constexpr int leaf_end(int i) {{\n{leaf_end}    return 0;\n  }}\n"
        f"{_method(tableau)}{bodies}}};\n\n"
        "}  // namespace ODENET_LEVEL\n}  // namespace odenet\n\n" + _entry(target)
    )


def _entry(target: Target) -> str:
    pack = target.dtype if target.lanes == "one" or target.cuda else f"Pack<{target.dtype}, kWidth>"
    equation: Any = "Adjoint<Equation>" if target.solve.startswith("adjoint") else "Equation"
    kept = f"Reverse<Equation, {pack}>" if target.solve == "reverse" else f"Kept<{equation}, {pack}>"
    control = {"per_sample": "kPerSample", "joint": "kJoint", "grid": "kGrid"}.get(target.solve.removeprefix("adjoint_"), "")
    if target.cuda:
        call = {"reverse": "reverse_tile", "grid": "solve_grid"}.get(target.solve, "solve_tile")
        return (
            f"using namespace odenet;\n\n// A thread a sample. left: rows, or steps, that are not done.\n"
            f'extern "C" __global__ void odenet_kernel(SolveCall in, unsigned long long* left) {{\n'
            f"  const int64_t sample = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;\n"
            f"  if (sample >= in.batch) return;\n"
            f"  const int64_t rest = {call}<{equation}, {pack}>(in, sample);\n"
            f"  if (rest > 0) atomicAdd(left, static_cast<unsigned long long>(rest));\n}}\n"
        )
    run = f"reverse<Equation, {pack}>" if target.solve == "reverse" else f"solve<{equation}, {pack}, {control}>"
    return (
        "using namespace odenet;\n\n"
        'extern "C" ODENET_EXPORT void odenet_sizes(int64_t* sizes) {\n'
        f"  sizes[0] = Lanes<{pack}>::width;\n  sizes[1] = sizeof({kept});\n  sizes[2] = sizeof(Record<Equation, {pack}>);\n}}\n"
        'extern "C" ODENET_EXPORT int64_t odenet_run(const SolveCall* in, ParallelFor parallel_for) {\n'
        f"  return {run}(*in, parallel_for);\n}}\n"
    )
