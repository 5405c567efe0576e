"""A compiled field whose guards have missed something is found out as it is used: it is compared with func again."""

import random
import threading
import types
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from compiled_fields import rows
from torch import nn

import odenet_cuda
from odenet_cuda import solve
from odenet_cuda.compiled import check, comparison, recheck, trace
from odenet_cuda.compiled.guards import Guards
from odenet_cuda.compiled.plans import Plans
from odenet_cuda.compiled.reach import Reach
from odenet_cuda.compiled.watch import Watch
from odenet_cuda.compiled.writes import Code

Y0 = rows(5, 2)
TOLERANCE = 1e-12  # of a few steps in float64


pytestmark = pytest.mark.usefixtures("quick_compiler")


@pytest.fixture
def blind(monkeypatch):
    """Guards that see nothing."""
    monkeypatch.setattr(Guards, "hold", lambda self, args, batch=None: True)


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
    field = odenet_cuda.compile(func, pure=True)

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


def test_solves_too_short_to_compare():
    """Between times a few units in the last place apart no step can be taken: that says nothing about the code."""
    y0, options = rows(5, 2), {"step_control": "per_sample"}
    field = odenet_cuda.compile(lambda t, y: torch.sin(y) * torch.cos(t))
    for first in (True, False):
        for units in (1, 3, 40, 500, 10_000):
            field = odenet_cuda.compile(field.func) if first else field
            watch = None if first else watch_of(field)
            if watch is not None:
                watch.unseen = 10**9
            t = [3.0, 3.0 + units * 2.0**-51]
            assert torch.equal(solve(field, y0, t, **options).ys, solve(field.func, y0, t, **options).ys)
        solve(field, y0, [3.0, 4.0], **options)
        assert field.explain() == "compiled"


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


def test_func_that_can_never_be_called_again():
    """It is tried ever more seldom; the stepper serves those solves, so that the user meets what func raises."""
    calls = 0

    class Watched(nn.Module):
        def forward(self, t, y):
            warnings.warn("each call", stacklevel=2)
            return torch.sin(y) * 2.0

    field = odenet_cuda.compile(Watched())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ends(field)
    raised = []
    for _ in range(40):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                ends(field)
                assert field.explain() == "compiled"
            except UserWarning:
                raised.append(calls)
                assert "could not be compared again" in field.explain()
    assert len(raised) == 5


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
    field._plans.distrust("for a test")
    assert_as_stepper(field)
    assert field.explain().endswith(": for a test") and len(calls) == 1


# ---- other threads, while func is called with what is not the user's ----


class Trained(nn.Module):
    """It anneals, counts, keeps and has weights."""

    def __init__(self):
        super().__init__()
        self.k, self.count, self.kept = 1.0, 0, None
        self.weight = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.register_buffer("buffer", torch.ones(2, dtype=torch.float64))

    def forward(self, t, y):
        self.count += 1
        self.kept = y * 2
        return self.kept * self.weight * self.buffer * self.k * SHARED.scale


SHARED = types.SimpleNamespace(scale=1.0)


def fill(x, value):
    with torch.no_grad():
        x.fill_(value)


CHANGES = {  # that do not meet
    "values": [
        lambda f: fill(f.weight, 0.5),
        lambda f: fill(f.buffer, 0.5),
        lambda f: setattr(f, "k", 0.5),
        lambda f: setattr(f, "epoch", 3),
        lambda f: setattr(f.weight, "grad", torch.ones_like(f.weight)),
        lambda f: f.weight.register_hook(lambda g: g),
        lambda f: torch.manual_seed(5),
        lambda f: (random.seed(5), np.random.seed(5)),  # noqa: NPY002
    ],
    "places": [
        lambda f: setattr(f.weight, "data", torch.full((2,), 0.5, dtype=torch.float64)),
        lambda f: setattr(SHARED, "scale", 0.5),
        lambda f: (f.weight * 2).sum().backward(),
    ],
    "a weight": [
        lambda f: setattr(f, "weight", nn.Parameter(torch.full((2,), 0.5, dtype=torch.float64))),
        lambda f: f.weight.requires_grad_(False),
    ],
}
WHEN = {"a call": (trace, "observe"), "its check": (check, "_check_at"), "a comparison": (comparison.Solves, "by_stepper")}


def state_of(func):
    weight = func.weight
    values = weight.tolist(), func.buffer.tolist(), float(func.k), SHARED.scale, vars(func).get("epoch"), weight.requires_grad
    places = id(weight), weight.data_ptr(), id(weight.grad), len(weight._backward_hooks or ())
    generators = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    return values, places, generators


def elsewhere(call):
    """call() in another thread; what it gave."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("name", CHANGES)
def test_what_another_thread_writes_is_left(name, when, monkeypatch):
    """While func is read, its library checked, and the two are compared again; and no later solve is wrong."""
    monkeypatch.setattr(SHARED, "scale", 1.0)
    func, seen = Trained(), []
    field = odenet_cuda.compile(func, pure=True)
    ends(field)
    func.k = 1.5  # it becomes an argument of the code at the next solve
    original = getattr(*WHEN[when])

    def disturbed(*args):
        if not seen:
            seen.append(elsewhere(lambda: ([change(func) for change in CHANGES[name]], state_of(func))[1]))
        return original(*args)

    monkeypatch.setattr(*WHEN[when], disturbed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2 if when == "a comparison" else 1):  # of the library, and of the plan again
            seen.clear()
            ends(field)
            assert seen and state_of(func) == seen[0]
            assert (func.count, func.kept) == (0, None) or field.explain() != "compiled"
            func.count, func.kept = 0, None
        for _ in range(4):
            found, (func.count, func.kept) = ends(field), (0, None)
            assert (found - ends(func)).abs().max() < TOLERANCE
            func.count, func.kept = 0, None
    assert field.explain() == "compiled"


class Renewing(Trained):
    """It has a buffer set anew by a function that registers things for it."""

    def forward(self, t, y):
        self.buffer = self.buffer * 2
        return super().forward(t, y)


def test_hooks_of_others(monkeypatch):
    """A hook of registration, such as torch leaves behind where an export fails, is run by what registers something alone; one
    of calls may write anything."""
    module = nn.modules.module
    handle = module.register_module_buffer_registration_hook(lambda *_: None)
    try:
        test_what_another_thread_writes_is_left("values", "a call", monkeypatch)
        assert not Code(Reach(Trained())).writes("another")
        assert Code(Reach(Renewing())).writes("another")
    finally:
        handle.remove()
    handle = module.register_module_forward_hook(lambda *_: None)
    try:
        assert Code(Reach(Trained())).writes("another")
    finally:
        handle.remove()


def test_weights_that_another_thread_always_changes(monkeypatch):
    """Nothing can be said then; nothing is, and it is tried again ever more seldom."""
    func, calls = Trained(), []
    field = odenet_cuda.compile(func, pure=True)
    ends(field)
    original = comparison.Solves.compiled

    def disturbed(*args):
        calls.append(elsewhere(lambda: fill(func.weight, 3.0)))
        found = original(*args)
        elsewhere(lambda: fill(func.weight, 1.0))
        return found

    monkeypatch.setattr(comparison.Solves, "compiled", disturbed)
    tried = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(20):
            before = len(calls)
            ends(field)
            assert field.explain() == "compiled"
            tried += [i + 1] if len(calls) > before else []
    assert tried == [1, 3, 7, 15]


class Later(nn.Module):
    """It writes for six samples alone."""

    def __init__(self, write):
        super().__init__()
        self.write, self.total, self.extra = write, torch.zeros(2, dtype=torch.float64), None

    def forward(self, t, y):
        if len(y) == 6:
            self.write(self, y)
        return torch.sin(y) * 2.0 + 0 * self.total.mean()


def test_writes_that_were_not_read():
    field = odenet_cuda.compile(Later(lambda self, y: self.total.add_(1)))
    ends(field)
    assert field.explain() == "compiled"
    with pytest.warns(UserWarning, match=r"writes a tensor \[2\]"):
        ends(field, y0=rows(6, 2))
    field = odenet_cuda.compile(Later(lambda self, y: setattr(self, "extra", y)))
    ends(field)
    ends(field, y0=rows(6, 2))
    assert "changed while it was compared" in field.explain()
    field = odenet_cuda.compile(Later(lambda self, y: self.total.add_(1)))
    ends(field, y0=rows(6, 2))
    assert "func writes" in field.explain()


def test_a_reading_that_ends_is_waited_for(monkeypatch):
    """Another thread meets no stand-in, and reads nothing anew that has been read meanwhile."""
    func, readings = Trained(), []
    field = odenet_cuda.compile(func, pure=True)
    ends(field)
    func.k = 1.5
    original, waiting = Plans._read, threading.Event()
    monkeypatch.setattr(Plans, "_read", lambda *args: readings.append(1) or original(*args))
    observe = trace.observe

    def slow(*args):
        if not waiting.is_set():
            thread.start()
            waiting.set()
            thread.join(0.2)
        return observe(*args)

    found = []
    thread = threading.Thread(target=lambda: found.append(ends(field)))
    monkeypatch.setattr(trace, "observe", slow)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ends(field)
        thread.join()
        assert (found[0] - ends(func)).abs().max() < TOLERANCE
    assert len(readings) == 1 and field.explain() == "compiled"


def test_the_stepper_beside_a_reading(monkeypatch):
    """Its solve that meets a stand-in and raises is done once more when the reading has ended."""
    func = Trained()
    field = odenet_cuda.compile(func, pure=True)
    ends(field)
    func.k, outcome = 1.5, []
    observe = trace.observe

    def meet(self, t, y):
        if type(self.k) is not float:
            raise RuntimeError("a stand-in")
        return torch.sin(y) * self.k

    def slow(*args):
        if not threads:
            threads.append(None)
            other = Trained.__new__(Trained)
            other.__dict__ = func.__dict__  # the same attributes
            other.__class__ = type("Meeting", (Trained,), {"forward": meet})
            thread = threading.Thread(target=lambda: outcome.append(ends(odenet_cuda.compile(other), dense=True)))
            thread.start()
            thread.join(0.3)
            threads[0] = thread
        return observe(*args)

    threads = []
    monkeypatch.setattr(trace, "observe", slow)
    ends(field)
    threads[0].join()
    assert len(outcome) == 1


@pytest.mark.parametrize("how", [{}, {"method": "dopri5", "step_size": None, "step_control": "per_sample"}])
def test_a_number_of_samples_that_func_asks_for(how):
    """One that no trial had, as one lane more than a pack, at the first solve of it."""
    field = odenet_cuda.compile(lambda t, y: -y if y.shape[0] == 23 else torch.sin(y))
    for count in (5, 5, 5, 4, 5, 4):
        assert_as_stepper(field, y0=rows(count, 2), **how)
        assert field.explain() == "compiled"
    with pytest.warns(UserWarning, match="was not seen"):
        assert_as_stepper(field, y0=rows(23, 2), **how)


def test_other_numbers_of_samples_are_compared_a_few_times():
    watch = Watch()
    assert not watch.due_with(5)  # of the first solve the reading knows
    watch.add(1e-3)
    watch.add(1e-3)
    watch.compared(1e-3)
    assert [watch.due_with(5), watch.due_with(7), watch.due_with(7)] == [False, True, False]
    assert sum(watch.due_with(size) for size in range(100, 200)) < 10
