"""Lifetimes: what a call leaves behind when its results are gone, with the collector of cycles switched off."""

import contextlib
import gc
import resource
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from fuzzing import FRESH, child, examples, tick
from hypothesis import given, note
from hypothesis import strategies as st
from torch import Tensor, nn

import odenet_cuda
from odenet_cuda import ODEBlock, SolverError, odeint, odeint_adjoint, solve
from odenet_cuda.compiled.plan import Plan

D = torch.float64
CALLS = 2000 if FRESH else 25
FIRST = 10  # calls after which caches are full
GRADIENTS = ("direct", "checkpoint", "adjoint", "quadrature")
THEN = ("backward", "backward", "forward only", "create_graph", "retain_graph", "no_grad", "grad twice")
LEAK = 48 << 20  # bytes that a process may grow by in CALLS calls: the allocator's own moods


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 3, dtype=D)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.layer(y)) * torch.cos(t)


class Fails(Field):
    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(t, y) / (t < 0.5)


class Raises(Field):
    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        if float(t.max()) > 0.5:
            raise RuntimeError("on purpose")
        return super().forward(t, y)


def tensors() -> int:
    return sum(1 for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter))


@contextlib.contextmanager
def no_collector():
    """Cycles stay where they are, to be seen."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect()


@st.composite
def uses(draw: Any) -> dict[str, Any]:
    return {
        "field": draw(st.sampled_from(["plain", "plain", "compiled", "fails", "raises"])),
        "front": draw(st.sampled_from(["solve", "solve", "block", "odeint", "odeint_adjoint"])),
        "gradient": draw(st.sampled_from(GRADIENTS)),
        "method": draw(st.sampled_from(["dopri5", "bosh3", "rk4", "euler"])),
        "control": draw(st.sampled_from(["joint", "per_sample"])),
        "then": draw(st.sampled_from(THEN)),
        "dense": draw(st.integers(0, 5)) == 0,
    }  # fmt: skip


def once(use: dict[str, Any], func: Any) -> None:
    """One call of that kind, of which nothing is kept."""
    adaptive = use["method"] in ("dopri5", "bosh3")
    steps = {"rtol": 1e-3, "atol": 1e-3} if adaptive else {}
    y0 = torch.full((4, 3), 0.3, dtype=D, requires_grad=True)
    t = torch.tensor([0.0, 0.5, 1.0], dtype=D)
    control = use["control"] if adaptive else "joint"
    grad = contextlib.nullcontext() if use["then"] != "no_grad" else torch.no_grad()
    with grad:
        if use["front"] == "block":
            ys = ODEBlock(func, t, method=use["method"], gradient=use["gradient"], step_control=control, **steps)(y0)
        elif use["front"] == "odeint":
            ys = odeint(func, y0, t, method=use["method"], **steps)
        elif use["front"] == "odeint_adjoint":
            ys = odeint_adjoint(func, y0, t, method=use["method"], **steps)
        else:
            dense = use["dense"] and use["gradient"] != "quadrature"
            how = {"method": use["method"], "gradient": use["gradient"], "step_control": control, "dense": dense, **steps}
            ys = solve(func, y0, t, **how).ys
    if not ys.requires_grad or use["then"] == "forward only":
        return
    wanted = [y0, *func.parameters()]
    exact = use["front"] == "odeint" or (use["front"] in ("solve", "block") and use["gradient"] in ("direct", "checkpoint"))
    if use["then"] == "create_graph" and exact:
        (grad,) = torch.autograd.grad(ys.sum(), y0, create_graph=True)
        torch.autograd.grad((grad * grad).sum(), wanted, allow_unused=True)
    elif use["then"] in ("retain_graph", "grad twice"):
        torch.autograd.grad(ys.sum(), wanted, retain_graph=True)
        torch.autograd.grad(ys.sum(), wanted)
    else:
        torch.autograd.grad(ys.sum(), wanted)


def attempt(use: dict[str, Any], func: Any) -> None:
    try:
        once(use, func)
    except SolverError:
        assert use["field"] == "fails"
    except RuntimeError as error:
        assert "on purpose" in str(error), error


def field_of(use: dict[str, Any]) -> Any:
    func = {"fails": Fails, "raises": Raises}.get(use["field"], Field)()
    return odenet_cuda.compile(func) if use["field"] == "compiled" else func


@examples(short=5, fresh=8)
@given(uses())
def test_calls(use):
    """Neither tensors nor memory pile up, whatever the end of a call, and no cycle holds a tensor."""
    tick()
    note(f"{use}")
    func = field_of(use)
    with no_collector():
        for _ in range(FIRST):
            attempt(use, func)
        before, size = tensors(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(CALLS):
            attempt(use, func)
        left = tensors() - before
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - size) * 1024
    assert left <= 2, f"{left} tensors are left by {CALLS} calls: {sizes()}"
    assert grown < LEAK, f"the process has grown by {grown >> 20} MiB in {CALLS} calls"


def sizes() -> list[Any]:
    return Counter(tuple(x.shape) for x in gc.get_objects() if type(x) is Tensor).most_common(4)


@examples(short=6, fresh=40)
@given(uses())
def test_losses_that_are_kept(use):
    """A loss in a list holds its own number after backward(), as torch frees what a graph has saved."""
    tick()
    note(f"{use}")
    if use["field"] in ("fails", "raises") or use["then"] in ("no_grad", "forward only"):
        return
    func, losses = field_of(use), []
    kept: list[int] = []
    with no_collector():
        for _ in range(6):
            y0 = torch.full((4, 3), 0.3, dtype=D, requires_grad=True)
            steps = {} if use["method"] in ("dopri5", "bosh3") else {"step_size": 0.01}
            ys = solve(func, y0, [0.0, 1.0], method=use["method"], gradient=use["gradient"], **steps).ys
            losses.append(ys.sum())
            del ys
            losses[-1].backward()
            kept.append(tensors())
    each = (kept[-1] - kept[1]) / 4
    assert each <= 12, f"{each} tensors stay alive with each loss"


def test_second_backward():
    """Without retain_graph it raises torch's own error, from each kind of gradient, compiled too."""
    for compiled in (False, True):
        for gradient in GRADIENTS:
            func: Any = odenet_cuda.compile(Field()) if compiled else Field()
            ys = solve(func, torch.ones(4, 3, dtype=D, requires_grad=True), [0.0, 1.0], gradient=gradient).ys
            ys.sum().backward()
            with pytest.raises(RuntimeError, match="second time"):
                ys.sum().backward()


@examples(short=4, fresh=40)
@given(uses())
def test_owners_that_die(use):
    """A module that nobody has any more is gone with all that was made for it: plans, tapes, states, blocks."""
    tick()
    note(f"{use}")
    with no_collector():
        func = field_of(use)
        attempt(use, func)
        module = func.func if use["field"] == "compiled" else func
        dead = [weakref.ref(module), weakref.ref(module.layer.weight)]
        del func, module
        alive = [ref for ref in dead if ref() is not None]
    # What the tracer leaves of a field that was read waits for the collector, which has run now; no registry may hold it.
    assert not [ref for ref in dead if ref() is not None], "a module stays alive"
    assert use["field"] == "compiled" or not alive, "a cycle holds a module"


def test_modules_that_are_replaced():
    """Plans of submodules that were swapped for others go with them."""
    func = Field()
    field = odenet_cuda.compile(func)
    y0 = torch.ones(2, 3, dtype=D)
    before = sum(type(x) is Plan for x in gc.get_objects())
    dead = []
    for _ in range(CALLS // 10 + 5):
        dead.append(weakref.ref(func.layer))
        solve(field, y0, [0.0, 0.1], method="euler")
        func.layer = nn.Linear(3, 3, dtype=D)
    solve(field, y0, [0.0, 0.1], method="euler")
    gc.collect()
    alive = sum(ref() is not None for ref in dead)
    plans = sum(type(x) is Plan for x in gc.get_objects()) - before
    assert alive <= 2 and plans <= 4, f"{alive} dead modules are alive, and {plans} plans"


EXITS = """
import torch, odenet_cuda, threading, sys
from torch import nn
class Field(nn.Module):
    def __init__(self):
        super().__init__(); self.layer = nn.Linear(3, 3)
    def forward(self, t, y): return torch.tanh(self.layer(y))
y = torch.ones(4, 3, requires_grad=True)
keep = odenet_cuda.solve(Field(), y, [0.0, 1.0], gradient="direct", dense=True)  # alive until the very end
field = odenet_cuda.compile(Field())
other = odenet_cuda.solve(field, y, [0.0, 1.0], step_control="per_sample").ys
other.sum().backward()
thread = threading.Thread(target=lambda: odenet_cuda.solve(field, y, [0.0, 2.0]))
thread.start()
{end}
"""


@pytest.mark.parametrize(
    "end", ["thread.join()", "thread.join(); sys.exit(0)", "pass", "cycle = [keep, field]; cycle.append(cycle)"]
)
def test_exit(end):
    """The interpreter ends without a word, also while results are alive and a thread is at work."""
    if FRESH or end == "pass":
        assert child(EXITS.format(end=end), environment={"ODENET_CXXFLAGS": "-O0"}) == ""
