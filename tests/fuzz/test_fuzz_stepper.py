"""The stepper beside scipy: random systems, states, times, options and failures. An answer to tolerance, or our words."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from fuzzing import ADAPTIVE, FIXED, examples, tick
from hypothesis import assume, event, given, note
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from torch import Tensor

from odenet_cuda import SolverError, solve

# An adaptive solve may be off by so many tolerances for each step of a system that hardly magnifies errors.
STEPS_TOLERANCE = 30.0
GRID = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}  # order
FAILED = {"underflow in dt", "non-finite values", "max_num_steps exceeded"}
MOST_STEPS = 20_000


class System:
    """dy/dt = s f(s (t - t0)) on the vector of all numbers: time may run far from 0 and at another speed."""

    def __init__(self, kind: str, n: int, seed: int, t0: float, speed: float):
        self.kind, self.n, self.t0, self.speed = kind, n, t0, speed
        self.given = f"System({kind!r}, {n}, {seed}, {t0}, {speed})"
        draw = np.random.default_rng(seed)
        turn = draw.normal(size=(n, n)) / max(1.0, math.sqrt(n))
        self.matrix = turn - turn.T - 0.3 * np.eye(n)
        self.push = draw.normal(size=n)
        self.y0 = draw.uniform(-1, 1, size=n)

    def __repr__(self) -> str:
        return self.given

    def slope(self, t: Any, y: Any, lib: Any, matrix: Any, push: Any) -> Any:
        """For NumPy and torch alike."""
        t = (t - self.t0) * self.speed
        if self.kind == "linear":
            slope = y @ matrix.T + push * lib.cos(2 * t)
        elif self.kind == "bounded":
            slope = lib.tanh(y @ matrix.T + push) - y
        elif self.kind == "quadrature":
            slope = push * lib.cos(3 * t) + 0 * y
        else:  # pairs of a predator and its prey
            slope = lib.sin(y @ matrix.T) * (1 + 0.5 * lib.sin(t))
        return slope * self.speed

    def numpy(self, t: float, y: np.ndarray) -> np.ndarray:
        return self.slope(t, y, np, self.matrix, self.push)

    def exact(self, times: list[float]) -> np.ndarray:
        """Solved in a time of its own, so that an offset costs no digits."""
        here = System.__new__(System)
        here.__dict__.update(self.__dict__, t0=0.0, speed=1.0)
        own = [(t - self.t0) * self.speed for t in times]
        found = solve_ivp(here.numpy, (own[0], own[-1]), self.y0, t_eval=own, method="DOP853", rtol=1e-12, atol=1e-13)
        return found.y.T


class Packed:
    """The system on a state of leaves with any shape and layout."""

    def __init__(self, system: System, shapes: list[tuple[int, ...]], kind: str, dtype: torch.dtype):
        self.system, self.shapes, self.kind, self.dtype = system, shapes, kind, dtype
        self.given = f"Packed({system}, {shapes}, {kind!r}, {dtype})"
        self.matrix, self.push = torch.tensor(system.matrix, dtype=dtype), torch.tensor(system.push, dtype=dtype)

    def __repr__(self) -> str:
        return self.given

    def state(self, flat: Tensor, strided: bool) -> Any:
        parts = flat.split([math.prod(shape) for shape in self.shapes], -1)
        leaves = [part.reshape((*flat.shape[:-1], *shape)) for part, shape in zip(parts, self.shapes, strict=True)]
        if strided:  # the same numbers, every other one of a larger tensor
            leaves = [torch.stack([leaf, leaf * 0], -1)[..., 0] for leaf in leaves]
        if self.kind == "tensor":
            return leaves[0]
        if self.kind == "dict":
            return {f"part {i}": leaf for i, leaf in enumerate(leaves)}
        if self.kind == "nest":
            return [leaves[0], (leaves[1:], {"none": ()})] if len(leaves) > 1 else [[leaves[0]]]
        return tuple(leaves)

    def flat(self, state: Any, axes: int) -> Tensor:
        leaves = torch.utils._pytree.tree_leaves(state)
        return torch.cat([leaf.reshape((*leaf.shape[:axes], -1)) for leaf in leaves], -1)

    def __call__(self, t: Tensor, state: Any) -> Any:
        y = self.flat(state, 0)
        return self.state(self.system.slope(t.double(), y, torch, self.matrix, self.push).to(self.dtype), False)


@st.composite
def problems(draw: Any) -> tuple[System, Packed, list[float], bool]:
    kind = draw(st.sampled_from(["tensor", "tuple", "dict", "nest"]))
    shapes = draw(st.lists(st.sampled_from([(), (1,), (3,), (2, 2), (1, 1, 2), (5,)]), min_size=1, max_size=3))
    shapes = shapes[:1] if kind == "tensor" else shapes
    n = sum(map(math.prod, shapes))
    t0 = draw(st.sampled_from([0.0, 0.0, 0.0, -3.0, 1e3, 1e9]))
    speed = draw(st.sampled_from([1.0, 1.0, 1e3, 1e-3])) if abs(t0) < 1e3 else 1.0
    system = System(draw(st.sampled_from(["linear", "bounded", "quadrature", "waves"])), n, draw(st.integers(0, 99)), t0, speed)
    gaps = draw(st.lists(st.sampled_from([1.0, 0.3, 0.01, 1e-6]), min_size=1, max_size=6))
    if draw(st.integers(0, 7)) == 7:
        gaps = [0.02] * 60
    sign = draw(st.sampled_from([1, -1]))
    times = [t0]
    for gap in gaps:
        times.append(times[-1] + sign * gap / speed)
    assume(len(set(times)) == len(times))
    dtype = draw(st.sampled_from([torch.float64, torch.float64, torch.float32])) if abs(t0) < 1e3 else torch.float64
    return system, Packed(system, shapes, kind, dtype), times, draw(st.booleans())


@st.composite
def options(draw: Any, times: list[float]) -> dict[str, Any]:
    """Options that change the steps, and not what is right."""
    span = abs(times[-1] - times[0])
    inside = [times[0] + x * (times[-1] - times[0]) for x in (0.25, 0.5, 0.77)]
    choices = {
        "first_step": [max(span * 1e-4, 4 * math.ulp(times[0])), span, span * 10],  # less does not change the time
        "max_step": [span / 7, span * 3],
        "step_t": [inside[:1], inside, [times[-1] + 1, *inside[1:]], [times[0]]],
        "jump_t": [[times[0] + x * (times[-1] - times[0]) for x in (0.2, 0.6)], [times[0] + 0.9 * (times[-1] - times[0])]],
        "controller": ["PI", "PID", (0.3, 0.4, 0.0)],
        "safety": [0.5, 0.95],
        "ifactor": [2.0, 50.0],
        "dfactor": [0.5, 0.05],
        "dense": [True],
    }
    names = draw(st.lists(st.sampled_from(sorted(choices)), max_size=3, unique=True))
    return {name: draw(st.sampled_from(choices[name])) for name in names}


def told(packed: Packed, times: list[float], how: dict[str, Any]) -> None:
    note(f"packed = {packed}; y0 = {packed.system.y0.tolist()}")
    note(f"solve(packed, packed.state(torch.tensor(y0), False), {times}, **{how})")


@examples(short=30, fresh=300)
@given(problems(), st.data())
def test_adaptive(problem, data):
    """Values at every output, from both directions; steps land where they are told to."""
    tick()
    system, packed, times, strided = problem
    method = data.draw(st.sampled_from(ADAPTIVE))
    loose = method in ("fehlberg2", "adaptive_heun") or packed.dtype == torch.float32
    rtol = data.draw(st.sampled_from([1e-3, 1e-4] if loose else [1e-3, 1e-6, 1e-9]))
    how = {"method": method, "rtol": rtol, "atol": rtol, "max_num_steps": MOST_STEPS, **data.draw(options(times))}
    told(packed, times, how)
    y0 = packed.state(torch.tensor(system.y0, dtype=packed.dtype), strided)
    solution = solve(packed, y0, times, **how)
    steps = int(solution.stats.num_accepted)
    found = packed.flat(solution.ys, 1)
    right = torch.tensor(system.exact(times))
    assert found.shape == right.shape and found.dtype == packed.dtype
    # float32 takes its time with 24 bits; an offset of 1e9 leaves 1e-7 of it.
    resolution = 2.0**-52 * (abs(system.t0) + 1) * system.speed + torch.finfo(packed.dtype).eps * (
        1 + abs(times[0]) * system.speed
    )
    size = 1 + float(right.abs().max())
    allowed = (STEPS_TOLERANCE * rtol * max(steps, 4) ** 0.5 + 30 * resolution * max(steps, 1)) * size * 4
    allowed *= 3 if method == "fehlberg2" else 1  # whose estimate is that far off: torchdiffeq's errs as much
    gap = float((found.double() - right).abs().max())
    assert gap <= allowed, f"off by {gap:.1e}, allowed {allowed:.1e}, {steps} steps"
    if how.get("dense") and method != "dopri8":  # whose steps are too long for any interpolant
        middle = times[-2] + 0.4 * (times[-1] - times[-2])
        between = torch.tensor(system.exact([times[0], middle]))[-1]
        gap = float((packed.flat(solution.interpolant(middle), 0).double() - between).abs().max())
        assert gap <= 100 * allowed, f"the interpolant is off by {gap:.1e}"


TABLEAUS: dict[str, tuple[list[list[float]], list[float]]] = {
    "euler": ([[]], [1.0]),
    "midpoint": ([[], [1 / 2]], [0.0, 1.0]),
    "heun2": ([[], [1.0]], [1 / 2, 1 / 2]),
    "heun3": ([[], [1 / 3], [0.0, 2 / 3]], [1 / 4, 0.0, 3 / 4]),
    "rk4": ([[], [1 / 3], [-1 / 3, 1.0], [1.0, -1.0, 1.0]], [1 / 8, 3 / 8, 3 / 8, 1 / 8]),
}


def on_grid(system: System, method: str, grid: list[float]) -> np.ndarray:
    """The textbook's loop."""
    a, b = TABLEAUS[method]
    ys = [system.y0]
    for t0, t1 in pairwise(grid):
        dt, k = t1 - t0, []
        for row in a:
            y = ys[-1] + dt * sum((x * slope for x, slope in zip(row, k, strict=True)), np.zeros(system.n))
            k.append(system.numpy(t0 + sum(row) * dt, y))
        ys.append(ys[-1] + dt * sum(x * slope for x, slope in zip(b, k, strict=True)))
    return np.array(ys)


@examples(short=25, fresh=250)
@given(problems(), st.sampled_from(FIXED))
def test_fixed(problem, method):
    """Step for step the textbook's formulas, on the grid of the times."""
    tick()
    system, packed, times, strided = problem
    told(packed, times, {"method": method})
    found = packed.flat(
        solve(packed, packed.state(torch.tensor(system.y0, dtype=packed.dtype), strided), times, method=method).ys, 1
    )
    right = torch.tensor(on_grid(system, method, times))
    unit = torch.finfo(packed.dtype).eps * (1 + abs(times[0]) * system.speed)
    gap = float((found.double() - right).abs().max())
    assert gap <= 200 * unit * len(times) * (1 + float(right.abs().max())), f"off by {gap:.1e}"


class Broken:
    """A rotation until some time, or some size, then something else; per sample where y has rows."""

    def __init__(self, how: str, at: float):
        self.how, self.at = how, at

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        slope = torch.stack([y[..., 1], -y[..., 0]], -1)
        late = (t > self.at).expand(slope.shape) if t.dim() else t > self.at
        if self.how == "stiff":
            return slope - 1e7 * (y - torch.cos(t))
        if self.how == "blow up":
            return slope + y**3 * 10
        if self.how == "underflow":
            return slope + torch.where(late, torch.sin(1e18 * y), 0 * y)
        bad = {"nan": math.nan, "inf": math.inf}[self.how]
        return torch.where(late, torch.full_like(y, bad), slope)


@examples(short=25, fresh=250)
@given(
    st.sampled_from(["nan", "inf", "stiff", "blow up", "underflow"]), st.sampled_from([-1.0, 0.0, 0.4, 0.9, 5.0]),
    st.sampled_from(ADAPTIVE), st.sampled_from(["joint", "per_sample"]), st.sampled_from(["raise", "return"]),
    st.sampled_from([1, 30, 400]), st.sampled_from(["none", "direct", "adjoint", "checkpoint", "quadrature"]),
)  # fmt: skip
def test_failures(how, at, method, control, on_failure, most, gradient):
    """A solve that fails says so in words, and what it got before is right; NaN is where it did not get."""
    tick()
    y0 = torch.tensor([[1.0, 0.0], [0.0, 0.5]], dtype=torch.float64).requires_grad_(gradient != "none")
    t = [0.0, 0.3, 0.6, 1.2]
    given = {"method": method, "step_control": control, "on_failure": on_failure, "max_num_steps": most, "rtol": 1e-5}
    if gradient != "none":
        given["gradient"] = gradient
    note(f"solve(Broken({how!r}, {at}), y0, {t}, {given})")
    try:
        solution = solve(Broken(how, at), y0, t, **given)
    except SolverError as error:
        assert on_failure == "raise" and error.status in FAILED and "Remedy" in str(error)
        solution = error.solution
        event("raised: " + error.status)
    words = solution.status if isinstance(solution.status, list) else [solution.status] * 2
    assert set(words) <= FAILED | {"success"}
    ys = solution.ys.detach()
    for row, word in enumerate(words):
        got = ys[:, row].isfinite().all(-1)
        assert bool(got[0]) and torch.equal(got, got.cummin(0).values), "a number after one that was not reached"
        if word == "success":
            assert bool(got.all())
        else:
            assert not bool(got[-1])
        if how in ("nan", "inf"):
            reached = torch.tensor(t)[got]
            assert float(reached[-1]) <= max(at, 0.0) or at < 0, "an answer from after the function ended"
            angle = reached[:, None].double()
            start = y0[row].detach()
            right = torch.cat(
                [start[0] * angle.cos() + start[1] * angle.sin(), start[1] * angle.cos() - start[0] * angle.sin()], 1
            )
            gap = float((ys[:, row][got] - right).abs().max())
            assert gap < 1e-3, f"sample {row} is off by {gap:.1e} before it failed"
    if gradient != "none" and solution.ys.requires_grad and how != "underflow":  # whose derivative, 1e18 a step, overflows
        loss = solution.ys[:, [i for i, word in enumerate(words) if word == "success"]].sum()
        if loss.requires_grad and "success" in words:
            (grad,) = torch.autograd.grad(loss, y0)  # of those that did not fail
            assert bool(grad[[i for i, word in enumerate(words) if word == "success"]].isfinite().all())
