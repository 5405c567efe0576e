"""What the C++ compiler makes of compiled fields: the functions of some widths, and whole solves. The whole grid of widths and
shapes is machine_code.py itself, `make test-grid`."""

import platform
import subprocess

import pytest
from machine_code import CONTROLS, DTYPES, Case, differences, layer_of_square, layer_of_sum, net, whole_solves

from odenet_cuda import _C
from odenet_cuda.compiled.compilers import LEVEL_FLAGS, NoCompiler, compiler_flags, find_compiler, include_folder
from odenet_cuda.compiled.emit import Target
from odenet_cuda.methods import find_method

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


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the flags are those of x86")
@pytest.mark.parametrize("level", LEVEL_FLAGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_compiler_takes_every_instruction_set(dtype, level, tmp_path):
    """That of this machine is compiled wherever a field is solved; the others nowhere else."""
    plan = Case.of(net, 3, dtype).plan
    source = tmp_path / "field.cpp"
    for name, solve in (("dopri5", "per_sample"), ("rodas5p", "per_sample"), ("dopri5", "adjoint_joint"), ("rk4", "reverse")):
        for lanes in ("pack", "one"):
            source.write_text(plan.source(find_method(name), Target(dtype, lanes, solve)))
            flags = [*compiler_flags(), f"-DODENET_LEVEL={level}", *LEVEL_FLAGS[level], "-I", str(include_folder())]
            command = [*find_compiler()[0], *flags, "-fsyntax-only", str(source)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, f"{name}, {solve}, {lanes}: {done.stderr[-3000:]}"
