"""The package as it is built, installed and imported."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import odenet_cuda
from odenet_cuda import _C, __main__

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}


def run(*command: str, **arguments) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, **arguments)


@pytest.fixture(scope="module")
def distributions(tmp_path_factory, request) -> Path:
    """A folder with an sdist and a wheel without CUDA kernels, built from a copy of the checkout: not optimised, that takes
    time."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("needs the checkout")
    folder = tmp_path_factory.mktemp("dist")
    compiler = folder / "compiler.sh"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    compiler.chmod(0o755)
    env = {**os.environ, "ODENET_CUDA": "0", "CXX": str(compiler)}
    built = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT), env=env, cwd=folder)
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    return folder


def test_sdist_holds_the_sources(distributions):
    """The sdist holds every file of csrc/."""
    (archive,) = distributions.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    assert names >= SOURCES


def test_wheel_is_imported_outside_the_checkout(distributions, tmp_path):
    """A wheel, built from the sdist without CUDA, is installed elsewhere, imported there and solves an equation."""
    (wheel,) = distributions.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert any(name.startswith("odenet_cuda/_C") for name in archive.namelist())
    installed = run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(tmp_path), str(wheel))
    assert installed.returncode == 0, installed.stderr
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import torch, odenet_cuda\n"
        f"assert odenet_cuda.__file__.startswith({str(tmp_path)!r}), odenet_cuda.__file__\n"
        "assert odenet_cuda._C.cuda is None\n"
        "y = odenet_cuda.odeint(lambda t, y: -y, torch.ones(3, dtype=torch.float64), torch.tensor([0.0, 1.0]))\n"
        "print(float(y[-1, 0]))"
    )
    solved = run(sys.executable, "-c", code, cwd=tmp_path)
    assert solved.returncode == 0, solved.stderr
    assert float(solved.stdout) == pytest.approx(0.36787944117, abs=1e-7)


def test_sources_without_an_extension_say_so(tmp_path):
    """As where python is started in the folder that a package was installed from."""
    package = ROOT / "odenet_cuda"
    program = (  # an editable installation would find the extension elsewhere
        "import sys; sys.meta_path = [x for x in sys.meta_path if 'editable' not in getattr(x, '__module__', '')]; "
        "import odenet_cuda"
    )
    shutil.copytree(package, tmp_path / "odenet_cuda", ignore=shutil.ignore_patterns("_C*.so", "_C*.pyd", "__pycache__"))
    done = run(sys.executable, "-c", program, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1 and "without its built extension" in done.stderr and "in another folder" in done.stderr
    broken = tmp_path / "odenet_cuda" / Path(_C.__file__).name
    broken.write_bytes(b"not a library")
    done = run(sys.executable, "-c", program, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1 and "ImportError" in done.stderr and "without its built extension" not in done.stderr


def test_version_without_metadata():
    """A checkout that was copied and built in place has none."""
    code = (
        "import importlib.metadata as m, torch\n"
        "def version(name):\n    raise m.PackageNotFoundError(name)\n"
        "m.version = version\n"
        "import odenet_cuda; print(odenet_cuda.__version__)"
    )
    assert run(sys.executable, "-c", code).stdout.strip() == importlib.metadata.version("odenet-cuda")


def test_report():
    """``python -m odenet_cuda`` prints what a bug report needs."""
    output = run(sys.executable, "-m", "odenet_cuda")
    assert output.returncode == 0, output.stderr
    for name, value in __main__.report().items():
        assert name in output.stdout
        assert value.split("\n")[0] in output.stdout
    assert torch.__version__ in output.stdout and odenet_cuda.__version__ in output.stdout


def test_cuda_extension_loads_under_this_torch():
    """An extension with CUDA kernels is imported by any torch, one without CUDA too, and knows what it holds."""
    if _C.cuda is None:
        pytest.skip("built without CUDA kernels: no nvcc, or ODENET_CUDA=0")
    assert _C.cuda_architectures
    y = [torch.zeros(3)]
    odenet_cuda.ops.stage(y, [torch.ones(3)], [torch.ones(3)], [2.0], torch.ones(1, dtype=torch.float64))
    assert torch.equal(y[0], torch.full((3,), 3.0))


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"ODENET_CUDA": "yes"}, "ODENET_CUDA must be 0 or 1"),
        ({"ODENET_CUDA": "1", "CUDA_HOME": "/nowhere"}, "no nvcc was found"),
        ({"CXX": "no-such-compiler", "PATH": "/nowhere", "ODENET_CUDA": "0"}, "C++20 compiler"),
    ],
    ids=["bad-switch", "no-nvcc", "no-compiler"],
)
def test_build_errors_are_one_sentence(environment, words, tmp_path):
    """What the build lacks is said in one clear sentence."""
    env = {**__import__("os").environ, **environment}
    built = run(
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-temp",
        str(tmp_path),
        "--build-lib",
        str(tmp_path),
        cwd=ROOT,
        env=env,
    )
    assert built.returncode != 0
    assert words in built.stderr
    assert "Traceback" not in built.stderr


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_files_that_a_page_names_are_there(page):
    """Its links, and the paths that it mentions."""
    path = ROOT / page
    if not path.exists():
        pytest.skip("needs the checkout")
    text = path.read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    named = re.findall(r"`((?:csrc|odenet_cuda|tests|docs|benchmarks|examples)/[\w./]+)`", text)
    assert links
    missing = [name for name in [*links, *named] if not (ROOT / name).exists()]
    assert not missing


def test_names_that_contributing_mentions():
    """Its examples are there."""
    from odenet_cuda import tableaus
    from odenet_cuda.compiled import decompositions, operations, pointwise
    from odenet_cuda.solvers import families

    assert tableaus.BOSH3.order == 3 and families.FAMILIES
    assert pointwise.TEXTS["hypot"] == "hypotenuse({0}, {1})" and operations.OPERATIONS["clone"] is operations._same
    assert decompositions
