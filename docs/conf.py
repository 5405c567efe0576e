"""Sphinx's settings, and how a docstring of this package becomes a page. Build: make docs."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from odenet_cuda import __version__

project = "odenet_cuda"
author = "the authors of odenet_cuda"
version = release = __version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxcontrib.bibtex",
]
myst_enable_extensions = ["colon_fence", "dollarmath", "deflist"]
myst_heading_anchors = 3
bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "unsrt"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
html_theme = "pydata_sphinx_theme"
html_title = f"odenet_cuda {version}"
html_theme_options = {"show_toc_level": 2, "navigation_with_keys": False, "secondary_sidebar_items": ["page-toc"]}
html_sidebars = {page: [] for page in ("index", "gallery", "references")}
html_static_path = ["_static"]
html_css_files = ["pages.css"]

_NAMED = re.compile(r"([a-z]\w*(?:, [a-z]\w*)*): (.*)")
_LITERAL = re.compile(r"(``.+?``)")


def _escaped(text: str) -> str:
    """What stands outside of ``literals``, with the marks of reStructuredText taken as they are."""
    parts = _LITERAL.split(text)
    return "".join(part if part.startswith("``") else re.sub(r"([|*\\])", r"\\\1", part) for part in parts)


def _paragraph(lines: list[str]) -> list[str]:
    """``name: what it is``, with its lines below it indented, becomes an entry of a list; prose stays prose."""
    if lines[0].startswith(">>>"):
        return lines
    items: list[str] = []
    for line in lines:
        if line.startswith(" ") or not items or not (named := _NAMED.match(line)):
            items[-1:] = [f"{items[-1]} {_escaped(line.strip())}"] if items else [_escaped(line.strip())]
        else:
            items.append(f"**{named[1]}**: {_escaped(named[2])}")
    first = _NAMED.match(lines[0])
    if first is None and len(items) == 1:
        return items
    if first is not None:
        items[0] = f"**{first[1]}**: " + items[0][len(_escaped(first[1])) + 2 :]
    return [x for i in items for x in (f"- {i}",)]


def _house_style(app, what, name, obj, options, lines: list[str]) -> None:
    """Paragraphs of a docstring, in place."""
    text = "\n".join(lines).strip("\n")
    paragraphs = [_paragraph(part.split("\n")) for part in re.split(r"\n\s*\n", text) if part]
    lines[:] = [line for paragraph in paragraphs for line in [*paragraph, ""]]


def setup(app) -> None:
    app.connect("autodoc-process-docstring", _house_style)
