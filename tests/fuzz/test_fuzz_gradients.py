"""Gradients of random solves: the four kinds among each other, and beside finite differences in float64."""

import math
import warnings
from typing import Any

import torch
from fuzzing import ADAPTIVE, FIXED, distance, examples, largest, leaves_of, tick, weighted
from hypothesis import given, note
from hypothesis import strategies as st
from torch import Tensor, nn

from odenet_cuda import odeint_adjoint, solve

D = torch.float64
EXACT = ("direct", "checkpoint")  # of the discrete solve
NEAR = ("adjoint", "quadrature")  # to tolerance
STEP, DIFFERENCES = 1e-6, 3e-6  # of a central difference, and what it is off by: rounding of the loss over the step
ROUNDING = 1e-10


class Field(nn.Module):
    """A small net, with what programs do besides: a jump, hooks on weights, random numbers, a weight that is not used."""

    def __init__(self, kind: str, width: int, seed: int):
        super().__init__()
        self.kind, self.width, self.given = kind, width, f"Field({kind!r}, {width}, {seed})"
        g = torch.Generator().manual_seed(seed)
        self.w = nn.Parameter(torch.randn(width, width, generator=g, dtype=D) / width**0.5)
        self.b = nn.Parameter(torch.randn(width, generator=g, dtype=D) / 2)
        self.frozen = nn.Parameter(torch.ones(width, dtype=D) / 2, requires_grad=False)
        self.unused = nn.Parameter(torch.ones(2, dtype=D))
        self.jump = 0.4321
        if kind == "hook":
            self.w.register_hook(lambda grad: 0.5 * grad)
            self.b.register_hook(lambda grad: grad.clamp(-0.01, 0.01))

    def __repr__(self) -> str:
        return self.given

    def forward(self, t: Tensor, y: Any, *args: Tensor) -> Any:
        if self.kind == "tuple":
            return torch.sin(y[1] @ self.w.t()), torch.tanh(y[0] @ self.w + self.b) * torch.cos(t)
        slope = torch.tanh(y @ self.w.t() + self.b * torch.cos(2 * t)) - self.frozen * y
        if self.kind == "jump":
            slope = slope + self.b * (t > self.jump).to(y)
        if self.kind == "args":
            slope = slope * args[0] + args[1]
        if self.kind == "inner":
            with torch.enable_grad():
                x = y if y.requires_grad else y.detach().requires_grad_()
                slope = slope + torch.autograd.grad((torch.sin(x) ** 2).sum(), x, create_graph=True)[0]
        if self.kind == "noise":
            slope = slope * (1 + 0.3 * torch.rand(y.shape, dtype=D))
        if self.kind == "in place":
            slope = slope.clone()
            slope[..., :1] *= 2
            slope.add_(1.0)
        if self.kind == "complex":
            turned = torch.view_as_real(torch.view_as_complex(slope[..., :2].contiguous()) * (0.2 + 1j)).sum(-1, keepdim=True)
            slope = turned * torch.sin(y)  # bounded: times y it may be infinite within the interval
        return slope


KINDS = ("plain", "jump", "args", "inner", "noise", "in place", "tuple", "hook", "complex")


@st.composite
def cases(draw: Any, kinds: tuple[str, ...] = KINDS) -> tuple[Field, Any, tuple, list[float], dict[str, Any]]:
    """(func, y0, args, times, options)"""
    kind = draw(st.sampled_from(kinds))
    width, rows, seed = draw(st.integers(2, 4)), draw(st.integers(1, 4)), draw(st.integers(0, 9))
    func = Field(kind, width, seed)
    g = torch.Generator().manual_seed(seed)
    y0: Any = torch.randn(rows, width, generator=g, dtype=D)
    if kind == "tuple":
        y0 = (y0, torch.randn(rows, width, generator=g, dtype=D))
    args = (torch.rand(rows, 1, generator=g, dtype=D), torch.rand(width, generator=g, dtype=D)) if kind == "args" else ()
    inside = draw(st.lists(st.sampled_from([0.1, 0.25, 0.4321, 0.5, 0.50001, 0.9]), max_size=3, unique=True))
    times = [0.0, *sorted(inside), 1.0]
    if kind == "jump" and draw(st.booleans()):
        times = [t for t in times if t != func.jump]
    if draw(st.booleans()):
        times = times[::-1]
    how: dict[str, Any] = {}
    if draw(st.booleans()) or kind == "noise":
        how["method"] = draw(st.sampled_from(FIXED))
        if kind != "jump":
            how["step_size"] = draw(st.sampled_from([0.1, 0.3]))
        else:  # a step ends at the jump, and is evaluated on its own side of it
            grid = sorted({*times, func.jump, *[0.05 * i for i in range(21)]}, reverse=times[0] > times[-1])
            how |= {"grid_constructor": lambda f, y, t: torch.tensor(grid, dtype=D), "perturb": True}
    else:
        how["method"] = draw(st.sampled_from(ADAPTIVE[:4]))
        how["step_control"] = draw(st.sampled_from(["joint", "per_sample"]))
        if kind == "jump":
            how["jump_t"] = [func.jump]
        if draw(st.booleans()):
            how["step_t"] = [0.33, 0.66]
    return func, y0, args, times, how


def gradients(func: Field, y0: Any, args: tuple, times: list[float], how: dict[str, Any], of_times: bool) -> list[Any]:
    """Of y0, the arguments, the weights and, where wanted, the times."""
    torch.manual_seed(7)
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves_of(y0)]
    given = [x.detach().clone().requires_grad_() for x in args]
    t = torch.tensor(times, dtype=D, requires_grad=of_times)
    state = tuple(leaves) if isinstance(y0, tuple) else leaves[0]
    ys = solve(func, state, t, args=given, **how).ys
    wanted = [*leaves, *given, func.w, func.b, func.unused, *([t] if of_times else [])]
    return list(torch.autograd.grad(weighted(leaves_of(ys)), wanted, allow_unused=True))


def told(case: tuple, **more: Any) -> None:
    func, y0, args, times, how = case
    note(f"gradients({func}, y0, args, {times}, {how | more}); y0 = {y0}; args = {args}")


@examples(short=15, fresh=120)
@given(cases(), st.sampled_from([1e-6, 1e-8]), st.booleans())
def test_among_each_other(case, rtol, of_times):
    """direct and checkpoint to rounding; adjoint and quadrature to tolerance, or as near as their grid is."""
    tick()
    func, y0, args, times, how = case
    of_times = of_times and func.kind != "noise"
    adaptive = "step_size" not in how and "grid_constructor" not in how
    how = {**how, "rtol": rtol, "atol": rtol} if adaptive else how
    told(case, rtol=rtol, of_times=of_times)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*adjoint.*")
        right = gradients(func, y0, args, times, {**how, "gradient": "direct"}, of_times)
        scale = 1 + largest(right)
        found = gradients(func, y0, args, times, {**how, "gradient": "checkpoint"}, of_times)
        gap = distance(found, right)
        assert gap <= ROUNDING * scale, f"checkpoint is off by {gap:.1e}"
        if func.kind in ("noise", "hook") or not adaptive:  # a hook sees other sums; a grid's adjoint is another formula
            return
        for gradient in NEAR:
            found = gradients(func, y0, args, times, {**how, "gradient": gradient}, of_times)
            gap = distance(found, right)
            assert gap <= 2000 * rtol * scale, f"{gradient} is off by {gap:.1e}"


@examples(short=10, fresh=80)
@given(cases(("hook",)))
def test_hooks(case):
    """A hook on a weight sees its gradient once, whole: what it makes of it is what comes out."""
    tick()
    func, y0, args, times, how = case
    told(case)
    for gradient in (*EXACT, *NEAR):
        if gradient == "quadrature" and "step_size" in how:
            continue
        func.w._backward_hooks, func.b._backward_hooks = None, None
        how = {**how, "gradient": gradient}
        plain = gradients(func, y0, args, times, how, False)
        func.w.register_hook(lambda grad: 0.5 * grad)
        func.b.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
        hooked = gradients(func, y0, args, times, how, False)
        place = len(leaves_of(y0)) + len(args)
        plain[place], plain[place + 1] = plain[place] * 0.5, plain[place + 1].clamp(-0.01, 0.01)
        gap = distance(hooked, plain)
        assert gap <= ROUNDING * (1 + largest(plain)), f"{gradient}: hooked weights are off by {gap:.1e}"


@examples(short=8, fresh=60)
@given(cases(("plain", "jump", "args", "inner", "in place", "tuple")), st.integers(0, 99), st.sampled_from(EXACT))
def test_differences(case, seed, gradient):
    """The directional derivative in one random direction of all numbers, those of the times among them."""
    tick()
    func, y0, args, times, how = case
    how = how if "step_control" not in how else {**how, "rtol": 1e-12, "atol": 1e-12}
    if how["method"] in ("bosh3", "fehlberg2", "adaptive_heun"):
        how["method"] = "dopri8"
    of_times = "grid_constructor" not in how and "step_size" not in how and func.kind != "jump"
    told(case)
    found = gradients(func, y0, args, times, {**how, "gradient": gradient}, of_times)
    g = torch.Generator().manual_seed(seed)
    numbers = [*leaves_of(y0), *args, func.w.detach(), func.b.detach(), func.unused.detach()]
    numbers += [torch.tensor(times, dtype=D)] if of_times else []
    ways = [torch.randn(x.shape, generator=g, dtype=D) for x in numbers]
    slope = sum(float((way * grad).sum()) for way, grad in zip(ways, found, strict=True) if grad is not None)

    def loss(by: float) -> float:
        moved = [x + by * way for x, way in zip(numbers, ways, strict=True)]
        count = len(leaves_of(y0))
        state = tuple(moved[:count]) if isinstance(y0, tuple) else moved[0]
        here = Field("plain", func.width, 0)
        here.__dict__.update({k: v for k, v in func.__dict__.items() if not k.startswith("_")})
        at = count + len(args)
        here.w.data, here.b.data, here.unused.data = moved[at : at + 3]
        with torch.no_grad():
            t = moved[-1].tolist() if of_times else times
            # An interpolant's error differs from one choice of steps to the next by far more than that of the steps.
            stops = {*how.get("step_t", ()), *t[1:-1]} - {*how.get("jump_t", ())}
            lands = {"step_t": sorted(stops)} if "step_control" in how else {}
            return float(weighted(leaves_of(solve(here, state, t, args=tuple(moved[count:at]), **how | lands).ys)))

    difference = (loss(STEP) - loss(-STEP)) / (2 * STEP)
    size = 1 + abs(slope) + math.sqrt(sum(float((x * x).sum()) for x in found if x is not None))
    assert abs(difference - slope) <= DIFFERENCES * size, f"{gradient} gives {slope:.9g}, differences {difference:.9g}"


@examples(short=5, fresh=40)
@given(cases(("plain", "tuple", "in place", "inner")))
def test_odeint_adjoint(case):
    """The drop-in function, with gradients added to .grad as a training loop does, from two solves of one field."""
    tick()
    func, y0, args, times, how = case
    if "step_size" in how:
        how = {"method": "dopri5"}
    told(case)
    right = [x for x in gradients(func, y0, args, times, {"method": how["method"], "rtol": 1e-8, "atol": 1e-8}, False)]
    func.zero_grad()
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves_of(y0)]
    state = tuple(leaves) if isinstance(y0, tuple) else leaves[0]
    t = torch.tensor(times, dtype=D)
    for _ in range(2):
        ys = odeint_adjoint(func, state, t, method=how["method"], rtol=1e-8, atol=1e-8)
        weighted(leaves_of(ys)).backward()
    found = [*(x.grad for x in leaves), func.w.grad, func.b.grad, func.unused.grad]
    gap = distance([None if x is None else x / 2 for x in found], right)
    assert gap <= 1e-4 * (1 + largest(right)), f"off by {gap:.1e}"
