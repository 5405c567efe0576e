"""gradient="reversible": the coupled scheme against itself in plain torch, its gradient by autograd through that and by finite
differences, what it keeps, where it fails, and what is refused."""

import warnings

import pytest
import torch
from torch import nn

import odenet_cuda
from odenet_cuda import Event, Jump, ODEBlock, SolverError, odeint, solve, tableaus
from odenet_cuda.solvers.trajectory import Step

D = torch.float64
ROUNDING = 1e-11  # of a few hundred steps forwards and back, 1 / coupling to the power of their number included
CONTROLS = ["joint", "per_sample"]
TABLEAUS = {"euler": tableaus.EULER, "midpoint": tableaus.MIDPOINT, "rk4": tableaus.RK4, "dopri5": tableaus.DOPRI5}
TABLEAUS |= {"bosh3": tableaus.BOSH3, "fehlberg2": tableaus.FEHLBERG2, "dopri8": tableaus.DOPRI8, "tsit5": tableaus.TSIT5}
Y0 = torch.tensor([[0.3, -0.8], [1.1, 0.4], [-0.5, 0.9]], dtype=D)
TIMES = torch.tensor([0.1, 0.35, 0.6, 1.3], dtype=D)
WEIGHTS = torch.cos(torch.arange(24, dtype=D)).reshape(4, 3, 2)


class Field(nn.Module):
    """A small network, driven by the time. steps: accepted, as (t0, dt)."""

    def __init__(self, dtype=D):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)
        self.steps = []

    def forward(self, t, y):
        return self.layers(y) * torch.cos(3 * t)


class Noted(Field):
    def callback_accept_step(self, t0, y0, dt):
        self.steps.append((float(t0), float(dt)))


def increment(tableau, func, t, dt, x):
    """psi of the scheme: what a step of size dt from (t, x) adds."""
    k = []
    for c, row in zip(tableau.c, tableau.a, strict=True):
        k.append(func(t + c * dt, x + dt * sum([w * slope for w, slope in zip(row, k, strict=True)], 0 * x)))
    return dt * sum(w * slope for w, slope in zip(tableau.b, k, strict=True))


def scheme(tableau, func, y0, nodes, coupling=0.999):
    """The states at the nodes, tensors, eq. (5) of McCallum and Foster."""
    y = z = y0
    ys = [y]
    for i in range(len(nodes) - 1):
        t0, t1 = nodes[i], nodes[i + 1]
        y = coupling * y + (1 - coupling) * z + increment(tableau, func, t0, t1 - t0, z)
        z = z - increment(tableau, func, t1, t0 - t1, y)
        ys.append(y)
    return torch.stack(ys)


def gradients(func, ys, y0, t):
    return torch.autograd.grad((ys * WEIGHTS[: len(ys)]).sum(), (y0, t, *func.parameters()))


def both(func, t, method, nodes_of, **options):
    """Outputs and gradients of the solve, and of the scheme on nodes_of(t)."""
    y0, t = Y0.clone().requires_grad_(), t.clone().requires_grad_()
    solution = solve(func, y0, t, method=method, gradient="reversible", **options)
    found = solution.ys, *gradients(func, solution.ys, y0, t)
    nodes, at = nodes_of(t)
    ys = scheme(TABLEAUS[method], func, y0, nodes)[at]
    return found, (ys, *gradients(func, ys, y0, t))


def assert_close(found, expected, tolerance=ROUNDING):
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("direction", [1, -1], ids=["forwards", "backwards"])
@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4"])
def test_on_a_grid_it_is_the_scheme_and_its_gradient(method, direction):
    """Each interval in steps of its own, and outputs that a uniform grid would pass are nodes of it."""
    t = TIMES if direction > 0 else TIMES.flip(0)
    assert_close(*both(Field(), t, method, lambda t: (t, slice(None))))

    def uniform(t):
        start, size, others = t[0], direction * 0.25, []
        for i in range(1, 5):
            others.append(start + size * i)
        nodes = sorted([start, *others, *t[1:]], key=lambda x: direction * float(x.detach()))
        kept = [x for i, x in enumerate(nodes) if i == 0 or abs(float(x.detach()) - float(nodes[i - 1].detach())) > 1e-9]
        at = [min(range(len(kept)), key=lambda i: abs(float(kept[i].detach()) - float(x))) for x in t.detach()]
        return kept, at

    found, expected = both(Field(), t, method, uniform, step_size=0.25)
    for i in (0, 1, *range(3, len(found))):  # the node at 0.35 or 0.1 + 0.25 is one, and either time moves it
        torch.testing.assert_close(found[i], expected[i], rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3", "fehlberg2", "dopri8"])
def test_adaptive_steps_are_the_scheme_and_its_gradient(method):
    """On the steps that it has chosen, which end at every output."""
    func = Noted()

    def nodes_of(t):
        ends = [start for start, _ in func.steps] + [float(t.detach()[-1])]
        moving = [t[int((t.detach() - end).abs().argmin())] for end in ends]
        nodes = [
            x if abs(float(x.detach()) - end) < 1e-12 else torch.tensor(end, dtype=D)
            for x, end in zip(moving, ends, strict=True)
        ]
        at = [min(range(len(ends)), key=lambda i: abs(ends[i] - float(x))) for x in t.detach()]
        return nodes, at

    found, expected = both(func, TIMES, method, nodes_of, rtol=1e-5, atol=1e-5)
    assert_close(found, expected)
    assert set(TIMES[:-1].tolist()) <= {start for start, _ in func.steps}


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "dopri8"])
def test_adaptive_solves_keep_the_tolerance(method, control):
    """Both the state and its gradient, beside the method itself at a tighter tolerance."""
    func, found = Field(), []
    for gradient, tolerance in (("reversible", 1e-6), ("direct", 1e-10)):
        y0, t = Y0.clone().requires_grad_(), TIMES.clone().requires_grad_()
        options = {"method": method if gradient == "reversible" else "dopri8", "step_control": control}
        ys = solve(func, y0, t, rtol=tolerance, atol=tolerance, gradient=gradient, **options).ys
        found.append((ys, *gradients(func, ys, y0, t)))
    assert_close(*found, tolerance=2e-4)
    assert (found[0][0] - found[1][0]).abs().max() < 1e-5


def test_finite_differences():
    func = Field()
    names, values = zip(*func.named_parameters(), strict=True)

    def outputs(y0, t, *parameters):
        call = lambda t, y, *p: torch.func.functional_call(func, dict(zip(names, p, strict=True)), (t, y))  # noqa: E731
        return solve(call, y0, t, args=parameters, method="midpoint", gradient="reversible").ys

    inputs = [x.detach().clone().requires_grad_() for x in (Y0, TIMES, *values)]
    assert torch.autograd.gradcheck(outputs, inputs, atol=1e-7)


def test_samples_have_steps_and_gradients_of_their_own():
    options = {"gradient": "reversible", "step_control": "per_sample", "rtol": 1e-6, "atol": 1e-6}
    func, y0 = Field(), (Y0 * torch.tensor([[1.0], [5.0], [0.1]], dtype=D)).requires_grad_()
    solution = solve(func, y0, TIMES, **options)
    (together,) = torch.autograd.grad((solution.ys * WEIGHTS).sum(), y0)
    for i in range(3):
        alone = y0[i : i + 1].detach().requires_grad_()
        one = solve(func, alone, TIMES, **options)
        assert one.stats.num_accepted[0] == solution.stats.num_accepted[i]
        torch.testing.assert_close(one.ys[:, 0], solution.ys[:, i], rtol=ROUNDING, atol=ROUNDING)
        (grad,) = torch.autograd.grad((one.ys * WEIGHTS[:, i : i + 1]).sum(), alone)
        torch.testing.assert_close(grad[0], together[i], rtol=ROUNDING, atol=ROUNDING)


def test_a_state_of_several_leaves_and_a_discontinuity():
    """The slope jumps at 0.5, from one to the other of two constants."""
    a = torch.tensor([2.0, -3.0], dtype=D, requires_grad=True)

    def func(t, y):
        rate = torch.where(t < 0.5, a[0], a[1])
        return {"u": rate * torch.ones_like(y["u"]), "v": torch.ones_like(y["v"]) * y["u"].sum()}

    y0 = {"u": torch.zeros(1, dtype=D), "v": torch.zeros(2, dtype=D)}
    ys = solve(func, y0, [0.0, 1.0], jump_t=[0.5], gradient="reversible").ys
    torch.testing.assert_close(ys["u"][-1], (a.sum() / 2).reshape(1), rtol=1e-12, atol=0.0)
    (grad,) = torch.autograd.grad(ys["v"][-1, 0], a)
    torch.testing.assert_close(grad, torch.tensor([0.375, 0.125], dtype=D), rtol=1e-8, atol=0.0)


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4"])
def test_the_order_is_that_of_the_method(method):
    matrix = torch.tensor([[0.0, 2.0], [-2.0, 0.0]], dtype=D)
    exact = torch.linalg.matrix_exp(matrix) @ Y0[0]
    errors = []
    for steps in (32, 64):
        options = {"method": method, "step_size": 1 / steps, "gradient": "reversible"}
        errors.append((solve(lambda t, y: matrix @ y, Y0[0], [0.0, 1.0], **options).ys[-1] - exact).abs().max())
    assert TABLEAUS[method].order - 0.2 < torch.log2(errors[0] / errors[1]) < TABLEAUS[method].order + 1.2


@pytest.mark.parametrize("options", [{"rtol": 1e-6}, {"method": "rk4", "step_size": 0.01}], ids=["adaptive", "grid"])
def test_a_step_keeps_its_numbers_alone(options):
    y0 = torch.randn(64, 2, dtype=D, requires_grad=True)
    ys = solve(Field(), y0, [0.0, 1.0], gradient="reversible", **options).ys
    node = ys.grad_fn
    while not hasattr(node, "recorder"):
        node = node.next_functions[0][0]
    steps = [entry for entry in node.recorder.tape if isinstance(entry, Step)]
    assert len(steps) > 3
    for step in steps:
        assert step.y0 is None and not step.k and not step.evaluations
        assert step.times.numel() == 2
    before = node.recorder
    ys.sum().backward()
    assert before is not None and node.recorder is None  # goes with the backward pass
    with pytest.raises(RuntimeError, match="second time"):
        ys.sum().backward()


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-4), (D, 1e-12)], ids=["float32", "float64"])
def test_the_state_comes_back(dtype, most):
    """By how much is told by the statistics, as a multiple of the tolerance."""
    y0 = Y0.to(dtype).requires_grad_()
    solution = solve(Field(dtype), y0, [0.0, 3.0], method="rk4", step_size=0.01, rtol=1.0, atol=0.0, gradient="reversible")
    solution.ys[-1].sum().backward()
    assert 0 < solution.stats.adjoint_drift < most
    assert solution.stats.nfe_backward == 300 * 8


def test_without_gradients_the_numbers_are_the_same():
    y0 = Y0.clone().requires_grad_()
    options = {"gradient": "reversible", "rtol": 1e-5}
    ys = solve(Field(), y0, TIMES, **options).ys
    with torch.no_grad():
        assert torch.equal(solve(Field(), y0, TIMES, **options).ys, ys)
    assert not torch.equal(solve(Field(), y0, TIMES, rtol=1e-5).ys, ys)


def test_front_doors():
    block = ODEBlock(Field(), gradient="reversible", rtol=1e-6, atol=1e-6)
    block(Y0).sum().backward()
    assert block.nfe_backward > 0 and all(p.grad is not None for p in block.parameters())
    y0 = Y0.clone().requires_grad_()
    ys = odeint(Field(), y0, TIMES, method="rk4", options={"gradient": "reversible", "step_size": 0.1})
    (grad,) = torch.autograd.grad((ys * WEIGHTS).sum(), y0)
    expected = solve(Field(), y0, TIMES, method="rk4", step_size=0.1, gradient="reversible").ys
    assert torch.equal(ys, expected) and torch.equal(grad, torch.autograd.grad((expected * WEIGHTS).sum(), y0)[0])


def test_coupling():
    """The smaller, the sooner the states come together, and the more rounding is in what comes back."""
    y0 = Y0.clone().requires_grad_()
    drifts = []
    for coupling in (1.0, 0.9):
        options = {"adjoint_options": {"coupling": coupling}, "gradient": "reversible", "rtol": 1.0, "atol": 0.0}
        solution = solve(Field(), y0, [0.0, 1.0], method="midpoint", step_size=0.01, **options)
        solution.ys[-1].sum().backward()
        drifts.append(solution.stats.adjoint_drift)
    assert drifts[1] > 100 * drifts[0]


def decay(t, y):
    return -y


def test_where_func_contracts_a_grid_warns_and_adaptive_steps_shrink():
    """y' = -y: the distance of the two states grows as exp(t), unless steps are below (1 - coupling)."""
    y0 = torch.ones(1, dtype=D)
    options = {"gradient": "reversible", "adjoint_options": {"coupling": 0.99}}
    with pytest.warns(UserWarning, match="two states of gradient='reversible' ended .* apart"):
        solve(decay, y0, [0.0, 20.0], method="rk4", step_size=0.1, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fine = solve(decay, y0, [0.0, 4.0], method="rk4", step_size=0.1, **options)
        adaptive = solve(decay, y0, [0.0, 14.0], rtol=1e-6, atol=1e-6, **options)
    assert abs(fine.ys[-1] - torch.exp(torch.tensor(-4.0))).max() < 1e-5
    assert abs(adaptive.ys[-1] - torch.exp(torch.tensor(-14.0))).max() < 1e-5
    assert adaptive.stats.num_accepted > 10 * solve(decay, y0, [0.0, 14.0], rtol=1e-6, atol=1e-6).stats.num_accepted


@pytest.mark.parametrize("control", CONTROLS)
def test_failures(control):
    """A solve that blows up; rows that end well keep their gradients."""
    y0 = torch.tensor([[0.5], [3.0]], dtype=D, requires_grad=True)
    options = {"gradient": "reversible", "step_control": control, "rtol": 1e-6, "atol": 1e-6, "max_num_steps": 300}
    with pytest.raises(SolverError):
        solve(lambda t, y: y * y, y0, [0.0, 1.0], **options)
    ys = solve(lambda t, y: y * y, y0, [0.0, 1.0], on_failure="return", **options).ys
    assert ys[-1, 1].isnan()
    if control == "per_sample":
        (grad,) = torch.autograd.grad(ys[-1, 0].sum(), y0)
        torch.testing.assert_close(grad, torch.tensor([[4.0], [0.0]], dtype=D), rtol=1e-4, atol=0.0)


REFUSED = {
    "dense=True": {"dense": True},
    "events": {"events": Event(lambda t, y: y.sum())},
    "every": {"every": 2},
    "regularizers": {"regularizers": ("kinetic",)},
    "integrals": {"integrals": lambda t, y: y},
    "jumps of the state": {"jumps": Jump([0.5], lambda t, y, i: y), "step_control": "per_sample"},
    "rodas5p": {"method": "rodas5p"},
    "radauIIA3": {"method": "radauIIA3"},
    "explicit_adams": {"method": "explicit_adams"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name):
    with pytest.raises(NotImplementedError, match=rf"{name}.*not served|not served.*{name}"):
        solve(Field(), Y0, [0.0, 1.0], gradient="reversible", **REFUSED[name])


def test_jumps_under_joint_control():
    """Between two of them the solve begins anew."""
    grads = []
    for gradient in ("reversible", "direct"):
        y0 = Y0.clone().requires_grad_()
        jumps = Jump([0.5, 1.0], lambda t, y, i: 2 * y)
        ys = solve(Field(), y0, TIMES, jumps=jumps, gradient=gradient, rtol=1e-9, atol=1e-9).ys
        grads.append(torch.autograd.grad((ys * WEIGHTS).sum(), y0)[0])
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


def test_wrong_arguments():
    for given, words in (
        ({"adjoint_options": {"coupling": 0.0}}, r"in \(0, 1\]"),
        ({"adjoint_options": {"coupling": True}}, r"in \(0, 1\]"),
        ({"adjoint_options": {"norm": "seminorm"}}, "'coupling' alone"),
        ({"adjoint_method": "rk4"}, "adjoint_method must not be given"),
        ({"adjoint_rtol": 1e-3}, "adjoint_rtol must not be given"),
        ({"max_checkpoints": 3}, "max_checkpoints needs gradient='checkpoint'"),
    ):
        with pytest.raises(ValueError, match=words):
            solve(Field(), Y0, [0.0, 1.0], gradient="reversible", **given)
    with pytest.raises(NotImplementedError, match="32 bits"):
        solve(decay, Y0.bfloat16(), [0.0, 1.0], gradient="reversible")
    times = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0]])
    with pytest.raises(NotImplementedError, match="times of each sample"):
        solve(decay, Y0, times, step_control="per_sample", gradient="reversible")
    first = solve(decay, Y0, [0.0, 1.0])
    with pytest.raises(NotImplementedError, match="resume not served"):
        solve(decay, None, [1.0, 2.0], resume=first, gradient="reversible")
    with pytest.raises(NotImplementedError, match="random numbers"):
        solve(lambda t, y: y * torch.rand(()), Y0.clone().requires_grad_(), [0.0, 1.0], method="rk4", gradient="reversible")
    with pytest.raises(NotImplementedError, match="not served inside"):
        torch.func.grad(lambda y: solve(decay, y, [0.0, 1.0], method="rk4", gradient="reversible").ys.sum())(Y0)


def test_second_derivatives_are_refused_in_words():
    y0 = Y0.clone().requires_grad_()
    ys = solve(Field(), y0, [0.0, 1.0], method="rk4", gradient="reversible").ys
    (first,) = torch.autograd.grad(ys.sum(), y0, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(first.sum(), y0)


def test_a_func_that_has_changed_is_refused():
    func, y0 = Field(), Y0.clone().requires_grad_()
    ys = solve(func, y0, [0.0, 1.0], method="rk4", gradient="reversible").ys
    with torch.no_grad():
        func.layers[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ys.sum().backward()


def test_what_autograd_asks_for_besides():
    """A second pass, batched gradients, autocast, chosen parameters, complex states."""
    func, y0 = Field(torch.float32), Y0.float().requires_grad_()
    ys = solve(func, y0, [0.0, 1.0], gradient="reversible", rtol=1e-5, atol=1e-5).ys
    weights = torch.stack([WEIGHTS[:2].float(), torch.ones(2, 3, 2)])
    (batched,) = torch.autograd.grad(ys, y0, weights, is_grads_batched=True, retain_graph=True)
    for one, weight in zip(batched, weights, strict=True):
        torch.testing.assert_close(one, torch.autograd.grad(ys, y0, weight, retain_graph=True)[0])
    grads = []
    for gradient in ("reversible", "direct"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ys = solve(func, y0, [0.0, 1.0], gradient=gradient, rtol=1e-2, atol=1e-2).ys
        grads.append(torch.autograd.grad(ys[-1].sum(), func.layers[0].weight)[0])
    torch.testing.assert_close(*grads, rtol=0.05, atol=0.02)
    chosen, other = func.layers[0].weight, func.layers[2].weight
    ys = solve(func, y0, [0.0, 1.0], gradient="reversible", adjoint_params=[chosen]).ys
    found = torch.autograd.grad(ys.sum(), (chosen, other), allow_unused=True)
    assert found[0] is not None and found[1] is None
    z, rate = torch.tensor([1.0 + 2j], dtype=torch.complex128), torch.tensor(0.1 + 1j, dtype=torch.complex128).requires_grad_()
    end = solve(lambda t, y: rate * y, z, [0.0, 1.0], gradient="reversible", rtol=1e-10, atol=1e-10).ys[-1]
    torch.testing.assert_close(torch.autograd.grad(end.abs().sum(), rate)[0].real, end.abs().sum(), rtol=1e-7, atol=0.0)


def test_save_valid_and_a_compiled_field():
    with torch.no_grad():
        options = {"gradient": "reversible", "step_control": "per_sample"}
        sums = solve(decay, Y0.abs(), TIMES, save=lambda t, y: y.sum(1), valid=lambda y: (y > 0).all(1), **options).ys
        torch.testing.assert_close(sums, solve(decay, Y0.abs(), TIMES, **options).ys.sum(2))
    solution = solve(odenet_cuda.compile(Field()), Y0, [0.0, 1.0], gradient="reversible")
    assert solution.engine == "stepper" and "gradient='reversible' needs it" in solution.explanation["compiled"]
