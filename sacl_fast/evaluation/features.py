"""Frozen features of a whole data set: what kNN and linear evaluation see of an encoder."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sacl_fast.checks import checked
from sacl_fast.errors import UserError
from sacl_fast.precision import autocast


@torch.no_grad()
@checked
def extract_features(
    encoder: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device,
    amp_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Features (N, F) float32 and labels (N,) int64 of all the loader's images, on the device.

    The encoder runs in the mode it is in (see ``recalibrated``).

    Args:
        loader: yields images (B, C, H, W) and labels (B,).
        amp_dtype: autocast type of the encoder (None: no autocast).

    Raises:
        UserError: there are no images, or the encoder gives no features.
    """
    features, labels = extract_share(encoder, loader, device=device, amp_dtype=amp_dtype)
    if not len(features):
        raise UserError("there are no images to extract features from: the data set is empty")
    return features, labels


def as_features(given: Any) -> Tensor:
    """What an encoder gives for a batch, (N, F), as float32.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(given, Tensor) or given.ndim != 2:
        shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise UserError(f"the encoder gives {shape} for a batch; features (N, F) work")
    return given.float()


@torch.no_grad()
def extract_share(
    encoder: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device,
    amp_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``extract_features`` of what may be no images at all: then (0, 0) and (0,)."""
    features: list[Tensor] = []
    labels: list[Tensor] = []
    with autocast(device, amp_dtype):
        for images, targets in loader:
            features.append(as_features(encoder(images.to(device, non_blocking=True))))
            labels.append(targets)
    if not features:
        return torch.zeros(0, 0, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    return torch.cat(features), torch.cat(labels).to(device, torch.int64)
