"""The picture of the curves: drawn at any number of readings, readable by any viewer."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from sacl_fast.engine import plots
from sacl_fast.engine.plots import plot_accuracy, plot_curves


def train_rows(n: int, epochs: float = 5.0) -> list[dict[str, Any]]:
    return [
        dict(
            kind="train",
            step=i,
            epoch=(i + 1) * epochs / n,
            loss=200 * math.exp(-i / n * 4) + math.sin(i),
            on_diagonal=150 * math.exp(-i / n * 4),
            off_diagonal=3.0,
            distillation=0.0,
            lr=0.3 * i / n,
            embedding_std=0.9,
            effective_rank=30 + 10 * i / n,
        )
        for i in range(n)
    ]


def knn_rows(n: int) -> list[dict[str, Any]]:
    return [
        dict(kind="knn", step=i, epoch=float(i), knn_dense=10.0 * i, knn_slim=9.0 * i)
        for i in range(n)
    ]


def label_free_rows(n: int) -> list[dict[str, Any]]:
    return [
        dict(kind="label_free", step=i, epoch=float(i), rankme_dense=3.0 * i, lidar_slim=2.0 * i)
        for i in range(n)
    ]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is drawn."""
    made: list[Figure] = []

    def make(*args: Any, **kwargs: Any) -> Figure:
        made.append(Figure(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(plots, "Figure", make)
    return made


def panel(figure: Figure, title: str):
    return next(axes for axes in figure.axes if axes.get_title(loc="left") == title)


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


@pytest.mark.parametrize("n", [0, 1, 2, 50, 100_000])
def test_drawn_at_any_number_of_readings(tmp_path: Path, n: int, figures: list[Figure]):
    path = tmp_path / "curves.png"
    plot_curves(train_rows(n) + knn_rows(min(n, 6)) + label_free_rows(min(n, 6)), path)
    image = np.asarray(Image.open(path).convert("RGB"), dtype=int)
    assert image.shape[0] > 700
    assert image.shape[1] > 1000
    coloured = (image.max(-1) - image.min(-1) > 60).sum()
    assert coloured == 0 if n == 0 else coloured > 60
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png"]
    points = [np.size(line.get_xdata()) for axes in figures[0].axes for line in axes.lines]
    assert max(points, default=0) <= 600
    none = ["no readings yet", "no labels", *["no readings yet"] * 2, "not measured"]
    assert texts(figures[0]) == (none if n == 0 else [])


def test_the_values_are_the_ones_drawn(tmp_path: Path, figures: list[Figure]):
    rows = train_rows(20)
    plot_curves(rows + knn_rows(4) + label_free_rows(3), tmp_path / "curves.png")
    (figure,) = figures
    loss = panel(figure, "Loss")
    assert [line.get_label() for line in loss.lines] == ["loss", "on-diagonal", "off-diagonal"]
    np.testing.assert_allclose(
        np.asarray(loss.lines[0].get_xydata()), [(r["epoch"], r["loss"]) for r in rows]
    )
    knn = panel(figure, "kNN accuracy")
    assert [line.get_label() for line in knn.lines] == ["dense 30.0 %", "slim 27.0 %"]
    ranks = panel(figure, "Features")
    assert [line.get_label() for line in ranks.lines] == ["RankMe dense 6.0", "slim 4.0"]
    assert all(axes.get_xlabel() == "epoch" for axes in figure.axes[:5])


def test_without_labels_the_panel_says_so(tmp_path: Path, figures: list[Figure]):
    plot_curves(train_rows(5), tmp_path / "curves.png")
    assert texts(figures[0]) == ["no labels", "not measured"]


@pytest.mark.parametrize("scale", [-1e12, -40.0, 1e-7, 1.0, 99.9])
def test_all_that_is_written_is_on_the_picture(tmp_path: Path, figures: list[Figure], scale: float):
    """Of curves of any height; the margins are given, not found. No panel reaches into another."""
    rows = train_rows(50, epochs=1000)
    for row in rows:
        for key in ("loss", "on_diagonal"):
            row[key] *= scale
        for key in ("lr", "embedding_std", "effective_rank"):
            row[key] *= abs(scale)
    scores = [{**row, "rankme_slim": 1000.0} for row in label_free_rows(600)]
    plot_curves(rows + knn_rows(11) + scores, tmp_path / "curves.png")
    plot_accuracy([*rows, dict(kind="accuracy", epoch=1, accuracy=99.9)], tmp_path / "curves.png")
    for figure, twins in zip(figures, (2, 1), strict=True):
        whole = figure.bbox.padded(1)
        boxes: list[Any] = [axes.get_tightbbox() for axes in figure.axes]
        assert all(whole.x0 < b.x0 and b.x1 < whole.x1 for b in boxes)
        assert all(whole.y0 < b.y0 and b.y1 < whole.y1 for b in boxes)
        panels = boxes[: len(boxes) - twins + 1]
        assert not any(a.overlaps(b) for i, a in enumerate(panels) for b in panels[:i])


def test_a_long_curve_keeps_its_mean_and_range(tmp_path: Path, figures: list[Figure]):
    rows = train_rows(10_001)
    plot_curves(rows, tmp_path / "curves.png")
    loss = panel(figures[0], "Loss")
    values = np.array([row["loss"] for row in rows])
    assert np.asarray(loss.lines[0].get_ydata()).mean() == pytest.approx(values.mean(), rel=1e-3)
    band = np.asarray(loss.collections[0].get_paths()[0].vertices)[:, 1]
    assert (band.min(), band.max()) == (values.min(), values.max())


@pytest.mark.parametrize("loss", [-12_000.0, 0.0, 5.0])
def test_gaps_negative_and_constant_values(tmp_path: Path, loss: float):
    """Null for what was not finite; the literal off-diagonal is negative."""
    rows = train_rows(10)
    for row in rows:
        row["loss"] = loss
    rows[3]["loss"] = rows[4]["effective_rank"] = None
    del rows[5]["embedding_std"], rows[6]["lr"]
    event = dict(kind="event", step=3, epoch=0.1, message="text")
    plot_curves([*rows, event, *knn_rows(1)], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_rows_may_come_in_any_order(tmp_path: Path):
    rows = train_rows(30) + knn_rows(3)
    plot_curves(rows, tmp_path / "a.png")
    plot_curves(rows[::-1], tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_picture_that_cannot_be_written(tmp_path: Path):
    """The old one stays, and nothing else is left."""
    target = tmp_path / "curves.png"
    target.mkdir()
    with pytest.raises(OSError, match="directory"):
        plot_curves(train_rows(3), target)
    assert list(tmp_path.iterdir()) == [target]


def test_pyplot_is_not_touched(tmp_path: Path):
    code = (
        "import sys; from sacl_fast.engine.plots import plot_curves; "
        "plot_curves([], sys.argv[1]); sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    root = Path(plots.__file__).parents[2]
    command = [sys.executable, "-c", code, str(tmp_path / "curves.png")]
    subprocess.run(command, cwd=root, check=True)
