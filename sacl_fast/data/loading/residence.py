"""Where the pixels of a packed source are while a run draws views of them: on the disk, as a memory
map; in this process's memory; or in that of the GPU. Decided once, before the first step.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import warnings
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sacl_fast.config.choices import Residence, ResidenceSetting
from sacl_fast.data.images.decode import BadImage
from sacl_fast.data.images.pixel_file import CUT, is_cut
from sacl_fast.data.images.source import Packed
from sacl_fast.data.loading.waiting import NoBatch
from sacl_fast.errors import UserError
from sacl_fast.machine import usable_memory

logger = logging.getLogger(__name__)

_SHARE = 0.5  # of free memory that pixels may take: the model and its batches need some
_CHUNK = 64 << 20  # bytes that are copied at once
_ALIGNED = 16  # bytes: where an image begins in a batch
_PAGE = mmap.PAGESIZE
_WILL_NEED = 3  # MADV_WILLNEED
_libc = ctypes.CDLL(None, use_errno=True)


class Free(NamedTuple):
    """Bytes of memory that are free."""

    host: int
    """of this machine, or of its container"""
    device: int
    """of the GPU; 0 on a CPU"""


class Choice(NamedTuple):
    """Where the pixels are, and why there."""

    residence: Residence
    reason: str


def choose(
    asked: ResidenceSetting,
    size: int,
    *,
    mapped: bool,
    device: torch.device,
    on_device: bool,
    free: Free,
    processes: int = 1,
) -> Choice:
    """Where ``size`` bytes of pixels are to be.

    Args:
        asked: ``data.residence``.
        mapped: whether they are a file's, mapped into memory; else they are in memory already.
        on_device: whether the views are made on ``device``, which is the run's.
        processes: of this run on this machine, each of which would have a copy of its own.

    Raises:
        UserError: it cannot be had; says what is there and what works.
    """
    fits_device = device.type == "cuda" and on_device and size <= _SHARE * free.device
    copies = size * processes
    fits_host = copies <= _SHARE * free.host
    each = f" in each of {processes} processes" if processes > 1 else ""
    works = ("auto, disk" if mapped else "auto") + " and ram work"
    if asked == "device":
        if device.type != "cuda":
            raise UserError(
                f"data.residence is device, but the run is on the {device.type.upper()}; {works}"
            )
        if not on_device:
            raise UserError(
                "data.residence is device, but the views are not made on the GPU, since the "
                f"compiled operator augment is not built for it; {works}"
            )
        if size > free.device:
            raise UserError(
                f"data.residence is device, but the images take {_gib(size)} and the GPU has "
                f"{_gib(free.device)} free; {works}"
            )
        return Choice("device", "as requested")
    if asked == "disk":
        if not mapped:
            raise UserError(
                "data.residence is disk, but the images are in memory and not in a file of pixels; "
                "auto and ram work"
            )
        return Choice("disk", "as requested")
    if asked == "ram":
        if mapped and copies > free.host:
            raise UserError(
                f"data.residence is ram, but the images take {_gib(size)}{each} and "
                f"{_gib(free.host)} of memory are free; auto and disk work"
            )
        return Choice("ram", "as requested")
    if fits_device:
        return Choice("device", f"{_gib(size)} fit in {_gib(free.device)} that the GPU has free")
    if not mapped:
        return Choice("ram", "the images are in memory")
    if device.type != "cuda":
        return Choice("disk", f"{_gib(size)} that all processes share, read ahead")
    if fits_host:
        return Choice("ram", f"{_gib(size)}{each} fit in {_gib(free.host)} of free memory")
    return Choice(
        "disk",
        f"{_gib(size)}{each} are more than half of the {_gib(free.host)} of memory that are free; "
        "read ahead",
    )


class Pixels:
    """The pixels of a packed source where they are to be, and the part of them that a batch needs.

    Args:
        device: that makes the views: pixels on a CPU are sent there batch by batch.
    """

    def __init__(self, source: Packed, residence: Residence, device: torch.device) -> None:
        self._source, self._device, self.residence = source, device, residence
        self._check = getattr(source, "check", None)
        self.placement = source.placement
        """(N, 3) int64, in ``memory``"""
        pixels = source.pixels
        self._file = mapped_file(pixels) if residence == "disk" else None
        copied = residence == "device" or (residence == "ram" and is_mapped(pixels))
        self.memory = self._copied(pixels) if copied else _tensor(pixels)
        self._bytes = None if self.memory.is_cuda else self.memory.numpy()

    def expect(self, indices: np.ndarray) -> None:
        """These images are needed soon: a disk is told to read them."""
        if self._file is None:
            return
        for first, bytes_ in self._ranges(indices):
            begin = first // _PAGE * _PAGE
            length = ctypes.c_size_t(first + bytes_ - begin)
            _libc.madvise(ctypes.c_void_p(begin), length, _WILL_NEED)  # advice: it may be refused

    def readable(self, index: int) -> int:
        """``index``, if that image can be read. BadImage where it cannot."""
        if not self.placement[index, 1]:
            self._source.read(index)
            raise BadImage("its size is 0")
        if self._check is not None:
            self._check(np.array([index]))
        return index

    def are_readable(self, indices: np.ndarray) -> bool:
        """Whether all of these images can be read."""
        if not self.placement[indices, 1].all():
            return False
        if self._check is not None:
            try:
                self._check(indices)
            except BadImage:
                return False
        return True

    def batch(self, indices: np.ndarray, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What ``augment_packed`` takes for these images and their ``draws`` (2, n, 16): pixels,
        images (n, 3), and draws.

        Where pixels go to a GPU, they are the rows of pixels that crops need, in pinned memory.
        """
        images = self.placement[indices]
        if self._file is not None and is_cut(self._file):
            raise NoBatch(f"the file of images {CUT}")
        if self._device.type != "cpu" and self._bytes is not None:
            return gathered(self._bytes, images, draws, pin=True)
        if self._file is not None:
            self._touch(images)
        return self.memory, torch.from_numpy(images), draws

    def _touch(self, images: np.ndarray) -> None:
        """Have the pages mapped by this thread, which may wait for the disk."""
        assert self._bytes is not None
        for offset, height, width in images.tolist():
            self._bytes[offset : offset + 3 * height * width : _PAGE].sum()

    def _ranges(self, indices: np.ndarray) -> Iterator[tuple[int, int]]:
        base = self.memory.data_ptr()
        for offset, height, width in self.placement[indices].tolist():
            yield base + offset, 3 * height * width

    def _copied(self, pixels: np.ndarray) -> Tensor:
        """The pixels of the source's images, and of no others, in other memory; what is damaged is
        found on the way."""
        runs, self.placement = compacted(self.placement)
        if self._check is not None:
            for index in np.flatnonzero(self.placement[:, 1]):
                with suppress(BadImage):  # told when it is drawn
                    self._check(np.array([index]))
        device = self._device if self.residence == "device" else torch.device("cpu")
        total = int(sum(end - begin for begin, end in runs))
        try:
            memory = torch.empty(total, dtype=torch.uint8, device=device)
        except (MemoryError, RuntimeError) as error:  # torch's OutOfMemoryError is the latter
            raise UserError(
                f"data.residence is {self.residence}, but {_gib(total)} cannot be had there "
                f"({str(error).splitlines()[0]}); data.residence disk works"
            ) from None
        at = 0
        for begin, end in runs:
            for first in range(begin, end, _CHUNK):
                chunk = _tensor(pixels[first : min(end, first + _CHUNK)])
                memory[at : at + len(chunk)].copy_(chunk)
                at += len(chunk)
        return memory


def compacted(placement: np.ndarray) -> tuple[list[tuple[int, int]], np.ndarray]:
    """The ranges of bytes that images lie in, in order, neighbours joined, and the placement
    (N, 3) in those ranges end to end."""
    begin = placement[:, 0]
    end = begin + 3 * placement[:, 1] * placement[:, 2]
    there = np.flatnonzero(placement[:, 1])
    runs: list[list[int]] = []
    moved = placement.copy()
    shift = 0  # from a byte's number in the source to that in the copy
    for i in there[np.argsort(begin[there], kind="stable")].tolist():
        first, last = int(begin[i]), int(end[i])
        if runs and first <= runs[-1][1] + _PAGE:  # what pads images is copied as well
            runs[-1][1] = max(runs[-1][1], last)
        else:
            shift += first - (runs[-1][1] if runs else 0)
            runs.append([first, last])
        moved[i, 0] = first - shift
    return [(first, last) for first, last in runs], moved


def gathered(
    pixels: np.ndarray, images: np.ndarray, draws: Tensor, *, pin: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``images`` (n, 3) in ``pixels``, the rows that the crops of ``draws`` (V, n, 16) need, end
    to end in memory of their own, where they lie there, and draws for them."""
    top = draws[..., 0].amin(0)
    bottom = (draws[..., 0] + draws[..., 2]).amax(0)
    moved = draws.clone()
    moved[..., 0] -= top
    first, last = top.long().numpy(), bottom.long().numpy()
    widths = 3 * images[:, 2]
    sizes = (last - first) * widths
    padded = -(-sizes // _ALIGNED) * _ALIGNED
    at = np.cumsum(padded) - padded
    memory = torch.empty(int(padded.sum()), dtype=torch.uint8, pin_memory=pin)
    to, begin = memory.numpy(), images[:, 0] + first * widths
    for target, source, size in zip(at.tolist(), begin.tolist(), sizes.tolist(), strict=True):
        to[target : target + size] = pixels[source : source + size]
    placement = np.stack([at, last - first, images[:, 2]], axis=1)
    return memory, torch.from_numpy(placement), moved


def is_mapped(array: np.ndarray) -> bool:
    """Whether an array lies in a file that is mapped into memory."""
    return mapped_file(array) is not None


def mapped_file(array: np.ndarray) -> mmap.mmap | None:
    """The file, mapped into memory, that an array lies in."""
    base: Any = array
    while base is not None and not isinstance(base, mmap.mmap):
        base = base.obj if isinstance(base, memoryview) else getattr(base, "base", None)
    return base


def pixel_bytes(placement: np.ndarray) -> int:
    """Bytes of the images of a placement (N, 3)."""
    return int((3 * placement[:, 1] * placement[:, 2]).sum())


def free_memory(device: torch.device) -> Free:
    """What is free now."""
    return Free(
        usable_memory().free, torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    )


def processes_here() -> int:
    """Of this run, on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _tensor(pixels: np.ndarray) -> Tensor:
    """The same memory, which may be read-only and is not written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writ", UserWarning)
        return torch.from_numpy(pixels)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
