"""What is kept of the steps of a solve, and how solutions and blocks are drawn and printed."""

import re
import sys

import pytest
import torch
from torch import nn

import odenet_cuda
from odenet_cuda import Event, Jump, ODEBlock, solve

D = torch.float64
Y0 = torch.tensor([[2.0, 0.0], [0.5, 1.0], [-1.0, 0.3]], dtype=D)
ROUNDING = 1e-12  # of times that are added up


def van_der_pol(t, y):
    x, v = y.unbind(-1)
    return torch.stack([v, 5 * (1 - x * x) * v - x], -1)


def solved(y0=Y0, t=(0.0, 4.0, 12.0), **options):
    return solve(van_der_pol, y0, list(t), dense=True, rtol=1e-5, atol=1e-5, **options)


@pytest.mark.parametrize("t", [(0.0, 4.0, 12.0), (0.0, -0.3, -0.6)], ids=["forwards", "backwards"])
@pytest.mark.parametrize("method", ["dopri5", "rodas5p"])
@pytest.mark.parametrize("control", ["joint", "per_sample"])
def test_attempts(control, method, t):
    """They are as many as the statistics say, follow on one another, and are accepted by their ratio."""
    solution = solved(t=t, method=method, step_control=control)
    of = solution.attempts
    columns = [x[:, None] if control == "joint" else x for x in of]
    counts = [torch.as_tensor(x).reshape(-1) for x in (solution.stats.num_accepted, solution.stats.num_rejected)]
    assert columns[0].shape[1] == (1 if control == "joint" else 3)
    for row, (start, dt, ratio, accepted) in enumerate(zip(*[x.T for x in columns], strict=True)):
        ran = ~start.isnan()
        assert torch.equal(ran, ~dt.isnan()) and not (accepted & ~ran).any()
        assert int(accepted.sum()) == counts[0][row] and int((ran & ~accepted).sum()) == counts[1][row]
        assert torch.equal(ratio[ran] <= 1, accepted[ran])
        assert float(start[0]) == t[0] and float((start + dt)[accepted][-1]) == pytest.approx(t[-1], abs=ROUNDING)
        after = torch.where(accepted, start + dt, start)[ran][:-1]
        torch.testing.assert_close(after, start[ran][1:], rtol=0, atol=ROUNDING)
    if control == "per_sample":
        alone = solved(Y0[1:2], t, method=method, step_control=control).attempts
        found = of.t[:, 1][~of.t[:, 1].isnan()]
        assert torch.equal(found, alone.t[:, 0])


def test_ratios_are_those_of_the_tolerance():
    """Of y' = y by the Euler-Heun pair in adaptive_heun the error estimate of the first step is known."""
    h, tol = 0.125, 0.01
    solution = solve(
        lambda t, y: y, torch.ones(1, dtype=D), [0.0, 1.0], method="adaptive_heun", first_step=h, rtol=0.0, atol=tol, dense=True
    )
    assert float(solution.attempts.error_ratio[0]) == pytest.approx(h * h / 2 / tol, rel=1e-12)


def test_nothing_is_kept_without_dense():
    assert solve(van_der_pol, Y0, [0.0, 1.0]).attempts is None
    assert solve(van_der_pol, Y0, [0.0, 1.0], method="rk4", dense=True).attempts is None


def test_state_of_a_plot_and_its_steps():
    pytest.importorskip("matplotlib")
    solution = solved(step_control="per_sample")
    state, size, ratio = solution.plot(sample=2).axes
    curves = [line for line in state.lines if len(line.get_xdata()) == 400]
    assert len(curves) == 2
    torch.testing.assert_close(torch.as_tensor(curves[1].get_ydata()[-1]), solution.ys[-1, 2, 1], rtol=1e-6, atol=1e-9)
    accepted, rejected = size.lines
    assert len(accepted.get_xdata()) == int(solution.stats.num_accepted[2])
    assert len(rejected.get_xdata()) == int(solution.stats.num_rejected[2])
    assert [axis.get_ylabel() for axis in (state, size, ratio)] == ["state", "step size", "error ratio"]
    assert "sample 2" in state.get_title()


PLOTS = {
    "outputs alone": (lambda: solve(van_der_pol, Y0[0], [0.0, 1.0, 2.0]), 1),
    "a grid": (lambda: solve(van_der_pol, Y0[0], [0.0, 0.5, 1.0], method="rk4", dense=True), 2),
    "an event": (lambda: solve(van_der_pol, Y0[0], [0.0, 5.0], events=Event(lambda t, y: y[0]), dense=True), 3),
    "bounces": (
        lambda: solve(
            van_der_pol, Y0[0], [0.0, 5.0, 9.0], events=Event(lambda t, y: y[0], apply=lambda t, y: -y), max_events=2
        ),
        1,
    ),
    "jumps": (
        lambda: solve(van_der_pol, Y0, [0.0, 1.0], jumps=Jump([0.5], lambda t, y, i: y + 1), step_control="per_sample"),
        1,
    ),
    "complex": (lambda: solve(lambda t, y: 1j * y, torch.ones(2, dtype=torch.complex64), [0.0, 1.0], dense=True), 3),
    "a dict": (lambda: solve(lambda t, y: {"a": -y["a"]}, {"a": torch.ones(3, 2, 2)}, [0.0, 1.0], dense=True), 3),
    "no axis": (lambda: solve(lambda t, y: -y, torch.tensor(1.0), [0.0, 1.0], dense=True), 3),
    "bfloat16": (lambda: solve(lambda t, y: -y, torch.ones(2, dtype=torch.bfloat16), [0.0, 1.0], rtol=0.1, atol=0.1), 1),
    "own times": (
        lambda: solve(
            van_der_pol, Y0, torch.tensor([[0, 1, 2], [0, 1, torch.nan], [0, -0.2, -0.4]]), step_control="per_sample"
        ),
        1,
    ),
}


@pytest.mark.parametrize("name", PLOTS)
def test_every_kind_is_drawn(name, tmp_path):
    pytest.importorskip("matplotlib")
    make, panels = PLOTS[name]
    solution = make()
    figure = solution.plot()
    assert len(figure.axes) == panels
    assert len(figure.axes[0].lines) >= 1 and len(figure.axes[0].lines[0].get_xdata()) >= 2
    figure.savefig(tmp_path / "plot.png")
    if name != "no axis":
        solution.plot_phase().savefig(tmp_path / "phase.png")
    else:
        with pytest.raises(ValueError, match=r"x and y must lie in 0 \.\. 0, got 1"):
            solution.plot_phase()


def test_what_is_not_there_is_named(monkeypatch):
    solution = solved(t=(0.0, 1.0))
    with pytest.raises(ValueError, match=r"sample must lie in 0 \.\. 2, got 3"):
        solution.plot(sample=3)
    with pytest.raises(ValueError, match=r"samples must lie in 0 \.\. 2, got -1"):
        solution.plot_phase(samples=[-1])
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match=r"components must lie in 0 \.\. 1, got 2"):
        solution.plot(components=[2])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="plots need matplotlib: pip install matplotlib"):
        solution.plot()


def test_a_solution_in_words():
    solution = solve(van_der_pol, Y0.expand(3, 2), [0.0, 1.0], step_control="per_sample", events=Event(lambda t, y: y[:, 0]))
    text = repr(solution)
    assert "status=3 x 'success'" in text and "ys=float64 [2, 3, 2]" in text and "event_t=[" in text and len(text) < 400
    accepted = re.search(r"accepted=(\d+) to (\d+)", text)
    assert [int(x) for x in accepted.groups()] == [f(solution.stats.num_accepted.tolist()) for f in (min, max)]
    page = solution._repr_html_()
    assert page.count("<tr>") >= 7 and "<th" in page and "3 x &#x27;success&#x27;" in page
    failed = solve(lambda t, y: y * y, torch.ones(2, 1, dtype=D), [0.0, 2.0], on_failure="return", step_control="per_sample")
    assert "2 x 'underflow in dt'" in repr(failed)
    assert "of no sample" in repr(solve(van_der_pol, Y0[:0], [0.0, 1.0], step_control="per_sample"))


def test_a_block_in_words():
    block = ODEBlock(nn.Linear(2, 2), return_all=True, max_step=0.5, jump_t=list(range(1000)))
    text = repr(block)
    assert "method='dopri5'" in text and "max_step=0.5" in text and "return_all=True" in text and "(func): Linear" in text
    assert len(text) < 400
    assert "<td style='text-align:left'>Linear</td>" in block._repr_html_() and "nfe_forward" not in block._repr_html_()

    class Field(nn.Module):
        def forward(self, t, y):
            return -y

    block = ODEBlock(Field(), compile=False)
    block(torch.ones(2, 2))
    assert f"<td style='text-align:left'>{block.nfe_forward}</td>" in block._repr_html_()


def test_a_compiled_field_in_words():
    field = odenet_cuda.compile(van_der_pol)
    assert "<td style='text-align:left'>van_der_pol</td>" in field._repr_html_() and "not solved yet" in field._repr_html_()
    assert "<th style='text-align:left'>read</th>" not in field._repr_html_()
    solve(field, Y0.expand(3, 2), [0.0, 1.0], step_control="per_sample")
    page = field._repr_html_()
    assert page.count("<tr>") == 4 and "float64, 2 numbers a sample" in page and "per_sample</td>" in page, page
    assert "served</th><td style='text-align:left'>compiled</td>" in page
    block = ODEBlock(odenet_cuda.compile(nn.Linear(2, 2).double()), compile=False)
    assert "CompiledField" in block._repr_html_()
