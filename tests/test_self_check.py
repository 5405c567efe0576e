"""A compiled field that is wrong is found out before its first result is given out; the stepper serves, and it is told of."""

import warnings

import pytest
import torch
from compiled_fields import Net, rows
from torch import Tensor, nn

import odenet_cuda
from odenet_cuda import solve
from odenet_cuda.compiled import build, comparison
from odenet_cuda.compiled.plan import Plan

TIMES = [0.0, 0.4, 1.0]
CONTROLS = {"joint": {}, "per_sample": {"step_control": "per_sample"}, "grid": {"method": "rk4"}}
# What the machine code does where the environment says so, to a result or in a part of the samples or times.
FAULTS = {
    "all": "x = x * P(T(1.001));",
    "one lane": "set_lane(x, 1, T(lane(x, 1) * T(1.001)));",
    "last lane": "set_lane(x, Lanes<P>::width - 1, T(lane(x, Lanes<P>::width - 1) * T(1.001)));",
    "many tiles": "if (in.batch > Lanes<P>::width) x = x * P(T(1.001));",
    "one tile": "if (in.batch <= Lanes<P>::width) x = x * P(T(1.001));",
    "not a number": "x = x * P(T(NAN));",
    "at the end": "if (T(lane(t, 0)) > T(0.9)) x = x + P(T(0.01));",
    "none where it is 0": "x = select(x == P(T(0)), P(T(1)), x);",
}
OF_VALUES, OF_GRADIENTS = list(FAULTS)[1:-1], ["one lane", "many tiles", "one tile"]


pytestmark = pytest.mark.usefixtures("quick_compiler")


@pytest.fixture
def faulty(monkeypatch):
    """Functions of the emitted text have every fault, and FAULT says which one they show: "field: one lane", say."""
    original = Plan.source
    results = {
        "field": "dy[0]",
        "product": "gy[0]",
        "product_of_kept": "gy[0]",
        "slope_and_product": "gy[0]",
        "taps": "taps[0]",
    }

    def source(plan: Plan, *args) -> str:
        lines, function = [], ""
        for line in original(plan, *args).splitlines():
            if " static void " in line:
                function = line.split(" static void ")[1].split("(")[0]
            if line == "  }" and function in results:
                for name in (function, *(["taps"] if function != "field" else [])):
                    lines += [f'    {{ P& x = {results[name]}; const char* which = getenv("FAULT");']
                    for fault, text in FAULTS.items():
                        lines.append(f'    if (which && !strcmp(which, "{name}: {fault}")) {{ {text} }}')
                    lines.append("    }")
                function = ""
            lines.append(line)
        return "#include <cstdlib>\n#include <cstring>\n" + "\n".join(lines)

    monkeypatch.setattr(Plan, "source", source)
    monkeypatch.setattr(build, "discard", lambda *args: "kept")  # else every fault would compile anew
    monkeypatch.setattr(build, "_refused", {})


def results_of(func, control: str, gradient: str, y0: Tensor) -> list[Tensor]:
    net = func.func if isinstance(func, odenet_cuda.CompiledField) else func
    y0 = y0.clone().requires_grad_(bool(gradient))
    with torch.set_grad_enabled(bool(gradient)):
        ys = solve(func, y0, TIMES, rtol=1e-5, atol=1e-5, gradient=gradient or "direct", **CONTROLS[control]).ys
        return [ys, *(torch.autograd.grad(ys.square().sum(), [y0, *net.parameters()]) if gradient else ())]


def assert_found_out(monkeypatch, fault: str, control: str, gradient: str, y0: Tensor) -> None:
    monkeypatch.setenv("FAULT", fault)
    func = odenet_cuda.compile(Net())
    with pytest.warns(UserWarning, match="the stepper serves instead"):
        found = results_of(func, control, gradient, y0)
    assert "is wrong" in func.explain(), fault
    for x, y in zip(found, results_of(func.func, control, gradient, y0), strict=True):
        assert torch.equal(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results_of(func, control, gradient, y0)  # it is remembered
    assert "is wrong" in func.explain()


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("batch", [5, 1])
def test_values(faulty, monkeypatch, control, batch):
    """In all, in one lane, in the last, in one of the two ways that tiles are visited, and late."""
    one = batch == 1
    for fault in ["all", "not a number", "at the end"] if one else OF_VALUES:
        assert_found_out(monkeypatch, f"field: {fault}", control, "", rows(batch, 2))


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
def test_gradients(faulty, monkeypatch, gradient, control):
    """Of the state or of the weights alone; the values stay compiled where no gradient is wanted."""
    name = "slope_and_product" if gradient == "adjoint" else "product"
    for fault in OF_GRADIENTS:
        assert_found_out(monkeypatch, f"{name}: {fault}", control, gradient, rows(5, 2))
    assert_found_out(monkeypatch, "taps: all", control, gradient, rows(5, 2))
    if gradient == "checkpoint":
        assert_found_out(monkeypatch, "product_of_kept: all", control, gradient, rows(5, 2))
    func = odenet_cuda.compile(Net())
    with pytest.warns(UserWarning, match="the gradient for"):
        results_of(func, control, gradient, rows(5, 2))
    results_of(func, control, "", rows(5, 2))
    assert func.explain() == "compiled"


def test_wrong_library_leaves_the_cache(tmp_path, monkeypatch):
    """Its text stays, for the report, which says all that is needed to make it again. Another process tries anew."""
    original = Plan.source
    monkeypatch.setattr(Plan, "source", lambda *args: original(*args).replace("dy[i] = ", "dy[i] = P(T(0.5)) * "))
    monkeypatch.setenv("ODENET_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "_refused", {})

    def field() -> odenet_cuda.CompiledField:
        return odenet_cuda.compile(lambda t, y: -1.25 * y * y)

    y0 = rows(3, 2)
    with pytest.warns(UserWarning) as told:
        ys = solve(field(), y0, TIMES).ys
    assert torch.equal(ys, solve(field().func, y0, TIMES).ys)
    words = str(told[0].message)
    for part in (f"torch {torch.__version__}", "-O3", build.find_compiler()[1].splitlines()[0], "seed", "[3, 2]", "Target("):
        assert part in words
    assert list(tmp_path.glob("*.so")) == []
    (text,) = tmp_path.glob("wrong-*.cpp")
    assert str(text) in words and "P(T(0.5)) * " in text.read_text()
    again = field()  # another reading of the same: it is not compiled again
    solve(again, y0, TIMES)
    assert "is wrong" in again.explain() and list(tmp_path.glob("*.so")) == []


def test_values_that_are_none(monkeypatch):
    """func has no finite value near y0, or in some of the samples: that is no reason to refuse what is right."""
    field = odenet_cuda.compile(lambda t, y: torch.sqrt(y) * torch.log(1 - y))
    y0 = torch.tensor([[0.0, 0.5], [0.999999, 0.1], [0.3, 0.3]], dtype=torch.float64)
    solve(field, y0, TIMES, step_control="per_sample", on_failure="return")
    assert field.explain() == "compiled"
    y0[1, 0] = 2.0
    field = odenet_cuda.compile(lambda t, y: torch.sqrt(y) * torch.log(1 - y) * 1.0)
    found = solve(field, y0, TIMES, step_control="per_sample", on_failure="return")
    assert field.explain() == "compiled" and found.status[1] == "non-finite values"
    with pytest.raises(odenet_cuda.SolverError):
        solve(field, torch.full((2, 2), 2.0, dtype=torch.float64), TIMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("size", [1e-25, 1.0, 1e25])
def test_sizes(dtype, size):
    """Large and small values, stiff fields and kinks are right to rounding, so nobody warns."""
    parts = [
        lambda t, y: -y,
        lambda t, y: 1e4 * (torch.cos(t) * size - y),
        lambda t, y: -torch.sign(y) * y.abs().sqrt() * size**0.5,
        lambda t, y: (y + 1000 * size) - 1000 * size - 2 * y,
        lambda t, y: y.cumsum(1) - y.sum(1, keepdim=True) * 1.5,
        lambda t, y: y * 0,
    ]
    field = odenet_cuda.compile(lambda t, y: torch.cat([f(t, x) for f, x in zip(parts, y.split(4, 1), strict=True)], 1))
    y0 = (rows(3, 4 * len(parts)) * size).to(dtype).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for gradient in ("direct", "adjoint"):
            solve(field, y0, [0.0, 1e-4, 1e-3], method="rk4", gradient=gradient)
            assert field.explain() == "compiled", gradient


class Bias(nn.Module):
    """The gradient of the bias is rounding alone."""

    def __init__(self):
        super().__init__()
        self.bias, self.norm = nn.Parameter(torch.zeros(6)), nn.LayerNorm(6)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.norm(y + self.bias.sum()) - y


def test_gradient_that_is_rounding():
    field = odenet_cuda.compile(Bias())
    solve(field, rows(7, 6, dtype=torch.float32), TIMES).ys.sum().backward()
    assert field.explain() == "compiled"


def test_hooks_of_the_user():
    """They see the gradients of the solve, not those of the check."""
    net, seen = Net(), []
    for parameter in net.parameters():
        parameter.register_hook(lambda grad: seen.append(grad))
    field = odenet_cuda.compile(net)
    solve(field, rows(3, 2), TIMES).ys.sum().backward()
    assert field.explain() == "compiled" and len(seen) == 4


def test_checked_once(monkeypatch):
    """A plan's libraries are checked when they are first used."""
    calls = []
    original = comparison.Comparison.run
    monkeypatch.setattr(comparison.Comparison, "run", lambda *args: calls.append(args[1]) or original(*args))
    field, y0 = odenet_cuda.compile(Net()), rows(3, 2).requires_grad_()
    for _ in range(3):
        with torch.no_grad():
            solve(field, y0, TIMES)
        solve(field, y0, TIMES)
        solve(field, y0, TIMES, gradient="adjoint")
    assert calls == ["", "direct", "adjoint"]


def test_layer_that_begins_with_zero(faulty, monkeypatch):
    """What it multiplies is checked once it is no longer zero."""
    net = Net()
    with torch.no_grad():
        for parameter in net.second.parameters():
            parameter.zero_()
    monkeypatch.setenv("FAULT", "field: all")
    field, y0 = odenet_cuda.compile(net), rows(5, 2)
    solve(field, y0, TIMES)
    assert field.explain() == "compiled"  # right so far: everything is zero
    with torch.no_grad():
        net.second.weight.fill_(0.5)
    with pytest.warns(UserWarning, match="the stepper serves instead"):
        ys = solve(field, y0, TIMES).ys
    assert torch.equal(ys, solve(net, y0, TIMES).ys)


class Log:
    def __init__(self):
        self.count, self.times, self.kept = 0, [], None


def test_objects_in_args_are_put_back():
    """A counter, a list and what is kept there stand as before the solve."""

    def func(t, y, log):
        log.count += 1
        log.kept = torch.tanh(y)
        return -log.kept

    field, log = odenet_cuda.compile(func, pure=True), Log()
    solve(field, rows(3, 2), TIMES, args=(log,))
    assert field.explain() == "compiled" and (log.count, log.times, log.kept) == (0, [], None)


@pytest.mark.parametrize("gradient", ["direct", "adjoint"])
def test_slopes_with_a_gradient(gradient):
    """A func that turns gradients on inside itself is asked no numbers of tensors that require one."""

    class Divergence(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, t, state):
            with torch.enable_grad():
                x = state[0].requires_grad_(True)
                dx = self.net(t, x)
                parts = [torch.autograd.grad(dx[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)]
            return dx, -sum(parts)[:, None]

    field = odenet_cuda.compile(Divergence())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for needed in (False, True):
            with torch.set_grad_enabled(needed):
                solve(field, (rows(3, 2), rows(3, 1)), TIMES, method="rk4", gradient=gradient)
                assert field.explain() == "compiled"


@pytest.mark.parametrize("gradient", ["direct", "adjoint"])
def test_gradients_of_arguments(gradient):
    """Those of arguments with one entry a sample, one that func does not use among them, are compared with func's own."""
    y0, used, unused = rows(5, 2), rows(5, 1, seed=1).requires_grad_(), rows(5, 1, seed=2).requires_grad_()
    field = odenet_cuda.compile(lambda t, y, a, b: a - torch.tanh(y))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ys = solve(field, y0, [0.0, 0.3], args=(used, unused), method="euler", step_size=0.15, gradient=gradient).ys
    assert field.explain() == "compiled"
    ys[-1].sum().backward()
    assert float(used.grad.abs().min()) > 0.1
