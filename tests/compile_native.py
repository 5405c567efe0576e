"""Compiles the programs of native/, which test the kernels without Python and torch, with the flags of setup.py."""

import os
import runpy
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["-std=c++20", "-DNDEBUG", "-Wall", "-Wextra", "-fno-math-errno", "-ffp-contract=off", f"-I{ROOT / 'csrc'}"]
# The program says itself how large the caches are.
OWN_CACHE = "-Dlast_level_cache=machine_last_level_cache"


def setup_py() -> dict[str, Any]:
    """The names that setup.py defines, without building anything."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


def require_compiler() -> None:
    """Skips the test where there is no checkout or no compiler."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("needs the checkout")
    try:
        setup_py()["find_compiler"]()
    except SystemExit as reason:
        pytest.skip(str(reason))


def compile_threads(folder: Path, flags: list[str], levels: dict[str, list[str]]) -> Path:
    """The CPU kernels in threads. levels: the flags of each instruction set of the kernels, as in setup.py."""
    if len(levels) > 1:
        flags = [*flags, "-DODENET_X86"]
    units = {"threads": [str(ROOT / "tests" / "native" / "threads.cpp")]}
    units["machine"] = [OWN_CACHE, str(ROOT / "csrc" / "machine.cpp")]
    for level, own in levels.items():
        units |= cpu_units(level, own)
    return compile_program(folder / "threads", flags, units)


def compile_emulation(folder: Path, flags: list[str], *programs: str) -> list[Path]:
    """The CUDA kernels, blocks of 8 threads of the CPU. programs: "cuda_kernels", beside the CPU kernels, and
    "gpu_native", that of benchmarks/gpu_native/."""
    own = {
        "cuda_kernels": {"kernels": [str(ROOT / "tests" / "native" / "cuda_kernels.cpp")], **cpu_units("baseline", [])},
        "gpu_native": emulated_units("benchmarks/gpu_native"),
    }
    units = emulated_units("csrc/cuda")
    kernels = list(units)
    for name in programs:
        units |= own[name]
    objects = compile_units(folder, flags, units)
    return [link(folder / name, flags, [objects[unit] for unit in (*kernels, *own[name])]) for name in programs]


# Blocks and numbers for native/team_layers.cpp, and how many comparisons it makes with them.
TEAM_LAYERS = [({"TEAM": 16, "GROUPS": 4, "ROW": 24}, "float", 48), ({"TEAM": 8, "GROUPS": 8, "ROW": 8}, "double", 36)]


def compile_team_layers(folder: Path, flags: list[str], sizes: dict[str, int], number: str) -> Path:
    native = ROOT / "tests" / "native"
    own = [f"-DODENET_{name}={size}" for name, size in sizes.items()] + [f"-DNUMBER={number}", "-w"]  # as compiled fields are
    units = {"team_layers": [*own, "-include", str(native / "emulation.h"), str(native / "team_layers.cpp")]}
    return link(folder / "team_layers", flags, list(compile_units(folder, flags, units).values()))


def emulated_units(folder: str) -> dict[str, list[str]]:
    """The CUDA files of a folder, as C++."""
    flags = ["-DODENET_THREADS=8", '-DODENET_ARCHITECTURES="none"', "-Wno-unknown-pragmas"]
    for header in ("emulated_runtime.h", "emulation.h"):
        flags += ["-include", str(ROOT / "tests" / "native" / header)]
    sources = sorted((ROOT / folder).glob("*.cu"))
    return {f"{source.parent.name}_{source.stem}": [*flags, "-x", "c++", str(source)] for source in sources}


def cpu_units(level: str, flags: list[str]) -> dict[str, list[str]]:
    sources = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    return {f"{level}_{source.stem}": [f"-DODENET_LEVEL={level}", *flags, str(source)] for source in sources}


def compile_program(program: Path, flags: list[str], units: dict[str, list[str]]) -> Path:
    """The program, from units compiled in parallel; their objects lie beside it."""
    return link(program, flags, list(compile_units(program.parent, flags, units).values()))


def compile_units(folder: Path, flags: list[str], units: dict[str, list[str]]) -> dict[str, str]:
    """The object of each unit, in the folder."""
    compiler = setup_py()["find_compiler"]()
    folder.mkdir(parents=True, exist_ok=True)
    objects = {name: str(folder / f"{name}.o") for name in units}

    def compile_unit(name: str) -> None:
        run_compiler(compiler, *FLAGS, *flags, "-c", *units[name], "-o", objects[name])

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        list(pool.map(compile_unit, units))
    return objects


def link(program: Path, flags: list[str], objects: list[str]) -> Path:
    run_compiler(setup_py()["find_compiler"](), *flags, *objects, "-pthread", "-o", str(program))
    return program


def run_compiler(*command: str) -> None:
    """Runs it; a warning is an error too."""
    compiled = subprocess.run(command, capture_output=True, text=True)
    if compiled.returncode != 0 or "warning:" in compiled.stderr:
        raise RuntimeError(f"{' '.join(command)}\n{compiled.stderr[-4000:]}")
