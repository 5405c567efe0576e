"""A program and a method as C++ text: one struct `Equation`, and the entry points that run a solve of it.

The same text is compiled for the CPU, where P is a pack of lanes, and for CUDA, where P is a number and every thread a lane.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..rosenbrock import rosenbrock_of
from ..tableau import ButcherTableau, Method, StepFunction
from .function_text import needed_for
from .functions import Function, functions_for
from .program import Product, Program
from .team_text import Memory
from .teams import Team

NO_EVENTS = "  static constexpr int events = 0;\n"
SOLVES = ("per_sample", "joint", "grid", "adjoint_per_sample", "adjoint_joint", "adjoint_grid", "reverse")


@dataclass(frozen=True)
class Target:
    """What is compiled. dtype: "float" or "double". lanes: "pack", or "one" for a single sample. solve: one of SOLVES.
    team: of a kernel on CUDA, instead of a function of the CPU."""

    dtype: str
    lanes: str
    solve: str
    team: Team | None = None


def kept_buffers(program: Program) -> tuple[dict[int, int], int]:
    """What the way back needs of the way there: buffers that do not depend on the incoming gradient, with their places."""
    taps, _, _ = program.product.layout()
    stop = {b for b, buffer in enumerate(program.buffers) if buffer.kind == "local" and not buffer.mask} - program.tainted
    _, used = needed_for(program, [program.product.state, taps], stop)
    places, size = {}, 0
    for b in sorted(used & stop):
        places[b] = size
        size += program.buffers[b].size
    return places, size


def _accumulate(name: str, product: Product, begin: int = 0) -> str:
    """The function that adds up what a product has handed out at several points."""
    taps, layout, _ = product.layout(begin)
    lines = []
    for s, (a, b, result) in zip(product.sums, layout, strict=True):
        rows = s.a.shape[1]
        for k in range(s.a.shape[0]):
            if s.b is None:
                lines.append(f"    column_sums<{rows}, steps, {a + k * rows}>(team, taps, weight, sums + {result});")
            else:
                columns = s.b.shape[1]
                places = f"{a + k * rows}, {b + k * columns}"
                lines.append(f"    outer_sums<{rows}, {columns}, steps, {places}>(team, taps, weight, sums + {result});")
    if count := len(product.arguments):
        lines.append(f"    lane_sums<{count}, steps, {len(taps) - count}>(taps, weight, arguments);")
    body = "\n".join(lines)
    return (
        "\n  template <int steps, class Team, class P, int N, class T>\n"
        f"  ODENET_HD static void {name}(const Team& team, const P (*taps)[N], const P* weight, T* sums,\n"
        "                                   P* arguments) {\n"
        f"    (void)team, (void)taps, (void)weight, (void)sums, (void)arguments;\n{body}\n  }}\n"
    )


def _table(name: str, arguments: str, entries: list[tuple[str, float]]) -> str:
    lines = [f"    if ({condition}) return {value!r};" for condition, value in entries if value != 0]
    return f"  ODENET_HD static constexpr double {name}({arguments}) {{\n" + "\n".join(lines) + "\n    return 0;\n  }\n"


def _method(tableau: Method) -> str:
    s = tableau.stages
    step = rosenbrock_of(tableau)
    if isinstance(tableau, ButcherTableau):
        a = _triangle(tableau.a)
        family = "  static constexpr bool implicit = false;\n"
    else:  # beside the slopes of its stages stand those at both ends
        assert step is not None
        a = _triangle(((), *[(0.0, *row) for row in step.a]))
        family = (
            f"  static constexpr bool implicit = true, ends_in_y1 = {'true' if step.ends_in_y1 else 'false'};\n"
            f"  static constexpr double gamma = {step.gamma!r};\n"
            + _table("g", "int i, int j", _triangle(((), *[(0.0, *row) for row in step.g])))
            + _table("d", "int i", [(f"i == {i}", weight) for i, weight in enumerate(step.d, 1)])
        )
    p = [(f"j == {j} && d == {d}", tableau.p[j][d]) for j in range(s) for d in range(len(tableau.p[0]))]
    one = {name: [(f"j == {j}", values[j]) for j in range(s)] for name, values in (("b", tableau.b), ("c", tableau.c))}
    one["e"] = [(f"j == {j}", tableau.e[j]) for j in range(s)] if tableau.e else []
    return (
        f"  static constexpr int stages = {s}, degree = {len(tableau.p[0])};\n"
        f"  static constexpr bool fsal = {'true' if tableau.fsal else 'false'};\n"
        + family
        + _table("a", "int i, int j", a)
        + "".join(_table(name, "int j", entries) for name, entries in one.items())
        + _table("p", "int j, int d", p)
    )


def _triangle(rows: Sequence[Sequence[float]]) -> list[tuple[str, float]]:
    return [(f"i == {i} && j == {j}", weight) for i, row in enumerate(rows) for j, weight in enumerate(row)]


def emit(
    program: Program,
    tableau: Method,
    leaf_sizes: list[int],
    title: str,
    target: Target,
    kept: tuple[dict[int, int], int],
    more: Sequence[Function] = (),
    members: str = NO_EVENTS,
) -> str:
    """The text of one library. kept: see `kept_buffers`; empty: the way back computes the field again. more, members: what the
    equation has besides, see event_plan.py. Raises TooLarge."""
    backward = target.solve not in ("per_sample", "joint", "grid")
    state, arguments = sum(leaf_sizes), len(program.product.arguments)
    taps, _, behind = program.product.layout()
    ends = [(f"i == {i}", float(end)) for i, end in enumerate(np.cumsum(leaf_sizes).tolist())]
    leaf_end = "".join(f"    if ({condition}) return {int(value)};\n" for condition, value in ends)
    implicit = isinstance(tableau, StepFunction)
    functions, memory = functions_for(program, target.solve, kept[0], target.team, implicit)
    functions = [*functions, *more]
    timed = any(re.search(r"\bt\b", function.text.text) for function in functions)
    bodies = "".join([_body(function, target.team is not None and target.team.groups > 1) for function in functions])
    if backward:
        bodies += _accumulate("accumulate", program.product)
    second = 0
    if backward and implicit:
        assert program.second is not None
        second = len(program.second.layout()[0])
        bodies += _accumulate("accumulate_second", program.second, behind)
    return (
        f"// {title}\n"
        + (memory.defines() if memory is not None else "#define ODENET_ONE_LANE\n" if target.lanes == "one" else "")
        + f'#include "core/{"backward" if backward else "driver"}.h"\n#include "core/layers.h"\n#include "core/lookup.h"\n'
        + ('#include "core/run.h"\n\n' if target.team else "\n")
        + "namespace odenet {\nnamespace ODENET_LEVEL {\n\n"
        "struct Equation {\n"
        f"  static constexpr int state = {state}, parts = 1, arguments = {arguments}, leaves = {len(leaf_sizes)}, taps = 0;\n"
        f"  static constexpr int taps_of_product = {len(taps)}, taps_of_second = {second}, kept = {kept[1]};\n"
        f"  static constexpr bool timed = {'true' if timed else 'false'};\n"
        f"  static constexpr bool by_time = {'true' if len(program.time_product) else 'false'};\n"
        f"  ODENET_HD static constexpr int leaf_end(int i) {{\n{leaf_end}    return 0;\n  }}\n"
        f"{members}{_method(tableau)}{bodies}}};\n\n"
        "}  // namespace ODENET_LEVEL\n\n"
        + (_entry(target) if memory is None else _kernel(target, memory, program))
        + "\n}  // namespace odenet\n"
    )


def _body(function: Function, shared: bool) -> str:
    """shared: y and g come as what a thread has of its own, and the text shares them."""
    head, names = function.head, ["in", "t", "y", "arguments", "g", "v", "rate", "kept", "taps"]
    if shared:
        head = head.replace("P* y", "P* own_y").replace("P* g,", "P* own_g,")
        names = ["own_" + name if name in "yg" else name for name in names]
    unused = ", ".join(f"(void){name}" for name in names if re.search(rf"[&* ]{name}\b", head))
    return (
        f"\n  template <class P>\n  {function.text.linkage} static void {function.name}({head}) {{\n"
        f"    using T = Number<P>;\n    {unused};\n{function.text.text}\n  }}\n"
    )


def _types(target: Target) -> tuple[str, str, str]:
    """Of a pack, of what is solved, and of its control."""
    pack = target.dtype if target.lanes == "one" or target.team else f"Pack<{target.dtype}, kWidth<{target.dtype}>>"
    equation = "Adjoint<Equation>" if target.solve.startswith("adjoint") else "Equation"
    control = {"per_sample": "kPerSample", "joint": "kJoint", "grid": "kGrid"}.get(target.solve.removeprefix("adjoint_"), "")
    return pack, equation, control


def _sizes(target: Target) -> str:
    pack, equation, control = _types(target)
    name = "Reverse" if target.solve == "reverse" else "Samples" if control == "kPerSample" else "Kept"
    return (
        'extern "C" ODENET_EXPORT void odenet_sizes(int64_t* sizes) {\n'
        f"  sizes[0] = Lanes<{pack}>::width;\n  sizes[1] = sizeof({name}<{equation}, {pack}>);\n"
        f"  sizes[2] = sizeof(Record<{equation}, {pack}>);\n"
        f"  sizes[3] = {'kTeam' if target.team else '1'};\n  sizes[4] = kGroups;\n}}\n"
    )


def _entry(target: Target) -> str:
    pack, equation, control = _types(target)
    run = f"reverse<Equation, {pack}>" if target.solve == "reverse" else f"solve<{equation}, {pack}, {control}>"
    return (
        f"{_sizes(target)}"
        'extern "C" ODENET_EXPORT int64_t odenet_run(const SolveCall* in, ParallelFor parallel_for) {\n'
        f"  return {run}(*in, parallel_for);\n}}\n"
    )


def _kernel(target: Target, memory: Memory, program: Program) -> str:
    pack, equation, control = _types(target)
    if target.solve == "reverse":
        call = f"for_block(in, [&](int64_t place) {{ return reverse_place<Equation, {pack}>(Block{{}}, in, place); }})"
    else:
        call = f"solve_block<{equation}, {pack}, {control}>(in, reinterpret_cast<unsigned*>(left + 1))"
    sizes = f"Block::size, {memory.bytes}"
    together = control == "kJoint"  # blocks wait for each other
    tiles = "places" if target.solve == "reverse" else "batch"
    return (
        "// A lane a sample, a block a chunk of them. left: rows, or steps, that are not done, and behind it meetings.\n"
        f"__global__ void __launch_bounds__(Block::size{', 2' * memory.team.fits_twice(memory.bytes)})\n"
        "    odenet_kernel(const __grid_constant__ SolveCall in, unsigned long long* left) {\n"
        f"{memory.stage(program, pack)}"
        f"  const int64_t rest = {call};\n"
        "  if (rest > 0) atomicAdd(left, static_cast<unsigned long long>(rest));\n}\n"
        f"{_sizes(target)}"
        'extern "C" ODENET_EXPORT const char* odenet_launch(const SolveCall* in, unsigned long long* left,\n'
        "                                                   void* stream) {\n"
        f"  const unsigned blocks = blocks_of(*in, in->{tiles});\n"
        f"  return cuda::run{'_together' * together}<{sizes}>(odenet_kernel, blocks, stream, *in, left);\n}}\n"
        'extern "C" ODENET_EXPORT const char* odenet_resident(int64_t* blocks) {\n'
        f"  return cuda::resident<{sizes}>(odenet_kernel, blocks);\n}}\n"
    )
