"""What the fuzzers share with pytest: a count of the examples, in the closing lines."""

from fuzzing import FRESH, TRIED


def pytest_terminal_summary(terminalreporter) -> None:
    if FRESH:
        terminalreporter.write_line(f"examples: {TRIED['examples']}")
