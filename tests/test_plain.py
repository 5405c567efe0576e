"""Solves on a grid by torch's operations beside the kernels, and what is kept from one solve to the next."""

import pytest
import torch
from torch import nn

from odenet_cuda import plain, solve
from odenet_cuda.integrate import Options, fixed_grid
from odenet_cuda.methods import FIXED
from odenet_cuda.problem import Field, Problem, Structure
from odenet_cuda.solvers.fixed import plan_of
from odenet_cuda.stepper import _tables

D = torch.float64
GRIDS = {
    "outputs": {},
    "step_size": {"step_size": 0.3},
    "nodes": {"grid_constructor": lambda func, y0, t: torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=D)},
    "cubic": {"step_size": 0.3, "interp": "cubic"},
    "perturb": {"step_size": 0.3, "perturb": True},
}
TIMES = [0.0, 0.4, 0.5, 1.0]
ROUNDING = {D: 1e-13, torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.complex128: 1e-13}


class Rates(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.3, -0.5], [0.2, 0.4]]).to(dtype))

    def forward(self, t, y):
        return torch.tanh(y @ self.weight) * (1 + t.to(y.dtype))


def differentiated(ways, dtype, t_grad):
    """The outputs and gradients of each way, (func, y0, t) -> ys."""
    found = []
    for way in ways:
        func, t = Rates(dtype), torch.tensor(TIMES, dtype=D, requires_grad=t_grad)
        y0 = torch.linspace(-1, 1, 6).view(3, 2).to(dtype).requires_grad_()
        ys = way(func, y0, t)
        loss = (ys * torch.linspace(1, 2, ys.numel()).view(ys.shape).to(dtype)).sum().real
        found.append([ys.detach(), *torch.autograd.grad(loss, [y0, func.weight, *([t] if t_grad else [])])])
    return zip(*found, strict=True)


def both(method, given):
    """The plain solve, and that by the kernels."""

    def by_torch(func, y0, t):
        options = Options(method=method, **given)
        structure = Structure(y0)
        field = Field(func, structure)
        problem = Problem(field, [y0.detach()], TIMES, False, [1e-7], [1e-9])
        grid = fixed_grid(options, TIMES, func, y0, t)
        return plain.solve_on_grid(problem, options.tableau, *grid, options.perturb, field, [y0], t)[0][0]

    return by_torch, lambda func, y0, t: solve(func, y0, t, method=method, gradient="checkpoint", **given).ys


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("method", sorted(FIXED))
@pytest.mark.parametrize("t_grad", [False, True])
def test_same_as_the_kernels(method, grid, t_grad):
    for x, y in differentiated(both(method, GRIDS[grid]), D, t_grad):
        torch.testing.assert_close(x, y, rtol=ROUNDING[D], atol=ROUNDING[D])


@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "adjoint"])
@pytest.mark.parametrize("grid", [name for name in GRIDS if name != "nodes"])  # where an output moves and its node does not
@pytest.mark.parametrize("method", ["euler", "heun3", "rk4"])
def test_a_gradient_for_t_changes_no_other_number(method, grid, gradient):
    """To the bit."""

    def way(func, y0, t):
        return solve(func, y0, t, method=method, gradient=gradient, **GRIDS[grid]).ys

    without, with_t = ([x for (x,) in differentiated([way], torch.float32, t_grad)] for t_grad in (False, True))
    assert all(torch.equal(x, y) for x, y in zip(without, with_t[:3], strict=True))
    assert with_t[3].abs().max() > 0.1


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
def test_types(dtype):
    for x, y in differentiated(both("rk4", {"step_size": 0.3}), dtype, False):
        torch.testing.assert_close(x, y, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


@pytest.mark.parametrize("step_size", [None, 0.3, 0.5])
@pytest.mark.parametrize("method", ["euler", "rk4"])
def test_outputs_are_apart_from_what_else_is_given_out(method, step_size):
    """States are written where outputs lie: nobody else may have that memory."""
    y0, seen = torch.ones(3, 2, dtype=D), []
    solution = solve(lambda t, y: seen.append(y) or -y, y0, TIMES, method=method, step_size=step_size)
    expected, last = solution.ys.clone(), solution.y_last.clone()
    assert torch.equal(last, expected[-1])
    solution.ys.zero_()
    assert torch.equal(solution.y_last, last) and torch.equal(y0, torch.ones(3, 2, dtype=D))
    assert torch.equal(solve(lambda t, y: -y, y0, TIMES, method=method, step_size=step_size).ys, expected)


@pytest.mark.parametrize("step_size", [None, 0.3])
@pytest.mark.parametrize("give", [lambda y: y, lambda y: y.detach(), lambda y: y[:], lambda y: y.flip(0).flip(0)])
def test_func_may_give_back_its_state(give, step_size):
    """A slope in the solver's own memory is not lost when that is written again."""
    y0 = torch.linspace(1, 2, 6, dtype=D).view(3, 2)
    for method in ("euler", "midpoint", "heun3", "rk4"):
        found, expected = (
            solve(f, y0, TIMES, method=method, step_size=step_size).ys for f in (lambda t, y: give(y), lambda t, y: 1 * y)
        )
        assert torch.equal(found, expected)


def test_a_long_grid_has_all_its_outputs():
    """More outputs and steps than there are views of at a time."""
    t = torch.linspace(0, 1, 3000, dtype=D)
    ys = solve(lambda t, y: torch.ones_like(y), torch.zeros(1, dtype=D), t, method="euler").ys
    torch.testing.assert_close(ys[:, 0], t, rtol=0, atol=1e-12)


def test_plans_are_kept_by_the_bits_of_their_numbers(kernels_alone):
    """0.0 and -0.0 are one key of a dictionary, and two times for func."""
    seen = []
    for zero in (0.0, -0.0):
        solve(lambda t, y: seen.append(float(t)) or -y, torch.ones(1), [zero, 1.0], method="euler")
    assert [str(x) for x in seen] == ["0.0", "-0.0"]
    tableau = FIXED["euler"]
    assert plan_of([0.0, 1.0], [0.0, 1.0], 1.0, tableau) is plan_of([0.0, 1.0], [0.0, 1.0], 1.0, tableau)


def test_tables_of_another_kind_are_others():
    """Whatever the kernels' tables depend on is in their key."""
    y0 = torch.linspace(0.1, 1, 6, dtype=D).view(3, 2)
    kinds = [
        {}, {"rtol": 1e-3}, {"atol": 1e-3}, {"safety": 0.5}, {"method": "tsit5"}, {"controller": "PI"},
        {"step_control": "per_sample"}, {"interp": "linear"}, {"method": "bosh3"},
    ]  # fmt: skip
    states = [y0, y0.float(), y0[:1], y0.to(torch.complex128)]

    def field(t, y):
        return torch.cos(9 * t) * y

    def all_kinds():
        for kind in kinds:
            for state in states:
                yield kind, solve(field, state, TIMES, **kind).ys
        yield {"t": "backwards"}, solve(field, y0, TIMES[::-1]).ys

    kept = [ys for _, ys in all_kinds()]
    for (kind, ys), expected in zip(all_kinds(), kept, strict=True):
        _tables.cache_clear()  # the next is made anew
        assert torch.equal(ys, expected), kind
