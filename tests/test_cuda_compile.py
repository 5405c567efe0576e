"""The CUDA kernels compile without a warning wherever there is a compiler for them; no GPU is needed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from odenet_cuda import _C

CSRC = Path(__file__).resolve().parent.parent / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
ARCHITECTURE = "90"


def find_nvcc() -> str | None:
    """nvcc on PATH or in the usual place."""
    usual = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(usual) if usual.exists() else None)


def test_there_are_sources():
    """There is one CUDA file for each file of the CPU, and one for the graph that repeats a step, which is CUDA's alone."""
    if not CSRC.exists():
        pytest.skip("needs the checkout")
    assert {path.stem for path in SOURCES} == {"repeat", *(path.stem for path in (CSRC / "cpu").glob("*.cpp"))}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_warnings(source, tmp_path):
    """One file, with the flags of the build and every warning an error."""
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc was found")
    target = tmp_path / f"{source.stem}.o"
    command = [nvcc, "-std=c++20", "-O3", "-DNDEBUG", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    command += [f"-gencode=arch=compute_{ARCHITECTURE},code=sm_{ARCHITECTURE}"]
    command += [f'-DODENET_ARCHITECTURES="{ARCHITECTURE}"', "-Werror=all-warnings", "-c", str(source), "-o", str(target)]
    compiled = subprocess.run(command, capture_output=True, text=True)
    words = compiled.stdout + compiled.stderr
    assert compiled.returncode == 0 and "warning" not in words, words[-4000:]
    assert target.stat().st_size > 0


TIMES = """#include "core/step_size.h"
__global__ void times(odenet::StepSize s, double* out) {
  const odenet::Row<double> r = odenet::load_row(s, threadIdx.x);
  out[2 * threadIdx.x] = odenet::stage_time<double>(s, r, s.c[2]);
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
