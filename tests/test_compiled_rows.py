"""Tensors of func with one row a sample: noise, coefficients of paths, what was made of other inputs of the samples."""

import pytest
import torch
from compile_native import require_compiler
from compiled_fields import rows
from torch import nn

import odenet_cuda
from odenet_cuda import solve
from odenet_cuda.compiled.plans import Plans

D = torch.float64
T = torch.tensor([0.0, 0.3, 1.0], dtype=D)
SOLVED = {"rtol": 1e-8, "atol": 1e-8}
AGREE = {"rtol": 1e-6, "atol": 1e-6}
GRADIENTS = ("direct", "adjoint")
BATCH = 70  # more numbers than a state has that may be read as one sample


@pytest.fixture(autouse=True)
def quickly_compiled(monkeypatch):
    require_compiler()
    monkeypatch.setenv("ODENET_CXXFLAGS", "-O0")


@pytest.fixture
def readings(monkeypatch):
    """How often a func has been read."""
    found, read = [], Plans._read
    monkeypatch.setattr(Plans, "_read", lambda *args: found.append(1) or read(*args))
    return found


class Field(nn.Module):
    """A net of the state and of `z`, which has one row a sample."""

    def __init__(self, z=None) -> None:
        super().__init__()
        self.first, self.second, self.z = nn.Linear(4, 5, dtype=D), nn.Linear(5, 2, dtype=D), z
        for i, p in enumerate([*self.first.parameters(), *self.second.parameters()]):
            p.data = rows(*p.shape, seed=i)

    def forward(self, t, y):
        return self.second(torch.tanh(self.first(torch.cat([y, self.z], 1)))) * torch.cos(t)


def gradients(func, y0, sources, **options):
    y0 = y0.clone().requires_grad_()
    ys = solve(func, y0, T, **{**SOLVED, **options}).ys
    return [ys.detach(), *torch.autograd.grad(ys.square().sum(), [y0, *sources])]


def compare(field, func, y0, sources, **options):
    found, expected = (gradients(f, y0, sources, **options) for f in (field, func))
    assert field.explain() == "compiled", field.explain()
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, **AGREE)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_constant_of_the_samples(gradient, readings):
    """Others take its place, for as many samples as there are, and nothing is read anew for that."""
    func = Field()
    field = odenet_cuda.compile(func)
    for seed, batch in enumerate((BATCH, BATCH, 9, BATCH)):
        func.z = rows(batch, 2, seed=seed)
        compare(field, func, rows(batch, 2), list(func.parameters()), gradient=gradient)
    assert len(readings) == 1


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_one_that_was_computed(gradient):
    """Gradients go on to what it was made of, as an encoder."""
    func, encoder = Field(), nn.Linear(3, 2, dtype=D)
    field = odenet_cuda.compile(func)
    for seed in range(2):
        func.z = encoder(rows(BATCH, 3, seed=seed))
        chosen = {} if gradient == "direct" else {"adjoint_params": [*func.parameters(), func.z]}
        found = []
        for f in (field, func):
            y0 = rows(BATCH, 2).requires_grad_()
            ys = solve(f, y0, T, gradient=gradient, **chosen, **SOLVED).ys
            found.append(torch.autograd.grad(ys.square().sum(), [y0, *func.parameters(), encoder.weight], retain_graph=True))
        assert field.explain() == "compiled"
        torch.testing.assert_close(*found, **AGREE)


def test_parameters_of_the_samples():
    """Beside a weight whose first axis happens to be as long."""
    func = Field(nn.Parameter(rows(5, 2, seed=3)))
    field = odenet_cuda.compile(func)
    compare(field, func, rows(5, 2), list(func.parameters()))


def test_as_many_samples_as_features():
    """A weight is one still."""
    net = nn.Sequential(nn.Linear(2, BATCH), nn.Tanh(), nn.Linear(BATCH, 2)).to(D)
    field = odenet_cuda.compile(lambda t, y: net(y))
    for batch in (BATCH, 9):
        compare(field, field.func, rows(batch, 2), list(net.parameters()))


def test_rows_for_another_number_of_samples():
    """func raises as it does by itself."""
    func = Field(rows(BATCH, 2))
    field = odenet_cuda.compile(func)
    solve(field, rows(BATCH, 2), T)
    with pytest.raises(RuntimeError, match="must match"):
        solve(field, rows(9, 2), T)
    solve(field, rows(BATCH, 2), T)
    assert field.explain() == "compiled"


def test_rows_that_func_writes():
    """It is not read."""

    class Writes(Field):
        def forward(self, t, y):
            self.z.mul_(0.5)
            return super().forward(t, y)

    func = Writes(rows(BATCH, 2))
    field = odenet_cuda.compile(func)
    solve(field, rows(BATCH, 2), T)
    assert field.explain().startswith("served by ")


def test_other_rows_before_the_way_back():
    """The gradient is that of the solve; a second derivative, which needs func, is refused."""
    func = Field(rows(BATCH, 2))
    field = odenet_cuda.compile(func)
    _, *expected = gradients(func, rows(BATCH, 2), list(func.parameters()))
    y0 = rows(BATCH, 2).requires_grad_()
    loss = solve(field, y0, T, **SOLVED).ys.square().sum()
    func.z = rows(BATCH, 2, seed=5)
    found = torch.autograd.grad(loss, [y0, *func.parameters()], retain_graph=True)
    torch.testing.assert_close(list(found), expected, **AGREE)
    with pytest.raises(RuntimeError, match="other"):
        torch.autograd.grad(loss, y0, create_graph=True)


def test_rows_changed_in_place_before_the_way_back():
    func = Field(rows(BATCH, 2))
    field = odenet_cuda.compile(func)
    ys = solve(field, rows(BATCH, 2).requires_grad_(), T).ys
    func.z.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ys.sum().backward()


class Hutchinson(nn.Module):
    """(z, log p) with noise that is made at the first call, calls counted in a buffer, as FFJORD does."""

    def __init__(self, rebinds: bool) -> None:
        super().__init__()
        self.net, self.rebinds, self.e = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 2)).to(D), rebinds, None
        for i, p in enumerate(self.net.parameters()):
            p.data = rows(*p.shape, seed=i)
        self.register_buffer("calls", torch.tensor(0.0))

    def forward(self, t, state):
        z = state[0]
        if self.rebinds:
            self.calls = self.calls + 1
        else:
            self.calls += 1
        if self.e is None:
            self.e = torch.randn_like(z)
        with torch.set_grad_enabled(True):
            z.requires_grad_(True)
            t.requires_grad_(True)
            dz = self.net(z) * torch.cos(t)
            product = torch.autograd.grad(dz, z, self.e, create_graph=True)[0]
        return dz, -(product * self.e).sum(1, keepdim=True)


@pytest.mark.parametrize(("rebinds", "gradient"), [(True, "direct"), (False, "adjoint")])
def test_noise_made_at_the_first_call(rebinds, gradient, readings):
    """The same noise as by the stepper, the same state of the generator afterwards, and the same count of calls."""
    func = Hutchinson(rebinds)
    field = odenet_cuda.compile(func)
    for seed in range(3):
        found = []
        for f in (field, func):
            torch.manual_seed(seed)
            func.e = None
            func.calls.fill_(0)
            z = rows(BATCH, 2).requires_grad_()
            ys = solve(f, (z, torch.zeros(BATCH, 1, dtype=D)), T, gradient=gradient, **SOLVED).ys
            calls = func.calls.clone()
            loss = ys[0][-1].square().sum() + ys[1][-1].sum()
            grads = torch.autograd.grad(loss, [z, *func.parameters()])
            found.append([*(y.detach() for y in ys), *grads, calls, torch.rand(()), func.e])
        assert field.explain() == "compiled", field.explain()
        torch.testing.assert_close(*found, **AGREE)
    assert len(readings) == 2  # before the first call, and after it


def test_what_is_made_at_the_first_call_with_a_gradient():
    """Belongs to that call: the stepper makes it, in the solve."""

    class Lazy(Field):
        def forward(self, t, y):
            if self.z is None:
                self.z = torch.tanh(self.second(torch.tanh(self.first(torch.cat([y, y], 1)))))
            return super().forward(t, y)

    func = Lazy()
    field = odenet_cuda.compile(func)
    found = []
    for f in (field, func):
        func.z = None
        found.append(gradients(f, rows(BATCH, 2), list(func.parameters())))
    assert field.explain().startswith("served by ")
    torch.testing.assert_close(*found, **AGREE)


class Path(nn.Module):
    """A controlled equation: y' = net(y) dX/dt along cubic pieces, [batch, pieces, channels] each, found by the time."""

    def __init__(self, coefficients) -> None:
        super().__init__()
        self.net = nn.Linear(2, 4, dtype=D)
        for i, p in enumerate(self.net.parameters()):
            p.data = rows(*p.shape, seed=i)
        self.register_buffer("knots", torch.linspace(0, 1, 5, dtype=D))
        self.b, self.two_c, self.three_d = coefficients

    def forward(self, t, y):
        index = torch.bucketize(t.detach(), self.knots).sub(1).clamp(0, 3)
        part = t - self.knots[index]
        slope = self.b[..., index, :] + (self.two_c[..., index, :] + self.three_d[..., index, :] * part) * part
        return (torch.tanh(self.net(y)).view(len(y), 2, 2) @ slope[:, :, None])[:, :, 0]


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_paths(method):
    coefficients = [rows(BATCH, 4, 2, seed=i) for i in range(3)]
    func = Path([x.requires_grad_(i == 1) for i, x in enumerate(coefficients)])
    field = odenet_cuda.compile(func)
    options = {"step_size": 0.05} if method == "rk4" else {"jump_t": [0.25, 0.5, 0.75]}
    sources = [*func.parameters(), func.two_c]
    compare(field, func, rows(BATCH, 2), sources, method=method, **options)


@pytest.mark.parametrize("kept", [False, True], ids=["argument", "attribute"])
@pytest.mark.parametrize("name", ["gathered", "taken"])
def test_what_can_be_read_as_a_table_of_all_samples(name, kept):
    """For as many samples as the recordings have, and more, a gather along rows is one from the first rows of a table too."""
    take = {
        "gathered": lambda z, place: z.gather(1, place),
        "taken": lambda z, place: torch.take_along_dim(z, place, 1),
    }[name]
    knots = torch.linspace(0, 1, 7, dtype=D)

    class Table(nn.Module):
        def forward(self, t, y, *args):
            place = (torch.searchsorted(knots, torch.ones_like(y[:, :1]) * t, right=True) - 1).clamp(0, 5)
            return take(args[0] if args else self.z, place) - y

    func = Table()
    field = odenet_cuda.compile(func)
    for batch in (9, 12, 40):
        func.z, z = rows(batch, 6, seed=batch), rows(batch, 6, seed=batch).requires_grad_()
        options = {"step_control": "per_sample", "jump_t": knots[1:-1], "args": () if kept else (z,)}
        compare(field, func, rows(batch, 1), [] if kept else [z], **options)
