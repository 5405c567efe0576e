"""Times of each sample, [batch, T]: every row is solved as it would be alone."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from odenet_cuda import ODEBlock, SolverError, solve

NAN = math.nan
TIMES = torch.tensor(
    [
        [0.0, 0.5, 1.0, 2.0, 3.0],
        [1.0, 0.2, -1.0, NAN, NAN],
        [0.5, NAN, NAN, NAN, NAN],
        [2.0, 2.1, 2.3, 5.0, NAN],
        [-1.0, -2.5, NAN, NAN, NAN],
        [0.0, 1e-3, 0.7, 0.8, 0.81],
        [3.0, 2.0, 1.0, 0.5, 0.0],
    ],
    dtype=torch.float64,
)
COUNTS = [5, 3, 1, 4, 2, 5, 5]
ROWS = len(COUNTS)
RATES = torch.tensor([[0.3], [1.0], [2.0], [-0.1], [0.5], [4.0], [-0.7]], dtype=torch.float64)
START = torch.tensor(
    [[1.0, 0.5], [2.0, -1.0], [0.1, 0.2], [-0.2, 0.3], [0.4, -0.6], [1.5, 1.0], [0.2, 0.3]], dtype=torch.float64
)
GRADIENTS = ["direct", "adjoint", "checkpoint", "quadrature"]
EXACT = 1e-12  # the same sums in another order
SOLVED = 1e-6  # of backward solves at 1e-10
DIFFERENCE = 1e-5  # of a symmetric difference of width 1e-4
TOLERANCES = {"rtol": 1e-7, "atol": 1e-7, "compile": False}
PER_SAMPLE = {"step_control": "per_sample"}


class Pull(nn.Module):
    """Products alone, which torch rounds alike wherever in a vector they fall. Rates are given for each row."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.8, -0.3], dtype=torch.float64))
        self.seen: list[Tensor] = []

    def forward(self, t, y, rate):
        self.seen.append(t.detach().reshape(-1).clone())
        weight = self.weight.to(y.dtype)
        other = torch.stack([y[:, 1], y[:, 0]], 1)
        return rate * (weight * y - (0.1 * t) * y * y) + other * weight


def alone(func, i: int, y0=START, times=TIMES, rates=RATES, **options):
    """Row i by itself, at its own times."""
    return solve(
        func, y0[i : i + 1], times[i, : COUNTS[i]], args=(rates[i : i + 1],), **{**TOLERANCES, **PER_SAMPLE, **options}
    )


def together(func, y0=START, times=TIMES, rates=RATES, **options):
    return solve(func, y0, times, args=(rates,), **{**TOLERANCES, **PER_SAMPLE, **options})


@pytest.mark.parametrize(
    ("method", "gradient"), [*(("dopri5", gradient) for gradient in (None, *GRADIENTS)), ("bosh3", "direct"), ("dopri8", None)]
)
def test_a_row_is_solved_as_alone(method, gradient):
    """The same bits, steps and calls; NaN at the padding; both directions in one batch."""
    func = Pull().requires_grad_(gradient is not None)
    options = {"method": method, "gradient": gradient or "direct", "controller": "PI"}
    whole = together(func, **options)
    assert whole.ys.shape == (5, ROWS, 2) and whole.status == ["success"] * ROWS
    assert torch.equal(whole.t.nan_to_num(-9), TIMES.nan_to_num(-9))
    for i, count in enumerate(COUNTS):
        part = alone(func, i, **options)
        assert torch.equal(whole.ys[:count, i], part.ys[:, 0]) and bool(whole.ys[count:, i].isnan().all())
        assert torch.equal(whole.y_last[i], part.ys[-1, 0])
        assert int(whole.stats.num_rejected[i]) == (0 if count == 1 else int(part.stats.num_rejected[0]))
        assert int(whole.stats.num_accepted[i]) == (0 if count == 1 else int(part.stats.num_accepted[0]))


def test_no_row_is_asked_for_beyond_its_times():
    """func is never called outside of a row's own interval, and no more often than the row with the most steps needs."""
    func = Pull()
    with torch.no_grad():
        whole = together(func)
    seen = torch.stack(func.seen)
    low, high = TIMES.nan_to_num(math.inf).amin(1), TIMES.nan_to_num(-math.inf).amax(1)
    assert bool((seen >= low).all()) and bool((seen <= high).all())
    tries = whole.stats.num_accepted + whole.stats.num_rejected
    assert whole.stats.nfe == len(seen) == 6 * int(tries.max()) + 2


def of_rows(run, y0=START, times=TIMES, **options):
    """Gradients for y0, t and the weight of a loss over all outputs there are."""
    func, y0, t = Pull(), y0.clone().requires_grad_(), times.clone().requires_grad_()
    loss = run(func, y0, t, **options)
    return torch.autograd.grad(loss, [y0, t, func.weight])


def loss_of(ys: Tensor, counts: list[int]) -> Tensor:
    """Of the outputs that there are, each with another weight."""
    weights = torch.linspace(0.5, 1.5, ys.shape[0] * 2, dtype=torch.float64).reshape(-1, 1, 2)
    there = torch.arange(ys.shape[0])[:, None] < torch.tensor(counts)
    return torch.where(there[..., None], weights * ys * ys, 0).sum()


def loss_together(func, y0, t, **options):
    return loss_of(together(func, y0, t, **options).ys, COUNTS)


def loss_alone(func, y0, t, **options):
    weights = torch.linspace(0.5, 1.5, 10, dtype=torch.float64).reshape(-1, 1, 2)
    parts = [alone(func, i, y0, t, **options).ys for i in range(ROWS)]
    return sum((weights[: len(ys)] * ys * ys).sum() for ys in parts)


@pytest.mark.parametrize("jumps", [False, True], ids=["smooth", "jumps"])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_are_those_of_the_rows_alone(gradient, jumps):
    """For y0, the times of every row, and what the rows share."""
    options = {"gradient": gradient, "rtol": 1e-10, "atol": 1e-10}
    if jumps:
        options |= {"jump_t": [0.6, 2.0, -1.0], "step_t": [0.75, 0.3]}
    found, expected = of_rows(loss_together, **options), of_rows(loss_alone, **options)
    close = EXACT if gradient in ("direct", "checkpoint") else SOLVED
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=close, atol=close)
    assert not found[1][TIMES.isnan()].any()


def test_gradients_of_times_by_differences():
    """Of the loss itself, at every time of every row."""
    func, options = Pull(), {"rtol": 1e-11, "atol": 1e-11}
    _, grad, _ = of_rows(loss_together, **options)
    with torch.no_grad():
        for i, j in (~TIMES.isnan()).nonzero().tolist():
            if i == 5 and j < 2:
                continue  # the two times are nearer to each other than the difference is wide
            change = torch.zeros_like(TIMES)
            change[i, j] = 1e-4
            after, before = (loss_together(func, START, TIMES + sign * change, **options) for sign in (1, -1))
            assert abs(float(after - before) / 2e-4 - float(grad[i, j])) <= DIFFERENCE * (1 + abs(float(grad[i, j])))


@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
def test_second_derivatives(gradient):
    """The gradient of a gradient, which replays the steps in torch, is that of the rows alone."""

    def second(run):
        func, y0, t = Pull(), START.clone().requires_grad_(), TIMES.clone().requires_grad_()
        grads = torch.autograd.grad(run(func, y0, t, gradient=gradient), [y0, t, func.weight], create_graph=True)
        return torch.autograd.grad(sum((g * g).sum() for g in grads), [y0, t, func.weight])

    for x, y in zip(second(loss_together), second(loss_alone), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


def test_forward_mode():
    """Inside torch.func, where the steps are replayed."""
    func = Pull()
    solved = lambda y0: torch.nan_to_num(together(func, y0).ys)  # noqa: E731
    ys, tangent = torch.func.jvp(solved, (START,), (torch.ones_like(START),))
    torch.testing.assert_close(ys, torch.nan_to_num(together(func).ys), rtol=EXACT, atol=EXACT)
    wide = (solved(START + 1e-5) - solved(START - 1e-5)) / 2e-5
    torch.testing.assert_close(tangent, wide, rtol=DIFFERENCE, atol=DIFFERENCE)


@pytest.mark.parametrize("names", [("kinetic",), ("error", "stiffness")], ids=str)
def test_regularizers(names):
    """Costs of each row over its own interval, with gradients."""
    for gradient in ["direct", "checkpoint", *(["adjoint", "quadrature"] if names == ("kinetic",) else [])]:

        def costs(run, gradient=gradient):
            func, y0, t = Pull(), START.clone().requires_grad_(), TIMES.clone().requires_grad_()
            values = run(func, y0, t, {"regularizers": names, "gradient": gradient, "rtol": 1e-9, "atol": 1e-9})
            return values.detach(), *torch.autograd.grad((values * values).sum(), [y0, t, func.weight])

        def one_call(func, y0, t, options):
            return torch.stack([*together(func, y0, t, **options).regularizers.values()])

        def row_by_row(func, y0, t, options):
            rows = [i for i in range(ROWS) if COUNTS[i] > 1]
            found = torch.zeros(len(names), ROWS, dtype=torch.float64)
            parts = [torch.stack([*alone(func, i, y0, t, **options).regularizers.values()])[:, 0] for i in rows]
            return found.index_copy(1, torch.tensor(rows), torch.stack(parts, 1).double())

        for x, y in zip(costs(one_call), costs(row_by_row), strict=True):
            torch.testing.assert_close(x, y.to(x), rtol=SOLVED, atol=SOLVED)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_row_that_fails(gradient):
    """Others are as without it; its outputs are NaN from where it failed; a loss without it has the gradient of the others."""
    rates = RATES.clone()
    y0 = START.clone()
    y0[3] = torch.tensor([400.0, 500.0])  # grows without bound before t = 5
    options = {"on_failure": "return", "gradient": gradient, "max_num_steps": 300}
    func = Pull()
    start = y0.clone().requires_grad_()
    found = together(func, start, rates=rates, **options)
    assert [word != "success" for word in found.status] == [i == 3 for i in range(ROWS)]
    sound = together(Pull(), START, rates=rates, **options)
    others = [i for i in range(ROWS) if i != 3]
    torch.testing.assert_close(found.ys[:, others], sound.ys[:, others], rtol=0, atol=0, equal_nan=True)
    assert bool(found.ys[3, 3].isnan().all())
    loss = loss_of(found.ys[:, others], [COUNTS[i] for i in others])
    grad, by_weight = torch.autograd.grad(loss, [start, func.weight])
    assert bool(grad.isfinite().all()) and bool(by_weight.isfinite().all()) and not grad[3].any()
    with pytest.raises(SolverError) as raised:
        together(func, y0, rates=rates, max_num_steps=300)
    assert raised.value.sample == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128], ids=str)
def test_types(dtype):
    """Every type of state; float32 times too, which func sees."""
    rate = RATES.to(dtype.to_real())

    def func(t, y, rate):
        if not dtype.is_complex:
            return -rate * y * (1 + 0.1 * t)
        return torch.view_as_complex(-(rate * (1 + 0.1 * t))[..., None] * torch.view_as_real(y))

    y0, tol = START.to(dtype), 1e-2 if torch.finfo(dtype).bits == 16 else 1e-5
    options = {"rtol": tol, "atol": tol}
    whole = together(func, y0, rates=rate, times=TIMES.float(), **options)
    assert whole.ys.dtype == dtype and whole.t.dtype == torch.float64
    for i, count in enumerate(COUNTS):
        part = alone(func, i, y0, TIMES.float(), rate, **options)
        assert torch.equal(whole.ys[:count, i], part.ys[:, 0]) and bool(whole.ys[count:, i].isnan().all())


def test_several_leaves():
    """Each leaf has the same padding."""
    y0 = {"x": START, "z": START[:, 0].clone()}

    def func(t, y):
        return {"x": -y["x"] * y["z"][:, None], "z": -0.5 * y["z"] * (1 + t[:, 0])}

    whole = solve(func, y0, TIMES, **TOLERANCES, **PER_SAMPLE)
    for i, count in enumerate(COUNTS):
        part = solve(func, {name: x[i : i + 1] for name, x in y0.items()}, TIMES[i, :count], **TOLERANCES, **PER_SAMPLE)
        for name in y0:
            assert torch.equal(whole.ys[name][:count, i], part.ys[name][:, 0])
            assert bool(whole.ys[name][count:, i].isnan().all())


@settings(max_examples=15)
@given(st.data())
def test_any_times(data):
    """Any number of rows and times, in any direction, with stops and discontinuities anywhere: each as alone, to the bit."""
    number = st.floats(-2, 2).map(lambda x: round(x, 2))
    rows = data.draw(st.lists(st.lists(number, min_size=1, max_size=4, unique=True), min_size=1, max_size=5))
    rows = [sorted(row, reverse=data.draw(st.booleans())) for row in rows]
    most = max(map(len, rows)) + data.draw(st.integers(0, 1))
    times = torch.tensor([row + [NAN] * (most - len(row)) for row in rows], dtype=torch.float64)
    stops = data.draw(st.lists(number, max_size=3, unique=True))
    options = {"jump_t": stops[:1], "step_t": stops[1:], **TOLERANCES, **PER_SAMPLE}
    func, y0 = Pull(), START[torch.arange(len(rows)) % ROWS]
    with torch.no_grad():
        whole = solve(func, y0, times, args=(RATES[: len(rows)],), **options).ys
        for i, row in enumerate(rows):
            part = solve(func, y0[i : i + 1], row, args=(RATES[i : i + 1],), **options).ys
            assert torch.equal(whole[: len(row), i], part[:, 0]) and bool(whole[len(row) :, i].isnan().all())


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_edges(gradient):
    """A batch of one, of none, rows of one time alone, and one time of each."""
    func, y0 = Pull(), START.clone().requires_grad_()
    one = solve(func, y0[:1], TIMES[:1], args=(RATES[:1],), gradient=gradient, **TOLERANCES, **PER_SAMPLE)
    assert torch.equal(one.ys, alone(func, 0, y0, gradient=gradient).ys) and one.t.shape == (1, 5)
    for times in (TIMES[:, :1], torch.cat([TIMES[:, :1], torch.full((ROWS, 2), NAN)], 1)):
        still = together(func, y0, times, gradient=gradient)
        assert (
            torch.equal(still.ys[0], START)
            and bool(still.ys[1:].isnan().all())
            and still.status in ("success", ["success"] * ROWS)
        )
        (grad,) = torch.autograd.grad(still.ys[0].sum(), y0)
        assert torch.equal(grad, torch.ones_like(START))
        assert not torch.as_tensor(still.stats.num_accepted).any()
    none = solve(func, y0[:0], TIMES[:0], args=(RATES[:0],), gradient=gradient, **TOLERANCES, **PER_SAMPLE)
    assert none.ys.shape == (5, 0, 2)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_padding_is_constant(gradient):
    """What a loss does with it has no part in the gradient, as in ``torch.where(mask, f(ys), 0)``, where it is 0 * NaN."""
    grads = []
    for masked in (lambda ys, there: torch.where(there, ys * ys, 0), lambda ys, there: torch.where(there, ys, 0) ** 2):
        func, y0, t = Pull(), START.clone().requires_grad_(), TIMES.clone().requires_grad_()
        ys = together(func, y0, t, gradient=gradient).ys
        grads.append(torch.autograd.grad(masked(ys, ~TIMES.T.isnan()[..., None]).sum(), [y0, t, func.weight]))
    assert all(bool(x.isfinite().all()) and torch.equal(x, y) for x, y in zip(*grads, strict=True))


WRONG = [
    pytest.param({"step_control": "joint"}, TIMES, r"t must be one-dimensional .* \[7, 5\]; .*per_sample", id="joint"),
    pytest.param({}, TIMES[:3], r"t must have shape \[7, T\].*got \[3, 5\]", id="batch"),
    pytest.param({}, TIMES[:, :0], r"t must have shape \[7, T\].*got \[7, 0\]", id="no-times"),
    pytest.param({}, TIMES[None], r"t must be one-dimensional", id="three-dimensions"),
    pytest.param({}, torch.where(TIMES == 2.1, NAN, TIMES), r"t must hold NaN after .* alone, got .* in row 3", id="hole"),
    pytest.param({}, torch.where(TIMES == -1.0, NAN, TIMES), r"t must not begin with NaN: .* in row 4", id="first"),
    pytest.param({}, torch.where(TIMES == 2.1, 2.0, TIMES), r"must be strictly increasing .* row 3", id="same"),
    pytest.param({}, torch.where(TIMES == 0.2, 1.2, TIMES), r"must be strictly increasing .* row 1", id="turn"),
    pytest.param({}, torch.where(TIMES == 5.0, math.inf, TIMES), r"t must be finite, .* in row 3", id="infinite"),
]


@pytest.mark.parametrize(("options", "times", "words"), WRONG)
def test_wrong_times(options, times, words):
    """The message names the argument, the rule, the row and the value, before func is called."""
    func = Pull()
    with pytest.raises(ValueError, match=words):
        solve(func, START, times, args=(RATES,), **{**TOLERANCES, **PER_SAMPLE, **options})
    assert not func.seen


def test_block_takes_times_at_the_call():
    """One for all, or one for each sample, whose last state is given then."""
    net = nn.Linear(2, 2, dtype=torch.float64)
    block = ODEBlock(lambda t, y: torch.tanh(net(y)), step_control="per_sample", rtol=1e-6, atol=1e-6, compile=False)
    ys = solve(block.func, START, TIMES, gradient="adjoint", rtol=1e-6, atol=1e-6, compile=False, **PER_SAMPLE).ys
    expected = torch.stack([ys[count - 1, i] for i, count in enumerate(COUNTS)])
    found = block(START, TIMES)
    assert torch.equal(found, expected)
    found.sum().backward()
    assert bool(net.weight.grad.isfinite().all())
    assert torch.equal(
        block(START, [0.0, 2.0]), solve(block.func, START, [0.0, 2.0], rtol=1e-6, atol=1e-6, **PER_SAMPLE).ys[-1]
    )
    assert torch.equal(block(START), block(START, [0.0, 1.0]))
