"""Steps of a given size by the compiled field and by the stepper: whether they differ by more than rounding."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..integrate import Options, integrate
from ..ops import FIELDS
from ..problem import Field, Problem, Structure, with_arguments
from ..solution import SolverError
from ..step_control import SUCCESS
from ..tableau import ButcherTableau
from .attach import Sources, attach
from .differences import Difference, Unchecked, Unsettled, distance, worst_of
from .engine import Engine

_CHANGE = 4
_ROWS = 64  # samples among which those of the trials are
_MANY = 1 << 18  # numbers in a state, of which not all are compared again
_STEP = 0.1  # of the state, about: what a step of a trial changes
_SHORTEST = 2.0**-43  # of a solve, in units of its times: its steps have many units in the last place of these
_NEAR = 1e-3  # of the times at which trials of an implicit method begin
_STIFF = 0.5  # the largest step times the field's rate of change, so that a step magnifies rounding by little


@dataclass
class Trial:
    """The start of a solve of a few samples, and its times."""

    leaves: list[Tensor]
    args: list[Any]
    t: list[float]
    steps: int


class Comparison:
    """Trials of one library, by the compiled field and by the stepper."""

    def __init__(self, engine: Engine, structure: Structure, args: Sequence[Any], func: Any, seed: int):
        self.engine, self.structure, self.args, self.func = engine, structure, args, engine.plan.rows.over(func)
        self.dtype = engine.plan.dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.whole = engine.plan.whole
        self.shrink = 0.3**seed
        self.t0, self.t1 = engine.problem.interval
        self.span, self.direction = abs(self.t1 - self.t0), -1.0 if self.t1 < self.t0 else 1.0
        if self.span < _SHORTEST * max(abs(self.t0), abs(self.t1)):
            raise Unsettled(f"the times of the solve, {self.t0} to {self.t1}, are too close for steps between them")
        self.implicit = not isinstance(engine.kind.tableau, ButcherTableau)
        if self.implicit:  # far from zero no two times are as close as steps may have to be
            self.t1 = self.t0 + self.direction * min(self.span, _NEAR)
        eps = torch.finfo(self.dtype).eps
        if engine.cuda and engine.matmul != "float32" and self.dtype == torch.float32:
            eps = {"tf32": 2.0**-11, "bf16": 2.0**-8}[engine.matmul]
        self.eps = eps

    def run(self, gradient: str, backward: Any) -> Difference | None:
        """gradient: "" for values alone."""
        self.rows = self._finite_rows()
        conclusive, trials = False, self._trials()
        step = self._step(trials[0])
        for trial in trials:
            if self.implicit:  # a larger one may meet a matrix that is singular
                step = self._step(trial)
            found, finite = self._compare(trial, step, gradient, backward)
            conclusive = conclusive or finite
            if found is not None:
                return found
        if not conclusive:
            raise Unchecked("func has no finite values here, so the compiled field could not be checked against it")
        return None

    def step(self, watched: AbstractContextManager) -> Difference | None:
        """One step of the samples at hand, or of some where they are many; values alone. watched: is on in one call of func."""
        engine = self.engine
        many = engine.batch * engine.state > _MANY
        count = 1 if self.whole else min(engine.batch, _ROWS) if many else engine.batch
        self.rows = torch.arange(count, device=engine.problem.device)
        trial = self._trial(count, self.t0, 1, 0.0)
        return self._compare(trial, self._step(trial, watched), "", None)[0]

    # Inputs

    def _finite_rows(self) -> Tensor:
        """Some samples where func has finite values, if there are any: the others are for nobody to compare."""
        if self.whole:
            return torch.zeros(1, dtype=torch.int64, device=self.engine.problem.device)
        leaves = [leaf.detach()[:_ROWS].clone() for leaf in self.structure.leaves]
        args = list(self.args)
        for i in self.engine.plan.batched:
            args[i] = args[i].detach()[:_ROWS]
        slopes = self._slopes(self.t0, leaves, args)
        finite = [x.isfinite().reshape(len(x), -1).all(1) for x in (*leaves, *slopes)]
        rows = torch.stack(finite).all(0).nonzero()[:, 0]
        if len(rows) == 0:
            raise Unchecked("func has no finite values here, so the compiled field could not be checked against it")
        return rows

    def _trials(self) -> list[Trial]:
        """Of a whole pack and one lane more, as given; and near it of a pack that is not full, and once more of the former."""
        engine = self.engine
        library = engine.plan.load(*engine.kind.wanted[0])
        lanes = library.lanes * library.team
        one = engine.batch == 1 and not engine.problem.per_sample and not engine.cuda
        many, few = (1, 1) if one or self.whole else (lanes + 1, 2)
        share = float(torch.rand((), generator=self.generator, dtype=torch.float64, device="cpu"))
        between = self.t0 + (self.t1 - self.t0) * share
        return [self._trial(many, self.t0, 2, 0.0), self._trial(few, self.t1, 1, 0.1), self._trial(many, between, 1, 0.1)]

    def _trial(self, rows: int, t: float, steps: int, spread: float) -> Trial:
        def near(x: Tensor) -> Tensor:
            which = self.rows[torch.arange(rows, device=x.device) % len(self.rows)]
            taken = x.detach().clone() if self.whole else x.detach()[which]
            if spread == 0 or not taken.is_floating_point():
                return taken
            size = float(taken.abs().max()) or 1.0
            size = size if size < float("inf") else 1.0
            noise = torch.randn(2, *taken.shape, generator=self.generator, dtype=torch.float64, device="cpu").to(taken)
            moved = taken * (1 + spread * noise[0])
            return moved if rows > 2 else moved + spread * size * noise[1]

        args = list(self.args)
        for i in self.engine.plan.batched:
            args[i] = near(args[i])
        return Trial([near(leaf) for leaf in self.structure.leaves], args, [t], steps)

    def _slopes(self, t: float, leaves: list[Tensor], args: list[Any]) -> list[Tensor]:
        problem = self._problem(Trial(leaves, args, [t], 1))
        with torch.no_grad():
            return [slope.detach() for slope in problem.field(problem.start_time(False), problem.leaves)]

    def _step(self, trial: Trial, watched: AbstractContextManager | None = None) -> float:
        """The size of a step that changes the state by a tenth, without magnifying rounding where the field is stiff."""
        t, span = trial.t[0], self.span
        moved = [leaf + 0.01 * (leaf.abs().amax() + 1e-3) * self._noise(leaf) for leaf in trial.leaves]
        with watched or nullcontext():
            slopes = self._slopes(t, trial.leaves, trial.args)
        others = self._slopes(t, moved, trial.args)
        sizes = [leaf.double().norm() for leaf in trial.leaves]
        rates = [slope.double().norm() for slope in slopes]
        size, rate = float(torch.stack(sizes).norm()), float(torch.stack(rates).norm())
        change = distance(slopes, others) / max(distance(trial.leaves, moved), 1e-300)
        step = span / 4
        for limit in (_STEP * (size or 1.0) / rate if rate > 0 else step, _STIFF / change if change > 0 else step):
            step = min(step, limit) if limit == limit else step
        least = 256 * torch.finfo(self.dtype).eps * max(abs(self.t0), abs(self.t1))  # two times that differ
        return min(max(step * self.shrink, least), span / 4)

    def _noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator, dtype=torch.float64, device="cpu").to(like)

    def _changed(self, trial: Trial) -> Trial:
        """The same start but for its last places."""
        few = _CHANGE * self.eps
        move = lambda x: x * (1 + few * self._noise(x)) if x.is_floating_point() else x  # noqa: E731
        args = [move(x.detach()) if i in self.engine.plan.batched else x for i, x in enumerate(trial.args)]
        return Trial([move(leaf) for leaf in trial.leaves], args, trial.t, trial.steps)

    # Solves

    def _problem(self, trial: Trial) -> Problem:
        structure = self._structure(trial)
        func: Any = with_arguments(self.func, trial.args)
        leaves = [leaf.detach().contiguous() for leaf in trial.leaves]
        ones = [1.0] * len(leaves)
        return replace(self.engine.problem, field=Field(func, structure), leaves=leaves, t=trial.t, rtol=ones, atol=ones)

    def _structure(self, trial: Trial) -> Structure:
        return Structure(self.structure.unflatten(trial.leaves))

    def _options(self, options: Options, step: float) -> Options:
        """Steps of this size, whatever their error."""
        control = replace(options.control, min_step=step, max_step=step)
        first = step if options.adaptive else None
        return replace(options, control=control, first_step=first, step_t=(), jump_t=(), step_size=None, grid_constructor=None)

    def _compare(self, trial: Trial, step: float, gradient: str, backward: Any) -> tuple[Difference | None, bool]:
        engine, direction = self.engine, self.direction
        begin, dt = trial.t[0], direction * step
        if not self.implicit and direction * (self.t1 - begin) < trial.steps * step:  # func is not called beyond the end
            begin = self.t1 - trial.steps * dt
        nodes = [begin + i * dt for i in range(trial.steps)] + [begin + trial.steps * dt]
        trial = replace(trial, t=[begin, begin + 0.4 * dt, nodes[-1]])
        options = self._options(engine.options, step)
        grid = None if options.adaptive else (nodes, [0, *[None] * (trial.steps - 1), 2])
        if backward is not None:
            backward = replace(backward, options=self._options(backward.options, step), chosen=False)
            backward = replace(backward, rtol=[1.0] * len(trial.leaves), atol=[1.0] * len(trial.leaves))
        solve = Solves(self, options, grid, gradient, backward)
        try:
            expected, failed = solve.by_stepper(trial)
        except SolverError:
            failed = True
        if failed:
            return None, False
        again: Callable[[], list[Tensor]] = lambda: solve.by_stepper(self._changed(trial))[0]  # noqa: E731
        try:
            found = solve.compiled(trial)
        except SolverError:
            found = [torch.full_like(x, torch.nan) for x in expected]
        where = f"t = {trial.t[0]:.9g} to {trial.t[-1]:.9g} by {step:.3g}, y0 {list(trial.leaves[0].shape)}"
        n = len(trial.leaves)
        # Gradients of what all samples share are sums, which may cancel: their size is that of the gradients for the state.
        size = max(
            [0.0, *(float(x[x.isfinite()].abs().max()) if bool(x.isfinite().any()) else 0.0 for x in expected[n : 2 * n])]
        )
        sizes = [size if gradient and i >= 2 * n else 0.0 for i in range(len(expected))]
        worst = worst_of(found, expected, again, self.eps, sizes)
        if worst is None:
            return None, True
        name = solve.names[worst[0]]
        of_gradient = bool(gradient) and worst[0] >= len(trial.leaves)
        return Difference(name, worst[1], worst[2], where, of_gradient), True


class Solves:
    """Both engines on the same steps. The results: increments, outputs, error ratio; or gradients."""

    def __init__(self, comparison: Comparison, options: Options, grid: Any, gradient: str, backward: Any):
        self.comparison, self.options, self.grid = comparison, options, grid
        self.gradient, self.backward = gradient, backward
        self.names: list[str] = []
        self.cotangents: list[Tensor] | None = None

    def by_stepper(self, trial: Trial) -> tuple[list[Tensor], bool]:
        """The results, and whether they are of no use."""
        from .. import recorded
        from ..request import Request
        from ..settings import Settings

        comparison = self.comparison
        sources = self._sources(trial) if self.gradient else []  # func is given these
        problem = comparison._problem(trial)
        if self.gradient:
            structure = comparison._structure(trial)
            t = torch.tensor(problem.t, dtype=torch.float64, device="cpu")
            kind = "adjoint" if self.gradient == "adjoint" else "direct"
            settings = Settings(self.options, kind, problem.per_sample, on_failure="return")
            backward = self.backward if kind == "adjoint" else None
            with torch.enable_grad():
                solution = recorded.solve(Request.of(problem, settings, structure, t, self.grid, backward))
                results = self._gradients(structure.flatten(solution.ys), sources)
            state = solution._state
        else:
            trajectory = integrate(problem, self.options, grid=self.grid)
            results, state = self._values(trajectory.ys, trajectory.state), trajectory.state
        if state is not None and bool((state[FIELDS["status"]] != SUCCESS).all()):
            return results, True
        return results, not any(bool(x.isfinite().any()) for x in results)

    def compiled(self, trial: Trial) -> list[Tensor]:
        comparison = self.comparison
        problem, like = comparison._problem(trial), comparison.engine
        gradient, backward = self.gradient, None if self.gradient != "adjoint" else self.backward.options
        make = partial(Engine, like.plan, problem, self.options, trial.args, self.grid, like.matmul, gradient, backward, like)
        if not self.gradient:
            trajectory = make().solve(keep=False)
            return self._values(trajectory.ys, trajectory.state)
        sources = self._sources(trial)
        with torch.enable_grad():
            engine = make()
            engine.sources = Sources(like.plan, comparison._structure(trial), trial.args)
            trajectory = engine.solve(keep=self.gradient != "adjoint")
            stats = _Counts()
            outputs = attach(engine, self.gradient, self.backward, trajectory.ys, stats, list)
            return self._gradients(outputs, sources)

    def _values(self, ys: list[Tensor], state: Tensor | None) -> list[Tensor]:
        self.names = [*(f"leaf {i}" for i in range(len(ys))), "the error ratio"]
        if state is not None:
            ys = [y.clone() for y in ys]
            failed = state[FIELDS["status"]] != SUCCESS  # what is there was never written
            for y in ys if bool(failed.any()) else ():
                y[:, failed.expand(y.shape[1]) if len(failed) == 1 else failed] = torch.nan
        ratio = [] if state is None else [1 + state[FIELDS["error_ratio"]][None]]  # itself of the size of rounding
        return [*ys, *ratio]

    def _sources(self, trial: Trial) -> list[Tensor]:
        """Leaves, arguments of samples and weights. Those with hooks are left out: the hooks are the user's."""
        engine = self.comparison.engine
        trial.leaves = [leaf.detach().requires_grad_() for leaf in trial.leaves]
        for i in engine.plan.batched:
            if self.comparison.args[i].requires_grad:
                trial.args[i] = trial.args[i].detach().requires_grad_()
        weights = [place(trial.args) for place in engine.plan.wanted]
        given = [trial.args[i] for i in engine.plan.batched if trial.args[i].requires_grad]
        weights = [x for x in weights if x.requires_grad and not x._backward_hooks]
        self.names = [f"leaf {i}" for i in range(len(trial.leaves))]
        self.names += [f"the gradient for leaf {i}" for i in range(len(trial.leaves))]
        self.names += [f"the gradient for argument {i}" for i in range(len(given))]
        self.names += [f"the gradient for a tensor {list(x.shape)}" for x in weights]
        return [*trial.leaves, *given, *weights]

    def _gradients(self, ys: Sequence[Tensor], sources: list[Tensor]) -> list[Tensor]:
        if self.cotangents is None:
            self.cotangents = [self.comparison._noise(y) for y in ys]
        used = [(y, g) for y, g in zip(ys, self.cotangents, strict=True) if y.requires_grad]
        found = torch.autograd.grad([y for y, _ in used], sources, [g for _, g in used], allow_unused=True)
        grads = [torch.zeros_like(x)[None] if g is None else g.detach()[None] for g, x in zip(found, sources, strict=True)]
        return [*(y.detach() for y in ys), *grads]


class _Counts:
    nfe_backward = 0
