"""The compiled module ``sacl_fast._C``, whose operators are registered with PyTorch's dispatcher.

Importing it registers the implementations. What PyTorch further needs to know of an operator, its
shapes and gradients, is registered by the operator's file here when it is first used.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def obstacle() -> str | None:
    """Why the compiled operators cannot be used; None if they can."""
    try:
        from sacl_fast import _C  # noqa: F401  (after torch, whose libraries it needs)
    except ImportError as error:
        return f"sacl_fast._C cannot be imported ({error})"
    if not hasattr(torch.ops.sacl_fast, "augment"):
        return "sacl_fast._C is of an older build; install again"
    return None


def takes(x: Tensor, *vectors: Tensor) -> bool:
    """Whether the compiled operators are for images ``x`` (N, C, H, W) and these parameters: on the
    CPU, in float32, x in channels-last memory and not empty."""
    return (
        x.device.type == "cpu"
        and all(t.dtype == torch.float32 for t in (x, *vectors))
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.numel() > 0
    )


def images(like: Tensor, *shape: int) -> Tensor:
    """An empty (N, C, H, W) in channels-last memory."""
    return like.new_empty(shape).contiguous(memory_format=torch.channels_last)
