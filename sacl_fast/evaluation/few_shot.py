"""Few-shot evaluation: classifiers of few labelled images, drawn several times.

Of 1, 5, 10 images a class: the nearest class mean, of features that are centred by the mean of all
training images (which needs no labels) and scaled to length 1 (Wang et al., "SimpleShot:
Revisiting Nearest-Neighbor Classification for Few-Shot Learning", 2019). Of 1 % or 10 % of the
images: the linear classifier of ``linear``.

Every encoder sees the same draws, so that differences between encoders are differences on the same
images. A draw passes over images that cannot be read, and takes the next ones of the class: so that
it does not matter whether all images are looked at or those drawn alone, and fine-tuning on few
labels has the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sacl_fast.checks import counted
from sacl_fast.data.images.splits import few
from sacl_fast.evaluation.linear import choose_decay, fit_with_decay


def draw_per_class(
    labels: np.ndarray, count: int, *, seed: int, nth: int = 0, readable: np.ndarray | None = None
) -> np.ndarray:
    """Positions of ``count`` images of each class, or of all that there are of it: the ``nth`` draw
    of a seed.

    Args:
        labels: (N,) of all images.
        readable: (N,) bool, the images that can be drawn; None: all.
    """
    return _draw(labels, count, lambda _: count, seed, nth, readable)


def draw_percent(
    labels: np.ndarray,
    percent: float,
    *,
    seed: int,
    nth: int = 0,
    readable: np.ndarray | None = None,
) -> np.ndarray:
    """Positions of so many percent of each class's images, at least one; likewise."""
    return _draw(labels, percent, lambda there: _share_of(there, percent), seed, nth, readable)


def _share_of(images: int, percent: float) -> int:
    return max(1, round(percent / 100 * images))


def less_than_one(labels: np.ndarray, percents: Sequence[float], classes: Sequence[str]) -> str:
    """Of shares that are less than one image of a class, of which one is drawn all the same: a
    sentence that says so; '' where there are none."""
    there = np.bincount(labels + 1, minlength=len(classes) + 1)[1 if classes else 0 :]
    said = []
    for percent in percents:
        short = np.flatnonzero((there > 0) & (percent / 100 * there < 1))
        if len(short):
            named = few([str(classes[i]) for i in short], 3) if classes else ""
            of = f" of {counted(len(short), 'class')} ({named})" if classes else ""
            drawn = sum(_share_of(int(count), percent) for count in there[there > 0])
            said.append(
                f"{percent:g} % is less than one image{of}; one{' of each' if of else ''} is "
                f"taken, which makes {100 * drawn / there.sum():.3g} % of all"
            )
    return ". ".join(said)


def short_of(labels: np.ndarray, count: int, classes: Sequence[str]) -> str:
    """A sentence on the classes of which fewer than ``count`` images can be drawn, among those of
    ``labels`` (N,); '' where there are none."""
    there = np.bincount(labels, minlength=len(classes))
    short = np.flatnonzero((there > 0) & (there < count))
    if not len(short):
        return ""
    named = few([f"{classes[i]} {there[i]}" for i in short], 3)
    return (
        f"fewer than {count} images can be read of {counted(len(short), 'class')} ({named}); all "
        "are taken"
    )


def _draw(
    labels: np.ndarray,
    amount: float,
    count: Callable[[int], int],
    seed: int,
    nth: int,
    readable: np.ndarray | None,
) -> np.ndarray:
    rng = np.random.default_rng([seed, nth, round(1000 * amount)])
    drawn = []
    for label in np.unique(labels):
        there = np.flatnonzero(labels == label)
        order = rng.permutation(there)
        drawn.append((order if readable is None else order[readable[order]])[: count(len(there))])
    return np.concatenate(drawn)


def few_shot_accuracies(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    num_classes: int,
    *,
    per_class: Sequence[int],
    percent: Sequence[float],
    draws: int,
    decays: Sequence[float],
    seed: int,
    tell: Callable[[], None] = lambda: None,
    among: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Top-1 in percent for each draw, (draws,), by name: ``10 per class``, ``1 %``.

    Args:
        train, test: features (N, F) and labels (N,).
        tell: called after each draw.
        among: labels (M,) of all training images, and which of them (M,) bool could be read, so
            that ``train`` is of them; None: all.
    """
    features, labels = train
    host, readable = among or (labels.cpu().numpy(), np.ones(len(labels), bool))
    row = np.cumsum(readable) - 1
    centre = features.mean(dim=0)
    found: dict[str, np.ndarray] = {}

    def positions(draw: Callable[..., np.ndarray], amount: float, nth: int) -> Tensor:
        drawn = draw(host, amount, seed=seed, nth=nth, readable=readable)
        return torch.from_numpy(row[drawn]).to(features.device)

    for count in per_class:
        scores = np.empty(draws)
        for nth in range(draws):
            some = positions(draw_per_class, count, nth)
            scores[nth] = _by_class_means(features[some], labels[some], test, centre, num_classes)
            tell()
        found[f"{count} per class"] = scores
    for share in percent:
        scores, decay = np.empty(draws), None
        for nth in range(draws):
            some = positions(draw_percent, share, nth)
            x, y = features[some], labels[some]
            if decay is None:
                decay = choose_decay(x, y, num_classes, decays, seed=seed)
            top = fit_with_decay(x, y, num_classes, decay).top(test[0], 1)
            scores[nth] = _percent_right(top[:, 0], test[1])
            tell()
        found[f"{share:g} %"] = scores
    return found


def _by_class_means(
    features: Tensor, labels: Tensor, test: tuple[Tensor, Tensor], centre: Tensor, classes: int
) -> float:
    x, queries = (F.normalize(f - centre, dim=1) for f in (features, test[0]))
    sums = torch.zeros(classes, x.shape[1], device=x.device).index_add_(0, labels, x)
    counts = torch.bincount(labels, minlength=classes)
    means = sums / counts.clamp(min=1)[:, None]
    # |q - m|^2 without |q|^2; a class of which there is no image is never the nearest.
    distance = means.square().sum(dim=1) - 2 * queries @ means.T
    distance[:, counts == 0] = torch.inf
    return _percent_right(distance.argmin(dim=1), test[1])


def _percent_right(predicted: Tensor, labels: Tensor) -> float:
    return 100.0 * (predicted == labels).sum().item() / len(labels)
