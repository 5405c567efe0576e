"""Benchmarks are run by hand: that what they call is there, and what they hold against each other agrees, is seen here."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

import odenet_cuda

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
if not BENCHMARKS.exists():
    pytest.skip("needs the checkout", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_names_that_a_benchmark_imports_are_there(name):
    importlib.import_module(name)


def test_products_are_timed():
    """Of our way back and of torchdiffeq's: as many as there are steps and stages."""
    measure = importlib.import_module("measure")
    field, y = torch.nn.Linear(2, 2), torch.ones(3, 2, requires_grad=True)
    for gradient in ("checkpoint", "adjoint"):  # a small grid with "direct" is autograd's alone
        ys = odenet_cuda.solve(lambda t, y: field(y), y, [0.0, 0.5, 1.0], method="euler", gradient=gradient).ys
        with measure.timed_products() as clock:
            ys.sum().backward()
        assert clock.calls == 2


@pytest.mark.usefixtures("one_thread")
def test_calls_agree_with_torchdiffeq(monkeypatch, capsys):
    bench = importlib.import_module("bench_call")
    monkeypatch.setattr(bench, "MANY", 3)
    monkeypatch.setattr(odenet_cuda, "compile", lambda field: field)  # what that takes is seen elsewhere
    monkeypatch.setattr(bench, "medians", lambda cases, runs: dict.fromkeys(cases, 1.0))
    bench.bench_calls(1)
    bench.bench_matrix(1, quick=True)
    assert "odeint_adjoint" in capsys.readouterr().out
