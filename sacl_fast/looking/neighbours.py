"""Nearest neighbours by cosine, and how far they are of one class."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sacl_fast.evaluation.scores import Figure, accuracy_of, mean_of
from sacl_fast.looking.features import Features

_JUDGED = 2000  # images whose neighbours are held against their labels
_QUERIES = 256  # at a time
_ALIKE = 6.0  # of 255: mean difference of the pixels of thumbnails
_SIDE = 16


class Neighbours(NamedTuple):
    """The k nearest of Q images among all the others, nearest first."""

    index: np.ndarray
    """(Q, k) positions."""
    cosine: np.ndarray
    """(Q, k)."""


class Purity(NamedTuple):
    """How often neighbours are of an image's own class, over images with a label."""

    images: int
    k: int
    same: Figure
    """Neighbours of the same class, percent."""
    accuracy: Figure
    """Images whose class most of their neighbours have, percent: kNN that leaves the image out."""
    chance: float
    """Neighbours of the same class if they were drawn at random, percent."""


def neighbours_of(found: Features, queries: np.ndarray, k: int) -> Neighbours:
    """The nearest of ``queries`` (Q,) among all images but itself; at most all the others."""
    k = min(k, len(found) - 1)
    best = [_Best(torch.from_numpy(part), k) for part in _parts(queries)]
    own = [torch.from_numpy(found.directions(part)) for part in _parts(queries)]
    start = 0
    for rows in found.chunks(normalised=True):
        bank = torch.from_numpy(rows).T
        for some, directions in zip(best, own, strict=True):
            some.add(directions @ bank, start)
        start += bank.shape[1]
    return Neighbours(
        torch.cat([some.index for some in best]).numpy(),
        torch.cat([some.cosine for some in best]).clamp(-1, 1).numpy(),
    )


def _parts(queries: np.ndarray) -> list[np.ndarray]:
    return [queries[i : i + _QUERIES] for i in range(0, len(queries), _QUERIES)]


class _Best:
    """The k largest cosines of some queries (n,) so far."""

    def __init__(self, queries: Tensor, k: int) -> None:
        self.queries, self.k = queries, k
        self.cosine = torch.zeros(len(queries), 0)
        self.index = torch.zeros(len(queries), 0, dtype=torch.int64)

    def add(self, cosine: Tensor, start: int) -> None:
        """Look at images from ``start`` on: ``cosine`` (n, count)."""
        at = self.queries - start
        inside = ((at >= 0) & (at < cosine.shape[1])).nonzero()[:, 0]
        cosine[inside, at[inside]] = -torch.inf  # itself
        nearest, index = cosine.topk(min(self.k + 1, cosine.shape[1]), dim=1)
        values = torch.cat([self.cosine, nearest], dim=1)
        indices = torch.cat([self.index, index + start], dim=1)
        order = values.sort(dim=1, descending=True, stable=True).indices[:, : self.k]
        self.cosine, self.index = values.gather(1, order), indices.gather(1, order)


def purity_of(found: Features, k: int, seed: int) -> Purity | None:
    """Of a random sample of images with a label; None where there are fewer than two of those, or
    fewer than two classes."""
    labelled = np.flatnonzero(found.labels >= 0)
    if len(found.classes) < 2 or len(labelled) < 2:
        return None
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(labelled, min(len(labelled), _JUDGED), replace=False))
    nearest = neighbours_of(found, chosen, k).index
    own, theirs = found.labels[chosen], found.labels[nearest]  # (n,), (n, k)
    same = 100.0 * (theirs == own[:, None]).mean(axis=1)
    votes = np.zeros((len(chosen), len(found.classes)), np.int32)
    for column in theirs.T:
        there = column >= 0
        np.add.at(votes, (np.flatnonzero(there), column[there]), 1)
    right = 100.0 * ((votes.argmax(axis=1) == own) & (votes.max(axis=1) > 0))
    counts = np.bincount(found.labels[labelled], minlength=len(found.classes))
    chance = 100.0 * float((np.maximum(counts[own] - 1, 0) / (len(found) - 1)).mean())
    return Purity(len(chosen), nearest.shape[1], mean_of(same), accuracy_of(right), chance)


def spread_choice(groups: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Up to ``count`` positions, sorted, of as many groups (N,) as there are, in turns."""
    order = np.random.default_rng(seed).permutation(len(groups))
    by_group = order[np.argsort(groups[order], kind="stable")]
    _, starts, sizes = np.unique(groups[by_group], return_index=True, return_counts=True)
    turn = np.arange(len(groups)) - np.repeat(starts, sizes)  # nth image of its group
    return np.sort(by_group[np.argsort(turn, kind="stable")][:count])


def look_alike(one: Image.Image, other: Image.Image) -> bool:
    """Whether two images are one picture or nearly so, by their pixels in small."""
    a, b = (np.asarray(image.resize((_SIDE, _SIDE)), np.float32) for image in (one, other))
    return float(np.abs(a - b).mean()) <= _ALIKE
