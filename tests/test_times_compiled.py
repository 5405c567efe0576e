"""Times of each sample in compiled fields: every sample is solved as it would be alone, and as by the stepper."""

import math

import pytest
import torch
from compile_native import require_compiler
from compiled_fields import assert_compiled, assert_same, rows
from torch import Tensor, nn

import odenet_cuda
from odenet_cuda import solve

BATCH, MOST = 75, 9
PER_SAMPLE = {"step_control": "per_sample"}
OPTIONS = {"rtol": 1e-6, "atol": 1e-6, **PER_SAMPLE}


@pytest.fixture(scope="module", autouse=True)
def needs_compiler():
    """Skips all where there is no C++ compiler."""
    require_compiler()


def irregular(batch: int = BATCH, most: int = MOST, seed: int = 0) -> Tensor:
    """[batch, most]: from one time to as many as there are, forwards and backwards, over spans of 0.1 to 2."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.rand(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    steps = (0.05 + draw(batch, most)) * (0.1 + 2 * draw(batch, 1)) / most
    t = draw(batch, 1) + steps.cumsum(1) * torch.where(draw(batch, 1) < 0.4, -1.0, 1.0)
    counts = 1 + (draw(batch) * most).long()
    return torch.where(torch.arange(most) < counts[:, None], t, math.nan)


TIMES = irregular()
COUNTS = (~TIMES.isnan()).sum(1).tolist()
START = rows(BATCH, 2, seed=3)


class Argued(nn.Module):
    """Formula of y, t and an argument for each sample, with a weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.5, -0.5]], dtype=torch.float64))

    def forward(self, t, y, p):
        a, b = y[:, :1], y[:, 1:]
        return torch.cat([b * torch.cos(t), -p * a + 0.2 * torch.tanh(b)], 1) * self.weight


@pytest.mark.parametrize("jumps", [False, True], ids=["smooth", "jumps"])
def test_values(jumps):
    """As alone to the bit, whatever lane a sample comes to; as by the stepper, step for step."""
    field, y0, p = odenet_cuda.compile(Argued()), START, rows(BATCH, 1, seed=1) + 2
    options = {**OPTIONS, **({"jump_t": [0.8, 0.3], "step_t": [0.5]} if jumps else {})}
    with torch.no_grad():
        found = solve(field, y0, TIMES, args=(p,), **options)
        assert_compiled(field)
        assert found.status == ["success"] * BATCH and found.t.shape == (BATCH, MOST)
        assert torch.equal(found.ys[..., 0].isnan(), TIMES.T.isnan())
        again = solve(field, y0, TIMES, args=(p,), **options)  # by what was kept
        assert torch.equal(again.ys.nan_to_num(9), found.ys.nan_to_num(9))
        for i in range(0, BATCH, 7):
            if COUNTS[i] == 1:
                assert torch.equal(found.ys[0, i], y0[i]) and int(found.stats.num_accepted[i]) == 0
                continue
            part = solve(field, y0[i : i + 1], TIMES[i, : COUNTS[i]], args=(p[i : i + 1],), **options)
            assert torch.equal(found.ys[: COUNTS[i], i], part.ys[:, 0]) and torch.equal(found.y_last[i], part.y_last[0])
            for name in ("num_accepted", "num_rejected"):
                assert torch.equal(getattr(found.stats, name)[i : i + 1], getattr(part.stats, name))
        expected = solve(field.func, y0, TIMES, args=(p,), compile=False, **options)
    assert_same(found, expected, 1e-9)


def grads_of(func, y0, t, p, gradient, **options):
    """Of a loss over the outputs that there are: for y0, arguments, weights, and for the times by the adjoint."""
    y0, p = y0.clone().requires_grad_(), p.clone().requires_grad_()
    t = t.clone().requires_grad_(gradient == "adjoint")
    module = getattr(func, "func", func)
    ys = solve(func, y0, t, args=(p,), gradient=gradient, **{**OPTIONS, **options}).ys
    weights = torch.cos(torch.arange(ys.numel(), dtype=ys.dtype)).reshape(ys.shape)
    wanted = [y0, p, module.weight, *([t] if gradient == "adjoint" else [])]
    return torch.autograd.grad(torch.where(ys.isnan(), 0, weights * ys * ys).sum(), wanted)


@pytest.mark.parametrize(("gradient", "jumps"), [("direct", True), ("adjoint", False), ("adjoint", True)])
def test_gradients(gradient, jumps):
    """Those of the stepper; padding has no part in them."""
    options = {"rtol": 1e-8, "atol": 1e-8, **({"jump_t": [0.8], "step_t": [0.5]} if jumps else {})}
    field, p = odenet_cuda.compile(Argued()), rows(BATCH, 1, seed=1) + 2
    found = grads_of(field, START, TIMES, p, gradient, **options)
    assert_compiled(field)
    expected = grads_of(field.func, START, TIMES, p, gradient, compile=False, **options)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6 * float(y.abs().max()))


def test_gradients_of_a_row_do_not_depend_on_others():
    """The same bits for its start and its argument, in another order and in other lanes."""
    field, p = odenet_cuda.compile(Argued()), rows(BATCH, 1, seed=1) + 2
    for gradient in ("direct", "adjoint"):
        whole = grads_of_rows(field, START, TIMES, p, gradient)
        for chosen in (list(range(BATCH - 1, -1, -1)), [3, 70, 12], [5] * 40 + [9]):
            part = grads_of_rows(field, START[chosen], TIMES[chosen], p[chosen], gradient)
            assert all(torch.equal(x[chosen], y) for x, y in zip(whole, part, strict=True))


def grads_of_rows(field, y0, t, p, gradient):
    y0, p = y0.clone().requires_grad_(), p.clone().requires_grad_()
    ys = solve(field, y0, t, args=(p,), gradient=gradient, **OPTIONS).ys
    assert_compiled(field)
    return torch.autograd.grad(torch.where(ys.isnan(), 0, ys * ys).sum(), [y0, p])


def test_rows_that_fail():
    """Of rows that take too many steps the outputs before are there; a loss over what there is has the gradient of that."""
    field, p = odenet_cuda.compile(Argued()), rows(BATCH, 1, seed=1) + 2
    failing = [i for i in range(BATCH) if COUNTS[i] == MOST][:2]
    p[failing] = 1e8
    options, found = {**OPTIONS, "on_failure": "return", "max_num_steps": 40}, []
    for func, more in ((field, {}), (field.func, {"compile": False})):
        start = START.clone().requires_grad_()
        solution = solve(func, start, TIMES, args=(p,), **options, **more)
        assert [i for i, word in enumerate(solution.status) if word != "success"] == failing
        (grad,) = torch.autograd.grad(torch.where(solution.ys.isnan(), 0, solution.ys)[:, ~p[:, 0].ge(1e8)].sum(), start)
        found.append((solution.ys, grad))
    assert_compiled(field)
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_batch_of_one_and_rows_of_one_time():
    field, p = odenet_cuda.compile(Argued()), rows(BATCH, 1, seed=1) + 2
    with torch.no_grad():
        found = solve(field, START, TIMES, args=(p,), **OPTIONS)
        i = next(i for i in range(BATCH) if 1 < COUNTS[i] < MOST)
        one = solve(field, START[i : i + 1], TIMES[i : i + 1], args=(p[i : i + 1],), **OPTIONS)
        assert torch.equal(one.ys.nan_to_num(9), found.ys[:, i : i + 1].nan_to_num(9))
        assert_compiled(field)
        still = solve(field, START, torch.cat([TIMES[:, :1], torch.full((BATCH, 2), math.nan)], 1), args=(p,), **OPTIONS)
    assert torch.equal(still.ys[0], START) and bool(still.ys[1:].isnan().all()) and not still.stats.num_accepted.any()
