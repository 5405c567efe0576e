"""The checkpoint gradient against the direct one, whose numbers it must give, and its schedule against the best there is."""

from functools import lru_cache
from itertools import combinations

import pytest
import torch
from problems import ADAPTIVE_METHODS, FIXED_METHODS
from torch import nn

from odenet_cuda import solve
from odenet_cuda.solvers.checkpoints import Checkpoints, best_subset, binomial_schedule, binomial_split, steps_again

pytestmark = pytest.mark.usefixtures("kernels_alone")  # by them the two gradients are the same bits

ROUNDING = 1e-12
Y0 = torch.tensor([[0.3, -0.8], [1.1, 0.4], [-0.5, 0.9], [2.0, 0.1]], dtype=torch.float64)
TIMES = torch.tensor([0.1, 0.35, 0.6, 1.3], dtype=torch.float64)
WEIGHTS = torch.cos(torch.arange(32, dtype=torch.float64)).reshape(4, 4, 2)


class Field(nn.Module):
    """A small network, driven by the time; `shapes` are those of what it was called with."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()

    def forward(self, t, y):
        return self.layers(y) * torch.cos(3 * t) - y


def gradients(func, t, **options):
    """(outputs, gradients by y0, t and the parameters)"""
    y0, t = Y0.clone().requires_grad_(), t.clone().requires_grad_()
    ys = solve(func, y0, t, **options).ys
    return ys, torch.autograd.grad((ys * WEIGHTS[: len(t)]).sum(), (y0, t, *func.parameters()))


def assert_same(func, t, limit, **options):
    ys, expected = gradients(func, t, gradient="direct", **options)
    again, found = gradients(func, t, gradient="checkpoint", max_checkpoints=limit, **options)
    assert torch.equal(ys, again)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("limit", [None, 1, 2, 5])
@pytest.mark.parametrize("jump_t", [(), (0.7,)], ids=["smooth", "jump"])
@pytest.mark.parametrize("step_control", ["joint", "per_sample"])
@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
def test_adaptive_methods(method, step_control, jump_t, limit):
    """As the direct gradient to rounding, with outputs inside steps, whatever is kept, restarts at discontinuities included."""
    options = {"method": method, "step_control": step_control, "jump_t": jump_t, "rtol": 1e-3, "atol": 1e-4}
    assert_same(Field(), TIMES, limit, **options)


GRIDS = {
    "the times": {},
    "step_size": {"step_size": 0.07},
    "cubic": {"step_size": 0.07, "interp": "cubic"},
    "perturb": {"step_size": 0.1, "perturb": True},
}


@pytest.mark.parametrize("limit", [None, 1, 3])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("method", FIXED_METHODS)
def test_fixed_methods(method, grid, limit):
    assert_same(Field(), TIMES, limit, method=method, **GRIDS[grid])


@pytest.mark.parametrize("step_control", ["joint", "per_sample"])
def test_one_interval_backwards_in_time(step_control):
    assert_same(Field(), TIMES.flip(0)[::3], 2, rtol=1e-6, atol=1e-6, step_control=step_control)


NOISY = {
    "dopri5": {"min_step": 0.05, "max_step": 0.2, "jump_t": [0.5]},
    "adaptive_heun": {"min_step": 0.1, "max_step": 0.2, "jump_t": [0.5]},
    "rejected steps": {"rtol": 1e-1, "atol": 1e-1, "min_step": 0.05, "max_step": 0.4},
    "rk4": {"method": "rk4", "step_size": 0.1},
    "rk4, cubic": {"method": "rk4", "step_size": 0.1, "interp": "cubic"},
}


class Noisy(Field):
    def forward(self, t, y):
        return nn.functional.dropout(super().forward(t, y), 0.2)


@pytest.mark.parametrize("limit", [None, 1, 3])
@pytest.mark.parametrize("case", NOISY)
def test_dropout_draws_the_same_again(case, limit):
    """The gradient of the noise that was drawn, and the generator stands where it stood."""
    options = {"method": case, **NOISY[case]} if case in ADAPTIVE_METHODS else NOISY[case]
    found = []
    for gradient in ({"gradient": "direct"}, {"gradient": "checkpoint", "max_checkpoints": limit}):
        func = Noisy()
        torch.manual_seed(3)
        found.append(gradients(func, TIMES, **options, **gradient))
        found[-1] += (torch.get_rng_state(),)
    (ys, expected, state), (again, grads, state_again) = found
    assert torch.equal(ys, again) and torch.equal(state, state_again)
    for x, y in zip(grads, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=ROUNDING, atol=ROUNDING)


def test_dropout_per_sample_is_refused_in_words():
    with pytest.raises(NotImplementedError, match="func draws random numbers"):
        solve(Noisy(), Y0, TIMES, gradient="checkpoint", step_control="per_sample", min_step=0.1)


# ---- what it costs ----


def test_func_is_called_without_a_graph_forwards():
    """Nothing is recorded on the way forward, but for the look at the first slope."""
    graphs = []
    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)

    def func(t, y):
        graphs.append(torch.is_grad_enabled())
        return -weight * y

    ys = solve(func, Y0, TIMES, gradient="checkpoint", adjoint_params=(weight,)).ys
    assert not any(graphs)
    graphs.clear()
    ys.sum().backward()
    assert all(graphs) and graphs


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("steps", [1, 7, 30])
def test_calls_of_func_are_the_fewest(steps, limit):
    """On a grid the number of steps made again is that of the best schedule, whose first pass is the solve itself; each costs
    a call a stage."""
    solution = solve(
        func := Field(), Y0, [0.0, 1.0], method="rk4", step_size=1 / steps, gradient="checkpoint", max_checkpoints=limit
    )
    solution.ys.sum().backward()
    assert solution.stats.nfe_backward == 4 * (steps + fewest(steps, limit) - binomial_schedule(steps, limit)[-1])
    assert all(p.grad is not None for p in func.parameters())


@pytest.mark.parametrize("limit", [1, 2, 4, 9])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_at_most_the_budget_is_kept(method, limit, monkeypatch):
    """States on the way forward and back, counted."""
    from odenet_cuda.gradients import checkpoint

    counts = []
    record = checkpoint.Recomputation.record

    def counting(self, index, state):
        counts.append(sum(step.y0 is not None for step in self.steps))
        return record(self, index, state)

    monkeypatch.setattr(checkpoint.Recomputation, "record", counting)
    options = {"step_size": 0.05} if method == "rk4" else {"rtol": 1e-9, "atol": 1e-9}
    ys = solve(Field(), Y0, [0.0, 1.0], method=method, gradient="checkpoint", max_checkpoints=limit, **options).ys
    ys.sum().backward()
    assert len(counts) > 12 and 1 <= max(counts) <= limit


def test_backward_twice_with_a_budget():
    """What was let go the first time is made again the second."""
    y0 = Y0.clone().requires_grad_()
    ys = solve(Field(), y0, [0.0, 2.0], rtol=1e-7, atol=1e-7, gradient="checkpoint", max_checkpoints=4).ys
    first, second = (torch.autograd.grad(ys[-1].sum(), y0, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=ROUNDING, atol=ROUNDING)


# ---- the schedule ----


@lru_cache(None)
def fewest(steps, slots):
    """Steps made again by the best schedule, found by trying all."""
    if steps == 1:
        return 0
    if slots == 1:
        return steps * (steps - 1) // 2
    return min(m + fewest(steps - m, slots - 1) + fewest(m, slots) for m in range(1, steps))


def by_formula(steps, slots):
    if steps == 1:
        return 0
    if slots == 1:
        return steps * (steps - 1) // 2
    split = binomial_split(steps, slots)
    return split + by_formula(steps - split, slots - 1) + by_formula(split, slots)


@pytest.mark.parametrize("slots", range(1, 8))
def test_binomial_splits_are_the_best(slots):
    for steps in range(1, 60):
        assert by_formula(steps, slots) == fewest(steps, slots)


@pytest.mark.parametrize("steps", [17, 40, 64])
def test_the_best_of_what_is_held(steps):
    """Of states evenly spread those are kept with which the fewest steps are made again: every choice is tried."""
    held, slots = list(range(0, steps, -(-steps // 6))), 6

    def cost(kept):
        ends = [*kept[1:], steps]
        return sum(steps_again(end - begin, slots - i) for i, (begin, end) in enumerate(zip(kept, ends, strict=True)))

    choices = [(0, *rest) for count in range(len(held)) for rest in combinations(held[1:], count)]
    assert cost(sorted(best_subset(held, steps, slots))) == min(map(cost, choices))


def test_binomial_schedule():
    """All states where there is room; else as many as allowed, the first among them, closer towards the end."""
    assert binomial_schedule(5, 8) == [0, 1, 2, 3, 4]
    kept = binomial_schedule(100, 6)
    gaps = [b - a for a, b in zip(kept, [*kept[1:], 100], strict=True)]
    assert len(kept) == 6 and kept[0] == 0 and gaps[0] > gaps[2] > gaps[-1]


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_states_of_an_unknown_number_of_steps(limit):
    """At any time at most the limit, the first always, evenly spread."""

    class Kept:
        def __init__(self):
            self.y0, self.k = None, []

    checkpoints, steps = Checkpoints(limit), []
    for _ in range(200):
        steps.append(step := Kept())
        if checkpoints.add(step):
            step.y0 = []
        held = [i for i, old in enumerate(steps) if old.y0 is not None]
        assert 1 <= len(held) <= limit and held[0] == 0
        assert held == list(range(0, len(steps), checkpoints.stride))[: len(held)]
        assert limit == 1 or len(steps) - held[-1] <= checkpoints.stride


# ---- errors ----


def test_a_tensor_that_func_comes_to_later_is_refused_in_words():
    """It is neither used at the start nor at the end."""
    early, late = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    func = lambda t, y: -(late if 0.4 < float(t) < 0.8 else early) * y  # noqa: E731
    ys = solve(func, Y0, [0.0, 1.0], method="rk4", step_size=0.1, gradient="checkpoint").ys
    with pytest.raises(RuntimeError, match="no gradient: name it in adjoint_params"):
        ys.sum().backward()


@pytest.mark.parametrize("limit", [0, -1, 2.5, True, "all"])
def test_max_checkpoints_is_checked(limit):
    with pytest.raises(ValueError, match="max_checkpoints must be a whole number of at least 1"):
        solve(Field(), Y0, TIMES, gradient="checkpoint", max_checkpoints=limit)


def test_max_checkpoints_of_another_gradient():
    with pytest.raises(ValueError, match="max_checkpoints needs gradient='checkpoint', got gradient='adjoint'"):
        solve(Field(), Y0, TIMES, gradient="adjoint", max_checkpoints=3)
