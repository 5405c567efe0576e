"""Text -> shared library: the system's C++ compiler, or nvcc, and a cache on disk that many processes share.

The cache lies in ``$ODENET_CACHE``, else in ``$XDG_CACHE_HOME`` or ``~/.cache`` under ``odenet_cuda``. It is private to the
user, holds at most ``$ODENET_CACHE_SIZE`` bytes (default 512 MB; the libraries used longest ago go first) and is removed by
``python -m odenet_cuda clear-cache``. A library comes into it whole, by renaming, so a process that is killed leaves no half;
its digest is looked at before it is loaded. Where nothing can be written, what is in the cache is used, and what is not is
compiled in a folder of the process.
``$ODENET_CXXFLAGS`` is added to the C++ compiler's flags. nvcc is that of ``$CUDA_HOME``, of the path, or of /usr/local/cuda.
"""

import atexit
import fcntl
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from .. import _C
from .compilers import (
    CUDA_FLAGS,
    LEVEL_FLAGS,
    Capability,
    Interrupted,
    NoCompiler,
    Refused,
    compiler_flags,
    find_compiler,
    find_nvcc,
    has_mvec,
    headers,
    include_folder,
)

_END = b"odenet_cuda end"  # behind a library, followed by the digest of its key and itself
_END_SIZE = len(_END) + hashlib.sha256().digest_size
_SECONDS = 300  # a compiler that takes longer is given up
_LOCK_SECONDS = 60  # the longest that a process waits for another that compiles the same

_loaded: dict[str, _C.Library] = {}
_refused: dict[str, str] = {}  # why, of what could not be compiled or has proved wrong
_warned = False


def cache_folder() -> Path:
    """The folder, made if it is missing. Raises NoCompiler where it cannot be made, belongs to another user than this one or
    root, or others may write into it."""
    given = os.environ.get("ODENET_CACHE") or os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(given) if given else Path.home() / ".cache"
        folder = folder if os.environ.get("ODENET_CACHE") else folder / "odenet_cuda"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except RuntimeError as error:  # nobody knows a home
        raise NoCompiler(f"{error}; set ODENET_CACHE") from error
    except OSError as error:
        raise NoCompiler(f"the cache folder {folder} cannot be made: {error.strerror}; set ODENET_CACHE") from error
    if not _trusted(found.st_uid):
        raise NoCompiler(f"the cache folder {folder} belongs to another user; set ODENET_CACHE")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        try:
            folder.chmod(0o700)
        except OSError:
            raise NoCompiler(f"others may write into the cache folder {folder}; set ODENET_CACHE") from None
    return folder


def _trusted(owner: int) -> bool:
    return owner in (os.getuid(), 0)


@functools.cache
def _own_folder(process: int) -> Path:
    """A folder of this process, where the cache cannot be used. It goes with it."""
    try:
        folder = tempfile.mkdtemp(prefix="odenet_cuda-")
    except OSError as error:
        try:
            folder = tempfile.mkdtemp(prefix="odenet_cuda-", dir="/dev/shm")
        except OSError:
            raise NoCompiler(f"there is no folder to compile in: {error}") from error

    def remove() -> None:
        if os.getpid() == process:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return Path(folder)


def clear_cache() -> int:
    """Removes every compiled field from the cache; how many there were."""
    files = list(cache_folder().glob("*.so"))
    for file in [*files, *cache_folder().glob("*.lock"), *cache_folder().glob("*.cpp")]:
        file.unlink(missing_ok=True)
    return len(files)


@dataclass(frozen=True)
class Command:
    """How a text is compiled. key: of its library, by all that this depends on."""

    compiler: tuple[str, ...]
    version: str
    flags: tuple[str, ...]
    text: str

    @property
    def key(self) -> str:
        parts = [self.text, *self.compiler[1:], self.version, platform.machine(), headers(), *self.flags]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]


def command_for(text: str, capability: Capability | None = None) -> Command:
    """capability: of the GPU it is for. Raises NoCompiler."""
    if capability is None:
        compiler, version = find_compiler()
        level = _C.cpu_level()
        given = shlex.split(os.environ.get("ODENET_CXXFLAGS", ""))
        return Command(compiler, version, (*compiler_flags(), f"-DODENET_LEVEL={level}", *LEVEL_FLAGS[level], *given), text)
    compiler, version = find_nvcc()
    return Command(compiler, version, (*CUDA_FLAGS, f"-arch=sm_{capability[0]}{capability[1]}"), text)


def load(text: str, capability: Capability | None = None) -> _C.Library:
    """The library of this text, from this process, the cache, or the compiler. capability: of the GPU it is for. Raises
    NoCompiler; what the compiler refused once it is not asked again."""
    command = command_for(text, capability)
    key = command.key
    if key in _refused:
        raise Refused(_refused[key], quiet=True)
    if key not in _loaded:
        try:
            _loaded[key] = _find(command, key)
        except Refused as error:
            _refused[key] = str(error)
            raise
    return _loaded[key]


def discard(text: str, capability: Capability | None, reason: str) -> str:
    """A library that has proved wrong: it leaves the cache, and this process does not try it again. Where its text is now."""
    key = command_for(text, capability).key
    _refused[key] = reason
    _loaded.pop(key, None)
    kept = f"its text has the key {key}"
    for find in (lambda: _own_folder(os.getpid()), cache_folder):
        with suppress(NoCompiler, OSError):
            folder = find()
            (folder / f"{key}.so").unlink(missing_ok=True)
            (folder / f"wrong-{key}.cpp").write_text(text)
            kept = f"its text is in {folder / f'wrong-{key}.cpp'}"
    return kept


def _find(command: Command, key: str) -> _C.Library:
    """From the cache, else into it. Where it cannot be used, what is in it may be; else a folder of this process serves."""
    global _warned
    try:
        return _find_in(cache_folder(), command, key)
    except (Refused, Interrupted):
        raise
    except (OSError, NoCompiler) as error:
        folder = _own_folder(os.getpid())
        if not _warned:
            _warned = True
            why = str(error) if isinstance(error, NoCompiler) else f"the cache folder cannot be used: {error}"
            words = f"odenet_cuda.compile: {why}; what is compiled is kept in {folder} until this process ends"
            warnings.warn(words, stacklevel=2)
    try:
        return _find_in(folder, command, key)
    except OSError as error:
        raise NoCompiler(f"a compiled field can be kept neither in the cache nor in {folder}: {error}") from error


def _find_in(folder: Path, command: Command, key: str) -> _C.Library:
    """Raises OSError where the folder is to blame, Refused where the compiler is."""
    path = folder / f"{key}.so"
    if _usable(path):  # whole, for it came by renaming: no lock is needed
        with suppress(RuntimeError):
            return _C.Library(str(path))
        path.unlink()
    with _locked(folder / f"{key}.lock", path):
        if not _usable(path):
            _compile(command, path)
            _prune(folder, path)
    try:
        return _C.Library(str(path))
    except RuntimeError as error:  # on a disk from which nothing may be run, say
        path.unlink(missing_ok=True)
        raise OSError(f"a compiled field could not be loaded: {error}") from error


def _end(path: Path, body: bytes) -> bytes:
    """What stands behind a library; it holds the key too, for another's library under this name would be run as this one."""
    return _END + hashlib.sha256(path.stem.encode() + body).digest()


def _usable(path: Path) -> bool:
    """Whether it is there, whole, and nobody else's."""
    try:
        with open(path, "rb") as file:
            owner, content = os.fstat(file.fileno()).st_uid, file.read()
    except OSError:
        return False
    if not _trusted(owner):
        raise NoCompiler(f"{path} belongs to another user; remove it, or set ODENET_CACHE")
    body, end = content[:-_END_SIZE], content[-_END_SIZE:]  # one that was cut short would be fatal to load
    if end != _end(path, body):
        return False
    with suppress(OSError):
        os.utime(path)
    return True


@contextmanager
def _locked(path: Path, library: Path) -> Iterator[None]:
    """Alone, so that one process compiles and the others wait; but for a process that holds the lock for ever, or a disk that
    has no locks, nobody waits: then two compile the same."""
    with open(path, "w") as file:
        end = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end or library.exists():
                    break
                time.sleep(0.02)
            except OSError:
                break
        yield


def _compile(command: Command, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, ignore_cleanup_errors=True) as folder:
        cuda = "-cudart=static" in command.flags
        source, result = Path(folder) / ("field.cu" if cuda else "field.cpp"), Path(folder) / "field.so"
        source.write_text(command.text)
        words = [*command.compiler, *command.flags, f"-I{include_folder()}", str(source), "-o", str(result)]
        if platform.system() == "Linux" and not cuda:
            words += ["-Wl,--as-needed", *(["-lmvec"] if has_mvec() else []), "-lm"]
        name = command.compiler[0]
        try:
            run = subprocess.run(words, capture_output=True, text=True, timeout=_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise Refused(f"{name} took longer than {_SECONDS} s") from None
        if run.returncode == -signal.SIGINT:  # that of a terminal reaches it too
            raise Interrupted(f"{name} was interrupted")
        if run.returncode != 0:
            if full := re.search("No space left on device|Disk quota exceeded", run.stderr):
                raise OSError(f"{name} failed: {full[0]}")
            errors = [line for line in run.stderr.splitlines() if "error" in line] or run.stderr.splitlines()
            raise Refused(f"{name} failed: {(errors or ['no message'])[0]}")
        with open(result, "r+b") as file:
            file.write(_end(path, file.read()))
        os.replace(result, path)


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
