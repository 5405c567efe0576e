"""What bench_compiled.py solves: each field in torch and in JAX, and its problem."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Case:
    """dy/dt = field(t, y, *args) from 0 to end, by dopri5. per_row(t, y, parameters, *args) is the field of one sample in JAX,
    with parameters in the order of the field's; by_hand: the function of by_hand.cpp that solves it."""

    name: str
    field: Any
    y0: Tensor
    end: float
    rtol: float
    atol: float
    per_row: Callable[..., Any]
    args: tuple[Tensor, ...] = ()
    controls: tuple[str, ...] = ("joint", "per_sample")
    by_hand: str | None = None
    gradients: bool = True
    peers: tuple[str, ...] = ("torchdiffeq", "torchode", "diffrax")
    parameters: list[Tensor] = field(default_factory=list)
    check_end: float | None = None  # where errors are compared, if the end is beyond what can be predicted

    def __post_init__(self) -> None:
        if isinstance(self.field, nn.Module):
            self.parameters = list(self.field.parameters())


def numpy_of(jax: bool) -> Any:
    return importlib.import_module("jax.numpy") if jax else torch


def lorenz(t: Any, y: Tensor) -> Tensor:
    a, b, c = y.unbind(-1)
    return torch.stack([10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c], -1)


def lorenz_row(t: Any, y: Any, parameters: Any) -> Any:
    jnp = numpy_of(True)
    return jnp.stack([10 * (y[1] - y[0]), y[0] * (28 - y[2]) - y[1], y[0] * y[1] - 8 / 3 * y[2]])


def lotka_volterra(t: Any, y: Tensor, p: Tensor) -> Tensor:
    prey, predators = y.unbind(-1)
    a, b, c, d = p.unbind(-1)
    return torch.stack([prey * (a - b * predators), predators * (c * prey - d)], -1)


def lotka_volterra_row(t: Any, y: Any, parameters: Any, p: Any) -> Any:
    jnp = numpy_of(True)
    return jnp.stack([y[0] * (p[0] - p[1] * y[1]), y[1] * (p[2] * y[0] - p[3])])


class MLP(nn.Module):
    """Linear layers with tanh between. cubed: of y^3; timed: of y and t."""

    def __init__(self, widths: list[int], scale: float, cubed: bool = False, timed: bool = False):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.cubed, self.timed = cubed, timed
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.normal_(std=scale if cubed else scale / layer.in_features**0.5)
                layer.bias.zero_()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        if self.cubed:
            y = y**3
        if self.timed:
            y = torch.cat([y, torch.ones_like(y[:, :1]) * t], 1)
        for layer in self.layers[:-1]:  # type: ignore[union-attr]
            y = torch.tanh(layer(y))
        return self.layers[-1](y)


def mlp_row(cubed: bool, timed: bool) -> Callable[..., Any]:
    def row(t: Any, y: Any, parameters: Any) -> Any:
        jnp = numpy_of(True)
        if cubed:
            y = y**3
        if timed:
            y = jnp.concatenate([y, jnp.asarray(t, y.dtype).reshape(1)])
        for i in range(0, len(parameters), 2):
            y = parameters[i] @ y + parameters[i + 1]
            y = jnp.tanh(y) if i + 2 < len(parameters) else y
        return y

    return row


def fitted_spiral() -> MLP:
    """A net 2-50-2 of y^3 that is close to the spiral dy/dt = A y^3 of torchdiffeq's example, as it is after training."""
    net = MLP([2, 50, 2], 0.15, cubed=True)
    first, last = net.layers
    y = 4 * torch.rand(4000, 2) - 2
    with torch.no_grad():
        first.bias.uniform_(-1, 1)
        hidden = torch.cat([torch.tanh(first(y**3)), torch.ones_like(y[:, :1])], 1).double()
        wanted = (y**3).double() @ torch.tensor([[-0.1, 2.0], [-2.0, -0.1]], dtype=torch.float64)
        ridge = 1e-3 * torch.eye(51, dtype=torch.float64)
        found = torch.linalg.solve(hidden.T @ hidden + ridge, hidden.T @ wanted).float()
        last.weight.copy_(found[:-1].T)
        last.bias.copy_(found[-1])
    return net


def on_circle(batch: int) -> Tensor:
    angle = 6.2832 * torch.rand(batch)
    return torch.stack([angle.cos(), angle.sin()], 1) * (1.2 + 0.3 * torch.rand(batch, 1))


class Flow(nn.Module):
    """A continuous normalizing flow of the plane with the exact divergence: the state is (z, log p)."""

    def __init__(self, width: int):
        super().__init__()
        self.net = MLP([3, width, width, 2], 1.0, timed=True)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            z = y[:, :2]
            if not z.requires_grad:
                z = z.requires_grad_()
            dz = self.net(t, z)
            rows = [torch.autograd.grad(dz[:, i].sum(), z, create_graph=True)[0][:, i] for i in range(2)]
        return torch.cat([dz, -(rows[0] + rows[1])[:, None]], 1)


def flow_row(t: Any, y: Any, parameters: Any) -> Any:
    jax, jnp = importlib.import_module("jax"), numpy_of(True)
    net = mlp_row(False, True)
    jacobian = jax.jacfwd(lambda z: net(t, z, parameters))(y[:2])
    return jnp.concatenate([net(t, y[:2], parameters), -jnp.trace(jacobian).reshape(1)])


def cases(quick: bool) -> list[Case]:
    torch.manual_seed(0)
    many = 1_000 if quick else 10_000
    one = torch.ones(3, dtype=torch.float64)
    near = torch.ones(many, 3, dtype=torch.float64) + 0.1 * torch.randn(many, 3, dtype=torch.float64)
    hunted = 1 + torch.rand(many, 4)
    spiral = fitted_spiral()
    wide = MLP([65, 128, 128, 64], 2.5, timed=True)
    spiral_row, wide_row = mlp_row(True, False), mlp_row(False, True)
    return [
        Case("lorenz-one", lorenz, one, 10.0 if quick else 100.0, 1e-8, 1e-8, lorenz_row, controls=("joint",),
             by_hand="lorenz_one", gradients=False, peers=("torchdiffeq", "scipy", "diffrax"), check_end=10.0),
        Case("lotka-volterra", lotka_volterra, torch.ones(many, 2) + 0.1 * torch.rand(many, 2), 10.0, 1e-6, 1e-6,
             lotka_volterra_row, args=(hunted,), by_hand="lotka_volterra_float", gradients=False),
        Case("lorenz-many, float32", lorenz, near.float(), 1.0, 1e-6, 1e-6, lorenz_row,
             by_hand="lorenz_float", gradients=False),
        Case("lorenz-many, float64", lorenz, near, 1.0, 1e-6, 1e-6, lorenz_row, by_hand="lorenz_double", gradients=False),
        Case("spiral, batch 20", spiral, on_circle(20), 25.0, 1e-3, 1e-4, spiral_row),
        Case("spiral, batch 1,024", spiral, on_circle(1024), 25.0, 1e-3, 1e-4, spiral_row),
        Case("mlp, batch 256", wide, torch.randn(256, 64), 1.0, 1e-4, 1e-4, wide_row),
        Case("flow, batch 512", Flow(64), torch.randn(512, 3), 1.0, 1e-5, 1e-5, flow_row),
    ]  # fmt: skip
