"""The configured optimiser over a model's parameters."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import nn

from sacl_fast.checks import checked
from sacl_fast.config import Backend, OptimConfig
from sacl_fast.optim.lars import Lars


@checked
def build_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimConfig, backend: Backend = "auto"
) -> torch.optim.Optimizer:
    """LARS or AdamW; one-dimensional parameters (biases, norms) are not decayed by either.

    A step of either waits for nothing, takes its learning rate as a number or a tensor on the
    device, and unscales and skips by itself under a ``GradScaler``.

    Args:
        backend: of LARS. AdamW is PyTorch's fused one always, which does in as many launches and
            bytes what apex's does.
    """
    parameters = list(parameters)
    if config.name == "lars":
        return Lars(
            parameters,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            eta=config.eta,
            clip=config.clip,
            backend=backend,
        )
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    # ``capturable``: a CUDA graph of a step may be made. Not every step is, of which PyTorch warns.
    on_gpu = any(p.is_cuda for p in parameters)
    warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=config.betas, fused=True, capturable=on_gpu
    )
