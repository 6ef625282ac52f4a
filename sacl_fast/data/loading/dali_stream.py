"""Views by DALI, on the CPU or on a GPU: files are read and parameters drawn in Python, DALI
decodes, and either the compiled operator or DALI itself augments.

The feeds hold what torchvision would work on: same plan, same draws, same substitutes for
unreadable images, all of them functions of (seed, epoch, index). So order, sharding over ranks and
resuming amid an epoch are those of torchvision, and DALI has no state that a checkpoint would need:
a pipeline begins anew at the step where an epoch is entered, and runs on from one epoch into the
next.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch

from sacl_fast.config import Config, ViewsConfig
from sacl_fast.data.images.source import Source
from sacl_fast.data.loading.bad_images import BadImages
from sacl_fast.data.loading.batch import Plan
from sacl_fast.data.loading.dali_reader import Feed, FeedReader
from sacl_fast.data.loading.readers import Views
from sacl_fast.data.loading.torchvision_stream import input_dtype
from sacl_fast.data.loading.view_loader import NormalisedViews
from sacl_fast.data.loading.waiting import Patience, no_stop
from sacl_fast.data.loading.workers import Prefetcher, open_prefetcher, worker_count
from sacl_fast.data.views.compiled import CompiledViews
from sacl_fast.data.views.dali import ViewPipeline
from sacl_fast.data.views.dali_parameters import draw_parameters
from sacl_fast.data.views.dali_pipeline import DaliError, undecodable
from sacl_fast.data.views.draws import draw_rows
from sacl_fast.data.views.operator import are_compiled

logger = logging.getLogger(__name__)


class DaliStream:
    """A ``Stream`` (``view_loader.py``) by DALI on the CPU or the GPU. While a batch is waited for,
    ``check`` is called, and what it raises ends the wait."""

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
        self._reader = feed_reader(source, config, device)
        self._source, self._config, self._plan, self._bad = source, config, plan, bad
        self._device, self._check = device, check
        self._waits = Patience()  # for a feed
        self._feeds: Prefetcher | None = None
        self._pipeline: ViewPipeline | CompiledViews | None = None
        self._fed: deque[Feed] = deque()  # what the pipeline holds, oldest first

    def enter(self, step: int) -> None:
        self.close()
        self._waits = Patience(self._config.data.batch_timeout, self._check)
        self._feeds = self._open_feeds(step)  # workers are forked without a pipeline
        self._pipeline = view_pipeline(
            self._feed,
            self._config,
            encoded=not self._source.decoded,
            batch=self._plan.share,
            device=self._device,
        )

    def take(self, step: int) -> NormalisedViews:
        while True:
            assert self._pipeline is not None
            try:
                a, b = self._pipeline.run()
                break
            except DaliError as error:
                leave_to_pillow(self._fed, self._reader, self._device, error)
                self.enter(step)  # workers hold a copy of the reader
        feed = self._fed.popleft()
        if not self._config.channels_last:
            a, b = a.contiguous(), b.contiguous()
        return NormalisedViews(a, b, feed.index, feed.missed)

    def close(self) -> None:
        self._waits.over = True  # the pipeline may be waiting in a thread of its own
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = None
        self._fed.clear()
        if self._feeds is not None:
            self._feeds.close()
            self._feeds = None

    def _open_feeds(self, step: int) -> Prefetcher:
        readers = self._config.data.dali.readers
        if readers < 0:
            readers = 4 if self._device.type == "cuda" else 0
        return open_prefetcher(
            self._reader,
            self._plan.tasks(step),
            workers=readers,
            prefetch=2,
            pin_memory=False,
            patience=self._waits,
            setting="data.dali.readers",
            remedy="fewer data.dali.readers take less",
        )

    def _feed(self) -> tuple[list[np.ndarray], Any]:
        assert self._feeds is not None
        feed: Feed = next(self._feeds)
        self._bad.add(feed.bad)
        self._fed.append(feed)
        return feed.arrays(), feed.draws


def feed_reader(source: Source, config: Config, device: torch.device) -> FeedReader:
    """What reads for the ``view_pipeline`` of the same ``config`` and ``device``."""
    return FeedReader(
        source, config, draw_rows if are_compiled(config, device) else draw_parameters
    )


def view_pipeline(
    feed: Callable[[], Any], config: Config, *, encoded: bool, batch: int, device: torch.device
) -> ViewPipeline | CompiledViews:
    """What makes views of what ``feed`` gives: DALI and the compiled operator, or, where that
    does not run, DALI alone."""
    dali, threads = config.data.dali, worker_count(config.data.dali.threads)
    if are_compiled(config, device):
        maker, dtype = CompiledViews, input_dtype(config, device)
    else:
        # The encoder casts what it gets to its autocast type; on the way there half is enough, and
        # DALI has no bfloat16.
        half = device.type == "cuda" and config.precision != "fp32"
        maker, dtype = ViewPipeline, torch.float16 if half else torch.float32
    return maker(
        config.views,
        feed,
        encoded=encoded,
        batch=batch,
        ahead=batches_ahead(config, batch, dtype),
        threads=threads,
        device=device,
        dtype=dtype,
        hw_decoder_load=dali.hw_decoder_load,
    )


def batches_ahead(config: Config, share: int, dtype: torch.dtype) -> int:
    """``dali.prefetch``, or fewer batches of ``share`` images where both views of those would take
    more than ``dali.memory`` GiB."""
    dali = config.data.dali
    batch_bytes = 2 * share * 3 * config.views.size**2 * dtype.itemsize
    return max(1, min(dali.prefetch, int(dali.memory * 2**30 / batch_bytes)))


def dali_views(source: Source, config: Config, epoch: int, indices: np.ndarray) -> Views:
    """Both views of some images as ``ViewReader`` gives them, by DALI on the CPU."""
    cpu = torch.device("cpu")
    reader = feed_reader(source, config, cpu)
    while True:
        feed = reader[epoch, indices]
        if not len(feed.index):
            return Views(torch.empty(0), torch.empty(0), feed.index, feed.bad)
        pipeline = view_pipeline(
            partial(_once, feed),
            config,
            encoded=not source.decoded,
            batch=len(indices),
            device=cpu,
        )
        try:
            a, b = (_pixels(view, config.views) for view in pipeline.run())
        except DaliError as error:
            leave_to_pillow([feed], reader, cpu, error)
            continue
        finally:
            pipeline.close()
        return Views(a, b, feed.index, feed.bad, feed.missed)


def _once(feed: Feed) -> tuple[list[np.ndarray], Any]:
    return feed.arrays(), feed.draws


def leave_to_pillow(
    feeds: Iterable[Feed], reader: FeedReader, device: torch.device, error: DaliError
) -> None:
    """Have the ``reader`` decode by Pillow the images of ``feeds`` that DALI cannot decode. Pillow
    then finds which of them are broken, and they are named and replaced as ever. Raises ``error``
    where it was due to none of them."""
    for feed in feeds:
        if len(feed.sizes):
            raise error
        indices = feed.index.tolist()
        failed = undecodable(feed.arrays(), device)
        found = {indices[position]: why for position, why in failed.items()}
        found = {index: why for index, why in found.items() if index not in reader.by_pillow}
        if found:
            break
    else:
        raise error
    for index, reason in found.items():
        name = reader.source.name(index)
        logger.debug("DALI cannot decode %s (%s); leaving it to Pillow", name, reason)
    reader.by_pillow |= found.keys()


def _pixels(normalised: torch.Tensor, views: ViewsConfig) -> torch.Tensor:
    """(n, 3, S, S) normalised to (n, S, S, 3) uint8."""
    mean, std = (255 * torch.tensor(values) for values in (views.mean, views.std))
    values = normalised.permute(0, 2, 3, 1) * std + mean
    return values.round_().clamp_(0, 255).to(torch.uint8)
