"""What tests do to modules."""

from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def channels_last(module: M) -> M:
    """The module itself, its weights of four dimensions in channels-last; torch declares no
    overload for it."""
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
