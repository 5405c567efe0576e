"""The CUDA text of compiled fields: nvcc compiles it, and the threads of a CPU, in blocks of eight, solve with it.

What a GPU makes of it these tests do not show.
"""

import hashlib
import os
import subprocess
from pathlib import Path

import pytest
import torch
from compile_native import FLAGS, require_compiler, run_compiler, setup_py
from compiled_fields import Net, Stretched, compare, compare_gradients, lorenz, rows
from problems import ADAPTIVE_METHODS
from test_cuda_compile import CSRC, find_nvcc

import odenet_cuda
from odenet_cuda import _C, SolverError, solve
from odenet_cuda.compiled import engine, field, plan

D = torch.float64
TIMES = torch.tensor([0.0, 0.013, 0.3, 0.31, 1.0], dtype=D)
NATIVE = Path(__file__).resolve().parent / "native"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    require_compiler()
    return tmp_path_factory.mktemp("fields")


@pytest.fixture
def emulated(folder, monkeypatch):
    """Solves on the CPU run the CUDA text, compiled with native/emulation.h."""
    compiler = setup_py()["find_compiler"]()  # here, for libraries are compiled in several threads

    def load(text: str, capability: tuple[int, int]) -> _C.Library:
        path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.so"
        if not path.exists():
            source = path.with_suffix(".cu")
            source.write_text(text)
            flags = [*FLAGS, "-w", "-O1", "-fPIC", "-shared", "-fno-gnu-unique", "-DODENET_TEAM=8"]
            flags += [*os.environ.get("ODENET_CXXFLAGS", "").split(), "-include", str(NATIVE / "emulation.h"), "-x", "c++"]
            run_compiler(compiler, *flags, str(source), "-pthread", "-o", str(path))
        return _C.Library(str(path))

    monkeypatch.setattr(plan, "load_text", load)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for module in (engine, field):
        monkeypatch.setattr(module, "on_cuda", lambda device: True)


@pytest.mark.parametrize("control", ["per_sample", "joint"])
@pytest.mark.parametrize("batch", [1, 8, 21])
def test_solves(emulated, batch, control):
    """Blocks that are full and that are not; outputs between; every sample with its own steps."""
    func = odenet_cuda.compile(Stretched())
    compare(func, rows(batch, 2), TIMES, step_control=control, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [*ADAPTIVE_METHODS, "rk4", "euler"])
def test_methods(emulated, method):
    options = {"method": method} if method in ADAPTIVE_METHODS else {"method": method, "step_size": 0.1}
    compare(odenet_cuda.compile(Net()), rows(10, 2), TIMES, rtol=1e-4, atol=1e-4, **options)


def test_jumps_and_slices(emulated, monkeypatch):
    """A call that ends before the solve does goes on where it was, in blocks some of whose samples have ended too."""
    monkeypatch.setattr(engine, "_SLICE", 1e-9)
    func = odenet_cuda.compile(Stretched())
    for options in ({"step_control": "per_sample"}, {}, {"method": "rk4", "step_size": 0.25}):
        jumps = {} if "method" in options else {"jump_t": [0.5], "rtol": 1e-3, "atol": 1e-3}
        compare(func, rows(11, 2), TIMES[[0, 2, 4]], **options, **jumps)
    compare_gradients(Stretched(), rows(11, 2), TIMES[[0, 2, 4]], 1e-9, step_control="per_sample", rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("control", ["per_sample", "joint", "rk4"])
@pytest.mark.parametrize("gradient", ["direct", "adjoint"])
def test_gradients(emulated, control, gradient):
    """For y0, weights and arguments: sums over the threads of a block, and over blocks."""
    options = {"method": "rk4", "step_size": 0.1} if control == "rk4" else {"step_control": control}
    tolerance = 1e-9
    if control != "rk4":
        options |= {"rtol": 1e-4, "atol": 1e-4} if gradient == "direct" else {"rtol": 1e-9, "atol": 1e-9}
        tolerance = 1e-9 if gradient == "direct" else 1e-5
    times = TIMES[[0, 2, 4]] if gradient == "direct" or control == "rk4" else TIMES[[0, 2]]
    if control == "rk4" and gradient == "adjoint":
        tolerance = 1e-3  # on a grid the two backward solves differ by more than rounding
    compare_gradients(Net(hidden=19), rows(11, 2), times, tolerance, gradient=gradient, **options)


def test_arguments_have_gradients(emulated):
    p = rows(11, 3, seed=3) + torch.tensor([10.0, 28.0, 8 / 3], dtype=D)
    compare_gradients(lorenz, rows(11, 3), [0.0, 0.05, 0.1], 1e-8, args=(p,), step_control="per_sample", rtol=1e-5, atol=1e-5)


def test_float32(emulated):
    compare(odenet_cuda.compile(Net(dtype=torch.float32)), rows(9, 2, dtype=torch.float32), [0.0, 1.0], 1e-5, counts=False)


def test_same_bits(emulated):
    func, y0 = odenet_cuda.compile(Net()), rows(21, 2)
    found = []
    for _ in range(2):
        start = y0.clone().requires_grad_()
        func.zero_grad()
        solve(func, start, [0.0, 1.0], step_control="per_sample").ys[-1].sum().backward()
        found.append([start.grad, *(p.grad.clone() for p in func.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_failure(emulated):
    """It names the sample, and the others have their results."""
    func = odenet_cuda.compile(lambda t, y: y * y)
    y0 = torch.tensor([[0.5]] * 9 + [[2.0]], dtype=D)
    with pytest.raises(SolverError, match="sample 9"):
        solve(func, y0, [0.0, 1.0], step_control="per_sample")
    found = solve(func, y0, [0.0, 1.0], step_control="per_sample", on_failure="return").ys
    assert torch.isnan(found[1, 9]).all()
    torch.testing.assert_close(found[1, :9], torch.full((9, 1), 1.0, dtype=D), rtol=1e-5, atol=1e-5)


def test_what_cuda_does_not_serve(emulated, monkeypatch):
    monkeypatch.setattr(field, "MOST_JOINT", 8)
    func = odenet_cuda.compile(lambda t, y: -y)
    solve(func, rows(9, 2), [0.0, 1.0])
    assert "one step size for more than 8 samples" in func.explain()


KINDS = [(kind, "dopri5") for kind in ("per_sample", "joint", "adjoint_per_sample", "adjoint_joint", "reverse")]
KINDS += [("grid", "rk4"), ("adjoint_grid", "rk4")]


@pytest.mark.parametrize("kind, method", KINDS)
def test_nvcc_compiles(kind, method, tmp_path):
    """Into a library like that of the CPU, for one architecture; no GPU is needed."""
    from odenet_cuda.compiled.build import CUDA_FLAGS
    from odenet_cuda.methods import find_method

    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc was found")
    func = odenet_cuda.compile(Net())
    solve(func, rows(5, 2), [0.0, 0.1])
    text = func._latest.source(find_method(method), odenet_cuda.compiled.emit.Target("double", "one", kind, cuda=True))
    source, library = tmp_path / "field.cu", tmp_path / "field.so"
    source.write_text(text)
    command = [nvcc, *CUDA_FLAGS, "-arch=sm_90", f"-I{CSRC}", str(source), "-o", str(library)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
    loaded = _C.Library(str(library))
    assert (loaded.lanes, loaded.team) == (1, 128) and loaded.tile_bytes > 0


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("control", ["per_sample", "joint"])
@pytest.mark.parametrize("gradient", ["direct", "adjoint"])
def test_gpu(control, gradient):
    """On a GPU: values and gradients of 300 samples beside the stepper's on the CPU."""
    results = []
    for device in ("cuda", "cpu"):
        net = Net().to(device)
        func = odenet_cuda.compile(net, cuda=True) if device == "cuda" else net
        y0 = rows(300, 2).to(device).requires_grad_()
        ys = solve(func, y0, TIMES[[0, 2, 4]], step_control=control, gradient=gradient, rtol=1e-9, atol=1e-9).ys
        ys.square().sum().backward()
        results.append([x.detach().cpu() for x in (ys, y0.grad, *(p.grad for p in net.parameters()))])
        if device == "cuda":
            assert func.explain() == "compiled"
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
