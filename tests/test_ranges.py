"""A profile names the solve, its steps and the backward pass."""

from collections import Counter

import pytest
import torch
from torch import nn

import odenet_cuda
from odenet_cuda import solve
from odenet_cuda.ranges import marked

Y0 = torch.ones(2, 3)
OPTIONS = {"first_step": 0.25, "min_step": 0.25, "max_step": 0.25}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, t, y):
        return torch.tanh(self.linear(y))


def ranges(function):
    """How often each of our names is in a profile of function()."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    names = [event.name for event in profile.events()]
    return Counter(name.removeprefix("odenet_cuda.") for name in names if name.startswith("odenet_cuda."))


@pytest.mark.parametrize("options", [OPTIONS, {"method": "rk4", "step_size": 0.25}], ids=["adaptive", "fixed"])
@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "adjoint"])
def test_profile(kernels_alone, gradient, options):
    ys = []
    found = ranges(lambda: ys.append(solve(Net(), Y0, [0.0, 1.0], gradient=gradient, **options).ys))
    assert found["solve"] == 1 and found["step"] == 4
    found = ranges(lambda: ys[0].sum().backward())
    assert found["backward"] == 1
    if gradient == "adjoint":
        assert found["solve"] == 1 and found["step"] == 4
    else:
        assert found["step backwards"] >= 4


def test_compiled():
    func = odenet_cuda.compile(Net())
    for _ in range(2):  # the second is compared with func, by solves of its own
        solve(func, Y0, [0.0, 1.0])
    if func.explain() != "compiled":
        pytest.skip(func.explain())
    ys = []
    assert ranges(lambda: ys.append(solve(func, Y0, [0.0, 1.0]).ys)) == {"solve": 1}
    assert ranges(lambda: ys[0].sum().backward()) == {"backward": 1}


def test_nothing_is_marked_without_a_profile():
    assert marked("solve") is marked("step")
