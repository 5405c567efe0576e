"""Pointwise torch operations as C++ over packs. {0}, {1}, ... stand for operands of type P, or masks where torch has bool."""

from typing import Any

import torch

_aten = torch.ops.aten

# name of the overload packet -> text, for tensors and numbers alike
TEXTS: dict[str, str] = {
    "neg": "-{0}",
    "reciprocal": "P(T(1)) / {0}",
    "sqrt": "sqrt({0})",
    "rsqrt": "P(T(1)) / sqrt({0})",
    "exp": "exp({0})",
    "exp2": "exp2({0})",
    "expm1": "expm1({0})",
    "log": "log({0})",
    "log2": "log2({0})",
    "log10": "log10({0})",
    "log1p": "log1p({0})",
    "sin": "sin({0})",
    "cos": "cos({0})",
    "tan": "tan({0})",
    "asin": "asin({0})",
    "acos": "acos({0})",
    "atan": "atan({0})",
    "atan2": "atan2({0}, {1})",
    "hypot": "hypotenuse({0}, {1})",
    "sinh": "sinh({0})",
    "cosh": "cosh({0})",
    "tanh": "tanh({0})",
    "asinh": "asinh({0})",
    "acosh": "acosh({0})",
    "atanh": "atanh({0})",
    "erf": "erf({0})",
    "erfc": "erfc({0})",
    "floor": "floor({0})",
    "ceil": "ceil({0})",
    "trunc": "select({0} < P(T(0)), ceil({0}), floor({0}))",
    "sigmoid": "sigmoid({0})",
    "relu": "select(({0} > P(T(0))) | ({0} != {0}), {0}, P(T(0)))",
    "abs": "abs({0})",
    "sign": "select({0} > P(T(0)), P(T(1)), select({0} < P(T(0)), P(T(-1)), P(T(0))))",
    "square": "{0} * {0}",
    "mul": "{0} * {1}",
    "fmod": "fmod({0}, {1})",
    "remainder": "modulo({0}, {1})",
    "floor_divide": "floor_divide({0}, {1})",
    "maximum": "maximum({0}, {1})",
    "minimum": "minimum({0}, {1})",
    "fmax": "select(({0} >= {1}) | ({1} != {1}), {0}, {1})",  # what is a number, where one is not
    "fmin": "select(({0} <= {1}) | ({1} != {1}), {0}, {1})",
    "clamp_min": "maximum({0}, {1})",
    "clamp_max": "minimum({0}, {1})",
    "where": "select({0}, {1}, {2})",
    "hardshrink_backward": "select(({1} >= -{2}) & ({1} <= {2}), P(T(0)), {0})",
    "softshrink_backward": "select(({1} >= -{2}) & ({1} <= {2}), P(T(0)), {0})",
}
TEXTS["sgn"] = TEXTS["sign"]

MASKS: dict[str, str] = {
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "isnan": "{0} != {0}",
    "isinf": "abs({0}) == P(T(INFINITY))",
    "logical_and": "{0} & {1}",
    "logical_or": "{0} | {1}",
    "logical_xor": "({0} | {1}) & negate({0} & {1})",
    "logical_not": "negate({0})",
    "bitwise_and": "{0} & {1}",
    "bitwise_or": "{0} | {1}",
    "bitwise_xor": "({0} | {1}) & negate({0} & {1})",
    "bitwise_not": "negate({0})",
}
OF_MASKS = {name for name in MASKS if name.startswith(("logical_", "bitwise_"))}


def packet(target: Any) -> str:
    """The name of an operation without its overload: "mul" of aten.mul.Tensor."""
    return str(target.overloadpacket).removeprefix("aten.") if hasattr(target, "overloadpacket") else str(target)


def power(exponent: float) -> str:
    """x to a number, by multiplication where torch multiplies."""
    known = {0.0: "P(T(1))", 0.5: "sqrt({0})", 1.0: "{0}", 2.0: "{0} * {0}", 3.0: "{0} * {0} * {0}"}
    known |= {-0.5: "P(T(1)) / sqrt({0})", -1.0: "P(T(1)) / {0}", -2.0: "P(T(1)) / ({0} * {0})"}
    return known.get(float(exponent), "pow({0}, {1})")
