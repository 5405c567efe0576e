"""A wide stiff system with a known pattern: Fisher's equation in 1,000 cells, beside no pattern and scipy with its pattern.

    python benchmarks/bench_sparse.py [--json FILE] [--cells N] [--write]

y' = 25 n^2 / 10^4 * second difference + y (1 - y), a front that runs from the left, to t = 2. error: the largest at the end, to
a solve at a thousandth of the tolerance. products: with df/dy, a step. Seconds on the processor, one thread.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from measure import print_machine, print_table, save, write_tables
from torch import Tensor

import odenet_cuda

try:
    from scipy.integrate import solve_ivp
    from scipy.sparse import diags
except ImportError:
    raise SystemExit("this benchmark compares with scipy: pip install 'odenet-cuda[bench]'") from None

END = 2.0


def slope(rate: float) -> Callable[[Tensor, Tensor], Tensor]:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return rate * torch.diff(torch.nn.functional.pad(torch.diff(y), (1, 1))) + y * (1 - y)

    return func


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="also write the results there")
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--write", action="store_true", help="also into results/")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print_machine()
    n = arguments.cells
    rate = 25.0 * n * n / 1e4
    y0 = np.where(np.arange(n) < n // 10, 1.0, 0.0)
    band = diags([1, 1, 1], [-1, 0, 1], shape=(n, n), dtype=float)
    pattern = torch.from_numpy(band.toarray() != 0)

    def numpy(t: float, y: np.ndarray) -> np.ndarray:
        return rate * np.diff(np.pad(np.diff(y), 1)) + y * (1 - y)

    def ours(method: str, rtol: float, known: Tensor | None) -> tuple[np.ndarray, dict[str, Any]]:
        with torch.no_grad():
            solution = odenet_cuda.solve(
                slope(rate),
                torch.from_numpy(y0),
                [0.0, END],
                method=method,
                rtol=rtol,
                atol=rtol,
                jac_sparsity=known,
                compile=False,
            )
        stats = solution.stats
        return solution.ys[-1].numpy(), {"steps": stats.num_accepted + stats.num_rejected, "nfe": stats.nfe}

    def theirs(method: str, rtol: float, known: Any) -> tuple[np.ndarray, dict[str, Any]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = solve_ivp(numpy, (0, END), y0, method=method, rtol=rtol, atol=rtol, jac_sparsity=known)
        return found.y[:, -1], {"steps": len(found.t) - 1, "nfe": found.nfev}

    right = theirs("Radau", 1e-9, band)[0]
    rows = []
    for name, run, known in (
        ("rodas5p, no pattern", ours, None),
        ("rodas5p", ours, pattern),
        ("kvaerno5", ours, pattern),
        ("bdf", ours, pattern),
        ("BDF, no pattern", theirs, None),
        ("BDF", theirs, band),
        ("Radau", theirs, band),
    ):
        begin = time.process_time()
        y, row = run(name.split(",")[0], 1e-6, known)
        spent = time.process_time() - begin
        rows.append(
            {
                "": name,
                "error": float(np.abs(y - right).max()),
                **row,
                "seconds": spent,
                "ms a step": 1e3 * spent / row["steps"],
            }
        )
    title = f"Fisher's equation, {n} cells, rtol = atol = 1e-6"
    print_table(title, rows)
    save(arguments.json, {"sparse": rows})
    if arguments.write:
        write_tables("sparse", "A front in many cells", "python benchmarks/bench_sparse.py --write", [(title, rows)])


if __name__ == "__main__":
    main()
