"""Where a system comes to rest, and how that depends on what it is made of."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import transforms
from .formulas import rms_norm, widened
from .gradients.gmres import gmres
from .graphed.capture import no_cast_is_kept
from .integrate import integrate
from .interpolant import State
from .methods import ADAPTIVE, find_method
from .ops import FIELDS
from .outcome import failed, solution_of, stats_of
from .problem import Problem
from .request import Request
from .settings import settings_by_name
from .solution import SolverError, Stats
from .step_control import SUCCESS


@dataclass(frozen=True, eq=False)
class SteadyState(Generic[State]):
    """y: the state at rest, in the structure of y0, with a gradient. t: float64, the time at which func had settled,
    0-dimensional, under per-sample control [batch]. residual: the root mean square of func over its tolerance there, at most 1,
    as t. stats: of the solve, see `Stats`."""

    y: State
    t: Tensor
    residual: Tensor
    stats: Stats


def steady_state(
    func: Callable[..., Any],
    y0: State,
    args: Sequence[Any] = (),
    *,
    rtol: float = 1e-6,
    atol: float = 1e-8,
    max_time: float = 1e6,
    max_num_steps: int = 100_000,
    method: str = "dopri5",
    step_control: str | None = None,
    step_rtol: float | None = None,
    step_atol: float | None = None,
    valid: Callable[[Any], Any] | None = None,
) -> SteadyState[State]:
    """Solves dy/dt = func(t, y) from y0 at t = 0 until func has settled: the root mean square of func / (atol + rtol |y|) is at
    most 1, for each sample, under joint control for the whole state.

    func, args: as for `solve`; func is not to depend on t. rtol, atol: in the units of y for a unit of time.
    max_time, max_num_steps: until which it must have settled. method: adaptive, with func at the end of a step as its last
        slope: "dopri5", "tsit5", "bosh3", and for stiff systems "rodas5p", "kvaerno5" and the like. step_rtol, step_atol:
        tolerances of the steps, by default a hundredth of the others, but at least four units in the last place.
    step_control: by default "per_sample" where every leaf of y0 has axes besides that of samples, else "joint": the numbers of
        a state with one axis may depend on each other.
    valid: as of `solve`.

    y has gradients for all that func depends on, by the implicit function theorem: with func(y; theta) = 0 they are
    -g (df/dy)^-1 df/dtheta, where g (df/dy)^-1 comes from vector-Jacobian products alone (GMRES, for each sample). y0 gets
    none: a steady state does not depend on it. They are as exact as y is: by rtol and atol.

    Raises ValueError and TypeError for wrong arguments; SolverError where func does not settle, or the solve fails;
    in the backward pass RuntimeError where df/dy is singular: the steady state is one of many.

    >>> import torch
    >>> from odenet_cuda import steady_state
    >>> rate = torch.tensor(2.0, requires_grad=True)
    >>> rest = steady_state(lambda t, y: rate - y, torch.zeros(1, 1))
    >>> rest.y.sum().backward()
    >>> round(rest.y.item(), 4), round(rate.grad.item(), 4)
    (2.0, 1.0)
    """
    _check(rtol, atol, max_time, method)
    settings = settings_by_name(method=method, step_control=step_control or _control_of(y0), max_num_steps=max_num_steps)
    with torch.no_grad(), no_cast_is_kept():
        tolerances = step_rtol, step_atol
        request = Request(
            func, y0, [0.0, float(max_time)], args, settings, *_of_steps(y0, rtol, atol, *tolerances), valid=valid
        )
        request.compiled = None
        found, settled = _solved(request, rtol, atol)
    problem, time = request.problem, problem_time(request.problem, settled.t)
    leaves = [leaf.detach().clone() for leaf in found.last]
    if torch.is_grad_enabled() and not problem.empty:
        leaves = _attached(problem, time, leaves)
    t, residual = (x if problem.per_sample else x[0] for x in (settled.t, settled.residual))
    return SteadyState(request.structure.unflatten(leaves), t, residual, stats_of(request, found))


def _check(rtol: Any, atol: Any, max_time: Any, method: str) -> None:
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not (isinstance(value, (int, float)) and 0 <= value < math.inf):
            raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
    if not 0 < max_time < math.inf:
        raise ValueError(f"max_time must be a finite number above 0, got {max_time!r}")
    if method not in ADAPTIVE or not find_method(method).fsal:
        served = "dopri5, tsit5, bosh3, rodas5p, kvaerno5 or rosenbrock23"
        raise ValueError(f"method must be adaptive and end its steps with the slope there: {served}, got {method!r}")
    if transforms.active():
        raise NotImplementedError("steady_state is not served inside torch.func transforms and forward mode")


def _control_of(y0: Any) -> str:
    leaves = [x for x in torch.utils._pytree.tree_leaves(y0) if isinstance(x, Tensor)]
    return "per_sample" if all([x.dim() > 1 for x in leaves]) else "joint"


def _of_steps(y0: Any, rtol: float, atol: float, step_rtol: float | None, step_atol: float | None) -> tuple[float, float]:
    leaves = [
        x for x in torch.utils._pytree.tree_leaves(y0) if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())
    ]
    eps = max([torch.finfo(x.dtype).eps for x in leaves], default=0.0)
    return (
        max(rtol / 100, 4 * eps) if step_rtol is None else step_rtol,
        max(atol / 100, 1e-30) if step_atol is None else step_atol,
    )


def problem_time(problem: Problem, t: Tensor) -> Tensor:
    """Times of the rows as func sees them."""
    return problem.time_views(t.to(problem.real)[None])[0]


class _Settling:
    """Holds each row at the end of the step after which func has settled. Nothing in here waits for the device."""

    def __init__(self, problem: Problem, rtol: float, atol: float):
        self.problem, self.rtol, self.atol, self.n = problem, rtol, atol, len(problem.state_leaves)
        self.settled = torch.zeros(problem.rows, dtype=torch.bool, device=problem.device)
        self.t = torch.zeros(problem.rows, dtype=torch.float64, device=problem.device)
        self.residual = torch.full_like(self.t, math.inf)

    def after_step(self, state: Tensor, stepper: Any) -> None:
        parts = []
        for slope, y in zip(stepper.k[-1][: self.n], stepper.y[-1], strict=True):
            parts.append(rms_norm(widened(slope) / (self.atol + self.rtol * widened(y).abs()), self.problem.rows))
        residual, time = torch.stack(parts).amax(0).double(), state[FIELDS["time"]]
        moved = state[FIELDS["accept"]] != 0
        rows = moved & (residual <= 1)
        self.settled |= rows
        self.residual = torch.where(moved, residual, self.residual)
        self.t = torch.where(moved, time, self.t)
        state[FIELDS["status"]].masked_fill_(rows, float(SUCCESS))
        state[FIELDS["dt"]].masked_fill_(rows, 0.0)
        state[FIELDS["step_end"]].copy_(torch.where(rows, time, state[FIELDS["step_end"]]))


def _solved(request: Request, rtol: float, atol: float) -> tuple[Any, _Settling]:
    problem = request.problem
    settling = _Settling(problem, rtol, atol)
    found = integrate(problem, request.options, events=settling)  # type: ignore[arg-type]
    stats = stats_of(request, found)
    state = found.host_state()
    if state is None:
        return found, settling
    if bool((state[FIELDS["status"]] != SUCCESS).any()):
        failed(request, problem, found, found.ys, stats)
    restless = ~settling.settled.cpu()
    if bool(restless.any()):
        row = int(restless.nonzero()[0])
        where = f" in sample {row} of {problem.rows} ({int(restless.sum())} do not)" if problem.per_sample else ""
        t, dt = (float(state[FIELDS[name], row]) for name in ("time", "last_dt"))
        raise SolverError(
            f"func does not settle{where}: at t = {t:.9g} it is still {float(settling.residual[row]):.3g} times its tolerance. "
            "Remedy: a larger max_time, looser rtol and atol, or tighter step_rtol and step_atol where func is large against "
            "them; a cycle or growth has no steady state. The last state is in `y` of this exception",
            status="not settled",
            sample=row if problem.per_sample else None,
            t=t,
            dt=dt,
            solution=solution_of(request, problem, found.ys, found, None, stats),
        )
    return found, settling


# ---- the gradient -----------------------------------------------------------------------------------------------------


def _attached(problem: Problem, t: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """The state, with a gradient for what func depends on."""
    field: Any = problem.field
    k = field(t, leaves)
    if not any([slope.requires_grad for slope in k]):
        return leaves
    if any([leaf.is_complex() for leaf in leaves]):
        raise NotImplementedError(
            "steady_state has no gradient for complex states: give real and imaginary parts as real numbers"
        )
    return list(_Implicit.apply(problem, t, len(leaves), *leaves, *k))


class _Implicit(torch.autograd.Function):
    """y of f(y; theta) = 0 as a function of the value of f there: dy = -(df/dy)^-1 df."""

    @staticmethod
    def forward(ctx, problem, t, count, *tensors):
        ctx.problem, ctx.count = problem, count
        ctx.save_for_backward(t, *tensors[:count])
        ctx.set_materialize_grads(True)
        return tuple([leaf.clone() for leaf in tensors[:count]])

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        problem, n = ctx.problem, ctx.count
        t, *leaves = ctx.saved_tensors
        found = _transposed_solve(problem, t, leaves, list(grads))
        return None, None, None, *[None] * n, *[-x for x in found]


def _transposed_solve(problem: Problem, t: Tensor, leaves: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """v with v df/dy = g. Raises RuntimeError where there is none."""
    rows, kind = problem.rows, torch.promote_types(torch.float32, leaves[0].dtype)
    field: Any = problem.field
    with torch.enable_grad():
        y = [leaf.detach().requires_grad_() for leaf in leaves]
        k = field.again()(t.detach(), y)
    used = [i for i, slope in enumerate(k) if slope.requires_grad]

    def flat(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([x.to(kind).reshape(rows, -1) for x in parts], 1)

    def parted(v: Tensor) -> list[Tensor]:
        pieces = v.split([leaf.numel() // rows for leaf in leaves], 1)
        return [x.reshape(leaf.shape).to(leaf.dtype) for x, leaf in zip(pieces, leaves, strict=True)]

    def product(v: Tensor) -> Tensor:
        parts = parted(v)
        of_k, of_v = [k[i] for i in used], [parts[i] for i in used]
        found = torch.autograd.grad(of_k, y, of_v, retain_graph=True, allow_unused=True) if used else [None] * len(y)
        return flat([torch.zeros_like(leaf) if x is None else x for x, leaf in zip(found, leaves, strict=True)])

    rtol = 1e-10 if kind is torch.float64 else 1e-5
    v, left = gmres(product, flat(grads), rtol)
    if not bool((left <= 1e3 * rtol).all()):
        row = int((~(left <= 1e3 * rtol)).nonzero()[0])
        where = f" of sample {row}" if problem.per_sample else ""
        raise RuntimeError(
            f"steady_state: the linear system for the gradient{where} has no solution, its residual is {float(left[row]):.3g}: "
            "df/dy is singular there, as where a quantity is conserved or the steady state is one of many. Remedy: leave such "
            "a direction out of the state, or differentiate a solve to a fixed time"
        )
    return parted(v)
