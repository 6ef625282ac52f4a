"""Evaluation within a run: which images, on which rank, what is kept for later."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch

from sacl_fast.config import Config
from sacl_fast.data.images.source import Splits
from sacl_fast.data.loading.evaluation import AugmentedLoader, EvalLoader
from sacl_fast.encoders.batch_norm import local_batch_norm
from sacl_fast.encoders.recalibrate import recalibrated
from sacl_fast.engine.distributed import Ranks
from sacl_fast.engine.method import SaclXd
from sacl_fast.evaluation.evaluate import evaluate_encoders, first_images
from sacl_fast.evaluation.images import choose_images

_VIEW_EPOCHS = 2  # of two views each
_IMAGES_OF_LIDAR = 4  # one of so many of RankMe's


class _UntilStopped:
    """Batches of a loader; once a stop is asked for, ``Stopped``: an evaluation can take long."""

    def __init__(self, loader: EvalLoader | AugmentedLoader, ranks: Ranks) -> None:
        self.loader, self.ranks = loader, ranks

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.ranks.check()
        for batch in self.loader:
            yield batch
            self.ranks.check()

    def share(self) -> _UntilStopped:
        """This rank's batches."""
        return _UntilStopped(self.loader.share(self.ranks.rank, self.ranks.world_size), self.ranks)


class Evaluator:
    """Evaluates the encoder on the splits of a data source, dense and slim; each rank its share.

    The bank is a random subset of the training images; the queries are one of the validation
    images or, where there are none, a tenth of the training images that the bank then lacks.
    """

    def __init__(
        self,
        splits: Splits,
        config: Config,
        ranks: Ranks,
        amp_dtype: torch.dtype | None,
    ) -> None:
        self.config = config
        self.ranks = ranks
        self.device = ranks.device
        self.amp_dtype = amp_dtype
        self.classes = splits.train.classes
        self.possible = len(self.classes) > 1 or config.eval.rank_images > 0
        """Whether there is something to evaluate."""
        self._labelled = len(self.classes) > 1
        images = choose_images(
            splits, config.seed, train=config.eval.bank, test=config.eval.queries
        )
        train, chosen, ranked = images.train, images.train_index, config.eval.rank_images
        options = {"config": config, "device": ranks.device, "check": ranks.check}
        self.bank = self._until(EvalLoader(train, chosen, **options))
        self.queries = self._until(EvalLoader(images.test, images.test_index, **options))
        self._few = self._until(EvalLoader(train, chosen[:ranked], **options))
        of_lidar = chosen[: ranked // _IMAGES_OF_LIDAR]
        of_lidar = of_lidar if len(of_lidar) > 1 else of_lidar[:0]
        self._views = self._until(AugmentedLoader(train, of_lidar, epochs=_VIEW_EPOCHS, **options))

    def _until(self, loader: EvalLoader | AugmentedLoader) -> _UntilStopped:
        return _UntilStopped(loader, self.ranks)

    def evaluate(self, method: SaclXd) -> dict[str, float]:
        """``knn_dense`` and ``knn_slim``, top-1 accuracies in percent, where there are labels;
        ``rankme_dense``, ``lidar_dense`` and so on, effective ranks, where ``eval.rank_images`` is
        not 0. By all ranks together; the model is unchanged."""
        with local_batch_norm(method):
            return evaluate_encoders(
                method.encoder,
                method.slicer,
                (self.bank if self._labelled else self._few).share(),
                self.queries.share() if self._labelled else (),
                self.config.eval,
                len(self.classes) if self._labelled else 0,
                device=self.device,
                amp_dtype=self.amp_dtype,
                views=self._views.share(),
                first=self.bank,
                jointly=self.ranks.jointly,
            )

    def final_states(self, method: SaclXd) -> dict[str, dict[str, torch.Tensor]]:
        """The ``state_dict`` of the encoder, ``dense`` and, where that is another, ``slim``: on the
        CPU, each with batch-norm statistics of its own.

        The running ones mix the two networks; see ``encoders/recalibrate.py``. The slim encoder's
        are the slicer's from then on.
        """
        states = {}
        with torch.random.fork_rng(devices=[]), local_batch_norm(method):
            with method.slicer.mode("dense"), recalibrated(method.encoder, self._first_images()):
                states["dense"] = _on_cpu(method.encoder.state_dict())
            if method.slicer.active:
                method.slicer.recalibrate(self._first_images())
                states["slim"] = _on_cpu(method.slicer.slim_state())
        return states

    def _first_images(self) -> Iterator[torch.Tensor]:
        return first_images(self.bank, self.config.eval.recalibrate_batches, self.device)


def _on_cpu(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A copy."""
    return {name: value.cpu().contiguous() for name, value in copy.deepcopy(state).items()}
