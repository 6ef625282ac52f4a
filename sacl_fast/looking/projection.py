"""Features in two dimensions, and in clusters. All of it is of features at length 1, as the nearest
neighbours are: by cosine.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch

from sacl_fast.checks import counted
from sacl_fast.config.choices import Projection
from sacl_fast.errors import UserError
from sacl_fast.looking.features import Features

_CLUSTERED = 20_000  # images from which clusters are made
_ROUNDS = 50


class Plane(NamedTuple):
    """Some images in two dimensions."""

    points: np.ndarray
    """(n, 2)."""
    axes: tuple[str, str]
    """What the dimensions are."""
    title: str


def check_projection(kind: Projection) -> None:
    """Raise UserError where what it needs is not installed."""
    if kind == "umap":
        _umap()


def plane_of(found: Features, chosen: np.ndarray, kind: Projection, seed: int) -> Plane:
    """The images ``chosen`` (n,) in two dimensions: of the PCA of all features, or of a UMAP of the
    chosen ones.

    Raises:
        UserError: umap-learn is not installed, or there are too few images for it.
    """
    if kind == "pca":
        mean, directions, shares = principal_components(found, 2)
        points = (found.directions(chosen) - mean) @ directions.T
        named = tuple(f"component {i}: {s:.1%} of the variance" for i, s in enumerate(shares, 1))
        return Plane(points, (named[0], named[1]), "PCA")
    if len(chosen) < 4:
        raise UserError(
            f"UMAP of {counted(len(chosen), 'image')} says nothing; 4 or more work, as does PCA"
        )
    reducer = _umap().UMAP(
        n_components=2, metric="cosine", random_state=seed, n_neighbors=min(15, len(chosen) - 1)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads, which a seed rules out
        points = np.asarray(reducer.fit_transform(found.directions(chosen)), np.float32)
    return Plane(points, ("dimension 1", "dimension 2"), "UMAP")


def principal_components(
    found: Features, count: int
) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
    """Mean (F,), the ``count`` directions (count, F) of most variance, each with its largest weight
    positive, and their shares of the variance; zeros for those that there are not."""
    dims = found.features.shape[1]
    total, squares = np.zeros(dims), np.zeros((dims, dims))
    for part in found.chunks(normalised=True):
        wide = part.astype(np.float64)
        total += wide.sum(axis=0)
        squares += wide.T @ wide
    mean = total / len(found)
    values, vectors = np.linalg.eigh(squares / len(found) - np.outer(mean, mean))
    directions, shares = np.zeros((count, dims)), np.zeros(count)
    there = min(count, dims)
    directions[:there] = vectors.T[::-1][:there]
    signs = np.sign(directions[np.arange(count), np.abs(directions).argmax(axis=1)])
    directions *= np.where(signs, signs, 1)[:, None]
    variance = np.maximum(values, 0)
    if variance.sum() > 1e-12:  # else all features are the same
        shares[:there] = variance[::-1][:there] / variance.sum()
    return mean.astype(np.float32), directions.astype(np.float32), tuple(shares.tolist())


def clusters_of(found: Features, count: int, seed: int) -> np.ndarray:
    """The cluster (N,) of each image: k-means from k-means++ (Arthur & Vassilvitskii, SODA 2007) on
    a sample, largest cluster first. Fewer than ``count`` where fewer images differ."""
    rng = np.random.default_rng(seed)
    size = min(len(found), _CLUSTERED)
    sample = found.directions(np.sort(rng.choice(len(found), size, replace=False)))
    points = torch.from_numpy(sample)
    centres = _spread(points, count, rng)
    nearest = torch.cdist(points, centres).argmin(dim=1)
    for _ in range(_ROUNDS):
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        counts = torch.bincount(nearest, minlength=len(centres))
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
        before, nearest = nearest, torch.cdist(points, centres).argmin(dim=1)
        if torch.equal(before, nearest):
            break
    parts = [
        torch.cdist(torch.from_numpy(part), centres).argmin(dim=1)
        for part in found.chunks(normalised=True)
    ]
    own = torch.cat(parts).numpy()
    order = np.argsort(-np.bincount(own, minlength=len(centres)), kind="stable")
    return np.argsort(order)[own]


def _spread(points: torch.Tensor, count: int, rng: np.random.Generator) -> torch.Tensor:
    """Up to ``count`` different points, each likelier the farther from those before."""
    chosen = [int(rng.integers(len(points)))]
    distance = (points - points[chosen[0]]).square().sum(dim=1)
    while len(chosen) < count and float(distance.max()) > 1e-10:
        weights = distance.double().numpy()
        chosen.append(int(rng.choice(len(points), p=weights / weights.sum())))
        distance = torch.minimum(distance, (points - points[chosen[-1]]).square().sum(dim=1))
    return points[chosen]


def _umap() -> Any:
    try:
        return import_module("umap")
    except ModuleNotFoundError as error:
        if error.name != "umap":
            raise
        raise UserError(
            "project umap needs umap-learn, which is not installed; pip install 'sacl-fast[umap]' "
            "installs it, and --project pca works without"
        ) from None
