"""The configured optimiser over a model's parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from sacl_fast.checks import checked
from sacl_fast.config import OptimConfig
from sacl_fast.optim.lars import Lars


@checked
def build_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimConfig
) -> torch.optim.Optimizer:
    """LARS or AdamW; one-dimensional parameters (biases, norms) are not decayed by either."""
    parameters = list(parameters)
    if config.name == "lars":
        return Lars(
            parameters,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            eta=config.eta,
            clip=config.clip,
        )
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    # ``capturable``: a CUDA graph of a step may be made.
    on_gpu = any(p.is_cuda for p in parameters)
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=config.betas, fused=True, capturable=on_gpu
    )
