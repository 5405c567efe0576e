"""The order of every method as it is measured: of its steps, and of its dense output.

    python benchmarks/orders.py [--write]

In float64, on a problem with a closed form that is neither linear nor autonomous. steps: the slope of the error at the end over
the step, of solves in equal steps. dense output: the slope of the largest error inside one step from the exact solution, less
one. Both by least squares over the smallest steps whose error is still above rounding. --write: also into
results/orders-<date>.md. Ends with 1 where one lies below its nominal order by more than 0.2.
"""

import argparse
import datetime
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import print_machine, print_table
from torch import Tensor

import odenet_cuda
from odenet_cuda.methods import ADAPTIVE, FIXED, IMPLICIT, MULTISTEP, ON_GRID, STIFF

D = torch.float64
END = 1.5
COUNTS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
ROUNDING, NEAR = 3e-13, 3e-2  # errors between which a slope is taken
WITHIN = 0.2
# of those whose regions of stability shrink with the order
OPTIONS: dict[str, dict[str, Any]] = {
    "explicit_adams": {"max_order": 5},
    "implicit_adams": {"max_order": 8, "max_iters": 30},
    "fixed_adams": {"max_order": 8, "max_iters": 30},
}


def func(t: Tensor, y: Tensor) -> Tensor:
    """1 / sqrt(t + 1) and exp(sin t), coupled."""
    a, b = y.unbind(-1)
    return torch.stack([-(a**3) / 2 + (b * torch.exp(-torch.sin(t)) - 1), b * torch.cos(t) + (a * a * (t + 1) - 1)], -1)


def exact(t: Tensor) -> Tensor:
    return torch.stack([1 / (t + 1).sqrt(), t.sin().exp()], -1)


def solved(method: str, t: Tensor, size: float) -> Tensor:
    """In steps of this size."""
    steps = {"step_size": size} if method in ON_GRID else {"first_step": size, "min_step": size, "max_step": size}
    how: dict[str, Any] = {"rtol": 1e-14, "atol": 1e-14, **steps, **OPTIONS.get(method, {})}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return odenet_cuda.solve(func, exact(t[0]), t, method=method, compile=False, **how).ys


def end_error(method: str, size: float) -> float:
    t = torch.tensor([0.0, END], dtype=D)
    return float((solved(method, t, size)[-1] - exact(t)[-1]).abs().max())


def dense_error(method: str, size: float) -> float:
    t = torch.linspace(0, 1, 9, dtype=D) * size
    return float((solved(method, t, 1.01 * size) - exact(t)).abs()[1:-1].max())


def slope(error: Any, method: str, sizes: list[float]) -> tuple[float, str]:
    """(the order; the steps that it is from)."""
    points = []
    for size in sizes:
        try:
            found = error(method, size)
        except odenet_cuda.SolverError:  # too large a step for Newton's method to rounding
            continue
        if found < ROUNDING:
            break
        if found < NEAR:
            points.append((math.log(size), math.log(found)))
    points = points[-4:]
    if len(points) < 2:
        return math.nan, ""
    x, y = np.array(points).T
    return float(np.polyfit(x, y, 1)[0]), f"{math.exp(x[0]):.3g} to {math.exp(x[-1]):.3g}"


def rows_of(names: list[str]) -> list[dict[str, Any]]:
    rows = []
    for name in names:
        data = {**ADAPTIVE, **ON_GRID}[name]
        steps, between = slope(end_error, name, [END / n for n in COUNTS])
        dense, _ = slope(dense_error, name, [0.8 * 2 ** (-k / 2) for k in range(24)])
        rows.append(
            {
                "method": name,
                "order": data.order,
                "measured": round(steps, 2),
                "steps": between,
                "dense output": data.p_order,
                "measured there": round(dense - 1, 2),
                "note": _note(data.order, steps, data.p_order, dense - 1),
            }
        )
    return rows


def _note(order: int, steps: float, p_order: int, dense: float) -> str:
    notes = [
        f"{what}: {'more' if found > nominal else 'LESS'} than nominal"
        for what, nominal, found in (("steps", order, steps), ("dense output", p_order, dense))
        if not abs(found - nominal) <= WITHIN
    ]
    return ", ".join(notes)


KINDS = {
    "adaptive, explicit": [name for name in ADAPTIVE if name not in (*STIFF, "bdf", "scipy_solver")],
    "adaptive, for stiff systems": list(STIFF),
    "on a grid, explicit": list(FIXED),
    "on a grid, implicit": list(IMPLICIT),
    "of many steps": list(MULTISTEP),  # ab2 and dpmpp_2m, whose first step is one of Euler, are measured in the tests
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="also into results/")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print_machine()
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    lines = [
        f"# Orders, measured on {day}",
        "",
        "By `python benchmarks/orders.py --write`; what is measured, its docstring says.",
        "",
    ]
    failed = False
    for kind, names in KINDS.items():
        rows = rows_of(names)
        print_table(kind, rows)
        columns = list(rows[0])
        lines += [f"## {kind}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(str(row[column]) for column in columns) + " |" for row in rows] + [""]
        failed = failed or any("LESS" in row["note"] for row in rows)
    if arguments.write:
        (Path(__file__).parent / "results" / f"orders-{day}.md").write_text("\n".join(lines))
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
