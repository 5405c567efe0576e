"""The fields of a program, found in its text, and what in them speaks against compiling: what `migrate` says of them."""

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .callbacks import CALLBACKS

_TIMES = {"t", "_t", "time", "s", "tau"}  # first arguments that tell a field from another module
_SHAPES = {"shape", "dtype", "device", "ndim", "requires_grad"}
_SIZES = {"size", "dim", "numel", "is_floating_point"}
_TO_PYTHON = {"item", "tolist", "numpy"}
_RANDOM = {"rand", "randn", "randint", "rand_like", "randn_like", "normal", "bernoulli", "dropout", "multinomial"}
_LAYERS = {
    "Dropout": "dropout draws random numbers while training",
    "BatchNorm": "batch norm mixes samples while training",
    "Conv": "convolutions are compiled over very small pictures alone",
}


@dataclass
class Candidate:
    """What is, or may be, a field. sure: a solve is given it. obstacles: to compiling it, with their lines; none where it looks
    readable."""

    name: str
    line: int
    sure: bool
    obstacles: list[str] = field(default_factory=list)


def fields_of(tree: ast.Module, given: Sequence[ast.expr], events: Sequence[ast.expr] = ()) -> list[Candidate]:
    """given: what solves are given as func, events: as event_fn. A class whose forward begins with a time may be a field too,
    unless another of them is made of it."""
    classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    made: dict[str, str] = dict(_assigned(tree, classes))
    sure, not_one = ({made.get(_name(node), _name(node)) for node in nodes} for nodes in (given, events))
    perhaps = {name for name, node in classes.items() if _begins_with_time(node)} - not_one
    for name in perhaps | (sure & classes.keys()):
        not_one |= {_name(part.func) for part in ast.walk(classes[name]) if isinstance(part, ast.Call)}
    chosen = [classes[name] for name in classes if name in sure or name in perhaps - not_one]
    found = [Candidate(node.name, node.lineno, node.name in sure, _of_class(node, classes)) for node in chosen]
    for name in functions.keys() & sure:
        found.append(Candidate(name, functions[name].lineno, True, list(_of_function(functions[name], 0))))
    return sorted(found, key=lambda candidate: candidate.line)


def _name(node: ast.expr) -> str:
    """Of a variable, or of an attribute of self."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _assigned(tree: ast.Module, classes: dict[str, ast.ClassDef]) -> Iterator[tuple[str, str]]:
    """(variable or attribute, class of this program) wherever an object of it, or a call of its, is assigned."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            calls = [part for part in ast.walk(node.value) if isinstance(part, ast.Call)]
            kinds = [name for call in calls if (name := _name(call.func)) in classes]
            for target in node.targets:
                if kinds and _name(target):
                    yield _name(target), kinds[0]


def _method(node: ast.ClassDef, name: str) -> ast.FunctionDef | None:
    return next((part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == name), None)


def _begins_with_time(node: ast.ClassDef) -> bool:
    method = _method(node, "forward")
    names = [] if method is None else [argument.arg for argument in method.args.args[1:]]
    return len(names) >= 2 and names[0] in _TIMES


def _of_class(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> list[str]:
    """The obstacles in a class, and in those of this program that it is made of."""
    found, waiting, seen = [], [node], {node.name}
    while waiting:
        owner = waiting.pop()
        for name in CALLBACKS:
            if _method(owner, name) is not None:
                found.append(f"its {name} is served by the stepper alone")
        for part in ast.walk(owner):
            called = _name(part.func) if isinstance(part, ast.Call) else ""
            layer = part.attr if isinstance(part, ast.Attribute) else called
            words = next((words for kind, words in _LAYERS.items() if layer.startswith(kind)), "")
            if words:
                found.append(f"{words} (line {getattr(part, 'lineno', owner.lineno)})")
            if called in classes and called not in seen:
                seen.add(called)
                waiting.append(classes[called])
        for method in owner.body:
            if isinstance(method, ast.FunctionDef) and not method.name.startswith("__") and method.name not in CALLBACKS:
                found += _of_function(method, 1)
    return list(dict.fromkeys(found))


def _of_function(function: ast.FunctionDef, skip: int) -> Iterator[str]:
    """skip: arguments that are no tensors, self."""
    values = {argument.arg for argument in function.args.args[skip:]}
    for node in ast.walk(function):  # names that are computed from the arguments
        if isinstance(node, ast.Assign) and _reads(node.value, values):
            values |= {part.id for target in node.targets for part in _parts(target) if isinstance(part, ast.Name)}
    asked = [node for node in ast.walk(function) if isinstance(node, ast.If) and _asks_once(node.test)]
    once = {id(part) for node in asked for part in ast.walk(node)}
    for node in ast.walk(function):
        if id(node) not in once:
            words = _obstacle(node, values)
            if words:
                yield f"{words} (line {getattr(node, 'lineno', function.lineno)})"


def _parts(target: ast.expr) -> list[ast.expr]:
    return [x for part in target.elts for x in _parts(part)] if isinstance(target, (ast.Tuple, ast.List)) else [target]


def _asks_once(test: ast.expr) -> bool:
    """``if self.noise is None``: done at the first call."""
    return any(isinstance(part, ast.Constant) and part.value is None for part in ast.walk(test)) or (
        isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)
    )


def _obstacle(node: ast.AST, values: set[str]) -> str:
    if isinstance(node, (ast.If, ast.While, ast.IfExp)) and _reads(node.test, values) and not _asks_once(node.test):
        return "branches on a value of the time or the state: use torch.where"
    if isinstance(node, ast.Assign):
        kept = [part.attr for part in node.targets if isinstance(part, ast.Attribute) and _name(part.value) == "self"]
        return f"keeps {kept[0]!r}: drop that, or compile(func, pure=True)" if kept else ""
    if not isinstance(node, ast.Call):
        return ""
    called = _name(node.func)
    if isinstance(node.func, ast.Name):
        if called in ("float", "int", "bool") and any(_reads(part, values) for part in node.args):
            return f"{called}() takes a value of the time or the state into Python"
        return "prints" if called == "print" else ""
    if called in _TO_PYTHON and isinstance(node.func, ast.Attribute) and _reads(node.func.value, values):
        return f".{called}() takes a value of the time or the state into Python"
    return "draws random numbers: make them at the first call, or hand them over" if called in _RANDOM else ""


def _reads(node: ast.AST, values: set[str]) -> bool:
    """Whether an expression depends on more of these than their shape and type."""
    if isinstance(node, ast.Attribute) and node.attr in _SHAPES:
        return False
    if isinstance(node, ast.Call) and (_name(node.func) in _SIZES or _name(node.func) in ("len", "isinstance", "hasattr")):
        return False
    if isinstance(node, ast.Name):
        return node.id in values
    return any(_reads(part, values) for part in ast.iter_child_nodes(node))
