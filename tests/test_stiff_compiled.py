"""Compiled Rosenbrock steps: what the stepper gives, sample by sample, and what is refused in words."""

from typing import Any

import pytest
import torch
from compile_native import require_compiler
from torch import Tensor, nn

import odenet_cuda
from odenet_cuda import SolverError, solve
from odenet_cuda.methods import STIFF
from odenet_cuda.rosenbrock import rosenbrock_of

D = torch.float64
every_method = pytest.mark.parametrize("method", [name for name, method in STIFF.items() if rosenbrock_of(method)])
every_control = pytest.mark.parametrize("control", ["joint", "per_sample"])
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def needs_compiler():
    """Skips all where there is no C++ compiler."""
    require_compiler()


class Robertson(nn.Module):
    """Hairer and Wanner II, IV.1: rates from 0.04 to 3e7, each sample its own."""

    def forward(self, t: Tensor, y: Tensor, k: Tensor) -> Tensor:
        a, b, c = y.unbind(1)
        first, second, third = k[:, 0] * a, k[:, 1] * b * b, k[:, 2] * b * c
        return torch.stack([third - first, first - second - third, second], 1)


def rates(batch: int) -> Tensor:
    factors = torch.linspace(0.5, 2, batch, dtype=D)[:, None] ** torch.tensor([1.0, -1.0, 0.5], dtype=D)
    return torch.tensor([[0.04, 3e7, 1e4]], dtype=D) * factors


class Oscillators(nn.Module):
    """y' = A y in pairs that turn at high rates: whatever the step, the largest numbers lie beside the diagonal."""

    def __init__(self, pairs: int):
        super().__init__()
        turns = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=D)
        matrix = torch.block_diag(*[turns * 10.0**i for i in range(pairs)])
        mixed = torch.linalg.qr(torch.randn(2 * pairs, 2 * pairs, generator=torch.Generator().manual_seed(1), dtype=D))[0]
        self.register_buffer("matrix", mixed @ matrix @ mixed.T)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return y @ self.matrix.T


def both(func: Any, y0: Any, t: Any, **options: Any) -> tuple[Any, Any]:
    """By the compiled field and by the stepper."""
    with torch.no_grad():
        found = solve(odenet_cuda.compile(func), y0, t, **options)
        expected = solve(func, y0, t, compile=False, **options)
    assert found.engine == "compiled", found.explanation
    return found, expected


@every_method
@every_control
def test_what_the_stepper_gives(method: str, control: str):
    """States at outputs inside steps, the steps themselves, and the calls of func: 21 samples fill no whole pack."""
    t, y0 = torch.tensor([0.0, 0.3, 7.0, 40.0], dtype=D), torch.tensor([[1.0, 0.0, 0.0]], dtype=D).repeat(21, 1)
    found, expected = both(Robertson(), y0, t, args=(rates(21),), method=method, rtol=1e-5, atol=1e-9, step_control=control)
    assert torch.allclose(found.ys, expected.ys, rtol=1e-9, atol=1e-14)
    for name in ("nfe", "num_accepted", "num_rejected"):
        assert torch.equal(torch.as_tensor(getattr(found.stats, name)), torch.as_tensor(getattr(expected.stats, name)))


@every_control
def test_rows_are_exchanged(control: str):
    """Systems whose pivots lie off the diagonal, of up to as many numbers as are compiled, some alone."""
    for pairs, batch in ((2, 1), (16, 3)) if control == "joint" else ((5, 3),):
        y0 = torch.randn(batch, 2 * pairs, generator=torch.Generator().manual_seed(2), dtype=D)
        options = dict(method="rodas5p", rtol=1e-3, atol=1e-3, max_num_steps=40, on_failure="return", step_control=control)
        found, expected = both(Oscillators(pairs), y0, [0.0, 3.0], **options)
        assert torch.allclose(found.y_last, expected.y_last, rtol=1e-8, atol=1e-10)
        assert torch.equal(torch.as_tensor(found.stats.num_rejected), torch.as_tensor(expected.stats.num_rejected))


@pytest.mark.parametrize("n", [2, 3, 7, 32])
def test_one_step_through_dense_systems(n: int):
    """Of a size with which every column looks for its pivot, each sample in its own rows: y1 in closed form."""
    generator = torch.Generator().manual_seed(n)
    a = torch.randn(9, n, n, generator=generator, dtype=D) * 30.0
    y0 = torch.randn(9, n, generator=generator, dtype=D)

    def linear(t: Tensor, y: Tensor, a: Tensor) -> Tensor:
        return (a * y[:, None, :]).sum(2)

    options: Any = dict(method="rosenbrock23", first_step=1.0, min_step=1.0, max_step=1.0, step_control="per_sample")
    found, expected = both(linear, y0, [0.0, 1.0], args=(a,), **options)
    assert found.stats.num_accepted.tolist() == [1] * 9
    gamma = 1 / (2 + 2**0.5)
    inverse = torch.linalg.inv(torch.eye(n, dtype=D) - gamma * a)
    first = inverse @ (a @ y0[:, :, None])
    middle = a @ (y0[:, :, None] + first / 2)
    second = inverse @ (middle - first) + first
    y1 = (y0[:, :, None] + second)[:, :, 0]
    assert torch.allclose(found.ys[-1], y1, rtol=1e-9, atol=1e-9) and torch.allclose(expected.ys[-1], y1, rtol=1e-9, atol=1e-9)


def test_a_sample_is_that_of_any_batch():
    y0, k = torch.tensor([[1.0, 0.0, 0.0]], dtype=D).repeat(40, 1), rates(40)
    func = odenet_cuda.compile(Robertson())
    options: Any = dict(method="rodas5p", rtol=1e-6, atol=1e-10, step_control="per_sample")
    with torch.no_grad():
        whole = solve(func, y0, [0.0, 1e5], args=(k,), **options).ys
        for rows in ([3], [39, 0, 7], list(range(5, 30))):
            assert torch.equal(solve(func, y0[rows], [0.0, 1e5], args=(k[rows],), **options).ys, whole[:, rows])


def test_long_times_float32_and_times_of_each_sample():
    """To 1e11, where no explicit step is as short as steps can be; in float32; backwards, each sample over its own times."""
    y0 = torch.tensor([[1.0, 0.0, 0.0]], dtype=D)
    k = torch.tensor([[0.04, 3e7, 1e4]], dtype=D)
    found, _ = both(Robertson(), y0, [0.0, 1e11], args=(k,), method="rodas5p", rtol=1e-7, atol=1e-14)
    end = torch.tensor([0.2083340149701255e-07, 0.8333360770334713e-13, 0.9999999791665050], dtype=D)  # the test set for IVPs
    assert torch.allclose(found.ys[-1, 0], end, rtol=1e-5, atol=1e-17)

    def decay(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        a, b = y
        return -300 * (a - b), -b * b

    state = (torch.full((4, 1), 2.0), torch.linspace(0.5, 1, 4)[:, None])
    times = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.5, torch.nan], [0.0, 3.0, 4.0], [1.0, 2.0, 5.0]])
    found, expected = both(decay, state, times, method="rodas5p", rtol=1e-4, atol=1e-5, step_control="per_sample")
    for x, y in zip(found.ys, expected.ys, strict=True):
        assert torch.allclose(x, y, rtol=3e-4, atol=3e-5, equal_nan=True)
    exact = state[1] / (1 + state[1] * (times[:, 2:] - times[:, :1]))
    assert torch.allclose(found.ys[1][2], exact, rtol=1e-3, atol=1e-4, equal_nan=True)

    def growth(t: Tensor, y: Tensor) -> Tensor:
        return 200 * (y - 1)

    found, expected = both(growth, torch.full((3, 2), 3.0, dtype=D), [1.0, 0.5, 0.0], method="rodas5p", rtol=1e-6, atol=1e-8)
    assert torch.allclose(found.ys, expected.ys, rtol=1e-10, atol=1e-12)
    assert torch.allclose(found.ys[-1], torch.ones(3, 2, dtype=D), atol=1e-7)


class Driven(nn.Module):
    """Pulled to a wave at a rate of each sample; what is linear in t alone, and a second leaf that jumps in time."""

    def forward(self, t: Tensor, y: tuple[Tensor, Tensor], k: Tensor) -> tuple[Tensor, Tensor]:
        a, b = y
        time = t.reshape(-1, 1)
        return -k * (a - torch.sin(3 * time)), a - b * torch.exp(-time) + 2 * time + torch.where(time > 0.7, 1.0, 0.0)


@every_method
@every_control
def test_func_depends_on_the_time(method: str, control: str):
    """df/dt is recorded beside the rows of df/dy."""
    y0 = (torch.rand(5, 2, generator=torch.Generator().manual_seed(3), dtype=D), torch.zeros(5, 2, dtype=D))
    k = torch.logspace(0, 4, 5, dtype=D)[:, None]
    found, expected = both(Driven(), y0, [0.0, 0.5, 0.7, 1.5], args=(k,), method=method, rtol=1e-4, atol=1e-6, jump_t=[0.7],
                           step_control=control)  # fmt: skip
    for x, y in zip(found.ys, expected.ys, strict=True):
        assert torch.allclose(x, y, rtol=1e-8, atol=1e-10)
    assert torch.equal(torch.as_tensor(found.stats.num_accepted), torch.as_tensor(expected.stats.num_accepted))


def test_a_discontinuity():
    class Switched(nn.Module):
        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return -50 * (y - 1)

    y0 = torch.zeros(5, 1, dtype=D)
    options: Any = dict(method="rosenbrock23", rtol=1e-5, atol=1e-7, jump_t=[0.25], step_control="per_sample")
    found, expected = both(Switched(), y0, [0.0, 1.0], **options)
    assert torch.allclose(found.ys, expected.ys, rtol=1e-10, atol=1e-12)


@every_control
def test_failures(control: str):
    """A state that runs to infinity, and slopes that are no numbers."""
    func = odenet_cuda.compile(lambda t, y: y * y)
    y0 = torch.tensor([[0.1], [2.0]], dtype=D)
    with torch.no_grad(), pytest.raises(SolverError) as failed:
        solve(func, y0, [0.0, 1.0], method="rodas5p", step_control=control)
    assert failed.value.t == pytest.approx(0.5, abs=1e-3)
    assert failed.value.sample == (None if control == "joint" else 1)
    if control == "per_sample":
        solution = solve(
            func, y0.requires_grad_(False), [0.0, 1.0], method="rodas5p", step_control=control, on_failure="return"
        )
        assert torch.allclose(solution.ys[-1, 0], torch.tensor([1 / 9], dtype=D), rtol=1e-6) and solution.ys[-1, 1].isnan()


def test_adjoint_by_an_explicit_method():
    """The backward solve is compiled too; the gradients of rates are those by direct."""
    k = rates(6).mul(torch.tensor([1.0, 1e-5, 1e-3], dtype=D)).requires_grad_()
    y0 = torch.tensor([[1.0, 0.0, 0.0]], dtype=D).repeat(6, 1).requires_grad_()
    options: Any = dict(method="rodas5p", rtol=1e-9, atol=1e-12, step_control="per_sample")
    found = solve(odenet_cuda.compile(Robertson()), y0, [0.0, 2.0], args=(k,), gradient="adjoint", adjoint_method="dopri5",
                  **options)  # fmt: skip
    assert found.engine == "compiled", found.explanation
    expected = solve(Robertson(), y0, [0.0, 2.0], args=(k,), compile=False, **options)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=D)
    grads = [torch.autograd.grad((x.ys[-1] * weights).sum(), (y0, k)) for x in (found, expected)]
    for x, y in zip(*grads, strict=True):
        assert torch.allclose(x, y, rtol=1e-6, atol=1e-9)


def test_without_a_gradient_its_way_does_not_matter():
    """The backward steps of a stiff method are not compiled: that is said where a gradient is wanted."""
    field, y0 = odenet_cuda.compile(lambda t, y: -y), torch.ones(2, 1, dtype=D)
    for start, engine in ((y0, "compiled"), (y0.clone().requires_grad_(), "stepper")):
        solution = solve(field, start, [0.0, 1.0], method="rodas5p", gradient="adjoint")
        assert solution.engine == engine, solution.explanation
    assert "backward steps" in solution.explanation["compiled"]


def test_what_is_refused_in_words():
    with torch.no_grad():
        wide = solve(odenet_cuda.compile(lambda t, y: -y), torch.ones(2, 40, dtype=D), [0.0, 1.0], method="rodas5p")
    assert wide.engine == "stepper" and "at most 32" in wide.explanation["compiled"]
