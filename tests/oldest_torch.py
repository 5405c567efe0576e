"""Whether the package builds with the oldest torch that it promises to serve: ``python tests/oldest_torch.py``.

Of that torch's wheel, which pip downloads, headers and libraries are used: installed it would take gigabytes of CUDA with it.
What is built is not optimised. ``make test TORCH=torch==<version> VENV=<folder>`` installs it, builds, imports and tests.
"""

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TAKEN = re.compile(r"torch/(include/.*|version\.py|lib/lib(torch|torch_cpu|c10)\.so)")


def promised() -> str:
    """The version that pyproject.toml asks for at least."""
    found = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert found is not None
    return found[1] + ".0" * (2 - found[1].count("."))


def main() -> int:
    version = promised()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), f"torch=={version}"]
        if subprocess.run(pip).returncode != 0:
            print(f"NOT CHECKED: pip finds no torch {version} for this machine")
            return 0
        (wheel,) = folder.glob("torch-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [member for member in archive.namelist() if TAKEN.fullmatch(member)])
        (folder / "torch" / "__init__.py").write_text("from .version import __version__\n")
        compiler = folder / "compiler.sh"
        compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
        compiler.chmod(0o755)
        built = folder / "built"
        places = [f"--build-lib={built}", f"--build-temp={folder / 'objects'}"]
        command = [sys.executable, "setup.py", "--quiet", "build_ext", *places]
        environment = {**os.environ, "PYTHONPATH": str(folder), "ODENET_CUDA": "0", "CXX": str(compiler)}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
        (library,) = built.glob("odenet_cuda/_C*.so")
        print(f"built with torch {version}: {library.stat().st_size >> 10} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
