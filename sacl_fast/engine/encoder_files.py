"""The encoders that a finished run leaves, each with batch-norm statistics of its own: those of the
end and, where an earlier evaluation was better, those of the best one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

from torch import Tensor

from sacl_fast.config import Config
from sacl_fast.encoders.file import encoder_metadata, is_encoder_of, save_encoder
from sacl_fast.engine.best import measure_of
from sacl_fast.engine.checkpoint import BEST, UnusableCheckpoint, load_checkpoint
from sacl_fast.engine.evaluator import Evaluator
from sacl_fast.engine.method import SaclXd
from sacl_fast.engine.run_folder import BEST_ENCODERS, CHECKPOINTS, ENCODERS, RunFolder
from sacl_fast.files import kind_of

logger = logging.getLogger(__name__)

States = Mapping[str, Mapping[str, Tensor]]  # ``dense`` and perhaps ``slim``


class EncoderFiles:
    """Writes them; the first rank's."""

    def __init__(self, config: Config, claim: RunFolder, *, images: int) -> None:
        self.config, self.claim, self.images = config, claim, images

    def metadata(
        self, state: Mapping[str, Any], *, slim: bool = False, best: bool = False
    ) -> dict[str, str]:
        """Of the encoder in a checkpoint's state."""
        figures = {**state["knn"], **state.get("label_free", {})}
        return encoder_metadata(
            self.config,
            epochs=state["step"] / state["steps_per_epoch"],
            steps=state["step"],
            images=self.images,
            knn=figures,
            slim=slim,
            best_by=measure_of(figures) if best else None,
        )

    def save_last(
        self, state: Mapping[str, Any], method: SaclXd, states: Callable[[], States]
    ) -> None:
        """Write the encoders of the end, unless they are there.

        Args:
            state: as of the last checkpoint.
            states: gives the encoders' ``state_dict``.
        """
        self._save(ENCODERS, state, method, states)

    def save_best(self, last: int, method: SaclXd, evaluator: Evaluator) -> None:
        """Write the encoders of the best checkpoint, unless that is the ``last`` step's or they are
        there. ``method`` is as before in the end."""
        path = self.claim.path / CHECKPOINTS / BEST
        if kind_of(path) is None:
            return
        try:
            state = load_checkpoint(path)
        except UnusableCheckpoint as error:
            logger.warning("no encoder of the best evaluation: %s", error)
            return
        if state["step"] == last:
            return
        slicer, epochs = method.slicer, state["step"] / state["steps_per_epoch"]
        before, enabled = deepcopy(method.state_dict()), slicer.enabled
        try:
            method.load_state_dict(state["model"])
            slicer.enabled = epochs > self.config.slim.warmup_epochs
            self._save(
                BEST_ENCODERS, state, method, lambda: evaluator.final_states(method), best=True
            )
        finally:
            method.load_state_dict(before)
            slicer.enabled = enabled

    def _save(
        self,
        names: Mapping[str, str],
        state: Mapping[str, Any],
        method: SaclXd,
        states: Callable[[], States],
        *,
        best: bool = False,
    ) -> None:
        widths = ("dense", "slim") if method.slicer.active else ("dense",)
        metadata = {w: self.metadata(state, slim=w == "slim", best=best) for w in widths}
        paths = {width: self.claim.path / names[width] for width in widths}
        if all(is_encoder_of(paths[width], metadata[width]) for width in widths):
            return
        self.claim.check()
        found = states()
        for width in reversed(widths):  # the dense one of the end says that the run is finished
            save_encoder(paths[width], found[width], metadata[width])
