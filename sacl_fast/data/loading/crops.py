"""Batches to learn labels from: a random resized crop and flip of each image.

The draws are those of view a of a pre-training run with such settings, from (seed, epoch, image),
so that batches do not depend on the number of workers, nor on the step at which a run resumes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sacl_fast.config import Config, ViewConfig
from sacl_fast.data.images.source import Source
from sacl_fast.data.loading.bad_images import BadImages
from sacl_fast.data.loading.batch import Plan
from sacl_fast.data.loading.readers import CompiledViewReader, ViewReader, first_readable
from sacl_fast.data.loading.waiting import Patience, no_stop
from sacl_fast.data.loading.workers import by_data_workers
from sacl_fast.data.views.draw import draw_view, sample_rng
from sacl_fast.data.views.operator import are_compiled

_PATIENCE = 20  # other images that are tried in place of an unreadable one, where there are few
CROP_AND_FLIP = ViewConfig(jitter=0.0, grayscale=0.0, blur=0.0, solarize=0.0)


class Crops(NamedTuple):
    """A batch as it leaves a worker."""

    pixels: Tensor  # (n, S, S, 3) uint8
    index: Tensor  # (n,) int64
    bad: list[tuple[int, str]]  # unreadable images met, and why
    missed: int = 0  # images that others stand for


class CropReader:
    """(epoch, indices) to a crop of each of those images; for an unreadable one the next readable
    one is taken, cyclically among all that ``chosen`` (N,) names."""

    def __init__(self, source: Source, chosen: np.ndarray, config: Config) -> None:
        compiled = are_compiled(config, torch.device("cpu"))
        self.make = (CompiledViewReader if compiled else ViewReader)(source, config).make
        self.source, self.chosen, self.seed = source, chosen, config.seed
        self.size, self.view = config.views.size, config.views.a
        self.patience = max(_PATIENCE, int(config.data.max_bad_share * len(chosen)))

    def __getitem__(self, key: tuple[int, np.ndarray]) -> Crops:
        epoch, wanted = key
        pixels = np.empty((len(wanted), self.size, self.size, 3), np.uint8)
        taken, bad = wanted.copy(), {}
        for slot, place in enumerate(wanted.tolist()):
            image, taken[slot] = first_readable(
                lambda i: self.source.load(int(self.chosen[i])),
                *(place, len(self.chosen), self.patience, bad),
            )
            if image is None:  # the loader will say so
                return Crops(torch.empty(0), torch.empty(0), self._named(bad))
            rng = sample_rng(self.seed, epoch, place, 0)
            pixels[slot] = self.make(image, [draw_view(self.view, rng, *image.size)])[0]
        missed = int((taken != wanted).sum())
        index = torch.from_numpy(self.chosen[taken])
        return Crops(torch.from_numpy(pixels), index, self._named(bad), missed)

    def _named(self, bad: dict[int, str]) -> list[tuple[int, str]]:
        return [(int(self.chosen[i]), why) for i, why in bad.items()]


class CropLoader:
    """Batches of ``config.batch_size`` of the images ``chosen`` (N,) of a source, shuffled anew in
    each epoch; what fills no batch is left out of an epoch.

    Args:
        repeat: where there are fewer images than that, each is in an epoch as often as fills a
            batch, every time as another crop.

    Raises:
        UserError: there are fewer images, and they are not to be repeated.
    """

    def __init__(
        self,
        source: Source,
        chosen: np.ndarray,
        config: Config,
        device: torch.device,
        *,
        check: Callable[[], None] = no_stop,
        repeat: bool = False,
    ) -> None:
        images = len(chosen)
        if repeat:
            chosen = np.tile(chosen, -(-config.batch_size // images))
        views = replace(config.views, a=CROP_AND_FLIP)
        self._config, self._device, self._check = replace(config, views=views), device, check
        self._plan = Plan(config, len(chosen))
        self._reader = CropReader(source, np.asarray(chosen, np.int64), self._config)
        self._bad = BadImages(source, config.data.max_bad_share, sample=images)
        self.steps_per_epoch = self._plan.steps_per_epoch

    @property
    def unreadable(self) -> int:
        """How many of the images were found so."""
        return len(self._bad.reasons)

    def batches(self, start: int = 0) -> Generator[tuple[Tensor, Tensor], None, None]:
        """(pixels (n, S, S, 3) uint8, index (n,) int64 into the source), both on the CPU, from step
        ``start`` on, without end."""
        waits = Patience(self._config.data.batch_timeout, self._check)
        crops = by_data_workers(
            self._reader, self._plan.tasks(start), self._config, self._device, waits
        )
        try:
            for some in crops:
                self._bad.add(some.bad)
                if not len(some.index):
                    raise self._bad.too_many()
                self._bad.drew(len(some.index), some.missed)
                yield some.pixels, some.index
        finally:
            crops.close()
