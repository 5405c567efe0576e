"""Text -> shared library: the system's C++ compiler, or nvcc, and a cache on disk that many processes share.

The cache lies in ``$ODENET_CACHE``, else in ``$XDG_CACHE_HOME`` or ``~/.cache`` under ``odenet_cuda``. It is private to the
user, holds at most ``$ODENET_CACHE_SIZE`` bytes (default 512 MB; the libraries used longest ago go first) and is removed by
``python -m odenet_cuda clear-cache``. A library comes into it whole, by renaming, so a process that is killed leaves no half.
``$ODENET_CXXFLAGS`` is added to the C++ compiler's flags. nvcc is that of ``$CUDA_HOME``, of the path, or of /usr/local/cuda.
"""

import fcntl
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .. import _C

FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-DNDEBUG",
    "-w",
)
# GCC bug 113255, of g++ before 11.5, 12.4, 13.3 and 14: an inlined copy of a block (`rep movs`) first aligns its target, and
# the source, moved by as much, `src - (dst - aligned)`, is taken for an address inside dst. Stores into a local array just
# before it is copied are then deleted as dead. With the first flag nothing is inlined that way; with the second few copies are
# left to be calls, for a loop over packs stays one.
GNU_X86_FLAGS = ("-mmemcpy-strategy=libcall:-1:noalign", "-fno-tree-loop-distribute-patterns")
LEVEL_FLAGS = {
    "baseline": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
}
CUDA_FLAGS = (
    "-std=c++20",
    "-O3",
    "-shared",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-w",
    "-cudart=static",
    "--expt-relaxed-constexpr",
    "-DNDEBUG",
    "-w",
)
_END = b"odenet_cuda end"  # behind a library, followed by its size
_SECONDS = 300  # a compiler that takes longer is given up

_loaded: dict[str, _C.Library] = {}


Capability = tuple[int, int]  # of a GPU: (9, 0)


class NoCompiler(Exception):
    """There is no C++ compiler or no nvcc, or it failed; the words say which."""


def include_folder() -> Path:
    """What lies in it is `core/`: beside the package where it is installed, in csrc/ in a source tree."""
    here = Path(__file__).resolve().parent.parent
    for folder in (here, here.parent / "csrc"):
        if (folder / "core" / "solve.h").exists():
            return folder
    raise NoCompiler("the headers of the package are missing: core/solve.h")


@functools.cache
def find_compiler() -> tuple[tuple[str, ...], str]:
    """The command of the compiler, with flags where CXX has some, and what it says of its version. Raises NoCompiler."""
    given = os.environ.get("CXX", "")
    for name in (given,) if given else ("c++", "g++", "clang++"):
        command = shlex.split(name)
        path = shutil.which(command[0]) if command else None
        if path:
            run = subprocess.run([path, *command[1:], "--version"], capture_output=True, text=True, check=False)
            if run.returncode == 0:
                return (path, *command[1:]), run.stdout
    where = f" as CXX, {given}" if given else ""
    raise NoCompiler(f"no C++ compiler was found{where}; install g++ 11 or clang++ 14, or newer, or set CXX")


def compiler_flags() -> tuple[str, ...]:
    """FLAGS, and what works around errors of this compiler. Raises NoCompiler."""
    gnu = "Free Software Foundation" in find_compiler()[1]
    return FLAGS + GNU_X86_FLAGS if gnu and platform.machine() in ("x86_64", "AMD64") else FLAGS


@functools.cache
def find_nvcc() -> tuple[tuple[str, ...], str]:
    """The same of nvcc."""
    homes = [Path(home) / "bin" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    for folder in (homes[0], None, homes[-1]):
        path = shutil.which("nvcc", path=None if folder is None else str(folder))
        if path:
            run = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
            if run.returncode == 0:
                return (path,), run.stdout.splitlines()[-1]
    raise NoCompiler("no nvcc was found, which solves on CUDA need; install the CUDA toolkit or set CUDA_HOME")


@functools.cache
def _headers() -> str:
    digest = hashlib.sha256()
    for header in sorted((include_folder() / "core").glob("*.h")):
        digest.update(header.read_bytes())
    return digest.hexdigest()


def cache_folder() -> Path:
    """The folder, made if it is missing. Raises NoCompiler if it belongs to someone else or others may write into it."""
    given = os.environ.get("ODENET_CACHE")
    folder = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "odenet_cuda"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        raise NoCompiler(f"the cache folder {folder} cannot be made: {error.strerror}; set ODENET_CACHE") from error
    if found.st_uid != os.getuid():
        raise NoCompiler(f"the cache folder {folder} belongs to another user; set ODENET_CACHE")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        folder.chmod(0o700)
    return folder


def clear_cache() -> int:
    """Removes every compiled field from the cache; how many there were."""
    files = list(cache_folder().glob("*.so"))
    for file in [*files, *cache_folder().glob("*.lock"), *cache_folder().glob("*.cpp")]:
        file.unlink(missing_ok=True)
    return len(files)


def load(text: str, capability: Capability | None = None) -> _C.Library:
    """The library of this text, from this process, the cache, or the compiler. capability: of the GPU it is for. Raises
    NoCompiler."""
    if capability is None:
        compiler, version = find_compiler()
        level = _C.cpu_level()
        given = shlex.split(os.environ.get("ODENET_CXXFLAGS", ""))
        flags = (*compiler_flags(), f"-DODENET_LEVEL={level}", *LEVEL_FLAGS[level], *given)
    else:
        compiler, version = find_nvcc()
        flags = (*CUDA_FLAGS, f"-arch=sm_{capability[0]}{capability[1]}")
    parts = [text, *compiler[1:], version, platform.machine(), _headers(), *flags]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]
    if key not in _loaded:
        folder = cache_folder()
        path = folder / f"{key}.so"
        with _locked(folder / f"{key}.lock"):
            if not _usable(path):
                _compile(compiler, flags, text, path)
                _prune(folder, path)
        try:
            _loaded[key] = _C.Library(str(path))
        except RuntimeError as error:
            path.unlink(missing_ok=True)
            raise NoCompiler(f"a compiled field could not be loaded: {error}") from error
    return _loaded[key]


def _usable(path: Path) -> bool:
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    if found.st_uid != os.getuid():
        raise NoCompiler(f"{path} belongs to another user; remove it, or set ODENET_CACHE")
    with open(path, "rb") as file:  # one that was cut short would be fatal to load
        file.seek(max(0, found.st_size - len(_END) - 8))
        end = file.read()
    if end != _END + (found.st_size - len(end)).to_bytes(8, "little"):
        return False
    os.utime(path)
    return True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(compiler: tuple[str, ...], flags: tuple[str, ...], text: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        cuda = "-cudart=static" in flags
        source, result = Path(folder) / ("field.cu" if cuda else "field.cpp"), Path(folder) / "field.so"
        source.write_text(text)
        command = [*compiler, *flags, f"-I{include_folder()}", str(source), "-o", str(result)]
        if platform.system() == "Linux" and not cuda:
            command += ["-Wl,--as-needed", *(["-lmvec"] if _has_mvec() else []), "-lm"]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise NoCompiler(f"{compiler[0]} took longer than {_SECONDS} s") from None
        if run.returncode != 0:
            words = [line for line in run.stderr.splitlines() if "error" in line] or run.stderr.splitlines()
            raise NoCompiler(f"{compiler[0]} failed: {(words or ['no message'])[0]}")
        size = result.stat().st_size
        with open(result, "ab") as file:
            file.write(_END + size.to_bytes(8, "little"))
        os.replace(result, path)


def _has_mvec() -> bool:
    return platform.machine() in ("x86_64", "AMD64") and platform.libc_ver()[0] == "glibc"


def _prune(folder: Path, keep: Path) -> None:
    try:
        limit = int(os.environ.get("ODENET_CACHE_SIZE", 512 << 20))
    except ValueError:
        limit = 512 << 20
        warnings.warn("ODENET_CACHE_SIZE must be a number of bytes; 512 MB is used", stacklevel=2)
    found = []
    for file in folder.glob("*.so"):
        try:
            found.append((file.stat().st_mtime, file.stat().st_size, file))
        except FileNotFoundError:  # another process removed it
            continue
    total = sum(size for _, size, _ in found)
    for _, size, file in sorted(found, key=lambda entry: entry[0]):
        if total <= limit:
            return
        if file != keep:
            file.unlink(missing_ok=True)
            total -= size
