"""Costs of a trajectory that make an equation easier to solve, given by its solve as differentiable numbers.

"kinetic": the integral of mean |f|^2; "jacobian": that of mean |eps^T df/dy|^2, with Gaussian noise eps drawn once a solve,
whose expectation is the squared Frobenius norm of df/dy over the size of y (Finlay et al. 2020, arXiv:2002.02798).
"error": the sum over accepted steps of |dt| times the root mean square of the embedded error estimate, "stiffness": that of
|k_i - k_j| / |Y_i - Y_j| over the last two stages that lie at the end of a step (Pal et al. 2021, arXiv:2105.03918).

Means are over the elements of the whole state, under per-sample control over those of each sample.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .formulas import stage, widened
from .integrals import Integrand, with_quadratures
from .problem import Field, Problem, Structure
from .solvers.trajectory import Step
from .tableau import ButcherTableau

RUNNING = ("kinetic", "jacobian")  # integrals over time
OF_STEPS = ("error", "stiffness")  # sums over steps, which have no continuous form
REGULARIZERS = (*RUNNING, *OF_STEPS)
_SMALLEST = 1e-30  # of a mean square whose root is taken: the root has no derivative at zero


def check_regularizers(names: Any, tableau: ButcherTableau, method: str, gradient: str) -> tuple[str, ...]:
    """The names as asked for. Raises ValueError where one is unknown, given twice, or not served by the method or gradient."""
    if isinstance(names, str) or not all(name in REGULARIZERS for name in names) or len(set(names)) < len(names):
        raise ValueError(f"regularizers must name each of {REGULARIZERS} at most once, got {names!r}")
    for name in names:
        if name in OF_STEPS and gradient not in ("direct", "checkpoint"):
            raise ValueError(
                f"regularizers: {name!r} is a sum over steps, which has no continuous form, so gradient={gradient!r} has no "
                "gradient of it; use gradient='direct' or 'checkpoint'"
            )
        if name == "error" and not tableau.e:
            raise ValueError(f"regularizers: 'error' needs a method with an error estimate, got method={method!r}")
        if name == "stiffness" and len(_ends(tableau)) < 2:
            raise ValueError(f"regularizers: 'stiffness' needs two stages at the end of a step, as dopri5 has, got {method!r}")
    return tuple(names)


def mean_square(leaves: Sequence[Tensor], rows: int) -> Tensor:
    """The mean of |x|^2 over the elements of all leaves, for each of the rows, [rows]."""
    parts = [torch.view_as_real(x) if x.is_complex() else x for x in leaves]
    count = sum(leaf.numel() for leaf in leaves) // rows
    return torch.stack([widened(x).reshape(rows, -1).square().sum(1) for x in parts]).sum(0) / count


class CostField(Field):
    """func and the rates of running costs and of integrals, which come as further leaves after the slopes."""

    def __init__(
        self,
        func: Any,
        structure: Structure,
        names: Sequence[str],
        per_sample: bool,
        noise: Sequence[Tensor] = (),
        integrand: Integrand | None = None,
    ):
        super().__init__(func, structure)
        self.names, self.per_sample, self.noise, self.integrand = names, per_sample, noise, integrand
        if "jacobian" in names and not noise:
            self.noise = [torch.randn_like(leaf.detach()) for leaf in structure.leaves]

    def again(self) -> "CostField":
        return CostField(self.func, self.structure, self.names, self.per_sample, self.noise, self.integrand)

    def __call__(self, t: Tensor, y: Sequence[Tensor], stage: int = 0) -> list[Tensor]:
        rows = y[0].shape[0] if self.per_sample else 1
        recording = torch.is_grad_enabled()
        inputs = list(y)
        if "jacobian" in self.names:
            inputs = [leaf if recording and leaf.requires_grad else leaf.detach().requires_grad_() for leaf in y]
            with torch.enable_grad():
                k = super().__call__(t, inputs, stage)
        else:
            k = super().__call__(t, inputs, stage)
        costs = []
        for name in self.names:
            rate = mean_square(k if name == "kinetic" else self._products(k, inputs, recording), rows)
            costs.append(rate if self.per_sample else rate[0])
        if self.integrand is not None:
            costs += self.integrand.rates(t, y)
        if "jacobian" in self.names and not recording:
            k = [slope.detach() for slope in k]
        return [*k, *costs]

    def _products(self, k: Sequence[Tensor], y: Sequence[Tensor], recording: bool) -> list[Tensor]:
        """eps^T df/dy, a leaf each."""
        pairs = [(slope, noise) for slope, noise in zip(k, self.noise, strict=True) if slope.requires_grad]
        grads: Sequence[Tensor | None] = [None] * len(y)
        if pairs:
            slopes, noise = zip(*pairs, strict=True)
            grads = torch.autograd.grad(
                slopes, y, noise, retain_graph=True, create_graph=recording, allow_unused=True, materialize_grads=False
            )
        return [torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(grads, y, strict=True)]


def with_costs(problem: Problem, names: Sequence[str]) -> Problem:
    """The problem with the running costs as quadratures, whose errors do not count."""
    kind = torch.promote_types(problem.real, torch.float32)
    shape = [problem.rows] if problem.per_sample else []
    return with_quadratures(problem, [torch.zeros(shape, dtype=kind, device=problem.device) for _ in names], False)


class StepCosts:
    """The costs of single steps, and their derivatives by what the step is made of."""

    def __init__(self, names: Sequence[str], tableau: ButcherTableau, per_sample: bool, leaves: int):
        self.names, self.tableau, self.per_sample, self.leaves = names, tableau, per_sample, leaves
        self.totals: list[Any] = [0.0 for _ in names]

    def add(self, step: Step) -> None:
        with torch.no_grad():
            k, ends, dt = self._parts(step)
            for i, cost in enumerate(self._costs(k, ends, dt)):
                counted = cost if step.accept is None else torch.where(step.accept, cost, 0.0)
                self.totals[i] = self.totals[i] + (counted if self.per_sample else counted[0])

    def sums(self, problem: Problem) -> list[Tensor]:
        """Over all steps so far, float64, 0-dimensional or [rows]."""
        zeros = torch.zeros(problem.rows if self.per_sample else (), dtype=torch.float64, device=problem.device)
        return [zeros + total for total in self.totals]

    def gradients(self, step: Step, cotangents: Sequence[Tensor]) -> tuple[list[list[Any]], dict[int, list[Tensor]], Tensor]:
        """By each slope [stages][leaves], by the state at the stages {stage: leaves}, and by dt [rows]."""
        k, ends, dt = self._parts(step)
        flat = [leaf.requires_grad_() for state in (*k, *ends.values()) for leaf in state]
        dt.requires_grad_()
        with torch.enable_grad():
            costs = self._costs(k, ends, dt)
            weights = [g.reshape(-1) if step.accept is None else g * step.accept for g in cotangents]
            total = torch.stack([(cost * weight).sum() for cost, weight in zip(costs, weights, strict=True)]).sum()
            grads = list(torch.autograd.grad(total, [*flat, dt], allow_unused=True))
        by_dt = grads.pop()
        states = [grads[i : i + self.leaves] for i in range(0, len(grads), self.leaves)]
        by_ends = {
            i: [torch.zeros_like(y) if g is None else g for g, y in zip(state, ends[i], strict=True)]
            for i, state in zip(ends, states[len(k) :], strict=True)
        }
        return states[: len(k)], by_ends, torch.zeros_like(dt) if by_dt is None else by_dt.detach()

    def _parts(self, step: Step) -> tuple[list[list[Tensor]], dict[int, list[Tensor]], Tensor]:
        k = [[leaf.detach() for leaf in of_stage[: self.leaves]] for of_stage in step.k]
        ends = {}
        if "stiffness" in self.names:
            for i in _ends(self.tableau)[-2:]:
                evaluation = step.evaluations[i - 1]
                assert evaluation is not None
                ends[i] = [leaf.detach() for leaf in evaluation.y]
        dt = torch.as_tensor(step.dt, dtype=torch.float64, device=k[0][0].device).reshape(-1).clone()
        return k, ends, dt

    def _costs(self, k: list[list[Tensor]], ends: dict[int, list[Tensor]], dt: Tensor) -> list[Tensor]:
        rows, costs = len(dt), []
        for name in self.names:
            if name == "error":
                parts = [stage(None, [widened(s[leaf]) for s in k], self.tableau.e, 1.0) for leaf in range(self.leaves)]
                costs.append(dt.square() * _root(mean_square(parts, rows)).to(dt.dtype))
            else:
                (i, y_i), (j, y_j) = ends.items()
                rise = mean_square([a - b for a, b in zip(k[i], k[j], strict=True)], rows)
                run = mean_square([a - b for a, b in zip(y_i, y_j, strict=True)], rows)
                costs.append(_root(rise) / _root(run))
        return costs


def _root(x: Tensor) -> Tensor:
    return x.clamp_min(_SMALLEST).sqrt()


def _ends(tableau: ButcherTableau) -> list[int]:
    """Stages at the end of a step."""
    return [i for i, c in enumerate(tableau.c) if c == 1]
