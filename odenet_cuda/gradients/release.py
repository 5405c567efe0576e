"""What a solve keeps for its way back goes when autograd lets saved tensors go: after a backward pass without retain_graph."""

from typing import Any

import torch

_SECOND = (
    "Trying to backward through the graph a second time: what the solve kept for its gradient is freed by .backward() or "
    "autograd.grad(). Specify retain_graph=True to go through it once more"
)


def kept(ctx: Any, name: str) -> Any:
    """An attribute of the autograd node `ctx`. To be asked for first in `backward`, after a look at `ctx.saved_tensors`.

    Raises RuntimeError where it is gone, as `saved_tensors` does.
    """
    value = getattr(ctx, name)
    if value is None:
        raise RuntimeError(_SECOND)
    return value


def let_go(ctx: Any, *names: str) -> bool:
    """The node lets these go, and whether it did: not with retain_graph or create_graph, and not where more passes are made of
    a batch of gradients. To be called when nothing speaks against the pass any more, before anything is used up: a pass that
    was refused says the same again."""
    stays = torch._C._autograd._get_current_graph_task_keep_graph() or getattr(ctx, "more_to_come", False)
    for name in () if stays else names:
        setattr(ctx, name, None)
    return not stays
