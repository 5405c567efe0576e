"""The program of a field, run by NumPy in float64 beside the field itself: what was misread is refused, not compiled."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..problem import Structure
from .call import products, sample_rows
from .field_program import FieldProgram
from .memory import has_memory
from .program import Contract, Linear, Lookup, Pointwise, Program, Reduce, Refs, split
from .trace import Unreadable
from .writes import written_by

_NAMES: dict[str, Any] = {
    "P": lambda x: x,
    "T": lambda x: x,
    "INFINITY": np.inf,
    "select": np.where,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "negate": np.logical_not,
    "hypotenuse": np.hypot,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "modulo": np.mod,
    "floor_divide": np.floor_divide,
    "rint": np.rint,
    "fmod": np.fmod,
    "asin": np.arcsin,
    "acos": np.arccos,
    "atan": np.arctan,
    "atan2": np.arctan2,
    "asinh": np.arcsinh,
    "acosh": np.arccosh,
    "atanh": np.arctanh,
    "pow": np.power,
    "erf": lambda x: torch.erf(torch.as_tensor(x, device="cpu")).numpy(),
    "erfc": lambda x: torch.erfc(torch.as_tensor(x, device="cpu")).numpy(),
    **{name: getattr(np, name) for name in ("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan")},
    **{name: getattr(np, name) for name in ("sinh", "cosh", "tanh", "sqrt", "abs", "floor", "ceil")},
}


def _without_gradients(
    func: Callable, structure: Structure, t: Tensor, leaves: Sequence[Tensor], args: Sequence[Any], others: "Others"
) -> list[list[Tensor]]:
    """The slopes where no gradient is wanted, as the stepper asks for them, and in inference mode; without those for which func
    needs one."""
    given = [x.detach() if isinstance(x, Tensor) and not x.is_leaf else x for x in args]
    found = []
    for mode in (torch.no_grad, torch.inference_mode):
        try:
            with mode(), others:
                found.append(structure.flatten(func(t, structure.unflatten([leaf.detach() for leaf in leaves]), *given)))
        except Exception:
            continue
    return found


def run_program(program: Program, inputs: dict[str, np.ndarray], constants: list[np.ndarray]) -> list[np.ndarray]:
    """The buffers after a run on a batch: each [batch, size]. inputs: t, y, arguments, g, v, rate, by name, [batch, size]."""
    batch = len(inputs["y"])
    waiting = iter(constants)
    memory: list[Any] = []
    for buffer in program.buffers:
        if buffer.kind == "input":
            memory.append(inputs[buffer.name])
        elif buffer.kind == "constant":
            memory.append(np.broadcast_to(next(waiting), (batch, buffer.size)))
        elif buffer.kind == "literal":
            memory.append(np.broadcast_to(np.array(buffer.values), (batch, len(buffer.values))))
        else:
            memory.append(np.empty((batch, buffer.size), bool if buffer.mask else float))

    def read(refs: Refs) -> np.ndarray:
        buffers, places = split(refs)
        if refs.size == 0:
            return np.zeros((batch, 0))
        out = np.empty((batch, *refs.shape), bool if memory[int(buffers.flat[0])].dtype == bool else float)
        for buffer in np.unique(buffers):
            out[:, buffers == buffer] = memory[int(buffer)][:, places[buffers == buffer]]
        return out

    for s in program.statements:
        if isinstance(s, Pointwise):
            operands = {f"x{i}": read(refs) for i, refs in enumerate(s.operands)}
            names = {**_NAMES, **operands, "i": np.arange(program.buffers[s.out].size)}
            text = s.text.replace("/", "//") if "{i}" in s.text else s.text  # of whole numbers, as in C++
            memory[s.out][:] = eval(text.format(*operands, i="i"), names)
        elif isinstance(s, Reduce):
            memory[s.out][:] = read(s.operand).max(-1) if s.largest else read(s.operand).sum(-1)
        elif isinstance(s, Contract):
            memory[s.out][:] = (read(s.a) * read(s.b)).sum(-1)
        elif isinstance(s, Lookup):
            places, count = read(s.places), s.table.shape[1]
            known = (places >= 0) & (places < count)
            found = np.take_along_axis(read(s.table), np.where(known, places, 0).astype(int)[..., None], -1)[..., 0]
            memory[s.out][:] = np.where(known, found, np.nan)
        elif isinstance(s, Linear):
            places = s.offset + s.row * np.arange(s.rows)[:, None] + s.column * np.arange(s.columns)
            memory[s.out][:] = read(s.x) @ memory[s.weight][0][places].T + (0 if s.bias is None else read(s.bias))
    program_read = read
    results = [program.slopes, program.product.state, program.product.arguments, program.time_product]
    if program.second is not None:
        results += [program.second.state, program.second.arguments]
    return [program_read(x) for x in results]


# Times, and how many samples there are, where a program is checked: with the tensors of func as they are, then with others.
_POINTS = ((0.25, 5), (-0.625, 2), (1.75, 40), (0.125, 1100))
_MOST_NUMBERS = 5_000_000  # in all values of a check
_SAMPLES = 5  # with a time for each


def check_program(
    plan: FieldProgram, func: Callable, structure: Structure, t: Tensor, args: Sequence[Any], per_sample: bool = False
) -> None:
    """Raises Unreadable where slopes or products of the program are not those of func, at states near the one given, with the
    tensors of func as they are and with others: a layer that is zero now, as last layers of flows are, hides what is before it.
    What func writes is left as it is then. per_sample: at a time for each sample too, as the stepper gives them then."""
    generator = torch.Generator().manual_seed(0)
    rows = structure.leaves[0].shape[0] if structure.leaves[0].dim() else 1
    most = max(2, _MOST_NUMBERS // (1 + sum(buffer.size for buffer in plan.program.buffers)))
    for place, (time, samples) in enumerate((*_POINTS, (0.5, rows))):
        batch = min(samples, most)
        others, size = Others(plan.outside if place else [], generator), 1 if plan.whole else max(batch, 1)
        try:
            _check_at(plan, func, structure, t + time, args, size, others, generator)
        except Unreadable:
            raise
        except Exception:  # func may not take other numbers, such as a matrix that must be positive definite
            _check_at(plan, func, structure, t + time, args, size, Others([], generator), generator)
    if per_sample:
        shape = [_SAMPLES, *[1] * (structure.leaves[0].dim() - 1)]
        times = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(t)
        try:
            _check_at(plan, func, structure, times, args, _SAMPLES, Others([], generator), generator)
        except Exception as error:
            words = str(error) if isinstance(error, Unreadable) else f"{type(error).__name__}: {error}"
            given = "under step_control='per_sample' func is given a time for each sample, [batch, 1, ...] of y's rank"
            raise Unreadable(f"{given}, with which it does something else than with one time: {words}") from error


class Others(TorchDispatchMode):
    """Operations get other numbers in place of these tensors, which are left alone."""

    def __init__(self, tensors: Sequence[Tensor], generator: torch.Generator):
        super().__init__()
        self._found: dict[Any, Tensor] = {}
        for x in tensors:
            if x.is_floating_point() and has_memory(x) and _key(x) not in self._found:
                moved = torch.randn(x.shape, generator=generator, dtype=torch.float64, device="cpu").to(x) * 0.1
                other = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x.detach() + moved)
                self._found[_key(x)] = other

    def of(self, x: Any) -> Any:
        return self._found.get(_key(x), x) if isinstance(x, Tensor) and has_memory(x) else x

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for x in written_by(func, args, kwargs or {}):
            if _key(x) in self._found:
                raise Unreadable(f"func writes a tensor {list(x.shape)} at one call and not at another")
        args, kwargs = pytree.tree_map(self.of, (args, kwargs or {}))
        return func(*args, **kwargs)


def _key(x: Tensor) -> Any:
    return x.data_ptr(), x.shape, x.stride(), x.dtype


def _check_at(
    plan: FieldProgram,
    func: Callable,
    structure: Structure,
    t: Tensor,
    args: Sequence[Any],
    batch: int,
    others: Others,
    generator: torch.Generator,
) -> None:
    def near(x: Tensor) -> Tensor:
        rows = x.detach() if plan.whole else sample_rows(x, batch)
        if not x.is_floating_point():
            return rows
        return rows + 0.1 * torch.randn(rows.shape, generator=generator, dtype=torch.float64, device="cpu").to(rows)

    leaves = [near(leaf).requires_grad_() for leaf in structure.leaves]
    samples = [near(args[i]).requires_grad_(args[i].requires_grad) for i in plan.batched]
    g, tangents = (
        [torch.randn(leaf.shape, generator=generator, dtype=torch.float64, device="cpu").to(leaf) for leaf in leaves]
        for _ in range(2)
    )
    given = list(args)
    for i, place in enumerate(plan.batched):
        given[place] = samples[i]
    at = t.detach().clone().requires_grad_(plan.recording.by_time)
    rate = torch.ones_like(at)
    with torch.enable_grad(), others:
        slopes = structure.flatten(func(at, structure.unflatten(leaves), *given))
        wanted = [slopes, *_derivatives(plan, slopes, [*leaves, *samples], at, g, [*tangents, rate])]
    alone = _without_gradients(func, structure, t, leaves, given, others)

    def flat(parts: Sequence[Tensor], rows: int = batch) -> np.ndarray:
        flat = [part.detach().double().cpu().reshape(rows, -1) for part in parts]
        return torch.cat(flat, 1).numpy() if flat else np.zeros((rows, 0))

    times = np.broadcast_to(t.detach().double().cpu().numpy().reshape(-1, 1), (batch, 1))
    inputs = {"t": times, "y": flat(leaves), "arguments": flat(samples), "g": flat(g), "v": flat(tangents)}
    inputs["rate"] = np.ones((batch, 1))
    nodes = [node for node in plan.recording.graphs[0].nodes if node.op == "get_attr"]
    seen = {node: others.of(plan.recording.constant(node)) for node in nodes}
    # Copies: memory that NumPy has seen cannot be resized any more, as FSDP does with that of parameters.
    arrays = [plan.array(node, seen).cpu().clone().numpy() for node in plan.program.constants]
    with np.errstate(all="ignore"):
        results = run_program(plan.program, inputs, [a if a.dtype == bool else a.astype(float) for a in arrays])
    for what, got, parts in zip(_RESULTS, results, wanted, strict=False):
        if what != "df/dt":
            _compare(what, got, flat(parts), plan.dtype)
        elif got.size:  # of a common time func gives the sum over the samples
            _compare(what, got if t.dim() else got.sum(0, keepdims=True), flat(parts, at.numel()), plan.dtype)
    for values in alone:
        _compare("slopes where no gradient is wanted", results[0], flat(values), plan.dtype)


_RESULTS = "slopes", "products", "products", "df/dt", "second derivatives", "second derivatives"  # those of `run_program`


def _derivatives(
    plan: FieldProgram,
    slopes: list[Tensor],
    inside: list[Tensor],
    at: Tensor,
    g: Sequence[Tensor],
    tangents: Sequence[Tensor],
) -> list[list[Tensor]]:
    """As autograd has them: the products for leaves, for arguments and for the time, and perhaps the former of the second
    derivatives. inside: leaves and arguments; tangents: of the leaves and of the time."""
    n = len(g)
    sources = [x if x.requires_grad else None for x in (*inside, at)]
    found = products(slopes, sources, g, plan.recording.second)
    parts = [found[:n], found[n:-1], found[-1:]]
    if plan.recording.second:
        second = products([*found[:n], found[-1]], sources[:-1], tangents)
        parts += [second[:n], second[n:]]
    like = inside[:n], inside[n:], [at], inside[:n], inside[n:]
    return [
        [torch.zeros_like(y) if x is None else x for x, y in zip(part, of_part, strict=True)]
        for part, of_part in zip(parts, like, strict=False)
    ]


def _compare(what: str, got: np.ndarray, expected: np.ndarray, dtype: torch.dtype) -> None:
    """Raises Unreadable where they differ."""
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3  # some 1e7 roundings
    # Where func is not finite, float32 and the NumPy here may differ in how; elsewhere each sample has its own scale.
    known = np.isfinite(expected)
    scale = 1 + np.abs(np.where(known, expected, 0)).max(1, initial=0, keepdims=True)
    with np.errstate(all="ignore"):
        difference = (np.abs(np.where(known, got - expected, 0)) / scale).max(initial=0)
    if not difference <= tolerance:
        raise Unreadable(f"func was misread: its {what} differ by {difference:.1e}")
