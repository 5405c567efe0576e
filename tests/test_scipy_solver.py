"""Scipy's solvers by name, and programs written for torchdiffeq that ask for methods by their names."""

import importlib
import math
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import odenet_cuda
from odenet_cuda import ODEBlock, SolverError, odeint, odeint_adjoint, solve
from odenet_cuda.methods import ADAPTIVE, ON_GRID, SYMPLECTIC

pytest.importorskip("scipy")
D = torch.float64
SOLVERS = ["LSODA", "Radau", "BDF", "RK45", "RK23", "DOP853"]
every_solver = pytest.mark.parametrize("solver", SOLVERS)

pytestmark = pytest.mark.usefixtures("one_thread")


def field(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """With a closed form: 1 / sqrt(t + 1) and exp(sin t)."""
    a, b = y
    return -(a**3) / 2 + (b * torch.exp(-torch.sin(t)) - 1), b * torch.cos(t) + (a * a * (t + 1) - 1)


def exact(t: Tensor) -> tuple[Tensor, Tensor]:
    return 1 / (t + 1).sqrt(), t.sin().exp()


@every_solver
@pytest.mark.parametrize("backwards", [False, True])
def test_against_a_closed_form(solver: str, backwards: bool):
    """Outputs inside steps and at the end, where it lands."""
    t = torch.linspace(0, 2, 7, dtype=D)
    t = t.flip(0) if backwards else t
    solution = solve(field, tuple(x[:1] for x in exact(t)), t, method="scipy_solver", solver=solver, rtol=1e-7, atol=1e-8)
    for found, right in zip(solution.ys, exact(t), strict=True):
        torch.testing.assert_close(found[:, 0], right, rtol=3e-5, atol=3e-5)
    assert solution.status == "success" and solution.stats.num_accepted >= 5
    assert solution.engine == "stepper" and solution.stats.nfe > solution.stats.num_accepted


def test_types_shapes_and_tolerances():
    t = torch.tensor([0.0, 1.0])
    for dtype in (torch.float32, torch.complex64, torch.complex128):
        y0 = torch.ones(2, 3, dtype=dtype)
        rate = 1j if dtype.is_complex else -1.0
        found = odeint(lambda t, y, rate=rate: rate * y, y0, t, method="scipy_solver", rtol=1e-6, atol=torch.full((2, 3), 1e-7))
        assert found.dtype == dtype and found.shape == (2, 2, 3)
        torch.testing.assert_close(found[1], y0 * (math.e**rate), rtol=1e-4, atol=1e-5)
    parts = solve(field, tuple(x[:1] for x in exact(t)), t, method="scipy_solver", rtol=1e-6, atol=(1e-6, 1e-8)).ys
    torch.testing.assert_close(parts[0][-1, 0], exact(t)[0][-1], rtol=1e-4, atol=1e-4)
    assert odeint(lambda t, y: -y, torch.ones(3), t[:1], method="scipy_solver").shape == (1, 3)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 2).to(D)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.layer(y)) * (1 + t)


@every_solver
def test_gradients_by_the_adjoint(solver: str):
    """For y0, the times and parameters; the way back is of this package."""
    found = []
    for run in (
        lambda func, y0, t: odeint_adjoint(func, y0, t, method="scipy_solver", options={"solver": solver}),
        lambda func, y0, t: odeint(func, y0, t, rtol=1e-10, atol=1e-11),
    ):
        func, y0 = Net(), torch.tensor([[1.0, -0.5]], dtype=D, requires_grad=True)
        t = torch.tensor([0.0, 0.4, 1.0], dtype=D, requires_grad=True)
        found.append(torch.autograd.grad(run(func, y0, t).square().sum(), [y0, t, *func.parameters()]))
    for x, right in zip(*found, strict=True):
        torch.testing.assert_close(x, right, rtol=1e-4, atol=1e-5)


def test_block():
    block = ODEBlock(Net(), method="scipy_solver", solver="RK45", rtol=1e-6, atol=1e-6)
    y0 = torch.ones(4, 2, dtype=D)
    right = ODEBlock(block.func, rtol=1e-8, atol=1e-8)(y0)
    torch.testing.assert_close(block(y0), right, rtol=1e-4, atol=1e-4)
    block(y0).sum().backward()
    assert block.nfe_backward > 0


def test_values_of_a_func_with_parameters():
    """As torchdiffeq gives them, where nobody has switched gradients off; solve refuses."""
    func, y0, t = Net(), torch.tensor([[1.0, -0.5]], dtype=D), torch.tensor([0.0, 0.4, 1.0], dtype=D)
    with pytest.warns(UserWarning, match="this result has no gradient. Use odeint_adjoint"):
        found = odeint(func, y0, t, method="scipy_solver")
    assert not found.requires_grad
    torch.testing.assert_close(found, odeint(func, y0, t).detach(), rtol=1e-6, atol=1e-6)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(odeint(func, y0, t, method="scipy_solver"), found)


# ---- what ends in words ----


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"gradient": "direct"}, r"gradient='adjoint' \(odeint_adjoint\)"),
        ({"gradient": "checkpoint"}, "outside of torch"),
        ({"gradient": "quadrature"}, "outside of torch"),
        ({"dense": True}, "dense=True"),
        ({"gradient": "adjoint", "step_control": "per_sample"}, "step_control='per_sample'"),
        ({"gradient": "adjoint", "events": odenet_cuda.Event(lambda t, y: y.sum())}, "events: not served"),
        ({"method": "dopri5", "gradient": "adjoint", "adjoint_method": "scipy_solver"}, "cannot be an adjoint_method"),
    ],
)
def test_what_is_refused(how: dict[str, Any], words: str):
    with pytest.raises(NotImplementedError, match=words):
        solve(Net(), torch.ones(1, 2, dtype=D), [0.0, 1.0], **{"method": "scipy_solver", **how}).ys.sum().backward()


def test_wrong_options():
    with pytest.raises(ValueError, match=r"solver must be one of .*'BDF'.*got 'bdf'"):
        solve(Net(), torch.ones(1, 2, dtype=D), [0.0, 1.0], method="scipy_solver", solver="bdf")
    with pytest.raises(ValueError, match="solver is no option of method='dopri5', got 'BDF'"):
        solve(Net(), torch.ones(1, 2, dtype=D), [0.0, 1.0], solver="BDF")
    with torch.no_grad(), pytest.warns(UserWarning, match="scipy_solver: Unexpected arguments {'step_size': 0.1}"):
        odeint(Net(), torch.ones(1, 2, dtype=D), torch.tensor([0.0, 1.0]), method="scipy_solver", options={"step_size": 0.1})


@every_solver
def test_failures(solver: str):
    """With time and remedy; nothing hangs where func gives no number."""
    how = {"method": "scipy_solver", "solver": solver}
    with pytest.raises(SolverError, match=r"non-finite values.*Remedy"):
        solve(lambda t, y: (0.5 - t).sqrt() + y, torch.ones(2, dtype=D), [0.0, 1.0], **how)
    with pytest.raises(SolverError, match="non-finite values"):
        solve(lambda t, y: -y, torch.tensor([math.nan, 1.0], dtype=D), [0.0, 1.0], **how)
    with pytest.raises(SolverError, match="max_num_steps exceeded"):
        solve(lambda t, y: -y, torch.ones(2, dtype=D), [0.0, 1.0], max_num_steps=2, **how)
    found = solve(lambda t, y: y * y, torch.ones(2, dtype=D), [0.0, 0.5, 2.0], max_num_steps=10**4, on_failure="return", **how)
    assert found.status in ("scipy failed", "non-finite values", "max_num_steps exceeded")
    torch.testing.assert_close(found.ys[1], torch.full((2,), 2.0, dtype=D), rtol=1e-4, atol=1e-4)
    assert found.ys[2].isnan().all()


def test_without_scipy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=r"method='scipy_solver' needs scipy: pip install scipy"):
        solve(lambda t, y: -y, torch.ones(1), [0.0, 1.0], method="scipy_solver")


# ---- programs written for torchdiffeq ----


@pytest.mark.parametrize("name", [name for name in (*ADAPTIVE, *ON_GRID) if name not in SYMPLECTIC])
def test_programs_find_methods_by_name(monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setitem(sys.modules, "torchdiffeq", odenet_cuda)
    theirs = importlib.import_module("torchdiffeq")
    options = {"solver": "LSODA"} if name == "scipy_solver" else {"step_size": 0.05} if name in ON_GRID else None
    func, y0, t = Net(), torch.tensor([[1.0, -0.5]], dtype=D), torch.tensor([0.5, 1.5], dtype=D)
    if name == "explicit_adams":
        options = {"step_size": 0.05, "max_order": 4}
    ys = theirs.odeint_adjoint(func, y0, t, method=name, options=options, rtol=1e-5, atol=1e-6)
    ys.sum().backward()
    with torch.no_grad():
        right = theirs.odeint(func, y0, t, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(ys, right, rtol=0.2 if name in ("euler", "implicit_euler") else 1e-2, atol=1e-2)
    assert all(param.grad is not None and bool(param.grad.isfinite().all()) for param in func.parameters())
