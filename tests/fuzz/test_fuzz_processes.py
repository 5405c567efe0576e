"""Threads, forks, interrupts and a cache that many processes share, or that is broken: right, or in words; never a deadlock."""

import ctypes
import os
import random
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fuzzing import FRESH, child, examples, tick
from hypothesis import given, note
from hypothesis import strategies as st

from odenet_cuda.compiled import build

QUICK = {"ODENET_CXXFLAGS": "-O0"}  # it is not the compiler that is tried here

BEGIN = """
import math, os, sys, threading, time, warnings
import torch, odenet_cuda
from odenet_cuda import solve
from torch import nn
torch.set_num_threads({threads})
D = torch.float64

class Field(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.w = nn.Parameter(torch.randn(3, 3, generator=g, dtype=D) / 2)
    def forward(self, t, y):
        return torch.tanh(y @ self.w) * torch.cos(t)

def results(func, seed, gradient="direct", control="per_sample"):
    g = torch.Generator().manual_seed(seed)
    y0 = torch.randn(40, 3, generator=g, dtype=D).requires_grad_()
    ys = solve(func, y0, [0.0, 0.5, 1.0], gradient=gradient, step_control=control).ys
    return [ys.detach(), *torch.autograd.grad((ys * ys).sum(), [y0, *func.parameters()])]

def check(func, plain, seed, *how):
    for x, y in zip(results(func, seed, *how), results(plain, seed, *how)):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
"""

# Each worker: its own field or one for all, made before or in the thread; changes weights between solves of its own.
WORK = """
shared, plain = {make}(Field()), Field()
errors = []
def work(i):
    try:
        for k in range({rounds}):
            own = Field(i)
            func = shared if {share} else {make}(own)
            check(func, plain if {share} else own, 10 * i + k, {gradient!r}, {control!r})
    except BaseException as error:
        errors.append(repr(error))
"""

JOINS = {
    "threads": """
threads = [threading.Thread(target=work, args=(i,)) for i in range({workers})]
[x.start() for x in threads]; [x.join() for x in threads]
""",
    "fork": """
work(0)  # threads of torch and of the compiled code have been started
children = []
for i in range({workers}):
    pid = os.fork()
    if pid == 0:
        work(i); print(errors) if errors else None
        sys.stdout.flush(); os._exit(1 if errors else 0)
    children.append(pid)
assert all(os.waitpid(pid, 0)[1] == 0 for pid in children), "a child failed"
""",
    "fork while threads run": """
threads = [threading.Thread(target=work, args=(i,)) for i in range({workers})]
[x.start() for x in threads]
pid = os.fork()
if pid == 0:
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
[x.join() for x in threads]
""",
    "interrupts": """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
work(0)  # what torch imports late is not whole in Python where its import is interrupted
def interrupt():
    for _ in range(3):
        time.sleep(0.05 + 0.1 * {workers})
        os.kill(os.getpid(), signal.SIGINT)
    sent.append(True)
sent = []  # Python takes a thread whose join is interrupted for one that has ended
threading.Thread(target=interrupt).start()
while not sent:
    try:
        work(0)
        errors[:] = [x for x in errors if "KeyboardInterrupt" not in x]
    except KeyboardInterrupt:
        pass
try: time.sleep(0.1)
except KeyboardInterrupt: pass
errors[:] = [x for x in errors if "KeyboardInterrupt" not in x]
work(1)  # all is well afterwards
""",
}


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Path:
    """A cache that holds what these programs need."""
    folder = tmp_path_factory.mktemp("filled") / "cache"
    child(BEGIN.format(threads=1) + SOLVE.format(fresh=FRESH), environment={"ODENET_CACHE": folder, **QUICK})
    return folder


SOLVE = """
for control in ("joint", "per_sample") if {fresh} else ("per_sample",):
    for gradient in ("direct", "adjoint") if {fresh} else ("direct",):
        field = odenet_cuda.compile(Field())
        check(field, Field(), 0, gradient, control)
print(field.explain())
"""
ONE = """
field = odenet_cuda.compile(Field())
check(field, Field(), 0)
print(field.explain())
"""


@examples(short=2, fresh=8, shrink=False)
@given(
    st.sampled_from(sorted(JOINS)), st.integers(1, 4), st.integers(1, 3), st.booleans(), st.sampled_from([1, 2, 3]),
    st.sampled_from(["odenet_cuda.compile", "(lambda f: f)"]), st.sampled_from(["direct", "adjoint"][: 1 + FRESH]),
    st.sampled_from(["per_sample", "joint"][: 1 + FRESH]),
)  # fmt: skip
def test_many_at_once(filled, join, workers, rounds, share, threads, make, gradient, control):
    tick()
    threads = 1 if "fork" in join else threads  # torch's own threads do not live through a fork, and it waits for them
    how = {"rounds": rounds, "share": share, "make": make, "gradient": gradient, "control": control, "workers": workers}
    program = BEGIN.format(threads=threads) + (WORK + JOINS[join]).format(**how) + "assert not errors, errors\nprint('right')\n"
    note(program)
    assert child(program, environment={"ODENET_CACHE": filled, **QUICK}).endswith("right\n")


def broken(kind: str, cache: Path, chance: random.Random) -> dict:
    """Does something to the cache; what the environment of the next process then has besides."""
    libraries = sorted(cache.glob("*.so"))
    if kind in ("missing", "someone else's file", "home that does not exist"):
        shutil.rmtree(cache)
    if kind == "someone else's file":
        cache.write_text("not a folder")
    if kind == "home that does not exist":
        return {"ODENET_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/proc/nobody"}
    for library in libraries if kind != "missing" else ():
        if not library.exists():
            continue
        data = library.read_bytes()
        if kind == "cut short":
            library.write_bytes(data[: chance.randrange(len(data))])
        elif kind == "zeros within":
            place = chance.randrange(len(data) - 200)
            library.write_bytes(data[:place] + bytes(150) + data[place + 150 :])
        elif kind == "another library":
            library.write_bytes(chance.choice(libraries).read_bytes())
        elif kind == "folders":
            library.unlink()
            library.mkdir()
        elif kind == "no right to read":
            library.chmod(0)
    if kind == "locks of the dead":
        for lock in cache.glob("*.lock"):
            lock.write_text("1")
    if kind == "read-only":
        for path in [*cache.iterdir(), cache]:
            path.chmod(path.stat().st_mode & ~0o222)
    if kind == "read-only and empty":
        shutil.rmtree(cache)
        cache.mkdir(mode=0o500)
    return {}


KINDS = (
    "missing", "someone else's file", "home that does not exist", "cut short", "zeros within", "another library", "folders",
    "no right to read", "locks of the dead", "read-only", "read-only and empty",
)  # fmt: skip


def unprivileged() -> None:
    """Rights of files count for root too once it has lost the right to pass them by."""
    drop, dac_override, dac_read_search = 24, 1, 2  # PR_CAPBSET_DROP and two of the capabilities
    for capability in (dac_override, dac_read_search):
        ctypes.CDLL(None).prctl(drop, capability, 0, 0, 0)


@examples(short=2, fresh=8, shrink=False)
@given(st.sampled_from(KINDS), st.integers(0, 1000), st.booleans())
def test_broken_cache(filled, tmp_path_factory, kind, seed, compiler):
    """The stepper's answer, or a library made anew; with and without a compiler, and without a traceback."""
    tick()
    note(f"{kind}, {seed}, {compiler}")
    folder = tmp_path_factory.mktemp("broken")
    cache = folder / "cache"
    shutil.copytree(filled, cache)
    environment = {"ODENET_CACHE": cache, "TMPDIR": folder, **QUICK, **broken(kind, cache, random.Random(seed))}
    if not compiler:
        environment["CXX"] = folder / "none"
    out = child(BEGIN.format(threads=1) + ONE, environment=environment, before=unprivileged if os.getuid() == 0 else None)
    if kind in ("read-only", "locks of the dead") and compiler:
        assert out == "compiled\n", out


WAITS = """#!/bin/sh
case "$*" in *--version*) exec {real} --version;; esac
echo $$ > {begun}.part; mv {begun}.part {begun}
while [ ! -e {go} ]; do sleep 0.05; done
exec {real} "$@"
"""


@examples(short=1, fresh=3, shrink=False)
@given(st.sampled_from([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]), st.sampled_from(["process", "compiler", "nobody"]))
def test_killed_while_compiling(tmp_path_factory, with_what, whom):
    """A process or its compiler dies in the middle, while others wait for the same library: they have it in the end."""
    tick()
    note(f"{with_what!r} kills {whom}")
    folder = tmp_path_factory.mktemp("killed")
    begun, go, cxx = folder / "begun", folder / "go", folder / "cxx"
    cxx.write_text(WAITS.format(real=build.find_compiler()[0][0], begun=begun, go=go))
    cxx.chmod(0o755)
    environment = {"ODENET_CACHE": folder / "cache", "CXX": cxx, **QUICK}
    program = BEGIN.format(threads=1) + ONE
    variables = {**os.environ, **{name: str(value) for name, value in environment.items()}, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen([sys.executable, "-c", program], env=variables, start_new_session=True, stderr=subprocess.DEVNULL,
                             stdout=subprocess.DEVNULL)  # fmt: skip
    try:
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(child, program, environment=environment) for _ in range(2)]
            while not begun.exists():
                assert first.poll() is None or begun.exists()
            if whom == "process":
                os.killpg(first.pid, with_what)
            elif whom == "compiler":
                os.kill(int(begun.read_text()), with_what)
            go.touch()
            for future in waiting:
                assert "compiled" in future.result() or whom == "compiler"
    finally:
        first.kill()
        first.wait()
    assert not [path for path in (folder / "cache").iterdir() if path.suffix not in (".so", ".lock")] or whom != "nobody"
