"""kNN accuracy of the dense and of the slim encoder, while training and after it.

A guest in the training loop: parameters, buffers, training flags and random numbers are left as
they were, so a run that is evaluated and one that is not stay equal bit for bit. The slicer learns
the slim encoder's batch-norm statistics by the way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor, nn

from sacl_fast.checks import Count, checked
from sacl_fast.config import EvalConfig
from sacl_fast.encoders.recalibrate import recalibrated
from sacl_fast.evaluation.features import extract_features
from sacl_fast.evaluation.knn import knn_accuracy
from sacl_fast.precision import autocast
from sacl_fast.slim.slicer import Mode, Slicer

_MODES: dict[str, Mode] = {"dense": "dense", "slim": "mask"}


@torch.no_grad()
@checked
def evaluate_knn(
    encoder: nn.Module,
    slicer: Slicer,
    bank_loader: Iterable[tuple[Tensor, Tensor]],
    query_loader: Iterable[tuple[Tensor, Tensor]],
    config: EvalConfig,
    num_classes: Count,
    *,
    device: torch.device,
    amp_dtype: torch.dtype | None,
) -> dict[str, float]:
    """Top-1 in percent: ``knn_dense`` and ``knn_slim``, or the one ``config.encoders`` names.

    Where the slim encoder is the dense one (``slicer.active`` is False) it is computed once, as
    ``knn_dense``. Batch-norm statistics come from the first ``config.recalibrate_batches``
    batches of the bank loader, so the bank's order should mix the classes.

    Args:
        bank_loader, query_loader: yield images (B, C, H, W), not augmented, and labels (B,);
            read anew for every encoder.
        amp_dtype: autocast type of the encoder (None: no autocast).
    """
    widths = ("dense", "slim") if config.encoders == "both" else (config.encoders,)
    if not slicer.active:
        widths = ("dense",)
    cuda = [device] if device.type == "cuda" else []
    scores: dict[str, float] = {}
    with torch.random.fork_rng(devices=cuda):  # a data loader draws a seed each time it is read
        for width in widths:
            images = first_images(bank_loader, config.recalibrate_batches, device)
            with (
                slicer.mode(_MODES[width]),
                autocast(device, amp_dtype),
                recalibrated(encoder, images),
            ):
                if width == "slim":
                    slicer.note_statistics()
                bank = extract_features(encoder, bank_loader, device=device, amp_dtype=amp_dtype)
                queries = extract_features(
                    encoder, query_loader, device=device, amp_dtype=amp_dtype
                )
            scores[f"knn_{width}"] = knn_accuracy(
                *bank,
                *queries,
                k=config.k,
                temperature=config.temperature,
                num_classes=num_classes,
            )
    return scores


def first_images(
    loader: Iterable[tuple[Tensor, Tensor]], count: int, device: torch.device
) -> Iterator[Tensor]:
    """The first batches of images, up to a short one: it would weigh as much as a full one."""
    full = 0
    for images, _ in islice(loader, count):
        if len(images) < full:
            return
        full = len(images)
        yield images.to(device, non_blocking=True)
