"""Fine-tuning from a trained encoder to a result.

Written into the folder::

    finetune.md, finetune.json    what came of it; finetune_confusion.png where classes exclude
    last.safetensors              the network after the last step (see classifier.py)
    best.safetensors              that of the evaluation with the best figure
    checkpoints/, metrics.jsonl, curves.png
    from_scratch/                 the same of the untrained encoder, with 'from_scratch'
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sacl_fast.config import Config, to_dict
from sacl_fast.config.finetune import FinetuneConfig
from sacl_fast.data.images.given import Given
from sacl_fast.data.images.open import open_sources
from sacl_fast.data.images.root import refuse_among_images
from sacl_fast.data.loading.evaluation import EvalLoader, ReadableImages
from sacl_fast.engine.checkpoint import list_checkpoints
from sacl_fast.engine.convolutions import tried_algorithms
from sacl_fast.engine.distributed import pick_device
from sacl_fast.engine.launch import read_launch
from sacl_fast.engine.lock import LOCK, RunLock
from sacl_fast.engine.preflight import check_run
from sacl_fast.engine.run_folder import CONFIG, CURVES, METRICS
from sacl_fast.engine.signals import StopRequest
from sacl_fast.errors import Stopped, UserError
from sacl_fast.evaluation.evaluate import first_images
from sacl_fast.evaluation.images import choose_images
from sacl_fast.evaluation.named_images import require_images
from sacl_fast.evaluation.report import write_result
from sacl_fast.evaluation.run import written_to
from sacl_fast.evaluation.scores import Result, Scores
from sacl_fast.evaluation.trained import Trained, fresh_encoder, fresh_slicer
from sacl_fast.files import shown_names, user_path
from sacl_fast.transfer.classifier import LAST, make_classifier
from sacl_fast.transfer.task import task_of, with_few_labels
from sacl_fast.transfer.training import BEST, CHECKPOINTS, Labelled, Training

logger = logging.getLogger(__name__)

_STEPS = 10_000
# Of few labels: the passes of SimCLR over 1 % of ImageNet, and the steps that a handful needs.
_PASSES, _FEWEST = 60, 1000

# What one leaves that was killed before its first checkpoint.
_BEGUN = {CHECKPOINTS, BEST, METRICS, CURVES, LOCK}


class Finetuned(NamedTuple):
    """What came of it."""

    result: Result | None
    """None where a signal ended it."""
    folder: Path
    stopped_by: int = 0
    """The number of the signal, 0 for none."""


def default_folder(trained: Trained, settings: FinetuneConfig) -> Path:
    """``finetune/IMAGES`` in the run folder, or beside the file; ``-slim`` for that width,
    ``-1percent`` or ``-5perclass`` for so few labels, with ``-seed1`` where the run's is another.
    """
    data = settings.data
    plain = data.source in ("folder", "webdataset") and data.root is not None
    name = user_path(data.root or "", "data.root").resolve().name if plain else data.source
    slim = "-slim" if settings.width == "slim" else ""
    few = "" if settings.per_class is None else f"-{settings.per_class}perclass"
    few = few if settings.percent is None else f"-{settings.percent:g}percent"
    if few and settings.seed != trained.config.seed:
        few += f"-seed{settings.seed}"
    name = f"{name or 'images'}{slim}{few}"
    return (trained.folder or trained.path.parent) / "finetune" / name


def finetune(
    trained: Trained,
    settings: FinetuneConfig,
    *,
    quiet: bool = False,
    given: Given | None = None,
) -> Finetuned:
    """Fine-tune what ``open_trained`` found, and write the result.

    Args:
        given: images from Python in place of those that the settings name.

    Raises:
        UserError: before any work, where the images, their labels, the settings or the folder do
            not allow it; or later, where it diverges or the disk is full.
    """
    if read_launch().world_size > 1:
        raise UserError(
            "fine-tuning runs in one process, and WORLD_SIZE asks for several; without torchrun it "
            "works"
        )
    given = given or Given()
    if given.source is None:
        require_images(trained, settings.data)
    device = pick_device(settings.device)
    config = _config(trained, settings)
    check_run(config)
    folder = default_folder(trained, settings)
    if settings.out is not None:
        folder = user_path(settings.out, "out")
    trained.check_width(settings.width)
    refuse_among_images(folder, config.data)
    _check_resume(folder, settings)
    splits = open_sources(config.data, config.seed, given=given)
    images = choose_images(splits, config.seed)
    task_of(images)  # what all of them lack, before what few of them lack
    drawn_from = ReadableImages(images.train, len(images.train_index), config, device)
    images, note = with_few_labels(images, settings, drawn_from.unreadable)
    if note:
        logger.warning("%s", note)
    task = task_of(images)
    settings = replace(settings, steps=_steps(settings, len(images.train_index)))
    stop = StopRequest()
    labelled = Labelled(images, task, config, device, stop.check_wait)

    def encoders() -> Iterator[tuple[str, Path, Callable[[], nn.Module]]]:
        width = settings.width
        yield width, folder, lambda: _pretrained(trained, settings, config, labelled)
        if settings.from_scratch:
            yield (
                f"{width}, from scratch",
                folder / "from_scratch",
                lambda: _untrained(trained, settings),
            )

    untrained = replace(settings, backbone_lr=None)
    scores: list[Scores] = []
    with (
        written_to(folder),
        _locked(folder),
        tried_algorithms(device),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        # Before any work: what cannot take such images or a classifier.
        _classifier(trained, settings, fresh_encoder(trained.config), len(task.classes))
        for name, place, build in encoders():
            torch.manual_seed(settings.seed)
            classifier = _classifier(trained, settings, build(), len(task.classes))
            control = f"{name}, from scratch" if settings.from_scratch and not scores else None
            so = settings if not scores else untrained
            with Training(
                *(classifier, labelled, so, trained, place, stop), quiet=quiet
            ) as training:
                try:
                    scores.append(training.run(name, control))
                except Stopped as stopped:
                    return Finetuned(None, folder, stopped.number)
        result = Result(
            method="finetune",
            main=task.main,
            scores=tuple(scores),
            classes=task.classes,
            train_images=len(images.train_index) - labelled.crops.unreadable,
            test_images=labelled.seen,
            held_out=splits.val is None,
            settings=to_dict(settings),
            path=str(trained.path),
            folder=folder,
            few_labels=settings.few_labels,
            note=note,
        )
        write_result(result, folder)
    return Finetuned(result, folder)


def _steps(settings: FinetuneConfig, images: int) -> int:
    """Steps of the protocol, or of few labels."""
    if settings.steps is not None or not settings.few_labels:
        return settings.steps or _STEPS
    passes = math.ceil(_PASSES * images / settings.batch_size)
    return min(_STEPS, max(_FEWEST, passes))


def _config(trained: Trained, settings: FinetuneConfig) -> Config:
    """A run's configuration, for what loads images."""
    views = replace(trained.config.views, size=settings.size)
    return replace(
        Config(),
        seed=settings.seed,
        device=settings.device,
        precision=settings.precision,
        batch_size=settings.batch_size,
        data=settings.data,
        views=views,
    )


def _pretrained(
    trained: Trained, settings: FinetuneConfig, config: Config, labelled: Labelled
) -> nn.Module:
    """The trained encoder with batch-norm statistics of its own, at full size."""

    def batches() -> Iterator[Tensor]:
        views, cpu = trained.config.views, torch.device("cpu")
        chosen = labelled.images
        loader = EvalLoader(chosen.train, chosen.train_index, replace(config, views=views), cpu)
        return first_images(loader, config.eval.recalibrate_batches, cpu)

    encoder = fresh_encoder(trained.config)
    encoder.load_state_dict(trained.state(settings.width, batches))
    return encoder


def _untrained(trained: Trained, settings: FinetuneConfig) -> nn.Module:
    """The encoder as its run began with it; slim, with the filters that its weights call for."""
    encoder = fresh_encoder(trained.config)
    if settings.width == "slim":
        slicer = fresh_slicer(encoder, trained.config)
        if slicer.active:
            slicer.note_statistics()
            encoder.load_state_dict(slicer.slim_state())
    return encoder


def _classifier(trained: Trained, settings: FinetuneConfig, encoder: nn.Module, classes: int):
    slim = settings.width == "slim"
    return make_classifier(encoder, trained.config, classes, settings.size, slim=slim)


def _check_resume(folder: Path, settings: FinetuneConfig) -> None:
    there = shown_names(folder)
    holds = LAST in there or bool(list_checkpoints(folder / CHECKPOINTS))
    if CONFIG in there or (not holds and not there <= _BEGUN):
        raise UserError(
            f"{folder} is not empty and holds no fine-tuning; --out names another folder"
        )
    if holds and settings.resume == "never":
        raise UserError(
            f"{folder} already holds a fine-tuning; --resume auto goes on with it, another --out "
            "starts a new one"
        )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = RunLock(folder)
    try:
        yield
    finally:
        lock.release()
