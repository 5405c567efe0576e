"""What a quarter of an hour on a GPU can tell, in three stages that each bring knowledge even if all later ones fail.

    python benchmarks/gpu_check.py --stage first|second|third [--only PART ...] [--out FOLDER] [--emulate]

first   4.5 minutes: the kernels without torch, right and how fast; a solve by launches, by a graph and by a WHILE node;
        memcheck and racecheck; meanwhile the extension is built for this card alone; then every way to solve, small
second  7 minutes: the tests marked `gpu` of ops, stepper and types, then of compiled fields and graphs; bench_cuda,
        bench_ensemble and bench_ops
third   9 minutes: all other tests marked `gpu`, the other benchmarks, and compute-sanitizer over tests

It uses the interpreter that starts it, installs nothing and needs no network. Every part is a process with a bound of its own,
and is told of in FOLDER/parts.jsonl as soon as it ends; FOLDER/log.txt is all that was said, a benchmark has a JSON, and
table.txt is printed last. What gpu_prepare.py built beforehand in build/gpu/ is used. Exit status: 0 all went well that could
go, 1 a part failed. Where there is no GPU, parts that need one say so, and the others run; --emulate has threads of the CPU
run the kernels.
"""

import argparse
import ctypes
import json
import os
import re
import signal
import sys
import time
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from gpu_prepare import CACHE, FIELDS, NATIVE, find_tool, unpack
from gpu_report import (
    ROOT,
    Finished,
    Part,
    Reading,
    Report,
    Short,
    no_lines,
    python,
    read_lines,
    read_results,
    read_sanitizer,
    read_tests,
    run,
    run_parts,
)
from gpu_tables import cuda_lines, ensemble_lines, native_lines, ops_lines, smoke_lines

BOUNDS = {"first": 270.0, "second": 420.0, "third": 540.0}  # seconds
PROBE = "import gpu_check, json; print(json.dumps(gpu_check.find_card()))"
LOADED = """
import json, torch
from odenet_cuda import _C
found = {"cuda": _C.cuda, "architectures": _C.cuda_architectures, "compiler": _C.compiler, "torch's CUDA": torch.version.cuda}
print(json.dumps({**found, "card": torch.cuda.get_device_name() if torch.cuda.is_available() else None}))
"""
CLOCKS = "name,driver_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.draw,memory.used"
OPS_TESTS = ["tests/test_ops.py", "tests/test_stepper.py", "tests/test_dtypes.py"]
FIELD_TESTS = ["tests/test_compiled_cuda.py", "tests/test_cuda_graph.py", "tests/test_cuda_graph_gradients.py"]
# Under compute-sanitizer, which is slow: complex128 and float32 run the kernels of float64 and complex64 too.
SANITIZED = "not (float64 or complex64 or wrong_arguments or 20000 or 3000)"
WORKERS = ["-n", "8"]


def find_card() -> dict[str, str] | None:
    """The first card and its capability, asked of the driver; nothing is left on it. Called in a process of its own."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count, device, name, numbers = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256), []
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or count.value == 0:
        return None
    if driver.cuDeviceGet(ctypes.byref(device), 0) or driver.cuDeviceGetName(name, len(name), device):
        return None
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        number = ctypes.c_int()
        if driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device):
            return None
        numbers.append(str(number.value))
    return {"card": name.value.decode(), "capability": ".".join(numbers)}


def last_line(command: list[str]) -> str | None:
    finished = run(command, 30)
    return finished.output.strip().splitlines()[-1] if finished.code == 0 and finished.output.strip() else None


def describe_machine() -> dict[str, Any]:
    """What the results depend on."""
    found = last_line(python("-c", f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); {PROBE}"))
    nvcc = find_tool("nvcc")
    return {
        **({"card": None, "capability": "9.0"} | (json.loads(found or "null") or {})),
        "nvcc": last_line([nvcc, "--version"]) if nvcc else None,
        "torch": metadata.version("torch"),
        "python": sys.version.split()[0],
        "cores": os.cpu_count(),
        "commit": last_line(["git", "rev-parse", "--short", "HEAD"]) or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


# ---- parts ----


def clocks(name: str) -> Part:
    return Part(name, ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv"], 5)


def read_loaded(finished: Finished) -> Reading:
    try:
        found = json.loads(finished.output.strip().rsplit("\n", 1)[-1])
    except ValueError:
        return {}, "the extension could not be asked"
    problem = None if found["cuda"] else "the extension was built without CUDA kernels"
    return {"extension": found}, problem or (None if found["card"] else "torch sees no GPU")


def extension(machine: dict[str, Any], limit: float) -> list[Part]:
    """In place, for this card alone; aside where there is none, for what stands there may serve others."""
    env = {
        "ODENET_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": machine["capability"],
        "MAX_JOBS": str(max(1, (os.cpu_count() or 1) - 2)),
    }
    aside = ROOT / "build" / "gpu" / "extension"
    where = ["--inplace"] if machine["card"] else ["--build-lib", str(aside / "lib"), "--build-temp", str(aside / "temp")]
    warm = "import torch; torch.zeros(1).cuda(); print(torch.__version__, torch.cuda.get_device_properties(0))"
    return [
        Part("torch", python("-c", warm), 90, background=True),  # its libraries are read from the disk meanwhile
        Part("extension", python("setup.py", "build_ext", *where), limit, env=env, gpu=False, background=True),
        Part("import", python("-c", LOADED), 15, read_loaded, needs=("torch", "extension")),
    ]


def native(name: str, limit: float, program: Path, *arguments: str) -> Part:
    command = [str(program), *arguments]
    return Part(name, command, limit, read_lines, needs=("native",), short=native_lines)


def sanitized(tool: str, part: Part) -> Part:
    """The part under compute-sanitizer; without torch's cache, so that each tensor has bounds."""
    program = find_tool("compute-sanitizer") or "compute-sanitizer"
    part.command = [
        program,
        "--tool",
        tool,
        "--require-cuda-init=no",
        "--report-api-errors=no",
        "--error-exitcode=86",
        *part.command,
    ]
    part.env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    part.read = partial(read_sanitizer, read=part.read)
    return part


def tests(name: str, limit: float, *arguments: str) -> Part:
    """pytest that names each test as it runs, and says where one hangs."""
    xml = ROOT / "build" / "gpu" / f"{re.sub('[^a-z]+', '-', name)}.xml"
    xml.unlink(missing_ok=True)
    command = python("-m", "pytest", "-vv", "-o", "faulthandler_timeout=60", f"--junitxml={xml}", *arguments)
    return Part(name, command, limit, partial(read_tests, xml=xml, all_on_cuda=True), needs=("extension",))


def bench(name: str, limit: float, out: Path, script: str, *arguments: str, short: Short = no_lines) -> Part:
    file = out / f"{name}.json"
    command = python(str(Path("benchmarks") / script), *arguments, "--json", str(file))
    return Part(name, command, limit, partial(read_results, file=file), needs=("extension",), short=short)


def first(machine: dict[str, Any], out: Path, emulate: bool) -> list[Part]:
    if emulate:
        program = ROOT / "build" / "gpu" / "emulated" / "gpu_native"
        build = Part("native", python("benchmarks/gpu_check.py", "--build-emulation"), 240, gpu=False, background=True)
    else:
        program = NATIVE
        command = python("benchmarks/gpu_prepare.py", "native", "--capability", machine["capability"])
        build = Part("native", command, 100, gpu=False, background=True)
    kernels = ["stage", "advance", "dense_output", "error"]
    alone = [native("copies", 10, program, "copies"), native("stage", 20, program, "stage")]
    alone += [
        native(name, 12, program, name) for name in ("error", "advance", "dense_output", "rows", "launch", "graph", "loop")
    ]
    for part in alone if emulate else ():
        part.gpu = False
    checks = [
        sanitized("memcheck", native("memcheck", 25, program, "--check", *kernels, "rows")),
        sanitized("racecheck", native("racecheck", 25, program, "--check", *kernels)),
    ]
    smoke = Part("smoke", python("benchmarks/gpu_smoke.py"), 75, read_lines, needs=("extension",), short=smoke_lines)
    return [clocks("clocks"), build, *alone, *checks, *extension(machine, 175), smoke]


def second(machine: dict[str, Any], out: Path, emulate: bool) -> list[Part]:
    few = ["--sizes", "64M", "256M", "--budget", "0.1", "--device", "cuda"]
    large = ["rivals", "lorenz", "--runs", "3", "--limit", "1"]
    return [
        *extension(machine, 180),
        tests("tests-ops", 80, *WORKERS, "-m", "gpu", *OPS_TESTS),
        tests("tests-fields", 75, *WORKERS, "-m", "gpu", *FIELD_TESTS),
        bench("cuda", 55, out, "bench_cuda.py", "--runs", "7", short=cuda_lines),
        bench("ensemble", 50, out, "bench_ensemble.py", *large, short=ensemble_lines),
        bench("ops", 30, out, "bench_ops.py", *few, short=ops_lines),
        clocks("clocks"),
    ]


def third(machine: dict[str, Any], out: Path, emulate: bool) -> list[Part]:
    others = [f"--ignore={path}" for path in (*OPS_TESTS, *FIELD_TESTS)]
    few = ["-m", "gpu", "-k", SANITIZED, FIELD_TESTS[0], *OPS_TESTS[:2]]
    return [
        *extension(machine, 180),
        tests("tests-others", 70, *WORKERS, "-m", "gpu", "tests", *others),
        bench("nets", 80, out, "bench_ensemble.py", "nets", "--runs", "3", "--limit", "2", short=ensemble_lines),
        bench("training", 50, out, "bench_training.py", "--device", "cuda"),
        bench("peers", 50, out, "bench_peers.py", "--device", "cuda"),
        bench("sizes", 40, out, "bench_ops.py", "--device", "cuda", "--budget", "0.1", short=ops_lines),
        sanitized("memcheck", tests("memcheck-tests", 60, *few)),
        sanitized("racecheck", tests("racecheck-tests", 60, *few)),
        clocks("clocks"),
    ]


STAGES = {"first": first, "second": second, "third": third}


def chosen(parts: list[Part], only: list[str]) -> list[Part]:
    """Those, and what they need. All, where none is named."""
    if unknown := set(only) - {part.name for part in parts}:
        raise SystemExit(f"gpu_check: there is no part {unknown.pop()!r}; there are {', '.join(part.name for part in parts)}")
    names = {need for part in parts if part.name in only for need in part.needs} | set(only)
    return [part for part in parts if not only or part.name in names]


def build_emulation() -> None:
    """build/gpu/emulated/gpu_native: the native program, whose kernels threads of the CPU run."""
    sys.path.insert(0, str(ROOT / "tests"))
    from compile_native import compile_emulation

    compile_emulation(ROOT / "build" / "gpu" / "emulated", ["-O1"], "gpu_native")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=STAGES, help="each is bounded: 270, 420 and 540 s")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="these parts of the stage, and what they need")
    parser.add_argument("--out", type=Path, help="the folder of the results; a new one in benchmarks/results unless given")
    parser.add_argument("--emulate", action="store_true", help="the kernels run on the CPU: right or wrong, but no speed")
    parser.add_argument("--build-emulation", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if not arguments.stage and not arguments.build_emulation:
        parser.error("say which --stage: first, second or third")
    return arguments


def main(argv: list[str] | None = None) -> int:
    begin, arguments = time.monotonic(), parse(argv)
    if arguments.build_emulation:
        build_emulation()
        return 0
    machine = describe_machine()
    card = re.sub(r"[^a-z0-9]+", "-", (machine["card"] or "no gpu").lower()).strip("-")
    home = ROOT / "benchmarks" / "results" if machine["card"] else ROOT / "build" / "gpu"
    out = (arguments.out or home / f"{machine['date']}-{card}-{machine['commit']}-{arguments.stage}").resolve()
    (ROOT / "build" / "gpu").mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("ODENET_CACHE", str(CACHE))
    if FIELDS.exists():
        unpack()
    parts = chosen(STAGES[arguments.stage](machine, out, arguments.emulate), arguments.only)
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    report = Report(out, machine)
    good = run_parts(parts, begin, BOUNDS[arguments.stage] - 5, machine["card"], report)
    table = report.table()
    (out / "table.txt").write_text(table)
    print(f"\n{table}\n{time.monotonic() - begin:.0f} s; the results are in {os.path.relpath(out)}")
    return 0 if good else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended too
    sys.exit(main())
