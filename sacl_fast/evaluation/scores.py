"""What an evaluation found of each encoder, with its statistical uncertainty.

95 % intervals, none of which leaves what is possible, on however few images or draws:

- of an accuracy over images: Wilson's score interval (1927), which Brown, Cai and DasGupta advise
  ("Interval Estimation for a Binomial Proportion", Statistical Science, 2001). Of 10 images that
  are all classified rightly, it is 72.2 to 100 %.
- of a gain over the same images: Bonett and Price's ("Adjusted Wald Confidence Interval for a
  Difference of Binomial Proportions Based on Paired Data", 2012), who add a pair in favour of each
  side and take the usual interval of what that gives.
- of draws, and of classes: Student's t, cut off at 0 and 100 %.
"""

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
    """A mean in percent, or in percentage points, and its 95 % interval."""

    mean: float
    low: float = -math.inf
    high: float = math.inf
    """Infinite where no interval is known."""

    @property
    def margin(self) -> float:
        """Half the width of the interval; inf where none is known."""
        return (self.high - self.low) / 2

    @property
    def interval(self) -> str:
        return f"{self.low:.1f} to {self.high:.1f}"

    def shown(self, sign: str = "") -> str:
        """``31.3 ± 2.9``; with the interval in full where both its ends, as they are printed, are
        others than ± says."""
        mean, margin = f"{self.mean:{sign}.1f}", self.margin
        if math.isinf(margin):
            return mean
        ends = (self.low, self.mean - margin), (self.high, self.mean + margin)
        if all(f"{end:.1f}" != f"{by_margin:.1f}" for end, by_margin in ends):
            return f"{mean} ({self.interval})"
        return f"{mean} ± {margin:.1f}"


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
    of_images: bool = False
    """Whether the samples are images."""
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
        samples = scores.samples - self.of(scores.control).samples
        return gain_of(samples) if scores.of_images else mean_of(samples, -100.0)

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
        within = "interval over draws" if self.method == "few-shot" else "interval"
        if gain is None:
            figure = first.figures[self.main]
            interval = "" if math.isinf(figure.margin) else f"; 95 % {within} {figure.interval}"
            name = self.main if self.method == "finetune" else "top-1"
            return f"{name} is {figure.mean:.1f} % ({where}{interval})"
        untrained = "training from scratch" if self.method == "finetune" else "an untrained encoder"
        if gain.low <= 0 <= gain.high:
            return (
                f"pre-training makes no difference to {untrained} that can be told from "
                f"chance: {gain.mean:+.1f} points ({where}; 95 % {within} {gain.interval})"
            )
        verb, side = ("adds", "over") if gain.mean > 0 else ("takes away", "from")
        size = gain if gain.mean > 0 else Figure(-gain.mean, -gain.high, -gain.low)
        return (
            f"pre-training {verb} {size.mean:.1f} points {side} {untrained} ({where}; "
            f"95 % {within} {size.interval})"
        )


def classified(name: str, top: Tensor, labels: Tensor, num_classes: int, **more: Any) -> Scores:
    """The scores of predicted classes (N, up to 5), likeliest first, for images with ``labels``
    (N,)."""
    guesses, truth = top.cpu().numpy(), labels.cpu().numpy()
    right = 100.0 * (guesses[:, 0] == truth)
    figures = {"top-1": accuracy_of(right)}
    if num_classes > 5:
        figures["top-5"] = accuracy_of(100.0 * (guesses == truth[:, None]).any(axis=1))
    confusion = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(confusion, (truth, guesses[:, 0]), 1)
    return Scores(name, figures, right, of_images=True, confusion=confusion, **more)


def accuracy_of(right: np.ndarray) -> Figure:
    """Of images (n,), 100 where one is classified rightly and 0 elsewhere: Wilson's interval."""
    n, share = len(right), float(right.mean()) / 100
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + (_Z / (2 * n)) ** 2)
    return _bounded(100 * share, 100 * centre, 100 * half, 0.0)


def gain_of(samples: np.ndarray) -> Figure:
    """Of pairs (n,), 100 where the first encoder alone is right, -100 where the second alone is,
    and 0 elsewhere: Bonett and Price's interval."""
    n = len(samples)
    first, second = (float(of.sum() + 1) / (n + 2) for of in (samples > 0, samples < 0))
    half = _Z * math.sqrt((first + second - (first - second) ** 2) / (n + 2))
    return _bounded(float(samples.mean()), 100 * (first - second), 100 * half, -100.0)


def mean_of(samples: np.ndarray, least: float = 0.0) -> Figure:
    """The mean of figures that are ``least`` to 100, and the interval of Student's t for it; of a
    single one there is none."""
    n, mean = len(samples), float(samples.mean())
    if n < 2:
        return Figure(mean)
    half = t_quantile(n - 1) * float(samples.std(ddof=1)) / n**0.5
    return _bounded(mean, mean, half, least)


def _bounded(mean: float, centre: float, half: float, least: float) -> Figure:
    low, high = min(mean, centre - half), max(mean, centre + half)  # where rounding parts them
    return Figure(mean, max(least, low), min(100.0, high))


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
