"""The CUDA kernels compiled for the CPU, where the threads of a block are threads of the machine, against the CPU kernels."""

import subprocess
from pathlib import Path

from compile_native import compile_emulation, require_compiler


def test_cuda_kernels_compute_what_the_cpu_kernels_do(tmp_path: Path):
    """Leaves of many sizes in one launch, rows, packs and their rests, unaligned buffers, the step decided in one launch."""
    require_compiler()
    program = compile_emulation(tmp_path, ["-O1"])
    finished = subprocess.run([str(program)], capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    checks, failed = finished.stdout.splitlines()[-1].split(" checks, ")
    assert int(checks) > 250 and failed == "0 failed"
