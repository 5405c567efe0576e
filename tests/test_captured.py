"""Every way in which func can hold a tensor, against plain torch: which tensors get gradients, and how their hooks run."""

import functools
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from odenet_cuda import ODEBlock, odeint_adjoint, solve

GRADIENTS = ["direct", "checkpoint", "adjoint", "quadrature"]
TOLERANCE = 1e-5  # rtol and atol of the solves below are 1e-8, and backward solves err by some hundred times that
T1 = 0.5


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def numbers(*shape, seed=0, grad=True):
    return (0.5 * torch.randn(*shape, generator=generator(seed), dtype=torch.float64)).requires_grad_(grad)


Y0 = numbers(4, 3, seed=9, grad=False)


def reference(func, y0=Y0, args=()):
    """40 steps of rk4 in plain torch: the error is about 1e-7."""
    y, dt = y0, T1 / 40
    for i in range(40):
        t = torch.full((len(y0), 1), i * dt, dtype=torch.float64)
        k1 = func(t, y, *args)
        k2 = func(t + dt / 2, y + dt / 2 * k1, *args)
        k3 = func(t + dt / 2, y + dt / 2 * k2, *args)
        k4 = func(t + dt, y + dt * k3, *args)
        y = y + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return y


def ours(gradient, control="joint"):
    def run(func, y0=Y0, args=()):
        how = {"gradient": gradient, "step_control": control, "rtol": 1e-8, "atol": 1e-8, "args": args}
        return solve(func, y0, [0.0, T1], **how).ys[-1]

    return run


def slope(y, w, scale=1.0):
    return torch.tanh(y @ w) * scale


class Net(nn.Module):
    """tanh(y W) scale, and whatever else a way gives it."""

    def __init__(self, seed=0):
        super().__init__()
        self.weight = nn.Parameter(numbers(3, 3, seed=seed))
        self.register_buffer("scale", numbers(3, seed=seed + 1, grad=False))

    def forward(self, t, y):
        return slope(y, self.weight, self.scale)


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=torch.float64)
        with torch.no_grad():
            self.linear.weight.copy_(numbers(3, 3))
            self.linear.bias.copy_(numbers(3))

    def forward(self, t, y):
        return torch.tanh(self.linear(y))


def replica_of(net):
    """What nn.DataParallel makes of a module for each device."""
    replicas = {module: module._replicate_for_data_parallel() for module in net.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            setattr(replica, name, replicas[child])
        for name, x in (*module._parameters.items(), *module._buffers.items()):
            setattr(replica, name, x * 1.0)
    return replicas[net]


def in_thread(work, ahead=0):
    """work() in another thread, whose autograd has made as many nodes before."""
    result = {}

    def run():
        x = torch.ones(1, requires_grad=True)
        for _ in range(ahead):
            x * 1
        try:
            result["value"] = work()
        except BaseException as error:
            result["error"] = error

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if "error" in result:
        raise result["error"]
    return result["value"]


# ---- the ways: each solves by `run` and returns (y1, the leaves whose gradients are compared) -----------------------------


def parameter(run):
    net = Net()
    return run(net), [net.weight]


def buffer_with_gradient(run):
    net = Net()
    net.scale.requires_grad_()
    return run(net), [net.weight, net.scale]


def buffer_that_is_a_result(run):
    net, x = Net(), numbers(3, seed=4)
    net.scale = x.exp()
    return run(net), [net.weight, x]


def closure_over_a_leaf(run):
    w = numbers(3, 3)
    return run(lambda t, y: slope(y, w)), [w]


def closure_over_a_result(run):
    x = numbers(3, 3)
    w = torch.tanh(x)
    return run(lambda t, y: slope(y, w)), [x]


def closure_over_a_result_and_its_leaf(run):
    x = numbers(3, 3)
    w = torch.tanh(x)
    return run(lambda t, y: slope(y, w) + y @ x), [x]


def closure_over_a_view(run):
    x = numbers(2, 3, 3)
    w = x.exp()[1]
    return run(lambda t, y: slope(y, w)), [x]


def one_part_of_a_result_known(run):
    """Another output of the same node."""
    x = numbers(2, 3, 3)
    a, b = x.exp().unbind()
    return run(lambda t, y, a: slope(y, a) + y @ b, args=(a,)), [x]


def module_and_closure(run):
    net, h = Net(), numbers(3, seed=5)
    code = h.exp()
    net.condition = code
    net.forward = lambda t, y: slope(y, net.weight, net.scale) * net.condition
    return run(net), [net.weight, h]


def own_result_and_parameter(run):
    """A Module that keeps what it made of its own parameter."""
    net = Net()
    net.twice = net.weight.exp()
    net.forward = lambda t, y: slope(y, net.weight, net.scale) + y @ net.twice
    return run(net), [net.weight]


def argument(run):
    w = numbers(3, 3)
    return run(slope_of_arguments, args=(w,)), [w]


def argument_that_is_a_result(run):
    x = numbers(3, 3)
    return run(slope_of_arguments, args=(x.exp(),)), [x]


def argument_in_a_container(run):
    x, v = numbers(3, 3), numbers(3, seed=2)
    return run(lambda t, y, held: slope(y, held["w"][0], held["v"]), args=({"w": [x.exp()], "v": v},)), [x, v]


def slope_of_arguments(t, y, w):
    return slope(y, w)


class Helper:
    def __init__(self, w):
        self.parts = {"w": w}

    def __call__(self, t, y):
        return slope(y, self.parts["w"])

    def method(self, t, y):
        return self(t, y)


def attribute_of_an_object(run):
    w = numbers(3, 3)
    return run(Helper(w)), [w]


def bound_method(run):
    x = numbers(3, 3)
    return run(Helper(x.exp()).method), [x]


def partial(run):
    x = numbers(3, 3)
    return run(functools.partial(lambda w, t, y: slope(y, w), x.exp())), [x]


def made_in_another_thread(run):
    x = numbers(3, 3)
    w = in_thread(lambda: x.exp())
    return run(lambda t, y: slope(y, w)), [x]


def made_in_another_thread_that_is_ahead(run):
    x = numbers(3, 3)
    w = in_thread(lambda: x.exp(), ahead=100_000)
    return run(lambda t, y: slope(y, w)), [x]


def made_in_another_thread_with_numbers_of_the_solve(run):
    """Its numbers are those that nodes of the first call get."""
    x = numbers(3, 3)
    here = torch.autograd._get_sequence_nr()
    w = in_thread(lambda: x.exp().sin().cos().exp(), ahead=here)
    return run(lambda t, y: slope(y, w)), [x]


def solved_in_another_thread(run):
    x = numbers(3, 3)
    w = x.exp()
    return in_thread(lambda: run(lambda t, y: slope(y, w))), [x]


def threads_inside(run):
    w = numbers(3, 3)

    def func(t, y):
        with torch.enable_grad() if torch.is_grad_enabled() else torch.no_grad():
            return in_thread(lambda: slope(y, w)) + slope(y, w)

    return run(func), [w]


def replica(run):
    net = Linear()
    copied = replica_of(net)
    return in_thread(lambda: run(copied)), list(net.parameters())


def replica_in_a_closure(run):
    net = Linear()
    copied = replica_of(net)
    return in_thread(lambda: run(lambda t, y: copied(t, y))), list(net.parameters())


class Model(nn.Module):
    """A model that solves, by a func of each kind."""

    def __init__(self, run, kind):
        super().__init__()
        self.run, self.net = run, Net()
        self.func = {
            "module": self.net,
            "closure": lambda t, y: self.net(t, y),
            "method": self.slope,
            "partial": functools.partial(Model.slope, self),
            "list": [lambda t, y: self.net(t, y)],
        }[kind]

    def slope(self, t, y):
        return self.net(t, y)

    def forward(self, y0):
        func = self.func
        return self.run((lambda t, y: func[0](t, y)) if isinstance(func, list) else func, y0)


def lent(run, kind, result):
    """Frozen weights, and others in their place for one call."""
    model, x = Model(run, kind).requires_grad_(False), numbers(3, 3, seed=7)
    scale = numbers(3, seed=8)
    w = x.exp() if result else x
    return functional_call(model, {"net.weight": w, "net.scale": scale}, (Y0,)), [x, scale]


def lent_unfrozen(run):
    model, x = Model(run, "module"), numbers(3, 3, seed=7)
    y1 = functional_call(model, {"net.weight": x}, (Y0,))
    return y1, [x, model.net.weight]


def lent_twice(run):
    model, x, z = Model(run, "module"), numbers(3, 3, seed=7), numbers(3, 3, seed=6)
    y1 = functional_call(model, {"net.weight": x}, (Y0,)) + functional_call(model, {"net.weight": z.exp()}, (Y0,))
    return y1 + model(Y0), [x, z, model.net.weight]


def lent_inside(run):
    net, x = Net().requires_grad_(False), numbers(3, 3, seed=7)
    return run(lambda t, y: functional_call(net, {"weight": x}, (t, y))), [x]


def replaced_afterwards(run):
    net = Net()
    before = net.weight
    y1 = run(net)
    net.weight, net.scale = nn.Parameter(numbers(3, 3, seed=6)), numbers(3, seed=6, grad=False)
    return y1, [before]


def condition_replaced_afterwards(run):
    net = Net()
    net.condition = numbers(3, seed=6, grad=False)
    net.forward = lambda t, y: slope(y, net.weight, net.scale) * net.condition
    y1 = run(net)
    net.condition = numbers(3, seed=7, grad=False)
    return y1, [net.weight]


def parametrized(run):
    net = Linear()
    parametrizations.weight_norm(net.linear)
    return run(net), list(net.parameters())


def orthogonal(run):
    net = Linear()
    parametrizations.orthogonal(net.linear)
    return run(net), [x for x in net.parameters() if x.requires_grad]


def spectral_norm(run):
    net = Linear()
    parametrizations.spectral_norm(net.linear).eval()  # in training the norm is another at each call
    net.eval()
    return run(net), list(net.parameters())


def weight_norm_by_hook(run):
    net = Linear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(net.linear)
    return run(net), list(net.parameters())


def cached(run):
    net = Linear()
    parametrizations.weight_norm(net.linear)
    with parametrize.cached():
        y1 = run(net)
    return y1, list(net.parameters())


def cached_before(run):
    net = Linear()
    parametrizations.weight_norm(net.linear)
    with parametrize.cached():
        net(0, Y0)
        y1 = run(net) + run(net)
    return y1, list(net.parameters())


def cached_by_func(run):
    """Made in the first call, and kept."""
    net, kept = Net(), []

    def func(t, y):
        if not kept:
            with torch.enable_grad():
                kept.append(net.weight.exp())
        return slope(y, kept[0])

    return run(func), [net.weight]


def hooked_leaf(run):
    w = numbers(3, 3)
    w.register_hook(lambda grad: 0.5 * grad)
    w.register_hook(lambda grad: grad.clamp(-0.1, 0.1))
    return run(lambda t, y: slope(y, w)), [w]


def hooked_parameter(run):
    net = Net()
    net.weight.register_hook(lambda grad: grad.square())
    return run(net), [net.weight]


def hooked_afterwards(run):
    net = Net()
    y1 = run(net)
    net.weight.register_hook(lambda grad: grad.square())
    return y1, [net.weight]


def hooked_result(run):
    x = numbers(3, 3)
    w = x.exp()
    w.register_hook(lambda grad: grad.square())
    return run(lambda t, y: slope(y, w)), [x]


def hooked_result_and_its_leaf(run):
    x = numbers(3, 3)
    w = x.exp()
    w.register_hook(lambda grad: grad.square())
    x.register_hook(lambda grad: grad.square())
    return run(lambda t, y: slope(y, w) + y @ x), [x]


def hooked_argument(run):
    x = numbers(3, 3)
    w = x.exp()
    w.register_hook(lambda grad: 0.5 * grad)
    return run(slope_of_arguments, args=(w,)), [x]


def hooked_y0(run):
    y0 = numbers(4, 3, seed=9)
    y0.register_hook(lambda grad: grad.square())
    return run(lambda t, y: slope(y, torch.eye(3, dtype=y.dtype)) * y0.mean(), y0), [y0]


def hook_that_says_nothing_once_removed(run):
    w = numbers(3, 3)
    handle = w.register_hook(lambda grad: 0.5 * grad)
    y1 = run(lambda t, y: slope(y, w))
    handle.remove()
    return y1, [w]


def made_inside(run):
    """A leaf of func's own; its results do not depend on y by it."""
    w = numbers(3, 3)

    def func(t, y):
        with torch.enable_grad():
            x = y.detach().clone().requires_grad_(True)
            energy = torch.tanh(x @ w).square().sum()
            return torch.autograd.grad(energy, x, create_graph=True)[0] - 0.1 * y

    return run(func), [w]


def made_inside_without_a_copy(run):
    w = numbers(3, 3)

    def func(t, y):
        with torch.enable_grad():
            x = y.detach().requires_grad_(True)
            return torch.autograd.grad(slope(x, w).sum(), x, create_graph=True)[0] + x @ w

    return run(func), [w]


def gradient_inside(run):
    """The slope is itself a gradient, by y."""
    w = numbers(3, 3)

    def func(t, y):
        with torch.enable_grad():
            x = y if y.requires_grad else y.detach().requires_grad_()
            return -torch.autograd.grad(torch.tanh(x @ w).square().sum(), x, create_graph=True)[0]

    return run(func), [w]


def gradient_inside_a_module(run):
    net = Net()
    net.forward = lambda t, y: gradient_of(net, y)
    return run(net), [net.weight]


def gradient_of(net, y):
    with torch.enable_grad():
        x = y if y.requires_grad else y.detach().requires_grad_()
        return -torch.autograd.grad(slope(x, net.weight, net.scale).square().sum(), x, create_graph=True)[0]


def hypernetwork(run):
    hyper = nn.Linear(2, 9, dtype=torch.float64)
    with torch.no_grad():
        hyper.weight.copy_(numbers(9, 2))
    code = numbers(2, seed=3)
    w = hyper(code).view(3, 3)
    return run(lambda t, y: slope(y, w)), [hyper.weight, hyper.bias, code]


def hypernetwork_inside(run):
    hyper = nn.Linear(1, 9, dtype=torch.float64)
    with torch.no_grad():
        hyper.weight.copy_(numbers(9, 1))

    def func(t, y):  # t: one time, or one for each sample
        return torch.tanh(y[:, None] @ hyper(t.reshape(-1, 1)).view(-1, 3, 3))[:, 0]

    return run(func), [hyper.weight, hyper.bias]


class Named(torch.autograd.Function):
    """Keeps a tensor under the name that autograd's own node of a leaf has for it."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.variable = torch.ones(3, requires_grad=True)
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w.T, x.T @ grad


def custom_function(run):
    w = numbers(3, 3)
    return run(lambda t, y: torch.tanh(Named.apply(y, w))), [w]


def result_returned(run):
    """The slope is an earlier result itself."""
    x = numbers(4, 3)
    k = x.exp()
    k.register_hook(lambda grad: grad.square())
    return run(lambda t, y: k), [x]


def leaf_returned(run):
    k = numbers(4, 3)
    return run(lambda t, y: k), [k]


WAYS = [
    parameter, buffer_with_gradient, buffer_that_is_a_result, closure_over_a_leaf, closure_over_a_result,
    closure_over_a_result_and_its_leaf, closure_over_a_view, one_part_of_a_result_known, module_and_closure,
    own_result_and_parameter, argument, argument_that_is_a_result, argument_in_a_container, attribute_of_an_object,
    bound_method, partial, made_in_another_thread, made_in_another_thread_that_is_ahead,
    made_in_another_thread_with_numbers_of_the_solve, solved_in_another_thread, threads_inside, replica,
    replica_in_a_closure, lent_unfrozen, lent_twice, lent_inside, replaced_afterwards, condition_replaced_afterwards,
    parametrized, orthogonal, spectral_norm, weight_norm_by_hook, cached, cached_before, cached_by_func, hooked_leaf,
    hooked_parameter, hooked_afterwards, hooked_result, hooked_result_and_its_leaf, hooked_argument, hooked_y0,
    hook_that_says_nothing_once_removed, made_inside, made_inside_without_a_copy, gradient_inside,
    gradient_inside_a_module, hypernetwork, hypernetwork_inside, custom_function, result_returned, leaf_returned,
]  # fmt: skip
for _kind in ("module", "closure", "method", "partial", "list"):
    for _result in (False, True):
        _way = functools.partial(lent, kind=_kind, result=_result)
        _way.__name__ = f"lent_to_{_kind}_{'a_result' if _result else 'a_leaf'}"
        WAYS.append(_way)


@functools.cache
def expected(way):
    return gradients_of(way, reference)


def gradients_of(way, run):
    torch.manual_seed(0)
    y1, leaves = way(run)
    y1.square().sum().backward()
    return [leaf.grad for leaf in leaves]


def assert_alike(found, wanted, tolerance=TOLERANCE):
    """autograd.Function gives zeros where plain torch gives None."""
    for x, y in zip(found, wanted, strict=True):
        pair = [torch.zeros_like(x if y is None else y) if z is None else z for z in (x, y) if x is not None or y is not None]
        if pair:
            torch.testing.assert_close(*pair, rtol=tolerance, atol=tolerance)


CASES = [(way, gradient, "joint") for way in WAYS for gradient in GRADIENTS]
CASES += [(way, "adjoint", "per_sample") for way in WAYS]  # it takes its products in two parts


@pytest.mark.parametrize(("way", "gradient", "control"), CASES, ids=lambda x: getattr(x, "__name__", x))
def test_each_way_to_hold_a_tensor(way, gradient, control):
    assert_alike(gradients_of(way, ours(gradient, control)), expected(way))


# ---- what the table cannot hold ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_hooks_run_once_on_the_whole_gradient(gradient):
    """Of every kind that torch has."""
    found = {}
    for name, run in (("ours", ours(gradient)), ("torch", reference)):
        w, x = numbers(3, 3), numbers(3, seed=4)
        h = x.exp()
        h.retain_grad()
        seen = found[name] = []
        w.register_hook(lambda grad, seen=seen: seen.append(grad.clone()))
        h.register_hook(lambda grad, seen=seen: seen.append(grad.clone()))
        w.register_post_accumulate_grad_hook(lambda w, seen=seen: seen.append(w.grad.clone()))
        torch.autograd.graph.register_multi_grad_hook((w, h), lambda grads, seen=seen: seen.extend(grads))
        accumulate = torch.autograd.graph.get_gradient_edge(w).node
        accumulate.register_prehook(lambda grads, seen=seen: seen.extend(grads))
        run(lambda t, y, w=w, h=h: slope(y, w, h)).square().sum().backward()
        seen += [h.grad, x.grad]
        key = lambda grad: (grad.dim(), float(grad.sum()))  # noqa: E731
        seen.sort(key=key)
    assert len(found["ours"]) == len(found["torch"]) == 8
    assert_alike(found["ours"], found["torch"])


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_that_were_there_are_added_to(gradient):
    """A retained gradient is no place for what single calls of func give."""
    x = numbers(3, 3)
    h = x.exp()
    h.retain_grad()
    h.sum().backward(retain_graph=True)
    ours(gradient)(lambda t, y: slope(y, h)).square().sum().backward()
    before = numbers(3, 3).exp().detach().requires_grad_()
    reference(lambda t, y: slope(y, before)).square().sum().backward()
    assert_alike([h.grad - 1], [before.grad])


@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
def test_hooks_under_a_second_derivative(gradient):
    found = []
    for run in (ours(gradient), reference):
        w = numbers(3, 3)
        w.register_hook(lambda grad: grad.square())
        y1 = run(lambda t, y, w=w: slope(y, w))
        (grad,) = torch.autograd.grad(y1.square().sum(), w, create_graph=True)
        found.append([grad, *torch.autograd.grad(grad.square().sum(), w)])
    assert_alike(*found)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_hooks_are_as_they_were_afterwards(gradient):
    w = numbers(3, 3)
    hook = lambda grad: 0.5 * grad  # noqa: E731
    handle = w.register_hook(hook)
    y1 = ours(gradient)(lambda t, y: slope(y, w))
    w.register_hook(lambda grad: 2 * grad)
    y1.sum().backward()
    assert w._backward_hooks[handle.id] is hook and len(w._backward_hooks) == 2
    handle.remove()
    assert len(w._backward_hooks) == 1


def test_hooks_run_in_a_thread_beside_a_solve():
    """While one thread walks a solve back, another's gradient of the same tensor has its hooks."""
    w, inside, go_on = numbers(3, 3), threading.Event(), threading.Event()
    w.register_hook(lambda grad: 0.5 * grad)

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            inside.set()
            assert go_on.wait(60)
            return grad

    y1 = ours("adjoint")(lambda t, y: Slow.apply(slope(y, w)))
    thread = threading.Thread(target=lambda: y1.sum().backward())
    thread.start()
    assert inside.wait(60)
    (beside,) = torch.autograd.grad(w.sum(), w)
    go_on.set()
    thread.join()
    assert beside.unique().tolist() == [0.5]


class Owner(nn.Module):
    """An encoder's output is what func uses, and y0."""

    def __init__(self, gradient):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.gradient = nn.Linear(3, 3, dtype=torch.float64), gradient
        self.block = ODEBlock(Linear(), [0.0, T1], rtol=1e-8, atol=1e-8, gradient=gradient)

    def forward(self, x):
        h = torch.tanh(self.encoder(x))
        run = reference if self.gradient is None else ours(self.gradient)
        func = self.block.func
        y = run(func, h) if self.gradient is None else self.block(h)
        return run(lambda t, y: func(t, y) * h, y)


@pytest.mark.parametrize("how", ["checkpoint", "save_on_cpu", "hooks"])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_saved_tensors_that_come_back_as_copies(gradient, how):
    found = []
    for kind in (gradient, None):
        model, x = Owner(kind), Y0.clone().requires_grad_()
        if how == "checkpoint":
            y = checkpoint(model, x, use_reentrant=False)
        elif how == "save_on_cpu":
            with torch.autograd.graph.save_on_cpu():
                y = model(x)
        else:
            with torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach().clone(), lambda x: x):
                y = model(x)
        y.square().sum().backward()
        found.append([x.grad, *(p.grad for p in model.parameters())])
    assert_alike(*found)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_cached_while_the_gradient_is_taken(gradient):
    found = []
    for run in (ours(gradient), reference):
        net = Linear()
        parametrizations.weight_norm(net.linear)
        with parametrize.cached():
            run(net).square().sum().backward()
        found.append([p.grad for p in net.parameters()])
    assert_alike(*found)


@pytest.mark.parametrize("gradient", ["checkpoint", "adjoint", "quadrature"])
def test_a_tensor_changed_before_the_backward_pass(gradient):
    x = numbers(3, 3)
    for w in (numbers(3, 3), x.exp()):
        y1 = ours(gradient)(lambda t, y, w=w: slope(y, w))
        with torch.no_grad():
            w.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y1.sum().backward()


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_module_is_left_as_it_was(gradient):
    """What a backward pass lends to a module of func it takes away again."""
    model = Model(ours(gradient), "closure")
    own = model.net.weight
    y1 = functional_call(model, {"net.weight": numbers(3, 3, seed=7)}, (Y0,))
    assert model.net.weight is own
    y1.sum().backward()
    assert model.net.weight is own and own.grad is None


def test_chosen_parameters_behind_a_graph():
    """A path is made of its coefficients before the solve, as torchcde does; the gradient goes to the coefficients alone."""
    found = []
    for solved in (True, False):
        net, coefficients, other = Net(), numbers(2, 3, seed=3), numbers(3, seed=4)
        path = (coefficients.exp().square() * other.exp()).tanh()
        func = lambda t, y, net=net, path=path: net(t, y) * (path[0] + path[1] * t)  # noqa: E731
        if solved:
            params = (*net.parameters(), coefficients)
            y1 = odeint_adjoint(func, Y0, torch.tensor([0, T1]), adjoint_params=params, rtol=1e-8, atol=1e-8)[-1]
            y1.square().sum().backward()
            assert other.grad is None
        else:
            reference(func).square().sum().backward()
        found.append([net.weight.grad, coefficients.grad])
    assert_alike(*found)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("result", [False, True])
def test_tensors_used_only_for_a_while(gradient, result):
    """At the start, at the end, and in the middle, which is refused where no graph is kept there."""
    middle = gradient == "direct"
    parts = [(0.0, 0.2), (0.2, 0.4), (0.4, 0.6)]  # of the time; smooth at their ends

    def solved(run):
        leaves = [numbers(3, seed=i) for i in range(3)]
        kept = [x.exp() if result else x for x in leaves]

        def func(t, y):
            k = -0.5 * y
            for (a, b), w in zip(parts, kept, strict=True):
                if a <= float(t.max()) < b and (middle or a != 0.2):
                    k = k + (1e8 * ((t - a) * (b - t)).clamp(min=0) ** 4 + (a == 0)) * w
            return k

        run(func).square().sum().backward()
        return [x.grad for x in leaves]

    how = {"rtol": 1e-9, "atol": 1e-9, "gradient": gradient, "step_t": [0.2, 0.4], "max_step": 0.02}
    mine = lambda func: solve(func, Y0, [0.0, T1], **how).ys[-1]  # noqa: E731
    if gradient == "direct":
        assert all(float(x.abs().max()) > 1e-2 for x in solved(mine))
    found, wanted = solved(mine), solved(reference)
    assert_alike(found, wanted, 1e-1)  # of two solves across jumps; a gradient that is missing is 1 off


class InTheMiddle(nn.Module):
    """A Module that depends on its parameters alone, but for a while in the middle."""

    def __init__(self, v, w):
        super().__init__()
        self.weight, self.v = w, v

    def forward(self, t, y):
        k = slope(y, self.weight)
        return k + self.v if 0.1 < float(t.max()) < 0.4 else k


IN_THE_MIDDLE = {
    "closure": lambda v, w: lambda t, y: slope(y, w) + (v if 0.1 < float(t.max()) < 0.4 else 0.0),
    "module": lambda v, w: InTheMiddle(v, nn.Parameter(w.detach())),
    "frozen module": lambda v, w: InTheMiddle(v, w.detach()),
    "result": lambda v, w: InTheMiddle(v.exp(), nn.Parameter(w.detach())),
}


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("kind", IN_THE_MIDDLE)
def test_a_tensor_used_in_the_middle_alone(gradient, kind):
    """Its gradient is there, or is refused in words."""
    grads = []
    steps = {"method": "rk4", "step_size": T1 / 40}
    for mine in (True, False):
        v, w = numbers(3), numbers(3, 3)
        func = IN_THE_MIDDLE[kind](v, w)
        y1 = solve(func, Y0, [0.0, T1], gradient=gradient, **steps).ys[-1] if mine else reference(func)
        try:
            y1.sum().backward()
        except RuntimeError as error:
            assert mine and gradient != "direct" and "use gradient='direct'" in str(error)
            return
        grads.append(v.grad)
    assert_alike(*[[x] for x in grads], 0.1)  # of steps across jumps; a gradient that is missing is 1 off


class Product(torch.autograd.Function):
    """A node at the border that autograd alone can run."""

    @staticmethod
    def forward(ctx, y, w):
        ctx.save_for_backward(y, w)
        return y * w

    @staticmethod
    def backward(ctx, grad):
        y, w = ctx.saved_tensors
        return grad * w, (grad * y).sum(0)


BEYOND = {
    "product": lambda t, y, w, u, h: h * y.sin() - w * y,  # autograd's engine sums over what is broadcast
    "matrix": lambda t, y, w, u, h: torch.tanh(y @ torch.diag(w)) * h,
    "both in one": lambda t, y, w, u, h: (h * w).expand_as(y) - 0.1 * y,
    "three deep": lambda t, y, w, u, h: torch.stack([w * y, u * y, h * y]).sin().sum(0).mul(0.3) - 0.1 * w.sin() * u,
    "function": lambda t, y, w, u, h: Product.apply(y, w) + Product.apply(y.cos(), h),
    "sums": lambda t, y, w, u, h: (w + h).expand_as(y) + u,
    "in place": lambda t, y, w, u, h: y.clone().mul_(w).add_(h),
}


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("kind", BEYOND)
def test_nothing_between_captured_tensors_is_run(kind, gradient, second):
    """func uses h and what h was made of; a hook between them that is not linear sees the whole gradient, once."""
    if second and gradient in ("adjoint", "quadrature"):
        return
    steps = {"method": "rk4", "step_size": T1 / 40, "gradient": gradient}
    found = []
    for run in (lambda func: solve(func, Y0, [0.0, T1], **steps).ys[-1], reference):
        calls = []

        class Counted(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x * 2

            @staticmethod
            def backward(ctx, grad, calls=calls):
                calls.append("node")
                return grad * 2

        w = (1 + numbers(3)).detach().requires_grad_()
        u = Counted.apply(w)
        u.register_hook(lambda grad, calls=calls: (calls.append("hook"), grad / grad.norm())[1])
        h = 0.5 * u
        h.grad_fn.register_prehook(lambda grads, calls=calls: calls.append("prehook"))
        y1 = run(lambda t, y, w=w, u=u, h=h: BEYOND[kind](t, y, w, u, h))
        (grad,) = torch.autograd.grad(y1.square().sum(), w, create_graph=second)
        assert sorted(calls) == ["hook", "node", "prehook"]
        found.append([grad, *(torch.autograd.grad(grad.square().sum(), w) if second else ())])
    assert_alike(*found, 1e-4 if gradient in ("adjoint", "quadrature") else TOLERANCE)  # rk4 backwards


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_chained_solves_run_each_of_them_once(gradient):
    """h = solve(..., args=(h,)) in a loop: the way back of one solve does not enter those before it."""
    net, h, counts = Linear(), Y0.clone().requires_grad_(), []
    for _ in range(4):
        h = solve(lambda t, y, c: net(t, y) * c, h, [0.0, 0.3], args=(h,), method="rk4", gradient=gradient).ys[-1]
        runs = []
        h.grad_fn.next_functions[0][0].register_prehook(lambda grads, runs=runs: runs.append(1))
        counts.append(runs)
    h.square().sum().backward()
    assert [len(runs) for runs in counts] == [1, 1, 1, 1]


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("view", [True, False])
def test_a_result_changed_in_place_after_the_solve(view, recorded):
    """Where its value is not needed, as in plain torch: the gradient goes to what it was then."""
    found = []
    for run in (ours("direct"), reference):
        w = numbers(2, 3)
        base = w * 2
        h = base[0] if view else base.sum(0)
        y1 = run(lambda t, y, h=h: h - y)
        with torch.set_grad_enabled(recorded):
            (base if view else h).mul_(3)
        (y1.square().sum() + h.sum()).backward()
        found.append([w.grad])
    assert_alike(*found)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_parameter_frozen_after_the_solve(gradient):
    found = []
    for run in (ours(gradient), reference):
        net = Linear()
        y1 = run(net)
        net.linear.bias.requires_grad_(False)
        if gradient != "direct" and run is not reference:
            with pytest.raises(RuntimeError, match="freeze it after the backward pass"):
                y1.sum().backward()
            return
        y1.sum().backward()
        found.append([net.linear.weight.grad, net.linear.bias.grad])
    assert_alike(*found)


@pytest.mark.parametrize("gradient", ["checkpoint", "adjoint", "quadrature"])
def test_results_kept_while_no_graph_was_recorded(gradient):
    """A module that makes one matrix early and another one late."""
    net, kept = Linear(), {}

    def forward(t, y):
        late = float(t.max()) > 0.25
        if late not in kept:
            kept[late] = net.linear.weight.exp() * (1.0 + late)
        return torch.tanh(y @ kept[late] + net.linear.bias)

    net.forward = forward
    with pytest.raises(RuntimeError, match="a result that it kept"):
        solve(net, Y0, [0.0, T1], method="rk4", step_size=0.05, gradient=gradient).ys.sum().backward()


def test_a_closed_module_is_called_no_more_than_needed():
    """Once at the start, and for every stage."""
    for gradient, more in (("direct", 0), ("adjoint", 0)):
        net, calls = Net(), []
        net.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        stats = solve(net, Y0, [0.0, T1], gradient=gradient).stats
        assert len(calls) == stats.nfe + more
