"""A call of func and of its derivatives, as it is recorded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..problem import Structure
from .decompositions import decompositions
from .marks import Unreadable
from .picked import Picked

BATCHES = (7, 11)  # of the two recordings

_MOVED = 0.375  # from the time and state of the first recording to those of the second


@dataclass
class Call:
    """A call of func as it is recorded. t: of the first recording. batched: which arguments have one entry a sample; trained:
    whether these get gradients. whole: the state has no axis of samples, it is one sample. by_time: the time gets one too.
    second: for tangents v of the state and r of the time, and cotangents g, the gradients of g . (df/dy v + df/dt r) are
    recorded too.
    """

    func: Callable
    structure: Structure
    t: Tensor
    batched: list[int]
    whole: bool
    trained: list[bool] = field(default_factory=list)
    by_time: bool = False
    second: bool = False

    def field(self, index: int, args: Sequence[Any], wanted: Callable[[], list[Tensor]]) -> tuple[Callable, list[Tensor]]:
        """The slopes and their product with cotangents as one function, and what to call it with at recording `index`."""
        batch, moved = 0 if self.whole else BATCHES[index], index * _MOVED
        leaves = [sample_rows(leaf, batch) + moved for leaf in self.structure.leaves]
        samples = [sample_rows(args[i], batch) for i in self.batched]
        generator = torch.Generator().manual_seed(index)
        like = [*leaves, *leaves, self.t] if self.second else leaves
        noise = [torch.randn(x.shape, generator=generator, dtype=torch.float64, device="cpu").to(x) for x in like]
        n, m = len(leaves), len(samples)
        wants = [*[True] * n, *self.trained, *[True] * n, *[False] * (len(noise) - n)]

        def field(t: Tensor, *inputs: Tensor) -> Any:
            with torch.enable_grad():
                inputs = tuple(x.detach().requires_grad_(want) for x, want in zip(inputs, wants, strict=True))
                t = t.detach().requires_grad_(self.by_time)
                given = list(args)
                for i, place in enumerate(self.batched):
                    given[place] = inputs[n + i]
                slopes = self.structure.flatten(self.func(t, self.structure.unflatten(inputs[:n]), *given))
                for slope, leaf in zip(slopes, leaves, strict=True):
                    if slope.shape != leaf.shape or slope.dtype != leaf.dtype:
                        words = f"{slope.dtype} {list(slope.shape)} for {leaf.dtype} {list(leaf.shape)}"
                        raise Unreadable(f"func returned {words}")
                sources = [*(x if want else None for x, want in zip(inputs[: n + m], wants, strict=False)), *wanted()]
                sources += [t] if self.by_time else []
                grads = products(slopes, sources, inputs[n + m : 2 * n + m], self.second)
                found = [*grads]
                if self.second:
                    *tangents, rate = inputs[2 * n + m :]
                    by_time = [(grads.pop(), rate)] if self.by_time else []
                    pairs = [*zip(grads[:n], tangents, strict=True), *by_time]
                    found += products([x for x, _ in pairs], sources[: len(grads)], [v for _, v in pairs])
            return [*(slope.detach() for slope in slopes), *(None if x is None else x.detach() for x in found)]

        return field, [self.t + moved, *leaves, *samples, *noise]

    def trace(self, index: int, args: Sequence[Any], wanted: list[Tensor]) -> fx.GraphModule:
        field, inputs = self.field(index, args, lambda: wanted)
        with sdpa_kernel(SDPBackend.MATH), Picked():  # attention as the products that it consists of
            return make_fx(field, decomposition_table=decompositions(), record_stack_traces=True)(*inputs)


def products(
    outputs: Sequence[Tensor | None], sources: Sequence[Tensor | None], cotangents: Sequence[Tensor], again: bool = False
) -> list[Tensor | None]:
    """The gradients of outputs for sources, None where there is none, or where either is None. again: they have some
    themselves."""
    used = [(x, g) for x, g in zip(outputs, cotangents, strict=True) if x is not None and x.requires_grad]
    given = [x for x in sources if x is not None]
    if not used:
        return [None] * len(sources)
    found = torch.autograd.grad([x for x, _ in used], given, [g for _, g in used], allow_unused=True, create_graph=again)
    waiting = iter(found)
    return [None if x is None else next(waiting) for x in sources]


def sample_rows(x: Tensor, batch: int) -> Tensor:
    """`batch` rows of x, repeated as needed; 0: x itself."""
    if batch == 0:
        return x.detach()
    return x.detach()[torch.arange(batch, device=x.device) % x.shape[0]]
