"""The machinery of gpu_check: runs parts within bounds of time, reads what they leave, and writes it down as it comes."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
INTERRUPT_S = 5.0  # of a limit, how much an interrupted process may take to end by itself; a quarter at most
TAIL = 4000  # characters of the output of a failed part that parts.jsonl keeps
VERDICTS = {"PASSED": "passed", "FAILED": "failed", "ERROR": "errors", "SKIPPED": "skipped", "XFAIL": "skipped"}
NO_GPU = "needs a GPU, and there is none"


@dataclass
class Finished:
    """A command that ended. code: its exit status, None where it ran past its limit."""

    code: int | None
    seconds: float
    output: str


# What the output and the files of a part say, and what is wrong with it, or None.
Reading = tuple[dict[str, Any], str | None]
Short = Callable[[dict[str, Any]], Iterable[str]]


def no_lines(details: dict[str, Any]) -> Iterable[str]:
    return ()


@dataclass
class Part:
    """A command of a stage. limit: seconds. needs: parts that must have passed. background: begun with the stage, and waited
    for when its turn comes. short: the lines of the table that its details give."""

    name: str
    command: list[str]
    limit: float
    read: Callable[[Finished], Reading] = lambda finished: ({}, None)
    env: dict[str, str] = field(default_factory=dict)
    gpu: bool = True
    needs: tuple[str, ...] = ()
    background: bool = False
    short: Short = no_lines


class Running:
    """A command in a process group of its own, from the root of the checkout."""

    def __init__(self, command: list[str], env: dict[str, str] | None = None, nice: int = 0):
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **(env or {})}
        self.begin, self.log = time.monotonic(), tempfile.TemporaryFile()  # noqa: SIM115
        self.process: subprocess.Popen | None = None
        self.ended, self.words = 0.0, ""
        command = ["nice", "-n", str(nice), *command] if nice else command
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": self.log, "stderr": self.log}
        try:
            self.process = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **streams)
        except OSError as error:
            self.words = f"{command[0]}: {error.strerror}\n"
            return
        self.watch = threading.Thread(target=self._watch, args=(self.process,), daemon=True)
        self.watch.start()

    def _watch(self, process: subprocess.Popen) -> None:
        """When it ends, which may be long before it is waited for."""
        process.wait()
        self.ended = time.monotonic()

    def finish(self, limit: float) -> Finished:
        """What came of it, at most so many seconds after it began: it is interrupted before that, then killed."""
        if self.process is None:
            return Finished(127, 0.0, self.words)
        grace = min(INTERRUPT_S, limit / 4)
        self.watch.join(max(0.0, self.begin + limit - grace - time.monotonic()))
        code = self.process.returncode if self.ended else None
        self.end(grace)
        seconds = (self.ended or time.monotonic()) - self.begin
        self.log.seek(0)
        return Finished(code, seconds, without_paths(self.log.read().decode(errors="replace")))

    def end(self, grace: float = 0.0) -> None:
        """Ends the process and whatever it started; interrupted, pytest still writes what it has."""
        process, self.process = self.process, None
        if process is None:
            return
        if process.poll() is None and grace > 0:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(grace)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # a driver may hold it for ever
            process.wait(2)


def run(command: list[str], limit: float, env: dict[str, str] | None = None) -> Finished:
    """The command, ended with all it started at its limit."""
    running = Running(command, env)
    try:
        return running.finish(limit)
    finally:
        running.end()


def without_paths(text: str) -> str:
    """The text without the folders of this machine."""
    text = text.replace(sys.executable, "python").replace(f"{ROOT}{os.sep}", "")
    for prefix in (sys.prefix, sys.base_prefix):
        text = text if prefix in ("/usr", "/usr/local") else text.replace(prefix, "PREFIX")
    return text


# ---- what parts leave ----


def read_lines(finished: Finished) -> Reading:
    """Lines of JSON, one a result, whatever else stands between them. What is wrong says so: "wrong", "failed", "good"."""
    results = []
    for line in finished.output.splitlines():
        with suppress(ValueError):
            found = json.loads(line)
            results += [found] if isinstance(found, dict) else []
    bad = [r for r in results if r.get("good") is False or "failed" in r or ("wrong" in r and "checked" not in r)]
    problem = f"{len(bad)} wrong, the first: {json.dumps(bad[0])[:300]}" if bad else None if results else "said nothing"
    return {"results": results}, problem


def read_tests(finished: Finished, xml: Path, all_on_cuda: bool = False) -> Reading:
    """Counts and failures, from pytest's XML, or from its lines where it was killed before it wrote any."""
    counts, failures, reasons = Counter[str](), [], Counter[str]()
    unfinished: dict[str, None] = {}
    for line in finished.output.splitlines():
        line = re.sub(r"^\[gw\d+\] \[ *\d+%\] (\w+) (.*?) *$", r"\2 \1", line).rstrip()  # as workers tell it
        if match := re.match(r"(\S+\.py::.+?)(?: (PASSED|FAILED|ERROR|SKIPPED|XFAIL)(?: +\(.*)?(?: +\[ *\d+%\])?)?$", line):
            name, verdict = match.groups()
            if verdict is None:
                unfinished[name] = None
                continue
            unfinished.pop(name, None)
            counts[VERDICTS[verdict]] += 1
            failures += [{"test": name, "message": ""}] * (verdict in ("FAILED", "ERROR"))
    try:
        cases = list(ElementTree.parse(xml).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        cases = []
    if cases:
        counts, failures = Counter[str](), []
    for case in cases:
        found = {child.tag: child.get("message", "") for child in case}
        kind = next((tag for tag in ("failure", "error", "skipped") if tag in found), None)
        counts[{"failure": "failed", "error": "errors", "skipped": "skipped", None: "passed"}[kind]] += 1
        if kind == "skipped":
            reasons[found[kind]] += 1
        elif kind:
            test = f"{case.get('classname')}::{case.get('name')}"
            failures.append({"test": test, "message": found[kind].strip().split("\n")[0][:300]})
    in_order = {kind: counts[kind] for kind in ("passed", "failed", "errors", "skipped") if counts[kind]}
    details: dict[str, Any] = {"counts": in_order, "failures": failures, "skipped": dict(reasons)}
    if finished.code is None and unfinished:
        details["unfinished"] = list(unfinished)[:16]
    if failures:
        return details, f"{len(failures)} of {sum(counts.values())} tests failed"
    if not counts["passed"]:
        return details, "no test passed" + "".join(f"; skipped: {reason}" for reason, _ in reasons.most_common(1))
    no_cuda = [reason for reason in reasons if "CUDA" in reason]
    return details, f"tests were skipped: {no_cuda[0]}" if all_on_cuda and no_cuda else None


def read_sanitizer(finished: Finished, read: Callable[[Finished], Reading]) -> Reading:
    """As read, and the errors or hazards that compute-sanitizer counted."""
    details, problem = read(finished)
    words = finished.output
    numbers = re.findall(r"(?:ERROR SUMMARY: ([\d,]+) error|RACECHECK SUMMARY: ([\d,]+) hazard)", words)
    if not numbers:
        return details, "compute-sanitizer wrote no summary" + (f"; {problem}" if problem else "")
    details["errors"] = sum(int("".join(pair).replace(",", "")) for pair in numbers)
    if details["errors"]:
        details["words"] = [line for line in words.splitlines() if line.startswith("=========")][:60]
    return details, f"{details['errors']} errors" if details["errors"] else problem


def read_results(finished: Finished, file: Path) -> Reading:
    """The results that a benchmark wrote; one that was ended has those of its first cases."""
    try:
        return {"results": json.loads(file.read_text())}, None
    except (OSError, ValueError):
        return {}, "wrote no results"


# ---- the parts, one after the other ----


class Report:
    """FOLDER/parts.jsonl, a line a part as soon as it ends, and FOLDER/log.txt, their output."""

    def __init__(self, folder: Path, machine: dict[str, Any]):
        folder.mkdir(parents=True, exist_ok=True)
        self.parts, self.done = list[Part](), list[dict[str, Any]]()
        self.lines, self.log = folder / "parts.jsonl", folder / "log.txt"
        self.log.write_text("")
        self.lines.write_text(json.dumps({"machine": machine}) + "\n")

    def add(self, part: Part, problem: str | None, at: float, finished: Finished | None = None, details: Any = None) -> None:
        done = {"part": part.name, "problem": problem, "at": round(at, 1)}
        if finished is not None:
            done |= {"seconds": round(finished.seconds, 1), "code": finished.code, "details": details}
            command = without_paths(shlex.join([*(f"{k}={v}" for k, v in part.env.items()), *part.command]))
            with self.log.open("a") as file:
                file.write(f"== {part.name}: {command}\n{finished.output}\n")
            if problem:
                done |= {"command": command, "output": finished.output[-TAIL:]}
        with self.lines.open("a") as file:
            file.write(json.dumps(done) + "\n")
        self.parts.append(part)
        self.done.append(done)
        took = f", {finished.seconds:.1f} s" if finished else ""
        print(f"{at:6.1f} s  {part.name}: {problem or 'passed'}{took}", flush=True)

    def problem(self, name: str) -> str | None:
        return next((done["problem"] for done in self.done if done["part"] == name), None)

    def table(self) -> str:
        """Short, for it is what is read first: failures, then figures."""
        lines = []
        for part, done in zip(self.parts, self.done, strict=True):
            details = done.get("details") or {}
            counts = ", ".join(f"{count} {name}" for name, count in details.get("counts", {}).items())
            lines.append(f"{part.name:22} {done.get('seconds', 0):6.1f} s  {done['problem'] or counts or 'passed'}"[:240])
            lines += [
                f"    FAILED {failure['test']}: {failure['message']}"[:240] for failure in details.get("failures", [])[:12]
            ]
            lines += [f"    {line}"[:160] for line in part.short(details)]
        return "\n".join(lines) + "\n"


def run_parts(parts: list[Part], begin: float, bound: float, card: str | None, report: Report) -> bool:
    """Runs them until begin + bound, of time.monotonic(). Whether all went well that could go."""
    running: dict[int, Running] = {}  # by the number of the part
    try:
        for number, part in enumerate(parts):
            if part.background and not (part.gpu and card is None):
                running[number] = Running(part.command, part.env, nice=10)
        # What cannot run says so at once, and not after a build.
        for number, part in sorted(enumerate(parts), key=lambda pair: not (pair[1].gpu and card is None)):
            at = time.monotonic() - begin
            missing = next((name for name in part.needs if report.problem(name)), None)
            if part.gpu and card is None:
                report.add(part, NO_GPU, at)
            elif missing:
                report.add(part, f"not run: {missing} failed", at)
            elif bound - at < 1:
                report.add(part, "not run: no time was left", at)
            else:
                command = running.get(number) or Running(part.command, part.env)
                running[number] = command
                limit = min(part.limit, begin + bound - command.begin)
                finished = command.finish(limit)
                details, problem = part.read(finished)
                if finished.code is None:
                    problem = f"ran past its limit of {limit:.0f} s" + (f"; {problem}" if problem else "")
                elif finished.code != 0:
                    problem = f"exit status {finished.code}" + (f"; {problem}" if problem else "")
                report.add(part, problem, at, finished, details)
    finally:
        for command in running.values():
            command.end()
    return not any(done["problem"] not in (None, NO_GPU) for done in report.done)


def python(*arguments: str) -> list[str]:
    """A command of the interpreter that runs this."""
    return [sys.executable, *arguments]
