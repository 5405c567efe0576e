"""compile(field): solves and gradients agree with the stepper's, and what cannot be compiled is served by it."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

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
    decay,
    gradients,
    lorenz,
    lorenz_alone,
    rows,
)
from problems import ADAPTIVE_METHODS
from torch import nn

import odenet_cuda
from odenet_cuda import SolverError, solve

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
    """It says so in words, and which gradients have one, to whoever differentiates the first."""
    y0 = rows(5, 2).requires_grad_()
    ys = solve(odenet_cuda.compile(Stretched()), y0, [0.0, 1.0], gradient="adjoint").ys
    (first,) = torch.autograd.grad(ys.sum(), y0, create_graph=True)
    assert torch.equal(first, torch.autograd.grad(ys.sum(), y0)[0])
    with pytest.raises(RuntimeError, match=r"second derivative.*direct"):
        torch.autograd.grad(first.sum(), y0)


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


# ---- gradients of other fields ----


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
