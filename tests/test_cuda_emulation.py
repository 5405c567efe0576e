"""The CUDA kernels compiled for the CPU, where the threads of a block are threads of the machine, against the CPU kernels."""

import json
import subprocess
from pathlib import Path

import pytest
from compile_native import TEAM_LAYERS, compile_emulation, compile_team_layers, require_compiler


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> dict[str, Path]:
    """Two that have the kernels in common, which take their time to compile."""
    require_compiler()
    names = ("cuda_kernels", "gpu_native")
    return dict(zip(names, compile_emulation(tmp_path_factory.mktemp("emulation"), ["-O1"], *names), strict=True))


def test_cuda_kernels_compute_what_the_cpu_kernels_do(programs):
    """Leaves of many sizes in one launch, rows, packs and their rests, unaligned buffers, the step decided in one launch."""
    finished = subprocess.run([str(programs["cuda_kernels"])], capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    checks, failed = finished.stdout.splitlines()[-1].split(" checks, ")
    assert int(checks) > 250 and failed == "0 failed"


@pytest.mark.parametrize("sizes, number, checks", TEAM_LAYERS, ids=["float", "double"])
def test_layers_of_a_team(tmp_path, sizes, number, checks):
    """Each thread its rows and lanes of a layer, in every shape; sums to the bit."""
    require_compiler()
    program = compile_team_layers(tmp_path, ["-O1"], sizes, number)
    finished = subprocess.run([str(program)], capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    assert finished.stdout.splitlines()[-1] == f"{checks} checks, 0 failed"


# Comparisons at least of each part of benchmarks/gpu_native/; a launch and a WHILE node are CUDA's own.
COMPARED = {
    "copies": 0,
    "stage": 100,
    "advance": 18,
    "dense_output": 6,
    "error": 60,
    "rows": 4,
    "launch": 0,
    "graph": 2,
    "loop": 0,
}


def test_the_program_for_a_gpu_finds_its_kernels_right(programs):
    """What gpu_check runs first on a GPU, by emulation: its expectations hold, and every line is JSON."""
    finished = subprocess.run([str(programs["gpu_native"]), *COMPARED], capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    lines = [json.loads(line) for line in finished.stdout.splitlines()]
    ends = {line["what"].removeprefix("end of "): line for line in lines if "checked" in line}
    assert list(ends) == list(COMPARED) and all(line["wrong"] == 0 for line in ends.values())
    before = 0
    for name, line in ends.items():
        assert line["checked"] - before >= COMPARED[name], name
        before = line["checked"]
    unknown = subprocess.run([str(programs["gpu_native"]), "no such part"], capture_output=True, text=True)
    assert unknown.returncode == 2 and json.loads(unknown.stdout)["failed"] == "there is no such part"
