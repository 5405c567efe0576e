"""What a recorded value is: the same for all samples, of one sample, or a sum over all."""

from dataclasses import dataclass

from torch import fx

from .pointwise import packet
from .program import Refs


@dataclass
class Sample:
    """Addresses in the traced shape, but for the axis `batch`, which has the entries of one sample; None: no such axis."""

    refs: Refs
    batch: int | None
    mask: bool = False


@dataclass
class Uniform:
    node: fx.Node


@dataclass
class Summed:
    node: fx.Node


Value = Sample | Uniform | Summed


def where(node: fx.Node) -> str:
    """The operation and the line of the user's source it comes from."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip().startswith("File")]
    lines = [line for line in lines if "/torch/" not in line and "odenet_cuda/compiled/" not in line]
    return f"{packet(node.target)}" + (f" ({lines[-1]})" if lines else "")
