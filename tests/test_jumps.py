"""Discontinuities of func wherever they lie: at the ends of the interval, on an output, between outputs.

y' = p0 y, then p1 y + 1, in turns from one jump to the next, with exact solutions on every piece.
"""

import itertools

import pytest
import torch

import odenet_cuda
from odenet_cuda import solve

PLACES = {  # (output times, jumps)
    "between": ([0.0, 1.0], [0.3]),
    "on an output": ([0.0, 0.3, 1.0], [0.3]),
    "at the start": ([0.0, 1.0], [0.0]),
    "at the end": ([0.0, 1.0], [1.0]),
    "everywhere": ([0.0, 0.5, 1.0], [0.0, 0.25, 0.5, 1.0]),
}
SIDES = {"left": lambda s, jump: s > jump, "right": lambda s, jump: s >= jump}  # of which func takes the jump itself
METHODS = {"dopri5": 1e-8, "dopri8": 1e-8, "tsit5": 1e-8, "bosh3": 1e-5, "adaptive_heun": 1e-4}
STIFF = {"rodas5p": 1e-7, "kvaerno5": 1e-5, "kvaerno3": 1e-5, "rosenbrock23": 1e-4, "auto": 1e-7, "bdf": 1e-6}
SPARE = 300  # multiples of the tolerance, for errors of gradients
SAME_STEPS = 3  # a jump that is seen costs this many steps more at most


class Pieces(torch.nn.Module):
    def __init__(self, jumps, side, sign):
        super().__init__()
        self.p = torch.nn.Parameter(torch.tensor([1.3, -0.7], dtype=torch.float64))
        self.jumps, self.side, self.sign = jumps, side, sign

    def forward(self, t, y):
        passed = sum(SIDES[self.side](self.sign * t, jump).to(y.dtype) for jump in self.jumps)
        second = passed % 2
        return self.sign * ((1 - second) * self.p[0] * y + second * (self.p[1] * y + 1))


def exact(p, y, t, jumps):
    """y at the times t, ascending; derivatives by t with the slope before a jump, for t[0] with that after it."""

    def flow(y, pieces, h):
        return y * torch.exp(p[0] * h) if pieces % 2 == 0 else (y + 1 / p[1]) * torch.exp(p[1] * h) - 1 / p[1]

    times = t.tolist()
    passed, start, ys = sum(jump <= times[0] for jump in jumps), t[0], [y]
    ahead = [jump for jump in jumps if jump > times[0]]
    for i in range(1, len(t)):
        while ahead and ahead[0] < times[i]:
            y, passed, start = flow(y, passed, ahead[0] - start), passed + 1, torch.tensor(ahead.pop(0), dtype=y.dtype)
        ys.append(flow(y, passed, t[i] - start))
    return torch.stack(ys)


def derivatives(ys, inputs):
    weights = torch.arange(1.0, len(ys) + 1, dtype=ys.dtype)[:, None, None] * torch.tensor([[1.0], [0.5]], dtype=ys.dtype)
    return torch.autograd.grad((weights * ys).sum(), inputs)


def compare(place, side, sign, tol, compiled=False, **options):
    times, jumps = PLACES[place]
    field = Pieces(jumps, side, sign)
    y0 = torch.tensor([[1.0], [2.0]], dtype=torch.float64, requires_grad=True)
    t = (sign * torch.tensor(times, dtype=torch.float64)).requires_grad_(not compiled)
    func = odenet_cuda.compile(field) if compiled else field
    solution = solve(func, y0, t, jump_t=[sign * jump for jump in jumps], rtol=tol, atol=tol, **options)
    inputs = [field.p, y0, *([] if compiled else [t])]
    found = [solution.ys.detach(), *derivatives(solution.ys, inputs)]
    p, start = (x.detach().clone().requires_grad_() for x in (field.p, y0))
    ascending = (sign * t.detach()).requires_grad_()
    ys = exact(p, start, ascending, jumps)
    by_t = [] if compiled else [ascending]
    wanted = [ys.detach(), *derivatives(ys, [p, start, *by_t])]
    if by_t:
        wanted[-1] = sign * wanted[-1]
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=SPARE * tol, atol=SPARE * tol)
    return solution


@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "adjoint", "quadrature"])
@pytest.mark.parametrize("step_control", ["joint", "per_sample"])
@pytest.mark.parametrize("place", PLACES)
def test_gradients(gradient, step_control, place):
    for side, sign in itertools.product(SIDES, (1, -1)):
        compare(place, side, sign, 1e-8, gradient=gradient, step_control=step_control)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gradient", ["direct", "adjoint"])
def test_methods(gradient, method):
    for step_control, place in itertools.product(("joint", "per_sample"), ("on an output", "everywhere")):
        compare(place, "right", 1, METHODS[method], gradient=gradient, step_control=step_control, method=method)


@pytest.mark.parametrize("method", STIFF)
@pytest.mark.parametrize("gradient", ["direct", "adjoint", "quadrature"])
def test_stiff_methods(gradient, method):
    """The integral of the parameters over a backward step is on the same side of a jump as the step."""
    if method == "bdf" and gradient == "direct":
        return
    for step_control, side in zip(("joint", "per_sample"), SIDES, strict=True):
        for sign in (1, -1):
            how = {"gradient": gradient, "step_control": step_control, "method": method}
            compare("everywhere", side, sign, STIFF[method], **how)


@pytest.mark.parametrize("method", ["dopri5", "vern7", "bosh3"])
def test_two_coupled_states(method):
    compare("everywhere", "right", 1, 1e-7, gradient="reversible", method=method)
    compare("everywhere", "left", -1, 1e-7, gradient="reversible", method=method, step_control="per_sample")


@pytest.mark.parametrize("place", ["at the start", "at the end"])
@pytest.mark.parametrize("side", SIDES)
def test_no_step_is_lost_at_an_end(place, side):
    """func is never seen from beyond the interval, so its jump costs nothing."""
    times, jumps = PLACES[place]
    seen = []

    def func(t, y):
        seen.append(float(t))
        return torch.where(SIDES[side](t, jumps[0]), -y, y)

    y0 = torch.ones(1, dtype=torch.float64)
    stats = solve(func, y0, times, jump_t=jumps, rtol=1e-8, atol=1e-8).stats
    assert all(time != jumps[0] for time in seen)
    smooth = solve(lambda t, y: y, y0, times, rtol=1e-8, atol=1e-8).stats
    assert abs(stats.num_accepted - smooth.num_accepted) <= SAME_STEPS and stats.num_rejected <= SAME_STEPS


def test_times_of_float32_meet_jumps_that_are_written_out():
    """0.3 and float32(0.3) are one time for a state in float32."""
    y0, seen = torch.ones(1), []

    def func(t, y):
        seen.append(t.clone())
        return torch.where(t < 0.3, 1.0, -1.0) + 0 * y

    ys = solve(func, y0, torch.tensor([0.0, 0.3, 1.0]), jump_t=[0.3], gradient="adjoint").ys
    torch.testing.assert_close(ys[:, 0], torch.tensor([1.0, 1.3, 0.6]))
    seen.clear()
    ys = solve(func, y0, torch.tensor([0.3, 1.0]), jump_t=[0.3]).ys
    torch.testing.assert_close(ys[:, 0], torch.tensor([1.0, 0.3]))
    assert min(seen) > torch.tensor(0.3)


@pytest.mark.parametrize("gradient", ["direct", "adjoint"])
@pytest.mark.parametrize("step_control", ["joint", "per_sample"])
def test_compiled(gradient, step_control, compiled_quickly):
    for place in PLACES:
        compare(place, "right", 1, 1e-8, compiled=True, gradient=gradient, step_control=step_control)


def test_steps_of_the_pid_controller_are_those_of_the_stepper(compiled_quickly):
    """Beyond rounding: after a jump steps are so small that their error is nothing else, and the PID controller remembers it.
    So samples count whose steps stay as many by the stepper where the state is a little other."""
    chance = torch.Generator().manual_seed(1)
    y0 = torch.randn(300, 3, dtype=torch.float64, generator=chance)
    k = torch.rand(300, 1, dtype=torch.float64, generator=chance) * 5 + 0.5
    func = lambda t, y, k: torch.sin(k * y.flip(1)) - 0.3 * y + torch.where(t < 1.0, 1.0, -2.0)  # noqa: E731
    options = {"step_control": "per_sample", "controller": "PID", "rtol": 1e-6, "atol": 1e-8, "jump_t": [0.3, 1.0, 1.7]}

    def steps(func, y0):
        stats = solve(func, y0, [0.0, 2.0], args=(k,), **options).stats
        return torch.stack([stats.num_accepted, stats.num_rejected])

    field = odenet_cuda.compile(func)
    found, right = steps(field, y0), steps(func, y0)
    assert field.explain() == "compiled"
    near = [steps(func, y0 * (1 + i * 2.0**-52)) for i in (-2, -1, 1, 2)]
    settled = torch.stack([(x == right).all(0) for x in near]).all(0)
    assert settled.sum() > 250 and (found != right).any(0)[settled].sum() <= 3
