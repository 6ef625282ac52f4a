"""Batches of two views: which images are in each, and how pixels become what an encoder takes.

The plan yields whole batches as (epoch, image indices), and every view is drawn from (seed,
epoch, index), so batches do not depend on the number of workers or ranks, nor on the step at which
an epoch is entered.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sacl_fast.checks import counted
from sacl_fast.config import Config, ViewsConfig
from sacl_fast.data.views.draw import epoch_order
from sacl_fast.errors import UserError


class Batch(NamedTuple):
    """Two views of each of n images, and which images they are."""

    view_a: Tensor
    """(n, 3, S, S) on the device, normalised; float32, or, on a GPU where the encoder runs in half
    precision, its type (from DALI: float16)"""
    view_b: Tensor
    index: Tensor
    """(n,) int64 on the CPU: positions in the source"""
    label: Tensor
    """(n,) int64 on the CPU, -1 without labels"""


class Plan:
    """Which of ``count`` images one rank loads at which step: the ``rank``-th slice of every global
    batch of ``config.batch_size``.

    Raises:
        UserError: such batches cannot be had of so many images, or be shared by so many ranks.
    """

    def __init__(self, config: Config, count: int, rank: int = 0, world_size: int = 1) -> None:
        _check_batch(count, config.batch_size, world_size)
        self.seed, self.count = config.seed, count
        self.batch, self.share = config.batch_size, config.batch_size // world_size
        self.offset = rank * self.share
        self.steps_per_epoch = count // self.batch

    def tasks(self, start: int) -> Iterator[tuple[int, np.ndarray]]:
        """(epoch, indices (share,)), step after step without end; the first is step ``start``,
        counted from the first of epoch 0."""
        epoch, step = divmod(start, self.steps_per_epoch)
        while True:
            order = epoch_order(self.seed, epoch, self.count)
            for begin in range(step * self.batch, self.count - self.batch + 1, self.batch):
                yield epoch, order[begin + self.offset :][: self.share]
            epoch, step = epoch + 1, 0


def _check_batch(count: int, batch: int, world_size: int) -> None:
    if batch % world_size:
        works = batch - batch % world_size or world_size
        raise UserError(
            f"batch_size is {batch} over {world_size} processes; a multiple of {world_size} "
            f"works, such as {works}"
        )
    if batch < 2 * world_size:
        raise UserError(
            f"batch_size is {batch} over {world_size} processes; 2 or more images each work "
            f"(batch_size {2 * world_size})"
        )
    if batch > count:
        works = f"at most {count:,}" if count >= 2 else "2 or more images and batch_size 2"
        raise UserError(
            f"batch_size is {batch}, but there {'is' if count == 1 else 'are'} only "
            f"{counted(count, 'training image')}; {works} works"
        )


class Normalise:
    """uint8 (n, S, S, 3) to ``dtype`` (n, 3, S, S) on the device: (x / 255 - mean) / std.

    On a GPU, where ``dtype`` may be half, copy and arithmetic are on a stream of their own, beside
    the step before. The arithmetic is one kernel, x * scale + shift in float32: one pass over
    memory instead of three, and a digit at the end may differ from the CPU's.
    """

    def __init__(
        self,
        views: ViewsConfig,
        device: torch.device,
        channels_last: bool,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.device, self.dtype = device, dtype
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        mean, std = (255 * torch.tensor(v).view(3, 1, 1) for v in (views.mean, views.std))
        self.mean, self.std = mean.to(device), std.to(device)
        self.scale, self.shift = (1 / std).to(device), (-mean / std).to(device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, pixels: Tensor) -> Tensor:
        if self._stream is None:
            images = pixels.to(self.device).permute(0, 3, 1, 2)
            values = images.to(torch.float32, memory_format=self.format)
            return values.sub_(self.mean).div_(self.std)
        step = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._stream):
            images = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
            normalised = self.in_one_pass(images)
        step.wait_stream(self._stream)
        normalised.record_stream(step)  # its memory is of the other stream
        return normalised

    def in_one_pass(self, images: Tensor) -> Tensor:
        """``images`` (n, 3, S, S) uint8. On a GPU the kernel converts as it reads and writes."""
        out = torch.empty(
            images.shape, dtype=self.dtype, device=images.device, memory_format=self.format
        )
        return torch.addcmul(self.shift, images, self.scale, out=out)
