"""The compilers of the system, their flags, and the headers that they are given."""

import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-ffp-contract=off",  # see core/vector.h
    "-DNDEBUG",
    "-w",
)
# GCC bug 113255, seen with g++ 11 and 12.2 at -O2 and -O3: an inlined copy of a block (`rep movs`) first aligns its target, and
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

Capability = tuple[int, int]  # of a GPU: (9, 0)


class NoCompiler(Exception):
    """There is no C++ compiler or no nvcc, or it failed; the words say which. quiet: no warning is to be made of it."""

    quiet = False


class Refused(NoCompiler):
    """It would fail again: the compiler refuses the text, or the library has proved wrong. quiet: it has been told of."""

    def __init__(self, words: str, quiet: bool = False):
        super().__init__(words)
        self.quiet = quiet


class Interrupted(NoCompiler):
    """The user has ended it: it is asked again."""

    quiet = True


def include_folder() -> Path:
    """What lies in it is `core/`: beside the package where it is installed, in csrc/ in a source tree."""
    here = Path(__file__).resolve().parent.parent
    for folder in (here, here.parent / "csrc"):
        if (folder / "core" / "driver.h").exists():
            return folder
    raise NoCompiler("the headers of the package are missing: core/driver.h")


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
def headers() -> str:
    digest = hashlib.sha256()
    for header in sorted((include_folder() / "core").glob("*.h")):
        digest.update(header.read_bytes())
    return digest.hexdigest()


def has_mvec() -> bool:
    return platform.machine() in ("x86_64", "AMD64") and platform.libc_ver()[0] == "glibc"
