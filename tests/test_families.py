"""Families of steps: methods that are no explicit Runge-Kutta method run through the same loop, with all that a solve offers.

Two stand for the rest. A linearly implicit one, given as a function in torch's operations; and one of two steps, which carries
a slope from step to step, as a family of its own.
"""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from graph_stand_ins import Capture, run_ahead
from torch import Tensor, nn

import odenet_cuda
from odenet_cuda import SolverError, methods, solve
from odenet_cuda.formulas import per_row
from odenet_cuda.ops import FIELDS
from odenet_cuda.solvers import adaptive, families
from odenet_cuda.solvers.families import family_of
from odenet_cuda.solvers.whole import WholeSteps
from odenet_cuda.tableau import StepFunction, hermite

D = torch.float64
CONTROLS = ["joint", "per_sample"]
NAMES = ["implicit", "two_step"]
NEAR = 4e-3  # of both methods of order 2, at tolerances of 1e-4; the errors of their steps add up
ROUNDING = 1e-12  # sums of the same numbers in another order


# ---- a linearly implicit method ----


def jacobian(field: Any, t: Tensor, y: list[Tensor], rows: int) -> Tensor:
    """df/dy of each row, [rows, n, n]; of joint control the whole state is one row."""
    recording = torch.is_grad_enabled()
    with torch.enable_grad():
        if not all(leaf.requires_grad for leaf in y):
            y = [leaf.detach().requires_grad_() for leaf in y]
        k = flat(field(t, y, 0), rows)
        lines = []
        for i in range(k.shape[1]):
            grads = torch.autograd.grad(k[:, i].sum(), y, retain_graph=True, create_graph=recording, materialize_grads=True)
            lines.append(flat(grads, rows))
        return torch.stack(lines, 1)


def flat(leaves: Any, rows: int) -> Tensor:
    return torch.cat([leaf.reshape(rows, -1) for leaf in leaves], 1)


def extrapolated_step(field: Any, t: Any, dt: Tensor, y0: list[Tensor], k0: list[Tensor], as_tensors: bool = False) -> Any:
    """Two linearly implicit Euler steps of half the size, and one of the whole for extrapolation, whose distance from them is
    the error: Deuflhard 1985, doi 10.1137/1027140."""
    rows = len(dt)

    def leaves(x: Tensor) -> list[Tensor]:
        parts = x.split([leaf.numel() // rows for leaf in y0], 1)
        return [part.reshape(leaf.shape) for part, leaf in zip(parts, y0, strict=True)]

    df, h, start = jacobian(field, t[0], y0, rows), dt.to(y0[0].dtype)[:, None], flat(y0, rows)
    one = torch.eye(start.shape[1], dtype=start.dtype)

    def solved(slopes: list[Tensor], size: Tensor) -> Tensor:
        return torch.linalg.solve(one - size[:, :, None] * df, flat(slopes, rows)[:, :, None])[:, :, 0]

    whole = solved(field(t[1], y0, 1), h)
    first = solved(field(t[2], y0, 2), h / 2)
    second = solved(field(t[3], leaves(start + h / 2 * first), 3), h / 2)
    y1 = leaves(start + h * (first + second - whole))
    error = leaves(h * ((first + second) / 2 - whole)) if as_tensors else None
    return y1, [leaves(whole), leaves(first), leaves(second), field(t[4], y1, 4)], error


IMPLICIT = StepFunction(
    order=2,
    c=(0.0, 1.0, 1 / 2, 1.0, 1.0),
    b=(0.0, -1.0, 1.0, 1.0, 0.0),
    e=(0.0, -1.0, 1 / 2, 1 / 2, 0.0),
    p=hermite((0.0, -1.0, 1.0, 1.0, 0.0)),
    p_order=2,
    step=extrapolated_step,
)
AS_TENSORS = replace(IMPLICIT, e=(), step=lambda *args: extrapolated_step(*args, as_tensors=True))


# ---- a method of two steps ----


@dataclass(frozen=True)
class TwoStep(StepFunction):
    """Adams and Bashforth's method of two steps of any sizes (Hairer, Norsett and Wanner I, III.5); its error is the distance
    from the trapezoidal rule."""


class TwoStepSteps:
    """before, size: the slope and the size of the last step of each row; a row that begins, or begins anew, has size 0."""

    looks, steers, calls = False, False, 1
    no_way_back, no_graph = "knows no integrals of parameters: give another adjoint_method", "moves on in Python"

    def __init__(self, method, problem, stepper, state, recorder, ahead):
        self.problem, self.stepper, self.state = problem, stepper, state

    @staticmethod
    def refusal(problem, recorder):
        if problem.quadratures or (recorder is not None and (recorder.graphs or recorder.checkpoints)):
            return "has no gradient of its own: use gradient='adjoint' with an explicit adjoint_method, or 'quadrature'"
        return ""

    def begin(self):
        self.before = [leaf.clone() for leaf in self.stepper.k[0]]
        self.size = torch.zeros_like(self.state[FIELDS["dt"]])

    def step(self, field, times, views):
        stepper, dt = self.stepper, self.state[FIELDS["dt"]].clone()
        self.tried = dt
        share = torch.where(self.size == 0, 0.0, dt / torch.where(self.size == 0, 1.0, self.size) / 2)
        slope = [k + per_row(share, k) * (k - old) for k, old in zip(stepper.k[0], self.before, strict=True)]
        stepper.kernels.bind_slopes(1, stepper.set_slopes(1, slope, True))
        stepper.kernels.stage(1, [])
        return (), stepper.set_slopes(2, field(views[2], stepper.y[1], 2), True)

    def error(self):
        k0, slope, k1 = self.stepper.k
        return [per_row(self.tried, z) * ((x + z) / 2 - y) for x, y, z in zip(k0, slope, k1, strict=True)]

    def moved(self, accept):
        self.before = [torch.where(self.rows(accept, x), x, old) for x, old in zip(self.stepper.k[0], self.before, strict=True)]
        self.size = torch.where(accept, self.tried, self.size)

    def rows(self, mask, leaf):
        return mask.reshape(-1, *[1] * (leaf.dim() - 1)) if self.problem.per_sample else mask[0]

    def advance(self):
        self.moved(self.state[FIELDS["accept"]] != 0)
        self.stepper.kernels.advance()

    def swap(self):
        self.moved(torch.ones(1, dtype=torch.bool))
        self.stepper.swap_accepted()

    def restart(self, rows):
        self.size = torch.where(rows, 0.0, self.size)


TWO_STEP = TwoStep(order=2, c=(0.0, 1.0, 1.0), b=(0.0, 1.0, 0.0), p=hermite((0.0, 1.0, 0.0)), p_order=2, step=lambda: None)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(families.FAMILIES, TwoStep, TwoStepSteps)
    for name, method in (("implicit", IMPLICIT), ("as_tensors", AS_TENSORS), ("two_step", TWO_STEP)):
        monkeypatch.setitem(methods.ADAPTIVE, name, method)
        monkeypatch.setitem(methods.INTERPOLATIONS["method"], name, method)
        monkeypatch.setitem(methods.INTERPOLATIONS["linear"], name, method.linear())
        monkeypatch.setitem(methods.INTERPOLATIONS["cubic"], name, method.cubic())


class Net(nn.Module):
    """A pendulum that is pushed, and follows a small net; samples on axis 0."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = nn.Linear(2, 2).to(D)
        self.count = 0

    def forward(self, t, y):
        self.count += 1
        return torch.tanh(self.layer(y)) + torch.stack([y[:, 1], -y[:, 0]], 1) + torch.cos(3 * t + 0 * y)


def start(requires_grad=False):
    y0 = torch.tensor([[1.0, 0.0], [-2.0, 1.0]], dtype=D)
    return y0.requires_grad_(requires_grad)


T = [0.0, 0.1, 0.35, 0.8]
TOLERANCES = {"rtol": 1e-4, "atol": 1e-4}


@torch.no_grad()
def plain(field, y0, t, **options):
    """A solve without gradients."""
    return solve(field, y0, t, **options)


def reference(field, y0, t=T, **options):
    return plain(field, y0, t, method="dopri8", rtol=1e-9, atol=1e-9, **options)


def near(found, expected, tolerance=NEAR):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# ---- what it solves ----


def test_a_family_by_the_type_of_its_method():
    assert family_of(IMPLICIT) is WholeSteps and family_of(TWO_STEP) is TwoStepSteps
    assert family_of(methods.DOPRI5) is not WholeSteps


@pytest.mark.parametrize("interp", ["method", "linear"])
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("method", NAMES)
def test_order(method, control, interp):
    """Of the end and of outputs inside steps: halving the step quarters the error."""
    errors = []
    exact = reference(Net(), start(), [0.0, 0.77, 0.8]).ys
    for steps in (20, 40):
        size = 0.8 / steps
        forced = {"first_step": size, "min_step": size, "max_step": size}
        ys = plain(Net(), start(), [0.0, 0.77, 0.8], method=method, step_control=control, interp=interp, **forced).ys
        errors.append((ys - exact).abs().amax((1, 2)))
    assert 3.4 < errors[0][2] / errors[1][2] < 4.8 and errors[1][1] < 2e-3


def test_a_stiff_problem():
    """y' = -500 (y - cos t) - sin t: an explicit method takes a step for every time constant, this one does not."""
    func = lambda t, y: -500 * (y - torch.cos(t)) - torch.sin(t)  # noqa: E731
    y0, t = torch.ones(2, 1, dtype=D), torch.tensor([0.0, 0.4, 1.0], dtype=D)
    for control in CONTROLS:
        implicit, explicit = (plain(func, y0, t, method=m, step_control=control, **TOLERANCES) for m in ("implicit", "bosh3"))
        near(implicit.ys, torch.cos(t)[:, None, None].expand(3, 2, 1))
        assert int(torch.as_tensor(explicit.stats.num_accepted).max()) > 5 * int(
            torch.as_tensor(implicit.stats.num_accepted).max()
        )


@pytest.mark.parametrize("control", CONTROLS)
def test_an_error_given_as_tensors(control):
    """The same steps and the same numbers, whether the kernel weighs the slopes or the norm of tensors is taken."""
    first, second = (plain(Net(), start(), T, method=m, step_control=control, **TOLERANCES) for m in ("implicit", "as_tensors"))
    near(first.ys, second.ys, ROUNDING)
    assert repr(first.stats) == repr(second.stats)


@pytest.mark.parametrize("options", [{}, {"controller": "PI", "step_t": [0.2, 0.5], "max_step": 0.1}], ids=str)
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("method", NAMES)
def test_outputs_and_interpolant(method, control, options):
    """Of tuples, inside steps and forwards and backwards in time."""
    field = Net()

    def func(t, state):
        y, z = state
        t = t.reshape(t.shape[0], *[1] * 1) if t.dim() else t
        return field(t, y), (y * y).sum(1) - z

    y0 = start(), torch.zeros(2, dtype=D)
    t = torch.tensor(T, dtype=D)
    for times in (t, 0.8 - t.flip(0)):
        expected = reference(func, y0, times, dense=True)
        found = plain(func, y0, times, method=method, step_control=control, dense=True, **TOLERANCES, **options)
        for x, exact in zip(found.ys, expected.ys, strict=True):
            near(x, exact, 3 * NEAR)
        for x, exact in zip(found.interpolant(0.21), expected.interpolant(0.21), strict=True):
            near(x, exact, 3 * NEAR)
        torch.testing.assert_close(found.interpolant(times)[0], found.ys[0], rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("norm", ["rtol", "norm"])
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("method", ["implicit", "as_tensors"])
def test_other_norms(method, control, norm):
    """Tolerances that are tensors, and the user's norm."""
    options: dict[str, Any] = {"atol": torch.full((2,), 1e-5), "rtol": 1e-5}
    if norm == "norm":
        options = {**TOLERANCES, "norm": lambda y: y.abs().amax() if control == "joint" else y.abs().amax(1)}
    near(plain(Net(), start(), T, method=method, step_control=control, **options).ys, reference(Net(), start()).ys)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("method", NAMES)
def test_discontinuities(method, control):
    """func is evaluated on the side of a jump that the step lies on; what a family carries along ends there."""

    def func(t, y):
        return torch.where(t < 0.7, -y, 3.0 + 0 * y)

    y0 = torch.tensor([[1.0], [4.0]], dtype=D)
    solution = plain(func, y0, [0.0, 0.7, 1.5], method=method, step_control=control, jump_t=[0.7], **TOLERANCES)
    before = y0 * torch.exp(torch.tensor(-0.7, dtype=D))
    near(solution.ys, torch.stack([y0, before, before + 3 * 0.8]))
    assert int(torch.as_tensor(solution.stats.num_rejected).max()) <= 2


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("method", NAMES)
def test_callbacks_failure_and_counts(method, control):
    field, seen = Net(), []
    field.callback_accept_step = lambda t, y, dt: seen.append(t)
    solution = plain(field, start(), T, method=method, step_control=control, **TOLERANCES)
    assert len(seen) >= int(torch.as_tensor(solution.stats.num_accepted).max())
    assert solution.stats.nfe == field.count
    blow_up = lambda t, y: y * y  # noqa: E731
    y0 = torch.tensor([[1.0], [0.1]], dtype=D)
    options = {"method": method, "step_control": control, "max_num_steps": 100, **TOLERANCES}
    with pytest.raises(SolverError):
        plain(blow_up, y0, [0.0, 0.5, 2.0], **options)
    failed = plain(blow_up, y0, [0.0, 0.5, 2.0], on_failure="return", **options)
    assert failed.ys[2, 0].isnan().all() and failed.status[0] != "success"
    near(failed.ys[1], y0 / (1 - 0.5 * y0), 3 * NEAR)
    if control == "per_sample":
        near(failed.ys[2, 1], y0[1] / (1 - 2 * y0[1]))


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("method", NAMES)
def test_where_the_host_runs_ahead(monkeypatch, method, control):
    """The same to the bit, and no graph holds the steps."""
    looked = plain(Net(), start(), T, method=method, step_control=control, **TOLERANCES)
    run_ahead(monkeypatch, Capture())
    with pytest.warns(UserWarning, match=family_of(methods.ADAPTIVE[method]).no_graph):
        ahead = plain(Net(), start(), T, method=method, step_control=control, cuda_graph=True, **TOLERANCES)
    assert torch.equal(ahead.ys, looked.ys) and repr(ahead.stats) == repr(looked.stats)


# ---- gradients ----


def forced(size):
    return {"first_step": size, "min_step": size, "max_step": size}


def by_hand(control, t, y0, w, steps):
    mixed = w * 2  # no leaf
    func = lambda t, y: torch.tanh(y @ mixed) + torch.sin(t) * y  # noqa: E731
    return solve(func, y0, t, method="implicit", step_control=control, gradient="direct", **forced(0.4 / steps)).ys


def weights():
    return torch.tensor([[0.3, -0.8], [0.5, 0.1]], dtype=D, requires_grad=True)


@pytest.mark.parametrize("control", CONTROLS)
def test_direct_is_exact(control):
    """The gradient of the steps as they were taken, by y0 and by what func closes over."""
    times = [0.0, 0.13, 0.25, 0.4]
    assert torch.autograd.gradcheck(lambda y0, w: by_hand(control, times, y0, w, 4), (start(True), weights()))


@pytest.mark.parametrize("control", CONTROLS)
def test_direct_by_times_is_exact(control):
    """One step, which moves with its ends, and outputs in it, which move with their own times."""
    t = torch.tensor([0.0, 0.13, 0.25, 0.4], dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: by_hand(control, t, start(), weights().detach(), 0.1), (t,))


@pytest.mark.parametrize("late", [False, True])
def test_what_func_depends_on_later(monkeypatch, late):
    """Only beyond some time: found where y0 has no gradient, and where a step calls func with gradients alone."""

    def recorded(*args):
        with torch.enable_grad():
            y1, slopes, error = extrapolated_step(*args)
        return [leaf.detach() for leaf in y1], [[leaf.detach() for leaf in k] for k in slopes], error

    def step(*args):
        return extrapolated_step(*args) if torch.is_grad_enabled() else recorded(*args)

    monkeypatch.setitem(methods.INTERPOLATIONS["method"], "implicit", replace(IMPLICIT, step=step))
    w, grads = weights(), []
    func = lambda t, y: -y + (t - 0.2) * (y @ w) if t > 0.2 or not late else -y  # noqa: E731
    for how in ({"method": "implicit", **TOLERANCES}, {"method": "dopri5", **TOLERANCES}):
        solve(func, start(), [0.0, 0.2, 0.4], gradient="direct", **how).ys.sum().backward()
        grads.append(w.grad)
        w.grad = None
    near(*grads)


@pytest.mark.parametrize("control", CONTROLS)
def test_second_derivatives(control):
    y0, t = start().requires_grad_(), torch.tensor([0.0, 0.13, 0.4], dtype=D, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda y0, w: by_hand(control, [0.0, 0.13, 0.4], y0, w, 1), (y0, weights()))
    assert torch.autograd.gradgradcheck(lambda t: by_hand(control, t, y0.detach(), weights().detach(), 0.1), (t,))


@pytest.mark.parametrize("options", [{}, {"jump_t": [0.2]}, {"rtol": 1e-3, "first_step": 2.0}], ids=str)
@pytest.mark.parametrize("control", CONTROLS)
def test_direct_of_a_whole_solve(control, options):
    """With rejected steps, jumps, and rows that end at different times."""
    grads = []
    for how in ({"method": "implicit", **TOLERANCES, **options}, {"method": "dopri8", "rtol": 1e-10, "atol": 1e-10}):
        field, y0 = Net(), start(True)
        ys = solve(field, y0, T, step_control=control, gradient="direct", **how).ys
        ys.square().sum().backward()
        grads.append([y0.grad, *(p.grad for p in field.parameters())])
    for x, exact in zip(*grads, strict=True):
        near(x, exact, 30 * NEAR if "rtol" in options else 10 * NEAR)


def test_direct_of_rows_that_failed():
    """The others have their gradients."""
    y0 = torch.tensor([[1.0], [0.1]], dtype=D, requires_grad=True)
    options = {"method": "implicit", "step_control": "per_sample", "max_num_steps": 100, **TOLERANCES}
    ys = solve(lambda t, y: y * y, y0, [0.0, 2.0], on_failure="return", **options).ys
    (grad,) = torch.autograd.grad(ys[1, 1].sum(), y0)
    near(grad, torch.tensor([[0.0], [1 / (1 - 0.2) ** 2]], dtype=D))


@pytest.mark.parametrize("control", CONTROLS)
def test_steps_are_made_again(control):
    """With the gradient of those that were taken."""
    found = []
    for gradient in ("direct", "checkpoint"):
        field, y0 = Net(), start(True)
        t = torch.tensor(T, dtype=D, requires_grad=True)
        solve(
            field, y0, t, method="implicit", step_control=control, gradient=gradient, **TOLERANCES
        ).ys.square().sum().backward()
        found.append([y0.grad, t.grad, *(p.grad for p in field.parameters())])
    for x, y in zip(*found, strict=True):
        near(x, y, ROUNDING)


@pytest.mark.parametrize("gradient", ["adjoint", "quadrature"])
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("method", NAMES)
def test_backwards_by_an_explicit_method(method, control, gradient):
    grads = []
    for how in (
        {"method": method, "gradient": gradient, "adjoint_method": "dopri5", **TOLERANCES},
        {"rtol": 1e-10, "atol": 1e-10},
    ):
        field, y0 = Net(), start(True)
        t = torch.tensor(T, dtype=D, requires_grad=True)
        solve(field, y0, t, step_control=control, **how).ys.square().sum().backward()
        grads.append([y0.grad, t.grad, *(p.grad for p in field.parameters())])
    for x, exact in zip(*grads, strict=True):
        near(x, exact, 30 * NEAR)


@pytest.mark.parametrize("method", NAMES)
def test_block(method):
    block = odenet_cuda.ODEBlock(Net(), method=method, gradient="adjoint", adjoint_method="dopri5", **TOLERANCES)
    with torch.no_grad():
        near(block(start()), reference(Net(), start(), [0.0, 1.0]).ys[-1])


# ---- what is refused ----

REFUSED = [
    ("implicit", {"regularizers": ["kinetic"]}, "'kinetic' and 'jacobian' need an explicit method"),
    ("implicit", {"regularizers": ["error"]}, "'error' and 'stiffness' need an explicit method"),
    ("two_step", {"gradient": "direct"}, "no gradient of its own"),
    ("two_step", {"gradient": "checkpoint"}, "no gradient of its own"),
    ("two_step", {"gradient": "adjoint"}, "another adjoint_method"),
]


@pytest.mark.parametrize(("method", "options", "words"), REFUSED, ids=str)
def test_refusals(monkeypatch, method, options, words):
    """In words, and before any kernel runs."""
    monkeypatch.setattr(adaptive, "Stepper", None)
    with pytest.raises(NotImplementedError, match=f"method='{method}' .*{words}"):
        solve(Net(), start(True), T, method=method, **options)


def test_refused_inside_transforms():
    field = Net()
    with pytest.raises(NotImplementedError, match=r"method='implicit' .*torch.func"):
        torch.func.jvp(lambda y0: solve(field, y0, T, method="implicit").ys, (start(),), (start(),))


def test_compiled_fields_leave_it_to_the_stepper():
    field = odenet_cuda.compile(Net())
    near(plain(field, start(), T, method="implicit", **TOLERANCES).ys, reference(Net(), start()).ys)
    assert "are not compiled" in str(field.explain())


WRONG = [
    ({"c": (0.1, 1.0, 0.5, 1.0, 1.0)}, "c must begin with 0 and end with 1"),
    ({"c": (0.0,)}, "c must have from 2 to 17 nodes, got 1"),
    ({"b": (1.0,)}, "b and p must have one entry a node"),
    ({"e": (1.0,)}, "e must be empty or have one entry a node"),
    ({"b": (1.0, -1.0, 1.0, 1.0, 0.0)}, "the interpolant ends in y1"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_data(change, message):
    with pytest.raises(ValueError, match=f"StepFunction: .*{message}"):
        replace(IMPLICIT, **change)
