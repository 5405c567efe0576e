"""The backward solve of an adjoint by a method whose steps are whole functions, such as an implicit one: these differentiate
the field, so it gives its slopes with a graph, and the parameters' integral is taken over each step after it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..formulas import of_rows, per_row
from ..newton import combined
from ..problem import Field, Problem
from ..products import NOTHING, gradients
from ..solvers.trajectory import Recorder, Step
from ..tableau import StepFunction
from .accumulator import Accumulator
from .augmented import AugmentedField


def with_graphs(leaves: Sequence[Tensor]) -> list[Tensor]:
    """Leaves to differentiate by: themselves where gradients are recorded and they have one, else leaves of autograd."""
    recording = torch.is_grad_enabled()
    return [x if recording and x.requires_grad else x.detach().requires_grad_() for x in leaves]


class WholeField(AugmentedField):
    """Slopes of (y, a): f and -a^T df/dy, from one call of func. Where gradients are recorded they have a graph, for which func
    must be differentiable twice."""

    def __init__(
        self, field: Field, params: Sequence[Tensor], like: Sequence[Tensor], costs: Sequence[Tensor], stages: int, chosen: bool
    ):
        super().__init__(field, params, like, costs, [False] * stages, chosen)

    def __call__(self, t: Tensor, state: Sequence[Tensor], stage: int = 0) -> list[Tensor | None]:
        n, recording = self.leaves, torch.is_grad_enabled()
        y, cotangents = with_graphs(state[:n]), [*state[n:], *self.costs]
        with torch.enable_grad():
            k = self.watch.evaluate(self.field, t, y)
            grads = self.differentiable(k, cotangents, y, recording)
        slopes: list[Tensor | None] = [*k[:n], *(self.zero(i) if grad is None else -grad for i, grad in enumerate(grads))]
        return slopes if recording else [slope if slope is None else slope.detach() for slope in slopes]

    def differentiable(
        self, k: Sequence[Tensor], a: Sequence[Tensor], y: Sequence[Tensor], recording: bool
    ) -> Sequence[Tensor | None]:
        """a^T dk/dy, with a graph where one is recorded"""
        used = [(slope, cotangent) for slope, cotangent in zip(k, a, strict=True) if slope.requires_grad]
        if not used:
            return [None] * len(y)
        outputs, cotangents = zip(*used, strict=True)
        return gradients(outputs, y, cotangents, NOTHING, recording or self.watch.keeps_graphs, recording)


class StepIntegral(Recorder):
    """Adds up dL/dtheta = -integral a^T df/dtheta dt over the steps of a backward solve of (y, a), by the quadrature that the
    method has: its own stages, or Gauss's nodes on its interpolant."""

    def __init__(self, method: StepFunction, backward: Problem, field: WholeField):
        super().__init__(method, backward.t, backward.per_sample, len(backward.leaves))
        self.problem, self.field = backward, field
        self.nodes = [(c, weight, row, method.c.index(c) if c in method.c else -1) for c, weight, row in method.nodes]
        self.every_slope = self.at_once = True
        self.integral = Accumulator(field.params, len(self.nodes), field.like[0].device)

    def _keep(self, t0: float | Tensor, t1: float | Tensor, step: Step) -> None:
        field, problem = self.field, self.problem
        if not field.params:
            return
        assert step.y0 is not None
        start, end = (torch.as_tensor(t, dtype=torch.float64, device=problem.device).reshape(-1) for t in (t0, t1))
        dt, n = end - start, field.leaves
        for c, weight, row, stage in self.nodes:
            with torch.no_grad():
                state = [x.detach() for x in combined(step.y0, dt, row, step.k)]
            part = -weight * (dt if step.accept is None else dt * step.accept)
            if step.accept is not None:  # what others tried may be no number
                kept = step.accept
                state = [torch.where(of_rows(kept, x), x, y0.detach()) for x, y0 in zip(state, step.y0, strict=True)]
            cotangents = [per_row(part, x) * x for x in (*state[n:], *field.costs)]
            # Those of stages as func saw them: beside a discontinuity on the side of the step.
            t = step.first if c == 0 else step.times[stage] if stage > 0 else (start + c * dt).to(problem.real)
            k = field.evaluate(problem.time_views(t.reshape(1, -1))[0], state[:n])
            self.integral.add(field.product(k, cotangents, (), field.targets, False))
        self.integral.flush()

    def take(self) -> list[Tensor]:
        totals = zip(self.integral.results(), self.field.params, strict=True)
        return [torch.zeros_like(x) if total is None else total for total, x in totals]
