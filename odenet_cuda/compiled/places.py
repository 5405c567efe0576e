"""How the addresses of numbers go on, from one turn of a loop to the next: what is regular is one loop, however long."""

from itertools import pairwise

import numpy as np

from .program import Program, Refs, split

_MOST_DIGITS = 4
_FEW = 4  # loops that are written one after the other, where each turn goes as far; more become one that counts in digits


def digits(places: np.ndarray) -> list[tuple[int, int, int]] | None:
    """places[i] - places[0] as a sum over digits of i: of each its step, what i is divided by for it, and how many values it
    has. None where there are no such digits."""
    found: list[tuple[int, int, int]] = []
    divisor = 1
    while len(places) > 1:
        if len(found) == _MOST_DIGITS:
            return None
        step = int(places[1] - places[0])
        others = np.flatnonzero(np.diff(places) != step)
        run = int(others[0]) + 1 if len(others) else len(places)
        if len(places) % run:
            return None
        rows = places.reshape(-1, run)
        if (rows != rows[:, :1] + step * np.arange(run)).any():
            return None
        found.append((step, divisor, run))
        divisor, places = divisor * run, rows[:, 0]
    return found


def index_text(places: np.ndarray, variable: str, base: int = 0) -> str | None:
    """places[variable] as an expression. base: what is added."""
    found = digits(places)
    if found is None:
        return None
    base, terms = base + int(places[0]), []
    for step, divisor, count in found:
        digit = variable if divisor == 1 else f"{variable} / {divisor}"
        digit = digit if divisor * count == len(places) else f"{digit} % {count}"
        if step != 0:
            terms.append(digit if step == 1 and digit == variable else f"({digit})" if step == 1 else f"{step} * ({digit})")
    terms = [term.replace(f"({variable})", variable) for term in terms]
    return " + ".join([*([str(base)] if base or not terms else []), *terms])


def grid_text(program: Program, refs: Refs) -> tuple[int, str, int] | None:
    """refs[i, j] as a buffer and an expression of i and j, and where the first lies; None where there is none."""
    buffers, places = split(refs)
    buffer, begin = int(buffers[0, 0]), int(places[0, 0])
    varied = program.buffers[buffer].kind == "literal" and (places != begin).any()
    if (buffers != buffer).any() or varied:
        return None
    row, column = places[:, 0], places[0] - places[0, 0]
    if (places != row[:, None] + column).any():
        return None
    first, other = index_text(row, "i"), index_text(column, "j")
    if first is None or other is None:
        return None
    return buffer, " + ".join([x for x in (first, other) if x != "0"]) or "0", begin


def segments(program: Program, operands: list[Refs]) -> list[tuple[int, int]]:
    """Ranges in which every operand lies in one buffer, at even distances or such as `index_text` writes."""
    breaks = {0, len(operands[0])}
    for refs in operands if len(operands[0]) else ():
        for start, end in _pieces(refs):
            breaks |= {start, *_inside(program, refs, start, end)}
    return list(pairwise(sorted(breaks)))


def _pieces(refs: Refs) -> list[tuple[int, int]]:
    """Of one buffer each."""
    edges = np.flatnonzero(np.diff(split(refs)[0])) + 1
    return list(pairwise([0, *edges.tolist(), len(refs)]))


def _inside(program: Program, refs: Refs, start: int, end: int) -> list[int]:
    """Where a piece is to be divided."""
    places = split(refs[start:end])[1]
    literal = program.buffers[int(refs[start]) >> 32].kind == "literal"
    found, begin = list[int](), 0
    while begin < len(places):
        step = 0 if literal else int(places[begin + 1] - places[begin]) if begin + 1 < len(places) else 0
        others = np.flatnonzero(np.diff(places[begin:]) != step)
        begin = begin + int(others[0]) + 1 if len(others) else len(places)
        found.append(start + begin)
    return [] if not literal and len(found) > _FEW and digits(places) is not None else found


def place_in_loop(refs: Refs, start: int, end: int, variable: str) -> str:
    """The place of refs[variable] in its buffer, in one of the `segments`."""
    places = split(refs[start:end])[1]
    if len(places) < 3 or (np.diff(places) == places[1] - places[0]).all():
        step = int(places[1] - places[0]) if len(places) > 1 else 0
        return index_text(np.array([0, step, 2 * step]), variable, int(places[0]) - step * start) or "0"
    first, last = next(piece for piece in _pieces(refs) if piece[0] <= start < piece[1])
    return index_text(split(refs[first:last])[1], f"({variable} - {first})" if first else variable) or "0"
