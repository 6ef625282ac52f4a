"""Nearest neighbours, against all cosines at once."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sacl_fast.looking import features as module
from sacl_fast.looking.features import to_unit_length
from sacl_fast.looking.neighbours import look_alike, neighbours_of, purity_of, spread_choice


@pytest.mark.parametrize("chunk", [1, 5, 1000])
@pytest.mark.parametrize("k", [1, 4, 99])
def test_neighbours_are_the_largest_cosines(made, monkeypatch, chunk, k):
    features = np.random.default_rng(0).normal(0.2, 1, (23, 6))
    monkeypatch.setattr(module, "_CHUNK", 6 * chunk)
    queries = np.array([0, 7, 22])
    found = neighbours_of(made(features), queries, k)
    unit = to_unit_length(features)
    cosine = unit[queries] @ unit.T
    cosine[np.arange(3), queries] = -2
    index = np.argsort(-cosine, axis=1)[:, : min(k, 22)]
    np.testing.assert_array_equal(found.index, index)
    np.testing.assert_allclose(found.cosine, np.take_along_axis(cosine, index, 1), atol=1e-6)


def test_one_image_has_no_neighbours(made):
    found = neighbours_of(made(np.ones((1, 3))), np.array([0]), 5)
    assert found.index.shape == found.cosine.shape == (1, 0)


def test_purity_counts_neighbours_of_the_same_class(made):
    features = np.eye(4)[[0, 0, 0, 1, 1, 1]] + np.random.default_rng(0).normal(0, 0.01, (6, 4))
    labels = np.array([0, 0, 1, 1, 1, -1])  # the third lies with the others; one has no label
    of = purity_of(made(features, labels, ("a", "b")), 2, seed=0)
    assert of is not None and (of.images, of.k) == (5, 2)
    # a: 1 of 2 twice; 0 of 2; b: 1 of 2 twice (one neighbour has no label)
    assert of.same.mean == pytest.approx(100 * (0.5 + 0.5 + 0 + 0.5 + 0.5) / 5)
    assert of.chance == pytest.approx(100 * (1 / 5 * 2 + 2 / 5 * 3) / 5)


def test_accuracy_is_that_of_most_neighbours(made):
    features = np.eye(3)[np.repeat([0, 1, 2], 5)] + np.random.default_rng(0).random((15, 3)) / 20
    labels = np.repeat([0, 1, 2], 5)
    of = purity_of(made(features, labels, ("a", "b", "c")), 4, seed=0)
    assert of is not None
    assert of.accuracy.mean == of.same.mean == 100


def test_no_purity_without_two_classes(made):
    assert purity_of(made(np.ones((3, 2))), 2, seed=0) is None
    assert purity_of(made(np.ones((3, 2)), [0, 0, 0], ("a",)), 2, seed=0) is None


def test_a_choice_takes_of_each_group_in_turn():
    groups = np.repeat([0, 1, 2, 5], [50, 1, 20, 3])
    for count, of_each in ((4, [1, 1, 1, 1]), (8, [3, 1, 2, 2]), (99, [50, 1, 20, 3])):
        chosen = spread_choice(groups, count, seed=0)
        assert len(np.unique(chosen)) == len(chosen) and (np.sort(chosen) == chosen).all()
        counts = np.bincount(groups[chosen], minlength=6)[[0, 1, 2, 5]]
        assert counts.sum() == min(count, 74)
        assert (counts >= np.minimum(of_each, counts.max()) - 1).all() and counts.min() >= 1


def test_pictures_alike():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    one = Image.fromarray(pixels).resize((64, 64))
    brighter = Image.fromarray((np.asarray(one) * 0.98).astype(np.uint8))
    assert look_alike(one, one.resize((48, 48))) and look_alike(one, brighter)
    assert not look_alike(one, one.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
