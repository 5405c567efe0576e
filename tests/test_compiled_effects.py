"""What func does besides giving slopes: counts are counted in compiled solves too, results that it keeps are the stepper's."""

import types
import warnings

import pytest
import torch
from compile_native import require_compiler
from compiled_fields import rows
from torch import nn

import odenet_cuda
from odenet_cuda import solve

D = torch.float64
T = [0.0, 0.4, 1.0]
STEPS = {"method": "rk4", "step_size": 0.1}
BOX: dict = {"nfe": 0}


class Counting(nn.Module):
    """In attributes, a dict, a list, a buffer by operations, and in floats."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2, dtype=D)
        self.layer.weight.data = rows(2, 2)
        self.nfe, self.weight, self.calls, self.inside = 0, 0.0, [0, 0], types.SimpleNamespace(n=0)
        self.register_buffer("evals", torch.zeros((), dtype=torch.int64))
        self.register_buffer("halves", torch.zeros(2))

    def forward(self, t, y):
        self.nfe += 1
        self.weight += 0.5
        self.calls[1] -= 2
        self.inside.n += 3
        BOX["nfe"] += 1
        self.evals += 1
        self.halves.add_(0.5)
        return torch.tanh(self.layer(y))

    def counts(self):
        found = [self.nfe, self.weight, self.calls[1], self.inside.n, BOX["nfe"], int(self.evals), float(self.halves[1])]
        self.nfe, self.weight, self.calls[1], self.inside.n, BOX["nfe"] = 0, 0.0, 0, 0, 0
        self.evals.zero_(), self.halves.zero_()
        return found


@pytest.fixture(autouse=True)
def quickly_compiled(monkeypatch):
    require_compiler()
    monkeypatch.setenv("ODENET_CXXFLAGS", "-O0")


WAYS = {
    "none": {},
    "checkpoint": {"gradient": "checkpoint"},
    "adjoint": {"gradient": "adjoint"},
    "direct": {"gradient": "direct"},
    "adaptive": {"method": "bosh3", "rtol": 1e-4, "atol": 1e-4, "step_size": None},
    "per sample": {"method": "bosh3", "rtol": 1e-4, "atol": 1e-4, "step_size": None, "step_control": "per_sample"},
}


@pytest.mark.parametrize("way", WAYS)
def test_calls_are_counted(way):
    """As many as `stats` says, forwards and backwards, in every place; nothing that only looked at func counts."""
    func, options = Counting(), {**STEPS, **WAYS[way]}
    field = odenet_cuda.compile(func)
    for _ in range(3):
        y0 = rows(5, 2).requires_grad_("gradient" in options)
        solution = solve(field, y0, T, **options)
        assert field.explain() == "compiled"
        calls = solution.stats.nfe
        assert func.counts() == [calls, 0.5 * calls, -2 * calls, 3 * calls, calls, calls, 0.5 * calls] and calls > 5
        if "gradient" in options:
            solution.ys.sum().backward()
            calls = 0 if way == "direct" else solution.stats.nfe_backward
            assert func.counts()[0] == calls
            if way != "direct":
                assert calls > 0


def test_as_many_as_by_the_stepper():
    func = Counting()
    for options in ({**STEPS, "gradient": "adjoint"}, {"method": "bosh3", "rtol": 1e-4, "atol": 1e-4}):
        counts = []
        for served in (odenet_cuda.compile(func), func):
            func.counts()
            solve(served, rows(5, 2), T, **options)
            func.counts()
            solve(served, rows(5, 2), T, **options)
            counts.append(func.counts())
        assert counts[0] == counts[1]


def test_a_buffer_that_was_replaced_counts():
    func = Counting()
    field = odenet_cuda.compile(func)
    solve(field, rows(5, 2), T, **STEPS)
    func.evals = func.evals.clone().zero_()
    solution = solve(field, rows(5, 2), T, **STEPS)
    assert int(func.evals) == solution.stats.nfe and field.explain() == "compiled"


class Keeping(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.what, self.scale, self.kept = what, nn.Parameter(torch.tensor(0.5, dtype=D)), None

    def forward(self, t, y):
        self.kept = self.what(self, t, y)
        return torch.tanh(self.scale * y)


def doubling(self, t, y):
    self.n = self.n * 2
    return None


KEPT = {
    "a slope": lambda self, t, y: y.sin(),
    "the state": lambda self, t, y: y,
    "a regularizer": lambda self, t, y: (self.scale * y).square().sum(),
    "the time": lambda self, t, y: t,
}


@pytest.mark.parametrize("what", KEPT)
def test_results_that_are_kept(what):
    """The stepper serves, so that they are those of the last call; as pure they stay as they were."""
    func = Keeping(KEPT[what])
    field = odenet_cuda.compile(func)
    solve(field, rows(5, 2), T, **STEPS)
    found = func.kept.detach().clone()
    assert "keeps results in 'kept'" in field.explain() and "pure=True" in field.explain()
    solve(func, rows(5, 2), T, **STEPS)
    torch.testing.assert_close(found, func.kept.detach(), rtol=0, atol=0)
    func.kept, pure = None, odenet_cuda.compile(func, pure=True)
    solve(pure, rows(5, 2), T, **STEPS)
    assert pure.explain() == "compiled" and func.kept is None


def test_what_is_made_of_weights_alone():
    """A weight that is computed at every call is no result."""
    func = Keeping(lambda self, t, y: self.scale * 2)
    field = odenet_cuda.compile(func)
    solve(field, rows(5, 2), T, **STEPS)
    assert field.explain() == "compiled"


def test_what_changes_otherwise():
    func = Keeping(doubling)
    func.n = 3
    field = odenet_cuda.compile(func)
    solve(field, rows(5, 2), T, **STEPS)
    assert "not by adding the same" in field.explain() and func.n > 3
    func.n = 3
    assert "served" in field.explain()
    pure = odenet_cuda.compile(func, pure=True)
    solve(pure, rows(5, 2), T, **STEPS)
    assert pure.explain() == "compiled" and func.n == 3


def test_a_count_of_a_failed_solve():
    func = Counting()
    field = odenet_cuda.compile(func)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = solve(field, rows(5, 2), [0.0, 1.0], max_num_steps=2, on_failure="return", first_step=1e-3)
    assert field.explain() == "compiled" and solution.status != "success"
    assert func.counts()[0] == solution.stats.nfe > 0


def test_memory_of_weights_can_be_resized_still():
    """As FSDP does; NumPy, once it has seen some, forbids it."""
    func = Counting()
    field = odenet_cuda.compile(func)
    solve(field, rows(5, 2).requires_grad_(), T, **STEPS).ys.sum().backward()
    assert field.explain() == "compiled"
    assert all(x.untyped_storage().resizable() for x in (*func.parameters(), *func.buffers()))
