"""One picture: error against time of dopri5 in each library that is installed, for a formula and a small net.

    python benchmarks/picture.py [--out build/bench/error_and_time.png] [--json FILE] [--runs N] [--quick]

float64, one thread. Each curve goes through tolerances. All points of a case are timed in turn, after a first call of each
that is not timed (there fields are compiled, ours and diffrax's). Errors are relative, against torchdiffeq's dopri8 at 1e-12
in steps that land on the end. Ours is drawn twice: by the compiled engine, which reads these fields, and by the stepper, which
takes any.
"""

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from bench_peers import reference, relative_error
from fields import MLP, LotkaVolterra
from measure import elapsed, interleave, print_machine, print_table, save
from peers import LIBRARIES, OURS, Case

import odenet_cuda

COMPILED, STEPPER = "odenet_cuda, compiled", "odenet_cuda, stepper"
STYLES = {
    COMPILED: ("o-", "#d62728"),
    STEPPER: ("s-", "#ff9f5a"),
    "torchdiffeq": ("^--", "#1f77b4"),
    "diffrax": ("v--", "#2ca02c"),
    "torchdyn": ("x--", "#8c564b"),
}


def cases() -> list[tuple[str, str, Case]]:
    """A title, what is timed, and the case."""
    torch.manual_seed(0)
    populations = Case("", LotkaVolterra().double(), torch.tensor([[5.0, 3.0]], dtype=torch.float64), 10.0, 1e-5)
    net = Case("", MLP().double(), torch.randn(64, 8, dtype=torch.float64), 10.0, 1e-5)
    return [
        ("formula, 1 x 2, forward", "forward", populations),
        ("net 8-32-8, 64 x 8, forward", "forward", net),
        ("net 8-32-8, 64 x 8, with gradient", "training", net),
    ]


def solvers(case: Case, field: odenet_cuda.CompiledField) -> dict[str, Any]:
    """By label; ours first. field: that of the case, compiled."""
    found = {COMPILED: OURS.solver(dataclasses.replace(case, field=field), False), STEPPER: OURS.solver(case, False)}
    for library in LIBRARIES:
        if library is not OURS and not library.per_sample and library.installed():
            found[library.label] = library.solver(case, False)
    return found


def measure(direction: str, case: Case, tolerances: list[float], runs: int) -> list[dict[str, Any]]:
    """A row for each library and tolerance."""
    expected = reference(dataclasses.replace(case, tol=1e-10, tight=1e-2))[direction]
    ready, rows, field = {}, [], odenet_cuda.compile(case.field)
    for tol in tolerances:
        for label, solver in solvers(dataclasses.replace(case, tol=tol), field).items():
            call = getattr(solver, direction)
            error = relative_error(solver.tensors(call()), expected)
            assert label != COMPILED or field.explain() == "compiled", field.explain()
            rows.append({"": label, "tolerance": tol, "error": error})
            ready[label, tol] = lambda call=call: {"total": elapsed(call, "cpu")}
    samples = interleave(ready, runs, warmup=1)
    for row in rows:
        row["ms"] = 1e3 * samples[row[""], row["tolerance"]].median("total")
    return rows


def draw(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(10, 3.6), layout="constrained")
    for axis, (title, rows) in zip(axes, results.items(), strict=True):
        for label, (mark, color) in STYLES.items():
            points = [(row["ms"], row["error"]) for row in rows if row[""] == label]
            if points:
                axis.loglog(*zip(*points, strict=True), mark, color=color, markersize=4, linewidth=1.4, label=label)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("milliseconds", fontsize=9)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
    axes[0].set_ylabel("relative error", fontsize=9)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(STYLES), fontsize=9, frameon=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/bench/error_and_time.png"), help="the picture")
    parser.add_argument("--json", help="also write the numbers there")
    parser.add_argument("--runs", type=int, help="runs of each point; 9 unless given, 2 with --quick")
    parser.add_argument("--quick", action="store_true", help="two tolerances")
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_ENABLE_X64", "1")
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    torch.set_num_threads(1)
    print_machine()
    tolerances = [1e-4, 1e-6] if arguments.quick else [10.0**-i for i in range(3, 10)]
    results = {}
    for title, direction, case in cases():
        results[title] = measure(direction, case, tolerances, arguments.runs or (2 if arguments.quick else 9))
        print_table(title, results[title])
    draw(results, arguments.out)
    save(arguments.json, {"picture": results})


if __name__ == "__main__":
    main()
