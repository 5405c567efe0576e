"""What a step launches besides func and its product: kernels of ours and operations of torch, counted where they are called.

On the CPU the host goes the way here that it goes on CUDA, where every one of them is a launch.
"""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from odenet_cuda import _C, Event, solve
from odenet_cuda.gradients import augmented
from odenet_cuda.solvers import adaptive

D = torch.float64
MOST = 8  # in a step
# Operations of torch that launch nothing: views, and memory without values.
NOTHING = {
    "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "new_empty", "permute", "reshape",
    "select", "slice", "squeeze", "t", "transpose", "unsqueeze", "view", "_unsafe_view", "requires_grad_", "unbind",
}  # fmt: skip

# Methods of the stepper that launch one kernel each; the first two launch another for quadratures, where there are some.
KERNELS = [
    "quadrature", "error_and_step_size", "stage", "step_size", "norm", "euler", "first_step", "dense_output", "advance",
    "advance_and_stage", "error",
]  # fmt: skip


class Launches(TorchDispatchMode):
    """counts: of every kernel and operation, by name. Paused inside func and its product."""

    def __init__(self):
        super().__init__()
        self.counts: dict[str, int] = {}
        self.paused = 0

    def add(self, name: str) -> None:
        if not self.paused:
            self.counts[name] = self.counts.get(name, 0) + 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func.overloadpacket).removeprefix("aten.")
        if name not in NOTHING:
            self.add(name)
        return func(*args, **(kwargs or {}))

    def outside(self, function):
        """The function, in which nothing is counted."""

        def call(*args, **kwargs):
            self.paused += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.paused -= 1

        return call


@pytest.fixture
def launches(monkeypatch):
    mode = Launches()

    class Counted(_C.Stepper):
        def __init__(self, tables):
            super().__init__(tables)
            self.quadratures = tables.quadratures

    def counted(name):
        method = getattr(_C.Stepper, name)

        def call(self, *args):
            if name in ("quadrature", "error_and_step_size") and self.quadratures:
                mode.add("quadrature")
            if name != "quadrature":
                mode.add(name)
            return method(self, *args)

        return call

    for name in KERNELS:
        setattr(Counted, name, counted(name))
    monkeypatch.setattr(_C, "Stepper", Counted)
    monkeypatch.setattr(adaptive, "runs_ahead", lambda device: True)
    monkeypatch.setattr(augmented, "gradients", mode.outside(augmented.gradients))
    return mode


class Net(nn.Module):
    """layers: the number of parameters is twice as many."""

    def __init__(self, layers: int, mode: Launches):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers))).to(D)
        self.call = mode.outside(self._call)

    def _call(self, t, y):
        return torch.tanh(self.layers(y)) - y

    def forward(self, t, y):
        return self.call(t, y)


def counts(mode, net, steps, gradient=None, outputs=2, **options):
    """Launches of a solve of so many steps, or of the backward solve."""
    size = 1.0 / steps
    forced = {"first_step": size, "min_step": size, "max_step": size, **options}
    y0 = torch.linspace(-1, 1, 12, dtype=D).view(3, 4).requires_grad_(gradient is not None)
    t = torch.linspace(0, 1, outputs, dtype=D)
    mode.counts = {}
    if gradient is None:
        with mode, torch.no_grad():
            solve(net, y0, t, **forced)
        return dict(mode.counts)
    net.zero_grad()
    ys = solve(net, y0, t, gradient=gradient, **forced).ys
    mode.counts = {}
    with mode:
        ys[-1].sum().backward()
    return dict(mode.counts)


def each_step(mode, net, **options):
    """What 16 steps more launch, for each of them."""
    few, many = (counts(mode, net, steps, **options) for steps in (16, 32))
    return {name: (many.get(name, 0) - few.get(name, 0)) / 16 for name in many if many.get(name, 0) != few.get(name, 0)}


CONTROLS = ["joint", "per_sample"]


@pytest.mark.parametrize("outputs", [2, 5])
@pytest.mark.parametrize("control", CONTROLS)
def test_forward(launches, control, outputs):
    """Five stages, one launch for error and decision, one to move on and make the first stage of the next step, and one for
    outputs. A copy tells the host of the end."""
    found = each_step(launches, Net(2, launches), outputs=outputs, step_control=control)
    looks = found.pop("copy_", 0)
    expected = {"stage": 5, "error_and_step_size": 1, "advance_and_stage": 1}
    assert found == (expected if outputs == 2 else {**expected, "dense_output": 1})
    assert looks <= 1 and sum(found.values()) <= MOST


WAITS = ["cpu", "item", "tolist", "__int__", "__float__", "__bool__"]


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("control", CONTROLS)
def test_the_host_waits_once(launches, monkeypatch, control, recorded):
    """At the end, for all that it then reads: states of recorded steps, counts, statuses."""
    waits = []
    net, t = Net(2, launches), torch.linspace(0, 1, 3, dtype=D)
    adaptive_run = adaptive.AdaptiveSolver.run

    def counted(name):
        method = getattr(torch.Tensor, name)
        return lambda self: waits.append(name) or method(self)

    def run(self, start=None):
        for name in WAITS:
            monkeypatch.setattr(torch.Tensor, name, counted(name))
        return adaptive_run(self, start)

    monkeypatch.setattr(adaptive.AdaptiveSolver, "run", run)
    with torch.set_grad_enabled(recorded):
        solution = solve(net, torch.linspace(-1, 1, 12, dtype=D).view(3, 4), t, gradient="direct", step_control=control)
    assert waits == ["cpu"]
    assert solution.ys.requires_grad == recorded


def far_away(launches, control):
    """An event that does not come, whose function's own launches do not count, and how often it was called."""
    calls = []

    def function(t, y):
        calls.append(1)
        return y.sum(1) + 100 if control == "per_sample" else y.sum() + 100

    return Event(launches.outside(function)), calls


MOST_OF_EVENTS = 70  # of small operations on [parts, rows, values], whatever the state, and of four points of the step


@pytest.mark.parametrize("outputs", [2, 5])
@pytest.mark.parametrize("control", CONTROLS)
def test_events_leave_the_step_as_it_is(launches, monkeypatch, control, outputs):
    """The launches of a step are those without events, and those of looking at the events: four points and their values."""
    monkeypatch.setattr("odenet_cuda.solvers.events.runs_ahead", lambda device: True)
    event, calls = far_away(launches, control)
    options = {"outputs": outputs, "step_control": control}
    without = each_step(launches, Net(2, launches), **options)
    found = []
    for steps in (16, 32):
        calls.clear()
        found.append((counts(launches, Net(2, launches), steps, events=event, **options), len(calls)))
    (few, called), (many, called_more) = found
    more = {name: (many[name] - few.get(name, 0)) / 16 for name in many if many[name] != few.get(name, 0)}
    assert 4 <= (called_more - called) / 16 <= 6  # steps past the end count too, at most one in ten and two
    for name in ("error_and_step_size", "error", "step_size", "advance_and_stage", "dense_output"):
        assert more.get(name, 0) == without.get(name, 0)
    assert more.pop("stage") == without["stage"] + 4
    others = {name: count for name, count in more.items() if name not in without}
    assert sum(others.values()) <= MOST_OF_EVENTS


@pytest.mark.parametrize("control", CONTROLS)
def test_events_do_not_make_the_host_wait(launches, monkeypatch, control):
    """In the solve it waits once, at its end, as without events."""
    monkeypatch.setattr("odenet_cuda.solvers.events.runs_ahead", lambda device: True)
    event, _ = far_away(launches, control)
    waits, inside = [], adaptive.AdaptiveSolver.run

    def counted(name):
        method = getattr(torch.Tensor, name)
        return lambda self: waits.append(name) or method(self)

    def run(self, start=None):
        with pytest.MonkeyPatch.context() as patch:
            for name in WAITS:
                patch.setattr(torch.Tensor, name, counted(name))
            return inside(self, start)

    monkeypatch.setattr(adaptive.AdaptiveSolver, "run", run)
    y0, net = torch.linspace(-1, 1, 12, dtype=D).view(3, 4), Net(2, launches)
    for most in (0.1, 0.01):
        waits.clear()
        solve(net, y0, [0.0, 1.0], step_control=control, events=event, max_step=most)
        assert waits == ["cpu"]


@pytest.mark.parametrize("control", CONTROLS)
def test_a_domain_does_not_make_the_host_wait(launches, control):
    """Looking at the domain costs a few small operations a step, beside its own function, and the decision a launch more."""
    inside = lambda y: (y > -9).all(1) if control == "per_sample" else (y > -9).all()  # noqa: E731
    without = each_step(launches, Net(2, launches), step_control=control)
    found = each_step(launches, Net(2, launches), step_control=control, valid=launches.outside(inside))
    assert found.pop("stage") == without["stage"]
    assert found.pop("error") == found.pop("step_size") == found.pop("advance_and_stage") == 1
    assert sum(found.values()) <= 25


@pytest.mark.parametrize("seminorm", [False, True])
@pytest.mark.parametrize("layers", [1, 40])
def test_adjoint(launches, layers, seminorm):
    """The same for 2 parameters and for 80: their integral is one launch more."""
    options = {"adjoint_options": {"norm": "seminorm"}} if seminorm else {}
    found = each_step(launches, Net(layers, launches), gradient="adjoint", **options)
    looks = found.pop("copy_", 0)
    assert found == {"stage": 5, "error_and_step_size": 1, "advance_and_stage": 1, "quadrature": 1}
    assert looks <= 1 and sum(found.values()) <= MOST


@pytest.mark.parametrize("layers", [1, 40])
def test_per_sample_adjoint(launches, layers):
    """One more: the stages' cotangents weighted once the step is known, and the gradients of parameters added up."""
    found = each_step(launches, Net(layers, launches), gradient="adjoint", step_control="per_sample")
    assert found.pop("copy_") <= 1
    assert found == {"stage": 5 + 2, "error_and_step_size": 1, "advance_and_stage": 1}


@pytest.mark.parametrize("gradient", ["checkpoint", "direct"])
@pytest.mark.parametrize("control", CONTROLS)
def test_recorded_forward(launches, control, gradient):
    """What is kept of a step are copies: the state and the solver state of each, its times or its first slope."""
    y0 = torch.linspace(-1, 1, 12, dtype=D).view(3, 4).requires_grad_()
    net, found = Net(2, launches), []
    for steps in (16, 32):
        size = 1.0 / steps
        launches.counts = {}
        with launches:
            solve(net, y0, [0.0, 1.0], gradient=gradient, step_control=control, first_step=size, min_step=size, max_step=size)
        found.append(dict(launches.counts))
    each = {name: (found[1].get(name, 0) - found[0].get(name, 0)) / 16 for name in found[1]}
    assert each.pop("copy_") <= 1
    for name in ("where", "lift_fresh"):  # per sample, after the solve
        each.pop(name, None)
    copies = each.pop("clone")
    kept = {"stage": 6, "advance": 1}  # slopes with graphs, in memory that no kernel writes again
    move = kept if gradient == "direct" else {"stage": 5, "advance_and_stage": 1}
    assert copies == 3 and {name: count for name, count in each.items() if count} == {"error_and_step_size": 1, **move}


def test_start(launches):
    """What a solve launches besides its steps does not grow with the parameters or the steps."""
    few, many = (counts(launches, Net(2, launches), steps) for steps in (16, 32))
    looks = many.pop("copy_") - few.pop("copy_")
    assert 0 < looks < 16  # as the next steps' are fewer
    assert sum(few.values()) - 17 * 7 == sum(many.values()) - 33 * 7 < 25
