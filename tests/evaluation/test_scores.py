"""Figures, intervals and the verdict, against closed forms."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from sacl_fast.evaluation.report import _confusion_png, markdown, plain
from sacl_fast.evaluation.scores import Result, Scores, classified, mean_of, t_quantile


def test_quantiles_of_student_s_t():
    table = {2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 29: 2.045, 10_000: 1.960}
    for degrees, value in table.items():
        assert t_quantile(degrees) == pytest.approx(value, rel=0.01)


def test_the_interval_of_an_accuracy_is_the_binomial_one():
    right = 100.0 * (np.arange(1000) < 300)
    figure = mean_of(right)
    assert figure.mean == pytest.approx(30.0)
    assert figure.margin == pytest.approx(196 * math.sqrt(0.3 * 0.7 / 1000), rel=0.01)
    assert mean_of(right[:1]).margin == math.inf


def test_scores_of_predictions():
    truth = torch.tensor([0, 0, 1, 2, 2, 2])
    top = torch.tensor([[0, 1], [1, 0], [1, 2], [2, 0], [0, 2], [1, 0]])
    scores = classified("dense", top, truth, 7)
    assert scores.figures["top-1"].mean == pytest.approx(50.0)
    assert scores.figures["top-5"].mean == pytest.approx(100 * 5 / 6)
    assert scores.per_class[:3].tolist() == pytest.approx([50, 100, 100 / 3])
    assert np.isnan(scores.per_class[3:]).all()
    assert scores.confusion is not None and scores.confusion[2, :3].tolist() == [1, 1, 1]
    assert "top-5" not in classified("dense", top, truth, 3).figures


def test_the_picture_of_a_confusion_matrix(recwarn):
    """Names that the font lacks make no noise, and no blank band is left above the title."""
    truth = torch.arange(3).repeat(9)
    scores = classified("dense", truth[:, None], truth, 3)
    told = Result(
        "knn", "top-1", (scores,), ("Äpfel", "猫", "a class of a very long name"), 9, 27, False, {}
    )
    gray = np.asarray(Image.open(io.BytesIO(_confusion_png(told))).convert("L"))
    assert np.flatnonzero((gray < 200).any(1))[0] < 20
    assert np.flatnonzero((gray < 200).any(0))[0] < 20
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


def result(before: np.ndarray, after: np.ndarray | None, name: str = "dense") -> Result:
    def scores(samples: np.ndarray, name: str, control: str | None = None) -> Scores:
        return Scores(name, {"top-1": mean_of(samples)}, samples, control=control)

    rows = [scores(before, name)]
    if after is not None:
        rows = [scores(after, name, f"{name}, untrained"), scores(before, f"{name}, untrained")]
    return Result("knn", "top-1", tuple(rows), ("a", "b"), 9, len(before), False,
                  {"eval": {"k": 2, "temperature": 0.1}})  # fmt: skip


def test_the_verdict():
    n = np.arange(5000)
    low, high = 100.0 * (n % 2), 100.0 * ((n % 2) | (n % 7 == 0))
    assert result(low, high).verdict == (
        "pre-training adds 7.2 points over an untrained encoder (kNN, 5,000 images; 95 % interval "
        "6.4 to 7.9)"
    )
    assert result(high, low).verdict == (
        "pre-training takes away 7.2 points from an untrained encoder (kNN, 5,000 images; 95 % "
        "interval 6.4 to 7.9)"
    )
    few = slice(0, 20)
    assert result(low[few], high[few], "slim").verdict == (
        "pre-training makes no difference to an untrained encoder that can be told from chance: "
        "+10.0 points (kNN, slim encoder, 20 images; 95 % interval -4.4 to 24.4)"
    )
    assert result(low, None).verdict == (
        "top-1 is 50.0 % (kNN, 5,000 images; 95 % interval 48.6 to 51.4)"
    )


def test_the_gain_is_of_pairs():
    """What both encoders get right says nothing of their difference."""
    n = np.arange(1000)
    low, high = 100.0 * (n < 500), 100.0 * (n < 520)
    found = result(low, high)
    gain = found.gain(found.of("dense"))
    assert gain is not None and gain.mean == pytest.approx(2.0) and gain.margin < 0.9
    assert found.of("dense").figures["top-1"].margin > 3


def test_tables_name_every_encoder():
    found = result(np.array([0.0, 100.0]), np.array([100.0, 100.0]))
    for text in (plain(found), markdown(found)):
        assert "dense, untrained" in text and "+50.0" in text and found.verdict in text
