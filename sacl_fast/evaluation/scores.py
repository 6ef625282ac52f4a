"""What an evaluation found of each encoder, with its statistical uncertainty."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from sacl_fast.checks import counted

METHODS = {
    "knn": "kNN",
    "linear": "linear",
    "linear-fast": "linear-fast",
    "few-shot": "few-shot",
    "finetune": "fine-tuning",
}
"""What a verdict calls them."""

_Z = 1.959964  # of the normal distribution: 95 % lie within


class Figure(NamedTuple):
    """A mean in percent, or in percentage points, and how far its 95 % interval reaches."""

    mean: float
    margin: float

    @property
    def interval(self) -> str:
        return f"{self.mean - self.margin:.1f} to {self.mean + self.margin:.1f}"


@dataclass(frozen=True)
class Scores:
    """Of one encoder."""

    name: str
    """``dense``, ``slim``, ``dense, untrained``, ``supervised``, ..."""
    figures: dict[str, Figure]
    """By the column's name: ``top-1``, ``top-5``; ``10 per class``, ``1 %``."""
    samples: np.ndarray
    """(n,) what the main figure is the mean of: 0 or 100 for each image, or the accuracy of each
    draw. The same images and draws for every encoder."""
    confusion: np.ndarray | None = None
    """(C, C) images of the class in the row that were taken for that in the column."""
    control: str | None = None
    """The name of the same encoder untrained, where it was evaluated."""
    note: str = ""
    by_class: np.ndarray | None = None
    """(C,) average precision of each class in percent, nan where no image shows it."""
    images: np.ndarray | None = None
    """(C,) images that show the class, beside ``by_class``."""

    @property
    def per_class(self) -> np.ndarray:
        """(C,) top-1 in percent for the images of each class, or its average precision; nan where
        there are none."""
        if self.by_class is not None:
            return self.by_class
        assert self.confusion is not None
        images = self.confusion.sum(axis=1)
        return np.where(images, 100.0 * self.confusion.diagonal() / np.maximum(images, 1), np.nan)


@dataclass(frozen=True)
class Result:
    """Of an evaluation."""

    method: str
    """One of ``METHODS``."""
    main: str
    """The column that the verdict is about."""
    scores: tuple[Scores, ...]
    classes: tuple[str, ...]
    train_images: int
    test_images: int
    held_out: bool
    """Whether the images that were classified are a tenth of the training images, for want of
    validation images."""
    settings: dict[str, Any]
    path: str = ""
    """What was evaluated."""
    folder: Path | None = None
    """Where it was written."""
    few_labels: str = ""
    """How few of them were learnt from in fine-tuning: ``10 % of labels``."""
    note: str = ""
    """Where the draws of few images are not what their name says."""

    def of(self, name: str) -> Scores:
        """The scores of the encoder of that name."""
        return next(scores for scores in self.scores if scores.name == name)

    def gain(self, scores: Scores) -> Figure | None:
        """Percentage points over the untrained encoder; None where that was not evaluated."""
        if scores.control is None:
            return None
        return mean_of(scores.samples - self.of(scores.control).samples)

    @property
    def verdict(self) -> str:
        """Whether pre-training helped, in one line, of the first encoder."""
        first = self.scores[0]
        what = [METHODS[self.method]]
        if self.method == "few-shot":
            what.append(self.main)
        if self.few_labels:
            what.append(self.few_labels)
        if first.name != "dense":
            what.append(f"{first.name} encoder")
        what.append(counted(self.test_images, "image"))
        where = ", ".join(what)
        gain = self.gain(first)
        if gain is None:
            figure = first.figures[self.main]
            interval = "" if math.isinf(figure.margin) else f"; 95 % interval {figure.interval}"
            name = self.main if self.method == "finetune" else "top-1"
            return f"{name} is {figure.mean:.1f} % ({where}{interval})"
        untrained = "training from scratch" if self.method == "finetune" else "an untrained encoder"
        if abs(gain.mean) <= gain.margin:
            return (
                f"pre-training makes no difference to {untrained} that can be told from "
                f"chance: {gain.mean:+.1f} points ({where}; 95 % interval {gain.interval})"
            )
        verb, side = ("adds", "over") if gain.mean > 0 else ("takes away", "from")
        size = Figure(abs(gain.mean), gain.margin)
        return (
            f"pre-training {verb} {size.mean:.1f} points {side} {untrained} ({where}; "
            f"95 % interval {size.interval})"
        )


def classified(name: str, top: Tensor, labels: Tensor, num_classes: int, **more: Any) -> Scores:
    """The scores of predicted classes (N, up to 5), likeliest first, for images with ``labels``
    (N,)."""
    guesses, truth = top.cpu().numpy(), labels.cpu().numpy()
    right = 100.0 * (guesses[:, 0] == truth)
    figures = {"top-1": mean_of(right)}
    if num_classes > 5:
        figures["top-5"] = mean_of(100.0 * (guesses == truth[:, None]).any(axis=1))
    confusion = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(confusion, (truth, guesses[:, 0]), 1)
    return Scores(name, figures, right, confusion, **more)


def mean_of(samples: np.ndarray) -> Figure:
    """Their mean, and the 95 % interval of Student's t for it."""
    n = len(samples)
    if n < 2:
        return Figure(float(samples.mean()), math.inf)
    return Figure(float(samples.mean()), t_quantile(n - 1) * float(samples.std(ddof=1)) / n**0.5)


def t_quantile(degrees: int) -> float:
    """97.5 % quantile of Student's t, to 1 % from 2 degrees of freedom on (Abramowitz & Stegun,
    26.7.5)."""
    z, v = _Z, degrees
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / v**i for i, term in enumerate(terms))
