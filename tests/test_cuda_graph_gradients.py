"""Gradients of adaptive solves by captured steps, forwards and back: on the CPU, with a stand-in for the graphs."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from graph_stand_ins import Graph, run_ahead
from test_cuda_graph import Clocked, Net, T, same, y0  # noqa: F401

from odenet_cuda import SolverError, solve
from odenet_cuda.graphed import capture as capturing
from odenet_cuda.graphed.steps import GraphedSteps

pytestmark = pytest.mark.usefixtures("kernels_alone")  # which are what is captured

D = torch.float64
WAYS = ["direct", "checkpoint"]
FSAL = ["dopri5", "dopri8", "tsit5", "bosh3"]
OPTIONS = {"rtol": 1e-4, "atol": 1e-5, "max_step": 0.2}


@pytest.fixture
def ahead(monkeypatch):
    """The host runs ahead, as it does on CUDA. A replay makes what was done, where it was done, without Python."""
    return run_ahead(monkeypatch, Graph())


def trained(way, options, times, graph, solves=4, wanted=True):
    """Values, gradients, and statistics of solves whose weights and start change from one to the next."""
    net, start = Net(wanted), torch.linspace(-1, 1, 24, dtype=D).view(6, 4).requires_grad_()
    optimizer = torch.optim.SGD([start, *(net.parameters() if wanted else ())], lr=0.05)
    found = []
    for _ in range(solves):
        optimizer.zero_grad()
        solution = solve(net, start, times, gradient=way, cuda_graph=graph, **{**OPTIONS, **options})
        weights = torch.cos(torch.arange(solution.ys.numel(), dtype=D)).view_as(solution.ys)
        (solution.ys.square() * weights).sum().backward()
        optimizer.step()
        found.append((solution, [start.grad.clone(), *(p.grad.clone() for p in net.parameters() if wanted)]))
        del solution
        gc.collect()  # its graphs are free for the next
        found[-1] = copy.deepcopy(_plain(*found[-1]))
    return found


def _plain(solution, grads):
    solution.ys = solution.ys.detach()
    return solution, grads


def compare(found, expected):
    for (one, grads), (other, others) in zip(found, expected, strict=True):
        torch.testing.assert_close(one.ys, other.ys, rtol=1e-12, atol=1e-14)
        for name in ("nfe", "num_accepted", "num_rejected"):
            assert torch.equal(torch.as_tensor(getattr(one.stats, name)), torch.as_tensor(getattr(other.stats, name))), name
        for x, y in zip(grads, others, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("control", ["joint", "per_sample"])
@pytest.mark.parametrize("method", FSAL)
@pytest.mark.parametrize("way", WAYS)
def test_training(ahead, monkeypatch, way, method, control):
    """From the second solve on every step is a replay, but for the first of each solve that captures, which is made before."""
    options = {"method": method, "step_control": control}
    found = trained(way, options, T, True)
    steps = [int(torch.as_tensor(s.stats.num_accepted + s.stats.num_rejected).max()) for s, _ in found]
    back = [s.stats.nfe_backward for s, _ in found]
    assert ahead.captured == 3 and ahead.replayed >= sum(steps[1:]) - 1
    monkeypatch.undo()
    expected = trained(way, options, T, False)
    compare(found, expected)
    again = [s.stats.nfe_backward for s, _ in trained("checkpoint", options, T, False)]
    assert back[0] in (0, again[0]) and all(0 < a <= b for a, b in zip(back[1:], again[1:], strict=True))


@pytest.mark.parametrize("method", ["dopri5", "fehlberg2", "rk4"])
@pytest.mark.parametrize("control", ["joint", "per_sample"])
def test_adjoint(ahead, monkeypatch, control, method):
    """The same of the adjoint, whose integral for the weights is in the graph."""
    if (method, control) == ("rk4", "per_sample"):
        pytest.skip("a grid has no step control")
    found = {}
    for graph in (True, False):
        net, start = Clocked(wanted=True), torch.linspace(-1, 1, 24, dtype=D).view(6, 4).requires_grad_()
        optimizer = torch.optim.SGD([start, *net.parameters()], lr=0.05)
        options = {"gradient": "adjoint", "method": method, **({"step_size": 0.1} if method == "rk4" else OPTIONS)}
        found[graph] = []
        for _ in range(3):
            optimizer.zero_grad()
            ys = solve(net, start, T, step_control=control, cuda_graph=graph, **options).ys
            ys.square().sum().backward()
            found[graph].append([ys.detach(), start.grad.clone(), *(p.grad.clone() for p in net.parameters())])
            optimizer.step()
        if graph:
            assert ahead.captured >= 2
            monkeypatch.undo()
    for one, other in zip(found[True], found[False], strict=True):
        for x, y in zip(one, other, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("times", [[0.0, 1.0], [0.0, 0.01, 0.02, 0.03, 0.5, 0.6, 1.0], [1.0, 0.4, 0.0]], ids=str)
@pytest.mark.parametrize("control", ["joint", "per_sample"])
def test_outputs(ahead, monkeypatch, times, control):
    """None between the ends, for which nothing is captured; many in one step; back in time."""
    found = trained("checkpoint", {"step_control": control}, times, True, 3)
    assert ahead.captured == (2 if len(times) == 2 else 3)
    monkeypatch.undo()
    compare(found, trained("checkpoint", {"step_control": control}, times, False, 3))


@pytest.mark.parametrize("options", [{"first_step": 0.01}, {"step_t": [0.5]}, {"controller": "PI"}], ids=str)
def test_options(ahead, monkeypatch, options):
    found = trained("direct", options, T, True, 3)
    assert ahead.captured == 3
    monkeypatch.undo()
    compare(found, trained("direct", options, T, False, 3))


def test_frozen_weights(ahead, monkeypatch):
    found = trained("checkpoint", {}, T, True, 3, wanted=False)
    assert ahead.captured == 3
    monkeypatch.undo()
    compare(found, trained("checkpoint", {}, T, False, 3, wanted=False))


class Pair(torch.nn.Module):
    """Two leaves, of which one has no gradient of its own; a parameter that is not used."""

    def __init__(self):
        super().__init__()
        self.a, self.unused = (torch.nn.Parameter(torch.tensor(x, dtype=D)) for x in (0.7, 1.0))

    def forward(self, t, y):
        x, z = y
        return torch.tanh(self.a * x) * z.sum(1, keepdim=True), -z * x.square().sum(1, keepdim=True) + torch.cos(t)


def test_leaves_and_unused_parameters(ahead, monkeypatch):
    found = {}
    for graph in (True, False):
        func = Pair()
        for _ in range(3):
            x, z = torch.linspace(-1, 1, 6, dtype=D).view(3, 2).requires_grad_(), torch.linspace(0, 1, 9, dtype=D).view(3, 3)
            solution = solve(func, (x, z), T, gradient="direct", cuda_graph=graph, **OPTIONS)
            loss = solution.ys[0].square().sum() + solution.ys[1].sum()
            grads = torch.autograd.grad(loss, [x, func.a, func.unused], allow_unused=True)
            found.setdefault(graph, []).append([*(y.detach() for y in solution.ys), *grads])
            del solution, loss
        if graph:
            assert ahead.captured == 3
            monkeypatch.undo()
    for one, other in zip(found[True], found[False], strict=True):
        assert one[-1] is None and other[-1] is None
        for a, b in zip(one[:-1], other[:-1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_two_solves_before_their_gradients(y0, ahead):  # noqa: F811
    """Each has graphs for itself until its outputs are gone, and may be walked back twice."""
    net, start = Net(wanted=True), y0.clone().requires_grad_()
    options = {"gradient": "checkpoint", "cuda_graph": True, **OPTIONS}
    for _ in range(2):
        solve(net, start, T, **options)
    assert ahead.captured == 3 and len(capturing.graphs) == 1
    losses = [solve(net, start * i, T, **options).ys.square().sum() for i in (1, 2, 3)]
    grads = [torch.autograd.grad(loss, start, retain_graph=True)[0] for loss in losses for _ in range(2)]
    for i in (1, 2, 3):
        expected = torch.autograd.grad(solve(net, start * i, T, **OPTIONS).ys.square().sum(), start)[0]
        for grad in grads[2 * i - 2 : 2 * i]:
            torch.testing.assert_close(grad, expected, rtol=1e-11, atol=1e-13)
    held = len(capturing.graphs)
    del losses
    assert len(capturing.graphs) > held


def test_second_derivatives_and_changed_weights(y0, ahead):  # noqa: F811
    net, start = Net(wanted=True), y0.clone().requires_grad_()
    found = []
    for graph in (True, True, True, False):
        ys = solve(net, start, T, gradient="direct", cuda_graph=graph, **OPTIONS).ys
        first = torch.autograd.grad(ys.square().sum(), start, create_graph=True)[0]
        found.append(torch.autograd.grad(first.square().sum(), start)[0])
        del ys, first  # and with them the graphs are free for the next
    assert ahead.captured == 3
    for grad in found[:-1]:
        torch.testing.assert_close(grad, found[-1], rtol=1e-11, atol=1e-13)
    ys = solve(net, start, T, gradient="direct", cuda_graph=True, **OPTIONS).ys
    with torch.no_grad():
        net.net[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ys.sum().backward()


def test_failed_solves(y0, ahead):  # noqa: F811
    """A failure is told as without graphs; a solve that accepted no step has a gradient too; the next one is right."""
    net = Net(wanted=True)
    options = {"gradient": "checkpoint", "cuda_graph": True, "rtol": 1e-8, "atol": 1e-8}
    for _ in range(3):
        with pytest.raises(SolverError, match="max_num_steps"):
            solve(net, y0, T, max_num_steps=3, **options)
    start = y0.clone().requires_grad_()
    for _ in range(3):
        found = solve(net, start, T, first_step=1.0, max_num_steps=1, on_failure="return", **options)
        assert int(found.stats.num_accepted) == 0
        grad = torch.autograd.grad(found.ys[0].sum(), start)[0]
        assert torch.equal(grad, torch.ones_like(grad))
    for graph in (True, True, False):
        ys = solve(net, start, T, **{**options, "cuda_graph": graph}).ys
        found = torch.autograd.grad(ys.square().sum(), start)[0]
    expected = torch.autograd.grad(solve(net, start, T, rtol=1e-8, atol=1e-8).ys.square().sum(), start)[0]
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


REFUSED = {
    "max_checkpoints": {"gradient": "checkpoint", "max_checkpoints": 3},
    "jump_t": {"jump_t": [0.5]},
    "a gradient for t": {},
    "func is no module that depends on its parameters alone": {},
    "fehlberg2 begins a step with the last slope of the step before": {"method": "fehlberg2"},
    "func draws random numbers": {},
    "a norm of the user": {"norm": lambda x: x.abs().max()},
    "parameters of 16 bits": {},
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_served_without_graphs(y0, ahead, words):  # noqa: F811
    net, times, start = Net(wanted=True), T.clone(), y0.clone()
    func = net
    if words.startswith("func is"):
        func = lambda t, y: net(t, y)  # noqa: E731
    elif words.startswith("func draws"):
        net.net.append(torch.nn.Dropout(0.1))
    elif words == "a gradient for t":
        times.requires_grad_()
    elif words.startswith("parameters"):
        net, start = net.to(torch.bfloat16), start.to(torch.bfloat16)
        func = net
    options = {"gradient": "direct", **OPTIONS, "rtol": 1e-2, "atol": 1e-2, **REFUSED[words]}
    with pytest.warns(UserWarning, match=words):
        ys = solve(func, start, times, cuda_graph=True, **options).ys
    ys.sum().backward()
    assert net.net[0].weight.grad is not None and ahead.captured == 0


def solved(net, start, times, graph, **options):
    """Values and gradients."""
    ys = solve(net, start, times, gradient="checkpoint", cuda_graph=graph, **{**OPTIONS, **options}).ys
    return [ys.detach(), *torch.autograd.grad(ys.square().sum(), [start, *(p for p in net.parameters() if p.requires_grad)])]


@pytest.mark.parametrize("control", ["joint", "per_sample"])
def test_other_times_and_first_steps(ahead, control):
    """The same graphs serve them: they are numbers in memory, and on the tape of each solve."""
    net, start = Net(wanted=True), torch.linspace(-1, 1, 24, dtype=D).view(6, 4).requires_grad_()
    cases = [([0.0, 0.3, 1.0], {})] * 2 + [
        ([0.0, 0.31, 1.0], {}),
        ([0.1, 0.6, 2.0], {}),
        ([0.0, 0.5, 1.0], {"first_step": 0.05}),
    ]
    for times, options in cases:
        found, expected = (solved(net, start, times, graph, step_control=control, **options) for graph in (True, False))
        gc.collect()
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-13)
    assert ahead.captured == 3


def test_frozen_weights_that_change(y0, ahead):  # noqa: F811
    """Between a solve and its backward pass: a replay would mix what was with what is."""
    for method in ({"method": "rk4"}, {}):
        net, start = Net(wanted=True), y0.clone().requires_grad_()
        net.net[0].requires_grad_(False)
        for _ in range(2):
            ys = solve(net, start, T, gradient="direct", cuda_graph=True, **OPTIONS, **method).ys
        with torch.no_grad():
            net.net[0].weight.mul_(3)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            ys.sum().backward()


def test_hooks_for_saved_tensors(y0, ahead):  # noqa: F811
    """torch.utils.checkpoint solves twice and must find the same."""
    net, start = Net(wanted=True), y0.clone().requires_grad_()
    for _ in range(2):
        solve(net, start, T, gradient="direct", cuda_graph=True, **OPTIONS)
    run = lambda x: solve(net, x, T, gradient="direct", cuda_graph=True, **OPTIONS).ys  # noqa: E731
    with pytest.warns(UserWarning, match="hooks for saved tensors are active"):
        ys = torch.utils.checkpoint.checkpoint(run, start, use_reentrant=False)
        found = torch.autograd.grad(ys.square().sum(), start)[0]
    expected = torch.autograd.grad(solve(net, start, T, **OPTIONS).ys.square().sum(), start)[0]
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


def test_kept_graphs_hold_no_graph_of_autograd(ahead):
    """What y0 was made from goes with the solve."""
    net = Net(wanted=True)
    for options in (OPTIONS, {"method": "rk4"}):
        for way in WAYS:
            for _ in range(2):
                upstream = torch.ones(6, 4, dtype=D, requires_grad=True)
                start = upstream * 1
                node = weakref.ref(start)
                solve(net, start, T, gradient=way, cuda_graph=True, **options).ys.sum().backward()
                del start
                gc.collect()
                assert node() is None


def test_failed_captures_are_remembered(y0, ahead, monkeypatch):  # noqa: F811
    """They are not tried at each solve."""
    tried = []

    def failing(step, device):
        tried.append(step)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(capturing, "capture", failing)
    net, start = Net(wanted=True), y0.clone().requires_grad_()
    for options in ({"gradient": "direct"}, {"gradient": "direct", "method": "rk4"}, {"gradient": "adjoint"}):
        tried.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(5):
                solve(net, start, T, cuda_graph=True, **{**OPTIONS, **options}).ys.sum().backward()
        assert len(tried) == (2 if options["gradient"] == "adjoint" else 1)


def test_a_capture_waits_for_no_other(y0, ahead, monkeypatch):  # noqa: F811
    """Where another thread captures, the solve goes on without a graph, and the next one has one."""
    capture, busy = capturing.capture, [True]

    def sometimes(step, device):
        if busy[0]:
            raise capturing.Busy("another thread captures a graph")
        return capture(step, device)

    monkeypatch.setattr(capturing, "capture", sometimes)
    net, start = Net(wanted=True), y0.clone().requires_grad_()
    expected = solved(net, start, T, False)
    for busy[0] in (True, True, True, False, False):
        found = solved(net, start, T, True)
        gc.collect()
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-13)
    assert ahead.captured == 3


@pytest.mark.parametrize("method", [{"method": "rk4"}, OPTIONS], ids=str)
def test_chosen_parameters(y0, ahead, method):  # noqa: F811
    """`direct` has gradients for all that func depends on, `checkpoint` for those asked for."""
    net, start = Net(wanted=True), y0.clone().requires_grad_()
    for way in WAYS:
        options = {"gradient": way, "adjoint_params": [net.net[0].weight], **method}
        for _ in range(3):
            with pytest.warns(UserWarning, match="adjoint_params"):
                ys = solve(net, start, T, cuda_graph=True, **options).ys
        grads = torch.autograd.grad(ys.sum(), list(net.parameters()), allow_unused=True)
        assert [grad is not None for grad in grads] == [way == "direct" or i == 0 for i in range(len(grads))]


@pytest.mark.parametrize("fails", [1, 2, 3])
def test_captures_that_fail(y0, ahead, monkeypatch, fails):  # noqa: F811
    """Forwards, back, or back with outputs: the solve and its gradient go on without graphs, in words."""
    capture = capturing.capture

    def failing(step, device):
        if ahead.captured + 1 == fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        return capture(step, device)

    monkeypatch.setattr(capturing, "capture", failing)
    net, start = Net(wanted=True), y0.clone().requires_grad_()
    expected = torch.autograd.grad(solve(net, start, T, **OPTIONS).ys.square().sum(), start)[0]
    solve(net, start, T, gradient="direct", cuda_graph=True, **OPTIONS)
    with pytest.warns(UserWarning, match="func cannot be captured: operation not permitted"):
        solution = solve(net, start, T, gradient="direct", cuda_graph=True, **OPTIONS)
    same(solution, solve(net, start, T, **OPTIONS))
    grad = torch.autograd.grad(solution.ys.square().sum(), start)[0]
    torch.testing.assert_close(grad, expected, rtol=1e-11, atol=1e-13)


def test_the_memory_of_a_solve(ahead):
    """Steps lie on the tape as states alone: what func computes is not kept."""
    net, start = Net(wanted=True), torch.ones(6, 4, dtype=D, requires_grad=True)
    for _ in range(2):
        solution = solve(net, start, T, gradient="direct", cuda_graph=True, **OPTIONS)
    lease = solution.ys.grad_fn.lease
    assert isinstance(lease.graphed, GraphedSteps)
    steps = lease.graphed._steps()
    assert len(steps) == int(solution.stats.num_accepted) and all(step.evaluations == () and step.k == [] for step in steps)


@pytest.mark.gpu
@pytest.mark.parametrize("control", ["joint", "per_sample"])
@pytest.mark.parametrize("way", WAYS)
def test_gpu(way, control):
    """Captured and replayed on a GPU, beside the same without graphs."""
    found = {}
    for graph in (True, False):
        net, start = Net(True).cuda(), torch.linspace(-1, 1, 24, dtype=D, device="cuda").view(6, 4).requires_grad_()
        optimizer = torch.optim.SGD([*net.parameters(), start], lr=0.05)
        for _ in range(4):
            optimizer.zero_grad()
            ys = solve(net, start, T, gradient=way, step_control=control, cuda_graph=graph, **OPTIONS).ys
            ys.square().mean().backward()
            optimizer.step()
            grads = [start.grad.clone(), *(p.grad.clone() for p in net.parameters())]
            found.setdefault(graph, []).append([ys.detach(), *grads])
            del ys
    for one, other in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
