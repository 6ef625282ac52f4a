"""Decode a source into one file.

Worker processes decode runs of images, and this one writes them in order, so the file is the same
for any number of workers, and whether or not it was made in one go.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import PIL

from sacl_fast._version import __version__
from sacl_fast.caching.decoding import DecodingReader
from sacl_fast.caching.dimensions import DimensionReader, Images
from sacl_fast.caching.partial import Partial, refuse_existing
from sacl_fast.checks import counted
from sacl_fast.config.cache import CacheConfig
from sacl_fast.data.images.fingerprint import fingerprint
from sacl_fast.data.images.pixel_format import VERSION, About, Index, one_line
from sacl_fast.data.images.source import Splits
from sacl_fast.data.loading.bad_images import BadImages
from sacl_fast.data.loading.waiting import Patience, no_stop
from sacl_fast.data.loading.workers import Prefetcher, open_prefetcher, worker_count
from sacl_fast.errors import UserError
from sacl_fast.evaluation.progress import EvaluationProgress

logger = logging.getLogger(__name__)

_AT_ONCE = 256  # images that a worker takes at a time, at most,
_AT_ONCE_BYTES = 2**24  # and their pixels, unless one image has more
_INDEX = 100  # bytes of an image in the index and in the journal, or fewer


def make_cache(
    splits: Splits,
    out: Path,
    config: CacheConfig,
    *,
    check: Callable[[], None] = no_stop,
    quiet: bool = False,
) -> None:
    """Write the decoded images of ``splits`` to the new file ``out``, or go on where an earlier
    process was ended.

    Args:
        check: called often; what it raises ends the work, which the same call goes on with.
        quiet: without a progress bar.

    Raises:
        UserError: ``out`` exists or cannot be written, the disk is too small, or more than
            ``data.max_bad_share`` of the images of a split are unreadable.
    """
    refuse_existing(out)
    images = Images(*splits)
    plan = {
        "format": VERSION,
        "images": [fingerprint(source) for source in images.splits],
        "size": config.size,
        "Pillow": PIL.__version__,
    }
    with Partial(out, images.count, plan) as partial, EvaluationProgress(quiet=quiet) as progress:
        if partial.done:
            logger.info(
                "going on after %d of %s in %s",
                partial.done,
                counted(images.count, "image"),
                partial.folder,
            )
        bad = [BadImages(source, config.data.max_bad_share) for source in images.splits]
        _add(bad, images, partial, partial.bad)
        work = _Work(config, check)
        room = _room(images, partial, work, progress)
        done = progress.steps(f"decoding images into {out}", images.count)
        done(partial.done)
        reader = DecodingReader(images, config.size)
        for decoded in work.over(reader, _runs(partial.done, room)):
            first = partial.done
            partial.append(decoded)
            _add(bad, images, partial, {first + slot: why for slot, why in decoded.bad})
            done(len(decoded.sizes))
        partial.seal(_index(images, splits, partial, config))


class _Work:
    """By worker processes; ``check`` is called after each batch too."""

    def __init__(self, config: CacheConfig, check: Callable[[], None]) -> None:
        self._config, self._check = config, check

    def over(
        self, reader: DecodingReader | DimensionReader, tasks: Iterator[tuple[int, int]]
    ) -> Iterator:
        data = self._config.data
        batches: Prefetcher = open_prefetcher(
            reader,
            tasks,
            workers=worker_count(data.workers),
            prefetch=2,
            pin_memory=False,
            patience=Patience(data.batch_timeout, self._check),
            setting="data.workers",
            remedy="fewer data.workers take less",
        )
        try:
            for batch in batches:
                yield batch
                self._check()
        finally:
            batches.close()


def _add(bad: list[BadImages], images: Images, partial: Partial, found: dict[int, str]) -> None:
    """Count the unreadable images ``found``, each with those of its split."""
    for split, (split_bad, source) in enumerate(zip(bad, images.splits, strict=True)):
        first = images.train if split else 0
        last = first + len(source)
        try:
            split_bad.add([(i - first, why) for i, why in found.items() if first <= i < last])
        except UserError as error:
            if not partial.written:
                raise
            raise UserError(
                f"{error}; what is done is kept in {partial.folder}: with a larger "
                "--data.max-bad-share the same command goes on from there, and once images are "
                "mended it works after that folder is removed"
            ) from None


def _room(
    images: Images, partial: Partial, work: _Work, progress: EvaluationProgress
) -> np.ndarray:
    """(n,) int64: the bytes of each image that is not done. Says how large the file will be.

    Raises:
        UserError: the disk has less.
    """
    tasks = (
        (start, min(start + _AT_ONCE, images.count))
        for start in range(partial.done, images.count, _AT_ONCE)
    )
    done = progress.steps("looking at the sizes of images", images.count - partial.done)
    rooms, told = [np.empty(0, np.int64)], True
    for dimensions in work.over(DimensionReader(images, partial.plan["size"]), tasks):
        rooms.append(dimensions.room.numpy())
        told = told and bool(dimensions.told.all())
        done(len(rooms[-1]))
    room = np.concatenate(rooms)
    pixels = int(room.sum())
    needed = pixels + _INDEX * images.count
    about = "" if told else ", an estimate: some are in formats whose size decoding tells"
    whole = _shown(partial.written + pixels)
    logger.info("%s will hold %s of pixels%s", partial.out, whole, about)
    free = shutil.disk_usage(partial.folder).free
    if needed > free:
        raise UserError(
            f"{partial.out} needs {_shown(needed)}{' more' if partial.done else ''}, and "
            f"{_shown(free)} are free in {partial.out.absolute().parent}; a smaller --size takes "
            "less, and OUT may be on another disk"
        )
    return room


def _shown(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _runs(first: int, room: np.ndarray) -> Iterator[tuple[int, int]]:
    """What is decoded at a time: ranges of images from ``first`` on."""
    ends, start = np.cumsum(room), 0
    while start < len(room):
        before = ends[start] - room[start]
        stop = int(np.searchsorted(ends, before + _AT_ONCE_BYTES, "right"))
        stop = min(max(stop, start + 1), start + _AT_ONCE)
        yield first + start, first + stop
        start = stop


def _index(images: Images, splits: Splits, partial: Partial, config: CacheConfig) -> Index:
    names = [source.name(i) for source in images.splits for i in range(len(source))]
    shared = os.path.commonprefix(names)  # noqa: RUF071 (cut at a slash below)
    root = shared[: shared.rfind("/") + 1]
    about = About(
        train=images.train,
        val=None if splits.val is None else len(splits.val),
        classes=tuple(splits.train.classes),
        size=config.size,
        shrunk=partial.shrunk,
        source=config.data.source,
        root=root,
        made_by=f"sacl-fast {__version__}, Pillow {PIL.__version__}",
    )
    labels = np.concatenate([source.labels for source in images.splits])
    return Index(
        about=np.frombuffer(about.to_json(), np.uint8),
        sizes=partial.sizes,
        checksums=partial.checksums,
        labels=labels.astype(np.int32),
        names=one_line([name[len(root) :] for name in names]),
        bad=np.array(sorted(partial.bad), np.int64),
        reasons=one_line([partial.bad[i] for i in sorted(partial.bad)]),
    )
