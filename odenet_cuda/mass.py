"""What the user knows of a system besides func: its df/dy or the pattern of that, and a constant matrix M in
M dy/dt = func(t, y), perhaps singular: then some of the equations have no derivative.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .jacobian import checked_jac, linearize, refuse_other_jac
from .problem import Problem, with_arguments
from .sparsity import checked_sparsity

_ZERO = 1e-10  # of the largest singular value: below, a combination of equations has no derivative
_CONSISTENT = 1e-5  # of the slopes: how far equations without a derivative may be from zero at the start


class System(NamedTuple):
    """As the user gave them."""

    jac: Any = None
    mass: Any = None
    jac_sparsity: Any = None

    @property
    def named(self) -> str:
        """What is given, as the start of a sentence."""
        names = [name for name, given in zip(self._fields, self, strict=True) if given is not None]
        return " and ".join(names) + (" are" if len(names) > 1 else " is")

    def refuse(self, options: Any, gradient: str) -> None:
        """Raises ValueError where the method takes no such, NotImplementedError where one is not served."""
        takes = getattr(options.tableau, "takes", ())
        for name, given in zip(self._fields, self, strict=True):
            if given is not None and name.removesuffix("_sparsity") not in takes:
                raise ValueError(
                    f"{name} is no option of method={options.method!r}: use one for stiff systems, such as rodas5p"
                )
        if self.jac is not None and self.jac_sparsity is not None:
            raise ValueError("jac and jac_sparsity must not both be given: with jac there are no products to save")
        if self.mass is not None and gradient in ("adjoint", "quadrature"):
            raise NotImplementedError(f"mass is not served by gradient={gradient!r}: use gradient='direct' or 'checkpoint'")
        if self.mass is not None and options.interp == "cubic":
            raise NotImplementedError("mass is not served by interp='cubic', for func is no slope: use the method's own")


NOTHING = System()


def add_system(problem: Problem, options: Any, gradient: str, given: System, args: Sequence[Any]) -> None:
    """Puts what is given into the problem. Raises TypeError and ValueError where one is wrong, NotImplementedError where it is
    not served."""
    given.refuse(options, gradient)
    rows = problem.rows if problem.per_sample else 0
    if given.mass is not None:
        problem.mass = checked_mass(given.mass, problem.leaves)
    if given.jac is not None:
        problem.jac = checked_jac(with_arguments(given.jac, args), problem.leaves, rows)
        with torch.enable_grad():
            t, y = problem.start_time(False), [leaf.clone().requires_grad_() for leaf in problem.leaves]
            refuse_other_jac(problem.jac, t, y, _field(problem)(t, y))
    if given.jac_sparsity is not None:
        problem.jac = checked_sparsity(given.jac_sparsity, problem.leaves, rows)
        _check_sparsity(problem)


def _field(problem: Problem) -> Any:
    """func, whose calls count for nothing."""
    field: Any = problem.field
    return field.again()


@torch.no_grad()
def _check_sparsity(problem: Problem) -> None:
    """At the start, and beside it, for zeros in y0 hide entries; not where func has no number there. Raises ValueError."""
    field, generator = _field(problem), torch.Generator("cpu").manual_seed(0)
    for share in (0.0, 0.1):
        y = []
        for leaf in problem.leaves:
            noise = torch.rand(leaf.shape, generator=generator, dtype=torch.float64, device="cpu").to(leaf.device, leaf.dtype)
            y.append(leaf + share * noise * (leaf.abs() + 0.01 * leaf.abs().amax()) if leaf.numel() else leaf)
        t = problem.start_time(False)
        if share and not all([bool(torch.isfinite(k).all()) for k in field(t, y, 0)]):
            return
        linearize(field, t, y, problem.rows, by_time=False, jac=problem.jac)


def checked_mass(mass: Any, y0: Sequence[Tensor]) -> Tensor:
    """M in the type of the state. Raises TypeError, ValueError where it is no such matrix."""
    if not isinstance(mass, Tensor):
        raise TypeError(f"mass must be a tensor [n, n], got {type(mass).__name__}")
    if mass.requires_grad:
        raise ValueError("mass must not require a gradient: it is a constant of the solve")
    if mass.dim() != 2 or mass.shape[0] != mass.shape[1] or not mass.is_floating_point():
        raise ValueError(f"mass must be a real matrix of shape [n, n], got {mass.dtype} {list(mass.shape)}")
    if not bool(torch.isfinite(mass).all()):
        raise ValueError("mass must be finite everywhere")
    numbers = sum([leaf.numel() for leaf in y0])
    if numbers % max(len(mass), 1):
        raise ValueError(f"mass must have a row for each number of a system, got {len(mass)} for a state of {numbers} numbers")
    return mass.detach().to(y0[0].device, y0[0].dtype)


def for_systems(mass: Tensor, n: int) -> Tensor:
    """Raises ValueError where M is not that of systems of n numbers."""
    if len(mass) != n:
        raise ValueError(
            f"mass must have shape [{n}, {n}], as func falls into systems of {n} numbers, got {list(mass.shape)}; where axis 0 "
            "of y0 is a batch that func does not couple, give y0 another axis"
        )
    return mass


def check_consistent(problem: Problem, k0: Sequence[Tensor]) -> None:
    """k0: func at the start. Raises ValueError where equations without a derivative do not hold there."""
    assert problem.mass is not None
    left, size, _ = torch.linalg.svd(problem.mass.double())
    without = left[:, size <= _ZERO * size.amax()]
    systems = sum([k.numel() for k in k0]) // len(left)
    if without.shape[1] == 0 or systems == 0:
        return
    slopes = torch.cat([k.detach().double().reshape(systems, -1) for k in k0], 1)
    off = (slopes @ without).abs().amax(1)
    wrong = off > _CONSISTENT * slopes.abs().amax(1).clamp_min(1.0)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        where = f" in system {row}" if systems > 1 else ""
        raise ValueError(
            f"y0 must fulfil the equations that mass leaves without a derivative{where}: there func is {float(off[row]):.3g}, "
            "not 0"
        )
