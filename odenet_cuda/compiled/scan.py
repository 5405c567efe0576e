"""What the code of a function names: globals, attributes, modules that it imports, and names that it only counts with."""

import dis
import sys
from dataclasses import dataclass, field
from functools import lru_cache
from types import CodeType

# Between a load of a name and a store into it, these leave no other trace of what was loaded: name = name + something.
_COUNTING = {
    "LOAD_CONST", "LOAD_SMALL_INT", "LOAD_DEREF", "BINARY_OP", "INPLACE_ADD", "INPLACE_SUBTRACT", "BINARY_ADD", "SWAP", "COPY",
    "ROT_TWO", "PUSH_NULL", "NOP",
}  # fmt: skip
_LONGEST = 6  # instructions between the two
LIBRARIES = frozenset(sys.stdlib_module_names) | {
    "torch",
    "numpy",
    "functorch",
    "torchgen",
    "odenet_cuda",
    "sympy",
    "opt_einsum",
}


@dataclass
class Names:
    """globals: that the code loads; written: that it stores. attributes: of anything, with strings that may name one.
    read: names whose value goes elsewhere than back into the name. modules: imported inside."""

    globals: set[str] = field(default_factory=set)
    written: set[str] = field(default_factory=set)
    attributes: set[str] = field(default_factory=set)
    read: set[str] = field(default_factory=set)
    stored: set[str] = field(default_factory=set)
    modules: set[str] = field(default_factory=set)


@lru_cache(maxsize=4096)
def names_of(code: CodeType) -> Names:
    """Those of a code object and of all within it."""
    names = Names()
    instructions = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "EXTENDED_ARG", "PRECALL", "RESUME")]
    for place, instruction in enumerate(instructions):
        name, value = instruction.opname, instruction.argval
        if name in ("LOAD_GLOBAL", "LOAD_NAME"):
            names.globals.add(value)
        elif name in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "IMPORT_FROM", "STORE_ATTR", "DELETE_ATTR"):
            names.attributes.add(value)
        elif name == "IMPORT_NAME":
            names.modules.add(value)
        elif name == "LOAD_CONST" and isinstance(value, str) and value.isidentifier():
            names.attributes.add(value)
        if name.startswith("STORE_") and isinstance(value, str):
            names.stored.add(value)
            if name in ("STORE_GLOBAL", "STORE_NAME"):
                names.written.add(value)
        elif name.startswith("LOAD_") and not name.startswith("LOAD_FAST") and isinstance(value, str):
            names.read |= set() if _counts(instructions[place : place + _LONGEST + 2]) else {value}
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


def is_library(name: str | None) -> bool:
    """Whether a module of this name is the standard library's or torch's: its code is taken as it is."""
    return name is not None and name.split(".")[0] in LIBRARIES and name != "__main__"
