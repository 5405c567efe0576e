"""method="auto": which method makes the steps, on stiff, nonstiff and mixed problems, sample by sample, with gradients."""

import pytest
import torch
from torch import nn

from odenet_cuda import Event, SolverError, solve
from odenet_cuda.auto import AUTO, AutoStep, stiffness_of
from odenet_cuda.methods import find_method
from odenet_cuda.solvers import auto

D = torch.float64
CONTROLS = ["joint", "per_sample"]
TOLERANCES = {"rtol": 1e-6, "atol": 1e-6}


class VanDerPol(nn.Module):
    """x'' = mu (1 - x^2) x' - x: stiff for a large mu, but for the jumps between its branches."""

    def __init__(self, mu):
        super().__init__()
        self.mu = nn.Parameter(torch.tensor(mu, dtype=D))

    def forward(self, t, y):
        x, v = y.unbind(-1)
        return torch.stack([v, self.mu * (1 - x * x) * v - x], -1)


class Steps:
    """By which method the rows made their steps: bool or bool [rows], in order."""

    def __init__(self, monkeypatch):
        self.stiff = []
        call = AutoStep.__call__

        def noted(step, *args, **more):
            self.stiff.append(step.stiff if isinstance(step.stiff, bool) else step.stiff.tolist())
            return call(step, *args, **more)

        monkeypatch.setattr(AutoStep, "__call__", noted)

    @property
    def switches(self):
        return sum(a != b for a, b in zip(self.stiff, self.stiff[1:], strict=False))


@pytest.fixture
def steps(monkeypatch):
    return Steps(monkeypatch)


def start(*x):
    return torch.tensor([[value, 0.0] for value in x], dtype=D)


@torch.no_grad()
def test_the_sum_of_both_methods():
    """The weights read the slopes of either, and the data are those of one method of order 5."""
    assert find_method("auto") is AUTO and AUTO.stages == 17 and AUTO.order == 5
    y0, field = [start(2.0)], lambda t, y, stage=0: [VanDerPol(3.0)(t, y[0])]
    dt, times = torch.tensor([0.02], dtype=D), [torch.tensor(0.02 * c, dtype=D) for c in AUTO.c]
    ends = []
    for stiff in (False, True):
        y1, k, _ = AutoStep(stiff)(field, times, dt, y0, field(times[0], y0))
        k = [field(times[0], y0), *k]
        total = y0[0] + dt * sum(b * slope[0] for b, slope in zip(AUTO.b, k, strict=True))
        torch.testing.assert_close(total, y1[0], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(k[-1][0], field(times[-1], y1)[0], rtol=1e-13, atol=1e-13)
        ends.append(y1[0])
    torch.testing.assert_close(*ends, rtol=1e-8, atol=1e-8)


def test_the_stiffness_that_a_step_tells():
    """dt |lambda| of y' = -lambda y, row by row."""
    rates, dt = torch.tensor([[1.0], [30.0]], dtype=D), torch.tensor([0.1, 0.1], dtype=D)
    from odenet_cuda.auto import explicit_step

    y0, field = [torch.ones(2, 1, dtype=D)], lambda t, y, stage=0: [-rates * y[0]]
    with torch.no_grad():
        _, k = explicit_step(field, [dt.new_zeros(())] * 17, dt, y0, field(None, y0))
        torch.testing.assert_close(stiffness_of(k, dt), torch.tensor([0.1, 3.0], dtype=D), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("control", CONTROLS)
def test_a_problem_that_is_not_stiff_is_left_to_tsit5(control, steps):
    """The same steps, and as many evaluations."""
    options = {"step_control": control, **TOLERANCES}
    with torch.no_grad():
        found = solve(VanDerPol(1.0), start(2.0, 1.0), [0.0, 10.0], method="auto", **options)
        assert set(steps.stiff) == {False}
        expected = solve(VanDerPol(1.0), start(2.0, 1.0), [0.0, 10.0], method="tsit5", **options)
    torch.testing.assert_close(found.ys, expected.ys, rtol=1e-9, atol=1e-9)
    assert found.stats.nfe == expected.stats.nfe


@torch.no_grad()
def test_a_stiff_problem_is_left_to_rodas5p_between_its_jumps(steps):
    """There and back, forwards and backwards in time; far fewer evaluations than tsit5, and fewer than rodas5p."""
    func, y0 = VanDerPol(100.0), start(2.0)
    found = solve(func, y0, [0.0, 300.0], method="auto", **TOLERANCES)
    assert steps.switches >= 3
    exact = solve(func, y0, [0.0, 300.0], method="rodas5p", rtol=1e-10, atol=1e-10)
    assert (found.ys[-1] - exact.ys[-1]).abs().max() < 1e-4
    alone = solve(func, y0, [0.0, 300.0], method="rodas5p", **TOLERANCES)
    assert found.stats.nfe < alone.stats.nfe
    mirrored = solve(lambda t, y: -func(t, y), y0, [0.0, -300.0], method="auto", **TOLERANCES)
    torch.testing.assert_close(mirrored.ys, found.ys, rtol=1e-6, atol=1e-6)


def test_samples_switch_alone(steps):
    """Each row as it would without the others: its steps, and its result to rounding."""
    mus = torch.tensor([[1.0], [50.0], [200.0]], dtype=D)

    def func(t, y, mu):
        x, v = y[:, :1], y[:, 1:]
        return torch.cat([v, mu * (1 - x * x) * v - x], 1)

    options = {"method": "auto", "step_control": "per_sample", **TOLERANCES}
    with torch.no_grad():
        together = solve(func, start(2.0, 2.0, 2.0), [0.0, 20.0], args=(mus,), **options)
        assert any(isinstance(stiff, list) for stiff in steps.stiff)
        for i in range(3):
            alone = solve(func, start(2.0), [0.0, 20.0], args=(mus[i : i + 1],), **options)
            assert alone.stats.num_accepted[0] == together.stats.num_accepted[i]
            torch.testing.assert_close(alone.ys[:, 0], together.ys[:, i], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("control", CONTROLS)
def test_gradients_through_switches(control, steps):
    """By finite differences in mu, with the steps as they fall, and second derivatives."""
    y0 = start(2.0, 1.5)
    options = {"method": "auto", "step_control": control, "rtol": 1e-9, "atol": 1e-9}
    func = VanDerPol(60.0)
    ys = solve(func, y0, [0.0, 1.0, 5.0], **options).ys
    assert True in steps.stiff or any(isinstance(stiff, list) for stiff in steps.stiff)
    (grad,) = torch.autograd.grad(ys[:, :, 0].sum(), func.mu)
    for limit in (None, 3):  # states kept, from which the steps are made again by the method that made them
        again = solve(func, y0, [0.0, 1.0, 5.0], gradient="checkpoint", max_checkpoints=limit, **options).ys
        torch.testing.assert_close(again, ys, rtol=1e-11, atol=1e-11)  # with a graph sums have another order
        torch.testing.assert_close(torch.autograd.grad(again[:, :, 0].sum(), func.mu)[0], grad, rtol=1e-7, atol=0.0)
    with torch.no_grad():
        ends = [solve(VanDerPol(60.0 + h), y0, [0.0, 1.0, 5.0], **options).ys[:, :, 0].sum() for h in (1e-2, -1e-2)]
    torch.testing.assert_close(grad, (ends[0] - ends[1]) / 2e-2, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
def test_second_derivatives(gradient):
    func = VanDerPol(60.0)
    ys = solve(func, start(2.0), [0.0, 1.0], method="auto", gradient=gradient, rtol=1e-8, atol=1e-8).ys
    (once,) = torch.autograd.grad(ys[-1, 0, 0], func.mu, retain_graph=True)
    (first,) = torch.autograd.grad(ys[-1, 0, 0], func.mu, create_graph=True)
    torch.testing.assert_close(first, once, rtol=1e-9, atol=0.0)
    (second,) = torch.autograd.grad(first, func.mu)
    firsts = []
    for h in (0.5, -0.5):
        other = VanDerPol(60.0 + h)
        end = solve(other, start(2.0), [0.0, 1.0], method="auto", rtol=1e-10, atol=1e-10).ys[-1, 0, 0]
        firsts.append(torch.autograd.grad(end, other.mu)[0])
    torch.testing.assert_close(second, firsts[0] - firsts[1], rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("gradient", ["adjoint", "quadrature"])
def test_other_gradients(gradient):
    """Their backward solve is by rodas5p, unless another method is asked for."""
    grads = []
    for name, more in ((gradient, {}), (gradient, {"adjoint_method": "dopri5"}), ("direct", {})):
        func = VanDerPol(5.0)
        ys = solve(func, start(2.0), [0.0, 0.6, 1.0], method="auto", rtol=1e-9, atol=1e-9, gradient=name, **more).ys
        grads.append(torch.autograd.grad(ys[:, :, 0].sum(), func.mu)[0])
    torch.testing.assert_close(grads[0], grads[2], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(grads[1], grads[2], rtol=1e-5, atol=1e-8)


@torch.no_grad()
def test_outputs_and_events_inside_steps_of_both():
    func, t = VanDerPol(100.0), torch.linspace(0, 200, 41, dtype=D)
    found = solve(func, start(2.0), t, method="auto", **TOLERANCES)
    exact = solve(func, start(2.0), t, method="rodas5p", rtol=1e-10, atol=1e-10)
    assert (found.ys - exact.ys).abs().max() < 1e-3
    ends = [
        solve(func, start(2.0), [0.0, 300.0], method=method, events=Event(lambda t, y: y[..., 0] - 1.2), **TOLERANCES).event_t
        for method in ("auto", "rodas5p")
    ]
    torch.testing.assert_close(*ends, rtol=1e-4, atol=0.0)


def test_refusals():
    func, y0 = VanDerPol(5.0), start(2.0).requires_grad_()
    for options, words in (
        ({"gradient": "reversible"}, "not served by method='auto'"),
        ({"integrals": lambda t, y: y[:, 0]}, "no slopes for integrals"),
        ({"adjoint_method": "auto", "gradient": "adjoint", "method": "dopri5"}, "cannot be an adjoint_method"),
    ):
        with pytest.raises(NotImplementedError, match=words):
            solve(func, y0, [0.0, 1.0], **{"method": "auto", **options})
    with pytest.raises(NotImplementedError, match="float32 or float64"):
        solve(lambda t, y: -y, torch.ones(2, dtype=torch.complex64), [0.0, 1.0], method="auto")
    with pytest.raises(ValueError, match="mass is no option"):
        solve(func, y0, [0.0, 1.0], method="auto", mass=torch.eye(2, dtype=D))
    first = solve(func, y0, [0.0, 1.0], method="auto")
    with pytest.raises(ValueError, match="resume needs a method that keeps"):
        solve(func, None, [1.0, 2.0], method="auto", resume=first)


def test_a_failure_says_where():
    with pytest.raises(SolverError, match="max_num_steps"), torch.no_grad():
        solve(VanDerPol(1e3), start(2.0), [0.0, 2000.0], method="auto", max_num_steps=50)


def test_counts_are_those_of_the_textbook():
    assert (auto.STIFF_STEPS, auto.OTHERS) == (15, 6)
