"""What the documentation says: its blocks of Python run, print what is written beside them, and name all that there is."""

import contextlib
import io
import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import odenet_cuda
from odenet_cuda.compiled import compilation

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
PRINTED = re.compile(r"#\s*-> (.*)$", re.MULTILINE)


def blocks(page: Path) -> list[tuple[int, str]]:
    """The line at which each begins, and its text."""
    text = page.read_text()
    return [(text.count("\n", 0, found.start(2)), textwrap.dedent(found[2])) for found in BLOCK.finditer(text)]


def check_printed(block: str, output: str, where: str) -> None:
    """The lines of the output are those of the comments ``# -> ...``, in which "..." stands for anything."""
    expected = PRINTED.findall(block)
    if not expected:
        return
    lines = output.splitlines()
    assert len(lines) == len(expected), f"{where} prints\n{output}"
    for line, words in zip(lines, expected, strict=True):
        pattern = ".*".join(re.escape(part) for part in words.rstrip().split("..."))
        assert re.fullmatch(pattern, line.rstrip()), f"{where} prints {line!r}, and says {words!r}"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_page_runs(page, quick_compiler, one_thread, monkeypatch, tmp_path):
    """Its blocks, one after another in one namespace, as in a program in which nobody has called `set_compile`."""
    monkeypatch.setattr(compilation, "_asked", None)
    monkeypatch.setattr(sys, "argv", [page.stem])
    monkeypatch.chdir(tmp_path)  # where it may write
    if page.stem == "plots":
        pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    namespace: dict = {"__name__": "page"}
    for line, block in blocks(page):
        where = f"{page.relative_to(ROOT)}:{line}"
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile("\n" * line + block, str(page), "exec"), namespace)
        check_printed(block, output.getvalue(), where)


def test_every_public_name_has_its_place():
    """The pages of the API document what the package gives, and nothing else."""
    text = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").rglob("*.md"))
    documented = re.findall(r"\.\. auto(?:class|function|exception):: odenet_cuda\.(\w+)$", text, re.MULTILINE)
    assert sorted(documented) == sorted(odenet_cuda.__all__)


def test_every_method_is_in_the_guide():
    from odenet_cuda.methods import ADAPTIVE, ON_GRID

    text = (ROOT / "docs" / "guide" / "choose.md").read_text()
    missing = [name for name in (*ADAPTIVE, *ON_GRID) if f"`{name}`" not in text]
    assert not missing


def test_fences():
    """No block is left out because its fence is misspelt: what is no Python says what it is."""
    for page in PAGES:
        fences = re.findall(r"^ *```(.*)$", page.read_text(), re.MULTILINE)
        assert len(fences) % 2 == 0, page
        assert all(word in ("python", "text", "bash") or word.startswith("{") for word in fences[::2]), (page, fences[::2])
        assert len(blocks(page)) == fences.count("python"), page


def test_every_page_is_listed_once():
    """As Sphinx would say, which the tests do not have."""
    for index in (ROOT / "docs").rglob("index.md"):
        trees = re.findall(r"```{toctree}\n(.*?)```", index.read_text(), re.S)
        pages = [line.strip() for tree in trees for line in tree.split("\n") if line.strip() and not line.startswith(":")]
        assert len(pages) == len(set(pages)), index
        assert all((index.parent / f"{page}.md").exists() for page in pages), index
