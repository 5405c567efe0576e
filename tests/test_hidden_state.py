"""func that does not give the same again: the gradient is that of the solve, or it is refused in words."""

import random
import warnings

import numpy as np
import pytest
import torch
from torch.nn.functional import dropout

from odenet_cuda import solve

METHODS = {
    "euler": {"method": "euler", "step_size": 0.1},
    "midpoint": {"method": "midpoint", "step_size": 0.1},
    "rk4": {"method": "rk4"},
    "heun3, outputs inside": {"method": "heun3", "step_size": 0.15},
    "dopri5": {"rtol": 1e30, "atol": 1e30, "first_step": 0.1, "max_step": 0.1},
    "dopri5, first step": {"rtol": 1e30, "atol": 1e30, "max_step": 0.1},
    "bosh3, jump": {"method": "bosh3", "rtol": 1e30, "atol": 1e30, "max_step": 0.1, "jump_t": [0.5]},
    "adaptive_heun": {"method": "adaptive_heun", "rtol": 1e30, "atol": 1e30, "max_step": 0.1},
}
TIMES = [0.0, 0.52, 1.0]
SHAPE = 4, 3


class Draws:
    """y' = -w y, with factors of y from random numbers."""

    def __init__(self):
        torch.manual_seed(1), np.random.seed(1), random.seed(1)  # noqa: NPY002, its global generator is the point
        self.generator, self.rng = torch.Generator().manual_seed(1), np.random.default_rng(1)
        self.calls, self.kept = 0, None
        self.w = torch.linspace(0.5, 1.5, SHAPE[1], dtype=torch.float64, requires_grad=True)


DEFAULT = {  # of torch's generators, which are put back
    "dropout": lambda s, t, y: dropout(y, 0.5),
    "only after t = 0.5": lambda s, t, y: dropout(y, 0.5) if t > 0.5 else y,
    "only at the start": lambda s, t, y: dropout(y, 0.5) if t == 0 else y,
    "only at the end": lambda s, t, y: y * torch.rand(SHAPE, dtype=y.dtype) if t > 0.9 else y,
}
OWN = {
    "generator": lambda s, t, y: y * torch.rand(SHAPE, generator=s.generator, dtype=y.dtype),
    "generator, late": lambda s, t, y: y * torch.rand(SHAPE, generator=s.generator, dtype=y.dtype) if t > 0.7 else y,
    "generator, early": lambda s, t, y: y * torch.rand(SHAPE, generator=s.generator, dtype=y.dtype) if t < 0.05 else y,
    "numpy": lambda s, t, y: y * torch.as_tensor(np.random.rand(*SHAPE)),  # noqa: NPY002
    "numpy generator": lambda s, t, y: y * torch.as_tensor(s.rng.random(SHAPE)),
    "python": lambda s, t, y: y * random.random(),
    "counter": lambda s, t, y: y * s.count(),
}


def field(name):
    state, draw = Draws(), {**DEFAULT, **OWN}[name]

    def count():
        state.calls += 1
        return 1 + 0.05 * state.calls

    state.count = count
    return (lambda t, y: -state.w * draw(state, t, y)), state.w


def gradient_of(name, gradient, **options):
    func, w = field(name)
    y0 = torch.ones(SHAPE, dtype=torch.float64)
    loss = solve(func, y0, TIMES, gradient=gradient, **options).ys[1:].square().sum()
    return torch.autograd.grad(loss, w)[0]


@pytest.mark.parametrize("name", DEFAULT)
@pytest.mark.parametrize("method", METHODS)
def test_torch_draws_the_same_again(method, name):
    expected = gradient_of(name, "direct", **METHODS[method])
    for limit in (None, 2):
        found = gradient_of(name, "checkpoint", max_checkpoints=limit, **METHODS[method])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_put_back_is_refused(method, name):
    """Or right, where no step has other numbers than it had: a grid may never evaluate late enough."""
    expected = gradient_of(name, "direct", **METHODS[method])
    for limit in (None, 2):
        try:
            found = gradient_of(name, "checkpoint", max_checkpoints=limit, **METHODS[method])
        except RuntimeError as error:
            assert "made a step of the solve again, and it ended elsewhere" in str(error)
        else:
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_noise_that_is_drawn_once_is_no_noise():
    """FFJORD's, in the first call: per sample too, and the adjoint does not warn."""
    y0 = torch.ones(SHAPE, dtype=torch.float64)
    w = torch.linspace(0.5, 1.5, SHAPE[1], dtype=torch.float64, requires_grad=True)
    grads = []
    for gradient in ("direct", "checkpoint", "adjoint", "quadrature"):
        torch.manual_seed(0)
        kept = []

        def func(t, y, kept=kept):
            if not kept:
                kept.append(torch.rand(SHAPE, dtype=y.dtype))
            return -w * y * kept[0]

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ys = solve(func, y0, [0.0, 1.0], gradient=gradient, step_control="per_sample", rtol=1e-9, atol=1e-9).ys
            grads.append(torch.autograd.grad(ys[-1].sum(), w)[0])
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["dropout", "only after t = 0.5"])
def test_the_adjoints_warn(name):
    for gradient in ("adjoint", "quadrature"):
        with pytest.warns(UserWarning, match="func draws random numbers at every call"):
            gradient_of(name, gradient, method="rk4", step_size=0.1)


@pytest.mark.parametrize("name", ["generator", "numpy", "python", "counter"])
@pytest.mark.parametrize("gradient", ["adjoint", "quadrature"])
def test_the_adjoints_warn_of_what_differs_at_every_call(gradient, name):
    with pytest.warns(UserWarning, match="func gives something else at every call"):
        gradient_of(name, gradient, method="rk4", step_size=0.1)


@pytest.mark.parametrize("gradient", ["adjoint", "quadrature"])
def test_weights_that_adapt_with_each_call(gradient):
    """spectral_norm in training: served, with a word."""
    torch.manual_seed(0)
    first, second = (torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(*n)) for n in ((8, 32), (32, 8)))
    ys = solve(lambda t, y: second(torch.tanh(first(y))), torch.randn(16, 8), [0.0, 1.0], gradient=gradient, method="rk4").ys
    with pytest.warns(UserWarning, match="spectral_norm"):
        ys.sum().backward()


@pytest.mark.parametrize("gradient", ["adjoint", "quadrature"])
def test_a_module_that_changed_since_is_refused_by_the_adjoints(gradient):
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)).double()
    y0 = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    loss = solve(lambda t, y: net(y), y0, [0.0, 1.0], gradient=gradient, rtol=1e-3, atol=1e-3).ys[-1].sum()
    net.eval()
    with pytest.raises(RuntimeError, match="func does not give what it gave in the solve"):
        loss.backward()


def test_a_module_that_changed_since_is_refused():
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.5)).double().eval()
    y0 = torch.ones(SHAPE, dtype=torch.float64, requires_grad=True)
    loss = solve(lambda t, y: net(y), y0, [0.0, 1.0], gradient="checkpoint").ys[-1].sum()
    net.train()
    with pytest.raises(RuntimeError, match="its module may have changed"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rounding_is_no_other_state(dtype):
    """Sums in another order, as CUDA may form them, and a module that rounds to 32 bits."""
    calls = [0]
    w = torch.linspace(-1, 1, 64, dtype=torch.float32).reshape(8, 8).requires_grad_()

    def func(t, y):
        calls[0] += 1
        order = torch.randperm(8, generator=torch.Generator().manual_seed(calls[0]))
        return torch.tanh(y[:, order].float() @ w[order]).to(y.dtype)

    y0 = torch.ones(2, 8, dtype=dtype, requires_grad=True)
    solve(func, y0, [0.0, 1.0], gradient="checkpoint", rtol=1e-3, atol=1e-3).ys[-1].float().sum().backward()
