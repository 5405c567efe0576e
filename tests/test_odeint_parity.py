"""The drop-in functions against torchdiffeq 0.2.5, which is an oracle here and nothing the package needs."""

import math
import warnings

import pytest
import torch
from problems import FIXED_METHODS, ORDERS, PROBLEMS, Recording
from torch import nn

import odenet_cuda
from odenet_cuda import odeint, odeint_adjoint, odeint_dense

torchdiffeq = pytest.importorskip("torchdiffeq")

SHARED_ADAPTIVE = ("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun")  # tsit5 is not in 0.2.5
STAGES = {"dopri8": 13, "dopri5": 6, "bosh3": 3}  # calls a try; the other two differ on purpose
SAME = 1e-12  # float64, the same formulas in another order of summation
# Steps agree to rounding, so values do but for outputs in the last step, which is shortened here to land on the end.
TOLERANCES = {"dopri8": 1e-9, "dopri5": 1e-9, "bosh3": 1e-6, "fehlberg2": 1e-6, "adaptive_heun": 1e-6}
# fehlberg2 errs by about 1000 times its tolerance, and by other amounts here as its last slope is f(t1, y1) here.
FACTORS = {"fehlberg2": 2000.0, "dopri8": 100.0}


def direction(sign: int, *times: float) -> torch.Tensor:
    return sign * torch.tensor(times, dtype=torch.float64)


class Net(nn.Module):
    """A small smooth field that depends on t."""

    def __init__(self, width: int = 2, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.inner, self.outer = nn.Linear(width, 5).double(), nn.Linear(5, width).double()

    def forward(self, t, y):
        return self.outer(torch.tanh(self.inner(y))) * torch.cos(t)


class PairNet(Net):
    """The same for a tuple of two states."""

    def forward(self, t, y):
        x, z = y
        return super().forward(t, z), -x.sum() * torch.ones_like(z)


Y0 = torch.tensor([[0.3, -0.8], [1.1, 0.4], [-0.5, 0.9]], dtype=torch.float64)

# ---- values ----


@pytest.mark.parametrize("sign", [1, -1], ids=["forwards", "backwards"])
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("method", SHARED_ADAPTIVE)
def test_values_of_adaptive_methods(method, name, sign):
    """Both solve to the tolerance at the same times."""
    problem, tol = PROBLEMS[name], TOLERANCES[method]
    t = direction(sign, 0.0, 0.3, 1.0, 1.9, 2.0)
    ours = odeint(problem.func, problem.y0, t, method=method, rtol=tol, atol=tol)
    theirs = torchdiffeq.odeint(problem.func, problem.y0, t, method=method, rtol=tol, atol=tol)
    exact = problem.exact(t)
    factor = FACTORS.get(method, 10.0)
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    assert ((ours - exact).abs() / (1 + exact.abs())).max() <= factor * tol
    if method not in ("bosh3", "dopri5", "dopri8"):  # their interpolants of these are worse than ours
        torch.testing.assert_close(ours, theirs, rtol=2 * factor * tol, atol=2 * factor * tol)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("method", STAGES)
def test_steps_and_calls_of_adaptive_methods(method, name):
    """As many tries as torchdiffeq, but for the last, which may be spared or rejected as it lands on the end here."""
    problem, tol = PROBLEMS[name], 1e-5  # of dopri8 a tighter one leaves the error of the first step in the rounding
    t = direction(1, 0.0, 5.0)
    ours, theirs = Recording(problem.func), Recording(problem.func)
    odeint(ours, problem.y0, t, method=method, rtol=tol, atol=tol)
    torchdiffeq.odeint(theirs, problem.y0, t, method=method, rtol=tol, atol=tol)
    stages = STAGES[method]
    assert (ours.nfe - 2) % stages == 0
    assert abs(ours.nfe - theirs.nfe) <= 2 * stages
    # Up to the first try of theirs that goes beyond the end, the times of the calls are the same.
    beyond = next(i for i, time in enumerate(theirs.times) if time > 5.0)
    same = 2 + (beyond - 2) // stages * stages
    assert same > 2
    assert ours.times[:same] == pytest.approx(theirs.times[:same], rel=1e-4)


@pytest.mark.parametrize("sign", [1, -1], ids=["forwards", "backwards"])
@pytest.mark.parametrize("method", [*STAGES, "rk4"])
def test_complex_states(method, sign):
    """Complex states: calls at the same times, the same values, and times in the real type."""
    y0 = torch.complex(Y0, Y0.flip(1))
    func = lambda t, y: 1j * y * torch.cos(t) - 0.2 * y.conj()  # noqa: E731
    t = direction(sign, 0.0, 1.0, 2.0)
    ours, theirs = Recording(func), Recording(func)
    options = {"options": {"step_size": 0.125}} if method == "rk4" else {"rtol": 1e-5, "atol": 1e-5}
    mine = odeint(ours, y0, t, method=method, **options)
    other = torchdiffeq.odeint(theirs, y0, t, method=method, **options)
    assert mine.dtype == other.dtype and {x.dtype for x in ours.seen} == {x.dtype for x in theirs.seen}
    torch.testing.assert_close(mine, other, rtol=SAME if method == "rk4" else 1e-3, atol=SAME if method == "rk4" else 1e-3)
    same = theirs.nfe - 2 * STAGES.get(method, 0)
    assert ours.times[:same] == pytest.approx(theirs.times[:same], rel=1e-4, abs=1e-9)


def test_adaptive_options():
    """first_step, safety, ifactor, dfactor, max_step and dtype lead to calls at the same times."""
    problem = PROBLEMS["cosine"]
    t = direction(1, 0.0, 3.0)
    options = {
        "first_step": 0.5,
        "safety": 0.7,
        "ifactor": 2.0,
        "dfactor": 0.5,
        "max_step": 0.3,
        "dtype": torch.float64,
    }
    ours, theirs = Recording(problem.func), Recording(problem.func)
    odeint(ours, problem.y0, t, rtol=1e-8, atol=1e-8, options=options)
    torchdiffeq.odeint(theirs, problem.y0, t, rtol=1e-8, atol=1e-8, options=options)
    same = theirs.nfe - 12
    assert ours.times[:same] == pytest.approx(theirs.times[:same], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("sign", [1, -1], ids=["forwards", "backwards"])
def test_step_t_and_jump_t(sign):
    """Steps end at step_t and jump_t, and f is evaluated beside a jump, in the same places."""
    t = direction(sign, 0.0, 2.0)
    options = {"step_t": direction(sign, 0.4), "jump_t": direction(sign, 1.0), "first_step": 0.1}
    func = lambda t, y: torch.where(sign * t < 1, y, -2 * y)  # noqa: E731
    ours, theirs = Recording(func), Recording(func)
    y0 = torch.ones(1, dtype=torch.float64)
    mine = odeint(ours, y0, t, options=options)
    other = torchdiffeq.odeint(theirs, y0, t, options=options)
    torch.testing.assert_close(mine, other, rtol=1e-6, atol=0)
    torch.testing.assert_close(mine[-1], torch.exp(torch.tensor([sign * -1.0])).double(), rtol=1e-6, atol=0)
    same = theirs.nfe - 12
    assert ours.times[:same] == pytest.approx(theirs.times[:same], rel=1e-6, abs=1e-9)


def test_norm():
    """A user's norm leads to the same steps."""
    problem = PROBLEMS["linear_system"]
    t = direction(1, 0.0, 2.0)
    options = {"norm": lambda y: y.abs().max()}
    ours, theirs = Recording(problem.func), Recording(problem.func)
    mine = odeint(ours, problem.y0, t, options=options)
    other = torchdiffeq.odeint(theirs, problem.y0, t, options=options)
    torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
    same = theirs.nfe - 12
    assert ours.times[:same] == pytest.approx(theirs.times[:same], rel=1e-6, abs=1e-9)


def test_tuple_state_and_tolerances_of_parts():
    """The mixed norm and a tolerance for each part of a tuple lead to the same steps."""
    slow, fast = PROBLEMS["decay"], PROBLEMS["oscillator"]
    func = lambda t, y: (slow.func(t, y[0]), fast.func(t, y[1]))  # noqa: E731
    ours, theirs = Recording(func), Recording(func)
    t = direction(1, 0.0, 2.0)
    options = {"rtol": (1e-6, 1e-4), "atol": (1e-8, 1e-6)}
    mine = odeint(ours, (slow.y0, fast.y0), t, **options)
    other = torchdiffeq.odeint(theirs, (slow.y0, fast.y0), t, **options)
    assert isinstance(mine, tuple) and len(mine) == 2
    for problem, x, z in zip((slow, fast), mine, other, strict=True):
        torch.testing.assert_close(x, z, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(x, problem.exact(t), rtol=1e-4, atol=1e-5)
    same = theirs.nfe - 12
    assert ours.times[:same] == pytest.approx(theirs.times[:same], rel=1e-6, abs=1e-9)


FIXED_OPTIONS = {
    "the times": None,
    "step_size": {"step_size": 0.15},
    "grid_constructor": {"grid_constructor": lambda f, y0, t: torch.linspace(float(t[0]), float(t[-1]), 9).to(t)},
    "perturb": {"step_size": 0.15, "perturb": True},
    "cubic": {"step_size": 0.15, "interp": "cubic"},
    "linear": {"step_size": 0.15, "interp": "linear"},
    "cubic on the times": {"interp": "cubic"},
}


@pytest.mark.parametrize("sign", [1, -1], ids=["forwards", "backwards"])
@pytest.mark.parametrize("options", FIXED_OPTIONS)
@pytest.mark.parametrize("method", FIXED_METHODS)
def test_fixed_methods_are_equal(method, options, sign):
    """Fixed methods give the same numbers at the same calls."""
    net = Net()
    ours, theirs = Recording(net), Recording(net)
    t = direction(sign, 0.0, 0.31, 0.5, 1.0)
    given = FIXED_OPTIONS[options]
    with torch.no_grad():
        mine = odeint(ours, Y0, t, method=method, options=given)
        other = torchdiffeq.odeint(theirs, Y0, t, method=method, options=given)
    torch.testing.assert_close(mine, other, rtol=0, atol=SAME)
    if "cubic" not in options:  # there the slope at the end is evaluated once more for each output
        assert ours.times == pytest.approx(theirs.times, abs=SAME)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_devices(device, dtype):
    """The same on every device and in both types."""
    net = Net().to(device, dtype)
    y0, t = Y0.to(device, dtype), torch.tensor([0.0, 0.5, 1.0], device=device, dtype=dtype)
    tol = 1e-5 if dtype == torch.float32 else 1e-9
    for method, factor in (("dopri5", 20), ("rk4", 1)):
        mine = odeint(net, y0, t, method=method, rtol=tol, atol=tol)
        other = torchdiffeq.odeint(net, y0, t, method=method, rtol=tol, atol=tol)
        assert mine.dtype == other.dtype and mine.device == other.device
        torch.testing.assert_close(mine, other, rtol=factor * tol, atol=factor * tol)


# ---- gradients ----

T_GRAD = (0.0, 0.4, 1.0)


def gradients(module, function, net, sign, tuple_state=False, **options):
    """dL/dy0, dL/dt and dL/dparams of one loss over all outputs."""
    y0, t = Y0.clone().requires_grad_(), direction(sign, *T_GRAD).requires_grad_()
    weights = torch.cos(torch.arange(18, dtype=torch.float64)).reshape(3, 3, 2)
    if tuple_state:
        second = (Y0 * 0.5).requires_grad_()
        x, z = getattr(module, function)(net, (y0, second), t, **options)
        loss = (x * weights).sum() + (z.square() * weights).sum()
        wanted = [y0, second, t, *net.parameters()]
    else:
        loss = (getattr(module, function)(net, y0, t, **options) * weights).sum()
        wanted = [y0, t, *net.parameters()]
    return torch.autograd.grad(loss, wanted)


def assert_gradients_agree(ours, theirs, tolerance):
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


SOLVED = {"rtol": 1e-9, "atol": 1e-9}
GRADIENT = 1e-6  # both gradients of solves at 1e-9; torchdiffeq's outputs in between err by more than that
ADJOINTS = {
    "default": {},
    "seminorm": {"adjoint_options": {"norm": "seminorm"}},
    "own tolerances": {"adjoint_rtol": 1e-8, "adjoint_atol": 1e-10},
    "own method": {"adjoint_method": "dopri8"},
    "own method and options": {"adjoint_method": "rk4", "adjoint_options": {"step_size": 0.01}},
    "own norm": {"adjoint_options": {"norm": lambda parts: max(part.abs().max() for part in parts)}},
    "options": {"options": {"first_step": 0.01, "safety": 0.8}},
}


@pytest.mark.parametrize("sign", [1, -1], ids=["forwards", "backwards"])
@pytest.mark.parametrize("name", ADJOINTS)
def test_adjoint_gradients(name, sign):
    """y0, every t and the parameters get torchdiffeq's gradients, forwards and backwards in time."""
    net, options = Net(), {**SOLVED, **ADJOINTS[name]}
    ours = gradients(odenet_cuda, "odeint_adjoint", net, sign, **options)
    theirs = gradients(torchdiffeq, "odeint_adjoint", net, sign, **options)
    # torchdiffeq reads the ends of dopri8's long backward steps from an interpolant of order 4.
    assert_gradients_agree(ours, theirs, 1e-5 if name == "own method" else GRADIENT)


@pytest.mark.parametrize("name", ["default", "seminorm", "own method"])
def test_adjoint_gradients_of_tuples(name):
    """A tuple state."""
    net, options = PairNet(), {**SOLVED, **ADJOINTS[name]}
    ours = gradients(odenet_cuda, "odeint_adjoint", net, 1, tuple_state=True, **options)
    theirs = gradients(torchdiffeq, "odeint_adjoint", net, 1, tuple_state=True, **options)
    assert_gradients_agree(ours, theirs, GRADIENT)


def test_adjoint_norm_of_a_tuple_gets_its_parts():
    """A user's norm of the backward solve gets (t, *y, *adjoint, *params), shaped as they are."""
    seen = []
    net = PairNet()

    def norm(parts):
        seen.append([tuple(part.shape) for part in parts])
        return max(part.abs().max() for part in parts)

    options = {**SOLVED, "adjoint_options": {"norm": norm}}
    ours = gradients(odenet_cuda, "odeint_adjoint", net, 1, tuple_state=True, **options)
    mine = seen.copy()
    seen.clear()
    theirs = gradients(torchdiffeq, "odeint_adjoint", net, 1, tuple_state=True, **options)
    assert mine[0] == seen[0] == [(), (3, 2), (3, 2), (3, 2), (3, 2), (5, 2), (5,), (2, 5), (2,)]
    assert_gradients_agree(ours, theirs, GRADIENT)


@pytest.mark.parametrize("method", FIXED_METHODS)
@pytest.mark.parametrize("step_size", [None, 0.1], ids=["the times", "step_size"])
@pytest.mark.parametrize("sign", [1, -1], ids=["forwards", "backwards"])
def test_adjoint_gradients_of_fixed_methods(method, step_size, sign):
    """On a grid both adjoints are one computation for y0 and the parameters; dL/dt[0] is another discrete sum there."""
    net = Net()
    options = {"method": method, "options": None if step_size is None else {"step_size": step_size}}
    ours = gradients(odenet_cuda, "odeint_adjoint", net, sign, **options)
    theirs = gradients(torchdiffeq, "odeint_adjoint", net, sign, **options)
    assert_gradients_agree((ours[0], ours[1][1:], *ours[2:]), (theirs[0], theirs[1][1:], *theirs[2:]), 1e-10)


@pytest.mark.parametrize("method", FIXED_METHODS)
@pytest.mark.parametrize("options", ["the times", "step_size", "perturb", "cubic", "cubic on the times"])
@pytest.mark.parametrize("sign", [1, -1], ids=["forwards", "backwards"])
def test_direct_gradients_of_fixed_methods(method, options, sign):
    """The direct gradient by y0, t and parameters is that of autograd through torchdiffeq's steps."""
    net = Net()
    options = {"method": method, "options": FIXED_OPTIONS[options]}
    ours = gradients(odenet_cuda, "odeint", net, sign, **options)
    theirs = gradients(torchdiffeq, "odeint", net, sign, **options)
    assert_gradients_agree(ours, theirs, 1e-10)


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3"])
def test_direct_gradients_of_adaptive_methods(method):
    """The direct gradient by y0, t and parameters agrees with autograd through torchdiffeq's steps."""
    net = Net()
    options = {"rtol": 1e-11, "atol": 1e-11, "method": method} if ORDERS[method] >= 5 else {**SOLVED, "method": method}
    ours = gradients(odenet_cuda, "odeint", net, 1, **options)
    theirs = gradients(torchdiffeq, "odeint_adjoint", net, 1, rtol=1e-11, atol=1e-11)
    assert_gradients_agree(ours, theirs, GRADIENT)


def test_adjoint_params():
    """adjoint_params choose which tensors get gradients; one that is not used gets zeros."""
    weight = torch.tensor([0.7, 1.3], dtype=torch.float64, requires_grad=True)
    unused = torch.ones(3, dtype=torch.float64, requires_grad=True)
    frozen = torch.ones(3, dtype=torch.float64)
    func = lambda t, y: -weight * y  # noqa: E731
    t = direction(1, 0.0, 1.0)
    ys = odeint_adjoint(func, Y0, t, adjoint_params=(weight, unused, frozen), **SOLVED)
    by_weight, by_unused = torch.autograd.grad(ys[-1].sum(), (weight, unused))
    torch.testing.assert_close(by_weight, (-Y0 * torch.exp(-weight)).sum(0).detach(), rtol=1e-6, atol=1e-8)
    assert torch.equal(by_unused, torch.zeros(3, dtype=torch.float64))
    without = odeint_adjoint(func, Y0.clone().requires_grad_(), t, adjoint_params=(), **SOLVED)
    assert torch.autograd.grad(without[-1].sum(), weight, allow_unused=True) == (None,)


@pytest.mark.parametrize("module", [odenet_cuda, torchdiffeq], ids=["ours", "torchdiffeq"])
def test_unused_and_frozen_parameters_of_the_adjoint(module):
    """As there: unused parameters get zeros, frozen ones nothing."""
    net = Net()
    net.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    net.inner.bias.requires_grad_(False)
    module.odeint_adjoint(net, Y0, direction(1, 0.0, 1.0), **SOLVED)[-1].sum().backward()
    assert torch.equal(net.unused.grad, torch.zeros(2, dtype=torch.float64))
    assert net.inner.bias.grad is None and net.outer.weight.grad.abs().max() > 0


def test_adjoint_callbacks():
    """The callbacks of the backward solve are called as often as its tries, with (t, y, adjoint, *params)."""

    class Calls(Net):
        def __init__(self):
            super().__init__()
            self.calls = {"step": [], "accept": [], "reject": []}

        def callback_step_adjoint(self, t0, y0, dt):
            self.calls["step"].append((float(t0), len(y0), [tuple(part.shape) for part in y0[1:3]], float(dt)))

        def callback_accept_step_adjoint(self, t0, y0, dt):
            self.calls["accept"].append(float(t0))

        def callback_reject_step_adjoint(self, t0, y0, dt):
            self.calls["reject"].append(float(t0))

    found = []
    for module in (odenet_cuda, torchdiffeq):
        net = Calls()
        module.odeint_adjoint(net, Y0.clone().requires_grad_(), direction(1, 0.0, 1.0), **SOLVED)[-1].sum().backward()
        assert len(net.calls["step"]) == len(net.calls["accept"]) + len(net.calls["reject"]) > 3
        found.append(net.calls)
    ours, theirs = (calls["step"] for calls in found)
    assert ours[0][:3] == theirs[0][:3] == (1.0, 7, [(3, 2), (3, 2)])
    assert abs(len(ours) - len(theirs)) <= 1
    assert [call[0] for call in ours[:-2]] == pytest.approx([call[0] for call in theirs[: len(ours) - 2]], rel=1e-5)


# ---- arguments ----


@pytest.mark.parametrize("function", [odeint, odeint_adjoint], ids=["odeint", "odeint_adjoint"])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_unknown_options_warn(function, method):
    """An option that the method does not know is warned of, and the solve goes on."""
    net = Net()
    with pytest.warns(UserWarning, match=r"Unexpected arguments \{'no_such_option': 1\}"):
        ys = function(net, Y0, direction(1, 0.0, 1.0), method=method, options={"no_such_option": 1})
    torch.testing.assert_close(ys, function(net, Y0, direction(1, 0.0, 1.0), method=method), rtol=0, atol=0)


def test_known_options_do_not_warn():
    """Every option of torchdiffeq is taken in silence, and the caller's dict is left as it was."""
    options = {
        "first_step": 0.1,
        "safety": 0.9,
        "ifactor": 10.0,
        "dfactor": 0.2,
        "max_num_steps": 1000,
        "min_step": 0,
        "max_step": math.inf,
        "dtype": torch.float64,
        "step_t": direction(1, 0.2),
        "jump_t": direction(1, 0.3),
        "norm": lambda y: y.abs().max(),
    }
    before = options.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        odeint(Net(), Y0, direction(1, 0.0, 1.0), options=options)
        odeint_adjoint(Net(), Y0, direction(1, 0.0, 1.0), options=options)
        odeint(Net(), Y0, direction(1, 0.0, 1.0), method="rk4", options={"step_size": 0.1, "perturb": True, "norm": max})
    assert options.keys() == before.keys() and all(options[key] is before[key] for key in before)


@pytest.mark.parametrize("module", [odenet_cuda, torchdiffeq], ids=["ours", "torchdiffeq"])
def test_adjoint_of_what_is_no_module(module):
    """Without adjoint_params the function must be a Module."""
    with pytest.raises(ValueError, match=r"must be an instance of nn\.Module to specify the adjoint parameters"):
        module.odeint_adjoint(lambda t, y: -y, Y0, direction(1, 0.0, 1.0))


@pytest.mark.parametrize("module", [odenet_cuda, torchdiffeq], ids=["ours", "torchdiffeq"])
def test_adjoint_method_without_its_options(module):
    """Options of one method are not guessed for another."""
    with pytest.raises(ValueError, match="adjoint_options"):
        module.odeint_adjoint(Net(), Y0, direction(1, 0.0, 1.0), options={"first_step": 0.1}, adjoint_method="bosh3")


def test_autograd_node_shows_the_adjoint_norm():
    """As torchdiffeq's own tests read it: the default norm, the seminorm, and a user's."""
    net, y0, t = Net(), Y0.clone().requires_grad_(), direction(1, 0.0, 1.0)
    one, two, three, five = (torch.full((2,), x, dtype=torch.float64) for x in (1.0, 2.0, 3.0, 5.0))
    zero = torch.zeros((), dtype=torch.float64)
    norm = odeint_adjoint(net, y0, t).grad_fn.adjoint_options["norm"]
    assert float(norm((zero, one, two, five))) == 5 and float(norm((zero + 7, one, two, five))) == 7
    norm = odeint_adjoint(net, y0, t, adjoint_options={"norm": "seminorm"}).grad_fn.adjoint_options["norm"]
    assert float(norm((zero, one, three, five))) == 3
    own = lambda parts: parts[0]  # noqa: E731
    assert odeint_adjoint(net, y0, t, adjoint_options={"norm": own}).grad_fn.adjoint_options["norm"] is own


def test_one_time():
    """A single time gives the initial state, as there."""
    for module in (odenet_cuda, torchdiffeq):
        assert torch.equal(module.odeint(Net(), Y0, direction(1, 0.5)), Y0[None])


@pytest.mark.parametrize("sign", [1, -1], ids=["forwards", "backwards"])
@pytest.mark.parametrize("method", [None, "dopri8", "bosh3", "rk4"])
def test_odeint_dense(method, sign):
    """A callable of one or many t, right everywhere between t0 and t1, by any method and in any structure."""
    problem = PROBLEMS["cosine"]
    options = {"step_size": 0.02} if method == "rk4" else None
    tol = 1e-7 if method == "bosh3" else 1e-9
    t0, t1 = torch.tensor(0.0), torch.tensor(sign * 2.0)
    func = lambda t, y: (problem.func(t, y[0]),)  # noqa: E731
    dense = odeint_dense(func, (problem.y0,), t0, t1, method=method, options=options, rtol=tol, atol=tol)
    t = sign * torch.linspace(0.0, 2.0, 41, dtype=torch.float64)
    torch.testing.assert_close(dense(t)[0], problem.exact(t), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dense(t[3])[0], problem.exact(t)[3], rtol=1e-6, atol=1e-6)


def test_odeint_dense_is_torchdiffeqs():
    """Numbers for t0 and t1, and the values that torchdiffeq's callable gives."""
    problem = PROBLEMS["linear_system"]
    ours = odeint_dense(problem.func, problem.y0, 0.0, 2.0, **SOLVED)
    t0, t1 = direction(1, 0.0, 2.0)
    theirs = torchdiffeq.odeint_dense(problem.func, problem.y0, t0, t1, **SOLVED)
    for t in torch.linspace(0.0, 2.0, 9, dtype=torch.float64):
        torch.testing.assert_close(ours(t), theirs(t).squeeze(), rtol=1e-7, atol=1e-7)
