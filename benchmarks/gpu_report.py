"""The machinery of gpu_check: runs commands within limits of time, reads what they leave, and writes one report of it all."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
INTERRUPT_S = 10  # how long an interrupted process may take to end by itself
TAIL = 6000  # characters of the output of a failed step
VERDICTS = {"PASSED": "passed", "FAILED": "failed", "ERROR": "errors", "SKIPPED": "skipped", "XFAIL": "skipped"}


@dataclass
class Finished:
    """A command that ended. code: its exit status, None where it ran past its limit."""

    code: int | None
    seconds: float
    output: str


# What the output and the files of a step say, and what is wrong with it, or None.
Reading = tuple[dict[str, Any], str | None]


@dataclass
class Step:
    """A command of a part. weight: its share of the time that is left. needed: the rest cannot run without it."""

    part: str
    name: str
    command: list[str]
    weight: float
    read: Callable[[Finished], Reading] = lambda finished: ({}, None)
    env: dict[str, str] = field(default_factory=dict)
    needed: bool = False
    keep_output: bool = False


def end_group(process: subprocess.Popen) -> None:
    """Ends the process and whatever it started; interrupted, pytest still writes what it has."""
    for number, seconds in ((signal.SIGINT, INTERRUPT_S), (signal.SIGKILL, INTERRUPT_S)):
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run(command: list[str], limit: float, env: dict[str, str] | None = None) -> Finished:
    """The command from the root of the checkout, in a process group of its own, ended with all it started at its limit."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **(env or {})}
    begin, code = time.monotonic(), None
    with tempfile.TemporaryFile() as log:
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        except OSError as error:
            return Finished(127, 0.0, f"{command[0]}: {error.strerror}\n")
        try:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(limit)
        finally:
            end_group(process)
        seconds = time.monotonic() - begin
        log.seek(0)
        return Finished(code, seconds, without_paths(log.read().decode(errors="replace")))


def without_paths(text: str) -> str:
    """The text without the folders of this machine."""
    text = text.replace(sys.executable, "python").replace(f"{ROOT}{os.sep}", "")
    for prefix in (sys.prefix, sys.base_prefix):
        text = text if prefix in ("/usr", "/usr/local") else text.replace(prefix, "PREFIX")
    return text


def read_json(finished: Finished) -> Reading:
    """The last line of the output, which is to be JSON."""
    try:
        return json.loads(finished.output.strip().rsplit("\n", 1)[-1]), None
    except ValueError:
        return {}, "did not say what it was asked"


def read_tests(finished: Finished, xml: Path, all_on_cuda: bool = False) -> Reading:
    """Counts and failures, from pytest's XML, or from its lines where it was killed before it wrote any."""
    counts, failures, reasons = Counter[str](), [], Counter[str]()
    unfinished = None
    for line in finished.output.splitlines():
        if match := re.match(r"(\S+\.py::.+?) (?:(PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b.*)?$", line):
            name, verdict = match.groups()
            unfinished = None if verdict else name
            if verdict:
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
        details["unfinished"] = unfinished
    if failures:
        return details, f"{len(failures)} of {sum(counts.values())} tests failed"
    if not counts["passed"]:
        return details, "no test passed" + "".join(f"; skipped: {reason}" for reason, _ in reasons.most_common(1))
    no_cuda = [reason for reason in reasons if "CUDA" in reason]
    return details, f"tests were skipped: {no_cuda[0]}" if all_on_cuda and no_cuda else None


def read_sanitizer(finished: Finished, xml: Path, log: Path) -> Reading:
    """As read_tests, and the errors or hazards that compute-sanitizer counted."""
    details, problem = read_tests(finished, xml, all_on_cuda=True)
    text = log.read_text(errors="replace") if log.exists() else ""
    numbers = re.findall(r"(?:ERROR SUMMARY: ([\d,]+) error|RACECHECK SUMMARY: ([\d,]+) hazard)", text)
    details["log"] = text[:TAIL]
    if not numbers:
        return details, "compute-sanitizer wrote no summary" + (f"; {problem}" if problem else "")
    details["errors"] = sum(int("".join(pair).replace(",", "")) for pair in numbers)
    return details, f"{details['errors']} errors" if details["errors"] else problem


def read_results(finished: Finished, file: Path) -> Reading:
    """The results that a benchmark wrote."""
    try:
        return {"results": json.loads(file.read_text())}, None
    except (OSError, ValueError):
        return {}, "wrote no results"


def execute(step: Step, limit: float) -> dict[str, Any]:
    """Runs a step and tells what came of it."""
    finished = run(step.command, limit, step.env)
    details, problem = step.read(finished)
    if finished.code is None:
        problem = f"ran past its limit of {limit:.0f} s" + (f"; {problem}" if problem else "")
    elif finished.code != 0:
        problem = f"exit status {finished.code}" + (f"; {problem}" if problem else "")
    output = finished.output if step.keep_output and not problem else finished.output[-TAIL:] if problem else ""
    return {**record(step, problem), "seconds": round(finished.seconds, 1), "details": details, "output": output}


def record(step: Step, problem: str | None) -> dict[str, Any]:
    command = without_paths(shlex.join(step.command))
    return {"part": step.part, "name": step.name, "problem": problem, "command": command, "env": step.env}


def run_steps(steps: list[Step], deadline: float, report: dict[str, Any], write: Callable[[], None]) -> bool:
    """Runs the steps until the deadline, of time.monotonic(), and writes the report after each. Whether all went well."""
    missing = None
    for number, step in enumerate(steps):
        left = deadline - time.monotonic()
        limit = left * step.weight / sum(later.weight for later in steps[number:])
        if missing or limit < 1:
            done = record(step, f"not run: {missing} failed" if missing else "not run: no time was left")
        else:
            print(f"{step.part}: {step.name}, at most {limit:.0f} s", flush=True)
            done = execute(step, limit)
        print(f"    {done['problem'] or 'passed'}", flush=True)
        report["steps"].append(done)
        write()
        if step.needed and done["problem"]:
            missing = step.name
    return not any(done["problem"] for done in report["steps"])


def fenced(text: str) -> list[str]:
    return ["```text", text.strip().replace("```", "'''"), "```", ""]


def markdown(report: dict[str, Any]) -> str:
    """The report in words and tables."""
    machine = report["machine"]
    lines = [f"# {machine['card']}, {machine['date']}, commit {machine['commit']}", ""]
    lines += ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in machine.items()), ""]
    lines += ["| part | step | result | seconds | what |", "| --- | --- | --- | --- | --- |"]
    for done in report["steps"]:
        details = done.get("details", {})
        what = ", ".join(f"{count} {name}" for name, count in details.get("counts", {}).items())
        if "errors" in details:
            what += f", {details['errors']} errors by compute-sanitizer"
        result = f"**{done['problem']}**" if done["problem"] else "passed"
        lines.append(f"| {done['part']} | {done['name']} | {result} | {done.get('seconds', '')} | {what} |")
    lines.append("")
    for done in report["steps"]:
        details = done.get("details", {})
        lines += [f"## {done['part']}: {done['name']}", "", f"`{done['command']}`", ""]
        lines += [f"- {name}: {details[name]}" for name in ("extension", "unfinished") if name in details]
        lines += [f"- {count} skipped: {reason}" for reason, count in details.get("skipped", {}).items()]
        lines += [f"- `{failure['test']}`: {failure['message']}" for failure in details.get("failures", [])]
        lines += [""] if lines[-1] else []
        for text in (details.get("log"), done.get("output")):
            lines += fenced(text) if text else []
    for when, clocks in report["clocks"].items():
        lines += [f"## nvidia-smi {when}", "", *fenced(clocks)]
    return "\n".join(lines).rstrip() + "\n"


def write_report(report: dict[str, Any], folder: Path, name: str) -> None:
    """Both files, each put in place whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".json", json.dumps(report, indent=1) + "\n"), (".md", markdown(report))):
        part = folder / f"{name}{suffix}.part"
        part.write_text(text)
        part.replace(folder / f"{name}{suffix}")


def python(*arguments: str) -> list[str]:
    """A command of the interpreter that runs this."""
    return [sys.executable, *arguments]
