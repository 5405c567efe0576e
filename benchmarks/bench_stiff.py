"""Stiff problems of the Bari test set: digits, steps and time beside scipy's implicit solvers, in one run.

    python benchmarks/bench_stiff.py [--json FILE] [--quick]

End values are right to more digits than float64 has (160-bit arithmetic, two meshes each). atol is rtol times the size that the
problem's smallest component reaches. digits: -log10 of the largest relative error of a component. factorisations: of the matrix
of an implicit method. A stepper of torch spends its time in calls of Python and of small operations; scipy's in Python alone.
"""

import argparse
import statistics
import time
import warnings
from typing import Any

import torch
from initial_values import STIFF
from measure import print_machine, print_table, save

import odenet_cuda

try:
    from scipy.integrate import solve_ivp
except ImportError:
    raise SystemExit("this benchmark compares with scipy: pip install 'odenet-cuda[bench]'") from None


PROBLEMS = {name: STIFF[name] for name in ("ROBER", "OREGO", "VDPOL", "HIRES")}
COMPILED = "rodas5p, compiled"
OURS, THEIRS = (COMPILED, "rodas5p", "rosenbrock23", "kvaerno5", "kvaerno3"), ("Radau", "BDF", "LSODA")
FEW = 20  # calls of a compiled solve, of which the median counts
MOST_STEPS = 20_000


def ours(method: str, name: str, rtol: float) -> dict[str, Any]:
    problem = PROBLEMS[name]
    field, state = problem.torch, torch.tensor(problem.y0, dtype=torch.float64)
    compiled = method == COMPILED
    solved: Any = odenet_cuda.compile(field) if compiled else field
    how: dict[str, Any] = {
        "method": method.split(",")[0],
        "rtol": rtol,
        "atol": rtol * problem.atol,
        "max_num_steps": MOST_STEPS,
    }
    times = []
    for _ in range(FEW + 1 if compiled else 1):  # the first compiles
        begin = time.process_time()
        try:
            solution = odenet_cuda.solve(solved, state, [0.0, problem.end], **how)
        except odenet_cuda.SolverError as error:
            return {"note": error.status}
        times.append(time.process_time() - begin)
    if compiled and solution.engine != "compiled":
        return {"note": solution.explanation["compiled"]}
    spent, stats = statistics.median(times[compiled:]), solution.stats
    steps = stats.num_accepted + stats.num_rejected
    row = {"digits": problem.digits(solution.ys[-1].numpy()), "steps": steps, "nfe": stats.nfe}
    if method.startswith("ro"):  # Rosenbrock methods take one a step; kvaerno mostly, and more where iterations are slow
        row["factorisations"] = steps
    return {**row, "seconds": spent}


def theirs(method: str, name: str, rtol: float) -> dict[str, Any]:
    problem = PROBLEMS[name]
    begin = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        solution = solve_ivp(problem.numpy, (0, problem.end), problem.y0, method=method, rtol=rtol, atol=rtol * problem.atol)
    spent = time.process_time() - begin
    if not solution.success:
        return {"note": solution.message}
    row = {"digits": problem.digits(solution.y[:, -1]), "steps": len(solution.t) - 1, "nfe": solution.nfev}
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
