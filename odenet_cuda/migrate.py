"""``python -m odenet_cuda migrate FILE...``: what a program uses of torchdiffeq, and what becomes of it here.

The text is read, not run: what a program decides as it runs (a method in a variable, a field from elsewhere) is called open.
`Solution.explanation` and ``explain()`` say of a solve that ran what this can only suppose.
"""

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .methods import ADAPTIVE, ON_GRID
from .migrate_fields import Candidate, fields_of
from .odeint import known_options
from .tableau import ButcherTableau

FUNCTIONS = ("odeint", "odeint_adjoint", "odeint_dense", "odeint_event")
_PACKAGE = "torchdiffeq"
_FOR_COMPILED = 'set_compile("auto")'
_DIFFERS = {
    "gl4": "gl4 has order 4 here; torchdiffeq's has a wrong node, and order 1",
    "implicit_adams": "the corrector is held against rtol and atol; torchdiffeq takes rtol for both",
    "tsit5": "tsit5 has order 5 here; torchdiffeq's newest source advances with its weights of order 4",
    "dopri8": "the end value has order 8: the last step lands on it; torchdiffeq reads it from an interpolant of order 4",
}
_DIFFERS["fixed_adams"] = _DIFFERS["implicit_adams"]


@dataclass
class Use:
    """One place of a program. what: in words. engine: who serves it, "" where nobody does. notes: what differs, and why."""

    line: int
    what: str
    engine: str = ""
    notes: list[str] = field(default_factory=list)
    served: bool = True


@dataclass
class Report:
    """Of one file. imports: (line, as it is, as it could be)."""

    path: str
    imports: list[tuple[int, str, str]] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    fields: list[Candidate] = field(default_factory=list)

    @property
    def can_compile(self) -> bool:
        """Whether a line could make it faster."""
        return any("compiled" in use.engine for use in self.uses) and (
            not self.fields or any(not candidate.obstacles for candidate in self.fields)
        )

    def lines(self) -> Iterator[str]:
        yield self.path
        if not self.imports:
            yield "    imports nothing of torchdiffeq"
            return
        for line, old, new in self.imports:
            yield f"{line:8}  {old}"
            yield f"          -> {new or 'keep it: see below'}"
        for use in self.uses:
            yield f"{use.line:8}  {use.what}: {use.engine if use.served else 'NOT SERVED'}"
            yield from (f"          {note}" for note in use.notes)
        for candidate in self.fields:
            kind = "field" if candidate.sure else "perhaps a field,"
            state = "for the stepper" if candidate.obstacles else "looks readable"
            yield f"{candidate.line:8}  {kind} {candidate.name}: {state}"
            yield from (f"          {obstacle}" for obstacle in candidate.obstacles)
        if self.can_compile:
            yield f"          one line makes it faster, after the imports: import odenet_cuda; odenet_cuda.{_FOR_COMPILED}"
        elif any(use.served for use in self.uses):
            yield "          nothing to add: the stepper serves it with the import changed"
        elif self.uses:
            yield "          no call is served as it is"


class _Names(ast.NodeVisitor):
    """What names of a program stand for torchdiffeq and its functions."""

    def __init__(self) -> None:
        self.modules: set[str] = set()
        self.functions: dict[str, set[str]] = {}  # two imports, one in each branch, may give one name
        self.imports: list[tuple[int, str, str]] = []
        self.uses: list[Use] = []

    def visit_Import(self, node: ast.Import) -> None:
        ours = [alias for alias in node.names if alias.name.split(".")[0] == _PACKAGE]
        if ours:
            self.modules |= {alias.asname or _PACKAGE for alias in ours}
            others = [alias for alias in node.names if alias not in ours]
            new = [f"import odenet_cuda as {alias.asname or _PACKAGE}" for alias in ours]
            kept = [ast.unparse(ast.Import(others))] if others else []
            self.imports.append((node.lineno, ast.unparse(node), "; ".join([*kept, *new])))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        if module.split(".")[0] != _PACKAGE or node.level:
            return
        missing = []
        for alias in node.names:
            if alias.name == "*":
                self.functions.update({name: {name} for name in FUNCTIONS})
            elif alias.name in FUNCTIONS:
                self.functions.setdefault(alias.asname or alias.name, set()).add(alias.name)
            elif not _known(module, alias.name):
                missing.append(alias.name)
        text = ast.unparse(node)
        self.imports.append((node.lineno, text, "" if missing else text.replace(_PACKAGE, "odenet_cuda", 1)))
        self.uses += [_inner(node.lineno, f"{module}.{name}") for name in missing]

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """``torchdiffeq._impl.misc.name``, without an import of its own."""
        package, *parts, name = ast.unparse(node).split(".")
        if package in self.modules and parts[:1] == ["_impl"] and len(parts) > 1:
            module = ".".join([_PACKAGE, *parts])
            if not _known(module, name):
                self.uses.append(_inner(node.lineno, f"{module}.{name}"))
        else:
            self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        """``odeint = torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint``."""
        found = {name for part in _choices(node.value) for name in self.function(part)}
        for target in node.targets:
            if found and isinstance(target, ast.Name):
                self.functions.setdefault(target.id, set()).update(found)
        self.generic_visit(node)

    def function(self, node: ast.expr) -> set[str]:
        """The functions of torchdiffeq that this may be."""
        if isinstance(node, ast.Name):
            return self.functions.get(node.id, set())
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in self.modules:
            return {node.attr} & set(FUNCTIONS)
        return set()


def _inner(line: int, name: str) -> Use:
    return Use(line, name, "", ["an inner part of torchdiffeq: keep torchdiffeq itself for this import"], served=False)


def _choices(node: ast.expr) -> list[ast.expr]:
    return [*_choices(node.body), *_choices(node.orelse)] if isinstance(node, ast.IfExp) else [node]


def _known(module: str, name: str) -> bool:
    """Whether this package has that name of a module of torchdiffeq's too."""
    from . import _impl

    parts = module.split(".")[1:]
    if not parts:
        return name == "_impl"
    return name in (_impl._KNOWN.get(parts[-1], {}) if len(parts) > 1 else {**_impl._KNOWN, **dict.fromkeys(FUNCTIONS)})


def report(path: Path) -> Report:
    """Of the program in this file. Raises SyntaxError where it is no Python."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    names = _Names()
    names.visit(tree)
    found = Report(str(path), names.imports, names.uses)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in calls:
        functions = names.function(call.func)
        if functions:
            found.uses.append(_use(call, sorted(functions)))
    if found.imports:
        solves = [call for call in calls if names.function(call.func)]
        events = [keyword.value for call in solves for keyword in call.keywords if keyword.arg == "event_fn"]
        found.fields = fields_of(tree, [call.args[0] for call in solves if call.args], events)
    found.uses.sort(key=lambda use: use.line)
    return found


def _use(call: ast.Call, functions: Sequence[str]) -> Use:
    by_name = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
    use = Use(call.lineno, " or ".join(functions))
    stepper: list[str] = []
    if any(keyword.arg is None for keyword in call.keywords):
        use.notes.append("it is given **keywords, which are open here")
    methods = _literals(by_name.get("method"), "dopri5")
    use.what += f", method {' or '.join(methods)}" if methods else ", a method that is decided as it runs"
    for method in methods:
        use.notes += _of_method(use, method, stepper)
    if functions[0] in ("odeint_dense", "odeint_event") or "event_fn" in by_name:
        stepper.append("events" if functions[0] != "odeint_dense" else "an interpolant")
    _of_options(use, by_name.get("options"), methods, stepper)
    norm = _literal_dict(by_name.get("adjoint_options")).get("norm")
    if norm is not None and not isinstance(norm, ast.Constant):
        stepper.append("a norm of the adjoint")
    if use.served:
        use.engine = "the stepper"
        if stepper:
            use.notes.append("the stepper alone: " + ", ".join(dict.fromkeys(stepper)))
        else:
            use.engine = f"compiled with {_FOR_COMPILED} where the field can be read, else the stepper"
    if call.args and isinstance(call.args[0], ast.Lambda):
        use.notes.append("a lambda made at the call is read a few times, then left to the stepper: give it a name outside")
    return use


def _of_method(use: Use, method: str, stepper: list[str]) -> list[str]:
    tableau = ADAPTIVE.get(method) or ON_GRID.get(method)
    if tableau is None:
        use.served = False
        return [f"{method!r} is no method of torchdiffeq or odenet_cuda"]
    if not isinstance(tableau, ButcherTableau):
        stepper.append(method)
    return [_DIFFERS[method]] if method in _DIFFERS else []


def _of_options(use: Use, options: ast.expr | None, methods: Sequence[str], stepper: list[str]) -> None:
    if options is None:
        return
    given = _literal_dict(options)
    if not given:
        use.notes.append("its options are open here")
    for method in methods:
        unknown = sorted(set(given) - known_options(method))
        if unknown:
            use.notes.append(f"{method} warns of options it does not know and goes on: {', '.join(unknown)}")
    stepper += [f"options[{name!r}]" for name in ("norm", "perturb") if name in given]


def _literals(node: ast.expr | None, default: str) -> list[str]:
    """The texts that this may be; [] where that is open."""
    if node is None or (isinstance(node, ast.Constant) and node.value is None):
        return [default]
    parts = _choices(node)
    texts = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    return texts if len(texts) == len(parts) else []


def _literal_dict(node: ast.expr | None) -> dict[str, ast.expr]:
    if isinstance(node, ast.Dict):
        return {
            key.value: value
            for key, value in zip(node.keys, node.values, strict=True)
            if isinstance(key, ast.Constant) and isinstance(key.value, str)
        }
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
    return {}


def main(paths: Sequence[str]) -> None:
    """Prints the report of each file. Raises SystemExit in words where one cannot be read."""
    if not paths:
        raise SystemExit("python -m odenet_cuda migrate FILE...: no file given")
    for path in paths:
        try:
            found = report(Path(path))
        except (OSError, UnicodeDecodeError) as error:
            raise SystemExit(f"migrate: {path} cannot be read: {error}") from None
        except SyntaxError as error:
            raise SystemExit(f"migrate: {path} is no Python: {error.msg}, line {error.lineno}") from None
        print("\n".join(found.lines()))
