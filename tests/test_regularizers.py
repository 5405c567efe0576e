"""Regularizers: their values against formulas, and their gradients against finite differences."""

import math

import pytest
import torch
from torch import nn

from odenet_cuda import ODEBlock, solve
from odenet_cuda.regularizers import REGULARIZERS, RUNNING

WIDTH = 1e-5
DIFFERENCE = 2e-6
Y0 = torch.tensor([[0.3, -0.8], [1.1, 0.4], [-0.5, 0.9]], dtype=torch.float64)
TIMES = torch.tensor([0.1, 0.35, 0.6, 1.0], dtype=torch.float64)
MATRIX = torch.tensor([[0.2, -1.1], [0.9, -0.3]], dtype=torch.float64)
BIAS = torch.tensor([0.4, -0.2], dtype=torch.float64)
STEPS = {"min_step": 0.21, "max_step": 0.21, "max_num_steps": 100}  # of a given size: they do not move with the inputs
ACCURATE = {"rtol": 1e-11, "atol": 1e-11}
DISCRETE = ["direct", "checkpoint"]
CONTINUOUS = ["adjoint", "quadrature"]
SETS = [("kinetic",), ("jacobian",), ("error",), ("stiffness",), REGULARIZERS]


def field(matrix, bias):
    return lambda t, y: torch.tanh(y @ matrix + bias * torch.sin(2 * t)) * (1 + 0.5 * torch.cos(t))


def loss(names, y0, t, matrix, bias, **options):
    """Of the outputs and of every regularizer; the noise of "jacobian" is the same at each call."""
    torch.manual_seed(0)
    solution = solve(field(matrix, bias), y0, t, regularizers=names, **options)
    assert list(solution.regularizers) == list(names)
    return 0.3 * solution.ys.square().sum() + sum((i + 1) * x.sum() for i, x in enumerate(solution.regularizers.values()))


def assert_gradients(names, wanted, **options):
    """Along one direction for each input."""
    values = [Y0, TIMES, MATRIX, BIAS]
    inputs = [x.clone().requires_grad_() for x in values]
    grads = torch.autograd.grad(loss(names, *inputs, **options), inputs)
    for i in wanted:
        direction = torch.cos(torch.arange(values[i].numel(), dtype=torch.float64)).reshape(values[i].shape)
        moved = [[*values[:i], values[i] + sign * WIDTH * direction, *values[i + 1 :]] for sign in (1, -1)]
        with torch.no_grad():
            up, down = (float(loss(names, *x, **options)) for x in moved)
        found = float((grads[i] * direction).sum())
        assert found == pytest.approx((up - down) / (2 * WIDTH), rel=DIFFERENCE, abs=DIFFERENCE), i


@pytest.mark.parametrize("names", SETS, ids="-".join)
@pytest.mark.parametrize("step_control", ["joint", "per_sample"])
@pytest.mark.parametrize("gradient", [*DISCRETE, "three checkpoints"])
def test_gradients_of_the_discrete_solve(gradient, step_control, names):
    budget = {"gradient": "checkpoint", "max_checkpoints": 3} if gradient == "three checkpoints" else {"gradient": gradient}
    assert_gradients(names, [0, 2, 3], step_control=step_control, **STEPS, **budget)


@pytest.mark.parametrize("names", [("kinetic",), RUNNING], ids="-".join)
@pytest.mark.parametrize("gradient", DISCRETE)
def test_gradients_on_a_grid(gradient, names):
    """By the times too, with which the grid moves."""
    assert_gradients(names, [0, 1, 2, 3], method="rk4", step_size=0.23, gradient=gradient)


@pytest.mark.parametrize("names", [("error",), ("stiffness", "kinetic", "error")], ids="-".join)
@pytest.mark.parametrize("gradient", DISCRETE)
def test_gradients_of_one_step(gradient, names):
    """By every time, the two that the step goes between among them."""
    assert_gradients(names, [0, 1, 2, 3], first_step=5.0, min_step=5.0, max_num_steps=100, gradient=gradient)


@pytest.mark.parametrize("names", [("kinetic",), ("jacobian",), RUNNING], ids="-".join)
@pytest.mark.parametrize("step_control", ["joint", "per_sample"])
@pytest.mark.parametrize("gradient", CONTINUOUS)
def test_gradients_of_running_costs(gradient, step_control, names):
    assert_gradients(names, [0, 1, 2, 3], step_control=step_control, gradient=gradient, **ACCURATE)


@pytest.mark.parametrize("gradient", DISCRETE)
def test_second_derivatives_of_running_costs(gradient):
    def function(y0, matrix):
        torch.manual_seed(0)
        solution = solve(field(matrix, BIAS), y0, TIMES, regularizers=RUNNING, gradient=gradient, **STEPS)
        return solution.regularizers["kinetic"] + solution.regularizers["jacobian"]

    assert torch.autograd.gradgradcheck(function, [x.clone().requires_grad_() for x in (Y0, MATRIX)])


# ---- values ----


@pytest.mark.parametrize("gradient", [*DISCRETE, *CONTINUOUS])
def test_kinetic_energy_of_a_decay(gradient):
    """y' = -y: the integral of mean y0^2 exp(-2t); the steps do not change, nor do the outputs."""
    solution = solve(lambda t, y: -y, Y0.clone().requires_grad_(), [0.0, 1.0], regularizers=["kinetic"], gradient=gradient)
    plain = solve(lambda t, y: -y, Y0, [0.0, 1.0])
    expected = Y0.square().mean() * (1 - math.exp(-2.0)) / 2
    torch.testing.assert_close(solution.regularizers["kinetic"], expected, rtol=1e-6, atol=0)
    assert torch.equal(solution.ys, plain.ys) and solution.stats.num_accepted == plain.stats.num_accepted


def test_jacobian_of_a_linear_field():
    """For y' = y A the mean over the noise is the squared Frobenius norm of A over the number of features."""
    y0 = torch.ones(20000, 2, dtype=torch.float64)
    torch.manual_seed(0)
    with torch.no_grad():
        solution = solve(lambda t, y: y @ MATRIX, y0, [0.0, 1.0], regularizers=["jacobian"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(solution.regularizers["jacobian"], MATRIX.square().sum() / 2, rtol=0.03, atol=0)


def test_stiffness_of_a_linear_field():
    """For y' = -5 y every step counts 5; for that and the error see the steps: no rejected step counts."""
    solution = solve(
        lambda t, y: -5 * y, Y0, [0.0, 2.0], regularizers=["error", "stiffness"], first_step=1.5, rtol=1e-3, atol=1e-3
    )
    assert solution.stats.num_rejected > 0
    found = float(solution.regularizers["stiffness"])
    assert found == pytest.approx(5 * solution.stats.num_accepted, rel=1e-9)
    assert 0 < float(solution.regularizers["error"]) < 1e-2


def test_one_number_a_sample():
    """Under per-sample control each sample has its own, as if it were alone."""
    names = ("kinetic", "error", "stiffness")
    options = {"step_control": "per_sample", "rtol": 1e-4, "atol": 1e-4, "regularizers": names}
    solution = solve(field(MATRIX, BIAS), Y0, TIMES, **options)
    for i in range(3):
        alone = solve(field(MATRIX, BIAS), Y0[i : i + 1], TIMES, **options)
        for name in names:
            assert solution.regularizers[name].shape == (3,)
            torch.testing.assert_close(solution.regularizers[name][i : i + 1], alone.regularizers[name])


def test_in_a_block():
    """A block keeps those of its last call, and can still be copied."""
    import copy

    block = ODEBlock(Tanh(), gradient="checkpoint", regularizers=("kinetic", "error"))
    out = block(torch.randn(4, 3))
    (out.square().mean() + 0.1 * block.regularizers["kinetic"] + block.regularizers["error"]).backward()
    assert all(p.grad is not None for p in block.parameters())
    assert copy.deepcopy(block).regularizers == {}


class Tanh(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, t, y):
        return torch.tanh(self.layer(y))


@pytest.mark.parametrize("structure", ["tuple", "complex"])
def test_other_states(structure):
    """The mean goes over the elements of all leaves, of complex numbers over both parts."""
    if structure == "tuple":
        y0, func, size = (Y0, Y0[:, :1]), lambda t, y: (torch.ones_like(y[0]), 2 * torch.ones_like(y[1])), 9
        expected = (6 * 1 + 3 * 4) / size
    else:
        y0, func, expected = Y0 + 0j, lambda t, y: torch.full_like(y, 3 + 4j), 25.0
    solution = solve(func, y0, [0.0, 1.0], regularizers=["kinetic"], dense=True)
    assert float(solution.regularizers["kinetic"]) == pytest.approx(expected, rel=1e-12)
    assert solution.interpolant(0.5) is not None


# ---- errors ----

WRONG = {
    "unknown": ({"regularizers": ["energy"]}, "regularizers must name each of"),
    "a word": ({"regularizers": "kinetic"}, "regularizers must name each of"),
    "twice": ({"regularizers": ["kinetic", "kinetic"]}, "at most once"),
    "error by the adjoint": ({"regularizers": ["error"], "gradient": "adjoint"}, "'error' is a sum over steps"),
    "stiffness by quadrature": ({"regularizers": ["stiffness"], "gradient": "quadrature"}, "no continuous form"),
    "no error estimate": ({"regularizers": ["error"], "method": "rk4"}, "'error' needs a method with an error estimate"),
    "one stage at the end": ({"regularizers": ["stiffness"], "method": "bosh3"}, "'stiffness' needs two stages"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    options, words = WRONG[case]
    with pytest.raises(ValueError, match=words):
        solve(lambda t, y: -y, Y0, [0.0, 1.0], **options)


@pytest.mark.parametrize("gradient", DISCRETE)
def test_second_derivatives_of_step_costs_are_refused_in_words(gradient):
    y0 = Y0.clone().requires_grad_()
    solution = solve(lambda t, y: -y.square(), y0, [0.0, 1.0], regularizers=["error"], gradient=gradient)
    with pytest.raises(RuntimeError, match="'error' and 'stiffness' have first derivatives only"):
        torch.autograd.grad(solution.regularizers["error"], y0, create_graph=True)
