"""The ops against plain torch and against a reference of the step size controller in Python."""

import contextlib
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from odenet_cuda import formulas, methods, ops
from odenet_cuda.ops import FIELDS, MAX_DEGREE, MAX_STAGES, NUM_FIELDS, STATUS, STOPS
from odenet_cuda.step_control import StepControl, initial_state

# Of the type in which sums are formed.
EPS = {
    torch.float32: 2.0**-23,
    torch.float64: 2.0**-52,
    torch.float16: 2.0**-23,
    torch.bfloat16: 2.0**-23,
    torch.complex64: 2.0**-23,
    torch.complex128: 2.0**-52,
}
# What rounding a result to 16 bits changes at most: relative, and absolute where it is subnormal.
SHORT = {torch.float16: (2.0**-11, 2.0**-25), torch.bfloat16: (2.0**-8, 2.0**-134)}
# Roundings of one element beside one a slope: the weight twice, the base, the result, and the reference's own.
ROUNDINGS = 6
# Squares are summed in the state's type in runs of at most 256 elements, then in float64; each square is rounded thrice.
SUM_ROUNDINGS = 260
# The controller is float64 arithmetic and at most three powers, each within a few units of rounding of the C library's.
CONTROLLER_RTOL = 1e-13
SENTINEL = -12345.0

DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in EPS]
REALS = [param for param in DTYPES if not param.values[0].is_complex]
ABOVE_GRAIN = 200_003  # elements: more than one thread's share on the CPU, more than one block, and odd
SHAPES = [
    pytest.param((), 1, id="0-dimensional"),
    pytest.param((1,), 1, id="one-element"),
    pytest.param((0,), 1, id="empty"),
    pytest.param((7,), 1, id="joint-7"),
    pytest.param((5, 3), 1, id="joint-5x3"),
    pytest.param((ABOVE_GRAIN,), 1, id="joint-above-grain"),
    pytest.param((1, 4), 1, id="one-sample"),
    pytest.param((5, 3), 5, id="rows-5x3"),
    pytest.param((4,), 4, id="rows-4-scalars"),
    pytest.param((3, 0), 3, id="rows-3-empty"),
    pytest.param((0, 3), 0, id="no-rows"),
    pytest.param((3, 66_667), 3, id="rows-above-grain"),
    pytest.param((33_001, 2), 33_001, id="many-rows"),
]
LAYOUTS = ["contiguous", "transposed", "expanded", "sliced"]


@pytest.fixture(params=DTYPES)
def dtype(request) -> torch.dtype:
    """The element types of a state."""
    return request.param


@pytest.fixture(params=REALS)
def real(request) -> torch.dtype:
    """The types of stage times."""
    return request.param


class Numbers:
    """Random tensors that depend on the seed alone, not on the device."""

    def __init__(self, device: torch.device, seed: int = 0):
        self.device, self.generator = device, torch.Generator().manual_seed(seed)

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
        def draw(*size: int) -> Tensor:
            drawn = torch.complex128 if dtype.is_complex else torch.float64
            return torch.randn(size, generator=self.generator, dtype=drawn).to(dtype).to(self.device)

        if layout == "transposed":
            return draw(*reversed(shape)).permute(*reversed(range(len(shape))))
        if layout == "expanded":
            return draw(*shape[:-1], 1).expand(*shape)
        if layout == "sliced":
            return draw(*shape[:-1], 2 * shape[-1] + 1)[..., 1::2]
        return draw(*shape)

    def rows(self, rows: int) -> Tensor:
        """Step sizes of both signs, none of them 0."""
        values = torch.rand(rows, generator=self.generator, dtype=torch.float64) + 0.1
        return (values * (-1.0) ** torch.arange(rows)).to(self.device)


def per_row(values: Tensor, leaf: Tensor) -> Tensor:
    """values [rows], shaped to multiply a leaf."""
    return values.reshape(-1, *[1] * (leaf.dim() - 1)) if values.numel() != 1 else values.reshape(())


def wide(x: Tensor) -> Tensor:
    """x in float64 or complex128."""
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def assert_within(got: Tensor, exact: Tensor, bound: Tensor) -> None:
    """Every element of got is within the bound of exact, which are wide; a result of 16 bits is rounded once more."""
    assert got.shape == exact.shape
    if got.dtype in SHORT:
        relative, absolute = SHORT[got.dtype]
        bound = bound * (1 + relative) + exact.abs() * relative + absolute
    excess = (wide(got) - exact).abs() - bound
    assert bool((excess <= 0).all()), f"beyond the bound by {float(excess.max()):.3e}"


def check_stage(y: Tensor, y0: Tensor | None, k: list[Tensor], a: list[float], dt: Tensor, dtype: torch.dtype) -> None:
    """y against the formula in float64, within the roundings of its terms."""
    slopes, factor = [wide(slope) for slope in k], per_row(dt, y)
    base = None if y0 is None else wide(y0)
    exact = formulas.stage(base, slopes, a, factor) if slopes or base is not None else wide(torch.zeros_like(y))
    size = torch.zeros_like(exact.abs()) if base is None else base.abs()
    for weight, slope in zip(a, slopes, strict=True):
        size = size + abs(weight) * slope.abs() * factor.abs()
    assert_within(y, exact, size * (ROUNDINGS + len(a)) * EPS[dtype])


def check_error(
    ratio: Tensor,
    leaves: list[tuple],
    e: list[float],
    dt: Tensor,
    rtol: list[float],
    atol: list[float],
    dtype: torch.dtype,
) -> None:
    """ratio against the formula in float64, within the roundings of its terms and its sum."""
    rows, exact, bound = dt.numel(), torch.zeros_like(ratio), torch.zeros_like(ratio)
    for (y0, y1, k), r, a in zip(leaves, rtol, atol, strict=True):
        slopes, factor = [wide(slope) for slope in k], per_row(dt, y0)
        y0, y1 = wide(y0), wide(y1)
        scaled = formulas.scaled_error(y0, y1, slopes, e, factor, r, a)
        size = formulas.scaled_error(y0, y1, [x.abs() for x in slopes], [abs(w) for w in e], factor.abs(), r, a)
        norm, sizes = formulas.rms_norm(scaled, rows), formulas.rms_norm(size, rows)
        exact = torch.maximum(exact, norm)
        bound = torch.maximum(bound, norm * SUM_ROUNDINGS * EPS[dtype] + sizes * (ROUNDINGS + len(e)) * EPS[dtype])
    assert_within(ratio, exact, bound)


def coefficients(count: int) -> list[float]:
    """`count` different numbers of both signs, none of them 0."""
    return [(-1.0) ** j / (j + 1.5) for j in range(count)]


# ---- stage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "rows"), SHAPES)
@pytest.mark.parametrize("base", ["base", "zero"])
def test_stage(device, dtype, shape, rows, base):
    """A linear combination of three slopes, added to a base or to zero."""
    numbers = Numbers(device)
    y, y0 = numbers.tensor(shape, dtype), numbers.tensor(shape, dtype)
    k, a, dt = [numbers.tensor(shape, dtype) for _ in range(3)], coefficients(3), numbers.rows(rows)
    ops.stage([y], [y0] if base == "base" else [], k, a, dt)
    check_stage(y, y0 if base == "base" else None, k, a, dt, dtype)


@pytest.mark.parametrize("count", range(MAX_STAGES + 1))
def test_stage_counts(device, dtype, count):
    """Any number of slopes from none to the most, of which there may be more than coefficients."""
    numbers, shape = Numbers(device, count), (4, 37)
    slots = max(count, 1) + count % 3
    y, y0, dt = numbers.tensor(shape, dtype), numbers.tensor(shape, dtype), numbers.rows(4)
    k, a = [numbers.tensor(shape, dtype) for _ in range(slots)], coefficients(count)
    ops.stage([y], [y0], k, a, dt)
    check_stage(y, y0, k[:count], a, dt, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 6], ids=["joint", "rows"])
def test_stage_reads_strided(device, dtype, layout, rows):
    """Base and slopes may be strided: the result is that of contiguous copies, bit for bit."""
    numbers, shape = Numbers(device), (6, 5, 3)
    y0, k = numbers.tensor(shape, dtype, layout), [numbers.tensor(shape, dtype, layout) for _ in range(3)]
    dt, a = numbers.rows(rows), coefficients(3)
    y, expected = torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device)
    ops.stage([y], [y0], k, a, dt)
    ops.stage([expected], [y0.contiguous()], [slope.contiguous() for slope in k], a, dt)
    assert torch.equal(y, expected)
    check_stage(y, y0, k, a, dt, dtype)


@pytest.mark.parametrize("rows", [1, 4], ids=["joint", "rows"])
def test_stage_several_leaves(device, rows):
    """Leaves of different shapes and types in one call, slopes leaf-major with a slot to spare."""
    numbers, dt, a = Numbers(device), Numbers(device, 1).rows(rows), coefficients(2)
    kinds = [(shape, dtype) for dtype in EPS for shape in ((4, 3), (4,))]
    y = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in kinds]
    y0 = [numbers.tensor(shape, dtype) for shape, dtype in kinds]
    k = [numbers.tensor(shape, dtype) for shape, dtype in kinds for _ in range(3)]
    ops.stage(y, y0, k, a, dt)
    for leaf, (_, dtype) in enumerate(kinds):
        check_stage(y[leaf], y0[leaf], k[3 * leaf : 3 * leaf + 2], a, dt, dtype)


def test_stage_without_leaves(device):
    """No leaves, no work."""
    ops.stage([], [], [], [], torch.ones(1, dtype=torch.float64, device=device))


def test_stage_skips_zero_coefficients(device, dtype):
    """A slope whose coefficient is 0 is not read: not its NaN, and not its shape."""
    numbers = Numbers(device)
    y0, slope, dt = numbers.tensor((9,), dtype), numbers.tensor((9,), dtype), numbers.rows(1)
    y = torch.empty_like(y0)
    bad = torch.full((9,), math.nan, dtype=dtype, device=device)
    ops.stage([y], [y0], [bad, slope, bad[:2]], [0.0, 0.5, 0.0], dt)
    expected = torch.empty_like(y)
    ops.stage([expected], [y0], [slope], [0.5], dt)
    assert torch.equal(y, expected)
    check_stage(y, y0, [slope], [0.5], dt, dtype)


def test_stage_in_place_on_base(device, dtype):
    """The base may be the tensor that is written."""
    numbers = Numbers(device)
    y, k, dt = numbers.tensor((50,), dtype), [numbers.tensor((50,), dtype)], numbers.rows(1)
    expected = torch.empty_like(y)
    ops.stage([expected], [y.clone()], k, [0.5], dt)
    ops.stage([y], [y], k, [0.5], dt)
    assert torch.equal(y, expected)


@st.composite
def leaves(draw) -> tuple[tuple[int, ...], int, int, int, torch.dtype]:
    """A shape, rows that fit it, a number of slopes, a seed and a type."""
    shape = tuple(draw(st.lists(st.integers(0, 9), min_size=0, max_size=4)))
    rows = shape[0] if shape and draw(st.booleans()) else 1
    dtype = draw(st.sampled_from(list(EPS)))
    return shape, rows, draw(st.integers(1, MAX_STAGES)), draw(st.integers(0, 2**32 - 1)), dtype


@given(leaves())
def test_stage_of_any_shape(device, case):
    """Any shape, rows and number of slopes."""
    shape, rows, count, seed, dtype = case
    numbers = Numbers(device, seed)
    y, y0, k = torch.empty(shape, dtype=dtype, device=device), numbers.tensor(shape, dtype), []
    k, dt, a = [numbers.tensor(shape, dtype) for _ in range(count)], numbers.rows(rows), coefficients(count)
    ops.stage([y], [y0], k, a, dt)
    check_stage(y, y0, k, a, dt, dtype)


# ---- error -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "rows"), SHAPES)
def test_error(device, dtype, shape, rows):
    """The error ratio of three slopes; 0 where a row is empty."""
    numbers = Numbers(device)
    y0, y1, k = *(numbers.tensor(shape, dtype) for _ in range(2)), [numbers.tensor(shape, dtype) for _ in range(3)]
    dt, e = numbers.rows(rows), coefficients(3)
    ratio = torch.full((rows,), SENTINEL, dtype=torch.float64, device=device)
    ops.error(ratio, [y0], [y1], k, e, dt, [1e-2], [1e-3])
    check_error(ratio, [(y0, y1, k)], e, dt, [1e-2], [1e-3], dtype)


@pytest.mark.parametrize("count", range(1, MAX_STAGES + 1))
def test_error_counts(device, dtype, count):
    """Any number of slopes, of which there may be more than weights."""
    numbers, shape = Numbers(device, count), (4, 37)
    y0, y1, dt = *(numbers.tensor(shape, dtype) for _ in range(2)), numbers.rows(4)
    k, e = [numbers.tensor(shape, dtype) for _ in range(count + count % 3)], coefficients(count)
    ratio = torch.empty(4, dtype=torch.float64, device=device)
    ops.error(ratio, [y0], [y1], k, e, dt, [0.1], [0.0])
    check_error(ratio, [(y0, y1, k[:count])], e, dt, [0.1], [0.0], dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 6], ids=["joint", "rows"])
def test_error_reads_strided(device, dtype, layout, rows):
    """States and slopes may be strided: the result is that of contiguous copies, bit for bit."""
    numbers, shape = Numbers(device), (6, 5, 3)
    y0, y1, *k = (numbers.tensor(shape, dtype, layout) for _ in range(5))
    dt, e = numbers.rows(rows), coefficients(3)
    ratio, expected = torch.empty(2, rows, dtype=torch.float64, device=device).unbind(0)
    ops.error(ratio, [y0], [y1], k, e, dt, [1e-2], [1e-3])
    ops.error(expected, [y0.contiguous()], [y1.contiguous()], [x.contiguous() for x in k], e, dt, [1e-2], [1e-3])
    assert torch.equal(ratio, expected)
    check_error(ratio, [(y0, y1, k)], e, dt, [1e-2], [1e-3], dtype)


@pytest.mark.parametrize("rows", [1, 4], ids=["joint", "rows"])
@pytest.mark.parametrize("largest", range(3), ids=lambda leaf: f"largest-in-leaf-{leaf}")
def test_error_several_leaves(device, dtype, rows, largest):
    """The largest of the leaves' ratios, each with its tolerances, whichever leaf it is in."""
    numbers, dt, e = Numbers(device), Numbers(device, 1).rows(rows), coefficients(2)
    shapes, rtol, atol = [(4, 3), (4,), (4, 2, 5)], [1e-1, 1e-2, 0.0], [1e-2, 1e-3, 1.0]
    atol[largest], rtol[largest] = 1e-5, 1e-5
    y0, y1 = ([numbers.tensor(shape, dtype) for shape in shapes] for _ in range(2))
    k = [numbers.tensor(shape, dtype) for shape in shapes for _ in range(3)]
    ratio = torch.empty(rows, dtype=torch.float64, device=device)
    ops.error(ratio, y0, y1, k, e, dt, rtol, atol)
    parts = [(y0[leaf], y1[leaf], k[3 * leaf : 3 * leaf + 2]) for leaf in range(3)]
    check_error(ratio, parts, e, dt, rtol, atol, dtype)


def test_error_of_known_numbers(device, dtype):
    """Small numbers, by hand: half of 6 and of 16, scaled."""
    y0, y1 = (torch.tensor(x, dtype=dtype, device=device) for x in ([1.0, -4.0], [-2.0, 1.0]))
    k = torch.tensor([6.0, 16.0], dtype=dtype, device=device)
    ratio = torch.empty(1, dtype=torch.float64, device=device)
    half = torch.tensor([0.5], dtype=torch.float64, device=device)
    for part, atol, expected in ((slice(0, 1), 1.0, 3 / (1 + 0.5 * 2)), (slice(1, 2), 2.0, 8 / (2 + 0.5 * 4))):
        ops.error(ratio, [y0[part]], [y1[part]], [k[part]], [1.0], half, [0.5], [atol])
        assert float(ratio) == expected
    ops.error(ratio, [y0], [y1], [k], [1.0], half, [0.0], [2.0])
    assert float(ratio) == math.sqrt((1.5**2 + 4.0**2) / 2)


def test_error_skips_zero_weights(device, dtype):
    """A slope whose weight is 0 is not read, not even its NaN."""
    numbers = Numbers(device)
    y0, y1, slope, dt = *(numbers.tensor((9,), dtype) for _ in range(3)), numbers.rows(1)
    bad = torch.full((9,), math.nan, dtype=dtype, device=device)
    ratio = torch.empty(1, dtype=torch.float64, device=device)
    ops.error(ratio, [y0], [y1], [bad, slope, bad], [0.0, 0.5, 0.0], dt, [1e-2], [1e-3])
    check_error(ratio, [(y0, y1, [slope])], [0.5], dt, [1e-2], [1e-3], dtype)


PLACES = ["y0", "y1", "k"]
NOT_FINITE = [pytest.param(place, float(value), id=f"{place}-{value}") for place in PLACES for value in ("nan", "inf", "-inf")]


@pytest.mark.parametrize(("place", "value"), NOT_FINITE)
@pytest.mark.parametrize("leaf", [0, 1], ids=["first-leaf", "last-leaf"])
@pytest.mark.parametrize("rows", [1, 5], ids=["joint", "rows"])
@pytest.mark.parametrize("size", [3, 9001], ids=["small", "several-chunks"])
def test_error_is_never_small_beside_what_is_not_finite(device, dtype, place, value, leaf, rows, size):
    """One element that is not finite makes the ratio of its row not finite, and of no other row."""
    tensors = {name: [torch.ones(5, size, dtype=dtype, device=device) for _ in range(2)] for name in PLACES}
    dt = torch.full((rows,), 1e-3, dtype=torch.float64, device=device)
    ratio = torch.zeros(rows, dtype=torch.float64, device=device)
    arguments = tensors["y0"], tensors["y1"], tensors["k"], [1e-3], dt, [1e-2] * 2, [1e-3] * 2
    ops.error(ratio, *arguments)
    clean = ratio.clone()
    tensors[place][leaf][2, size // 2] = value
    ops.error(ratio, *arguments)
    hit = torch.arange(rows, device=device) == (2 if rows > 1 else 0)
    assert not bool(torch.isfinite(ratio[hit]).any())
    assert torch.equal(ratio[~hit], clean[~hit])


def test_error_beyond_the_type_is_large(device):
    """A scaled error whose square exceeds float32 gives inf, not a number that wrapped."""
    one = torch.ones(3, dtype=torch.float32, device=device)
    ratio = torch.empty(1, dtype=torch.float64, device=device)
    dt = torch.ones(1, dtype=torch.float64, device=device)
    ops.error(ratio, [one], [one], [one * 1e30], [1.0], dt, [0.0], [1e-5])
    assert float(ratio) == math.inf


@given(leaves())
def test_error_of_any_shape(device, case):
    """Any shape, rows and number of slopes."""
    shape, rows, count, seed, dtype = case
    numbers = Numbers(device, seed)
    y0, y1, *k = (numbers.tensor(shape, dtype) for _ in range(2 + count))
    dt, e = numbers.rows(rows), coefficients(count)
    ratio = torch.full((rows,), SENTINEL, dtype=torch.float64, device=device)
    ops.error(ratio, [y0], [y1], k, e, dt, [1e-2], [1e-1])
    check_error(ratio, [(y0, y1, k)], e, dt, [1e-2], [1e-1], dtype)


# ---- independence of threads and rows --------------------------------------------------------------------------------


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """torch on `count` threads, and then as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("shape", "rows"), [((ABOVE_GRAIN,), 1), ((7, 30_011), 7)], ids=["joint", "rows"])
def test_results_do_not_depend_on_threads(dtype, shape, rows):
    """Every op that visits elements gives the same bits on one, two and three threads."""
    numbers = Numbers(torch.device("cpu"))
    y0, y1, *k = (numbers.tensor(shape, dtype) for _ in range(6))
    dt, weights = numbers.rows(rows), coefficients(4)
    state = accepted_step(rows, torch.device("cpu"))
    results = []
    for count in (1, 2, 3):
        with threads(count):
            y, ys = torch.empty_like(y0), torch.full((3, *shape), SENTINEL, dtype=dtype)
            ratio, moved = torch.empty(rows, dtype=torch.float64), [y0.clone(), k[0].clone()]
            ops.stage([y], [y0], k, weights, dt)
            ops.error(ratio, [y0], [y1], k, weights, dt, [1e-2], [1e-3])
            ops.dense_output([ys], [y0], [y1], k, [1.0, 0.5] * 4, 2, state, torch.tensor([0.0, 1.5, 2.0]).double())
            ops.advance(moved[:1], moved[1:], [y1], [k[3]], torch.arange(rows).double() % 2)
            results.append([y, ratio, ys, *moved])
    for other in results[1:]:
        for x, expected in zip(other, results[0], strict=True):
            assert torch.equal(x, expected)


def test_controller_does_not_depend_on_threads():
    """step_size over many rows gives the same bits on one, two and three threads."""
    results = []
    for count in (1, 2, 3):
        with threads(count):
            solve = Solve(5003, torch.device("cpu"))
            solve.start(0.01)
            solve.ratio.copy_(torch.linspace(0, 3, 5003))
            solve.step_size()
            results.append((solve.state, solve.times))
    for state, times in results[1:]:
        assert torch.equal(state, results[0][0]) and torch.equal(times, results[0][1])


@pytest.mark.parametrize("columns", [3, 4099, 12_345])
def test_rows_do_not_depend_on_each_other(device, dtype, columns):
    """A row of a batch has the bits that it has alone."""
    numbers, rows = Numbers(device), 5
    y0, y1, *k = (numbers.tensor((rows, columns), dtype) for _ in range(6))
    dt, weights = numbers.rows(rows), coefficients(4)
    y, ratio = torch.empty_like(y0), torch.empty(rows, dtype=torch.float64, device=device)
    ops.stage([y], [y0], k, weights, dt)
    ops.error(ratio, [y0], [y1], k, weights, dt, [1e-2], [1e-3])
    for row in range(rows):
        part = slice(row, row + 1)
        alone, alone_ratio = torch.empty_like(y0[part]), torch.empty(1, dtype=torch.float64, device=device)
        slopes = [slope[part] for slope in k]
        ops.stage([alone], [y0[part]], slopes, weights, dt[part])
        ops.error(alone_ratio, [y0[part]], [y1[part]], slopes, weights, dt[part], [1e-2], [1e-3])
        assert torch.equal(alone, y[part]) and torch.equal(alone_ratio, ratio[part])


# ---- the controller --------------------------------------------------------------------------------------------------


class Row(dict):
    """The reference: the solver state of one row, and the controller as it is documented."""

    def __init__(
        self,
        state: np.ndarray,
        row: int,
        control: StepControl,
        order: int,
        direction: float,
        stops: list,
        kinds: list,
        t: tuple,
    ):
        super().__init__({name: float(state[i, row]) for name, i in FIELDS.items()})
        self.control, self.order, self.direction = control, order, direction
        self.stops, self.kinds, self.t = stops, kinds, t
        coefficients = {"I": (0, 1, 0), "PI": (0.4, 0.3, 0), "PID": (1 / 18, 1 / 9, 1 / 18)}
        self.p, self.i, self.d = coefficients.get(control.controller, control.controller)

    def end(self, status: str) -> None:
        self.update(status=STATUS[status], dt=0.0, step_end=self["time"])

    def plan(self, size: float) -> None:
        """The next step: size, within the limits, or just to the next stop."""
        size = min(max(size, self.control.min_step), self.control.max_step)
        self["proposal"] = size
        stop = self.stops[int(self["next_stop"])]
        left = (stop - self["time"]) * self.direction
        if left <= size * (1 + 1e-9):
            self.update(dt=stop - self["time"], step_end=stop)
            return
        end = self["time"] + self.direction * size
        if end == self["time"]:
            self.end("underflow" if math.isfinite(self["error_ratio"]) else "non_finite")
            return
        self.update(dt=self.direction * size, step_end=end)

    def factor(self, ratio: float, accept: bool) -> float:
        q = self.control
        if not math.isfinite(ratio):
            return q.dfactor
        if ratio == 0:
            return q.ifactor
        floor = q.dfactor
        if not accept:
            factor = q.safety * ratio ** (-1 / self.order)
        else:
            factor = q.safety * ratio ** (-(self.p + self.i + self.d) / self.order)
            factor *= self["inverse1"] ** (-(self.p + 2 * self.d) / self.order)
            factor *= self["inverse2"] ** (self.d / self.order)
            if self.p == self.d == 0 and ratio < 1:
                floor = 1.0
        return min(max(factor, floor), q.ifactor)

    def step(self) -> None:
        """What step_size does to one row."""
        self.update(output_begin=self["output_end"])
        if self["status"] != STATUS["running"]:
            self["accept"] = self["accepted_dt"] = 0
            return
        size, ratio = abs(self["dt"]), self["error_ratio"]
        accept = ratio <= 1 or (math.isfinite(ratio) and size <= self.control.min_step)
        self.update(accept=float(accept), last_time=self["time"], last_dt=self["dt"])
        self.update(accepted_dt=self["dt"] if accept else 0.0)
        size *= self.factor(ratio, accept)
        self["next_size"] = min(max(size, self.control.min_step), self.control.max_step)
        self["steps_since_output"] += 1
        if accept:
            self["num_accepted"] += 1
            self.update(inverse2=self["inverse1"], inverse1=1 / max(ratio, 1e-10), time=self["step_end"], jumped=0)
            reached = sum((time - self["time"]) * self.direction <= 0 for time in self.t)
            if reached > self["output_end"]:
                self.update(output_end=reached, steps_since_output=0)
            if self["time"] == self.stops[int(self["next_stop"])]:
                kind = self.kinds[int(self["next_stop"])]
                if kind == STOPS["end"]:
                    self.end("success")
                    return
                self["jumped"] = float(kind == STOPS["jump"])
                self["next_stop"] += 1
        else:
            self["num_rejected"] += 1
            if abs(self["last_dt"]) <= self.control.min_step:
                self.end("non_finite")
                return
        if self["steps_since_output"] >= self.control.max_num_steps:
            self.end("max_num_steps")
            return
        self.plan(size)

    def first(self, d0: float, d1: float, d2: float, size: float, phase: int) -> None:
        """What first_step does to one row: Hairer, Norsett and Wanner I, II.4."""
        if math.isnan(d0) or math.isnan(d1):
            self.end("non_finite")
            return
        if phase == 2:
            size = self["next_size"]
        if size <= 0:
            h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
            if h0 == 0 or math.isnan(h0):
                h0 = 1e-6
            h0 = min(h0, (self.stops[int(self["next_stop"])] - self["time"]) * self.direction)
            if phase == 0:
                self.update(dt=self.direction * h0, step_end=self["time"] + self.direction * h0)
                return
            largest = max(d1, d2 / h0)
            h1 = max(1e-6, h0 * 1e-3) if largest <= 1e-15 else (0.01 / largest) ** (1 / self.order)
            size = min(100 * h0, h1) or h0
        self.plan(size)

    def times(self, c: list[float], dtype: torch.dtype) -> list[float]:
        """The stage times of the step planned; beside a jump they lie on the side of the step."""
        times, moved = [], []  # moved: towards +1 or -1, by one number
        for node in c:
            times.append(self["time"] + node * self["dt"])
            moved.append(0.0)
            if node == 0:
                times[-1] = self["time"]
                moved[-1] = self.direction * self["jumped"]
            elif node == 1:
                times[-1] = self["step_end"]
                stop = int(self["next_stop"])
                jump = self["status"] == STATUS["running"] and self["step_end"] == self.stops[stop]
                if jump and self.kinds[stop] == STOPS["jump"]:
                    moved[-1] = -self.direction
        rounded, away = torch.tensor(times, dtype=torch.float64).to(dtype), torch.tensor(moved).to(dtype)
        return torch.where(away == 0, rounded, torch.nextafter(rounded, away * math.inf)).tolist()


class Solve:
    """A solver state with its stops and outputs, which steps through the ops and compares with the reference."""

    NODES = (0.0, 0.3, 0.5, 1.0, 1.0)

    def __init__(
        self,
        rows: int,
        device: torch.device,
        *,
        control: StepControl | None = None,
        order: int = 5,
        t: tuple[float, ...] = (0.0, 0.5, 1.0, 3.0),
        stops: tuple[tuple[float, str], ...] = (),
        dtype: torch.dtype = torch.float64,
    ):
        self.rows, self.device, self.order, self.t, self.dtype = rows, device, order, t, dtype
        self.control = control or StepControl()
        self.direction = 1.0 if t[-1] > t[0] else -1.0
        table = [*stops, (t[-1], "end")]
        self.stop_times, self.kinds = [time for time, _ in table], [STOPS[kind] for _, kind in table]
        kinds = [float(kind) for kind in self.kinds]
        self.stops = torch.tensor([self.stop_times, kinds], dtype=torch.float64, device=device)
        self.outputs = torch.tensor(t, dtype=torch.float64, device=device)
        self.state = torch.from_numpy(initial_state(t[0], rows, self.direction)).to(device)
        self.times = torch.full((len(self.NODES), rows), SENTINEL, dtype=dtype, device=device)
        self.constants = self.control.constants(order)

    @property
    def ratio(self) -> Tensor:
        return self.state[FIELDS["error_ratio"]]

    def get(self, name: str) -> list[float]:
        return self.state[FIELDS[name]].tolist()

    def reference(self) -> list[Row]:
        state = self.state.cpu().numpy().copy()
        stops = self.stop_times, self.kinds, self.t
        return [Row(state, row, self.control, self.order, self.direction, *stops) for row in range(self.rows)]

    def start(self, size: float) -> None:
        """A given first step; every row begins with f and y of norm 1."""
        norms = torch.ones(3, self.rows, dtype=torch.float64, device=self.device)
        self.first_step(norms, size, 1)

    def first_step(self, norms: Tensor, size: float, phase: int) -> None:
        tables = self.stops, self.outputs, self.NODES, self.constants
        ops.first_step(self.state, self.times, norms, *tables, size, phase)

    def step_size(self) -> None:
        ops.step_size(self.state, self.times, self.stops, self.outputs, self.NODES, self.constants)

    def compare(self, expected: list[Row]) -> None:
        """The state and the stage times are the reference's; whole numbers exactly."""
        found = self.state.cpu().numpy()[list(FIELDS.values())]
        values = np.array([[row[name] for row in expected] for name in FIELDS])
        if not np.allclose(found, values, CONTROLLER_RTOL, 0, equal_nan=True):
            for name, x, y in zip(FIELDS, found, values, strict=True):
                np.testing.assert_allclose(x, y, rtol=CONTROLLER_RTOL, atol=0, err_msg=name)
        for row, values in enumerate(self.reference()):  # from the kernel's own state: exactly
            assert self.times[:, row].tolist() == values.times(self.NODES, self.dtype)

    def checked_step(self, ratios: list[float]) -> None:
        self.ratio.copy_(torch.tensor(ratios, dtype=torch.float64))
        expected = self.reference()
        for row in expected:
            row.step()
        self.step_size()
        self.compare(expected)


CONTROLS = [
    pytest.param(StepControl(), id="I"),
    pytest.param(StepControl("PI", safety=0.8, ifactor=4.0, dfactor=0.3), id="PI"),
    pytest.param(StepControl("PID"), id="PID"),
    pytest.param(StepControl((0.2, 0.3, 0.05)), id="three-numbers"),
    pytest.param(StepControl(min_step=0.05), id="min-step"),
    pytest.param(StepControl(max_step=0.15), id="max-step"),
    pytest.param(StepControl(max_num_steps=5), id="max-num-steps"),
]
STOP_TABLES = [
    pytest.param((), id="no-stops"),
    pytest.param(((0.3, "step"), (0.5, "jump"), (1.7, "jump")), id="stops-and-jumps"),
]


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("stops", STOP_TABLES)
@pytest.mark.parametrize("direction", [1.0, -1.0], ids=["forwards", "backwards"])
@pytest.mark.parametrize("rows", [1, 7], ids=["joint", "rows"])
def test_step_size_follows_the_reference(device, real, control, stops, direction, rows):
    """Forty steps with ratios that are small, large, 0, 1 and not finite: the state is the reference's after each."""
    t = tuple(direction * time for time in (0.0, 0.5, 0.6, 0.6001, 1.0, 3.0))
    stops = tuple((direction * time, kind) for time, kind in stops)
    solve = Solve(rows, device, control=control, t=t, stops=stops, dtype=real)
    solve.start(0.1)
    random = np.random.default_rng(0)
    special = [0.0, 1.0, 1e-12, 1e12, math.inf, math.nan, math.nextafter(1, 2)]
    for _ in range(40):
        ratios = np.where(random.random(rows) < 0.15, random.choice(special, rows), 10 ** random.uniform(-3, 1, rows))
        solve.checked_step(ratios.tolist())
    assert all(solve.get("num_accepted"))


@given(
    ratios=st.lists(st.floats(0, 1e6) | st.sampled_from([math.nan, math.inf]), min_size=1, max_size=20),
    control=st.builds(
        StepControl,
        controller=st.sampled_from(["I", "PI", "PID"]),
        safety=st.floats(0.5, 1.0),
        ifactor=st.floats(1.0, 20.0),
        dfactor=st.floats(0.1, 1.0),
    ),
    order=st.integers(1, 8),
    size=st.floats(1e-6, 10.0),
)
def test_step_size_of_any_ratios(device, ratios, control, order, size):
    """Any ratios, constants, order and first step: the state is the reference's after each step."""
    solve = Solve(1, device, control=control, order=order, stops=((0.25, "jump"),))
    solve.start(size)
    for ratio in ratios:
        solve.checked_step([ratio])


RATIOS = [
    # the ratio, whether the step is accepted, and the next step after one of 0.01 by a method of order 5
    pytest.param(0.0, True, 0.1, id="no-error"),
    pytest.param(0.9**5 / 32, True, 0.02, id="doubles"),
    pytest.param(0.95, True, 0.01, id="never-shrinks-below-1"),
    pytest.param(1.0, True, 0.009, id="one"),
    pytest.param(0.9**5 * 32, False, 0.005, id="halves"),
    pytest.param(1e9, False, 0.002, id="dfactor"),
    pytest.param(math.inf, False, 0.002, id="inf"),
    pytest.param(math.nan, False, 0.002, id="nan"),
]


@pytest.mark.parametrize(("ratio", "accept", "expected"), RATIOS)
def test_step_size_of_known_numbers(device, ratio, accept, expected):
    """The next step of the classical controller, by hand."""
    solve = Solve(1, device)
    solve.start(0.01)
    solve.ratio.fill_(ratio)
    solve.step_size()
    assert solve.get("accept") == [float(accept)]
    assert solve.get("time") == [0.01 if accept else 0.0]
    assert solve.get("dt")[0] == pytest.approx(expected, rel=CONTROLLER_RTOL)


def test_step_size_lands_on_stops(device):
    """A step ends exactly on a stop, takes a sliver along, and stage times beside a jump stay on the step's side."""
    jump = 0.1 + 1e-12
    solve = Solve(1, device, stops=((jump, "jump"),))
    solve.start(0.1)
    assert solve.get("step_end") == [jump] and solve.get("dt") == [jump]
    assert solve.times[3:].flatten().tolist() == [math.nextafter(jump, 0)] * 2
    solve.ratio.fill_(0.5)
    solve.step_size()
    assert (solve.get("time"), solve.get("jumped"), solve.get("next_stop")) == ([jump], [1.0], [1.0])
    assert solve.times[0].tolist() == [math.nextafter(jump, 1)]
    solve.ratio.fill_(0.5)
    solve.step_size()
    assert solve.get("jumped") == [0.0] and solve.times[0].tolist() == solve.get("time")


def test_step_size_counts_outputs(device):
    """A step over two outputs tells which, and the next step begins after them."""
    solve = Solve(1, device, t=(0.0, 0.1, 0.2, 3.0))
    solve.start(0.2)
    solve.ratio.fill_(0.5)
    solve.step_size()
    assert (solve.get("output_begin"), solve.get("output_end")) == ([1.0], [3.0])
    solve.ratio.fill_(2.0)
    solve.step_size()
    assert (solve.get("output_begin"), solve.get("output_end")) == ([3.0], [3.0])


@pytest.mark.parametrize(
    ("control", "size", "ratio", "status"),
    [
        pytest.param(StepControl(), 3.0, 0.5, "success", id="success"),
        pytest.param(StepControl(max_num_steps=1), 0.1, 0.5, "max_num_steps", id="max-num-steps"),
        pytest.param(StepControl(min_step=0.1), 0.1, math.nan, "non_finite", id="not-finite-at-min-step"),
        pytest.param(StepControl(min_step=0.1), 0.1, 1e9, "running", id="min-step-accepts"),
    ],
)
def test_step_size_ends(device, control, size, ratio, status):
    """Why a row ends; it is then held with steps of size 0, whatever its ratio."""
    solve = Solve(1, device, control=control)
    solve.start(size)
    solve.ratio.fill_(ratio)
    solve.step_size()
    assert solve.get("status") == [STATUS[status]]
    if status != "running":
        time = solve.get("time")
        solve.checked_step([0.5])
        assert (solve.get("dt"), solve.get("accept"), solve.get("step_end")) == ([0.0], [0.0], time)
        assert solve.times.flatten().tolist() == time * len(Solve.NODES)


@pytest.mark.parametrize(("ratio", "status"), [(1e9, "underflow"), (math.inf, "non_finite")], ids=["finite", "inf"])
def test_step_size_underflows(device, ratio, status):
    """Steps rejected until time no longer moves end the row, and the status says whether f was finite."""
    solve = Solve(1, device, t=(1.0, 3.0))
    solve.start(0.1)
    for _ in range(60):
        solve.checked_step([ratio])
    assert solve.get("status") == [STATUS[status]] and solve.get("time") == [1.0]


NORMS = [
    pytest.param((1.0, 2.0, 3.0), id="plain"),
    pytest.param((1e-6, 2.0, 3.0), id="small-y0"),
    pytest.param((1.0, 0.0, 0.0), id="f0-zero"),
    pytest.param((0.0, 0.0, 0.0), id="all-zero"),
    pytest.param((1.0, 1e-4, 0.0), id="straight-line"),
    pytest.param((1.0, 1e200, 1e250), id="huge"),
    pytest.param((1.0, math.inf, 1.0), id="f0-inf"),
    pytest.param((1e9, 1e-3, 1e-9), id="beyond-the-end"),
    pytest.param((math.nan, 1.0, 1.0), id="y0-nan"),
    pytest.param((1.0, math.nan, 1.0), id="f0-nan"),
]


@pytest.mark.parametrize("direction", [1.0, -1.0], ids=["forwards", "backwards"])
@pytest.mark.parametrize("order", [2, 5, 8])
@pytest.mark.parametrize("phase", [0, 1], ids=["phase-0", "phase-1"])
def test_first_step_follows_the_reference(device, real, direction, order, phase):
    """The small step of phase 0 and the first step of phase 1 for norms of all sizes, one a row."""
    t = (0.0, direction * 0.5, direction * 3.0)
    solve = Solve(len(NORMS), device, order=order, t=t, dtype=real)
    norms = [param.values[0] for param in NORMS]
    expected = solve.reference()
    for row, values in zip(expected, norms, strict=True):
        row.first(*values, 0.0, phase)
    solve.first_step(torch.tensor(norms, dtype=torch.float64, device=device).T.contiguous(), 0.0, phase)
    solve.compare(expected)


@pytest.mark.parametrize("d2", [math.nan, math.inf], ids=["nan", "inf"])
def test_first_step_beside_a_slope_that_is_not_finite(device, d2):
    """f1 not finite: the first step is no larger than the small step of phase 0."""
    solve = Solve(1, device)
    solve.first_step(torch.tensor([[1.0], [2.0], [d2]], dtype=torch.float64, device=device), 0.0, 1)
    assert 0 < solve.get("dt")[0] <= 0.01 / 2


@pytest.mark.parametrize(("size", "expected"), [(0.2, 0.2), (5.0, 1.0), (0.01, 0.05), (1.5, 1.0)])
def test_first_step_given(device, size, expected):
    """A given first step is taken within min_step and max_step."""
    solve = Solve(2, device, control=StepControl(min_step=0.05, max_step=1.0))
    solve.start(size)
    assert solve.get("dt") == [expected] * 2 and solve.get("status") == [STATUS["running"]] * 2


def test_first_step_leaves_ended_rows(device):
    """A row that has ended stays as it is."""
    solve = Solve(2, device)
    solve.state[FIELDS["status"], 1] = STATUS["success"]
    before = solve.state.clone()
    solve.start(0.1)
    assert torch.equal(solve.state[:, 1], before[:, 1]) and solve.get("dt") == [0.1, 0.0]


@pytest.mark.parametrize("op", ["step_size", "first_step"])
def test_controller_without_rows(device, op):
    """A batch of no samples has no steps."""
    solve = Solve(0, device)
    solve.step_size() if op == "step_size" else solve.start(0.1)
    assert solve.state.shape == (NUM_FIELDS, 0)


def test_step_size_of_rows_with_their_own_times(device):
    """Stops and outputs of each row, of either direction and number: as the row alone, to the bit."""
    tables = [  # stops without the end, times
        ((((0.3, "step"), (0.5, "jump"))), (0.0, 0.5, 0.6, 3.0)),
        ((), (2.0, 1.5)),
        (((-0.5, "step"),), (0.0, -0.2, -1.0)),
    ]
    alone = [Solve(1, device, t=t, stops=stops) for stops, t in tables]
    whole = Solve(3, device)
    whole.state.copy_(torch.cat([row.state for row in alone], 1))
    ends = [torch.cat([row.stops, row.stops[:, -1:].expand(2, 3 - row.stops.shape[1])], 1) for row in alone]
    whole.stops = torch.stack(ends).contiguous()
    whole.outputs = torch.full((3, 4), math.nan, dtype=torch.float64, device=device)
    for row, (_, t) in enumerate(tables):
        whole.outputs[row, : len(t)] = torch.tensor(t, dtype=torch.float64)
    for solve in (*alone, whole):
        solve.start(0.1)
    random = np.random.default_rng(0)
    for _ in range(60):
        ratios = torch.from_numpy(10 ** random.uniform(-3, 1, 3))
        for row, solve in enumerate(alone):
            solve.ratio.copy_(ratios[row : row + 1])
        whole.ratio.copy_(ratios)
        for solve in (*alone, whole):
            solve.step_size()
        assert torch.equal(whole.state, torch.cat([row.state for row in alone], 1))
        assert torch.equal(whole.times, torch.cat([row.times for row in alone], 1))
    assert whole.get("status") == [STATUS["success"]] * 3 and whole.get("output_end") == [4.0, 2.0, 3.0]


# ---- dense_output ----------------------------------------------------------------------------------------------------

LAST_TIME, TIME = 1.25, 2.0


def accepted_step(rows: int, device: torch.device, begin: int = 1, end: int = 3) -> Tensor:
    """The state after a step from LAST_TIME to TIME into which outputs [begin, end) fell."""
    state = torch.from_numpy(initial_state(LAST_TIME, rows)).to(device)
    values = {"time": TIME, "last_time": LAST_TIME, "last_dt": TIME - LAST_TIME}
    values.update(output_begin=begin, output_end=end)
    for name, value in values.items():
        state[FIELDS[name]] = value
    return state


def check_dense(out: Tensor, tableau, y0: Tensor, k: list[Tensor], theta: float, dtype: torch.dtype) -> None:
    """One output against the formula in float64, within the roundings of its terms."""
    dt, slopes = TIME - LAST_TIME, [wide(slope) for slope in k]
    exact = formulas.dense_output(tableau, wide(y0), slopes, theta, dt)
    weights = formulas.interpolant_weights(tableau, theta)
    size = sum((abs(dt * w) * slope.abs() for w, slope in zip(weights, slopes, strict=True)), wide(y0).abs())
    assert_within(out, exact, size * (ROUNDINGS + tableau.stages) * EPS[dtype])


@pytest.mark.parametrize("method", methods.EXPLICIT)
@pytest.mark.parametrize(("shape", "rows"), SHAPES)
def test_dense_output(device, dtype, method, shape, rows):
    """Outputs inside the step from the interpolant, one at its end is y1, and no other output is written."""
    if math.prod(shape) > 1000 and method != "dopri5":
        pytest.skip("one method is enough for many elements")
    numbers, tableau = Numbers(device), methods.EXPLICIT[method]
    y0, y1, *k = (numbers.tensor(shape, dtype) for _ in range(2 + tableau.stages))
    t = torch.tensor([0.0, 1.4, 1.75, TIME, 3.0], dtype=torch.float64, device=device)
    ys = torch.full((5, *shape), SENTINEL, dtype=dtype, device=device)
    p = [number for row in tableau.p for number in row]
    ops.dense_output([ys], [y0], [y1], k, p, len(tableau.p[0]), accepted_step(rows, device, 1, 4), t)
    for output in (1, 2):
        check_dense(ys[output], tableau, y0, k, float((t[output] - LAST_TIME) / (TIME - LAST_TIME)), dtype)
    assert torch.equal(ys[3], y1)
    assert bool((ys[[0, 4]] == SENTINEL).all())


def test_dense_output_row_by_row(device, dtype):
    """Each row writes the outputs that fell into its own step, of its own size."""
    numbers, tableau, rows = Numbers(device), methods.TSIT5, 4
    y0, y1, *k = (numbers.tensor((rows, 3), dtype) for _ in range(2 + tableau.stages))
    state = accepted_step(rows, device)
    begin, end = [1, 1, 2, 0], [1, 2, 4, 4]
    state[FIELDS["output_begin"]], state[FIELDS["output_end"]] = (torch.tensor(x).to(state) for x in (begin, end))
    t = torch.tensor([1.3, 1.4, 1.5, 1.9], dtype=torch.float64, device=device)
    ys = torch.full((4, rows, 3), SENTINEL, dtype=dtype, device=device)
    ops.dense_output([ys], [y0], [y1], k, [x for row in tableau.p for x in row], 4, state, t)
    own = torch.full_like(ys, SENTINEL)  # each row's own times, here the same ones
    ops.dense_output([own], [y0], [y1], k, [x for row in tableau.p for x in row], 4, state, t.repeat(rows, 1))
    assert torch.equal(own, ys)
    for row in range(rows):
        for output in range(4):
            if begin[row] <= output < end[row]:
                theta = float((t[output] - LAST_TIME) / (TIME - LAST_TIME))
                check_dense(ys[output, row], tableau, y0[row], [slope[row] for slope in k], theta, dtype)
            else:
                assert bool((ys[output, row] == SENTINEL).all())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense_output_reads_strided(device, dtype, layout):
    """States and slopes may be strided: the result is that of contiguous copies, bit for bit."""
    numbers, tableau, shape = Numbers(device), methods.BOSH3, (6, 5, 3)
    y0, y1, *k = (numbers.tensor(shape, dtype, layout) for _ in range(2 + tableau.stages))
    t = torch.tensor([0.0, 1.4, TIME], dtype=torch.float64, device=device)
    ys, expected = (torch.full((3, *shape), SENTINEL, dtype=dtype, device=device) for _ in range(2))
    tables = [x for row in tableau.p for x in row], len(tableau.p[0]), accepted_step(6, device), t
    ops.dense_output([ys], [y0], [y1], k, *tables)
    ops.dense_output([expected], [y0.contiguous()], [y1.contiguous()], [x.contiguous() for x in k], *tables)
    assert torch.equal(ys, expected) and torch.equal(ys[2], y1)
    check_dense(ys[1], tableau, y0, k, 0.2, dtype)


def test_dense_output_several_leaves(device):
    """Leaves of different shapes and types, slopes with a slot to spare, the greatest degree and the most stages."""
    numbers, kinds = Numbers(device), [(shape, dtype) for dtype in EPS for shape in ((4, 3), (4,))]
    p = [[(-1.0) ** (j + d) / (j + d + 1) for d in range(MAX_DEGREE)] for j in range(MAX_STAGES)]
    tableau = type("Interpolant", (), {"p": p, "stages": MAX_STAGES})
    ys = [torch.empty(1, *shape, dtype=dtype, device=device) for shape, dtype in kinds]
    y0, y1 = ([numbers.tensor(shape, dtype) for shape, dtype in kinds] for _ in range(2))
    k = [numbers.tensor(shape, dtype) for shape, dtype in kinds for _ in range(MAX_STAGES + 1)]
    t = torch.tensor([1.7], dtype=torch.float64, device=device)
    ops.dense_output(ys, y0, y1, k, [x for row in p for x in row], MAX_DEGREE, accepted_step(4, device, 0, 1), t)
    for leaf, (_, dtype) in enumerate(kinds):
        slopes = k[leaf * (MAX_STAGES + 1) :][:MAX_STAGES]
        check_dense(ys[leaf][0], tableau, y0[leaf], slopes, (1.7 - LAST_TIME) / (TIME - LAST_TIME), dtype)


# ---- advance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "rows"), SHAPES)
@pytest.mark.parametrize("layout", ["contiguous", "expanded"])
def test_advance(device, dtype, shape, rows, layout):
    """Accepted rows take the end of the step and its slope, bit for bit; the others keep theirs."""
    if not shape:
        layout = "contiguous"
    numbers = Numbers(device)
    y0, k0 = (numbers.tensor(shape, dtype) for _ in range(2))
    y1, k1 = (numbers.tensor(shape, dtype, layout) for _ in range(2))
    for pattern in (1, 2):
        accept = (torch.arange(rows, device=device) % pattern == 0).double() * 0.5
        if pattern == 2 and rows == 1:
            accept = accept * 0
        mask = per_row(accept != 0, y0)
        expected = torch.where(mask, y1, y0), torch.where(mask, k1, k0)
        y, k = y0.clone(), k0.clone()
        ops.advance([y], [k], [y1], [k1], accept)
        assert torch.equal(y, expected[0]) and torch.equal(k, expected[1])


def test_advance_several_leaves(device):
    """Leaves of different shapes and types in one call."""
    numbers, kinds = Numbers(device), [(shape, dtype) for dtype in EPS for shape in ((4, 3), (4,))]
    y0, k0, y1, k1 = ([numbers.tensor(shape, dtype) for shape, dtype in kinds] for _ in range(4))
    accept = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64, device=device)
    pairs = zip([*y0, *k0], [*y1, *k1], strict=True)
    expected = [torch.where(per_row(accept != 0, old), new, old) for old, new in pairs]
    ops.advance(y0, k0, y1, k1, accept)
    assert all(torch.equal(x, y) for x, y in zip([*y0, *k0], expected, strict=True))


# ---- what every op keeps to ------------------------------------------------------------------------------------------


class Call:
    """One call of an op: positional arguments, and the indices of those that it writes."""

    def __init__(self, name: str, arguments: list, written: tuple[int, ...]):
        self.name, self.arguments, self.written = name, arguments, written

    def __call__(self) -> None:
        getattr(ops, self.name)(*self.arguments)

    def tensors(self, written: bool) -> list[Tensor]:
        """The tensors that are written, or those that are not."""
        found: list[Tensor] = []
        for i, argument in enumerate(self.arguments):
            if (i in self.written) == written:
                parts = argument if isinstance(argument, list) else [argument]
                found += [part for part in parts if isinstance(part, Tensor)]
        return found


def make_call(name: str, device: torch.device, dtype: torch.dtype = torch.float32, rows: int = 3) -> Call:
    """A plain call of an op with two leaves."""
    numbers, shapes = Numbers(device), [(3, 2), (3,)]

    def leaves(slots: int = 1) -> list[Tensor]:
        return [numbers.tensor(shape, dtype) for shape in shapes for _ in range(slots)]

    if name == "stage":
        return Call(name, [leaves(), leaves(), leaves(2), [0.5, 0.25], numbers.rows(rows)], (0,))
    if name == "error":
        ratio = torch.zeros(rows, dtype=torch.float64, device=device)
        arguments = [ratio, leaves(), leaves(), leaves(2), [0.5, 0.25], numbers.rows(rows), [1e-2] * 2, [1e-3] * 2]
        return Call(name, arguments, (0,))
    if name == "dense_output":
        ys = [torch.stack([leaf] * 3) for leaf in leaves()]
        t = torch.tensor([0.0, 1.5, 2.0], dtype=torch.float64, device=device)
        p = [1.0, -0.5, 0.0, 0.5]
        return Call(name, [ys, leaves(), leaves(), leaves(2), p, 2, accepted_step(rows, device), t], (0,))
    if name == "advance":
        accept = torch.ones(rows, dtype=torch.float64, device=device)
        return Call(name, [leaves(), leaves(), leaves(), leaves(), accept], (0, 1))
    solve = Solve(rows, device, dtype=dtype.to_real())
    tables = [solve.stops, solve.outputs, list(Solve.NODES), solve.constants]
    if name == "first_step":
        norms = torch.ones(3, rows, dtype=torch.float64, device=device)
        return Call(name, [solve.state, solve.times, norms, *tables, 0.0, 1], (0, 1))
    solve.start(0.1)
    return Call(name, [solve.state, solve.times, *tables], (0, 1))


@pytest.mark.parametrize("name", ops.__all__)
@pytest.mark.parametrize("rows", [1, 3], ids=["joint", "rows"])
def test_writes_what_it_says_and_nothing_else(device, dtype, name, rows):
    """Version counters rise for what is written, all of which changes; everything else stays as it was."""
    call = make_call(name, device, dtype, rows)
    written, read = call.tensors(True), call.tensors(False)
    before = [(tensor.clone(), tensor._version) for tensor in (*written, *read)]
    call()
    for tensor, (value, version) in zip((*written, *read), before, strict=True):
        is_written = any(tensor is other for other in written)
        assert tensor._version > version if is_written else tensor._version == version
        assert torch.equal(tensor, value) != is_written


@pytest.mark.parametrize("name", ops.__all__)
def test_autograd_notices_what_was_overwritten(device, name):
    """backward raises where an op wrote into a tensor that autograd had saved."""
    call = make_call(name, device)
    for i in range(len(call.tensors(True))):
        call = make_call(name, device)
        saved = call.tensors(True)[i]
        x = torch.ones_like(saved, requires_grad=True)
        product = (x * saved).sum()
        call()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


@pytest.mark.parametrize("name", ops.__all__)
def test_inference_mode(device, name):
    """Tensors made under inference mode, which have no version counter, get the same values."""
    expected = make_call(name, device)
    expected()
    with torch.inference_mode():
        call = make_call(name, device)
        call()
    for x, y in zip(call.tensors(True), expected.tensors(True), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", ops.__all__)
def test_opcheck(device, name):
    """Schema, fake kernel, dispatch and tracing are as torch wants them of a mutating op without a gradient."""
    checks = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_static",
        "test_aot_dispatch_dynamic",
    )
    result = torch.library.opcheck(
        getattr(torch.ops.odenet_cuda, name).default, tuple(make_call(name, device).arguments), test_utils=checks
    )
    assert result == dict.fromkeys(checks, "SUCCESS")


@pytest.mark.parametrize("name", ops.__all__)
def test_fake_tensors(device, name):
    """A call on fake tensors does no work and leaves their shapes."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        call = make_call(name, torch.device("cpu"))
        call.arguments = [
            [mode.from_tensor(x) if isinstance(x, Tensor) and type(x) is Tensor else x for x in argument]
            if isinstance(argument, list)
            else mode.from_tensor(argument)
            if type(argument) is Tensor
            else argument
            for argument in call.arguments
        ]
        shapes = [tensor.shape for tensor in call.tensors(True)]
        call()
        assert [tensor.shape for tensor in call.tensors(True)] == shapes


@pytest.mark.parametrize("name", ops.__all__)
def test_compiled(name):
    """A graph traced through the op writes what the op writes."""
    from torch.fx.experimental.proxy_tensor import make_fx

    call, expected = make_call(name, torch.device("cpu")), make_call(name, torch.device("cpu"))
    op = getattr(torch.ops.odenet_cuda, name).default
    flat, spec = torch.utils._pytree.tree_flatten(call.arguments)
    places = [i for i, part in enumerate(flat) if isinstance(part, Tensor)]

    def function(*tensors: Tensor) -> None:
        parts = list(flat)
        for place, tensor in zip(places, tensors, strict=True):
            parts[place] = tensor
        op(*torch.utils._pytree.tree_unflatten(parts, spec))

    tensors = [flat[place] for place in places]
    graph = make_fx(function, tracing_mode="fake")(*[tensor.clone() for tensor in tensors])
    graph(*tensors)
    expected()
    for x, y in zip(call.tensors(True), expected.tensors(True), strict=True):
        assert torch.equal(x, y)


# ---- errors ----------------------------------------------------------------------------------------------------------


def replaced(name: str, index: int, value: object, part: int | None = None) -> Callable[[torch.device], Call]:
    """Makes a plain call in which one argument, or one of its tensors, is another; `value` may be a function of it."""

    def make(device: torch.device) -> Call:
        call = make_call(name, device)
        old = call.arguments[index] if part is None else call.arguments[index][part]
        new = value(old) if callable(value) else value
        if part is None:
            call.arguments[index] = new
        else:
            call.arguments[index][part] = new
        return call

    return make


def whole(x: Tensor) -> Tensor:
    return x.int()


def longer(x: Tensor) -> Tensor:
    return torch.cat([x, x[:1]])


def single(x: Tensor) -> Tensor:
    return x.float()


def spread(x: Tensor) -> Tensor:
    """The same values, not contiguous."""
    return torch.stack([x, x], -1)[..., 0]


def shorter(x: list) -> list:
    return x[:-1]


def too_many(_: list) -> list[float]:
    return [0.5] * (MAX_STAGES + 1)


WRONG = [
    # the call, and what the message must say
    pytest.param(
        replaced("stage", 0, whole, 0),
        r"y\[0\] must be of a floating or complex type of 16 to 128 bits, got Int",
        id="stage-y-dtype",
    ),
    pytest.param(replaced("stage", 0, spread, 0), r"y\[0\] is written and must be contiguous", id="stage-y-not-contiguous"),
    pytest.param(
        replaced("stage", 0, longer, 0), r"y\[0\] must have 3 samples on axis 0, got shape \[4, 2\]", id="stage-y-samples"
    ),
    pytest.param(replaced("stage", 1, shorter), r"y0 must hold one tensor a leaf, or none, 2, got 1", id="stage-y0-count"),
    pytest.param(
        replaced("stage", 1, longer, 0), r"y0\[0\] must have the shape of y\[0\], \[3, 2\], got \[4, 2\]", id="stage-y0-shape"
    ),
    pytest.param(replaced("stage", 1, Tensor.double, 0), r"y0\[0\] must have the dtype of y\[0\]", id="stage-y0-dtype"),
    pytest.param(
        replaced("stage", 2, longer, 1), r"k\[1\] must have the shape of y\[0\], \[3, 2\], got \[4, 2\]", id="stage-k-shape"
    ),
    pytest.param(replaced("stage", 2, Tensor.double, 1), r"k\[1\] must have the dtype of y\[0\]", id="stage-k-dtype"),
    pytest.param(
        replaced("stage", 2, shorter), r"k must hold as many slopes for each of the 2 leaves, got 3", id="stage-k-count"
    ),
    pytest.param(
        replaced("stage", 3, [0.5] * 3), r"k must hold 3 slopes a leaf, one a coefficient, got 2", id="stage-k-too-few"
    ),
    pytest.param(replaced("stage", 3, too_many), r"a must hold at most 17 coefficients, got 18", id="stage-a-too-many"),
    pytest.param(replaced("stage", 4, single), r"dt must be float64", id="stage-dt-dtype"),
    pytest.param(replaced("stage", 4, spread), r"dt must be contiguous", id="stage-dt-not-contiguous"),
    pytest.param(replaced("error", 0, single), r"ratio must be float64", id="error-ratio-dtype"),
    pytest.param(replaced("error", 0, longer), r"ratio must have 3 elements, got 4", id="error-ratio-size"),
    pytest.param(replaced("error", 0, spread), r"ratio must be contiguous", id="error-ratio-not-contiguous"),
    pytest.param(
        replaced("error", 1, whole, 0),
        r"y0\[0\] must be of a floating or complex type of 16 to 128 bits, got Int",
        id="error-y0-dtype",
    ),
    pytest.param(
        replaced("error", 1, longer, 0), r"y0\[0\] must have 3 samples on axis 0, got shape \[4, 2\]", id="error-y0-samples"
    ),
    pytest.param(
        replaced("error", 2, longer, 0), r"y1\[0\] must have the shape of y0\[0\], \[3, 2\], got \[4, 2\]", id="error-y1-shape"
    ),
    pytest.param(replaced("error", 2, Tensor.double, 0), r"y1\[0\] must have the dtype of y0\[0\]", id="error-y1-dtype"),
    pytest.param(replaced("error", 2, shorter), r"y1 must hold one tensor a leaf, 2, got 1", id="error-y1-count"),
    pytest.param(
        replaced("error", 3, longer, 1), r"k\[1\] must have the shape of y0\[0\], \[3, 2\], got \[4, 2\]", id="error-k-shape"
    ),
    pytest.param(replaced("error", 4, too_many), r"e must hold at most 17 coefficients, got 18", id="error-e-too-many"),
    pytest.param(replaced("error", 6, shorter), r"rtol must hold one number a leaf, 2, got 1", id="error-rtol-count"),
    pytest.param(replaced("error", 7, shorter), r"atol must hold one number a leaf, 2, got 1", id="error-atol-count"),
    pytest.param(
        replaced("step_size", 0, longer), r"state must have shape \[21, rows\], got \[22, 3\]", id="step-size-state-shape"
    ),
    pytest.param(replaced("step_size", 0, single), r"state must be float64", id="step-size-state-dtype"),
    pytest.param(replaced("step_size", 0, spread), r"state must be contiguous", id="step-size-state-not-contiguous"),
    pytest.param(replaced("step_size", 1, longer), r"times must have shape \[5, 3\], got \[6, 3\]", id="step-size-times-shape"),
    pytest.param(
        replaced("step_size", 1, whole),
        r"times.* must be of a floating or complex type of 16 to 128 bits, got Int",
        id="step-size-times-dtype",
    ),
    pytest.param(
        replaced("step_size", 1, lambda x: x + 0j), r"times must be real, got ComplexFloat", id="step-size-complex-times"
    ),
    pytest.param(
        replaced("first_step", 1, lambda x: x + 0j), r"times must be real, got ComplexFloat", id="first-step-complex-times"
    ),
    pytest.param(
        replaced("step_size", 1, spread), r"times.* is written and must be contiguous", id="step-size-times-not-contiguous"
    ),
    pytest.param(
        replaced("step_size", 2, longer),
        r"stops must have shape \[2, at least 1\], .* got \[3, 1\]",
        id="step-size-stops-shape",
    ),
    pytest.param(
        replaced("step_size", 2, lambda x: x[:, :0]),
        r"stops must have shape \[2, at least 1\], .* got \[2, 0\]",
        id="step-size-no-stops",
    ),
    pytest.param(replaced("step_size", 3, single), r"t must be float64", id="step-size-t-dtype"),
    pytest.param(
        replaced("step_size", 3, lambda x: x.repeat(2, 1)),
        r"t must have one dimension, or shape \[3, times\], got \[2,",
        id="step-size-t-rows",
    ),
    pytest.param(
        replaced("step_size", 2, lambda x: x.repeat(2, 1, 1)),
        r"stops must have shape .* each of the 3 rows, got \[2, 2, 1\]",
        id="step-size-stops-rows",
    ),
    pytest.param(replaced("step_size", 4, too_many), r"c must hold at most 17 coefficients, got 18", id="step-size-c-too-many"),
    pytest.param(
        replaced("step_size", 5, shorter),
        r"controller must hold the numbers of a Controller, 11, got 10",
        id="step-size-controller",
    ),
    pytest.param(replaced("first_step", 2, longer), r"norms must have 9 elements, got 12", id="first-step-norms-size"),
    pytest.param(replaced("first_step", 2, single), r"norms must be float64", id="first-step-norms-dtype"),
    pytest.param(
        replaced("dense_output", 0, longer, 0),
        r"ys\[0\] must hold 3 states of y0\[0\], \[3, 2\], got \[4, 3, 2\]",
        id="dense-output-ys-size",
    ),
    pytest.param(
        replaced("dense_output", 0, Tensor.double, 0), r"ys\[0\] must hold 3 states of y0\[0\]", id="dense-output-ys-dtype"
    ),
    pytest.param(
        replaced("dense_output", 0, spread, 0),
        r"ys\[0\] is written and must be contiguous",
        id="dense-output-ys-not-contiguous",
    ),
    pytest.param(
        replaced("dense_output", 1, whole, 0),
        r"y0\[0\] must be of a floating or complex type of 16 to 128 bits, got Int",
        id="dense-output-y0-dtype",
    ),
    pytest.param(replaced("dense_output", 1, shorter), r"y0 must hold one tensor a leaf, 2, got 1", id="dense-output-y0-count"),
    pytest.param(
        replaced("dense_output", 2, longer, 0),
        r"y1\[0\] must have the shape of y0\[0\], \[3, 2\], got \[4, 2\]",
        id="dense-output-y1-shape",
    ),
    pytest.param(
        replaced("dense_output", 3, longer, 1),
        r"k\[1\] must have the shape of y0\[0\], \[3, 2\], got \[4, 2\]",
        id="dense-output-k-shape",
    ),
    pytest.param(
        replaced("dense_output", 4, shorter), r"p must hold \[stages, degree\] numbers .* got 3 and 2", id="dense-output-p-size"
    ),
    pytest.param(
        replaced("dense_output", 4, [0.5] * 36), r"p must hold at most 17 coefficients, got 18", id="dense-output-p-too-many"
    ),
    pytest.param(replaced("dense_output", 5, 9), r"p must hold .* degree at most 8, got 4 and 9", id="dense-output-degree"),
    pytest.param(replaced("dense_output", 5, 0), r"p must hold .* got 4 and 0", id="dense-output-no-degree"),
    pytest.param(
        replaced("dense_output", 6, lambda x: x[0]),
        r"state must have shape \[fields, rows\], got \[3\]",
        id="dense-output-state-shape",
    ),
    pytest.param(replaced("dense_output", 6, longer), r"state must have 63 elements, got 66", id="dense-output-state-size"),
    pytest.param(replaced("dense_output", 7, single), r"t must be float64", id="dense-output-t-dtype"),
    pytest.param(
        replaced("advance", 0, whole, 0),
        r"y0\[0\] must be of a floating or complex type of 16 to 128 bits, got Int",
        id="advance-y0-dtype",
    ),
    pytest.param(
        replaced("advance", 0, spread, 0), r"y0\[0\] is written and must be contiguous", id="advance-y0-not-contiguous"
    ),
    pytest.param(
        replaced("advance", 1, spread, 0), r"k0\[0\] is written and must be contiguous", id="advance-k0-not-contiguous"
    ),
    pytest.param(replaced("advance", 1, shorter), r"k0 must hold one tensor a leaf, 2, got 1", id="advance-k0-count"),
    pytest.param(
        replaced("advance", 2, longer, 0),
        r"y1\[0\] must have the shape of y0\[0\], \[3, 2\], got \[4, 2\]",
        id="advance-y1-shape",
    ),
    pytest.param(replaced("advance", 3, Tensor.double, 0), r"k1\[0\] must have the dtype of y0\[0\]", id="advance-k1-dtype"),
    pytest.param(replaced("advance", 4, single), r"accept must be float64", id="advance-accept-dtype"),
]


@pytest.mark.parametrize(("make", "message"), WRONG)
def test_wrong_arguments(device, make, message):
    """A wrong argument raises ValueError, which names the argument, the rule and the value, and nothing is written."""
    call = make(device)
    written = call.tensors(True)
    before = [tensor.clone() for tensor in written]
    with pytest.raises(ValueError, match=message):
        call()
    assert all(torch.equal(x, y) for x, y in zip(written, before, strict=True))


LAST_WRONG = {
    "stage": replaced("stage", 1, longer, 1),
    "error": replaced("error", 2, longer, 1),
    "dense_output": replaced("dense_output", 2, longer, 1),
    "advance": replaced("advance", 2, longer, 1),
}


@pytest.mark.parametrize("name", LAST_WRONG)
def test_nothing_is_written_where_the_last_leaf_is_wrong(device, name):
    """An error in the last leaf is found before the first is written."""
    call = LAST_WRONG[name](device)
    before = [tensor.clone() for tensor in call.tensors(True)]
    with pytest.raises(ValueError, match=r"y[01]\[1\] must have the shape of y0?\[1\], \[3\], got \[4\]"):
        call()
    assert all(torch.equal(x, y) for x, y in zip(call.tensors(True), before, strict=True))


def test_devices_that_differ(device):
    """Tensors of two devices in one call are refused."""
    if device.type == "cpu":
        pytest.skip("needs two devices")
    for name, index in (("stage", 1), ("error", 2), ("advance", 2), ("dense_output", 2)):
        call = replaced(name, index, Tensor.cpu, 0)(device)
        with pytest.raises(ValueError, match="must be on the device of"):
            call()
