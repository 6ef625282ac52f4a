"""kNN accuracy against a case worked by hand and a plain loop in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sacl_fast.errors import UserError
from sacl_fast.evaluation.knn import _nearest, knn_accuracy, knn_predictions


def brute_force(bank, bank_labels, queries, query_labels, k, temperature, classes) -> float:
    """The definition, one query at a time."""
    bank = bank.double().numpy()
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    right = 0
    for query, label in zip(queries.double().numpy(), query_labels.tolist(), strict=True):
        similarity = bank @ (query / np.linalg.norm(query))
        votes = np.zeros(classes)
        for j in np.argsort(-similarity, kind="stable")[:k]:
            votes[bank_labels[j]] += math.exp(similarity[j] / temperature)
        right += int(votes.argmax() == label)
    return 100 * right / len(queries)


def random_case(
    n: int = 300, q: int = 101, classes: int = 7
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    centers = torch.randn(classes, 5, generator=g)
    bank_labels = torch.randint(classes, (n,), generator=g)
    query_labels = torch.randint(classes, (q,), generator=g)
    bank = centers[bank_labels] + torch.randn(n, 5, generator=g)
    return bank, bank_labels, centers[query_labels] + torch.randn(q, 5, generator=g), query_labels


@pytest.mark.parametrize("k", [1, 5, 20, 300, 1000])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("chunk", [1, 32, 256])
def test_matches_the_definition(k: int, temperature: float, chunk: int):
    case = random_case()
    expected = brute_force(*case, min(k, 300), temperature, 7)
    assert 15 < expected < 99
    got = knn_accuracy(*case, k=k, temperature=temperature, num_classes=7, chunk=chunk)
    assert got == pytest.approx(expected)


def test_worked_by_hand():
    """Query (1, 0); cosines 1, 0.8, 0.6. At T = 1 the two of class 1 outvote the nearest one
    (e^0.8 + e^0.6 = 4.05 against e = 2.72), at T = 0.1 they do not (4.0e3 + 0.4e3 against 2.2e4).
    """
    bank = torch.tensor([[3.0, 0.0], [0.8, 0.6], [6.0, 8.0]])
    labels, query = torch.tensor([0, 1, 1]), torch.tensor([[2.0, 0.0]])
    for temperature, winner in ((1.0, 1), (0.1, 0)):
        for label in (0, 1):
            got = knn_accuracy(
                bank,
                labels,
                query,
                torch.tensor([label]),
                k=3,
                temperature=temperature,
                num_classes=2,
            )
            assert got == 100.0 * (label == winner)


def test_a_tiny_temperature_is_the_nearest_neighbour():
    bank, bank_labels, queries, query_labels = random_case()
    one = knn_accuracy(*random_case(), k=1, temperature=1.0, num_classes=7)
    many = knn_accuracy(
        bank, bank_labels, queries, query_labels, k=50, temperature=1e-9, num_classes=7
    )
    assert one == many


def test_ties_go_to_the_lower_index():
    similarity = torch.tensor(
        [[0.5, 0.9, 0.5, 0.5, 0.1], [0.2] * 5, [0.5, 0.4, 0.3, 0.2, 0.1], [0.0, 0.5, 0.5, 0.0, 0.9]]
    )
    nearest, index = _nearest(similarity, 3)
    assert index[:3].tolist() == [[1, 0, 2], [0, 1, 2], [0, 1, 2]]
    assert sorted(index[3].tolist()) == [1, 2, 4]
    assert torch.equal(nearest, similarity.gather(1, index))
    assert torch.equal(nearest, nearest.sort(dim=1, descending=True).values)


def test_many_ties_match_the_definition():
    """Collapsed features: the worst case of the tie rule."""
    g = torch.Generator().manual_seed(0)
    bank = torch.eye(4)[torch.randint(4, (200,), generator=g)]
    labels = torch.randint(3, (200,), generator=g)
    queries, answers = torch.eye(4).repeat(3, 1), torch.arange(3).repeat_interleave(4)
    expected = brute_force(bank, labels, queries, answers, 13, 0.07, 3)
    got = knn_accuracy(bank, labels, queries, answers, k=13, temperature=0.07, num_classes=3)
    assert got == pytest.approx(expected)


def test_equal_votes_go_to_the_lower_class():
    bank, query = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    got = knn_accuracy(
        bank, torch.tensor([1, 0]), query, torch.tensor([0]), k=2, temperature=1.0, num_classes=2
    )
    assert got == 100.0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"bank": torch.zeros(0, 5), "bank_labels": torch.zeros(0, dtype=torch.long)}, "bank: no"),
        (
            {"queries": torch.zeros(0, 5), "query_labels": torch.zeros(0, dtype=torch.long)},
            "queries: no",
        ),
        ({"bank_labels": torch.zeros(3, dtype=torch.long)}, "do not fit"),
        ({"queries": torch.zeros(101)}, "do not fit"),
        ({"queries": torch.zeros(101, 4)}, "same encoder"),
        ({"num_classes": 3}, "0 to 2 work"),
        ({"query_labels": torch.full((101,), -1)}, "labels go from -1"),
        ({"bank": torch.full((300, 5), torch.nan)}, "not finite"),
        ({"k": 0}, "k is 0; 1 or more works"),
        ({"temperature": 0.0}, "temperature is 0.0; a value above 0"),
        ({"temperature": float("nan")}, "temperature is nan; a finite number"),
    ],
)
def test_what_does_not_fit_is_said(change: dict, sentence: str):
    names = ("bank", "bank_labels", "queries", "query_labels")
    given = dict(zip(names, random_case(), strict=True))
    options: dict = given | {"k": 5, "temperature": 0.07, "num_classes": 7} | change
    with pytest.raises(UserError, match=sentence):
        knn_accuracy(**options)


def test_predictions_are_the_classes_by_their_votes():
    """Of three neighbours two classes have votes; the others follow by their number."""
    bank = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.9, 0.3], [-1.0, 0.0]])
    labels = torch.tensor([4, 2, 2, 0])
    options = {"k": 3, "temperature": 1.0, "num_classes": 6}
    query = torch.tensor([[2.0, 0.0]]), torch.tensor([2])
    top = knn_predictions(bank, labels, *query, **options)
    assert top.tolist() == [[2, 4, 0, 1, 3]]
    assert knn_predictions(bank, labels, *query, count=9, **options).shape == (1, 6)
    g = torch.Generator().manual_seed(0)
    features, classes = torch.randn(80, 8, generator=g), torch.arange(80) % 6
    split = features[:50], classes[:50], features[50:], classes[50:]
    top = knn_predictions(*split, chunk=7, **options)
    first = 100.0 * (top[:, 0] == split[3]).double().mean().item()
    assert knn_accuracy(*split, **options) == pytest.approx(first)
