"""The plots of odenet_digits.py."""

import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: works where there is no display
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, MaxNLocator

COLOURS = {"residual network": "tab:orange", "ODE-Net": "tab:blue"}


def power(tolerance: float) -> str:
    """1e-3, not 1e-03."""
    return f"{tolerance:.0e}".replace("e-0", "e-")


def save(figure: plt.Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.grid(True, which="major", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_accuracy(results: dict[str, list[dict[str, Any]]], target: float, path: Path) -> None:
    """Test accuracy of every seed and parameters, the two networks side by side."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    width = 0.8 / len(results)
    lowest = min(run["accuracy"] for runs in results.values() for run in runs)
    for i, (name, runs) in enumerate(results.items()):
        places = [run["seed"] + (i - (len(results) - 1) / 2) * width for run in runs]
        values = [100 * run["accuracy"] for run in runs]
        left.plot(places, values, "o", ms=9, color=COLOURS[name], label=f"{name}, mean {statistics.fmean(values):.2f} %")
        for x, value in zip(places, values, strict=True):
            left.annotate(f"{value:.2f}", (x, value), (0, 8), textcoords="offset points", ha="center", fontsize=9)
        bar = right.bar(name, runs[0]["parameters"], width=0.55, color=COLOURS[name])
        right.bar_label(bar, [f"{runs[0]['parameters']:,}"], padding=3)
    left.axhline(100 * target, color="grey", ls="--", lw=1, label=f"target for the ODE-Net's mean, {100 * target:.0f} %")
    left.set(xlabel="seed", ylabel="test accuracy after the last epoch, %", title="accuracy")
    left.set_xlim(-0.6, len(next(iter(results.values()))) - 0.4)
    left.set_ylim(min(100 * lowest, 100 * target) - 1.2, 100.2)
    left.set_xticks([run["seed"] for run in next(iter(results.values()))])
    left.legend(loc="lower left", fontsize=9)
    right.set(ylabel="parameters", title="parameters")
    right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    right.margins(y=0.12)
    save(figure, path)


def plot_memory(rows: list[dict[str, Any]], batch: int, path: Path) -> None:
    """Peak live storage against the number of steps."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    steps = [row["steps"] for row in rows]
    for gradient, colour, marker in (("direct", "tab:red", "s"), ("adjoint", "tab:blue", "o")):
        axes.plot(steps, [row[gradient] / 2**20 for row in rows], marker=marker, color=colour, label=f'gradient="{gradient}"')
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(steps, [str(n) for n in steps])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set(xlabel="steps of rk4", ylabel="peak live storage, MiB", title=f"a training step of the ODE-Net, batch {batch}")
    axes.legend()
    save(figure, path)


def plot_nfe(runs: list[dict[str, Any]], tolerance: float, path: Path) -> None:
    """Calls of the field a training step, by epoch: thin lines are the seeds, thick lines their mean."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for key, label, colour, marker in (
        ("nfe_forward", "forward", "tab:blue", "o"),
        ("nfe_backward", "backward", "tab:red", "s"),
    ):
        series = [run[key] for run in runs]
        epochs = range(1, len(series[0]) + 1)
        if len(series) > 1:
            for values in series:
                axes.plot(epochs, values, color=colour, lw=0.8, alpha=0.45)
        mean = [statistics.fmean(values) for values in zip(*series, strict=True)]
        axes.plot(epochs, mean, color=colour, marker=marker, ms=4, lw=2, label=label)
    axes.set_ylim(0, 1.1 * max(max(run[key]) for run in runs for key in ("nfe_forward", "nfe_backward")))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    seeds = f"mean and each of {len(runs)} seeds" if len(runs) > 1 else "one seed"
    axes.set(xlabel="epoch", ylabel="NFE of a training step", title=f"tolerance {power(tolerance)}, {seeds}")
    axes.legend()
    save(figure, path)


def plot_trade(adaptive: list[dict[str, Any]], euler: list[dict[str, Any]], path: Path) -> None:
    """Error against NFE and against time: dopri5 by tolerance, Euler by number of steps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained", sharey=True)
    for axes, key, scale in ((left, "nfe", 1), (right, "seconds", 1e3)):
        for rows, label, colour, marker in (
            (adaptive, "dopri5, by tolerance", "tab:blue", "o"),
            (euler, "Euler, by number of steps", "tab:orange", "s"),
        ):
            x = [scale * row[key] for row in rows]
            y = [row["error"] for row in rows]
            axes.loglog(x, y, marker=marker, color=colour, label=label)
            for row, place in zip(rows, zip(x, y, strict=True), strict=True):
                text = power(row["tolerance"]) if "tolerance" in row else str(row["steps"])
                offset = (-6, -4) if "tolerance" in row else (6, 3)
                side = "right" if "tolerance" in row else "left"
                axes.annotate(text, place, offset, textcoords="offset points", ha=side, fontsize=8, color=colour)
        label = "one Euler step: a residual block"
        axes.plot(scale * euler[0][key], euler[0]["error"], "*", ms=15, color="tab:red", label=label, zorder=3)
        axes.margins(x=0.1)
    left.set(xlabel="NFE, forward", ylabel="relative error of the block's output", title="error against NFE")
    right.set(xlabel="time, forward, ms", title="error against time")
    left.legend(loc="lower left", fontsize=9)
    save(figure, path)
