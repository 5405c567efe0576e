"""Fields for the tests of compiled fields, and how a compiled solve is compared with the stepper's."""

from typing import Any

import torch
from torch import Tensor, nn

import odenet_cuda
from odenet_cuda import Solution, solve


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers between -1 and 1, always the same."""
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1).to(dtype)


class Net(nn.Module):
    """Two linear layers of y and t, with tanh between."""

    def __init__(self, width: int = 2, hidden: int = 6, dtype: torch.dtype = torch.float64):
        super().__init__()
        self.first, self.second = nn.Linear(width + 1, hidden, dtype=dtype), nn.Linear(hidden, width, dtype=dtype)
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                parameter.copy_(rows(*parameter.shape, seed=10 + i, dtype=dtype))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        timed = torch.cat([y, torch.ones_like(y[:, :1]) * torch.sin(3 * t)], 1)
        return self.second(torch.tanh(self.first(timed)))


class Stretched(nn.Module):
    """A rotation whose rate differs from sample to sample, so that their steps do too."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        a, b = y[:, :1], y[:, 1:]
        speed = self.rate * (1 + 2 * torch.tanh(2 * (a * a + b * b))) * (1 + 0.3 * torch.sin(5 * t))
        return torch.cat([speed * b, -speed * a], 1)


class Flow(nn.Module):
    """(z, log p) with the exact divergence. detached: z is detached by the user first; weighted: a detached factor too."""

    def __init__(self, detached: bool = False, weighted: bool = False):
        super().__init__()
        self.net, self.detached, self.weighted = Net(), detached, weighted

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        z = y[:, :2]
        with torch.enable_grad():
            if self.detached:
                z = z.detach()
            z = z.requires_grad_() if not z.requires_grad else z
            dz = self.net(t, z)
            trace = sum(torch.autograd.grad(dz[:, i].sum(), z, create_graph=True)[0][:, i] for i in range(2))
        if self.weighted:
            dz = dz * torch.sigmoid(dz).detach()
        return torch.cat([dz, -trace[:, None]], 1)


def decay(t: Tensor, y: Tensor) -> Tensor:
    return -y


def lorenz(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    """p: [batch, 3], one row a sample."""
    a, b, c = y.unbind(-1)
    sigma, rho, beta = p.unbind(-1)
    return torch.stack([sigma * (b - a), a * (rho - c) - b, a * b - beta * c], -1)


def lorenz_alone(t: Tensor, y: Tensor) -> Tensor:
    """The same of one state [3]."""
    a, b, c = y.unbind(-1)
    return torch.stack([10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c], -1)


def leaves_of(state: Any) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else list(state)


def assert_compiled(field: odenet_cuda.CompiledField) -> None:
    assert field.explain() == "compiled"


def assert_same(found: Solution, expected: Solution, tolerance: float = 1e-10, counts: bool = True) -> None:
    """Values, status and, step for step, statistics."""
    for name in ("ys", "y_last"):
        for x, y in zip(leaves_of(getattr(found, name)), leaves_of(getattr(expected, name)), strict=True):
            assert x.shape == y.shape and x.dtype == y.dtype
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert found.status == expected.status
    torch.testing.assert_close(found.t, expected.t, rtol=0, atol=0, equal_nan=True)
    if counts:
        for name in ("num_accepted", "num_rejected"):
            x, y = getattr(found.stats, name), getattr(expected.stats, name)
            assert type(x) is type(y) and torch.equal(torch.as_tensor(x), torch.as_tensor(y))


def compare(field: odenet_cuda.CompiledField, y0: Any, t: Any, tolerance: float = 1e-10, counts: bool = True, **options) -> Any:
    """Solves by the compiled field and by the stepper, and compares."""
    found, expected = solve(field, y0, t, **options), solve(field.func, y0, t, **options)
    assert_compiled(field)
    assert_same(found, expected, tolerance, counts)
    return found


def gradients(func: Any, y0: Any, t: Any, parameters: list[Tensor], **options) -> list[Tensor]:
    """Those of a sum with weights over all outputs that there are, for the leaves of y0, tensors in args, and parameters."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves_of(y0)]
    args = [x.detach().clone().requires_grad_() for x in options.pop("args", ())]
    start = leaves[0] if isinstance(y0, Tensor) else tuple(leaves)
    ys = solve(func, start, t, args=args, **options).ys
    weighted = [part * torch.cos(torch.arange(part.numel()).to(part)).view_as(part) for part in leaves_of(ys)]
    loss = sum(torch.where(part.isnan(), 0, part).sum() for part in weighted)
    wanted = [x for x in (*leaves, *args, *parameters) if x.requires_grad]
    return list(torch.autograd.grad(loss, wanted))


def compare_gradients(func: Any, y0: Any, t: Any, tolerance: float, **options) -> None:
    parameters = [p for p in func.parameters() if p.requires_grad] if isinstance(func, nn.Module) else []
    field = odenet_cuda.compile(func)
    found = gradients(field, y0, t, parameters, **options)
    assert_compiled(field)
    expected = gradients(func, y0, t, parameters, **options)
    for x, y in zip(found, expected, strict=True):
        scale = float(y.abs().max()) + 1e-3
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * scale)
