"""The problems of the benchmarks with known ends, and whether the methods find these."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from odenet_cuda import SolverError, compile, solve

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
if not BENCHMARKS.exists():
    pytest.skip("needs the checkout", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))
problems = importlib.import_module("initial_values")

D = torch.float64
pytestmark = pytest.mark.usefixtures("one_thread")


def test_detest_is_whole():
    assert sorted(problems.DETEST) == [f"{letter}{i}" for letter in "ABCDE" for i in range(1, 6)]


@pytest.mark.parametrize("name", problems.DETEST)
def test_detest(name: str):
    """The ends, by closed forms or more digits, and the two ways to write the field."""
    problem = problems.DETEST[name]
    y0 = torch.tensor(problem.y0, dtype=D)
    found = solve(problem.torch, y0, [0.0, problem.end], method="dopri8", rtol=1e-12, atol=1e-12, compile=False)
    assert problem.error(found.ys[-1].numpy()) < 3e-10
    t, y = torch.tensor(0.3, dtype=D), y0 + 0.1
    assert torch.allclose(problem.torch(t, y), torch.from_numpy(problem.numpy(0.3, y.numpy())), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", problems.STIFF)
def test_stiff_set(name: str):
    """Within 100 times a tolerance of 1e-5. PLEI's close encounters leave fewer digits to every method; y2 = y3 + y4 of E5 is
    lost to rounding in the linear systems of rodas5p."""
    problem = problems.STIFF[name]
    y0, rtol = torch.tensor(problem.y0, dtype=D), 1e-7 if name == "PLEI" else 1e-5
    how = {"method": "kvaerno5" if name == "E5" else "rodas5p", "rtol": rtol, "atol": rtol * problem.atol, "compile": False}
    found = solve(problem.torch, y0, [0.0, problem.end], **how)
    assert problem.digits(found.ys[-1].numpy()) > 3


def test_a_compiled_field_of_the_set():
    problem = problems.STIFF["HIRES"]
    how = {"method": "rodas5p", "rtol": 1e-5, "atol": 1e-9}
    found = solve(compile(problem.torch), torch.tensor(problem.y0, dtype=D), [0.0, problem.end], **how)
    assert found.engine == "compiled"
    assert problem.digits(found.ys[-1].numpy()) > 4


@pytest.mark.parametrize(
    ("method", "gradient", "rtol"),
    [
        ("rodas5p", "direct", 1e-9),
        ("rodas5p", "checkpoint", 1e-9),
        ("rodas5p", "quadrature", 2e-10),
        ("kvaerno5", "direct", 1e-9),
        ("kvaerno5", "checkpoint", 1e-9),
    ],
)
def test_gradients_by_the_rates_of_rober(method: str, gradient: str, rtol: float):
    """To 1e-8 of those of more digits: ROBER at t = 40, of which the middle number is 1e-5."""
    y, log_k = problems.rober_by_rates(lambda func, y0, t: solve(
        func, y0, t, method=method, gradient=gradient, rtol=rtol, atol=rtol * 1e-6, compile=False
    ).ys[-1])  # fmt: skip
    known, right = (torch.tensor(x, dtype=D) for x in (problems.ROBER_AT_40, problems.ROBER_BY_RATES))
    weights = torch.tensor([1.0, -0.5, 0.7], dtype=D) / known
    (found,) = torch.autograd.grad(y @ weights, log_k)
    torch.testing.assert_close(found, right @ weights, rtol=1e-8, atol=0)


def test_the_adjoint_does_not_find_its_way_back():
    """What decays forwards grows backwards: it ends in words, not in numbers."""
    y, log_k = problems.rober_by_rates(lambda func, y0, t: solve(
        func, y0, t, method="rodas5p", gradient="adjoint", rtol=1e-6, atol=1e-12, compile=False
    ).ys[-1])  # fmt: skip
    with pytest.raises(SolverError):
        torch.autograd.grad(y[0], log_k)
