"""The front door: solve(func, y0, t, ...) -> Solution."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .callbacks import find_callbacks
from .captured import captured_tensors, earlier_results, sequence_number
from .gradients import adjoint as adjoint_gradient
from .gradients import checkpoint as checkpoint_gradient
from .gradients import direct as direct_gradient
from .gradients.adjoint_setup import adjoint_setup
from .integrate import Grid, Options, fixed_grid, integrate, stop_times
from .ops import FIELDS
from .problem import Field, Problem, Structure, check_samples, check_state, check_times, check_tolerance
from .solution import Interpolant, Solution, Stats, failure
from .solvers.checkpoints import Checkpoints
from .solvers.trajectory import Evaluation, Recorder, Trajectory
from .step_control import STEP_CONTROLS, SUCCESS, StepControl

GRADIENTS = ("direct", "adjoint", "checkpoint")
ABSENT_GRADIENTS = ("quadrature",)
FAILURES = ("raise", "return")


def solve(
    func: Callable[[Tensor, Any], Any],
    y0: Any,
    t: Any,
    *,
    method: str = "dopri5",
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    gradient: str = "direct",
    step_control: str = "joint",
    controller: str | tuple[float, float, float] = "I",
    first_step: float | None = None,
    min_step: float = 0.0,
    max_step: float = math.inf,
    max_num_steps: int = 2**31 - 1,
    safety: float = 0.9,
    ifactor: float = 10.0,
    dfactor: float = 0.2,
    step_t: Any = (),
    jump_t: Any = (),
    step_size: float | None = None,
    grid_constructor: Callable | None = None,
    perturb: bool = False,
    interp: str = "method",
    norm: Callable | None = None,
    dense: bool = False,
    on_failure: str = "raise",
    max_checkpoints: int | None = None,
    adjoint_params: Sequence[Tensor] | None = None,
    adjoint_method: str | None = None,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_options: dict[str, Any] | None = None,
) -> Solution:
    """Solves dy/dt = func(t, y), y(t[0]) = y0, and gives the state at every t.

    func: called as ``func(t, y)``; returns dy/dt in the structure of y. t is a 0-dimensional tensor of y's real type, under
        per-sample control a tensor [batch, 1, ...] of y's rank. The tensors it is given are written again after the call.
    y0: a tensor, real or complex, or a tuple, list, dict or nest of them; float16 and bfloat16 are summed in float32, and their
        times have 11 and 8 bits.
    t: [T] times, strictly increasing or decreasing; a tensor (which may require a gradient) or numbers.
    method: adaptive "dopri5", "dopri8", "tsit5", "bosh3", "fehlberg2", "adaptive_heun"; on a grid "euler", "midpoint",
        "heun2", "heun3", "rk4".
    rtol, atol: a step is accepted where norm(error / (atol + rtol * max(|y0|, |y1|))) <= 1. Numbers, tensors that broadcast
        against the state, or one for each leaf.
    gradient: "direct", exact for the discrete solve, memory grows with the steps; "adjoint", one more solve backwards, memory
        does not grow (Chen et al. 2018, arXiv:1806.07366); "checkpoint", as exact as direct, keeps the state of each step
        alone and makes the steps again. All give gradients for y0, t, and every tensor func depends on.
    step_control: "joint", one step size for the whole state; "per_sample", one for each sample on axis 0 of every leaf.
    controller: "I", "PI", "PID" or (proportional, integral, derivative) coefficients (Soderlind 2003).
    first_step, min_step, max_step: step sizes, positive, in units of t. A step of min_step is accepted whatever its error.
    max_num_steps: steps tried from one output to the next before the solve is given up.
    safety, ifactor, dfactor: the next step is the last times a factor in [dfactor, ifactor].
    step_t, jump_t: times at which a step must end; func is discontinuous at those of jump_t.
    step_size, grid_constructor: the grid of a method without error control, else t itself; ``grid_constructor(func, y0, t)``
        returns the times of the grid. perturb: evaluate at the ends of a step just inside it.
    interp: outputs inside a step from the "method"'s own interpolant, "linear", or "cubic" (Hermite).
    norm: of the scaled error, a function of the state; default: the largest of the leaves' root mean squares.
    dense: give a `Solution.interpolant`, at the cost of keeping every step.
    on_failure: "raise" a `SolverError`, or "return" a Solution whose `status` says why and whose `ys` are NaN where the
        solve did not get.
    max_checkpoints: how many states "checkpoint" may keep; steps between are made again, by the binomial schedule (Griewank
        and Walther 2000, doi 10.1145/347837.347846). Default: all.
    adjoint_params: tensors to give gradients to, but not by "direct"; default: all that func depends on. adjoint_method,
        adjoint_rtol, adjoint_atol, adjoint_options: for the backward solve, by default as forward. Options by name as
        above, and ``{"norm": "seminorm"}`` leaves the parameters out of its error norm (Kidger et al. 2021,
        arXiv:2009.09457), or a function of the tuple (t, y, adjoint, *params).

    Raises ValueError, TypeError: an argument is wrong; the message names it. NotImplementedError: not part of this version.
    SolverError: the solve failed; it has the sample, the time, the step and the last accepted state.

    Source: Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, II.4 to II.6.

    >>> import torch
    >>> from odenet_cuda import solve
    >>> solution = solve(lambda t, y: -y, torch.ones(1), [0.0, 1.0])
    >>> round(float(solution.ys[-1, 0]), 4)
    0.3679
    """
    options = Options(
        method=method,
        control=StepControl(controller, safety, ifactor, dfactor, float(min_step), float(max_step), max_num_steps),
        first_step=None if first_step is None else float(first_step),
        step_t=stop_times("step_t", step_t),
        jump_t=stop_times("jump_t", jump_t),
        step_size=None if step_size is None else float(step_size),
        grid_constructor=grid_constructor,
        perturb=perturb,
        interp=interp,
    )
    _one_of("step_control", step_control, STEP_CONTROLS)
    _one_of("on_failure", on_failure, FAILURES)
    if gradient in ABSENT_GRADIENTS:
        raise NotImplementedError(f"gradient={gradient!r} is not part of this version of odenet_cuda; there are {GRADIENTS}")
    _one_of("gradient", gradient, GRADIENTS)
    _check_checkpoints(max_checkpoints, gradient)
    _refuse_transforms()
    structure = check_state(y0)
    times, values = check_times(t)
    per_sample = step_control == "per_sample"
    if per_sample:
        check_samples(structure)
        if not options.adaptive:
            raise ValueError(f"step_control='per_sample' needs an adaptive method, got {method!r}, which has no step control")
    field = Field(func, structure)
    problem = Problem(
        field=field,
        leaves=[leaf.detach().contiguous() for leaf in structure.leaves],
        t=values,
        direction=-1.0 if len(values) > 1 and values[1] < values[0] else 1.0,
        per_sample=per_sample,
        rtol=check_tolerance("rtol", rtol, structure),
        atol=check_tolerance("atol", atol, structure),
        norm=None if norm is None else lambda leaves: norm(structure.unflatten(leaves)),
    )
    backward = None
    if gradient == "adjoint":
        given = (adjoint_method, adjoint_rtol, adjoint_atol, adjoint_options)
        backward = adjoint_setup(func, problem, structure, options, *given, check=adjoint_params is None)
    grid = None
    if not options.adaptive:
        grid = fixed_grid(options, values, func, y0, times)
    checkpoints = None
    if gradient == "checkpoint":
        checkpoints = Checkpoints(max_checkpoints, None if grid is None else len(grid[0]) - 1)
    job = _Solve(problem, options, structure, times, dense, grid)
    return job.run(gradient, backward, checkpoints, adjoint_params, on_failure)


class _Solve:
    """One solve with what surrounds it: which tensors get gradients, recording, failure, and the Solution."""

    def __init__(self, problem: Problem, options: Options, structure: Structure, t: Tensor, dense: bool, grid: Grid | None):
        self.problem, self.options, self.structure, self.t, self.dense, self.grid = (
            problem,
            options,
            structure,
            t,
            dense,
            grid,
        )
        self.field: Any = problem.field

    def run(
        self,
        gradient: str,
        backward: Any,
        checkpoints: Checkpoints | None,
        params: Sequence[Tensor] | None,
        on_failure: str,
    ) -> Solution:
        wanted = torch.is_grad_enabled() and len(self.problem.t) > 1 and self.problem.leaves[0].numel() > 0
        since = sequence_number() if wanted else 0
        start, captured, closed = self._probe(gradient, params, since) if wanted else (None, [], True)
        inputs = [*self.structure.leaves, self.t, *captured]
        wanted = wanted and any(tensor.requires_grad for tensor in inputs)
        graphs = wanted and gradient == "direct"
        recorder: Any = None
        states = checkpoints if wanted else None
        if graphs or self.dense or states is not None:
            keep = dict(graphs=graphs, checkpoints=states, dense=self.dense, t_grad=self.t.requires_grad)
            recorder = self._recorder(**keep)
        trajectory = integrate(
            self.problem,
            self.options,
            callbacks=find_callbacks(self.field.func, self.structure, self.options.adaptive),
            recorder=recorder,
            start=start,
            grid=self.grid,
        )
        stats = self._stats(trajectory)
        ys = trajectory.ys
        error = self._failure(trajectory, ys, stats)
        if error is not None and on_failure == "raise":
            raise error
        y0 = self.structure.leaves
        if graphs:
            captured = direct_gradient.find_captured(self.field, recorder.tape, since, captured, closed)
            ys = direct_gradient.attach(recorder, self.problem, ys, y0, self.t, captured, stats)
        elif wanted:
            if params is None and not closed:
                captured = self._captured_at_end(trajectory, captured, since)
                stats.nfe = self.field.nfe
            if states is not None:
                check = "" if params is not None else "first" if closed else "all"
                ys = checkpoint_gradient.attach(recorder, self.problem, ys, y0, self.t, captured, stats, check)
            else:
                ys = adjoint_gradient.attach(backward, self.problem, ys, y0, self.t, captured, stats)
        elif len(self.problem.t) == 1 and torch.is_grad_enabled():
            ys = [leaf[None].clone() for leaf in y0]
        return self._solution(ys, trajectory, recorder, stats)

    def _probe(
        self, gradient: str, params: Sequence[Tensor] | None, since: int
    ) -> tuple[Evaluation | None, list[Tensor], bool]:
        """f(t0, y0) with its graph, the tensors outside of func that get gradients, and whether func can have no others."""
        parameters = list(self.field.func.parameters()) if isinstance(self.field.func, torch.nn.Module) else []
        if params is not None:
            return None, [param for param in params if param.requires_grad], True
        problem = self.problem
        if self.options.perturb:
            times = torch.full((1, problem.rows), problem.t[0], dtype=problem.real)
            times = torch.nextafter(times, torch.full_like(times, problem.direction * math.inf))
        else:
            times = torch.full((1, problem.rows), problem.t[0], dtype=problem.real)
        t0 = problem.time_views(times.to(problem.device))[0]
        recorder = self._recorder(graphs=True, t_grad=self.t.requires_grad)
        y_grad = self.t.requires_grad or any(leaf.requires_grad for leaf in self.structure.leaves)
        start = recorder.evaluate(self.field, t0, [leaf.detach().clone() for leaf in problem.leaves], y_grad)
        found, earlier = captured_tensors(start.k, [start.t, *start.y], since)
        known: dict[int, Tensor] = {id(tensor): tensor for tensor in parameters if tensor.requires_grad}
        closed = bool(parameters) and not earlier and all(id(tensor) in known for tensor in found)
        known.update((id(tensor), tensor) for tensor in found)
        if earlier:
            results = earlier_results(lambda: self.field(start.t, start.y), since)
            known.update((id(tensor), tensor) for tensor in results)
        if gradient != "direct":
            start = Evaluation(start.t, start.y, [slope.detach() for slope in start.k])
        return start, list(known.values()), closed

    def _recorder(self, **keep: Any) -> Recorder:
        tableau = self.options.tableau
        return Recorder(
            tableau, self.problem.t, self.problem.per_sample, carried=self.options.adaptive and not tableau.fsal, **keep
        )

    def _captured_at_end(self, trajectory: Trajectory, captured: list[Tensor], since: int) -> list[Tensor]:
        """captured, and what func depends on at the end but not at the start: it may branch on the time."""
        problem = self.problem
        times = torch.full((1, problem.rows), problem.t[-1], dtype=problem.real, device=problem.device)
        recorder = self._recorder(graphs=True)
        y = [leaf.detach().clone() for leaf in trajectory.last]
        end = recorder.evaluate(self.field, problem.time_views(times)[0], y)
        return direct_gradient.find_captured(self.field, [end], since, captured, False)

    def _stats(self, trajectory: Trajectory) -> Stats:
        state = trajectory.state
        if state is not None:
            counts = state[FIELDS["num_accepted"]], state[FIELDS["num_rejected"]]
        else:
            rows = self.problem.rows
            steps = len(self.grid[0]) - 1 if self.grid is not None and self.problem.leaves[0].numel() else 0
            counts = torch.full((rows,), steps), torch.zeros(rows, dtype=torch.int64)
        return Stats(self.field.nfe, *counts, self.problem.per_sample)

    def _failure(self, trajectory: Trajectory, ys: list[Tensor], stats: Stats):
        if trajectory.state is None:
            return None
        state = trajectory.state.cpu().numpy()
        if (state[FIELDS["status"]] == SUCCESS).all():
            return None
        last = self._solution(ys, trajectory, None, stats)
        error = failure(state, last, self.options.control.max_num_steps)
        if error is not None:
            reached = torch.from_numpy(state[FIELDS["output_end"]]).to(ys[0].device)
            missing = torch.arange(len(self.problem.t), device=ys[0].device)[:, None] >= reached  # [T, rows]
            for out in ys:
                columns = [missing.shape[1], *[1] * (out.dim() - 2)] if out.dim() > 1 else []
                out.masked_fill_(missing.reshape(-1, *columns), math.nan)
        return error

    def _solution(self, ys: list[Tensor], trajectory: Trajectory, recorder: Recorder | None, stats: Stats) -> Solution:
        interpolant = None
        t = torch.tensor(self.problem.t, dtype=torch.float64, device=self.problem.device)
        if self.dense and recorder is not None:
            interpolant = Interpolant(
                self.options.tableau,
                recorder.dense_steps,
                [x.clone() for x in self.problem.leaves],
                t,
                self.structure.unflatten,
            )
        return Solution(
            ys=self.structure.unflatten(ys),
            t=t,
            stats=stats,
            y_last=self.structure.unflatten([leaf.detach() for leaf in trajectory.last]),
            interpolant=interpolant,
            per_sample=self.problem.per_sample,
            _state=trajectory.state,
        )


def _refuse_transforms() -> None:
    """What would otherwise be silently wrong, or fail in obscure words, inside the kernels."""
    if forward_ad._current_level >= 0:
        raise NotImplementedError("forward-mode derivatives are not part of this version of odenet_cuda; use backward mode")
    if torch._C._functorch.maybe_current_level() is not None:
        raise NotImplementedError("torch.func transforms of a solve are not part of this version of odenet_cuda; use autograd")


def _check_checkpoints(limit: Any, gradient: str) -> None:
    if limit is None:
        return
    if gradient != "checkpoint":
        raise ValueError(f"max_checkpoints needs gradient='checkpoint', got gradient={gradient!r}")
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise ValueError(f"max_checkpoints must be a whole number of at least 1, got {limit!r}")


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
