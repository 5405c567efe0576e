"""compile(field): a field whose solves run as one kernel call each."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..methods import find_method
from ..printing import table
from ..problem import Structure, parted
from .compilation import Compilation, automatic
from .emit import SOLVES, Target
from .plan import Plan
from .plans import Plans
from .teams import H100, MATMULS

_MANY = 1 << 16  # samples


class CompiledField(nn.Module):
    """What `compile` gives: the field itself when called, and a program of it wherever it is solved.

    What func reads from Python is compared at every call, and where it has changed func is read anew: modules, functions
    and numbers in attributes, items, closures, defaults, global names and args. Numbers that have changed are arguments of
    the code from then on; where something else changes at call after call, the stepper serves. What cannot be compared so
    is refused, and so are values of the time, the state or args that reach Python. func's own Python does not run in a
    compiled solve: what it counts there is counted for it, and a func that keeps something, as a tensor for a regularizer, is
    served by the stepper.
    """

    def __init__(self, func: Callable[..., Any], cuda: bool = False, matmul: str = "float32", pure: bool = False):
        super().__init__()
        self.func, self._cuda, self._matmul = func, cuda, matmul
        self._plans = Plans(pure)

    def forward(self, t: Tensor, y: Any, *args: Any) -> Any:
        return self.func(t, y, *args)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "func":
                raise
            return getattr(super().__getattr__("func") if "func" in self._modules else self.__dict__["func"], name)

    @property
    def _latest(self) -> Plan | None:
        return self._plans.latest

    def plan(self, structure: Structure, args: Sequence[Any], per_sample: bool) -> Plan:
        """That of solves of such states. Raises Unreadable."""
        kind = self._plans.kind(structure, args, per_sample, self._cuda)
        return self._plans.find(self.func, kind, structure, args)

    def reset(self) -> None:
        """Forgets what was read."""
        self._plans.reset()

    def explain(self) -> str:
        """How the last solve was served, and why not by the compiled field where it was not."""
        served = self._plans.served
        return "not solved yet" if served is None else in_words(*served)

    @property
    def compilation(self) -> Compilation:
        own, modules = self.__dict__, self.__dict__["_modules"]
        func = modules["func"] if "func" in modules else own["func"]
        return Compilation(func, self._plans, own["_cuda"], own["_matmul"])

    def source(self, method: str = "dopri5", solve: str = "per_sample", *, cuda: bool = False, lanes: str = "pack") -> str:
        """The C++ text of the field read last, with one method. solve: one of "per_sample", "joint", "grid", and for gradients
        "adjoint_per_sample", "adjoint_joint", "adjoint_grid", "reverse". cuda: the kernel for many samples on an H100. Raises
        RuntimeError before the first solve."""
        if solve not in SOLVES:
            raise ValueError(f"solve must be one of {SOLVES}, got {solve!r}")
        plan = self._latest
        if plan is None:
            raise RuntimeError("the field has not been read yet: solve with it once; " + self.explain())
        dtype = "float" if plan.dtype == torch.float32 else "double"
        team = plan.team((solve,), _MANY, H100, self._matmul) if cuda else None
        return plan.source(find_method(method), Target(dtype, "one" if cuda else lanes, solve, team))

    def _repr_html_(self) -> str:
        """For notebooks: the field, how its last solve was served, what has been read and built."""
        rows = {"func": getattr(self.func, "__qualname__", type(self.func).__name__), "served": self.explain()}
        plan = self._latest
        if plan is not None:
            state = "in all" if plan.whole else "a sample"
            rows["read"] = f"{str(plan.dtype).removeprefix('torch.')}, {sum(plan.leaf_sizes)} numbers {state}"
            rows["built"] = ", ".join(sorted({target.solve for _, target in plan.libraries})) or "nothing yet"
        return table("CompiledField", rows)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": Plans(self._plans.pure)}  # libraries stay behind; the cache has them


def compile(func: Callable[..., Any], *, pure: bool = False, cuda: bool = False, matmul: str = "float32") -> CompiledField:
    """A field that is compiled to C++ when it is first solved: the whole solve, and its backward, then run in one call each.

    func: ``func(t, y)`` or ``func(t, y, *args)``, a Module or a function, made of linear layers, matrix products with
        parameters, pointwise functions, concatenations, slices, sums, softmax and layer norms over features, and derivatives
        of these by `torch.autograd.grad`. Arguments given to `solve(args=...)` with one entry a sample are read as such.

    pure: whether nobody minds if what func keeps or counts, in its attributes say, stays as it was in a compiled solve. Else
        a func that does more than count its calls is served by the stepper.
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
    return func if isinstance(func, CompiledField) else CompiledField(func, cuda, matmul, pure)


_WORDS = {
    "stepper": "the stepper",
    "graphed": "captured graphs",
    "plain": "torch's operations",
    "transformed": "torch's operations",
}


def in_words(engine: str, refusals: dict[str, str]) -> str:
    """How a solve was served, and why not by the compiled field. refusals: those of `Solution.explanation`."""
    if engine == "compiled":
        return "compiled"
    return f"served by {_WORDS[engine]}: " + refusals.get(
        "compiled", "inside a transform of torch, or while operations are written down"
    )


def compiled_field(func: Any, mode: str | bool | None) -> tuple[Compilation | None, tuple]:
    """What is compiled of func, which is a compiled field or is to be compiled, and its arguments. mode: "auto", False, or None
    for what `set_compile` says."""
    func, args = parted(func)
    return func.compilation if isinstance(func, CompiledField) else automatic(func, mode), args
