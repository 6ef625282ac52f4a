"""Both views of images that lie end to end in memory, by the compiled operator ``augment_packed``,
on the CPU or on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sacl_fast.config import ViewsConfig


class PackedViews:
    """Packed images and their draws to both views, in ``dtype`` on ``device``.

    On a GPU everything is put on the current stream, and the host waits for none of it: what comes
    from the CPU goes by pinned memory, which PyTorch uses again when the copy is done.
    """

    def __init__(
        self,
        views: ViewsConfig,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        threads: int = 1,
    ) -> None:
        self._device, self._dtype, self._threads = device, dtype, threads
        self._size, self._window = views.size, views.blur_window
        self._mean, self._std = (
            (255 * torch.tensor(values, dtype=torch.float32)).to(device)
            for values in (views.mean, views.std)
        )

    def __call__(self, pixels: Tensor, images: Tensor, draws: Tensor) -> Tensor:
        """Views (2, n, 3, S, S), normalised, channels last in memory.

        Args:
            pixels: (bytes,) uint8, on the device or on the CPU.
            images: (n, 3) int64 on the CPU: where in ``pixels`` each begins, its height and width.
            draws: (2, n, 16) float64 on the CPU, as ``draw_rows`` (``draws.py``) gives them.
        """
        from sacl_fast.ops.augment import augment_packed

        views = torch.empty(
            (2 * len(images), 3, self._size, self._size),
            dtype=self._dtype,
            device=self._device,
            memory_format=torch.channels_last,
        )
        augment_packed(
            self._there(pixels),
            self._there(images),
            self._there(draws),
            window=self._window,
            mean=self._mean,
            std=self._std,
            out=views,
            threads=self._threads,
        )
        return views.unflatten(0, (2, len(images)))

    def _there(self, given: Tensor) -> Tensor:
        if given.device.type == self._device.type:
            return given
        return given.pin_memory().to(self._device, non_blocking=True)


def packed(images: np.ndarray | Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Images (H, W, 3) uint8 of any size as ``PackedViews`` takes them: pixels, end to end, and
    where each image lies."""
    sizes = np.array([image.shape for image in images], np.int64).reshape(-1, 3)
    pixels = np.concatenate([np.empty(0, np.uint8), *(image.reshape(-1) for image in images)])
    return torch.from_numpy(pixels), placement(sizes)


def placement(shapes: np.ndarray) -> Tensor:
    """(n, 3) int64, offset, height and width, of images of ``shapes`` (n, 3) that lie end to
    end."""
    ends = shapes.prod(1).cumsum()
    return torch.from_numpy(np.column_stack((ends - shapes.prod(1), shapes[:, :2])))
