"""The CUDA kernels compile without a warning wherever there is a compiler for them; no GPU is needed."""

import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from cuda_machine_code import ARCHITECTURE, CSRC, Kernel, compile_kernels

from odenet_cuda import _C

SOURCES = sorted((CSRC / "cuda").glob("*.cu"))


def find_nvcc() -> str | None:
    """nvcc on PATH or in the usual place."""
    usual = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(usual) if usual.exists() else None)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Object and kernels of a source, compiled once."""
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc was found")
    return cache(lambda source: compile_kernels(nvcc, source, tmp_path_factory.mktemp(source.stem)))


def test_there_are_sources():
    """There is one CUDA file for each file of the CPU, several for `error`, and one for the graph that repeats a step, which is
    CUDA's alone."""
    if not CSRC.exists():
        pytest.skip("needs the checkout")
    names = {re.sub("^error_.*", "error", path.stem) for path in SOURCES}
    assert names == {"repeat", *(path.stem for path in (CSRC / "cpu").glob("*.cpp"))}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_warnings(source, compiled):
    """One file, with the flags of the build and every warning an error."""
    target, kernels = compiled(source)
    assert target.stat().st_size > 0 and kernels


# ---- the machine code ----

THREADS_OF_MULTIPROCESSOR, REGISTERS_OF_MULTIPROCESSOR, THREADS_OF_BLOCK = 2048, 65536, 256
BYTES = {"f": 4, "d": 8, "N6odenet4HalfE": 2, "N6odenet8BFloat16E": 2, "NS_4HalfE": 2, "NS_8BFloat16E": 2}


def kernels_of(found: dict[str, Kernel], name: str) -> dict[tuple[int, ...], Kernel]:
    """By the bytes of an element and the numbers among the template's arguments; complex types are left out."""
    kernels = {}
    for mangled, kernel in found.items():
        text = re.search(rf"\d{name}I(\w+?)((?:Lin?\d+E)+)EEv", mangled)
        if text and text[1] in BYTES:
            numbers = re.findall(r"Li(n?\d+)E", text[2])
            key = (BYTES[text[1]], *(int(number.replace("n", "-")) for number in numbers))
            kernels.setdefault(key, []).append(kernel)
    return kernels


def blocks_at_once(kernel: Kernel) -> int:
    """Of a multiprocessor, by its registers, which are given out by eight to a thread."""
    of_thread = (kernel.registers + 7) // 8 * 8
    return min(THREADS_OF_MULTIPROCESSOR, REGISTERS_OF_MULTIPROCESSOR // of_thread) // THREADS_OF_BLOCK


def test_advance_stores_packs(compiled):
    """Three stores of 16 bytes, three of one element for what is left after the packs, and all the threads that fit."""
    kernels = kernels_of(compiled(CSRC / "cuda" / "advance.cu")[1], "advance_kernel")
    packs = [(size, kernel) for (size, width, _), both in kernels.items() if width > 1 for kernel in both]
    assert len(packs) == 8  # four types, few leaves or many
    for size, kernel in packs:
        assert kernel.stores == {16: 3, size: 3} and kernel.loads[16] == 2
        assert blocks_at_once(kernel) == 8 and kernel.instructions < 500


def test_stage_stores_packs(compiled):
    """One store of 16 bytes; loads of 16 bytes for each slope and y0. Six blocks at once, all eight for few slopes."""
    kernels = kernels_of(compiled(CSRC / "cuda" / "stage.cu")[1], "stage_kernel")
    packs = [(size, slopes, kernel) for (size, slopes, width, _), both in kernels.items() if width > 1 for kernel in both]
    assert len(packs) == 4 * 11
    for size, slopes, kernel in packs:
        assert kernel.stores == {16: 1, size: 1}
        assert slopes < 0 or kernel.loads[16] == slopes + 1
        assert blocks_at_once(kernel) >= (8 if 0 <= slopes <= 2 and size > 2 else 6) and kernel.instructions < 750


def test_dense_output_stores_packs(compiled):
    """One store of 16 bytes, or of each element where a pack does not fit."""
    kernels = kernels_of(compiled(CSRC / "cuda" / "dense_output.cu")[1], "dense_output_kernel")
    assert sum(len(both) for both in kernels.values()) == 8
    for (size, _), both in kernels.items():
        for kernel in both:
            assert kernel.stores == {16: 1, size: 16 // size} if size != 8 else {16: 1, 8: 2}
            assert blocks_at_once(kernel) >= 3


@pytest.mark.parametrize("of", ["float", "double", "half", "complex"])
def test_error_has_three_blocks_at_once(of, compiled):
    """And reads packs: 16 bytes for each slope, y0 and y1."""
    found = compiled(CSRC / "cuda" / f"error_{of}.cu")[1]
    assert all(blocks_at_once(kernel) >= 3 for name, kernel in found.items() if "error_kernel" in name)
    for (_, slopes, _), both in kernels_of(found, "error_kernel").items():
        assert all(slopes < 0 or kernel.loads[16] == slopes + 2 for kernel in both)


TIMES = """#include "core/step_size.h"
__global__ void times(odenet::StepSize s, double* out) {
  const odenet::Row r = odenet::load_row(s, threadIdx.x);
  out[2 * threadIdx.x] = odenet::stage_time<double>(r, s.c[2]);
  out[2 * threadIdx.x + 1] = r[odenet::kTime] + s.c[2] * r[odenet::kDt];
}
"""


def test_times_are_rounded_as_on_the_cpu(tmp_path):
    """In two operations; the compiler makes one of the same written plainly, which shows that it would."""
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc was found")
    source = tmp_path / "times.cu"
    source.write_text(TIMES)
    command = [nvcc, "-std=c++20", "-O3", "-ptx", f"-arch=sm_{ARCHITECTURE}", f"-I{CSRC}", str(source), "-o", "-"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert text.count("fma.rn.f64") == 1 and text.count("mul.rn.f64") == 1 and text.count("add.rn.f64") == 1


@pytest.mark.skipif(_C.cuda is None, reason="odenet_cuda was built without CUDA kernels")
def test_built_with_cuda():
    """The extension with CUDA kernels is imported in a new process, under this torch, and says what it holds."""
    code = "from odenet_cuda import _C; print(_C.cuda); print(_C.cuda_architectures)"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert imported.returncode == 0, imported.stderr[-4000:]
    toolkit, architectures = imported.stdout.splitlines()
    assert (toolkit, architectures) == (_C.cuda, _C.cuda_architectures)
    assert all(part.isdigit() for part in toolkit.split("."))
    for name in architectures.split():
        major, minor = name.removesuffix("+PTX").split(".")
        assert major.isdigit() and minor[:1].isdigit()


@pytest.mark.gpu
def test_device_is_served():
    """The kernels hold code for the device, or code that its driver can compile for it."""
    capability = torch.cuda.get_device_capability()
    names = _C.cuda_architectures.split()
    numbers = {name: tuple(int(part) for part in name.removesuffix("+PTX").split(".")) for name in names}
    same_major = any(number[0] == capability[0] and number <= capability for number in numbers.values())
    later = any(name.endswith("+PTX") and number <= capability for name, number in numbers.items())
    assert same_major or later
