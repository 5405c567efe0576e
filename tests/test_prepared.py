"""What follows from the kind of a solve is made once and kept: whatever changes afterwards is seen by the next solve.

Each case solves twice with a gradient and without, changes something, and solves again, beside the stepper.
"""

import gc
import os
import threading
import weakref
from contextlib import contextmanager, nullcontext

import pytest
import torch
from compile_native import require_compiler
from compiled_fields import rows
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import odenet_cuda
from odenet_cuda import solve

D = torch.float64
T = [0.0, 0.4]
TOLERANCE = 1e-10  # both take the same steps; the order of sums differs


class Net(nn.Module):
    """A linear layer and another one, with tanh between; two biases after one another; a buffer; and what only Python knows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.between, self.second = nn.Linear(2, 4, dtype=D), nn.Tanh(), nn.Linear(4, 2, dtype=D)
        self.shift = nn.Parameter(rows(2, seed=7))
        self.register_buffer("scale", torch.tensor(0.8, dtype=D))
        self.rate = 1.0
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(rows(*p.shape, seed=i))

    def forward(self, t, y):
        dy = self.second(self.between(self.first(y))) + self.shift
        return self.scale * self.rate * dy * (0.5 if self.training else 1.0)


OPTIONS = {"method": "bosh3", "rtol": 1e-5, "atol": 1e-7}


def results(func, parameters, y0, t, options, grad=True):
    """Outputs, and gradients for y0 and parameters where they are wanted."""
    start = y0.detach().clone().requires_grad_(grad)
    ys = solve(func, start, t, **options).ys
    if not (grad and ys.requires_grad):
        return [ys.detach()]
    wanted = [start, *(p for p in parameters if p.requires_grad)]
    loss = (ys * torch.cos(torch.arange(ys.numel(), dtype=ys.dtype)).view_as(ys)).sum()
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [ys.detach(), *[torch.zeros_like(x) if g is None else g for g, x in zip(found, wanted, strict=True)]]


def assert_fresh(field, y0=None, t=T, options=OPTIONS, compiled=True):
    """With and without a gradient, each beside the stepper."""
    y0 = rows(5, 2) if y0 is None else y0
    parameters = list(field.parameters())
    for grad in (True, False):
        found = results(field, parameters, y0, t, options, grad)
        if compiled is not None:
            assert (field.explain() == "compiled") == compiled, field.explain()
        expected = results(field.func, parameters, y0, t, options, grad)
        assert len(found) == len(expected)
        for x, y in zip(found, expected, strict=True):
            assert x.dtype == y.dtype and x.shape == y.shape
            scale = float(y.abs().max()) + 1e-3
            torch.testing.assert_close(x, y, rtol=TOLERANCE, atol=TOLERANCE * scale)


@pytest.fixture(autouse=True)
def quickly_compiled(monkeypatch):
    """What is prepared does not depend on how well the machine code is."""
    monkeypatch.setenv("ODENET_CXXFLAGS", "-O0")


def prepared(func=None):
    require_compiler()
    field = odenet_cuda.compile(Net() if func is None else func)
    assert_fresh(field)
    assert_fresh(field)
    return field


def put(module, name, value):
    setattr(module, name, value)


def other(p, seed=30):
    return rows(*p.shape, seed=seed, dtype=p.dtype)


def written(net):
    with torch.no_grad():
        net.first.weight.mul_(0.5)
        net.shift.add_(1.0)
        net.scale.fill_(0.3)


def trained(net):
    for p in net.parameters():
        p.data -= 0.1 * other(p)


def transposed(net):
    net.first.weight.data = net.first.weight.data.t().contiguous().t() * 2


def part_of_a_larger_one(net):
    memory = torch.zeros(9, 7, dtype=D)
    memory[2:6, 1:3] = other(net.first.weight)
    net.first.weight.data = memory[2:6, 1:3]


CHANGES = {
    "written in place": written,
    "trained": trained,
    "a parameter replaced": lambda net: put(net.first, "weight", nn.Parameter(other(net.first.weight))),
    "its data replaced": lambda net: put(net.first.weight, "data", other(net.first.weight)),
    "its memory set": lambda net: net.shift.data.set_(other(net.shift)),
    "transposed in memory": transposed,
    "a part of a larger tensor": part_of_a_larger_one,
    "a buffer replaced": lambda net: put(net, "scale", torch.tensor(0.2, dtype=D)),
    "frozen": lambda net: net.first.weight.requires_grad_(False),
    "all frozen": lambda net: net.requires_grad_(False),
    "tied": lambda net: put(net.second, "bias", net.shift),
    "layers exchanged": lambda net: put(net, "second", nn.Linear(4, 2, dtype=D)),
    "moved": lambda net: net.to("cpu").share_memory(),
    "threads": lambda net: torch.set_num_threads(2),
    "a cache elsewhere": lambda net: os.environ.update(ODENET_CACHE=str(os.environ.get("ODENET_CACHE", "/tmp")) + "/other"),
    "a level of the CPU": lambda net: os.environ.update(ODENET_CPU="baseline"),
}


@pytest.fixture
def as_it_was(monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CHANGES)
def test_changes_of_tensors_need_no_new_program(as_it_was, name):
    field = prepared()
    CHANGES[name](field.func)
    assert_fresh(field)
    assert_fresh(field)


NEW_PROGRAMS = {
    "a module swapped": lambda net: put(net, "between", nn.Sigmoid()),
    "evaluated": lambda net: net.eval(),
    "a number": lambda net: put(net, "rate", 1.5),
}


@pytest.mark.parametrize("name", NEW_PROGRAMS)
def test_what_the_program_was_read_from(name):
    field = prepared()
    NEW_PROGRAMS[name](field.func)
    assert_fresh(field)
    assert_fresh(field)


def test_another_type():
    field = prepared()
    field.func.float()
    y0, options = rows(5, 2).float(), {**OPTIONS, "rtol": 1e-3, "atol": 1e-4}
    found, expected = solve(field, y0, T, **options).ys, solve(field.func, y0, T, **options).ys
    assert field.explain() == "compiled" and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    field.func.double()
    assert_fresh(field)


def test_training_goes_on_after_a_layer_of_zeros():
    """What was multiplied by zero is compared when it is zero no more."""
    func = Net()
    nn.init.zeros_(func.second.weight)
    field = prepared(func)
    trained(func)
    assert_fresh(field)


# What a call is asked for

CALLS = {
    "times": {"t": [0.1, 0.9]},
    "backwards": {"t": [0.4, 0.0]},
    "more times": {"t": [0.0, 0.1, 0.4]},
    "many": {"y0": rows(67, 2)},
    "one": {"y0": rows(1, 2)},
    "another state": {"y0": rows(5, 2, seed=3)},
    "a part of a larger state": {"y0": rows(5, 6)[:, 2:4]},
    "tolerances": {"options": {**OPTIONS, "rtol": 1e-3, "atol": 1e-3}},
    "controller": {"options": {**OPTIONS, "controller": "PI"}},
    "a first step": {"options": {**OPTIONS, "first_step": 0.01}},
    "stops": {"options": {**OPTIONS, "step_t": [0.15], "jump_t": [0.3]}},
}


def test_what_a_call_is_asked_for():
    """One after the other, and back: nothing of one call is left in the next."""
    field = prepared()
    for call in CALLS.values():
        assert_fresh(field, **call)
        assert_fresh(field)
    for call in reversed(CALLS.values()):
        assert_fresh(field, **call)


def test_the_two_zeros():
    """As times they are equal, and yet func may tell them apart."""
    require_compiler()
    field = odenet_cuda.compile(lambda t, y: torch.where(1 / t > 0, y, -y))
    for t0 in (0.0, -0.0, 0.0):
        found, expected = (solve(f, torch.ones(3, 1, dtype=D), [t0, 1.0], method="euler").ys for f in (field, field.func))
        assert field.explain() == "compiled" and torch.equal(found, expected) and float(found[-1, 0, 0]) in (0.0, 2.0)


def test_arguments():
    require_compiler()
    field = odenet_cuda.compile(lambda t, y, a, k: torch.tanh(a * y) - k * y)
    a, k = rows(5, 2, seed=1).requires_grad_(), torch.tensor(0.5, dtype=D)
    for _ in range(2):
        assert_fresh(field, options={**OPTIONS, "args": (a, k)})
    for args in ((a.detach() + 1, k), (a, k.clone().requires_grad_()), (a, torch.tensor(2.0, dtype=D)), (a.t().clone().t(), k)):
        assert_fresh(field, options={**OPTIONS, "args": args})


# Torch's own state


class Seen(TorchFunctionMode):
    calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


class SeenBelow(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def default_dtype():
    torch.set_default_dtype(D)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


STATES = {  # and whether the compiled field serves then
    "autocast": (lambda: torch.autocast("cpu", torch.bfloat16), False),
    "anomaly detection": (torch.autograd.detect_anomaly, False),
    "a function mode": (Seen, False),
    "a dispatch mode": (SeenBelow, False),
    "a default device": (lambda: torch.device("cpu"), True),
    "a default dtype": (default_dtype, True),
    "no gradients": (torch.no_grad, True),
    "inference": (torch.inference_mode, True),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", STATES)
def test_torch_is_asked_at_every_call(name):
    field, (state, compiled) = prepared(), STATES[name]
    options = {**OPTIONS, "rtol": 1e-2, "atol": 1e-2} if name == "autocast" else OPTIONS
    with state() as entered:
        assert_fresh(field, options=options, compiled=compiled)
        assert not hasattr(entered, "calls") or entered.calls > 50
    assert_fresh(field)


def test_numbers_of_another_default_dtype():
    """A tensor that func makes has it."""
    require_compiler()
    field = odenet_cuda.compile(lambda t, y: -y * torch.full((2,), 1 / 3))
    for state in (nullcontext, default_dtype, nullcontext):
        with state():
            found, expected = (solve(f, rows(5, 2), T, method="euler").ys for f in (field, field.func))
            assert torch.allclose(found, expected, rtol=TOLERANCE, atol=0)


def test_callbacks_that_come_later():
    """As attributes of the field, of its class, and as modules of it."""
    calls = []
    for place in ("object", "class", "module"):
        func = type("Net", (Net,), {})()
        field = prepared(func)
        calls.clear()
        count = lambda *args: calls.append(1)  # noqa: E731
        if place == "class":
            type(func).callback_step = count
        else:
            func.callback_step = count if place == "object" else type("Counter", (nn.Module,), {"forward": count})()
        solve(field, rows(5, 2), T, **OPTIONS)
        assert calls and "callbacks" in field.explain()


@pytest.mark.parametrize("gradient", ["direct", "adjoint"])
@pytest.mark.parametrize("how", ["joint", "own", "list"])
def test_other_times_are_solved_at_those(monkeypatch, how, gradient):
    """A solve at other times, as many, is prepared by the one before: forwards, backwards, and with stops between them."""
    net, y0 = Net(), rows(3, 2, seed=3)
    field, own = prepared(net), how == "own"
    options = {**OPTIONS, "gradient": gradient, "step_control": "per_sample" if own else "joint", "jump_t": (0.25,)}

    def times(*values):
        if how == "list":
            return list(values)
        t = torch.tensor(values, dtype=D)
        return torch.stack([t, t + 0.1, torch.cat([t[:-1], t.new_tensor([torch.nan])])]) if own else t

    for _ in range(12):  # and it is not due to be compared with func again
        results(field, net.parameters(), y0, times(0.0, 0.2, 0.4), options)
    monkeypatch.setattr(odenet_cuda.engines.compiled, "prepare", None)  # nothing is prepared anew
    for values in ((0.1, 0.3, 0.9), (0.4, 0.1, -0.3), (-0.0, 0.2, 0.4)):
        ours, theirs = (results(f, net.parameters(), y0, times(*values), options) for f in (field, net))
        assert field.explain() == "compiled"
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, equal_nan=True)
    for wrong in ((0.0, 0.0, 1.0), (0.0, 2.0, 1.0), (0.0, 1.0, float("inf"))):
        with pytest.raises(ValueError, match="t must be"):
            solve(field, y0, times(*wrong), **options)


def test_times_that_change_before_a_second_derivative():
    """The solve that is made again for it is the one that was."""
    field, y0, t = prepared(), rows(5, 2), torch.tensor(T, dtype=D)
    seconds = []
    for func in (field, field, field.func):
        start = y0.clone().requires_grad_()
        ys = solve(func, start, t, **OPTIONS).ys
        t.mul_(2)
        (first,) = torch.autograd.grad(ys.square().sum(), start, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), start)[0])
        t.mul_(0.5)
    for found in seconds[:2]:
        torch.testing.assert_close(found, seconds[2], rtol=1e-9, atol=1e-9)


def test_a_solve_that_fails_again():
    """Rows that do not get to the end are told of, and lose their gradient, at every solve of a kind."""
    require_compiler()
    field = odenet_cuda.compile(lambda t, y: y * y)
    y0 = torch.tensor([[0.1], [5.0], [0.2]], dtype=D)
    options = {"step_control": "per_sample", "on_failure": "return", "max_num_steps": 60, "rtol": 1e-6, "atol": 1e-6}
    for grad in (False, True, True):
        start = y0.clone().requires_grad_(grad)
        solution = solve(field, start, [0.0, 0.1, 1.0], **options)
        assert field.explain() == "compiled" and [x == "success" for x in solution.status] == [True, False, True]
        assert solution.ys[2].isnan().reshape(-1).tolist() == [False, True, False]
        if grad:
            (found,) = torch.autograd.grad(solution.ys[2, ::2].sum(), start)
            assert found.isfinite().all() and found[1] == 0


def test_a_module_without_length():
    """That it is false is no reason to look for another."""

    class Empty(Net):
        def __len__(self):
            return 0

    assert not Empty()
    field = prepared(Empty())
    assert field.explain() == "compiled"


# Memory that is used again


def test_results_stay():
    """The memory of one solve is not that of another, and what one keeps for its way back stays."""
    field = prepared()
    starts = [rows(5, 2, seed=i).requires_grad_() for i in range(3)]
    ends = [solve(field, y0, T, **OPTIONS) for y0 in starts]
    kept = [[x.detach().clone() for x in (end.ys, end.y_last)] for end in ends]
    with torch.no_grad():
        for i in range(3):
            solve(field, rows(5, 2, seed=9 + i), T, **OPTIONS).ys.fill_(7.0)
    for start, end, (ys, last) in zip(starts, ends, kept, strict=True):
        assert torch.equal(end.ys, ys) and torch.equal(end.y_last, last)
        expected = results(field.func, [], start, T, OPTIONS)
        (found,) = torch.autograd.grad((end.ys * torch.cos(torch.arange(20, dtype=D)).view(2, 5, 2)).sum(), start)
        torch.testing.assert_close(found, expected[1], rtol=TOLERANCE, atol=TOLERANCE)


def test_gradients_share_no_numbers():
    """Two biases have one gradient; each its own memory."""
    field = prepared()
    solve(field, rows(5, 2), T, **OPTIONS).ys.sum().backward()
    grads = [p.grad for p in field.parameters()]
    before = [grad.clone() for grad in grads]
    for i, grad in enumerate(grads):
        grad.fill_(1e3 + i)
        for j in range(i + 1, len(grads)):
            assert torch.equal(grads[j], before[j])
    assert all(bool((grad == 1e3 + i).all()) for i, grad in enumerate(grads))


def test_memory_that_a_parameter_had_in_the_solve():
    field = prepared()
    y0 = rows(5, 2)
    ys = solve(field, y0, T, **OPTIONS).ys
    expected = results(field.func, [field.func.shift], y0, T, OPTIONS)[2]
    field.func.first.weight.data = other(field.func.first.weight)
    (found,) = torch.autograd.grad((ys * torch.cos(torch.arange(20, dtype=D)).view(2, 5, 2)).sum(), field.func.shift)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_threads_share_a_prepared_solve():
    field, wrong = prepared(), []
    starts = [rows(40, 2, seed=i) for i in range(4)]
    expected = [solve(field.func, y0, [0.0, 0.3 + i], **OPTIONS).ys for i, y0 in enumerate(starts)]

    def work(i):
        for _ in range(30):
            found = solve(field, starts[i], [0.0, 0.3 + i], **OPTIONS).ys
            if not torch.allclose(found, expected[i], rtol=1e-8, atol=1e-8):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_is_kept_is_bounded_and_goes_with_the_field():
    field = prepared()
    for i in range(80):
        solve(field, rows(2 + i, 2), T, method="bosh3", rtol=1e-3, atol=1e-3, max_step=1.0 + i)
    plan = field._latest
    assert len(plan.kinds) <= 40
    gone = weakref.ref(plan), weakref.ref(field.func.first.weight)
    gc.collect()
    gc.disable()  # by counts alone
    try:
        del plan, field
        assert gone[0]() is None
    finally:
        gc.enable()
    gc.collect()  # what a reading leaves
    assert gone[1]() is None
