"""The libraries beside which this one is timed, each behind the same three calls. Only those that are installed take part.

A solver of a case has forward(), which gives the state at the end; training(), which runs forward and backward through the
discrete solve and gives the gradients of the state at the start and of the field's parameters; and evaluations(), how often
the field is called in forward(). What forward() and training() return is read by tensors(), outside of what is timed.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from fields import MLP, ConvolutionField, Counted, LotkaVolterra
from torch import Tensor, nn

import odenet_cuda


@dataclass(frozen=True)
class Case:
    """dy/dt = field(t, y) from 0 to end, by dopri5, with rtol and atol both tol; the reference's tolerance is tight of it."""

    name: str
    field: nn.Module
    y0: Tensor
    end: float
    tol: float
    tight: float = 1e-2


class TorchSolver:
    """A solver whose state and gradients are torch's: solve(field, case) gives y at the end."""

    def __init__(self, case: Case, solve: Callable[[nn.Module, Case, Tensor], Tensor]):
        self.case, self.solve = case, solve

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.solve(self.case.field, self.case, self.case.y0)

    def training(self) -> list[Tensor]:
        y0 = self.case.y0.clone().requires_grad_()
        inputs = [y0, *self.case.field.parameters()]
        return list(torch.autograd.grad(self.solve(self.case.field, self.case, y0).square().mean(), inputs))

    def evaluations(self) -> int:
        counted = Counted(self.case.field)
        with torch.no_grad():
            self.solve(counted, self.case, self.case.y0)
        return counted.calls

    def tensors(self, result: Any) -> list[Tensor]:
        return [result] if isinstance(result, Tensor) else result


def times(case: Case) -> Tensor:
    return torch.tensor([0.0, case.end], device=case.y0.device, dtype=case.y0.dtype)


def ours(case: Case, per_sample: bool) -> TorchSolver:
    control = "per_sample" if per_sample else "joint"

    def solve(field: nn.Module, case: Case, y0: Tensor) -> Tensor:
        return odenet_cuda.solve(field, y0, times(case), rtol=case.tol, atol=case.tol, step_control=control).ys[-1]

    return TorchSolver(case, solve)


def torchdiffeq(case: Case, per_sample: bool) -> TorchSolver:
    library = importlib.import_module("torchdiffeq")

    def solve(field: nn.Module, case: Case, y0: Tensor) -> Tensor:
        return library.odeint(field, y0, times(case), rtol=case.tol, atol=case.tol, method="dopri5")[-1]

    return TorchSolver(case, solve)


def torchdyn(case: Case, per_sample: bool) -> TorchSolver:
    library = importlib.import_module("torchdyn.numerics")

    def solve(field: nn.Module, case: Case, y0: Tensor) -> Tensor:
        return library.odeint(field, y0, times(case), solver="dopri5", atol=case.tol, rtol=case.tol)[1][-1]

    return TorchSolver(case, solve)


class Rows(nn.Module):
    """A field of [batch, columns] and times [batch], as torchode has them, over one of any shape."""

    def __init__(self, field: nn.Module, shape: tuple[int, ...]):
        super().__init__()
        self.field, self.shape, self.columns = field, shape, (-1, *[1] * (len(shape) - 1))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.field(t.reshape(self.columns), y.reshape(self.shape)).flatten(1)


def torchode(case: Case, per_sample: bool) -> TorchSolver:
    library = importlib.import_module("torchode")
    bounds = torch.tensor([[0.0], [case.end]], dtype=case.y0.dtype, device=case.y0.device)
    begin, end = bounds.expand(2, len(case.y0))

    def build(field: nn.Module) -> Any:
        term = library.ODETerm(Rows(field, case.y0.shape), with_stats=False)
        controller = library.IntegralController(atol=case.tol, rtol=case.tol, term=term)
        method = library.Dopri5(term=term)
        return library.AutoDiffAdjoint(method, controller, backprop_through_step_size_control=False).to(case.y0)

    prepared = build(case.field)

    def solve(field: nn.Module, case: Case, y0: Tensor) -> Tensor:
        adjoint = prepared if field is case.field else build(field)
        solution = adjoint.solve(library.InitialValueProblem(y0.flatten(1), t_start=begin, t_end=end))
        return solution.ys[:, -1].reshape(y0.shape)

    return TorchSolver(case, solve)


class DiffraxSolver:
    """Compiled once, before anything is timed; control for each sample is jax.vmap over the solve of one. step: the size of
    every step, None where the controller chooses."""

    def __init__(self, case: Case, per_sample: bool, step: float | None = None):
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the GPU's memory is shared with torch
        self.jax, self.diffrax = importlib.import_module("jax"), importlib.import_module("diffrax")
        self.case, self.device = case, self.jax.devices("gpu" if case.y0.is_cuda else "cpu")[0]
        self.per_sample, self.step = per_sample, step
        self.y0 = self._array(case.y0)
        self.parameters = [self._array(parameter) for parameter in case.field.parameters()]
        self._forward = self.jax.jit(self._solve_with(jax_field(case.field)))
        self._training = self.jax.jit(self.jax.grad(self._loss, argnums=(0, 1)))

    def _array(self, tensor: Tensor) -> Any:
        return self.jax.device_put(tensor.detach().cpu().numpy(), self.device)

    def _solve_with(self, field: Callable) -> Callable:
        diffrax, tol, end, step = self.diffrax, self.case.tol, self.case.end, self.step
        forced = {} if step is None else {"dtmin": step, "dtmax": step, "force_dtmin": True}

        def solve(y0: Any, parameters: Any) -> Any:
            term, controller = diffrax.ODETerm(field), diffrax.PIDController(rtol=tol, atol=tol, **forced)
            solution = diffrax.diffeqsolve(
                term, diffrax.Dopri5(), 0.0, end, step, y0, parameters, stepsize_controller=controller
            )
            return solution.ys[-1]

        if not self.per_sample:
            return solve
        one = self.jax.vmap(lambda row, parameters: solve(row[None], parameters)[0], in_axes=(0, None))
        return lambda y0, parameters: one(y0, parameters)

    def _loss(self, y0: Any, parameters: Any) -> Any:
        return (self._forward(y0, parameters) ** 2).mean()

    def forward(self) -> Any:
        return self.jax.block_until_ready(self._forward(self.y0, self.parameters))

    def training(self) -> Any:
        return self.jax.block_until_ready(self._training(self.y0, self.parameters))

    def evaluations(self) -> int:
        """Counted by a callback in a solve of its own; under vmap one call evaluates the whole batch."""
        calls = 0

        def count() -> None:
            nonlocal calls
            calls += 1

        field = jax_field(self.case.field)

        def counted(t: Any, y: Any, parameters: Any) -> Any:
            self.jax.debug.callback(count)
            return field(t, y, parameters)

        self.jax.block_until_ready(self.jax.jit(self._solve_with(counted))(self.y0, self.parameters))
        self.jax.effects_barrier()
        return calls

    def tensors(self, result: Any) -> list[Tensor]:
        numpy = importlib.import_module("numpy")
        return [torch.from_numpy(numpy.array(leaf)) for leaf in self.jax.tree_util.tree_leaves(result)]


def diffrax_installed() -> bool:
    return importlib.util.find_spec("diffrax") is not None


def jax_field(field: nn.Module) -> Callable:
    """The same field in JAX: (t, y, parameters in the order of field.parameters()) -> dy/dt."""
    jax, jnp = importlib.import_module("jax"), importlib.import_module("jax.numpy")

    def lotka_volterra(t: Any, y: Any, parameters: Any) -> Any:
        growth, hunted, death, fed = parameters[0]
        prey, predators = y[:, :1], y[:, 1:]
        return jnp.concatenate([prey * (growth - hunted * predators), predators * (fed * prey - death)], 1)

    def mlp(t: Any, y: Any, parameters: Any) -> Any:
        weight1, bias1, weight2, bias2 = parameters
        return jnp.tanh(y @ weight1.T + bias1) @ weight2.T + bias2

    def normalise(y: Any, weight: Any, bias: Any) -> Any:
        groups = y.reshape(len(y), field.norm1.num_groups, -1)
        groups = (groups - groups.mean(-1, keepdims=True)) / jnp.sqrt(groups.var(-1, keepdims=True) + field.norm1.eps)
        return groups.reshape(y.shape) * weight[:, None, None] + bias[:, None, None]

    def convolve(t: Any, y: Any, weight: Any, bias: Any) -> Any:
        y = jnp.concatenate([jnp.ones_like(y[:, :1]) * t, y], 1)
        return jax.lax.conv_general_dilated(y, weight, (1, 1), "SAME") + bias[:, None, None]

    def convolution(t: Any, y: Any, parameters: Any) -> Any:
        norm1, conv1, norm2, conv2, norm3 = (parameters[i : i + 2] for i in range(0, 10, 2))
        y = convolve(t, jax.nn.relu(normalise(y, *norm1)), *conv1)
        return normalise(convolve(t, jax.nn.relu(normalise(y, *norm2)), *conv2), *norm3)

    return {LotkaVolterra: lotka_volterra, MLP: mlp, ConvolutionField: convolution}[type(field)]


@dataclass(frozen=True)
class Library:
    """Where a solver comes from: its label in the tables, the package it needs, and how it steps."""

    label: str
    package: str
    per_sample: bool
    solver: Callable[[Case, bool], Any]

    def installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


OURS = Library("odenet_cuda", "odenet_cuda", False, ours)
OURS_PER_SAMPLE = Library("odenet_cuda, per sample", "odenet_cuda", True, ours)
LIBRARIES = (
    OURS,
    Library("torchdiffeq", "torchdiffeq", False, torchdiffeq),
    Library("torchdyn", "torchdyn", False, torchdyn),
    Library("diffrax", "diffrax", False, DiffraxSolver),
    OURS_PER_SAMPLE,
    Library("torchode, per sample", "torchode", True, torchode),
    Library("diffrax, per sample", "diffrax", True, DiffraxSolver),
)
