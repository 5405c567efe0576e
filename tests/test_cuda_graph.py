"""Solves whose host runs ahead of the device, and captured steps: on the CPU, with a stand-in for the graph."""

import copy
import threading
import warnings

import pytest
import torch
from graph_stand_ins import Capture, run_ahead
from problems import ADAPTIVE_METHODS, FIXED_METHODS
from torch import nn

from odenet_cuda import SolverError, solve
from odenet_cuda.graphed import capture as capturing
from odenet_cuda.graphed import loops, way_back
from odenet_cuda.graphed.calls import Calls
from odenet_cuda.graphed.capture import Graphs, Watch
from odenet_cuda.solvers import adaptive
from odenet_cuda.step_control import RUNNING, SUCCESS

pytestmark = pytest.mark.usefixtures("kernels_alone")  # which are what is captured

D = torch.float64
T = torch.tensor([0.0, 0.3, 1.0], dtype=D)


class Net(nn.Module):
    """wanted: its weights get gradients; then the steps of a solve are recorded, unless that is by the adjoint."""

    def __init__(self, wanted: bool = False):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)).to(D)
        self.scale = 1.0
        self.requires_grad_(wanted)

    def forward(self, t, y):
        return self.net(y) * self.scale - t * y


@pytest.fixture
def y0():
    return torch.linspace(-1, 1, 24, dtype=D).view(6, 4)


@pytest.fixture
def ahead(monkeypatch):
    """The host runs ahead, as it does on CUDA."""
    return run_ahead(monkeypatch, Capture())


def same(found, expected):
    assert torch.equal(found.ys, expected.ys) and torch.equal(found.y_last, expected.y_last)
    for name in ("nfe", "num_accepted", "num_rejected"):
        assert torch.equal(torch.as_tensor(getattr(found.stats, name)), torch.as_tensor(getattr(expected.stats, name))), name


OPTIONS = [{}, {"step_control": "per_sample"}, {"first_step": 0.01, "max_step": 0.1}, {"step_t": [0.5]}, {"controller": "PI"}]


@pytest.mark.parametrize("graph", [False, True, "loop"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_solves_are_the_same(y0, ahead, monkeypatch, options, graph):
    """Values, statistics and the number of useful calls, whether the host looks or not."""
    found = solve(Net(), y0, T, cuda_graph=graph, **options)
    monkeypatch.undo()
    same(found, solve(Net(), y0, T, **options))


@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
def test_methods(y0, ahead, monkeypatch, method):
    found = solve(Net(), y0, T, method=method, rtol=1e-4, atol=1e-5, cuda_graph=True)
    monkeypatch.undo()
    same(found, solve(Net(), y0, T, method=method, rtol=1e-4, atol=1e-5))


def test_failure(ahead):
    """The solve ends where it failed, and says so."""
    with pytest.raises(SolverError, match="at t = 1"):
        solve(lambda t, y: y * y, torch.ones(2, 1, dtype=D), [0.0, 2.0])
    with pytest.raises(SolverError):
        solve(Net(), torch.ones(2, 4, dtype=D), [0.0, 10.0], max_num_steps=3, cuda_graph=True)


def test_what_looks_at_each_step(y0, ahead):
    """Discontinuities and recorded steps are served without a graph, and right."""
    net = Net()
    solve(net, y0, T, jump_t=[0.5], cuda_graph=True)
    solve(net, y0.clone().requires_grad_(), T, gradient="direct", cuda_graph=True).ys.sum().backward()
    assert ahead.captured == 0


RECORDED = [{"gradient": "direct"}, {"gradient": "checkpoint"}, {"gradient": "direct", "regularizers": ["error", "kinetic"]}]
RECORDED += [{"gradient": "direct", "dense": True}, {"gradient": "quadrature"}]


@pytest.mark.parametrize("control", ["joint", "per_sample"])
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "fehlberg2"])
@pytest.mark.parametrize("way", RECORDED, ids=str)
def test_recorded_steps(y0, ahead, monkeypatch, way, method, control):
    """What a gradient needs of the steps is learnt after the solve; values, gradients and statistics are the same."""
    found = []
    looked = adaptive.AdaptiveSolver.looked_at_step
    if way["gradient"] != "quadrature":
        monkeypatch.setattr(adaptive.AdaptiveSolver, "looked_at_step", None)
    for undo in (False, True):
        if undo:
            monkeypatch.undo()
            assert adaptive.AdaptiveSolver.looked_at_step is looked
        net, start = Net(wanted=True), y0.clone().requires_grad_()
        times = T.clone().requires_grad_(way["gradient"] != "quadrature" and "regularizers" not in way)
        options = {"method": method, "rtol": 1e-4, "atol": 1e-5, "max_step": 0.2, "step_control": control}
        solution = solve(net, start, times, **options, **way)
        loss = solution.ys.square().sum() + sum(value.sum() for value in solution.regularizers.values())
        loss.backward()
        inside = [solution.interpolant(0.37)] if way.get("dense") else []
        grads = [start.grad, *([] if times.grad is None else [times.grad]), *(p.grad for p in net.parameters())]
        found.append((solution, [solution.ys.detach(), *inside, *grads]))
    same(found[0][0], found[1][0])
    for x, y in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


def test_a_thinned_tape_is_looked_at(y0, ahead):
    """With max_checkpoints the host looks at each step, for it forgets states on the way."""
    net, start = Net(wanted=True), y0.clone().requires_grad_()
    ys = solve(net, start, T, gradient="checkpoint", max_checkpoints=3, rtol=1e-6).ys
    grad = torch.autograd.grad(ys.square().sum(), start)[0]
    expected = torch.autograd.grad(solve(net, start, T, gradient="direct", rtol=1e-6).ys.square().sum(), start)[0]
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-14)


# ---- which solves share a step ----


def test_one_capture_for_many_solves(y0, ahead):
    net = Net()
    for i in range(3):
        found = solve(net, y0 + i, T, cuda_graph=True)
        assert ahead.captured == 1
        expected = solve(net, y0 + i, T + 0.0, cuda_graph=False)
        assert torch.equal(found.ys, expected.ys)
    assert ahead.replayed > 0 and len(capturing.graphs) == 1


def test_results_are_not_written_again(y0, ahead):
    net = Net()
    first = solve(net, y0, T, cuda_graph=True)
    kept = first.ys.clone(), first.y_last.clone()
    solve(net, y0 * 2, T, cuda_graph=True)
    assert torch.equal(first.ys, kept[0]) and torch.equal(first.y_last, kept[1])


def test_weights_updated_in_place_are_seen(y0, ahead):
    net = Net()
    before = solve(net, y0, T, cuda_graph=True).ys
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.5)
    after = solve(net, y0, T, cuda_graph=True).ys
    assert ahead.captured == 1 and not torch.equal(before, after)
    assert torch.equal(after, solve(net, y0, T).ys)


def test_other_times(y0, ahead):
    """Times are numbers in memory: another interval needs no other graph, nor does the other direction."""
    net = Net()
    for times in (T, T * 2, T + 1, -T):
        assert torch.equal(solve(net, y0, times, cuda_graph=True).ys, solve(net, y0, times).ys)
    assert ahead.captured == 1
    for count, times in ((2, T), (3, T * 0.4)):  # with a stop inside, and without
        found = solve(net, y0, times, step_t=[0.5], cuda_graph=True)
        assert ahead.captured == count and torch.equal(found.ys, solve(net, y0, times, step_t=[0.5]).ys)


CHANGES = {
    "weights": lambda net: setattr(net.net[0], "weight", nn.Parameter(net.net[0].weight.clone(), False)),
    "number": lambda net: setattr(net, "scale", 2.0),
    "operation": lambda net: net.net.__setitem__(1, nn.ReLU()),
    "module": lambda net: net.net.insert(1, nn.Hardtanh()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_step_is_captured_anew(y0, ahead, name):
    """Other memory, another number in Python, another operation."""
    net = Net()
    solve(net, y0, T, cuda_graph=True)
    CHANGES[name](net)
    found = solve(net, y0, T, cuda_graph=True)
    assert ahead.captured == 2 and torch.equal(found.ys, solve(net, y0, T).ys)


def test_what_the_key_holds(y0, ahead):
    net = Net()
    solve(net, y0, T, cuda_graph=True)
    others = [{"rtol": 1e-5}, {"method": "tsit5"}, {"controller": "PI"}, {"step_control": "per_sample"}, {"max_step": 0.5}]
    for count, options in enumerate(others, 2):
        solve(net, y0, T, cuda_graph=True, **options)
        assert ahead.captured == count
    solve(net, y0[:3], T, cuda_graph=True)
    solve(net, y0, T[[0, 2]], cuda_graph=True)
    assert ahead.captured == len(others) + 3


def test_copies_of_a_module(y0, ahead):
    """A copy has memory of its own, and takes no graph along."""
    net = Net()
    solve(net, y0, T, cuda_graph=True)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.net[0].weight.zero_()
    assert torch.equal(solve(twin, y0, T, cuda_graph=True).ys, solve(twin, y0, T).ys)
    assert ahead.captured == 2


class Clocked(Net):
    """The graph of a slope keeps the time, as a factor of the parameters."""

    def forward(self, t, y):
        return self.net(y) * t - y


@pytest.mark.parametrize("graph", [True, "loop"])
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "fehlberg2"])
@pytest.mark.parametrize("control", ["joint", "per_sample"])
def test_adjoint(y0, ahead, monkeypatch, control, method, graph):
    """The solve backwards is captured too, once for all intervals and training steps; weights change between them."""
    found = {}
    for mode in (graph, False):
        net, start = Clocked(wanted=True), y0.clone().requires_grad_()
        optimizer = torch.optim.SGD([*net.parameters(), start], lr=0.05)
        options = {"gradient": "adjoint", "rtol": 1e-5, "atol": 1e-5, "method": method, "step_control": control}
        found[mode] = []
        for _ in range(3):
            optimizer.zero_grad()
            solution = solve(net, start, T, cuda_graph=mode, **options)
            solution.ys.square().mean().backward()
            found[mode].append([start.grad.clone(), *(p.grad.clone() for p in net.parameters())])
            found[mode][-1].append(torch.tensor(solution.stats.nfe_backward))
            optimizer.step()
        if mode:
            assert ahead.captured == 2
            monkeypatch.undo()
    for one, other in zip(found[graph], found[False], strict=True):
        for x, y in zip(one[:-1], other[:-1], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)
        assert one[-1] == other[-1]


def test_threads(y0, ahead):
    """Two threads with one field never have one solver at a time."""
    net, expected, results = Net(), solve(Net(), y0, T).ys, []

    def work():
        for _ in range(5):
            results.append(solve(net, y0, T, cuda_graph=True).ys)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 15 and all(torch.equal(ys, expected) for ys in results)
    assert 1 <= ahead.captured <= 3


# ---- fixed grids: the whole solve is one graph ----

GRIDS = [{}, {"step_size": 0.1}, {"step_size": 0.25, "perturb": True}, {"step_size": 0.07, "interp": "cubic"}]


@pytest.mark.parametrize("method", FIXED_METHODS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_fixed_grids(y0, ahead, monkeypatch, grid, method):
    """The first solve of a kind is not captured, the second is, with outputs at nodes and between; odd numbers of steps too."""
    net = Net()
    found = [solve(net, y0 * i, T, method=method, cuda_graph=True, **grid) for i in (1, 2, 3)]
    assert (ahead.captured, ahead.replayed) == (1, 2)
    monkeypatch.undo()
    for i, solution in enumerate(found, 1):
        same(solution, solve(net, y0 * i, T, method=method, **grid))


def test_fixed_grids_at_other_times(y0, ahead):
    """They are numbers in memory, as long as outputs lie in the same places of the same steps."""
    net = Net()
    for times in (T, T * 2, T + 1, T[[0, 0, 2]] + torch.tensor([0, 0.7, 0], dtype=D)):
        assert torch.equal(solve(net, y0, times, method="rk4", cuda_graph=True).ys, solve(net, y0, times, method="rk4").ys)
    assert ahead.captured == 1 and ahead.replayed == 3
    inside = {"method": "rk4", "step_size": 0.2, "cuda_graph": True}
    for times in (T, T * 1.01):
        solve(net, y0, times, **inside)
    assert ahead.captured == 1  # the outputs lie elsewhere in their steps
    solve(net, y0, T * 1.01, **inside)
    assert ahead.captured == 2


def test_training_on_a_fixed_grid(y0, ahead, monkeypatch):
    """Forwards and by the adjoint, whose intervals share a graph; weights change between the steps."""
    times = torch.tensor([0.0, 0.2, 0.5, 0.6, 1.0], dtype=D)
    losses = {}
    for graph in (True, False):
        net = Net(wanted=True)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        losses[graph] = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = solve(net, y0, times, method="rk4", gradient="adjoint", cuda_graph=graph).ys.square().mean()
            loss.backward()
            optimizer.step()
            losses[graph].append(loss.item())
        if graph:
            assert ahead.captured == 2 and ahead.replayed == 3 + 4 * 4 - 1
            monkeypatch.undo()
    assert losses[True] == pytest.approx(losses[False], rel=1e-12)


WAYS = [{"gradient": "direct"}, {"gradient": "checkpoint"}, {"gradient": "checkpoint", "max_checkpoints": 2}]


@pytest.mark.parametrize("method", ["euler", "heun3", "rk4"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_gradients_on_fixed_grids(y0, ahead, monkeypatch, way, grid, method):
    """Solve and way back are two graphs from the second solve on; weights change, and the numbers are the same."""
    found = {}
    for graph in (True, False):
        net, start = Net(wanted=True), y0.clone().requires_grad_()
        optimizer = torch.optim.SGD([*net.parameters(), start], lr=0.05)
        found[graph] = []
        for _ in range(4):
            optimizer.zero_grad()
            solution = solve(net, start, T, method=method, cuda_graph=graph, **way, **grid)
            solution.ys.square().mean().backward()
            optimizer.step()
            found[graph].append([solution.ys.detach(), start.grad.clone(), *(p.grad.clone() for p in net.parameters())])
            found[graph][-1].append(torch.tensor(solution.stats.nfe))
            del solution  # and with it its graphs are free for the next
        if graph:
            assert (ahead.captured, ahead.replayed) == (2, 6)
            monkeypatch.undo()
    for one, other in zip(found[True], found[False], strict=True):
        for x, y in zip(one, other, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "adjoint"])
@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_autocast(ahead, monkeypatch, method, gradient):
    """Weights are cast in the graph: their updates are seen. The way back is made as it is outside of autocast."""
    found = {}
    for graph in (True, False):
        net = Net(wanted=True).float()
        found[graph] = []
        for i in range(3):
            if i == 1 and not graph and method == "dopri5" and gradient == "direct":
                gradient = "checkpoint"  # as which it is computed by graphs
            start = torch.linspace(-1, 1, 24).view(6, 4).requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                ys = solve(net, start, T, method=method, gradient=gradient, rtol=0.1, atol=0.1, cuda_graph=graph).ys
            found[graph] += [ys.detach(), *torch.autograd.grad(ys.square().sum(), [start, *net.parameters()])]
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.mul_(0.9)
            del ys
        if graph:
            assert ahead.captured == (3 if method == "dopri5" and gradient != "adjoint" else 2)
            monkeypatch.undo()
    for x, y in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_two_solves_before_their_gradients(y0, ahead):
    """Each has graphs for itself until its outputs are gone, and may be walked back twice."""
    net, start = Net(wanted=True), y0.clone().requires_grad_()
    options = {"method": "rk4", "gradient": "direct", "cuda_graph": True}
    for _ in range(2):
        solve(net, start, T, **options)
    assert ahead.captured == 2 and len(capturing.graphs) == 1
    losses = [solve(net, start * i, T, **options).ys.square().sum() for i in (1, 2, 3)]
    grads = [torch.autograd.grad(loss, start, retain_graph=True)[0] for loss in losses for _ in range(2)]
    for i in (1, 2, 3):
        expected = torch.autograd.grad(solve(net, start * i, T, method="rk4").ys.square().sum(), start)[0]
        for grad in grads[2 * i - 2 : 2 * i]:
            torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-14)
    held = len(capturing.graphs)
    del losses
    assert len(capturing.graphs) > held


def test_second_derivatives_and_changed_weights(y0, ahead):
    net, start = Net(wanted=True), y0.clone().requires_grad_()
    options = {"method": "rk4", "gradient": "direct", "cuda_graph": True}
    found = []
    for graph in (True, True, True, False):
        ys = solve(net, start, T, **{**options, "cuda_graph": graph}).ys
        first = torch.autograd.grad(ys.square().sum(), start, create_graph=True)[0]
        found.append(torch.autograd.grad(first.square().sum(), start)[0])
        del ys, first  # and with them the graphs are free for the next
    assert ahead.captured == 2 and ahead.replayed == 4
    for grad in found[:-1]:
        torch.testing.assert_close(grad, found[-1], rtol=1e-12, atol=1e-14)
    ys = solve(net, start, T, **options).ys
    with torch.no_grad():
        net.net[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ys.sum().backward()


REFUSED_GRADIENTS = {
    "regularizers": {"regularizers": ["kinetic"]},
    "dense=True": {"dense": True},
    "func is no module that depends on its parameters alone": {},
}


@pytest.mark.parametrize("words", REFUSED_GRADIENTS)
def test_gradients_without_a_graph(y0, ahead, words):
    net = Net(wanted=True)
    func = (lambda t, y: net(t, y)) if words.startswith("func") else net
    options = {"method": "rk4", "gradient": "direct", **REFUSED_GRADIENTS[words]}
    with pytest.warns(UserWarning, match=f"cuda_graph: {words}; the solve goes on"):
        ys = solve(func, y0, T, cuda_graph=True, **options).ys
    assert ahead.captured == 0 and torch.equal(ys, solve(func, y0, T, **options).ys)


def test_long_grids_are_not_captured(y0, ahead):
    with pytest.warns(UserWarning, match="the grid takes 4400 calls of func, a graph at most 4096"):
        solve(Net(), y0, [0.0, 1.0], method="rk4", step_size=1 / 1100, cuda_graph=True)
    assert ahead.captured == 0


def test_a_fixed_solve_whose_capture_fails(y0, ahead, monkeypatch):
    def fails(step, device):
        raise RuntimeError("not permitted")

    monkeypatch.setattr(capturing, "capture", fails)
    solve(Net(), y0, T, method="rk4", cuda_graph=True)
    net = Net()
    solve(net, y0, T, method="rk4", cuda_graph=True)
    with pytest.warns(UserWarning, match="cannot be captured: not permitted"):
        found = solve(net, y0 * 2, T, method="rk4", cuda_graph=True)
    same(found, solve(net, y0 * 2, T, method="rk4"))


# ---- the device repeats the step ----


@pytest.mark.parametrize("steps", [1, 3, 256])
def test_launches_of_many_steps(y0, ahead, monkeypatch, steps):
    """After a first step from the host, as many launches as the rest takes; in a second solve from the start."""
    monkeypatch.setattr(capturing, "_STEPS_A_LAUNCH", steps)
    net, made = Net(), 0
    for count in (1, 0):
        found = solve(net, y0, T, rtol=1e-8, cuda_graph="loop")
        tried = int(found.stats.num_accepted + found.stats.num_rejected)
        made += -(-(tried - count) // steps)
        assert (ahead.captured, ahead.replayed) == (1, made)
    same(found, solve(net, y0, T, rtol=1e-8))


def test_adjoint_by_launches_of_many_steps(y0, ahead):
    grads = []
    for graph in ("loop", False):
        net = Net(wanted=True)
        solve(net, y0, T, gradient="adjoint", rtol=1e-6, cuda_graph=graph).ys.square().sum().backward()
        grads.append([p.grad for p in net.parameters()])
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)
    assert ahead.captured == 2


def test_random_numbers_are_not_repeated(y0, ahead):
    """torch's generators move on from the host, so that every step would draw the same."""
    with pytest.warns(UserWarning, match="func draws random numbers; each step is replayed"):
        solve(lambda t, y: torch.dropout(y, 0.5, True), y0, [0.0, 0.1], max_num_steps=10**4, rtol=0.1, cuda_graph="loop")
    assert ahead.captured == 1 and ahead.replayed > 1


def test_a_device_that_cannot_repeat(y0, ahead, monkeypatch):
    def fails(step, status):
        raise RuntimeError("CUDA: operation not supported")

    monkeypatch.setattr(capturing, "repeat", fails)
    net = Net()
    with pytest.warns(UserWarning, match="cannot repeat the step: CUDA: operation not supported; each is replayed"):
        found = solve(net, y0, T, cuda_graph="loop")
    same(found, solve(net, y0, T))
    assert ahead.captured == 1 and ahead.replayed > 1


def test_names_of_the_option(y0):
    with pytest.raises(ValueError, match=r"cuda_graph must be one of \('step', 'loop'\), got 'whole'"):
        solve(Net(), y0, T, cuda_graph="whole")


# ---- what cannot be captured ----

REFUSED = {
    "_local_scalar_dense": lambda t, y: y * float(y.sum() > 0),
    "nonzero": lambda t, y: y + 0 * y.new_tensor(len(torch.nonzero(y))),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(y0, ahead, name):
    """It is named, and the solve goes on without a graph."""
    with pytest.warns(UserWarning, match=f"cuda_graph: func waits for the device, {name}"):
        found = solve(REFUSED[name], y0, T, cuda_graph=True)
    assert ahead.captured == 0 and torch.equal(found.ys, solve(REFUSED[name], y0, T).ys)


def test_norms_of_the_user(y0, ahead):
    with pytest.warns(UserWarning, match="a norm of the user"):
        solve(Net(), y0, T, norm=lambda x: x.abs().max(), cuda_graph=True)


@pytest.mark.parametrize("method, gradient", [("dopri5", "adjoint"), ("rk4", "adjoint"), ("rk4", "direct")])
def test_inside_a_graph_of_the_user(y0, ahead, monkeypatch, method, gradient):
    """There is no graph in a graph."""
    for module in (loops, way_back):
        monkeypatch.setattr(module, "being_captured", lambda device: True)
    net = Net(wanted=gradient == "direct")
    for _ in range(2):
        with pytest.warns(UserWarning, match="a graph is being captured"):
            solve(net, y0, T, method=method, gradient=gradient, cuda_graph=True)
    assert ahead.captured == 0


def test_no_adaptive_solve_in_a_graph_of_the_user(y0, ahead, monkeypatch):
    """The host could not learn of its end."""
    monkeypatch.setattr("odenet_cuda.solvers.ahead.being_captured", lambda device: True)
    with pytest.raises(RuntimeError, match="cannot be part of a CUDA graph that the caller captures"):
        solve(Net(), y0, T)


def test_capture_that_fails(y0, ahead, monkeypatch):
    def fails(step, device):
        raise RuntimeError("operation not permitted when stream is capturing\nmore words")

    monkeypatch.setattr(capturing, "capture", fails)
    with pytest.warns(UserWarning, match="cannot be captured: operation not permitted when stream is capturing; the solve"):
        found = solve(Net(), y0, T, cuda_graph=True)
    assert torch.equal(found.ys, solve(Net(), y0, T).ys) and len(capturing.graphs) == 0


def test_without_the_option_nothing_is_captured(y0, ahead):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve(Net(), y0, T)
    assert ahead.captured == 0


# ---- the parts ----


def test_calls_tell_work_apart():
    weight, other, y = torch.ones(3), torch.ones(3), torch.zeros(3)

    def key(func, y=y):
        with Calls([y]) as calls:
            func(y)
        return calls.key

    assert key(lambda y: y * weight + 1) == key(lambda y: y * weight + 1)
    assert key(lambda y: y * weight, torch.zeros(3)) == key(lambda y: y * weight)  # the state may lie elsewhere
    different = [lambda y: y * weight, lambda y: y * other, lambda y: y * weight + 2, lambda y: y * weight + weight]
    different += [lambda y: y * weight[:1], lambda y: (y * weight).sum(), lambda y: y * y, lambda y: weight * y]
    assert len({key(func) for func in different}) == len(different)


class Passed:
    """Stands for a fence."""

    waited = passed = 0

    def pass_(self):
        Passed.passed += 1

    def wait(self):
        Passed.waited += 1


def key(func, own, *more):
    calls = Calls([own])
    with calls:
        k = func(own)
    calls.returned([k])
    return (calls.key, *more)


def test_calls_tell_results_and_numbers_apart():
    own, a, b = torch.ones(3, device="meta"), torch.ones(3, device="meta"), torch.tensor(2.0)
    assert key(lambda y: y * b, own) == key(lambda y: y * b, own)
    before = key(lambda y: y * b, own)
    b.fill_(5.0)  # a kernel on a device is launched with the number
    assert key(lambda y: y * b, own) != before
    u, v = (lambda y: [y * 1, y + 1][0]), (lambda y: [y * 1, y + 1][1])
    assert key(u, own) != key(v, own)
    del a


REFUSED_CALLS = {
    "by a mask": lambda y: y[y > 0],
    "_linalg_check_errors": lambda y: torch.linalg.inv(torch.eye(3)) @ y,
    "sparse or made of others": lambda y: torch.sparse.mm(torch.eye(3).to_sparse(), y[:, None]),
}


@pytest.mark.parametrize("words", REFUSED_CALLS)
def test_calls_that_cannot_be_captured(words):
    calls = Calls([torch.ones(3)])
    with calls:
        REFUSED_CALLS[words](torch.ones(3))
    assert words in calls.refusal


def test_settings_that_choose_kernels(y0, ahead):
    net, before = Net(), torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high", "highest"):
            torch.set_float32_matmul_precision(precision)
            solve(net, y0, T, cuda_graph=True)
    finally:
        torch.set_float32_matmul_precision(before)
    assert ahead.captured == 2


def test_adjoint_for_other_parameters(y0, ahead):
    """The gradients are those of the parameters asked for, in their order; also of a method whose first slope has no weight."""
    first, second = (torch.linspace(-1, 1, 16, dtype=D).view(4, 4).mul(x).requires_grad_() for x in (1.0, -0.5))
    field = lambda t, y: torch.tanh(y @ second) @ first * t  # noqa: E731
    for method in ({}, {"method": "midpoint", "step_size": 0.1}):
        for params in ((first, second), (second, first), (first,), (second,)):
            found = {}
            for graph in (True, False):
                options = {"gradient": "adjoint", "adjoint_params": params, "cuda_graph": graph, "rtol": 1e-7, "atol": 1e-7}
                ys = solve(field, y0, T, **options, **method).ys
                found[graph] = torch.autograd.grad(ys.square().sum(), params)
            for x, y in zip(found[True], found[False], strict=True):
                torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)
    assert ahead.captured >= 4


def test_cache_is_bounded():
    """Who takes one waits for its last use on the device, and the host does before one goes."""
    graphs = Graphs(limit=3)
    for i in range(10):
        graphs.give(i % 5, object(), Passed())
    assert len(graphs) == 3 and graphs.take(0) is None and graphs.take(4) is not None
    assert (Passed.waited, Passed.passed) == (7, 1)
    assert len(graphs) == 2
    graphs.clear()
    assert len(graphs) == 0 and graphs.take(4) is None


class Event:
    """Stands for an event of CUDA: the device is `behind` steps behind."""

    def __init__(self, behind):
        self.behind, self.asked, self.waited = behind, 0, 0

    def record(self, stream=None):
        self.asked = 0

    def query(self):
        self.asked += 1
        return self.asked > self.behind

    def synchronize(self):
        self.waited += 1


@pytest.mark.parametrize("behind", [0, 3, 1000])
@pytest.mark.parametrize(
    "end, expected, past_end",
    [(1, 0, 1), (2, 0, 1), (10, 0, 1), (19, 0, 2), (37, 0, 4), (200, 0, 14), (1000, 0, 31), (200, 190, 14), (200, 300, 100)],
)
def test_the_end_is_learnt_late(end, expected, past_end, behind):
    """An eighth of the steps past the end at most, or the square root of their number, or one; unless more were expected."""
    status = torch.full((3,), RUNNING, dtype=D)
    watch = Watch(status, expected, on_device=False)
    watch._event = Event(behind)
    for done in range(1, 2000):
        if done == end:
            status[:] = SUCCESS
        if watch.ended(done):
            break
    assert end <= done <= end + past_end


@pytest.mark.parametrize("behind", [0, 1000])
def test_looks_grow_fewer(behind):
    """With the steps that were made; the host waits at each where the device is behind, and never where it is not."""
    for end, looks in {10: 10, 37: 26, 100: 41, 1000: 124}.items():
        status = torch.full((3,), RUNNING, dtype=D)
        watch = Watch(status, on_device=False)
        watch._event, asked = Event(behind), []
        for done in range(1, 2 * end):
            status[:] = SUCCESS if done >= end else RUNNING
            if watch.ended(done):
                break
            asked += [watch._asked] if watch._asked not in (0, *asked[-1:]) else []
        assert len(asked) <= looks and watch._event.waited == (len(asked) if behind else 0)


def test_the_end_is_that_of_all_samples():
    status = torch.tensor([SUCCESS, RUNNING], dtype=D)
    watch = Watch(status, on_device=False)
    assert not any([watch.ended(step) for step in range(1, 50)])
    status[1] = SUCCESS
    assert any([watch.ended(step) for step in range(50, 56)])


def test_the_host_waits_and_looks_seldom():
    watch = Watch(torch.full((1,), RUNNING, dtype=D), on_device=False)
    watch._event = event = Event(5)
    looks = set()
    for step in range(1, 400):
        assert not watch.ended(step)
        looks.add(watch._asked)
    assert 0 < event.waited < 100 and len(looks) < 100


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.parametrize("wanted", [False, True], ids=["forward", "adjoint"])
@pytest.mark.parametrize(
    "graph, method, gradient",
    [
        ("step", "dopri5", "adjoint"),
        ("loop", "dopri5", "adjoint"),
        *(("step", "rk4", g) for g in ("adjoint", "direct", "checkpoint")),
    ],
)
def test_gpu(y0, graph, method, gradient, wanted):
    """What is replayed gives what single launches give; weights updated between solves are seen."""
    net, start = Net(wanted).cuda(), y0.cuda().requires_grad_(wanted)
    options = {"method": method, "step_size": 0.05} if method == "rk4" else {"rtol": 1e-7, "atol": 1e-7}
    for _ in range(3):
        grads = []
        for used in (graph, False):
            ys = solve(net, start, T, gradient=gradient, cuda_graph=used, **options).ys
            grads.append([ys, *(torch.autograd.grad(ys.square().sum(), [start, *net.parameters()]) if wanted else ())])
        for found, expected in zip(*grads, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(0.9)
    assert len(capturing.graphs) > 0


@pytest.mark.gpu
def test_gpu_does_not_wait(y0):
    """Between the start and the end of a solve nothing synchronises: torch would raise."""
    net, start = Net().cuda(), y0.cuda()
    solver = adaptive.AdaptiveSolver.__dict__["_step"]
    waits = []

    def step(self):
        torch.cuda.set_sync_debug_mode("error")
        try:
            solver(self)
        except RuntimeError as error:
            waits.append(error)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adaptive.AdaptiveSolver, "_step", step)
        solve(net, start, T)
    assert not waits
