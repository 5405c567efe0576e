"""compile(field): a field whose solves run as one kernel call each, and how a solve of one is served."""

import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._device import DeviceContext

from ..callbacks import find_callbacks
from ..integrate import Grid, Options
from ..methods import find_method
from ..problem import Problem, Structure, WithArguments
from . import self_check
from .attach import Sources
from .build import NoCompiler
from .emit import SOLVES, Target
from .engine import Engine
from .leaks import line_of, summary
from .marks import Disturbed
from .plan import Plan
from .reading import Reading
from .recheck import recheck
from .refusals import Never, Readings, Refused
from .teams import H100, MATMULS
from .trace import Unreadable

_SERVED = (torch.float32, torch.float64)
_SMALL = 64  # numbers: a batch of no more, whose samples are mixed, is read as one sample
_MANY = 1 << 16  # samples
_MOST_PLANS = 4  # kept of one kind of state: those of training and of evaluation, say
_FLAGS = (  # of torch, which func may ask for; whether gradients or inference mode are on is left to check.py
    torch.are_deterministic_algorithms_enabled, torch.is_deterministic_algorithms_warn_only_enabled,
    torch.is_warn_always_enabled, torch.get_float32_matmul_precision,
)  # fmt: skip
_reading = threading.RLock()  # of whoever calls func with what is not the user's
_turns = 0  # of readings that have begun and have ended
_warned = False


class CompiledField(nn.Module):
    """What `compile` gives: the field itself when called, and a program of it wherever it is solved.

    What func reads from Python is compared at every call, and where it has changed func is read anew: modules, functions
    and numbers in attributes, items, closures, defaults, global names and args. Numbers that have changed are arguments of
    the code from then on; where something else changes at call after call, the stepper serves. What cannot be compared so
    is refused, and so are values of the time, the state or args that reach Python. func's own Python does not run in a
    compiled solve: what it counts or keeps there, as a tensor for a regularizer, stays as it was.
    """

    def __init__(self, func: Callable[..., Any], cuda: bool = False, matmul: str = "float32"):
        super().__init__()
        self.func, self._cuda, self._matmul = func, cuda, matmul
        self._plans: dict[Any, list[Plan | Refused]] = {}  # the last few of each kind of state
        self._readings: dict[Any, Readings] = {}  # of each kind
        self._read_of: tuple = ()  # the func of the plans; in a tuple, for it is no module of this one a second time
        self._distrust = ""  # why it is read no more, see recheck.py
        self._why: list[str] = []  # this engine refused the last solve
        self._explained = ""
        self._latest: Plan | None = None

    def forward(self, t: Tensor, y: Any, *args: Any) -> Any:
        return self.func(t, y, *args)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "func":
                raise
            return getattr(super().__getattr__("func") if "func" in self._modules else self.__dict__["func"], name)

    def reset(self) -> None:
        """Forgets what was read."""
        self._plans.clear()
        self._readings.clear()
        self._latest, self._distrust = None, ""

    def distrust(self, reason: str) -> None:
        """The stepper serves from now on, until `reset`."""
        self.reset()
        self._distrust = reason

    def explain(self) -> str:
        """How the last solve was served, and why not by the compiled field where it was not."""
        return self._explained or "not solved yet"

    def served_by(self, engine: str, refusals: dict[str, str]) -> None:
        """For `explain`."""
        self._explained = in_words(engine, refusals)

    def source(self, method: str = "dopri5", solve: str = "per_sample", *, cuda: bool = False, lanes: str = "pack") -> str:
        """The C++ text of the field read last, with one method. solve: one of "per_sample", "joint", "grid", and for gradients
        "adjoint_per_sample", "adjoint_joint", "adjoint_grid", "reverse". cuda: the kernel for many samples on an H100. Raises
        RuntimeError before the first solve."""
        if solve not in SOLVES:
            raise ValueError(f"solve must be one of {SOLVES}, got {solve!r}")
        if self._latest is None:
            raise RuntimeError("the field has not been read yet: solve with it once; " + self.explain())
        dtype = "float" if self._latest.dtype == torch.float32 else "double"
        team = self._latest.team((solve,), _MANY, H100, self._matmul) if cuda else None
        return self._latest.source(find_method(method), Target(dtype, "one" if cuda else lanes, solve, team))

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_plans": {},
            "_readings": {},
            "_read_of": (),
            "_latest": None,
            "_distrust": "",
            "_why": [],
            "_explained": "",
        }  # libraries stay behind; the cache has them

    # How a solve asks

    def plan(self, structure: Structure, args: Sequence[Any], per_sample: bool) -> Plan:
        """Raises Unreadable."""
        func = self.func
        if not self._read_of or self._read_of[0] is not func:
            self.reset()
            self._read_of = (func,)
        if self._distrust:
            raise Unreadable(self._distrust)
        key = self._key(structure, args, per_sample)
        whole = (key, tuple([leaf.shape for leaf in structure.leaves]))  # of a state that is one sample
        readings = self._readings.get(key) or self._readings.setdefault(key, Readings())
        found = self._held((key, whole), args, readings)
        if found is None:
            with _reading, _turn():
                found = self._held((key, whole), args, readings)  # while another thread reads, Numbers stand for numbers
                if found is None:
                    stale = [*self._plans.get(key, ()), *self._plans.get(whole, ())]
                    readings.begin(stale, args)
                    found = self._read(structure, args, per_sample, stale)
                    kind = whole if isinstance(found, Refused) or found.whole else key
                    kept = [plan for plan in self._plans.get(kind, ()) if plan.guards.alive]
                    self._plans[kind] = [found, *kept[: _MOST_PLANS - 1]]
        if isinstance(found, Refused):
            raise found.error
        self._latest = found
        return found

    def _held(self, kinds: Sequence[Any], args: Sequence[Any], readings: Readings) -> "Plan | Refused | None":
        """What has been read and is so still."""
        for kind in kinds:
            for found in self._plans.get(kind, ()):
                if found.guards.hold(args):
                    readings.served += 1
                    return found
        return None

    def _key(self, structure: Structure, args: Sequence[Any], per_sample: bool) -> tuple:
        """Shapes and types, for which there are plans; what else a reading depends on is compared by the guards of each."""
        rows = structure.leaves[0].shape[0] if structure.leaves[0].dim() else -1
        leaves = tuple([(leaf.dtype, leaf.device, leaf.shape[1:], leaf.dim(), rows == 1) for leaf in structure.leaves])
        given: list[Any] = []
        for x in args:
            if isinstance(x, Tensor):
                one = x.dim() > 0 and x.shape[0] == rows  # it may have one entry a sample
                shape, kind = x.shape[1:] if one else x.shape, (type(x), not vars(x))  # attributes of Python
                given.append((x.dtype, x.device, one, shape, x.requires_grad, kind))
            else:
                given.append(type(x))
        device = torch.get_default_device() if torch._C._len_torch_function_stack() else None
        return structure.spec, leaves, tuple(given), per_sample, device, tuple([flag() for flag in _FLAGS])

    @torch.inference_mode(False)
    def _read(self, structure: Structure, args: Sequence[Any], per_sample: bool, stale: list[Any]) -> Plan | Refused:
        """stale: plans that were right once; numbers that are others now become arguments of the code."""
        numbers = stale[0].guards.changed_numbers(args) if stale else ()
        found = self._read_with(structure, args, per_sample, numbers) if numbers else None
        return found if isinstance(found, Plan) else self._read_with(structure, args, per_sample, ())

    def _read_with(self, structure: Structure, args: Sequence[Any], per_sample: bool, numbers: Any) -> Plan | Refused:
        leaves = structure.leaves
        rows = {leaf.shape[0] if leaf.dim() else None for leaf in leaves}
        failure = Unreadable("the leaves of y0 have no common axis of samples")
        if len(rows) == 1 and None not in rows:
            try:
                with _in_words():
                    return Plan(self.func, structure, args, False, Reading(self.func, args, numbers, leaves[0]), per_sample)
            except Unreadable as error:
                failure = error
        vectors = all(leaf.dim() < 2 for leaf in leaves)
        if not per_sample and (vectors or sum(leaf.numel() for leaf in leaves) <= _SMALL):
            try:
                with _in_words():
                    return Plan(self.func, structure, args, True, Reading(self.func, args, numbers, leaves[0]))
            except Unreadable as error:
                if vectors:
                    failure = error
        code = getattr(getattr(self.func, "__func__", self.func), "__code__", None)
        if code is not None and 'File "' not in str(failure):  # torch keeps the lines of modules alone
            failure = type(failure)(f'{failure} (File "{code.co_filename}", line {code.co_firstlineno}, in {code.co_name})')
        try:
            with _in_words():
                again = isinstance(failure, Disturbed)
                return Refused(failure, Never() if again else Reading(self.func, args).guards(args))
        except Unreadable as error:
            # What cannot be compared may be gone at the next call, as a parameter that is not initialized yet.
            return Refused(error, Never())


@contextmanager
def _in_words() -> Iterator[None]:
    """Whatever a reading comes upon is no reason for a solve to fail that runs without it."""
    try:
        yield
    except Unreadable:
        raise
    except Exception as error:
        raise Unreadable(f"func could not be read: {summary(error)}{line_of(error)}") from error


def compile(func: Callable[..., Any], *, cuda: bool = False, matmul: str = "float32") -> CompiledField:
    """A field that is compiled to C++ when it is first solved: the whole solve, and its backward, then run in one call each.

    func: ``func(t, y)`` or ``func(t, y, *args)``, a Module or a function, made of linear layers, matrix products with
        parameters, pointwise functions, concatenations, slices, sums, softmax and layer norms over features, and derivatives
        of these by `torch.autograd.grad`. Arguments given to `solve(args=...)` with one entry a sample are read as such.

    cuda: whether solves of states on CUDA run the compiled field too, which needs nvcc. No GPU has run that yet.
    matmul: on CUDA, what the operands of wide linear layers are rounded to where the state is float32: "float32" (not at all),
        "tf32" (11 bits) or "bf16" (8 bits). Tensor cores then multiply them and add up in float32; tolerances below some 1e-3
        or 1e-2 cost steps and bring nothing. Elsewhere it changes nothing.

    The result is a Module that can be used wherever func is. Training never compiles anew; another shape, type, method or
    control does, once, and the cache on disk keeps it. A solve that cannot be served so, because func cannot be read, the
    state is not float32 or float64, or an option needs the stepper, is served by the stepper:
    ``field.explain()`` says why. ``field.source()`` shows the text.

    Beside the stepper: results agree to rounding, gradient="direct" is computed as "checkpoint" is, and the error norm of
    gradient="adjoint" leaves the parameters out.

    Raises TypeError if func is not callable, and ValueError if matmul is not one of these.

    >>> import torch, odenet_cuda
    >>> field = odenet_cuda.compile(lambda t, y: -y)
    >>> round(float(odenet_cuda.odeint(field, torch.ones(1, 1), torch.tensor([0.0, 1.0]))[-1]), 4)
    0.3679
    >>> field.explain()
    'compiled'
    """
    if not callable(func):
        raise TypeError(f"func must be callable as func(t, y), got {type(func).__name__}")
    if matmul not in MATMULS:
        raise ValueError(f"matmul must be one of {tuple(MATMULS)}, got {matmul!r}")
    return func if isinstance(func, CompiledField) else CompiledField(func, cuda, matmul)


def in_words(engine: str, refusals: dict[str, str]) -> str:
    """How a solve was served, and why not by the compiled field. refusals: those of `Solution.explanation`."""
    if engine == "compiled":
        return "compiled"
    return f"served by the {engine}: " + refusals.get(
        "compiled", "inside a transform of torch, or while operations are written down"
    )


def compiled_field(func: Any) -> tuple[CompiledField | None, tuple]:
    """The compiled field that func is, if it is one, and its arguments."""
    args: tuple = ()
    if isinstance(func, WithArguments):
        func, args = func._func, func._args
    return (func, args) if isinstance(func, CompiledField) else (None, args)


def prepare(
    field: CompiledField,
    args: Sequence[Any],
    problem: Problem,
    options: Options,
    structure: Structure,
    t: Tensor,
    grid: Grid | None,
    gradient: str,
    backward: Any,
    needs: dict[str, bool],
) -> Engine | None:
    """The engine of this solve, or None where the stepper must serve it; `field.explain` then says why. needs: what only the
    stepper has, and whether the solve was asked for it."""
    global _warned
    field._why = []
    if len(problem.t) == 1 or any(leaf.numel() == 0 for leaf in structure.leaves):
        field._why = ["there is nothing to solve"]
        return None
    why = [f"{name} needs it" for name, needed in needs.items() if needed]
    if problem.device.type != "cpu" and not field._cuda:
        why.append(f"the state is on {problem.device}; compile(func, cuda=True) serves it, which no GPU has run yet")
    kinds = {leaf.dtype for leaf in structure.leaves}
    if len(kinds) > 1 or not kinds <= set(_SERVED):
        why.append("the state is not all float32 or all float64")
    if problem.norm is not None or any(isinstance(tol, Tensor) for tol in (*problem.rtol, *problem.atol)):
        why.append("a norm of the user, or tolerances that are tensors")
    if options.perturb:
        why.append("perturb=True needs it")
    if torch._C._is_any_autocast_enabled():
        why.append("autocast is on")
    if torch.is_anomaly_enabled():
        why.append("anomaly detection is on")
    if _modes():
        why.append("a mode that sees torch's operations is on")
    if torch.is_grad_enabled() and t.requires_grad:
        why.append("a gradient for t needs it")
    if find_callbacks(field.func, structure, options.adaptive):
        why.append("callbacks of func need it")
    if not why:
        try:
            plan = field.plan(structure, args, problem.per_sample)
            sources = Sources(plan, structure, args)
            how = gradient if sources.wanted else ""
            adjoint = backward.options if how == "adjoint" else None
            if adjoint is not None and problem.per_sample and options.adaptive and not adjoint.tableau.fsal:
                raise Unreadable("the stepper's per-sample adjoint by this method evaluates the first stage of a step anew")
            engine = Engine(plan, problem, options, args, grid, field._matmul, how, adjoint)
            engine.sources = sources
            plan.build(engine.kind.wanted)
            if self_check.due(engine, args):
                with _reading:
                    self_check.check(engine, structure, args, field.func, gradient, backward)
            recheck(field, engine, structure, args, _reading)
            engine.begun = time.perf_counter()
            return engine
        except Unreadable as error:
            why.append(str(error))
        except NoCompiler as error:
            why.append(str(error))
            if not _warned and not error.quiet:
                _warned = True
                warnings.warn(f"odenet_cuda.compile: {error}; the stepper serves instead", stacklevel=4)
        except Warning:  # of ours, where filters make them errors
            raise
        except Exception as error:  # what func reads may change at any moment, by another thread
            why.append(f"what func reads has changed in between: {summary(error)}")
    field._why = why
    return None


def _modes() -> bool:
    """Whether there are modes that see torch's functions or operations, besides that of a default device."""
    if torch._C._len_torch_dispatch_stack():
        return True
    modes = range(torch._C._len_torch_function_stack())
    return any([not isinstance(torch._C._get_function_stack_at(i), DeviceContext) for i in modes])


@contextmanager
def _turn() -> Iterator[None]:
    global _turns
    _turns += 1
    try:
        yield
    finally:
        _turns += 1


def undisturbed(run: Callable[[], Any]) -> Any:
    """run(), a solve by the stepper. Where it raises and another thread read func meanwhile, it may have met what stands in
    func's attributes for the reading alone, see numbers.py and marks.Unset: once more then, while nobody reads."""
    before = _turns
    try:
        return run()
    except Exception:
        if before % 2 == 0 and _turns == before:
            raise
    with _reading:
        return run()
