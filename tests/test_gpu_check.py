"""The machinery of benchmarks/gpu_check.py: steps that fail, hang or die, what they leave, and the report. No GPU is needed."""

import importlib
import json
import os
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
if not BENCHMARKS.exists():
    pytest.skip("needs the checkout", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))
report = importlib.import_module("gpu_report")
check = importlib.import_module("gpu_check")

MACHINE = {"card": "Some GPU", "capability": "9.0", "commit": "abc", "date": "2026-01-02"}


def step(code: str, **arguments):
    """A step that runs Python code."""
    return report.Step("part", arguments.pop("name", "step"), [sys.executable, "-c", textwrap.dedent(code)], 1, **arguments)


def run_all(*steps, seconds: float = 60) -> tuple[bool, list[dict], list[int]]:
    """Whether all went well, the records, and how many of them each writing of the report held."""
    found: dict[str, list] = {"steps": []}
    written: list[int] = []
    good = report.run_steps(list(steps), time.monotonic() + seconds, found, lambda: written.append(len(found["steps"])))
    return good, found["steps"], written


def test_failing_step_is_reported_and_the_next_one_runs():
    """The exit status and the end of the output are kept, and the report is written after each step."""
    good, (bad, fine), written = run_all(step("print('words'); raise SystemExit(3)"), step("print('other words')"))
    assert not good and written == [1, 2]
    assert bad["problem"] == "exit status 3" and "words" in bad["output"]
    assert fine["problem"] is None and fine["output"] == ""


def test_program_that_does_not_exist():
    """A program that is missing is a failure that names it."""
    finished = report.run(["no-such-program", "--version"], 5)
    assert finished.code == 127 and "no-such-program" in finished.output


@pytest.mark.parametrize("stubborn", [False, True], ids=["interrupted", "killed"])
def test_hanging_step_ends_with_all_it_started(stubborn, tmp_path, monkeypatch):
    """At its limit a step is interrupted, then killed, and so are the processes that it started."""
    monkeypatch.setattr(report, "INTERRUPT_S", 0.5)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    code = f"""
        import signal, subprocess, sys, time
        if {stubborn}:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        child = "import time; file = open({str(fifo)!r}, 'w'); file.write('x'); file.flush(); time.sleep(60)"
        subprocess.Popen([sys.executable, "-c", child])
        print("begun", flush=True)
        time.sleep(60)
    """
    begin = time.monotonic()
    good, (hung,), _ = run_all(step(code), seconds=1.5)
    assert not good and time.monotonic() - begin < 10
    assert hung["problem"].startswith("ran past its limit") and "begun" in hung["output"]
    deadline = time.monotonic() + 5
    assert os.read(reader, 1) == b"x"
    while True:
        try:
            end = os.read(reader, 1)  # nothing more, once no process holds the other end
            break
        except BlockingIOError:
            assert time.monotonic() < deadline, "a process that the step started still runs"
            time.sleep(0.05)
    os.close(reader)
    assert end == b""


def test_steps_that_cannot_run():
    """After a step that is needed failed, and after the deadline, nothing runs; the records say why."""
    good, (_, later), _ = run_all(step("raise SystemExit(1)", name="build", needed=True), step("print()"))
    assert not good and later["problem"] == "not run: build failed" and "seconds" not in later
    good, (late,), _ = run_all(step("print()"), seconds=0)
    assert not good and late["problem"] == "not run: no time was left"


TESTS = """
    import time
    import pytest
    def test_good(): pass
    @pytest.mark.parametrize("x", ["a b"])
    def test_bad(x): assert 1 == 2, "one is not two"
    def test_skipped(): pytest.skip("no reason")
"""
HANGING = """
    def test_hangs():
        __import__("signal").signal(2, __import__("signal").SIG_IGN)
        time.sleep(60)
"""


@pytest.mark.parametrize("hangs", [False, True], ids=["ends", "killed"])
def test_results_of_tests(hangs, tmp_path, monkeypatch):
    """Counts and failures are those of pytest, also where it was killed, and then the test that hung is named."""
    monkeypatch.setattr(report, "INTERRUPT_S", 0.2)
    file, xml = tmp_path / "test_these.py", tmp_path / "tests.xml"
    file.write_text(textwrap.dedent(TESTS + HANGING * hangs))
    command = check.pytest_command(xml, "-q", "-p", "no:cacheprovider", str(file))
    read = partial(report.read_tests, xml=xml)
    _, (done,), _ = run_all(report.Step("tests", "these", command, 1, read), seconds=4 if hangs else 60)
    details = done["details"]
    assert details["counts"] == {"passed": 1, "failed": 1, "skipped": 1}, done["output"]
    assert [failure["test"].split("::")[-1] for failure in details["failures"]] == ["test_bad[a b]"]
    assert "1 of 3 tests failed" in done["problem"]
    assert xml.exists() != hangs
    if hangs:
        assert details["unfinished"].endswith("::test_hangs")
    else:
        assert "one is not two" in details["failures"][0]["message"]
        assert list(details["skipped"].values()) == [1]


def test_no_test_ran(tmp_path):
    """That nothing failed is not enough: a run in which every test was skipped has not passed."""
    xml = tmp_path / "tests.xml"
    xml.write_text("<a><testcase classname='t' name='x'><skipped message='torch sees no CUDA device'/></testcase></a>")
    details, problem = report.read_tests(report.Finished(0, 1.0, ""), xml)
    assert details["counts"] == {"skipped": 1}
    assert problem == "no test passed; skipped: torch sees no CUDA device"
    xml.write_text(xml.read_text().replace("</a>", "<testcase classname='t' name='y'/></a>"))
    assert report.read_tests(report.Finished(0, 1.0, ""), xml)[1] is None
    on_cuda = report.read_tests(report.Finished(0, 1.0, ""), xml, all_on_cuda=True)
    assert on_cuda[1] == "tests were skipped: torch sees no CUDA device"


@pytest.mark.parametrize(
    ("words", "errors", "problem"),
    [
        ("========= ERROR SUMMARY: 0 errors\n", 0, None),
        ("========= ERROR SUMMARY: 1,203 errors\n", 1203, "1203 errors"),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n", 2, "2 errors"),
        ("========= COMPUTE-SANITIZER\n", None, "compute-sanitizer wrote no summary"),
    ],
)
def test_results_of_compute_sanitizer(words, errors, problem, tmp_path):
    """Errors and hazards are counted; a log without a summary is a failure."""
    xml, log = tmp_path / "tests.xml", tmp_path / "log"
    xml.write_text("<a><testcase classname='t' name='x'/></a>")
    log.write_text(words)
    details, found = report.read_sanitizer(report.Finished(0, 1.0, ""), xml, log)
    assert details.get("errors") == errors and found == problem


def test_commands_of_the_benchmarks(tmp_path):
    """The benchmarks exist and know the options that they are given."""
    for dry in (False, True):
        for bench in check.bench_part(tmp_path, dry):
            source = (BENCHMARKS.parent / bench.command[1]).read_text()
            options = [word for word in bench.command if word.startswith("--")]
            assert "--json" in options
            assert all(f'"{option}"' in source for option in options)


def test_build_for_the_card(tmp_path):
    """The extension is built in place, for the card alone; what was built without CUDA kernels is a failure."""
    build, _ = check.build_part(MACHINE, tmp_path, dry=False)
    assert build.command[-1] == "--inplace"
    assert build.env == {"ODENET_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
    finished = report.Finished(0, 1.0, '{"cuda": null}')
    assert check.read_loaded(finished, dry=False)[1] == "the extension was built without CUDA kernels"
    assert check.read_loaded(finished, dry=True)[1] is None


def test_without_a_gpu(monkeypatch, capsys):
    """One sentence, and exit status 2."""
    monkeypatch.setattr(check, "describe_machine", lambda: {**MACHINE, "card": None})
    assert check.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_report(monkeypatch, tmp_path):
    """One Markdown file and one JSON file hold the machine, every step and the failures."""
    monkeypatch.setattr(check, "describe_machine", lambda: dict(MACHINE))
    monkeypatch.setattr(check, "clocks", lambda: "clocks.sm\n1980 MHz\n")
    monkeypatch.setattr(check, "ROOT", tmp_path)
    failure = {"counts": {"failed": 1}, "failures": [{"test": "t::x", "message": "no"}], "skipped": {}}
    steps = [step("print('table')", keep_output=True), step("", read=lambda _: (failure, "1 of 1 tests failed"))]
    monkeypatch.setattr(check, "tests_part", lambda *_: steps)
    assert check.main(["--parts", "tests", "--out", str(tmp_path / "out")]) == 1
    written = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert set(written) == {f"2026-01-02-some-gpu-abc{suffix}" for suffix in (".md", ".json")}
    data, words = json.loads(written["2026-01-02-some-gpu-abc.json"]), written["2026-01-02-some-gpu-abc.md"]
    assert data["machine"] == MACHINE and [done["problem"] for done in data["steps"]] == [None, "1 of 1 tests failed"]
    assert all(part in words for part in ("table", "`t::x`: no", "**1 of 1 tests failed**", "1980 MHz", "Some GPU"))
    assert sys.executable not in words
