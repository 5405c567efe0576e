"""What is written into between a solve and its backward pass: the gradient is as without, or torch says that it was."""

import pytest
import torch
from torch import Tensor, nn

import odenet_cuda
from odenet_cuda import solve

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
