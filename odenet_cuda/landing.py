"""Methods without an interpolant: their steps end at the times of outputs."""

from typing import Any

from .tableau import StepFunction


def lands(method: Any) -> bool:
    """Whether its steps end at the times of outputs."""
    return isinstance(method, StepFunction) and method.lands


def with_outputs(nodes: list[float], moves_with: list[int | None], t: list[float]) -> tuple[list[float], list[int | None]]:
    """The grid with a node at each time of t: one that lies there up to rounding, or another one."""
    if nodes == t:
        return nodes, moves_with
    direction = 1.0 if t[-1] > t[0] else -1.0
    wide, index, found, moves = max(map(abs, (nodes[0], nodes[-1]))), 1, [nodes[0]], [moves_with[0]]
    for node, moving in zip(nodes[1:], moves_with[1:], strict=True):
        near = 1e-9 * abs(node - found[-1]) + 1e-15 * wide
        while index < len(t) - 1 and direction * (node - t[index]) > near:
            found.append(t[index])
            moves.append(index)
            index += 1
        here = index < len(t) - 1 and abs(node - t[index]) <= near
        found.append(t[index] if here else node)
        moves.append(index if here else moving)
        index += here
    return found, moves


def refuse_what_is_between(request: Any, options: Any, own_times: bool) -> None:
    """Raises NotImplementedError for what needs values inside a step, or for more than the state at a step's start."""
    settings = request.settings
    asked = {
        "dense=True": settings.dense,
        "events": request.events is not None,
        "every": bool(settings.every),
        "regularizers": bool(settings.regularizers),
        "integrals": request.integrals is not None,
        "resume": request.resume is not None,
        "gradient='quadrature'": settings.gradient == "quadrature",
    }
    name = next((name for name, given in asked.items() if given), "")
    if own_times and request.events is None:
        name = "times of each sample, t [batch, T], and jumps of the state:"
    if name:
        how = "gradient='reversible'" if options.coupling else f"method={options.method!r}"
        instead = "another gradient" if options.coupling else "an explicit method such as 'dopri5' or 'rk4'"
        raise NotImplementedError(
            f"{name} not served with {how}, whose steps end at the outputs and have nothing between their ends: use {instead}"
        )
