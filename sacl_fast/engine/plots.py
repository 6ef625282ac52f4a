"""The curves of a run as one picture, drawn from ``metrics.jsonl``.

Matplotlib's object interface on the Agg canvas: no display, no pyplot and so no global state in
the process that trains.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from sacl_fast.files import whole_file

_POINTS = 600  # per curve: about one a pixel

# Okabe & Ito's palette: told apart with every common colour blindness.
_BLACK, _ORANGE, _SKY, _GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
_BLUE, _VERMILION = "#0072B2", "#D55E00"
_GREY = "#6b6b6b"

_LOSSES = {
    "loss": ("loss", _BLACK),
    "on_diagonal": ("on-diagonal", _BLUE),
    "off_diagonal": ("off-diagonal", _ORANGE),
    "distillation": ("distillation", _GREEN),
}
_KNN = {"knn_dense": ("dense", _BLUE), "knn_slim": ("slim", _ORANGE)}
_RANKS = {
    "rankme_dense": ("RankMe dense", _BLUE),
    "rankme_slim": ("slim", _ORANGE),
    "lidar_dense": ("LiDAR dense", _GREEN),
    "lidar_slim": ("slim", _SKY),
}


def plot_curves(metrics: Sequence[dict[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draw loss, learning rate, kNN accuracy, the effective ranks of features and the embeddings'
    health over epochs.

    Args:
        metrics: lines as ``read_metrics`` gives them; any number, in any order.
        path: of the PNG; written to a temporary name and renamed.

    Raises:
        OSError: it cannot be written; an older picture is left as it was.
    """
    figure, canvas = _figure(16, 7.5)
    loss, knn, health, rate, ranks = (figure.add_subplot(2, 3, n) for n in range(1, 6))
    train, scores, label_free = (
        [row for row in metrics if row.get("kind") == kind]
        for kind in ("train", "knn", "label_free")
    )
    _draw_loss(loss, train)
    _draw_rate(rate, train)
    percent: Any = {"most": 100.5, "suffix": " %"}
    _draw_evaluation(knn, scores, _KNN, "kNN accuracy", "top-1 (%)", "no labels", **percent)
    _draw_evaluation(ranks, label_free, _RANKS, "Features", "effective rank", "not measured")
    _draw_health(health, train)
    last = max((row["epoch"] for row in [*train, *scores, *label_free]), default=0)
    for axes in figure.axes:
        axes.set_xlim(-0.015 * max(1, last), 1.015 * max(1, last))

    with whole_file(Path(path)) as file:
        canvas.print_png(file)


def plot_accuracy(
    metrics: Sequence[dict[str, Any]], path: str | os.PathLike[str], kind: str = "accuracy"
) -> None:
    """The same of a run that learns labels: loss, learning rate, and ``accuracy`` or, of images of
    several classes, mean average ``precision``."""
    figure, canvas = _figure(15, 4)
    loss, rate, accuracy = (figure.add_subplot(1, 3, n) for n in range(1, 4))
    train = [row for row in metrics if row.get("kind") == "train"]
    _draw_loss(loss, train)
    _draw_rate(rate, train)
    title = "Accuracy" if kind == "accuracy" else "Mean average precision, 11 points"
    frame(accuracy, title, "of validation images (%)")
    epochs, values = series([row for row in metrics if row.get("kind") == "accuracy"], kind)
    if len(values):
        draw_line(accuracy, epochs, values, _BLUE, None, marker="o" if len(values) < 60 else None)
    else:
        say(accuracy, "no readings yet")
    with whole_file(Path(path)) as file:
        canvas.print_png(file)


def _figure(width: float, height: float) -> tuple[Figure, FigureCanvasAgg]:
    """Of a size in inches. The margins are given, since a run draws after its epochs and to find
    them takes longer than the picture."""
    figure = Figure(figsize=(width, height), dpi=110)
    figure.subplots_adjust(
        left=0.8 / width,
        right=1 - 0.75 / width,
        bottom=0.5 / height,
        top=1 - 0.4 / height,
        wspace=0.24,
        hspace=0.3,
    )
    return figure, FigureCanvasAgg(figure)


def _draw_loss(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    frame(axes, "Loss", "loss and its weighted parts")
    lowest, highest = np.inf, -np.inf
    for key, (label, color) in _LOSSES.items():
        epochs, values = series(rows, key)
        if not len(values) or not values.any():
            continue  # a part that is switched off
        lowest, highest = min(lowest, values.min()), max(highest, values.max())
        draw_line(axes, epochs, values, color, label, width=1.8 if key == "loss" else 1.3)
    if not np.isfinite(lowest):
        say(axes, "no readings yet")
        return
    if lowest > 0 and highest > 30 * lowest:
        axes.set_yscale("log")
    _legend(axes)


def _draw_rate(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    frame(axes, "Learning rate", "learning rate")
    epochs, values = series(rows, "lr")
    if not len(values):
        say(axes, "no readings yet")
        return
    draw_line(axes, epochs, values, _BLUE, None)
    axes.set_ylim(bottom=0)


def _draw_evaluation(
    axes: Axes,
    rows: Sequence[dict[str, Any]],
    curves: Mapping[str, tuple[str, str]],
    title: str,
    unit: str,
    without: str,
    *,
    most: float = np.inf,
    suffix: str = "",
) -> None:
    """Figures of the evaluations, their last values in the legend; ``without``: said where there
    are none."""
    frame(axes, title, unit)
    drawn = []
    for key, (label, color) in curves.items():
        epochs, values = series(rows, key)
        if len(values):
            drawn += [values.min(), values.max()]
            label = f"{label} {values[-1]:.1f}{suffix}"
            draw_line(axes, epochs, values, color, label, marker="o" if len(values) < 60 else None)
    if not drawn:
        say(axes, without)
        return
    axes.set_ylim(max(0, min(drawn) - 3), min(most, max(drawn) + 3))
    _legend(axes)


def _draw_health(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    frame(axes, "Embeddings", "std (1: healthy, 0: collapsed)")
    std_epochs, std = series(rows, "embedding_std")
    rank_epochs, rank = series(rows, "effective_rank")
    if not len(std) and not len(rank):
        say(axes, "no readings yet")
        return
    draw_line(axes, std_epochs, std, _BLUE, None)
    axes.set_ylim(0, max(1.05, 1.05 * std.max(initial=0)))
    _paint(axes, "left", _BLUE)
    twin = axes.twinx()
    twin.spines[["top", "left"]].set_visible(False)
    twin.set_ylabel("effective rank (directions)")
    draw_line(twin, rank_epochs, rank, _VERMILION, None)
    twin.set_ylim(bottom=0)
    _paint(twin, "right", _VERMILION)


def series(rows: Sequence[dict[str, Any]], key: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Epochs and values of a key, in order; readings that were not finite are left out."""
    pairs = [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]
    array = np.array(sorted(pairs), dtype=float).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def draw_line(
    axes: Axes,
    epochs: NDArray[Any],
    values: NDArray[Any],
    color: str,
    label: str | None,
    *,
    width: float = 1.5,
    marker: str | None = None,
    style: str = "-",
) -> None:
    """A curve; a long one as the means of neighbouring readings, in the band of their range."""
    if len(values) > _POINTS:
        edges = np.linspace(0, len(values), _POINTS + 1).astype(int)[:-1]
        counts = np.diff(edges, append=len(values))
        low, high = np.minimum.reduceat(values, edges), np.maximum.reduceat(values, edges)
        epochs = np.add.reduceat(epochs, edges) / counts
        values = np.add.reduceat(values, edges) / counts
        axes.fill_between(epochs, low, high, color=color, alpha=0.15, linewidth=0)
    if len(values) == 1:
        marker = "o"
    axes.plot(epochs, values, color=color, label=label, linewidth=width, marker=marker, ms=4,
              linestyle=style)  # fmt: skip


def frame(axes: Axes, title: str, unit: str) -> None:
    """Title, axes and grid of a panel over epochs."""
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.set_xlabel("epoch")
    axes.set_ylabel(unit)
    axes.ticklabel_format(axis="y", scilimits=(-3, 4))  # no wider than the margin
    axes.grid(color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: Axes) -> None:
    """In the title's line, where no curve can be."""
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=4,
        frameon=False,
        fontsize=8,
        borderaxespad=0.2,
        columnspacing=1.0,
        handlelength=1.0,
    )


def _paint(axes: Axes, side: str, color: str) -> None:
    axes.yaxis.label.set_color(color)
    axes.tick_params(axis="y", colors=color)
    axes.spines[side].set_visible(True)
    axes.spines[side].set_color(color)


def say(axes: Axes, text: str) -> None:
    """Text in place of curves."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=_GREY)
    axes.set_xticks([])
    axes.set_yticks([])
