"""Pictures of a solution, by matplotlib, which nothing else of this package needs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_MOST_COMPONENTS, _MOST_SAMPLES = 8, 64
_POINTS = 400  # of a curve
_ACCEPTED, _REJECTED = "#1f77b4", "#d62728"


def plot(solution: Any, sample: int = 0, components: Sequence[int] | None = None) -> Any:
    """See `Solution.plot`."""
    t, values, curve = _curves(solution, sample)
    chosen = _chosen("components", components, values.shape[1], _MOST_COMPONENTS)
    steps = _steps(solution, sample)
    rows = 1 + (steps is not None) + (steps is not None and steps[2] is not None)
    figure, axes = _figure(rows)
    state = axes[0]
    for i in chosen:
        (line,) = state.plot(*(curve[0], curve[1][:, i]) if curve else (t, values[:, i]), label=f"{i}", linewidth=1.3)
        state.plot(t, values[:, i], "o", color=line.get_color(), markersize=3)
    if len(chosen) > 1:
        state.legend(fontsize=8, ncols=min(len(chosen), 4), title="component", title_fontsize=8)
    state.set_ylabel("state")
    _mark_events(solution, sample, axes)
    if steps is not None:
        _draw_steps(axes[1:], *steps)
    axes[-1].set_xlabel("t")
    stats, one = solution.stats, solution.per_sample
    counts = [x[sample] if one else x for x in (stats.num_accepted, stats.num_rejected)]
    title = f"{int(counts[0])} steps, {int(counts[1])} rejected, {stats.nfe} evaluations, {solution.engine}"
    state.set_title((f"sample {sample}: " if one else "") + title, fontsize=10)
    return figure


def plot_phase(solution: Any, x: int = 0, y: int = 1, samples: Sequence[int] | None = None) -> Any:
    """See `Solution.plot_phase`."""
    leaf = _leaf(solution.ys)
    rows = leaf.shape[1] if leaf.dim() > 2 else 1
    figure, (axis,) = _figure(1)
    for i in _chosen("samples", samples, rows, _MOST_SAMPLES):
        _, values, curve = _curves(solution, i)
        _chosen("x and y", (x, y), values.shape[1], 2)
        path = curve[1] if curve else values
        (line,) = axis.plot(path[:, x], path[:, y], linewidth=1.2)
        axis.plot(values[:1, x], values[:1, y], "o", color=line.get_color(), markersize=4)
    axis.set_xlabel(f"component {x}")
    axis.set_ylabel(f"component {y}")
    return figure


def _figure(rows: int) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plots need matplotlib: pip install matplotlib, or the extra 'plot' of odenet-cuda") from None
    figure = Figure(figsize=(7, 2.4 + 1.5 * rows), layout="constrained")  # of no window, and shown by notebooks
    axes = figure.subplots(rows, 1, squeeze=False, sharex=True, height_ratios=[2, *[1] * (rows - 1)])[:, 0]
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
    return figure, axes


def _leaf(ys: Any) -> Tensor:
    """The first leaf; of complex numbers the real parts, then the imaginary ones."""
    leaf = pytree.tree_leaves(ys)[0].detach()
    if leaf.is_complex():
        leaf = torch.cat([leaf.real, leaf.imag], -1) if leaf.dim() > 1 else torch.stack([leaf.real, leaf.imag], -1)
    return leaf.cpu().double()


def _of_sample(leaf: Tensor, sample: int) -> Tensor:
    """[T, numbers] of outputs [T, ...]; a state of one axis has no samples."""
    if leaf.dim() < 3:
        _chosen("sample", (sample,), 1, 1)
        return leaf.reshape(len(leaf), -1)
    _chosen("sample", (sample,), leaf.shape[1], 1)
    return leaf[:, sample].reshape(len(leaf), -1)


def _curves(solution: Any, sample: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """(times, outputs [T, numbers], and of the interpolant, if there is one, times and values between)."""
    values = _of_sample(_leaf(solution.ys), sample)
    t = solution.t.detach().cpu()
    t = t[sample] if t.dim() == 2 else t
    known = ~(t.isnan() | values.isnan().all(1))
    t, values = t[known], values[known]
    if solution.interpolant is None or len(t) < 2:
        return t, values, None
    end = t[-1] if solution.event_t is None else _clipped(solution, sample, t[-1])
    between = torch.linspace(float(t[0]), float(end), _POINTS, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        found = _of_sample(_leaf(solution.interpolant(between)), sample)
    return t, values, (between, found)


def _clipped(solution: Any, sample: int, end: Tensor) -> Tensor:
    """The end of the curve: the event that ended the solve, if one did."""
    events = solution.event_t.detach().cpu().reshape(-1)
    event = events[min(sample, len(events) - 1)]
    return end if bool(event.isnan()) else event


def _steps(solution: Any, sample: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor] | None:
    """(t, dt, error ratios, accepted), each [N]; None where steps were not kept. On a grid there are no ratios."""
    if solution.attempts is not None:
        of = [x[:, sample] if x.dim() == 2 else x for x in solution.attempts]
        ran = ~of[0].isnan()
        return of[0][ran], of[1][ran].abs(), of[2][ran], of[3][ran]
    if solution.interpolant is None or not solution.interpolant.steps:
        return None
    ends = torch.stack([torch.stack([step.t0[0], step.t1[0]]) for step in solution.interpolant.steps]).cpu()
    return ends[:, 0], (ends[:, 1] - ends[:, 0]).abs(), None, torch.ones(len(ends), dtype=torch.bool, device="cpu")


def _draw_steps(axes: Any, t: Tensor, dt: Tensor, ratio: Tensor | None, accepted: Tensor) -> None:
    for axis, values, name in zip(axes, (dt, ratio), ("step size", "error ratio"), strict=False):
        if values is None:
            continue
        good = accepted & (values > 0)  # of a field without error the ratio is 0, which no logarithm shows
        axis.semilogy(t[good], values[good], ".-", color=_ACCEPTED, markersize=4, linewidth=0.8, label="accepted")
        bad = ~accepted & values.isfinite() & (values > 0)
        if bool(bad.any()):
            axis.semilogy(t[bad], values[bad], "x", color=_REJECTED, markersize=5, label="rejected")
            axis.legend(fontsize=8)
        axis.set_ylabel(name)
    if ratio is not None:
        axes[-1].axhline(1.0, color="#555555", linewidth=0.8, linestyle="--")


def _mark_events(solution: Any, sample: int, axes: Any) -> None:
    if solution.event_t is None:
        return
    times = solution.event_t.detach().cpu()
    times = times[..., sample] if solution.per_sample else times
    for time in times.reshape(-1).tolist():
        if time == time:
            for axis in axes:
                axis.axvline(time, color="#555555", linewidth=0.8, linestyle=":")


def _chosen(name: str, given: Sequence[int] | None, count: int, most: int) -> list[int]:
    """Raises ValueError where one of those given is not there."""
    chosen = list(range(min(count, most))) if given is None else [int(i) for i in given]
    wrong = [i for i in chosen if not 0 <= i < count]
    if wrong:
        raise ValueError(f"{name} must lie in 0 .. {count - 1}, got {wrong[0]}")
    return chosen
