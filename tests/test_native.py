"""The CPU kernels in threads, in a program of their own; `make test-sanitize` runs the same under sanitizers."""

import subprocess

from compile_native import compile_threads, require_compiler

OPS = {"stage", "stage, streamed", "error", "first_step", "step_size", "dense_output", "advance"}


def test_threads_give_the_bits_of_one_thread(tmp_path):
    """Every op, cut into ranges that run in several threads, gives the bits of one range in one thread."""
    require_compiler()
    program = compile_threads(tmp_path, ["-O1"], {"baseline": []})
    finished = subprocess.run([str(program)], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    lines = {line[:16].strip(): line for line in finished.stdout.splitlines()}
    assert set(lines) == OPS
    assert all(line.endswith(", 0 wrong") for line in lines.values())
