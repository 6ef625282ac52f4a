"""The user's images, for what an export needs of them: statistics, calibration, checks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from sacl_fast.config import Config
from sacl_fast.data.images.given import Given
from sacl_fast.data.images.open import open_sources
from sacl_fast.data.loading.evaluation import EvalLoader
from sacl_fast.errors import UserError
from sacl_fast.evaluation.evaluate import first_images
from sacl_fast.evaluation.features import extract_features
from sacl_fast.evaluation.images import choose_images
from sacl_fast.evaluation.knn import knn_accuracy

logger = logging.getLogger(__name__)
_CPU = torch.device("cpu")


class RunImages:
    """The training and validation images of a run, or ``others``, chosen as the run's own
    evaluation does."""

    def __init__(self, config: Config, given: Given, others: bool) -> None:
        self._config, self.others = config, others
        splits = open_sources(config.data, config.seed, download=False, given=given)
        kept = config.eval
        chosen = choose_images(splits, config.seed, train=kept.bank, test=kept.queries)
        self.classes = len(splits.train.classes)
        self._bank = EvalLoader(chosen.train, chosen.train_index, config, _CPU)
        self._queries = EvalLoader(chosen.test, chosen.test_index, config, _CPU)

    def training_batches(self) -> Iterator[Tensor]:
        """Batches (N, 3, S, S) to estimate batch-norm statistics from."""
        return first_images(self._bank, self._config.eval.recalibrate_batches, _CPU)

    def some(self, count: int) -> Tensor:
        """(n, 3, S, S), at most ``count``, of those that training is validated with."""
        images, _ = next(iter(self._queries))
        return images[:count]

    def knn(self, run: Callable[[Tensor], Tensor]) -> float:
        """kNN accuracy in percent of an encoder."""
        bank, queries = (
            extract_features(_AsModule(run), loader, device=_CPU)
            for loader in (self._bank, self._queries)
        )
        k, temperature = self._config.eval.k, self._config.eval.temperature
        return knn_accuracy(*bank, *queries, k=k, temperature=temperature, num_classes=self.classes)


class _AsModule(nn.Module):
    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._run = run

    def forward(self, images: Tensor) -> Tensor:
        return self._run(images)


def open_images(
    config: Config,
    *,
    known: bool,
    needed_for: str | None,
    asked: bool = False,
    given: Given | None = None,
    others: bool = False,
) -> RunImages | None:
    """The images of a run; None where they are not there and not needed.

    Args:
        known: whether ``config.data`` names them.
        needed_for: what cannot be done without.
        asked: whether this call named them, and not the run.
        given: images from Python in their place.
        others: whether they are not those that the run was trained on.

    Raises:
        UserError: they are needed or asked for, and not there.
    """
    if known:
        try:
            return RunImages(config, given or Given(), others)
        except UserError as error:
            if needed_for is not None:
                raise UserError(f"{needed_for} needs the run's images, and {error}") from None
            if asked:
                raise
            logger.info("the run's images are not at hand (%s)", error)
    elif needed_for is not None:
        raise UserError(
            f"{needed_for} needs images, and an encoder's file does not say where those are that "
            "it was trained on; --data.source and --data.root name them"
        )
    return None
