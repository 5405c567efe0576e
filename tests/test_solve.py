"""solve: accuracy, states, times, options, statistics, interpolant, failures and callbacks."""

import math

import numpy as np
import pytest
import torch
from problems import ADAPTIVE_METHODS, FIXED_METHODS, ORDERS, PROBLEMS, Recording, VanDerPol

from odenet_cuda import SolverError, formulas, solve

# The global error adds up the local ones, each kept below the tolerance; fehlberg2 estimates the error of its
# first-order part, whose coefficient is 1/512, and so errs by far more than it asks for.
END_FACTOR = {"fehlberg2": 1000.0}
DEFAULT_FACTOR = 10.0
# dopri8's steps are so long that its interpolant of order 5 errs by more than its end value.
BETWEEN_FACTOR = {"fehlberg2": 1000.0, "dopri8": 100.0}
SOLVED = 5e-6  # what the default tolerances, rtol = 1e-7 a step, come to over a unit of time, interpolants included
ROUNDING = 1e-12  # float64 sums over a few hundred steps
ORDER_SLACK = 0.35  # observed orders at finite step sizes
# A tolerance that the type can resolve.
TYPES = {
    torch.float32: 1e-5,
    torch.float64: 1e-9,
    torch.float16: 1e-3,
    torch.bfloat16: 1e-2,
    torch.complex64: 1e-5,
    torch.complex128: 1e-9,
}


def tolerance(method: str) -> float:
    """A tolerance that the method reaches in a few hundred steps."""
    return 1e-9 if ORDERS[method] >= 5 else 1e-6


def relative_error(ys: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """The largest error of each output, as the tolerances scale it, [T]."""
    return ((ys.to(torch.promote_types(ys.dtype, exact.dtype)) - exact).abs() / (1 + exact.abs())).flatten(1).amax(1)


class Steps:
    """A field with callbacks that keep what they are given."""

    def __init__(self, func):
        self.func = func
        self.tried, self.accepted, self.rejected = [], [], []

    def __call__(self, t, y):
        return self.func(t, y)

    def callback_step(self, t0, y0, dt):
        self.tried.append((float(t0), y0, float(dt)))

    def callback_accept_step(self, t0, y0, dt):
        self.accepted.append((float(t0), y0, float(dt)))

    def callback_reject_step(self, t0, y0, dt):
        self.rejected.append((float(t0), y0, float(dt)))

    @property
    def sizes(self) -> list[float]:
        return [dt for _, _, dt in self.tried]

    @property
    def ends(self) -> list[float]:
        return [t0 + dt for t0, _, dt in self.accepted]


# ---- accuracy ----


@pytest.mark.parametrize("sign", [1, -1], ids=["forwards", "backwards"])
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
def test_adaptive_methods_meet_their_tolerance(method, name, sign):
    """Every adaptive method reaches the exact solution at the end and in between, in both directions of time."""
    problem, tol = PROBLEMS[name], tolerance(method)
    t = sign * torch.linspace(0.0, 2.0, 7, dtype=torch.float64)
    ys = solve(problem.func, problem.y0, t, method=method, rtol=tol, atol=tol).ys
    error = relative_error(ys, problem.exact(t)) / tol
    assert torch.equal(ys[0], problem.y0)
    assert error[-1] <= END_FACTOR.get(method, DEFAULT_FACTOR)
    assert error.max() <= BETWEEN_FACTOR.get(method, DEFAULT_FACTOR)


@pytest.mark.parametrize("dtype", list(TYPES), ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_devices_and_types(device, dtype):
    """The result has the type and device of y0 and is right in every type."""
    problem, tol = PROBLEMS["cosine"], TYPES[dtype]
    t = torch.linspace(0.0, 2.0, 5, dtype=torch.float64)
    ys = solve(problem.func, problem.y0.to(device, dtype), t.to(device), rtol=tol, atol=tol).ys
    assert ys.dtype == dtype and ys.device.type == device.type
    assert relative_error(ys.cpu(), problem.exact(t)).max() <= DEFAULT_FACTOR * tol


@pytest.mark.parametrize("sign", [1, -1], ids=["forwards", "backwards"])
@pytest.mark.parametrize("method", [*ADAPTIVE_METHODS, *FIXED_METHODS])
def test_func_is_never_evaluated_outside_of_the_interval(method, sign):
    """Steps land on the end: no time beyond t[-1] or before t[0] is ever seen, and t[-1] itself is."""
    problem = PROBLEMS["cosine"]
    func = Recording(problem.func)
    t = [0.0, sign * 0.35, sign * 1.03]
    options = {"step_size": 0.25} if method in FIXED_METHODS else {"rtol": 1e-5, "atol": 1e-5}
    solve(func, problem.y0, t, method=method, **options)
    seen = [sign * time for time in func.times]
    assert min(seen) == 0.0
    if method in ADAPTIVE_METHODS:
        assert max(seen) == 1.03
    assert max(seen) <= 1.03


@pytest.mark.parametrize("method", [*ADAPTIVE_METHODS, *FIXED_METHODS])
def test_end_value_has_the_order_of_the_method(method):
    """Halving the steps divides the error at the end, which is no multiple of the step, by 2**order."""
    problem = PROBLEMS["linear_system"]
    order = ORDERS[method]
    sizes = [0.4, 0.2] if order >= 5 else [0.05, 0.025]
    t = torch.tensor([0.0, 0.97, 2.0], dtype=torch.float64)
    errors = []
    for size in sizes:
        options = {"min_step": size, "max_step": size, "max_num_steps": 1000}
        if method in FIXED_METHODS:
            options = {"step_size": size}
        ys = solve(problem.func, problem.y0, t, method=method, **options).ys
        errors.append(float((ys[-1] - problem.exact(t)[-1]).norm()))
    assert -ORDER_SLACK < math.log2(errors[0] / errors[1]) - order < 1.5  # a linear problem may be solved better


def test_dopri8_ends_better_than_its_interpolant():
    """The end is a step's end, not read from the interpolant: 1e-12 is reached there."""
    problem = PROBLEMS["oscillator"]
    t = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    ys = solve(problem.func, problem.y0, t, method="dopri8", rtol=1e-12, atol=1e-12).ys
    errors = (ys - problem.exact(t)).abs().amax(1)
    assert errors[2] < 1e-12
    assert 1e-12 < errors[1] < 1e-9


@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
def test_outputs_in_between_do_not_change_the_steps(method):
    """Outputs are read from the interpolant: many of them cost no evaluation and leave the end as it is."""
    problem, tol = PROBLEMS["logistic"], tolerance(method)
    few = solve(problem.func, problem.y0, [0.0, 2.0], method=method, rtol=tol, atol=tol)
    t = torch.linspace(0.0, 2.0, 101, dtype=torch.float64)
    many = solve(problem.func, problem.y0, t, method=method, rtol=tol, atol=tol)
    assert few.stats.nfe == many.stats.nfe
    assert torch.equal(few.ys[-1], many.ys[-1])
    assert relative_error(many.ys, problem.exact(t)).max() <= BETWEEN_FACTOR.get(method, DEFAULT_FACTOR) * tol


@pytest.mark.parametrize("interp", ["method", "linear", "cubic"])
@pytest.mark.parametrize("method", FIXED_METHODS)
def test_fixed_methods_interpolate_with_their_order(method, interp):
    """Outputs inside a step converge with the order of the interpolant or of the method, whichever is lower."""
    problem = PROBLEMS["cosine"]
    of_interpolant = {"linear": 1, "cubic": 3, "method": {"euler": 1, "rk4": 3}.get(method, 2)}[interp]
    # The interpolant errs locally by h**(p + 1), the method globally by h**order.
    order = min(of_interpolant + 1, ORDERS[method])
    errors = []
    for step in (0.1, 0.05):
        t = torch.tensor([0.0, 1.0 + 0.37 * step, 2.0], dtype=torch.float64)
        ys = solve(problem.func, problem.y0, t, method=method, step_size=step, interp=interp).ys
        errors.append(float((ys[1] - problem.exact(t)[1]).norm()))
    assert math.log2(errors[0] / errors[1]) > order - ORDER_SLACK


# ---- states ----

DECAY = torch.tensor([1.0, 2.0], dtype=torch.float64)
GROWTH = torch.tensor([[0.5], [0.25], [0.125]], dtype=torch.float64)
T3 = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
DECAYED = DECAY * torch.exp(-T3)[:, None]
GROWN = GROWTH * torch.exp(T3)[:, None, None]


@pytest.mark.parametrize("control", ["rk4", "dopri5"])
@pytest.mark.parametrize(
    ("build", "parts"),
    [
        (lambda x, z: (x, z), lambda y: (y[0], y[1])),
        (lambda x, z: [x, z], lambda y: (y[0], y[1])),
        (lambda x, z: {"x": x, "z": z}, lambda y: (y["x"], y["z"])),
        (lambda x, z: {"z": [z], "x": (x, {})}, lambda y: (y["x"][0], y["z"][0])),
    ],
    ids=["tuple", "list", "dict", "nested"],
)
def test_structures(control, build, parts):
    """A state may be any nest; func gets it and the result has it."""
    y0 = build(DECAY, GROWTH)

    def func(t, y):
        assert type(y) is type(y0)
        x, z = parts(y)
        return build(-x, z)

    options = {"step_size": 0.01} if control == "rk4" else {}
    ys = solve(func, y0, T3, method=control, **options).ys
    assert type(ys) is type(y0)
    x, z = parts(ys)
    torch.testing.assert_close(x, DECAYED, rtol=0, atol=1e-7)
    torch.testing.assert_close(z, GROWN, rtol=0, atol=1e-7)


def test_state_without_dimensions():
    """A number is a state."""
    ys = solve(lambda t, y: -y, torch.tensor(1.0, dtype=torch.float64), T3).ys
    assert ys.shape == (3,)
    torch.testing.assert_close(ys, torch.exp(-T3), rtol=0, atol=1e-7)


def test_state_without_dimensions_in_a_tuple():
    """A number may stand beside a matrix."""
    x, z = solve(lambda t, y: (-y[0], y[1]), (torch.tensor(1.0, dtype=torch.float64), GROWTH), T3).ys
    torch.testing.assert_close(x, torch.exp(-T3), rtol=0, atol=1e-7)
    torch.testing.assert_close(z, GROWN, rtol=0, atol=1e-7)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_one_time_gives_the_initial_state(method):
    """len(t) == 1: nothing to solve; the gradient of the result by y0 is one."""
    y0 = DECAY.clone().requires_grad_()
    ys = solve(lambda t, y: -y, y0, [0.5], method=method).ys
    assert torch.equal(ys, DECAY[None])
    assert torch.equal(torch.autograd.grad(ys.sum(), y0)[0], torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("step_control", ["joint", "per_sample"])
@pytest.mark.parametrize("gradient", ["direct", "adjoint", "checkpoint", "quadrature"])
def test_empty_batch(gradient, step_control):
    """No samples: an empty result of the right shape, and a gradient of the right shape."""
    y0 = torch.zeros(0, 3, requires_grad=True)
    ys = solve(lambda t, y: -y, y0, T3, gradient=gradient, step_control=step_control).ys
    assert ys.shape == (3, 0, 3)
    if ys.requires_grad:
        ys.sum().backward()
        assert y0.grad.shape == (0, 3)
    assert solve(lambda t, y: -y, y0, T3, method="rk4").ys.shape == (3, 0, 3)


def test_empty_leaf_beside_a_full_one():
    """An empty leaf does not disturb the others."""
    x, z = solve(lambda t, y: (-y[0], y[1]), (DECAY, torch.zeros(0, 2, dtype=torch.float64)), T3).ys
    assert z.shape == (3, 0, 2)
    torch.testing.assert_close(x, DECAYED, rtol=0, atol=1e-7)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_initial_state_that_is_not_contiguous(method):
    """Transposed and strided initial states are read by value and not written."""
    base = torch.arange(1.0, 13.0, dtype=torch.float64).reshape(3, 4)
    before = base.clone()
    t = torch.linspace(0.0, 1.0, 101, dtype=torch.float64)
    for y0 in (base.t(), base[:, ::2], base[0].expand(2, 4)):
        ys = solve(lambda t, y: -y, y0, t, method=method).ys
        torch.testing.assert_close(ys[-1], y0 * math.exp(-1), rtol=1e-7, atol=0)
    assert torch.equal(base, before)


def test_initial_state_changed_after_the_solve():
    """The solution does not look into y0 any more once solve has returned."""
    y0 = DECAY.clone()
    solution = solve(lambda t, y: -y, y0, T3, dense=True)
    single = solve(lambda t, y: -y, y0, [0.0])
    y0.zero_()
    torch.testing.assert_close(solution.interpolant(0.0), DECAY, rtol=0, atol=0)
    torch.testing.assert_close(single.ys[0], DECAY, rtol=0, atol=0)
    torch.testing.assert_close(single.y_last, DECAY, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("first", [torch.float32, torch.float64], ids=["float32 first", "float64 first"])
def test_leaves_of_two_types(first, method):
    """Leaves of float32 and float64 are solved, each in its type, or refused in words; never read as the other type."""
    dtypes = (first, torch.float64 if first == torch.float32 else torch.float32)
    y0 = tuple(torch.full((2,), 1.5, dtype=dtype) for dtype in dtypes)
    options = {"step_size": 0.05} if method == "rk4" else {"rtol": 1e-5, "atol": 1e-5}
    try:
        ys = solve(lambda t, y: (-y[0], y[1]), y0, T3, method=method, **options).ys
    except (TypeError, ValueError, NotImplementedError) as error:
        assert "y0" in str(error) and "float32" in str(error)
        return
    assert tuple(leaf.dtype for leaf in ys) == dtypes
    for leaf, sign in zip(ys, (-1, 1), strict=True):
        torch.testing.assert_close(leaf.double(), 1.5 * torch.exp(sign * T3)[:, None].expand(3, 2), rtol=1e-4, atol=0)


# ---- what func returns ----

BUFFER = torch.empty(2, dtype=torch.float64)
CONSTANT = torch.tensor([2.0, -1.0], dtype=torch.float64)


def same_buffer(t, y):
    """Writes each result into one and the same memory."""
    return torch.mul(y, -t, out=BUFFER)


RETURNS = {
    "its argument": (lambda t, y: y, lambda t: DECAY * torch.exp(t)[:, None]),
    "a view of its argument": (lambda t, y: y.view(2, 1)[:, 0], lambda t: DECAY * torch.exp(t)[:, None]),
    "a reversed copy": (
        lambda t, y: y.flip(0),
        lambda t: (3 * torch.exp(t)[:, None] + torch.stack([-torch.exp(-t), torch.exp(-t)], 1)) / 2,
    ),
    "a constant": (lambda t, y: CONSTANT, lambda t: DECAY + CONSTANT * t[:, None]),
    "an expanded number": (lambda t, y: CONSTANT[:1].expand(2), lambda t: DECAY + 2 * t[:, None]),
    "one buffer": (same_buffer, lambda t: DECAY * torch.exp(-t * t / 2)[:, None]),
}


@pytest.mark.parametrize("step_control", ["joint", "per_sample", "fixed"])
@pytest.mark.parametrize("name", RETURNS)
def test_what_func_may_return(name, step_control):
    """Arguments, views, constants and reused buffers all give the right answer."""
    func, exact = RETURNS[name]
    y0, t = DECAY, torch.linspace(0.0, 1.0, 6, dtype=torch.float64)
    if step_control == "per_sample":
        if name in ("a reversed copy", "one buffer"):
            pytest.skip("couples the samples, or is made for one shape of t")
        y0, given = DECAY[:, None], func
        if name == "a view of its argument":
            func = lambda t, y: y.view(1, 2).view(2, 1)  # noqa: E731
        elif name != "its argument":
            func = lambda t, y: given(t, y)[:, None]  # noqa: E731
    options = {"method": "rk4", "step_size": 0.01} if step_control == "fixed" else {"step_control": step_control}
    ys = solve(func, y0, t, **options).ys.reshape(6, 2)
    torch.testing.assert_close(ys, exact(t), rtol=2 * SOLVED, atol=0)  # most of it the interpolant's, between steps


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "dopri5"])
def test_gradients_of_times_where_func_returns_one_buffer(method):
    """They are made of slopes, which func must not overwrite, not by NumPy either, of which torch knows nothing."""
    memory = np.empty(2)

    def written(t, y):
        np.multiply(y.detach().numpy(), -float(t.detach()), out=memory)
        return torch.from_numpy(memory)

    found = []
    for func in (written, lambda t, y: -t.detach() * y.detach()):
        t = torch.linspace(0.5, 2.0, 5, dtype=torch.float64).requires_grad_()
        ys = solve(func, DECAY, t, method=method).ys
        found.append(torch.autograd.grad((ys * torch.arange(5.0)[:, None]).sum(), t)[0])
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


def test_func_by_numpy():
    """Where nothing requires a gradient func may leave torch: its arguments require none either."""
    ys = solve(lambda t, y: torch.from_numpy(-y.numpy() * float(t)), DECAY, T3).ys
    torch.testing.assert_close(ys, DECAY * torch.exp(-T3 * T3 / 2)[:, None], rtol=SOLVED, atol=0)


@pytest.mark.parametrize("gradient", ["direct", "adjoint", "checkpoint", "quadrature"])
def test_gradient_where_func_returns_its_argument(gradient):
    """y' = y written as ``return y``: dy(1)/dy0 is e."""
    y0 = DECAY.clone().requires_grad_()
    ys = solve(lambda t, y: y, y0, [0.0, 1.0], gradient=gradient).ys
    torch.testing.assert_close(torch.autograd.grad(ys[-1].sum(), y0)[0], torch.full_like(y0, math.e), rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "rk4", "euler"])
def test_positions_and_velocities(method):
    """func returns (v, a) for (x, v): the slope of x is the other argument itself."""
    t = torch.linspace(0.0, 1.0, 6, dtype=torch.float64)
    options = {"step_size": 1e-3 if method == "rk4" else 1e-4} if method in FIXED_METHODS else {}
    x0, v0 = torch.tensor([1.0], dtype=torch.float64), torch.tensor([0.0], dtype=torch.float64)
    x, v = solve(lambda t, y: (y[1], -y[0]), (x0, v0), t, method=method, **options).ys
    atol = 1e-4 if method == "euler" else SOLVED
    torch.testing.assert_close(x[:, 0], torch.cos(t), rtol=0, atol=atol)
    torch.testing.assert_close(v[:, 0], -torch.sin(t), rtol=0, atol=atol)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_slope_that_is_part_of_another_leaf(method):
    """The slope of one leaf is a slice inside another leaf's memory, which is written again at the next stage."""
    x0 = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    z0 = torch.zeros(2, dtype=torch.float64)
    options = {"step_size": 0.01} if method == "rk4" else {}
    x, z = solve(lambda t, y: (-y[0], y[0][1:]), (x0, z0), T3, method=method, **options).ys
    torch.testing.assert_close(x, x0 * torch.exp(-T3)[:, None], rtol=0, atol=1e-7)
    torch.testing.assert_close(z, x0[1:] * (1 - torch.exp(-T3))[:, None], rtol=0, atol=1e-7)


@pytest.mark.parametrize("step_control", ["joint", "per_sample", "fixed"])
def test_slope_that_is_the_time_itself(step_control):
    """y' = t written as ``return t``, or as a view of it, whose memory holds other times at the next step."""
    t = torch.linspace(0.0, 2.0, 5, dtype=torch.float64)
    options = {"method": "rk4", "step_size": 0.1} if step_control == "fixed" else {"step_control": step_control}
    # The other leaf makes the steps many.
    func = lambda t, y: (-10 * y[0], t if step_control != "per_sample" else t[:, 0])  # noqa: E731
    clock = torch.zeros(3 if step_control == "per_sample" else (), dtype=torch.float64)
    ys = solve(func, (torch.ones(3, 1, dtype=torch.float64), clock), t, **options).ys[1]
    exact = (t * t / 2).reshape(5, *[1] * clock.dim()).expand_as(ys)
    torch.testing.assert_close(ys, exact, rtol=0, atol=SOLVED)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_func_sees_time_without_dimensions_in_the_type_of_the_state(method, dtype):
    """t is a 0-dimensional tensor of y's dtype, whatever the dtype of the times."""
    for t in (
        torch.linspace(0, 1, 3, dtype=torch.float32),
        torch.linspace(0, 1, 3, dtype=torch.float64),
        [0.0, 0.5, 1.0],
    ):
        func = Recording(lambda t, y: -y * t)
        ys = solve(func, torch.ones(2, dtype=dtype), t, method=method, rtol=1e-4, atol=1e-4).ys
        assert {(tuple(seen.shape), seen.dtype) for seen in func.seen} == {((), dtype)}
        assert ys.dtype == dtype


# ---- step control ----


@pytest.mark.parametrize("controller", ["I", "PI", "PID", (0.3, 0.4, 0.0), (0.0, 1.0, 0.0)], ids=str)
def test_controllers_reach_the_tolerance(controller):
    """Every controller solves van der Pol's equation as dopri8 does at a far smaller tolerance."""
    field = VanDerPol(torch.tensor([[5.0]], dtype=torch.float64))
    y0 = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    reference = solve(field, y0, [0.0, 10.0], method="dopri8", rtol=1e-12, atol=1e-12).ys
    solution = solve(field, y0, [0.0, 10.0], controller=controller, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(solution.ys[-1], reference[-1], rtol=0, atol=1e-5)


def test_the_classical_controller_by_its_coefficients():
    """(0, 1, 0) is "I"."""
    field, y0 = VanDerPol(torch.tensor([[5.0]], dtype=torch.float64)), torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    by_name = solve(field, y0, [0.0, 10.0], controller="I")
    by_number = solve(field, y0, [0.0, 10.0], controller=(0.0, 1.0, 0.0))
    assert torch.equal(by_name.ys, by_number.ys) and by_name.stats.nfe == by_number.stats.nfe


@pytest.mark.parametrize("controller", ["I", "PI", "PID"])
def test_step_sizes_follow_the_controller(controller):
    """The ratio of two steps is the factor that the formula of the controller gives for the error worked out here."""
    problem = PROBLEMS["logistic"]
    func = Steps(problem.func)
    tol, order, safety = 1e-6, 5, 0.9
    solve(func, problem.y0, [0.0, 3.0], controller=controller, rtol=tol, atol=tol)
    p, i, d = {"I": (0, 1, 0), "PI": (0.4, 0.3, 0), "PID": (1 / 18, 1 / 9, 1 / 18)}[controller]
    assert not func.rejected and len(func.tried) > 5
    ratios = [error_ratio(problem.func, t0, y0, dt, tol) for t0, y0, dt in func.tried]
    before = [1.0, 1.0]
    for ratio, size, following in zip(ratios, func.sizes[:-2], func.sizes[1:-1], strict=False):
        factor = safety * ratio ** (-(p + i + d) / order) * before[-1] ** ((p + 2 * d) / order) * before[-2] ** (-d / order)
        low = 1.0 if controller == "I" else 0.2
        assert following / size == pytest.approx(min(10.0, max(low, factor)), rel=1e-6)
        before.append(ratio)


def error_ratio(func, t0, y0, dt, tol):
    """The error ratio of one step of the Dormand-Prince pair, by its own tableau (Dormand and Prince 1980)."""
    c = [0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1]
    a = [
        [],
        [1 / 5],
        [3 / 40, 9 / 40],
        [44 / 45, -56 / 15, 32 / 9],
        [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729],
        [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656],
        [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84],
    ]
    # Shampine's embedded weights (1986), which torchdiffeq uses.
    embedded = [1951 / 21600, 0, 22642 / 50085, 451 / 720, -12231 / 42400, 649 / 6300, 1 / 60]
    k = []
    for node, row in zip(c, a, strict=True):
        y = y0 + dt * sum(weight * slope for weight, slope in zip(row, k, strict=True))
        k.append(func(torch.tensor(t0 + node * dt, dtype=torch.float64), y))
    error = dt * sum((w - v) * slope for w, v, slope in zip([*a[-1], 0], embedded, k, strict=True))
    return float((error / (tol + tol * torch.maximum(y0.abs(), y.abs()))).square().mean().sqrt())


def test_first_step():
    """The first step tried is the one given, and then no evaluation is spent on guessing it."""
    problem = PROBLEMS["cosine"]
    func = Steps(problem.func)
    given = solve(func, problem.y0, [0.0, 1.0], first_step=0.0625)
    assert func.sizes[0] == 0.0625
    assert given.stats.nfe == 1 + 6 * len(func.tried)
    assert relative_error(given.ys, problem.exact(given.t))[-1] < 1e-6


def test_min_step_is_accepted_whatever_its_error():
    """No step is shorter than min_step but the last, and steps of that size are never rejected."""
    problem = PROBLEMS["oscillator"]
    func = Steps(problem.func)
    solution = solve(func, problem.y0, [0.0, 1.0], rtol=1e-14, atol=1e-14, min_step=0.07)
    assert not func.rejected
    assert solution.stats.num_accepted == 15
    assert all(size == pytest.approx(0.07, abs=ROUNDING) for size in func.sizes[:-1])
    assert func.sizes[-1] == pytest.approx(0.02, abs=ROUNDING)


def test_max_step():
    """No step is longer than max_step."""
    problem = PROBLEMS["cosine"]
    func = Steps(problem.func)
    solution = solve(func, problem.y0, [0.0, 1.0], rtol=1e-2, atol=1e-2, max_step=0.125, first_step=10.0)
    assert func.sizes == [0.125] * 8 and solution.stats.num_accepted == 8


def test_max_num_steps_counts_from_output_to_output():
    """Nine intervals of at most 30 tries each succeed where one with the same limit does not."""
    problem = PROBLEMS["oscillator"]
    options = {"max_num_steps": 30, "rtol": 1e-8, "atol": 1e-8}
    t = torch.linspace(0.0, 4.0, 10, dtype=torch.float64)
    solution = solve(problem.func, problem.y0, t, **options)
    assert solution.stats.num_accepted > 30
    assert relative_error(solution.ys, problem.exact(t)).max() < 1e-6
    with pytest.raises(SolverError, match="max_num_steps exceeded"):
        solve(problem.func, problem.y0, [0.0, 4.0], **options)


@pytest.mark.parametrize("sign", [1, -1], ids=["forwards", "backwards"])
@pytest.mark.parametrize("kind", [list, tuple, lambda x: torch.tensor(x, dtype=torch.float64)], ids=["list", "tuple", "tensor"])
def test_step_t(sign, kind):
    """Steps end exactly at each of step_t; times outside of the interval are passed over."""
    problem = PROBLEMS["cosine"]
    func = Steps(problem.func)
    stops = [sign * x for x in (0.7, 0.3, -1.0, 5.0)]
    solution = solve(func, problem.y0, [0.0, sign * 1.0], step_t=kind(stops), rtol=1e-4, atol=1e-4)
    starts = [t0 for t0, _, _ in func.accepted]
    assert sign * 0.3 in starts and sign * 0.7 in starts
    assert relative_error(solution.ys, problem.exact(solution.t))[-1] < 1e-3


def jumping(t, y):
    """y' = 1 before t = 1, -5 up to t = 2, then y."""
    return torch.where(t < 1, torch.ones_like(y), torch.where(t < 2, torch.full_like(y, -5.0), y))


def jumping_exact(t: torch.Tensor) -> torch.Tensor:
    """From y(0) = 3."""
    return torch.where(t < 1, 3 + t, torch.where(t < 2, 4 - 5 * (t - 1), -torch.exp(t - 2)))[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("sign", [1, -1], ids=["forwards", "backwards"])
@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
def test_jump_t(method, sign, dtype):
    """A field with two jumps: accurate, without a rejected step at the jumps, and evaluated only beside them."""
    tol = 1e-5 if dtype == torch.float32 or ORDERS[method] < 5 else 1e-9
    t = torch.tensor([0.0, 0.8, 1.0, 1.5, 2.0, 2.5], dtype=torch.float64)
    if sign < 0:
        t = t.flip(0)
    func = Recording(jumping)
    y0 = jumping_exact(t[:1])[0].to(dtype)
    options = {"rtol": tol, "atol": tol, "method": method, "jump_t": [1.0, 2.0], "max_step": 0.5}
    solution = solve(func, y0, t, **options)
    assert not {1.0, 2.0} & set(func.times)
    assert relative_error(solution.ys, jumping_exact(t)).max() <= 200 * tol
    without = solve(jumping, y0, t, **{**options, "jump_t": ()}, on_failure="return")
    assert without.stats.num_rejected > solution.stats.num_rejected


def test_jump_t_per_sample():
    """Every sample steps onto the jumps by itself."""
    t = torch.tensor([0.0, 0.8, 1.0, 1.5, 2.0, 2.5], dtype=torch.float64)
    y0 = torch.tensor([[3.0], [3.0], [3.0]], dtype=torch.float64)
    func = Recording(jumping)
    solution = solve(func, y0, t, jump_t=[1.0, 2.0], step_control="per_sample", rtol=1e-9, atol=1e-9)
    assert not {1.0, 2.0} & set(func.times)
    exact = jumping_exact(t)[:, None].expand(6, 3, 1)
    assert relative_error(solution.ys, exact).max() <= 1e-7


@pytest.mark.parametrize("method", FIXED_METHODS)
def test_perturb(method):
    """With perturb a grid that has the jumps as nodes sees only times inside its steps, and is exact for constants."""
    func = Recording(lambda t, y: torch.where(t < 1, torch.ones_like(y), torch.full_like(y, -5.0)))
    t = [0.0, 0.5, 1.0, 1.5, 2.0]
    ys = solve(func, torch.tensor([3.0], dtype=torch.float64), t, method=method, perturb=True).ys
    assert not {0.0, 0.5, 1.0, 1.5, 2.0} & set(func.times)
    expected = torch.tensor([3.0, 3.5, 4.0, 1.5, -1.0], dtype=torch.float64)
    torch.testing.assert_close(ys[:, 0], expected, rtol=0, atol=ROUNDING)


def test_step_size_and_grid_constructor():
    """A grid given as numbers is the grid of step_size, and its times are those of the calls."""
    problem = PROBLEMS["cosine"]
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    grid = torch.tensor([0.0, 0.4, 0.8, 1.0], dtype=torch.float64)
    by_size, by_grid = Recording(problem.func), Recording(problem.func)
    one = solve(by_size, problem.y0, t, method="euler", step_size=0.4).ys
    seen = []
    constructor = lambda func, y0, t: seen.append((func, y0, t)) or grid  # noqa: E731
    other = solve(by_grid, problem.y0, t, method="euler", grid_constructor=constructor).ys
    torch.testing.assert_close(one, other, rtol=0, atol=ROUNDING)
    assert by_grid.times == pytest.approx([0.0, 0.4, 0.8], abs=ROUNDING)
    assert seen[0][0] is by_grid and torch.equal(seen[0][1], problem.y0) and torch.equal(seen[0][2], t)


# ---- norms and tolerances ----


def largest(y):
    """The maximum norm of a tensor or a tuple."""
    parts = y if isinstance(y, tuple) else (y,)
    return torch.stack([part.abs().max() for part in parts]).max()


def test_norm_that_is_the_default():
    """The root mean square as a user's norm takes the same steps as the kernels' own."""
    problem = PROBLEMS["linear_system"]
    own = solve(problem.func, problem.y0, [0.0, 2.0])
    given = solve(problem.func, problem.y0, [0.0, 2.0], norm=lambda y: y.square().mean().sqrt())
    assert own.stats.nfe == given.stats.nfe
    torch.testing.assert_close(own.ys, given.ys, rtol=0, atol=ROUNDING)


def test_norm_of_a_tuple():
    """A user's norm of a tuple state gets the tuple; a norm of the first part takes the steps of that part alone."""
    slow, fast = PROBLEMS["decay"], PROBLEMS["oscillator"]
    alone = solve(slow.func, slow.y0, [0.0, 2.0], norm=largest)
    func = lambda t, y: (slow.func(t, y[0]), fast.func(t, y[1]))  # noqa: E731
    both = solve(func, (slow.y0, fast.y0), [0.0, 2.0], norm=lambda y: y[0].abs().max())
    assert both.stats.nfe == alone.stats.nfe
    torch.testing.assert_close(both.ys[0], alone.ys, rtol=0, atol=ROUNDING)


def test_tolerances_of_each_element():
    """An element with an endless tolerance plays no part; the others are solved as if it were not there."""
    problem = PROBLEMS["decay"]
    rates = torch.tensor([1.0, 1.0, 50.0], dtype=torch.float64)
    options = {"norm": largest, "rtol": 1e-6}
    alone = solve(lambda t, y: -y, problem.y0[:2], [0.0, 2.0], atol=1e-6, **options)
    atol = torch.tensor([1e-6, 1e-6, 1e30], dtype=torch.float64)
    all_three = solve(lambda t, y: -rates * y, problem.y0 * torch.tensor([1.0, 1.0, 1e-3]), [0.0, 2.0], atol=atol, **options)
    assert alone.stats.nfe == all_three.stats.nfe
    torch.testing.assert_close(all_three.ys[:, :2], alone.ys, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["numbers", "tensors"])
def test_tolerances_of_each_leaf(as_tensor):
    """A leaf with an endless tolerance plays no part in the steps of the other."""
    slow, fast = PROBLEMS["decay"], PROBLEMS["oscillator"]
    rtol, atol = (1e-6, 0.0), (1e-6, 1e30)
    if as_tensor:
        rtol, atol = tuple(torch.tensor(x).double() for x in rtol), tuple(torch.tensor(x).double() for x in atol)
    alone = solve(slow.func, slow.y0, [0.0, 2.0], rtol=1e-6, atol=1e-6)
    func = lambda t, y: (slow.func(t, y[0]), fast.func(t, y[1]))  # noqa: E731
    both = solve(func, (slow.y0, fast.y0), [0.0, 2.0], rtol=rtol, atol=atol)
    assert both.stats.nfe == alone.stats.nfe
    torch.testing.assert_close(both.ys[0], alone.ys, rtol=0, atol=ROUNDING)


def test_tensor_tolerance_equal_everywhere():
    """A tolerance given for every element takes the steps of the number."""
    problem = PROBLEMS["linear_system"]
    number = solve(problem.func, problem.y0, [0.0, 2.0], rtol=1e-6, atol=1e-8)
    tensor = solve(
        problem.func, problem.y0, [0.0, 2.0], rtol=torch.full((2,), 1e-6).double(), atol=torch.full((2,), 1e-8).double()
    )
    assert number.stats.nfe == tensor.stats.nfe
    torch.testing.assert_close(number.ys, tensor.ys, rtol=0, atol=ROUNDING)


# ---- interpolant, statistics, failures, callbacks ----


@pytest.mark.parametrize("sign", [1, -1], ids=["forwards", "backwards"])
@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
def test_interpolant(method, sign):
    """dense=True: any time, number or tensor, and the outputs themselves at their times."""
    problem, tol = PROBLEMS["logistic"], tolerance(method)
    t = sign * torch.tensor([0.0, 0.9, 2.0], dtype=torch.float64)
    solution = solve(problem.func, problem.y0, t, method=method, rtol=tol, atol=tol, dense=True)
    wanted = sign * torch.linspace(0.0, 2.0, 24, dtype=torch.float64).reshape(2, 3, 4)
    values = solution.interpolant(wanted)
    assert values.shape == (2, 3, 4, 2, 2)
    exact = problem.exact(wanted.reshape(-1)).reshape(values.shape)
    assert ((values - exact).abs() / (1 + exact.abs())).max() <= BETWEEN_FACTOR.get(method, DEFAULT_FACTOR) * tol
    torch.testing.assert_close(solution.interpolant(t), solution.ys, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(solution.interpolant(sign * 0.5), solution.interpolant(torch.tensor(sign * 0.5)))
    assert solution.interpolant(sign * 0.5).shape == (2, 2)
    assert solution.interpolant(torch.empty(0)).shape == (0, 2, 2)
    assert not solution.interpolant(sign * 0.5).requires_grad
    for outside in (-1e-3 * sign, 2.001 * sign, math.nan, torch.tensor([0.5 * sign, 3.0 * sign])):
        with pytest.raises(ValueError, match="t must lie in"):
            solution.interpolant(outside)
    assert solve(problem.func, problem.y0, t).interpolant is None


def test_interpolant_of_a_fixed_method_and_a_dict():
    """Fixed methods have an interpolant too, in the structure of the state."""
    solution = solve(lambda t, y: {"x": -y["x"]}, {"x": DECAY}, [0.0, 1.0], method="rk4", step_size=0.01, dense=True)
    t = torch.tensor([0.0, 0.123, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(solution.interpolant(t)["x"], DECAY * torch.exp(-t)[:, None], rtol=0, atol=1e-8)


def test_interpolant_per_sample():
    """Each sample is interpolated in its own steps."""
    rates = torch.tensor([[0.1], [1.0], [20.0]], dtype=torch.float64)
    y0 = torch.ones(3, 1, dtype=torch.float64)
    solution = solve(lambda t, y: -rates * y, y0, [0.0, 2.0], step_control="per_sample", dense=True, rtol=1e-8, atol=1e-8)
    t = torch.linspace(0.0, 2.0, 33, dtype=torch.float64)
    torch.testing.assert_close(solution.interpolant(t), torch.exp(-rates * t[:, None, None]), rtol=0, atol=1e-7)
    torch.testing.assert_close(solution.interpolant(0.25), torch.exp(-rates * 0.25), rtol=0, atol=1e-7)


def test_interpolant_beside_a_gradient():
    """dense=True and a gradient do not get in each other's way."""
    y0 = DECAY.clone().requires_grad_()
    solution = solve(lambda t, y: -y, y0, T3, dense=True)
    torch.testing.assert_close(solution.interpolant(0.25), DECAY * math.exp(-0.25), rtol=0, atol=1e-7)
    grad = torch.autograd.grad(solution.ys[-1].sum(), y0)[0]
    torch.testing.assert_close(grad, torch.full_like(DECAY, math.exp(-1)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("gradient", [None, "direct", "adjoint", "checkpoint", "quadrature"])
@pytest.mark.parametrize("method", [*ADAPTIVE_METHODS, *FIXED_METHODS])
def test_stats(method, gradient):
    """nfe is the number of calls; tries are accepted or rejected ones."""
    problem = PROBLEMS["cosine"]
    func = Recording(problem.func)
    steps = Steps(func)
    adaptive = method in ADAPTIVE_METHODS
    options = {"rtol": 1e-4, "atol": 1e-4, "first_step": 1.5} if adaptive else {"step_size": 0.1}
    y0 = problem.y0.clone().requires_grad_(gradient is not None)
    with pytest.warns(UserWarning, match="callbacks") if not adaptive else pytest.MonkeyPatch.context():
        solution = solve(steps, y0, [0.0, 2.0], method=method, gradient=gradient or "direct", **options)
    stats = solution.stats
    assert stats.nfe == func.nfe
    assert stats.num_accepted + stats.num_rejected == len(steps.tried)
    if adaptive:
        assert (stats.num_accepted, stats.num_rejected) == (len(steps.accepted), len(steps.rejected))
        assert stats.num_rejected > 0
    else:
        assert (stats.num_accepted, stats.num_rejected) == (20, 0)
    assert stats.nfe_backward == 0
    if gradient is not None:
        before = func.nfe
        solution.ys[-1].sum().backward()
        assert stats.nfe_backward == func.nfe - before
        assert (stats.nfe_backward > 0) == (gradient != "direct")


def test_no_evaluation_is_wasted():
    """A solve for a gradient takes as many calls as one without, and a fixed method one a stage and step."""
    problem = PROBLEMS["cosine"]
    plain = solve(problem.func, problem.y0, [0.0, 2.0]).stats.nfe
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    with_gradient = solve(lambda t, y: scale * problem.func(t, y), problem.y0, [0.0, 2.0])
    assert with_gradient.stats.nfe == plain
    for method, stages in (("euler", 1), ("midpoint", 2), ("heun2", 2), ("heun3", 3), ("rk4", 4)):
        assert solve(problem.func, problem.y0, [0.0, 1.0], method=method, step_size=0.1).stats.nfe == 10 * stages


@pytest.mark.parametrize("structure", ["tensor", "tuple"])
def test_failure_that_returns(structure):
    """on_failure="return": the status says why, outputs that were reached are right, the others are NaN."""
    y0 = torch.tensor([1.0], dtype=torch.float64)
    t = torch.tensor([0.0, 0.25, 0.5, 1.5, 2.0], dtype=torch.float64)
    if structure == "tensor":
        solution = solve(lambda t, y: y * y, y0, t, on_failure="return", max_num_steps=500)
        ys, last = solution.ys, solution.y_last
    else:
        solution = solve(lambda t, y: (y[0] * y[0],), (y0,), t, on_failure="return", max_num_steps=500)
        (ys,), (last,) = solution.ys, solution.y_last
    assert solution.status in ("underflow in dt", "max_num_steps exceeded", "non-finite values")
    torch.testing.assert_close(ys[:3, 0], 1 / (1 - t[:3]), rtol=1e-5, atol=0)
    assert ys[3:].isnan().all()
    assert last.item() > 1e3


def test_failure_at_the_step_limit_has_the_state_that_was_reached():
    """The last accepted state solves the equation up to the time that was reached."""
    problem = PROBLEMS["decay"]
    with pytest.raises(SolverError) as caught:
        solve(problem.func, problem.y0, [0.0, 2.0], max_num_steps=5)
    solution = solve(problem.func, problem.y0, [0.0, 2.0], max_num_steps=5, on_failure="return")
    assert solution.status == caught.value.status == "max_num_steps exceeded"
    assert 0 < caught.value.t < 2
    reached = problem.exact(torch.tensor([caught.value.t]))[0]
    torch.testing.assert_close(caught.value.y, reached, rtol=1e-6, atol=0)
    torch.testing.assert_close(solution.y_last, reached, rtol=1e-6, atol=0)


def test_success():
    """A solve that went through says so, and its last state is its last output."""
    solution = solve(lambda t, y: -y, DECAY, T3, on_failure="return")
    assert solution.status == "success" and torch.equal(solution.y_last, solution.ys[-1])
    assert torch.equal(solution.t, T3)


@pytest.mark.parametrize("sign", [1, -1], ids=["forwards", "backwards"])
def test_callbacks(sign):
    """Each try is announced with its start, state and size, and then accepted or rejected with the same."""
    problem = PROBLEMS["cosine"]
    func = Steps(problem.func)
    solve(func, problem.y0, [0.0, sign * 2.0], rtol=1e-8, atol=1e-8, first_step=1.0)
    assert func.rejected and len(func.tried) == len(func.accepted) + len(func.rejected)
    assert all(dt > 0 for _, _, dt in func.tried)
    outcomes = {(t0, dt) for t0, _, dt in func.accepted + func.rejected}
    assert outcomes == {(t0, dt) for t0, _, dt in func.tried}
    time = 0.0
    for t0, y0, dt in func.accepted:
        assert t0 == pytest.approx(time, abs=ROUNDING)
        torch.testing.assert_close(y0, problem.exact(torch.tensor([t0]))[0], rtol=0, atol=1e-6)
        time = t0 + sign * dt
    assert time == pytest.approx(sign * 2.0, abs=ROUNDING)
    for t0, y0, _ in func.tried:
        torch.testing.assert_close(y0, problem.exact(torch.tensor([t0]))[0], rtol=0, atol=1e-6)


def test_callbacks_of_a_tuple_state_and_a_fixed_method():
    """The state is given in its structure; fixed methods call callback_step only and warn of the others."""
    func = Steps(lambda t, y: (-y[0], y[1]))
    with pytest.warns(UserWarning, match="does not support callbacks"):
        solve(func, (DECAY, GROWTH), [0.0, 0.5, 1.0], method="rk4")
    assert [(t0, dt) for t0, _, dt in func.tried] == [(0.0, 0.5), (0.5, 0.5)]
    assert torch.equal(func.tried[0][1][0], DECAY) and torch.equal(func.tried[0][1][1], GROWTH)
    assert not func.accepted and not func.rejected


def test_callbacks_leave_the_solve_as_it_is():
    """A callback may write into the state it is given: it is a copy."""
    problem = PROBLEMS["cosine"]

    class Writes(Steps):
        def callback_step(self, t0, y0, dt):
            y0.zero_()

    with_callback = solve(Writes(problem.func), problem.y0, [0.0, 2.0])
    assert torch.equal(with_callback.ys, solve(problem.func, problem.y0, [0.0, 2.0]).ys)


@pytest.mark.parametrize("times", [[0.0, 1.0], [1.0, 0.0]], ids=str)
@pytest.mark.parametrize(
    "options", [{"rtol": 1e-9}, {"rtol": 1e-9, "step_control": "per_sample"}, {"method": "rk4", "step_size": 0.01}]
)
def test_an_interpolant_evaluates_few_steps(monkeypatch, times, options):
    """Those in which its times lie, whose values are those of a walk through all."""
    y0 = torch.linspace(0.1, 1, 6, dtype=torch.float64).view(3, 2)
    found = solve(lambda t, y: torch.cos(9 * t) * y, y0, times, dense=True, **options).interpolant
    wanted = torch.tensor([0.0, 0.123, 0.5, 0.77, 1.0, float(found.steps[3].t1[0])], dtype=torch.float64)
    few = found(wanted)
    with monkeypatch.context() as patch:
        patch.setattr(type(found), "_steps_with", lambda self, t: range(len(self.steps)))
        assert torch.equal(few, found(wanted))
    calls = []
    evaluate = formulas.dense_output
    monkeypatch.setattr(formulas, "dense_output", lambda *args: calls.append(1) or evaluate(*args))
    found(0.5)
    assert 1 <= len(calls) <= (2 if "step_control" not in options else 4) < len(found.steps)
