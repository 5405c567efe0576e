"""What is published works elsewhere: ``python tests/wheel.py [--torch REQUIREMENT] [--out dist]``, or ``make wheel``.

Builds an sdist and from it a wheel, has twine check both, installs the wheel in a fresh environment with the torch asked
for, and runs a handful of tests there, in a folder outside of the checkout.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("test_methods.py", "test_block.py", "test_dense.py", "test_second_derivatives.py")
SUPPORT = ("conftest.py", "problems.py", "order_conditions.py")


def run(*command: object, **options) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True, **options)


def build(out: Path) -> Path:
    """The wheel, which is made from the sdist, beside it in this folder."""
    for old in [*out.glob("odenet_cuda-*.tar.gz"), *out.glob("odenet_cuda-*.whl")]:
        old.unlink()
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, stdout=subprocess.DEVNULL)
    (sdist,), (wheel,) = out.glob("odenet_cuda-*.tar.gz"), out.glob("odenet_cuda-*.whl")
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)
    return wheel


def try_out(wheel: Path, torch: str, folder: Path) -> None:
    """Installs it in an environment of this folder, and runs the tests there."""
    venv.create(folder / "environment", with_pip=True)
    python, tests = folder / "environment" / "bin" / "python", folder / "tests"
    run(python, "-m", "pip", "install", "--quiet", torch, wheel, "pytest", "hypothesis")
    tests.mkdir()
    for name in (*TESTS, *SUPPORT):
        shutil.copy(ROOT / "tests" / name, tests)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = f"import odenet_cuda; assert odenet_cuda.__file__.startswith({str(folder)!r}), odenet_cuda.__file__"
    run(python, "-c", code, cwd=tests, env=environment)
    run(python, "-m", "odenet_cuda", cwd=tests, env=environment)
    run(python, "-m", "pytest", "-q", "-x", "-m", "not gpu", *TESTS, cwd=tests, env=environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", default="torch", help="what pip is asked for: torch==2.13.0")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="the folder of sdist and wheel (dist)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    wheel = build(arguments.out)
    with tempfile.TemporaryDirectory() as name:
        try_out(wheel, arguments.torch, Path(name))
    print(f"{wheel} works")


if __name__ == "__main__":
    main()
