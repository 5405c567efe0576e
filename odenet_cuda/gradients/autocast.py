"""Mixed precision in a backward pass: what ran under autocast forwards is made again under the same."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def autocast_state(device: torch.device) -> dict[str, Any]:
    """Arguments of torch.autocast that make it as it is now."""
    kind = device.type
    return {
        "device_type": kind,
        "enabled": torch.is_autocast_enabled(kind),
        "dtype": torch.get_autocast_dtype(kind),
        "cache_enabled": False,  # stages are written into the same tensors again and again: a cast kept of one is stale
    }


def autocast_again(state: dict[str, Any]) -> AbstractContextManager[Any]:
    """In here autocast is as that state says."""
    if not state["enabled"] and not torch.is_autocast_enabled(state["device_type"]):
        return _NONE
    return torch.autocast(**state)


_NONE = nullcontext()
