"""The ratios of all runs in results/, one column a file, as the table of results/README.md.

    python benchmarks/ratios.py [--write]

A ratio is a peer's time over ours, above 1 ours is faster, but for shares, which are parts of a limit. `--write` puts the table
into results/README.md. A figure that a run did not measure stays empty.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- table -->\n", "<!-- end -->\n"
Run = dict[str, Any]


def gradient(ours: str, theirs: str, steps: str) -> Callable[[Run], float]:
    return lambda run: run["gradients"][steps][theirs]["solver_step"] / run["gradients"][steps][ours]["solver_step"]


def share(way: str, steps: str) -> Callable[[Run], float]:
    return lambda run: run["gradients"][steps][way]["share"]


def compiled(case: str, peer: str, control: str = "joint", kind: str = "forward") -> Callable[[Run], float]:
    def ratio(run: Run) -> float:
        rows = [row for row in run["compiled"][case] if row[""] == peer and row["control"] == control]
        return min(row[f"{kind} / ours"] for row in rows if row.get("gradient") != "adjoint")

    return ratio


def ensemble(peer: str) -> Callable[[Run], float]:
    return lambda run: run["ensemble"]["lorenz, rk4, 8,400 trajectories"][peer]["ratio"]


RATIOS: dict[str, Callable[[Run], float]] = {
    "solver alone to torchdiffeq's, 64 x 8, 37 steps: forward": lambda run: run["small"]["forward_37"]["ratio"]["solver"],
    "... adjoint": lambda run: run["small"]["adjoint_37"]["ratio"]["solver"],
    "... direct": lambda run: run["small"]["direct_37"]["ratio"]["solver"],
    "... convolution block: forward": lambda run: run["convolution"]["forward"]["ratio"]["solver"],
    "... convolution block: adjoint": lambda run: run["convolution"]["adjoint"]["ratio"]["solver"],
    "... 64 steps: adjoint": gradient("adjoint", "torchdiffeq odeint_adjoint", "64"),
    "... 64 steps: checkpoint, to direct": gradient("checkpoint", "torchdiffeq odeint", "64"),
    "... 1,024 steps: adjoint": gradient("adjoint", "torchdiffeq odeint_adjoint", "1024"),
    "... 1,024 steps: checkpoint, to direct": gradient("checkpoint", "torchdiffeq odeint", "1024"),
    "func's share of the time, 1,024 steps: adjoint": share("adjoint", "1024"),
    "func's share of the time, 1,024 steps: checkpoint": share("checkpoint", "1024"),
    "compiled, one Lorenz trajectory: to C++ by hand": compiled("lorenz-one", "by hand, C++"),
    "one Lorenz trajectory: to diffrax": compiled("lorenz-one", "diffrax"),
    "Lotka-Volterra, per sample: to C++ by hand": compiled("lotka-volterra", "by hand, C++", "per_sample"),
    "Lotka-Volterra, per sample: to diffrax": compiled("lotka-volterra", "diffrax", "per_sample"),
    "Lotka-Volterra, joint: to torchdiffeq": compiled("lotka-volterra", "torchdiffeq"),
    "Lotka-Volterra, per sample: two threads to one": lambda run: run["compiled"]["threads"]["ratio"],
    "10,000 Lorenz, float32: to C++ by hand": compiled("lorenz-many, float32", "by hand, C++", "per_sample"),
    "10,000 Lorenz, float64: to C++ by hand": compiled("lorenz-many, float64", "by hand, C++", "per_sample"),
    "net 2-50-2, batch 20: to diffrax": compiled("spiral, batch 20", "diffrax"),
    "net 2-50-2, batch 20: to torchdiffeq": compiled("spiral, batch 20", "torchdiffeq"),
    "net 2-50-2, batch 20, gradient: to diffrax": compiled("spiral, batch 20", "diffrax", kind="training"),
    "net 2-50-2, batch 20, gradient: to torchdiffeq": compiled("spiral, batch 20", "torchdiffeq", kind="training"),
    "net 2-50-2, batch 1,024: to diffrax": compiled("spiral, batch 1,024", "diffrax"),
    "net 2-50-2, batch 1,024: to torchdiffeq": compiled("spiral, batch 1,024", "torchdiffeq"),
    "net 2-50-2, batch 1,024, gradient: to diffrax": compiled("spiral, batch 1,024", "diffrax", kind="training"),
    "net 2-50-2, batch 1,024, gradient: to torchdiffeq": compiled("spiral, batch 1,024", "torchdiffeq", kind="training"),
    "net 65-128-128-64, batch 256: to diffrax": compiled("mlp, batch 256", "diffrax"),
    "net 65-128-128-64, batch 256: to torchdiffeq": compiled("mlp, batch 256", "torchdiffeq"),
    "net 65-128-128-64, batch 256, gradient: to diffrax": compiled("mlp, batch 256", "diffrax", kind="training"),
    "net 65-128-128-64, batch 256, gradient: to torchdiffeq": compiled("mlp, batch 256", "torchdiffeq", kind="training"),
    "net 65-128-128-64: share of a matrix product's arithmetic": lambda run: run["compiled"]["peak"]["peak"],
    "8,400 Lorenz, 1,000 steps of rk4: to torchdiffeq": ensemble("torchdiffeq"),
    "8,400 Lorenz, 1,000 steps of rk4: to a JAX loop": ensemble("JAX loop, cpu"),
    "flow with exact trace: to diffrax": compiled("flow, batch 512", "diffrax"),
    "flow with exact trace, gradient: to diffrax": compiled("flow, batch 512", "diffrax", kind="training"),
}


def found(run: Run, ratio: Callable[[Run], float]) -> str:
    try:
        return f"{ratio(run):.2g}" if ratio(run) < 10 else f"{ratio(run):.0f}"
    except (KeyError, ValueError):  # not measured in this run
        return ""


def table() -> str:
    runs = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*-cpu.json"))}
    lines = [f"| ratio | {' | '.join(runs)} |", "| --- |" + " --- |" * len(runs)]
    for name, ratio in RATIOS.items():
        lines.append(f"| {name} | {' | '.join(found(run, ratio) for run in runs.values())} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into results/README.md")
    if not parser.parse_args().write:
        print(table(), end="")
        return
    page = RESULTS / "README.md"
    before, rest = page.read_text().split(BEGIN)
    page.write_text(before + BEGIN + table() + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
