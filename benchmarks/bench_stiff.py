"""Stiff problems of the Bari test set: digits, steps and time beside scipy's implicit solvers, in one run.

    python benchmarks/bench_stiff.py [--json FILE] [--quick]

End values are right to more digits than float64 has (160-bit arithmetic, two meshes each). atol is rtol times the size that the
problem's smallest component reaches. digits: -log10 of the largest relative error of a component. factorisations: of the matrix
of an implicit method. A stepper of torch spends its time in calls of Python and of small operations; scipy's in Python alone.
"""

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from measure import print_machine, print_table, save
from torch import Tensor

import odenet_cuda

try:
    from scipy.integrate import solve_ivp
except ImportError:
    raise SystemExit("this benchmark compares with scipy: pip install 'odenet-cuda[bench]'") from None


def rober(y: Any, stack: Callable) -> Any:
    a, b, c = y
    return stack([-0.04 * a + 1e4 * b * c, 0.04 * a - 1e4 * b * c - 3e7 * b * b, 3e7 * b * b])


def orego(y: Any, stack: Callable) -> Any:
    a, b, c = y
    return stack([77.27 * (b + a * (1 - 8.375e-6 * a - b)), (c - (1 + a) * b) / 77.27, 0.161 * (a - c)])


def vdpol(y: Any, stack: Callable) -> Any:
    a, b = y
    return stack([b, ((1 - a * a) * b - a) / 1e-6])


def hires(y: Any, stack: Callable) -> Any:
    a, b, c, d, e, f, g, h = y
    last = 280 * f * h - 1.81 * g
    return stack(
        [
            -1.71 * a + 0.43 * b + 8.32 * c + 0.0007,
            1.71 * a - 8.75 * b,
            -10.03 * c + 0.43 * d + 0.035 * e,
            8.32 * b + 1.71 * c - 1.12 * d,
            -1.745 * e + 0.43 * (f + g),
            -280 * f * h + 0.69 * d + 1.71 * e - 0.43 * f + 0.69 * g,
            last,
            -last,
        ]
    )


# right-hand side, y0, the end, atol over rtol, y there
PROBLEMS: dict[str, tuple[Callable, list[float], float, float, list[float]]] = {
    "ROBER": (rober, [1, 0, 0], 1e11, 1e-8, [2.08334014970129423e-8, 8.33336077033478340e-14, 9.99999979166515169e-1]),
    "OREGO": (orego, [1, 2, 3], 360, 1e-2, [1.00081487031852272, 1.22817852154988799e3, 1.32055494284650828e2]),
    "VDPOL": (vdpol, [2, 0], 2, 1e-2, [1.70616773217046501, -8.92809701024816548e-1]),
    "HIRES": (
        hires,
        [1, 0, 0, 0, 0, 0, 0, 0.0057],
        321.8122,
        1e-4,
        [
            *(7.3713125733256678e-4, 1.4424857263161847e-4, 5.8887297409675750e-5, 1.1756513432831491e-3),
            *(2.3863561988313305e-3, 6.2389682527427958e-3, 2.8499983951857687e-3, 2.8500016048142313e-3),
        ],
    ),
}
COMPILED = "rodas5p, compiled"
OURS, THEIRS = (COMPILED, "rodas5p", "rosenbrock23", "kvaerno5", "kvaerno3"), ("Radau", "BDF", "LSODA")
FEW = 20  # calls of a compiled solve, of which the median counts
MOST_STEPS = 20_000


def digits(y: np.ndarray, expected: list[float]) -> float:
    return -math.log10(max(abs(y - expected) / np.abs(expected)))


def ours(method: str, name: str, rtol: float) -> dict[str, Any]:
    func, y0, end, ratio, expected = PROBLEMS[name]

    def field(t: Tensor, y: Tensor) -> Tensor:
        return func(y.unbind(-1), lambda parts: torch.stack(parts, -1))

    state = torch.tensor(y0, dtype=torch.float64)
    compiled = method == COMPILED
    solved: Any = odenet_cuda.compile(field) if compiled else field
    how: dict[str, Any] = {"method": method.split(",")[0], "rtol": rtol, "atol": rtol * ratio, "max_num_steps": MOST_STEPS}
    times = []
    for _ in range(FEW + 1 if compiled else 1):  # the first compiles
        begin = time.process_time()
        try:
            solution = odenet_cuda.solve(solved, state, [0.0, end], **how)
        except odenet_cuda.SolverError as error:
            return {"note": error.status}
        times.append(time.process_time() - begin)
    if compiled and solution.engine != "compiled":
        return {"note": solution.explanation["compiled"]}
    spent, stats = statistics.median(times[compiled:]), solution.stats
    steps = stats.num_accepted + stats.num_rejected
    row = {"digits": digits(solution.ys[-1].numpy(), expected), "steps": steps, "nfe": stats.nfe}
    if method.startswith("ro"):  # Rosenbrock methods take one a step; kvaerno mostly, and more where iterations are slow
        row["factorisations"] = steps
    return {**row, "seconds": spent}


def theirs(method: str, name: str, rtol: float) -> dict[str, Any]:
    func, y0, end, ratio, expected = PROBLEMS[name]
    begin = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        solution = solve_ivp(lambda t, y: func(y, np.array), (0, end), y0, method=method, rtol=rtol, atol=rtol * ratio)
    spent = time.process_time() - begin
    if not solution.success:
        return {"note": solution.message}
    row = {"digits": digits(solution.y[:, -1], expected), "steps": len(solution.t) - 1, "nfe": solution.nfev}
    return {**row, "factorisations": int(solution.nlu), "seconds": spent}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="also write the results there")
    parser.add_argument("--quick", action="store_true", help="one tolerance")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print_machine()
    results = []
    for name in PROBLEMS:
        rows = []
        for rtol in (1e-4,) if arguments.quick else (1e-4, 1e-7, 1e-10):
            for method in (*OURS, *THEIRS):
                if method in ("rosenbrock23", "kvaerno3") and rtol < 1e-6:
                    continue  # of order 2 and 3
                found = ours(method, name, rtol) if method in OURS else theirs(method, name, rtol)
                columns = ("digits", "steps", "nfe", "factorisations", "seconds", "note")
                rows.append({"rtol": rtol, "": method, **{column: found.get(column, "") for column in columns}})
        print_table(name, rows)
        results += [{"problem": name, **row} for row in rows]
    save(arguments.json, {"stiff": results})


if __name__ == "__main__":
    main()
