"""Matrix products."""

from typing import Any

import numpy as np

from .lowered import Lowered
from .operations import operation, source_of
from .trace import Unreadable
from .values import Sample, Value, where


@operation("mm", "addmm")
def _mm(low: Lowered, node: Any, twin: Any) -> Value:
    first = 1 if "addmm" in str(node.target) else 0
    if node.kwargs:
        raise Unreadable(f"{where(node)} with beta or alpha is not read")
    a, b = source_of(low, node, first), source_of(low, node, first + 1)
    shape, batch = low.shapes(node)
    if a.batch == 1 and b.batch == 0 and not first:
        return low.sums.add(node, a.refs.T, b.refs)
    if (a.batch, b.batch) not in ((0, None), (None, 1), (None, None)):
        raise Unreadable(f"{where(node)} mixes samples")
    bias = np.broadcast_to(source_of(low, node).refs, shape) if first else None
    return Sample(low.program.matmul(a.refs[None], b.refs[None], bias)[0], batch)


@operation("bmm")
def _bmm(low: Lowered, node: Any, twin: Any) -> Value:
    a, b = source_of(low, node), source_of(low, node, 1)
    shape, batch = low.shapes(node)
    count = shape[0]
    left, right = (np.broadcast_to(x.refs, (count, *x.refs.shape[1:])) for x in (a, b))
    if (a.batch, b.batch) == (2, 1) and count == 1:
        return low.sums.add(node, a.refs[0].T, b.refs[0])
    if (a.batch, b.batch) == (2, 1):
        products = low.program.contract(left[:, :, None], np.swapaxes(right, 1, 2)[:, None])
        return low.sums.add(node, products.reshape(1, -1), None)
    if (a.batch, b.batch) not in ((0, 0), (0, None), (None, 0), (1, None), (None, 2), (None, None)):
        raise Unreadable(f"{where(node)} mixes samples")
    return Sample(low.program.matmul(left, right), batch)
