"""Solves by scipy's solvers, on the host, outside of torch: for a second opinion, and for programs that ask for them by
name."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..ops import FIELDS
from ..problem import Problem
from ..step_control import MAX_NUM_STEPS, NON_FINITE, SCIPY_FAILED, SUCCESS, initial_state
from .trajectory import Evaluation, Trajectory

SOLVERS = {"LSODA": "rodas5p", "Radau": "rodas5p", "BDF": "rodas5p", "RK45": "dopri5", "RK23": "bosh3", "DOP853": "dopri8"}


@dataclass(frozen=True)
class ScipyMethod:
    """A solver of scipy.integrate by its name. Raises ValueError where there is none of that name."""

    solver: str = "LSODA"
    order: ClassVar[int] = 1  # nothing goes by it
    stages: ClassVar[int] = 1
    fsal: ClassVar[bool] = True
    e: ClassVar[tuple[float, ...]] = ()
    c: ClassVar[tuple[float, ...]] = ()

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"solver must be one of {tuple(SOLVERS)}, got {self.solver!r}")

    @property
    def backward(self) -> str:
        """The method of this package that solves the adjoint's equation."""
        return SOLVERS[self.solver]

    def linear(self) -> "ScipyMethod":
        """Outputs inside a step are always its own."""
        return self

    cubic = linear


class ScipySteps:
    """In place of a family of steps, see `families.Family`: it has none."""

    looks: ClassVar[bool] = True
    steers: ClassVar[bool] = False
    no_way_back: ClassVar[str] = "cannot be an adjoint_method: give one of this package, or none"
    no_graph: ClassVar[str] = "runs on the host"

    @staticmethod
    def refusal(problem: Problem, recorder: Any) -> str:
        served = (
            "solves outside of torch, which sees no steps of it: use gradient='adjoint' (odeint_adjoint) for gradients, and "
            "another method for "
        )
        if recorder is not None:
            return served + "gradient='direct', 'checkpoint' and 'quadrature', dense=True and regularizers"
        if problem.per_sample or problem.norm is not None or problem.quadratures:
            return served + "step_control='per_sample', a norm and regularizers"
        return ""


class ScipySolver:
    """One solve. A solve that fails has a solver state that says why, as an adaptive one."""

    def __init__(
        self,
        problem: Problem,
        method: ScipyMethod,
        first_step: float | None,
        max_step: float,
        max_num_steps: int,
        callbacks: dict[str, Callable] | None = None,
    ):
        try:
            from scipy import integrate
        except ImportError:
            raise ImportError(
                "method='scipy_solver' needs scipy: pip install scipy, or use a method of odenet_cuda, such as rodas5p"
            ) from None
        if callbacks:
            warnings.warn(f"method='scipy_solver' does not support callbacks {set(callbacks)}", stacklevel=4)
        self.problem, self.max_num_steps = problem, max_num_steps
        self.make: Callable[..., Any] = getattr(integrate, method.solver)
        self.options: dict[str, Any] = {"max_step": max_step, "rtol": self._tolerance("rtol"), "atol": self._tolerance("atol")}
        if first_step is not None:
            self.options["first_step"] = first_step
        self.call: Evaluation | None = None

    def _tolerance(self, name: str) -> Any:
        """A number, or one for each number of the state."""
        given = getattr(self.problem, name)
        if all([isinstance(tol, float) and tol == given[0] for tol in given]):
            return given[0]
        pairs = zip(given, self.problem.leaves, strict=True)
        parts = [torch.as_tensor(tol, device=leaf.device).expand(leaf.shape) for tol, leaf in pairs]
        numbers = [
            torch.stack([x, x], -1) if leaf.is_complex() else x for x, leaf in zip(parts, self.problem.leaves, strict=True)
        ]
        return torch.cat([x.double().reshape(-1).cpu() for x in numbers]).numpy()

    def run(self, start: Evaluation | None = None) -> Trajectory:
        problem = self.problem
        t, steps, code, words = problem.t, 0, SUCCESS, ""
        y = _numbers(problem.leaves)
        rows, solver = [y], None
        try:
            if not np.isfinite(y).all():
                raise _NoNumber(t[0])
            solver = self.make(self._slopes, t[0], y, t[-1], **self.options)
            since = 0  # the last output
            while solver.status == "running":
                if steps - since >= self.max_num_steps:
                    code = MAX_NUM_STEPS
                    break
                message = solver.step()
                if solver.status == "failed":
                    code, words = SCIPY_FAILED, f"{type(solver).__name__} of scipy gave up: {message}"
                    break
                steps += 1
                inside = None
                while len(rows) < len(t) and problem.direction * (solver.t - t[len(rows)]) >= 0:
                    inside = inside or solver.dense_output()
                    at = t[len(rows)]
                    rows.append(solver.y.copy() if at == solver.t else inside(at))
                    since = steps
            reached, y = solver.t, solver.y
        except _NoNumber as error:
            code, reached = NON_FINITE, error.t
            y = rows[0] if solver is None else solver.y
        outputs = len(rows)
        rows += [np.full_like(y, np.nan)] * (len(t) - outputs)
        ys = self._leaves(np.stack(rows))
        state = initial_state(reached, 1, problem.direction)
        for name, value in (("status", code), ("num_accepted", steps), ("output_end", outputs)):
            state[FIELDS[name]] = value
        last = [leaf[0] for leaf in self._leaves(y[None])]
        whole = torch.from_numpy(state).to(problem.device)
        return Trajectory(ys=ys, last=last, state=whole, call=self.call, words=words)

    def _slopes(self, t: float, y: np.ndarray) -> np.ndarray:
        problem = self.problem
        state = [leaf[0] for leaf in self._leaves(y[None])]
        time = torch.tensor(t, dtype=problem.real, device=problem.device)
        slopes = problem.field(time, state, 0)
        self.call = Evaluation(time, state, slopes)
        k = _numbers(slopes)
        if not np.isfinite(k).all():
            raise _NoNumber(t)
        return k

    def _leaves(self, rows: np.ndarray) -> list[Tensor]:
        """The leaves of the states in these rows, [rows, ...]."""
        found, begin = [], 0
        for leaf in self.problem.leaves:
            end = begin + leaf.numel() * (2 if leaf.is_complex() else 1)
            kind = torch.float64 if leaf.is_complex() else leaf.dtype
            part = torch.from_numpy(np.ascontiguousarray(rows[:, begin:end])).to(leaf.device, kind)
            shape = (len(rows), *leaf.shape)
            part = torch.view_as_complex(part.reshape(*shape, 2)).to(leaf.dtype) if leaf.is_complex() else part.reshape(shape)
            found.append(part.clone())
            begin = end
        return found


class _NoNumber(ArithmeticError):
    """func gave something that is none, at this time: some solvers of scipy would go on for ever."""

    def __init__(self, t: float):
        super().__init__(t)
        self.t = t


def _numbers(leaves: Any) -> np.ndarray:
    """All of a state, float64."""
    parts = [torch.view_as_real(x.detach().resolve_conj()) if x.is_complex() else x.detach() for x in leaves]
    found: np.ndarray = torch.cat([x.double().reshape(-1).cpu() for x in parts]).numpy()
    return found
