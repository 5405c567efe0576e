"""Element types other than float32 and float64: conversions, complex norms, and solves."""

import math

import pytest
import torch
from torch import Tensor

from odenet_cuda import formulas, ops, solve

SHORT = [torch.float16, torch.bfloat16]
COMPLEX = [torch.complex64, torch.complex128]
DTYPES = [*SHORT, torch.float32, torch.float64, *COMPLEX]
# A tolerance of a solve that the type can resolve, and what its results then err by at most.
TOLERANCE = dict(zip(DTYPES, (1e-3, 1e-2, 1e-5, 1e-9, 1e-5, 1e-9), strict=True))
ERROR = dict(zip(DTYPES, (5e-3, 5e-2, 1e-4, 1e-7, 1e-4, 1e-7), strict=True))
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def name(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Equal to the bit; one NaN is as good as another."""
    kind = BITS[x.element_size()]
    return x.dtype == y.dtype and bool(((x.view(kind) == y.view(kind)) | (x.isnan() & y.isnan())).all())


def one(device: torch.device, value: float = 1.0) -> Tensor:
    return torch.full((1,), value, dtype=torch.float64, device=device)


def complex_numbers(*shape: int, dtype: torch.dtype = torch.complex128, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- 16 bits ----


@pytest.mark.parametrize("dtype", SHORT, ids=name)
def test_every_number_of_16_bits_is_kept(device, dtype):
    """y = y0 for all patterns, to the bit: infinities and subnormal numbers too; NaN as NaN, and -0 + 0 is 0."""
    y0 = torch.arange(2**16, device=device).to(torch.int16).view(dtype)
    y = torch.zeros_like(y0)
    ops.stage([y], [y0], [], [], one(device))
    expected = torch.where(y0 == 0, 0, y0)
    assert same_bits(y, expected) and int(y0.isnan().sum()) > 100
    ops.stage([y], [], [y0], [1.0], one(device))  # as a slope
    assert same_bits(y, expected)


def float32_numbers(dtype: torch.dtype) -> Tensor:
    """Numbers of every size, those halfway between two of the short type with their neighbours, and those at its ends."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32)
    every = torch.arange(2**16).to(torch.int16).view(dtype).float()
    every = every[every.isfinite()].sort().values
    ties = torch.cat([(every[1:].double() + every[:-1].double()).mul(0.5).float(), every])
    ends = torch.tensor([65504.0, 65519.996, 65520.0, 65535.0, 1e38, 3.3895314e38, 3.3961775e38, 2.0**-24, 2.0**-25])
    near = [torch.nextafter(x, torch.full_like(x, sign * math.inf)) for x in (ties, ends) for sign in (1, -1)]
    return torch.cat([bits.view(torch.float32), ties, ends, -ends, *near])


@pytest.mark.parametrize("dtype", SHORT, ids=name)
def test_sums_of_16_bits_are_rounded_once(device, dtype):
    """A float32 sum becomes the nearest number of 16 bits, of two as near the even one, as torch rounds; inf beyond.

    The sum dt a k is made with k = 1 and one row for each number, a step size that float32 holds.
    """
    numbers = float32_numbers(dtype).to(device)
    y, slope = torch.zeros(len(numbers), dtype=dtype, device=device), torch.ones(len(numbers), dtype=dtype, device=device)
    ops.stage([y], [], [slope], [1.0], numbers.double())
    expected = torch.where(numbers == 0, 0, numbers).to(dtype)
    subnormal = (expected != 0) & (expected.abs() < torch.finfo(dtype).tiny)
    assert same_bits(y, expected) and bool(expected.isinf().any()) and int(subnormal.sum()) > 100


@pytest.mark.parametrize("dtype", SHORT, ids=name)
def test_terms_of_16_bits_are_added_in_float32(device, dtype):
    """Terms too small to move a number of 16 bits one by one move it together."""
    y0, slope = torch.ones(5, dtype=dtype, device=device), torch.ones(5, dtype=dtype, device=device)
    y = torch.empty_like(y0)
    step = torch.finfo(dtype).eps / 8
    ops.stage([y], [y0], [slope] * 16, [step] * 16, one(device))
    assert torch.equal(y, y0 + 16 * step)


# ---- complex numbers ----


@pytest.mark.parametrize("rows", [1, 4], ids=["joint", "rows"])
@pytest.mark.parametrize("dtype", COMPLEX, ids=name)
def test_complex_error_counts_the_modulus(device, dtype, rows):
    """The norm of complex errors is that of the formulas: moduli of errors and of states."""
    y0, y1, *k = (complex_numbers(4, 37, dtype=dtype, seed=seed).to(device) for seed in range(5))
    dt, e, ratio = (
        torch.linspace(0.5, -0.5, rows, dtype=torch.float64, device=device),
        [0.5, -1.0, 0.25],
        one(device).repeat(rows),
    )
    ops.error(ratio, [y0], [y1], k, e, dt, [1e-1], [1e-2])
    wide = [x.to(torch.complex128) for x in (y0, y1, *k)]
    scaled = formulas.scaled_error(wide[0], wide[1], wide[2:], e, dt[:, None] if rows > 1 else dt, 1e-1, 1e-2)
    torch.testing.assert_close(ratio, formulas.rms_norm(scaled, rows), rtol=1e-5 if dtype == torch.complex64 else 1e-13, atol=0)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e30, 3e38])
def test_complex_modulus_of_any_size(device, size):
    """|3 + 4i| is 5 at every size: the squares on the way neither overflow nor vanish."""
    z = torch.tensor([(3 + 4j) / 5], dtype=torch.complex128).mul(size).to(device, torch.complex64)
    ratio = one(device, 0.0)
    ops.error(ratio, [z], [z], [z], [1.0], one(device), [0.5], [0.0])
    torch.testing.assert_close(ratio, one(device, 2.0), rtol=1e-6, atol=0)


BAD = [complex(*parts) for bad in (math.nan, math.inf, -math.inf) for parts in ((bad, 1.0), (1.0, bad), (bad, bad), (bad, 0.0))]


@pytest.mark.parametrize("place", ["y0", "y1", "k"])
@pytest.mark.parametrize("value", BAD, ids=str)
@pytest.mark.parametrize("dtype", COMPLEX, ids=name)
def test_complex_error_beside_what_is_not_finite(device, dtype, value, place):
    """A part that is not finite makes the ratio not finite, even where the other is."""
    tensors = {key: torch.ones(9, dtype=dtype, device=device) for key in ("y0", "y1", "k")}
    tensors[place][4] = value
    ratio = one(device, 0.0)
    ops.error(ratio, [tensors["y0"]], [tensors["y1"]], [tensors["k"]], [1e-3], one(device, 1e-3), [1e-2], [1e-3])
    assert not bool(torch.isfinite(ratio))


VIEWS = {
    "conjugated": torch.conj,
    "negated": torch._neg_view,
    "both": lambda z: torch._neg_view(torch.conj(z)),
    "conjugated and strided": lambda z: torch.stack([z, z], -1)[..., 1].conj(),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", COMPLEX, ids=name)
def test_ops_read_lazy_views(device, dtype, view):
    """A view that conjugates or negates when it is read gives the bits of its values."""
    lazy = [VIEWS[view](complex_numbers(4, 5, dtype=dtype, seed=seed).to(device)) for seed in range(4)]
    plain = [z.resolve_conj().resolve_neg().contiguous() for z in lazy]
    assert any(z.is_conj() or z.is_neg() for z in lazy) and not any(z.is_conj() or z.is_neg() for z in plain)
    results = []
    for y0, y1, *k in (lazy, plain):
        y, ratio, moved = torch.empty_like(plain[0]), one(device), [torch.zeros_like(plain[0]) for _ in range(2)]
        ops.stage([y], [y0], k, [0.5, 0.25], one(device, 0.5))
        ops.error(ratio, [y0], [y1], k, [0.5, 0.25], one(device, 0.5), [0.1], [0.1])
        ops.advance(moved[:1], moved[1:], [y1], [k[0]], one(device))
        results.append([y, ratio, *moved])
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


def test_ops_read_the_imaginary_part_of_a_conjugate(device):
    """z.conj().imag, a real view that negates."""
    z = complex_numbers(6).to(device)
    y = torch.empty(6, dtype=torch.float64, device=device)
    ops.stage([y], [z.conj().imag], [z.conj().imag], [1.0], one(device))
    assert z.conj().imag.is_neg() and torch.equal(y, -2 * z.imag)


@pytest.mark.parametrize("options", [{}, {"step_control": "per_sample"}, {"method": "rk4", "step_size": 0.05}], ids=str)
@pytest.mark.parametrize("gradient", [None, "direct", "adjoint", "checkpoint", "quadrature"])
def test_func_may_return_lazy_views(device, options, gradient):
    """y' = conj(-i y), which of 1 - i makes exp(-t) (1 - i), and for a real state y' = -y as the part of a conjugate."""
    y0 = torch.tensor([[1 - 1j], [2 - 2j]], dtype=torch.complex128, device=device, requires_grad=gradient is not None)
    options = {"gradient": gradient or "direct", **options}
    ys = solve(lambda t, y: (-1j * y).conj(), y0, [0.0, 1.0], **options).ys
    torch.testing.assert_close(ys[-1], y0 * math.exp(-1), rtol=1e-5, atol=0)
    real = y0.detach().real.clone().requires_grad_(gradient is not None)
    ys = solve(lambda t, y: torch.complex(y, y).conj().imag, real, [0.0, 1.0], **options).ys
    torch.testing.assert_close(ys[-1], real * math.exp(-1), rtol=1e-5, atol=0)
    if gradient is not None:
        (grad,) = torch.autograd.grad(ys[-1].sum(), real)
        torch.testing.assert_close(grad, torch.full_like(real, math.exp(-1)), rtol=1e-5, atol=0)


# ---- solves ----

SOLVES = [("dopri5", "joint"), ("dopri5", "per_sample"), ("bosh3", "joint"), ("dopri8", "per_sample"), ("rk4", "joint")]


def options_of(method: str, step_control: str, dtype: torch.dtype) -> dict:
    """What solves to the type's tolerance."""
    if method == "rk4":
        return {"method": "rk4", "step_size": 0.125 if TOLERANCE[dtype] > 1e-4 else 0.01}
    return {"method": method, "step_control": step_control, "rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}


def rates(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Of y' = rate y; of complex numbers rates that turn."""
    values = [-1.0, -0.5, 0.25]
    return torch.tensor([complex(x, 3 * x + 1) for x in values] if dtype.is_complex else values, device=device).to(dtype)[
        :, None
    ]


@pytest.mark.parametrize(("method", "step_control"), SOLVES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_solve(device, dtype, method, step_control):
    """The exact solution to what the type allows, at the end and in between; results and times keep their types."""
    rate, seen = rates(dtype, device), set()
    y0 = torch.tensor([[1.0, -2.0]] * 3, device=device).to(dtype)
    t = torch.linspace(0.0, 1.0, 5, dtype=torch.float64)

    def func(t: Tensor, y: Tensor) -> Tensor:
        seen.add((t.dtype, y.dtype))
        return rate * y

    solution = solve(func, y0, t, **options_of(method, step_control, dtype))
    assert solution.ys.dtype == solution.y_last.dtype == dtype and seen == {(dtype.to_real(), dtype)}
    exact = torch.exp(rate.to(torch.complex128) * t.to(device)[:, None, None]) * y0
    error = (solution.ys - exact).abs().amax((1, 2))
    assert float(error[-1]) <= ERROR[dtype] and float(error.max()) <= 4 * ERROR[dtype]


@pytest.mark.parametrize("step_control", ["joint", "per_sample"])
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "tsit5", "bosh3"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_interpolant(device, dtype, method, step_control):
    """Between the ends of steps the interpolant has the state's type and errs by no more than that must."""
    y0 = torch.ones(2, 1, dtype=dtype, device=device)
    options = options_of(method, step_control, dtype)
    interpolant = solve(lambda t, y: -y, y0, [0.0, 1.0], dense=True, **options).interpolant
    t = torch.linspace(0.0, 1.0, 33, dtype=torch.float64)
    values = interpolant(t)
    assert values.dtype == dtype and float((values[:, 0, 0].cpu() - torch.exp(-t)).abs().max()) <= ERROR[dtype] / 2


STATES = {"float32 first": (torch.float32, torch.complex64, torch.bfloat16), "bfloat16 first": (torch.bfloat16, torch.float64)}


@pytest.mark.parametrize("types", STATES)
@pytest.mark.parametrize("gradient", [None, "direct", "adjoint", "checkpoint", "quadrature"])
@pytest.mark.parametrize(("method", "step_control"), SOLVES)
def test_leaves_of_different_types(device, method, step_control, gradient, types):
    """Every leaf keeps its type, and time has the real type of the first."""
    dtypes, seen = STATES[types], set()
    y0 = tuple(torch.ones(3, 2 + i, dtype=dtype, device=device) for i, dtype in enumerate(dtypes))
    turns = [rates(dtype, device)[:1] for dtype in dtypes]
    for leaf in y0:
        leaf.requires_grad_(gradient is not None)

    def func(t: Tensor, y: tuple) -> tuple:
        seen.add(t.dtype)
        return tuple(turn * leaf for turn, leaf in zip(turns, y, strict=True))

    options = options_of(method, step_control, torch.bfloat16)
    ys = solve(func, y0, [0.0, 0.4, 1.0], gradient=gradient or "direct", **options).ys
    assert [leaf.dtype for leaf in ys] == list(dtypes) and seen == {dtypes[0].to_real()}
    for turn, out in zip(turns, ys, strict=True):
        exact = torch.exp(turn.to(torch.complex128)).expand_as(out[-1])
        assert float((out[-1].detach() - exact).abs().max()) <= ERROR[torch.bfloat16]
    if gradient is not None:
        grads = torch.autograd.grad(sum(out[-1].real.float().sum() for out in ys), y0)
        for turn, grad, dtype in zip(turns, grads, dtypes, strict=True):
            exact = torch.exp(turn.to(torch.complex128)).conj().expand_as(grad)
            assert grad.dtype == dtype and float((grad - exact).abs().max()) <= ERROR[torch.bfloat16]


TOLERANCES = {
    "tensor of atol": {"atol": torch.full((3,), 1e-9, dtype=torch.float64)},
    "tensor of rtol": {"rtol": torch.full((3,), 1e-2, dtype=torch.float64)},
    "norm": {"norm": lambda error: error.abs().square().mean().sqrt()},
}


@pytest.mark.parametrize("given", TOLERANCES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_tolerances_and_norms_of_the_user(dtype, given):
    """An atol far below the numbers of the type is one all the same, beside a state that is 0 in places too."""
    y0 = torch.tensor([1.0, 0.0, -2.0]).to(dtype)
    options = {"rtol": 1e-2, "atol": 1e-9}
    expected = solve(lambda t, y: -y, y0, [0.0, 1.0], **options)
    found = solve(lambda t, y: -y, y0, [0.0, 1.0], **{**options, **TOLERANCES[given]})
    assert float((found.ys[-1] - expected.ys[-1]).abs().max()) <= 2e-2


@pytest.mark.parametrize("step_control", ["joint", "per_sample"])
@pytest.mark.parametrize("sign", [1, -1], ids=["forwards", "backwards"])
@pytest.mark.parametrize("dtype", SHORT, ids=name)
def test_stops_in_16_bits(device, dtype, sign, step_control):
    """step_t and jump_t of 16 bits: steps end there, and func sees the numbers beside a jump, one on each side."""
    y0, seen = torch.ones(2, 1, dtype=dtype, device=device), []
    jump, stop = (sign * torch.tensor([time], dtype=dtype) for time in (0.3, 0.7))

    def func(t: Tensor, y: Tensor) -> Tensor:
        seen.extend(t.reshape(-1).tolist())
        return torch.where(sign * t < sign * jump.to(device), y, -y)

    options = {**options_of("dopri5", step_control, dtype), "jump_t": jump, "step_t": stop}
    ys = solve(func, y0, [0.0, sign * 1.0], **options).ys
    assert float((ys[-1].double() - math.exp(sign * (2 * abs(float(jump)) - 1))).abs().max()) <= ERROR[dtype]
    below, above = (float(torch.nextafter(jump, torch.full_like(jump, towards))) for towards in (-math.inf, math.inf))
    assert below in seen and above in seen and float(jump) not in seen and float(stop) in seen


@pytest.mark.parametrize("sign", [1, -1], ids=["forwards", "backwards"])
@pytest.mark.parametrize("gradient", [None, "direct", "adjoint", "checkpoint", "quadrature"])
@pytest.mark.parametrize("dtype", SHORT, ids=name)
def test_perturb_in_16_bits(device, dtype, gradient, sign):
    """With perturb the ends of a step are seen from just inside it: the next number of the type."""
    y0 = torch.ones(2, dtype=dtype, device=device, requires_grad=gradient is not None)
    seen = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        seen.append(float(t))
        return -y

    options = {"method": "rk4", "step_size": 0.25, "perturb": True, "gradient": gradient or "direct"}
    ys = solve(func, y0, [0.0, sign * 1.0], **options).ys
    nodes = sign * torch.arange(5).div(4).to(dtype)
    beside = torch.nextafter(nodes, torch.full_like(nodes, math.inf)), torch.nextafter(nodes, torch.full_like(nodes, -math.inf))
    later, earlier = beside if sign > 0 else beside[::-1]
    assert set(later[:-1].tolist()) | set(earlier[1:].tolist()) <= set(seen)
    assert not set(nodes[:-1].tolist()) & set(seen)
    torch.testing.assert_close(
        ys[-1].detach().double(), torch.full((2,), math.exp(-sign)).double().to(device), rtol=ERROR[dtype], atol=0
    )
