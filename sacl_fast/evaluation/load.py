"""The trained encoder ready for use: ``sacl_fast.load_encoder``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sacl_fast.checks import check
from sacl_fast.config.choices import Width
from sacl_fast.data.images.given import Given
from sacl_fast.data.images.open import open_sources
from sacl_fast.data.loading.evaluation import EvalLoader
from sacl_fast.engine.run_folder import ENCODERS
from sacl_fast.errors import UserError
from sacl_fast.evaluation.evaluate import first_images
from sacl_fast.evaluation.images import choose_images
from sacl_fast.evaluation.trained import Trained, open_trained
from sacl_fast.slim.export import compact, load_compact


def load_encoder(
    path: str | os.PathLike[str], width: Width = "dense", *, source: Any = None
) -> nn.Module:
    """The trained encoder as an ordinary module: (N, 3, S, S) -> (N, F), in eval mode, on the CPU,
    with batch-norm statistics of its own.

    >>> import sacl_fast, torch
    >>> encoder = sacl_fast.load_encoder("runs/imagenet1k/...")
    >>> encoder(torch.rand(2, 3, 224, 224)).shape
    torch.Size([2, 1280])
    >>> slim = sacl_fast.load_encoder("runs/imagenet1k/...", width="slim")

    Images are to be normalised by the run's ``views.mean`` and ``views.std``. A checkpoint in the
    midst of a run does not have the statistics; they are estimated from the images that it was
    trained on.

    Args:
        path: a run folder, a checkpoint, or the file of an encoder.
        source: the images that it was trained on, where those were given from Python.
        width: ``dense``: timm's model (or ``resnet20``). ``slim``: the slim encoder as a smaller
            network, see ``slim.export.compact``.

    Raises:
        UserError: as ``open_trained``; the width is not there; or images are needed and cannot be
            opened.
    """
    check(width, Width, "width")
    trained = open_trained(path)
    trained.check_width(width)
    if trained.slicer is None and width == "slim":
        alone = trained.widths == ("slim",)
        return load_compact(trained.path if alone else trained.path.with_name(ENCODERS["slim"]))
    state = trained.state(
        width, lambda: training_batches(trained, torch.device("cpu"), Given(source))
    )
    if width == "slim":
        assert trained.slicer is not None
        return compact(trained.encoder, trained.slicer.masks, trained.slicer.norms)
    trained.encoder.load_state_dict(state)
    return trained.encoder


def training_batches(
    trained: Trained, device: torch.device, given: Given | None = None
) -> Iterator[Tensor]:
    """The images (B, 3, S, S), normalised, from which the run estimated batch-norm statistics when
    it evaluated: ``eval.recalibrate_batches`` batches of the training images.

    Raises:
        UserError: the images cannot be opened.
    """
    config = trained.config
    try:
        splits = open_sources(config.data, config.seed, download=False, given=given or Given())
    except UserError as error:
        raise UserError(
            f"{trained.path} is of the midst of a run, so that batch-norm statistics are to be "
            f"estimated from the images that it was trained on, but {error}"
        ) from error
    images = choose_images(splits, config.seed, train=config.eval.bank)
    bank = EvalLoader(images.train, images.train_index, config, device)
    return first_images(bank, config.eval.recalibrate_batches, device)
