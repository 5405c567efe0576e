"""Builds odenet_cuda._C: the C++ kernels always, the CUDA kernels when nvcc is found. Never needs a GPU.

Environment:
  ODENET_CUDA           1: CUDA kernels or fail; 0: none; unset: when nvcc is found
  CUDA_HOME             where CUDA is; unset: nvcc on PATH, then the usual place
  TORCH_CUDA_ARCH_LIST  as torch reads it ("8.0;9.0+PTX"); unset: 8.0, 9.0, 10.0 and PTX, as far as nvcc knows them
  CXX                   the C++ compiler; unset: c++
  MAX_JOBS              parallel compilations; unset: ninja decides
  ODENET_SANITIZE       "address" (with undefined behaviour) or "thread": the C++ kernels under a sanitizer
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# The CPU kernels are compiled once for each; csrc/machine.h chooses when the module is loaded.
LEVELS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mf16c"],
    "avx512": ["-mf16c", *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")), "-mprefer-vector-width=512"],
}
# Against GCC bug 113255, which deletes stores before a block is copied: see odenet_cuda/compiled/build.py.
GNU_X86_FLAGS = ["-mmemcpy-strategy=libcall:-1:noalign", "-fno-tree-loop-distribute-patterns"]
SANITIZERS = {"address": "-fsanitize=address,undefined", "thread": "-fsanitize=thread"}
TORCH_TARGET = "0x020b000000000000"  # the stable ABI of torch 2.11


def stop(message: str) -> None:
    raise SystemExit(f"odenet_cuda: {message}")


def run_output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def find_nvcc() -> str | None:
    """The nvcc to build with, or None for a build without CUDA."""
    wish = os.environ.get("ODENET_CUDA", "")
    if wish not in ("", "0", "1"):
        stop(f"ODENET_CUDA must be 0 or 1, got {wish!r}.")
    if wish == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    places = [Path(home) / "bin" / "nvcc"] if home else [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    for place in places:
        if place and Path(place).exists():
            return str(place)
    if wish == "1":
        stop("ODENET_CUDA=1 asks for CUDA kernels, but no nvcc was found; install the CUDA toolkit or set CUDA_HOME.")
    return None


def architectures(nvcc: str) -> list[str]:
    """Names like "9.0" or "9.0+PTX", from TORCH_CUDA_ARCH_LIST or what this nvcc knows of our default."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if asked:
        names = re.split(r"[;,\s]+", asked.strip())
        bad = [name for name in names if not re.fullmatch(r"\d+\.\d[a-z]?(\+PTX)?", name)]
        if bad:
            stop(f"TORCH_CUDA_ARCH_LIST must hold names like 9.0 or 9.0+PTX, got {bad[0]!r}.")
        return names
    known = run_output(nvcc, "--list-gpu-arch")
    names = [name for name in ("8.0", "9.0", "10.0") if f"compute_{name.replace('.', '')}" in known]
    return [*names[:-1], names[-1] + "+PTX"]


def toolkit_home(nvcc: str) -> Path:
    """The folder of the toolkit that this nvcc, perhaps a link or a script, belongs to."""
    plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    return Path(re.search(r"^#\$ TOP=(.*)$", plan, re.MULTILINE).group(1).strip()).resolve()


def architecture_flags(names: list[str]) -> list[str]:
    flags = []
    for name in names:
        number = name.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def sanitizer_flags() -> list[str]:
    """The flags of the sanitizer asked for, the first of them for the linker too."""
    wish = os.environ.get("ODENET_SANITIZE", "")
    if not wish:
        return []
    if wish not in SANITIZERS:
        stop(f"ODENET_SANITIZE must be one of {', '.join(SANITIZERS)}, got {wish!r}.")
    return [SANITIZERS[wish], "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]


def find_compiler() -> str:
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        stop("building needs a C++20 compiler (g++ 11 or clang++ 14, or newer) and none was found; install one or set CXX.")
    return compiler


def ninja_text(text: str) -> str:
    return text.replace("$", "$$").replace(":", "$:").replace(" ", "$ ")


class NinjaBuild(build_ext):
    """Compiles and links the one extension with ninja, in parallel, rebuilding only what changed."""

    def build_extension(self, ext: Extension) -> None:
        try:
            import ninja
            import pybind11
            import torch
        except ImportError as missing:
            stop(f"building needs the package {missing.name}; install torch, ninja, pybind11 and setuptools first.")
        compiler, nvcc = find_compiler(), find_nvcc()
        torch_root = Path(torch.__file__).parent
        includes = [
            f"-I{ROOT / 'csrc'}",
            # pybind11 first: torch 2.11 has a copy of its own there, which refuses TORCH_TARGET_VERSION.
            *(f"-isystem{path}" for path in (pybind11.get_include(), torch_root / "include")),
        ]
        includes += [f"-I{path}" for path in self.include_dirs]
        words = run_output(compiler, "--version")
        version = words.splitlines()[0]
        common = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-DNDEBUG"]
        defines = [
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
            f'-DODENET_COMPILER="{version}"',
            f'-DODENET_TORCH="{torch.__version__}"',
        ]
        levels = {"baseline": []}
        if platform.machine().lower() in ("x86_64", "amd64"):
            levels = LEVELS
            common.append("-DODENET_X86")
        sanitizer = sanitizer_flags()
        # No contraction: a row is rounded the same wherever in a vector it falls, and on every instruction set.
        cxx = [*common, "-Wall", "-Wextra", "-fno-math-errno", "-ffp-contract=off", *sanitizer]
        if "-DODENET_X86" in common and "Free Software Foundation" in words:
            cxx += GNU_X86_FLAGS
        libraries = [f"-L{torch_root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
        sources = [(source, "torch", []) for source in sorted((ROOT / "csrc").glob("*.cpp"))]
        for level, flags in levels.items():
            flags = [f"-DODENET_LEVEL={level}", *flags]
            sources += [(source, level, flags) for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
        cuda = []
        if nvcc:
            names = architectures(nvcc)
            toolkit = re.search(r"release ([\d.]+)", run_output(nvcc, "--version")).group(1)
            cuda = [*common[:2], f"-ccbin={compiler}", "-DNDEBUG", "-Xcompiler=-fPIC,-fvisibility=hidden"]
            cuda += [*architecture_flags(names), f'-DODENET_ARCHITECTURES="{" ".join(names)}"']
            defines.append(f'-DODENET_CUDA="{toolkit}"')
            sources += [(source, "cuda", []) for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
            home = toolkit_home(nvcc)
            folders = [home / "lib64", home / "lib", *home.glob("targets/*/lib")]
            folder = next((f for f in folders if (f / "libcudart_static.a").exists()), None)
            if folder is None:
                stop(f"libcudart_static.a was not found below {home}; set CUDA_HOME or build with ODENET_CUDA=0.")
            libraries += [f"-L{folder}", "-lcudart_static", "-lrt", "-lpthread"]
        link = ["-shared", "-Wl,--no-as-needed"] if sys.platform == "linux" else ["-bundle", "-undefined", "dynamic_lookup"]
        link += sanitizer[:1]

        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        quoted = {
            k: " ".join(shell_quote(f) for f in v)
            for k, v in {
                "cxx": [*cxx, *includes],
                "defines": defines,
                "cuda": cuda,
                "link": link,
                "libs": libraries,
            }.items()
        }
        lines = [
            "ninja_required_version = 1.5",
            *(f"{key} = {value.replace('$', '$$')}" for key, value in quoted.items()),
            f"rule cxx\n  command = {compiler} $cxx $level -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            f"rule torch\n  command = {compiler} $cxx $defines -MMD -MF $out.d -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc",
            f"rule cuda\n  command = {nvcc} $cuda -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            f"rule link\n  command = {compiler} $link -o $out $in $libs",
        ]
        objects = []
        for source, kind, flags in sources:
            rule = kind if kind in ("torch", "cuda") else "cxx"
            objects.append(ninja_text(str(build / f"{kind}_{source.name}.o")))
            lines.append(f"build {objects[-1]}: {rule} {ninja_text(str(source))}")
            if flags:
                lines.append(f"  level = {' '.join(flags)}")
        lines.append(f"build {ninja_text(str(target))}: link {' '.join(objects)}")
        (build / "build.ninja").write_text("\n".join(lines) + "\n")
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build)]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        if subprocess.run(command).returncode != 0:
            stop(
                "the kernels did not compile; the compiler's words are above. They need g++ 11, clang++ 14 or newer, "
                "and nvcc 12.4 or newer (ODENET_CUDA=0 builds without CUDA)."
            )


def shell_quote(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'" if re.search(r"[^\w@%+=:,./-]", text) else text


if platform.system() == "Windows":
    stop("Windows is not supported; use Linux, macOS or the Windows Subsystem for Linux.")

setup(ext_modules=[Extension("odenet_cuda._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
