"""The numbers of the methods: order conditions, interpolants, and the order of convergence that they give."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from order_conditions import density, residual, rooted_trees

from odenet_cuda import formulas, solve
from odenet_cuda.methods import ADAPTIVE, DOPRI5, EXPLICIT, FIXED, HEUN2, ON_GRID, RK4, find_method
from odenet_cuda.tableau import MAX_DEGREE, MAX_STAGES, ButcherTableau

ALL = {**EXPLICIT, **FIXED}
# Conditions are sums of up to 14 products whose factors reach 100, in float64.
HOLDS = 1e-13
# At its end an interpolant is a sum of coefficients that reach 121.
END_HOLDS = 1e-12
# Its slope is too, times the degree; those of dopri8 are known to eleven digits in this combination.
SLOPE_HOLDS = {"dopri8": 1e-10}
# The violations at order + 1 of the methods here are at least 1e-6: they are wrong by far more than rounding.
FAILS = 1e-7
# A measured order differs from the true one by a term of size h, and h is small enough for a quarter.
ORDER_TOLERANCE = 0.25
# Of those of Verner the error is rounding before h is as small as that.
ORDER_TOLERANCES = {7: 0.75, 9: 0.9}
THETAS = (0.1, 0.25, 0.5, 0.75, 0.9)

every = pytest.mark.parametrize("name", ALL)
every_adaptive = pytest.mark.parametrize("name", EXPLICIT)


def at(tableau: ButcherTableau, theta: float) -> np.ndarray:
    """The weights b_j(theta) of the interpolant."""
    p = np.array(tableau.p)
    return p @ theta ** np.arange(1, p.shape[1] + 1)


def worst(tableau: ButcherTableau, order: int) -> float:
    """The largest violation by the interpolant of the conditions of exactly this order."""
    return max(residual(tableau, at(tableau, theta), order, theta) for theta in THETAS)


def check_order(tableau: ButcherTableau) -> None:
    """b, and the interpolant uniformly in theta, have the order that the tableau states, and no more."""
    weights = np.array(tableau.b)
    for order in range(1, tableau.order + 1):
        assert residual(tableau, weights, order) < HOLDS
    assert residual(tableau, weights, tableau.order + 1) > FAILS
    for order in range(1, tableau.p_order + 1):
        assert worst(tableau, order) < HOLDS
    assert worst(tableau, tableau.p_order + 1) > FAILS


# ---- order conditions ----


def test_rooted_trees():
    """The number of rooted trees of each order, and the densities of those of order 4."""
    assert [len(rooted_trees(order)) for order in range(1, 10)] == [1, 1, 2, 4, 9, 20, 48, 115, 286]
    assert sorted(map(density, rooted_trees(4))) == [4, 8, 12, 24]


@every
def test_order_conditions(name):
    """b and the interpolant have the order that the method states, and no more."""
    check_order(ALL[name])


@every_adaptive
def test_order_of_the_embedded_weights(name):
    """The embedded weights have one order less than b, and no more."""
    tableau = EXPLICIT[name]
    embedded = np.array(tableau.b) - np.array(tableau.e)
    for order in range(1, tableau.order):
        assert residual(tableau, embedded, order) < HOLDS
    assert residual(tableau, embedded, tableau.order) > FAILS


@every
def test_interpolant_ends(name):
    """The interpolant begins in y0 and ends in y1, with the slope at y0, and at y1 where that is a stage."""
    tableau = ALL[name]
    p, first = np.array(tableau.p), np.eye(tableau.stages)[0]
    np.testing.assert_allclose(at(tableau, 0.0), 0.0, atol=0)
    np.testing.assert_allclose(at(tableau, 1.0), tableau.b, atol=END_HOLDS)
    np.testing.assert_allclose(p[:, 0], first, atol=HOLDS)
    if tableau.fsal:
        slopes = p @ np.arange(1, p.shape[1] + 1)
        np.testing.assert_allclose(slopes, np.eye(tableau.stages)[-1], atol=SLOPE_HOLDS.get(name, END_HOLDS))


@every
def test_first_same_as_last(name):
    """Every adaptive method of order 3 and more ends with the slope at (t1, y1), the others with one at t1 beside y1."""
    tableau = ALL[name]
    assert tableau.fsal == (name in EXPLICIT and tableau.order > 2)
    assert tableau.c[-1] == 1 or name in FIXED
    assert tableau.rows[-1] == (tableau.b[:-1] if tableau.fsal else tableau.b)
    assert bool(tableau.e) == (name in EXPLICIT)
    assert tableau.stages == len(tableau.c) <= MAX_STAGES
    if tableau.fsal:
        assert tableau.a[-1] == tableau.b[:-1] and tableau.b[-1] == 0 and tableau.c[-1] == 1


@pytest.mark.parametrize(("name", "scipy_name"), [("dopri5", "RK45"), ("bosh3", "RK23")], ids=["dopri5", "bosh3"])
def test_coefficients_are_those_of_scipy(name, scipy_name):
    """Nodes, matrix and weights are those of scipy's class of the same method."""
    other, tableau = getattr(pytest.importorskip("scipy.integrate"), scipy_name), EXPLICIT[name]
    stages = tableau.stages - 1
    np.testing.assert_allclose(tableau.c[:stages], other.C, rtol=HOLDS)
    np.testing.assert_allclose(tableau.b[:stages], other.B, rtol=HOLDS)
    for i in range(stages):
        np.testing.assert_allclose(tableau.a[i], other.A[i, :i], rtol=HOLDS)


# ---- other interpolants ----


@every
def test_linear(name):
    """The straight line: the same method, an interpolant of order 1."""
    tableau = ALL[name].linear()
    assert (tableau.c, tableau.a, tableau.b, tableau.e) == (ALL[name].c, ALL[name].a, ALL[name].b, ALL[name].e)
    np.testing.assert_allclose(at(tableau, 0.3), 0.3 * np.array(tableau.b), rtol=HOLDS)
    check_order(tableau)


@every
def test_cubic(name):
    """The cubic Hermite interpolant: values and slopes of both ends; f(t1, y1) joins where it was not a stage."""
    method = ALL[name]
    tableau = method.cubic()
    added = 0 if method.fsal else 1
    assert tableau.stages == method.stages + added and tableau.fsal
    assert tableau.b == method.b + (0.0,) * added and tableau.a[: method.stages] == method.a
    assert tableau.e == (method.e + (0.0,) * added if method.e else ())
    p = np.array(tableau.p)
    assert p.shape[1] == 3
    np.testing.assert_allclose(at(tableau, 1.0), tableau.b, atol=HOLDS)
    np.testing.assert_allclose(p[:, 0], np.eye(tableau.stages)[0], atol=HOLDS)
    np.testing.assert_allclose(p @ [1, 2, 3], np.eye(tableau.stages)[-1], atol=END_HOLDS)
    check_order(tableau)


# ---- wrong tableaus ----


def changed(values: tuple, index: int, by: float = 1e-6) -> tuple:
    """values with one number off."""
    return (*values[:index], values[index] + by, *values[index + 1 :])


def with_row(rows: tuple, index: int, row: tuple) -> tuple:
    """rows with one of them replaced."""
    return (*rows[:index], row, *rows[index + 1 :])


def many(stages: int) -> dict:
    """An explicit method of so many stages, all but the first without weight."""
    zeros = (0.0,) * (stages - 1)
    return {
        "c": (0.0, *zeros),
        "a": tuple((0.0,) * i for i in range(stages)),
        "b": (1.0, *zeros),
        "e": (),
        "p": ((1.0,), *((0.0,) for _ in zeros)),
    }


WRONG = [
    pytest.param({"c": changed(DOPRI5.c, 1)}, r"row 1 of a must add up to c\[1\]", id="node"),
    pytest.param({"c": changed(DOPRI5.c, 0)}, r"row 0 of a must add up to c\[0\]", id="first-node"),
    pytest.param({"a": with_row(DOPRI5.a, 3, changed(DOPRI5.a[3], 1))}, r"row 3 of a must add up", id="matrix"),
    pytest.param({"a": with_row(DOPRI5.a, 3, DOPRI5.a[2])}, "a must have rows of 0, 1, 2", id="short-row"),
    pytest.param({"a": DOPRI5.a[:-1]}, "a must have rows of 0, 1, 2", id="missing-row"),
    pytest.param({"b": changed(DOPRI5.b, 0)}, "b must add up to 1", id="weights"),
    pytest.param({"b": DOPRI5.b[:-1]}, "b and p must have one entry a node", id="missing-weight"),
    pytest.param({"e": changed(DOPRI5.e, 0)}, "e must add up to 0", id="error-weights"),
    pytest.param({"e": DOPRI5.e[:-1]}, "e must be empty or have one entry a node", id="missing-error-weight"),
    pytest.param({"p": DOPRI5.p[:-1]}, "b and p must have one entry a node", id="missing-polynomial"),
    pytest.param({"p": with_row(DOPRI5.p, 2, changed(DOPRI5.p[2], 1))}, r"row 2 of p must add up", id="polynomial"),
    pytest.param({"p": with_row(DOPRI5.p, 2, (*DOPRI5.p[2], 0.0))}, "p must have rows of one length", id="degree"),
    pytest.param(
        {"p": with_row(DOPRI5.p, 0, changed(changed(DOPRI5.p[0], 1), 2, -1e-6))},
        r"b_j\(theta\) must add up to theta",
        id="polynomials-do-not-add-up",
    ),
    pytest.param(
        {"p": tuple((*row, *(0.0,) * (MAX_DEGREE - len(row) + 1)) for row in DOPRI5.p)},
        "p must have rows of one length",
        id="degree-too-high",
    ),
    pytest.param(many(MAX_STAGES + 1), "c must have at most 17 nodes, got 18", id="too-many-stages"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_tableau(change, message):
    """Numbers that contradict each other are refused, and the message says which."""
    with pytest.raises(ValueError, match=message):
        replace(DOPRI5, **change)


def test_most_stages():
    """As many stages as the kernels take are accepted."""
    assert replace(DOPRI5, **many(MAX_STAGES)).stages == MAX_STAGES


def test_tableaus_are_constant():
    """A tableau cannot be changed after its checks."""
    with pytest.raises(AttributeError):
        RK4.order = 5  # type: ignore[misc]


# ---- convergence ----

END = 4.0
PROBLEMS = {
    # func and the exact solution
    "growth": (lambda t, y: y * torch.cos(t), lambda t: math.exp(math.sin(t))),
    "logistic": (lambda t, y: y * (1 - y), lambda t: 1 / (1 + 9 * math.exp(-t))),
}
# Steps to the end, by order: few enough that the error stays above rounding, many enough that the order shows.
STEPS = {
    1: (128, 256),
    2: (128, 256),
    3: (128, 256),
    4: (128, 256),
    5: (64, 128),
    6: (24, 48),
    7: (16, 32),
    8: (12, 24),
    9: (8, 16),
}
# Ends of steps at which the error is taken, whatever the number of steps: at one alone it may happen to vanish.
COMMON = [0.0, 1.0, 2.0, 3.0, 4.0]
problems = pytest.mark.parametrize("problem", PROBLEMS)


def start(problem: str) -> torch.Tensor:
    return torch.tensor([PROBLEMS[problem][1](0.0)], dtype=torch.float64)


def largest_error(problem: str, t: list[float], values: list[float]) -> float:
    exact = PROBLEMS[problem][1]
    return max(abs(value - exact(time)) for time, value in zip(t, values, strict=True))


def by_formulas(name: str, problem: str, steps: int) -> list[float]:
    """The solution at the common times by equal steps of the formulas in plain torch."""
    func, tableau, y, dt = PROBLEMS[problem][0], ALL[name], start(problem), END / steps
    values = [float(y)]
    for step in range(steps):
        k: list[torch.Tensor] = []
        for node, row in zip(tableau.c, tableau.a, strict=True):
            point = formulas.stage(y, k, row, dt) if k else y
            k.append(func(torch.tensor((step + node) * dt, dtype=torch.float64), point))
        y = formulas.stage(y, k, tableau.b, dt)
        if (step + 1) % (steps // (len(COMMON) - 1)) == 0:
            values.append(float(y))
    return values


def by_solve(name: str, problem: str, steps: int, t: list[float]) -> list[float]:
    """The solution at t by equal steps of solve; min_step makes an adaptive method accept each."""
    h = END / steps
    options = {"step_size": h} if name in FIXED else {"first_step": h, "min_step": h, "max_step": h}
    solution = solve(PROBLEMS[problem][0], start(problem), t, method=name, **options)
    assert int(solution.stats.num_accepted) == steps
    return solution.ys[:, 0].tolist()


def check_convergence(errors: list[float], order: int) -> None:
    """Twice as many steps divide the error by 2**order."""
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=ORDER_TOLERANCES.get(order, ORDER_TOLERANCE))


@every
@problems
def test_convergence_of_the_formulas(name, problem):
    """The formulas with equal steps converge with the order of the method."""
    order = ALL[name].order
    errors = [largest_error(problem, COMMON, by_formulas(name, problem, steps)) for steps in STEPS[order]]
    check_convergence(errors, order)


@every
@problems
def test_convergence_of_solve(name, problem):
    """solve with equal steps converges with the order of the method."""
    order = ALL[name].order
    errors = [largest_error(problem, COMMON, by_solve(name, problem, steps, COMMON)) for steps in STEPS[order]]
    check_convergence(errors, order)


@every
@problems
def test_convergence_inside_steps(name, problem):
    """Off the ends of steps the error has the order of the interpolant plus one, or that of the method if lower."""
    t = np.linspace(0, END, 514).tolist()
    order = min(ALL[name].order, ALL[name].p_order + 1)
    counts = (128, 256) if order == 5 else STEPS[order]  # the largest of many errors settles later
    errors = [largest_error(problem, t, by_solve(name, problem, steps, t)) for steps in counts]
    check_convergence(errors, order)


@every
def test_one_step_of_solve_is_that_of_the_formulas(name):
    """One step, and an output inside it, by solve and by the formulas."""
    (func, _), tableau, h = PROBLEMS["growth"], ALL[name], 0.25
    y0 = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    k: list[torch.Tensor] = []
    for node, row in zip(tableau.c, tableau.a, strict=True):
        k.append(func(torch.tensor(node * h, dtype=torch.float64), formulas.stage(y0, k, row, h) if k else y0))
    options = {"step_size": h} if name in FIXED else {"first_step": h, "min_step": h, "max_step": h}
    ys = solve(func, y0, [0.0, 0.3 * h, h], method=name, **options).ys
    torch.testing.assert_close(ys[1], formulas.dense_output(tableau, y0, k, 0.3, h), rtol=HOLDS, atol=HOLDS)
    torch.testing.assert_close(ys[2], formulas.stage(y0, k, tableau.b, h), rtol=HOLDS, atol=HOLDS)


# ---- names ----


@every
def test_find_method(name):
    """A method is found by its name."""
    assert find_method(name) is ALL[name]


@pytest.mark.parametrize("name", ["", "Dopri5", "rk45", None], ids=["empty", "capital", "unknown", "none"])
def test_find_unknown_method(name):
    """Any other name is refused with those that there are."""
    with pytest.raises(ValueError, match=f"method must be one of dopri8, .*dopri5, .*rk4, .*; got {name!r}"):
        find_method(name)


def test_every_method_of_torchdiffeq_is_known():
    """Every name that torchdiffeq takes is a method here."""
    names = set(pytest.importorskip("torchdiffeq._impl.odeint").SOLVERS)
    assert names <= {*ADAPTIVE, *ON_GRID}


def test_adaptive_and_fixed_are_apart():
    """No name is both, and a method with a straight line instead is still the method."""
    assert not set(EXPLICIT) & set(FIXED)
    assert HEUN2.linear().order == HEUN2.order
