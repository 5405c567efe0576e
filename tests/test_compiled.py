"""compile(field): solves and gradients agree with the stepper's, and what cannot be compiled is served by it."""

import copy
import os
import pickle
import signal
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from compiled_fields import (
    Flow,
    Net,
    Stretched,
    assert_compiled,
    assert_same,
    compare,
    compare_gradients,
    gradients,
    lorenz,
    lorenz_alone,
    rows,
)
from problems import ADAPTIVE_METHODS
from torch import nn

import odenet_cuda
from odenet_cuda import ODEBlock, SolverError, odeint, odeint_adjoint, solve

TIMES = torch.tensor([0.0, 0.013, 0.3, 0.31, 0.32, 1.0], dtype=torch.float64)
FIXED = ("euler", "midpoint", "rk4")
ADJOINT = 1e-5  # two solves backwards at 1e-9, whose norms differ
EXACT = 1e-9  # two sums of the same numbers in another order
CONTROLS = ("joint", "per_sample")


@pytest.fixture(scope="module", autouse=True)
def needs_compiler():
    """Skips all where there is no C++ compiler."""
    from odenet_cuda.compiled.compilers import NoCompiler, find_compiler

    try:
        find_compiler()
    except NoCompiler as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def stretched() -> odenet_cuda.CompiledField:
    return odenet_cuda.compile(Stretched())


# ---- values and statistics ----


@pytest.mark.parametrize("sign", [1, -1], ids=["forwards", "backwards"])
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
def test_adaptive_methods(stretched, method, control, sign):
    """Outputs at and inside steps, and the steps themselves, of a batch of more than one tile."""
    tol = 1e-4 if method in ("bosh3", "fehlberg2", "adaptive_heun") else 1e-7
    t = sign * TIMES
    found = compare(stretched, rows(40, 2), t, method=method, rtol=tol, atol=tol, step_control=control)
    if control == "per_sample":
        assert len(set(found.stats.num_accepted.tolist())) > 3


@pytest.mark.parametrize("options", [{}, {"step_size": 0.07}], ids=["the times", "step_size"])
@pytest.mark.parametrize("sign", [1, -1], ids=["forwards", "backwards"])
@pytest.mark.parametrize("method", FIXED)
def test_fixed_methods(stretched, method, sign, options):
    """On the grid of the outputs, and with outputs inside steps."""
    compare(stretched, rows(40, 2), sign * TIMES, method=method, **options)


def test_grid_constructor(stretched):
    """The user's own grid."""
    grid = torch.linspace(0, 1, 12, dtype=torch.float64)
    compare(stretched, rows(5, 2), TIMES, method="rk4", grid_constructor=lambda func, y0, t: grid)


@pytest.mark.parametrize("batch", [1, 5, 31, 32, 33, 100, 257])
@pytest.mark.parametrize("control", CONTROLS)
def test_batches(stretched, control, batch):
    """Part of a tile, whole ones, and several."""
    compare(stretched, rows(batch, 2, seed=batch), TIMES, step_control=control)


OPTIONS = {
    "PI": {"controller": "PI"},
    "PID": {"controller": "PID"},
    "coefficients": {"controller": (0.5, 0.1, 0.05)},
    "first_step": {"first_step": 0.3},
    "small first_step": {"first_step": 1e-6},
    "max_step": {"max_step": 0.02},
    "min_step": {"min_step": 0.08},
    "factors": {"safety": 0.7, "ifactor": 3.0, "dfactor": 0.5},
    "step_t": {"step_t": (0.123, 0.31, 0.77)},
    "jump_t": {"jump_t": (0.25, 0.5)},
    "jump_t and step_t": {"jump_t": [0.25], "step_t": torch.tensor([0.2, 0.9])},
    "times beyond the ends": {"jump_t": (-1.0, 3.0), "step_t": (-0.5, 1.5)},
    "loose": {"rtol": 1e-2, "atol": 1e-3},
    "no atol": {"rtol": 1e-6, "atol": 0.0},
}


@pytest.mark.parametrize("sign", [1, -1], ids=["forwards", "backwards"])
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(stretched, name, control, sign):
    """Every option of the step size."""
    options = dict(OPTIONS[name])
    for key in ("step_t", "jump_t"):
        if key in options:
            options[key] = [sign * float(x) for x in options[key]]
    compare(stretched, rows(40, 2), sign * TIMES, step_control=control, **options)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("name", ["none", "first_step", "jump_t", "times beyond the ends"])
def test_number_of_calls(stretched, name, control):
    """stats.nfe is that of the stepper, with jumps inside the interval and beyond it too."""
    options = {**OPTIONS.get(name, {}), "step_control": control}
    found, expected = (solve(f, rows(40, 2), TIMES, **options).stats.nfe for f in (stretched, stretched.func))
    if name == "jump_t" and control == "per_sample":  # rows are on a jump in different steps: the stepper calls func in each
        assert found <= expected
    else:
        assert found == expected


@pytest.mark.parametrize("control", CONTROLS)
def test_many_outputs(stretched, control):
    """Far more outputs than steps."""
    t = torch.linspace(0.5, 0.9, 500, dtype=torch.float64)
    found = compare(stretched, rows(40, 2), t, step_control=control, rtol=1e-4, atol=1e-4)
    assert torch.as_tensor(found.stats.num_accepted).max() < 100


@pytest.mark.parametrize("interp", ["cubic"])
def test_interpolation(stretched, interp):
    """The interpolants that the user can choose."""
    compare(stretched, rows(5, 2), TIMES, method="rk4", step_size=0.3, interp=interp)


def jumping(t, y):
    return torch.where(t < 0.5, -y, 4 * y)


@pytest.mark.parametrize("control", ["per_sample"])
def test_jump(control):
    """A field that jumps, told so by jump_t."""
    field = odenet_cuda.compile(jumping)
    found = compare(field, rows(5, 2), [0.0, 0.7, 1.0], step_control=control, jump_t=(0.5,))
    exact = rows(5, 2) * torch.exp(torch.tensor(-0.5 + 2.0, dtype=torch.float64))
    torch.testing.assert_close(found.ys[-1], exact, rtol=1e-5, atol=1e-5)


def coupled(t, state):
    position, (velocity, cost) = state[0], state[1:]
    return velocity.squeeze(-1), -position[..., None] - 0.1 * velocity, (velocity * velocity).sum((1, 2)) + 0 * cost


@pytest.mark.parametrize("control", CONTROLS)
def test_tuple_state(control):
    """Leaves of different shapes, each with its own norm and tolerance."""
    y0 = rows(5, 3), rows(5, 3, 1, seed=1), rows(5, seed=2)
    field = odenet_cuda.compile(coupled)
    for tolerances in ({}, {"rtol": (1e-3, 1e-5, 1e-2), "atol": (1e-6, 1e-4, 1e-2)}):
        compare(field, y0, TIMES, step_control=control, **tolerances)
    if control == "joint":
        compare_gradients(coupled, y0, TIMES, EXACT)


@pytest.mark.parametrize("control", ["per_sample"])
def test_float32(control):
    """Values and gradients to the rounding of float32."""
    net = Net(dtype=torch.float32)
    field, y0 = odenet_cuda.compile(net), rows(40, 2, dtype=torch.float32)
    compare(field, y0, TIMES, 1e-4, counts=False, step_control=control, rtol=1e-5, atol=1e-5)
    compare_gradients(net, y0, TIMES, 1e-3, step_control=control, rtol=1e-5, atol=1e-5)


def test_state_without_samples():
    """One state [3] is one sample."""
    field = odenet_cuda.compile(lorenz_alone)
    y0 = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    compare(field, y0, torch.linspace(0, 1.5, 40, dtype=torch.float64), 1e-8, counts=False)
    compare_gradients(lorenz_alone, y0, [0.0, 0.5, 1.0], 1e-8)


def test_state_of_rank_0():
    """A number."""
    compare(odenet_cuda.compile(decay), torch.tensor(1.5, dtype=torch.float64), TIMES)


def decay(t, y):
    return -y


def centred(t, y):
    return (y.mean(0, keepdim=True) - y) * (1 + y)


def wide(t, y):
    return torch.sin(y + t)


ALONE = {
    "samples that are mixed": ("centred", [(3, 2), (5, 2), (3, 2), (4, 2)], {}),
    "euler of a wide state": ("wide", [(40, 20), (300, 20)], {"method": "euler", "step_size": 0.1}),
}


@pytest.mark.parametrize("name", ALONE)
def test_in_a_process_of_its_own(name):
    """A small state whose samples are mixed is read as one sample, one with another number of rows as another; and a method of
    one stage. Where these go wrong, memory is written that is not theirs."""
    func, shapes, options = ALONE[name]
    script = (
        "from compiled_fields import assert_same, rows\nimport test_compiled, odenet_cuda\nfrom odenet_cuda import solve\n"
        f"func, options = test_compiled.{func}, {options}\nfield = odenet_cuda.compile(func)\n"
        f"for shape in {shapes}:\n"
        "    y0 = rows(*shape)\n"
        "    assert_same(solve(field, y0, test_compiled.TIMES, **options), solve(func, y0, test_compiled.TIMES, **options))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=os.path.dirname(__file__), capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, f"exit status {run.returncode}: {run.stderr[-2000:]}"


@pytest.mark.parametrize("layout", ["transposed", "expanded", "strided"])
def test_layouts_of_y0(stretched, layout):
    """y0 need not be contiguous."""
    y0 = {"transposed": rows(2, 5).t(), "expanded": rows(1, 2).expand(5, 2), "strided": rows(5, 4)[:, ::2]}[layout]
    compare(stretched, y0, TIMES)


# ---- elementary functions, where they are hard ----

POINTWISE = {
    "exp": torch.exp, "expm1": torch.expm1, "log": torch.log, "log1p": torch.log1p, "sin": torch.sin, "cos": torch.cos,
    "tanh": torch.tanh, "sinh": torch.sinh, "cosh": torch.cosh, "atan": torch.atan, "asinh": torch.asinh, "erf": torch.erf,
    "sqrt": torch.sqrt, "abs": torch.abs, "sign": torch.sign, "floor": torch.floor, "ceil": torch.ceil,
    "relu": torch.relu, "sigmoid": torch.sigmoid, "softplus": nn.functional.softplus,
    "gelu": lambda x: nn.functional.gelu(x.clamp(-1e3, 1e3)),
    "silu": nn.functional.silu, "clamp": lambda x: x.clamp(-1, 1), "square": torch.square, "reciprocal": torch.reciprocal,
    "maximum": lambda x: torch.maximum(x, torch.ones_like(x)), "isnan": lambda x: torch.isnan(x).to(x.dtype),
    "logsigmoid": nn.functional.logsigmoid, "elu": nn.functional.elu, "mish": nn.functional.mish,
}  # fmt: skip


def pointwise(t, y, x):
    return torch.stack([function(x) for function in POINTWISE.values()], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_pointwise_functions_at_hard_arguments(dtype):
    """A step from 0 gives the field itself: as torch's at large, tiny, infinite and undefined arguments."""
    info = torch.finfo(dtype)
    hard = [0.0, -0.0, info.tiny, -info.tiny, info.tiny / 8, 1e-20, 1e-8, -1e-8, 1e-4, 0.5, -0.5, 1.0, -1.0, 3.0, -3.0, 9.0]
    hard += [19.9, 20.1, -20.1, 40.0, -40.0, 80.0, -80.0, 88.0, -100.0, 700.0, -700.0, 1e4, -1e4]
    hard += [float("inf"), -float("inf"), float("nan")]
    x = torch.cat([rows(100, dtype=dtype) * 5, torch.tensor(hard, dtype=dtype)])
    field = odenet_cuda.compile(pointwise)
    y0 = torch.zeros(len(x), len(POINTWISE), dtype=dtype)
    found = solve(field, y0, [0.0, 1.0], method="midpoint", args=(x,)).ys[-1]
    assert_compiled(field)
    expected = pointwise(0, y0, x)
    for i, name in enumerate(POINTWISE):
        torch.testing.assert_close(
            found[:, i],
            expected[:, i],
            rtol=16 * info.eps,
            atol=8 * info.eps,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )


# ---- gradients ----


@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
def test_gradients_of_adaptive_methods(method, control, gradient):
    """For y0 and parameters, of outputs at and inside steps."""
    tol = 1e-3 if method in ("bosh3", "fehlberg2", "adaptive_heun") else 1e-6
    options = {"method": method, "gradient": gradient, "step_control": control, "rtol": tol, "atol": tol}
    for sign in (1, -1):
        compare_gradients(Stretched(), rows(40, 2), sign * TIMES, EXACT, **options)


@pytest.mark.parametrize("options", [{}, {"step_size": 0.07}], ids=["the times", "step_size"])
@pytest.mark.parametrize("method", FIXED)
def test_gradients_of_fixed_methods(method, options):
    """The same on a grid."""
    for gradient in ("direct", "checkpoint"):
        compare_gradients(Stretched(), rows(40, 2), TIMES, EXACT, method=method, gradient=gradient, **options)


@pytest.mark.parametrize("name", ["max_step", "jump_t", "jump_t and step_t", "PID", "min_step", "first_step"])
@pytest.mark.parametrize("control", CONTROLS)
def test_gradients_with_options(name, control):
    """Steps chosen in other ways."""
    compare_gradients(Stretched(), rows(40, 2), TIMES, EXACT, step_control=control, **OPTIONS[name])


@pytest.mark.parametrize("batch", [1, 5, 33, 2100])
@pytest.mark.parametrize("control", CONTROLS)
def test_gradients_of_batches(control, batch):
    """One sample, tiles, and chunks of several tiles."""
    compare_gradients(Stretched(), rows(batch, 2), [0.0, 0.5, 1.0], EXACT, step_control=control, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("gradient", ["direct", "adjoint"])
def test_gradients_of_a_net(gradient, control):
    """Weights and biases."""
    tolerance = ADJOINT if gradient == "adjoint" else EXACT
    options = {"rtol": 1e-9, "atol": 1e-9} if gradient == "adjoint" else {}
    compare_gradients(Net(), rows(40, 2), TIMES, tolerance, gradient=gradient, step_control=control, **options)


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("detached", [False, True], ids=["", "detached"])
def test_gradients_of_flows(detached, weighted):
    """torch.autograd.grad in the field, detach by the user, and both."""
    flow = Flow(detached, weighted)
    compare_gradients(flow, rows(5, 3), [0.0, 0.5, 1.0], EXACT)
    if not (detached or weighted):
        options = {"gradient": "adjoint", "rtol": 1e-9, "atol": 1e-9}
        compare_gradients(flow, rows(5, 3), [0.0, 0.5, 1.0], ADJOINT, **options)


PARAMETERS = torch.tensor([10.0, 28.0, 8 / 3], dtype=torch.float64) * (1 + 0.1 * rows(40, 3, seed=3))


@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "adjoint"])
def test_gradients_for_args(gradient):
    """One row of parameters a sample."""
    options = {"gradient": gradient, "step_control": "per_sample", "rtol": 1e-9, "atol": 1e-9}
    tolerance = ADJOINT if gradient == "adjoint" else 1e-8
    compare_gradients(lorenz, rows(40, 3), [0.0, 0.2, 0.4], tolerance, args=(PARAMETERS,), **options)


def scaled(t, y, w, p):
    return (y @ w) * p - y


def test_args_shared_and_for_each_sample():
    """A matrix for all, and a column with one entry a sample; both get gradients."""
    for batch in (1, 5, 2, 1):
        args = rows(2, 2, seed=5), rows(batch, 1, seed=6)
        compare_gradients(scaled, rows(batch, 2), [0.0, 1.0], EXACT, args=args, step_control="per_sample")


def test_one_row_first_then_many():
    """The reading of a batch of one serves no batch of five, where an argument has one row a sample."""
    field = odenet_cuda.compile(lorenz)
    for batch in (1, 5):
        args = (PARAMETERS[:batch],)
        options = {"args": args, "step_control": "per_sample"}
        found, expected = (
            solve(field, rows(batch, 3), [0.0, 0.1], **options),
            solve(lorenz, rows(batch, 3), [0.0, 0.1], **options),
        )
        assert_same(found, expected, 1e-8)


def test_argument_of_another_length():
    """An argument for all samples may be longer in the next call."""
    field = odenet_cuda.compile(summed)
    for p in (rows(3), rows(4), rows(4).sum()):
        found, expected = solve(field, rows(5, 2), [0.0, 1.0], args=(p,)), solve(summed, rows(5, 2), [0.0, 1.0], args=(p,))
        assert_same(found, expected)


def summed(t, y, p):
    return -y * p.reshape(-1).sum()


@pytest.mark.parametrize("p", [[1.5, 2.0], {0: 1.5}, (rows(2),)], ids=["list", "dict", "tuple of tensors"])
def test_arguments_that_are_no_tensors(p):
    """They are read or refused, and the answer is right."""
    field = odenet_cuda.compile(indexed)
    found, expected = solve(field, rows(5, 2), [0.0, 1.0], args=(p,)), solve(indexed, rows(5, 2), [0.0, 1.0], args=(p,))
    assert_same(found, expected)


def indexed(t, y, p):
    return -y * p[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64], ids=["float32", "int64"])
def test_arguments_of_other_types(dtype):
    """One entry a sample, of a type that is not the state's."""
    p = (rows(5, 1) * 3).to(dtype)
    field = odenet_cuda.compile(timed)
    found, expected = solve(field, rows(5, 2), [0.0, 1.0], args=(p,)), solve(timed, rows(5, 2), [0.0, 1.0], args=(p,))
    assert_same(found, expected, 1e-6 if dtype == torch.float32 else 1e-10, counts=dtype != torch.float32)


def timed(t, y, p):
    return -y * p


def test_two_uses_in_one_loss():
    """The second solve starts where the first ended; their gradients add up."""

    def grads(func, parameters):
        y0 = rows(40, 2).requires_grad_()
        ys = solve(func, y0, [0.0, 0.5]).ys
        more = solve(func, ys[-1], [0.5, 1.0]).ys
        return torch.autograd.grad((more**2).sum() + ys[-1].sin().sum(), [y0, *parameters])

    net = Net()
    field = odenet_cuda.compile(net)
    for x, y in zip(grads(field, net.parameters()), grads(net, net.parameters()), strict=True):
        torch.testing.assert_close(x, y, rtol=EXACT, atol=EXACT)
    assert_compiled(field)


def test_backward_twice():
    """With retain_graph, the second backward gives the same bits."""
    net, y0 = Net(), rows(5, 2).requires_grad_()
    loss = solve(odenet_cuda.compile(net), y0, TIMES).ys.sum()
    first = torch.autograd.grad(loss, [y0, *net.parameters()], retain_graph=True)
    second = torch.autograd.grad(loss, [y0, *net.parameters()])
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("control", CONTROLS)
def test_second_derivatives(control):
    """create_graph with gradient="direct": the gradient of a gradient penalty."""

    def grads(func, parameters):
        y0 = rows(5, 2).requires_grad_()
        ys = solve(func, y0, [0.0, 0.4, 1.0], step_control=control).ys
        grad = torch.autograd.grad((ys**2).sum(), y0, create_graph=True)[0]
        return [grad, *torch.autograd.grad((grad**2).sum(), [y0, *parameters])]

    net = Stretched()
    field = odenet_cuda.compile(net)
    found = grads(field, net.parameters())
    assert_compiled(field)
    for x, y in zip(found, grads(net, net.parameters()), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-8)


def test_adjoint_has_no_second_derivative():
    """It says so in words, and which gradients have one."""
    y0 = rows(5, 2).requires_grad_()
    ys = solve(odenet_cuda.compile(Stretched()), y0, [0.0, 1.0], gradient="adjoint").ys
    with pytest.raises(RuntimeError, match=r"second derivative.*direct"):
        torch.autograd.grad(ys.sum(), y0, create_graph=True)


def test_frozen_parameters():
    """Only the others get gradients; thawed, they do too."""
    net = Net()
    net.first.requires_grad_(False)
    field = odenet_cuda.compile(net)
    for frozen in (True, False):
        net.first.requires_grad_(not frozen)
        net.zero_grad()
        solve(field, rows(5, 2), TIMES).ys.sum().backward()
        assert_compiled(field)
        found = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
        net.zero_grad()
        solve(net, rows(5, 2), TIMES).ys.sum().backward()
        for x, p in zip(found, net.parameters(), strict=True):
            assert (x is None) == (p.grad is None)
            if x is not None:
                torch.testing.assert_close(x, p.grad, rtol=EXACT, atol=EXACT)
    net.requires_grad_(False)
    assert not solve(field, rows(5, 2), TIMES).ys.requires_grad


@pytest.mark.parametrize("kind", ["tensor", "module"])
def test_captured_tensor_that_begins_to_require_a_gradient(kind):
    """A function is asked anew which of what it captures requires one."""
    net = nn.Linear(2, 2, dtype=torch.float64).requires_grad_(False)
    w = net.weight if kind == "module" else rows(2, 2)

    def func(t, y):
        return net(y) if kind == "module" else y @ w

    field = odenet_cuda.compile(func)
    assert not solve(field, rows(5, 2), [0.0, 1.0]).ys.requires_grad
    w.requires_grad_()
    grads = [torch.autograd.grad(solve(f, rows(5, 2), [0.0, 1.0]).ys.sum(), w)[0] for f in (field, func)]
    torch.testing.assert_close(grads[0], grads[1], rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_read_without_gradients_first(mode):
    """What was read where no gradient is recorded serves a solve that needs one."""
    net = Net()
    field = odenet_cuda.compile(net)
    with mode():
        found = solve(field, rows(5, 2), TIMES).ys
    torch.testing.assert_close(found.clone(), solve(net, rows(5, 2), TIMES).ys.detach(), rtol=1e-10, atol=1e-10)
    grads = [gradients(f, rows(5, 2), TIMES, list(net.parameters())) for f in (field, net)]
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=EXACT, atol=EXACT)


# ---- parameters that change ----


def count_libraries(field) -> int:
    return sum(len(plan.libraries) for plans in field._plans.kept.values() for plan in plans)


def test_changed_parameters_are_seen():
    """Changed in place, replaced, or given other memory: without a compile."""
    net = Net()
    field = odenet_cuda.compile(net)

    def check():
        grads = [gradients(f, rows(5, 2), TIMES, list(net.parameters())) for f in (field, net)]
        for x, y in zip(*grads, strict=True):
            torch.testing.assert_close(x, y, rtol=EXACT, atol=EXACT)
        return compare(field, rows(5, 2), TIMES).ys.detach()

    results = [check()]
    compiled = count_libraries(field)
    with torch.no_grad():
        net.first.weight.mul_(1.5)
    results.append(check())
    net.second.weight = nn.Parameter(rows(2, 6, seed=50))
    results.append(check())
    net.second.bias.data = rows(2, seed=51)
    results.append(check())
    net.first.weight = nn.Parameter(rows(3, 6, seed=52).t())  # of other strides
    results.append(check())
    net.load_state_dict({name: x * 0.5 for name, x in net.state_dict().items()})
    results.append(check())
    assert all(not torch.equal(x, y) for x, y in pairwise(results))
    assert count_libraries(field) == compiled


def test_optimizer_steps_are_seen():
    """Adam in place, three steps: the same losses as with the stepper."""
    losses = {}
    for compiled in (False, True):
        net = Net()
        field = odenet_cuda.compile(net) if compiled else net
        optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
        losses[compiled] = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = (solve(field, rows(40, 2), [0.0, 1.0]).ys[-1] ** 2).mean()
            loss.backward()
            optimizer.step()
            losses[compiled].append(float(loss))
    assert losses[True] == pytest.approx(losses[False], rel=1e-9)
    assert losses[True][-1] < losses[True][0]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("gradient", ["direct", "adjoint"])
def test_changed_between_forward_and_backward(gradient, frozen):
    """torch's own error, as for any saved tensor."""
    net = Net()
    net.first.weight.requires_grad_(not frozen)
    ys = solve(odenet_cuda.compile(net), rows(5, 2), TIMES, gradient=gradient).ys
    with torch.no_grad():
        net.first.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ys.sum().backward()


def test_memory_of_a_parameter_replaced_between_forward_and_backward():
    """The memory that the solve read is kept until its gradient is computed, or an error is raised."""
    net = Net(hidden=200)  # its memory is given back to the system when it is freed
    field = odenet_cuda.compile(net)
    y0 = rows(5, 2).requires_grad_()
    grads = []
    for replaced in (False, True):
        before = {name: x.clone() for name, x in net.state_dict().items()}
        ys = solve(field, y0, [0.0, 1.0]).ys
        assert_compiled(field)
        if replaced:
            for parameter in net.parameters():
                parameter.data = torch.full_like(parameter, 100.0)
            torch.full((200, 3), 7.0, dtype=torch.float64)
        try:
            grads.append(torch.autograd.grad(ys.sum(), y0)[0])
        except RuntimeError as error:
            assert replaced and "modified" in str(error)
            return
        net.load_state_dict(before)
    torch.testing.assert_close(grads[0], grads[1], rtol=EXACT, atol=EXACT)


def test_outputs_written_in_place():
    """As with the stepper, the user may write into the outputs of gradient="direct"."""
    grads = []
    for func in (odenet_cuda.compile(decay), decay):
        y0 = rows(5, 2).requires_grad_()
        ys = solve(func, y0, [0.0, 0.5, 1.0]).ys
        ys.mul_(2.0)
        grads.append(torch.autograd.grad((ys**2).sum(), y0)[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=EXACT, atol=EXACT)


def test_module_replaced():
    """Another submodule is read anew."""
    net = Net()
    field = odenet_cuda.compile(nn.ModuleDict({"net": net}))
    field.func.forward = lambda t, y: field.func["net"](t, y)
    before = solve(field, rows(5, 2), TIMES).ys
    field.func["net"] = Net(hidden=4)
    after = solve(field, rows(5, 2), TIMES).ys
    torch.testing.assert_close(after, solve(field.func["net"], rows(5, 2), TIMES).ys, rtol=1e-10, atol=1e-10)
    assert not torch.equal(before, after)


def test_captured_module_replaced():
    """A module that a function captures, too."""
    net = nn.Linear(2, 2, dtype=torch.float64)

    def func(t, y):
        return net(y)

    field = odenet_cuda.compile(func)
    assert_same(solve(field, rows(5, 2), TIMES), solve(func, rows(5, 2), TIMES))
    net = nn.Linear(2, 2, dtype=torch.float64)
    assert_same(solve(field, rows(5, 2), TIMES), solve(func, rows(5, 2), TIMES))


def test_numbers_that_change():
    """A number of Python that is another now is read anew."""

    class Scaled(nn.Module):
        scale = 1.0

        def forward(self, t, y):
            return -self.scale * y

    field = odenet_cuda.compile(Scaled())
    compare(field, rows(5, 2), [0.0, 1.0])
    field.func.scale = 2.0
    compare(field, rows(5, 2), [0.0, 1.0])
    field.reset()
    assert field.explain() == "not solved yet"
    compare(field, rows(5, 2), [0.0, 1.0])


# ---- the same bits ----


def bits(field, y0, **options):
    """Outputs and gradients for y0 and parameters."""
    y0 = y0.clone().requires_grad_()
    ys = solve(field, y0, TIMES, **options).ys
    assert_compiled(field)
    return [ys.detach(), *torch.autograd.grad((ys**2).sum(), [y0, *field.parameters()])]


@pytest.mark.parametrize("gradient", ["direct", "adjoint"])
@pytest.mark.parametrize("control", CONTROLS)
def test_same_bits_in_any_number_of_threads(control, gradient):
    """Again, and in one thread or two."""
    field = odenet_cuda.compile(Net())
    options = {"step_control": control, "gradient": gradient, "rtol": 1e-4, "atol": 1e-4}
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 2, 1, 2):
            torch.set_num_threads(count)
            results.append(bits(field, rows(2500, 2), **options))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("model, gradient", [(Net, "direct"), (Net, "adjoint"), (Stretched, "direct")])
def test_a_sample_does_not_depend_on_its_batch(model, gradient):
    """Under per-sample control: the same bits alone, among 3 and among 100, of the solution and its gradient."""
    field = odenet_cuda.compile(model())
    y0 = rows(100, 2)
    whole = bits(field, y0, step_control="per_sample", gradient=gradient)
    for chosen in ([0], [71], [99, 3, 42], list(range(99, -1, -1))):
        part = bits(field, y0[chosen], step_control="per_sample", gradient=gradient)
        assert torch.equal(part[0], whole[0][:, chosen]) and torch.equal(part[1], whole[1][chosen])


def test_from_several_threads_of_python():
    """One field, solved by four threads at a time."""
    field = odenet_cuda.compile(Net())
    expected = [solve(field.func, rows(5 + i, 2, seed=i), TIMES).ys.detach() for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: solve(field, rows(5 + i, 2, seed=i), TIMES).ys.detach(), range(12)))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


# ---- failures ----


class Failing(nn.Module):
    """Undefined after 1.5 where y is above 0; stiff where mu is large."""

    def __init__(self, mu: float, undefined: bool):
        super().__init__()
        self.register_buffer("mu", torch.tensor(mu, dtype=torch.float64))
        self.undefined = undefined

    def forward(self, t, y):
        slope = -self.mu * y
        return torch.where((t > 1.5) & (y[:, :1] > 0), slope * float("nan"), slope) if self.undefined else slope


FAILURES = {
    "undefined": (Failing(1.0, True), {}),
    "max_num_steps": (Failing(100.0, False), {"max_num_steps": 9}),
    "underflow": (Failing(1.0, False), {"rtol": 0.0, "atol": 1e-300}),
}


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("name", FAILURES)
def test_failures(name, control):
    """The exception, and the solution with on_failure="return", say what the stepper's say."""
    func, options = FAILURES[name]
    field = odenet_cuda.compile(func)
    options = {**options, "step_control": control}
    y0 = rows(40, 2) if name != "underflow" else rows(5, 2) + 3
    errors = []
    for f in (field, func):
        with pytest.raises(SolverError) as raised:
            solve(f, y0, [1.0, 1.2, 2.0], **options)
        errors.append(raised.value)
    assert_compiled(field)
    found, expected = errors
    assert (found.status, found.sample) == (expected.status, expected.sample)
    assert found.t == pytest.approx(expected.t, rel=1e-6)
    torch.testing.assert_close(found.y, expected.y, rtol=1e-6, atol=1e-9, equal_nan=True)
    found, expected = (solve(f, y0, [1.0, 1.2, 2.0], on_failure="return", **options) for f in (field, func))
    assert_same(found, expected, 1e-6, counts=False)
    assert expected.ys[-1].isnan().any()


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
@pytest.mark.parametrize("kind", ["joint", "per sample", "fixed", "reverse"])
def test_interrupt(kind):
    """SIGINT ends a long compiled solve, forwards and backwards, in KeyboardInterrupt."""
    call = {
        "joint": "solve(field, y0, [0.0, 1e12])",
        "per sample": "solve(field, y0, [0.0, 1e12], step_control='per_sample')",
        "fixed": "solve(field, y0, [0.0, 1.0], method='euler', step_size=1e-8)",
        "reverse": "solve(field, y0.requires_grad_(), [0.0, 1.0], gradient='adjoint', "
        "adjoint_options={'max_step': 1e-10}).ys.sum().backward()",
    }[kind]
    if kind == "fixed":  # its grid is made in Python first
        call = call.replace("1e-8", "2.5e-7").replace("[0.0, 1.0]", "[0.0, 1.0]")
    first = call.replace("1e12", "1.0").replace("2.5e-7", "0.1").replace("1e-10", "0.1")
    script = (
        "import signal, torch\nfrom odenet_cuda import compile, solve\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background ignores it
        "def turn(t, y):\n    return torch.stack([y[..., 1], -y[..., 0]], -1)\n"
        "field = compile(turn)\ny0 = torch.rand(5000, 2, dtype=torch.float64)\n"
        f"{first}\nassert field.explain() == 'compiled'\nprint('begun', flush=True)\n"
        f"try:\n    {call}\nexcept KeyboardInterrupt:\n    print('interrupted', flush=True)\n"
        "else:\n    print('finished', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-u", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "begun\n", process.stderr.read()
        try:
            process.wait(2.0)  # the solve is under way; it has hours to go
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert out == "interrupted\n", err
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()


# ---- wherever a func is used ----


def test_copies():
    """Pickle and deepcopy of the field and of a module that holds it; the state dict is that of func."""
    field = odenet_cuda.compile(Net())
    expected = solve(field, rows(5, 2), TIMES).ys.detach()
    holder = nn.Sequential(nn.Linear(2, 2), field)
    for copied in (copy.deepcopy(field), pickle.loads(pickle.dumps(field)), copy.deepcopy(holder)[1]):
        assert isinstance(copied, odenet_cuda.CompiledField) and copied.func is not field.func
        assert copied.explain() == "not solved yet"
        assert torch.equal(solve(copied, rows(5, 2), TIMES).ys, expected)
        assert_compiled(copied)
    assert list(field.state_dict()) == [f"func.{name}" for name in field.func.state_dict()]
    other = odenet_cuda.compile(Net())
    nn.init.zeros_(other.func.first.weight)
    other.load_state_dict(field.state_dict())
    assert torch.equal(solve(other, rows(5, 2), TIMES).ys, expected)


def test_what_a_compiled_field_is():
    """Called, it is func; compiled again, itself; and it has the attributes of func."""
    net = Net()
    field = odenet_cuda.compile(net)
    assert odenet_cuda.compile(field) is field
    assert torch.equal(field(torch.tensor(0.3), rows(5, 2)), net(torch.tensor(0.3), rows(5, 2)))
    assert field.first is net.first and field.explain() == "not solved yet"
    with pytest.raises(AttributeError, match="nothing"):
        _ = field.nothing
    with pytest.raises(TypeError, match="callable"):
        odenet_cuda.compile(3)
    with pytest.raises(RuntimeError, match="solve with it once"):
        field.source()
    with pytest.raises(ValueError, match="solve must be one of"):
        field.source(solve="dense")


@pytest.mark.parametrize("how", ["compiled", "auto"])
def test_block_trains(how):
    """Three steps of gradient descent: the losses of a block that is not compiled, and they fall."""
    losses, options = {}, {"rtol": 1e-9, "atol": 1e-9}
    for compiled in (False, True):
        net = Net()
        if how == "auto":
            block = ODEBlock(net, compile="auto" if compiled else False, **options)
        else:
            block = ODEBlock(odenet_cuda.compile(net) if compiled else net, compile=False, **options)
        optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
        losses[compiled] = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = ((block(rows(40, 2)) - 0.3) ** 2).mean()
            loss.backward()
            optimizer.step()
            losses[compiled].append(float(loss))
        assert (block.explain() == "compiled") == compiled
        assert block.nfe_forward > 0 and (block.nfe_backward > 0 or not compiled)
    assert losses[True] == pytest.approx(losses[False], abs=1e-6)
    assert losses[True][2] < losses[True][1] < losses[True][0]


def test_odeint():
    """odeint, and odeint_adjoint with its gradients, with the stepper's answer."""
    net = Net()
    field = odenet_cuda.compile(net)
    torch.testing.assert_close(odeint(field, rows(5, 2), TIMES), odeint(net, rows(5, 2), TIMES), rtol=1e-10, atol=1e-10)
    assert_compiled(field)
    grads = []
    for func in (field, net):
        net.zero_grad()
        odeint_adjoint(func, rows(5, 2), TIMES, rtol=1e-9, atol=1e-9).sum().backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=ADJOINT, atol=ADJOINT)


def test_transforms():
    """torch.func.grad and vmap give what they give for func, and explain does not call it compiled."""
    net = Net()
    field = odenet_cuda.compile(net)
    compare(field, rows(5, 2), TIMES)
    for transform in (
        lambda f: torch.func.grad(lambda y: solve(f, y, TIMES).ys.sum())(rows(5, 2)),
        lambda f: torch.func.vmap(lambda y: solve(f, y, TIMES).ys)(rows(3, 5, 2)),
        lambda f: torch.func.jvp(lambda y: solve(f, y, TIMES).ys, (rows(5, 2),), (rows(5, 2, seed=1),))[1],
    ):
        torch.testing.assert_close(transform(field), transform(net), rtol=1e-12, atol=1e-12)
        assert field.explain() != "compiled"


# ---- what is refused ----


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2, dtype=torch.float64)

    def forward(self, t, y):
        return self.norm(y) - y


class Dropping(nn.Module):
    def forward(self, t, y):
        return -nn.functional.dropout(y, 0.5, self.training)


def minus_mean(t, y):
    return y - y.mean(0)


def minus_sum(t, y):
    return y - 0.1 * y.sum(0, keepdim=True)


def number_of_time(t, y):
    return -y * (float(t.reshape(-1)[0]) + 1)


def branches(t, y):
    if bool(y.sum() > 0):
        return -y
    return y


def takes_median(t, y):
    return -y * y.median(1, keepdim=True).values


def reverses_samples(t, y):
    return -y.flip(0)


def softmax_of_samples(t, y):
    return torch.softmax(y, 0)


def products_of_samples(t, y):
    return -(y @ y.t()) @ y


REFUSED = {  # what explain must name; in which file and line, where a line of this file does it
    "batch norm": (Normed(), "func writes a tensor", False),
    "mean": (minus_mean, "mean", True),
    "sum": (minus_sum, "sum", True),
    "float": (number_of_time, "into Python", True),
    "branch": (branches, "into Python", True),
    "median": (takes_median, "median", True),
    "flip": (reverses_samples, "flip", True),
    "softmax": (softmax_of_samples, "amax", True),
    "product": (products_of_samples, "mm", True),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    """explain names the operation and its line, and the answer is the stepper's, bit for bit."""
    func, word, line = REFUSED[name]
    field, other = odenet_cuda.compile(func), copy.deepcopy(func)
    found = solve(field, rows(5, 2), [0.0, 0.5], step_control="per_sample")
    assert field.explain().startswith("served by ") and word in field.explain()
    assert not line or os.path.basename(__file__) in field.explain()
    expected = solve(other, rows(5, 2), [0.0, 0.5], step_control="per_sample")
    assert torch.equal(found.ys, expected.ys) and torch.equal(found.stats.num_accepted, expected.stats.num_accepted)
    with pytest.raises(RuntimeError, match="served by the stepper"):
        field.source()


@pytest.mark.parametrize("control", CONTROLS)
def test_batch_norm_is_not_moved_by_reading(control):
    """Its running statistics and counter are those of the stepper's calls alone."""
    func, other = Normed(), Normed()
    field = odenet_cuda.compile(func)
    assert_same(
        solve(field, rows(5, 2), [0.0, 0.5], step_control=control), solve(other, rows(5, 2), [0.0, 0.5], step_control=control)
    )
    assert field.explain().startswith("served by ")
    assert other.norm.num_batches_tracked > 0
    for name, value in other.state_dict().items():
        torch.testing.assert_close(func.state_dict()[name], value, rtol=0, atol=0, msg=name)


def adds_noise(t, y):
    return -y + torch.rand(2, dtype=y.dtype)


@pytest.mark.parametrize("func", [Dropping(), adds_noise], ids=["dropout", "rand"])
def test_random_fields(func):
    """The numbers drawn are those that the stepper draws: reading draws none."""
    field = odenet_cuda.compile(func)
    torch.manual_seed(0)
    found = solve(field, rows(5, 2), [0.0, 0.5, 1.0], method="rk4").ys
    assert field.explain().startswith("served by ")
    torch.manual_seed(0)
    assert torch.equal(found, solve(func, rows(5, 2), [0.0, 0.5, 1.0], method="rk4").ys)


class WithCallback(Net):
    steps = 0

    def callback_step(self, t, y, dt):
        self.steps += 1


def largest(parts):
    return torch.stack([x.abs().max() for x in parts if x.numel()]).max()


NOT_SERVED = {
    "dense": (Net(), rows(5, 2), {"dense": True}, "dense"),
    "regularizers": (Net(), rows(5, 2), {"regularizers": ("kinetic",)}, "regularizers"),
    "norm": (Net(), rows(5, 2), {"norm": lambda y: y.abs().max()}, "norm"),
    "rtol": (Net(), rows(5, 2), {"rtol": torch.tensor([1e-5, 1e-6])}, "tolerances"),
    "atol": (Net(), rows(5, 2), {"atol": torch.tensor([1e-5, 1e-6])}, "tolerances"),
    "complex": (decay, torch.complex(rows(5, 2), rows(5, 2)), {}, "float64"),
    "float16": (decay, rows(5, 2).half(), {"rtol": 1e-2, "atol": 1e-2}, "float64"),
    "bfloat16": (decay, rows(5, 2).bfloat16(), {"rtol": 1e-1, "atol": 1e-1}, "float64"),
    "two types": (lambda t, y: (-y[0], -y[1]), (rows(5, 2), rows(5, 2).float()), {}, "float64"),
    "quadrature": (Net(), rows(5, 2), {"gradient": "quadrature"}, "quadrature"),
    "max_checkpoints": (Net(), rows(5, 2), {"gradient": "checkpoint", "max_checkpoints": 3}, "max_checkpoints"),
    "perturb": (Net(), rows(5, 2), {"method": "rk4", "perturb": True}, "perturb"),
    "adjoint norm": (Net(), rows(5, 2), {"gradient": "adjoint", "adjoint_options": {"norm": largest}}, "a norm of the adjoint"),
    "callback": (WithCallback(), rows(5, 2), {}, "callbacks"),
    "one time": (Net(), rows(5, 2), {"t": [0.0]}, "nothing to solve"),
    "empty": (decay, rows(0, 2), {}, "nothing to solve"),
    "large": (decay, rows(2, 1100), {}, "1100"),
}


@pytest.mark.parametrize("name", NOT_SERVED)
def test_not_served(name):
    """explain says which option or type needs the stepper, and the answer is the stepper's."""
    func, y0, options, word = NOT_SERVED[name]
    options = dict(options)
    t = options.pop("t", [0.0, 0.5, 1.0])
    field, other = odenet_cuda.compile(func), copy.deepcopy(func)
    found, expected = solve(field, y0, t, **options), solve(other, y0, t, **options)
    assert field.explain().startswith("served by ") and word in field.explain()
    assert_same(found, expected, 0.0)
    if name == "callback":
        assert func.steps == other.steps > 0


def test_gradient_for_times_is_not_served():
    """t gets its gradient, by the stepper; without one the same field is compiled."""
    field = odenet_cuda.compile(Stretched())
    grads = []
    for func in (field, field.func):
        t = TIMES.clone().requires_grad_()
        grads.append(torch.autograd.grad(solve(func, rows(5, 2), t).ys.sum(), t)[0])
    assert "gradient for t" in field.explain()
    assert torch.equal(*grads)
    with torch.no_grad():
        compare(field, rows(5, 2), t)


def test_autocast_is_not_served():
    """Under autocast the field is the user's own."""
    net = Net(dtype=torch.float32)
    field, y0 = odenet_cuda.compile(net), rows(5, 2, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = (solve(f, y0, [0.0, 1.0], rtol=1e-2, atol=1e-2).ys for f in (field, net))
    assert "autocast" in field.explain() and torch.equal(found, expected)


def test_errors_of_the_arguments_are_the_same():
    """What is wrong with a call is said as by the stepper."""
    field = odenet_cuda.compile(decay)
    for y0, t, options in (
        (rows(5, 2), [0.0, 0.0], {}),
        (rows(5, 2), [0.0, 1.0], {"rtol": -1.0}),
        (torch.tensor(1.0), [0.0, 1.0], {"step_control": "per_sample"}),
        (rows(5, 2), [0.0, 1.0], {"method": "euler", "step_control": "per_sample"}),
        (rows(5, 2), [0.0, 1.0], {"method": "none"}),
    ):
        raised = []
        for func in (field, decay):
            with pytest.raises((ValueError, TypeError)) as error:
                solve(func, y0, t, **options)
            raised.append((error.type, str(error.value)))
        assert raised[0] == raised[1]


@pytest.mark.parametrize(
    "func", [lambda t, y: y[:, :1], lambda t, y: (y, y), lambda t, y: None], ids=["shape", "tuple", "None"]
)
def test_wrong_results_of_func(func):
    """The stepper's own words where func returns something else than a slope."""
    raised = []
    for f in (odenet_cuda.compile(func), func):
        with pytest.raises((ValueError, TypeError)) as error:
            solve(f, rows(5, 2), [0.0, 1.0])
        raised.append((error.type, str(error.value)))
    assert raised[0] == raised[1]


def test_no_warnings():
    """A compiled solve and its gradient warn of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve(odenet_cuda.compile(Net()), rows(5, 2).requires_grad_(), TIMES).ys.sum().backward()


class Hypernet(nn.Module):
    """The weights of the layer are computed from the time."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.make = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 12)).double()

    def forward(self, t, y):
        p = self.make(t.reshape(1, 1)).reshape(-1)
        return torch.tanh(y @ p[:9].view(3, 3) + p[9:])


@pytest.mark.parametrize("gradient", ["direct", "adjoint"])
def test_hypernet(gradient):
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    compare_gradients(Hypernet(), rows(5, 3), t, 1e-6, gradient=gradient, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("method", ["fehlberg2", "adaptive_heun"])
def test_adjoint_that_does_not_go_on_with_the_last_slope(method):
    """Per sample the stepper's takes the parameters' integral from a slope of its own there, so a compiled one differs."""
    weight = rows(3, 3, seed=1).requires_grad_()
    field = odenet_cuda.compile(lambda t, y: torch.tanh(y @ weight))
    how = {"method": method, "step_control": "per_sample", "gradient": "adjoint", "rtol": 1e-4, "atol": 1e-4}
    solve(field, rows(5, 3), [0.0, 1.0], **how).ys.sum().backward()
    assert "per-sample adjoint" in field.explain()
