"""Kvaerno's methods for stiff systems: singly diagonally implicit with an explicit first stage, stiffly accurate, L-stable; the
embedded method is strongly A-stable. Kvaerno 2004, doi 10.1023/B:BITN.0000046811.70614.38.
"""

import numpy as np

from .implicit import implicit
from .newton import Rows
from .tableau import StepFunction

MOST_ITERATIONS = 10  # after which a step is rejected


def _kvaerno(order: int, gamma: float, below: Rows, p: Rows = (), p_order: int = 0) -> StepFunction:
    """below: rows under the diagonal, of which the last two are the embedded method's and the method's weights."""
    a = ((0.0,), *[(*row, gamma) for row in below])
    b, embedded = a[-1], (*a[-2], 0.0)
    e = tuple([x - y for x, y in zip(b, embedded, strict=True)])
    how = {"adaptive": True, "max_iters": MOST_ITERATIONS}
    return implicit(order, a, b, e, p, p_order, **how)


def _kvaerno3() -> StepFunction:
    """Order 3, with an estimate of order 2. gamma: the root of x^3 - 3 x^2 + 3 x / 2 - 1 / 6 with which it is L-stable."""
    g = 0.43586652150845899942
    second = ((-4 * g * g + 6 * g - 1) / (4 * g), (1 - 2 * g) / (4 * g))
    third = (6 * g - 1) / (12 * g), -1 / ((24 * g - 12) * g), (-6 * g * g + 6 * g - 1) / (6 * g - 3)
    return _kvaerno(3, g, ((g,), second, third))


def _kvaerno5() -> StepFunction:
    """Order 5, with an estimate of order 4. Two of its stages lie beyond the end of the step, at 1.23 of it the farthest."""
    below = (
        (0.26,),
        (0.13, 0.84033320996790809),
        (0.22371961478320505, 0.47675532319799699, -0.06470895363112615),
        (0.16648564323248321, 0.10450018841591720, 0.03631482272098715, -0.13090704451073998),
        (0.13855640231268224, 0.0, -0.04245337201752043, 0.02446657898003141, 0.61943039072480676),
        (0.13659751177640291, 0.0, -0.05496908796538376, -0.04118626728321046, 0.62993304899016403, 0.06962479448202728),
    )
    return _kvaerno(5, 0.26, below, quartic_of(0.26, below), 4)


def quartic_of(gamma: float, below: Rows) -> Rows:
    """The least weights b_j(theta) of an interpolant of degree 4 and order 4, uniformly in theta, which begins with k_0 and
    ends with the last slope. With stages of order 2 the conditions are on sum_j b_j, b_j c_j, b_j c_j^2, b_j c_j^3, b_j a_ji
    c_i^2."""
    count = len(below) + 1
    a = np.zeros((count, count))
    for i, row in enumerate(below, 1):
        a[i, : i + 1] = *row, gamma
    c = a.sum(1)
    conditions = np.stack([c**0, c, c**2, c**3, a @ c**2])
    right = np.diag([1, 1 / 2, 1 / 3, 1 / 4])[:, [0, 1, 2, 3, 3]]  # [power of theta, condition]
    right[:, 4] = 0, 0, 0, 1 / 12
    one = np.eye(count)
    # unknown: the coefficients of theta^2 to theta^4; that of theta is k_0's
    rows = [np.kron(np.eye(3), conditions), np.kron(np.ones((1, 3)), one), np.kron(np.array([[2.0, 3.0, 4.0]]), one)]
    known = [right[1:].reshape(-1), a[-1] - one[0], one[-1] - one[0]]
    found = np.linalg.lstsq(np.concatenate(rows), np.concatenate(known), rcond=None)[0].reshape(3, count)
    found[0] = a[-1] - one[0] - found[1] - found[2]  # to the last bit: it ends in y1
    return tuple([(float(j == 0), *map(float, found[:, j])) for j in range(count)])


KVAERNO3, KVAERNO5 = _kvaerno3(), _kvaerno5()
