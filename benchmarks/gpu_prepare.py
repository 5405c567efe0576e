"""Builds, on a machine that needs no GPU, what a check of a GPU would otherwise spend its minutes on.

    python benchmarks/gpu_prepare.py [native] [fields] [--capability 9.0]     both unless given

build/gpu/native, with its digest beside it, is the program of benchmarks/gpu_native/, build/gpu/fields.tar.xz the compiled
fields of gpu_smoke.py, bench_cuda.py and bench_ensemble.py: nvcc takes a quarter of a minute for each. These three files are
all that gpu_check.py needs to find on another machine. `native` leaves a program alone that is built from these very sources
and runs here.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "gpu"
NATIVE, CACHE, FIELDS = FOLDER / "native", FOLDER / "cache", FOLDER / "fields.tar.xz"
FLAGS = ["-std=c++20", "-O3", "-DNDEBUG", f"-I{ROOT / 'csrc'}"]


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit."""
    homes = [Path(home) for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    return shutil.which(name) or next((str(p) for home in homes if (p := home / "bin" / name).exists()), None)


# ---- the program ----


def native_sources() -> list[Path]:
    return sorted([*(ROOT / "csrc" / "cuda").glob("*.cu"), *(ROOT / "benchmarks" / "gpu_native").glob("*.cu")])


def digest(capability: str) -> str:
    """Of all that the program is made of."""
    found = hashlib.sha256(capability.encode())
    for folder in ("csrc", "csrc/core", "csrc/cuda", "benchmarks/gpu_native"):
        for path in sorted(path for path in (ROOT / folder).iterdir() if path.suffix in (".h", ".cu")):
            found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def is_built(program: Path, capability: str) -> bool:
    """Whether it is that of these sources, and runs here."""
    mark = program.with_suffix(".digest")
    if not program.exists() or not mark.exists() or mark.read_text() != digest(capability):
        return False
    try:
        return subprocess.run([str(program)], capture_output=True).returncode == 0
    except OSError:
        return False


def compile_native(program: Path, capability: str) -> None:
    """All sources side by side, and linked with nothing but the C library of the machine it will run on."""
    nvcc = find_tool("nvcc")
    if nvcc is None:
        raise SystemExit("gpu_prepare: no nvcc was found; install the CUDA toolkit or set CUDA_HOME")
    number = capability.replace(".", "")
    flags = [*FLAGS, f"-gencode=arch=compute_{number},code=sm_{number}", f'-DODENET_ARCHITECTURES="{capability}"']
    folder = program.with_suffix(".objects")
    folder.mkdir(parents=True, exist_ok=True)
    objects = {source: folder / f"{source.parent.name}-{source.stem}.o" for source in native_sources()}

    def compile_one(source: Path) -> None:
        subprocess.run([nvcc, *flags, "-c", str(source), "-o", str(objects[source])], check=True)

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        list(pool.map(compile_one, objects))
    link = ["-cudart=static", "-Xcompiler=-static-libstdc++,-static-libgcc", "-o", str(program)]
    subprocess.run([nvcc, *link, *map(str, objects.values())], check=True)
    shutil.rmtree(folder)
    program.with_suffix(".digest").write_text(digest(capability))


# ---- the fields ----


class Compiled(BaseException):
    """Instead of a solve: its libraries are in the cache. Nothing that handles errors of a solve is to handle it."""


@contextmanager
def pretended_card(capability: str) -> Iterator[None]:
    """Fields that are to be compiled are, as for a card of this capability with the H200's size, from tensors of the CPU; a
    solve then raises Compiled."""
    from odenet_cuda.compiled import engine, plan
    from odenet_cuda.compiled.teams import Card

    major, minor = map(int, capability.split("."))
    card = Card((major, minor), 132, 227 << 10)

    def stop(*_: Any, **options: Any) -> None:
        raise Compiled

    with (
        mock.patch.object(engine, "card_of", lambda device: card),
        mock.patch.object(plan, "card_of", lambda device: card),
        mock.patch.object(engine, "on_cuda", lambda device: True),
        mock.patch.object(engine.Engine, "solve", stop),
    ):
        yield


def fields() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Solves of compiled fields, by name."""
    import bench_cuda
    import bench_ensemble
    import gpu_smoke

    for module in (gpu_smoke, bench_cuda, bench_ensemble):
        yield from module.compiled_solves()


def compile_fields(capability: str) -> int:
    """How many could not be."""
    CACHE.mkdir(parents=True, exist_ok=True)
    os.environ["ODENET_CACHE"] = str(CACHE)
    failed = 0
    with pretended_card(capability):
        for name, solve in fields():
            begin = time.monotonic()
            try:
                solve()
                words = "was solved without being compiled"
            except Compiled:
                words = ""
            except Exception as error:
                words = f"{type(error).__name__}: {str(error)[:200]}"
            failed += bool(words)
            print(f"{name}: {words or 'compiled'}, {time.monotonic() - begin:.1f} s", flush=True)
    return failed


def pack() -> None:
    """Each holds the same CUDA runtime, so that together they are small."""
    with tarfile.open(FIELDS, "w:xz") as archive:
        for library in sorted(CACHE.glob("*.so")):
            archive.add(library, library.name)


def unpack() -> None:
    """Into the cache, as this user's own: those of another user would be refused."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with tarfile.open(FIELDS) as archive:
        for member in archive.getmembers():
            if not (CACHE / member.name).exists():
                archive.extract(member, CACHE, filter="data")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="native|fields")
    parser.add_argument("--capability", default="9.0", help="of the GPU; 9.0 is Hopper")
    arguments = parser.parse_args()
    what = arguments.what or ["native", "fields"]
    if unknown := set(what) - {"native", "fields"}:
        parser.error(f"there is no {unknown.pop()!r}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    if "native" in what:
        if not is_built(NATIVE, arguments.capability):
            compile_native(NATIVE, arguments.capability)
        print(f"{NATIVE.relative_to(ROOT)} is built for {arguments.capability}")
    if "fields" not in what:
        return 0
    failed = compile_fields(arguments.capability)
    pack()
    print(f"{FIELDS.relative_to(ROOT)} has {FIELDS.stat().st_size / 2**20:.1f} MiB")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    sys.exit(main())
