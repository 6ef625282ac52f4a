"""Figures of the dense and of the slim encoder while training: kNN accuracy and, without labels,
effective ranks (``label_free``).

A guest in the training loop: parameters, buffers, training flags and random numbers are left as
they were, so a run that is evaluated and one that is not stay equal bit for bit. The slicer learns
the slim encoder's batch-norm statistics by the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sacl_fast.checks import CountOrZero, checked
from sacl_fast.config import EvalConfig
from sacl_fast.encoders.recalibrate import recalibrated
from sacl_fast.errors import UserError
from sacl_fast.evaluation.features import extract_share
from sacl_fast.evaluation.knn import knn_hits
from sacl_fast.evaluation.label_free import lidar, rankme
from sacl_fast.ops.collectives import gather_uneven
from sacl_fast.precision import autocast
from sacl_fast.slim.slicer import Mode, Slicer

T = TypeVar("T")

_MODES: dict[str, Mode] = {"dense": "dense", "slim": "mask"}


def alone(function: Callable[[], T]) -> list[T]:
    """What each process gives, of one process."""
    return [function()]


@torch.no_grad()
@checked
def evaluate_encoders(
    encoder: nn.Module,
    slicer: Slicer,
    bank_loader: Iterable[tuple[Tensor, Tensor]],
    query_loader: Iterable[tuple[Tensor, Tensor]],
    config: EvalConfig,
    num_classes: CountOrZero,
    *,
    device: torch.device,
    amp_dtype: torch.dtype | None,
    views: Iterable[tuple[Tensor, Tensor]] = (),
    first: Iterable[tuple[Tensor, Tensor]] | None = None,
    jointly: Callable[[Callable[[], Any]], list[Any]] = alone,
) -> dict[str, float]:
    """Of each encoder that ``config.encoders`` names: ``knn_dense``, top-1 in percent, where there
    are classes; ``rankme_dense``, of the first ``config.rank_images`` images of the bank, where
    that is not 0; ``lidar_dense``, where there are ``views``. ``knn_slim`` and so on likewise.

    Where the slim encoder is the dense one (``slicer.active`` is False) it is computed once, as
    the dense one. Batch-norm statistics come from the first ``config.recalibrate_batches``
    batches of the bank loader, so the bank's order should mix the classes.

    Several processes share the work: each is given its share of all loaders, and has the same
    figures in the end.

    Args:
        bank_loader, query_loader: yield images (B, C, H, W), not augmented, and labels (B,);
            read anew for every encoder.
        num_classes: 0: without labels; then there are no queries.
        amp_dtype: autocast type of the encoder (None: no autocast).
        views: yields augmented images, and which image each is of (B,); equally many of each.
        first: the whole bank, where the loaders are shares, for the batch-norm statistics; None:
            ``bank_loader``.
        jointly: what a function gives in each process, in all of them (``Ranks.jointly``).

    Raises:
        UserError: there are no images, or features are not finite where there are labels.
    """
    widths = ("dense", "slim") if config.encoders == "both" else (config.encoders,)
    if not slicer.active:
        widths = ("dense",)
    cuda = [device] if device.type == "cuda" else []
    options: Any = {"k": config.k, "temperature": config.temperature, "num_classes": num_classes}
    scores: dict[str, float] = {}
    with torch.random.fork_rng(devices=cuda):  # a data loader draws a seed each time it is read
        for width in widths:
            own: list[tuple[Tensor, Tensor]] = []

            def extract(width: str = width, own: list[tuple[Tensor, Tensor]] = own) -> list[int]:
                images = first_images(first or bank_loader, config.recalibrate_batches, device)
                with (
                    slicer.mode(_MODES[width]),
                    autocast(device, amp_dtype),
                    recalibrated(encoder, images),
                ):
                    if width == "slim":
                        slicer.note_statistics()
                    for loader in (bank_loader, query_loader, views):
                        own.append(
                            extract_share(encoder, loader, device=device, amp_dtype=amp_dtype)
                        )
                return [size for features, _ in own for size in features.shape]

            sizes = jointly(extract)
            bank = _of_all(*own[0], [s[:2] for s in sizes])
            if num_classes:
                count = sum(s[2] for s in sizes)
                if not count:
                    raise UserError("kNN queries: no features; at least one image is needed")
                hits = jointly(lambda bank=bank, own=own: knn_hits(*bank, *own[1], **options))
                scores[f"knn_{width}"] = 100.0 * sum(hits) / count
            augmented, image = _of_all(*own[2], [s[4:] for s in sizes])
            if config.rank_images:
                scores[f"rankme_{width}"] = rankme(bank[0][: config.rank_images])
            if len(augmented):
                classes = augmented[image.argsort(stable=True)].unflatten(
                    0, (len(set(image.tolist())), -1)
                )
                scores[f"lidar_{width}"] = lidar(classes)
    return scores


def _of_all(
    features: Tensor, labels: Tensor, shapes: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """Those of all processes; a process without any knows no dimensions."""
    counts, dims = [n for n, _ in shapes], max(dims for _, dims in shapes)
    if not any(counts):
        return features, labels
    features = features if len(features) else features.new_zeros(0, dims)
    return gather_uneven(features, counts), gather_uneven(labels, counts)


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
