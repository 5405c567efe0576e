"""What every test file shares: the devices, the number of threads and the settings of hypothesis."""

import gc

import hypothesis
import pytest
import torch

import odenet_cuda
from odenet_cuda import _C
from odenet_cuda.compiled import build, plan

THREADS = 2

hypothesis.settings.register_profile("suite", deadline=None, max_examples=25, derandomize=True, database=None)
hypothesis.settings.load_profile("suite")


def pytest_sessionstart() -> None:
    """Runs torch on a fixed number of threads, so that times and reductions are alike everywhere, and compiles fields only
    where that is asked for: it takes seconds."""
    torch.set_num_threads(THREADS)
    odenet_cuda.set_compile(False)


def pytest_collection_finish() -> None:
    """Many tests let the garbage collector run; it need not look through what torch and the tests consist of each time."""
    gc.collect()
    gc.freeze()


def _why_no_cuda() -> str | None:
    if _C.cuda is None:
        return "odenet_cuda was built without CUDA kernels"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def pytest_runtest_setup(item) -> None:
    """Tests marked `gpu` are skipped where there is none."""
    if item.get_closest_marker("gpu") and (reason := _why_no_cuda()):
        pytest.skip(reason)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], scope="session")
def device(request) -> torch.device:
    """The devices that kernels run on."""
    return torch.device(request.param)


@pytest.fixture(scope="module")
def quick_compiler():
    """Compiled fields without optimisation, where the machine code is not tried. Skips where there is no compiler."""
    try:
        build.find_compiler()
    except build.NoCompiler as reason:
        pytest.skip(str(reason))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ODENET_CXXFLAGS", "-O0")
        patch.setattr(plan, "_MOST_LINES", 1 << 20)  # long texts take the optimiser's time
        yield


@pytest.fixture
def compiled_quickly(monkeypatch):
    """The same for one test, which is not skipped where there is no compiler."""
    monkeypatch.setenv("ODENET_CXXFLAGS", "-O0")


@pytest.fixture
def one_thread():
    """Systems of a few numbers are solved faster without others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def kernels_alone():
    """Every grid is solved by the kernels, a small one with gradient="direct" too."""
    from odenet_cuda import engines
    from odenet_cuda.solvers import short

    with pytest.MonkeyPatch.context() as patch:  # of its own: a test may undo the shared one
        patch.setattr(short, "serves", lambda *_: False)
        patch.setattr(engines, "ENGINES", tuple(engine for engine in engines.ENGINES if engine.NAME != "plain"))
        yield
