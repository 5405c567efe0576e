"""What is written into between a solve and its backward pass: the gradient is as without, or torch says that it was."""

import pytest
import torch
from torch import Tensor, nn

import odenet_cuda
from odenet_cuda import solve

pytestmark = pytest.mark.usefixtures("compiled_quickly")  # it is not the machine code that is tried here

D = torch.float64
TIMES = [0.0, 0.4, 1.0]
CONTROLS = {"joint": {}, "per_sample": {"step_control": "per_sample"}, "grid": {"method": "rk4"}}
WRITTEN = ("ys", "ys[-1]", "y_last", "y0", "argument", "parameter", "frozen", "buffer", "t", "solution.t")


class Decay(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor([0.5, 0.7], dtype=D))
        self.frozen = nn.Parameter(torch.tensor([0.3, 0.2], dtype=D), requires_grad=False)
        self.register_buffer("buffer", torch.tensor([1.3, 0.4], dtype=D))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, t: Tensor, y: Tensor, a: Tensor) -> Tensor:
        return -self.rate * y * y * a * self.buffer + torch.sin(t) * self.frozen * y


class Counting(Decay):
    """It counts its calls in a buffer, as a batch norm does."""

    def forward(self, t: Tensor, y: Tensor, a: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(t, y, a)


@pytest.fixture(scope="module")
def fields() -> dict[str, nn.Module]:
    func = Decay()
    return {"stepper": func, "compiled": odenet_cuda.compile(func)}


def gradient_of(func: nn.Module, gradient: str, control: str, written: str, y0_grad: bool) -> list[Tensor]:
    module = func.func if isinstance(func, odenet_cuda.CompiledField) else func
    y0 = torch.full((4, 2), 0.9, dtype=D, requires_grad=y0_grad)
    argument, t = torch.full((4, 2), 1.1, dtype=D, requires_grad=True), torch.tensor(TIMES, dtype=D)
    solution = solve(func, y0, t, args=(argument,), gradient=gradient, rtol=1e-5, atol=1e-5, **CONTROLS[control])
    ys, weights = solution.ys, torch.tensor([1.0, 2.0, 3.0], dtype=D)[:, None, None].repeat(1, 4, 2)
    others = {"y_last": solution.y_last, "y0": y0, "argument": argument, "t": t, "solution.t": solution.t}
    others |= {"parameter": module.rate, "frozen": module.frozen, "buffer": module.buffer}
    before = others[written].detach().clone() if written in others else None
    if written in others:
        with torch.no_grad():
            others[written].mul_(0.5)
    try:
        if written == "ys":
            loss = ys.mul_(weights).sum()
        elif written == "ys[-1]":
            ys[-1].mul_(3.0), ys[1].mul_(2.0)
            loss = ys.sum()
        else:
            loss = (ys * weights).sum()
        return list(torch.autograd.grad(loss, [module.rate, argument, *([y0] if y0_grad else [])]))
    finally:
        if before is not None:
            others[written].data.copy_(before)


@pytest.mark.parametrize("y0_grad", [False, True], ids=["y0 without", "y0 with"])
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("gradient", ["direct", "adjoint", "checkpoint", "quadrature"])
@pytest.mark.parametrize("engine", ["stepper", "compiled"])
def test_written_into(fields, engine, gradient, control, y0_grad):
    """Outputs, inputs, and what func reads."""
    func = fields[engine]
    expected = gradient_of(func, gradient, control, "", y0_grad)
    if engine == "compiled":
        assert (func.explain() == "compiled") == (gradient != "quadrature")
    unharmed = []
    for written in WRITTEN:
        try:
            found = gradient_of(func, gradient, control, written, y0_grad)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error), written
        else:
            unharmed.append(written)
            for x, y in zip(found, expected, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-12, atol=0)
    assert "y_last" in unharmed
    if gradient in ("direct", "checkpoint"):  # they do not read the outputs: as with torchdiffeq
        assert {"ys", "ys[-1]"} <= set(unharmed)


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint", "quadrature"])
def test_what_func_writes_itself(gradient):
    """Its own counts are no reason to refuse, also where it is called in another solve before the backward pass, or twice."""
    func = Counting()
    y0, a = torch.full((4, 2), 0.9, dtype=D), torch.full((4, 2), 1.1, dtype=D)
    ys = solve(func, y0, TIMES, args=(a,), gradient=gradient).ys
    again = solve(func, ys[-1], TIMES, args=(a,), gradient=gradient).ys
    first = torch.autograd.grad(again.sum(), func.rate, retain_graph=True)[0]
    second = torch.autograd.grad(again.sum(), func.rate)[0]
    assert torch.equal(first, second)


def test_second_derivatives():
    """A frozen tensor that was written into is told of there too."""
    func = Decay()
    y0, a = torch.full((4, 2), 0.9, dtype=D, requires_grad=True), torch.full((4, 2), 1.1, dtype=D)
    for gradient in ("direct", "checkpoint"):
        ys = solve(func, y0, TIMES, args=(a,), gradient=gradient).ys
        with torch.no_grad():
            func.buffer.mul_(0.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(ys.sum(), y0, create_graph=True)


def test_tensors_of_a_function():
    """Frozen ones in a closure and in args are known as well."""
    scale, y0 = torch.tensor(1.5, dtype=D), torch.ones(3, 1, dtype=D, requires_grad=True)
    given = torch.tensor(0.5, dtype=D)
    for written in (scale, given):
        ys = solve(lambda t, y, x: -scale * x * y * y, y0, TIMES, args=(given,), gradient="adjoint").ys
        with torch.no_grad():
            written.mul_(0.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            ys.sum().backward()


class Late:
    """At t = 0 and y = 0 its slope tells nothing of what it reads."""

    def __init__(self) -> None:
        self.tensor, self.parts, self.number = torch.ones(3, dtype=D), [torch.ones(3, dtype=D)], 1.0
        self.w = torch.ones(3, dtype=D, requires_grad=True)

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return self.number * self.tensor * self.parts[0] * torch.sin(t) - self.w * y


def _written(func: Late) -> None:
    func.tensor.mul_(2)


def _replaced(func: Late) -> None:
    func.tensor = 2 * func.tensor


def _written_in_list(func: Late) -> None:
    func.parts[0].mul_(2)


def _replaced_in_list(func: Late) -> None:
    func.parts[0] = 2 * func.parts[0]


def _number(func: Late) -> None:
    func.number = 2.0


SOLVES = {
    "dopri5": {},
    "per sample": {"step_control": "per_sample"},
    "carried slope": {"method": "adaptive_heun", "rtol": 1e-4, "atol": 1e-4},
    "jump at the end": {"jump_t": [1.0]},
    "rk4, one step": {"method": "rk4"},
    "euler": {"method": "euler", "step_size": 0.3},
    "chosen parameters": {"adjoint_params": ()},
    "cuda_graph": {"cuda_graph": True},
    "regularizers": {"regularizers": ["kinetic"]},
}


@pytest.mark.parametrize("change", [_written, _replaced, _written_in_list, _replaced_in_list, _number])
@pytest.mark.parametrize("solved", SOLVES)
@pytest.mark.parametrize("gradient", ["adjoint", "quadrature", "checkpoint"])
def test_what_nobody_can_list(gradient, solved, change):
    """Whatever func reads: where its slope is another, it is refused, each time; set back, the gradient is as before."""
    options, func = SOLVES[solved], Late()
    y0 = torch.zeros(2, 3, dtype=D, requires_grad=True)
    ys, expected = (solve(func, y0, [0.0, 1.0], gradient=gradient, **options).ys[-1] for _ in range(2))
    (expected,) = torch.autograd.grad(expected.sum(), y0)
    kept = func.tensor.clone(), func.parts[0].clone()
    with torch.no_grad():
        change(func)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(ys.sum(), y0)
        if gradient == "checkpoint":  # it finds out on its way
            return
    func.tensor, func.parts[0], func.number = *kept, 1.0
    torch.testing.assert_close(torch.autograd.grad(ys.sum(), y0)[0], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
def test_second_derivatives_of_what_nobody_can_list(gradient):
    func, y0 = Late(), torch.zeros(2, 3, dtype=D, requires_grad=True)
    ys = solve(func, y0, [0.0, 1.0], gradient=gradient).ys
    func.number = 2.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(ys[-1].sum(), y0, create_graph=True)


class Model(nn.Module):
    """A batch norm, and an average of the weights, that its field does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.norm, self.average = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3).requires_grad_(False)

    def field(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.net(y))


@pytest.mark.parametrize("gradient", ["adjoint", "quadrature", "checkpoint", "odeint_adjoint"])
@pytest.mark.parametrize("closure", [False, True])
def test_what_func_does_not_use_may_change(gradient, closure):
    """Before the backward pass, in a second forward pass say."""
    torch.manual_seed(0)
    model, x, t = Model().double(), torch.randn(4, 3, dtype=D), torch.tensor([0.0, 1.0], dtype=D)
    func = (lambda t, y: model.field(t, y)) if closure else model.field

    def loss() -> Tensor:
        if gradient == "odeint_adjoint":
            parameters = tuple(model.parameters())
            return odenet_cuda.odeint_adjoint(func, model.norm(x), t, adjoint_params=parameters)[-1].square().sum()
        return solve(func, model.norm(x), t, gradient=gradient).ys[-1].square().sum()

    first = loss()
    model.norm(x + 1), model.average.weight.mul_(0.9)
    expected = torch.autograd.grad(loss(), model.net.weight)
    torch.testing.assert_close(torch.autograd.grad(first, model.net.weight), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "adjoint", "quadrature"])
def test_a_buffer_for_y0_and_t(gradient):
    """Without a gradient, they are the user's to write into; second derivatives need their values, not them."""
    w = torch.linspace(0.5, 1.5, 3, dtype=D, requires_grad=True)
    found = []
    for write in (False, True):
        y0, t = torch.ones(2, 3, dtype=D), torch.tensor([0.0, 1.0], dtype=D)
        ys = solve(lambda t, y: -w * y.square(), y0, t, gradient=gradient).ys
        if write:
            y0.zero_(), t.add_(1)
        create = gradient in ("direct", "checkpoint")
        (grad,) = torch.autograd.grad(ys[-1].sum(), w, create_graph=create)
        found.append([grad, *(torch.autograd.grad(grad.sum(), w) if create else ())])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_a_batch_of_gradients_that_was_refused():
    """The next pass is as usual: it lets go of what the solve kept."""
    func, y0 = Late(), torch.zeros(2, 3, dtype=D, requires_grad=True)
    ys = solve(func, y0, [0.0, 1.0], gradient="adjoint").ys[-1]
    func.number = 2.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(ys, y0, torch.ones(2, 2, 3, dtype=D), is_grads_batched=True)
    func.number = 1.0
    torch.autograd.grad(ys.sum(), y0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(ys.sum(), y0)


WRITERS = {
    "mul_": lambda y: y.mul_(-1.0),
    "an element": lambda y: y.__setitem__(0, 0.0) or -y,
    "out": lambda y: torch.neg(y, out=y),
    "a view": lambda y: y.view(-1).clamp_(min=0.1) * 1.0,
}


@pytest.mark.parametrize("writes", WRITERS)
@pytest.mark.parametrize("options", [{"method": "rk4"}, {}, {"step_control": "per_sample"}, {"dense": True}], ids=str)
@pytest.mark.parametrize("recorded", [False, True])
def test_func_may_not_write_into_its_state(writes, options, recorded):
    """The next stage begins there: without a gradient nothing would say so."""
    y0 = torch.ones(3, 2, dtype=D, requires_grad=recorded)
    with torch.set_grad_enabled(recorded), pytest.raises(RuntimeError, match=r"in place|in-place|out=\.\.\. arguments"):
        solve(lambda t, y: WRITERS[writes](y), y0, [0.0, 0.5, 1.0], **options)
