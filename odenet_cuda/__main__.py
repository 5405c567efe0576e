"""``python -m odenet_cuda``: what to paste into a bug report; ``clear-cache``: empties the cache of compiled fields; ``migrate
FILE...``: what programs use of torchdiffeq, and what becomes of it here."""

import os
import platform
import shutil
import subprocess
import sys

import numpy
import torch

from . import _C, __version__, migrate
from .compiled.build import cache_folder, clear_cache


def _first_line(*command: str) -> str:
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "not found"
    lines = (output.stdout or output.stderr).strip().splitlines()
    return (lines[-1] if "nvcc" in command[0] else lines[0]) if lines else "no version given"


def report() -> dict[str, str]:
    """Versions, compilers, instruction set, CUDA and GPUs, by name."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    compiler = os.environ.get("CXX", "c++")
    cuda = "no" if _C.cuda is None else f"yes, toolkit {_C.cuda}, architectures {_C.cuda_architectures}"
    return {
        "odenet_cuda": __version__,
        "installed at": os.path.dirname(os.path.abspath(__file__)),
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda}), built against {_C.torch_built_with}",
        "numpy": numpy.__version__,
        "kernels compiled by": _C.compiler,
        "C++ compiler here": _first_line(compiler, "--version"),
        "nvcc here": _first_line("nvcc", "--version") if shutil.which("nvcc") else "not found",
        "CPU instruction set": f"{_C.cpu_level()} of {', '.join(_C.cpu_levels)}",
        "threads": str(torch.get_num_threads()),
        "CUDA kernels": cuda,
        "GPUs": ", ".join(gpus) or "none",
    }


def main(arguments: list[str]) -> None:
    if arguments == ["clear-cache"]:
        print(f"removed {clear_cache()} compiled fields from {cache_folder()}")
    elif arguments[:1] == ["migrate"]:
        migrate.main(arguments[1:])
    elif arguments:
        raise SystemExit(f"python -m odenet_cuda [clear-cache | migrate FILE...]: got {' '.join(arguments)}")
    else:
        for name, value in report().items():
            print(f"{name + ':':22}{value}")


if __name__ == "__main__":
    main(sys.argv[1:])
