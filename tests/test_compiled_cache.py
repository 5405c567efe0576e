"""The cache of compiled fields on disk, shared by processes, and what happens without a compiler."""

import dataclasses
import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import odenet_cuda
from odenet_cuda import solve
from odenet_cuda.compiled import build

SCRIPT = """
import torch, odenet_cuda, warnings
warnings.simplefilter("always")
y0 = torch.full((3, 1), 2.0, dtype=torch.float64)
field = odenet_cuda.compile(lambda t, y: -y * {factor})
ys = odenet_cuda.solve(field, y0, [0.0, 1.0]).ys
expected = odenet_cuda.solve(lambda t, y: -y * {factor}, y0, [0.0, 1.0]).ys
torch.testing.assert_close(ys, expected, rtol=1e-10, atol=1e-10)
print(field.explain())
"""

# Counts its calls that compile, in the file LOG, and does as told: compiles, fails, or dies in the middle.
COMPILER = """#!/bin/sh
case "$*" in *--version*) exec {real} --version;; esac
echo compiled >> {log}
out=""
while [ $# -gt 0 ]; do case "$1" in -o) out="$2";; esac; args="$args $1"; shift; done
case "{mode}" in
  fails) echo "field.cpp: error: refused on purpose" >&2; exit 1;;
  dies) echo half > "$out"; kill -9 $$;;
esac
exec {real} $args
"""


@pytest.fixture(autouse=True)
def needs_compiler():
    try:
        build.find_compiler()
    except build.NoCompiler as reason:
        pytest.skip(str(reason))


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def compiler(folder: Path, mode: str = "works") -> tuple[Path, Path]:
    """A compiler that notes when it compiles, and its notes."""
    program, log = folder / f"{mode}.sh", folder / f"{mode}.log"
    program.write_text(COMPILER.format(real=build.find_compiler()[0][0], log=log, mode=mode))
    program.chmod(0o755)
    return program, log


def compiles(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


def start(cache: Path, factor: float = 1.5, **environment: object) -> subprocess.Popen:
    variables = {
        **os.environ,
        "ODENET_CACHE": str(cache),
        "ODENET_CXXFLAGS": "-O0",  # it is not the machine code that is tried here
        "OMP_NUM_THREADS": "1",
        **{k: str(v) for k, v in environment.items()},
    }
    command = [sys.executable, "-c", SCRIPT.format(factor=factor)]
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(cache: Path, factor: float = 1.5, **environment: object) -> tuple[str, str]:
    """What explain says, and what went to stderr, of a new process that solved right."""
    process = start(cache, factor, **environment)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.strip(), err


def libraries(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.so"))


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if path.suffix not in (".so", ".lock")]


def test_second_process_compiles_nothing(cache, tmp_path):
    """The folder is the user's alone; a compiler that fails is no trouble where all is cached."""
    works, log = compiler(tmp_path)
    assert run(cache, CXX=works) == ("compiled", "")
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert compiles(log) == len(libraries(cache)) == 1 and leftovers(cache) == []
    assert run(cache, CXX=works)[0] == "compiled"
    assert compiles(log) == 1
    fails, failed = compiler(tmp_path, "fails")
    assert run(cache, CXX=fails) == ("compiled", "") and compiles(failed) == 0


def test_many_processes_at_once(cache, tmp_path):
    """Four that need the same library: one compiles, and none fails."""
    works, log = compiler(tmp_path)
    processes = [start(cache, CXX=works) for _ in range(4)]
    results = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, results
    assert [out.strip() for out, _ in results] == ["compiled"] * 4
    assert compiles(log) == len(libraries(cache)) == 1 and leftovers(cache) == []


@pytest.mark.parametrize("mode", ["fails", "dies"])
def test_compiler_that_fails(cache, tmp_path, mode):
    """It warns once, the stepper serves, and nothing of it is left; with another compiler all is well."""
    broken, log = compiler(tmp_path, mode)
    words, err = run(cache, CXX=broken)
    assert words.startswith("served by the stepper") and "failed" in words
    assert err.count("the stepper serves instead") == 1
    assert compiles(log) == 1
    assert libraries(cache) == [] and leftovers(cache) == []
    assert run(cache)[0] == "compiled"


INTERRUPTED = """
import signal, torch, odenet_cuda
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
y0 = torch.full((3, 1), 2.0, requires_grad={gradient})
field = odenet_cuda.compile(lambda t, y: -y * 1.5)
try:
    odenet_cuda.solve(field, y0, [0.0, 1.0])
except KeyboardInterrupt:
    print(field.explain())
odenet_cuda.solve(field, y0, [0.0, 1.0])
print(field.explain())
"""


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
@pytest.mark.parametrize("gradient", [False, True], ids=["one library", "two side by side"])
def test_interrupted_while_it_compiles(cache, tmp_path, gradient):
    """Ctrl-C, which reaches the compilers too, is KeyboardInterrupt at once; no half is left, and the next solve compiles."""
    program, begun = tmp_path / "waits.sh", tmp_path / "begun"
    count = 1 + gradient
    program.write_text(
        f'#!/bin/sh\ncase "$*" in *--version*) exec {build.find_compiler()[0][0]} --version;; esac\n'
        f"echo . >> {begun}\n[ $(wc -l < {begun}) -gt {count} ] || exec sleep 100\n"
        f'exec {build.find_compiler()[0][0]} "$@"\n'
    )
    program.chmod(0o755)
    environment = {**os.environ, "ODENET_CACHE": str(cache), "ODENET_CXXFLAGS": "-O0", "CXX": str(program)}
    command = [sys.executable, "-c", INTERRUPTED.format(gradient=gradient)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    try:
        while compiles(begun) < count and process.poll() is None:
            time.sleep(0.05)
        time.sleep(0.2)  # until the shell is the program that sleeps
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert out.splitlines() == ["not solved yet", "compiled"] and err == ""
        assert len(libraries(cache)) == count and leftovers(cache) == []
    finally:
        process.kill()
        process.communicate()


def test_no_compiler(cache, tmp_path):
    """One warning however many fields there are, and explain says what to install."""
    script = SCRIPT + "again = odenet_cuda.compile(lambda t, y: -y)\nodenet_cuda.solve(again, y0, [0.0, 1.0])\n"
    script += "odenet_cuda.solve(field, y0, [0.0, 1.0], step_control='per_sample')\nprint(again.explain())\n"
    variables = {**os.environ, "ODENET_CACHE": str(cache), "CXX": str(tmp_path / "none"), "PATH": str(tmp_path / "empty")}
    command = [sys.executable, "-c", script.format(factor=1.5)]
    process = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    assert all("no C++ compiler was found" in line for line in process.stdout.splitlines())
    assert len(process.stdout.splitlines()) == 2
    assert process.stderr.count("the stepper serves instead") == 1


@pytest.mark.parametrize("given", ["ccache-like", "plain"])
def test_compiler_of_the_environment(cache, tmp_path, given):
    """CXX is the compiler, also where it has arguments of its own."""
    works, log = compiler(tmp_path)
    run(cache, CXX=works if given == "plain" else f"{works} -DGIVEN")
    assert compiles(log) == 1


@pytest.fixture
def fresh(cache, monkeypatch):
    """A process that has loaded nothing yet, has warned of nothing, and compiles quickly. Gives the folder of the process."""
    monkeypatch.setenv("ODENET_CACHE", str(cache))
    monkeypatch.setenv("ODENET_CXXFLAGS", "-O0")
    monkeypatch.setattr(build, "_loaded", {})
    monkeypatch.setattr(build, "_refused", {})
    monkeypatch.setattr(build, "_warned", False)
    build._own_folder.cache_clear()
    yield lambda: build._own_folder(os.getpid())
    build._own_folder.cache_clear()


def solved(factor: float) -> str:
    """explain() of a field that solved right."""
    field, y0 = odenet_cuda.compile(lambda t, y: -y * factor), torch.ones(3, 1, dtype=torch.float64)
    torch.testing.assert_close(solve(field, y0, [0.0, 1.0]).ys, solve(field.func, y0, [0.0, 1.0]).ys, rtol=1e-10, atol=0)
    return field.explain()


def test_folder_of_another_user(cache, fresh, monkeypatch):
    """It is not used: a library in it may be anyone's. One warning, and a folder of the process serves."""
    cache.mkdir()
    monkeypatch.setattr(build, "_trusted", lambda owner: owner == -1)
    with pytest.raises(build.NoCompiler, match="another user"):
        build.cache_folder()
    trusted = iter([False] + [True] * 100)
    monkeypatch.setattr(build, "_trusted", lambda owner: next(trusted))
    with pytest.warns(UserWarning, match="another user") as told:
        assert solved(0.12345) == "compiled"
    assert len(told) == 1 and list(cache.iterdir()) == [] and len(libraries(fresh())) == 1


def no_writing(monkeypatch, folder: Path, error: int) -> None:
    """Nothing can be written below the folder, also by root."""
    import builtins
    import tempfile

    def refusing(function, place: int, writes):
        def wrapper(*args, **kwargs):
            where = str(kwargs.get("dir") or (args[place] if len(args) > place else ""))
            if where.startswith(str(folder)) and writes(args):
                raise OSError(error, os.strerror(error), where)
            return function(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(builtins, "open", refusing(open, 0, lambda args: len(args) > 1 and set(args[1]) & set("wa+")))
    monkeypatch.setattr(os, "utime", refusing(os.utime, 0, lambda args: True))
    monkeypatch.setattr(tempfile, "mkdtemp", refusing(tempfile.mkdtemp, 2, lambda args: True))


@pytest.mark.parametrize("error", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT], ids=lambda e: errno.errorcode[e])
def test_nothing_can_be_written(cache, fresh, monkeypatch, error):
    """What is there is used without a word; what is not goes into a folder of the process, with one warning in all."""
    assert solved(0.5) == "compiled"
    before = libraries(cache)
    no_writing(monkeypatch, cache, error)
    build._loaded.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert solved(0.5) == "compiled"
    with pytest.warns(UserWarning, match="until this process ends") as told:
        assert solved(0.75) == "compiled" and solved(1.25) == "compiled"
    assert len(told) == 1 and libraries(cache) == before and len(libraries(fresh())) == 2


def test_compiler_finds_the_disk_full(cache, fresh, tmp_path, monkeypatch):
    """Its words say so: another folder is tried."""
    real, full = build._compile, iter([True])

    def compile_once(command, path):
        if next(full, False):
            program = tmp_path / "full.sh"
            program.write_text(
                "#!/bin/sh\necho 'cc1plus: fatal error: error writing to x.s: No space left on device' >&2\nexit 1\n"
            )
            program.chmod(0o755)
            command = dataclasses.replace(command, compiler=(str(program),))
        real(command, path)

    monkeypatch.setattr(build, "_compile", compile_once)
    with pytest.warns(UserWarning, match="No space left"):
        assert solved(0.625) == "compiled"
    assert libraries(cache) == [] and len(libraries(fresh())) == 1


def test_no_home(fresh, monkeypatch):
    """Nobody knows a home, or it cannot be made."""
    monkeypatch.delenv("ODENET_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.warns(UserWarning, match="home directory"):
        assert solved(0.875) == "compiled"
    assert len(libraries(fresh())) == 1


def test_locks(cache, fresh, monkeypatch):
    """One that a dead process left does not count; one that is held for ever is not waited for; a disk may have none."""
    assert solved(1.0) == "compiled"
    library = libraries(cache)[0]
    library.unlink()  # the lock's file is still there
    build._loaded.clear()
    assert solved(1.0) == "compiled" and libraries(cache) == [library]
    monkeypatch.setattr(build, "_LOCK_SECONDS", 0.1)
    with open(library.with_suffix(".lock"), "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        library.unlink()
        build._loaded.clear()
        assert solved(1.0) == "compiled" and libraries(cache) == [library]

    def none(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    library.unlink()
    build._loaded.clear()
    assert solved(1.0) == "compiled" and libraries(cache) == [library]


def put(library: Path, content: bytes) -> None:
    """Another file in the place of one that this process may have loaded, as a new process finds it."""
    library.unlink()
    library.write_bytes(content)
    build._loaded.clear()


@pytest.mark.parametrize("size", [0, 100, 0.5], ids=["empty", "header", "half"])
def test_truncated_library_is_replaced(cache, fresh, size):
    """What a full disk or a crash left: the answer is right, and the process after finds a whole library."""
    assert solved(1.5) == "compiled"
    library = libraries(cache)[0]
    whole = library.read_bytes()
    put(library, whole[: int(size * len(whole)) if size == 0.5 else size])
    assert solved(1.5) == "compiled"
    assert libraries(cache) == [library] and library.stat().st_size == len(whole) and build._usable(library)


def test_foreign_library(cache, fresh):
    """One of which a number was changed, and one of another field, are replaced."""
    assert solved(1.5) == "compiled"
    library = libraries(cache)[0]
    right = library.read_bytes()
    solve(odenet_cuda.compile(lambda t, y: torch.sin(y)), torch.ones(3, 1, dtype=torch.float64), [0.0, 1.0])
    other = next(path for path in libraries(cache) if path != library).read_bytes()
    for foreign in (right[: len(right) // 2] + b"?" + right[len(right) // 2 + 1 :], other):
        put(library, foreign)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert solved(1.5) == "compiled"
        assert library.read_bytes() != foreign and build._usable(library)


def test_no_library(cache):
    """A file that is whole but cannot be loaded is replaced: by a new process, for one that has loaded the library keeps it."""
    run(cache)
    library = libraries(cache)[0]
    library.write_bytes(b"no library" + build._end(library, b"no library"))
    assert run(cache) == ("compiled", "")
    assert not library.read_bytes().startswith(b"no library") and build._usable(library)


def test_refusal_is_remembered(cache, fresh, monkeypatch):
    """What the compiler refuses is not tried again at every call, nor by another field of the same text."""
    from odenet_cuda.compiled import serve
    from odenet_cuda.compiled.plan import Plan

    monkeypatch.setattr(serve, "_warned", True)
    emitted, calls = Plan.source, []
    monkeypatch.setattr(Plan, "source", lambda *args: calls.append(1) or emitted(*args) + "#error refused on purpose\n")
    compiled = []
    real = build._compile
    monkeypatch.setattr(build, "_compile", lambda *args: compiled.append(1) or real(*args))
    y0 = torch.ones(3, 1, dtype=torch.float64)
    for fields_so_far in (1, 2):
        field = odenet_cuda.compile(lambda t, y: -y * 0.3125)
        for _ in range(3):
            solve(field, y0, [0.0, 1.0])
            assert "refused on purpose" in field.explain()
        assert len(calls) == fields_so_far and len(compiled) == 1


def test_folder_that_others_may_write(cache, monkeypatch):
    """Others lose the right to; a folder that cannot be made is named."""
    cache.mkdir()
    cache.chmod(0o777)
    monkeypatch.setenv("ODENET_CACHE", str(cache))
    assert build.cache_folder() == cache
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    file = cache / "file"
    file.write_text("")
    monkeypatch.setenv("ODENET_CACHE", str(file / "below"))
    with pytest.raises(build.NoCompiler, match="cannot be made"):
        build.cache_folder()


def test_default_folder(tmp_path, monkeypatch):
    """XDG_CACHE_HOME, else ~/.cache."""
    monkeypatch.delenv("ODENET_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert build.cache_folder() == tmp_path / "xdg" / "odenet_cuda"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build.cache_folder() == tmp_path / ".cache" / "odenet_cuda"


def test_oldest_go_first(cache, monkeypatch):
    """Beyond ODENET_CACHE_SIZE, what was used longest ago is removed, but not what was just made."""
    cache.mkdir()
    for i in range(5):
        (cache / f"{i}.so").write_bytes(bytes(100))
        os.utime(cache / f"{i}.so", (1000 + i, 1000 + i))
    os.utime(cache / "0.so", (5000, 5000))  # used since
    monkeypatch.setenv("ODENET_CACHE_SIZE", "300")
    build._prune(cache, cache / "1.so")
    assert [path.name for path in libraries(cache)] == ["0.so", "1.so", "4.so"]
    monkeypatch.setenv("ODENET_CACHE_SIZE", "10")
    build._prune(cache, cache / "1.so")
    assert [path.name for path in libraries(cache)] == ["1.so"]
    monkeypatch.setenv("ODENET_CACHE_SIZE", "much")
    with pytest.warns(UserWarning, match="ODENET_CACHE_SIZE"):
        build._prune(cache, cache / "1.so")


def test_size_bounds_the_cache(cache, fresh, monkeypatch):
    """Two fields where there is room for one: the second stays, and both answers are right."""
    assert solved(1.5) == "compiled"
    first = libraries(cache)[0]
    os.utime(first, (1000, 1000))
    monkeypatch.setenv("ODENET_CACHE_SIZE", str(first.stat().st_size + 10))
    assert solved(2.5) == "compiled"
    assert len(libraries(cache)) == 1 and libraries(cache) != [first]


def test_clear_cache(cache, monkeypatch):
    """``python -m odenet_cuda clear-cache`` removes what is there and says how many."""
    cache.mkdir()
    for name in ("a.so", "b.so", "a.lock"):
        (cache / name).write_text("")
    variables = {**os.environ, "ODENET_CACHE": str(cache)}
    command = [sys.executable, "-m", "odenet_cuda", "clear-cache"]
    out = subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout
    assert "removed 2" in out and list(cache.iterdir()) == []
