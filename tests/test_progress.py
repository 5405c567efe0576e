"""What is shown of a solve while it goes on."""

import sys
import types

import pytest
import torch

from odenet_cuda import compile, solve

D = torch.float64
Y0 = torch.tensor([[2.0, 0.0], [1.0, 1.0]], dtype=D)


def oscillator(t, y):
    return torch.stack([y[..., 1], 3 * (1 - y[..., 0] ** 2) * y[..., 1] - y[..., 0]], -1)


@pytest.fixture
def bars(monkeypatch):
    """Those that were made, by another tqdm that keeps what it is told."""
    made = []

    class Bar:
        def __init__(self, total, desc, **kwargs):
            self.desc, self.n, self.text, self.closed = desc, 0.0, "", False
            made.append(self)

        def set_postfix_str(self, text, refresh):
            self.text = text

        def close(self):
            self.closed = True

    module = types.ModuleType("tqdm.auto")
    module.tqdm = Bar
    monkeypatch.setitem(sys.modules, "tqdm.auto", module)
    return made


@pytest.mark.parametrize("t1", [1.0, -0.5])
@pytest.mark.parametrize("control", ["joint", "per_sample"])
def test_what_is_shown(bars, control, t1):
    options = {"step_control": control, "rtol": 1e-5, "atol": 1e-6}
    shown, free = (solve(oscillator, Y0, [0.0, t1], progress=x, **options) for x in (True, False))
    assert torch.equal(shown.ys, free.ys) and len(bars) == 1
    (bar,) = bars
    counts = (int(torch.as_tensor(x).max()) for x in (free.stats.num_accepted, free.stats.num_rejected))
    assert bar.closed and bar.desc == "solve" and bar.n == 100
    assert bar.text.startswith(f"t={t1:g} dt=") and bar.text.endswith("steps={} rejected={}".format(*counts))


@pytest.mark.parametrize("gradient", ["adjoint", "quadrature"])
def test_backward_solves_too(bars, gradient):
    y0 = Y0.clone().requires_grad_()
    solution = solve(oscillator, y0, [0.0, 0.3, 1.0], gradient=gradient, progress=True)
    assert [bar.desc for bar in bars] == ["solve"]
    solution.ys.sum().backward()
    assert [bar.desc for bar in bars] == ["solve", "backward", "backward"]
    assert all(bar.closed and bar.n == 100 for bar in bars) and bars[-1].text.startswith("t=0 ")


def test_grids_callbacks_and_compiled(bars):
    seen = []
    func = torch.nn.Linear(2, 2).double()
    block = type("Func", (torch.nn.Module,), {"forward": lambda self, t, y: func(y)})()
    block.callback_step = lambda t, y, dt: seen.append(float(t))
    with torch.no_grad():
        solve(block, Y0, [0.0, 1.0], method="rk4", step_size=0.25, progress=True)
    assert seen == [0.0, 0.25, 0.5, 0.75] and bars[-1].n == 100 and "steps=4" in bars[-1].text
    served = solve(compile(lambda t, y: -y), Y0, [0.0, 1.0], progress=True)
    assert served.engine == "stepper" and "progress" in served.explanation["compiled"]


def test_an_interrupted_and_a_failed_solve_close_it(bars):
    def func(t, y):
        if float(t) > 0.5:
            raise KeyboardInterrupt
        return -y

    with pytest.raises(KeyboardInterrupt):
        solve(func, Y0, [0.0, 1.0], progress=True)
    with pytest.raises(AssertionError):
        solve(oscillator, Y0, [0.0, 1.0], max_num_steps=3, progress=True)
    assert [bar.closed for bar in bars] == [True, True] and 0 < bars[0].n <= 50


def test_off_and_absent(monkeypatch, bars):
    solve(oscillator, Y0, [0.0, 0.1])
    assert not bars
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=r"progress=True needs tqdm.*odenet-cuda\[progress\]"):
        solve(oscillator, Y0, [0.0, 0.1], progress=True)
