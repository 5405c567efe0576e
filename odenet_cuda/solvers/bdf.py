"""The family of backward differentiation formulas, whose step size and order are their own."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..bdf import DIFFERENCES, MOST, BdfMethod, coefficients, rescaled
from ..factors import Factors
from ..jacobian import as_leaves, flat, linearize
from ..ops import FIELDS
from ..problem import Problem
from ..stepper import Stepper
from .norms import write_norm
from .trajectory import Recorder
from .whole import without_stages

MOST_ITERATIONS = 4  # of Newton's method
_SAME = 1e-10  # relative: steps that are of one size


class BdfSteps:
    """Steps of a `BdfMethod`; see `families.Family`.

    The state is held as systems, [systems, n], as func falls into them; of each the differences, df/dy and its factors, which
    stay from step to step as long as Newton's method ends with them. order, size, equal (how many steps of that size there
    were): of the rows of step control, [rows]; what belongs to systems and what to rows go together, for rows are 1 or as many.
    """

    looks: ClassVar[bool] = True
    steers: ClassVar[bool] = True
    no_way_back: ClassVar[str] = "cannot be an adjoint_method: give a one-step method such as rodas5p, or none"
    no_graph: ClassVar[str] = "decides on the host"

    def __init__(
        self, method: BdfMethod, problem: Problem, stepper: Stepper, state: Tensor, recorder: Recorder | None, ahead: bool
    ):
        self.method, self.problem, self.stepper, self.state = method, problem, stepper, state
        self.calls = 0  # counted as they are made
        self.dt = state[FIELDS["dt"]]
        self.numbers = coefficients(problem.device)
        self.systems = 0
        self.estimate: list[Tensor] = []
        eps = max([torch.finfo(leaf.dtype).eps for leaf in problem.leaves])
        rtol = max(min([float(torch.as_tensor(x, device="cpu").min()) for x in problem.rtol]), 100 * eps)
        self.enough = max(10 * eps / rtol, min(0.03, rtol**0.5))  # of the tolerance: how far d may be from the solution

    @staticmethod
    def refusal(problem: Problem, recorder: Any) -> str:
        if words := without_stages(problem, recorder):
            return words
        if recorder is not None and (recorder.graphs or recorder.checkpoints is not None):
            return (
                "keeps no graphs of its steps, which depend on those before: use gradient='quadrature', or 'adjoint' "
                "(odeint_adjoint)"
            )
        return ""

    # ---- the state of the family -----------------------------------------------------------------------------------------

    def begin(self) -> None:
        stepper, rows = self.stepper, self.problem.rows
        near = linearize(self.problem.field, stepper.views[0], stepper.y0, rows, by_time=False, jac=self.problem.jac)
        self.systems, self.dy = near.systems, near.dy
        self.order = torch.ones(rows, dtype=torch.int64, device=self.dt.device)
        self.size, self.equal = self.dt.clone(), torch.zeros_like(self.order)
        y0 = flat(stepper.y0, self.systems)
        self.differences = y0.new_zeros(DIFFERENCES, *y0.shape)
        self._first(torch.ones(rows, dtype=torch.bool, device=self.dt.device))
        self.fresh = torch.ones(self.systems, dtype=torch.bool, device=self.dt.device)
        self.factors: Factors | None = None
        self.factored = torch.zeros(self.systems, dtype=torch.float64, device=self.dt.device)  # c of the factors

    def _first(self, rows: Tensor) -> None:
        """The differences of these rows, bool [rows], from their y0 and slope; of order 1."""
        stepper = self.stepper
        y0, slope = flat(stepper.y0, self.systems), flat(stepper.k[0], self.systems)
        found = torch.zeros_like(self.differences)
        found[0], found[1] = y0, slope * self.dt.to(y0.dtype)[:, None]
        self.differences = torch.where(rows[None, :, None], found, self.differences)
        self.order = torch.where(rows, 1, self.order)
        self.equal = torch.where(rows, 0, self.equal)
        self.size = torch.where(rows, self.dt, self.size)

    def restart(self, rows: Tensor) -> None:
        self._first(rows)

    # ---- a step ----------------------------------------------------------------------------------------------------------

    def step(self, field: Callable[..., Any], times: Tensor, views: list[Tensor]) -> tuple[Sequence[Any], list[int]]:
        stepper, like = self.stepper, self.stepper.y0
        self._resize()
        k, alive = self.order, (self.dt != 0)[:, None]
        predicted, psi, c = self._predicted()
        d, systems = self._solved(field, views[-1], predicted, psi, c), self.systems
        if d is None:  # they are other systems now
            return self.step(field, times, views)
        after = self._differences_after(d)
        over = torch.where(alive, 1 / torch.where(alive, self.dt[:, None], 1.0), 0.0).to(d.dtype)
        slope = torch.where(alive, (psi + d) / torch.where(c == 0, 1.0, c), flat(stepper.k[0], systems))
        y1 = as_leaves(torch.where(alive, after[0], self.differences[0]), like)
        for own, leaf in zip(stepper.y[-1], y1, strict=True):
            own.copy_(leaf)
        addresses: list[int] = []
        for j in range(1, MOST + 2):
            x = slope if j > MOST else torch.where((k >= j)[:, None], after[j], 0.0) * over
            stepper.kernels.bind_slopes(j - 1, addresses)
            addresses = stepper.set_slopes(j, as_leaves(x, like), True)
        self.after = after
        self.estimate = as_leaves(self.numbers["error"][k].to(d.dtype)[:, None] * d, like)
        return (), addresses

    def _resize(self) -> None:
        """The differences are those of steps of the size that is to be tried."""
        alive = self.dt != 0
        factor = torch.where(alive, self.dt / torch.where(self.size == 0, 1.0, self.size), 1.0)
        other = (factor - 1).abs() > _SAME
        if bool(other.any()):
            found = rescaled(self.differences, self.order, torch.where(other, factor, 1.0))
            self.differences = torch.where(other[None, :, None], found, self.differences)
            self.equal = torch.where(other, 0, self.equal)
            self.size = torch.where(other, self.dt, self.size)

    def _predicted(self) -> tuple[Tensor, Tensor, Tensor]:
        """(y1 by extrapolation [systems, n]; what the formula takes from the differences, the same; dt / alpha [rows, 1])."""
        k, kind = self.order, self.differences.dtype
        alpha = self.numbers["alpha"][k]
        used = (torch.arange(DIFFERENCES, device=k.device)[:, None] <= k).double()
        weights = used * self.numbers["gamma"][:, None] / alpha
        sums = [(x.to(kind)[:, :, None] * self.differences).sum(0) for x in (used, weights)]
        return sums[0], sums[1], (self.dt / alpha).to(kind)[:, None]

    def _differences_after(self, d: Tensor) -> Tensor:
        """Those at the end of the step."""
        k, old = self.order[:, None], self.differences
        new = [old[-1]] * DIFFERENCES
        for j in range(DIFFERENCES - 1, -1, -1):
            x = old[j] if j == DIFFERENCES - 1 else torch.where(k >= j, old[j] + new[j + 1], old[j])
            x = torch.where(k + 1 == j, d, x)
            new[j] = torch.where(k + 2 == j, d - old[j - 1], x) if j else x
        return torch.stack(new)

    # ---- Newton's method -------------------------------------------------------------------------------------------------

    def _solved(self, field: Callable[..., Any], t: Tensor, predicted: Tensor, psi: Tensor, c: Tensor) -> Tensor | None:
        """d, with `failed` and `iterations` of the rows; None where func couples systems from here on."""
        todo = torch.ones(self.systems, dtype=torch.bool, device=psi.device)
        d, count, ended = torch.zeros_like(psi), self.factored.new_zeros(self.systems), torch.zeros_like(todo)
        while bool(todo.any()):
            self._factorise(c)
            found, iterations, good = self._newton(field, t, predicted, psi, c, todo)
            d, count, ended = torch.where(todo[:, None], found, d), torch.where(todo, iterations, count), ended | good
            todo = ~ended & ~self.fresh  # once more, with df/dy of here
            if bool(todo.any()) and not self._renew(field, t, predicted, todo):
                return None
        rows = self.problem.rows
        self.failed, self.iterations = (~ended).reshape(rows, -1).any(1), count.reshape(rows, -1).amax(1)
        return d

    def _newton(
        self, field: Callable[..., Any], t: Tensor, predicted: Tensor, psi: Tensor, c: Tensor, todo: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(d; iterations; whether it is solved), of the systems to do. d: c f(t1, predicted + d) = psi + d."""
        like, active = self.stepper.y0, todo
        d, count, ended = torch.zeros_like(psi), self.factored.new_zeros(self.systems), torch.zeros_like(todo)
        scale, before = self._scale(predicted), torch.full_like(count, torch.inf)
        assert self.factors is not None
        for left in range(MOST_ITERATIONS, 0, -1):
            slope = flat(field(t, as_leaves(predicted + d, like), 1), self.systems)
            right = c * slope - psi - d
            change = self.factors.solve(right)
            size = (change / scale).double().square().mean(1).sqrt()
            rate, first = size / before, left == MOST_ITERATIONS
            if not first:
                active = active & (rate < 1) & (rate**left / (1 - rate) * size <= self.enough)
            active = active & torch.isfinite(size)
            d, count = torch.where(active[:, None], d + change, d), torch.where(active, count + 1, count)
            done = active & ((size == 0) | (rate / (1 - rate) * size < self.enough) & (not first))
            ended, active, before = ended | done, active & ~done, size
            if not bool(active.any()):
                break
        return d, count, ended

    def _scale(self, y: Tensor) -> Tensor:
        problem = self.problem
        parts = zip(as_leaves(y, self.stepper.y0), problem.rtol, problem.atol, strict=False)
        return flat([(atol + rtol * leaf.abs()).expand_as(leaf) for leaf, rtol, atol in parts], self.systems)

    def _factorise(self, c: Tensor) -> None:
        """I - c df/dy, of the systems whose factors are those of another c."""
        c = c[:, 0].double().expand(self.systems)
        other = ~((c - self.factored).abs() <= _SAME * c.abs())
        if self.factors is not None and not bool(other.any()):
            return
        self.factored = c if self.factors is None else torch.where(other, c, self.factored)
        given = self.dy, self.factored, self.problem.jac
        self.factors = Factors(*given) if self.factors is None else self.factors.renewed(other, *given)

    def _renew(self, field: Callable[..., Any], t: Tensor, y: Tensor, which: Tensor) -> bool:
        """df/dy at y, of these systems; False where func couples them after all: then the state is one system."""
        problem, like = self.problem, self.stepper.y0
        near = linearize(field, t, as_leaves(y, like), problem.rows, 1, by_time=False, jac=problem.jac)
        same = near.systems == self.systems
        self.dy = torch.where(which[:, None, None], near.dy, self.dy) if same else near.dy
        self.fresh = self.fresh | which if same else torch.ones(near.systems, dtype=torch.bool, device=y.device)
        self.factored = torch.where(which, torch.nan, self.factored) if same else self.factored.new_zeros(near.systems)
        if not same:
            self.differences = torch.stack([flat(as_leaves(x, like), near.systems) for x in self.differences])
            self.systems, self.factors = near.systems, None
        return same

    # ---- its end ---------------------------------------------------------------------------------------------------------

    def error(self) -> list[Tensor] | None:
        return self.estimate

    def steer(self, ratio: Tensor) -> None:
        """Step size and order by the estimates of this order and those beside it (Shampine and Reichelt 1997, section 2.3; the
        order is thought about after as many equal steps as it has, and one)."""
        safety, most, least = (self.stepper.controller[i] for i in (1, 2, 8))
        k = self.order
        safe = safety * (2 * MOST_ITERATIONS + 1) / (2 * MOST_ITERATIONS + self.iterations)
        grown = _root(ratio, k + 1)
        accepted = (ratio <= 1) & ~self.failed
        self.ready = accepted & (self.equal >= k)
        factor, self.next_order = torch.ones_like(ratio), k
        if bool(self.ready.any()):
            choices = torch.stack([self._beside(-1), grown, self._beside(1)])
            best, which = choices.max(0)
            factor = torch.where(self.ready, safe * best, factor)
            self.next_order = torch.where(self.ready, k + which - 1, k)
        asked, size = self.state[FIELDS["proposal"]].abs(), self.dt.abs()
        cut = asked > size * (1 + 1e-6)  # it was cut to end at a stop
        factor = torch.where(cut, torch.maximum(factor, asked / torch.where(size == 0, 1.0, size)), factor)
        smaller = torch.where(self.failed, 0.5, safe * grown).clamp(0.2, 0.99 * safety)
        found = safety / torch.where(accepted, factor.clamp(safety, most), smaller)
        found = torch.where(accepted, found.clamp_max(1.0), found)
        lost = ~torch.isfinite(ratio) | (self.failed if least > 0 else torch.zeros_like(self.failed))
        ratio.copy_(torch.where(lost, torch.nan, found))

    def _beside(self, way: int) -> Tensor:
        """The factor by the estimate of the order one below or above, 0 where there is none, [rows]."""
        k, like = self.order, self.stepper.y0
        there = (k > 1) if way < 0 else (k < self.method.max_order)
        place = (k + (0 if way < 0 else 2)).expand(self.systems)
        d = self.after[place, torch.arange(self.systems, device=k.device)]
        error = as_leaves(self.numbers["error"][k + way].to(d.dtype)[:, None] * d, like)
        out = torch.empty_like(self.dt)
        write_norm(out, self.problem, len(like), like, self.stepper.y[-1], [error], [1.0], None)
        return torch.where(there, _root(out, k + 1 + way), 0.0)

    def _moved(self, rows: Tensor) -> None:
        self.differences = torch.where(rows[None, :, None], self.after, self.differences)
        self.equal = torch.where(rows, torch.where(self.ready, 0, self.equal + 1), self.equal)
        self.order = torch.where(rows, self.next_order, self.order)
        self.fresh = self.fresh & ~rows

    def advance(self) -> None:
        self._moved(self.state[FIELDS["accept"]] != 0)
        self.stepper.kernels.advance()

    def swap(self) -> None:
        self._moved(torch.ones_like(self.failed))
        self.stepper.swap_accepted()


def _root(ratio: Tensor, order: Tensor) -> Tensor:
    """The factor by which an estimate of this order, over the tolerance, asks for another step."""
    return ratio.clamp_min(1e-20) ** (-1 / order.double())
