"""The drop-in functions: torchdiffeq's names, arguments and returns over `solve`."""

import inspect
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor

from .interpolant import Interpolant, State
from .methods import ADAPTIVE, IMPLICIT, MULTISTEP, find_method
from .problem import Structure, parameters_of
from .problem.field import own_tensors
from .solve import solve, solve_by_method
from .until_event import until_event

_COMMON = ("step_control", "on_failure", "gradient", "max_checkpoints")
_ADAPTIVE_OPTIONS = (
    *(
        "first_step",
        "safety",
        "ifactor",
        "dfactor",
        "max_num_steps",
        "step_t",
        "jump_t",
        "norm",
        "min_step",
        "max_step",
    ),
    "controller",
)
_FIXED_OPTIONS = ("step_size", "grid_constructor", "perturb", "interp")
_SCIPY_OPTIONS = ("solver", "first_step", "max_step", "max_num_steps")
_LIMITS: dict[str, tuple[str, ...]] = dict.fromkeys(IMPLICIT, ("max_iters",)) | dict.fromkeys(
    MULTISTEP, ("max_order", "max_iters")
)
_LIMITS["bdf"] = ("max_order",)


@overload
def odeint(
    func: Callable,
    y0: State,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    event_fn: None = None,
) -> State: ...


@overload
def odeint(
    func: Callable,
    y0: State,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Callable,
) -> tuple[Tensor, State]: ...


def odeint(
    func: Callable,
    y0: Any,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Callable | None = None,
) -> Any:
    """The state at every t, as torchdiffeq's ``odeint`` gives it; gradients are those of the discrete solve.

    func, y0, t, rtol, atol: as in `solve`; a slope may have its leaf's numbers in another shape, [n, 1] for [n]. method:
    "dopri5" unless given. options: for adaptive methods first_step, safety, ifactor, dfactor, max_num_steps, step_t, jump_t,
    norm, min_step, max_step, dtype (of time; float64 always), and ours: step_control ("joint" or "per_sample"), controller. For
    fixed methods step_size or grid_constructor, perturb, interp ("linear" or "cubic"), for implicit ones max_iters, for Adams
    max_order and max_iters. A key that the method does not know is warned of. event_fn: a function of (t, y), in any shape,
    whose first change of sign of any number ends the solve (`Event`). t then
        holds two times, the start and one that tells the direction; a function that is zero at the start ends it there. A
        method on a grid needs step_size.

    Returns a tensor [len(t), *y0.shape], or the structure of y0 with such leaves; with event_fn (event_t, solution), where
    solution holds the start and the event. Both have gradients with the event moving, for y0, t[0], and what func and event_fn
    depend on. "scipy_solver" gives values without a gradient, as there, and warns where one may be wanted. Raises as `solve`
    does, and SolverError where no event comes.
    """
    chosen = method or "dopri5"
    state = Structure(y0, any_shape=True)
    if not options and event_fn is None and chosen != "scipy_solver" and type(chosen) is str:
        return solve_by_method(func, state, t, chosen, rtol, atol).ys
    by_name = _options(chosen, options)
    run: Callable[..., Any] = partial(solve, func, method=chosen, rtol=rtol, atol=atol, **by_name)
    if chosen == "scipy_solver" and "gradient" not in by_name and event_fn is None and isinstance(t, Tensor):
        if torch.is_grad_enabled() and any([x.requires_grad for x in (*state.leaves, *own_tensors(func)[0], t)]):
            warnings.warn(
                "method='scipy_solver' solves outside of torch: this result has no gradient. Use odeint_adjoint for one, or "
                "solve under torch.no_grad()",
                stacklevel=2,
            )
        with torch.no_grad():
            return run(state, t).ys
    return run(state, t).ys if event_fn is None else until_event(run, event_fn, state, t, chosen, by_name)


@overload
def odeint_adjoint(
    func: Callable,
    y0: State,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    event_fn: None = None,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_method: str | None = None,
    adjoint_options: dict[str, Any] | None = None,
    adjoint_params: Sequence[Tensor] | None = None,
) -> State: ...


@overload
def odeint_adjoint(
    func: Callable,
    y0: State,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Callable,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_method: str | None = None,
    adjoint_options: dict[str, Any] | None = None,
    adjoint_params: Sequence[Tensor] | None = None,
) -> tuple[Tensor, State]: ...


def odeint_adjoint(
    func: Callable,
    y0: Any,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Callable | None = None,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_method: str | None = None,
    adjoint_options: dict[str, Any] | None = None,
    adjoint_params: Sequence[Tensor] | None = None,
) -> Any:
    """`odeint` with gradients by the adjoint method: memory that does not grow with the number of steps.

    adjoint_rtol, adjoint_atol, adjoint_method: of the backward solve; those of the forward solve unless given.
    adjoint_options: its options; the forward ones but for the norm unless given. ``{"norm": "seminorm"}`` leaves the parameters
    out of its error norm. adjoint_params: tensors to give gradients to, ``func.parameters()`` unless given.

    Raises ValueError where func is no Module and adjoint_params are not given, or where adjoint_method differs, options were
    given and adjoint_options were not. Source: Chen et al. 2018, arXiv:1806.07366.
    """
    if adjoint_params is None:
        if not isinstance(func, torch.nn.Module):
            raise ValueError(
                "func must be an instance of nn.Module to specify the adjoint parameters; alternatively give them as "
                "adjoint_params, which may be () where there are none"
            )
        adjoint_params = parameters_of(func)
    chosen = method or "dopri5"
    backward = adjoint_method or chosen
    if backward != chosen and options is not None and adjoint_options is None:
        raise ValueError(
            f"adjoint_options must be given if adjoint_method, {backward!r}, differs from method, {chosen!r}, and options are"
        )
    adjoint_params = tuple(adjoint_params)
    state = Structure(y0, any_shape=True)
    if not options and event_fn is None and adjoint_options is None and type(chosen) is str:
        adjoint = adjoint_method, adjoint_rtol, adjoint_atol, None
        return solve_by_method(func, state, t, chosen, rtol, atol, "adjoint", adjoint_params, adjoint).ys
    by_name = _options(chosen, options)
    run: Callable[..., Any] = partial(
        solve,
        func,
        method=chosen,
        rtol=rtol,
        atol=atol,
        gradient="adjoint",
        adjoint_params=adjoint_params,
        adjoint_method=adjoint_method,
        adjoint_rtol=adjoint_rtol,
        adjoint_atol=adjoint_atol,
        adjoint_options=None if adjoint_options is None else _adjoint_options(backward, adjoint_options, adjoint_params),
        **by_name,
    )
    return run(state, t).ys if event_fn is None else until_event(run, event_fn, state, t, chosen, by_name)


def odeint_dense(
    func: Callable,
    y0: State,
    t0: Any,
    t1: Any,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
) -> Interpolant[State]:
    """The solution from t0 to t1 as a callable of t, a number or a tensor of times of any shape; see `Interpolant`.

    Its values have the gradient of the discrete solve where gradients are recorded; under torch.no_grad() it keeps less.
    """
    chosen = method or "dopri5"
    t = torch.stack([torch.as_tensor(x, dtype=torch.float64, device="cpu").detach().reshape(()) for x in (t0, t1)])
    arguments = _options(chosen, options)
    if chosen not in ADAPTIVE and "interp" not in (options or {}):
        arguments["interp"] = "method"
    state: Any = Structure(y0, any_shape=True)
    interpolant = solve(func, state, t, method=chosen, rtol=rtol, atol=atol, dense=True, **arguments).interpolant
    assert interpolant is not None  # dense=True
    return interpolant


def odeint_event(
    func: Callable,
    y0: State,
    t0: Any,
    *,
    event_fn: Callable,
    reverse_time: bool = False,
    odeint_interface: Callable = odeint,
    **kwargs: Any,
) -> tuple[Tensor, State]:
    """(event_t, solution) of `odeint` with ``event_fn``, from t0 on until the event, or, with reverse_time, from t0 back.

    t0: a time with one number; event_t has its type, and that of float64 where it is a number. odeint_interface: `odeint`,
    `odeint_adjoint`, or a function like them. kwargs: for it.
    """
    start = t0.reshape(-1) if isinstance(t0, Tensor) else torch.tensor([float(t0)], dtype=torch.float64, device="cpu")
    t = torch.cat([start, start.detach() + (-1.0 if reverse_time else 1.0)])
    return odeint_interface(func, y0, t, event_fn=event_fn, **kwargs)


def known_options(method: str) -> frozenset[str]:
    """The keys of options that this method takes; of others it warns."""
    return frozenset([*_COMMON, *_keys_of(method), "dtype" if method in ADAPTIVE else "norm"])


def _keys_of(method: str) -> Sequence[str]:
    if method == "scipy_solver":
        return _SCIPY_OPTIONS
    return (*(_ADAPTIVE_OPTIONS if method in ADAPTIVE else _FIXED_OPTIONS), *_LIMITS.get(method, ()))


def _options(method: str, options: dict[str, Any] | None, fixed_interp: bool = True) -> dict[str, Any]:
    """What `solve` takes by name, from torchdiffeq's options; those that the method does not know are warned of."""
    found = find_method(method)
    if not options:
        return {"interp": "linear"} if fixed_interp and method not in ADAPTIVE else {}
    given = dict(options)
    known = _keys_of(method)
    if method in ADAPTIVE:
        dtype = given.pop("dtype", torch.float64)
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"options['dtype'], the type of time, must be torch.float64, got {dtype}")
    else:
        given.pop("norm", None)
    takes = getattr(found, "takes", ())
    known = (*known, *(name for name in ("jac", "mass", "jac_sparsity") if name.removesuffix("_sparsity") in takes))
    unknown = {name: given.pop(name) for name in list(given) if name not in known and name not in _COMMON}
    if unknown:
        warnings.warn(f"{method}: Unexpected arguments {unknown}", stacklevel=3)
    if method not in ADAPTIVE and fixed_interp:
        given.setdefault("interp", "linear")
    return given


def _adjoint_options(method: str, given: dict[str, Any], params: Sequence[Tensor]) -> dict[str, Any]:
    """adjoint_options replace the forward options whole: what they leave out is at its default."""
    given = dict(given)
    norm = given.pop("norm", None)
    if callable(norm) and not all(param.requires_grad for param in params):
        warnings.warn(
            "an adjoint parameter does not require a gradient: it is left out of the adjoint and of its norm", stacklevel=3
        )
    defaults = {name: parameter.default for name, parameter in inspect.signature(solve).parameters.items()}
    names = (*_ADAPTIVE_OPTIONS, "step_size", "grid_constructor", "perturb", "max_iters", "max_order")
    filled = {name: defaults[name] for name in names if name != "norm"}
    return {**filled, **_options(method, given, fixed_interp=False), **({} if norm is None else {"norm": norm})}
