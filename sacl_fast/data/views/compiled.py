"""Views on the CPU by the compiled operator ``augment``; DALI only decodes.

This is several times as fast as DALI's own operators (``dali.py``), which read and write an image
in memory for every step of its arithmetic, and it gives torchvision's pixels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from sacl_fast.config import ViewsConfig
from sacl_fast.data.views.dali import ImagePipeline

# A batch of images, encoded (1-D uint8 each) or as pixels (n, H, W, 3), and the draws of both
# views as ``pack_rows`` (``operator.py``) gives them.
Fed = tuple[np.ndarray | Sequence[np.ndarray], np.ndarray, np.ndarray]


class CompiledViews:
    """Batches of both views of ``batch`` images, ``ahead`` of them prepared in the background.

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
    ) -> None:
        self._views, self._feed, self._threads = views, feed, threads
        self._draws: deque[tuple[np.ndarray, np.ndarray]] = deque()  # of the images under way
        self._decoder = (
            ImagePipeline(self._images, batch=batch, threads=threads) if encoded else None
        )
        self._executor = ThreadPoolExecutor(1, "views")
        self._failed = False
        self._batches: deque[Future[Tensor]] = deque(
            self._executor.submit(self._make) for _ in range(ahead)
        )

    def run(self) -> tuple[Tensor, Tensor]:
        """The next batch: both views (n, 3, S, S), normalised, channels last in memory.

        Raises DaliError, or what ``feed`` raises.
        """
        self._batches.append(self._executor.submit(self._make))
        a, b = self._batches.popleft().result()
        return a, b

    def close(self) -> None:
        """End the work in the background."""
        self._executor.shutdown(cancel_futures=True)
        if self._decoder is not None:
            self._decoder.close()

    def _make(self) -> Tensor:
        from sacl_fast.ops.augment import augment

        assert not self._failed, "batches after one that failed are not asked for"
        self._failed = True  # unless it returns
        if self._decoder is not None:
            images = self._decoder.run()
        else:
            images = [torch.from_numpy(image) for image in self._images()]
        made = augment(
            images,
            torch.from_numpy(np.stack(self._draws.popleft())),
            size=self._views.size,
            window=self._views.blur_window,
            mean=self._views.mean,
            std=self._views.std,
            threads=self._threads,
        )
        self._failed = False
        return made

    def _images(self) -> np.ndarray | Sequence[np.ndarray]:
        images, *draws = self._feed()
        a, b = draws
        self._draws.append((a, b))
        return images
