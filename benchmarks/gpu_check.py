"""One command for a machine with a GPU: builds for it, tests, looks for memory errors and races, measures, and reports.

    python benchmarks/gpu_check.py [--parts build,tests,sanitizer,bench] [--minutes N] [--out FOLDER] [--dry-run]

It uses the interpreter that starts it, installs nothing and needs no network. The results are FOLDER/<date>-<card>-<commit>.md
and .json, written again after each step. A step that fails or runs past its share of the time is reported, then the next runs.
Exit status: 0 all went well, 1 a step failed, 2 there is no GPU. --dry-run goes the same way on the CPU, with few tests.
"""

import argparse
import os
import re
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from gpu_report import (
    ROOT,
    Finished,
    Reading,
    Step,
    python,
    read_json,
    read_results,
    read_sanitizer,
    read_tests,
    run,
    run_steps,
    write_report,
)

PARTS = ("build", "tests", "sanitizer", "bench")
PROBE = """
import json, torch
found = {"torch": torch.__version__, "torch's CUDA": torch.version.cuda}
if torch.cuda.is_available():
    card = torch.cuda.get_device_properties(0)
    found |= {"card": card.name, "capability": f"{card.major}.{card.minor}", "memory": f"{card.total_memory / 2**30:.1f} GiB"}
print(json.dumps(found))
"""
LOADED = """
import json
from odenet_cuda import _C
print(json.dumps({"cuda": _C.cuda, "architectures": getattr(_C, "cuda_architectures", None), "compiler": _C.compiler}))
"""
CLOCKS = (
    "name,driver_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.draw,utilization.gpu"
)
CUDA_TESTS = "cuda and not test_cuda_compile"
# Under compute-sanitizer: complex128 and float32 run the kernels of float64 and complex64 too.
SANITIZED_TESTS = "cuda and not (float64 or complex64 or wrong_arguments)"
KERNEL_TESTS = ["tests/test_ops.py", "tests/test_stepper.py"]
KERNEL_TESTS += [
    f"tests/test_compiled_cuda.py::test_gpu[{g}-{c}-300]" for g in ("direct", "adjoint") for c in ("per_sample", "joint")
]
KERNEL_TESTS += [
    f"tests/test_compiled_cuda.py::test_gpu_tensor_cores[{m}-37]" for m in ("float32-1e-05", "tf32-0.002", "bf16-0.02")
]


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit."""
    homes = [Path(home) for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    return shutil.which(name) or next((str(p) for home in homes if (p := home / "bin" / name).exists()), None)


def last_line(command: list[str]) -> str | None:
    finished = run(command, 60)
    return finished.output.strip().splitlines()[-1] if finished.code == 0 and finished.output.strip() else None


def clocks() -> str:
    return run(["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv"], 20).output


def describe_machine() -> dict[str, Any]:
    """What the results depend on. The card is looked for in a process of its own: this one never holds a context on it."""
    probe = run(python("-c", PROBE), 180)
    if probe.code != 0:
        raise SystemExit(f"gpu_check: torch cannot be asked for a GPU:\n{probe.output[-2000:]}")
    nvcc = find_tool("nvcc")
    changes = run(["git", "status", "--porcelain"], 60)
    driver = run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], 60)
    return {
        "card": None,
        **read_json(probe)[0],
        "driver": driver.output.strip().splitlines()[0] if driver.code == 0 else None,
        "nvcc": last_line([nvcc, "--version"]) if nvcc else None,
        "python": sys.version.split()[0],
        "commit": last_line(["git", "rev-parse", "--short", "HEAD"]) or "unknown",
        "uncommitted changes": bool(changes.output.strip()) if changes.code == 0 else None,
        "date": time.strftime("%Y-%m-%d"),
    }


def read_loaded(finished: Finished, dry: bool) -> Reading:
    found, problem = read_json(finished)
    if not problem and not found["cuda"] and not dry:
        problem = "the extension was built without CUDA kernels"
    return {"extension": found}, problem


def build_part(machine: dict[str, Any], work: Path, dry: bool) -> list[Step]:
    """In place, for this card alone; a dry run builds aside, without CUDA."""
    env = {"ODENET_CUDA": "0" if dry else "1"}
    if not dry:
        env["TORCH_CUDA_ARCH_LIST"] = machine["capability"]
    where = ["--build-lib", str(work / "lib"), "--build-temp", str(work / "temp")] if dry else ["--inplace"]
    return [
        Step("build", "build", python("setup.py", "build_ext", *where), 8, env=env, needed=True),
        Step("build", "import", python("-c", LOADED), 1, partial(read_loaded, dry=dry), needed=True),
    ]


def pytest_command(xml: Path, *arguments: str) -> list[str]:
    """pytest that names each test as it runs, and says where one hangs."""
    return python("-m", "pytest", "-vv", "-o", "faulthandler_timeout=120", f"--junitxml={xml}", *arguments)


def tests_part(work: Path, dry: bool) -> list[Step]:
    """Those on CUDA first, then all others."""
    chosen = {"CUDA": (8, ["-k", CUDA_TESTS]), "all others": (8, ["-k", f"not ({CUDA_TESTS})"])}
    if dry:
        chosen = {"a few": (1, ["tests/test_ops.py", "-k", "cpu and test_advance"])}
    steps = []
    for name, (weight, arguments) in chosen.items():
        xml = work / f"tests {name}.xml"
        read = partial(read_tests, xml=xml, all_on_cuda=name == "CUDA")
        steps.append(Step("tests", name, pytest_command(xml, *arguments), weight, read))
    return steps


def sanitizer_part(work: Path, tools: list[str], expression: str) -> list[Step]:
    """compute-sanitizer over tests of the kernels; without torch's cache, so that each tensor has bounds."""
    program = find_tool("compute-sanitizer") or "compute-sanitizer"
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    steps = []
    for tool in tools:
        xml, log = work / f"{tool}.xml", work / f"{tool}.log"
        command = [program, "--tool", tool, "--require-cuda-init=no", "--report-api-errors=no", "--error-exitcode=86"]
        command += [f"--log-file={log}", *pytest_command(xml, *KERNEL_TESTS, "-k", expression)]
        steps.append(Step("sanitizer", tool, command, 5, partial(read_sanitizer, xml=xml, log=log), env))
    return steps


def bench_part(work: Path, dry: bool) -> list[Step]:
    chosen = {
        "ops": (4, ["bench_ops.py", "--device", "cuda", "--budget", "0.2", "--sizes", "1K", "256K", "4M", "64M", "256M"]),
        "solves": (4, ["bench_odeint.py", "peers", "--device", "cuda"]),
        "training": (4, ["bench_training.py", "--device", "cuda"]),
        "launches": (4, ["bench_cuda.py"]),
        "ensemble": (4, ["bench_ensemble.py"]),
    }
    if dry:
        chosen = {"ops": (1, ["bench_ops.py", "--quick", "--sizes", "1K"])}
    steps = []
    for name, (weight, (script, *arguments)) in chosen.items():
        file = work / f"{name}.json"
        command = python(str(Path("benchmarks") / script), *arguments, "--json", str(file))
        steps.append(Step("bench", name, command, weight, partial(read_results, file=file), keep_output=True))
    return steps


def comma_list(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=comma_list, default=list(PARTS), help=f"some of {','.join(PARTS)}; all unless given")
    parser.add_argument("--minutes", type=float, default=25, help="for everything together; 25 unless given")
    parser.add_argument("--out", type=Path, help="the folder of the report; benchmarks/results unless given")
    parser.add_argument("--sanitizer-tools", type=comma_list, default=["memcheck", "racecheck"], help="initcheck is another")
    parser.add_argument("--sanitizer-tests", default=SANITIZED_TESTS, metavar="EXPR", help="pytest -k; it is slow")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU; the report goes to build/gpu-check unless told")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"there is no part {unknown.pop()!r}; there are {', '.join(PARTS)}")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    begin, dry = time.monotonic(), arguments.dry_run
    machine = describe_machine()
    if machine["card"] is None and not dry:
        print("gpu_check: torch sees no GPU here; --dry-run goes the same way on the CPU.", file=sys.stderr)
        return 2
    if dry:
        machine["card"] = "CPU (dry run)"
    card = re.sub(r"[^a-z0-9]+", "-", machine["card"].lower()).strip("-")
    name = f"{machine['date']}-{card}-{machine['commit']}"
    folder = arguments.out or ROOT.joinpath(*(("build", "gpu-check") if dry else ("benchmarks", "results")))
    report: dict[str, Any] = {"machine": machine, "arguments": sys.argv[1:] if argv is None else argv, "steps": []}
    report["clocks"] = {} if dry else {"before": clocks()}

    def write() -> None:
        if not dry:
            report["clocks"]["after"] = clocks()
        report["minutes"] = round((time.monotonic() - begin) / 60, 1)
        write_report(report, folder, name)

    work = ROOT / "build" / "gpu-check" / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    parts = {
        "build": build_part(machine, work, dry),
        "tests": tests_part(work, dry),
        "sanitizer": [] if dry else sanitizer_part(work, arguments.sanitizer_tools, arguments.sanitizer_tests),
        "bench": bench_part(work, dry),
    }
    steps = [step for part in PARTS if part in arguments.parts for step in parts[part]]
    good = run_steps(steps, begin + arguments.minutes * 60, report, write)
    print(f"written to {folder / name}.md and .json")
    return 0 if good else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended too
    sys.exit(main())
