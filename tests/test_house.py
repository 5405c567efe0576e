"""How the package is built: imports run downwards, files and functions can be read in one sitting."""

import ast
from pathlib import Path

import odenet_cuda

ROOT = Path(odenet_cuda.__file__).parent
MOST_LINES, MOST_OF_A_FUNCTION = 330, 60
FRONT = ("solve",)  # functions whose docstring is the manual


def sources() -> dict[str, Path]:
    """Each module of the package by its name."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, modules: dict[str, Path]) -> set[str]:
    """The modules of the package that this one imports, wherever in its text, for types too."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{module}.{alias.name}"
                if alias.name != "_C":  # the extension
                    found.add(full if full in modules else module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {module for module in found if module in modules and module != name}


def test_imports_run_in_no_circle():
    modules = sources()
    graph = {name: imports(name, path, modules) for name, path in modules.items()}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*above, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_no_engine_knows_another():
    modules = sources()
    engines = [name for name in modules if name.startswith("odenet_cuda.engines.")]
    assert len(engines) >= 5
    for name in engines:
        assert not {other for other in imports(name, modules[name], modules) if other.startswith("odenet_cuda.engines")}, name


def test_files_and_functions_are_short():
    long = []
    for name, path in sources().items():
        text = path.read_text()
        if text.count("\n") > MOST_LINES:
            long.append(f"{name}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name not in FRONT:
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > MOST_OF_A_FUNCTION:
                    long.append(f"{name}.{node.name}: {length} lines")
    assert not long, "\n".join(sorted(long))
