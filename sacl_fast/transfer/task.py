"""What is learnt of labelled images: one class of each image, or which classes are in it.

A task gives the loss of logits, and scores of them. Of the second kind is VOC 2007. Its figures are
the mean over classes of the average precision AP, in percent: the whole area under the curve of
precision over recall (torchmetrics), and the mean of 11 points of it, as in VOC 2007's own
evaluation, ``1/11 sum_{r in 0, 0.1, ..., 1} max_{recall >= r} precision``. An image whose only
objects of a class are difficult counts neither for nor against it, in the loss as well.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sacl_fast.config.finetune import FinetuneConfig
from sacl_fast.data.images.voc import VOC_CLASSES, targets_of
from sacl_fast.errors import UserError
from sacl_fast.evaluation.few_shot import (
    draw_per_class,
    draw_percent,
    less_than_one,
    short_of,
)
from sacl_fast.evaluation.images import ChosenImages, require_classes, require_per_class
from sacl_fast.evaluation.scores import Figure, Scores, classified

_IGNORED = -1
_RECALLS = 11


class Task(Protocol):
    classes: tuple[str, ...]
    main: str
    """The figure that the verdict is about."""
    kind: str
    """What it is: ``accuracy`` or ``precision``, as readings and the console call it."""
    train_targets: Tensor
    """(N, ...) of the training images of the source, by their index."""
    test_targets: Tensor

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor: ...

    def scores(self, name: str, logits: Tensor, targets: Tensor, **more: Any) -> Scores:
        """Of logits (N, C) float32 and targets (N, ...) on the CPU."""
        ...


def task_of(images: ChosenImages) -> Task:
    """The task that images set.

    Raises:
        UserError: it is none: no labels, one class, classes of which there are no training images;
            or torchmetrics is needed and not installed.
    """
    train, test = targets_of(images.train), targets_of(images.test)
    if train is not None and test is not None:
        _require_torchmetrics()
        if not (train[images.train_index] == 1).any():
            raise UserError("the training images show no object of any class")
        return PresentClasses(torch.from_numpy(train), torch.from_numpy(test))
    require_classes(images)
    labels = (torch.from_numpy(source.labels) for source in (images.train, images.test))
    return OneClass(tuple(images.train.classes), *labels)


class FewLabels(NamedTuple):
    """What is learnt from where labels are few."""

    images: ChosenImages
    note: str
    """Where they are not what their name says."""


def with_few_labels(
    images: ChosenImages,
    settings: FinetuneConfig,
    unreadable: Callable[[np.ndarray], Collection[int]],
) -> FewLabels:
    """Those training images only that ``settings`` ask for: the first draw of few-shot evaluation
    with that seed. Of images without classes of their own, a share of all.

    Args:
        unreadable: which of some images of the source cannot be read. It is asked about those that
            are drawn, and about the ones that are drawn in their place.

    Raises:
        UserError: a class has fewer.
    """
    labels, classes = images.train.labels[images.train_index], images.train.classes
    percent, per_class = settings.percent, settings.per_class
    if percent is not None:
        note = less_than_one(labels, [percent], classes)
        draw: Callable[..., np.ndarray] = partial(draw_percent, labels, percent)
    elif per_class is None:
        return FewLabels(images, "")
    elif targets_of(images.train) is not None:
        raise UserError(
            "per_class is of images that show one class each, and these show several; percent works"
        )
    else:
        require_per_class(images, per_class)
        note = ""
        draw = partial(draw_per_class, labels, per_class)
    readable, known = np.ones(len(labels), bool), np.zeros(len(labels), bool)
    while not known[drawn := draw(seed=settings.seed, readable=readable)].all():
        new = drawn[~known[drawn]]
        bad = unreadable(images.train_index[new])
        readable[new], known[new] = ~np.isin(images.train_index[new], list(bad)), True
    if per_class is not None:
        note = short_of(labels[drawn], per_class, classes)
    return FewLabels(images._replace(train_index=images.train_index[drawn]), note)


class OneClass:
    """Cross-entropy; top-1 and top-5."""

    main, kind = "top-1", "accuracy"

    def __init__(self, classes: tuple[str, ...], train: Tensor, test: Tensor) -> None:
        self.classes, self.train_targets, self.test_targets = classes, train, test

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets)

    def scores(self, name: str, logits: Tensor, targets: Tensor, **more: Any) -> Scores:
        count = len(self.classes)
        top = logits.topk(min(5, count), dim=1).indices
        return classified(name, top, targets, count, **more)


class PresentClasses:
    """Binary cross-entropy of each class; mean average precision."""

    main, kind = "mAP 11-point", "precision"

    def __init__(self, train: Tensor, test: Tensor) -> None:
        self.classes, self.train_targets, self.test_targets = VOC_CLASSES, train, test

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        counts = (targets != _IGNORED).to(logits.dtype)
        wanted = targets.clamp(min=0).to(logits.dtype)
        each = F.binary_cross_entropy_with_logits(logits, wanted, weight=counts, reduction="sum")
        return each / counts.sum().clamp(min=1)

    def scores(self, name: str, logits: Tensor, targets: Tensor, **more: Any) -> Scores:
        whole, points = average_precisions(logits, targets)
        there = ~np.isnan(points)
        if not there.any():
            raise UserError("the validation images show no object of any class")
        # An interval over classes would say how much classes differ, and nothing of chance.
        means = {self.main: points[there].mean(), "mAP": whole[there].mean()}
        figures = {title: Figure(float(mean)) for title, mean in means.items()}
        images = (targets == 1).sum(dim=0).numpy()
        return Scores(name, figures, points[there], by_class=points, images=images, **more)


def average_precisions(scores: Tensor, targets: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """AP in percent of each class, (C,) twice: the whole area, and 11 points. nan where no image
    shows the class.

    Args:
        scores: (N, C), larger where the class is likelier.
        targets: (N, C) 1, 0, or -1 for what does not count.
    """
    from torchmetrics.functional.classification import (
        binary_average_precision,
        binary_precision_recall_curve,
    )

    whole, points = np.full((2, scores.shape[1]), np.nan)
    recalls = torch.linspace(0, 1, _RECALLS, dtype=torch.float64)
    for c in range(scores.shape[1]):
        counts = targets[:, c] != _IGNORED
        truth = targets[counts, c].long()
        if not truth.any():
            continue
        # Ranks in place of scores: torchmetrics takes shares of 1, in which far ones would meet.
        order = torch.unique(scores[counts, c].double(), return_inverse=True)[1].double()
        some = (order + 1) / (order.max() + 2)
        whole[c] = 100 * float(binary_average_precision(some, truth))
        precision, recall, _ = binary_precision_recall_curve(some, truth)
        precision, recall = precision[:-1].double(), recall[:-1].double()  # without (1, 0)
        reached = recall >= recalls[:, None] - 1e-6  # (11, thresholds)
        best = torch.where(reached, precision, 0.0).amax(dim=1)
        points[c] = 100 * float(best.mean())
    return whole, points


def _require_torchmetrics() -> None:
    try:
        import torchmetrics  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "torchmetrics":
            raise
        raise UserError(
            "mean average precision needs torchmetrics, which is not installed; "
            "pip install 'sacl-fast[eval]' installs it"
        ) from None
