"""What a run measures while it trains: read from the device, shown, recorded, watched."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from sacl_fast.config import Config
from sacl_fast.engine import run_folder as files
from sacl_fast.engine.clock import Clock
from sacl_fast.engine.collapse import CollapseAlarm, effective_rank, embedding_std
from sacl_fast.engine.console import RunConsole
from sacl_fast.engine.diagnosis import NonFiniteLoss
from sacl_fast.engine.memory_use import memory_here, peak_memory
from sacl_fast.engine.metrics import Kind, MetricWriter
from sacl_fast.engine.outlook import outlook
from sacl_fast.engine.regions import region
from sacl_fast.engine.step import TrainingStep
from sacl_fast.ops.xcorr_loss import LossParts

_SETTLED = 2  # readings, of which the first has what only the first steps take
_ROWS = 256  # of z1 whose spread and rank are read: the rank costs their cube


class Monitor:
    """The metrics of one rank. All ranks read them, so that a loss that is not finite ends all;
    the first one has a ``writer``."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        step: TrainingStep,
        console: RunConsole,
        writer: MetricWriter | None,
        world_size: int,
    ) -> None:
        self.config, self.folder, self.step = config, folder, step
        self.console, self.writer = console, writer
        # The rank of a few rows is low whatever they hold: standardised, at most one less.
        rows = min(_ROWS, config.batch_size // world_size // config.engine.accumulate)
        min_rank = config.log.min_rank if rows - 1 > config.log.min_rank else 0
        self._readings = 0
        self.alarm = CollapseAlarm(config.log.min_std, min_rank)

    @torch.no_grad()
    def read(
        self, steps_done: int, loss: torch.Tensor, parts: LossParts, z1: torch.Tensor, clock: Clock
    ) -> None:
        """Read the metrics of the last step, report them, and warn of a collapse.

        Raises:
            NonFiniteLoss: the loss of a step since the last reading was not finite.
        """
        z1 = z1[:_ROWS].float()
        on_device = torch.stack([loss, *parts, embedding_std(z1), effective_rank(z1)])
        with region("reading"):  # waits for the device
            values = [*on_device.tolist(), float(self.step.first_nonfinite.item())]
        names = ["loss", *LossParts._fields, "embedding_std", "effective_rank"]
        *readings, first_nonfinite = values
        if first_nonfinite >= 0:
            text = f"loss is not finite at step {int(first_nonfinite) + 1}"
            self._event(steps_done, text)
            raise self._not_finite(int(first_nonfinite) + 1)
        metrics = dict(zip(names, readings, strict=True))
        metrics["lr"] = self.step.learning_rate(steps_done - 1)
        metrics |= clock.read() | peak_memory(self.step.device)
        self._readings += 1
        left = self.config.epochs * self.step.steps_per_epoch - steps_done
        if self._readings == _SETTLED and left > 0:
            self.console.message(self._outlook(steps_done, metrics))
        self.console.update(steps_done, self._epoch(steps_done), metrics)
        self._write("train", steps_done, self._epoch(steps_done), metrics)
        warning = self.alarm.check(metrics["embedding_std"], metrics["effective_rank"], steps_done)
        if warning:
            self._event(steps_done, warning)
            self.console.message(warning, warning=True)

    def _outlook(self, steps_done: int, metrics: dict[str, float]) -> str:
        return outlook(
            self.config,
            steps_per_epoch=self.step.steps_per_epoch,
            steps_done=steps_done,
            images_per_second=metrics["images_per_second"],
            peak=metrics.get("peak_reserved_bytes", metrics["peak_memory_bytes"]),
            memory=memory_here(self.step.device)[0],
        )

    def report_evaluation(
        self, steps_done: int, epochs_done: int, knn: dict[str, float], label_free: dict[str, float]
    ) -> None:
        """Accuracies in percent, ``knn_dense`` and ``knn_slim``; effective ranks, ``rankme_dense``,
        ``lidar_dense`` and so on. Each where it was measured."""
        self.console.update(steps_done, epochs_done, {**knn, **label_free})
        if knn:
            self._write("knn", steps_done, epochs_done, knn)
        if label_free:
            self._write("label_free", steps_done, epochs_done, label_free)

    def check_finite(self, steps_done: int) -> None:
        """Whether the state after a step is worth keeping. Waits for the device.

        Raises:
            NonFiniteLoss: the loss of a step was not finite, or the next one would not be.
        """
        first_nonfinite = int(self.step.first_nonfinite.item())
        if first_nonfinite >= 0:
            raise self._not_finite(first_nonfinite + 1)
        if not self.step.weights_are_finite():
            raise self._not_finite(steps_done + 1)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def _write(
        self, kind: Kind, steps_done: int, epoch: float, values: Mapping[str, float | str]
    ) -> None:
        if self.writer is not None:
            self.writer.write(kind, step=steps_done, epoch=epoch, values=values)

    def _event(self, steps_done: int, text: str) -> None:
        self._write("event", steps_done, self._epoch(steps_done), {"message": text})

    def _epoch(self, steps_done: int) -> float:
        return steps_done / self.step.steps_per_epoch

    def _not_finite(self, step: int) -> NonFiniteLoss:
        saved = files.list_checkpoints(self.folder / files.CHECKPOINTS)
        rate = self.step.learning_rate(step - 1)
        return NonFiniteLoss(self.config, self.step.amp_dtype, step, rate, saved)
