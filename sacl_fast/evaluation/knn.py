"""Weighted kNN classification: how good frozen features are, without training anything.

For a query q and its k nearest bank features b_j by cosine, class c gets the vote
``sum_j [y_j = c] exp(cos(q, b_j) / T)``; the class with most votes wins (Wu et al.,
"Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sacl_fast.checks import Count, Positive, checked, counted
from sacl_fast.errors import UserError


@torch.no_grad()
@checked
def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    k: Count,
    temperature: Positive,
    num_classes: Count,
    chunk: Count = 256,
) -> float:
    """Top-1 accuracy in percent.

    The same input gives the same answer: bank features equally near go by their index, equal
    votes to the lower class.

    Args:
        bank: features (N, F) to search among; ``bank_labels`` (N,) in 0..num_classes - 1.
        queries: features (Q, F) to classify; ``query_labels`` (Q,).
        k: neighbours; at most N are used.
        temperature: T above.
        chunk: queries at a time; memory is about 5 * chunk * N bytes.

    Raises:
        UserError: shapes that do not fit, an empty input, labels out of range, features that are
            not finite.
    """
    _check_set("queries", queries, query_labels, num_classes)
    options = {"k": k, "temperature": temperature, "num_classes": num_classes, "chunk": chunk}
    return 100.0 * knn_hits(bank, bank_labels, queries, query_labels, **options) / len(queries)


@torch.no_grad()
def knn_hits(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    k: int,
    temperature: float,
    num_classes: int,
    chunk: int = 256,
) -> int:
    """How many queries ``knn_accuracy`` finds right; there may be none."""
    if not len(queries):
        _check_set("bank", bank, bank_labels, num_classes)
        return 0
    top = _classify(
        bank, bank_labels, queries, query_labels, k, temperature, num_classes, chunk, count=1
    )
    return int((top[:, 0] == query_labels).sum().item())


@torch.no_grad()
@checked
def knn_predictions(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    k: Count,
    temperature: Positive,
    num_classes: Count,
    count: Count = 5,
    chunk: Count = 256,
) -> Tensor:
    """The ``count`` classes (Q, count) with most votes for each query, most first; at most
    ``num_classes`` of them. Arguments and errors as of ``knn_accuracy``."""
    return _classify(
        bank, bank_labels, queries, query_labels, k, temperature, num_classes, chunk, count
    )


def _classify(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    k: int,
    temperature: float,
    num_classes: int,
    chunk: int,
    count: int,
) -> Tensor:
    _check_set("bank", bank, bank_labels, num_classes)
    _check_set("queries", queries, query_labels, num_classes)
    if bank.shape[1] != queries.shape[1]:
        raise UserError(
            f"kNN: bank features have {bank.shape[1]} dimensions and query features "
            f"{queries.shape[1]}; both must come from the same encoder"
        )
    k = min(k, len(bank))
    bank = F.normalize(bank.float(), dim=1)
    top: list[Tensor] = []
    for some in queries.split(chunk):
        similarity = F.normalize(some.float(), dim=1) @ bank.T  # (chunk, N)
        nearest, index = _nearest(similarity, k)  # (chunk, k) each
        # Weights relative to the nearest neighbour's: the same winner, and no overflow.
        weights = ((nearest - nearest[:, :1]) / temperature).exp()
        votes = _votes(weights, bank_labels[index], num_classes)
        if count == 1:
            top.append(votes.argmax(dim=1, keepdim=True))
        else:
            top.append(votes.sort(dim=1, descending=True, stable=True).indices[:, :count])
    return torch.cat(top)


def _nearest(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, in descending order, and their indices; of equal ones at the
    k-th place those of lowest index, which ``topk`` does not promise."""
    nearest, index = similarity.topk(k, dim=1)
    last = nearest[:, -1:]
    tied = (similarity >= last).sum(dim=1) > k
    if tied.any():
        rows, last = similarity[tied], last[tied]
        above, level = rows > last, rows == last
        room = k - above.sum(dim=1, keepdim=True)
        chosen = above | (level & (level.cumsum(dim=1) <= room))
        candidates = chosen.nonzero()[:, 1].view(-1, k)
        values, order = rows.gather(1, candidates).sort(dim=1, descending=True, stable=True)
        nearest[tied], index[tied] = values, candidates.gather(1, order)
    return nearest, index


def _votes(weights: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Votes (Q, num_classes). One neighbour at a time: no two additions meet, so the order of
    the sum is fixed on a GPU too."""
    votes = weights.new_zeros(len(weights), num_classes)
    for weight, label in zip(weights.split(1, dim=1), labels.split(1, dim=1), strict=True):
        votes.scatter_add_(1, label, weight)
    return votes


def _check_set(name: str, features: Tensor, labels: Tensor, num_classes: int) -> None:
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise UserError(
            f"kNN {name}: features {tuple(features.shape)} and labels {tuple(labels.shape)} do "
            "not fit; (N, F) and (N,) work"
        )
    if features.numel() == 0:
        raise UserError(f"kNN {name}: no features; at least one image is needed")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise UserError(
            f"kNN {name}: labels go from {low} to {high}; 0 to {num_classes - 1} work "
            f"({counted(num_classes, 'class')})"
        )
    if not features.isfinite().all():
        raise UserError(
            f"kNN {name}: some features are not finite, so the encoder has diverged; a lower "
            "learning rate or precision bf16 may help"
        )
