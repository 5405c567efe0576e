"""Random fields: what a compiled one gives beside the stepper and the stepper in float64, in value, gradient and statistics."""

import warnings
from typing import Any

import pytest
import torch
from fuzzing import ADAPTIVE, FIXED, FRESH, distance, examples, largest, leaves_of, tick, weighted
from hypothesis import event, given, note
from hypothesis import strategies as st
from random_fields import RandomField, fields
from torch import Tensor
from torch.utils import _pytree as pytree

import odenet_cuda
from odenet_cuda import solve
from odenet_cuda.compiled import build
from odenet_cuda.compiled.field import CompiledField

# A result may differ by so many times what rounding of y and of slopes, by some units, makes of the stepper's own.
SHAKES, SHAKE, TIMES, UNITS = 3, 4.0, 30.0, 100.0
LOOSE = 1e3  # tolerances, where steps differ or the adjoint is as near as its tolerance only
FAULTS = ("misread", "failed:", "could not be loaded", "report")  # reasons to be served by the stepper that no field may give


class Shaken:
    """func with y and slopes off by rounding, always in the same way."""

    def __init__(self, func: Any, seed: int):
        self.func, self.seed = func, seed
        self.generator = torch.Generator()

    def __call__(self, t: Tensor, y: Any, *args: Any) -> Any:
        self.generator.manual_seed(self.seed)
        return pytree.tree_map(self.shake, self.func(t, pytree.tree_map(self.shake, y), *args))

    def shake(self, x: Tensor) -> Tensor:
        signs = torch.rand(x.shape, generator=self.generator, dtype=torch.float64) * 2 - 1
        return x * (1 + SHAKE * torch.finfo(x.dtype).eps * signs).to(x)


@st.composite
def solves(draw: Any) -> dict[str, Any]:
    """Arguments of a solve, as they stand in a program."""
    how: dict[str, Any] = {}
    forward = draw(st.booleans())
    t = draw(st.sampled_from([[0.0, 0.3], [0.0, 0.2, 0.5], [0.7, 0.8, 1.0, 1.1]]))
    t = t if forward else t[::-1]
    control = draw(st.sampled_from(["grid", "joint", "per_sample"]))
    if control == "grid":
        how |= {"method": draw(st.sampled_from(FIXED)), "step_size": 0.15}
    else:
        how |= {"method": draw(st.sampled_from(ADAPTIVE)), "rtol": 1e-4, "atol": 1e-5, "step_control": control}
    how["gradient"] = draw(st.sampled_from(["direct", "checkpoint", "adjoint"]))
    return {"t": t, **how}


def program(field: RandomField, dtype: str, batch: int, how: dict[str, Any]) -> str:
    call = "".join(f", {name}={value!r}" for name, value in how.items() if name != "t")
    text = field.program(dtype, batch)
    for name, func in (("found", "odenet_cuda.compile(func)"), ("right", "func")):
        text += f"{name} = odenet_cuda.solve({func}, y0, {how['t']}, args=args{call}).ys\n"
    return text + "print(*(a - b for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, right)))))"


def results(func: Any, names: dict[str, Any], how: dict[str, Any], dtype: torch.dtype, differentiate: bool) -> tuple:
    """(values, gradients, statistics) of one solve."""
    module = names["func"]

    def fresh(x: Any) -> Any:
        return x.detach().to(dtype).requires_grad_(differentiate) if isinstance(x, Tensor) else x

    y0, args = pytree.tree_map(fresh, names["y0"]), pytree.tree_map(fresh, names["args"])
    sources = [*leaves_of(y0), *leaves_of(args), *(p for p in module.parameters() if p.requires_grad)]
    with torch.set_grad_enabled(differentiate):
        solution = solve(func, y0, args=args, **how)
    outputs = leaves_of(solution.ys)
    grads: list[Any] = []
    if differentiate and any(x.requires_grad for x in outputs):
        grads = list(torch.autograd.grad(weighted(outputs), sources, allow_unused=True))
    stats = [torch.as_tensor(x) for x in (solution.stats.num_accepted, solution.stats.num_rejected)]
    return [x.detach() for x in outputs], grads, stats


def compare(field: CompiledField, names: dict[str, Any], how: dict[str, Any], dtype: torch.dtype) -> None:
    func, differentiate = names["func"], how["gradient"] != "none"
    adjoint = how["gradient"] == "adjoint"
    plain = {**how, "adjoint_options": {"norm": "seminorm"}} if adjoint and "rtol" in how else how
    right = results(func, names, plain, dtype, differentiate)
    if any(largest(part) == float("inf") for part in right[:2]):
        return
    found = results(field, names, how, dtype, differentiate)
    why = field.explain()
    event("compiled" if why == "compiled" else "served by the stepper")
    assert not any(word in why for word in FAULTS), why
    shaken = [results(Shaken(func, seed), names, plain, dtype, differentiate) for seed in range(SHAKES)]
    same = all(torch.equal(a, b) for a, b in zip(found[2], right[2], strict=True))
    if not same:
        event("other steps")
    for part, what in enumerate(("values", "gradients")):
        scale = 1 + largest(right[part])
        allowed = TIMES * max(distance(s[part], right[part]) for s in shaken) + UNITS * torch.finfo(dtype).eps * scale
        if not same or (adjoint and part and "rtol" in how):
            allowed += LOOSE * how.get("rtol", 0.0) * scale
        gap = distance(found[part], right[part])
        assert gap <= allowed, f"{what} differ by {gap:.2e}, of {scale:.2e}; rounding makes {allowed:.2e}"
    if "step_size" in how and dtype == torch.float32:  # the same steps in float64
        func.double()
        exact = results(func, names, plain, torch.float64, differentiate)
        func.float()
        for part, what in enumerate(("values", "gradients")):
            allowed = TIMES * distance(right[part], exact[part]) + UNITS * 2.0**-23 * (1 + largest(exact[part]))
            gap = distance(found[part], exact[part])
            assert gap <= allowed, f"{what} differ from float64 by {gap:.2e}; the stepper's by {allowed / TIMES:.2e}"


def make(field: RandomField, dtype: str, batch: int) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(field.program(dtype, batch), names)
    return names


@pytest.fixture(autouse=True)
def no_warning():
    """A field that does not pass its own check is a fault that a warning tells."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="gradient='adjoint' came back")  # of a coarse grid, or by loose tolerances
        yield


def compiler() -> bool:
    try:
        build.find_compiler()
    except build.NoCompiler:
        return False
    return True


@pytest.mark.skipif(not compiler(), reason="needs a C++ compiler")
@examples(short=2, fresh=12)
@given(fields(), solves(), st.sampled_from(["float64", "float32"]), st.sampled_from([2, 5, 17, 33]), st.booleans())
def test_solves(field, how, dtype, batch, alone):
    """A solve of a compiled field and its gradients, for one sample too."""
    tick()
    for size in (batch, 1) if alone and FRESH else (batch,):
        note(program(field, dtype, size, how))
        names = make(field, dtype, size)
        compare(odenet_cuda.compile(names["func"]), names, how, getattr(torch, dtype))


@examples(short=8, fresh=50)
@given(fields(8), st.sampled_from(["float64", "float32"]), st.booleans())
def test_reading(field, dtype, per_sample):
    """Without a compiler: the program that is read is func's in slopes and products, or func is refused in words."""
    tick()
    note(field.program(dtype, 5))
    names = make(field, dtype, 5)
    compiled = odenet_cuda.compile(names["func"])
    try:
        compiled.plan(odenet_cuda.problem.Structure(names["y0"]), names["args"], per_sample)
    except odenet_cuda.compiled.trace.Unreadable as error:
        event("refused: " + str(error).split("(")[0][:60])
        assert not any(word in str(error) for word in (*FAULTS, "could not be recorded")), error
    else:
        event("read")


if __name__ == "__main__":  # what is read and what is refused, to see whether the fuzzer tries what it should
    test_reading()
