"""DETEST and the stiff set, tabled: errors against evaluations, Jacobians and factorisations, beside scipy's methods.

    python benchmarks/detest.py [--write] [--quick]

In float64, to the end values of `initial_values`. DETEST with rtol = atol = the tolerance; the error is the largest at the end
in units of 1 + |y|. Its classes: the sums over their five problems, the geometric mean of error / tolerance, and the largest,
with its problem. The stiff set with atol as rtol times the size of the smallest component; digits: -log10 of the largest
relative error. Steps are those tried, of ours, and those accepted, of scipy's, which tells no others. Then the gradients of
ROBER by its rates: the largest relative error of the nine. --write: also into results/detest-<date>.md. Every solve that fails
or is far from the tolerance stands there too.
"""

import argparse
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from initial_values import DETEST, ROBER_AT_40, ROBER_BY_RATES, STIFF, InitialValues, rober_by_rates
from measure import print_machine, print_table, write_tables

import odenet_cuda
from odenet_cuda import jacobian

try:
    from scipy.integrate import solve_ivp
except ImportError:
    raise SystemExit("this benchmark compares with scipy: pip install 'odenet-cuda[bench]'") from None

TOLERANCES = (1e-3, 1e-6, 1e-9, 1e-12)
STIFF_TOLERANCES = (1e-4, 1e-7, 1e-10)
EXPLICIT, IMPLICIT = ("bosh3", "dopri5", "tsit5", "dopri8"), ("rosenbrock23", "rodas5p", "kvaerno3", "kvaerno5", "bdf")
LOW_ORDER = ("bosh3", "rosenbrock23", "kvaerno3")  # not where they take tens of thousands of steps
THEIRS, THEIR_STIFF = ("RK45", "DOP853", "LSODA", "Radau", "BDF"), ("Radau", "BDF", "LSODA")
MOST_STEPS = 50_000
GRADIENT_METHODS = ("rodas5p", "kvaerno5")
GRADIENT_TOLERANCES = (1e-6, 1e-8)


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Counts Jacobians and factorisations of the stepper while it is open: those of all systems of a step count as one."""
    counts = {"jacobians": 0, "factorisations": 0}
    by_y, factor = jacobian._by_y, torch.linalg.lu_factor_ex

    def count_jacobian(*args: Any) -> Any:
        counts["jacobians"] += 1
        return by_y(*args)

    def count_factors(*args: Any, **how: Any) -> Any:
        counts["factorisations"] += 1
        return factor(*args, **how)

    jacobian._by_y, torch.linalg.lu_factor_ex = count_jacobian, count_factors
    try:
        yield counts
    finally:
        jacobian._by_y, torch.linalg.lu_factor_ex = by_y, factor


def ours(method: str, problem: InitialValues, rtol: float, atol: float) -> tuple[np.ndarray | None, dict[str, Any]]:
    y0 = torch.tensor(problem.y0, dtype=torch.float64)
    how: dict[str, Any] = {"method": method, "rtol": rtol, "atol": atol, "max_num_steps": MOST_STEPS, "compile": False}
    with torch.no_grad(), warnings.catch_warnings(), counted() as counts:
        warnings.simplefilter("ignore")
        try:
            solution = odenet_cuda.solve(problem.torch, y0, [0.0, problem.end], **how)
        except odenet_cuda.SolverError as error:
            return None, {"note": error.status}
    stats = solution.stats
    return solution.ys[-1].numpy(), {"steps": stats.num_accepted + stats.num_rejected, "nfe": stats.nfe, **counts}


def theirs(method: str, problem: InitialValues, rtol: float, atol: float) -> tuple[np.ndarray | None, dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y0 = np.array(problem.y0, dtype=float)
        solution = solve_ivp(problem.numpy, (0, problem.end), y0, method=method, rtol=rtol, atol=atol)
    if not solution.success:
        return None, {"note": solution.message}
    row = {"steps": len(solution.t) - 1, "nfe": solution.nfev, "jacobians": int(solution.njev)}
    return solution.y[:, -1], {**row, "factorisations": int(solution.nlu)}


def solved(method: str, problem: InitialValues, rtol: float, atol: float) -> tuple[np.ndarray | None, dict[str, Any]]:
    return (theirs if method in THEIRS else ours)(method, problem, rtol, atol)


def class_rows(letter: str, tolerances: tuple[float, ...]) -> list[dict[str, Any]]:
    names, rows = [name for name in DETEST if name[0] == letter], []
    for tol in tolerances:
        for method in (*EXPLICIT, *IMPLICIT, *THEIRS):
            if method in LOW_ORDER and tol < 1e-6:
                continue
            total = dict.fromkeys(("steps", "nfe", "jacobians", "factorisations"), 0)
            ratios, failed = {}, []
            for name in names:
                y, row = solved(method, DETEST[name], tol, tol)
                if y is None:
                    failed.append(f"{name}: {row['note']}")
                    continue
                ratios[name] = max(DETEST[name].error(y), 1e-17) / tol
                for key in total:
                    total[key] += row[key]
            worst = max(ratios, key=lambda name: ratios[name])
            mean = math.exp(np.mean(np.log(list(ratios.values()))))
            rows.append(
                {
                    "tolerance": f"{tol:.0e}",
                    "method": method,
                    **total,
                    "error / tolerance": f"{mean:.2g}",
                    "largest": f"{ratios[worst]:.2g} ({worst})",
                    "note": "; ".join(failed),
                }
            )
    return rows


def stiff_rows(name: str, tolerances: tuple[float, ...]) -> list[dict[str, Any]]:
    problem, rows = STIFF[name], []
    for rtol in tolerances:
        radau: dict[str, Any] = {}
        for method in (*THEIR_STIFF, *IMPLICIT):
            if method in LOW_ORDER and rtol < 1e-6:
                continue
            y, row = solved(method, problem, rtol, rtol * problem.atol)
            if method == "Radau":
                radau = row
            digits = "" if y is None else f"{problem.digits(y):.1f}"
            notes = [row["note"]] if y is None else []
            if y is not None and problem.digits(y) < -math.log10(rtol) - 1:
                notes.append("beyond 10 times the tolerance")
            if y is not None and method not in THEIR_STIFF and "steps" in radau:
                notes += [f"{row[key] / radau[key]:.1f} x Radau's {key}" for key in ("steps", "factorisations")
                          if row[key] > 2 * radau[key]]  # fmt: skip
            keys = ("steps", "nfe", "jacobians", "factorisations")
            rows.append(
                {
                    "rtol": f"{rtol:.0e}",
                    "method": method,
                    "digits": digits,
                    **{key: row.get(key, "") for key in keys},
                    "note": ", ".join(notes),
                }
            )
    return rows


def rate_rows(tolerances: tuple[float, ...]) -> list[dict[str, Any]]:
    """The largest relative error of a derivative by a rate, of every number of ROBER."""
    rows, right = [], torch.tensor(ROBER_BY_RATES, dtype=torch.float64)
    known = torch.tensor(ROBER_AT_40, dtype=torch.float64)
    for method in GRADIENT_METHODS:
        for gradient in ("direct", "checkpoint", "quadrature", "adjoint"):
            for rtol in tolerances:
                how = {"method": method, "gradient": gradient, "rtol": rtol, "atol": rtol * 1e-6, "compile": False}
                row: dict[str, Any] = {"method": method, "gradient": gradient, "rtol": f"{rtol:.0e}", "y": "", "by rates": ""}
                try:
                    y, log_k = rober_by_rates(lambda f, y0, t, how=how: odenet_cuda.solve(f, y0, t, **how).ys[-1])
                    row["y"] = f"{float((y.detach() / known - 1).abs().max()):.1e}"
                    found = [torch.autograd.grad(y[i], log_k, retain_graph=True)[0] for i in range(3)]
                    row["by rates"] = f"{float((torch.stack(found, 1) / right - 1).abs().max()):.1e}"
                except odenet_cuda.SolverError as error:
                    row["by rates"] = error.status
                except NotImplementedError:
                    row["by rates"] = "refused"
                rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="also into results/")
    parser.add_argument("--quick", action="store_true", help="one tolerance")
    parser.add_argument("--stiff", action="store_true", help="the stiff set alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print_machine()
    tables: list[tuple[str, list[dict[str, Any]]]] = []
    for letter in "" if arguments.stiff else "ABCDE":
        tables.append((f"DETEST {letter}", class_rows(letter, TOLERANCES[1:2] if arguments.quick else TOLERANCES)))
        print_table(*tables[-1])
    for name in STIFF:
        tables.append((name, stiff_rows(name, STIFF_TOLERANCES[1:2] if arguments.quick else STIFF_TOLERANCES)))
        print_table(*tables[-1])
    tables.append(("Gradients of ROBER at t = 40 by its rates", rate_rows(GRADIENT_TOLERANCES)))
    print_table(*tables[-1])
    if arguments.write:
        write_tables("detest", "DETEST and the stiff set", "python benchmarks/detest.py --write", tables)


if __name__ == "__main__":
    main()
