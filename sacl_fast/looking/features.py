"""The features of all images, on the disk rather than in memory.

They are written one batch after the other into a temporary file that has no name, and mapped from
there, so that a million images of 1,024 features take 4 GB of disk and no memory to speak of.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sacl_fast.checks import counted
from sacl_fast.config import Config, ViewsConfig, to_dict
from sacl_fast.config.evaluation import Evaluation
from sacl_fast.config.looking import FeaturesConfig
from sacl_fast.data.images.given import Given, as_given
from sacl_fast.data.images.open import open_sources
from sacl_fast.data.images.source import Source, Splits
from sacl_fast.data.loading.evaluation import EvalLoader
from sacl_fast.engine.distributed import pick_device
from sacl_fast.engine.preflight import check_run
from sacl_fast.errors import UserError, reason_of
from sacl_fast.evaluation.evaluate import first_images
from sacl_fast.evaluation.features import as_features
from sacl_fast.evaluation.images import choose_images
from sacl_fast.evaluation.named_images import require_images
from sacl_fast.evaluation.networks import GivenEncoder, networks_of
from sacl_fast.evaluation.progress import EvaluationProgress
from sacl_fast.evaluation.trained import Trained
from sacl_fast.precision import autocast, autocast_dtype

SPLITS = ("train", "val")
_TITLES = ("training", "validation")
_NAMING = ("source", "root", "labels", "limit")  # settings that say which images
_NOTHING = Given()
_CHUNK = 2**24  # numbers read at a time


@dataclass(frozen=True)
class Features:
    """Features of images, and which images they are of."""

    features: np.ndarray
    """(N, F) float32, in a file; it is gone when the array is."""
    labels: np.ndarray
    """(N,) int64 positions in ``classes``, -1 without a label."""
    classes: tuple[str, ...]
    splits: np.ndarray
    """(N,) int8: 0 for training images, 1 for validation images."""
    index: np.ndarray
    """(N,) int64 position in the source of the split."""
    settings: dict[str, Any]
    """Of the features: encoder, path, normalised, images that are left out, ..."""
    bad: dict[str, str]
    """The images that could not be read, by name, and why."""
    sources: tuple[Source | None, Source | None] = field(repr=False)

    def __len__(self) -> int:
        return len(self.features)

    @property
    def names(self) -> list[str]:
        """What the images are called: N paths, as a rule."""
        return [self.name(i) for i in range(len(self))]

    def name(self, i: int) -> str:
        return self._source(i).name(int(self.index[i]))

    def load(self, i: int) -> Image.Image:
        """The whole image, mode RGB. BadImage where it cannot be read."""
        return self._source(i).load(int(self.index[i]))

    def chunks(self, *, normalised: bool = False) -> Iterator[np.ndarray]:
        """The features, some (n, F) at a time."""
        rows = max(1, _CHUNK // max(1, self.features.shape[1]))
        for start in range(0, len(self), rows):
            part = np.array(self.features[start : start + rows])
            yield to_unit_length(part) if normalised else part

    def directions(self, chosen: np.ndarray) -> np.ndarray:
        """The features (n, F) of some images at length 1."""
        return to_unit_length(self.features[chosen])

    def _source(self, i: int) -> Source:
        source = self.sources[self.splits[i]]
        assert source is not None
        return source


def to_unit_length(features: np.ndarray) -> np.ndarray:
    """Rows (n, F) at length 1; zeros stay."""
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.maximum(lengths, 1e-12)


def features_of_trained(
    trained: Trained,
    settings: FeaturesConfig,
    folder: Path | None,
    *,
    quiet: bool = False,
    given: Given = _NOTHING,
) -> Features:
    """The features of what ``open_trained`` found.

    Args:
        folder: where the temporary file is made; None: where temporary files are.
        quiet: no progress.
        given: images from Python in place of those that the settings name.

    Raises:
        UserError: before any work, where the images or the settings do not allow it; where images
            cannot be read or the disk is full.
    """
    if given.source is None:
        require_images(trained, settings.data)
    settings = replace(settings, data=as_given(settings.data, given))
    trained.check_width(settings.width)
    device = pick_device(settings.device)
    config = _configured(trained.config, settings)
    splits = open_sources(config.data, config.seed, given=given)

    def training_images() -> Iterator[Tensor]:
        chosen = choose_images(splits, config.seed, train=config.eval.bank)
        loader = EvalLoader(chosen.train, chosen.train_index, config, device)
        return first_images(loader, config.eval.recalibrate_batches, device)

    of_width = Evaluation(control=False, eval=replace(config.eval, encoders=settings.width))
    (network,) = networks_of(trained, of_width, device, training_images)
    said = {"encoder": trained.config.encoder.name, "width": settings.width}
    said |= {"path": str(trained.path), "epochs": round(trained.epochs, 2)}
    shares = _shares(splits, settings)
    return _extract(network.build(), shares, config, settings, device, folder, said, quiet)


def features_of_module(
    encoder: nn.Module,
    views: ViewsConfig,
    settings: FeaturesConfig,
    folder: Path | None,
    *,
    given: Given = _NOTHING,
) -> Features:
    """The features of a module (N, 3, S, S) -> (N, F) in eval mode, on the device that it is on."""
    settings = replace(settings, data=as_given(settings.data, given))
    network = GivenEncoder(encoder)
    config = _configured(replace(Config(), views=views), settings)
    shares = _shares(open_sources(config.data, config.seed, given=given), settings)
    said = {"encoder": type(encoder).__name__}
    flags = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        device = network.device
        return _extract(network, shares, config, settings, device, folder, said, quiet=True)
    finally:
        for module, training in flags:
            module.training = training


class _Share(NamedTuple):
    """Chosen images of a split."""

    split: int
    source: Source
    index: np.ndarray


def _configured(run: Config, settings: FeaturesConfig) -> Config:
    config = replace(
        run,
        **dict(out=None, resume="never", seed=settings.seed, device=settings.device),
        **dict(data=settings.data, precision=settings.precision),
    )
    check_run(config)
    return config


def _shares(splits: Splits, settings: FeaturesConfig) -> list[_Share]:
    if settings.split == "val" and splits.val is None:
        raise UserError("split is val, but there are no validation images; train or all works")
    sources = [
        (split, source)
        for split, source in enumerate(splits)
        if source is not None and settings.split in ("all", SPLITS[split])
    ]
    ends = np.cumsum([0, *(len(source) for _, source in sources)])
    if not ends[-1]:
        raise UserError("there are no images to extract features from: the data set is empty")
    chosen = np.arange(ends[-1])
    if 0 < settings.images < len(chosen):
        rng = np.random.default_rng(settings.seed)
        chosen = np.sort(rng.choice(len(chosen), settings.images, replace=False))
    return [
        _Share(split, source, chosen[(chosen >= start) & (chosen < end)] - start)
        for (split, source), start, end in zip(sources, ends[:-1], ends[1:], strict=True)
    ]


@torch.no_grad()
def _extract(
    encoder: nn.Module,
    shares: list[_Share],
    config: Config,
    settings: FeaturesConfig,
    device: torch.device,
    folder: Path | None,
    said: dict[str, Any],
    quiet: bool,
) -> Features:
    config = replace(config, eval=replace(config.eval, batch_size=settings.batch_size))
    amp_dtype = autocast_dtype(config.precision, device)
    index: list[np.ndarray] = []
    splits: list[np.ndarray] = []
    bad: dict[str, str] = {}
    dims = 0
    with (
        _spool(folder) as file,
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        EvaluationProgress(quiet=quiet) as progress,
    ):
        for split, source, chosen in shares:
            loader = EvalLoader(source, chosen, config, device)
            title = f"features of {counted(len(chosen), f'{_TITLES[split]} image')}"
            for images, positions in progress.over(loader.indexed(), title, len(loader)):
                with autocast(device, amp_dtype):
                    found = encoder(images)
                rows = _rows(found)
                dims = rows.shape[1]
                file.write((to_unit_length(rows) if settings.normalise else rows).tobytes())
                index.append(positions.numpy())
                splits.append(np.full(len(positions), split, np.int8))
            bad |= {source.name(i): reason for i, reason in loader.bad.items()}
        file.flush()
        features = np.memmap(file, np.float32, "r", shape=(sum(map(len, index)), dims))
    of_split = {share.split: share.source for share in shares}
    positions, split_of = np.concatenate(index), np.concatenate(splits)
    labels = np.full(len(positions), -1)
    for split, source in of_split.items():
        there = split_of == split
        labels[there] = source.labels[positions[there]]
    classes = next((source.classes for source in of_split.values() if source.classes), ())
    said |= {"normalised": settings.normalise, "split": settings.split, "seed": settings.seed}
    said |= {"size": config.views.size, "left_out": len(bad), "precision": config.precision}
    said |= {"data": {k: v for k, v in to_dict(config.data).items() if k in _NAMING}}
    sources = of_split.get(0), of_split.get(1)
    return Features(features, labels, classes, split_of, positions, said, bad, sources)


def _rows(found: Any) -> np.ndarray:
    rows = np.ascontiguousarray(as_features(found).cpu().numpy())
    if not np.isfinite(rows).all():
        raise UserError("some features of the encoder are not finite")
    return rows


@contextlib.contextmanager
def _spool(folder: Path | None) -> Iterator[BinaryIO]:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            yield cast(BinaryIO, file)
    except OSError as error:
        where = folder or tempfile.gettempdir()
        works = "--out in a folder" if folder else "a TMPDIR"
        raise UserError(
            f"cannot write the features into a temporary file in {where}: {reason_of(error)}; "
            f"{works} that can be written and has room works"
        ) from error
