"""Outputs that are values of a function, and outputs at every n-th accepted step."""

import math

import pytest
import torch

from odenet_cuda import Event, Jump, SolverError, compile, solve, steps

D = torch.float64
Y0 = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.5, -1.0]], dtype=D)
OPTIONS = {"rtol": 1e-5, "atol": 1e-6}
GRADIENTS = ("direct", "adjoint", "checkpoint", "quadrature")
CONTROLS = ("joint", "per_sample")


def oscillator(t, y):
    return torch.stack([y[..., 1], 3 * (1 - y[..., 0] ** 2) * y[..., 1] - y[..., 0]], -1)


def energy(t, y):
    return {"energy": y.square().sum(-1), "time": y[..., 0] * 0 + (t[:, 0] if t.dim() else t)}


@pytest.mark.parametrize("t1", [2.0, -0.5])
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "fehlberg2"])
@pytest.mark.parametrize("control", CONTROLS)
def test_save_of_states_that_are_not_kept(control, method, t1):
    """As of the outputs of a solve that keeps them, to the bit, and with the same steps."""
    t = torch.linspace(0, t1, 40, dtype=D)
    options = {"step_control": control, "method": method, **OPTIONS}
    with torch.no_grad():
        free, found = solve(oscillator, Y0, t, **options), solve(oscillator, Y0, t, save=energy, **options)
    assert torch.equal(found.ys["energy"], free.ys.square().sum(-1)) and torch.equal(found.t, free.t)
    torch.testing.assert_close(found.ys["time"], t[:, None].expand(40, 3), rtol=0, atol=0)
    assert torch.equal(found.y_last, free.y_last) and found.stats.nfe == free.stats.nfe


def test_states_are_not_kept():
    """The largest tensor that is there during the solve is one state."""
    seen = []
    y0 = torch.ones(50, dtype=D)
    with torch.no_grad():
        solution = solve(lambda t, y: -y, y0, torch.linspace(0, 1, 300), save=lambda t, y: (seen.append(y.shape), y.sum())[1])
    assert solution.ys.shape == (300,) and set(seen) == {(50,)}
    torch.testing.assert_close(solution.ys, 50 * torch.exp(-torch.linspace(0, 1, 300)).double(), rtol=1e-6, atol=1e-8)


def test_save_at_times_of_samples():
    t = torch.tensor([[0.0, 0.1, 0.7, 2.0], [0.0, -0.3, math.nan, math.nan], [1.0, math.nan, math.nan, math.nan]], dtype=D)
    options = {"step_control": "per_sample", **OPTIONS}
    free = solve(oscillator, Y0, t, **options)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            found = solve(oscillator, Y0, t, save=lambda t, y: y[:, 0] * 2, **options)
        torch.testing.assert_close(found.ys, free.ys[..., 0] * 2, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(found.t, t, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_of_save(gradient, control):
    """Also of what save depends on, and of times that it reads."""
    found = []
    for inside in (False, True):
        y0, w = Y0.clone().requires_grad_(), torch.tensor(0.7, dtype=D, requires_grad=True)
        t = torch.tensor([0.0, 0.3, 1.0], dtype=D, requires_grad=True)
        save = lambda t, y, w=w: w * y.square() * t  # noqa: E731
        options = {"gradient": gradient, "step_control": control, **OPTIONS}
        if inside:
            ys = solve(oscillator, y0, t, save=save, **options).ys
        else:
            ys = solve(oscillator, y0, t, **options).ys
            ys = save(t[:, None, None], ys)
        ys.sum().backward()
        found.append((ys.detach(), y0.grad, w.grad, t.grad))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


def test_save_on_a_grid_with_jumps_events_and_compiled():
    with torch.no_grad():
        grid = solve(oscillator, Y0, [0.0, 0.5, 1.0], method="rk4", step_size=0.1, save=lambda t, y: y.sum())
        assert torch.equal(grid.ys[-1], grid.y_last.sum())
        jumps = Jump([0.5], lambda t, y, i: y + 1)
        plain, saved = (solve(oscillator, Y0, [0.0, 0.5, 1.0], jumps=jumps, save=save) for save in (None, lambda t, y: 2 * y))
        assert torch.equal(saved.ys, 2 * plain.ys)
        event = Event(lambda t, y: y[0, 0] - 1.9)
        plain, saved = (solve(oscillator, Y0, [0.0, 0.5, 1.0], events=event, save=save) for save in (None, lambda t, y: 2 * y))
        torch.testing.assert_close(saved.ys, 2 * plain.ys, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(saved.event_y, plain.event_y)
        field = compile(lambda t, y: -y)
        served = solve(field, Y0, [0.0, 1.0], save=lambda t, y: y.sum())
        assert served.engine == "stepper" and "save" in served.explanation["compiled"]
    mapped = torch.func.vmap(lambda y: solve(lambda t, y: -y, y, [0.0, 1.0], save=lambda t, y: y.sum()).ys)(Y0)
    torch.testing.assert_close(mapped[:, 1], Y0.sum(1) * math.exp(-1), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("t1", [2.0, -0.5])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("control", CONTROLS)
def test_every(control, n, t1):
    """The ends of steps that `steps` gives, beside the first and the last time."""
    options = {"step_control": control, **OPTIONS}
    found = solve(oscillator, Y0, [0.0, t1], every=n, **options)
    rows = 3 if control == "per_sample" else 1
    for row in range(rows):
        t, y, count = [0.0], [Y0], 0
        for step in steps(oscillator, Y0, 0.0, t1, **options):
            if not step.accept.reshape(-1)[row]:
                continue
            count += 1
            time = float(step.t1.reshape(-1)[row])
            if count % n == 0 or time == t1:
                t.append(time)
                y.append(step.y1)
        times = found.t[row] if control == "per_sample" else found.t
        assert times[: len(t)].tolist() == t and times[len(t) :].isnan().all()
        part = slice(row, row + 1) if control == "per_sample" else slice(None)
        assert torch.equal(found.ys[: len(t), part], torch.stack(y)[:, part])
        assert found.ys[len(t) :, part].isnan().all()


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_of_every(gradient, control):
    """As of outputs at those times: they are taken as given."""
    y0, t = Y0.clone().requires_grad_(), torch.tensor([0.0, 1.0], dtype=D, requires_grad=True)
    options = {"gradient": gradient, "step_control": control, "rtol": 1e-7, "atol": 1e-8}
    found = solve(oscillator, y0, t, every=4, **options)
    weight = torch.linspace(1, 2, len(found.ys), dtype=D)[:, None, None]
    (found.ys.nan_to_num() * weight).sum().backward()
    grads = [y0.grad.clone(), t.grad.clone()]
    y0.grad = t.grad = None
    at = found.t.detach().clone()
    middle = at[1:-1] if control == "joint" else at[:, 1:]
    if control == "joint":
        given = torch.cat([t[:1], middle, t[1:]])
    else:
        last = (~at.isnan()).sum(1) - 1
        given = torch.cat([t[0].expand(3, 1), middle], 1).scatter(1, last[:, None], t[1].expand(3, 1))
    ys = solve(oscillator, y0, given, **options).ys
    (ys.nan_to_num() * weight).sum().backward()
    exact = 1e-9 if gradient in ("direct", "checkpoint") else 1e-4
    for x, y in zip(grads, [y0.grad, t.grad], strict=True):
        torch.testing.assert_close(x, y, rtol=exact, atol=exact)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("control", CONTROLS)
def test_every_with_save_and_failures(control, grad):
    options = {"step_control": control, "every": 2, **OPTIONS}
    y0 = Y0.clone().requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        states, found = (solve(oscillator, y0, [0.0, 1.0], save=save, **options) for save in (None, energy))
        torch.testing.assert_close(found.ys["energy"], states.ys.square().sum(-1), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(found.t, states.t, rtol=0, atol=0, equal_nan=True)
        kept = solve(oscillator, y0, [0.0, 1.0], save=energy, max_num_steps=9, on_failure="return", **options)
        with pytest.raises(SolverError, match="max_num_steps") as caught:
            solve(oscillator, y0, [0.0, 1.0], save=energy, max_num_steps=9, **options)
    if control == "joint":
        reached = kept.t[:-1]
        assert torch.equal(kept.ys["time"][:-1, 0], reached) and kept.ys["energy"][-1].isnan().all() and kept.t[-1] == 1
        assert torch.equal(caught.value.solution.ys["time"][:-1, 0], reached)


def test_max_num_steps_counts_from_one_output_to_the_next():
    with torch.no_grad():
        t = torch.linspace(0, 3, 30, dtype=D)
        free = solve(oscillator, Y0, t, max_num_steps=25, **OPTIONS)
        found = solve(oscillator, Y0, t, max_num_steps=25, save=lambda t, y: y, **OPTIONS)
        assert free.stats.num_accepted > 25 and torch.equal(found.ys, free.ys)


def test_an_interrupted_solve_has_what_it_saved():
    calls = 0

    def func(t, y):
        nonlocal calls
        calls += 1
        if calls == 150:
            raise KeyboardInterrupt
        return oscillator(t, y)

    with torch.no_grad(), pytest.raises(KeyboardInterrupt) as caught:
        solve(func, Y0, torch.linspace(0, 2, 20, dtype=D), save=energy, **OPTIONS)
    kept = caught.value.solution
    known = ~kept.ys["time"][:, 0].isnan()
    assert 1 < known.sum() < 20 and torch.equal(kept.ys["time"][known, 0], kept.t[known])


def test_refusals():
    two = [0.0, 1.0]
    refused = [
        (ValueError, "every must be a whole number", two, {"every": 0}),
        (ValueError, "t must hold two times", [0.0, 0.5, 1.0], {"every": 2}),
        (ValueError, "every needs an adaptive method", two, {"every": 2, "method": "rk4"}),
        (NotImplementedError, "every is not served with events", two, {"every": 2, "events": Event(lambda t, y: y[0, 0] - 1)}),
        (NotImplementedError, "every is not served where", two, {"every": 2, "jumps": Jump([0.5], lambda t, y, i: y)}),
        (TypeError, "save must return a tensor or a nest", two, {"save": lambda t, y: 1.0}),
        (TypeError, "floating or complex", two, {"save": lambda t, y: y > 0}),
        (ValueError, "a row for each sample", two, {"save": lambda t, y: y.sum(), "step_control": "per_sample"}),
        (ValueError, "one shape and type", two, {"save": lambda t, y: y if t == 0 else y[0]}),
    ]
    for grad in (False, True):
        for error, words, t, options in refused:
            with torch.set_grad_enabled(grad), pytest.raises(error, match=words):
                solve(oscillator, Y0, t, **options)
    with pytest.raises(NotImplementedError, match="every is not served inside"):
        torch.func.vmap(lambda y: solve(lambda t, y: -y, y, two, every=2).ys)(Y0)
