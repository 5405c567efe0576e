"""Solves that compile their func where it can be read: blocks, and with `set_compile` the functions, with no other word."""

import copy
import gc
import os
import subprocess
import sys
import warnings
import weakref

import pytest
import torch
from compile_native import require_compiler
from compiled_fields import rows
from torch import nn

import odenet_cuda
from odenet_cuda import ODEBlock, odeint, odeint_adjoint, solve
from odenet_cuda.compiled import build, compilation

D = torch.float64
T = torch.tensor([0.0, 0.5], dtype=D)
SOLVED = {"method": "rk4"}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2, dtype=D)
        self.nfe = 0

    def forward(self, t, y):
        self.nfe += 1
        return torch.tanh(self.layer(y))

    def slower(self, t, y):
        return 0.5 * torch.tanh(self.layer(y))


@pytest.fixture(autouse=True)
def quickly_compiled(monkeypatch):
    require_compiler()
    monkeypatch.setenv("ODENET_CXXFLAGS", "-O0")
    monkeypatch.setattr(compilation, "_KEPT", compilation._Kept())


@pytest.fixture
def automatic():
    odenet_cuda.set_compile("auto")
    yield
    odenet_cuda.set_compile(False)


def assert_as_the_stepper(func, served, *args):
    found, expected = served(func), solve(func, rows(5, 2), T, compile=False, **SOLVED, args=args).ys
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_blocks_compile_unless_told_not_to(monkeypatch):
    block = ODEBlock(Net(), T, **SOLVED)
    block(rows(5, 2))
    assert "served by" in block.explain()  # these tests switch it off
    monkeypatch.setattr(compilation, "_asked", None)
    for given, compiled in ((None, True), ("auto", True), (False, False)):
        block = ODEBlock(Net(), T, compile=given, **SOLVED)
        torch.testing.assert_close(block(rows(5, 2)), solve(block.func, rows(5, 2), T, compile=False, **SOLVED).ys[-1])
        assert (block.explain() == "compiled") == compiled
    odenet_cuda.set_compile(False)
    assert ODEBlock(Net(), T, **SOLVED)._compile is None
    block = ODEBlock(Net(), T, compile="auto", **SOLVED)
    block(rows(5, 2))
    assert block.explain() == "compiled"


def test_the_functions(automatic):
    """odeint and odeint_adjoint, with their gradients, and a method of an object; a count goes on."""
    func = Net()
    y0 = rows(5, 2).requires_grad_()
    for served in (odeint, odeint_adjoint):
        grads = []
        for mode in ("auto", False):
            odenet_cuda.set_compile(mode)
            func.nfe = 0
            ys = served(func, y0, T, **SOLVED)
            grads.append(torch.autograd.grad(ys.square().sum(), [y0, *func.parameters()]))
            grads[-1] += (torch.tensor(float(func.nfe)),) if served is odeint else ()
        for x, y in zip(*grads, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
    odenet_cuda.set_compile("auto")
    for _ in range(3):
        assert solve(func, y0, T, **SOLVED).engine == "compiled"
        assert solve(func.slower, y0, T, **SOLVED).engine == "compiled"
        assert solve(lambda t, y, a: a * y, y0, T, args=(rows(5, 2),), **SOLVED).engine == "compiled"
    assert len([key for key in compilation._KEPT.plans if key[1] is not None]) == 1


def test_off_is_off():
    assert solve(Net(), rows(5, 2), T, **SOLVED).engine != "compiled"
    assert solve(Net(), rows(5, 2), T, compile="auto", **SOLVED).engine == "compiled"


@pytest.mark.parametrize("value", ["auto", "0", ""])
def test_the_environment_says_the_same(value):
    program = (
        "import torch, odenet_cuda\nf = lambda t, y: -y\n"
        "print(odenet_cuda.solve(f, torch.ones(3, 1), [0.0, 1.0], method='rk4').engine == 'compiled',"
        " odenet_cuda.compiled.compilation.mode_of_blocks(None))"
    )
    environment = {**os.environ, "ODENET_COMPILE": value, "ODENET_CXXFLAGS": "-O0"}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True).stdout
    assert found.split() == [str(value == "auto"), {"auto": "auto", "0": "False", "": "auto"}[value]]


@pytest.mark.parametrize("given", [True, None, "always", 1])
def test_other_modes_are_refused(given):
    with pytest.raises(ValueError, match="must be 'auto' or False"):
        odenet_cuda.set_compile(given)
    if given is not None:
        with pytest.raises(ValueError, match="compile must be"):
            ODEBlock(Net(), compile=given)
        with pytest.raises(ValueError, match="compile must be"):
            solve(Net(), rows(5, 2), T, compile=given)


def test_what_func_does_besides_is_left_to_the_stepper(automatic, capsys):
    """It keeps a result, prints, or draws; no noise, but a reason."""

    class Keeping(Net):
        def forward(self, t, y):
            self.last = self.layer(y)
            return self.last

    def saying(t, y):
        print("called")
        return -y

    def drawing(t, y):
        return -y + 0 * torch.rand_like(y)

    for func, word in ((Keeping(), "keeps results"), (saying, "func calls print"), (drawing, "random")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            solution = solve(func, rows(5, 2), T, **SOLVED)
        assert solution.engine != "compiled" and word in solution.explanation["compiled"]
    assert capsys.readouterr().out.count("called") == solution.stats.nfe


def test_without_a_compiler_there_is_no_noise(automatic, monkeypatch):
    def none(*args):
        raise build.NoCompiler("there is no compiler")

    monkeypatch.setattr(build, "find_compiler", none)
    monkeypatch.setattr("odenet_cuda.compiled.plan.load_text", none)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = solve(Net(), rows(5, 2), T, **SOLVED)
    assert "no compiler" in solution.explanation["compiled"]


def test_a_func_made_anew_for_each_solve(automatic):
    """It is read no more after some, whatever it is; one that lives is read."""
    weight = rows(2, 2)
    kinds = {
        "a lambda": lambda: lambda t, y: torch.tanh(y @ weight),
        "a method": lambda: Net().slower,
        "an object": lambda: Net(),
    }
    for make in kinds.values():
        engines = []
        for _ in range(12):
            func = make()
            solution = solve(func, rows(5, 2), T, **SOLVED)
            torch.testing.assert_close(solution.ys, solve(func, rows(5, 2), T, compile=False, **SOLVED).ys)
            engines.append(solution.engine)
            del func
            gc.collect()
        assert engines[0] == "compiled" and engines[-1] != "compiled"
        assert "made anew" in solution.explanation["compiled"]
    held = torch.tanh
    field = lambda t, y: held(y)  # noqa: E731
    assert [solve(field, rows(5, 2), T, **SOLVED).engine for _ in range(30)] == ["compiled"] * 30


@pytest.mark.parametrize("method", [False, True])
def test_what_is_kept_goes_with_func(automatic, method):
    func = Net()
    y0 = rows(5, 2).requires_grad_()
    for _ in range(3):
        odeint_adjoint(func, y0, T, **SOLVED)[-1].sum().backward()
        if method:
            odeint(func.slower, y0, T, **SOLVED)
    kept = [weakref.ref(x) for x in (func, func.layer.weight, *(plans for _, plans in compilation._KEPT.plans.values()))]
    del func
    gc.collect()
    assert not compilation._KEPT.plans and all(x() is None for x in kept)


def test_blocks_are_copied_and_pickled_without_it():
    block = ODEBlock(Net(), T, compile="auto", **SOLVED)
    block(rows(5, 2))
    other = copy.deepcopy(block)
    assert list(block.state_dict()) == ["func.layer.weight", "func.layer.bias"]
    with torch.no_grad():
        other.func.layer.weight.zero_()
    for each in (other, block):
        torch.testing.assert_close(each(rows(5, 2)), solve(each.func, rows(5, 2), T, compile=False, **SOLVED).ys[-1])
        assert each.explain() == "compiled"


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_inside_torch_compile(method):
    """A grid is taken whole, as with no compiled field; an adaptive solve runs between two graphs."""
    func = nn.Sequential(nn.Linear(2, 2, dtype=D), nn.Tanh())
    block = ODEBlock(lambda t, y: func(y), [0.0, 0.5], method=method, compile="auto")
    compiled = torch.compile(block, fullgraph=method == "rk4", backend="eager")
    y0 = rows(5, 2)
    for _ in range(2):
        torch.testing.assert_close(compiled(y0), ODEBlock(block.func, [0.0, 0.5], method=method, compile=False)(y0))


def test_inside_transforms():
    func = Net()
    block = ODEBlock(func, T, compile="auto", **SOLVED)
    found = torch.func.vmap(torch.func.jacrev(lambda y: block(y[None])[0]))(rows(5, 2))
    expected = torch.func.vmap(torch.func.jacrev(lambda y: ODEBlock(func, T, compile=False, **SOLVED)(y[None])[0]))(rows(5, 2))
    torch.testing.assert_close(found, expected)
