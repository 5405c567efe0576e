"""Problem -> solver -> trajectory, with no thought of gradients."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from .coupled import couple, coupled, doubled, is_coupled, of_one, uncoupled
from .graphed.loops import Kind, solve_by_graph
from .landing import lands, with_outputs
from .methods import ADAPTIVE, INTERPOLATIONS, adjusted, find_method
from .problem import Problem, check_times
from .ranges import marked
from .solvers import short
from .solvers.adaptive import AdaptiveSolver
from .solvers.events import EventWatch
from .solvers.families import family_of
from .solvers.fixed import FixedSolver, outputs_of_steps, uniform_grid
from .solvers.hooks import AfterStep, Looker, runs_ahead
from .solvers.progress import Progress
from .solvers.scipy_solver import ScipyMethod, ScipySolver
from .solvers.start import Resumed, stop_table
from .solvers.stepped import SteppedSolver
from .solvers.trajectory import Evaluation, Recorder, Trajectory
from .step_control import StepControl
from .tableau import is_whole

Grid = tuple[list[float], list[int | None]]

MOST_CAPTURED = 4096  # calls of func in one graph


@dataclass(frozen=True)
class Options:
    """How to solve. step_t, jump_t: times at which steps must end; func is discontinuous at the latter."""

    method: str = "dopri5"
    control: StepControl = field(default_factory=StepControl)
    first_step: float | None = None
    step_t: tuple[float, ...] = ()
    jump_t: tuple[float, ...] = ()
    step_size: float | None = None
    grid_constructor: Callable | None = None
    perturb: bool = False
    max_iters: int | None = None
    max_order: int | None = None
    solver: str | None = None
    coupling: float = 0.0  # of two states that undo their steps, see `coupled`; 0: one state
    interp: str = "method"
    cuda_graph: str = ""  # or one of graphed.capture.MODES
    progress: str = ""  # what it says goes on, where that is to be shown
    # The numbers of the method: a `ButcherTableau`, or the data of another family of `solvers.families`.
    tableau: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        adjusted(find_method(self.method), self.method, self.of_method)
        if self.method == "bdf" and self.control.controller != "I":
            raise ValueError(
                f"controller must be 'I' for method='bdf', whose steps are its own, got {self.control.controller!r}"
            )
        if self.interp not in INTERPOLATIONS:
            raise ValueError(f"interp must be one of {tuple(INTERPOLATIONS)}, got {self.interp!r}")
        for name in ("first_step", "step_size"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be a positive number, got {value}")
        if self.step_size is not None and self.grid_constructor is not None:
            raise ValueError("step_size and grid_constructor are mutually exclusive, got both")
        if (
            set(self.step_t) & set(self.jump_t)
            or len(set(self.step_t)) < len(self.step_t)
            or len(set(self.jump_t)) < len(self.jump_t)
        ):
            raise ValueError("`step_t` and `jump_t` must not have any repeated elements between them.")
        found = INTERPOLATIONS[self.interp][self.method]
        if self.coupling:
            found = coupled(found, self.coupling)
        elif self.of_method:
            found = adjusted(found, self.method, self.of_method)
        object.__setattr__(self, "tableau", found)  # asked for many times in a solve

    @property
    def adaptive(self) -> bool:
        return self.method in ADAPTIVE

    @cached_property
    def backwards(self) -> "Options":
        """Those of the adjoint's solve where nothing else is asked for."""
        return replace(self, interp="method", progress="backward" if self.progress else "")

    def on_side(self, problem: Problem, index: int) -> Any:
        """On which side of t[index] func is evaluated for a step that ends there, or for index 0 begins: 0, that is on it, but
        for times of jump_t and those of a grid with `perturb`. As in `Problem.time_beside`."""
        beside: Any = self.perturb
        for jump in self.jump_t if self.adaptive else ():
            beside = beside | problem.same_time(problem.t[index], jump)
        return beside * (1.0 if index == 0 else -1.0)

    @property
    def of_method(self) -> tuple[tuple[str, Any], ...]:
        """Options that the method itself goes by, those that were given."""
        found = ("max_iters", self.max_iters), ("max_order", self.max_order), ("solver", self.solver)
        return tuple([(name, value) for name, value in found if value is not None])


def integrate(
    problem: Problem,
    options: Options,
    *,
    callbacks: dict[str, Callable] | None = None,
    recorder: Recorder | None = None,
    start: Evaluation | None = None,
    after_step: AfterStep | None = None,
    grid: Grid | None = None,
    events: EventWatch | None = None,
    resumed: Resumed | None = None,
    lookers: Sequence[Looker] = (),
) -> Trajectory:
    """Solves the problem. start: f(t0, y0), where it is known. grid: the nodes of a fixed method, see `fixed_grid`. events:
    hold rows where they happen. resumed: where an adaptive solve goes on from. lookers: look at each of its steps.

    Does not raise when the solve fails: the solver state of the trajectory says so.
    """
    with torch.no_grad(), marked("solve"):
        if len(problem.t) == 1 or all([leaf.numel() == 0 for leaf in problem.state_leaves]):
            return _without_steps(problem)
        refuse(options, family_of(options.tableau).refusal(problem, recorder))
        progress = Progress(problem, options.progress) if options.progress else None
        if progress is not None:
            lookers, callbacks = progress.among(lookers, callbacks, options.adaptive)
        n, paired = len(problem.leaves), is_coupled(options.tableau)
        if paired:
            problem, start, callbacks = couple(problem), doubled(start), of_one(callbacks, n)
        common: dict[str, Any] = {"callbacks": callbacks, "recorder": recorder, "events": events}
        adaptive = {"after_step": after_step, "resumed": resumed, "lookers": lookers}
        try:
            trajectory = _run(problem, options, common, adaptive, start, grid)
            return uncoupled(trajectory, n) if paired else trajectory
        except KeyboardInterrupt as interrupt:
            if paired and vars(interrupt).get("trajectory") is not None:
                interrupt.trajectory = uncoupled(interrupt.trajectory, n)  # type: ignore[attr-defined]
            raise
        finally:
            if progress is not None:
                progress.end()


def _run(
    problem: Problem, options: Options, common: dict[str, Any], adaptive: dict[str, Any], start: Evaluation | None, grid: Any
) -> Trajectory:
    """By the loop of the method, or a captured graph of it. common, adaptive: arguments of all loops, of the adaptive one."""
    alone = not any([*common.values(), options.jump_t, adaptive["resumed"], adaptive["lookers"], problem.valid])
    by_graph = bool(options.cuda_graph) and alone and runs_ahead(problem.device)
    if isinstance(options.tableau, ScipyMethod):
        control = options.control
        limits = options.first_step, control.max_step, control.max_num_steps
        return ScipySolver(problem, options.tableau, *limits, common["callbacks"]).run(start)
    if options.adaptive:
        stops: dict[str, Any] = {"first_step": options.first_step, "step_t": options.step_t, "jump_t": options.jump_t}
        if lands(options.tableau):
            seen = {*options.step_t, *options.jump_t}
            stops["step_t"] = (*options.step_t, *[t for t in problem.t[1:-1] if t not in seen])
        make: Any = partial(AdaptiveSolver, problem, options.tableau, options.control, **stops, **adaptive, **common)
        after_step = adaptive["after_step"]
        refusal = "" if after_step is None else after_step.refusal
        kind = adaptive_kind(problem, options, refusal) if by_graph else None
    else:
        nodes, moves_with = grid or fixed_grid(options, problem.t)
        if alone and not by_graph and short.serves(problem, options.tableau, nodes):
            return short.solve(problem, options.tableau, nodes, options.perturb, start)
        whole = is_whole(options.tableau)
        solver: Any = SteppedSolver if whole else FixedSolver
        make = partial(solver, problem, options.tableau, nodes, moves_with, perturb=options.perturb, **common)
        kind = fixed_kind(problem, options, nodes) if by_graph and not whole else None
    return make().run(start) if kind is None else solve_by_graph(problem, kind, make, start is not None)


def _without_steps(problem: Problem) -> Trajectory:
    ys = [leaf.expand(len(problem.t), *leaf.shape).clone() for leaf in problem.state_leaves]
    return Trajectory(ys=ys, last=[leaf.clone() for leaf in problem.leaves], state=None)


def refuse(options: Options, refusal: str) -> None:
    """refusal: why the method's family does not serve, or ""."""
    if refusal:
        raise NotImplementedError(f"method={options.method!r} {refusal}")


def adaptive_kind(problem: Problem, options: Options, refusal: str = "") -> Kind:
    """The first step is tried before any that is captured."""
    refusal = refusal or family_of(options.tableau).no_graph
    refusal = refusal or ("" if problem.fused_error else "a norm of the user, or tolerances that are tensors")
    stops = stop_table(problem, options.step_t, options.jump_t).shape
    key = replace(options, first_step=None), stops
    return Kind(key, (problem, options.first_step), False, options.cuda_graph, refusal)


def fixed_kind(problem: Problem, options: Options, nodes: list[float]) -> Kind:
    """Other times are other numbers in memory, as long as the outputs lie in the same places of the same steps."""
    outputs = tuple(map(tuple, outputs_of_steps(nodes, problem.t, problem.direction)))
    calls = len(outputs) * options.tableau.stages
    refusal = f"the grid takes {calls} calls of func, a graph at most {MOST_CAPTURED}" if calls > MOST_CAPTURED else ""
    return Kind((options, outputs), (problem, nodes), options.perturb, "step", refusal)


def fixed_grid(options: Options, t: list[float], func: Any = None, y0: Any = None, user_t: Tensor | None = None) -> Grid:
    """The nodes of a fixed method, those of grid_constructor or step_size, else t itself, and which time each moves with."""
    found = _any_grid(options, t, func, y0, user_t)
    return with_outputs(*found, t) if lands(options.tableau) else found


def _any_grid(options: Options, t: list[float], func: Any, y0: Any, user_t: Tensor | None) -> Grid:
    last = len(t) - 1
    if last == 0:
        return list(t), [0]
    if options.grid_constructor is not None:
        times, nodes = check_times(options.grid_constructor(func, y0, user_t), "the grid of grid_constructor")
        tolerance = 4 * torch.finfo(times.dtype).eps
        for name, node, time in (("begin", nodes[0], t[0]), ("end", nodes[-1], t[-1])):
            if abs(node - time) > tolerance * max(1.0, abs(time)):
                raise ValueError(f"the grid of grid_constructor must {name} at {time}, got {node}")
        return [t[0], *nodes[1:-1], t[-1]], [0, *[None] * (len(nodes) - 2), last]
    if options.step_size is not None:
        nodes = uniform_grid(t, options.step_size)
        return nodes, [*[0] * (len(nodes) - 1), last]
    return list(t), list(range(len(t)))


def backward_grid(options: Options, field: Any, y: list[Tensor], t: list[float]) -> Grid | None:
    """The nodes of one interval of a backward solve, None for an adaptive one. y: the state it comes from. A grid_constructor
    is given func, that state as the user sees it, and the two times."""
    if options.adaptive or options.grid_constructor is None:
        return None if options.adaptive else fixed_grid(options, t)
    times = torch.tensor(t, dtype=torch.float64, device=y[0].device)
    return fixed_grid(options, t, field.func, field.structure.unflatten(y), times)


def stop_times(name: str, value: Any) -> tuple[float, ...]:
    if value is None:
        return ()
    try:
        times = tuple(float(x) for x in (value.tolist() if isinstance(value, Tensor) else value))
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a one-dimensional tensor or a list of times, got {value!r}") from None
    if not all(map(math.isfinite, times)):
        raise ValueError(f"{name} must be finite, got {list(times)}")
    return times
