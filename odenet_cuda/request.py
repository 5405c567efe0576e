"""What a solve was asked for, checked and made regular once; every engine is handed this and nothing else.

What follows from options alone is in `settings`. The rest, state, times and tolerances, are the numbers of one call.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .callbacks import find_callbacks
from .compiled.field import compiled_field
from .event import Events
from .formulas import SHORT
from .gradients.adjoint import Adjoint
from .gradients.adjoint_setup import NOT_GIVEN, adjoint_setup
from .integrals import Integrand, with_quadratures
from .integrate import Grid, Options, fixed_grid
from .landing import lands, refuse_what_is_between
from .mass import NOTHING, System, add_system
from .problem import (
    Field,
    OwnTimes,
    Problem,
    Structure,
    check_samples,
    check_state,
    check_times,
    check_tolerance,
    check_zero_tolerance,
    with_arguments,
)
from .regularizers import RUNNING, CostField, with_costs
from .resume import resumed_from
from .settings import Settings, with_coupling, with_stops
from .solution import Solution
from .solvers.domain import check_start
from .solvers.scipy_solver import ScipyMethod
from .solvers.start import Resumed
from .symplectic import check_separable, is_symplectic
from .tableau import ButcherTableau
from .transforms import under_vmap

_MADE = frozenset({"problem", "t", "grid", "backward"})


class Request:
    """One solve as it was asked for. Nobody writes into it but `serving`.

    structure: of the state, with its leaves as the user gave them. params: the tensors that the user wants gradients for, None:
    all. compiled: what is compiled of func, if anything, and args its further arguments. prepared: what was made ready while
    engines were asked, by name.

    The rest is checked and made when it is first asked for, which an engine that served such a solve before may not do.
    problem: to be solved. t: the times, perhaps with a gradient. grid: of a method without step control. backward: the solve of
    the adjoint. resumed: where it goes on from, if another solve ended there. Asking raises ValueError and TypeError as `solve`
    does.
    """

    problem: Problem
    t: Tensor
    grid: Grid | None
    backward: Adjoint | None
    resumed: Resumed | None

    def __init__(
        self,
        func: Callable[..., Any],
        y0: Any,
        t: Any,
        args: Sequence[Any],
        settings: Settings,
        rtol: Any,
        atol: Any,
        norm: Callable | None = None,
        params: Sequence[Tensor] | None = None,
        adjoint: tuple[Any, Any, Any, Any] = NOT_GIVEN,
        compile: str | bool | None = None,
        events: Events | None = None,
        resume: Solution | None = None,
        valid: Callable[[Any], Any] | None = None,
        integrals: Callable[..., Any] | None = None,
        integrals_in_norm: bool = False,
        save: Callable[..., Any] | None = None,
        system: System = NOTHING,
    ):
        """adjoint: method, rtol, atol and options of the backward solve. compile: as of `solve`. events: that end it.
        resume: the solution that it goes on from. valid, integrals, save: as of `solve`; system: what is known of it.

        Raises ValueError and TypeError for a wrong y0."""
        self.settings = with_coupling(with_stops(settings, func), adjoint)
        self.params, self.events, self.resume = params, events, resume
        self.valid, self.integrals_in_norm = valid, integrals_in_norm
        self.save = None if save is None else with_arguments(save, args)
        self.integrals = None if integrals is None else with_arguments(integrals, args)
        self.integrand: Integrand | None = None
        self.given, self.system = (t, rtol, atol, norm, adjoint), system
        self.structure = check_state(y0)
        self.func, self.extra = with_arguments(func, args), tuple(args)
        self.compiled, self.args = compiled_field(self.func, compile)
        self.prepared: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if name not in _MADE:
            raise AttributeError(name)
        self._make()
        return self.__dict__[name]

    def _make(self) -> None:
        t, rtol, atol, norm, adjoint = self.given
        settings, structure, func = self.settings, self.structure, self.func
        options, per_sample = settings.options, settings.per_sample
        tableau = options.tableau
        if per_sample:
            check_samples(structure)
        self.t, values = check_times(t, batch=structure.leaves[0].shape[0] if per_sample else None)
        if not isinstance(tableau, ButcherTableau):
            self._refuse_for(tableau, isinstance(values, OwnTimes))
        running = [name for name in settings.regularizers if name in RUNNING]
        costly = running or self.integrals is not None
        of = CostField(func, structure, running, per_sample) if costly else Field(func, structure)
        of.with_gradients = settings.gradient == "direct" and torch.is_grad_enabled()
        problem = Problem(
            field=of,
            leaves=[leaf.detach().contiguous() for leaf in structure.leaves],
            t=values,
            per_sample=per_sample,
            rtol=check_tolerance("rtol", rtol, structure),
            atol=check_tolerance("atol", atol, structure),
            norm=None if norm is None else lambda leaves: norm(structure.unflatten(leaves[: len(structure.leaves)])),
            valid=check_valid(self.valid, structure, options),
        )
        if options.adaptive and norm is None:
            check_zero_tolerance(problem)
        if problem.valid is not None:
            check_start(problem)
        if is_symplectic(tableau):
            check_separable(problem, structure, options.method)
        if running:
            problem = with_costs(problem, running)
        if any([given is not None for given in self.system]):
            if under_vmap():
                raise NotImplementedError(f"{self.system.named} not served under torch.vmap; give the samples as one batch")
            add_system(problem, options, settings.gradient, self.system, self.extra)
        if self.integrals is not None:
            problem = self._with_integrals(problem)
        grid = None
        if not options.adaptive:
            grid = fixed_grid(options, values, func, structure.unflatten(structure.leaves), self.t)
        backward = None
        if settings.gradient in ("adjoint", "quadrature"):
            if settings.gradient == "quadrature" and adjoint != NOT_GIVEN and (adjoint[3] or {}).get("norm") is not None:
                raise ValueError(
                    "adjoint_options['norm'] must not be given for gradient='quadrature': it solves a alone backwards"
                )
            backward = adjoint_setup(func, problem, structure, options, *adjoint, self.params is not None)
        self.problem, self.grid, self.backward, self.resumed = problem, grid, backward, None
        if self.resume is not None:
            self.resumed = resumed_from(self.resume, problem, structure, options.method, options.first_step, options.adaptive)

    def _refuse_for(self, method: Any, own_times: bool) -> None:
        """Raises NotImplementedError for what this method, no explicit Runge-Kutta method, does not serve."""
        gradient = self.settings.gradient
        if isinstance(method, ScipyMethod):
            for name, asked in (("events", self.events is not None), ("gradient='quadrature'", gradient == "quadrature")):
                if asked:
                    raise NotImplementedError(f"{name}: not served by method='scipy_solver', which solves outside of torch")
        if lands(method):
            refuse_what_is_between(self, self.settings.options, own_times)
        if gradient == "reversible" and any([leaf.dtype in SHORT for leaf in self.structure.leaves]):
            raise NotImplementedError(
                "gradient='reversible' needs a state of at least 32 bits: rounding of 16 bits does not come back to its start"
            )

    def _with_integrals(self, problem: Problem) -> Problem:
        if self.integrals_in_norm and problem.quadratures:
            raise ValueError("integrals_in_norm does not go with regularizers, whose errors do not count")
        field: Any = problem.field
        field.integrand = self.integrand = Integrand(self.integrals, problem, self.structure.unflatten)  # type: ignore[arg-type]
        return with_quadratures(problem, self.integrand.like, self.integrals_in_norm)

    @classmethod
    def of(
        cls,
        problem: Problem,
        settings: Settings,
        structure: Structure,
        t: Tensor,
        grid: Grid | None = None,
        backward: Adjoint | None = None,
    ) -> "Request":
        """For a problem that is there already."""
        field: Any = problem.field
        request = cls(field.func, structure, t, (), settings, problem.rtol, problem.atol, compile=False)
        request.settings = settings  # as they are: the stops of this problem are known
        request.problem, request.t, request.grid, request.backward, request.resumed = problem, t, grid, backward, None
        return request

    def but(self, **changed: Any) -> "Request":
        """Another that differs in these."""
        other = Request.__new__(Request)
        other.__dict__.update({**self.__dict__, "prepared": {}, **changed})
        return other

    @property
    def options(self) -> Options:
        return self.settings.options

    @property
    def records(self) -> bool:
        """Whether there may be gradients."""
        return torch.is_grad_enabled() and len(self.problem.t) > 1 and not self.problem.empty

    @cached_property
    def callbacks(self) -> dict[str, Callable]:
        """Those of func, by name; they are looked for, and perhaps warned of, once."""
        return find_callbacks(self.func, self.structure, self.options.adaptive)


def check_valid(valid: Any, structure: Structure, options: Options) -> Callable[[list[Tensor]], Any] | None:
    """As a function of leaves. Raises TypeError and ValueError."""
    if valid is None:
        return None
    if not callable(valid):
        raise TypeError(f"valid must be callable as valid(y), got {type(valid).__name__}")
    if not options.adaptive:
        raise ValueError(f"valid needs an adaptive method, which can shorten its steps, got {options.method!r}")
    return lambda leaves: valid(structure.unflatten(leaves))
