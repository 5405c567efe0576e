"""What the C++ compiler makes of compiled fields: the functions of some widths, and whole solves. The whole grid of widths and
shapes is machine_code.py itself, `make test-grid`."""

import pytest
from machine_code import CONTROLS, DTYPES, Case, differences, layer_of_square, layer_of_sum, net, whole_solves

from odenet_cuda import _C
from odenet_cuda.compiled.compilers import NoCompiler, find_compiler

# Widths that fill no whole number of passes of a layer, with which g++ 11 and 12 are wrong without our flags.
FIELDS = ((layer_of_sum, 7), (layer_of_sum, 9), (layer_of_square, 10), (net, 9))


@pytest.fixture(scope="module", autouse=True)
def needs_compiler():
    """Skips all where there is no C++ compiler."""
    try:
        find_compiler()
    except NoCompiler as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("level", sorted({"baseline", _C.cpu_levels[-1]}))
@pytest.mark.parametrize("dtype", DTYPES)
def test_functions(dtype, level):
    """Slopes, products and sums of gradients, of a pack and of one lane, are those of torch."""
    assert list(differences([Case.of(shape, n, dtype) for shape, n in FIELDS], level)) == []


def test_whole_solves():
    """On a grid, with its gradients, at the level that this process has; the other controls are in the grid."""
    whole_solves(9, "double", 5, CONTROLS[:1])
