"""Logistic regression on features, and few-shot draws, against what they must be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sacl_fast.evaluation.few_shot import (
    draw_per_class,
    draw_percent,
    few_shot_accuracies,
    less_than_one,
)
from sacl_fast.evaluation.linear import choose_decay, fit_linear, fit_with_decay


def blobs(n: int, classes: int = 3, spread: float = 1.0, seed: int = 0):
    """Features (n, 6), one of them constant, around a centre for each class."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    x = 3 * torch.eye(6)[labels] + spread * torch.randn(n, 6, generator=g)
    x[:, 5] = 7.0
    return 100 * x + 5, labels


def test_the_loss_is_at_its_minimum():
    """The gradient, by float64, vanishes; whatever the scale of the features."""
    x, y = blobs(90)
    found = fit_with_decay(x, y, 3, decay=0.1)
    z = ((x - found.mean) / found.std).double()
    w, b = (p.double().requires_grad_() for p in (found.weight, found.bias))
    loss = F.cross_entropy(z @ w.T + b, y) + 0.05 * w.square().sum()
    for gradient in torch.autograd.grad(loss, (w, b)):
        assert gradient.abs().max() < 1e-4
    assert z[:, 5].abs().max() == 0  # a constant feature counts for nothing
    again = fit_with_decay(x, y, 3, decay=0.1, start=fit_with_decay(x, y, 3, decay=1.0))
    torch.testing.assert_close(again.weight, found.weight, rtol=0, atol=1e-3)


def test_it_classifies_what_can_be_told():
    told: list[int] = []
    train, test = blobs(120), blobs(60, seed=1)
    found = fit_linear(*train, 3, (1.0, 1e-2, 1e-4), seed=0, tell=lambda: told.append(1))
    top = found.top(test[0])
    assert top.shape == (60, 3) and len(told) == 4
    assert (top[:, 0] == test[1]).float().mean() > 0.9
    assert (top.sort(dim=1).values == torch.arange(3)).all()


def test_the_decay_is_that_of_the_held_out_images():
    """Noise of many dimensions asks for decay, clear classes for none in particular: the largest
    that classifies them all."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(200) % 2
    x = torch.randn(200, 150, generator=g)
    x[:, 0] += 2 * y
    assert choose_decay(x, y, 2, (1e-1, 1e-6), seed=0) == 1e-1
    x, y = blobs(90, spread=0.01)
    assert choose_decay(x, y, 3, (1e-6, 1e-2, 1e-3), seed=0) == 1e-2
    assert choose_decay(x[:9], y[:9], 3, (1e-6, 1e-3), seed=0) == 1e-2  # too few to hold some out
    assert choose_decay(x, y, 3, (0.5,), seed=0) == 0.5


def test_draws_take_so_many_of_each_class():
    labels = np.repeat([0, 1, 2], [40, 30, 3])
    assert np.bincount(labels[draw_per_class(labels, 5, seed=0)]).tolist() == [5, 5, 3]
    assert np.bincount(labels[draw_percent(labels, 10, seed=0)]).tolist() == [4, 3, 1]
    drawn = draw_per_class(labels, 40, seed=0)
    assert len(set(drawn.tolist())) == len(drawn) == 73


def test_draws_pass_over_images_that_cannot_be_read():
    (x, y), test = blobs(60, spread=1.0), blobs(30, spread=1.0, seed=1)
    readable = np.arange(60) % 4 != 1
    kept = torch.from_numpy(readable)
    found = few_shot_accuracies(
        (x[kept], y[kept]),
        test,
        3,
        per_class=(2,),
        percent=(),
        draws=3,
        decays=(1.0,),
        seed=0,
        among=(y.numpy(), readable),
    )["2 per class"]
    centre = x[kept].mean(0)
    for nth in range(3):
        drawn = draw_per_class(y.numpy(), 2, seed=0, nth=nth, readable=readable)
        assert readable[drawn].all() and np.bincount(y[drawn]).tolist() == [2, 2, 2]
        some, queries = (F.normalize(f - centre, dim=1) for f in (x[drawn], test[0]))
        means = some.unflatten(0, (3, 2)).mean(1)
        right = (torch.cdist(queries, means).argmin(1) == test[1]).float().mean()
        assert found[nth] == pytest.approx(100 * float(right))


def test_shares_of_less_than_an_image_are_said():
    labels = np.repeat([0, 1, 2], [100, 99, 2])
    assert less_than_one(labels, (1.0, 50.0), ("a", "b", "c")) == (
        "1 % is less than one image of 2 classes (b, c); one of each is taken, which makes 1.49 % "
        "of all"
    )
    assert less_than_one(labels, (50.0,), ("a", "b", "c")) == ""
    assert less_than_one(np.full(20, -1), (1.0,), ()) == (
        "1 % is less than one image; one is taken, which makes 5 % of all"
    )


def test_more_images_do_better_and_draws_are_those_of_the_seed():
    def accuracies(seed: int):
        return few_shot_accuracies(
            blobs(300, spread=2.0),
            blobs(90, spread=2.0, seed=1),
            3,
            per_class=(1, 10),
            percent=(5.0,),
            draws=4,
            decays=(1.0, 1e-2),
            seed=seed,
        )

    first, again, other = accuracies(0), accuracies(0), accuracies(1)
    assert list(first) == ["1 per class", "10 per class", "5 %"]
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert any(not np.array_equal(first[name], other[name]) for name in first)
    assert 100 / 3 < first["1 per class"].mean() < first["10 per class"].mean() - 5
    assert len(set(first["1 per class"].tolist())) > 1


def test_a_class_without_images_is_not_the_nearest():
    (x, y), test = blobs(60), blobs(30)
    scores = few_shot_accuracies(
        (x, y), test, 9, per_class=(3,), percent=(), draws=3, decays=(1.0,), seed=0
    )
    assert scores["3 per class"] == pytest.approx(100.0, abs=10)
