"""Gradients of compiled Rosenbrock solves: those of the discrete solve, by second derivatives of func."""

import math
from typing import Any

import pytest
import torch
from compile_native import require_compiler
from torch import Tensor, nn
from torch.nn import functional as F

import odenet_cuda
from odenet_cuda import solve
from odenet_cuda.compiled.plan import Plan
from odenet_cuda.problem import Structure

D = torch.float64
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def needs_compiler():
    """Skips all where there is no C++ compiler."""
    require_compiler()


def gradients(func: Any, y0: Any, t: Any, args: tuple = (), params: Any = (), engine: str = "compiled", **options: Any) -> Any:
    """Of a weighted sum of all outputs, for the leaves of y0, the arguments and params; and the solution."""
    single = isinstance(y0, Tensor)
    leaves = [leaf.detach().clone().requires_grad_() for leaf in ([y0] if single else y0)]
    given = [x.detach().clone().requires_grad_(x.requires_grad) for x in args]
    solution = solve(func, leaves[0] if single else tuple(leaves), t, args=tuple(given), **options)
    assert solution.engine == engine, solution.explanation
    loss = torch.zeros((), dtype=D)
    for out in [solution.ys] if single else solution.ys:
        weights = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).reshape(out.shape)
        loss = loss + (out * weights).nan_to_num().sum()
    wanted = [*leaves, *(x for x in given if x.requires_grad), *params]
    return torch.autograd.grad(loss, wanted), solution


def both(func: Any, y0: Any, t: Any, args: tuple = (), params: Any = (), tolerance: float = 1e-10, **options: Any) -> Any:
    """By the compiled field and by the stepper, which must agree; the former."""
    found, solution = gradients(odenet_cuda.compile(func), y0, t, args, params, **options)
    expected, other = gradients(func, y0, t, args, params, "stepper", compile=False, **options)
    assert torch.equal(torch.as_tensor(solution.stats.num_accepted), torch.as_tensor(other.stats.num_accepted))
    for x, y in zip(found, expected, strict=True):
        assert (x - y).abs().max() <= tolerance * (y.abs().max() + 1e-3)
    return found, solution


class Driven(nn.Module):
    """A net with what depends on the time, a rate of each sample, and a frozen weight; two leaves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(D)
        self.frozen = nn.Parameter(torch.tensor([0.5, -0.25], dtype=D), requires_grad=False)

    def forward(self, t: Tensor, y: tuple[Tensor, Tensor], k: Tensor) -> tuple[Tensor, Tensor]:
        a, b = y
        time = t.reshape(-1, 1)
        pull = self.net(torch.cat([a, b], 1)) * torch.cos(2 * time) - k * (a - torch.sin(3 * time))
        return pull + self.frozen * b, a.sum(1, keepdim=True) - b * b * torch.exp(-time)


@pytest.mark.parametrize("method, control", [("rodas5p", "joint"), ("rodas5p", "per_sample"), ("rosenbrock23", "per_sample")])
def test_those_of_the_stepper(method: str, control: str):
    """Outputs inside steps, a discontinuity, arguments, weights and a time-dependent field: 11 samples fill no pack."""
    func, generator = Driven(), torch.Generator().manual_seed(1)
    y0 = torch.rand(11, 2, generator=generator, dtype=D), torch.rand(11, 1, generator=generator, dtype=D)
    k = torch.logspace(0, 3, 11, dtype=D)[:, None].requires_grad_()
    weights = [x for x in func.parameters() if x.requires_grad]
    options: Any = dict(method=method, rtol=1e-4, atol=1e-6, jump_t=[0.7], step_control=control)
    for t in ([0.0, 0.4, 0.41, 0.7, 1.5], [1.0, 0.95]):  # and backwards, where the pull pushes
        rate = (k if t[0] == 0 else k / 50).detach().requires_grad_()
        both(func, y0, t, (rate,), weights, **options)


@pytest.mark.parametrize("control", ["joint", "per_sample"])
def test_df_dy_is_that_beside_a_discontinuity(control: str):
    """A step that begins on one has the df/dy of its own side, in the step and on the way back."""
    rate = torch.tensor(0.5, dtype=D, requires_grad=True)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return -torch.where(t <= 0.5, rate, 3 * rate) * y

    y0 = torch.linspace(0.5, 1.5, 3, dtype=D)[:, None]
    options: Any = dict(method="rodas5p", rtol=1e-7, atol=1e-10, jump_t=[0.5], step_control=control)
    for t in ([0.0, 0.3, 1.0], [0.5, 1.0], [0.0, 0.5], [1.0, 0.25]):
        (_, found), solution = both(func, y0, t, params=[rate], tolerance=1e-9, **options)
        past = [min(x, 0.5) + 3 * max(x - 0.5, 0.0) for x in t]
        exact = [y0 * math.exp(-0.5 * (x - past[0])) for x in past]
        assert torch.allclose(solution.ys, torch.stack(exact), rtol=1e-6)
        weights = torch.linspace(0.5, 1.5, 3 * len(t), dtype=D).reshape(-1, 3, 1)
        slopes = [(past[0] - x) * y for x, y in zip(past, exact, strict=True)]
        assert torch.allclose(found, (weights * torch.stack(slopes)).sum(), rtol=1e-4)


@pytest.mark.parametrize("force", [torch.sin, torch.round])
def test_one_number_and_the_time(force: Any):
    """df/dt of a state () is no sum over samples, and may be zero."""
    rate = torch.tensor(2.0, dtype=D, requires_grad=True)
    y0, options = torch.tensor(0.7, dtype=D), dict[str, Any](method="rodas5p", rtol=1e-6, atol=1e-8, jump_t=[0.5])
    both(lambda t, y: -rate * y * y + force(t), y0, [0.0, 0.3, 1.0], params=[rate], **options)
    rows = y0.reshape(1, 1)
    both(lambda t, y: -rate * y * y + force(t), rows, [0.0, 0.3, 1.0], params=[rate], step_control="per_sample", **options)


def test_times_of_each_sample_and_float32():
    def decay(t: Tensor, y: Tensor, k: Tensor) -> Tensor:
        return -k * y * (1 + y) + torch.sin(t)

    y0 = torch.linspace(0.5, 1.5, 4)[:, None]
    k = torch.tensor([[1.0], [30.0], [300.0], [3.0]], requires_grad=True)
    times = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.5, torch.nan], [0.0, 3.0, 4.0], [1.0, 2.0, 5.0]])
    options: Any = dict(method="rodas5p", rtol=1e-3, atol=1e-4, step_control="per_sample")
    found, _ = gradients(odenet_cuda.compile(decay), y0, times, (k,), **options)
    expected, _ = gradients(decay, y0.double(), times.double(), (k.double(),), engine="stepper", **options)
    for x, y in zip(found, expected, strict=True):
        assert torch.allclose(x.double(), y, rtol=0.02, atol=0.02 * float(y.abs().max()))


def test_a_sample_is_that_of_any_batch_and_fails_alone():
    """A sample that runs to infinity leaves the gradients of the others as they are."""

    def growth(t: Tensor, y: Tensor, k: Tensor) -> Tensor:
        return k * y * y

    func = odenet_cuda.compile(growth)
    y0, k = torch.linspace(0.1, 0.9, 12, dtype=D)[:, None], torch.linspace(0.5, 1.0, 12, dtype=D)[:, None].requires_grad_()
    options: Any = dict(method="rodas5p", rtol=1e-8, atol=1e-10, step_control="per_sample", on_failure="return")
    whole, solution = gradients(func, y0, [0.0, 1.5], (k,), **options)
    exact = y0 / (1 - 1.5 * k.detach() * y0)
    alive = (exact > 0) & (exact < 1e3)
    assert solution.ys[-1].isnan().any() and alive.sum() > 5
    weights = torch.linspace(0.5, 1.5, 24, dtype=D).reshape(2, 12, 1)
    assert torch.allclose(whole[0][alive], (weights[0] + weights[1] * (exact / y0) ** 2)[alive], rtol=1e-6)
    assert torch.allclose(whole[1][alive], (weights[1] * 1.5 * exact**2)[alive], rtol=1e-6)
    for rows in ([3], [11, 0, 2]):
        y, rate = y0[rows].clone().requires_grad_(), k.detach()[rows].requires_grad_()
        ys = solve(func, y, [0.0, 1.5], args=(rate,), **options).ys
        part = torch.autograd.grad((ys * weights[:, rows]).nan_to_num().sum(), (y, rate))
        for x, of_whole in zip(part, whole, strict=True):
            assert torch.allclose(x[alive[rows]], of_whole[rows][alive[rows]], rtol=1e-12)


def test_one_sample_without_a_batch():
    """A state whose numbers mix, under joint control, with a matrix and a vector that are trained."""
    matrix = (-torch.diag(torch.logspace(0, 2, 4, dtype=D)) + 0.3).requires_grad_()
    bias = torch.linspace(-1, 1, 4, dtype=D).requires_grad_()

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(matrix @ y + bias) * y.norm() - y

    both(
        func, torch.linspace(0.5, 2, 4, dtype=D), [0.0, 0.3, 1.0], params=[matrix, bias], method="rodas5p", rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
def test_a_reference(gradient: str):
    """y' = -k (y - cos t): dy/dk in closed form, at a rate where explicit steps would be 1e5."""
    k = torch.tensor([[1e4], [2e5]], dtype=D, requires_grad=True)
    func = odenet_cuda.compile(lambda t, y, k: -k * (y - torch.cos(t)))
    solution = solve(func, torch.zeros(2, 1, dtype=D), [0.0, 1.0], args=(k,), method="rodas5p", gradient=gradient,
                     step_control="per_sample", rtol=1e-9, atol=1e-12)  # fmt: skip
    assert solution.engine == "compiled" and solution.stats.num_accepted.max() < 3000
    (found,) = torch.autograd.grad(solution.ys[-1].sum(), k)
    rate = k.detach()
    exact = torch.tensor(1.0, dtype=D)
    # y = (k^2 cos t + k sin t) / (1 + k^2), but for what has decayed
    wanted = (2 * rate * exact.cos() + (1 - rate**2) * exact.sin()) / (1 + rate**2) ** 2
    assert torch.allclose(found, wanted, rtol=1e-6)
    assert solution.stats.nfe_backward > 0


def test_gradients_of_gradients():
    """By the stepper, as of every compiled solve."""
    y0 = torch.tensor([[0.7]], dtype=D, requires_grad=True)
    solution = solve(odenet_cuda.compile(lambda t, y: -y * y), y0, [0.0, 1.0], method="rodas5p", rtol=1e-9, atol=1e-11)
    assert solution.engine == "compiled"
    (first,) = torch.autograd.grad(solution.ys[-1].sum(), y0, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), y0)
    assert torch.allclose(first, 1 / (1 + y0) ** 2, rtol=1e-7) and torch.allclose(second, -2 / (1 + y0) ** 3, rtol=1e-6)


torch.manual_seed(3)
WEIGHT, SQUARE = (torch.randn(4, 4, dtype=D) * 0.4).requires_grad_(), torch.randn(4, dtype=D).requires_grad_()
OPERATIONS: dict[str, Any] = {
    **{name: getattr(torch, name) for name in ("sin", "cos", "exp", "tanh", "sigmoid", "atan", "erf", "sinh", "cosh")},
    **{name: getattr(F, name) for name in ("softplus", "silu", "gelu", "elu", "mish", "relu", "leaky_relu", "logsigmoid")},
    "positive": lambda y: torch.log(1 + y * y) + torch.sqrt(1 + y * y) + (2 + y.tanh()) ** 1.7 + 1 / (2 + y * y),
    "powers": lambda y: y**3 + y.square() - y**2 * y.abs(),
    "softmax": lambda y: torch.softmax(y, 1) + torch.log_softmax(y, 1) + torch.logsumexp(y, 1, keepdim=True),
    "layer norm": lambda y: F.layer_norm(y, [4], SQUARE, WEIGHT[0]),
    "norm": lambda y: y * y.norm(dim=1, keepdim=True) + (y * y).sum(1, keepdim=True) + y.prod(1, keepdim=True),
    "net": lambda y: torch.tanh(F.linear(y, WEIGHT, SQUARE)) @ WEIGHT,
    "bilinear": lambda y: torch.einsum("bi,bj,ij->bi", y, y, WEIGHT) + y.flip(1) * y.roll(1, 1),
    "slices": lambda y: torch.cat([y[:, :1] * y[:, 1:2], y[:, 1:3] ** 2, y[:, 3:] * SQUARE[0]], 1),
    "written": lambda y: torch.stack([y[:, 1] * y[:, 0], y[:, 0] - y[:, 2] ** 2, -y[:, 3], y[:, 0] * y[:, 3]], 1),
    "pieces": lambda y: torch.where(y > 0.3, y * y, y.exp()) + y.clamp(-1, 1) * y + torch.maximum(y, y * y),
    "attention": lambda y: F.scaled_dot_product_attention(*[y.reshape(-1, 2, 2) * w for w in SQUARE[:3]]).reshape(-1, 4),
    "derivative": lambda y: torch.autograd.grad((y.sin() * F.linear(y, WEIGHT)).sum(), y, create_graph=True)[0],
    "linear": lambda y: y @ WEIGHT,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_second_derivatives_are_read(name: str):
    """Reading compares the program's second derivatives with autograd's, with other weights too: a misread one is refused."""
    operation = OPERATIONS[name]

    def func(t: Tensor, y: Tensor, k: Tensor) -> Tensor:
        return operation(y) * torch.cos(t) * k + operation(k * y)

    y0, k = torch.randn(6, 4, dtype=D), torch.rand(6, 1, dtype=D).requires_grad_()
    state = torch.get_rng_state()
    plan = Plan(func, Structure(y0), (k,), False, by_time=True, second=True)
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn from torch's own generator
    assert plan.program.second is not None and len(plan.program.second.arguments) == 1


def test_what_is_not_read_in_words():
    """The second derivative of a convolution: without a gradient the solve is compiled all the same."""
    kernel = torch.tensor([[[0.3, -1.0, 0.2]]], dtype=D, requires_grad=True)
    field = odenet_cuda.compile(lambda t, y: F.conv1d(torch.tanh(y)[:, None], kernel, padding=1)[:, 0])
    y0 = torch.ones(2, 4, dtype=D)
    with torch.no_grad():
        assert solve(field, y0, [0.0, 1.0], method="rodas5p").engine == "compiled"
    solution = solve(field, y0, [0.0, 1.0], method="rodas5p", gradient="checkpoint", step_control="per_sample")
    assert solution.engine == "stepper" and "samples apart" in solution.explanation["compiled"]
