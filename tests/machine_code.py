"""The machine code of many compiled fields against torch: slopes, products and sums of gradients, on packs and single lanes.

Whole solves of one field are a second of the compiler's each. Here the functions of many fields, of every width, are compiled
as one text, called from Python, and compared with torch in float64. Run as a program it is the whole grid: `make test-grid`.
"""

import ctypes
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from compiled_fields import compare, compare_gradients, rows
from torch import Tensor, nn

import odenet_cuda
from odenet_cuda import _C
from odenet_cuda.compiled.compilers import LEVEL_FLAGS, compiler_flags, find_compiler, has_mvec, include_folder
from odenet_cuda.compiled.emit import Target
from odenet_cuda.compiled.plan import Plan
from odenet_cuda.methods import RK4
from odenet_cuda.problem import Structure

WIDTHS = range(1, 71)
DTYPES = {"float": torch.float32, "double": torch.float64}
# Of the largest number of a result: at most some 5,000 terms are added up, and functions of vectors err by 4 ulp.
TOLERANCE = {"float": 2e-5, "double": 2e-13}
SOLVES = {"float": 1e-4, "double": 1e-9}  # whole solves, some ten steps of the same numbers in another order
ADJOINT = 3e-3  # two solves backwards at 1e-5, whose norms differ
_AT_ONCE = 12  # fields of one text: more take a compiler's memory, fewer its start
_T = 0.7

# As emitted, but for the solve: what a step calls, one after the other. x: t, y, g; all as [number][lane].
_HEAD = """#include "core/backward.h"
#include "core/layers.h"
namespace odenet {
namespace ODENET_LEVEL {
template <class E, class A, class P>
void run(const void* const* constants, const Number<P>* x, Number<P>* out, Number<P>* sums) {
  using T = Number<P>;
  SolveCall in{};
  in.constants = constants;
  static P t, y[E::state], g[E::state], results[6][E::state], kept[E::kept + 1], taps[2][E::taps_of_product + 1];
  static P weight, none[1];
  memcpy(&t, x, sizeof(t));
  memcpy(y, x + Lanes<P>::width, sizeof(y));
  memcpy(g, x + Lanes<P>::width * (1 + E::state), sizeof(g));
  weight = P(T(1));
  E::field(in, t, y, none, results[0], taps[0]);
  E::product(in, t, y, none, g, results[1], taps[0]);
  if constexpr (E::kept > 0) {
    E::field_and_keep(in, t, y, none, results[2], kept);
    E::product_of_kept(in, t, y, none, g, kept, results[3], taps[1]);
  } else {
    E::field(in, t, y, none, results[2], taps[1]);
    E::product(in, t, y, none, g, results[3], taps[1]);
  }
  A::slope_and_product(in, t, y, none, g, results[4], results[5], taps[1]);
  E::template accumulate<1>(Alone{}, taps, &weight, sums, none);
  memcpy(out, results, sizeof(results));
}
"""
_FIELD = """namespace of_reverse_{k} {{
{reverse}
}}
namespace of_adjoint_{k} {{
{adjoint}
}}
extern "C" ODENET_EXPORT void pack_{k}(const void* const* constants, const {T}* x, {T}* out, {T}* sums) {{
  run<of_reverse_{k}::Equation, of_adjoint_{k}::Equation, Pack<{T}, kWidth<{T}>>>(constants, x, out, sums);
}}
extern "C" ODENET_EXPORT void one_{k}(const void* const* constants, const {T}* x, {T}* out, {T}* sums) {{
  run<of_reverse_{k}::Equation, of_adjoint_{k}::Equation, {T}>(constants, x, out, sums);
}}
"""


# ---- fields: of y [batch, n], with weights of their own ----


def _weight(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return rows(*shape, seed=seed, dtype=dtype).requires_grad_()


def layer_of_square(n: int, dtype: torch.dtype) -> Callable:
    w = _weight(n, n, seed=1, dtype=dtype)
    return lambda t, y: F.linear(y * y, w) * 0.1 - 0.2 * y


def layer_of_sum(n: int, dtype: torch.dtype) -> Callable:
    w = _weight(n, n, seed=2, dtype=dtype)
    return lambda t, y: F.linear(y * y.sum(-1, keepdim=True), w)


def net(n: int, dtype: torch.dtype) -> Callable:
    k = n // 2 + 2
    w, b, v = _weight(k, n, seed=3, dtype=dtype), _weight(k, seed=4, dtype=dtype), _weight(n, k, seed=5, dtype=dtype)
    return lambda t, y: F.linear(torch.tanh(F.linear(y, w, b)), v)


def same_net(n: int, dtype: torch.dtype) -> Callable:
    w, b, v = _weight(n, n, seed=3, dtype=dtype), _weight(n, seed=4, dtype=dtype), _weight(n, n, seed=5, dtype=dtype)
    return lambda t, y: F.linear(torch.sin(F.linear(y, w, b) * t), v)


def layers(n: int, dtype: torch.dtype) -> Callable:
    w, v, u = _weight(n + 1, n, seed=6, dtype=dtype), _weight(n, n + 1, seed=7, dtype=dtype), _weight(n, n, seed=8, dtype=dtype)
    return lambda t, y: F.linear(F.linear(F.linear(y, w), v), u) * 0.1


def timed(n: int, dtype: torch.dtype) -> Callable:
    w, b = _weight(n, n + 1, seed=9, dtype=dtype), _weight(n, seed=10, dtype=dtype)
    return lambda t, y: torch.sigmoid(F.linear(torch.cat([y, t.expand(len(y), 1)], 1), w, b))


def softmax(n: int, dtype: torch.dtype) -> Callable:
    w = _weight(n, n, seed=11, dtype=dtype)
    return lambda t, y: torch.softmax(y * t, -1) @ w - y


def outer(n: int, dtype: torch.dtype) -> Callable:
    m = min(n, 6)
    w = _weight(n, m * m, seed=12, dtype=dtype)
    return lambda t, y: F.linear((y[:, :m, None] * y[:, None, :m]).reshape(len(y), -1), w)


def halves(n: int, dtype: torch.dtype) -> Callable:
    m = n // 2
    w, v = _weight(n - m, n - m, seed=13, dtype=dtype), _weight(m, n - m, seed=14, dtype=dtype)

    def field(t: Tensor, y: Tensor) -> Tensor:
        a, b = y[:, :m], y[:, m:]
        return torch.cat([F.linear(b * b, v) - a, F.linear(torch.exp(-b), w)], 1)

    return field


def transposed(n: int, dtype: torch.dtype) -> Callable:
    w, b = _weight(n, n, seed=15, dtype=dtype), _weight(n, seed=16, dtype=dtype)
    return lambda t, y: torch.addmm(b, y.abs() * y, w) + (y * b).sum(-1, keepdim=True)


EVERY = (layer_of_square, layer_of_sum)  # at every width
SHAPES = (net, same_net, layers, timed, softmax, outer, halves, transposed)


# ---- a field, its texts and what torch says ----


@dataclass
class Case:
    name: str
    func: Callable
    plan: Plan
    dtype: str

    @classmethod
    def of(cls, shape: Callable, n: int, dtype: str) -> "Case":
        func = shape(n, DTYPES[dtype])
        plan = Plan(func, Structure(rows(5, n, dtype=DTYPES[dtype])), (), False)
        return cls(f"{shape.__name__} of {n}, {dtype}", func, plan, dtype)

    def text(self, k: int) -> str:
        parts = {solve: self._struct(solve) for solve in ("reverse", "adjoint_grid")}
        return _FIELD.format(k=k, T=self.dtype, reverse=parts["reverse"], adjoint=parts["adjoint_grid"])

    def _struct(self, solve: str) -> str:
        text = self.plan.source(RK4, Target(self.dtype, "pack", solve))
        return text[text.index("struct Equation {") : text.index("\n}  // namespace ODENET_LEVEL")]

    def worst(self, library: ctypes.CDLL, k: int) -> float:
        """The largest difference from torch in float64, of the largest number, over what is allowed."""
        n, widths = self.plan.leaf_sizes[0], (ctypes.c_int * 1).in_dll(library, "width")[0]
        constants = self.plan.constants(())
        addresses = (ctypes.c_void_p * max(1, len(constants.addresses)))(*constants.addresses)
        found = 0.0
        for function, lanes in ((f"pack_{k}", widths), (f"one_{k}", 1)):
            y, g = (rows(lanes, n, seed=seed, dtype=DTYPES[self.dtype]) for seed in (20, 21))
            x = torch.cat([torch.full((lanes, 1), _T, dtype=y.dtype), y, g], 1).t().contiguous()
            out, sums = (
                torch.full((6, n, lanes), torch.nan, dtype=y.dtype),
                torch.zeros(self.plan.sums_at[1] + 1, dtype=y.dtype),
            )
            getattr(library, function)(addresses, *(ctypes.c_void_p(z.data_ptr()) for z in (x, out, sums)))
            slope, product, grads = self._expected(y, g)
            pairs = [(out[i].t(), expected) for i, expected in enumerate([slope, product] * 3)]
            pairs += zip(self.plan.gradients(sums[None], constants), grads, strict=True)
            found = max(found, *(_distance(a, b) for a, b in pairs))
        return found / TOLERANCE[self.dtype]

    def _expected(self, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        wanted = list(self.plan.recording.wanted)
        own = {id(w): w.detach().double().requires_grad_() for w in wanted}
        func = _with_weights(self.func, own)
        leaf = y.double().requires_grad_()
        slope = func(torch.tensor(_T, dtype=y.dtype).double(), leaf)
        product, *grads = torch.autograd.grad(slope, [leaf, *(own[id(w)] for w in wanted)], g.double())
        return slope.detach(), product, grads


def _with_weights(func: Callable, own: dict[int, Tensor]) -> Callable:
    """The same function over other tensors in its closure."""
    cells = [cell.cell_contents for cell in func.__closure__ or ()]
    return type(func)(
        func.__code__, func.__globals__, closure=tuple(type(func.__closure__[0])(own.get(id(x), x)) for x in cells)
    )


def _distance(found: Tensor | None, expected: Tensor) -> float:
    assert found is not None
    difference = (found.detach().double() - expected).abs()
    return float("inf") if not difference.isfinite().all() else float(difference.max() / (1 + expected.abs().max()))


def compile_cases(cases: list[Case], level: str, folder: Path) -> Path:
    """One library of them, with the flags of compiled fields."""
    text = _HEAD + "".join(case.text(k) for k, case in enumerate(cases))
    pack = f"Pack<{cases[0].dtype}, kWidth<{cases[0].dtype}>>"
    text += f'extern "C" ODENET_EXPORT const int width = Lanes<{pack}>::width;\n}}\n}}\n'
    source, result = folder / "fields.cpp", folder / "fields.so"
    source.write_text(text)
    extra = os.environ.get("ODENET_CXXFLAGS", "").split()
    flags = [*compiler_flags(), f"-DODENET_LEVEL={level}", *LEVEL_FLAGS[level], *extra, f"-I{include_folder()}"]
    command = [*find_compiler()[0], *flags, str(source), "-o", str(result), *(["-lmvec"] if has_mvec() else []), "-lm"]
    subprocess.run(command, check=True)
    return result


def differences(cases: list[Case], level: str) -> Iterator[tuple[str, float]]:
    """What differs from torch by more than is allowed, and by how much. Where the machine cannot run it: nothing."""
    with tempfile.TemporaryDirectory() as folder:
        path = compile_cases(cases, level, Path(folder))
        if level not in _C.cpu_levels:
            return
        library = ctypes.CDLL(str(path))
        for k, case in enumerate(cases):
            worst = case.worst(library, k)
            if not worst <= 1:
                yield case.name, worst


def grid(dtype: str) -> list[Case]:
    """Every width with the shapes of every width and with one other, which changes from width to width."""
    cases = []
    for n in WIDTHS:
        others = [SHAPES[(n + n // len(SHAPES)) % len(SHAPES)]] if n > 1 else []
        cases += [Case.of(shape, n, dtype) for shape in (*EVERY, *others)]
    return cases


CONTROLS: tuple[dict, ...] = ({"method": "rk4", "step_size": 0.1}, {"step_control": "per_sample"}, {"step_control": "joint"})


def whole_solves(n: int, dtype: str, batch: int, controls: tuple[dict, ...] = CONTROLS) -> None:
    """Each control forwards, and both kinds of gradient, against the stepper."""
    func = Layer(n, DTYPES[dtype])
    y0, t = rows(batch, n, seed=22, dtype=DTYPES[dtype]), torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    error = SOLVES[dtype]
    field = odenet_cuda.compile(func)
    for control in controls:
        how = control if "method" in control else {**control, "rtol": 1e-5, "atol": 1e-5}
        compare(field, y0, t, error, counts=dtype == "double", **how)
        for gradient in ("direct", "adjoint"):
            compare_gradients(func, y0, t, 10 * error if gradient == "direct" else ADJOINT, gradient=gradient, **how)


class Layer(nn.Module):
    """A linear layer of y times the sum of y: the shape whose code g++ gets wrong most often."""

    def __init__(self, n: int, dtype: torch.dtype):
        super().__init__()
        self.w = nn.Parameter(rows(n, n, seed=2, dtype=dtype) / n)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return F.linear(y * y.sum(-1, keepdim=True), self.w) - y


def main() -> int:
    wanted = sys.argv[1:] or list(LEVEL_FLAGS if len(_C.cpu_levels) > 1 else ("baseline",))
    torch.set_num_threads(1)
    bad = 0
    for dtype in DTYPES:
        cases = grid(dtype)
        parts = [cases[i :: len(cases) // _AT_ONCE] for i in range(len(cases) // _AT_ONCE)]
        for level in wanted:
            begin = time.time()
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                found = [
                    pair for part in pool.map(lambda part, level=level: list(differences(part, level)), parts) for pair in part
                ]
            for name, worst in found:
                print(f"{level}: {name}: {worst:.3g} times what is allowed")
            how = "" if level in _C.cpu_levels else " compiled, not run here;"
            print(f"{level} {dtype}: {len(cases)} fields,{how} {len(found)} differ, {time.time() - begin:.0f} s", flush=True)
            bad += len(found)
    for level in set(wanted) & set(_C.cpu_levels):
        _C.choose_level(level)
        for n, dtype, batch in itertools.product((7, 9, 13), DTYPES, (1, 5)):
            whole_solves(n, dtype, batch)
        print(f"{level}: whole solves agree", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
