"""The table of benchmark results over time."""

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import ratios  # noqa: E402


def test_page_shows_all_results():
    assert ratios.BEGIN + ratios.table() + ratios.END in (ratios.RESULTS / "README.md").read_text()


def test_every_ratio_is_of_some_run():
    lines = ratios.table().splitlines()[2:]
    assert len(lines) == len(ratios.RATIOS)
    assert all(any(cell.strip() for cell in line.split("|")[2:]) for line in lines)
