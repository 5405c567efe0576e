"""The field of the adjoint's backward solve: func with its vector-Jacobian products."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..captured import Watch
from ..combinations import combinations
from ..formulas import SHORT
from ..ops import readable
from ..problem import Field
from ..products import NOTHING, Targets, gradients
from .accumulator import Accumulator


class AugmentedField:
    """Slopes of (y, a) and of the parameters' integral, from one call of func and one vector-Jacobian product.

    Those of a and of the integral are given as a^T df/dy and a^T df/dtheta: the problem's signs turn them round.
    """

    def __init__(
        self,
        field: Field,
        params: Sequence[Tensor],
        like: Sequence[Tensor],
        costs: Sequence[Tensor],
        quadrature_stages: Sequence[bool],
        chosen: bool,
    ):
        self.costs = list(costs)  # cotangents of the running costs
        self.field, self.targets, self.quadrature_stages = field, Targets(params), quadrature_stages
        self.leaves, self.watch = len(like), Watch(params, chosen)
        self.like = like
        self._zeros: dict[int, Tensor] = {}
        self.convert = any(x.dtype in SHORT for x in params)
        self.none: list[Tensor | None] = [None] * len(self.params)
        self.recording = torch.enable_grad()

    @property
    def params(self) -> list[Tensor]:
        return self.targets.tensors

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.field.tensors, *self.params]

    def __call__(self, t: Tensor, state: Sequence[Tensor], stage: int) -> list[Tensor | None]:
        n, with_params = self.leaves, self.quadrature_stages[stage]
        y = state[:n]
        k = self.evaluate(t, y)
        grads = self.product(k, [*state[n:], *self.costs], y, self.targets if with_params else NOTHING, False)
        if self.convert:
            grads = [*grads[:n], *(grad if grad is None else as_leaf(grad) for grad in grads[n:])]
        slopes: list[Tensor | None] = [slope.detach() for slope in k[:n]]
        slopes += [self.zero(i) if grad is None else grad for i, grad in enumerate(grads)]
        if not with_params:
            slopes.extend(self.none)
        return slopes

    def zero(self, i: int) -> Tensor:
        """The product for the i-th of state and parameters where func does not depend on it."""
        if i not in self._zeros:
            like = self.like[i] if i < self.leaves else as_leaf(self.params[i - self.leaves])
            self._zeros[i] = torch.zeros_like(like)
        return self._zeros[i]

    def evaluate(self, t: Tensor, y: Sequence[Tensor]) -> list[Tensor]:
        """func with its graph; y are the solver's own buffers and become its leaves."""
        for leaf in y:
            leaf.requires_grad_()
        with self.recording:
            return self.watch.evaluate(self.field, t, y)

    def product(
        self, k: list[Tensor], a: Sequence[Tensor], inputs: Sequence[Tensor], targets: Targets, keep_graph: bool
    ) -> Sequence[Tensor | None]:
        """a^T dk/dinputs, and then by the targets"""
        if not all([slope.requires_grad for slope in k]):
            a = [cotangent for slope, cotangent in zip(k, a, strict=True) if slope.requires_grad]
            k = [slope for slope in k if slope.requires_grad]
            if not k:
                return [None] * (len(inputs) + len(targets.tensors))
        return gradients(k, inputs, a, targets, keep_graph or self.watch.keeps_graphs)


class PerSampleField(AugmentedField):
    """The same where every sample has its own steps: which rows a step counts for, and how much, is known only after it.

    So the stages, each in a buffer of its own, keep their graphs to the end of the step, and the parameters' integral takes
    dt * b_j * accept of each row then. The slope of the first stage may stem from an earlier step: it is evaluated again.
    """

    def __init__(
        self,
        field: Field,
        params: Sequence[Tensor],
        like: Sequence[Tensor],
        costs: Sequence[Tensor],
        b: Sequence[float],
        chosen: bool,
    ):
        super().__init__(field, params, like, costs, [False] * len(b), chosen)
        self.b, self.none = b, []
        self.sums = Accumulator(params, len(b), like[0].device)
        self.kept: dict[int, tuple[list[Tensor], Sequence[Tensor]]] = {}
        if not params:
            return
        self.costs = [readable(cost) for cost in self.costs]
        shapes = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (*like, *self.costs)]
        self.cotangents = {i: [*map(torch.empty_like, shapes)] for i, weight in enumerate(b) if weight != 0}
        leaves = [leaf for of_stage in self.cotangents.values() for leaf in of_stage]
        signs = [-b[i] for i, of_stage in self.cotangents.items() for _ in of_stage]
        self.kernels = combinations(leaves, len(like[0]), ((1.0,),), signs)
        self.kernels.bind_buffers([0] * len(leaves), [leaf.data_ptr() for leaf in leaves], [], 0)

    def __call__(self, t: Tensor, state: Sequence[Tensor], stage: int) -> list[Tensor | None]:
        n = self.leaves
        y, a = state[:n], state[n:]
        k = self.evaluate(t, y)
        keep = stage != 0 and self.b[stage] != 0 and bool(self.params)
        grads = self.product(k, [*a, *self.costs], y, NOTHING, keep)
        if keep:
            self.kept[stage] = k, a
        slopes = [self.zero(i) if grad is None else grad for i, grad in enumerate(grads)]
        return [*(slope.detach() for slope in k[:n]), *slopes]

    @property
    def calls(self) -> int:
        return int(bool(self.params) and self.b[0] != 0)

    @property
    def refusal(self) -> str:
        return "parameters of 16 bits, or on another device" if self.sums.others else ""

    def resume(self, field: Any) -> "PerSampleField":
        self.field, self.targets, self.watch = field.field, field.targets, field.watch
        return self

    def add(self, t0: Tensor, y0: Sequence[Tensor], dt: Tensor) -> None:
        if not self.params:
            return
        if self.b[0] != 0:
            self.kept[0] = self.evaluate(t0, y0[: self.leaves]), y0[self.leaves :]
        self.kernels.bind_dt(dt.data_ptr())
        self.kernels.stage(1, [x.data_ptr() for stage in self.cotangents for x in (*self.kept[stage][1], *self.costs)])
        for stage, (k, _) in self.kept.items():
            self.sums.add(self.product(k, self.cotangents[stage], (), self.targets, False))
        self.sums.flush()
        self.kept.clear()

    def take(self) -> list[Tensor]:
        totals = zip(self.sums.totals, self.params, strict=True)
        found = [torch.zeros_like(as_leaf(x)) if total is None else total.clone() for total, x in totals]
        self.sums.clear()
        return found


def as_leaf(x: Tensor) -> Tensor:
    """A parameter's gradient as it is added up over the steps: 16 bits as float32."""
    return x.float() if x.dtype in SHORT else x
