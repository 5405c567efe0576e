"""What func reads and what gets no gradient: a way back that calls func again must find it as the solve left it."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .problem import WithArguments


class Frozen:
    """The tensors that func is known to have and that get no gradient, as they are now.

    Those that get one are saved by autograd, which says where they were written into.
    """

    def __init__(self, func: Any):
        found = {id(x): x for x in _tensors_of(func) if not x.requires_grad and not x.is_inference()}
        self._versions = [(x, x._version) for x in found.values()]
        self._settled = False

    def settle(self) -> None:
        """After the solve: what func wrote into meanwhile are its own notes, such as the counts of a batch norm."""
        self._versions = [(x, version) for x, version in self._versions if x._version == version]
        self._settled = True

    def check(self) -> None:
        """Raises RuntimeError where one was written into since."""
        for x, version in self._versions if self._settled else ():
            if x._version != version:
                raise RuntimeError(
                    f"a tensor of func, {x.dtype} {list(x.shape)}, has been modified by an inplace operation since the solve, "
                    "and its gradient needs it"
                )


def _tensors_of(func: Any) -> Iterator[Tensor]:
    if isinstance(func, WithArguments):
        yield from (x for x in pytree.tree_leaves(func._args) if isinstance(x, Tensor))
        func = func._func
    if isinstance(func, nn.Module):
        yield from func.parameters()
        yield from func.buffers()
        return
    function = getattr(func, "__func__", func)
    values = [getattr(func, "__self__", None)]
    for cell in getattr(function, "__closure__", None) or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:  # an empty cell
            continue
    code, names = getattr(function, "__code__", None), getattr(function, "__globals__", {})
    values += [names.get(name) for name in (code.co_names if code else ())]
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, nn.Module):
            yield from value.parameters()
            yield from value.buffers()
