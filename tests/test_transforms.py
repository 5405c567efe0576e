"""Solves inside torch.func transforms and forward mode, against autograd and solves of each sample alone."""

import functools
import math

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

from odenet_cuda import ODEBlock, SolverError, odeint, solve

ROUNDING = 1e-12
Y0 = torch.tensor([[0.3, -0.8], [1.1, 0.4], [-0.5, 0.9]], dtype=torch.float64)
TIMES = torch.tensor([0.1, 0.35, 0.6, 1.0], dtype=torch.float64)
MATRIX = torch.tensor([[0.2, -1.1], [0.9, -0.3]], dtype=torch.float64)
BIAS = torch.tensor([0.4, -0.2], dtype=torch.float64)
WEIGHTS = torch.cos(torch.arange(24, dtype=torch.float64)).reshape(4, 3, 2)
TANGENTS = tuple(torch.sin(torch.arange(1.0, x.numel() + 1).double()).reshape(x.shape) for x in (Y0, TIMES, MATRIX, BIAS))
INPUTS = (0, 1, 2, 3)

FIXED = {
    "euler": {"method": "euler"},
    "rk4": {"method": "rk4"},
    "step_size": {"method": "rk4", "step_size": 0.23},
    "linear": {"method": "midpoint", "step_size": 0.23, "interp": "linear"},
    "cubic": {"method": "heun3", "step_size": 0.23, "interp": "cubic"},
    "perturb": {"method": "heun2", "step_size": 0.23, "perturb": True},
    "grid_constructor": {
        "method": "heun2",
        "grid_constructor": lambda f, y0, t: torch.linspace(0.1, 1.0, 6, dtype=torch.float64),
    },
}
JOINT = {
    "dopri5": {"method": "dopri5", "rtol": 1e-6, "atol": 1e-6},
    "dopri8": {"method": "dopri8", "rtol": 1e-6, "atol": 1e-6},
    "adaptive_heun": {"method": "adaptive_heun", "rtol": 1e-3, "atol": 1e-3},
    "bosh3, cubic": {"method": "bosh3", "rtol": 1e-4, "atol": 1e-4, "interp": "cubic"},
    "tsit5, PI, jump": {"method": "tsit5", "rtol": 1e-4, "atol": 1e-4, "controller": "PI", "jump_t": [0.5], "step_t": [0.7]},
}
PER_SAMPLE = {f"{name}, per sample": {**options, "step_control": "per_sample"} for name, options in JOINT.items()}
ALL = {**FIXED, **JOINT, **PER_SAMPLE}
FEW = ["rk4", "cubic", "dopri5", "dopri5, per sample", "tsit5, PI, jump"]
# Mapped products may be rounded otherwise than those alone. The error estimate of dopri8 is near rounding here, so that its
# steps differ then, and results by as much as a solve at its tolerance may.
DIFFERENT_STEPS = {"dopri8": 1e-8}
OF_VMAP = {**JOINT, "norms of elements": {"rtol": torch.tensor([1e-4, 1e-6]).double(), "atol": 1e-6}}


def field(matrix, bias):
    """A smooth field of t and y, whatever the shape of t."""
    return lambda t, y: torch.tanh(y @ matrix + bias * torch.sin(2 * t)) * (1 + 0.5 * torch.cos(t))


def loss(y0, t, matrix, bias, **options):
    return (solve(field(matrix, bias), y0, t, **options).ys * WEIGHTS).square().sum()


def leaves(*tensors):
    return [x.detach().clone().requires_grad_() for x in tensors]


def assert_close(found, expected, tolerance=ROUNDING):
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@functools.cache
def expected_gradients(name):
    """By autograd with the direct gradient, of `loss`."""
    inputs = leaves(Y0, TIMES, MATRIX, BIAS)
    return torch.autograd.grad(loss(*inputs, **ALL[name]), inputs)


@functools.cache
def expected_hessian(name):
    """By the bias, from the direct gradient's second derivative."""
    return torch.autograd.functional.hessian(lambda bias: loss(Y0, TIMES, MATRIX, bias, **ALL[name]), BIAS)


@pytest.fixture(autouse=True)
def no_transform_left():
    """However a test ends, nothing of a transform is left behind."""
    yield
    assert torch._C._functorch.maybe_current_level() is None and forward_ad._current_level == -1


# ---- derivatives ----


@pytest.mark.parametrize("name", ALL)
def test_grad(name):
    """y0, t and closed-over tensors."""
    found = grad(loss, argnums=INPUTS)(Y0, TIMES, MATRIX, BIAS, **ALL[name])
    assert_close(found, expected_gradients(name))


@pytest.mark.parametrize("transform", [jacrev, jacfwd], ids=["jacrev", "jacfwd"])
@pytest.mark.parametrize("name", ALL)
def test_jacobians(name, transform):
    """jacfwd maps over tangents, jacrev over cotangents."""
    found = transform(functools.partial(loss, **ALL[name]), argnums=INPUTS)(Y0, TIMES, MATRIX, BIAS)
    assert_close(found, expected_gradients(name))


@pytest.mark.parametrize("name", FEW)
def test_jacobians_of_the_outputs(name):
    """Every output by every element of y0, both ways."""
    function = lambda y0: solve(field(MATRIX, BIAS), y0, TIMES, **ALL[name]).ys  # noqa: E731
    expected = torch.autograd.functional.jacobian(function, Y0)
    assert_close([jacrev(function)(Y0), jacfwd(function)(Y0)], [expected, expected])


@pytest.mark.parametrize("name", ALL)
def test_jvp(name):
    """The value and its derivative in a direction."""
    value, tangent = jvp(functools.partial(loss, **ALL[name]), (Y0, TIMES, MATRIX, BIAS), TANGENTS)
    expected = sum((x * y).sum() for x, y in zip(expected_gradients(name), TANGENTS, strict=True))
    assert_close([value, tangent], [loss(Y0, TIMES, MATRIX, BIAS, **ALL[name]), expected])


@pytest.mark.parametrize("name", ALL)
def test_dual_numbers(name):
    """torch.autograd.forward_ad."""
    expected = sum((x * y).sum() for x, y in zip(expected_gradients(name), TANGENTS, strict=True))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, tangent) for x, tangent in zip((Y0, TIMES, MATRIX, BIAS), TANGENTS, strict=True)]
        value, tangent = forward_ad.unpack_dual(loss(*duals, **ALL[name]))
    assert_close([value, tangent], [loss(Y0, TIMES, MATRIX, BIAS, **ALL[name]), expected])


@pytest.mark.parametrize("name", ["rk4", "dopri5", "dopri5, per sample"])
@pytest.mark.parametrize("which", INPUTS, ids=["y0", "t", "matrix", "bias"])
def test_one_dual_number(which, name):
    """Where only one of the inputs has a tangent."""
    with forward_ad.dual_level():
        inputs = [Y0, TIMES, MATRIX, BIAS]
        inputs[which] = forward_ad.make_dual(inputs[which], TANGENTS[which])
        tangent = forward_ad.unpack_dual(loss(*inputs, **ALL[name])).tangent
    assert_close([tangent], [(expected_gradients(name)[which] * TANGENTS[which]).sum()])


@pytest.mark.parametrize("name", ["rk4", "dopri5", "dopri5, per sample"])
def test_dual_numbers_with_autograd(name):
    """The tangent of a gradient: a product with the Hessian."""
    (bias,) = leaves(BIAS)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(bias, TANGENTS[3])
        (gradient,) = torch.autograd.grad(loss(Y0, TIMES, MATRIX, dual, **ALL[name]), dual)
        found = forward_ad.unpack_dual(gradient).tangent
    assert_close([found.detach()], [expected_hessian(name) @ TANGENTS[3]])


@pytest.mark.parametrize("name", FEW)
def test_vjp(name):
    """The cotangent of every output, by every input."""
    function = lambda y0, t, bias: solve(field(MATRIX, bias), y0, t, **ALL[name]).ys  # noqa: E731
    ys, backward = vjp(function, Y0, TIMES, BIAS)
    inputs = leaves(Y0, TIMES, BIAS)
    expected = function(*inputs)
    assert_close([ys], [expected.detach()])
    assert_close(backward(WEIGHTS), torch.autograd.grad(expected, inputs, WEIGHTS))


@pytest.mark.parametrize("name", FEW)
def test_hessians(name):
    """jacfwd of jacrev, and grad of grad."""
    function = functools.partial(loss, Y0, TIMES, MATRIX, **ALL[name])
    found = hessian(function)(BIAS)
    rows = torch.stack([grad(lambda b, i=i: grad(function)(b)[i])(BIAS) for i in range(2)])
    assert_close([found, rows], [expected_hessian(name)] * 2)


@pytest.mark.parametrize("name", ["rk4", "dopri5"])
def test_autograd_of_a_transform(name):
    """torch.autograd by a tensor that a function under grad closes over."""
    (bias,) = leaves(BIAS)
    by_y0 = grad(lambda y0: loss(y0, TIMES, MATRIX, bias, **ALL[name]))(Y0)
    (found,) = torch.autograd.grad((by_y0 * TANGENTS[0]).sum(), bias)
    y0, bias = leaves(Y0, BIAS)
    (by_y0,) = torch.autograd.grad(loss(y0, TIMES, MATRIX, bias, **ALL[name]), y0, create_graph=True)
    (expected,) = torch.autograd.grad((by_y0 * TANGENTS[0]).sum(), bias)
    assert_close([found], [expected])


@pytest.mark.parametrize("gradient", ["direct", "adjoint", "checkpoint"])
@pytest.mark.parametrize("name", ["rk4", "dopri5"])
def test_any_kind_of_gradient_is_that_of_the_discrete_solve(name, gradient):
    """Inside a transform what `gradient` asks for makes no difference."""
    found = grad(loss, argnums=INPUTS)(Y0, TIMES, MATRIX, BIAS, gradient=gradient, **ALL[name])
    assert_close(found, expected_gradients(name))


@pytest.mark.parametrize("options", [{"method": "rk4"}, {}], ids=["fixed", "adaptive"])
def test_structures_arguments_and_complex_numbers(options):
    """A dict with a complex leaf, and tensors among args."""

    def function(x, z, rate):
        func = lambda t, y, rate: {"x": -rate * y["x"], "z": 1j * rate * y["z"] * torch.cos(t)}  # noqa: E731
        ys = solve(func, {"x": x, "z": z}, TIMES, args=(rate,), **options).ys
        return ys["x"].square().sum() + ys["z"].real.sum()

    values = Y0[0], torch.complex(Y0[1], Y0[2]), torch.tensor(0.7, dtype=torch.float64)
    inputs = leaves(*values)
    assert_close(grad(function, argnums=(0, 1, 2))(*values), torch.autograd.grad(function(*inputs), inputs))


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("times", [[0.5], torch.tensor([0.5]).double()], ids=["numbers", "tensor"])
def test_one_time(times, method):
    """The only output is the state itself."""
    function = lambda y0: solve(field(MATRIX, BIAS), y0, times, method=method).ys.square().sum()  # noqa: E731
    assert_close([grad(function)(Y0)], [2 * Y0])


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_empty_batch(method):
    """No samples: no gradient, no call of the field that fails."""
    function = lambda y0: solve(field(MATRIX, BIAS), y0, TIMES, method=method).ys.sum()  # noqa: E731
    assert grad(function)(Y0[:0]).shape == (0, 2)


def test_odeint():
    """The drop-in function."""
    function = lambda odeint_y0: odeint(field(MATRIX, BIAS), odeint_y0, TIMES).square().sum()  # noqa: E731
    (y0,) = leaves(Y0)
    assert_close([grad(function)(Y0)], torch.autograd.grad(function(y0), [y0]))


@pytest.mark.parametrize("options", [{"method": "rk4"}, {"rtol": 1e-5, "atol": 1e-5}], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("outer", ["none", "grad", "vmap"])
def test_transform_inside_of_the_field(outer, options):
    """A continuous normalizing flow: the trace of a Jacobian by jacrev inside of func."""

    def function(y, bias):
        velocity = lambda y: torch.tanh(y @ MATRIX + bias)  # noqa: E731
        func = lambda t, state: (velocity(state[0]), -torch.trace(jacrev(velocity)(state[0])))  # noqa: E731
        zero = torch.zeros((), dtype=torch.float64)
        y, change = solve(func, (y, zero), TIMES, **options).ys
        return y[-1].square().sum() + change[-1]

    def reference(y, bias):
        def func(t, state):
            slope = torch.tanh(state[0] @ MATRIX + bias)
            return slope, -((1 - slope.square()) * torch.diagonal(MATRIX)).sum()

        y, change = solve(func, (y, torch.zeros((), dtype=torch.float64)), TIMES, **options).ys
        return y[-1].square().sum() + change[-1]

    if outer == "none":
        inputs = leaves(Y0[0], BIAS)
        found, expected = (torch.autograd.grad(f(*inputs), inputs) for f in (function, reference))
    elif outer == "grad":
        found, expected = (grad(f, argnums=(0, 1))(Y0[0], BIAS) for f in (function, reference))
    else:
        found, expected = [vmap(function, in_dims=(0, None))(Y0, BIAS)], [torch.stack([reference(y, BIAS) for y in Y0])]
    assert_close(found, expected)


# ---- layers ----


class Network(nn.Module):
    """A small smooth network, driven by the time."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def forward(self, t, y):
        return self.layers(y) * torch.cos(t)


BLOCKS = {"fixed": {"method": "rk4", "t": (0.0, 0.3, 1.0)}, "adaptive": {}, "per sample": {"step_control": "per_sample"}}


@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS)
def test_functional_call(options):
    """The parameters of a block handed in, under grad_and_value."""
    block = ODEBlock(Network(), gradient="direct", **options)
    function = lambda parameters: functional_call(block, parameters, (Y0,)).square().sum()  # noqa: E731
    parameters = {name: x.detach() for name, x in block.named_parameters()}
    found, value = grad_and_value(function)(parameters)
    expected = block(Y0).square().sum()
    assert_close([value], [expected.detach()])
    assert_close(list(found.values()), torch.autograd.grad(expected, list(block.parameters())))


@pytest.mark.parametrize("options", [BLOCKS["fixed"], BLOCKS["adaptive"]], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("samples", ["shared", "own"])
def test_ensemble(samples, options):
    """vmap over the stacked parameters of several blocks, with autograd outside; each member has its own steps."""
    blocks = [ODEBlock(Network(seed), gradient="direct", **options) for seed in range(3)]
    parameters, buffers = stack_module_state(blocks)
    function = lambda p, b, y: functional_call(blocks[0], (p, b), (y,))  # noqa: E731
    y0 = Y0 if samples == "shared" else torch.stack([Y0, 2 * Y0, -Y0])
    found = vmap(function, in_dims=(0, 0, None if samples == "shared" else 0))(parameters, buffers, y0)
    expected = torch.stack([block(y) for block, y in zip(blocks, [Y0] * 3 if samples == "shared" else y0, strict=True)])
    assert_close([found.detach()], [expected.detach()])
    found = torch.autograd.grad(found.square().sum(), list(parameters.values()))
    expected = torch.autograd.grad(expected.square().sum(), [x for block in blocks for x in block.parameters()])
    assert_close(found, [torch.stack(expected[i::4]) for i in range(4)])


# ---- vmap over methods on a grid ----


@pytest.mark.parametrize("name", FIXED)
def test_vmap_over_fixed_methods(name):
    """Over samples, over a closed-over tensor alone, over both, and along another axis."""
    function = lambda y0, matrix: solve(field(matrix, BIAS), y0, TIMES, **FIXED[name]).ys  # noqa: E731
    matrices = torch.stack([MATRIX, -MATRIX, 2 * MATRIX])
    both = torch.stack([function(y0, matrix) for y0, matrix in zip(Y0, matrices, strict=True)])
    assert_close([vmap(function)(Y0, matrices)], [both])
    assert_close([vmap(function, in_dims=(1, 2), out_dims=2)(Y0.T, matrices.movedim(0, 2))], [both.movedim(0, 2)])
    found = vmap(function, in_dims=(None, 0))(Y0[0], matrices)
    assert_close([found], [torch.stack([function(Y0[0], matrix) for matrix in matrices])])
    found = vmap(vmap(function, in_dims=(0, None)), in_dims=(None, 0))(Y0, matrices)
    assert_close([found], [torch.stack([function(Y0, matrix) for matrix in matrices]).transpose(1, 2)])


def sample_loss(y0, t, matrix, bias, **options):
    return solve(field(matrix, bias), y0, t, **options).ys.square().sum()


@pytest.mark.parametrize("name", FIXED)
def test_gradients_of_each_sample(name):
    """vmap of grad."""
    found = vmap(grad(sample_loss, argnums=INPUTS), in_dims=(0, None, None, None))
    expected = [grad(sample_loss, argnums=INPUTS)(y0, TIMES, MATRIX, BIAS, **FIXED[name]) for y0 in Y0]
    found = found(Y0, TIMES, MATRIX, BIAS, **FIXED[name])
    assert_close(found, [torch.stack(of_input) for of_input in zip(*expected, strict=True)])


@pytest.mark.parametrize("name", FIXED)
def test_gradient_of_a_mapped_solve(name):
    """grad of vmap."""

    def total(*inputs):
        return vmap(functools.partial(sample_loss, **FIXED[name]), in_dims=(0, None, None, None))(*inputs).sum()

    inputs = leaves(Y0, TIMES, MATRIX, BIAS)
    expected = torch.autograd.grad(sample_loss(*inputs, **FIXED[name]), inputs)
    assert_close(grad(total, argnums=INPUTS)(Y0, TIMES, MATRIX, BIAS), expected)


@pytest.mark.parametrize("transform", [jacrev, jacfwd], ids=["jacrev", "jacfwd"])
@pytest.mark.parametrize("name", ["rk4", "cubic"])
def test_jacobians_of_each_sample(name, transform):
    """vmap of jacrev and of jacfwd."""
    function = lambda y0: solve(field(MATRIX, BIAS), y0, TIMES, **FIXED[name]).ys[-1]  # noqa: E731
    expected = torch.stack([torch.autograd.functional.jacobian(function, y0) for y0 in Y0])
    assert_close([vmap(transform(function))(Y0)], [expected])


# ---- vmap over adaptive methods ----


def assert_as_alone(function, inputs, in_dims, tolerance=0.0):
    """vmap(function) has the leaves of function(sample) of each sample."""
    found = vmap(function, in_dims=tuple(in_dims))(*inputs)
    size = next(x.shape[d] for x, d in zip(inputs, in_dims, strict=True) if d is not None)
    parts = [[x if d is None else x.select(d, i) for x, d in zip(inputs, in_dims, strict=True)] for i in range(size)]
    expected = torch.utils._pytree.tree_map(lambda *x: torch.stack(x), *[function(*part) for part in parts])
    found, expected = (torch.utils._pytree.tree_leaves(x) for x in (found, expected))
    assert_close(found, expected, tolerance)


@pytest.mark.parametrize("name", OF_VMAP)
def test_vmap_over_states(name):
    """Each sample has its own steps: those it has alone."""
    function = lambda y0: solve(field(MATRIX, BIAS), y0, TIMES, **OF_VMAP[name]).ys  # noqa: E731
    assert_as_alone(function, [Y0], [0], ROUNDING)
    assert_as_alone(function, [Y0.T], [1], ROUNDING)


@pytest.mark.parametrize("name", OF_VMAP)
def test_vmap_over_closed_over_tensors(name):
    """The state is the same for all, or has samples itself."""
    matrices = torch.stack([MATRIX, -MATRIX, 2 * MATRIX])
    function = lambda y0, matrix: solve(field(matrix, BIAS), y0, TIMES, **OF_VMAP[name]).ys  # noqa: E731
    tolerance = DIFFERENT_STEPS.get(name, ROUNDING)
    assert_as_alone(function, [Y0[0], matrices], [None, 0], tolerance)
    assert_as_alone(function, [Y0, matrices], [0, 0], tolerance)
    assert_as_alone(function, [Y0, matrices.movedim(0, 2)], [None, 2], tolerance)


def test_vmap_over_states_of_elementwise_fields_is_bit_for_bit():
    """Where the field has the same rounding mapped or alone."""
    function = lambda y0: solve(lambda t, y: torch.cos(3 * t) - y * y.abs(), y0, TIMES, rtol=1e-5, atol=1e-5).ys  # noqa: E731
    assert_as_alone(function, [Y0], [0], 0.0)


def test_vmap_over_numbers():
    """States of no axis become rows of one number."""
    function = lambda y0, rate: solve(lambda t, y: -rate * y, y0, TIMES).ys  # noqa: E731
    assert_as_alone(function, [Y0[:, 0], torch.tensor([0.5, 1.0, 4.0]).double()], [0, 0], ROUNDING)


def test_vmap_over_tuples():
    """Leaves of several shapes, one mapped along another axis, one not mapped, one with a slope that is not mapped."""

    def function(x, v, z):
        func = lambda t, y: (-y[0] * y[1].sum(), torch.ones(2, dtype=torch.float64), torch.tanh(y[2]) * y[0])  # noqa: E731
        return solve(func, (x, v, z), TIMES, rtol=1e-5, atol=1e-6).ys

    assert_as_alone(function, [Y0[:, 0], Y0.T, torch.ones(2, 2).double()], [0, 1, None], ROUNDING)


def test_vmap_over_dicts_and_complex_numbers():
    """A dict as the state, complex."""
    values = torch.complex(Y0, Y0.flip(0))

    def function(z, rate):
        return solve(lambda t, y: {"z": 1j * rate * y["z"]}, {"z": z}, TIMES, rtol=1e-5, atol=1e-6).ys["z"]

    assert_as_alone(function, [values, BIAS], [1, 0], ROUNDING)


def test_vmap_over_arguments():
    """Mapped tensors among args."""
    func = lambda t, y, rate: -rate * y  # noqa: E731
    function = lambda y0, rate: solve(func, y0, TIMES, args=(rate,)).ys  # noqa: E731
    assert_as_alone(function, [Y0, torch.tensor([0.5, 1.0, 4.0]).double()], [0, 0], ROUNDING)


def test_vmap_over_transposed_slopes():
    """Slopes whose mapped axis does not come first in memory."""
    function = lambda y0, matrix: solve(lambda t, y: (matrix.T @ y.T).T, y0, TIMES).ys  # noqa: E731
    states = torch.randn(2, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_as_alone(function, [states, MATRIX], [2, None], ROUNDING)
    matrices = torch.stack([MATRIX, -MATRIX, 2 * MATRIX], dim=1)
    assert_as_alone(function, [states[..., 0], matrices], [None, 1], ROUNDING)


def test_vmap_in_chunks():
    """chunk_size."""
    function = lambda y0: solve(field(MATRIX, BIAS), y0, TIMES).ys  # noqa: E731
    assert_close([vmap(function, chunk_size=2)(Y0)], [torch.stack([function(y0) for y0 in Y0])])


def test_vmap_over_one_time():
    """The only output is the state itself."""
    found = vmap(lambda y0: solve(field(MATRIX, BIAS), y0, [0.5]).ys)(Y0)
    assert torch.equal(found, Y0[:, None])


def test_vmap_over_something_else():
    """A solve inside of vmap that does not depend on what is mapped."""
    found = vmap(lambda x: x * solve(field(MATRIX, BIAS), Y0, TIMES).ys[-1].sum())(BIAS)
    assert_close([found], [BIAS * solve(field(MATRIX, BIAS), Y0, TIMES).ys[-1].sum()])


@pytest.mark.parametrize("name", OF_VMAP)
def test_autograd_around_vmap(name):
    """Gradients by mapped and by common tensors and times are those of all solves alone."""
    inputs = leaves(Y0, TIMES, torch.stack([MATRIX, -MATRIX, 2 * MATRIX]), BIAS)
    function = lambda y0, t, matrix, bias: solve(field(matrix, bias), y0, t, **OF_VMAP[name]).ys  # noqa: E731
    found = vmap(function, in_dims=(0, None, 0, None))(*inputs)
    expected = torch.stack([function(y0, inputs[1], m, inputs[3]) for y0, m in zip(inputs[0], inputs[2], strict=True)])
    weights = WEIGHTS.transpose(0, 1)
    assert_close(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        DIFFERENT_STEPS.get(name, ROUNDING),
    )


def test_autograd_around_vmap_by_a_common_state():
    """y0 without an axis per sample gets the sum over samples."""
    inputs = leaves(Y0[0], torch.stack([MATRIX, -MATRIX]))
    function = lambda y0, matrix: solve(field(matrix, BIAS), y0, TIMES).ys.square().sum()  # noqa: E731
    found = torch.autograd.grad(vmap(function, in_dims=(None, 0))(*inputs).sum(), inputs)
    expected = torch.autograd.grad(sum(function(inputs[0], matrix) for matrix in inputs[1]), inputs)
    assert_close(found, expected)


def test_autograd_around_vmap_by_results():
    """The field closes over results made outside and inside of the mapped function, and y0 is one."""
    inputs = leaves(Y0, torch.tensor([0.5, 1.0, 2.0]).double())

    def function(y0, rate, outside):
        inside = rate.square() + rate
        return solve(lambda t, y: -(inside + outside * rate) * y, y0 * rate + inside, TIMES).ys.square().sum()

    found = torch.autograd.grad(vmap(function)(*inputs, 2 * inputs[1]).sum(), inputs)
    parts = [function(y0, rate, 2 * rate) for y0, rate in zip(*inputs, strict=True)]
    assert_close(found, torch.autograd.grad(sum(parts), inputs))


def test_second_derivatives_around_vmap():
    """create_graph=True on a mapped adaptive solve, whose field closes over mapped and common tensors."""
    inputs = leaves(Y0, BIAS, torch.stack([MATRIX, -MATRIX, 2 * MATRIX]))

    def penalty(mapped):
        function = lambda y0, bias, matrix: sample_loss(y0, TIMES, 2 * matrix, bias, rtol=1e-5, atol=1e-5)  # noqa: E731
        if mapped:
            total = vmap(function, in_dims=(0, None, 0))(*inputs).sum()
        else:
            total = sum(function(y0, inputs[1], matrix) for y0, matrix in zip(inputs[0], inputs[2], strict=True))
        return torch.autograd.grad(total, inputs[0], create_graph=True)[0].square().sum()

    assert_close(torch.autograd.grad(penalty(True), inputs), torch.autograd.grad(penalty(False), inputs))


# ---- what is refused, and failures ----

ADAPTIVE = {"rtol": 1e-4, "atol": 1e-4}
COMBINATIONS = {
    "vmap of grad": lambda f: vmap(grad(f))(Y0),
    "grad of vmap": lambda f: grad(lambda y: vmap(f)(y).sum())(Y0),
    "vmap of jacrev": lambda f: vmap(jacrev(f))(Y0),
    "vmap of jacfwd": lambda f: vmap(jacfwd(f))(Y0),
    "jacrev of vmap": lambda f: jacrev(vmap(f))(Y0),
    "jvp of vmap": lambda f: jvp(vmap(f), (Y0,), (TANGENTS[0],)),
    "vmap of jvp": lambda f: vmap(lambda y: jvp(f, (y,), (y,)))(Y0),
    "vmap of vmap": lambda f: vmap(vmap(f))(Y0),
    "hessian of vmap": lambda f: hessian(lambda y: vmap(f)(y).sum())(Y0),
}


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_vmap_with_other_transforms_is_refused_in_words(combination):
    """Around or inside of vmap over an adaptive solve; the words say what to do instead."""
    function = lambda y: solve(lambda t, y: -y, y, TIMES, **ADAPTIVE).ys.square().sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match="step_control='per_sample'"):
        COMBINATIONS[combination](function)


def test_dual_numbers_around_vmap_are_refused_in_words():
    """Forward mode around vmap over an adaptive solve."""
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="step_control='per_sample'"):
        dual = forward_ad.make_dual(Y0, TANGENTS[0])
        vmap(lambda y: solve(lambda t, y: -y, y, TIMES, **ADAPTIVE).ys)(dual)


def test_vmap_over_mapped_parameters_with_grad_is_refused_in_words():
    """Where what is mapped is closed over, and the state is not."""
    rates = torch.tensor([0.5, 1.0]).double()
    function = lambda rate: solve(lambda t, y: -rate * y, Y0, TIMES, **ADAPTIVE).ys.square().sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match="step_control='per_sample'"):
        vmap(grad(function))(rates)
    with pytest.raises(NotImplementedError, match="step_control='per_sample'"):
        grad(lambda r: vmap(function)(r).sum())(rates)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"step_control": "per_sample"}, "step_control='per_sample' is not served under torch.vmap"),
        ({"norm": lambda y: y.abs().max()}, "norm is not served under torch.vmap"),
    ],
    ids=["per_sample", "norm"],
)
def test_options_that_vmap_does_not_serve(options, words):
    """Words instead of a wrong answer."""
    with pytest.raises(NotImplementedError, match=words):
        vmap(lambda y: solve(lambda t, y: -y, y, TIMES, **options).ys)(torch.stack([Y0, Y0]))


TRANSFORMS = {
    "grad": lambda f: grad(lambda y: f(y).sum())(Y0),
    "jvp": lambda f: jvp(f, (Y0,), (TANGENTS[0],)),
    "vmap": lambda f: vmap(f)(Y0),
}


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_dense_is_refused_in_words(transform, method):
    """No interpolant inside of a transform."""
    with pytest.raises(NotImplementedError, match=r"dense=True is not served inside torch.func transforms"):
        TRANSFORMS[transform](lambda y: solve(lambda t, y: -y, y, TIMES, method=method, dense=True).ys)


class Watched(nn.Module):
    """A field with a callback."""

    def forward(self, t, y):
        return -y

    def callback_step(self, t, y, dt):
        pass


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_callbacks_are_refused_in_words(transform, method):
    """No callbacks inside of a transform."""
    with pytest.raises(NotImplementedError, match=r"callbacks of func are not served inside torch.func transforms"):
        TRANSFORMS[transform](lambda y: solve(Watched(), y, TIMES, method=method).ys)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_mapped_times_are_refused_in_words(method):
    """Times must be the same for all samples."""
    times = torch.stack([TIMES, 2 * TIMES])
    with pytest.raises((NotImplementedError, ValueError, TypeError), match=r"\bt\b"):
        vmap(lambda t: solve(lambda t, y: -y, Y0[0], t, method=method).ys)(times)


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
@pytest.mark.parametrize("wrong", ["shape", "type"])
def test_wrong_fields(wrong, transform):
    """What func returns is checked inside of transforms too."""
    func = {"shape": lambda t, y: y.sum(), "type": lambda t, y: (y,)}[wrong]
    with pytest.raises(ValueError if wrong == "shape" else TypeError, match="func must return"):
        TRANSFORMS[transform](lambda y: solve(func, y, TIMES).ys)


# y' = y^2 from y0 > 0 ends at t = 1 / y0.
SOME = torch.tensor([0.25, 1.0, -1.0], dtype=torch.float64)


def explode(y0, **options):
    return solve(lambda t, y: y.square(), y0, [0.0, 0.5, 2.0], rtol=1e-4, atol=1e-4, **options)


FAILING = {
    "grad": lambda f: grad(lambda y: f(y).sum())(SOME[:, None]),
    "jvp": lambda f: jvp(f, (SOME[:, None],), (SOME[:, None],)),
    "hessian": lambda f: hessian(lambda y: f(y).sum())(SOME[:, None]),
    "vmap": lambda f: vmap(f)(SOME[:, None]),
}


@pytest.mark.parametrize(
    "transform, step_control",
    [*((name, "joint") for name in FAILING), *((name, "per_sample") for name in FAILING if name != "vmap")],
)
def test_failures_are_raised(transform, step_control):
    """A SolverError comes out of the transform with its words, its time and its sample."""
    with pytest.raises(SolverError) as caught:
        FAILING[transform](lambda y: explode(y, step_control=step_control).ys)
    assert 0.9 < caught.value.t < 1.1 and "Remedy" in str(caught.value)
    assert caught.value.sample == (1 if transform == "vmap" or step_control == "per_sample" else None)


@pytest.mark.parametrize("step_control", ["joint", "per_sample"])
def test_failures_are_returned(step_control):
    """on_failure="return": outputs that were not reached are NaN, the others have their derivatives."""
    options = {"step_control": step_control, "on_failure": "return"}
    ys, tangent = jvp(lambda y: explode(y, **options).ys, (SOME[:, None],), (torch.ones(3, 1).double(),))
    expected = explode(SOME[:, None], **options).ys
    torch.testing.assert_close(ys, expected, rtol=ROUNDING, atol=ROUNDING, equal_nan=True)
    assert expected[2].isnan().sum() == (3 if step_control == "joint" else 1)
    (y0,) = leaves(SOME[:, None])
    gradients = torch.autograd.grad(explode(y0, **options).ys[1].sum(), y0)
    assert_close([tangent[1], grad(lambda y: explode(y, **options).ys[1].sum())(SOME[:, None])], [*gradients] * 2)


def test_failures_are_returned_by_vmap():
    """One sample fails, the others are as alone."""
    solution = {}

    def function(y0):
        solution["all"] = explode(y0, on_failure="return")
        return solution["all"].ys

    found = vmap(function)(SOME[:, None])
    expected = torch.stack([explode(y0, on_failure="return").ys for y0 in SOME[:, None]])
    torch.testing.assert_close(found, expected, rtol=ROUNDING, atol=ROUNDING, equal_nan=True)
    assert found[1, 2].isnan().all() and found.isnan().sum() == 1
    status = solution["all"].status
    assert status[0] == status[2] == "success" != status[1]


def test_a_solve_after_a_failure_inside_a_transform():
    """Nothing is left behind: the next solve has its gradient."""
    for transform in FAILING.values():
        with pytest.raises(SolverError):
            transform(lambda y: explode(y).ys)
        (y0,) = leaves(Y0)
        (found,) = torch.autograd.grad(solve(lambda t, y: -y, y0, [0.0, 1.0]).ys[-1].sum(), y0)
        assert_close([found], [torch.full_like(Y0, math.exp(-1.0))], 1e-6)


def test_errors_of_the_field_come_through():
    """An exception of func leaves the transform as it is."""

    def func(t, y):
        raise LookupError("of the field")

    for transform in TRANSFORMS.values():
        for method in ("dopri5", "rk4"):
            with pytest.raises(LookupError, match="of the field"):
                transform(lambda y, method=method: solve(func, y, TIMES, method=method).ys)


# ---- statistics ----


@pytest.mark.parametrize("name", ["rk4", "step_size", "dopri5", "adaptive_heun"])
@pytest.mark.parametrize("transform", [grad, jacfwd], ids=["grad", "jacfwd"])
def test_statistics(transform, name):
    """The steps are those of the solve without a transform; the calls of func are all of them."""
    calls, solutions = [], []

    def function(y0):
        def func(t, y):
            calls.append(t)
            return field(MATRIX, BIAS)(t, y)

        solutions.append(solve(func, y0, TIMES, **ALL[name]))
        return solutions[-1].ys.sum()

    transform(function)(Y0)
    stats, plain = solutions[0].stats, solve(field(MATRIX, BIAS), Y0, TIMES, **ALL[name]).stats
    assert (stats.num_accepted, stats.num_rejected) == (plain.num_accepted, plain.num_rejected)
    assert stats.nfe == len(calls) >= plain.nfe
    assert solutions[0].status == "success"
    assert torch.equal(solutions[0].t, TIMES)


def test_statistics_of_vmap():
    """Counts of each sample, and the last states as the transform sees them."""
    solutions = []

    def function(y0):
        solutions.append(solve(field(MATRIX, BIAS), y0, TIMES, **ADAPTIVE))
        return solutions[0].ys, solutions[0].y_last

    ys, last = vmap(function)(Y0)
    alone = [solve(field(MATRIX, BIAS), y0, TIMES, **ADAPTIVE).stats for y0 in Y0]
    assert solutions[0].stats.num_accepted.tolist() == [stats.num_accepted for stats in alone]
    assert solutions[0].stats.num_rejected.tolist() == [stats.num_rejected for stats in alone]
    assert solutions[0].status == ["success"] * 3
    assert torch.equal(last, ys[:, -1])


def test_statistics_of_a_block():
    """nfe_forward of a block that was called inside a transform."""
    block = ODEBlock(Network())
    grad(lambda y: block(y).sum())(Y0)
    assert block.nfe_forward > 0 and block.nfe_backward == 0


# ---- seldom ----


def test_inside_no_grad():
    """torch.func transforms disregard an outer no_grad, and need no graph of autograd's."""
    with torch.no_grad():
        found = grad(loss, argnums=INPUTS)(Y0, TIMES, MATRIX, BIAS, **ALL["dopri5"])
        value = vmap(lambda y0: solve(field(MATRIX, BIAS), y0, TIMES).ys)(Y0)
    assert_close(found, expected_gradients("dopri5"))
    assert not value.requires_grad


def test_a_norm_under_grad():
    """A user's norm steers the steps, on plain values."""
    options = {"norm": lambda y: y.abs().max(), "rtol": 1e-5, "atol": 1e-5}
    inputs = leaves(Y0, TIMES, MATRIX, BIAS)
    expected = torch.autograd.grad(loss(*inputs, **options), inputs)
    assert_close(grad(loss, argnums=INPUTS)(Y0, TIMES, MATRIX, BIAS, **options), expected)


def test_a_field_that_branches_on_the_time():
    """t is a plain number where it has no derivative."""
    func = lambda t, y: -y if float(t) < 0.5 else y  # noqa: E731
    for options in ({"method": "rk4", "step_size": 0.1}, {"jump_t": [0.5]}):
        function = lambda y0, options=options: solve(func, y0, [0.0, 0.5, 1.0], **options).ys[-1].sum()  # noqa: E731
        (y0,) = leaves(Y0)
        assert_close([grad(function)(Y0)], torch.autograd.grad(function(y0), [y0]))


def test_single_precision_times():
    """t in float32 with a state in float64, both differentiated."""
    function = lambda y0, t: solve(field(MATRIX, BIAS), y0, t, rtol=1e-5, atol=1e-5).ys.square().sum()  # noqa: E731
    inputs = leaves(Y0, TIMES.float())
    found = grad(function, argnums=(0, 1))(Y0, TIMES.float())
    assert found[1].dtype == torch.float32
    assert_close(found, torch.autograd.grad(function(*inputs), inputs), 1e-6)


@pytest.mark.parametrize("short", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{"method": "rk4"}, {"rtol": 1e-2, "atol": 1e-2}], ids=["fixed", "adaptive"])
def test_states_of_16_bits(options, short):
    """Gradients in the types of the inputs, alone and under vmap."""
    function = lambda y0, rate: solve(lambda t, y: (-rate * y).to(y.dtype), y0, TIMES, **options).ys.float().sum()  # noqa: E731
    values = Y0.to(short), BIAS.float()
    inputs = leaves(*values)
    found = grad(function, argnums=(0, 1))(*values)
    assert [x.dtype for x in found] == [short, torch.float32]
    assert_close([x.float() for x in found], [x.float() for x in torch.autograd.grad(function(*inputs), inputs)], 0.02)
    alone = torch.stack([function(y0, values[1]) for y0 in values[0]])
    assert_close([vmap(function, in_dims=(0, None))(*values)], [alone], 1e-3)
