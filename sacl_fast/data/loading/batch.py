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

from sacl_fast.config import Config, ViewsConfig
from sacl_fast.data.views.draw import epoch_order
from sacl_fast.errors import UserError


class Batch(NamedTuple):
    """Two views of each of n images, and which images they are."""

    view_a: Tensor
    """(n, 3, S, S) on the device, normalised; float32, or float16 from DALI where the encoder runs
    in half precision"""
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
        works = f"at most {count}" if count >= 2 else "2 or more images and batch_size 2"
        raise UserError(
            f"batch_size is {batch}, but there are only {count} training images; {works} works"
        )


class Normalise:
    """uint8 (n, S, S, 3) to float32 (n, 3, S, S) on the device: (x / 255 - mean) / std."""

    def __init__(self, views: ViewsConfig, device: torch.device, channels_last: bool) -> None:
        self.device = device
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.mean = 255 * torch.tensor(views.mean, device=device).view(3, 1, 1)
        self.std = 255 * torch.tensor(views.std, device=device).view(3, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        on_device = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        return on_device.to(torch.float32, memory_format=self.format).sub_(self.mean).div_(self.std)
