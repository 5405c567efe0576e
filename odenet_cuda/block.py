"""ODEBlock: a differential equation as a layer."""

import reprlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .compiled.compilation import check_compile, mode_of_blocks
from .compiled.field import in_words
from .methods import on_host
from .printing import table
from .solution import Solution, Stats
from .solve import solve
from .tracing import written_down
from .transforms import between_graphs


class ODEBlock(nn.Module):
    """The layer y(t[0]) -> y(t[-1]) with dy/dt = func(t, y): the limit of a residual stack as its steps go to zero.

    func: a Module (or callable) of (t, y) that returns dy/dt in the structure and shape of y.
    t: times, at least two, strictly monotone; the input is the state at t[0]. A tensor or numbers; an nn.Parameter is learned.
    return_all: give the state at every t, each leaf [len(t), *leaf.shape], instead of the state at t[-1].
    gradient: "adjoint" (memory does not grow with the steps), "direct" or "checkpoint" (exact for the discrete solve; the
        second keeps the states alone), "reversible" (exact, memory does not grow, twice the calls), "quadrature": see `solve`.
    compile: "auto", the default unless `set_compile` says otherwise, compiles func at the first solve where it can be read (see
        `odenet_cuda.compile`), and leaves it to the stepper where not; `explain` says which and why. False: no compiling.
    method, rtol, atol, step_control and all that `solve` takes by name are handed to it.

    After a call, `nfe_forward`, and after its backward pass `nfe_backward`, are the calls of func it took; `stats` has more.
    With ``regularizers=("kinetic",)`` and the like, `regularizers` then holds them by name, to be added to the loss.
    Raises as `solve` does. Source: Chen et al. 2018, arXiv:1806.07366.

    >>> import torch
    >>> from torch import nn
    >>> class Field(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = nn.Linear(8, 8)
    ...     def forward(self, t, y):
    ...         return torch.tanh(self.layer(y))
    >>> model = nn.Sequential(nn.Linear(4, 8), ODEBlock(Field(), rtol=1e-3, atol=1e-3), nn.Linear(8, 2))
    >>> model(torch.randn(16, 4)).shape
    torch.Size([16, 2])
    """

    def __init__(
        self,
        func: Callable[[Tensor, Any], Any],
        t: Any = (0.0, 1.0),
        *,
        method: str = "dopri5",
        rtol: Any = 1e-3,
        atol: Any = 1e-3,
        gradient: str = "adjoint",
        step_control: str = "joint",
        return_all: bool = False,
        compile: str | bool | None = None,
        **options: Any,
    ):
        super().__init__()
        if isinstance(func, type) or not callable(func):
            raise TypeError(f"func must be an instance that is callable as func(t, y), got {func!r}")
        self.func = func
        # Times stay float64 on the CPU whatever the model is cast to: they are numbers, not weights.
        self.t: Any = t
        if not isinstance(t, nn.Parameter):
            self.t = torch.as_tensor(t, dtype=torch.float64, device="cpu").detach()
        self._numbers = tuple(self.t.detach().tolist())  # torch.compile cannot read them out of a tensor
        if self.t.dim() != 1 or len(self.t) < 2:
            raise ValueError(
                f"t must hold at least two times, the first that of the input, got {self.t.tolist()}; times of each sample are "
                "given at the call, block(y0, t)"
            )
        self.method, self.rtol, self.atol = method, rtol, atol
        self.gradient, self.step_control, self.return_all, self.options = gradient, step_control, return_all, options
        self._compile = None if compile is None else check_compile(compile)
        self.stats: Stats | None = None
        self._explained = ""
        self.regularizers: dict[str, Tensor] = {}

    @between_graphs(lambda self, y0, t=None: on_host(self.method) or self.gradient == "reversible")
    def forward(self, y0: Any, t: Any = None) -> Any:
        """t: times of this call, in place of those of the block, as `solve` takes them: with ``step_control="per_sample"`` also
        [batch, T], and then the state given is that at the last time of each sample."""
        times = self._times() if t is None else t
        solution = solve(
            self.func,
            y0,
            times,
            method=self.method,
            rtol=self.rtol,
            atol=self.atol,
            gradient=self.gradient,
            step_control=self.step_control,
            compile=mode_of_blocks(self._compile),
            **self.options,
        )
        self.stats, self.regularizers = solution.stats, solution.regularizers
        self._explained = in_words(solution.engine, solution.explanation)
        if self.return_all:
            return solution.ys
        # A copy: what comes after may write into it, and hooks on it are kept, unlike on a view.
        return pytree.tree_map(lambda leaf: _last(solution, leaf), solution.ys)

    def _times(self) -> Any:
        """Those of the block: as numbers where operations are written down."""
        constant = (torch.compiler.is_compiling() or written_down()) and not isinstance(self.t, nn.Parameter)
        return self._numbers if constant else self.t

    def explain(self) -> str:
        """How the last call was solved: "compiled", or by which engine else, and why not by the compiled one."""
        return self._explained or "not solved yet"

    @property
    def nfe_forward(self) -> int:
        """Calls of func in the last forward pass; 0 before one."""
        return 0 if self.stats is None else self.stats.nfe

    @property
    def nfe_backward(self) -> int:
        """Calls of func in the backward pass of the last call; 0 before one, and with gradient="direct"."""
        return 0 if self.stats is None else self.stats.nfe_backward

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "stats": None, "_explained": "", "regularizers": {}}  # the last call is no part of a copy

    def _repr_html_(self) -> str:
        """For notebooks: the layer, and its last call."""
        rows = {"func": type(self.func).__name__, **dict(part.split("=", 1) for part in self._facts())}
        if self.stats is not None:
            rows |= {"nfe_forward": str(self.nfe_forward), "nfe_backward": str(self.nfe_backward), "served": self.explain()}
        return table("ODEBlock", rows)

    def extra_repr(self) -> str:
        return ", ".join(self._facts())

    def _facts(self) -> list[str]:
        t = [round(x, 6) for x in self.t.detach().tolist()]
        return [
            f"t={t if len(t) <= 4 else f'{len(t)} times from {t[0]} to {t[-1]}'}",
            *(f"{name}={getattr(self, name)!r}" for name in ("method", "rtol", "atol", "gradient", "step_control")),
            *(["return_all=True"] if self.return_all else []),
            *(f"{name}={reprlib.repr(value)}" for name, value in self.options.items()),
        ]


def _last(solution: Solution, leaf: Tensor) -> Tensor:
    """The state at the last time, or at that of each sample."""
    if not solution.own_times:
        return leaf[-1].clone()
    last = (~solution.t.isnan()).sum(1) - 1
    return leaf[last, torch.arange(len(last), device=leaf.device)]
