"""How the benchmarks measure: interleaved runs, medians with spread, time inside func and its vector-Jacobian product."""

import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import odenet_cuda
from odenet_cuda import products


@dataclass
class Clock:
    """Adds up the time spent in what it wraps."""

    seconds: float = 0.0
    calls: int = 0

    def wrap(self, call: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = call(*args, **kwargs)
            self.seconds += time.perf_counter() - begin
            self.calls += 1
            return result

        return timed

    def reset(self) -> None:
        self.seconds, self.calls = 0.0, 0


class TimedField(torch.nn.Module):
    """func with a clock around it. The call skips Module's own, so that the clock costs little outside of what it counts."""

    def __init__(self, func: torch.nn.Module):
        super().__init__()
        self.func = func
        object.__setattr__(self, "clock", Clock())

    def __call__(self, t: torch.Tensor, y: Any) -> Any:
        clock = self.clock
        begin = time.perf_counter()
        k = self.func(t, y)
        clock.seconds += time.perf_counter() - begin
        clock.calls += 1
        return k


class timed_products:
    """While it is open, every vector-Jacobian product that a backward solve asks for is timed: torchdiffeq's and ours."""

    def __init__(self) -> None:
        self.clock = Clock()

    def __enter__(self) -> Clock:
        self._grad, self._product = torch.autograd.grad, products.product
        torch.autograd.grad, products.product = self.clock.wrap(self._grad), self.clock.wrap(self._product)
        return self.clock

    def __exit__(self, *_: Any) -> None:
        torch.autograd.grad, products.product = self._grad, self._product


@dataclass
class Samples:
    """Measured values of one case, by name of the quantity."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, **quantities: float) -> None:
        for name, value in quantities.items():
            self.values.setdefault(name, []).append(value)

    def median(self, name: str) -> float:
        return statistics.median(self.values[name])

    def milliseconds(self, name: str = "total") -> dict[str, float]:
        """Columns of a table: the median and the spread of a duration."""
        values = self.values[name]
        return {"total ms": self.median(name) * 1e3, "min": min(values) * 1e3, "max": max(values) * 1e3}

    def beside(self, first: "Samples", name: str) -> dict[str, float]:
        """Columns of a table: the duration, its spread, and its ratio to that of the first case."""
        median, least, most = self.milliseconds(name).values()
        ratio = self.median(name) / first.median(name)
        return {f"{name} ms": median, f"{name} min": least, f"{name} max": most, f"{name} ratio": ratio}

    def summary(self) -> dict[str, dict[str, float]]:
        return {
            name: {"median": statistics.median(v), "min": min(v), "max": max(v), "runs": len(v)}
            for name, v in self.values.items()
        }


def elapsed(call: Callable[[], Any], device: str = "cpu") -> float:
    """Seconds that call() takes: by the clock, or on CUDA between two events, with nothing else in flight."""
    if device == "cpu":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda.synchronize()
    events[0].record()
    call()
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) / 1e3


def find_device(name: str) -> str:
    """name, "cpu" or "cuda", or an exit in words where there is no such device."""
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda needs a GPU that torch can use")
    return name


def interleave(cases: dict[str, Callable[[], dict[str, float]]], runs: int, warmup: int = 2) -> dict[str, Samples]:
    """Each case in turn, `runs` times, so that a change in the machine's speed meets all of them."""
    samples = {name: Samples() for name in cases}
    for run in range(warmup + runs):
        for name, case in cases.items():
            quantities = case()
            if run >= warmup:
                samples[name].add(**quantities)
    return samples


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as info:
            model = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), model)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "odenet_cuda": odenet_cuda.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def print_machine() -> None:
    print(", ".join(f"{name} {value}" for name, value in machine().items()))


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}")
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_text(row.get(name, "")) for name in names] for row in rows]
    widths = [max(len(name), *(len(row[i]) for row in cells)) for i, name in enumerate(names)]
    for line in [names, ["-" * width for width in widths], *cells]:
        print(
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
        )


def _text(value: Any) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 1000
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )


def write_tables(name: str, title: str, command: str, tables: list[tuple[str, list[dict[str, Any]]]]) -> None:
    """Into results/<name>-<date>.md, with the machine."""
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    about = ", ".join(f"{key} {value}" for key, value in machine().items())
    lines = [f"# {title}, on {day}", "", f"By `{command}`; what is measured, its docstring says.", "", about, ""]
    for heading, rows in tables:
        columns = list(rows[0])
        lines += [f"## {heading}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(_text(row[column]) for column in columns) + " |" for row in rows] + [""]
    (Path(__file__).parent / "results" / f"{name}-{day}.md").write_text("\n".join(lines))


def save(path: str | None, results: dict[str, Any]) -> None:
    if path:
        with open(path, "w") as file:
            json.dump({"machine": machine(), **results}, file, indent=1)
        print(f"\nwritten to {path}")
