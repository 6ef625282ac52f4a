"""The loop of fine-tuning: steps, evaluations, checkpoints."""

from __future__ import annotations

import json
import logging
import math
import shlex
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from sacl_fast.checks import counted
from sacl_fast.config import Config, LogConfig, to_dict
from sacl_fast.config.finetune import FinetuneConfig
from sacl_fast.data.loading.batch import Normalise
from sacl_fast.data.loading.crops import CropLoader
from sacl_fast.data.loading.evaluation import EvalLoader
from sacl_fast.data.loading.torchvision_stream import input_dtype
from sacl_fast.encoders.file import encoder_metadata, save_encoder
from sacl_fast.encoders.onednn import avoid_memory_overwrite
from sacl_fast.engine.checkpoint import (
    UnusableCheckpoint,
    changed_settings,
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from sacl_fast.engine.clock import Clock
from sacl_fast.engine.console import RunConsole
from sacl_fast.engine.metrics import MetricWriter, read_metrics, rewind_metrics
from sacl_fast.engine.outlook import spoken
from sacl_fast.engine.plots import plot_accuracy
from sacl_fast.engine.resume import data_record
from sacl_fast.engine.run_folder import CURVES, METRICS
from sacl_fast.engine.signals import StopRequest
from sacl_fast.errors import Stopped, UserError, reason_of
from sacl_fast.evaluation.images import ChosenImages
from sacl_fast.evaluation.scores import Scores
from sacl_fast.evaluation.trained import Trained
from sacl_fast.files import remove_leftovers
from sacl_fast.optim.schedule import learning_rate
from sacl_fast.precision import autocast, autocast_dtype
from sacl_fast.transfer.classifier import LAST, Classifier
from sacl_fast.transfer.task import PresentClasses, Task

logger = logging.getLogger(__name__)

CHECKPOINTS, BEST = "checkpoints", "best.safetensors"
_CONTENT: dict[str, type | tuple[type, ...]] = {
    "settings": dict,
    "path": str,
    "data": dict,
    "step": int,
    "model": dict,
    "optimizer": dict,
    "scaler": dict,
    "random": dict,
    "best": (int, float),
    "best_step": int,
    "evaluated": int,
}
# What may be another where a fine-tuning is resumed: the steps are the same.
_FREE = ("out", "resume", "device", "eval_every", "checkpoint_every", "log_every", "from_scratch")
_FREE_OF_DATA = ("root", "workers", "prefetch", "batch_timeout", "cache_dir", "loader", "dali")


class Labelled:
    """The images to learn from and to be classified, and what is to be learnt of them."""

    def __init__(
        self,
        images: ChosenImages,
        task: Task,
        config: Config,
        device: torch.device,
        check: Callable[[], None],
    ) -> None:
        self.images, self.task, self.config, self.device = images, task, config, device
        self.crops = CropLoader(
            images.train, images.train_index, config, device, check=check, repeat=True
        )
        self.normalise = Normalise(
            config.views, device, config.channels_last, input_dtype(config, device)
        )
        self.test = EvalLoader(images.test, images.test_index, config, device, check=check)
        self.record = data_record(images.train)
        self.seen = 0
        """Images that were classified: those that can be read."""
        self._test_index = torch.from_numpy(images.test_index)

    def logits(self, module: torch.nn.Module, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        """(N, C) float32 and targets (N, ...) of the validation images, on the CPU."""
        found: list[Tensor] = []
        with torch.no_grad(), autocast(self.device, dtype):
            found = [module(images).float().cpu() for images, _ in self.test]
        there = torch.tensor([int(i) not in self.test.bad for i in self._test_index])
        targets = self.task.test_targets[self._test_index[there]]
        self.seen = len(targets)
        return torch.cat(found), targets


class Training:
    """Of one network, in one folder; closed when left."""

    def __init__(
        self,
        classifier: Classifier,
        labelled: Labelled,
        settings: FinetuneConfig,
        trained: Trained,
        folder: Path,
        stop: StopRequest,
        *,
        quiet: bool = False,
    ) -> None:
        self.labelled, self.settings, self.trained = labelled, settings, trained
        self.folder, self.stop, self.classifier = folder, stop, classifier
        device = labelled.device
        self.amp_dtype = autocast_dtype(settings.precision, device)
        self.module = classifier.module.to(device)
        self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if device.type == "cpu":
            avoid_memory_overwrite(self.module)
        if classifier.slicer is not None:
            classifier.slicer.to(device)
        assert settings.steps is not None
        self.total: int = settings.steps
        self.optimizer = torch.optim.SGD(
            _groups(classifier, settings),
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=True,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp_dtype == torch.float16)
        self.step, self.best, self.best_step = 0, -1.0, 0
        self.evaluated = 0
        """The step after which it was evaluated last."""
        self._told = False
        """Whether it has said how long it will take."""
        self._resume()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {reason_of(error)}") from error
        self.writer = MetricWriter(
            *(folder, LogConfig(tensorboard=False), to_dict(settings), self.step or None)
        )
        per_epoch = labelled.crops.steps_per_epoch
        self.console = RunConsole(
            *(math.ceil(self.total / per_epoch), per_epoch, settings.batch_size, self.step),
            steps=self.total,
            quiet=quiet,
        )

    def __enter__(self) -> Training:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.console.close()
        self.writer.close()

    def run(self, name: str, control: str | None) -> Scores:
        """Train what is left, and the scores after the last step.

        Raises:
            Stopped: by a signal, with a checkpoint.
        """
        total = self.total
        with self.console, self.stop.by_signals(self.console.message):
            done = f" after the {self.step:,} done" if self.step else ""
            left = counted(total - self.step, "step")
            self.console.message(f"{name}: {left}{done}, {self.folder}")
            try:
                if self.step < total:
                    self._train()
                return self._finish(name, control)
            except Stopped as stopped:
                if self.step:
                    self._save()
                word = signal.Signals(stopped.number).name
                folder = shlex.quote(str(self.folder))
                self.console.message(
                    f"stopped by {word} after step {self.step}; --resume auto goes on from there "
                    f"({folder})"
                )
                raise

    def _train(self) -> None:
        settings, labelled, module = self.settings, self.labelled, self.module
        device, task, total = labelled.device, labelled.task, self.total
        clock = Clock(settings.batch_size, device)
        module.train()
        self._evaluate_if_due()  # a signal may have ended it
        batches = labelled.crops.batches(self.step)
        try:
            for pixels, index in clock.waiting(batches):
                share = learning_rate(self.step, base=1.0, warmup_steps=0, total_steps=total)
                for group in self.optimizer.param_groups:
                    group["lr"] = share * group["base"]
                images = labelled.normalise(pixels)
                targets = task.train_targets[index].to(device, non_blocking=True)
                with self.classifier.slimmed(self.amp_dtype):
                    with autocast(device, self.amp_dtype):
                        logits = module(images)
                    loss = task.loss(logits.float(), targets)
                    self.optimizer.zero_grad(set_to_none=True)
                    self.scaler.scale(loss).backward()
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.step += 1
                last = self.step == total
                if self.step % settings.log_every == 0 or last:
                    self._read(loss, settings.lr * share, clock)
                self._evaluate_if_due()
                if self.step % settings.checkpoint_every == 0 or last:
                    self._save()
                if last:
                    return
                self.stop.check()
        finally:
            batches.close()

    def _read(self, loss: Tensor, rate: float, clock: Clock) -> None:
        value = loss.item()
        if not math.isfinite(value):
            raise UserError(
                f"the loss is {value} after step {self.step}: it diverged; {self._lower_rate()} "
                "works"
            )
        reading = {"loss": value, "lr": rate, **clock.read()}
        left = self.total - self.step
        if left and not self._told:
            speed = reading["images_per_second"]
            time = spoken(left * self.settings.batch_size / speed)
            self.console.message(f"{time} for {left:,} more steps ({speed:.3g} images/s)")
        self._told = True
        self.writer.write("train", self.step, self._epoch, reading)
        self.console.update(self.step, self._epoch, reading)

    @property
    def _epoch(self) -> float:
        return self.step / self.labelled.crops.steps_per_epoch

    def _evaluate_if_due(self) -> None:
        every, total = self.settings.eval_every, self.total
        if every and self.step % every == 0 and self.evaluated < self.step < total:
            self._evaluate()

    def _evaluate(self, **more: Any) -> Scores:
        with self.console.doing("evaluating"):
            self.module.eval()
            logits, targets = self.labelled.logits(self.module, self.amp_dtype)
            self.module.train()
        if not logits.isfinite().all():
            raise UserError(
                f"logits are not finite after step {self.step}: it diverged; {self._lower_rate()} "
                "works"
            )
        scores = self.labelled.task.scores(more.pop("name", ""), logits, targets, **more)
        figures = {name: figure.mean for name, figure in scores.figures.items()}
        task = self.labelled.task
        main = figures[task.main]
        if self.evaluated < self.step:
            row = {task.kind: main, **figures}
            self.writer.write("accuracy", self.step, self._epoch, row)
        self.evaluated = self.step
        self.console.update(self.step, self._epoch, {task.kind: main})
        if main > self.best:
            self.best, self.best_step = main, self.step
            self._write_network(BEST)
        return scores

    def _finish(self, name: str, control: str | None) -> Scores:
        rows = [row for row in read_metrics(self.folder / METRICS) if row["kind"] == "accuracy"]
        scores = self._evaluate(name=name, control=control)
        if len({row["step"] for row in rows} | {self.step}) > 1:
            note = f"best {self.best:.1f} at step {self.best_step:,}"
            scores = replace(scores, note=note)
        self._save()
        self._write_network(LAST)
        try:
            kind = self.labelled.task.kind
            plot_accuracy(read_metrics(self.folder / METRICS), self.folder / CURVES, kind)
        except (OSError, UserError) as error:  # pictures are a courtesy
            logger.warning("cannot write %s: %s", self.folder / CURVES, reason_of(error))
        return scores

    def _write_network(self, name: str) -> None:
        trained, settings, task = self.trained, self.settings, self.labelled.task
        run = trained.config
        config = replace(run, views=replace(run.views, size=settings.size))
        slim = self.classifier.slicer is not None
        said = encoder_metadata(
            *(config,), epochs=trained.epochs, steps=trained.steps, images=trained.images, knn={},
            slim=slim,
        )  # fmt: skip
        said |= {
            "classes": json.dumps(list(task.classes)),
            "task": "present-classes" if isinstance(task, PresentClasses) else "one-class",
            "finetuned_steps": str(self.step),
        }
        save_encoder(self.folder / name, self.module.state_dict(), said)

    # What is kept

    def _save(self) -> None:
        state = {
            "settings": _that_count(self.settings),
            "path": str(self.trained.path.absolute()),
            "data": self.labelled.record,
            "step": self.step,
            "model": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": random_state(self.labelled.device),
            "best": self.best,
            "best_step": self.best_step,
            "evaluated": self.evaluated,
        }
        save_checkpoint(checkpoint_path(self.folder / CHECKPOINTS, self.step), state, keep=1)

    def _resume(self) -> None:
        """Go on from the last checkpoint that can be read, if there is one."""
        checkpoints = self.folder / CHECKPOINTS
        found = list_checkpoints(checkpoints)[::-1]
        for path in found:
            try:
                state = load_checkpoint(path, _CONTENT)
            except UnusableCheckpoint as error:
                if path == found[-1]:
                    raise
                logger.warning("%s; going on from the one before", error)
                continue
            self._check(path, state)
            self.module.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            restore_random_state(state["random"], self.labelled.device)
            for key in ("step", "best", "best_step", "evaluated"):
                setattr(self, key, state[key])
            break
        if self.folder.exists():
            for folder in (self.folder, checkpoints):
                remove_leftovers(folder)
            rewind_metrics(self.folder / METRICS, self.step, self.folder / "superseded.jsonl")

    def _lower_rate(self) -> str:
        """The option that should be lower: of the larger rate."""
        lr, backbone = self.settings.lr, self.settings.backbone_lr
        if backbone is not None and backbone > lr:
            return f"a lower --backbone-lr than {backbone:g}"
        return f"a lower --lr than {lr:g}"

    def _check(self, path: Path, state: dict[str, Any]) -> None:
        changes = changed_settings(state["settings"], _that_count(self.settings))
        here = str(self.trained.path.absolute())
        if state["path"] != here:
            changes.append(f"the encoder: {state['path']} -> {here}")
        if state["data"] != self.labelled.record:
            changes.append("the training images")
        if changes:
            raise UserError(
                f"{path} was fine-tuned otherwise ({', '.join(changes)}); the same works, or "
                "another --out"
            )


def _groups(classifier: Classifier, settings: FinetuneConfig) -> list[dict[str, Any]]:
    """The parameters by the rate that they begin with."""
    backbone = settings.lr if settings.backbone_lr is None else settings.backbone_lr
    groups: dict[float, list[Tensor]] = {}
    for name, parameter in classifier.module.named_parameters():
        rate = settings.lr if name in classifier.head else backbone
        groups.setdefault(rate, []).append(parameter)
    return [{"params": some, "lr": rate, "base": rate} for rate, some in groups.items()]


def _that_count(settings: FinetuneConfig) -> dict[str, Any]:
    values = {k: v for k, v in to_dict(settings).items() if k not in _FREE}
    values["data"] = {k: v for k, v in values["data"].items() if k not in _FREE_OF_DATA}
    return values
