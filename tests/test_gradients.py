"""Gradients by y0, t, parameters and captured tensors, in every way there is, against finite differences."""

import math
import warnings
from itertools import pairwise

import pytest
import torch
from problems import ADAPTIVE_METHODS, FIXED_METHODS, ORDERS
from torch import nn
from torch.autograd import gradcheck

from odenet_cuda import solve
from odenet_cuda.gradients.accumulator import Accumulator

# Central differences with this width err by its square times a third derivative, here about 1e-9, and by the solve's
# own error over it, 1e-13 / 1e-5.
WIDTH = 1e-5
DIFFERENCE = 1e-6
SOLVE = {"rtol": 1e-11, "atol": 1e-11}
SOLVED = 1e-8  # two solves at 1e-11, and the gradients of one of them
ROUNDING = 1e-12

GRADIENTS = {
    "direct": {"gradient": "direct"},
    "adjoint": {"gradient": "adjoint"},
    "seminorm": {"gradient": "adjoint", "adjoint_options": {"norm": "seminorm"}},
    "direct per sample": {"gradient": "direct", "step_control": "per_sample"},
    "adjoint per sample": {"gradient": "adjoint", "step_control": "per_sample"},
    "checkpoint": {"gradient": "checkpoint"},
    "checkpoint per sample": {"gradient": "checkpoint", "step_control": "per_sample"},
    "quadrature": {"gradient": "quadrature"},
    "quadrature per sample": {"gradient": "quadrature", "step_control": "per_sample"},
    "three checkpoints": {"gradient": "checkpoint", "max_checkpoints": 3},
}
BOTH = ["direct", "adjoint", "checkpoint", "quadrature"]

Y0 = torch.tensor([[0.3, -0.8], [1.1, 0.4], [-0.5, 0.9]], dtype=torch.float64)
TIMES = torch.tensor([0.1, 0.35, 0.6, 1.0], dtype=torch.float64)
WEIGHTS = torch.cos(torch.arange(24, dtype=torch.float64)).reshape(4, 3, 2)
MATRIX = torch.tensor([[0.2, -1.1], [0.9, -0.3]], dtype=torch.float64)
BIAS = torch.tensor([0.4, -0.2], dtype=torch.float64)


def field(matrix, bias):
    """A smooth field of t and y, whatever the shape of t."""
    return lambda t, y: torch.tanh(y @ matrix + bias * torch.sin(2 * t)) * (1 + 0.5 * torch.cos(t))


def differences(function, *inputs):
    """Central differences of a number by each element of each input."""
    grads = []
    with torch.no_grad():
        for tensor in inputs:
            grad = torch.empty_like(tensor)
            for index in range(tensor.numel()):
                values = []
                for sign in (1, -1):
                    moved = [x.detach().clone() for x in inputs]
                    moved[[x is tensor for x in inputs].index(True)].view(-1)[index] += sign * WIDTH
                    values.append(float(function(*moved)))
                grad.view(-1)[index] = (values[0] - values[1]) / (2 * WIDTH)
            grads.append(grad)
    return grads


def leaves(*tensors):
    return [x.detach().clone().requires_grad_() for x in tensors]


def assert_close(found, expected, tolerance=DIFFERENCE):
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


# ---- exact gradients of discrete solves ----

# No output lies at an inner node, where an output as a function of its time has a kink.
GRIDS = {
    "the times": {},
    "step_size": {"step_size": 0.23},
    "grid_constructor": {"grid_constructor": lambda f, y0, t: torch.linspace(float(t[0]), float(t[-1]), 5, dtype=t.dtype)},
    "step_size, linear": {"step_size": 0.23, "interp": "linear"},
    "step_size, cubic": {"step_size": 0.23, "interp": "cubic"},
    "the times, cubic": {"interp": "cubic"},
    "perturb": {"step_size": 0.23, "perturb": True},
}


@pytest.mark.parametrize("grid", ["the times", "step_size", "step_size, linear", "step_size, cubic", "the times, cubic"])
@pytest.mark.parametrize("sign", [1, -1], ids=["forwards", "backwards"])
@pytest.mark.parametrize("method", FIXED_METHODS)
def test_direct_gradient_of_fixed_methods_is_exact(method, sign, grid):
    """y0, every t and what func captures: the derivative of the discrete solve, whose grid moves with t."""

    def function(y0, t, matrix, bias):
        return solve(field(matrix, bias), y0, sign * t, method=method, **GRIDS[grid]).ys

    assert gradcheck(function, leaves(Y0, TIMES, MATRIX, BIAS))


@pytest.mark.parametrize("grid", ["grid_constructor", "perturb"])
@pytest.mark.parametrize("method", FIXED_METHODS)
def test_direct_gradient_on_a_given_grid_is_exact(method, grid):
    """The same on the user's own grid, and with perturb; the inner nodes of a grid are taken as given."""

    def function(y0, matrix, bias):
        return solve(field(matrix, bias), y0, TIMES, method=method, **GRIDS[grid]).ys

    assert gradcheck(function, leaves(Y0, MATRIX, BIAS))


@pytest.mark.parametrize("step_control", ["joint", "per_sample"])
@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
def test_direct_gradient_of_adaptive_methods_is_exact(method, step_control):
    """With steps of a given size, which do not depend on the inputs, the direct gradient is the derivative."""

    def function(y0, between, matrix, bias):
        t = torch.cat([TIMES[:1], between, TIMES[-1:]])
        options = {"method": method, "step_control": step_control, "min_step": 0.21, "max_step": 0.21}
        return solve(field(matrix, bias), y0, t, max_num_steps=100, **options).ys

    assert gradcheck(function, leaves(Y0, TIMES[1:3], MATRIX, BIAS))


@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
def test_direct_gradient_of_one_step_is_exact(method):
    """One step from t[0] to t[-1], with outputs inside: every t."""

    def function(y0, t):
        return solve(field(MATRIX, BIAS), y0, t, method=method, min_step=5.0, first_step=5.0, max_num_steps=100).ys

    assert gradcheck(function, leaves(Y0, TIMES))


@pytest.mark.parametrize("step_control", ["joint", "per_sample"])
@pytest.mark.parametrize("sign", [1, -1], ids=["forwards", "backwards"])
@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
def test_direct_gradient_across_jumps_is_exact(method, sign, step_control):
    """A field with a jump, restarted behind it: the derivative of the discrete solve still."""

    def function(y0, rate):
        func = lambda t, y: torch.where(sign * t < 0.5, rate * y, torch.sin(t) - rate.square() * y)  # noqa: E731
        options = {"method": method, "step_control": step_control, "min_step": 0.21, "max_step": 0.21}
        return solve(func, y0, sign * TIMES, jump_t=[sign * 0.5], max_num_steps=100, **options).ys

    assert gradcheck(function, leaves(Y0, torch.tensor(0.7, dtype=torch.float64)))


# ---- against finite differences of accurate solves ----


def reference_loss(y0, t, matrix, bias):
    """The loss by dopri8 at a tolerance near rounding, each output the end of its own solve."""
    y, loss = y0, (y0 * WEIGHTS[0]).sum()
    for i in range(1, len(t)):
        interval = [float(t[i - 1]), float(t[i])]
        y = solve(field(matrix, bias), y, interval, method="dopri8", rtol=1e-13, atol=1e-13).ys[-1]
        loss = loss + (y * WEIGHTS[i]).sum()
    return loss


REFERENCES = {sign: differences(reference_loss, Y0, sign * TIMES, MATRIX, BIAS) for sign in (1, -1)}


@pytest.mark.parametrize("sign", [1, -1], ids=["forwards", "backwards"])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("method", [method for method in ADAPTIVE_METHODS if ORDERS[method] >= 3])
def test_adaptive_gradients(method, gradient, sign):
    """y0, every t, and captured tensors, with outputs in between."""
    if method == "bosh3" and "per sample" in gradient:
        options = {"rtol": 1e-8, "atol": 1e-8}  # far too many steps otherwise
    else:
        options = {"rtol": 1e-9, "atol": 1e-9} if method == "bosh3" else SOLVE
    y0, t, matrix, bias = leaves(Y0, sign * TIMES, MATRIX, BIAS)
    ys = solve(field(matrix, bias), y0, t, method=method, **options, **GRADIENTS[gradient]).ys
    found = torch.autograd.grad((ys * WEIGHTS).sum(), (y0, t, matrix, bias))
    assert_close(found, REFERENCES[sign])


@pytest.mark.parametrize("gradient", ["direct", "adjoint", "seminorm", "checkpoint"])
@pytest.mark.parametrize("method", ["fehlberg2", "adaptive_heun"])
def test_adaptive_gradients_of_low_order(method, gradient):
    """The methods of order 2, to a tolerance that they can reach."""
    options = {"rtol": 1e-8 if method == "fehlberg2" else 1e-6, "atol": 1e-8 if method == "fehlberg2" else 1e-6}
    y0, t, matrix, bias = leaves(Y0, TIMES, MATRIX, BIAS)
    ys = solve(field(matrix, bias), y0, t, method=method, **options, **GRADIENTS[gradient]).ys
    found = torch.autograd.grad((ys * WEIGHTS).sum(), (y0, t, matrix, bias))
    assert_close(found, REFERENCES[1], 2e-5)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_on_each_device(device, gradient):
    """float32 and the device."""
    y0, t, matrix, bias = (x.to(device, torch.float32).requires_grad_() for x in (Y0, TIMES, MATRIX, BIAS))
    ys = solve(field(matrix, bias), y0, t, rtol=1e-6, atol=1e-6, **GRADIENTS[gradient]).ys
    found = torch.autograd.grad((ys * WEIGHTS.to(ys)).sum(), (y0, t, matrix, bias))
    assert all(x.dtype == torch.float32 and x.device.type == device.type for x in found)
    assert_close([x.cpu().double() for x in found], REFERENCES[1], 2e-4)


class Driven(nn.Module):
    """The graph of a slope keeps the time itself, as a factor of the parameter."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, t, y):
        return (self.rate * t) * torch.sin(y)


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "fehlberg2"])
@pytest.mark.parametrize("control", ["joint", "per_sample"])
@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "adjoint"])
def test_the_time_in_the_graph_of_a_slope(gradient, control, method):
    """It is that of the slope when the product is made, for the solver writes its times again."""
    func, y0 = Driven(), torch.linspace(-1, 1, 6, dtype=torch.float64).view(3, 2)
    options = {"rtol": 1e-9, "atol": 1e-9} if method == "dopri5" else {"rtol": 1e-6, "atol": 1e-6}
    ys = solve(func, y0, [0.0, 0.5, 2.0], gradient=gradient, step_control=control, method=method, **options).ys
    found = torch.autograd.grad(ys.square().sum(), func.rate)[0]
    # y(t) = 2 atan(tan(y0 / 2) exp(rate t^2 / 2))
    rate, expected = torch.tensor(0.7, dtype=torch.float64, requires_grad=True), 0
    for t in (0.5, 2.0):
        expected = expected + (2 * torch.atan(torch.tan(y0 / 2) * torch.exp(rate * t * t / 2))).square().sum()
    torch.testing.assert_close(found, torch.autograd.grad(expected, rate)[0], rtol=1e-3, atol=0)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_adjoint_with_other_tolerances_and_method(gradient):
    """The backward solve may use its own; direct gradients take no notice."""
    y0, t, matrix, bias = leaves(Y0, TIMES, MATRIX, BIAS)
    options = {"adjoint_method": "dopri8", "adjoint_rtol": 1e-10, "adjoint_atol": 1e-10}
    ys = solve(field(matrix, bias), y0, t, **SOLVE, **options, **GRADIENTS[gradient]).ys
    assert_close(torch.autograd.grad((ys * WEIGHTS).sum(), (y0, t, matrix, bias)), REFERENCES[1])


@pytest.mark.parametrize("gradient", ["adjoint", "seminorm"])
def test_adjoint_with_tensor_tolerances_and_a_norm(gradient):
    """Tolerances of each element and a user's norm in the forward solve go with an adjoint."""
    y0, t, matrix, bias = leaves(Y0, TIMES, MATRIX, BIAS)
    options = {"rtol": torch.full((3, 2), 1e-11).double(), "adjoint_rtol": 1e-11, "norm": lambda y: y.abs().max()}
    ys = solve(field(matrix, bias), y0, t, atol=1e-11, **options, **GRADIENTS[gradient]).ys
    assert_close(torch.autograd.grad((ys * WEIGHTS).sum(), (y0, t, matrix, bias)), REFERENCES[1])


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradient_by_one_output_alone(gradient):
    """A loss of one output in between: the gradients by the times after it, and of what is not used, are zero."""
    y0, t = leaves(Y0, TIMES)
    ys = solve(field(MATRIX, BIAS), y0, t, **SOLVE, **GRADIENTS[gradient]).ys
    by_y0, by_t = torch.autograd.grad((ys[2] * WEIGHTS[2]).sum(), (y0, t))

    def loss(y0, t):
        y = solve(field(MATRIX, BIAS), y0, [float(t[0]), float(t[2])], method="dopri8", rtol=1e-13, atol=1e-13).ys
        return (y[-1] * WEIGHTS[2]).sum()

    assert_close((by_y0, by_t), differences(loss, Y0, TIMES))


@pytest.mark.parametrize("gradient", BOTH)
def test_adjoint_across_jumps(gradient):
    """jump_t goes with the backward solve too: dy(1)/drate of y' = rate y, then -rate y from t = 0.5."""
    rate, y0 = leaves(torch.tensor(0.7, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64))
    func = lambda t, y: torch.where(t < 0.5, rate, -rate) * y  # noqa: E731
    ys = solve(func, y0, [0.0, 0.25, 0.8], jump_t=[0.5], gradient=gradient, **SOLVE).ys
    by_rate, by_y0 = torch.autograd.grad(ys[-1].sum(), (rate, y0))
    end = math.exp(0.7 * (0.5 - 0.3))
    torch.testing.assert_close(by_rate, torch.tensor((0.5 - 0.3) * end, dtype=torch.float64), rtol=SOLVED, atol=SOLVED)
    torch.testing.assert_close(by_y0, torch.full((1, 1), end, dtype=torch.float64), rtol=SOLVED, atol=SOLVED)


# ---- what func depends on ----

RATE = torch.tensor([0.5, 1.5], dtype=torch.float64)
T01 = [0.0, 1.0]


def by_rate(scale=1.0):
    """d/drate of sum(y(1)) for y' = -scale * rate * y, y(0) = Y0."""
    return -scale * (Y0 * torch.exp(-scale * RATE)).sum(0)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_closure_over_a_leaf(gradient):
    """A lambda that captures a tensor with requires_grad."""
    (rate,) = leaves(RATE)
    ys = solve(lambda t, y: -rate * y, Y0, T01, **SOLVE, **GRADIENTS[gradient]).ys
    ys[-1].sum().backward()
    torch.testing.assert_close(rate.grad, by_rate(), rtol=SOLVED, atol=SOLVED)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_closure_over_results(gradient):
    """A lambda that captures tensors computed before, one by several steps: the gradient goes on to their origin."""
    (rate,) = leaves(RATE)
    doubled = 2 * rate
    fast = (doubled * 1.5).reshape(1, 2)
    ys = solve(lambda t, y: -(fast - doubled) * y, Y0, T01, **SOLVE, **GRADIENTS[gradient]).ys
    ys[-1].sum().backward()
    torch.testing.assert_close(rate.grad, by_rate(), rtol=SOLVED, atol=SOLVED)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_closure_over_a_leaf_and_a_result_of_it(gradient):
    """The same tensor captured itself and through a result counts once for each way."""
    (rate,) = leaves(RATE)
    tripled = 3 * rate
    ys = solve(lambda t, y: -(tripled + rate) * y, Y0, T01, **SOLVE, **GRADIENTS[gradient]).ys
    ys[-1].sum().backward()
    torch.testing.assert_close(rate.grad, by_rate(4.0), rtol=SOLVED, atol=SOLVED)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_closure_over_y0(gradient):
    """func may capture y0 itself: y' = -y0 y gives y0 exp(-y0 t)."""
    (y0,) = leaves(Y0)
    ys = solve(lambda t, y: -y0 * y, y0, T01, **SOLVE, **GRADIENTS[gradient]).ys
    (grad,) = torch.autograd.grad(ys[-1].sum(), y0)
    torch.testing.assert_close(grad, (1 - Y0) * torch.exp(-Y0), rtol=SOLVED, atol=SOLVED)


class Conditional(nn.Module):
    """y' = -(weight + condition) y, where the condition is set from outside and may be any tensor."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.25, 0.5], dtype=torch.float64))
        self.condition = None

    def forward(self, t, y):
        return -(self.weight + self.condition) * y


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_module_with_a_condition(gradient):
    """A Module whose attribute is set to a result of other parameters before the solve."""
    func = Conditional()
    (source,) = leaves(torch.tensor([0.125, 0.5], dtype=torch.float64))
    func.condition = 2 * source
    ys = solve(func, Y0, T01, **SOLVE, **GRADIENTS[gradient]).ys
    ys[-1].sum().backward()
    torch.testing.assert_close(func.weight.grad, by_rate(), rtol=SOLVED, atol=SOLVED)
    torch.testing.assert_close(source.grad, 2 * by_rate(), rtol=SOLVED, atol=SOLVED)


class Switch(nn.Module):
    """y' = -early y before t = 0.5, and -late y after it."""

    def __init__(self):
        super().__init__()
        self.early, self.late = nn.Parameter(RATE.clone()), nn.Parameter(2 * RATE)

    def forward(self, t, y):
        return -(self.early if float(t.reshape(-1)[0]) < 0.5 else self.late) * y


@pytest.mark.parametrize("gradient", BOTH)
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_parameter_used_only_later(method, gradient):
    """A parameter that the first evaluation does not use gets its gradient all the same."""
    func = Switch()
    options = {"jump_t": [0.5], **SOLVE} if method == "dopri5" else {"step_size": 0.0125, "perturb": True}
    solve(func, Y0, T01, method=method, gradient=gradient, **options).ys[-1].sum().backward()
    expected = -0.5 * (Y0 * torch.exp(-1.5 * RATE)).sum(0)
    tolerance = SOLVED if method == "dopri5" else DIFFERENCE
    torch.testing.assert_close(func.early.grad, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(func.late.grad, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["leaf", "result"])
@pytest.mark.parametrize("owner", ["closure", "module with parameters"])
@pytest.mark.parametrize("gradient", BOTH)
def test_captured_tensor_used_only_later(gradient, owner, kind):
    """A tensor that is no parameter and that the first evaluation does not use gets its gradient all the same."""
    (late,) = leaves(2 * RATE)
    used = late if kind == "leaf" else 1 * late
    if owner == "closure":
        early = RATE.clone().requires_grad_()
        func = lambda t, y: -(early if t < 0.5 else used) * y  # noqa: E731
    else:
        func = Switch()
        del func.late
        func.late = used
    ys = solve(func, Y0, T01, jump_t=[0.5], gradient=gradient, **SOLVE).ys
    if gradient != "direct" and owner != "closure":  # a Module with parameters is taken to depend on them alone
        with pytest.raises(RuntimeError, match="name it in adjoint_params"):
            ys[-1].sum().backward()
        return
    ys[-1].sum().backward()
    expected = -0.5 * (Y0 * torch.exp(-1.5 * RATE)).sum(0)
    torch.testing.assert_close(late.grad, expected, rtol=SOLVED, atol=SOLVED)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_unused_and_frozen_parameters(gradient):
    """A frozen parameter gets nothing; an unused one nothing or zeros."""
    func = Conditional()
    func.condition = torch.zeros(2, dtype=torch.float64)
    func.frozen = nn.Parameter(torch.ones(2, dtype=torch.float64), requires_grad=False)
    func.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    solve(func, Y0, T01, **SOLVE, **GRADIENTS[gradient]).ys[-1].sum().backward()
    expected = -(Y0 * torch.exp(-func.weight.detach())).sum(0)
    torch.testing.assert_close(func.weight.grad, expected, rtol=SOLVED, atol=SOLVED)
    assert func.frozen.grad is None
    assert func.unused.grad is None or torch.equal(func.unused.grad, torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_field_that_depends_on_nothing(gradient):
    """y' = sin(t) without y and without parameters: dy/dy0 is one and dy/dt[-1] is the field."""
    y0, t = leaves(Y0, torch.tensor(T01, dtype=torch.float64))
    func = lambda t, y: torch.sin(t).expand(y.shape)  # noqa: E731
    ys = solve(func, y0, t, **SOLVE, **GRADIENTS[gradient]).ys
    by_y0, by_t = torch.autograd.grad(ys[-1].sum(), (y0, t))
    torch.testing.assert_close(by_y0, torch.ones_like(Y0), rtol=0, atol=SOLVED)
    expected = torch.tensor([0.0, 6 * math.sin(1.0)], dtype=torch.float64)
    torch.testing.assert_close(by_t, expected, rtol=SOLVED, atol=SOLVED)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
@pytest.mark.parametrize("gradient", [*GRADIENTS, "direct, fixed"])
def test_slopes_that_are_not_contiguous(gradient, layout):
    """A field whose results are transposed, strided or expanded has the gradients of one whose results are not."""
    options = {"method": "rk4", "step_size": 0.1} if gradient == "direct, fixed" else {**SOLVE, **GRADIENTS[gradient]}
    inner = {
        "transposed": lambda y, rate: torch.tanh(y * rate).t().contiguous().t(),
        "strided": lambda y, rate: torch.tanh(torch.stack([y * rate, y], dim=-1))[..., 0],
        "expanded": lambda y, rate: torch.tanh(y * rate)[:, :1].expand(3, 2),
    }[layout]
    found = []
    for finish in (lambda x: x, torch.Tensor.contiguous):
        y0, rate = leaves(Y0, RATE)
        ys = solve(lambda t, y, end=finish, rate=rate: end(inner(y, rate)), y0, T01, **options).ys
        found.append(torch.autograd.grad((ys[-1] * WEIGHTS[0]).sum(), (y0, rate)))
    assert_close(found[0], found[1], SOLVED)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_constant_field(gradient):
    """A field without any graph."""
    (y0,) = leaves(Y0)
    ys = solve(lambda t, y: torch.ones_like(Y0), y0, T01, **SOLVE, **GRADIENTS[gradient]).ys
    torch.testing.assert_close(torch.autograd.grad(ys[-1].sum(), y0)[0], torch.ones_like(Y0), rtol=0, atol=SOLVED)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_constant_tensor_that_is_learned(gradient):
    """func returns the learned tensor itself: y(1) = y0 + slope."""
    slope, y0 = leaves(Y0.flip(0), Y0)
    ys = solve(lambda t, y: slope, y0, T01, **SOLVE, **GRADIENTS[gradient]).ys
    torch.testing.assert_close(ys[-1], Y0 + Y0.flip(0), rtol=0, atol=SOLVED)
    for grad in torch.autograd.grad(ys[-1].sum(), (slope, y0)):
        torch.testing.assert_close(grad, torch.ones_like(Y0), rtol=0, atol=SOLVED)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_dropout_free_batch_norm_in_eval(gradient):
    """Buffers in the field are constants: a normalisation with stored statistics scales the rate by them."""
    norm = nn.BatchNorm1d(2, affine=True).double().eval()
    norm.running_var.fill_(4.0 - norm.eps)
    ys = solve(lambda t, y: -norm(y), Y0, T01, **SOLVE, **GRADIENTS[gradient]).ys
    torch.testing.assert_close(ys[-1], Y0 * math.exp(-0.5), rtol=SOLVED, atol=SOLVED)
    ys[-1].sum().backward()
    expected = -0.5 * (Y0 * math.exp(-0.5)).sum(0)
    torch.testing.assert_close(norm.weight.grad, expected, rtol=SOLVED, atol=SOLVED)


OTHER_TYPES = {
    "float64 for float32": (torch.float32, torch.float64),
    "float32 for float64": (torch.float64, torch.float32),
    "bfloat16 for float32": (torch.float32, torch.bfloat16),
    "float16 for float32": (torch.float32, torch.float16),
    "complex128 for float64": (torch.float64, torch.complex128),
}


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", OTHER_TYPES)
def test_parameters_of_another_type(name, gradient):
    """A parameter whose type is not that of the state gets its gradient in its own type."""
    of_state, of_rate = OTHER_TYPES[name]
    rate = torch.tensor([0.5, 1.5], dtype=of_rate, requires_grad=True)
    cast = (lambda: rate.real) if of_rate.is_complex else (lambda: rate.to(of_state))
    options = {"rtol": 1e-5, "atol": 1e-5, "max_num_steps": 1000, **GRADIENTS[gradient]}
    ys = solve(lambda t, y: -cast() * y, Y0.to(of_state), T01, **options).ys
    ys[-1].sum().backward()
    assert rate.grad.dtype == of_rate
    low = torch.finfo(of_rate).bits == 16
    found = (rate.grad.real if of_rate.is_complex else rate.grad).double()
    torch.testing.assert_close(found, by_rate(), rtol=3e-2 if low else 1e-3, atol=0)


@pytest.mark.parametrize("owner", ["function", "module"])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_arguments_of_func(gradient, owner):
    """args= goes to func after (t, y); its tensors get gradients, a leaf and a result, one of them used late only."""
    (rate,) = leaves(RATE)
    args = (2 * rate, rate, 0.5)
    func = lambda t, y, double, single, cut: -(double if t.reshape(-1)[0] < cut else 2 * single) * y  # noqa: E731
    if owner == "module":
        module = nn.Linear(1, 1)
        module.forward = func
        func = module
    ys = solve(func, Y0, T01, args=args, jump_t=[0.5], **SOLVE, **GRADIENTS[gradient]).ys
    (grad,) = torch.autograd.grad(ys[-1].sum(), rate)
    torch.testing.assert_close(grad, by_rate(2.0), rtol=SOLVED, atol=SOLVED)


# ---- structures ----


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("structure", ["tuple", "dict"])
def test_structured_states(structure, gradient):
    """Coupled leaves: x' = -rate z, z' = rate x, the gradients by both and by the rate."""
    x0, z0, rate = leaves(Y0, Y0.flip(1), torch.tensor(0.75, dtype=torch.float64))
    if structure == "tuple":
        y0, func, parts = (x0, z0), lambda t, y: (-rate * y[1], rate * y[0]), lambda ys: ys
    else:
        y0, func = {"x": x0, "z": [z0]}, lambda t, y: {"x": -rate * y["z"][0], "z": [rate * y["x"]]}
        parts = lambda ys: (ys["x"], ys["z"][0])  # noqa: E731
    x, z = parts(solve(func, y0, [0.0, 0.5, 1.0], **SOLVE, **GRADIENTS[gradient]).ys)
    found = torch.autograd.grad((x[-1] * WEIGHTS[0]).sum() + (z[1] * WEIGHTS[1]).sum(), (x0, z0, rate))

    def exact(x0, z0, rate):
        x = x0 * torch.cos(rate) - z0 * torch.sin(rate)
        z = z0 * torch.cos(rate / 2) + x0 * torch.sin(rate / 2)
        return (x * WEIGHTS[0]).sum() + (z * WEIGHTS[1]).sum()

    inputs = leaves(x0, z0, rate)
    assert_close(found, torch.autograd.grad(exact(*inputs), inputs), SOLVED)


@pytest.mark.parametrize("gradient", BOTH)
def test_only_one_leaf_wants_a_gradient(gradient):
    """A leaf of the state without requires_grad, a leaf whose output is not used, a slope without a graph."""
    (x0,) = leaves(Y0)
    func = lambda t, y: (-y[0], torch.ones_like(y[1]).detach())  # noqa: E731
    x, z = solve(func, (x0, torch.zeros(2).double()), T01, gradient=gradient, **SOLVE).ys
    assert torch.allclose(z[-1], torch.ones(2).double())
    (grad,) = torch.autograd.grad(x[-1].sum(), x0)
    torch.testing.assert_close(grad, torch.full_like(Y0, math.exp(-1)), rtol=SOLVED, atol=SOLVED)


@pytest.mark.parametrize("gradient", BOTH)
def test_y0_that_is_a_result_and_not_contiguous(gradient):
    """y0 may come out of other layers, transposed."""
    (source,) = leaves(Y0.t().contiguous())
    ys = solve(lambda t, y: -y, (2 * source).t(), T01, gradient=gradient, **SOLVE).ys
    (grad,) = torch.autograd.grad((ys[-1] * WEIGHTS[0]).sum(), source)
    torch.testing.assert_close(grad, 2 * math.exp(-1) * WEIGHTS[0].t(), rtol=SOLVED, atol=SOLVED)


# ---- autograd's manners ----


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_backward_twice(gradient):
    """With retain_graph a second backward pass gives the same again."""
    y0, t, matrix, bias = leaves(Y0, TIMES, MATRIX, BIAS)
    loss = (solve(field(matrix, bias), y0, t, **SOLVE, **GRADIENTS[gradient]).ys * WEIGHTS).sum()
    first = torch.autograd.grad(loss, (y0, t, matrix, bias), retain_graph=True)
    second = torch.autograd.grad(loss, (y0, t, matrix, bias))
    assert_close(first, second, 0.0)
    assert_close(first, REFERENCES[1])


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_two_losses_add_up(gradient):
    """Gradients of two outputs taken one by one add up to that of the sum."""
    y0, t, matrix, bias = leaves(Y0, TIMES, MATRIX, BIAS)
    ys = solve(field(matrix, bias), y0, t, **SOLVE, **GRADIENTS[gradient]).ys
    parts = [torch.autograd.grad((ys[i] * WEIGHTS[i]).sum(), (y0, t, matrix, bias), retain_graph=True) for i in range(4)]
    assert_close([sum(grads) for grads in zip(*parts, strict=True)], REFERENCES[1])


@pytest.mark.parametrize("gradient", ["adjoint", "seminorm", "adjoint per sample", "quadrature"])
def test_second_derivatives_are_refused_in_words(gradient):
    """create_graph=True gives the gradient, never without a graph: whoever differentiates it is refused."""
    y0, rate = leaves(Y0, RATE)
    loss = solve(lambda t, y: -rate * y, y0, T01, **GRADIENTS[gradient]).ys[-1].square().sum()
    first = torch.autograd.grad(loss, (y0, rate), create_graph=True)
    for found, expected in zip(first, torch.autograd.grad(loss, (y0, rate), retain_graph=True), strict=True):
        assert found.requires_grad and torch.equal(found, expected)
    for penalty in (*[x.square().sum() for x in first], loss + first[1].sum()):
        with pytest.raises(RuntimeError, match=r"first derivatives only: .* gradient='direct' or 'checkpoint'"):
            torch.autograd.grad(penalty, rate, retain_graph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of the cycle that create_graph makes
        loss.backward(create_graph=True)
    torch.optim.SGD([rate], 0.1).step()
    rate.grad.detach_().zero_()
    assert_close([rate.detach()], [RATE - 0.1 * first[1].detach()], ROUNDING)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_no_grad_builds_no_graph(gradient):
    """Under no_grad, in inference mode, and where nothing wants a gradient the result has no graph and is the same."""
    y0, rate = leaves(Y0, RATE)
    func = lambda t, y: -rate * y  # noqa: E731
    with torch.no_grad():
        ys = solve(func, y0, T01, **SOLVE, **GRADIENTS[gradient]).ys
    with torch.inference_mode():
        inferred = solve(func, y0, T01, **SOLVE, **GRADIENTS[gradient]).ys
    constant = solve(lambda t, y: -RATE * y, Y0, T01, **SOLVE, **GRADIENTS[gradient]).ys
    assert ys.grad_fn is None and not ys.requires_grad and not constant.requires_grad
    assert torch.equal(ys, inferred) and torch.equal(ys, constant)
    torch.testing.assert_close(ys[-1], Y0 * torch.exp(-RATE), rtol=SOLVED, atol=SOLVED)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("gradient", BOTH)
def test_the_value_does_not_depend_on_the_gradient(kernels_alone, gradient, method):
    """Recording changes no bit of the result of the kernels."""
    y0, t, matrix, bias = leaves(Y0, TIMES, MATRIX, BIAS)
    recorded = solve(field(matrix, bias), y0, t, method=method, gradient=gradient).ys
    assert torch.equal(recorded, solve(field(MATRIX, BIAS), Y0, TIMES, method=method).ys)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_parameters_changed_before_the_backward_pass(gradient):
    """A parameter that was written into between forward and backward is noticed, not used silently."""
    (rate,) = leaves(RATE)
    ys = solve(lambda t, y: rate * -y, Y0.clone().requires_grad_(), T01, **GRADIENTS[gradient]).ys
    with torch.no_grad():
        rate.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ys[-1].sum().backward()


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_in_a_training_loop(gradient):
    """Ten steps of gradient descent fit the rates of two decays: graphs are free again after each."""
    (rate,) = leaves(torch.full_like(RATE, 0.8))
    target = torch.exp(-RATE)
    optimiser = torch.optim.LBFGS([rate], max_iter=30, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure():
        optimiser.zero_grad()
        ys = solve(lambda t, y: -rate * y, torch.ones(1, 2, dtype=torch.float64), T01, **SOLVE, **GRADIENTS[gradient]).ys
        loss = (ys[-1, 0] - target).square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    torch.testing.assert_close(rate.detach(), RATE, rtol=0, atol=1e-5)


# ---- complex numbers and 16 bits ----


def complex_numbers(*shape, seed=0):
    return torch.randn(shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(seed))


# y0, t, a complex and a real parameter; the loss weighs every output with complex numbers.
COMPLEX_INPUTS = complex_numbers(3, 2), torch.tensor([0.1, 0.4, 1.0]).double(), complex_numbers(2, 2, seed=1) / 2, BIAS
COMPLEX_WEIGHTS = complex_numbers(3, 3, 2, seed=2)
# What gradients of a solve err by, with the times of outputs inside of a step, which are the derivative of an interpolant.
COMPLEX_ERROR = {torch.complex64: 2e-4, torch.complex128: DIFFERENCE}


@pytest.fixture(params=COMPLEX_ERROR, ids=["complex64", "complex128"])
def complex_type(request):
    return request.param


def complex_field(matrix, bias):
    """A field of t and y that is no holomorphic function of y, whatever the shape of t."""
    return lambda t, y: torch.tanh(y @ matrix) + bias * torch.sin(2 * t) * y.abs() + 0.3 * y.conj()


def complex_leaves(dtype=torch.complex128, device=None):
    return [x.to(device, dtype if x.is_complex() else dtype.to_real()).requires_grad_() for x in COMPLEX_INPUTS]


def complex_gradients(ys, inputs):
    return torch.autograd.grad((COMPLEX_WEIGHTS.to(ys) * ys).real.sum(), inputs)


def plain_rk4(func, y, t, steps):
    """The method of order 4 with nodes at thirds in plain torch, `steps` of one size from each output to the next."""
    ys = [y]
    for t0, t1 in pairwise(t.unbind()):
        dt = (t1 - t0) / steps
        for i in range(steps):
            now = t0 + i * dt
            k1 = func(now, y)
            k2 = func(now + dt / 3, y + dt / 3 * k1)
            k3 = func(now + dt * 2 / 3, y + dt * (k2 - k1 / 3))
            k4 = func(now + dt, y + dt * (k1 - k2 + k3))
            y = y + dt / 8 * (k1 + 3 * k2 + 3 * k3 + k4)
        ys.append(y)
    return torch.stack(ys)


@pytest.fixture(scope="module")
def complex_reference():
    """The gradients of an accurate solve in plain torch."""
    y0, t, *params = inputs = complex_leaves()
    return complex_gradients(plain_rk4(complex_field(*params), y0, t, 100), inputs)


def test_complex_direct_gradient_of_rk4_is_exact(device, complex_type):
    """On the grid of the times: autograd through the same steps in plain torch."""
    rounding = 1e-5 if complex_type == torch.complex64 else ROUNDING
    y0, t, *params = inputs = complex_leaves(complex_type, device)
    found = complex_gradients(solve(complex_field(*params), y0, t, method="rk4").ys, inputs)
    y0, t, *params = inputs = complex_leaves()
    expected = complex_gradients(plain_rk4(complex_field(*params), y0, t, 1), inputs)
    assert_close([x.cpu().to(y.dtype) for x, y in zip(found, expected, strict=True)], expected, rounding)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("method", ["dopri5", "dopri8"])
def test_complex_gradients(device, complex_reference, complex_type, method, gradient):
    """y0, t, complex and real parameters, by every kind of gradient, in the types of the inputs."""
    tol = 1e-6 if complex_type == torch.complex64 else 1e-10
    y0, t, *params = inputs = complex_leaves(complex_type, device)
    ys = solve(complex_field(*params), y0, t, method=method, rtol=tol, atol=tol, **GRADIENTS[gradient]).ys
    found = complex_gradients(ys, inputs)
    assert [x.dtype for x in found] == [x.dtype for x in inputs]
    found = [x.cpu().to(y.dtype) for x, y in zip(found, complex_reference, strict=True)]
    assert_close(found, complex_reference, COMPLEX_ERROR[complex_type])


def test_complex_gradients_are_torchdiffeqs(complex_reference):
    """torchdiffeq, with autograd through its steps, agrees with the reference and so with the gradients here."""
    torchdiffeq = pytest.importorskip("torchdiffeq")
    y0, t, *params = inputs = complex_leaves()
    ys = torchdiffeq.odeint(complex_field(*params), y0, t, rtol=1e-10, atol=1e-10)
    assert_close(complex_gradients(ys, inputs), complex_reference)


# A tolerance that the type can resolve, and what gradients then err by.
SHORT = {torch.float16: (1e-3, 5e-3), torch.bfloat16: (1e-2, 5e-2)}
SHORT_PARTS = {"state and parameter": (True, True), "state alone": (True, False), "parameter alone": (False, True)}


@pytest.fixture(params=SHORT, ids=["float16", "bfloat16"])
def short(request):
    return request.param


@pytest.mark.parametrize("parts", SHORT_PARTS)
@pytest.mark.parametrize("gradient", [*GRADIENTS, "direct, fixed", "adjoint, fixed", "checkpoint, fixed"])
def test_gradients_of_16_bits(device, short, gradient, parts):
    """States and parameters of 16 bits have the exact gradients to what their type allows, in their own type."""
    tol, error = SHORT[short]
    fixed = {"method": "rk4", "step_size": 0.125, "gradient": gradient.split(",")[0]}
    options = {"max_num_steps": 1000, **(fixed if "fixed" in gradient else GRADIENTS[gradient])}
    of_state, of_rate = (short if part else torch.float32 for part in SHORT_PARTS[parts])
    y0 = torch.tensor([[1.0, 0.5], [-0.5, 2.0], [1.5, 1.0]], device=device, dtype=of_state, requires_grad=True)
    rate = torch.tensor([1.0, 0.5], device=device, dtype=of_rate, requires_grad=True)
    times = torch.tensor([0.0, 0.5, 1.0], requires_grad=True)
    ys = solve(lambda t, y: (-rate * torch.cos(t) * y).to(y.dtype), y0, times, rtol=tol, atol=tol, **options).ys
    found = torch.autograd.grad(ys[1:].float().sum(), (y0, rate, times))
    assert [x.dtype for x in found] == [of_state, of_rate, torch.float32]
    y0, rate, times = leaves(*(x.detach().cpu().double() for x in (y0, rate, times)))
    exact = y0 * torch.exp(-rate * (torch.sin(times)[1:, None, None] - torch.sin(times[0])))
    assert_close([x.cpu().double() for x in found], torch.autograd.grad(exact.sum(), (y0, rate, times)), error)


def test_many_small_gradients_are_added_in_float32(device, short):
    """Each addend is below the spacing of the type at the sum, which goes on growing; the result has the tensor's type."""
    parameter, other = torch.zeros(3, dtype=short, device=device), torch.zeros(2, device=device)
    sums = Accumulator([parameter, other], 4, device)
    addends = [torch.full_like(parameter, 2.0**-13), torch.full_like(other, 2.0**-13)]
    for _ in range(2**13):
        sums.add(addends)
    sums.flush()
    for total, like in zip(sums.results(), (parameter, other), strict=True):
        assert total.dtype == like.dtype and torch.equal(total, torch.ones_like(like))


@pytest.mark.parametrize("gradient", ["direct", "adjoint", "adjoint per sample", "checkpoint"])
def test_small_gradients_of_many_steps(device, short, gradient):
    """A parameter of 16 bits whose gradient is the sum of a thousand small parts."""
    rate = torch.zeros(2, dtype=short, device=device, requires_grad=True)
    steps = {"method": "euler", "step_size": 1e-3}
    if gradient == "adjoint per sample":
        steps = {"method": "adaptive_heun", "min_step": 1e-3, "max_step": 1e-3}
    func = lambda t, y: rate.float().expand(3, 2)  # noqa: E731
    ys = solve(func, torch.zeros(3, 2, device=device), T01, **steps, **GRADIENTS[gradient]).ys
    (grad,) = torch.autograd.grad(ys[-1].sum(), rate)
    assert grad.dtype == short
    torch.testing.assert_close(grad.float(), torch.full((2,), 3.0, device=device), rtol=SHORT[short][1], atol=0)


@pytest.mark.parametrize("step_control", ["joint", "per_sample"])
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3"])
@pytest.mark.parametrize("end", [1.0, -1.0])
def test_quadrature_follows_what_the_adjoint_does_not(step_control, method, end):
    """The adjoint of y' = w sin(50 t) is constant, so its steps are long; the integral for w is over the solution's steps."""
    w = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    rates = torch.tensor([[50.0], [20.0], [1.0]], dtype=torch.float64)
    y0 = torch.zeros(3, 1, dtype=torch.float64)
    how = {"rtol": 1e-8, "atol": 1e-8, "method": method, "step_control": step_control}
    ys = solve(lambda t, y: w * torch.sin(rates * t) + 0 * y, y0, [0.0, 0.3 * end, end], gradient="quadrature", **how).ys
    ys[1:].sum().backward()
    exact = sum(((1 - torch.cos(rates * t)) / rates).sum() for t in (0.3, 1.0))
    torch.testing.assert_close(w.grad, exact, rtol=0, atol=1e-6)
