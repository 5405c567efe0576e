"""Explicit methods that crawl where func is stiff say so, once; others say nothing, and nothing is disturbed by the look."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import odenet_cuda
from odenet_cuda import SolverError, solve
from odenet_cuda.methods import EXPLICIT
from odenet_cuda.solvers import stiffness
from odenet_cuda.solvers.stiffness import stable_until

D = torch.float64
CONTROLS = ["joint", "per_sample"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def early(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stiffness, "FIRST_LOOK", 64)
    monkeypatch.setattr(stiffness, "_warned", False)


def stiff(t: Tensor, y: Tensor) -> Tensor:
    """On its slow solution, cos t."""
    return -2000 * (y - torch.cos(t))


def said(func: Any, y0: Tensor, end: float, **how: Any) -> tuple[list[str], Any]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        solution = solve(func, y0, [0.0, end], compile=False, **{"rtol": 1e-4, "atol": 1e-4, **how})
    return [str(one.message) for one in caught if "stiff" in str(one.message)], solution


def test_intervals_of_stability():
    """Known ones: Hairer and Wanner II, IV.2; and of a method that begins a step with a slope that is not that at its start."""
    for name, known in {"dopri5": 3.31, "dopri8": 5.17, "bosh3": 2.51, "adaptive_heun": 1.0}.items():
        assert stable_until(EXPLICIT[name]) == pytest.approx(known, abs=0.02)


@pytest.mark.parametrize("method", EXPLICIT)
@pytest.mark.parametrize("control", CONTROLS)
def test_it_is_said_once(method: str, control: str):
    y0 = torch.ones(3, 2, dtype=D)
    words, _ = said(stiff, y0, 0.8, method=method, step_control=control)
    assert len(words) == 1
    where = "func is stiff in sample 0: after" if control == "per_sample" else "func is stiff: after"
    assert words[0].startswith(where) and "method='rodas5p'" in words[0] and "at most" in words[0]
    assert said(stiff, y0, 0.8, method=method, step_control=control)[0] == []


def test_the_sample_that_is_stiff_is_named():
    rate = torch.tensor([[1.0], [2000.0]], dtype=D)
    words, _ = said(lambda t, y: -rate * (y - torch.cos(t)), torch.ones(2, 1, dtype=D), 0.8, step_control="per_sample")
    assert len(words) == 1 and "in sample 1" in words[0]


def test_backwards_in_time_and_float32():
    func = lambda t, y: 2000 * (y - torch.cos(t))  # noqa: E731
    y0 = torch.ones(2, 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        solve(func, y0, [0.0, -0.8], rtol=1e-3, atol=1e-3, compile=False)
    assert any("func is stiff" in str(one.message) for one in caught)


def oscillator(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([50 * y[:, 1], -50 * y[:, 0]], 1)


NOT_STIFF = {
    "oscillator": (oscillator, 4.0, {}),
    "oscillator, loosely": (oscillator, 40.0, {"rtol": 1e-2, "atol": 1e-2}),
    "growth": (lambda t, y: 20 * y.tanh(), 3.0, {"max_step": 0.01}),
    "small steps": (lambda t, y: -y, 1.0, {"max_step": 0.005}),
    "exactly": (lambda t, y: -y * torch.cos(t), 10.0, {"rtol": 1e-12, "atol": 1e-13}),
}


@pytest.mark.parametrize("name", NOT_STIFF)
@pytest.mark.parametrize("control", CONTROLS)
def test_others_say_nothing(name: str, control: str):
    func, end, how = NOT_STIFF[name]
    words, solution = said(func, torch.tensor([[1.0, 0.5]], dtype=D), end, step_control=control, **how)
    assert words == [] and int(torch.as_tensor(solution.stats.num_accepted).max()) > 64


class Drawing(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2000.0, dtype=D))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return -self.weight * (y - torch.cos(t)) + 0 * torch.rand((), dtype=D)


@pytest.mark.parametrize("gradient", [None, "direct", "checkpoint"])
def test_nothing_is_disturbed(monkeypatch: pytest.MonkeyPatch, gradient: str | None):
    """Numbers, counts and random generators are what they are without the look."""
    found = []
    for first in (64, 0):
        monkeypatch.setattr(stiffness, "FIRST_LOOK", first)
        monkeypatch.setattr(stiffness, "_warned", False)
        torch.manual_seed(0)
        func = Drawing()
        with torch.set_grad_enabled(gradient is not None):
            words, solution = said(func, torch.ones(2, 1, dtype=D), 0.2, gradient=gradient or "direct")
        assert bool(words) == bool(first)
        if gradient is not None:
            solution.ys[-1].sum().backward()
        found.append((solution.ys.detach(), solution.stats.nfe, torch.rand(3), func.weight.grad))
    (ys, nfe, drawn, grad), others = found
    assert torch.equal(ys, others[0]) and nfe == others[1] and torch.equal(drawn, others[2])
    assert gradient is None or torch.equal(grad, others[3])


def test_before_a_failure():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(SolverError, match="max_num_steps"):
            solve(stiff, torch.ones(1, dtype=D), [0.0, 5.0], max_num_steps=100, compile=False)
    assert any("func is stiff" in str(one.message) for one in caught)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("gradient", ["direct", "adjoint"])
def test_compiled_solves_say_it_at_their_end(gradient: str, own: bool):
    """The first, and one like it, which is given what the first left; that looks too where there is nothing to say."""
    field = odenet_cuda.compile(lambda t, y: -2000 * (y - t * t))
    t: Any = torch.tensor([[0.0, 0.8]] * 3, dtype=D) if own else [0.0, 0.8]
    y0 = torch.ones(3, 2, requires_grad=True)
    how: Any = dict(rtol=1e-4, atol=1e-4, gradient=gradient, step_control="per_sample" if own else "joint")
    for _ in range(2):
        with pytest.warns(UserWarning, match="func is stiff"):
            solution = solve(field, y0, t, **how)
        assert solution.engine == "compiled", solution.explanation
        stiffness._warned = False
    field = odenet_cuda.compile(lambda t, y: torch.stack([y[:, 1], -9e4 * y[:, 0]], 1))
    for _ in range(2):
        solution = solve(field, y0, t, **how)
        assert solution.engine == "compiled" and int(torch.as_tensor(solution.stats.num_accepted).max()) > stiffness.FIRST_LOOK


def test_compiled_solves_are_looked_at_ever_more_rarely(monkeypatch: pytest.MonkeyPatch):
    """For a look may cost as much as the solve; each func has its own."""
    seen: list[int] = []
    monkeypatch.setattr(stiffness, "FIRST_LOOK", 50)
    monkeypatch.setattr(stiffness, "look", lambda *_: seen.append(1))
    for _ in range(2):
        field = odenet_cuda.compile(lambda t, y: torch.stack([y[:, 1], -400.0 * y[:, 0]], 1))
        counts = []
        for _ in range(9):
            solve(field, torch.ones(1, 2), [0.0, 2.0], rtol=1e-4, atol=1e-4)
            counts.append(len(seen))
            seen.clear()
        assert counts == [1, 1, 0, 1, 0, 0, 0, 1, 0]
