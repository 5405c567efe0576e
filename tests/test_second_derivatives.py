"""Derivatives of gradients: create_graph=True on solves with the direct and the checkpoint gradient."""

import math
from itertools import pairwise

import pytest
import torch
from problems import ADAPTIVE_METHODS, FIXED_METHODS
from torch import nn
from torch.autograd import gradgradcheck

from odenet_cuda import ODEBlock, odeint, solve

GRADIENTS = {
    "direct": {"gradient": "direct"},
    "checkpoint": {"gradient": "checkpoint"},
    "two checkpoints": {"gradient": "checkpoint", "max_checkpoints": 2},
}
SOLVE = {"rtol": 1e-11, "atol": 1e-11}
SOLVED = 1e-8
ROUNDING = 1e-12

Y0 = torch.tensor([[0.3, -0.8], [1.1, 0.4]], dtype=torch.float64)
TIMES = torch.tensor([0.1, 0.35, 0.6, 1.0], dtype=torch.float64)
T01 = [0.0, 1.0]
MATRIX = torch.tensor([[0.2, -1.1], [0.9, -0.3]], dtype=torch.float64)
BIAS = torch.tensor([0.4, -0.2], dtype=torch.float64)
RATE = torch.tensor([0.5, 1.5], dtype=torch.float64)
STEPS = {"min_step": 0.21, "max_step": 0.21, "max_num_steps": 100}  # of a size that does not depend on the inputs


@pytest.fixture(params=GRADIENTS)
def gradient(request):
    """What solve takes for one kind of gradient."""
    return GRADIENTS[request.param]


def field(matrix, bias):
    """A smooth field of t and y, whatever the shape of t."""
    return lambda t, y: torch.tanh(y @ matrix + bias * torch.sin(2 * t)) * (1 + 0.5 * torch.cos(t))


def leaves(*tensors):
    return [x.detach().clone().requires_grad_() for x in tensors]


def assert_close(found, expected, tolerance=SOLVED):
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def derivatives(value, inputs):
    """The gradients of a number by the inputs, and those of the sum of their squares."""
    first = torch.autograd.grad(value, inputs, create_graph=True)
    penalty = sum(x.square().sum() for x in first)
    second = torch.autograd.grad(penalty, inputs, allow_unused=True, materialize_grads=True)
    return [x.detach() for x in first], second


# ---- discrete solves against finite differences of the gradient ----

# No output lies at an inner node, where an output as a function of its time has a kink.
GRIDS = {
    "the times": {},
    "step_size": {"step_size": 0.23},
    "step_size, linear": {"step_size": 0.23, "interp": "linear"},
    "step_size, cubic": {"step_size": 0.23, "interp": "cubic"},
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("method", FIXED_METHODS)
@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
def test_fixed_methods(gradient, method, grid):
    """y0, every t and captured tensors."""

    def function(y0, t, matrix, bias):
        return solve(field(matrix, bias), y0, t, method=method, gradient=gradient, **GRIDS[grid]).ys

    assert gradgradcheck(function, leaves(Y0[:1], TIMES[:3], MATRIX, BIAS))


@pytest.mark.parametrize("sign", [1, -1], ids=["forwards", "backwards"])
@pytest.mark.parametrize("method", ["euler", "heun3"])
def test_fixed_methods_with_perturb(method, sign, gradient):
    """perturb, both ways in time."""

    def function(y0, matrix, bias):
        return solve(field(matrix, bias), y0, sign * TIMES, method=method, step_size=0.23, perturb=True, **gradient).ys

    assert gradgradcheck(function, leaves(Y0, MATRIX, BIAS))


@pytest.mark.parametrize("step_control", ["joint", "per_sample"])
@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
def test_adaptive_methods(gradient, method, step_control):
    """With steps of a given size: y0, the times between the ends, and captured tensors."""

    def function(y0, between, bias):
        t = torch.cat([TIMES[:1], between, TIMES[-1:]])
        options = {"method": method, "step_control": step_control, "gradient": gradient, **STEPS}
        return solve(field(MATRIX, bias), y0, t, **options).ys

    assert gradgradcheck(function, leaves(Y0[:, :1].expand(2, 2) if step_control == "per_sample" else Y0[0], TIMES[1:3], BIAS))


@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
def test_one_adaptive_step(method, gradient):
    """One step from t[0] to t[-1], with outputs inside: every t."""

    def function(y0, t):
        return solve(field(MATRIX, BIAS), y0, t, method=method, min_step=5.0, first_step=5.0, **gradient).ys

    assert gradgradcheck(function, leaves(Y0, TIMES))


@pytest.mark.parametrize("step_control", ["joint", "per_sample"])
@pytest.mark.parametrize("sign", [1, -1], ids=["forwards", "backwards"])
@pytest.mark.parametrize("method", ["dopri5", "adaptive_heun"])
def test_across_jumps(method, sign, step_control, gradient):
    """A field with a jump, restarted behind it."""

    def function(y0, rate):
        func = lambda t, y: torch.where(sign * t < 0.5, rate * y, torch.sin(t) - rate.square() * y)  # noqa: E731
        options = {"method": method, "step_control": step_control, "jump_t": [sign * 0.5], **STEPS}
        return solve(func, y0, sign * TIMES, **options, **gradient).ys

    assert gradgradcheck(function, leaves(Y0, torch.tensor(0.7, dtype=torch.float64)))


@pytest.mark.parametrize("options", [{"method": "rk4"}, {"method": "tsit5", **STEPS}], ids=["fixed", "adaptive"])
def test_tuple_state(options, gradient):
    """Leaves of other shapes, one of them a number."""

    def function(x, v, bias):
        func = lambda t, y: (y[1].sum() - y[0] * bias[0], torch.tanh(y[0] * bias - y[1] * t))  # noqa: E731
        return solve(func, (x, v), TIMES, **options, **gradient).ys

    assert gradgradcheck(function, leaves(torch.tensor(0.6, dtype=torch.float64), Y0, BIAS))


@pytest.mark.parametrize("options", [{"method": "rk4"}, {"method": "tsit5", **STEPS}], ids=["fixed", "adaptive"])
def test_dict_state(options, gradient):
    """A dict of which the loss uses one leaf alone."""

    def function(x, v):
        func = lambda t, y: {"x": y["v"] * torch.sin(t), "v": -y["x"].square()}  # noqa: E731
        return solve(func, {"x": x, "v": v}, TIMES, **options, **gradient).ys["x"]

    assert gradgradcheck(function, leaves(Y0[0], Y0[1]))


@pytest.mark.parametrize("options", [{"method": "rk4"}, {"method": "dopri5", **STEPS}], ids=["fixed", "adaptive"])
def test_complex_state(options, gradient):
    """A field that is no holomorphic function of y, with a complex and a real parameter."""
    y0, rate = torch.complex(Y0[0], Y0[1]), torch.tensor(0.4 - 0.7j, dtype=torch.complex128)

    def function(y0, between, rate, bias):
        t = torch.cat([TIMES[:1], between, TIMES[-1:]])
        func = lambda t, y: torch.tanh(y * rate) + bias * torch.sin(2 * t) * y.abs() + 0.3 * y.conj()  # noqa: E731
        return solve(func, y0, t, **options, **gradient).ys

    assert gradgradcheck(function, leaves(y0, TIMES[1:3], rate, BIAS))


def test_arguments(gradient):
    """Tensors among args."""

    def function(y0, matrix, bias):
        func = lambda t, y, matrix, bias: field(matrix, bias)(t, y)  # noqa: E731
        return solve(func, y0, TIMES, args=(matrix, bias), method="rk4", **gradient).ys

    assert gradgradcheck(function, leaves(Y0, MATRIX, BIAS))


def test_given_parameters():
    """adjoint_params name what the checkpoint gradient goes to."""

    def function(y0, bias):
        return solve(field(MATRIX, bias), y0, TIMES, method="rk4", gradient="checkpoint", adjoint_params=[bias]).ys

    assert gradgradcheck(function, leaves(Y0, BIAS))


# ---- against exact solutions ----


def decay(y0, rate, t=1.0):
    return y0 * torch.exp(-rate * t)


@pytest.mark.parametrize("step_control", ["joint", "per_sample"])
def test_closure_over_a_leaf(gradient, step_control):
    """y0, both ends in time, and a captured tensor."""
    y0, t, rate = inputs = leaves(Y0, torch.tensor([0.2, 1.1]).double(), RATE)
    ys = solve(lambda t, y: -rate * y, y0, t, step_control=step_control, **SOLVE, **gradient).ys
    found = derivatives(ys[-1].square().sum(), inputs)
    y0, t, rate = inputs = leaves(Y0, t, RATE)
    expected = derivatives(decay(y0, rate, t[1] - t[0]).square().sum(), inputs)
    assert_close(found[0], expected[0])
    assert_close(found[1], expected[1], 1e-7)


def test_closure_over_results(gradient):
    """A closure over results of others, one of them by several steps."""
    (rate,) = leaves(RATE)
    doubled = 2 * rate
    fast = (doubled * rate).reshape(1, 2)
    ys = solve(lambda t, y: -(fast + doubled) * y, Y0, T01, **SOLVE, **gradient).ys
    found = derivatives(ys[-1].square().sum(), [rate])
    (rate,) = leaves(RATE)
    expected = derivatives(decay(Y0, 2 * rate.square() + 2 * rate).square().sum(), [rate])
    assert_close(found[0] + list(found[1]), expected[0] + list(expected[1]))


def test_closure_over_a_leaf_and_a_result_of_it(gradient):
    """The same tensor captured itself and through a result counts once for each way."""
    (rate,) = leaves(RATE)
    squared = rate.square()
    ys = solve(lambda t, y: -(squared + rate) * y, Y0, T01, **SOLVE, **gradient).ys
    found = derivatives(ys[-1].square().sum(), [rate])
    (rate,) = leaves(RATE)
    expected = derivatives(decay(Y0, rate.square() + rate).square().sum(), [rate])
    assert_close(found[0] + list(found[1]), expected[0] + list(expected[1]))


@pytest.mark.parametrize("captured", ["leaf", "result", "both"])
def test_state_that_is_a_result_of_what_is_captured(captured, gradient):
    """y0 = 2 rate, where func captures rate, the same result 2 rate, or both."""
    (rate,) = leaves(RATE)
    doubled = 2 * rate
    speed = {"leaf": lambda: rate, "result": lambda: doubled, "both": lambda: rate + doubled}[captured]
    ys = solve(lambda t, y: -speed() * y, doubled, T01, **SOLVE, **gradient).ys
    found = derivatives(ys[-1].sum(), [rate])
    (rate,) = leaves(RATE)
    factor = {"leaf": 1, "result": 2, "both": 3}[captured]
    expected = derivatives(decay(2 * rate, factor * rate).sum(), [rate])
    assert_close(found[0] + list(found[1]), expected[0] + list(expected[1]))


def test_closure_over_y0(gradient):
    """func may capture y0 itself."""
    (y0,) = leaves(Y0)
    found = derivatives(solve(lambda t, y: -y0 * y, y0, T01, **SOLVE, **gradient).ys[-1].sum(), [y0])
    (y0,) = leaves(Y0)
    expected = derivatives(decay(y0, y0).sum(), [y0])
    assert_close(found[0] + list(found[1]), expected[0] + list(expected[1]))


def test_closure_over_t(gradient):
    """func may capture t itself: y' = -t[1] y."""
    (t,) = leaves(torch.tensor([0.2, 1.1], dtype=torch.float64))
    found = derivatives(solve(lambda _, y: -t[1] * y, Y0, t, **SOLVE, **gradient).ys[-1].sum(), [t])
    (t,) = leaves(t)
    expected = derivatives(decay(Y0, t[1], t[1] - t[0]).sum(), [t])
    assert_close(found[0] + list(found[1]), expected[0] + list(expected[1]))


@pytest.mark.parametrize("options", [{"method": "rk4", "step_size": 0.005}, SOLVE], ids=["fixed", "adaptive"])
def test_third_derivative(options, gradient):
    """d3/drate3 of y0 exp(-rate t) is -t3 y, and its other mixed derivatives."""
    y0, rate = leaves(torch.tensor(1.5, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64))
    value = solve(lambda t, y: -rate * y, y0, [0.0, 1.2], **options, **gradient).ys[-1]
    for _ in range(2):
        (value,) = torch.autograd.grad(value, rate, create_graph=True)
    by_rate, by_y0 = torch.autograd.grad(value, (rate, y0))
    end = math.exp(-0.7 * 1.2)
    expected = torch.tensor([-(1.2**3) * 1.5 * end, 1.2**2 * end], dtype=torch.float64)
    assert_close([by_rate, by_y0], expected.unbind(), 1e-7)


def test_hessian(gradient):
    """torch.autograd.functional.hessian by the rates of a decay."""
    loss = lambda rate: solve(lambda t, y: -rate * y, Y0, T01, **SOLVE, **gradient).ys[-1].sum()  # noqa: E731
    expected = torch.diag(decay(Y0, RATE).sum(0))
    assert_close([torch.autograd.functional.hessian(loss, RATE)], [expected])


def test_odeint():
    """odeint gives the direct gradient, so it has second derivatives too."""
    (rate,) = leaves(RATE)
    ys = odeint(lambda t, y: -rate * y, Y0, torch.tensor(T01), **SOLVE)
    found = derivatives(ys[-1].sum(), [rate])
    (rate,) = leaves(RATE)
    expected = derivatives(decay(Y0, rate).sum(), [rate])
    assert_close(found[0] + list(found[1]), expected[0] + list(expected[1]))


# ---- how graphs are made and used ----


@pytest.mark.parametrize("step_control", ["joint", "per_sample"])
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "rk4"])
def test_first_gradient_is_the_same(method, step_control, gradient):
    """With create_graph=True the first gradient has the numbers it has without, to rounding."""
    options = {"rtol": 1e-4, "atol": 1e-4, "step_control": step_control}
    if method == "rk4":
        options = {"step_size": 0.1}
    y0, t, matrix, bias = inputs = leaves(Y0, TIMES, MATRIX, BIAS)
    value = solve(field(matrix, bias), y0, t, method=method, **options, **gradient).ys.square().sum()
    plain = torch.autograd.grad(value, inputs, retain_graph=True)
    assert_close(torch.autograd.grad(value, inputs, create_graph=True), plain, ROUNDING)


def test_one_solve_differentiated_by_turns(gradient):
    """With and without a graph, again and again: the steps that were recorded are not used up."""
    y0, rate = inputs = leaves(Y0, RATE)
    value = solve(lambda t, y: -rate * torch.sin(y), y0, T01, rtol=1e-4, atol=1e-4, **gradient).ys[-1].sum()
    first = derivatives(value, inputs)
    plain = torch.autograd.grad(value, inputs, retain_graph=True)
    again = derivatives(value, inputs)
    assert_close(plain, first[0], ROUNDING)
    assert_close(again[0], first[0], 0)
    assert_close(again[1], first[1], 0)


@pytest.mark.parametrize(
    "kind",
    [
        "direct",
        "checkpoint",
        "two checkpoints",
    ],
)
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_captured_tensor_changed_in_place(kernels_alone, method, kind):
    """A captured tensor changed after the solve is noticed, as the steps cannot be made again. Where torch's operations solve,
    torch notices it if its gradient reads that tensor."""
    (rate,) = leaves(RATE)
    ys = solve(lambda t, y: -rate * y, Y0, T01, method=method, **GRADIENTS[kind]).ys
    with torch.no_grad():
        rate.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(ys[-1].sum(), rate, create_graph=True)


def test_state_without_a_gradient(gradient):
    """Where only a parameter wants a gradient it has a second one."""
    (bias,) = leaves(BIAS)
    assert gradgradcheck(lambda bias: solve(field(MATRIX, bias), Y0, TIMES, method="rk4", **gradient).ys, (bias,))


def test_parameter_used_only_later(gradient):
    """A parameter that the first evaluation does not use has second derivatives too."""
    early, late = inputs = leaves(RATE, 2 * RATE)
    func = lambda t, y: -(early if float(t.detach()) < 0.5 else late) * y  # noqa: E731
    names = {} if gradient["gradient"] == "direct" else {"adjoint_params": inputs}
    found = derivatives(solve(func, Y0, T01, jump_t=[0.5], **SOLVE, **names, **gradient).ys[-1].sum(), inputs)
    early, late = inputs = leaves(RATE, 2 * RATE)
    expected = derivatives(decay(Y0, (early + late) / 2).sum(), inputs)
    assert_close(found[0] + list(found[1]), expected[0] + list(expected[1]))


def test_linear_field_has_no_second_derivative_by_y0(gradient):
    """y' = -2 y is linear in y0: its gradient depends on nothing, and the loss's own curvature comes through."""
    (y0,) = leaves(Y0)
    ys = solve(lambda t, y: -2 * y, y0, T01, **SOLVE, **gradient).ys
    (grad,) = torch.autograd.grad(ys[-1].square().sum(), y0, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), y0)
    assert_close([second], [torch.full_like(Y0, 2 * math.exp(-4.0))])


@pytest.mark.parametrize("short", [torch.float16, torch.bfloat16])
def test_states_of_16_bits(short, gradient):
    """Second derivatives in the types of the inputs, to what those allow."""
    y0, rate = inputs = leaves(Y0.to(short), RATE.float())
    func = lambda t, y: (-rate * y).to(y.dtype)  # noqa: E731
    ys = solve(func, y0, T01, method="rk4", step_size=0.125, **gradient).ys
    found = derivatives(ys[-1].float().square().sum(), inputs)
    assert [x.dtype for x in found[1]] == [short, torch.float32]
    y0, rate = inputs = leaves(Y0, RATE)
    expected = derivatives(decay(y0, rate).square().sum(), inputs)
    assert_close([x.double() for x in found[1]], expected[1], 0.02 if short == torch.float16 else 0.1)


# ---- layers ----


class Network(nn.Module):
    """A small smooth network, driven by the time."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()

    def forward(self, t, y):
        return self.layers(y) * torch.cos(t)


class PlainBlock(nn.Module):
    """The method of order 4 with nodes at thirds in plain torch, one step from each time to the next."""

    def __init__(self, func, t):
        super().__init__()
        self.func, self.t = func, t

    def forward(self, y):
        for t0, t1 in pairwise(self.t.unbind()):
            dt = t1 - t0
            k1 = self.func(t0, y)
            k2 = self.func(t0 + dt / 3, y + dt / 3 * k1)
            k3 = self.func(t0 + dt * 2 / 3, y + dt * (k2 - k1 / 3))
            k4 = self.func(t1, y + dt * (k1 - k2 + k3))
            y = y + dt / 8 * (k1 + 3 * k2 + 3 * k3 + k4)
        return y


def penalised_gradients(block, x, parameters, create_graph_by):
    """The parameters' gradients of a loss with a penalty on the gradient by the input."""
    torch.manual_seed(1)
    first, last = nn.Linear(2, 3).double(), nn.Linear(3, 1).double()
    x = x.clone().requires_grad_()
    out = last(block(first(x)))
    if create_graph_by == "grad":
        (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    else:
        out.sum().backward(create_graph=True)
        grad = x.grad
    loss = out.square().mean() + (grad.norm(dim=1) - 1).square().mean()
    return torch.autograd.grad(loss, [x, *parameters, *first.parameters(), *last.parameters()])


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
@pytest.mark.parametrize("create_graph_by", ["grad", "backward"])
@pytest.mark.parametrize("times", ["fixed", "learned"])
def test_gradient_penalty(times, create_graph_by, gradient):
    """An ODEBlock between layers has the gradients that the same steps in plain torch have."""
    func, t = Network(), torch.tensor([0.0, 0.2, 0.5, 1.0], dtype=torch.float64)
    if times == "learned":
        t = nn.Parameter(t)
    parameters = [*func.parameters(), *([t] if times == "learned" else [])]
    block = ODEBlock(func, t, method="rk4", **gradient)
    found = penalised_gradients(block, Y0, parameters, create_graph_by)
    for parameter in parameters:
        parameter.grad = None
    assert_close(found, penalised_gradients(PlainBlock(func, t), Y0, parameters, create_graph_by), ROUNDING)


def test_gradient_penalty_with_an_adaptive_method(gradient):
    """The same by an accurate adaptive block, to its tolerance."""
    func = Network()
    parameters = list(func.parameters())
    found = penalised_gradients(ODEBlock(func, **SOLVE, **gradient), Y0, parameters, "grad")
    plain = PlainBlock(func, torch.linspace(0, 1, 101, dtype=torch.float64))
    assert_close(found, penalised_gradients(plain, Y0, parameters, "grad"))


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_adjoint_refuses_in_words(method):
    """create_graph=True is never answered with a gradient that has no graph."""
    y0, rate = leaves(Y0, RATE)
    ys = solve(lambda t, y: -rate * y, y0, T01, method=method, gradient="adjoint").ys
    first = torch.autograd.grad(ys[-1].square().sum(), (y0, rate), create_graph=True)
    for penalty in first:
        with pytest.raises(RuntimeError, match="solve with gradient='direct' or 'checkpoint'"):
            torch.autograd.grad(penalty.square().sum(), (y0, rate), retain_graph=True)
