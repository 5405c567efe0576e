"""torch.compile and torch.export of models with solves in them, against the same models without."""

import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.backends.registry import lookup_backend

from odenet_cuda import ODEBlock, SolverError, odeint, solve

ROUNDING = 1e-5  # of float32, over a few steps
X = torch.cos(torch.arange(15.0)).reshape(5, 3)
Y0 = torch.sin(torch.arange(12.0)).reshape(3, 4)
WEIGHT = torch.cos(torch.arange(16.0)).reshape(4, 4) / 2
TIMES = [0.0, 0.3, 1.0]

FIXED = {
    "euler": {"method": "euler", "t": TIMES},
    "midpoint, perturb": {"method": "midpoint", "t": TIMES, "perturb": True},
    "heun2, linear": {"method": "heun2", "t": TIMES, "step_size": 0.4, "interp": "linear", "return_all": True},
    "heun3, cubic": {"method": "heun3", "t": TIMES, "step_size": 0.4, "interp": "cubic", "return_all": True},
    "rk4, step_size": {"method": "rk4", "step_size": 0.5},
    "rk4, backwards": {"method": "rk4", "t": [1.0, 0.0]},
}


class Counting:
    """The backend aot_eager, with the graphs it was given."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Nothing compiled before is used again."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def backend():
    return Counting()


class Network(nn.Module):
    """A small network, driven by the time; of a pair it drives each by the other."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, t, y):
        if isinstance(y, tuple):
            return self.layers(y[1]) * torch.cos(t), -y[0]
        return self.layers(y) * torch.cos(t)


class Pair(nn.Module):
    """An ODEBlock with a tuple as its state."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return torch.cat(self.block((x, 2 * x)), dim=-1).unflatten(-1, (2, 4)).sum(-2)


class Model(nn.Module):
    """Linear, ODEBlock, Linear."""

    def __init__(self, block):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.block, self.last = nn.Linear(3, 4), block, nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.block(self.first(x)))


def model_of(tuples=False, **options):
    torch.manual_seed(0)
    block = ODEBlock(Network(), **options)
    return Model(Pair(block) if tuples else block)


def assert_close(found, expected, tolerance=ROUNDING):
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def assert_same(model, compiled, reference=None):
    """Outputs, gradients by the input and by the parameters."""
    results = []
    for function in (compiled, reference or model):
        x = X.clone().requires_grad_()
        out = function(x)
        parameters = list((reference if reference is not None and function is reference else model).parameters())
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *parameters])])
    assert_close(*results)


def field(weight):
    return lambda t, y: torch.tanh(y @ weight) * torch.cos(t)


def assert_same_function(function, compiled, *inputs):
    """Outputs and gradients by all inputs of a function of tensors."""
    results = []
    for each in (compiled, function):
        values = [x.clone().requires_grad_() for x in inputs]
        out = each(*values)
        results.append([out, *torch.autograd.grad(out.abs().square().sum(), values)])
    assert_close(*results)


# ---- methods on a grid: one graph ----


@pytest.mark.parametrize("name", FIXED)
def test_fixed_methods(backend, name):
    """A model with a block on a grid is one graph."""
    model = model_of(gradient="direct", **FIXED[name])
    assert_same(model, torch.compile(model, backend=backend, fullgraph=True))
    assert len(backend.graphs) == 1


def test_fixed_method_with_checkpoints(backend):
    """The checkpoint gradient of eager mode has the same numbers."""
    model = model_of(gradient="checkpoint", max_checkpoints=1, method="rk4", step_size=0.5)
    assert_same(model, torch.compile(model, backend=backend, fullgraph=True))
    assert len(backend.graphs) == 1


def test_fixed_method_with_the_adjoint(backend):
    """On a grid the gradient of a compiled block is that of the discrete solve, whatever `gradient` says."""
    options = {"method": "euler", "t": TIMES}
    model, direct = model_of(gradient="adjoint", **options), model_of(gradient="direct", **options)
    assert_same(model, torch.compile(model, backend=backend, fullgraph=True), direct)


def test_tuple_state(backend):
    """A tuple goes into the block and comes out of it."""
    model = model_of(tuples=True, gradient="direct", method="rk4")
    assert_same(model, torch.compile(model, backend=backend, fullgraph=True))
    assert len(backend.graphs) == 1


def test_without_gradients(backend):
    """Under no_grad, with the counts of the block."""
    model = model_of(method="rk4", step_size=0.5)
    with torch.no_grad():
        assert_close([torch.compile(model, backend=backend, fullgraph=True)(X)], [model(X)])
    calls = model.block.nfe_forward
    model(X)
    assert calls == model.block.nfe_forward == 8


def test_learned_times(backend):
    """Times that are an nn.Parameter are read between graphs; they have their gradient."""
    model = model_of(gradient="direct", method="rk4", t=nn.Parameter(torch.tensor(TIMES)))
    assert_same(model, torch.compile(model, backend=backend))


def test_whole_block_of_a_function(backend):
    """Solves in a loop of the user's own, state in complex numbers and args."""

    def function(y, weight):
        z = torch.complex(y, -y)
        for _ in range(2):
            z = solve(lambda t, z, weight: 1j * torch.tanh(z @ weight), z, [0.0, 1.0], args=(weight + 0j,), method="heun3").ys[
                -1
            ]
        return z.real * z.imag

    assert_same_function(function, torch.compile(function, backend=backend, fullgraph=True), Y0, WEIGHT)
    assert len(backend.graphs) == 1


@pytest.mark.parametrize("function_name", ["solve", "odeint"])
def test_functions_with_times_as_numbers(backend, function_name):
    """solve() and odeint() inside of a compiled function."""

    def function(y, weight):
        if function_name == "solve":
            return solve(field(weight), 2 * y, TIMES, method="midpoint", step_size=0.4).ys * 2
        return odeint(field(weight), 2 * y, TIMES, method="midpoint", options={"step_size": 0.4}) * 2

    assert_same_function(function, torch.compile(function, backend=backend, fullgraph=True), Y0, WEIGHT)
    assert len(backend.graphs) == 1


def test_times_as_a_tensor(backend):
    """Numbers are read from a tensor between two graphs."""
    times = torch.tensor(TIMES)
    function = lambda y, weight: odeint(field(weight), 2 * y, times, method="midpoint") * 2  # noqa: E731
    assert_same_function(function, torch.compile(function, backend=backend), Y0, WEIGHT)


def test_grid_constructor(backend):
    """The nodes of the user's own grid are read between graphs."""
    grid = lambda f, y0, t: torch.linspace(0, 1, 3, dtype=t.dtype)  # noqa: E731
    model = model_of(gradient="direct", method="midpoint", grid_constructor=grid)
    assert_same(model, torch.compile(model, backend=backend))


def test_second_call_compiles_nothing(backend):
    """The same shapes use the same graph; another batch size makes one more, for every size."""
    model = model_of(method="rk4")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    counts = []
    for rows in (5, 5, 4, 3, 5):
        compiled(X[:rows])
        counts.append(len(backend.graphs))
    assert counts == [1, 1, 2, 2, 2]


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler")
def test_inductor():
    """Compiled to machine code."""
    model = model_of(gradient="direct", method="heun2")
    assert_same(model, torch.compile(model, fullgraph=True))


# ---- adaptive methods: between two graphs ----

ADAPTIVE = {
    "direct": {"gradient": "direct"},
    "adjoint": {"gradient": "adjoint"},
    "checkpoint": {"gradient": "checkpoint"},
    "per sample": {"gradient": "direct", "step_control": "per_sample"},
    "adjoint per sample": {"gradient": "adjoint", "step_control": "per_sample", "method": "bosh3", "return_all": True},
}


@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_methods(backend, name):
    """The layers before and after the block are a graph each; a second call compiles nothing."""
    model = model_of(**ADAPTIVE[name])
    compiled = torch.compile(model, backend=backend)
    assert_same(model, compiled)
    assert len(backend.graphs) == 2
    assert_same(model, compiled)
    assert len(backend.graphs) == 2


def test_adaptive_method_in_nn_sequential(backend):
    """torch.compile cannot leave a graph inside of the loop of nn.Sequential; the model runs as it is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), ODEBlock(Network()), nn.Linear(4, 2))
    assert_same(model, torch.compile(model, backend=backend))


def test_adaptive_method_in_a_full_graph(backend):
    """fullgraph=True is refused with the reason."""
    with pytest.raises(torch._dynamo.exc.Unsupported, match="an adaptive solve chooses its steps by their values"):
        torch.compile(model_of(), backend=backend, fullgraph=True)(X)


@pytest.mark.parametrize("function_name", ["solve", "odeint"])
def test_functions_with_adaptive_methods(backend, function_name):
    """solve() and odeint() with the default method, times as a tensor."""

    def function(y, weight):
        if function_name == "solve":
            return solve(field(weight), 2 * y, torch.tensor(TIMES), rtol=1e-3, atol=1e-3).ys * 2
        return odeint(field(weight), 2 * y, torch.tensor(TIMES), rtol=1e-3, atol=1e-3) * 2

    assert_same_function(function, torch.compile(function, backend=backend), Y0, WEIGHT)
    assert len(backend.graphs) <= 2


def test_failures_come_through(backend):
    """A SolverError of a compiled model, and a good call after it."""
    model = model_of(max_num_steps=1, rtol=1e-6, atol=1e-6)
    compiled = torch.compile(model, backend=backend)
    with pytest.raises(SolverError, match="max_num_steps"):
        compiled(X)
    model.block.options["max_num_steps"] = 1000
    assert_same(model, compiled)


# ---- with other transforms ----


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_transforms_of_fixed_methods(backend, transform):
    """torch.func inside of a compiled function."""

    def function(y, weight):
        mapped = lambda y: solve(field(weight), y, [0.0, 1.0], method="midpoint").ys[-1]  # noqa: E731
        if transform == "vmap":
            return torch.func.vmap(mapped)(y)
        if transform == "jvp":
            return torch.func.jvp(mapped, (y,), (weight[:3],))[1]
        return torch.func.grad(lambda y: mapped(y).square().sum())(y)

    assert_same_function(function, torch.compile(function, backend=backend, fullgraph=True), Y0, WEIGHT)
    assert len(backend.graphs) == 1


@pytest.mark.parametrize(
    "transform",
    [
        "vmap",
        "grad",
    ],
)
def test_transforms_of_adaptive_methods(backend, transform):
    """torch.func over an adaptive solve in a compiled function runs as it does without; nothing of the solver is compiled."""

    def function(y, weight):
        mapped = lambda y: solve(field(weight), y, [0.0, 1.0], rtol=1e-2, atol=1e-2).ys[-1]  # noqa: E731
        if transform == "vmap":
            return torch.func.vmap(mapped)(y)
        return torch.func.grad(lambda y: mapped(y).square().sum())(y)

    assert_close([torch.compile(function, backend=backend)(Y0, WEIGHT)], [function(Y0, WEIGHT)])
    assert len(backend.graphs) == 0


# ---- fields that differentiate ----


def test_field_with_a_functional_gradient(backend):
    """A gradient flow by torch.func.grad is one graph, with the gradients it has without."""

    def function(y, weight):
        energy = lambda y: torch.tanh(y @ weight).square().sum()  # noqa: E731
        return solve(lambda t, y: -torch.func.grad(energy)(y), y, [0.0, 1.0], method="midpoint").ys

    assert_same_function(function, torch.compile(function, backend=backend, fullgraph=True), Y0, WEIGHT)
    assert len(backend.graphs) == 1


def gradient_flow(y, weight):
    """The same by torch.autograd.grad."""

    def func(t, y):
        with torch.enable_grad():
            y = y if y.requires_grad else y.requires_grad_()
            return -torch.autograd.grad(torch.tanh(y @ weight).square().sum(), y, create_graph=True)[0]

    return solve(func, y, [0.0, 1.0], method="midpoint").ys


def test_field_with_a_traced_gradient(backend):
    """torch.autograd.grad inside of func, where torch.compile is told to trace it."""
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(gradient_flow, backend=backend, fullgraph=True)
        assert_same_function(gradient_flow, compiled, Y0, WEIGHT)
    assert len(backend.graphs) == 1


def test_field_with_a_gradient_that_is_not_traced(backend):
    """Without, fullgraph=True refuses it in torch's words, and no wrong gradient comes out."""
    with pytest.raises(torch._dynamo.exc.Unsupported, match="trace_autograd_ops"):
        torch.compile(gradient_flow, backend=backend, fullgraph=True)(Y0.clone().requires_grad_(), WEIGHT)


# ---- what is refused ----


def test_dense_is_refused_in_words(backend):
    """No interpolant in a compiled function of a method on a grid."""
    function = lambda y: solve(field(WEIGHT), y, [0.0, 1.0], method="rk4", dense=True).ys  # noqa: E731
    with pytest.raises(NotImplementedError, match="dense=True is not served"):
        torch.compile(function, backend=backend)(Y0)


class Watched(Network):
    """A field with a callback."""

    def callback_step(self, t, y, dt):
        self.seen = float(t)


def test_callbacks_are_refused_in_words(backend):
    """No callbacks in a compiled block on a grid."""
    with pytest.raises(NotImplementedError, match="callbacks of func are not served"):
        torch.compile(ODEBlock(Watched(), method="rk4"), backend=backend)(Y0)


def test_callbacks_of_adaptive_methods(backend):
    """An adaptive block runs as it is and calls them."""
    block = ODEBlock(Watched())
    torch.compile(block, backend=backend)(Y0)
    assert block.func.seen >= 0


def test_adaptive_method_after_a_refusal(backend):
    """That a block on a grid could not be compiled makes no difference to another, adaptive block."""
    with pytest.raises(NotImplementedError, match="callbacks of func are not served"):
        torch.compile(ODEBlock(Watched(), method="rk4"), backend=backend)(Y0)
    backend.graphs.clear()
    torch.compile(ODEBlock(Network()), backend=backend)(Y0)
    assert len(backend.graphs) == 0


# ---- torch.export ----


@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
@pytest.mark.parametrize("name", ["heun3, cubic"])
def test_export(name, strict):
    """An exported block has the outputs of the block, on other values too."""
    model = model_of(**FIXED[name])
    exported = torch.export.export(model, (X,), strict=strict).module()
    assert_close([exported(X), exported(2 * X)], [model(X), model(2 * X)])


def test_export_of_any_batch():
    """With a batch size that is not fixed."""
    model = model_of(method="rk4")
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    exported = torch.export.export(model, (X,), dynamic_shapes=shapes).module()
    assert_close([exported(X[:2])], [model(X[:2])])


def test_export_of_a_tuple_state():
    """A tuple goes into the block and comes out of it."""
    model = model_of(tuples=True, method="midpoint")
    assert_close([torch.export.export(model, (X,)).module()(2 * X)], [model(2 * X)])
