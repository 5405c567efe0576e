"""Sums of products in one operation. Nothing is contracted by the compiler, see core/vector.h: the text says what is."""

from .program import Pointwise, Statement

PRODUCT, _SUM, _DIFFERENCE = "{0} * {1}", "{0} + {1}", "{0} - {1}"


def is_added(readers: list[Statement], out: int) -> bool:
    """Whether all that reads this buffer is one sum, once."""
    if len(readers) != 1 or not isinstance(readers[0], Pointwise) or readers[0].text not in (_SUM, _DIFFERENCE):
        return False
    return sum(int(refs[0]) >> 32 == out for refs in readers[0].operands) == 1


def fused_text(text: str, operands: list[str], factors: dict[str, list[str]]) -> str:
    """A sum with products in it, whose factors are given by name. Empty where it is none."""
    if text not in (_SUM, _DIFFERENCE):
        return ""
    (x, y), minus = operands, "-" if text == _DIFFERENCE else ""
    if x in factors:
        rest = PRODUCT.format(*factors[y]) if y in factors else y
        return f"fused({', '.join(factors[x])}, {f'-({rest})' if minus else rest})"
    return f"fused({minus}{factors[y][0]}, {factors[y][1]}, {x})" if y in factors else ""
