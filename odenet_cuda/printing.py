"""Results in words: the facts of a solve by name, as text and as a table for notebooks."""

import html
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

_MOST_SHOWN = 4


def facts(solution: Any) -> dict[str, str]:
    """Of a `Solution`, in a line each. No number of the state is among them: there may be millions."""
    stats = solution.stats
    found = {
        "status": _counted(solution.status),
        "engine": repr(solution.engine),
        "t": _times(solution),
        "ys": shapes(solution.ys),
        "nfe": str(stats.nfe),
        "accepted": spread(stats.num_accepted),
        "rejected": spread(stats.num_rejected),
    }
    if stats.nfe_backward:
        found["nfe_backward"] = str(stats.nfe_backward)
    if solution.event_t is not None:
        found["event_t"] = numbers(solution.event_t)
    if solution.regularizers:
        found["regularizers"] = ", ".join(solution.regularizers)
    if solution.interpolant is not None:
        found["interpolant"] = "yes"
    return found


def table(title: str, rows: dict[str, str]) -> str:
    """As HTML."""
    lines = "".join(
        f"<tr><th style='text-align:left'>{html.escape(name)}</th><td style='text-align:left'>{html.escape(words)}</td></tr>"
        for name, words in rows.items()
    )
    return f"<table><caption style='text-align:left'><b>{html.escape(title)}</b></caption>{lines}</table>"


def shapes(state: Any) -> str:
    """``float32 [2, 3]`` of each leaf."""
    leaves = pytree.tree_leaves(state)
    shown = [f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}" for leaf in leaves[:_MOST_SHOWN]]
    more = [f"{len(leaves) - _MOST_SHOWN} more"] if len(leaves) > _MOST_SHOWN else []
    return ", ".join(shown + more)


def numbers(x: Tensor) -> str:
    """All, or the first and how many more."""
    flat = x.detach().reshape(-1)
    shown = ", ".join(f"{value:.6g}" for value in flat[:_MOST_SHOWN].tolist())
    if x.dim() == 0:
        return shown
    return f"[{shown}{f', ... {len(flat)} in all' if len(flat) > _MOST_SHOWN else ''}]"


def spread(count: int | Tensor) -> str:
    """A number, or of samples the least, the mean and the most."""
    if not isinstance(count, Tensor):
        return str(count)
    if count.numel() == 0:
        return "of no sample"
    low, mean, high = int(count.min()), float(count.double().mean()), int(count.max())
    return f"{low} each" if low == high else f"{low} to {high}, {mean:.4g} on average"


def _counted(status: str | list[str]) -> str:
    if isinstance(status, str):
        return repr(status)
    counts = {word: status.count(word) for word in dict.fromkeys(status)}
    return ", ".join(f"{count} x {word!r}" for word, count in counts.items())


def _times(solution: Any) -> str:
    t = solution.t
    if t.dim() == 2:
        return f"of each sample, {list(t.shape)}"
    return f"{len(t)} from {float(t[0]):.6g} to {float(t[-1]):.6g}"
