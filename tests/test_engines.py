"""The ways to run a solve: which one serves, what the others answer, and that they agree."""

import ast
import gc
import inspect
import weakref

import pytest
import torch
from problems import FIXED_METHODS
from torch import nn

import odenet_cuda
from odenet_cuda import engines, settings, solve

pytestmark = pytest.mark.usefixtures("compiled_quickly")  # it is not the machine code that is tried here

D = torch.float64
GRIDS = [
    {},
    {"step_size": 0.07, "interp": "cubic"},
    {"step_size": 0.07, "interp": "linear"},
    {"step_size": 0.4, "perturb": True},
    {"grid_constructor": lambda func, y0, t: torch.linspace(t[0].item(), t[-1].item(), 9, dtype=D)},
]
PLAIN = {"method": "rk4", "step_size": 0.25}


class Net(nn.Module):
    def __init__(self, dtype=D):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)

    def forward(self, t, y):
        return self.layers(y) * torch.cos(3 * t).to(y.dtype) - y


def reuses_its_result():
    """A func that gives each slope in the same memory."""
    weight, buffer = torch.eye(3, dtype=D) * 0.3, torch.empty(4, 3, dtype=D)

    def func(t, y):
        with torch.no_grad():
            return torch.matmul(y.detach(), weight, out=buffer)

    return func


def of_an_energy(t, y):
    """Asks for gradients of its argument, as Hamiltonian fields do."""
    y.requires_grad_()
    (force,) = torch.autograd.grad(torch.cos(2 * y).sum(), y, create_graph=True)
    return -force


FUNCS = {
    "net": Net,
    "energy": lambda: of_an_energy,
    "one buffer": reuses_its_result,
    "returns its argument": lambda: lambda t, y: y,
    "sometimes grows": lambda: lambda t, y: y * (1.0 if t < 0.5 else -2.0),
}


def start(dtype=D):
    return torch.linspace(-1, 1, 12, dtype=dtype).reshape(4, 3).requires_grad_()


def outcome(func, t, **options):
    """Everything that a solve gives: values, counts, gradients."""
    y0, t = start(), torch.tensor(t, dtype=D, requires_grad=True)
    solution = solve(func, y0, t, **options)
    ys = solution.ys
    wanted = [y0, t, *(func.parameters() if isinstance(func, nn.Module) else ())]
    grads = torch.autograd.grad(
        (ys * torch.cos(torch.arange(ys.numel(), dtype=D)).reshape(ys.shape)).sum(), wanted, allow_unused=True
    )
    zeros = [torch.zeros_like(x) if grad is None else grad for x, grad in zip(wanted, grads, strict=True)]
    stats = solution.stats.nfe, solution.stats.num_accepted, solution.stats.num_rejected
    return solution.engine, stats, [ys.detach(), solution.y_last, solution.t, *zeros]


@pytest.mark.parametrize("name", FUNCS)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: ",".join(grid))
@pytest.mark.parametrize("method", FIXED_METHODS)
def test_plain_torch_gives_what_the_kernels_give(kernels_alone, method, grid, name):
    if "grid_constructor" not in grid and "step_size" not in grid and name != "net":
        pytest.skip("one func on that grid is enough")
    for t in ([0.0, 0.3, 1.0], [1.0, 0.3, -0.2]):
        options = {"method": method, **grid}
        by_kernels = outcome(FUNCS[name](), t, **options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engines, "ENGINES", (engines.plain,))
            by_torch = outcome(FUNCS[name](), t, **options)
        assert (by_kernels[0], by_torch[0]) == ("stepper", "plain") and by_kernels[1] == by_torch[1]
        for x, y in zip(by_kernels[2], by_torch[2], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_plain_torch_leaves_the_users_tensors_alone():
    y0 = torch.ones(3, dtype=D)
    weight = torch.ones(3, dtype=D, requires_grad=True)
    solution = solve(lambda t, y: weight * of_an_energy(t, y), y0, [0.0, 1.0], **PLAIN)
    assert solution.engine == "plain" and not y0.requires_grad and solution.ys.requires_grad
    solution.ys.detach().add_(1)
    assert torch.equal(y0, torch.ones(3, dtype=D))


class Called(Net):
    def callback_step(self, t, y, dt):
        pass


@pytest.mark.parametrize(
    ("words", "change"),
    {
        "chooses its steps": {"method": "dopri5", "step_size": None},
        "no graph": {"gradient": "checkpoint"},
        "dense": {"dense": True},
        "regularizers": {"regularizers": ("kinetic",)},
        "adjoint_params": {"adjoint_params": ()},
        "callbacks": {"func": Called()},
        "numbers": {"y0": torch.zeros(1 << 15, 3, dtype=D)},
        "16 bits": {"func": Net(torch.bfloat16), "y0": torch.zeros(2, 3, dtype=torch.bfloat16)},
    }.items(),
    ids=str,
)
def test_what_plain_torch_refuses(words, change):
    given = {"func": Net(), "y0": start(), "t": [0.0, 1.0], **PLAIN, **change}
    solution = solve(given.pop("func"), given.pop("y0"), given.pop("t"), **given)
    assert solution.engine == "stepper" and words in solution.explanation["plain"]


def test_plain_torch_finds_numbers_of_16_bits_wherever_func_has_them():
    """As a closure's, as a parameter's, or as what func makes of wider ones."""
    y0, weight = torch.ones(2, 3), torch.ones(3, requires_grad=True)
    short = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    made = weight.bfloat16()
    for func in (
        lambda t, y: y * short.float(),
        lambda t, y: y * made.float(),
        lambda t, y: (y.half() * weight.half()).float(),
    ):
        solution = solve(func, y0, [0.0, 1.0], **PLAIN)
        assert solution.engine == "stepper" and "16 bits" in solution.explanation["plain"]
        assert solution.stats.nfe in (16, 17)  # one more where it must be found what func depends on


def test_plain_torch_gives_no_gradient_where_none_is_wanted():
    """func asks for gradients of its arguments, of the time too, for itself."""

    def func(t, y):
        t.requires_grad_()
        (rate,) = torch.autograd.grad((t * y).sum(), t, create_graph=True)
        return of_an_energy(t, y) * rate

    y0 = torch.ones(2, 3, dtype=D)
    solution = solve(func, y0, [0.0, 1.0], **PLAIN)
    assert solution.engine == "plain" and not solution.ys.requires_grad and not y0.requires_grad
    scale = torch.ones((), dtype=D, requires_grad=True)
    assert solve(lambda t, y: scale * func(t, y), y0, [0.0, 1.0], **PLAIN).ys.requires_grad


def test_plain_torch_refuses_autocast_and_long_grids_without_a_gradient():
    with torch.autocast("cpu", torch.bfloat16):
        assert "16 bits" in solve(Net(torch.float32), start(torch.float32), [0.0, 1.0], **PLAIN).explanation["plain"]
    with torch.no_grad():
        assert solve(Net(), start(), [0.0, 1.0], **PLAIN).engine == "plain"
        many = solve(Net(), start(), [0.0, 1.0], **{**PLAIN, "step_size": 0.05})
        assert many.engine == "stepper" and "many steps" in many.explanation["plain"]


def test_each_engine_says_that_it_served():
    assert solve(Net(), start(), [0.0, 1.0]).engine == "stepper"
    assert solve(Net(), start(), [0.0, 1.0], **PLAIN).engine == "plain"
    field = odenet_cuda.compile(lambda t, y: -y)
    found = solve(field, start(), [0.0, 1.0])
    assert (found.engine, field.explain()) == ("compiled", "compiled") and list(found.explanation) == ["transformed"]
    found = solve(field, start(), [0.0, 1.0], dense=True)
    assert (
        found.engine == "stepper"
        and found.explanation["compiled"] in field.explain() == "served by the stepper: dense=True needs it"
    )
    seen = []

    def mapped(y0):
        solution = solve(field, y0, [0.0, 1.0])
        seen.append((solution.engine, solution.explanation))
        return solution.ys

    torch.vmap(mapped)(start().detach())
    assert seen == [("transformed", {})]
    assert field.explain().startswith("served by torch's operations: inside a transform of torch")


def test_a_block_explains_as_its_solution_does():
    block = odenet_cuda.ODEBlock(Net(), method="rk4", gradient="direct")
    assert block.explain() == "not solved yet"
    block(start())
    assert block.explain() == "served by torch's operations: func is no compiled field: see odenet_cuda.compile"
    block = odenet_cuda.ODEBlock(Net(), compile="auto")
    block(start())
    assert block.explain() == "compiled"


@pytest.mark.parametrize(
    "options", [{}, PLAIN, {"gradient": "adjoint"}, {"gradient": "checkpoint"}, {"gradient": "quadrature"}], ids=str
)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_solve_keeps_nothing_alive(options, compiled):
    """Neither func nor the state wait for the garbage collector, after the gradient, without it and without gradients."""
    gc.collect()
    gc.disable()
    try:
        for mode in ("backward", "forward", "no_grad"):
            net, y0 = Net(), start()
            field = odenet_cuda.compile(net) if compiled else net
            with torch.set_grad_enabled(mode != "no_grad"):
                ys = solve(field, y0, [0.0, 1.0], **options).ys
            if mode == "backward":
                ys.sum().backward()
            gone = [weakref.ref(net), weakref.ref(y0)]
            del net, field, y0, ys
            assert [x() for x in gone] == [None, None], mode
    finally:
        gc.enable()


# ---- settings ----------------------------------------------------------------------------------------------------------


def test_solve_hands_its_options_on_by_their_names():
    """By place, for that is done at every call: each in the place of its own name, and with one default."""
    calls = [x for x in ast.walk(ast.parse(inspect.getsource(solve))) if isinstance(x, ast.Call)]
    (call,) = [x for x in calls if getattr(x.func, "id", "") == "settings_of"]
    assert [getattr(x, "id", None) for x in call.args] == list(settings._PARAMETERS)
    defaults = inspect.signature(solve).parameters
    assert {name: defaults[name].default for name in settings._PARAMETERS} == {
        name: parameter.default for name, parameter in settings._PARAMETERS.items()
    }


def test_equal_options_have_the_same_settings():
    given = ["dopri5", "direct", "joint", "I", None, 0.0, 1.0, 100, 0.9, 10.0, 0.2, (), (), None, None, False]
    given += [None, None, None, False, "method", (), False, "raise", None]
    first = settings.settings_of(*given)
    assert settings.settings_of(*given) is first
    assert settings.settings_of(*given[:7], 101, *given[8:]) is not first
    stops = torch.tensor([0.5])
    changed = [*given[:11], stops, *given[12:]]
    before = settings.settings_of(*changed)
    stops += 0.1  # a tensor's numbers may change: it is read at every call
    assert before.options.step_t == (0.5,) and settings.settings_of(*changed).options.step_t == (float(stops[0]),)
    changed[11] = [0.25]
    assert settings.settings_of(*changed).options.step_t == (0.25,)


def test_settings_do_not_confuse_numbers_with_truth():
    net = Net()
    with pytest.raises(ValueError, match="max_checkpoints must be a whole number"):
        solve(net, start(), [0.0, 1.0], gradient="checkpoint", max_checkpoints=True)
    solve(net, start(), [0.0, 1.0], gradient="checkpoint", max_checkpoints=1)
    with pytest.raises(ValueError, match="max_checkpoints must be a whole number"):
        solve(net, start(), [0.0, 1.0], gradient="checkpoint", max_checkpoints=True)


def test_bad_options_are_refused_at_every_call():
    for _ in range(3):
        with pytest.raises(ValueError, match="controller must be"):
            solve(Net(), start(), [0.0, 1.0], controller="PIDs")


def test_a_func_that_draws_numbers_where_nothing_wants_a_gradient():
    """There is nothing to draw again for."""
    solution = solve(lambda t, y: torch.rand_like(y), torch.zeros(3), [0.0, 1.0], gradient="checkpoint", **PLAIN)
    assert solution.status == "success" and not solution.ys.requires_grad
