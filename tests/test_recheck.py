"""A compiled field whose guards have missed something is found out as it is used: it is compared with func again."""

import random
import threading
import types
import warnings

import numpy as np
import pytest
import torch
from compiled_fields import rows
from torch import nn

import odenet_cuda
from odenet_cuda import solve
from odenet_cuda.compiled import recheck
from odenet_cuda.compiled.guards import Guards
from odenet_cuda.compiled.watch import Watch

Y0 = rows(5, 2)
TOLERANCE = 1e-12  # of a few steps in float64


pytestmark = pytest.mark.usefixtures("quick_compiler")


@pytest.fixture
def blind(monkeypatch):
    """Guards that see nothing."""
    monkeypatch.setattr(Guards, "hold", lambda self, args: True)


def ends(func, y0=Y0, **options):
    return solve(func, y0, [0.0, 0.3, 0.5], **{"method": "euler", "step_size": 0.1, **options}).ys


def make_field():
    """All of these have one library."""
    h = types.SimpleNamespace(k=2.0)
    return h, odenet_cuda.compile(lambda t, y: torch.sin(y) * h.k)


def watch_of(field) -> Watch:
    return field._latest.watch


def assert_as_stepper(field, **options):
    assert (ends(field, **options) - ends(field.func, **options)).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("when", "options"),
    [
        ("second", {}),
        ("tenth", {}),
        ("after long", {}),
        ("second", {"method": "dopri5", "step_size": None}),
        ("second", {"method": "dopri5", "step_size": None, "step_control": "per_sample"}),
    ],
)
def test_a_change_that_was_not_seen(blind, when, options):
    h, field = make_field()
    solves = {"second": 1, "tenth": 5, "after long": 12}[when]
    for _ in range(solves):
        assert_as_stepper(field, **options)
        assert field.explain() == "compiled"
    h.k = 3.0
    unseen = {"second": 1, "tenth": 8, "after long": 4}[when]
    while watch_of(field).unseen < unseen:
        ends(field, **options)  # wrong, and nobody knows
        assert field.explain() == "compiled"
    if when == "after long":
        watch_of(field).seconds = 1e9
    with pytest.warns(UserWarning, match=rf"last {unseen} compiled solves may be wrong.*lambda"):
        found = ends(field, **options)
    assert (found - ends(field.func, **options)).abs().max() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert_as_stepper(field, **options)
            assert "changed unseen" in field.explain() and "reset()" in field.explain()
        field.reset()
        assert_as_stepper(field, **options)
    assert field.explain() == "compiled"


def test_a_branch_on_the_batch():
    """No guard looks at how many samples there are; the state at hand is compared whole."""
    field = odenet_cuda.compile(lambda t, y: torch.sin(y) * (3.0 if len(y) == 6 else 2.0))
    ends(field)
    assert field.explain() == "compiled"
    with pytest.warns(UserWarning, match="may be wrong"):
        assert_as_stepper(field, y0=rows(6, 2))


class Counting(nn.Module):
    """Counts, keeps and has buffers and hooks."""

    def __init__(self):
        super().__init__()
        self.count, self.kept = 0, None
        self.weight = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.register_buffer("buffer", torch.ones(2, dtype=torch.float64))

    def forward(self, t, y, counter):
        self.count += 1
        counter.count += 1
        self.kept = y * 2
        return self.kept * self.weight * self.buffer


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_nothing_else_changes(mode, monkeypatch):
    """Random generators, counters, what func keeps, tensors, gradients, hooks and the grad mode are as they were."""
    calls = []
    original = recheck._difference
    monkeypatch.setattr(recheck, "_difference", lambda *args: calls.append(torch.is_grad_enabled()) or original(*args))
    func, counter, seen = Counting(), types.SimpleNamespace(count=0), []
    func.weight.register_hook(seen.append)
    func.weight.grad = gradient = torch.zeros(2, dtype=torch.float64)
    field = odenet_cuda.compile(func)

    def state():
        versions = func.weight._version, func.buffer._version
        values = func.count, func.kept, counter.count, func.weight.grad is gradient, len(func.weight._backward_hooks), versions
        generators = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
        return values, generators, torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    with mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        before = state()
        for _ in range(3):
            ends(field, args=(counter,))
            assert field.explain() == "compiled" and state() == before
    assert len(calls) == 1 and not seen


def test_when_it_is_due():
    """Early, then after fifty times the time it took; so it takes two hundredths of the time of the solves."""
    watch = Watch()
    due = []
    for solved in range(12):
        if watch.due:
            due.append(solved)
            watch.compared(1.0)
        watch.add(1e-3)
    assert due == [1, 9]
    cost = spent = 0.0
    for _ in range(20_000):
        if watch.due:
            watch.compared(0.5)
            cost += 0.5
        watch.add(0.1)
        watch.add(0.02, solves=0)  # its backward pass
        spent += 0.12
    assert 0.018 < cost / spent <= 0.02
    watch = Watch()
    watch.add(0.1)
    watch.add(0.1)  # two at once: none began after the first
    assert watch.due


def test_func_that_cannot_be_called_again(blind):
    """The stepper serves until it can be."""
    h, field = make_field()
    ends(field)
    h.k = None
    with pytest.raises(TypeError):
        ends(field)
    assert "could not be compared again" in field.explain()
    h.k = 2.0
    assert_as_stepper(field)
    assert field.explain() == "compiled"


def test_one_thread_compares(monkeypatch):
    """Others go on meanwhile; and a field that was found out costs nothing more."""
    _, field = make_field()
    ends(field)
    inside, go, calls = threading.Event(), threading.Event(), []
    original = recheck._difference

    def slow(*args):
        calls.append(threading.get_ident())
        inside.set()
        assert go.wait(60)
        return original(*args)

    monkeypatch.setattr(recheck, "_difference", slow)
    thread = threading.Thread(target=ends, args=(field,))
    thread.start()
    assert inside.wait(60)
    assert_as_stepper(field)
    go.set()
    thread.join()
    assert len(calls) == 1 and watch_of(field).unseen <= 2
    field.distrust("for a test")
    assert_as_stepper(field)
    assert field.explain() == "served by the stepper: for a test" and len(calls) == 1
