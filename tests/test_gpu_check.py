"""The machinery of benchmarks/gpu_check.py: parts that fail, hang or die, what they leave, and the stages. No GPU is needed."""

import importlib
import json
import os
import subprocess
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
tables = importlib.import_module("gpu_tables")
prepare = importlib.import_module("gpu_prepare")
smoke = importlib.import_module("gpu_smoke")

CARD = {"card": "Some GPU", "capability": "9.0", "commit": "abc", "date": "2026-01-02"}
NO_CARD = {**CARD, "card": None}


def part(code: str, limit: float = 30, **arguments):
    """A part that runs Python code, on a machine with or without a GPU."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return report.Part(arguments.pop("name", "part"), command, limit, gpu=arguments.pop("gpu", False), **arguments)


def run_all(folder, *parts, bound: float = 60, card: str | None = None) -> tuple[bool, list[dict]]:
    """Whether all went well, and what parts.jsonl says of each."""
    written = report.Report(folder, {})
    good = report.run_parts(list(parts), time.monotonic(), bound, card, written)
    lines = [json.loads(line) for line in (folder / "parts.jsonl").read_text().splitlines()]
    assert lines[1:] == written.done
    return good, written.done


def test_a_part_that_fails_is_told_of_and_the_next_one_runs(tmp_path):
    """The exit status and the end of the output are kept; what all parts said is in the log."""
    good, (bad, fine) = run_all(tmp_path, part("print('words'); raise SystemExit(3)"), part("print('other words')"))
    assert not good and bad["problem"] == "exit status 3" and bad["code"] == 3 and "words" in bad["output"]
    assert fine["problem"] is None and "output" not in fine
    assert "other words" in (tmp_path / "log.txt").read_text() and sys.executable not in (tmp_path / "log.txt").read_text()


def test_results_are_written_as_they_come(tmp_path):
    """A part finds in parts.jsonl all that ended before it."""
    code = f"print(open({str(tmp_path / 'parts.jsonl')!r}).read())"
    good, _ = run_all(tmp_path, part("", name="first of all"), part(code, name="reader"))
    assert good and '{"part": "first of all", "problem": null' in (tmp_path / "log.txt").read_text()


def test_program_that_does_not_exist():
    """A program that is missing is a failure that names it."""
    finished = report.run(["no-such-program", "--version"], 5)
    assert finished.code == 127 and "no-such-program" in finished.output


@pytest.mark.parametrize("stubborn", [False, True], ids=["interrupted", "killed"])
def test_hanging_part_ends_with_all_it_started(stubborn, tmp_path):
    """A part is interrupted, then killed, within its limit, and so are the processes that it started."""
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
    good, (hung,) = run_all(tmp_path, part(code, limit=2))
    assert not good and time.monotonic() - begin < 10
    assert hung["problem"].startswith("ran past its limit of 2 s") and hung["code"] is None and "begun" in hung["output"]
    deadline = time.monotonic() + 5
    assert os.read(reader, 1) == b"x"
    while True:
        try:
            end = os.read(reader, 1)  # nothing more, once no process holds the other end
            break
        except BlockingIOError:
            assert time.monotonic() < deadline, "a process that the part started still runs"
            time.sleep(0.05)
    os.close(reader)
    assert end == b""


def test_parts_that_cannot_run(tmp_path):
    """After one that is needed failed, after the bound, and without a GPU nothing runs; what is told says why."""
    first = part("raise SystemExit(1)", name="build")
    good, (_, later, free) = run_all(tmp_path, first, part("print()", needs=("build",)), part("print()"))
    assert not good and later["problem"] == "not run: build failed" and "seconds" not in later and free["problem"] is None
    good, (late,) = run_all(tmp_path, part("print()"), bound=0)
    assert not good and late["problem"] == "not run: no time was left"
    good, (no_gpu,) = run_all(tmp_path, part("import time; time.sleep(60)", gpu=True, background=True))
    assert good and no_gpu["problem"] == report.NO_GPU and "seconds" not in no_gpu
    parts = part("print()", name="build"), part("print()", gpu=True, needs=("build",))
    good, (no_gpu, built) = run_all(tmp_path, *parts)
    assert good and no_gpu["problem"] == report.NO_GPU and built["part"] == "build"  # said at once, not after the build
    good, (here,) = run_all(tmp_path, part("print()", gpu=True), card="Some GPU")
    assert good and here["problem"] is None


def test_background(tmp_path):
    """A build begins with the stage and goes on while others run; its limit counts from there, and nothing is left of it."""
    mark = tmp_path / "mark"
    build = part(f"open({str(mark)!r}, 'w')", name="build", background=True)
    wait = f"import os, time\nwhile not os.path.exists({str(mark)!r}): time.sleep(0.01)"
    good, (before, built) = run_all(tmp_path, part(wait, name="before"), build)
    assert good and before["problem"] is built["problem"] is None
    brief = part("", name="build", background=True)
    good, (before, built) = run_all(tmp_path, part("import time; time.sleep(2)", name="before"), brief)
    assert good and built["seconds"] < before["seconds"]  # of its own, not those until it was waited for
    slow = part("import time; time.sleep(60)", limit=1.5, name="build", background=True)
    good, (_, built) = run_all(tmp_path, part("import time; time.sleep(1)", name="before"), slow)
    assert not good and built["problem"].startswith("ran past its limit") and built["at"] + 1 > 1.5 > built["at"]
    good, (late, _) = run_all(tmp_path, part("import time; time.sleep(60)", limit=30), slow, bound=1.5)
    assert not good and late["code"] is None


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
def test_results_of_tests(hangs, tmp_path):
    """Counts and failures are those of pytest, also where it was killed, and then the test that hung is named."""
    file, xml = tmp_path / "test_these.py", tmp_path / "tests.xml"
    file.write_text(textwrap.dedent(TESTS + HANGING * hangs))
    made = check.tests("these", 6 if hangs else 60, "-q", "-p", "no:cacheprovider", str(file))
    command = [word.replace(word.split("=")[-1], str(xml)) if word.startswith("--junitxml") else word for word in made.command]
    ready = report.Part("these", command, made.limit, partial(report.read_tests, xml=xml), gpu=False)
    _, (done,) = run_all(tmp_path, ready)
    details = done["details"]
    assert details["counts"] == {"passed": 1, "failed": 1, "skipped": 1}, done["output"]
    assert [failure["test"].split("::")[-1] for failure in details["failures"]] == ["test_bad[a b]"]
    assert "1 of 3 tests failed" in done["problem"]
    assert xml.exists() != hangs
    if hangs:
        assert [name.split("::")[-1] for name in details["unfinished"]] == ["test_hangs"]
    else:
        assert "one is not two" in details["failures"][0]["message"]
        assert list(details["skipped"].values()) == [1]


def test_results_of_tests_in_workers(tmp_path):
    """Of workers that were killed, from their lines; a test that was begun and is not told of is unfinished."""
    lines = ["tests/test_a.py::test_x[a b] ", "tests/test_a.py::test_y[an ERROR in words] ", "tests/test_a.py::test_z "]
    lines += ["[gw0] [  1%] PASSED tests/test_a.py::test_x[a b] ", "[gw11] [ 52%] FAILED tests/test_a.py::test_z "]
    details, problem = report.read_tests(report.Finished(None, 1.0, "\n".join(lines)), tmp_path / "none.xml")
    assert details["counts"] == {"passed": 1, "failed": 1} and problem == "1 of 2 tests failed"
    assert details["unfinished"] == ["tests/test_a.py::test_y[an ERROR in words]"]
    assert [failure["test"] for failure in details["failures"]] == ["tests/test_a.py::test_z"]


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
def test_results_of_compute_sanitizer(words, errors, problem):
    """Errors and hazards are counted; an output without a summary is a failure."""
    finished = report.Finished(0, 1.0, '{"what": "end of stage", "checked": 3, "wrong": 0}\n' + words)
    details, found = report.read_sanitizer(finished, report.read_lines)
    assert details.get("errors") == errors and found == problem and len(details["results"]) == 1


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"what": "stage", "MiB": 64, "us": 3.5}', None),
        ('{"what": "end of stage", "checked": 3, "wrong": 0}', None),
        ('{"what": "stage", "wrong": 1, "apart": "nan"}', "1 wrong, the first"),
        ('{"what": "cudaMalloc", "failed": "out of memory"}', "1 wrong, the first"),
        ('{"case": "forward", "good": false}', "1 wrong, the first"),
        ("words", "said nothing"),
    ],
)
def test_results_in_lines(line, problem):
    """What the native program and the smoke test print: what is wrong is a failure whatever the exit status."""
    _, found = report.read_lines(report.Finished(0, 1.0, f"other words\n{line}\n"))
    assert found is None if problem is None else found.startswith(problem)


@pytest.mark.parametrize("machine", [CARD, NO_CARD], ids=["card", "no card"])
@pytest.mark.parametrize("stage", check.STAGES)
def test_stages(stage, machine, tmp_path):
    """The limits of what is waited for add up to no more than the bound, and that is less than a command may take; what a part
    needs comes before it; the files are 8 at most; scripts, tests and options exist."""
    parts = check.STAGES[stage](machine, tmp_path, False)
    assert sum(part.limit for part in parts if not part.background) <= check.BOUNDS[stage] <= 600
    for number, part in enumerate(parts):
        assert set(part.needs) <= {other.name for other in parts[:number]}
        paths = [word for word in part.command if word.startswith(("benchmarks/", "tests/"))]
        assert all((BENCHMARKS.parent / path).exists() for path in paths)
        for path in (path for path in paths if path.startswith("benchmarks/")):
            source = (BENCHMARKS.parent / path).read_text()
            assert all(f'"{word}"' in source for word in part.command if word.startswith("--"))
    written = [word for part in parts for word in part.command if word.startswith(str(tmp_path))]
    assert len(set(written)) == len(written) <= 8 - len(["parts.jsonl", "log.txt", "table.txt"])
    (build,) = (part for part in parts if part.name == "extension")
    assert build.env["TORCH_CUDA_ARCH_LIST"] == "9.0" and build.env["ODENET_CUDA"] == "1" and build.background
    assert ("--inplace" in build.command) == (machine["card"] is not None)


def test_lines_of_the_table():
    """What is wrong comes into it; of figures the largest sizes, with what they are held against."""
    bad = {"what": "stage", "wrong": 1, "apart": 0.5}
    figures = [{"what": "stage", "MiB": mib, "slopes": 6, "of copy": 0.9} for mib in (1, 256)]
    lines = list(tables.native_lines({"results": [bad, *figures, {"what": "end of stage", "checked": 7, "wrong": 1}]}))
    assert lines == ["WRONG stage: wrong 1, apart 0.5", "stage: MiB 256, slopes 6, of copy 0.9", "7 comparisons, 1 wrong"]
    cases = [{"case": "a", "good": True, "warnings": []}, {"case": "b", "good": False, "error": "words"}]
    assert list(tables.smoke_lines({"results": cases})) == ["1 of 2 are good", "b: good False, error words"]
    total = {"total": {"median": 0.25}, "error": 1e-6}
    found = {"ensemble": {"rivals": {"compiled": total, "captured": {"note": "no"}, "to beat ms": 0.5, "published ms": {}}}}
    assert list(tables.ensemble_lines({"results": found})) == ["rivals: compiled 250 ms (error 1.0e-06), to beat ms 0.5"]
    way = {"total": {"median": 0.032}, "ratio": 3.0, "launches": 8.0, "syncs": 1}
    lines = list(tables.cuda_lines({"results": {"cuda": {"MLP": {"ours": way, "func_alone": 0.1}}}}))
    assert lines == ["MLP", "  ours: 32 ms, torchdiffeq / this 3, launches a step 8, waits 1"]
    rows = [{"": "stage6", "dtype": "float32", "bytes": n, "us": 5.0, "share": 0.9, "torch": 3.0} for n in (1, 2)]
    assert len(list(tables.ops_lines({"results": {"ops": rows}}))) == 1
    for lines_of in (tables.native_lines, tables.smoke_lines, tables.cuda_lines, tables.ensemble_lines, tables.ops_lines):
        assert list(lines_of({})) == []


def test_chosen_parts(tmp_path):
    """Those asked for and what they need, by name."""
    parts = check.first(CARD, tmp_path, False)
    assert [part.name for part in check.chosen(parts, ["smoke"])] == ["extension", "smoke"]
    assert check.chosen(parts, []) == parts
    with pytest.raises(SystemExit, match="there is no part 'x'; there are clocks, native"):
        check.chosen(parts, ["x"])


@pytest.mark.parametrize("stage", check.STAGES)
def test_a_stage_without_a_gpu(stage, tmp_path, monkeypatch, capsys):
    """Every part that needs one says so, without a process, and the table comes last."""
    monkeypatch.setattr(check, "describe_machine", lambda: dict(NO_CARD))
    make = check.STAGES[stage]
    monkeypatch.setitem(check.STAGES, stage, lambda *given: [part for part in make(*given) if part.gpu])
    monkeypatch.setattr(report, "Running", None)
    monkeypatch.setattr(check, "FIELDS", tmp_path / "none")
    monkeypatch.setenv("ODENET_CACHE", str(tmp_path / "cache"))
    assert check.main(["--stage", stage, "--out", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"parts.jsonl", "log.txt", "table.txt"}
    table, said = (tmp_path / "out" / "table.txt").read_text(), capsys.readouterr().out
    assert table in said and table.count(report.NO_GPU) == len(table.splitlines()) > 6


def test_what_a_prepared_program_is_made_of(tmp_path, monkeypatch):
    """It is used where it is of these very sources, for this card, and can be run."""
    program = tmp_path / "native"
    program.write_text("#!/bin/sh\nexit 0\n")
    program.chmod(0o700)
    assert not prepare.is_built(program, "9.0")
    program.with_suffix(".digest").write_text(prepare.digest("9.0"))
    assert prepare.is_built(program, "9.0") and not prepare.is_built(program, "10.0")
    program.write_text("#!/no/such/interpreter\n")
    assert not prepare.is_built(program, "9.0")
    assert all(source.suffix == ".cu" for source in prepare.native_sources()) and len(prepare.native_sources()) > 8


def test_the_program_compiles_for_a_card(tmp_path):
    """The part of it that no emulation has: launches with large parameters, graphs, WHILE nodes."""
    nvcc = prepare.find_tool("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc was found")
    source = BENCHMARKS / "gpu_native" / "solve.cu"
    command = [nvcc, *prepare.FLAGS, "-arch=sm_90", "-Werror=all-warnings", "-c", str(source), "-o", str(tmp_path / "solve.o")]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stdout + compiled.stderr


def test_packed_fields(tmp_path, monkeypatch):
    """They come back whole, as this user's; one that is there already is left alone."""
    monkeypatch.setattr(prepare, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(prepare, "FIELDS", tmp_path / "fields.tar.xz")
    prepare.CACHE.mkdir()
    for name, words in {"a.so": b"one", "b.so": b"two", "a.lock": b""}.items():
        (prepare.CACHE / name).write_bytes(words)
    prepare.pack()
    (prepare.CACHE / "a.so").unlink()
    (prepare.CACHE / "b.so").write_bytes(b"another")
    prepare.unpack()
    assert (prepare.CACHE / "a.so").read_bytes() == b"one" and (prepare.CACHE / "b.so").read_bytes() == b"another"


def test_prepared_fields(monkeypatch):
    """Solves of tensors of the CPU compile what the card will ask for: several threads a sample in wide nets, tensor cores; and
    end there."""
    from odenet_cuda.compiled import plan

    teams = []
    monkeypatch.setattr(plan.Plan, "build", lambda self, wanted: teams.append([target.team for _, target in wanted]))
    solves = dict(smoke.compiled_solves())
    with prepare.pretended_card("9.0"):
        for name in ("a thread a sample, joint", "bf16"):
            with pytest.raises(prepare.Compiled):
                solves[f"smoke: compiled, {name}"]()
    (alone, _), (wide, back) = teams
    assert alone.groups == 1 and wide == back and wide.groups > 1 and wide.matmul == "bf16"


def test_the_smoke_test():
    """A case that is right, one too far apart, one that raises; those that are compiled are prepared."""
    named = {name: options for name, _, options in smoke.cases()}
    assert len(named) == 35
    options = named["direct, per_sample"]
    good = smoke.run_case("a case", 1e-6, options, "cpu", 60)
    assert good["good"] and good["apart"] == 0 and good["warnings"] == []
    assert not smoke.run_case("a case", -1.0, options, "cpu", 60)["good"]
    bad = smoke.run_case("a case", 1.0, {**options, "method": "no such method"}, "cpu", 60)
    assert not bad["good"] and "no such method" in bad["error"]
    prepared = [name for name, _ in smoke.compiled_solves()]
    assert prepared == [f"smoke: {name}" for name, options in named.items() if "compiled" in options] and len(prepared) == 10
