"""The few lines that the table of gpu_check has of each part; all figures are in the files beside it."""

from collections.abc import Iterator
from typing import Any

Details = dict[str, Any]


def pairs(result: Details, *without: str) -> str:
    return ", ".join(f"{name} {value}" for name, value in result.items() if name not in without)


def native_lines(details: Details) -> Iterator[str]:
    """What is wrong, and figures of the largest sizes."""
    for result in details.get("results", []):
        if result.get("checked"):
            yield f"{result['checked']} comparisons, {result['wrong']} wrong"
        bad = "failed" in result or ("wrong" in result and "checked" not in result)
        if bad or ("checked" not in result and result.get("MiB", 256) >= 64 and result.get("slopes", 6) in (0, 6)):
            yield f"{'WRONG ' * bad}{result['what']}: {pairs(result, 'what')}"


def smoke_lines(details: Details) -> Iterator[str]:
    results = [result for result in details.get("results", []) if "good" in result]
    if results:
        yield f"{sum(result['good'] for result in results)} of {len(results)} are good"
    for result in results:
        if not result["good"] or result.get("warnings"):
            yield f"{result['case']}: {pairs(result, 'case', 'where')}"


def median(result: Any) -> float | None:
    return result.get("total", {}).get("median") if isinstance(result, dict) else None


def cuda_lines(details: Details) -> Iterator[str]:
    for title, ways in details.get("results", {}).get("cuda", {}).items():
        yield title
        for name, way in ways.items():
            if (seconds := median(way)) is not None:
                figures = {"launches a step": way.get("launches"), "waits": way.get("syncs")}
                told = "".join(f", {key} {value:.3g}" for key, value in figures.items() if value is not None)
                yield f"  {name}: {seconds * 1e3:.3g} ms, torchdiffeq / this {way['ratio']:.3g}{told}"


def ensemble_lines(details: Details) -> Iterator[str]:
    for title, ways in details.get("results", {}).get("ensemble", {}).items():
        told = []
        for name, way in ways.items():
            if (seconds := median(way)) is not None:
                error = f" (error {way['error']:.1e})" if "error" in way else ""
                told.append(f"{name} {seconds * 1e3:.3g} ms{error}")
        more = {name: ways[name] for name in ("to beat ms", "share") if name in ways}
        yield ", ".join([f"{title}: {'; '.join(told)}", *(f"{name} {value:.3g}" for name, value in more.items())])


def ops_lines(details: Details) -> Iterator[str]:
    """The share of a copy's bandwidth at each op's largest size."""
    rows = [row for row in details.get("results", {}).get("ops", []) if "share" in row]
    largest = max((row["bytes"] for row in rows), default=0)
    for row in rows:
        if row["bytes"] == largest:
            yield f"{row['']} {row['dtype']}: {row['us']:.0f} us, {row['share']:.2f} of copy, torch / this {row['torch']:.2g}"
