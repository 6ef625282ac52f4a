"""RankMe and LiDAR against a direct computation, and on matrices whose rank is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sacl_fast.evaluation.label_free import lidar, rankme


def entropy_rank(values: np.ndarray) -> float:
    p = values / values.sum()
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))


def direct_rankme(features: np.ndarray) -> float:
    return entropy_rank(np.sqrt(np.linalg.eigvalsh(features.T @ features).clip(0)))


def direct_lidar(features: np.ndarray) -> float:
    """By the paper's formulas: both covariances, and the inverse square root of one."""
    n, q, dims = features.shape
    between, within = np.zeros((dims, dims)), np.zeros((dims, dims))
    mean = features.mean((0, 1))
    for views in features:
        centre = views.mean(0)
        between += np.outer(centre - mean, centre - mean) / (n - 1)
        for view in views:
            within += np.outer(view - centre, view - centre) / (n * (q - 1))
    within += 1e-4 * np.trace(within) / dims * np.eye(dims)
    values, vectors = np.linalg.eigh(within)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    return entropy_rank(np.linalg.eigvalsh(root @ between @ root).clip(0))


@pytest.mark.parametrize("shape", [(40, 12), (7, 12), (1, 5), (5, 1)])
def test_rankme_is_the_formula(shape):
    features = np.random.default_rng(0).standard_normal(shape) @ np.diag(np.arange(1, shape[1] + 1))
    assert rankme(torch.from_numpy(features)) == pytest.approx(direct_rankme(features), rel=1e-6)


@pytest.mark.parametrize("shape", [(30, 4, 6), (4, 3, 6), (2, 2, 1)])
def test_lidar_is_the_formula(shape):
    rng = np.random.default_rng(0)
    features = rng.standard_normal(shape) + 3 * rng.standard_normal((shape[0], 1, shape[2]))
    assert lidar(torch.from_numpy(features)) == pytest.approx(direct_lidar(features), rel=1e-6)


def test_known_ranks():
    assert rankme(torch.eye(9)) == pytest.approx(9)
    assert rankme(torch.ones(50, 8)) == pytest.approx(1)
    assert rankme(torch.zeros(5, 3)) == rankme(torch.zeros(0, 3)) == 0
    assert rankme(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(
        math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    )
    low = torch.randn(200, 3).double() @ torch.randn(3, 64).double()
    assert 1 < rankme(low) <= 3
    # Images in as many directions as there are, views around them alike in all.
    noise = torch.randn(64, 8, 5, generator=torch.Generator().manual_seed(0)).double()
    corners = torch.cat([torch.eye(5), -torch.eye(5)]).double().repeat(7, 1)[:64, None]
    assert lidar(10 * corners + noise) == pytest.approx(5, rel=0.05)
    one = torch.zeros(5).double()
    one[2] = 1
    assert lidar(torch.randn(64, 1, 1).double() * one + 1e-3 * noise) == pytest.approx(1, rel=0.05)


def test_directions_of_the_views_count_for_little():
    """Where RankMe sees two directions, LiDAR sees the one in which images differ."""
    g = torch.Generator().manual_seed(0)
    images, views = torch.randn(200, 1, generator=g), torch.randn(200, 4, generator=g)
    features = torch.stack([images.expand(200, 4), views], -1)
    assert rankme(features.flatten(0, 1)) > 1.9
    assert lidar(features) < 1.1


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_neither_depends_on_the_scale(factor):
    features = torch.randn(20, 3, 7, generator=torch.Generator().manual_seed(1))
    plain = features.double()
    assert rankme(factor * plain[:, 0]) == pytest.approx(rankme(plain[:, 0]), rel=1e-9)
    assert lidar(factor * plain) == pytest.approx(lidar(plain), rel=1e-9)


def test_degenerate_features():
    assert lidar(torch.ones(5, 4, 3)) == 0
    same = torch.randn(30, 1, 4).double().expand(30, 3, 4)  # views that are all alike
    assert 1 < lidar(same) <= 4
    assert math.isnan(rankme(torch.tensor([[1.0, math.nan]])))
    assert math.isnan(lidar(torch.full((2, 2, 2), math.inf)))
    with pytest.raises(ValueError, match="2 images"):
        lidar(torch.zeros(1, 4, 3))
