"""How a solve of a compiled field is served: the engine of it, or in words why there is none."""

import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._device import DeviceContext

from ..callbacks import find_callbacks, may_have_callbacks
from ..integrate import Grid, Options
from ..problem import Problem, Structure
from ..rosenbrock import rosenbrock_of
from ..tableau import ButcherTableau
from . import self_check
from .attach import Sources
from .compilation import Compilation
from .compilers import NoCompiler
from .effects import FirstCall
from .engine import Engine
from .leaks import summary
from .plan import Plan
from .plans import LOCK, Plans
from .recheck import recheck
from .trace import Unreadable

_NOTHING = "there is nothing to solve"
_MOST_IMPLICIT = 32  # numbers of a system, whose matrix lies on the stack of a thread
_warned = False


def prepare(
    field: Compilation,
    args: Sequence[Any],
    problem: Problem,
    options: Options,
    structure: Structure,
    t: Tensor,
    grid: Grid | None,
    gradient: str,
    backward: Any,
    needs: Sequence[str],
    chosen: Sequence[Tensor] | None = None,
) -> Engine | str:
    """The engine of this solve, or why there is none. needs: what the solve was asked for that only the stepper has. chosen:
    the tensors that the user wants gradients for besides y0, None: all."""
    global _warned
    try:
        func, plans = field.func, field.plans
        if field.why:
            return field.why
        rosenbrock = rosenbrock_of(options.tableau) is not None
        kind = plans.kind(structure, args, problem.per_sample, field.cuda, rosenbrock)
        if kind.empty or len(problem.t) == 1 or (problem.own and not problem.last_output.any()):
            return _NOTHING
        why = [f"{name} needs it" for name in needs] + kind.refusals
        why += of_options(problem, options) + of_torch(t, gradient)
        if may_have_callbacks(func) and find_callbacks(func, structure, options.adaptive):
            why.append("callbacks of func need it")
        if why:
            return "; ".join(why)
        plan, called = _find(plans, problem, partial(plans.find, func, kind, structure, args))
        if rosenbrock and gradient != "adjoint" and plan.state <= _MOST_IMPLICIT:
            plan = _with_second(field, plan, structure, args, chosen, problem.per_sample)
        args = plan.rows.of(args)
        sources = Sources(plan, structure, args, chosen, t)
        how = gradient if sources.wanted else ""
        adjoint = backward.options if how == "adjoint" else None
        if refusal := _of_way_back(problem, options, adjoint) or (_of_rosenbrock(plan) if rosenbrock else ""):
            return refusal
        engine = Engine(plan, problem, options, args, grid, field.matmul, how, adjoint)
        engine.sources, engine.backward, engine.called = sources, backward, called
        if engine.kind.trusted is None:
            plan.build(engine.kind.wanted)
        if self_check.due(engine, args):
            with LOCK:
                self_check.check(engine, structure, args, func, gradient, backward)
        recheck(field, engine, structure, args, LOCK)
        engine.begun = time.perf_counter()
        return engine
    except Unreadable as error:
        return str(error)
    except NoCompiler as error:
        if field.named and not _warned and not error.quiet:
            _warned = True
            warnings.warn(f"odenet_cuda.compile: {error}; the stepper serves instead", stacklevel=4)
        return str(error)
    except Warning:  # of ours, where filters make them errors
        raise
    except Exception as error:  # what func reads may change at any moment, by another thread
        return f"what func reads has changed in between: {summary(error)}"


def _find(plans: Plans, problem: Problem, find: Callable[[], Plan]) -> tuple[Plan, int]:
    """The plan, and how often func was called for it as a solve calls it first: once where it makes then what it keeps."""
    try:
        return find(), 0
    except FirstCall:
        if not plans.called_first:
            raise
    plans.called_first = False
    with torch.enable_grad():
        field: Any = problem.field.again()  # type: ignore[attr-defined]
        field(problem.start_time(False), [leaf.detach() for leaf in problem.leaves])
    plan = find()
    plans.called_first = True
    return plan, 1


def _with_second(
    field: Compilation, plan: Plan, structure: Structure, args: Sequence[Any], chosen: Sequence[Tensor] | None, per_sample: bool
) -> Plan:
    """One that has second derivatives too, which gradients of a Rosenbrock method need; the same where none are wanted."""
    if not Sources(plan, structure, plan.rows.of(args), chosen).wanted:
        return plan
    kind = field.plans.kind(structure, args, per_sample, field.cuda, True, second=True)
    return field.plans.find(field.func, kind, structure, args)


def of_options(problem: Problem, options: Options) -> list[str]:
    why = []
    if not isinstance(options.tableau, ButcherTableau) and rosenbrock_of(options.tableau) is None:
        why.append(f"steps of method={options.method!r} are not compiled")
    if problem.norm is not None or not problem.fused_error:
        why.append("a norm of the user, or tolerances that are tensors")
    if options.perturb:
        why.append("perturb=True needs it")
    return why


def _of_way_back(problem: Problem, options: Options, adjoint: Options | None) -> str:
    """adjoint: of the backward solve, where a gradient is wanted so."""
    if adjoint is None:
        return ""
    if not isinstance(adjoint.tableau, ButcherTableau):
        served = "; gradient='direct' is" if rosenbrock_of(adjoint.tableau) is not None else ""
        return f"backward steps of adjoint_method={adjoint.method!r} are not compiled{served}"
    anew = problem.per_sample and options.adaptive and not adjoint.tableau.fsal
    return "the stepper's per-sample adjoint by this method evaluates the first stage of a step anew" if anew else ""


def _of_rosenbrock(plan: Plan) -> str:
    if plan.state > _MOST_IMPLICIT:
        return f"a sample has {plan.state} numbers: compiled systems have at most {_MOST_IMPLICIT}"
    return ""


def of_torch(t: Tensor, gradient: str) -> list[str]:
    """What is on now."""
    why = []
    if torch._C._is_any_autocast_enabled():
        why.append("autocast is on")
    if torch.is_anomaly_enabled():
        why.append("anomaly detection is on")
    if _modes():
        why.append("a mode that sees torch's operations is on")
    if t.requires_grad and torch.is_grad_enabled() and gradient != "adjoint":
        why.append("a gradient for t needs it")
    return why


def _modes() -> bool:
    """Whether there are modes that see torch's functions or operations, besides that of a default device."""
    if torch._C._len_torch_dispatch_stack():
        return True
    modes = range(torch._C._len_torch_function_stack())
    return bool(modes) and any([not isinstance(torch._C._get_function_stack_at(i), DeviceContext) for i in modes])
