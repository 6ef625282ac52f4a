"""cuDNN's choice of algorithms for convolutions, while a run lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def are_tried(device: torch.device) -> bool:
    """Whether a run on the device has cuDNN's algorithms tried."""
    return device.type == "cuda" and not torch.backends.cudnn.deterministic


@contextmanager
def tried_algorithms(device: torch.device) -> Iterator[None]:
    """Within, on a GPU, cuDNN tries its algorithms at the first convolution of each size and takes
    the fastest. A run's sizes stay the same, so it tries once; by default cuDNN guesses. Where it
    is to be deterministic it takes the same ones every time.

    ``torch.backends.cudnn.flags`` is not used: it also reads and sets TF32, which fails where that
    was set by ``fp32_precision``.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or are_tried(device)
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
