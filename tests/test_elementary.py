"""The functions of compiled fields against the C library, on packs and on numbers, in a program of their own."""

import subprocess

import pytest
from compile_native import ROOT, require_compiler

from odenet_cuda import _C
from odenet_cuda.compiled.compilers import LEVEL_FLAGS, compiler_flags, find_compiler, has_mvec, include_folder

UNITS = 4.0  # in the last place: what glibc promises of its vector functions, and we of ours
FLOATS = 9973  # every how many is tried


def functions(folder, level: str) -> list[list[str]]:
    """Of each function and type: its name, that of the type, the largest error and where, how often a number alone has other
    bits than a lane, and a digest of all results."""
    program = folder / level
    flags = [flag for flag in compiler_flags() if flag not in ("-O3", "-shared")]
    source = str(ROOT / "tests" / "native" / "elementary.cpp")
    command = [*find_compiler()[0], *flags, "-O1", f"-DODENET_LEVEL={level}", *LEVEL_FLAGS[level], f"-I{include_folder()}"]
    libraries = [*(["-lmvec"] if has_mvec() else []), "-lm"]
    subprocess.run([*command, source, "-o", str(program), *libraries], check=True)
    run = subprocess.run([str(program), str(FLOATS)], capture_output=True, text=True, check=True)
    return [line.split() for line in run.stdout.splitlines()]


@pytest.mark.parametrize("level", _C.cpu_levels)
def test_errors_and_bits(tmp_path, level):
    """Every function is right to four units in the last place, for all sizes of numbers, with the zeros' signs, infinities and
    what is no number; a number alone has the bits of a lane."""
    require_compiler()
    found = functions(tmp_path, level)
    assert len({name for name, *_ in found}) == 22 and len(found) == 44
    for name, number, error, at, differ, _ in found:
        assert float(error) <= UNITS, f"{name} of {number} errs by {error} units at {at}"
        assert differ == "0", f"{name} of {number}: {differ} numbers have other bits than a lane"
