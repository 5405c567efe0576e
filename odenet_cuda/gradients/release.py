"""What a solve keeps for its way back goes when autograd lets saved tensors go: after a backward pass without retain_graph."""

from typing import Any

import torch

_SECOND = (
    "Trying to backward through the graph a second time: what the solve kept for its gradient is freed by .backward() or "
    "autograd.grad(). Specify retain_graph=True to go through it once more"
)


def kept(ctx: Any, name: str) -> tuple[Any, bool]:
    """An attribute of the autograd node `ctx`, and whether it stays there: with retain_graph or create_graph, and where more
    passes are made of a batch of gradients. Else the node has let it go when this returns. To be called first in `backward`,
    after a look at `ctx.saved_tensors`.

    Raises RuntimeError where it is gone, as `saved_tensors` does.
    """
    value = getattr(ctx, name)
    if value is None:
        raise RuntimeError(_SECOND)
    stays = torch._C._autograd._get_current_graph_task_keep_graph() or getattr(ctx, "more_to_come", False)
    if not stays:
        setattr(ctx, name, None)
    return value, stays
