"""Samples that go through the lanes of a pack one after the other: what happens in a lane concerns no other, and no sample
knows how many lanes there were."""

import pytest
import torch
from compile_native import require_compiler
from compiled_fields import Stretched, assert_compiled, compare, gradients, rows
from torch import nn

import odenet_cuda
from odenet_cuda import solve
from odenet_cuda.compiled import ways

TIMES = [0.0, 0.013, 0.3, 0.31, 1.0]


@pytest.fixture(scope="module", autouse=True)
def needs_compiler():
    """Skips all where there is no C++ compiler."""
    require_compiler()


class Zoo(nn.Module):
    """Every kind of function that a pack has from a library, sums of products, a division, a layer; arguments too."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.layer = nn.Linear(3, 3, dtype=dtype)
        with torch.no_grad():
            self.layer.weight.copy_(rows(3, 3, seed=5))
            self.layer.bias.copy_(rows(3, seed=6))

    def forward(self, t, y, p):
        a, b, c = y[:, :1], y[:, 1:2], y[:, 2:]
        x = torch.tanh(a) * torch.exp(-b * b) + torch.sin(3 * c + t) * torch.cos(a)
        z = (1 + a * a) ** 1.7 * p / (1 + torch.sigmoid(b)) - torch.log1p(c * c) * torch.erf(a)
        w = torch.atan2(a, 1 + b * b) - torch.sqrt(1 + c * c) + torch.sinh(b) * torch.atan(c)
        return 3 * torch.tanh(self.layer(torch.cat([x, z, w], 1)))


def results(field, y0, p, t=TIMES, **options):
    """Outputs, steps, and gradients for y0 and the arguments."""
    y0, p = y0.clone().requires_grad_(), p.clone().requires_grad_()
    options = {"step_control": "per_sample", "rtol": 1e-4, "atol": 1e-4, **options}
    solution = solve(field, y0, t, args=(p,), **options)
    assert_compiled(field)
    grads = torch.autograd.grad((solution.ys**2).sum(), [y0, p])
    stats = solution.stats
    return [solution.ys.detach(), stats.num_accepted[None], stats.num_rejected[None], *[g[None] for g in grads]]


@pytest.mark.parametrize("gradient, dtype", [("direct", torch.float32), ("adjoint", torch.float64)])
def test_the_same_bits_alone_and_among_others(gradient, dtype):
    """In one lane, in a pack that is not full, in the first of a lane's samples and in a later one, whatever came before."""
    field = odenet_cuda.compile(Zoo(dtype))
    y0, p = rows(150, 3, dtype=dtype) * torch.linspace(0.1, 2, 150, dtype=dtype)[:, None], rows(150, 1, seed=1, dtype=dtype)
    whole = results(field, y0, p, gradient=gradient)
    assert len(set(whole[1].flatten().tolist())) > 3
    backwards = list(range(149, -1, -1))
    for chosen in ([0], [77], [149], [5, 140, 9], backwards, [120] * 40 + [3], backwards[::3]):
        part = results(field, y0[chosen], p[chosen], gradient=gradient)
        if len(chosen) == 1:
            part.pop()  # arguments with one row are read as constants, whose gradient is added up in another order
        assert all(torch.equal(x[:, chosen], y) for x, y in zip(whole, part, strict=False))


def hyperbola(t, y, p):
    """1 / (c - t), infinite at t = c = 1 / y0 for y0 > 0."""
    return y * y * p


def test_a_sample_that_fails_touches_no_other():
    """One has no start, one ends in a pole, one at a step of no size: the others have the bits that they have without them."""
    field = odenet_cuda.compile(hyperbola)
    y0 = rows(100, 1) * 0.4
    p = torch.ones_like(y0)
    options = {"on_failure": "return", "step_control": "per_sample", "rtol": 1e-5, "atol": 1e-5}
    sound = solve(field, y0, [0.0, 0.5, 2.0], args=(p,), **options)
    assert set(sound.status) == {"success"}
    bad = y0.clone()
    failing = {0: float("nan"), 31: 1.0, 50: float("inf"), 77: 0.9, 99: -float("inf")}
    for i, value in failing.items():
        bad[i] = value
    found = solve(field, bad, [0.0, 0.5, 2.0], args=(p,), **options)
    assert_compiled(field)
    expected = solve(hyperbola, bad, [0.0, 0.5, 2.0], args=(p,), **options)
    others = [i for i in range(100) if i not in failing]
    assert torch.equal(found.ys[:, others], sound.ys[:, others])
    assert torch.equal(found.stats.num_accepted[others], sound.stats.num_accepted[others])
    assert found.status == expected.status and found.status[31] != "success"
    torch.testing.assert_close(found.y_last, expected.y_last, rtol=1e-6, atol=1e-9, equal_nan=True)


def steep(t, y, p):
    """Grows by far more than a number can hold in a step that is too long: what such a step gives is rejected."""
    return p * torch.exp(torch.exp(y)) - y


@pytest.mark.parametrize("gradient", ["direct", "adjoint"])
def test_gradients_with_steps_that_were_infinite(gradient):
    """A step that overflows is rejected, and leaves nothing in the sums of gradients, which belong to all samples."""
    y0, scale = rows(40, 1) + 0.3, nn.Parameter(torch.tensor([[0.02]], dtype=torch.float64))

    class Steep(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = scale

        def forward(self, t, y):
            return steep(t, y, self.scale)

    options = {"step_control": "per_sample", "gradient": gradient, "first_step": 0.7, "rtol": 1e-6, "atol": 1e-6}
    if gradient == "adjoint":
        options["adjoint_options"] = {"first_step": 0.7}
    field = odenet_cuda.compile(Steep())
    found, expected = (gradients(f, y0, [0.0, 0.2], [scale], **options) for f in (field, Steep()))
    assert_compiled(field)
    for x, y in zip(found, expected, strict=True):
        assert x.isfinite().all()
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_slices(monkeypatch):
    """A call that ends after every step goes on where it was, whatever samples its lanes have."""
    field = odenet_cuda.compile(Stretched())
    options = {"step_control": "per_sample", "rtol": 1e-4, "atol": 1e-4, "jump_t": [0.5]}
    y0, parameters = rows(90, 2), list(field.parameters())
    whole, grads = solve(field, y0, TIMES, **options), gradients(field, y0, TIMES, parameters, **options)
    monkeypatch.setattr(ways, "_SLICE", 1e-9)
    again = odenet_cuda.compile(field.func)
    sliced = solve(again, y0, TIMES, **options)
    assert torch.equal(whole.ys, sliced.ys) and torch.equal(whole.stats.num_accepted, sliced.stats.num_accepted)
    for x, y in zip(grads, gradients(again, y0, TIMES, parameters, **options), strict=True):
        assert torch.equal(x, y)


def test_more_outputs_than_steps_and_times_that_go_back():
    """Every step has outputs inside it, of some lanes and not of others."""
    field = odenet_cuda.compile(Stretched())
    t = torch.linspace(0, -1, 201, dtype=torch.float64)
    compare(field, rows(70, 2), t, step_control="per_sample", rtol=1e-3, atol=1e-3)


def test_the_step_limit_counts_from_the_last_output():
    """max_num_steps, of samples that begin when others are under way."""
    field = odenet_cuda.compile(Stretched())
    y0 = rows(80, 2)
    options = {"step_control": "per_sample", "rtol": 1e-8, "atol": 1e-8, "on_failure": "return", "max_num_steps": 35}
    found, expected = (solve(f, y0, [0.0, 0.5, 1.0, 1.3], **options) for f in (field, field.func))
    assert found.status == expected.status and len(set(found.status)) > 1
    assert torch.equal(found.stats.num_accepted, expected.stats.num_accepted)
    torch.testing.assert_close(found.y_last, expected.y_last, rtol=1e-6, atol=1e-6)
