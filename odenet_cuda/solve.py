"""The front door: solve(func, y0, t, ...) -> Solution."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .compiled.compilation import check_compile
from .engines import serve, serve_events
from .event import Event, Events, Jump, check_events, check_jumps
from .gradients.adjoint_setup import NOT_GIVEN
from .interpolant import State
from .mass import System
from .methods import on_host
from .problem import Structure, with_arguments
from .request import Request
from .resume import check_resume
from .saving import saved
from .segments import goes_on, in_segments
from .settings import settings_of, settings_of_method
from .solution import Solution
from .transforms import between_graphs


@between_graphs(lambda *args, method="dopri5", gradient="", **kwargs: on_host(method) or gradient == "reversible")
def solve(
    func: Callable[..., Any],
    y0: State | None,
    t: Any,
    *,
    args: Sequence[Any] = (),
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
    max_iters: int | None = None,
    max_order: int | None = None,
    solver: str | None = None,
    jac: Callable[..., Tensor] | None = None,
    mass: Tensor | None = None,
    jac_sparsity: Tensor | None = None,
    cuda_graph: bool | str = False,
    interp: str = "method",
    norm: Callable | None = None,
    regularizers: Sequence[str] = (),
    dense: bool = False,
    on_failure: str = "raise",
    max_checkpoints: int | None = None,
    adjoint_params: Sequence[Tensor] | None = None,
    adjoint_method: str | None = None,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_options: dict[str, Any] | None = None,
    compile: str | bool | None = None,
    events: Event | Sequence[Event] | None = None,
    max_events: int = 100,
    jumps: Jump | Sequence[Jump] = (),
    resume: Solution[State] | None = None,
    valid: Callable[[Any], Any] | None = None,
    integrals: Callable[..., Any] | None = None,
    integrals_in_norm: bool = False,
    save: Callable[..., Any] | None = None,
    every: int | None = None,
    progress: bool = False,
) -> Solution[State]:
    """Solves dy/dt = func(t, y), y(t[0]) = y0, and gives the state at every t.

    func: called as ``func(t, y)``; returns dy/dt in the structure of y. t is a 0-dimensional tensor of y's real type, under
        per-sample control a tensor [batch, 1, ...] of y's rank. The tensors it is given are written again after the call.
    args: what func is called with after (t, y); tensors among it get gradients.
    y0: a tensor, real or complex, or a tuple, list, dict or nest of them; float16 and bfloat16 are summed in float32, and their
        times have 11 and 8 bits.
    t: [T] times, strictly increasing or decreasing; a tensor (which may require a gradient) or numbers. Under per-sample
        control a tensor [batch, T] gives each sample its own, of either direction, with NaN at the end where it has fewer: its
        outputs there are NaN, and nothing is solved for it after its last time.
    method: adaptive "dopri5", "tsit5", "vern7", "vern9", "dopri8", "bosh3", "fehlberg2", "adaptive_heun", for stiff systems
        "rodas5p" and, crude, "rosenbrock23", or "kvaerno5" and "kvaerno3", or "bdf", all of which differentiate func, and
        "auto", which makes steps by tsit5 and, while they are stiff, by rodas5p, those of each sample by its own; on a grid
        "euler", "midpoint", "heun2", "heun3", "rk4", and implicit, by Newton's method system by system, "implicit_euler",
        "implicit_midpoint", "trapezoid", "sdirk2", "trbdf2", "radauIIA3", "radauIIA5", "gl4", "gl6"; symplectic, for y = (q, p)
        with dq of p alone and dp of t and q alone, "leapfrog" (velocity Verlet) and "yoshida4", see `Separable`; of two steps
        "ab2" and, for samplers, "dpmpp_2m"; of many steps "explicit_adams" and "implicit_adams" (also "fixed_adams");
        "scipy_solver", one of scipy's, outside of torch.
    rtol, atol: a step is accepted where norm(error / (atol + rtol * max(|y0|, |y1|))) <= 1. Numbers, tensors that broadcast
        against the state, or one for each leaf.
    gradient: "direct", exact for the discrete solve, memory grows with the steps; "adjoint", one more solve backwards, memory
        does not grow (Chen et al. 2018, arXiv:1806.07366); "checkpoint", as exact as direct, keeps the state of each step
        alone and makes the steps again; "quadrature", the adjoint on the stored solution; "reversible", as exact, and memory
        does not grow: an explicit method runs as two coupled states whose steps can be undone (McCallum and Foster 2024,
        arXiv:2410.11648), at twice the calls of func. Steps then end at every time of t. Where func contracts the two states
        part, as exp of the integral of its rate: adaptive steps then become small, and a grid warns at its end. What rounding
        leaves of y0 on the way back is `Stats.adjoint_drift`. leapfrog and yoshida4 are undone as they are. All give gradients
        for y0, t and every tensor func depends on. All but direct call func again on the way back: what it reads must be as in
        the solve, and what it computes from tensors with gradients must not be kept by it from one call to the next
        ("checkpoint" would lose the gradient of what was kept in the solve). A `torch.utils.checkpoint` inside func needs
        use_reentrant=False.
    step_control: "joint", one step size for the whole state; "per_sample", one for each sample on axis 0 of every leaf.
    controller: "I", "PI", "PID" or (proportional, integral, derivative) coefficients (Soderlind 2003).
    first_step, min_step, max_step: step sizes, positive, in units of t. A step of min_step is accepted whatever its error.
    max_num_steps: steps tried from one output to the next before the solve is given up.
    safety, ifactor, dfactor: the next step is the last times a factor in [dfactor, ifactor].
    step_t, jump_t: times at which a step must end; func is discontinuous at those of jump_t.
    step_size, grid_constructor: the grid of a method without error control, else t itself; ``grid_constructor(func, y0, t)``
        returns the times of the grid. perturb: evaluate at the ends of a step just inside it. max_iters: iterations in which
        an implicit method must have solved a step, 100, and of the corrector of implicit_adams, 4. max_order: of bdf, 5, and of
        Adams methods, 12; the higher, the smaller the steps with which they are stable, of explicit_adams above all.
    solver: of scipy_solver: "LSODA", the default, "Radau", "BDF", "RK45", "RK23" or "DOP853", with gradient="adjoint" alone,
        whose backward solve is by rodas5p, dopri5, bosh3 or dopri8, by its kind.
    jac: for implicit and stiff methods, ``jac(t, y, *args)`` gives df/dy as a tensor, [batch, n, n] with a row of n numbers a
        sample, or [n, n] of the whole state; else it comes from torch. A solve that records gradients asks it only where no
        derivative of it is needed. mass: for rodas5p and rosenbrock23, the constant matrix M [n, n] of M dy/dt = func(t, y),
        which may be singular: then y0 must fulfil the equations without a derivative, and these must determine the rest (index
        1). With gradient="direct" or "checkpoint". jac_sparsity: for wide states, where df/dy may be other than 0, [n, n],
        dense or sparse, for systems of n numbers up to 8,192: df/dy then takes as many products as the pattern has colours,
        not n. A pattern that misses an entry raises ValueError.
    cuda_graph: on CUDA, capture func and the kernels around it, and replay them: True or "step" a step of an adaptive solve;
        "loop" lets the device repeat that while the solve goes on, 256 steps a launch (CUDA 12.4; func may not draw random
        numbers). A fixed grid of up to 4,096 calls of func is captured whole, and its way back too. What func does in Python
        besides (counting its calls, say) is then done a few times only. The last 16 graphs are kept, with their memory, until
        ``odenet_cuda.graphed.capture.graphs.clear()``. Not where every step needs the host: jump_t, callbacks, valid, resume,
        every, progress, max_checkpoints of adaptive methods, gradient="quadrature". An adaptive gradient="direct" is computed
        as "checkpoint" is. No GPU has run this yet.
    interp: outputs inside a step from the "method"'s own interpolant, "linear", or "cubic" (Hermite).
    norm: of the scaled error, a function of the state; default: the largest of the leaves' root mean squares.
    regularizers: costs of the trajectory to give as `Solution.regularizers`, with gradients: "kinetic", "jacobian" (Finlay et
        al. 2020), "error", "stiffness" (Pal et al. 2021; not by the adjoint); see the module `regularizers`.
    dense: give a `Solution.interpolant`, at the cost of keeping every step.
    on_failure: "raise" a `SolverError`, or "return" a Solution whose `status` says why and whose `ys` are NaN where the
        solve did not get.
    max_checkpoints: how many states "checkpoint" may keep; steps between are made again, by the binomial schedule (Griewank
        and Walther 2000, doi 10.1145/347837.347846). Default: all.
    adjoint_params: tensors to give gradients to, but not by "direct"; default: all that func depends on. adjoint_method,
        adjoint_rtol, adjoint_atol, adjoint_options: for the backward solve, by default as forward; a stiff or implicit
        method differentiates func twice there, and leaves the parameters out of its error norm. Options by name as
        above, and ``{"norm": "seminorm"}`` leaves the parameters out of its error norm (Kidger et al. 2021,
        arXiv:2009.09457), or a function of the tuple (t, y, adjoint, *params). Of "reversible" {"coupling": 0.999} alone, in
        (0, 1]: the smaller, the longer steps may be where func contracts, and the more rounding grows back, by 1 / coupling a
        step.
    compile: "auto", func is compiled where it can be read; False: not; default: what `set_compile` says.
    events: zeros of functions of (t, y) that end the solve, or change the state, under per-sample control each sample's own;
        see `Event`. The Solution then has `event_t`, `event_y` and `event_index`, with first derivatives, and `ys` is NaN after
        an event that ends it. max_events: the last of so many does, for each sample.
    jumps: changes of the state at known times, see `Jump`.
    resume: a Solution of the same func, method and step control, from which this solve goes on as one long solve would have,
        to the bit: with its step size, the memory of its controller and its last slope. It may have reached its end, or
        max_num_steps, or been interrupted: then it is the ``solution`` of the SolverError or of the KeyboardInterrupt. y0 is
        its y_last, or None; what has its value and a gradient, ``ys[-1]`` say, has one here too. t begins with its t_last:
        ``solve(func, None, solution.times_ahead(t), resume=solution)``. Where a gradient is recorded, func is called once more,
        at the start.
    valid: ``valid(y)``, whether a state lies in the domain that the solution may not leave (populations, concentrations): a
        bool, under per-sample control bool [batch], a row for each sample. A step that ends outside is rejected and tried again
        with half its size; within a step func may still be called there.
    progress: show how far the solve has come, its step size, steps and rejections, and so for solves of the adjoint, by tqdm
        (``pip install odenet-cuda[progress]``). On CUDA the host waits for each step.
    save: ``save(t, y)``, or ``save(t, y, *args)``, gives what ys is to hold of each output: a tensor or a nest of them, under
        per-sample control with a row for each sample. Under ``torch.no_grad()`` adaptive solves keep no states then, and on
        CUDA the host waits for each step; else states are kept, for gradients need them, and save is part of the graph.
    every: an output at every so many accepted steps of the state, or of each sample, beside the first and the last time: t
        holds these two, and `Solution.t` those of the outputs, under per-sample control [batch, T]. On CUDA the host waits for
        each step. Where they lie is taken as given by gradients.
    integrals: ``integrals(t, y)``, or ``integrals(t, y, *args)``: a tensor or a nest of them, under per-sample control with a
        row for each sample, whose integral over time is `Solution.integrals`, with gradients by every method. Its error does
        not count in the choice of the steps; with integrals_in_norm it does, by the tolerances of the first leaf.

    Raises ValueError, TypeError: an argument is wrong; the message names it. NotImplementedError: not part of this version.
    ImportError: progress without tqdm.
    SolverError: the solve failed; it has the sample, the time, the step and the last accepted state.

    Source: Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, II.4 to II.6.

    >>> import torch
    >>> from odenet_cuda import solve
    >>> solution = solve(lambda t, y: -y, torch.ones(1), [0.0, 1.0])
    >>> round(float(solution.ys[-1, 0]), 4)
    0.3679
    """
    settings = settings_of(
        method, gradient, step_control, controller, first_step, min_step, max_step, max_num_steps, safety, ifactor, dfactor,
        step_t, jump_t, step_size, grid_constructor, perturb, max_iters, max_order, solver, cuda_graph, interp,
        regularizers, dense, on_failure, max_checkpoints, every, progress,
    )  # fmt: skip
    if compile is not None:
        check_compile(compile)
    adjoint = adjoint_method, adjoint_rtol, adjoint_atol, adjoint_options
    ends, changes = check_events(events, args), check_jumps(jumps)
    more: dict[str, Any] = {"resume": resume, "valid": valid, "system": System(jac, mass, jac_sparsity)}
    more |= {"integrals": integrals, "integrals_in_norm": integrals_in_norm}
    if resume is not None:
        check_resume(resume)
        y0 = resume.y_last if y0 is None else y0

    def request(y0: Any, t: Any, ends: Events | None) -> Request:
        return Request(func, y0, t, args, settings, rtol, atol, norm, adjoint_params, adjoint, compile, ends, **more)

    def run(y0: Any, t: Any, ends: Events | None) -> Solution:
        return serve(request(y0, t, ends))

    def by_stepper(y0: Any, t: Any, ends: Events | None) -> Solution:
        return serve(request(y0, t, ends).but(compiled=None))

    def at_once(y0: Any, check: Callable[[Any], Solution]) -> Solution | None:
        return None if changes else serve_events(request(y0, t, ends), max_events, lambda: check(by_stepper))

    if goes_on(ends, changes) and mass is not None:
        raise NotImplementedError("mass is not served where events or jumps change the state")
    if goes_on(ends, changes):
        refused = ("resume", resume is not None), ("integrals", integrals is not None), ("every", every is not None)
        try:
            solution = in_segments(run, at_once, func, y0, t, args, ends, changes, max_events, settings, refused)
        except KeyboardInterrupt as interrupt:
            vars(interrupt).pop("solution", None)  # of one segment
            raise
        if save is not None:
            saved(solution, with_arguments(save, args), settings.per_sample, t if isinstance(t, Tensor) else None)
        return solution
    more["save"] = save
    return run(y0, t, ends)


@between_graphs(lambda func, y0, t, method, *rest: on_host(method))
def solve_by_method(
    func: Callable[..., Any],
    y0: Structure,
    t: Any,
    method: str,
    rtol: Any,
    atol: Any,
    gradient: str = "direct",
    params: Sequence[Tensor] | None = None,
    adjoint: tuple[Any, Any, Any, Any] = NOT_GIVEN,
) -> Solution:
    """`solve` as torchdiffeq's functions ask for it where they are given no options: these are then not looked at one by one.
    params, adjoint: see `Request`."""
    settings = settings_of_method(method, gradient)
    return serve(Request(func, y0, t, (), settings, rtol, atol, None, params, adjoint))
