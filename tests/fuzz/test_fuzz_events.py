"""Events of compiled fields beside those by the stepper: random fields, functions, directions, changes, times and gradients.

Where the two differ, the stepper is asked once more from a state that differs in its last digits: what that changes as much is
decided by rounding, and says nothing.
"""

import random
from typing import Any

import pytest
import torch
from fuzzing import FRESH, distance, examples, tick
from hypothesis import event as seen
from hypothesis import given, note
from hypothesis import strategies as st
from torch import Tensor

from odenet_cuda import Event, SolverError, compile, solve

D = torch.float64
NUMBERS = 12 if FRESH else 3  # of solves by one library
NEAR = 1e-12  # by which the state is moved
FIELDS = (
    lambda t, y, p, q: torch.stack([y[:, 1], -p[:, 0] * y[:, 0] - q * y[:, 1]], 1),
    lambda t, y, p, q: torch.tanh(y.flip(1) * p) - q * y,
    lambda t, y, p, q: p * torch.cos(3 * t) - q * y,
    lambda t, y, p, q: torch.stack([y[:, 0] * (p[:, 0] - y[:, 1]), y[:, 1] * (y[:, 0] - p[:, 1])], 1) * q,
)
FUNCTIONS = (
    lambda t, y, p, q: y[:, 0] - 0.5 * p[:, 0],
    lambda t, y, p, q: y[:, 1] + q,
    lambda t, y, p, q: y[:, 0] * y[:, 1] - 0.1,
    lambda t, y, p, q: torch.sin(5 * t.reshape(-1)) + 0.3 * y[:, 0],
    lambda t, y, p, q: (y * y).sum(1) - 1,
    lambda t, y, p, q: torch.sign(y[:, 1] - 0.3),
    lambda t, y, p, q: 2 * y[:, 0] - p[:, 0],  # zero with the first of all
)
CHANGES = (
    lambda t, y, p, q: -0.9 * y,
    lambda t, y, p, q: y.flip(1),
    lambda t, y, p, q: y + 0.1 * p,
    lambda t, y, p, q: torch.stack([y[:, 0], -q * y[:, 1]], 1),
)


def drawn_events(draw: random.Random) -> list[Event]:
    made = []
    for _ in range(draw.choice([1, 2, 2, 3])):
        kind = draw.choice(["ends", "noted", "changes"])
        change = draw.choice(CHANGES) if kind == "changes" else None
        made.append(Event(draw.choice(FUNCTIONS), draw.choice([-1, 0, 1]), kind == "ends", change))
    return made


def outcome(func: Any, y0: Tensor, t: Any, p: Tensor, q: Tensor, how: dict[str, Any]) -> tuple[list[Tensor], str, str]:
    """What the solve finds, or the words in which it refuses, and by which engine."""
    wants = how["gradient"] != "none"
    y0, p, q = (x.clone().requires_grad_(wants) for x in (y0, p, q))
    try:
        solution = solve(func, y0, t, args=(p, q), **{**how, "gradient": how["gradient"] if wants else "direct"})
        found = [solution.event_index, solution.event_t, solution.event_y, solution.ys]
        if wants:
            loss = torch.zeros((), dtype=D)
            for i, x in enumerate(found[1:]):
                kept = x[torch.isfinite(x)]
                loss = loss + (kept * torch.cos(torch.arange(len(kept)) + i)).sum()
            found += torch.autograd.grad(loss, [y0, p, q], allow_unused=True) if loss.requires_grad else []
    except (RuntimeError, ValueError, SolverError) as error:
        return [], str(error)[:40], ""
    return found, "", solution.engine


def differ(x: tuple[list[Tensor], str, str], y: tuple[list[Tensor], str, str], tolerance: float) -> str:
    if x[1] != y[1] or len(x[0]) != len(y[0]):
        return f"{x[1] or 'a solution'} / {y[1] or 'a solution'}"
    for name, a, b in zip(("index", "t", "y", "ys", "by_y0", "by_p", "by_q"), x[0], y[0], strict=False):
        size = 0.0 if b is None else float(b.detach().abs().nan_to_num(0.0).max()) if b.numel() else 0.0
        if (gap := distance([a], [b])) > tolerance * (1 + size):
            return f"{name}: {gap}"
    return ""


@pytest.mark.usefixtures("quick_compiler")
@examples(short=4, fresh=60, shrink=False)
@given(seed=st.integers(0, 2**32 - 1))
def test_events_are_those_of_the_stepper(seed):
    tick()
    draw, chance = random.Random(seed), torch.Generator().manual_seed(seed)
    field, events = draw.choice(FIELDS), drawn_events(draw)
    func = lambda t, y, p, q: field(t, y, p, q)  # noqa: E731
    compiled = compile(func)
    method = draw.choice(["dopri5", "tsit5", "bosh3"])
    for _ in range(NUMBERS):
        rows = draw.choice([1, 2, 5, 9])
        y0, p = (torch.rand(rows, 2, dtype=D, generator=chance) * scale for scale in (2, 2))
        q = torch.rand(rows, *[1] * (field is not FIELDS[0]), dtype=D, generator=chance)
        y0 = y0 - draw.choice([0.0, 1.0])
        sign, t0 = draw.choice([1.0, -1.0]), draw.choice([0.0, -0.7, 3.0])
        t = [t0, t0 + 0.4 * sign, t0 + draw.uniform(1, 4) * sign]
        how: dict[str, Any] = {
            "method": method,
            "step_control": draw.choice(["joint", "per_sample"]) if rows == 1 else "per_sample",
            "events": events,
            "max_events": draw.choice([1, 2, 4, 20]),
            "gradient": draw.choice(["none", "none", "adjoint", "direct"]),
            "rtol": 1e-7,
            "atol": 1e-7,
        }
        found = outcome(compiled, y0, t, p, q, how)
        seen(f"{found[2]} {how['gradient']}")
        right = outcome(func, y0, t, p, q, how)
        tolerance = 1e-8 if how["gradient"] == "none" else 1e-4
        wrong = differ(found, right, tolerance)
        near = [outcome(func, y0 * (1 + s * NEAR), t, p, q, how) for s in (1, -1)] if wrong else []
        if wrong and not any([differ(x, right, tolerance / 10) for x in near]):
            note(f"seed {seed}, {how}, t {t}, y0 {y0.tolist()}, p {p.tolist()}, q {q.tolist()}")
            raise AssertionError(wrong)
