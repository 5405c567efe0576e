"""Solves on a grid by torch's operations beside the kernels, funcs that write into their state, interpolants of many steps."""

import pytest
import torch
from torch import nn

from odenet_cuda import formulas, plain, solve
from odenet_cuda.methods import FIXED

D = torch.float64
GRIDS = {
    "outputs": {},
    "step_size": {"step_size": 0.3},
    "nodes": {"grid_constructor": lambda func, y0, t: torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=D)},
    "cubic": {"step_size": 0.3, "interp": "cubic"},
    "perturb": {"step_size": 0.3, "perturb": True},
}
ROUNDING = {D: 1e-13, torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.complex128: 1e-13}


class Field(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.3, -0.5], [0.2, 0.4]]).to(dtype))
        self.calls = 0

    def forward(self, t, y):
        self.calls += 1
        return torch.tanh(y @ self.weight) * (1 + t.to(y.dtype))


def gradients(dtype, method, options, t_grad):
    func = Field(dtype)
    y0 = torch.linspace(-1, 1, 6).view(3, 2).to(dtype).requires_grad_()
    t = torch.tensor([0.0, 0.4, 0.5, 1.0], dtype=D, requires_grad=t_grad)
    solution = solve(func, y0, t, method=method, gradient="direct", **options)
    weights = torch.linspace(1, 2, solution.ys.numel()).view(solution.ys.shape).to(dtype)
    wanted = [y0, func.weight, *([t] if t_grad else [])]
    loss = (solution.ys * weights).sum().real
    return [solution.ys.detach(), solution.y_last, *torch.autograd.grad(loss, wanted)], solution.stats, func.calls


@pytest.fixture
def ways(monkeypatch):
    """What both ways give."""

    def both(*case):
        found, stats, calls = gradients(*case)
        assert stats.nfe == calls
        with monkeypatch.context() as patch:
            patch.setattr(plain, "MOST", 0)
            expected, other, _ = gradients(*case)
        assert (stats.nfe, stats.num_accepted) == (other.nfe, other.num_accepted)
        return zip(found, expected, strict=True)

    return both


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("method", sorted(FIXED))
@pytest.mark.parametrize("t_grad", [False, True])
def test_same_as_the_kernels(ways, method, grid, t_grad):
    for x, y in ways(D, method, GRIDS[grid], t_grad):
        torch.testing.assert_close(x, y, rtol=ROUNDING[D], atol=ROUNDING[D])


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
def test_types(ways, dtype):
    for x, y in ways(dtype, "rk4", {"step_size": 0.3}, False):
        torch.testing.assert_close(x, y, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


def test_what_is_given_out_is_apart():
    """func has the state, not y0, and asks for gradients of its own; outputs, y_last and y0 share no memory."""
    seen = []

    class Asking(Field):
        def forward(self, t, y):
            seen.append((y.data_ptr(), y.requires_grad))
            return super().forward(t, y.requires_grad_())

    func, y0 = Asking(D), torch.ones(1, 2, dtype=D)
    solution = solve(func, y0, [0.0, 1.0], method="euler")
    assert y0.data_ptr() not in [address for address, _ in seen] and not y0.requires_grad and not seen[0][1]
    last = solution.y_last.clone()
    with torch.no_grad():
        solution.ys.zero_()
    assert torch.equal(y0, torch.ones(1, 2, dtype=D)) and torch.equal(solution.y_last, last)


def test_the_kernels_serve_where_gradients_are_of_16_bits_or_not_wanted(monkeypatch):
    served = []
    monkeypatch.setattr(plain, "solve_on_grid", lambda *args: served.append(1))
    for func in (Field(torch.bfloat16), Field(D).requires_grad_(False)):
        solve(func, torch.ones(1, 2, dtype=next(func.parameters()).dtype), [0.0, 1.0], method="rk4")
    with torch.no_grad():
        solve(Field(D), torch.ones(1, 2, dtype=D), [0.0, 1.0], method="rk4")
    assert not served


WRITERS = {
    "mul_": lambda y: y.mul_(-1.0),
    "an element": lambda y: y.__setitem__(0, 0.0) or -y,
    "out": lambda y: torch.neg(y, out=y),
    "a view": lambda y: y.view(-1).clamp_(min=0.1) * 1.0,
}


@pytest.mark.parametrize("writes", WRITERS)
@pytest.mark.parametrize("options", [{"method": "rk4"}, {}, {"step_control": "per_sample"}, {"dense": True}], ids=str)
@pytest.mark.parametrize("recorded", [False, True])
def test_func_may_not_write_into_its_state(writes, options, recorded):
    """The next stage begins there: without a gradient nothing would say so."""
    y0 = torch.ones(3, 2, dtype=D, requires_grad=recorded)
    with torch.set_grad_enabled(recorded), pytest.raises(RuntimeError, match=r"in place|in-place|out=\.\.\. arguments"):
        solve(lambda t, y: WRITERS[writes](y), y0, [0.0, 0.5, 1.0], **options)


@pytest.mark.parametrize("times", [[0.0, 1.0], [1.0, 0.0]], ids=str)
@pytest.mark.parametrize(
    "options", [{"rtol": 1e-9}, {"rtol": 1e-9, "step_control": "per_sample"}, {"method": "rk4", "step_size": 0.01}]
)
def test_an_interpolant_evaluates_few_steps(monkeypatch, times, options):
    """Those in which its times lie, whose values are those of a walk through all."""
    y0 = torch.linspace(0.1, 1, 6, dtype=D).view(3, 2)
    found = solve(lambda t, y: torch.cos(9 * t) * y, y0, times, dense=True, **options).interpolant
    wanted = torch.tensor([0.0, 0.123, 0.5, 0.77, 1.0, float(found.steps[3].t1[0])], dtype=D)
    few = found(wanted)
    with monkeypatch.context() as patch:
        patch.setattr(type(found), "_steps_with", lambda self, t: range(len(self.steps)))
        assert torch.equal(few, found(wanted))
    calls = []
    evaluate = formulas.dense_output
    monkeypatch.setattr(formulas, "dense_output", lambda *args: calls.append(1) or evaluate(*args))
    found(0.5)
    assert 1 <= len(calls) <= (2 if "step_control" not in options else 4) < len(found.steps)
