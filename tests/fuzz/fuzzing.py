"""How long and with which seed a fuzzer runs, and what all of them compare with.

In ``make test`` each tries a few examples, always the same. ``make fuzz`` sets ODENET_FUZZ=1 and hands pytest a new
``--hypothesis-seed`` every round; its output says how to repeat one.
"""

import math
import os
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, settings
from torch import Tensor
from torch.utils import _pytree as pytree

from odenet_cuda.compiled import build, field

FRESH = os.environ.get("ODENET_FUZZ") == "1"  # new examples; else the same few
TRIED: Counter = Counter()
CHILD_SECONDS = 240  # a child process that takes longer hangs

ADAPTIVE = ("dopri5", "dopri8", "tsit5", "bosh3", "fehlberg2", "adaptive_heun")
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4")


def examples(short: int, fresh: int, steps: int = 20, shrink: bool = True) -> settings:
    """short: how many in `make test`; fresh: in a round of `make fuzz`. steps: calls of rules of a state machine. shrink:
    whether a fault's program is made smaller, which tries it many times."""
    return settings(
        max_examples=fresh if FRESH else short,
        derandomize=not FRESH,
        database=None,
        deadline=None,
        print_blob=FRESH,
        stateful_step_count=steps,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if shrink else [])],  # Phase.explain takes too long
    )


def tick() -> None:
    """One more example; what an example before has proved wrong is to be seen, and told, again."""
    TRIED["examples"] += 1
    build._refused.clear()
    field._warned = False


def leaves_of(state: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor)]


def distance(found: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> float:
    """The largest difference, infinite where one is not a number or missing and the other is not."""
    assert len(found) == len(right)
    worst = 0.0
    for x, y in zip(found, right, strict=True):
        if x is None or y is None:
            rest = y if x is None else x
            worst = max(worst, 0.0 if rest is None else float(rest.detach().abs().max() if rest.numel() else 0.0))
            continue
        if x.shape != y.shape:
            return math.inf
        a, b = x.detach().double(), y.detach().double()
        same = (a == b) | (a.isnan() & b.isnan())
        gap = torch.where(same, torch.zeros_like(a), (a - b).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
        worst = max(worst, float(gap.max()) if gap.numel() else 0.0)
    return worst


def largest(tensors: Sequence[Tensor | None]) -> float:
    """The largest magnitude; infinite where one is not a number."""
    found = [float(x.detach().abs().double().nan_to_num(nan=math.inf).max()) for x in tensors if x is not None and x.numel()]
    return max(found, default=0.0)


def weighted(outputs: Sequence[Tensor]) -> Tensor:
    """A loss that every number of the outputs moves in its own way."""
    total = torch.zeros((), dtype=torch.float64)
    for i, x in enumerate(outputs):
        places = torch.arange(x.numel(), dtype=torch.float64)
        total = total + (x.double().reshape(-1) * torch.cos(1.7 * places + i)).sum()
    return total


def child(program: str, *, environment: dict[str, Any] | None = None, before: Callable | None = None) -> str:
    """What a new process that runs this program prints; it must end by itself, in time, with status 0."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    variables |= {name: str(value) for name, value in (environment or {}).items()}
    root = str(Path(__file__).resolve().parents[2])
    variables["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [variables.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", textwrap.dedent(program)],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=before,
    )
    try:
        out, err = process.communicate(timeout=CHILD_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        out, err = process.communicate()
        raise AssertionError(f"a process hangs; it ran\n{program}\nand said\n{out}\n{err[-2000:]}") from None
    assert process.returncode == 0, f"status {process.returncode} of\n{program}\n{out}\n{err[-3000:]}"
    return out
