"""Views by the compiled operator ``augment_packed``; DALI only decodes.

This is several times as fast as DALI's own operators (``dali.py``), which read and write an image
in memory for every step of its arithmetic, and it gives torchvision's pixels. On a GPU the images
are decoded, augmented and used without leaving it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from sacl_fast.config import ViewsConfig
from sacl_fast.data.views.ahead import Ahead
from sacl_fast.data.views.dali_pipeline import ImagePipeline
from sacl_fast.data.views.packed import PackedViews, packed

# A batch of images, encoded, (bytes,) uint8 each, or as pixels (H, W, 3), and the draws of both
# views (2, n, 16) as ``draw_rows`` (``draws.py``) gives them.
Fed = tuple[np.ndarray | Sequence[np.ndarray], Tensor]


class CompiledViews:
    """Batches of both views of ``batch`` images on ``device``, ``ahead`` of them prepared in the
    background.

    ``feed`` is called for each batch in turn, by a thread of its own; ``encoded`` says which kind
    of images it gives.
    """

    def __init__(
        self,
        views: ViewsConfig,
        feed: Callable[[], Fed],
        *,
        encoded: bool,
        batch: int,
        ahead: int = 1,
        threads: int = 1,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        hw_decoder_load: float = 0.65,
    ) -> None:
        self._feed = feed
        self._draws: deque[Tensor] = deque()  # of the images under way
        self._augment = PackedViews(views, device, dtype, threads)
        self._decoder = None
        if encoded:
            self._decoder = ImagePipeline(
                self._images,
                batch=batch,
                threads=threads,
                device=device,
                hw_decoder_load=hw_decoder_load,
            )
        self._batches = Ahead(self._make, ahead=ahead, device=device)

    def run(self) -> tuple[Tensor, Tensor]:
        """The next batch: both views (n, 3, S, S), normalised, channels last in memory.

        Raises DaliError, or what ``feed`` raises.
        """
        a, b = self._batches.take()
        return a, b

    def close(self) -> None:
        """End the work in the background."""
        self._batches.close()
        if self._decoder is not None:
            self._decoder.close()

    def _make(self) -> Tensor:
        if self._decoder is not None:
            pixels, images = self._decoder.run()
        else:
            pixels, images = packed(self._images())
        return self._augment(pixels, images, self._draws.popleft())

    def _images(self) -> np.ndarray | Sequence[np.ndarray]:
        images, draws = self._feed()
        self._draws.append(draws)
        return images
