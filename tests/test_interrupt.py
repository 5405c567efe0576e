"""An endless solve ends at once when it is interrupted."""

import os
import signal
import subprocess
import sys
import time

import pytest

LIMIT = 1.0  # seconds from the signal to the exception
START = 120.0  # seconds in which a loaded machine imports torch and takes the first steps

SCRIPT = """
import signal
import torch
from odenet_cuda import solve

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins with it ignored
calls = 0
told = False

def func(t, y):
    global calls, told
    calls += 1
    if calls == BEGUN and not told:
        told = True
        print("begun", flush=True)
    return torch.stack([y[..., 1], -y[..., 0]], dim=-1)

y0 = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
try:
    SOLVE
except KeyboardInterrupt:
    print("interrupted", flush=True)
else:
    print("finished", flush=True)
"""

SOLVES = {
    "joint": (200, "solve(func, y0, [0.0, 1e12])"),
    "per sample": (200, "solve(func, y0, [0.0, 1e12], step_control='per_sample')"),
    "fixed": (200, "solve(func, y0, [0.0, 1.0], method='euler', step_size=1 / 2_000_000)"),
    "recorded": (200, "solve(func, y0.requires_grad_(), [0.0, 1e12])"),
    "backward": (
        400,
        "solve(func, y0.requires_grad_(), [0.0, 1.0], gradient='adjoint', "
        "adjoint_options={'max_step': 1e-9}).ys.sum().backward()",
    ),
}


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
@pytest.mark.parametrize("name", SOLVES)
def test_interrupt(name):
    """SIGINT ends in KeyboardInterrupt within a second."""
    begun, call = SOLVES[name]
    script = SCRIPT.replace("BEGUN", str(begun)).replace("SOLVE", call)
    process = subprocess.Popen([sys.executable, "-u", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    watchdog = subprocess.Popen([sys.executable, "-c", f"import time, os; time.sleep({START}); os.kill({process.pid}, 9)"])
    try:
        assert process.stdout.readline() == "begun\n", process.stderr.read()
        sent = time.monotonic()
        process.send_signal(signal.SIGINT)
        line = process.stdout.readline()
        took = time.monotonic() - sent
        assert line == "interrupted\n", process.stderr.read()
        assert took < LIMIT
        assert process.wait(timeout=30) == 0
    finally:
        watchdog.kill()
        process.kill()
        watchdog.wait()
        process.wait()
        process.stdout.close()
        process.stderr.close()
