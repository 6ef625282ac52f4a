"""Figures, intervals and the verdict, against closed forms."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from sacl_fast.evaluation.report import (
    _confusion_png,
    as_dict,
    figure_from,
    markdown,
    plain,
    write_result,
)
from sacl_fast.evaluation.scores import (
    Figure,
    Result,
    Scores,
    accuracy_of,
    classified,
    gain_of,
    mean_of,
    t_quantile,
)


def test_quantiles_of_student_s_t():
    table = {2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 29: 2.045, 10_000: 1.960}
    for degrees, value in table.items():
        assert t_quantile(degrees) == pytest.approx(value, rel=0.01)


def test_the_interval_of_an_accuracy_is_the_binomial_one():
    figure = accuracy_of(100.0 * (np.arange(1000) < 300))
    assert figure.mean == pytest.approx(30.0)
    assert figure.margin == pytest.approx(196 * math.sqrt(0.3 * 0.7 / 1000), rel=0.01)
    assert figure.shown() == "30.0 ± 2.8"


@pytest.mark.parametrize(
    ("right", "n", "interval"),  # Wilson's, from tables
    [(10, 10, "72.2 to 100.0"), (0, 10, "0.0 to 27.8"), (1, 1, "20.7 to 100.0"),
     (1, 3, "6.1 to 79.2"), (81, 263, "25.5 to 36.6"), (15, 148, "6.2 to 16.0")],
)  # fmt: skip
def test_intervals_of_few_images_stay_within_what_is_possible(right, n, interval):
    figure = accuracy_of(100.0 * (np.arange(n) < right))
    assert figure.interval == interval and figure.low <= figure.mean <= figure.high
    assert figure.shown() == f"{100 * right / n:.1f} ({interval})"


def test_plus_minus_stands_where_it_gives_the_interval():
    """Of an interval that is not about its figure, neither end as printed is what ± would say."""
    assert Figure(20.0, 17.94, 22.06).shown() == "20.0 ± 2.1"
    assert Figure(20.0, 18.0, 22.3).shown("+") == "+20.0 (18.0 to 22.3)"
    assert Figure(20.04, 17.98, 22.1).shown() == "20.0 ± 2.1"
    gain = gain_of(np.repeat([100.0, 0.0], [12, 48]))
    assert gain.shown("+") == f"+20.0 ({gain.interval})"
    assert accuracy_of(100.0 * (np.arange(10_000) < 500)).shown() == "5.0 ± 0.4"


def test_the_interval_of_a_gain():
    """Of one image it says nothing; no gain among few images is no certainty either."""
    for samples in ([100.0], [0.0], [-100.0, 0.0]):
        gain = gain_of(np.array(samples))
        assert -100 <= gain.low < 0 < gain.high <= 100
    # Bonett and Price's formula, of 26 pairs for one side, 15 for the other, of 200.
    samples = np.repeat([100.0, -100.0, 0.0], [26, 15, 159])
    one, other = 27 / 202, 16 / 202
    half = 196 * math.sqrt((one + other - (one - other) ** 2) / 202)
    gain = gain_of(samples)
    assert gain.mean == pytest.approx(5.5) and gain.margin == pytest.approx(half, rel=1e-3)
    assert (gain.low + gain.high) / 2 == pytest.approx(100 * (one - other))


def test_intervals_over_draws_are_cut_off():
    figure = mean_of(np.array([99.0, 100.0, 92.0]))
    assert figure.low == pytest.approx(97 - 4.303 * math.sqrt(19 / 3), rel=1e-2)
    assert figure.high == 100
    assert mean_of(np.array([-99.0, -100.0, -92.0]), -100.0).low == -100
    assert math.isinf(mean_of(np.array([50.0])).margin)
    assert mean_of(np.array([50.0])).shown() == "50.0"


def test_figures_are_written_and_read_again():
    found = result(np.array([0.0, 100.0]), np.array([100.0, 100.0]))
    (of, _) = as_dict(found)["encoders"]
    assert figure_from(of["figures"]["top-1"]) == found.of("dense").figures["top-1"]
    assert figure_from({"mean": 3.0, "margin": 1.0}) == Figure(3.0, 2.0, 4.0)  # of earlier versions
    assert figure_from({"mean": 3.0, "margin": None, "low": None, "high": None}) == Figure(3.0)


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


def test_names_of_any_characters_are_written(tmp_path):
    truth = torch.tensor([0, 1, 2])
    names = ("\ud800", "a|b\nc", "\x1b[31m")
    told = Result(
        "knn", "top-1", (classified("dense", truth[:, None], truth, 3),), names, 9, 3, False,
        {"eval": {"k": 2, "temperature": 0.1}}, "run\udcff\n", note="of \udcff",
    )  # fmt: skip
    write_result(told, tmp_path)
    assert json.loads((tmp_path / "knn.json").read_text())["classes"] == list(names)
    lines = (tmp_path / "knn.md").read_text().splitlines()
    assert lines[0] == r"# knn: run\udcff\n"
    assert [line.split(" | ")[0] for line in lines if line.endswith(" 1 | 100.0 |")] == [
        r"| \ud800", r"| a\|b\nc", r"| \x1b[31m"
    ]  # fmt: skip


def result(before: np.ndarray, after: np.ndarray | None, name: str = "dense") -> Result:
    def scores(samples: np.ndarray, name: str, control: str | None = None) -> Scores:
        figures = {"top-1": accuracy_of(samples)}
        return Scores(name, figures, samples, of_images=True, control=control)

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
        "+10.0 points (kNN, slim encoder, 20 images; 95 % interval -8.3 to 26.5)"
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
    assert gain is not None and gain.mean == pytest.approx(2.0) and gain.margin < 0.92
    assert found.of("dense").figures["top-1"].margin > 3


def test_tables_name_every_encoder():
    found = result(np.array([0.0, 100.0]), np.array([100.0, 100.0]))
    for text in (plain(found), markdown(found)):
        assert "dense, untrained" in text and "+50.0" in text and found.verdict in text
