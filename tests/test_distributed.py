"""Models that are trained in two processes: DDP and FSDP2 on the CPU, against one process with the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("distributed_cases.py")
LIMIT = 240.0  # seconds; a hanging collective gives up after 60

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs torch.distributed and gloo"
)


def run(*cases: str) -> None:
    """Runs cases of distributed_cases.py, one after the other, in two processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT), *cases]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(launch, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.terminate()  # it ends its processes
        output, _ = process.communicate()
        pytest.fail(f"took more than {LIMIT} s:\n{output}")
    assert process.returncode == 0, output
    passed = [line.removeprefix("passed ") for line in output.splitlines() if line.startswith("passed ")]
    assert passed == list(cases), output


def test_ddp():
    """Gradients are those of the whole batch; so they are where blocks share a field."""
    run("ddp", "ddp_shared")


def test_ddp_unused_parameters():
    """Parameters that the loss does not depend on get no gradient and hold nothing up."""
    run("ddp_unused", "ddp_unused_in_field")


def test_fsdp():
    """Gradients are those of the whole batch, with the model sharded as one and with a block for itself."""
    run("fsdp_model", "fsdp_block", "fsdp_shared")


def test_fsdp_of_a_field():
    """A field, or a layer of it, that is sharded for itself would get wrong gradients: the solve says so."""
    run("fsdp_field", "fsdp_layer")


def test_fsdp_of_a_closure():
    """So it does where func is no module but calls one that is sharded."""
    run("fsdp_closure")
