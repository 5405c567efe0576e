"""Rosenbrock methods, for stiff systems: each stage solves a linear system, all with one matrix, I - gamma dt df/dy."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .factors import Factors
from .jacobian import as_leaves, flat, linearize
from .mass import for_systems
from .tableau import StepFunction

Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class RosenbrockStep:
    """The step of a Rosenbrock method in the form without products by df/dy (Hairer and Wanner, Solving Ordinary Differential
    Equations II, IV.7):

        (I - gamma dt f_y) u_i = gamma (dt f(t0 + c_i dt, y0 + sum_j a_ij u_j) + sum_j g_ij u_j + d_i dt^2 f_t)

    and y1 = y0 + sum_i m_i u_i. With a mass matrix M it stands in place of I, and before the sum of the g_ij u_j. The first
    stage is at (t0, y0); its slope is there. Called as `StepFunction.step`.
    """

    gamma: float
    a: Rows
    g: Rows
    d: tuple[float, ...]
    m: tuple[float, ...]
    ends_in_y1: bool  # the last stage is evaluated there

    @property
    def calls(self) -> int:
        """Of func, after the first slope of a solve."""
        return len(self.a) + (not self.ends_in_y1)

    def __call__(
        self,
        field: Callable[..., Any],
        t: list[Tensor],
        dt: Tensor,
        y0: list[Tensor],
        k0: list[Tensor],
        jac: Any = None,
        mass: Tensor | None = None,
    ) -> tuple[list[Tensor], list[list[Tensor]], None]:
        near = linearize(field, t[0], y0, len(dt), jac=jac)
        start, slope = flat(y0, near.systems), flat(k0, near.systems)
        h = dt.to(start.dtype)[:, None]
        # A matrix that is singular gives a step that is no number, which is rejected.
        whole = None if mass is None else for_systems(mass, start.shape[1])
        factors = Factors(near.dy, self.gamma * h[:, 0], jac, whole)
        by_time = None if near.dt is None else h * h * near.dt
        u: list[Tensor] = []
        for i, (a, g, d) in enumerate(zip(self.a, self.g, self.d, strict=True)):
            if i > 0:
                slope = flat(field(t[i + 1], as_leaves(_sum(start, a, u), y0), i + 1), near.systems)
            right = _sum(h * slope, g, u) if mass is None else h * slope + _sum(torch.zeros_like(slope), g, u) @ mass.T
            if by_time is not None and d != 0:
                right = right + d * by_time
            u.append(factors.solve(self.gamma * right))
        y1 = as_leaves(_sum(start, self.m, u), y0)
        last = as_leaves(slope, y0) if self.ends_in_y1 else field(t[-1], y1, len(u) + 1)
        size = torch.where(h == 0, 1, h)
        return y1, [*[as_leaves(x / size, y0) for x in u], last], None


def rosenbrock_of(method: Any) -> RosenbrockStep | None:
    """The numbers of a Rosenbrock method; None of another."""
    step = getattr(method, "step", None)
    return step if isinstance(step, RosenbrockStep) else None


def _sum(start: Tensor, weights: tuple[float, ...], u: list[Tensor]) -> Tensor:
    for weight, x in zip(weights, u, strict=False):
        if weight != 0:
            start = torch.add(start, x, alpha=weight)
    return start


def rosenbrock(
    order: int,
    gamma: float,
    c: tuple[float, ...],
    a: Rows,
    g: Rows,
    d: tuple[float, ...],
    m: tuple[float, ...],
    error: tuple[float, ...],
    p: Rows,
    p_order: int,
) -> StepFunction:
    """c: nodes of the stages. a, g: rows below the diagonal. error: weights of the u_i in the estimate; p: in the interpolant,
    see `StepFunction`."""
    none = (0.0,) * len(p[0])
    step = RosenbrockStep(gamma, a, g, d, m, c[-1] == 1 and (*a[-1], 0.0) == m)
    return StepFunction(
        order=order,
        c=(0.0, *c, 1.0),
        b=(0.0, *m, 0.0),
        e=(0.0, *error, 0.0),
        p=(none, *p, none),
        p_order=p_order,
        step=step,
        takes=("jac", "mass"),
    )


def _rodas5p() -> StepFunction:
    """Steinebach 2023, doi 10.1007/s10543-023-00967-x: order 5 with an estimate of order 4, stiffly accurate, L-stable, for
    parabolic problems too."""
    gamma = 0.21193756319429014
    last = (-7.502846399306121, 2.561846144803919, -11.627539656261098, -0.18268767659942256, 0.030198172008377946)
    a = (
        (),
        (3.0,),
        (2.849394379747939, 0.45842242204463923),
        (-6.954028509809101, 2.489845061869568, -10.358996098473584),
        (2.8029986275628964, 0.5072464736228206, -0.3988312541770524, -0.04721187230404641),
        last,
        (*last, 1.0),
        (*last, 1.0, 1.0),
    )
    g = (
        (),
        (-14.155112264123755,),
        (-17.97296035885952, -2.859693295451294),
        (147.12150275711716, -1.41221402718213, 71.68940251302358),
        (165.43517024871676, -0.4592823456491126, 42.90938336958603, -5.961986721573306),
        (24.854864614690072, -3.0009227002832186, 47.4931110020768, 5.5814197821558125, -0.6610691825249471),
        (30.91273214028599, -3.1208243349937974, 77.79954646070892, 34.28646028294783, -19.097331116725623,
         -28.087943162872662),
        (37.80277123390563, -3.2571969029072276, 112.26918849496327, 66.9347231244047, -40.06618937091002, -54.66780262877968,
         -9.48861652309627),
    )  # fmt: skip
    h = (
        (25.948786856663858, -2.5579724845846235, 10.433815404888879, -2.3679251022685204, 0.524948541321073,
         1.1241088310450404, 0.4272876194431874, -0.17202221070155493),
        (-9.91568850695171, -0.9689944594115154, 3.0438037242978453, -24.495224566215796, 20.176138334709044,
         15.98066361424651, -6.789040303419874, -6.710236069923372),
        (11.419903575922262, 2.8879645146136994, 72.92137995996029, 80.12511834622643, -52.072871366152654,
         -59.78993625266729, -0.15582684282751913, 4.883087185713722),
    )  # fmt: skip
    m = (*last, 1.0, 1.0, 1.0)
    # y(t0 + theta dt) = (1 - theta) y0 + theta (y1 + (1 - theta) (x_1 + theta (x_2 + theta x_3))), x_l = sum_i h_li u_i
    p = tuple((w + x, y - x, z - y, -z) for w, x, y, z in zip(m, *h, strict=True))
    return rosenbrock(
        order=5,
        gamma=gamma,
        c=(0.0, 0.6358126895828704, 0.4095798393397535, 0.9769306725060716, 0.4288403609558664, 1.0, 1.0, 1.0),
        a=a,
        g=g,
        d=(gamma, -2 * gamma, -0.3384627126235924, 1.8046452872882734, 2.325825639765069, 0.0, 0.0, 0.0),
        m=m,
        error=(0.0,) * 7 + (1.0,),
        p=p,
        p_order=4,
    )


def _rosenbrock23() -> StepFunction:
    """Shampine and Reichelt 1997, doi 10.1137/S1064827594276424, eq. (6) to (10): order 2, L-stable, three evaluations of func
    in all, for crude tolerances. In the form of `RosenbrockStep`, for which k_1 = u_1 / (gamma dt),
    k_2 = k_1 + u_2 / (gamma dt) and k_3 = (u_3 + e_32 u_2 + 2 u_1) / (gamma dt)."""
    gamma, e32 = 1 / (2 + 2**0.5), 6 + 2**0.5
    x, y = 1 / gamma, 1 / (1 - 2 * gamma)
    return rosenbrock(
        order=2,
        gamma=gamma,
        c=(0.0, 0.5, 1.0),
        a=((), (x / 2,), (x, x)),
        g=((), (-x,), (-2 * x, -e32 * x)),
        d=(gamma, 0.0, -gamma),
        m=(x, x, 0.0),
        error=(x / 6, (e32 - 2) * x / 6, x / 6),
        p=((x, 0.0), (-2 * y, x * y), (0.0, 0.0)),
        p_order=2,
    )


RODAS5P, ROSENBROCK23 = _rodas5p(), _rosenbrock23()
