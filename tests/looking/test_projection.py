"""Two dimensions and clusters of features."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import numpy as np
import pytest

from sacl_fast.errors import UserError
from sacl_fast.looking import features as module
from sacl_fast.looking.features import to_unit_length
from sacl_fast.looking.projection import (
    check_projection,
    clusters_of,
    plane_of,
    principal_components,
)


def test_principal_components_are_those_of_a_singular_value_decomposition(made, monkeypatch):
    features = np.random.default_rng(0).normal(2, 1, (50, 7)) * np.arange(1, 8)
    monkeypatch.setattr(module, "_CHUNK", 7 * 11)  # in uneven parts
    mean, directions, shares = principal_components(made(features), 2)
    unit = to_unit_length(features)
    _, singular, rows = np.linalg.svd(unit - unit.mean(axis=0))
    np.testing.assert_allclose(mean, unit.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(np.abs((directions @ rows.T)[:, :2]), np.eye(2), atol=1e-5)
    np.testing.assert_allclose(shares, (singular**2 / (singular**2).sum())[:2], rtol=1e-5)
    assert all(row[np.abs(row).argmax()] > 0 for row in directions)


@pytest.mark.parametrize("shape", [(1, 5), (6, 1), (3, 2), (4, 9)])
def test_a_plane_of_few_images_or_features(made, shape):
    features = np.random.default_rng(0).random(shape)
    plane = plane_of(made(features), np.arange(len(features)), "pca", 0)
    assert plane.points.shape == (shape[0], 2) and np.isfinite(plane.points).all()


def test_a_plane_of_features_that_are_all_the_same(made):
    plane = plane_of(made(np.ones((5, 4))), np.arange(5), "pca", 0)
    np.testing.assert_allclose(plane.points, 0, atol=1e-6)
    assert plane.axes[0] == "component 1: 0.0% of the variance"


def test_clusters_are_the_groups_that_are_there_largest_first(made):
    rng = np.random.default_rng(1)
    group = rng.permutation(np.repeat([0, 1, 2], [60, 30, 10]))
    features = np.eye(3, 8)[group] + rng.normal(0, 0.03, (100, 8))
    np.testing.assert_array_equal(clusters_of(made(features), 3, seed=0), group)
    again = clusters_of(made(features), 3, seed=0)
    np.testing.assert_array_equal(again, group)


def test_no_more_clusters_than_different_images(made):
    features = np.eye(2, 4)[[0, 1, 0, 0, 1]]
    np.testing.assert_array_equal(clusters_of(made(features), 10, seed=0), [0, 1, 0, 0, 1])
    assert not clusters_of(made(np.zeros((4, 3))), 10, seed=0).any()


def test_umap_or_how_to_install_it(made):
    found = made(np.random.default_rng(0).random((30, 8)))
    if importlib.util.find_spec("umap") is None:
        with pytest.raises(UserError, match=r"umap-learn.*pip install 'sacl-fast\[umap\]'"):
            check_projection("umap")
        return
    plane = plane_of(found, np.arange(30), "umap", 0)
    assert plane.points.shape == (30, 2) and plane.title == "UMAP"
    with pytest.raises(UserError, match="UMAP of 3 images"):
        plane_of(replace(found, features=found.features[:3]), np.arange(3), "umap", 0)
