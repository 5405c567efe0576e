"""`make test-sanitize`: the C++ kernels under sanitizers, built into build/sanitize beside the normal build.

address  the CPU kernels in threads (native/threads.cpp), and the CUDA kernels and layers of compiled fields with a block's
         threads as threads of the machine (native/cuda_kernels.cpp, native/team_layers.cpp), then the tests of the ops, of the
         stepper and of compiled fields, under AddressSanitizer and UndefinedBehaviorSanitizer
thread   the programs of native/, and the CUDA text of compiled fields (tests/test_compiled_cuda.py), under ThreadSanitizer

Each sanitizer must first report the faults that native/threads.cpp and native/emulation.h commit when they are asked to.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

from compile_native import ROOT, TEAM_LAYERS, compile_emulation, compile_team_layers, compile_threads, setup_py

FOLDER = ROOT / "build" / "sanitize"
# Of compiled fields those tests that go through every kind of kernel: the compiler needs half a minute for a sanitized one.
FIELDS = ["batches", "many_outputs", "tuple_state", "float32", "gradients_of_batches", "gradients_of_a_net"]
FIELDS += ["gradients_for_args", "same_bits_in_any_number_of_threads", "failures"]
TESTS = ["tests/test_ops.py", "tests/test_stepper.py", *(f"tests/test_compiled.py::test_{name}" for name in FIELDS)]
TESTS += ["tests/test_compiled_cuda.py"]
FAULTS = {
    "address": {"overrun": "heap-buffer-overflow", "misaligned": "misaligned address"},
    "thread": {"race": "data race"},
}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",  # Python itself leaks
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    # Of Python and torch, which are not instrumented, it would see the races and not the locks.
    "TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1",
}


def fail(message: str) -> None:
    raise SystemExit(f"sanitize: {message}")


def run(title: str, command: list[str], **arguments) -> None:
    """Runs it and stops where it fails."""
    print(f"== {title}", flush=True)
    begin = time.monotonic()
    code = subprocess.run(command, **arguments).returncode
    if code != 0:
        fail(f"{title}: failed with exit status {code}.")
    print(f"   {time.monotonic() - begin:.0f} s", flush=True)


def check_native(sanitizer: str) -> None:
    """The program of native/threads.cpp on every instruction set: first what must be reported, then what must not."""
    setup = setup_py()
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    levels = setup["LEVELS"] if on_x86 else {"baseline": []}
    print(f"== {sanitizer}: compiling native/threads.cpp", flush=True)
    program = compile_threads(FOLDER / f"{sanitizer}-native", setup["sanitizer_flags"](), levels)
    env = {**os.environ, **OPTIONS}
    for fault, words in FAULTS[sanitizer].items():
        faulty = subprocess.run([str(program), fault], capture_output=True, text=True, env=env)
        if faulty.returncode == 0 or words not in faulty.stderr:
            fail(f"{sanitizer} did not report the fault {fault!r}, but: {faulty.stderr[-2000:]}")
    run(f"{sanitizer}: native/threads.cpp", [str(program)], env=env)
    print(f"== {sanitizer}: compiling native/cuda_kernels.cpp", flush=True)
    (program,) = compile_emulation(FOLDER / f"{sanitizer}-emulation", setup["sanitizer_flags"](), "cuda_kernels")
    run(f"{sanitizer}: native/cuda_kernels.cpp", [str(program)], env=env)
    for sizes, number, _ in TEAM_LAYERS:
        folder = FOLDER / f"{sanitizer}-team-{number}"
        layers = compile_team_layers(folder, ["-O1", *setup["sanitizer_flags"]()], sizes, number)
        run(f"{sanitizer}: native/team_layers.cpp of {number}", [str(layers)], env=env)


def runtimes(*libraries: str) -> str:
    """What to preload: these libraries, and the one of C++, whose exceptions they take over when they start."""
    compiler = setup_py()["find_compiler"]()
    paths = []
    for name in (*libraries, "libstdc++.so.6"):
        printed = subprocess.run([compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout
        path = Path(printed.strip())
        if not path.is_absolute():
            fail(f"{compiler} has no {name}; this needs g++ with the sanitizers' libraries (CXX chooses the compiler).")
        paths.append(str(path.resolve()))
    return " ".join(paths)


def check_tests() -> None:
    """The tests of the ops and the stepper, with an extension built under AddressSanitizer."""
    library, preload = FOLDER / "lib", runtimes("libasan.so", "libubsan.so")
    shutil.rmtree(library, ignore_errors=True)
    build = [sys.executable, "setup.py", "build", "--build-lib", str(library), "--build-temp", str(FOLDER / "temp")]
    run("address: building the extension", build, cwd=ROOT, stdout=subprocess.DEVNULL)
    env = {**os.environ, **OPTIONS, "PYTHONPATH": str(library), "LD_PRELOAD": preload}
    env |= {"ODENET_CACHE": str(FOLDER / "fields"), "ODENET_CXXFLAGS": " ".join(setup_py()["sanitizer_flags"]())}
    # From a folder where no other odenet_cuda lies.
    where = "from odenet_cuda import _C; print(_C.__file__)"
    found = subprocess.run([sys.executable, "-c", where], cwd=FOLDER, env=env, capture_output=True, text=True)
    if found.returncode != 0:
        fail(f"the sanitized extension is not imported: {found.stderr[-2000:]}")
    extension = Path(found.stdout.strip())
    if library not in extension.parents or b"__asan_report" not in extension.read_bytes():
        fail(f"{extension} was imported, not a sanitized one in {library}.")
    run("address: the tests", pytest("-k", "not nvcc", *TESTS), cwd=FOLDER, env=env)


def check_fields() -> None:
    """The CUDA text of compiled fields, each thread of a block one of the machine; the extension is the usual one."""
    test, flags = "tests/test_compiled_cuda.py", " ".join(setup_py()["sanitizer_flags"]())
    env = {**os.environ, **OPTIONS, "LD_PRELOAD": runtimes("libtsan.so"), "ODENET_CXXFLAGS": flags}
    faulty = {**env, "ODENET_CXXFLAGS": flags + " -DODENET_FAULT"}
    found = subprocess.run(pytest("-k", "test_same_bits", test), cwd=FOLDER, env=faulty, capture_output=True, text=True)
    if "data race" not in found.stderr:
        fail(f"thread did not report threads that do not wait for each other, but: {(found.stdout + found.stderr)[-2000:]}")
    # Not with calls of one step each: the sanitizer does not survive so many short threads, and the step is the same.
    run(f"thread: {test}", pytest("-k", "not nvcc and not go_on", test), cwd=FOLDER, env=env)


def pytest(*arguments: str) -> list[str]:
    """The command. --capture=sys: a report goes past pytest, which would lose it."""
    arguments = tuple(str(ROOT / argument) if argument.startswith("tests/") else argument for argument in arguments)
    return [sys.executable, "-m", "pytest", "--capture=sys", "-p", "no:cacheprovider", *arguments]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sanitizers", nargs="*", metavar="SANITIZER", help=f"{' or '.join(FAULTS)}; both unless given")
    sanitizers = parser.parse_args().sanitizers or list(FAULTS)
    if unknown := set(sanitizers) - set(FAULTS):
        parser.error(f"there is no sanitizer {unknown.pop()!r}; there are {', '.join(FAULTS)}")
    for sanitizer in sanitizers:
        os.environ.update(ODENET_SANITIZE=sanitizer, ODENET_CUDA="0")
        check_native(sanitizer)
        {"address": check_tests, "thread": check_fields}[sanitizer]()
    print("no sanitizer found anything")


if __name__ == "__main__":
    main()
