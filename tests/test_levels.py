"""The CPU kernels are compiled for several instruction sets: each gives the same results, and none leaks into another."""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from odenet_cuda import _C, ops
from odenet_cuda.ops import DTYPES, FIELDS
from odenet_cuda.step_control import initial_state

HERE = Path(__file__).resolve().parent
SIZES = [((1,), 1), ((7,), 1), ((255,), 1), ((256,), 1), ((4099,), 1), ((33_001,), 1), ((3, 1021), 3), ((5, 1), 5)]
COUNTS = [0, 1, 3, 8, 9, 16]  # slopes; more than 8 have no loops of their own
PERIOD = 100_003  # elements after which a large state repeats


def draw(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.complex128 if dtype.is_complex else torch.float64).to(dtype)


# ---- run in another process, one a level ----


def kernels() -> dict[str, Tensor]:
    """What stage, error and dense_output give for the same random numbers, by name."""
    results = {}
    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        for shape, rows in SIZES:
            y0, y1, *k = (draw(shape, dtype, generator) for _ in range(2 + max(COUNTS)))
            dt = torch.linspace(-0.3, 0.7, rows, dtype=torch.float64) + 0.01
            for count in COUNTS:
                name, a = f"{dtype} {shape} {count}", [(-1.0) ** j / (j + 1.5) for j in range(count)]
                results[f"stage {name}"], ratio = torch.empty_like(y0), torch.empty(rows, dtype=torch.float64)
                ops.stage([results[f"stage {name}"]], [y0], k[:count], a, dt)
                if count:
                    ops.error(ratio, [y0], [y1], k[:count], a, dt, [1e-2], [1e-3])
                    results[f"error {name}"] = ratio
            state = torch.from_numpy(initial_state(0.0, rows))
            for field, value in {"time": 1.0, "last_dt": 1.0, "output_begin": 0, "output_end": 2}.items():
                state[FIELDS[field]] = value
            ys, p = torch.zeros(2, *shape, dtype=dtype), [1.0, -0.5, 0.25, 0.75, 0.1, -0.3]
            ops.dense_output([ys], [y0], [y1], k[:3], p, 2, state, torch.tensor([0.3, 0.9], dtype=torch.float64))
            results[f"dense_output {dtype} {shape}"] = ys
    return results


# Type, rows and base of each; they are dealt out among the levels.
STREAMS = [(torch.float32, 1, "in place"), (torch.bfloat16, 3, "base"), (torch.complex64, 1, "none")]


def streams(dtype: torch.dtype, rows: int, base: str) -> bool:
    """Whether stage on a state larger than the last-level cache gives the bits that it gives on pieces below that size.

    The state begins one element off a cache line, and each of its rows repeats after PERIOD elements.
    """
    generator = torch.Generator().manual_seed(1)
    slope, start = (draw((PERIOD,), dtype, generator) for _ in range(2))
    start = slope if base == "base" else start
    columns = _C.last_level_cache() // (dtype.itemsize * rows) + 4099
    times, last = divmod(columns, PERIOD)

    def large(tile: Tensor | None) -> Tensor:
        """[rows, columns], one element off a cache line."""
        memory = torch.empty(rows * columns + 64, dtype=dtype)
        off = (-memory.data_ptr() % 64) // dtype.itemsize + 1
        state = memory[off : off + rows * columns].view(rows, columns)
        assert state.data_ptr() % 64 == dtype.itemsize
        if tile is not None:
            state[:, : columns - last].unflatten(1, (times, PERIOD)).copy_(tile)
            state[:, columns - last :].copy_(tile[:last])
        return state

    k, y, dt = large(slope), large(start if base == "in place" else None), torch.linspace(0.25, 0.5, rows).double()
    ops.stage([y], {"in place": [y], "base": [k], "none": []}[base], [k], [0.75], dt)
    for row in range(rows):
        piece = torch.empty_like(start)
        ops.stage([piece], [] if base == "none" else [start], [slope], [0.75], dt[row : row + 1])
        whole = y[row, : columns - last].view(times, PERIOD)
        if not torch.equal(whole, piece.expand(times, PERIOD)) or not torch.equal(y[row, columns - last :], piece[:last]):
            return False
    return True


def run_level(path: str) -> None:
    """Saves what this process's level gives."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fits = 8 * _C.last_level_cache() < memory
    cases = STREAMS[_C.cpu_levels.index(_C.cpu_level()) :: len(_C.cpu_levels)] if fits else []
    streamed = {str(case): streams(*case) for case in cases}
    torch.save({"level": _C.cpu_level(), "kernels": kernels(), "streams": streamed}, path)


# ---- results ----


def python(code: str, level: str) -> subprocess.CompletedProcess:
    """Runs code in another process whose level is asked for."""
    path = os.pathsep.join([str(HERE), str(Path(_C.__file__).resolve().parent.parent)])
    env = {**os.environ, "ODENET_CPU": level, "PYTHONPATH": path}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)


@pytest.fixture(scope="module", params=_C.cpu_levels)
def results(request, tmp_path_factory) -> dict:
    """What each level gives."""
    path = tmp_path_factory.mktemp("levels") / request.param
    done = python(f"import test_levels; test_levels.run_level({str(path)!r})", request.param)
    assert done.returncode == 0, done.stderr
    return {"asked": request.param, **torch.load(path)}


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    """What the level in use gives."""
    return kernels()


def test_level_is_the_one_asked_for(results):
    """ODENET_CPU decides."""
    assert results["level"] == results["asked"]


def test_the_best_level_is_the_default():
    """Without ODENET_CPU the last of the machine's levels is used."""
    assert _C.cpu_levels[0] == "baseline"
    if os.environ.get("ODENET_CPU"):
        pytest.skip("ODENET_CPU is set")
    assert _C.cpu_level() == _C.cpu_levels[-1]


@pytest.mark.parametrize("op", ["stage", "error", "dense_output"])
def test_levels_agree(results, expected, op):
    """Every level gives the same bits: no sum is contracted, and no order of summation depends on the vectors' length."""
    names = [name for name in expected if name.startswith(op)]
    assert len(names) >= len(DTYPES) * len(SIZES) and results["kernels"].keys() == expected.keys()
    for name in names:
        x, y = results["kernels"][name], expected[name]
        assert torch.equal(x, y), f"{name}: differs by {float((x - y).abs().max()):.3e}"


def test_streaming_stores(results):
    """A state larger than the last-level cache, which stage writes past the caches, gets the bits of its pieces."""
    if not results["streams"]:
        pytest.skip("needs eight times the last-level cache of memory")
    assert all(results["streams"].values()), results["streams"]


@pytest.mark.parametrize("level", ["sse9", "AVX2"])
def test_levels_that_there_are_not(level):
    """An instruction set that is none of the machine's is refused at import, with those that are."""
    done = python("import odenet_cuda", level)
    assert done.returncode != 0
    assert f"ValueError: ODENET_CPU must be an instruction set of this machine, {', '.join(_C.cpu_levels)}, got " in done.stderr


# ---- machine code ----

# Statically linked beside our own code, and chooses for itself: the CUDA runtime.
RUNTIME = re.compile(r"(_ZL?\d*)?(cuda|__cuda|__nv_cuda|cudart|libcudart_static_)")
REGISTER = re.compile(r"%(?:(ymm|zmm|xmm)(\d+)|(k)[0-7])")
NOT_AVX = ("verr", "verw", "vm")  # instructions of other kinds that begin with a v


def level_of(function: str) -> str:
    """The level that the name of a function belongs to."""
    return next((level for level in ("avx512", "avx2") if level in function), "baseline")


def instruction_sets(operation: str) -> set[str]:
    """What an instruction asks of the machine beyond the baseline: avx, ymm, zmm, evex, fma."""
    found = set()
    if operation.startswith("v") and not operation.startswith(NOT_AVX):
        found.add("fma" if re.match(r"vfn?m(add|sub)", operation) else "avx")
    for wide, number, mask in REGISTER.findall(operation):
        if mask or (number and int(number) > 15):
            found.add("evex")
        if wide in ("ymm", "zmm"):
            found.add(wide)
    return found


def objdump(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(["objdump", *arguments, _C.__file__], stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def names() -> dict[int, list[tuple[str, bool]]]:
    """The functions of the extension by address: (symbol, whether the linker chose it among several of that name)."""
    if platform.machine() != "x86_64" or sys.platform != "linux":
        pytest.skip("there is one level only but on x86-64, and the form of objdump's words is that on Linux")
    if shutil.which("objdump") is None:
        pytest.skip("needs objdump")
    found = defaultdict(list)
    with objdump("-t", "-w") as table:
        for line in table.stdout:
            match = re.match(r"([0-9a-f]{16}) (.{7}) \.text\S*\t[0-9a-f]+\s+(?:\.\w+ )?(\S+)$", line)
            if match:
                found[int(match[1], 16)].append((match[3], "w" in match[2] or "u" in match[2]))
    if not any("odenet" in symbol for symbols in found.values() for symbol, _ in symbols):
        pytest.skip("the extension is stripped: it has no names of functions")
    return found


@pytest.fixture(scope="module")
def functions(names) -> dict[int, set[str]]:
    """What each function's instructions ask of the machine, by address; but for those of the CUDA runtime."""
    found: dict[int, set[str]] = defaultdict(set)
    address, skipped = 0, False
    with objdump("-d", "-w", "--no-show-raw-insn", "--section=.text") as listing:
        for line in listing.stdout:
            if line.endswith(">:\n"):
                address, symbol = int(line[:16], 16), line[line.index("<") + 1 : -3]
                skipped = RUNTIME.match(symbol) is not None and "odenet" not in symbol
                found[address]
            elif not skipped and "\t" in line:
                operation = line.rstrip().split("\t", 1)[1]
                if operation.startswith("v") or "mm" in operation or "%k" in operation:
                    found[address] |= instruction_sets(operation)
    return found


def test_code_of_each_level_stays_in_its_namespace(names, functions):
    """Code for a newer machine lies only in functions that are called where that machine was found."""
    allowed = {"baseline": set(), "avx2": {"avx", "ymm"}, "avx512": {"avx", "ymm", "zmm", "evex"}}
    assert any("odenet" in symbol for address in functions for symbol, _ in names[address])
    for address, used in functions.items():
        for symbol, _ in names[address]:
            assert used <= allowed[level_of(symbol)], f"{symbol} uses {sorted(used)}"


def test_what_the_linker_chose_among_several_is_for_every_machine(names, functions):
    """Of functions with one name in many files, such as templates of the standard library, the linker keeps any."""
    weak = {symbol: functions[address] for address in functions for symbol, is_weak in names[address] if is_weak}
    assert weak
    for symbol, used in weak.items():
        assert not used or level_of(symbol) != "baseline", f"{symbol} uses {sorted(used)}"


@pytest.mark.parametrize(("level", "register"), [("avx2", "ymm"), ("avx512", "zmm")])
@pytest.mark.parametrize("function", ["stage_block", "stage_range", "sum_of_squares"])
def test_levels_use_their_registers(names, functions, level, register, function):
    """The loops over elements are vectorised with the registers of the level."""
    loops = [functions[a] for a in functions for symbol, _ in names[a] if function in symbol and level in symbol]
    assert loops
    assert sum(register in used for used in loops) > 0.9 * len(loops)
