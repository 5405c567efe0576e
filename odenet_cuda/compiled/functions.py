"""The functions of a field that a kind of solve needs, written for packs of lanes or for the team of a block."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .function_text import FunctionText
from .program import Program, Refs
from .team_text import AloneText, Memory, TeamText
from .teams import Team

Results = list[tuple[str, Refs]]  # the names of arrays to write, and the addresses of what goes there
Writer = Callable[..., FunctionText]  # of results, what is kept, and whether that is given


class TooLarge(Exception):
    """The rows of a function do not fit into the team's memory."""


@dataclass
class Function:
    name: str
    head: str  # its parameters
    text: FunctionText


def functions_for(
    program: Program, solve: str, kept: dict[int, int], team: Team | None, implicit: bool = False
) -> tuple[list[Function], Memory | None]:
    """For one of emit.SOLVES. implicit: the method needs rows of df/dy. Raises TooLarge."""
    if team is None:
        return _functions(program, solve, kept, lambda *args: FunctionText(program, *args), implicit), None
    if implicit and team.groups > 1:
        raise TooLarge("a thread solves the systems of a sample")
    scratch = max(0 if solve in ("per_sample", "joint", "grid") else team.slabs, team.sums if solve.endswith("joint") else 0)
    scratch = max(scratch, team.lanes)  # bytes in which they are dealt samples
    if team.groups == 1:
        memory = Memory(team, bytes=scratch)
        return _functions(program, solve, kept, lambda *args: AloneText(memory, program, *args), implicit), memory
    memory = Memory(team)
    texts: list[TeamText] = []

    def write(results: Results, *_: Any) -> TeamText:
        texts.append(TeamText(program, results, memory))
        return texts[-1]

    functions = _functions(program, solve, kept, write)
    rows = max(text.height for text in texts)
    memory.bytes = max(team.row * team.item * max(rows, team.groups), scratch)
    if memory.bytes > team.memory:
        raise TooLarge(f"{memory.bytes} bytes of a block's memory are needed, and {team.memory} are there")
    if memory.stage_all(program, [layer for text in texts for layer in text.layers]):
        functions = _functions(program, solve, kept, write)
    return functions, memory


def _functions(program: Program, solve: str, kept: dict[int, int], write: Writer, implicit: bool = False) -> list[Function]:
    head = "const SolveCall& in, const P& t, const P* y, const P* arguments"
    slope, gradient = [("dy", program.slopes)], [("gy", program.product.state), ("taps", program.product.layout()[0])]
    functions = [Function("field", f"{head}, P* dy, P*", write(slope))]
    if implicit:
        results = [*gradient[:1], ("gt", program.time_product)]
        functions.append(
            Function("row", f"{head}, const P* g, P* gy, P*" + " gt" * bool(len(program.time_product)), write(results))
        )
    if solve == "reverse":
        functions.append(Function("product", f"{head}, const P* g, P* gy, P* taps", write(gradient)))
    if solve == "reverse" and implicit:
        second = program.second
        assert second is not None
        results = [("gy", second.state), ("taps", second.layout()[0])]
        functions.append(Function("second", f"{head}, const P* g, const P* v, const P& rate, P* gy, P* taps", write(results)))
    elif solve == "reverse":
        functions += [
            Function("field_and_keep", f"{head}, P* dy, P* kept", write(slope, kept)),
            Function("product_of_kept", f"{head}, const P* g, const P* kept, P* gy, P* taps", write(gradient, kept, True)),
        ]
    elif solve.startswith("adjoint"):
        text = write([*slope, *gradient])
        functions.append(Function("slope_and_product", f"{head}, const P* g, P* dy, P* gy, P* taps", text))
    return functions
