"""What the code of a function names: globals, attributes, modules that it imports, and names that it only counts with."""

import dis
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from types import CodeType

# Between a load of a name and a store into it, these leave no other trace of what was loaded: name = name + something.
_COUNTING = {
    "LOAD_CONST", "LOAD_SMALL_INT", "LOAD_DEREF", "BINARY_OP", "INPLACE_ADD", "INPLACE_SUBTRACT", "BINARY_ADD", "SWAP", "COPY",
    "ROT_TWO", "PUSH_NULL", "NOP",
}  # fmt: skip
_STORES = {"STORE_ATTR", "STORE_GLOBAL", "STORE_NAME", "STORE_DEREF"}  # a local variable is no counter
_LONGEST = 6  # instructions between the two
_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")  # as attrgetter takes them
_FIELD = re.compile(r"\{[^{}]*\}")  # of a string for str.format


@dataclass
class Names:
    """globals: that the code loads; opaque: those besides the callee of a call with a literal for its second argument, as
    getattr(x, "name"). written: globals that it stores. attributes: of anything, with strings that may name one. read: names
    whose value goes elsewhere than back into the name. stored: attributes, globals and variables of closures. modules: imported
    inside, each with the dots before it and what is taken from it. identical: what is compared by `is`, but with constants: the
    names of both, "" where there is none."""

    globals: set[str] = field(default_factory=set)
    written: set[str] = field(default_factory=set)
    attributes: set[str] = field(default_factory=set)
    read: set[str] = field(default_factory=set)
    stored: set[str] = field(default_factory=set)
    modules: set[tuple[int, str, tuple[str, ...]]] = field(default_factory=set)
    identical: set[tuple[str, str]] = field(default_factory=set)
    opaque: set[str] = field(default_factory=set)


@lru_cache(maxsize=4096)
def names_of(code: CodeType) -> Names:
    """Those of a code object and of all within it."""
    names = Names()
    instructions = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "EXTENDED_ARG", "PRECALL", "RESUME")]
    for place, instruction in enumerate(instructions):
        name, value = instruction.opname, instruction.argval
        rest = instructions[place:]
        if name in ("LOAD_GLOBAL", "LOAD_NAME"):
            names.globals.add(value)
            names.opaque |= set() if _takes_literal(rest) else {value}
        elif name in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "IMPORT_FROM", "STORE_ATTR", "DELETE_ATTR"):
            names.attributes.add(value)
        elif name == "IMPORT_NAME":
            level, taken = instructions[place - 2].argval, instructions[place - 1].argval
            names.modules.add((level, value, tuple(taken or ())))
        elif name == "LOAD_CONST":
            found = set(_names_in(value))
            names.attributes |= found
            names.read |= found
        elif name == "IS_OP":
            names.identical |= _compared(instructions[:place])
        elif name == "MATCH_CLASS" and instruction.arg:
            names.attributes.add("__match_args__")
        elif value == "__class__" and not (len(rest) > 2 and rest[2].opname.startswith("LOAD_SUPER")):
            names.attributes.add("__class__")
        if value in ("is_", "is_not"):  # of operator
            names.identical.add(("", ""))
        if name in _STORES and isinstance(value, str):
            names.stored.add(value)
            if name in ("STORE_GLOBAL", "STORE_NAME"):
                names.written.add(value)
        elif name.startswith("LOAD_") and not name.startswith(("LOAD_FAST", "LOAD_CONST")) and isinstance(value, str):
            names.read |= set() if _counts(rest[: _LONGEST + 2]) else {value}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner = names_of(constant)
            for what in vars(names):
                getattr(names, what).update(getattr(inner, what))
    return names


def _counts(instructions: list[dis.Instruction]) -> bool:
    """Whether what the first loads goes back, changed or not, into the same name alone."""
    kind = instructions[0].opname.split("_")[1]  # GLOBAL, ATTR, DEREF
    combined = False
    for instruction in instructions[1:]:
        name = instruction.opname
        if name == f"STORE_{kind}" and instruction.argval == instructions[0].argval:
            return combined
        combined = combined or name.startswith(("BINARY", "INPLACE"))
        if name not in _COUNTING and not name.startswith("LOAD_FAST"):
            return False
    return False


def _compared(instructions: list[dis.Instruction]) -> set[tuple[str, str]]:
    """The names of the two that these have loaded last, unless one is a class, or a constant that is no number."""
    rest, found = list(instructions), ["", ""]
    for i in range(2):
        last = rest.pop() if rest else None
        if last is None or not last.opname.startswith("LOAD_"):
            break
        if last.argval == "__class__" or (last.opname == "LOAD_CONST" and type(last.argval) not in (int, float)):
            return set()
        found[i] = last.argval if last.opname in ("LOAD_ATTR", "LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF") else ""
        while last.opname == "LOAD_ATTR" and rest:
            last = rest.pop()
        if not last.opname.startswith("LOAD_") or (last.opname.startswith("LOAD_FAST_") and last.opname.endswith("FAST")):
            break
    return {(found[0], found[1])}


def _names_in(constant: object) -> Iterator[str]:
    """The names that a string may give to getattr, attrgetter, str.format or a pattern of match."""
    if isinstance(constant, (tuple, frozenset)):
        for part in constant:
            yield from _names_in(part)
    elif isinstance(constant, str):
        if _NAME.fullmatch(constant):
            yield from constant.split(".")
        for part in _FIELD.findall(constant):
            yield from re.findall(r"\w+", part)


def _takes_literal(instructions: list[dis.Instruction]) -> bool:
    """Whether what the first loads is called at once, with a string that stands in the code for its second argument."""
    depth, literal = 0, False
    for instruction in instructions[1:]:
        name, before = instruction.opname, depth
        if name == "PUSH_NULL" and depth == 0:
            continue
        if name in ("CALL", "CALL_FUNCTION", "CALL_METHOD") and instruction.arg == depth:
            return literal
        if instruction.opcode in dis.hasjrel or instruction.opcode in dis.hasjabs:
            return False
        if name == "CALL":
            depth -= (instruction.arg or 0) + 1  # of 3.11 the rest of what it takes goes by PRECALL, which is left out
        else:
            depth += dis.stack_effect(instruction.opcode, instruction.arg if instruction.opcode >= dis.HAVE_ARGUMENT else None)
        if depth < 1:
            return False
        if depth == 2:  # the second argument begins, or is changed
            literal = before == 1 and name == "LOAD_CONST" and isinstance(instruction.argval, str)
    return False
