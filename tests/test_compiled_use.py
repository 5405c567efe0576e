"""How a compiled field is used: parameters that change, modules that hold it, and what is refused or served by the stepper.

What the compiler makes of its text is tried in test_compiled.py.
"""

import copy
import os
import pickle
import warnings
from itertools import pairwise

import pytest
import torch
from compiled_fields import Net, Stretched, assert_compiled, assert_same, compare, decay, gradients, rows
from torch import nn

import odenet_cuda
from odenet_cuda import ODEBlock, odeint, odeint_adjoint, solve

pytestmark = pytest.mark.usefixtures("quick_compiler")

TIMES = torch.tensor([0.0, 0.013, 0.3, 0.31, 0.32, 1.0], dtype=torch.float64)
ADJOINT = 1e-5  # two solves backwards at 1e-9, whose norms differ
EXACT = 1e-9  # two sums of the same numbers in another order
CONTROLS = ("joint", "per_sample")


# ---- parameters that change ----


def count_libraries(field) -> int:
    return sum(len(plan.libraries) for plans in field._plans.kept.values() for plan in plans)


def test_changed_parameters_are_seen():
    """Changed in place, replaced, or given other memory: without a compile."""
    net = Net()
    field = odenet_cuda.compile(net)

    def check():
        grads = [gradients(f, rows(5, 2), TIMES, list(net.parameters())) for f in (field, net)]
        for x, y in zip(*grads, strict=True):
            torch.testing.assert_close(x, y, rtol=EXACT, atol=EXACT)
        return compare(field, rows(5, 2), TIMES).ys.detach()

    results = [check()]
    compiled = count_libraries(field)
    with torch.no_grad():
        net.first.weight.mul_(1.5)
    results.append(check())
    net.second.weight = nn.Parameter(rows(2, 6, seed=50))
    results.append(check())
    net.second.bias.data = rows(2, seed=51)
    results.append(check())
    net.first.weight = nn.Parameter(rows(3, 6, seed=52).t())  # of other strides
    results.append(check())
    net.load_state_dict({name: x * 0.5 for name, x in net.state_dict().items()})
    results.append(check())
    assert all(not torch.equal(x, y) for x, y in pairwise(results))
    assert count_libraries(field) == compiled


def test_optimizer_steps_are_seen():
    """Adam in place, three steps: the same losses as with the stepper."""
    losses = {}
    for compiled in (False, True):
        net = Net()
        field = odenet_cuda.compile(net) if compiled else net
        optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
        losses[compiled] = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = (solve(field, rows(40, 2), [0.0, 1.0]).ys[-1] ** 2).mean()
            loss.backward()
            optimizer.step()
            losses[compiled].append(float(loss))
    assert losses[True] == pytest.approx(losses[False], rel=1e-9)
    assert losses[True][-1] < losses[True][0]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("gradient", ["direct", "adjoint"])
def test_changed_between_forward_and_backward(gradient, frozen):
    """torch's own error, as for any saved tensor."""
    net = Net()
    net.first.weight.requires_grad_(not frozen)
    ys = solve(odenet_cuda.compile(net), rows(5, 2), TIMES, gradient=gradient).ys
    with torch.no_grad():
        net.first.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ys.sum().backward()


def test_memory_of_a_parameter_replaced_between_forward_and_backward():
    """The memory that the solve read is kept until its gradient is computed, or an error is raised."""
    net = Net(hidden=200)  # its memory is given back to the system when it is freed
    field = odenet_cuda.compile(net)
    y0 = rows(5, 2).requires_grad_()
    grads = []
    for replaced in (False, True):
        before = {name: x.clone() for name, x in net.state_dict().items()}
        ys = solve(field, y0, [0.0, 1.0]).ys
        assert_compiled(field)
        if replaced:
            for parameter in net.parameters():
                parameter.data = torch.full_like(parameter, 100.0)
            torch.full((200, 3), 7.0, dtype=torch.float64)
        try:
            grads.append(torch.autograd.grad(ys.sum(), y0)[0])
        except RuntimeError as error:
            assert replaced and "modified" in str(error)
            return
        net.load_state_dict(before)
    torch.testing.assert_close(grads[0], grads[1], rtol=EXACT, atol=EXACT)


def test_outputs_written_in_place():
    """As with the stepper, the user may write into the outputs of gradient="direct"."""
    grads = []
    for func in (odenet_cuda.compile(decay), decay):
        y0 = rows(5, 2).requires_grad_()
        ys = solve(func, y0, [0.0, 0.5, 1.0]).ys
        ys.mul_(2.0)
        grads.append(torch.autograd.grad((ys**2).sum(), y0)[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=EXACT, atol=EXACT)


def test_module_replaced():
    """Another submodule is read anew."""
    net = Net()
    field = odenet_cuda.compile(nn.ModuleDict({"net": net}))
    field.func.forward = lambda t, y: field.func["net"](t, y)
    before = solve(field, rows(5, 2), TIMES).ys
    field.func["net"] = Net(hidden=4)
    after = solve(field, rows(5, 2), TIMES).ys
    torch.testing.assert_close(after, solve(field.func["net"], rows(5, 2), TIMES).ys, rtol=1e-10, atol=1e-10)
    assert not torch.equal(before, after)


def test_captured_module_replaced():
    """A module that a function captures, too."""
    net = nn.Linear(2, 2, dtype=torch.float64)

    def func(t, y):
        return net(y)

    field = odenet_cuda.compile(func)
    assert_same(solve(field, rows(5, 2), TIMES), solve(func, rows(5, 2), TIMES))
    net = nn.Linear(2, 2, dtype=torch.float64)
    assert_same(solve(field, rows(5, 2), TIMES), solve(func, rows(5, 2), TIMES))


def test_numbers_that_change():
    """A number of Python that is another now is read anew."""

    class Scaled(nn.Module):
        scale = 1.0

        def forward(self, t, y):
            return -self.scale * y

    field = odenet_cuda.compile(Scaled())
    compare(field, rows(5, 2), [0.0, 1.0])
    field.func.scale = 2.0
    compare(field, rows(5, 2), [0.0, 1.0])
    field.reset()
    assert field.explain() == "not solved yet"
    compare(field, rows(5, 2), [0.0, 1.0])


# ---- wherever a func is used ----


def test_copies():
    """Pickle and deepcopy of the field and of a module that holds it; the state dict is that of func."""
    field = odenet_cuda.compile(Net())
    expected = solve(field, rows(5, 2), TIMES).ys.detach()
    holder = nn.Sequential(nn.Linear(2, 2), field)
    for copied in (copy.deepcopy(field), pickle.loads(pickle.dumps(field)), copy.deepcopy(holder)[1]):
        assert isinstance(copied, odenet_cuda.CompiledField) and copied.func is not field.func
        assert copied.explain() == "not solved yet"
        assert torch.equal(solve(copied, rows(5, 2), TIMES).ys, expected)
        assert_compiled(copied)
    assert list(field.state_dict()) == [f"func.{name}" for name in field.func.state_dict()]
    other = odenet_cuda.compile(Net())
    nn.init.zeros_(other.func.first.weight)
    other.load_state_dict(field.state_dict())
    assert torch.equal(solve(other, rows(5, 2), TIMES).ys, expected)


def test_what_a_compiled_field_is():
    """Called, it is func; compiled again, itself; and it has the attributes of func."""
    net = Net()
    field = odenet_cuda.compile(net)
    assert odenet_cuda.compile(field) is field
    assert torch.equal(field(torch.tensor(0.3), rows(5, 2)), net(torch.tensor(0.3), rows(5, 2)))
    assert field.first is net.first and field.explain() == "not solved yet"
    with pytest.raises(AttributeError, match="nothing"):
        _ = field.nothing
    with pytest.raises(TypeError, match="callable"):
        odenet_cuda.compile(3)
    with pytest.raises(RuntimeError, match="solve with it once"):
        field.source()
    with pytest.raises(ValueError, match="solve must be one of"):
        field.source(solve="dense")


@pytest.mark.parametrize("how", ["compiled", "auto"])
def test_block_trains(how):
    """Three steps of gradient descent: the losses of a block that is not compiled, and they fall."""
    losses, options = {}, {"rtol": 1e-9, "atol": 1e-9}
    for compiled in (False, True):
        net = Net()
        if how == "auto":
            block = ODEBlock(net, compile="auto" if compiled else False, **options)
        else:
            block = ODEBlock(odenet_cuda.compile(net) if compiled else net, compile=False, **options)
        optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
        losses[compiled] = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = ((block(rows(40, 2)) - 0.3) ** 2).mean()
            loss.backward()
            optimizer.step()
            losses[compiled].append(float(loss))
        assert (block.explain() == "compiled") == compiled
        assert block.nfe_forward > 0 and (block.nfe_backward > 0 or not compiled)
    assert losses[True] == pytest.approx(losses[False], abs=1e-6)
    assert losses[True][2] < losses[True][1] < losses[True][0]


def test_odeint():
    """odeint, and odeint_adjoint with its gradients, with the stepper's answer."""
    net = Net()
    field = odenet_cuda.compile(net)
    torch.testing.assert_close(odeint(field, rows(5, 2), TIMES), odeint(net, rows(5, 2), TIMES), rtol=1e-10, atol=1e-10)
    assert_compiled(field)
    grads = []
    for func in (field, net):
        net.zero_grad()
        odeint_adjoint(func, rows(5, 2), TIMES, rtol=1e-9, atol=1e-9).sum().backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=ADJOINT, atol=ADJOINT)


def test_transforms():
    """torch.func.grad and vmap give what they give for func, and explain does not call it compiled."""
    net = Net()
    field = odenet_cuda.compile(net)
    compare(field, rows(5, 2), TIMES)
    for transform in (
        lambda f: torch.func.grad(lambda y: solve(f, y, TIMES).ys.sum())(rows(5, 2)),
        lambda f: torch.func.vmap(lambda y: solve(f, y, TIMES).ys)(rows(3, 5, 2)),
        lambda f: torch.func.jvp(lambda y: solve(f, y, TIMES).ys, (rows(5, 2),), (rows(5, 2, seed=1),))[1],
    ):
        torch.testing.assert_close(transform(field), transform(net), rtol=1e-12, atol=1e-12)
        assert field.explain() != "compiled"


# ---- what is refused ----


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2, dtype=torch.float64)

    def forward(self, t, y):
        return self.norm(y) - y


class Dropping(nn.Module):
    def forward(self, t, y):
        return -nn.functional.dropout(y, 0.5, self.training)


def minus_mean(t, y):
    return y - y.mean(0)


def minus_sum(t, y):
    return y - 0.1 * y.sum(0, keepdim=True)


def number_of_time(t, y):
    return -y * (float(t.reshape(-1)[0]) + 1)


def branches(t, y):
    if bool(y.sum() > 0):
        return -y
    return y


def takes_median(t, y):
    return -y * y.median(1, keepdim=True).values


def reverses_samples(t, y):
    return -y.flip(0)


def softmax_of_samples(t, y):
    return torch.softmax(y, 0)


def products_of_samples(t, y):
    return -(y @ y.t()) @ y


REFUSED = {  # what explain must name; in which file and line, where a line of this file does it
    "batch norm": (Normed(), "func writes a tensor", False),
    "mean": (minus_mean, "mean", True),
    "sum": (minus_sum, "sum", True),
    "float": (number_of_time, "into Python", True),
    "branch": (branches, "into Python", True),
    "median": (takes_median, "median", True),
    "flip": (reverses_samples, "flip", True),
    "softmax": (softmax_of_samples, "amax", True),
    "product": (products_of_samples, "mm", True),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    """explain names the operation and its line, and the answer is the stepper's, bit for bit."""
    func, word, line = REFUSED[name]
    field, other = odenet_cuda.compile(func), copy.deepcopy(func)
    found = solve(field, rows(5, 2), [0.0, 0.5], step_control="per_sample")
    assert field.explain().startswith("served by ") and word in field.explain()
    assert not line or os.path.basename(__file__) in field.explain()
    expected = solve(other, rows(5, 2), [0.0, 0.5], step_control="per_sample")
    assert torch.equal(found.ys, expected.ys) and torch.equal(found.stats.num_accepted, expected.stats.num_accepted)
    with pytest.raises(RuntimeError, match="served by the stepper"):
        field.source()


@pytest.mark.parametrize("control", CONTROLS)
def test_batch_norm_is_not_moved_by_reading(control):
    """Its running statistics and counter are those of the stepper's calls alone."""
    func, other = Normed(), Normed()
    field = odenet_cuda.compile(func)
    assert_same(
        solve(field, rows(5, 2), [0.0, 0.5], step_control=control), solve(other, rows(5, 2), [0.0, 0.5], step_control=control)
    )
    assert field.explain().startswith("served by ")
    assert other.norm.num_batches_tracked > 0
    for name, value in other.state_dict().items():
        torch.testing.assert_close(func.state_dict()[name], value, rtol=0, atol=0, msg=name)


def adds_noise(t, y):
    return -y + torch.rand(2, dtype=y.dtype)


@pytest.mark.parametrize("func", [Dropping(), adds_noise], ids=["dropout", "rand"])
def test_random_fields(func):
    """The numbers drawn are those that the stepper draws: reading draws none."""
    field = odenet_cuda.compile(func)
    torch.manual_seed(0)
    found = solve(field, rows(5, 2), [0.0, 0.5, 1.0], method="rk4").ys
    assert field.explain().startswith("served by ")
    torch.manual_seed(0)
    assert torch.equal(found, solve(func, rows(5, 2), [0.0, 0.5, 1.0], method="rk4").ys)


class WithCallback(Net):
    steps = 0

    def callback_step(self, t, y, dt):
        self.steps += 1


def largest(parts):
    return torch.stack([x.abs().max() for x in parts if x.numel()]).max()


NOT_SERVED = {
    "dense": (Net(), rows(5, 2), {"dense": True}, "dense"),
    "regularizers": (Net(), rows(5, 2), {"regularizers": ("kinetic",)}, "regularizers"),
    "norm": (Net(), rows(5, 2), {"norm": lambda y: y.abs().max()}, "norm"),
    "rtol": (Net(), rows(5, 2), {"rtol": torch.tensor([1e-5, 1e-6])}, "tolerances"),
    "atol": (Net(), rows(5, 2), {"atol": torch.tensor([1e-5, 1e-6])}, "tolerances"),
    "complex": (decay, torch.complex(rows(5, 2), rows(5, 2)), {}, "float64"),
    "float16": (decay, rows(5, 2).half(), {"rtol": 1e-2, "atol": 1e-2}, "float64"),
    "bfloat16": (decay, rows(5, 2).bfloat16(), {"rtol": 1e-1, "atol": 1e-1}, "float64"),
    "two types": (lambda t, y: (-y[0], -y[1]), (rows(5, 2), rows(5, 2).float()), {}, "float64"),
    "quadrature": (Net(), rows(5, 2), {"gradient": "quadrature"}, "quadrature"),
    "max_checkpoints": (Net(), rows(5, 2), {"gradient": "checkpoint", "max_checkpoints": 3}, "max_checkpoints"),
    "perturb": (Net(), rows(5, 2), {"method": "rk4", "perturb": True}, "perturb"),
    "adjoint norm": (Net(), rows(5, 2), {"gradient": "adjoint", "adjoint_options": {"norm": largest}}, "a norm of the adjoint"),
    "callback": (WithCallback(), rows(5, 2), {}, "callbacks"),
    "one time": (Net(), rows(5, 2), {"t": [0.0]}, "nothing to solve"),
    "empty": (decay, rows(0, 2), {}, "nothing to solve"),
    "large": (decay, rows(2, 1100), {}, "1100"),
}


@pytest.mark.parametrize("name", NOT_SERVED)
def test_not_served(name):
    """explain says which option or type needs the stepper, and the answer is the stepper's."""
    func, y0, options, word = NOT_SERVED[name]
    options = dict(options)
    t = options.pop("t", [0.0, 0.5, 1.0])
    field, other = odenet_cuda.compile(func), copy.deepcopy(func)
    found, expected = solve(field, y0, t, **options), solve(other, y0, t, **options)
    assert field.explain().startswith("served by ") and word in field.explain()
    assert_same(found, expected, 0.0)
    if name == "callback":
        assert func.steps == other.steps > 0


def test_gradient_for_times_is_not_served():
    """t gets its gradient, by the stepper; without one the same field is compiled."""
    field = odenet_cuda.compile(Stretched())
    grads = []
    for func in (field, field.func):
        t = TIMES.clone().requires_grad_()
        grads.append(torch.autograd.grad(solve(func, rows(5, 2), t).ys.sum(), t)[0])
    assert "gradient for t" in field.explain()
    assert torch.equal(*grads)
    with torch.no_grad():
        compare(field, rows(5, 2), t)


def test_autocast_is_not_served():
    """Under autocast the field is the user's own."""
    net = Net(dtype=torch.float32)
    field, y0 = odenet_cuda.compile(net), rows(5, 2, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = (solve(f, y0, [0.0, 1.0], rtol=1e-2, atol=1e-2).ys for f in (field, net))
    assert "autocast" in field.explain() and torch.equal(found, expected)


def test_errors_of_the_arguments_are_the_same():
    """What is wrong with a call is said as by the stepper."""
    field = odenet_cuda.compile(decay)
    for y0, t, options in (
        (rows(5, 2), [0.0, 0.0], {}),
        (rows(5, 2), [0.0, 1.0], {"rtol": -1.0}),
        (torch.tensor(1.0), [0.0, 1.0], {"step_control": "per_sample"}),
        (rows(5, 2), [0.0, 1.0], {"method": "euler", "step_control": "per_sample"}),
        (rows(5, 2), [0.0, 1.0], {"method": "none"}),
    ):
        raised = []
        for func in (field, decay):
            with pytest.raises((ValueError, TypeError)) as error:
                solve(func, y0, t, **options)
            raised.append((error.type, str(error.value)))
        assert raised[0] == raised[1]


@pytest.mark.parametrize(
    "func", [lambda t, y: y[:, :1], lambda t, y: (y, y), lambda t, y: None], ids=["shape", "tuple", "None"]
)
def test_wrong_results_of_func(func):
    """The stepper's own words where func returns something else than a slope."""
    raised = []
    for f in (odenet_cuda.compile(func), func):
        with pytest.raises((ValueError, TypeError)) as error:
            solve(f, rows(5, 2), [0.0, 1.0])
        raised.append((error.type, str(error.value)))
    assert raised[0] == raised[1]


def test_no_warnings():
    """A compiled solve and its gradient warn of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve(odenet_cuda.compile(Net()), rows(5, 2).requires_grad_(), TIMES).ys.sum().backward()
