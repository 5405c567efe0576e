"""Inputs sampled in time: values, gradients, ends, and the stops of solves that use them."""

import math

import pytest
import torch
from torch import Tensor, nn

from odenet_cuda import Interpolated, SolverError, solve

D = torch.float64
TIMES = [0.0, 0.5, 0.8, 2.0]
every_kind = pytest.mark.parametrize("kind", ["linear", "cubic", "hold"])


def values(*shape: int) -> Tensor:
    return torch.randn(len(TIMES), *shape, dtype=D, generator=torch.Generator().manual_seed(0))


@every_kind
def test_goes_through_its_values(kind: str):
    v = values(3)
    u = Interpolated(TIMES, v, kind)
    for time, value in zip(TIMES, v, strict=True):
        torch.testing.assert_close(u(torch.tensor(time, dtype=D)), value)
        assert bool(u(torch.tensor(time, dtype=torch.float32)).isfinite().all())  # as float32 writes it


def test_between_them():
    v, t = values(), torch.tensor(0.65, dtype=D)
    assert float(Interpolated(TIMES, v)(t)) == pytest.approx(float((v[1] + v[2]) / 2))
    assert float(Interpolated(TIMES, v, "hold")(t)) == float(v[1])
    spline = pytest.importorskip("scipy.interpolate").CubicSpline(TIMES, v.numpy(), bc_type="natural")
    u = Interpolated(TIMES, v, "cubic")
    for time in (0.0, 0.1, 0.5, 0.65, 1.9):
        assert float(u(torch.tensor(time, dtype=D))) == pytest.approx(float(spline(time)), rel=1e-12)


@every_kind
def test_each_sample_at_its_own_time(kind: str):
    common, own = values(2), values(3, 2)
    t = torch.tensor([[0.1], [0.65], [1.7]], dtype=D)
    at_common, at_own = Interpolated(TIMES, common, kind)(t), Interpolated(TIMES, own, kind, per_sample=True)(t)
    for i in range(3):
        torch.testing.assert_close(at_common[i], Interpolated(TIMES, common, kind)(t[i, 0]))
        torch.testing.assert_close(at_own[i], Interpolated(TIMES, own[:, i], kind)(t[i, 0]))
    together = Interpolated(TIMES, own, kind, per_sample=True)
    torch.testing.assert_close(together(t[1, 0]), Interpolated(TIMES, own, kind)(t[1, 0]))


@every_kind
def test_gradients(kind: str):
    v = values(2).requires_grad_()
    t = torch.tensor(0.6, dtype=D, requires_grad=kind != "hold")
    assert torch.autograd.gradcheck(lambda v, t: Interpolated(TIMES, v, kind)(t), (v, t))


class Plain(nn.Module):
    def __init__(self, u: nn.Module):
        super().__init__()
        self.u = u

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.u(t) - y


class Driven(nn.Module):
    """dy/dt = u(t), with a count of its calls."""

    def __init__(self, u: nn.Module):
        super().__init__()
        self.u, self.times = u, []

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.times.append(float(t.reshape(-1)[0]))
        return self.u(t).expand_as(y)


@pytest.mark.parametrize(("kind", "area"), [
    ("linear", lambda v: (0.5 * (v[0] + v[1]) + 0.3 * (v[1] + v[2]) + 1.2 * (v[2] + v[3])) / 2),
    ("hold", lambda v: 0.5 * v[0] + 0.3 * v[1] + 1.2 * v[2]),
])  # fmt: skip
@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("control", ["joint", "per_sample"])
def test_solves_step_to_what_is_not_smooth(kind: str, area, direction: int, control: str):
    """So the area is right to rounding, with few steps, and so is its gradient for the values."""
    v = nn.Parameter(values(1))
    func = Driven(Interpolated(TIMES, v, kind))
    t = torch.tensor([0.0, 2.0][::direction], dtype=D)
    solution = solve(func, torch.zeros(2, 1, dtype=D), t, step_control=control, rtol=1e-6, atol=1e-8, compile=False)
    expected = direction * area(v.detach())
    torch.testing.assert_close(solution.ys[-1], expected.expand(2, 1), rtol=1e-13, atol=1e-13)
    rejected = solution.stats.num_rejected
    assert int(rejected if isinstance(rejected, int) else rejected.max()) == 0
    (solution.ys[-1, 0] * direction).sum().backward()
    found, v.grad = v.grad.clone(), None
    area(v).sum().backward()
    torch.testing.assert_close(found, v.grad, rtol=1e-10, atol=1e-12)


@every_kind
def test_compiled(kind: str, quick_compiler):
    """With the stops, and their gradient; the comparison of one step with func is of one without any."""
    v, results = nn.Parameter(values(1)), []
    func = Plain(Interpolated(TIMES, v, kind))
    for how in (False, "auto"):
        solution = solve(func, torch.ones(3, 1, dtype=D), [0.0, 2.0], rtol=1e-7, atol=1e-9, gradient="checkpoint", compile=how)
        v.grad = None
        solution.ys[-1].sum().backward()
        results.append((solution.ys.detach(), v.grad.clone()))
    assert solution.engine == "compiled", solution.explanation
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-11)


def test_stops_of_the_user_stay():
    func = Driven(Interpolated(TIMES, values(), "linear"))
    jump_t, step_t = [0.5, 1.25], [0.8, 1.5]  # the knot 0.5 is a jump now, and 0.8 is given twice
    solve(func, torch.zeros(1, 1, dtype=D), [0.0, 2.0], jump_t=jump_t, step_t=step_t, rtol=1e-3, atol=1e-3, compile=False)
    for stop in (*step_t, 0.5, 1.25):
        assert any(math.isclose(time, stop, abs_tol=1e-12) for time in func.times)


def test_nothing_is_known_outside():
    u = Interpolated(TIMES, values(), "linear")
    assert bool(u(torch.tensor([[-0.1], [2.1]], dtype=D)).isnan().all())
    with pytest.raises(SolverError, match="non-finite"):
        solve(Driven(u), torch.zeros(1, 1, dtype=D), [0.0, 3.0], compile=False)


def test_the_state_dict_holds_values_alone():
    u = Interpolated(TIMES, values(), "cubic")
    assert list(u.state_dict()) == ["values"]
    assert next(Interpolated(TIMES, nn.Parameter(values())).parameters()).shape == (4,)
    assert "4 times from 0.0 to 2.0" in repr(u)


@pytest.mark.parametrize(("arguments", "error", "words"), [
    (([0.0], torch.ones(1)), ValueError, "at least two, in increasing order"),
    (([1.0, 0.0], torch.ones(2)), ValueError, "in increasing order"),
    (([0.0, 1.0], torch.ones(3)), ValueError, r"values must have shape \[2, ...\], got \[3\]"),
    (([0.0, 1.0], torch.ones(2), "linear", True), ValueError, r"\[2, batch, ...\]"),
    (([0.0, 1.0], [1.0, 2.0]), TypeError, "values must be a floating or complex tensor, got list"),
    (([0.0, 1.0], torch.ones(2), "steps"), ValueError, "kind must be one of"),
    ((torch.tensor([0.0, 1.0], requires_grad=True), torch.ones(2)), ValueError, "must not require a gradient"),
])  # fmt: skip
def test_wrong_arguments(arguments, error, words: str):
    with pytest.raises(error, match=words):
        Interpolated(*arguments)
