"""The order conditions of Runge-Kutta methods, from rooted trees (Hairer, Norsett and Wanner I, II.2)."""

import functools
import itertools
import math

import numpy as np


@functools.cache
def rooted_trees(order: int) -> tuple:
    """All rooted trees with `order` vertices; a tree is the sorted tuple of the trees below its root."""
    if order == 1:
        return ((),)
    trees = set()
    for sizes in _partitions(order - 1):
        for children in itertools.product(*(rooted_trees(size) for size in sizes)):
            trees.add(tuple(sorted(children)))
    return tuple(sorted(trees))


def _partitions(total: int, largest: int | None = None):
    largest = total if largest is None else largest
    if total == 0:
        yield ()
    for part in range(min(total, largest), 0, -1):
        for rest in _partitions(total - part, part):
            yield (part, *rest)


def _size(tree) -> int:
    return 1 + sum(map(_size, tree))


def density(tree) -> int:
    return _size(tree) * math.prod(map(density, tree))


def residual(tableau, weights, order: int, theta: float = 1.0) -> float:
    """The largest violation of the conditions of exactly this order by y0 + dt sum_j weights_j k_j at t0 + theta dt."""
    a = np.zeros((tableau.stages, tableau.stages))
    for i, row in enumerate(tableau.a):
        a[i, : len(row)] = row

    def inner(tree):
        values = np.ones(tableau.stages)
        for child in tree:
            values = values * (a @ inner(child))
        return values

    return max(abs(weights @ inner(tree) - theta**order / density(tree)) for tree in rooted_trees(order))
