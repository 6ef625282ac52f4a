"""Views by worker processes, which decode by Pillow and augment by torchvision or by the compiled
operator.

They send 8-bit pixels, which the device converts and normalises: a quarter of the bytes are moved.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sacl_fast.config import Config
from sacl_fast.data.images.source import Source
from sacl_fast.data.loading.bad_images import BadImages
from sacl_fast.data.loading.batch import Normalise, Plan
from sacl_fast.data.loading.readers import CompiledViewReader, ViewReader, Views
from sacl_fast.data.loading.view_loader import NormalisedViews
from sacl_fast.data.loading.waiting import Patience, no_stop
from sacl_fast.data.loading.workers import Prefetcher, by_data_workers
from sacl_fast.precision import autocast_dtype


class TorchvisionStream:
    """A ``Stream`` (``view_loader.py``). While a batch is waited for, ``check`` is called, and what
    it raises ends the wait."""

    reads: type[ViewReader] = ViewReader

    def __init__(
        self,
        source: Source,
        config: Config,
        plan: Plan,
        bad: BadImages,
        *,
        device: torch.device,
        check: Callable[[], None] = no_stop,
    ) -> None:
        self._reader = self.reads(source, config)
        dtype = input_dtype(config, device)
        self._normalise = Normalise(config.views, device, config.channels_last, dtype)
        self._config, self._plan, self._bad = config, plan, bad
        self._device, self._check = device, check
        self._batches: Prefetcher | None = None

    def enter(self, step: int) -> None:
        self.close()
        waits = Patience(self._config.data.batch_timeout, self._check)
        self._batches = by_data_workers(
            self._reader, self._plan.tasks(step), self._config, self._device, waits
        )

    def take(self, step: int) -> NormalisedViews:
        assert self._batches is not None
        views: Views = next(self._batches)
        self._bad.add(views.bad)
        a, b = self._normalise(views.a), self._normalise(views.b)
        return NormalisedViews(a, b, views.index, views.missed)

    def close(self) -> None:
        if self._batches is not None:
            self._batches.close()
            self._batches = None


def input_dtype(config: Config, device: torch.device) -> torch.dtype:
    """The type of the views: on a GPU that to which the encoder would cast them."""
    half = autocast_dtype(config.precision, device) if device.type == "cuda" else None
    return half or torch.float32


class PillowStream(TorchvisionStream):
    """The same by the compiled operator, on a machine without DALI."""

    reads = CompiledViewReader
