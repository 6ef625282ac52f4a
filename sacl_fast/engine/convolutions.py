"""cuDNN's choice of algorithms for convolutions, while a run lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tried_algorithms(device: torch.device, *, unless: bool = False) -> Iterator[None]:
    """Within, on a GPU, cuDNN tries its algorithms at the first convolution of each size and takes
    the fastest. A run's sizes stay the same, so it tries once; by default cuDNN guesses.
    ``unless`` it is to take the same ones every time.

    ``torch.backends.cudnn.flags`` is not used: it also reads and sets TF32, which fails where that
    was set by ``fp32_precision``.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or (device.type == "cuda" and not unless)
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
