"""Linear evaluation on cached features: multinomial logistic regression.

Features are standardised by the mean and standard deviation of the training features. The loss,
``mean cross-entropy + decay / 2 * |W|^2``, is convex, so that L-BFGS finds its one minimum whatever
the order of the images, and nothing but the decay is to be chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_ITERATIONS = 100
_LOGITS = 2**25  # at a time: 128 MiB
FEW = 5
"""Images a class from which on a decay can be chosen."""
_DECAY_OF_FEW = 1e-2


@dataclass(frozen=True)
class LinearClassifier:
    """``x -> W (x - mean) / std + b``."""

    weight: Tensor
    """(C, F)"""
    bias: Tensor
    """(C,)"""
    mean: Tensor
    """(F,)"""
    std: Tensor
    """(F,), 1 where a feature is constant."""
    decay: float

    def top(self, features: Tensor, count: int = 5) -> Tensor:
        """The ``count`` likeliest classes (N, count) of each feature vector (N, F)."""
        count = min(count, len(self.bias))
        rows = max(1, _LOGITS // len(self.bias))
        some = (self._logits(x).topk(count, dim=1).indices for x in features.split(rows))
        return torch.cat(list(some))

    def _logits(self, features: Tensor) -> Tensor:
        return F.linear((features - self.mean) / self.std, self.weight, self.bias)


def fit_linear(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    decays: Sequence[float],
    *,
    seed: int,
    tell: Callable[[], None] = lambda: None,
) -> LinearClassifier:
    """The classifier of features (N, F) with labels (N,), with the decay that classifies a tenth of
    them best, which is held out for that (of equally good ones the largest), fitted to all.

    Of less than ``FEW`` images a class nothing is held out: the decay is 0.01.

    Args:
        tell: called after each of the ``len(decays) + 1`` fits.
    """
    decay = choose_decay(features, labels, num_classes, decays, seed=seed, tell=tell)
    classifier = fit_with_decay(features, labels, num_classes, decay)
    tell()
    return classifier


def choose_decay(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    decays: Sequence[float],
    *,
    seed: int,
    tell: Callable[[], None] = lambda: None,
) -> float:
    """See ``fit_linear``."""
    if len(decays) == 1:
        tell()
        return decays[0]
    if len(labels) < FEW * num_classes:
        for _ in decays:
            tell()
        return _DECAY_OF_FEW
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed % 2**63))
    order = order.to(features.device)
    held_out, rest = order[: len(order) // 10], order[len(order) // 10 :]
    x, y, held_x, held_y = features[rest], labels[rest], features[held_out], labels[held_out]
    best, chosen, start = -1, max(decays), None
    for decay in sorted(decays, reverse=True):  # from the smoothest on, each starts at the last
        start = fit_with_decay(x, y, num_classes, decay, start)
        right = int((start.top(held_x, 1)[:, 0] == held_y).sum())
        if right > best:
            best, chosen = right, decay
        tell()
    return chosen


def fit_with_decay(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    decay: float,
    start: LinearClassifier | None = None,
) -> LinearClassifier:
    """The minimum of the loss above, from a start of zeros or of an earlier classifier."""
    std, mean = torch.std_mean(features, dim=0, unbiased=False)
    std = torch.where(std > 1e-6 * (1 + mean.abs()), std, torch.ones_like(std))
    x = (features - mean) / std
    weight = x.new_zeros(num_classes, x.shape[1]) if start is None else start.weight.clone()
    bias = x.new_zeros(num_classes) if start is None else start.bias.clone()
    weight.requires_grad_(True)
    bias.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_ITERATIONS,
        tolerance_grad=1e-5,
        tolerance_change=1e-7,
        history_size=10,
        line_search_fn="strong_wolfe",
    )
    rows = max(1, _LOGITS // num_classes)

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = decay / 2 * weight.square().sum()
        total.backward()
        for some, target in zip(x.split(rows), labels.split(rows), strict=True):
            part = F.cross_entropy(F.linear(some, weight, bias), target, reduction="sum") / len(x)
            part.backward()
            total = total + part.detach()
        return total.detach()

    with torch.enable_grad():
        optimizer.step(loss)
    return LinearClassifier(weight.detach(), bias.detach(), mean, std, decay)
