"""The numbers of implicit and stiff methods: order conditions, interpolants, and stability functions."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from order_conditions import density, rooted_trees

from odenet_cuda.implicit import ImplicitStep, implicit
from odenet_cuda.methods import IMPLICIT, STIFF
from odenet_cuda.tableau import StepFunction

ALL = {**IMPLICIT, **STIFF}
HOLDS, FAILS = 2e-13, 1e-4  # published decimals have 15 to 17 digits, and products of them reach 100
THETAS = (0.1, 0.3, 0.5, 0.8, 0.95, 1.0)
every_method = pytest.mark.parametrize("name", ALL)
# what |R| tends to where stiffness grows
DAMPED = {"implicit_midpoint": 1.0, "trapezoid": 1.0, "gl4": 1.0, "gl6": 1.0}


@dataclass
class Numbers:
    """A method as k_i = f(y0 + dt sum_j alpha_ij k_j) + dt df/dy sum_j gamma_ij k_j, y1 = y0 + dt sum_j b_j k_j: Rosenbrock
    methods have both matrices (Hairer and Wanner II, IV.7), Runge-Kutta methods the first alone. to_b: from weights of the
    slopes that the method's data knows to those of k."""

    alpha: np.ndarray
    gamma: np.ndarray
    to_b: np.ndarray

    @staticmethod
    def of(method: StepFunction) -> "Numbers":
        step, stages = method.step, method.stages
        if isinstance(step, ImplicitStep):
            a = np.zeros((stages, stages))
            for i, row in enumerate(step.a, 1):
                a[i, : len(row)] = row
            if not step.ends_in_y1:
                a[-1] = method.b
            return Numbers(a, np.zeros_like(a), np.eye(stages))
        s = stages - 2
        c, lower = np.zeros((s, s)), np.zeros((s, s))
        for i in range(s):
            c[i, :i], lower[i, :i] = step.g[i], step.a[i]
        inverse = np.linalg.inv(np.eye(s) / step.gamma - c)
        to_b = np.zeros((stages, s))
        to_b[1:-1] = inverse  # u_i = dt sum_j inverse_ij k_j
        return Numbers(lower @ inverse, inverse, to_b)

    def residual(self, weights: Any, order: int, theta: float = 1.0) -> float:
        """The largest violation of the conditions of exactly this order."""
        b, both = np.asarray(weights) @ self.to_b, self.alpha + self.gamma

        def inner(tree: Any) -> np.ndarray:
            if len(tree) == 1:
                return both @ inner(tree[0])
            values = np.ones(len(b))
            for child in tree:
                values = values * (self.alpha @ inner(child))
            return values

        return max(abs(b @ inner(tree) - theta**order / density(tree)) for tree in rooted_trees(order))

    def growth(self, weights: Any, z: complex) -> complex:
        """R(z): what a step makes of y' = z y / dt from 1."""
        b, n = np.asarray(weights) @ self.to_b, len(self.alpha)
        return 1 + z * (b @ np.linalg.solve(np.eye(n) - z * (self.alpha + self.gamma), np.ones(n)))


@every_method
def test_order_conditions(name: str):
    """Those of the order that it states hold, and not one more."""
    method = ALL[name]
    numbers = Numbers.of(method)
    for order in range(1, method.order + 1):
        assert numbers.residual(method.b, order) < HOLDS, order
    assert numbers.residual(method.b, method.order + 1) > FAILS


@pytest.mark.parametrize("name", STIFF)
def test_the_embedded_method(name: str):
    """Is of one order less; that of rosenbrock23 of one more, and its error has the other sign."""
    method, sign = ALL[name], 1.0 if name == "rosenbrock23" else -1.0
    numbers, b = Numbers.of(method), np.add(method.b, sign * np.array(method.e))
    orders = [bool(numbers.residual(b, order) < HOLDS) for order in range(1, method.order + 2)]
    if name == "rosenbrock23":
        assert orders == [True, True, True]
    else:
        assert orders == [True] * (method.order - 1) + [False] * 2


@every_method
@pytest.mark.parametrize("kind", ["method", "cubic", "linear"])
def test_interpolants(name: str, kind: str):
    """Their order is uniform in theta, and they end in y1."""
    method = ALL[name] if kind == "method" else getattr(ALL[name], kind)()
    numbers, p = Numbers.of(method), np.array(method.p)
    if kind == "cubic" and not isinstance(method.step, ImplicitStep):
        return  # its slopes at the ends are no stages of a Rosenbrock method
    at = lambda theta: p @ theta ** np.arange(1, p.shape[1] + 1)  # noqa: E731
    np.testing.assert_allclose(at(1.0), method.b, atol=1e-13)
    for order in range(1, method.p_order + 1):
        assert max(numbers.residual(at(theta), order, theta) for theta in THETAS) < HOLDS, order
    beyond = max(numbers.residual(at(theta), method.p_order + 1, theta) for theta in THETAS)
    assert beyond > FAILS


@every_method
def test_stability(name: str):
    """A-stable: |R| <= 1 on the imaginary axis, and no pole to its left. L-stable but for those that are said to be not."""
    method = ALL[name]
    numbers = Numbers.of(method)
    for y in [0.0, *np.logspace(-3, 5, 200)]:
        assert abs(numbers.growth(method.b, 1j * y)) < 1 + 1e-12
    poles = np.linalg.eigvals(numbers.alpha + numbers.gamma)
    assert min(poles.real) > -1e-12
    assert abs(numbers.growth(method.b, -1e9)) == pytest.approx(DAMPED.get(name, 0.0), abs=1e-6)
    for z in (-0.3, -0.2 + 0.4j):  # the order of the approximation of exp
        error = [abs(numbers.growth(method.b, z * h) - np.exp(z * h)) for h in (0.5, 0.25)]
        assert math.log2(error[0] / error[1]) > method.order + 0.6


@pytest.mark.parametrize("name", ["kvaerno3", "kvaerno5"])
def test_error_estimates_are_bounded(name: str):
    """The embedded method is strongly A-stable: a component that is gone does not hold the step back for ever."""
    method = ALL[name]
    numbers, embedded = Numbers.of(method), np.subtract(method.b, method.e)
    for y in np.logspace(-3, 5, 200):
        assert abs(numbers.growth(embedded, 1j * y)) < 1 + 1e-12
    assert abs(numbers.growth(embedded, -1e9)) < 0.96


@every_method
def test_nodes_of_quadrature(name: str):
    """Over a step they integrate what lies on the solution as its order asks for."""
    method = ALL[name]
    for power in range(method.order if isinstance(method.step, ImplicitStep) else 2 * (method.order // 2 + 1)):
        total = math.fsum(weight * c**power for c, weight, _ in method.nodes)
        assert total == pytest.approx(1 / (power + 1), abs=1e-13)
    for c, _, row in method.nodes:
        if isinstance(method.step, ImplicitStep):
            assert math.fsum(row) == pytest.approx(c, abs=1e-13)


def test_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match="row 1 of p must add up to"):
        implicit(1, ((1.0,),), (1.0,), p=((0.0,), (0.5,)))
