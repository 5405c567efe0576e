"""What programs written for torchdiffeq do, and what states, times and surroundings may be."""

import ast
import subprocess
import sys
from collections import OrderedDict, namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
import torchdiffeq
from torch import nn

import odenet_cuda
from odenet_cuda import odeint, odeint_adjoint, odeint_dense, solve

D = torch.float64
T = torch.tensor([0.0, 0.4, 1.0], dtype=D)
GRADIENTS = ("direct", "adjoint", "checkpoint", "quadrature")
METHODS = ("dopri5", "rk4")
CLOSE = {"rtol": 1e-6, "atol": 1e-8}  # both solve to their default tolerances
TOGETHER = {"rtol": 1e-4, "atol": 1e-6}  # gradients of two solves with other steps


class Flow(nn.Module):
    """A continuous normalizing flow: it differentiates by one leaf of its state, inside itself."""

    def __init__(self, marks: bool = True, enables: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.marks, self.enables = nn.Linear(2, 2, dtype=D), marks, enables

    def forward(self, t, state):
        with torch.set_grad_enabled(True if self.enables else torch.is_grad_enabled()):
            z = state[0]
            if self.marks:
                z.requires_grad_(True)
            dz = torch.tanh(self.layer(z)) * torch.cos(t)
            rows = [torch.autograd.grad(dz[:, i].sum(), z, create_graph=True)[0][:, i] for i in range(2)]
        return dz, -sum(rows)[:, None]


def states(grad: bool):
    return torch.linspace(-1, 1, 10, dtype=D).view(5, 2).requires_grad_(grad), torch.zeros(5, 1, dtype=D)


def loss_and_gradients(solver, func, y0, method):
    z, log_p = solver(func, y0, T, method=method)
    loss = z[-1].square().sum() + log_p[1:].sum()
    inputs = [*func.parameters(), *(leaf for leaf in y0 if leaf.requires_grad)]
    return [loss.detach(), *(torch.autograd.grad(loss, inputs) if inputs and loss.requires_grad else ())]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("grad", [False, True], ids=["x", "x with gradient"])
@pytest.mark.parametrize("enables", [True, False], ids=["enable_grad", "as called"])
def test_a_field_that_differentiates(enables, grad, method):
    """By one leaf of a tuple, with or without a gradient for it, inside enable_grad or as it was called."""
    func = Flow(marks=not grad, enables=enables)
    ours, theirs = (loss_and_gradients(f, func, states(grad), method) for f in (odeint, torchdiffeq.odeint))
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, **TOGETHER)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_field_that_differentiates_by_all_gradients(gradient, method):
    """The four gradients agree where func marks one leaf."""
    func = Flow()
    z, log_p = solve(func, states(False), T, gradient=gradient, method=method, rtol=1e-9, atol=1e-9, step_size=None).ys
    found = torch.autograd.grad(z[-1].square().sum() + log_p[-1].sum(), list(func.parameters()))
    z, log_p = solve(func, states(True), T, method=method, rtol=1e-9, atol=1e-9).ys
    expected = torch.autograd.grad(z[-1].square().sum() + log_p[-1].sum(), list(func.parameters()))
    # The adjoint of a grid is another discretisation: its error is that of rk4 with these steps.
    accuracy = {"rtol": 1e-2, "atol": 1e-3} if method == "rk4" else TOGETHER
    torch.testing.assert_close(found, expected, **accuracy)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_on_where_nothing_needs_them(method):
    """func differentiates inside itself as its caller may; the result has no graph."""
    weight = torch.tensor([1.0, 2.0], dtype=D)

    def func(t, y):
        return torch.autograd.grad((torch.sin(y.requires_grad_(True)) * weight).sum(), y)[0]

    y0 = torch.ones(2, dtype=D)
    found = odeint(func, y0, T, method=method)
    torch.testing.assert_close(found, torchdiffeq.odeint(func, y0.clone(), T, method=method).detach(), **CLOSE)
    assert not found.requires_grad and not y0.requires_grad


SHAPES = {  # of a leaf, and of its slope
    "one more axis": ((3,), (3, 1)),
    "an axis in front": ((3,), (1, 3)),
    "one less": ((3, 1), (3,)),
    "flat": ((2, 3), (6,)),
    "number": ((1,), ()),
    "of a number": ((), (1,)),
    "merged": ((2, 3, 4), (6, 4)),
}


@pytest.mark.parametrize("solver", [odeint, lambda *args, **kwargs: odeint_adjoint(*args, adjoint_params=(), **kwargs)])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SHAPES)
def test_slopes_of_another_shape(name, method, solver):
    """They have the leaf's numbers in the leaf's order, for a tensor, a tuple and a compiled field, and gradients."""
    shape, other = SHAPES[name]
    y0 = torch.rand(shape, dtype=D, requires_grad=True)
    expected = torch.autograd.grad(solver(lambda t, y: -y * y, y0, T, method=method).sum(), y0)
    for func in (lambda t, y: (-y * y).reshape(other), odenet_cuda.compile(lambda t, y: (-y * y).reshape(other))):
        torch.testing.assert_close(torch.autograd.grad(solver(func, y0, T, method=method).sum(), y0), expected)
    func = lambda t, y: (y[0] * 0, (-y[1] * y[1]).reshape(other))  # noqa: E731
    pair = torch.zeros(2, dtype=D), y0
    torch.testing.assert_close(torch.autograd.grad(solver(func, pair, T, method=method)[1].sum(), y0), expected)
    theirs = torchdiffeq.odeint(func, pair, T, method=method)[1]
    torch.testing.assert_close(solver(func, pair, T, method=method)[1], theirs, **CLOSE)


@pytest.mark.parametrize("shape", [(3, 2), (2,), (1, 3), (12,), ()])
def test_slopes_that_are_something_else(shape):
    """Transposed, or to be broadcast: the same numbers would stand elsewhere. `solve` takes no other shape at all."""
    with pytest.raises(ValueError, match=r"func must return the shape of y0, \[2, 3\]"):
        odeint(lambda t, y: torch.zeros(shape, dtype=D), torch.ones(2, 3, dtype=D), T)
    with pytest.raises(ValueError, match=r"func must return the shape of y0, \[3\], got \[3, 1\]"):
        solve(lambda t, y: -y[:, None], torch.ones(3, dtype=D), T)


@pytest.mark.parametrize("kind", [list, iter, torch.stack])
def test_what_gives_the_slopes_of_a_tuple(kind):
    """torchdiffeq goes through what func returns for a tuple one by one."""
    y0 = torch.ones(3, dtype=D), torch.arange(3, dtype=D)
    func = lambda t, y: kind([-y[1], y[0]])  # noqa: E731
    for ours, theirs in zip(odeint(func, y0, T), torchdiffeq.odeint(func, y0, T), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


Pair = namedtuple("Pair", "x v")
Other = namedtuple("Other", "v x")
NESTS = {
    "dict": (lambda x, v: {"x": x, "v": v}, lambda x, v: {"v": v, "x": x}),
    "dict in a tuple": (lambda x, v: ({"x": x, "v": v},), lambda x, v: ({"v": v, "x": x},)),
    "dict in a list, a tuple of it": (lambda x, v: [{"x": x, "v": v}], lambda x, v: ({"v": v, "x": x},)),
    "dict in a dict": (lambda x, v: {"a": {"x": x, "v": v}}, lambda x, v: {"a": OrderedDict(v=v, x=x)}),
    "named tuple": (Pair, lambda x, v: (x, v)),
}


@pytest.mark.parametrize("name", NESTS)
def test_leaves_are_matched_by_key(name):
    """A slope's entries belong to the state's of the same name, in whatever order they come."""
    make, other = NESTS[name]
    leaves = lambda state: torch.utils._pytree.tree_leaves(state)  # noqa: E731
    x, v = torch.zeros(2, dtype=D), torch.ones(2, dtype=D)
    func = lambda t, y: other(leaves(y)[1], -leaves(y)[0])  # noqa: E731
    found = leaves(solve(func, make(x, v), T, rtol=1e-9, atol=1e-9).ys)
    torch.testing.assert_close(found, [torch.sin(T)[:, None].expand(3, 2), torch.cos(T)[:, None].expand(3, 2)], **CLOSE)


@pytest.mark.parametrize("slopes", [lambda y: Other(*y), lambda y: {"x": y[0], "v": y[1]}, lambda y: [y[0]], lambda y: (y,)])
def test_other_structures(slopes):
    """Entries that have other names, or none, are not guessed."""
    with pytest.raises((TypeError, ValueError), match=r"func must return (the structure of y0|tensors)"):
        solve(lambda t, y: slopes(y), Pair(torch.ones(2), torch.ones(2)), T)


@pytest.mark.parametrize(("t0", "t1"), [(0.1, 0.7), (0.3, 1.1), (-0.7, -0.1), (1.1, 0.3)])
def test_ends_of_an_interpolant(t0, t1):
    """The ends come as float32 or float64 writes them, whichever the solve had; beyond them nothing is known."""
    for ends in ((t0, t1), (torch.tensor(t0), torch.tensor(t1)), (np.float32(t0), np.float32(t1))):
        interpolant = odeint_dense(lambda t, y: -y, torch.ones(2, dtype=D), *ends)
        for t in (t0, t1, torch.tensor([t0, t1]), np.float32(t1), torch.linspace(t0, t1, 7), torch.tensor(t1, dtype=D)):
            expected = torch.exp(float(ends[0]) - torch.as_tensor(t, dtype=D))
            torch.testing.assert_close(interpolant(t)[..., 0], expected, rtol=1e-6, atol=0)
        for t in (t0 - (t1 - t0) * 1e-6, t1 + (t1 - t0) * 1e-6, float("nan")):
            with pytest.raises(ValueError, match="t must lie in"):
                interpolant(t)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_batched_gradients(gradient, compiled):
    """jacobian(vectorize=True), is_grads_batched and vmap over a backward pass give the rows one by one."""
    weight = torch.linspace(-1, 1, 9, dtype=D).view(3, 3).requires_grad_()
    func = lambda t, y: torch.tanh(y @ weight)  # noqa: E731
    field = odenet_cuda.compile(func) if compiled else func
    y0, rows = torch.tensor([[0.3, -1.0, 2.0]], dtype=D, requires_grad=True), torch.eye(3, dtype=D)

    def end(y):
        return solve(field, y, T, gradient=gradient).ys[-1, 0]

    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(jacobian(end, y0, vectorize=True), jacobian(end, y0))
    out = end(y0)
    expected = [torch.autograd.grad(out, (y0, weight), row, retain_graph=True) for row in rows]
    expected = tuple(torch.stack(parts) for parts in zip(*expected, strict=True))
    batched = torch.autograd.grad(out, (y0, weight), rows, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(batched, expected)
    mapped = torch.vmap(lambda row: torch.autograd.grad(out, (y0, weight), row, retain_graph=True))(rows)
    torch.testing.assert_close(mapped, expected)


STATES = {
    "sparse": (lambda: torch.eye(2).to_sparse(), "y0 must be a dense tensor, got torch.sparse_coo"),
    "csr": (lambda: torch.eye(2).to_sparse_csr(), "y0 must be a dense tensor, got torch.sparse_csr"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "y0 must be a dense tensor, got a nested"),
    "masked": (lambda: torch.masked.masked_tensor(torch.ones(2), torch.tensor([True, False])), "y0 must be a plain tensor"),
    "meta": (lambda: torch.ones(2, device="meta"), "y0 must be on the CPU or a CUDA device, got meta"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", STATES)
def test_states_that_are_refused(name):
    """What is no array of numbers is named."""
    make, words = STATES[name]
    with pytest.raises((TypeError, NotImplementedError), match=words):
        solve(lambda t, y: -y, make(), [0.0, 1.0])


def test_sparse_slopes():
    """A sparse slope is what it is made dense."""
    found = solve(lambda t, y: (-y).to_sparse(), torch.eye(3), [0.0, 1.0]).ys
    assert torch.equal(found, solve(lambda t, y: -y, torch.eye(3), [0.0, 1.0]).ys)


@pytest.mark.parametrize("atol", [0.0, torch.zeros(2)])
@pytest.mark.parametrize("control", ["joint", "per_sample"])
def test_no_tolerance(atol, control):
    """atol of 0 is refused where y0 is 0, and serves where it is not."""
    with pytest.raises(ValueError, match="atol must be above 0 where y0 is 0"):
        solve(lambda t, y: -y, torch.tensor([[1.0, 0.0]]), [0.0, 1.0], atol=atol, step_control=control)
    found = solve(lambda t, y: -y, torch.tensor([[1.0, 2.0]]), [0.0, 1.0], atol=atol, step_control=control).ys[-1]
    torch.testing.assert_close(found, torch.tensor([[1.0, 2.0]]) * torch.exp(torch.tensor(-1.0)), rtol=1e-5, atol=0)


def test_times_one_by_one():
    """A list of tensors keeps their gradients: d/dt1 of exp(t0 - t1)."""
    times = [torch.tensor(0.0, dtype=D, requires_grad=True), torch.tensor(1.0, dtype=D, requires_grad=True)]
    grads = torch.autograd.grad(solve(lambda t, y: -y, torch.ones(1, dtype=D), times).ys[-1].sum(), times)
    expected = torch.exp(torch.tensor(-1.0, dtype=D))
    torch.testing.assert_close(grads, (expected, -expected), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="t must hold numbers, got a tensor on the meta device"):
        solve(lambda t, y: -y, torch.ones(1), torch.ones(2, device="meta"))


KINDS = {
    "dopri5": {},
    "rk4": {"method": "rk4", "step_size": 0.1},
    "per sample": {"step_control": "per_sample"},
    "jumps": {"method": "dopri8", "jump_t": [0.3]},
    "norm": {"norm": lambda y: y.abs().amax()},
}


class Tanh(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 9).view(3, 3))

    def forward(self, t, y):
        return torch.tanh(y @ self.weight) * torch.cos(t)


def everything(kind: str, gradient: str) -> list:
    """The numbers of a solve and of its gradients."""
    y0 = torch.linspace(-1, 2, 12, device="cpu", dtype=torch.float32).view(4, 3).requires_grad_()
    solution = solve(FIELD, y0, [0.0, 0.4, 1.0], gradient=gradient, **KINDS[kind])
    grads = torch.autograd.grad(solution.ys.square().sum(), [y0, *FIELD.parameters()])
    return [solution.ys.detach(), solution.t, solution.y_last, *grads]


FIELD = Tanh()


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_default_device_and_type(kind, gradient):
    """They are the user's, for the user's tensors: a solve is the same under each of them."""
    expected = everything(kind, gradient)
    with torch.device("meta"):
        on_meta = everything(kind, gradient)
    before = torch.get_default_dtype()
    try:
        torch.set_default_device("meta")
        by_default = everything(kind, gradient)
        torch.set_default_device(None)
        torch.set_default_dtype(D)
        wide = everything(kind, gradient)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)
    for found in (on_meta, by_default, wide):
        assert all(
            x.device == y.device and x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(found, expected, strict=True)
        )


def test_no_tensor_is_left_to_the_default_device():
    """Every tensor that the package makes says where."""
    makers = {
        "empty",
        "zeros",
        "ones",
        "full",
        "tensor",
        "arange",
        "as_tensor",
        "linspace",
        "eye",
        "rand",
        "randn",
        "empty_strided",
    }
    forgotten = []
    for path in Path(odenet_cuda.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in makers:
                of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
                if of_torch and not any(keyword.arg == "device" for keyword in node.keywords):
                    forgotten.append(f"{path.name}:{node.lineno}")
    assert not forgotten


def recording(seen: list):
    def grid(func, y0, t):
        seen.append((y0.clone(), t.tolist()))
        return torch.linspace(float(t[0]), float(t[-1]), 6, dtype=D)

    return grid


@pytest.mark.parametrize("how", ["adjoint", "quadrature", "compiled"])
def test_grid_constructor_on_the_way_back(how):
    """It is given func, the state and the two times of each interval."""
    y0, seen = torch.rand(2, 3, requires_grad=True), []
    field = odenet_cuda.compile(FIELD) if how == "compiled" else FIELD
    gradient = "adjoint" if how == "compiled" else how
    ys = solve(field, y0, T, method="rk4", grid_constructor=recording(seen), gradient=gradient).ys
    ys[-1].sum().backward()
    assert [times for _, times in seen] == [T.tolist(), [1.0, 0.4], [0.4, 0.0]]
    torch.testing.assert_close([y for y, _ in seen], [y0.detach(), ys[2].detach(), ys[1].detach()])


def test_norm_put_into_the_result():
    """backward() takes the norm that stands in the result's adjoint_options then."""
    y0, calls = torch.rand(2, 3, requires_grad=True), []
    ys = odeint_adjoint(FIELD, y0, T)
    norm = ys.grad_fn.adjoint_options["norm"]
    ys.grad_fn.adjoint_options["norm"] = lambda parts: calls.append([part.shape for part in parts]) or norm(parts)
    ys[-1].sum().backward()
    assert calls and all(shapes == [(), (2, 3), (2, 3), (3, 3)] for shapes in calls)


ALIASED = """
import sys, odenet_cuda
sys.modules["torchdiffeq"] = odenet_cuda
import torch, torchdiffeq
block = torch.nn.Linear(2, 2)
found = torchdiffeq._impl.adjoint.find_parameters(block)
assert [p is q for p, q in zip(found, block.parameters(), strict=True)] == [True, True]
assert not hasattr(torchdiffeq, "no_such_name")
from torchdiffeq import odeint
from torchdiffeq._impl import odeint_adjoint
from torchdiffeq._impl.odeint import SOLVERS, odeint as inner
from torchdiffeq._impl.misc import _flat_to_shape, _mixed_norm, _rms_norm
assert inner is odeint is odenet_cuda.odeint and odeint_adjoint is odenet_cuda.odeint_adjoint
assert {"dopri5", "rk4", "euler"} <= set(SOLVERS)
for line in (
    "from torchdiffeq._impl.solvers import FixedGridODESolver",
    "from torchdiffeq._impl.dopri5 import _DORMAND_PRINCE_SHAMPINE_TABLEAU",
    "from torchdiffeq._impl.misc import _check_inputs",
):
    try:
        exec(line)
    except ImportError as error:
        assert "keep torchdiffeq itself" in str(error), error
    else:
        raise AssertionError(line)
try:
    torchdiffeq._impl.adjoint.find_parameters(torch.sin)
except TypeError as error:
    assert "torch.nn.Module" in str(error)
try:
    SOLVERS["rk4"](func=None, y0=None)
except NotImplementedError as error:
    assert "odenet_cuda.odeint" in str(error)
"""

LATE = """
import sys, torch
before = set(sys.modules)
import odenet_cuda
odenet_cuda.solve(lambda t, y: -y, torch.ones(2), [0.0, 1.0])
weight = torch.ones(2, requires_grad=True)
odenet_cuda.solve(lambda t, y: -y * weight, torch.ones(2), [0.0, 1.0], gradient="adjoint").ys.sum().backward()
late = "torch._dynamo", "torch._inductor", "torch.fx.experimental.proxy_tensor", "torch._decomp", "sympy"
loaded = [name for name in late if name in sys.modules and name not in before]
assert not loaded, loaded
"""


@pytest.mark.parametrize("program", [ALIASED, LATE], ids=["torchdiffeq's inner parts", "what an import loads"])
def test_programs(program):
    """In a process of their own: aliased imports; and torch's compiler stays unloaded until something needs it."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
