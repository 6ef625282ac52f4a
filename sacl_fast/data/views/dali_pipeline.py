"""Pipelines of NVIDIA DALI that are fed by a function, and the one that only decodes.

What is relied on beyond DALI's documentation of a function, where a GPU is at work:

- ``run(stream)`` gives its outputs bound to that stream: the stream waits for them, and their
  memory is free for others in the stream's order when the last reference to it is gone. So what is
  put on the stream before may read them, and the host waits for nothing.
- The samples of an output lie end to end, as they do on the CPU (``MakeContiguous`` ends every
  graph), so ``as_reshaped_tensor`` gives all of them as one tensor without a copy.
- ``torch.from_dlpack`` hands the current stream to DALI, which is the one they are bound to.

This is the only module that imports DALI; ``dali.py`` has it from here.
"""
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet, ref

import numpy as np
import torch
from torch import Tensor

from sacl_fast.data.views.packed import placement

# Buffers above 1 MB come from DALI's pool, not from malloc, which would give their pages back to
# the system after every operator: up to half the time of a batch. Read when DALI is loaded.
os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", "1000000")

from nvidia.dali import fn, math, pipeline_def, types

__all__ = [
    "DaliError",
    "FedPipeline",
    "ImagePipeline",
    "dali_device",
    "decoded",
    "fn",
    "math",
    "pipeline_def",
    "types",
    "undecodable",
]

# A pipeline that is collected waits for its threads. In a forked process, like a loader's worker,
# they are not there: it would hang or crash. So none that is inherited is ever collected.
_alive: WeakSet[Any] = WeakSet()
_inherited: list[Any] = []
os.register_at_fork(after_in_child=lambda: _inherited.extend(_alive))


class DaliError(RuntimeError):
    """DALI failed at a batch; the pipeline is of no more use."""


class FedPipeline:
    """A graph that is fed by a function; whoever takes its outputs owns them."""

    def __init__(self, feed: Callable[[], Any], device: torch.device) -> None:
        self._feed, self._device = feed, device
        self._feed_failed = False
        self._pipeline: Any = None

    def _build(self, graph: Any, *arguments: Any, **options: Any) -> None:
        device = dali_device(self._device)
        self._pipeline = graph(*arguments, device_id=device, exec_dynamic=True, **options)
        _alive.add(self._pipeline)
        self._pipeline.build()

    def _call_feed(self) -> Any:
        self._feed_failed = True  # unless it returns
        fed = self._feed()
        self._feed_failed = False
        return fed

    def close(self) -> None:
        """End it now, also where it lies in a cycle of references; a collection takes 0.2 s."""
        pipeline = None if self._pipeline is None else ref(self._pipeline)
        self._pipeline = None
        if pipeline is not None and pipeline() is not None:
            gc.collect()

    def _outputs(self) -> tuple[Any, ...]:
        """On a GPU for use on the current stream. DaliError, or what ``feed`` raises."""
        assert self._pipeline is not None
        on_gpu = self._device.type == "cuda"
        stream = torch.cuda.current_stream(self._device) if on_gpu else None
        try:
            return self._pipeline.run(stream)
        except RuntimeError as error:
            if self._feed_failed:
                raise
            raise DaliError(_reason(error)) from error


class ImagePipeline(FedPipeline):
    """Decoded images in batches of up to ``batch``; the next batch is decoded in the background.
    ``feed`` is called for the encoded images of each batch in turn."""

    def __init__(
        self,
        feed: Callable[[], np.ndarray | Sequence[np.ndarray]],
        *,
        batch: int,
        threads: int,
        device: torch.device,
        hw_decoder_load: float = 0.65,
    ) -> None:
        super().__init__(feed, device)
        self._build(
            _images, self._call_feed, device.type, hw_decoder_load,
            batch_size=batch, num_threads=threads, prefetch_queue_depth=2,
        )  # fmt: skip

    def run(self) -> tuple[Tensor, Tensor]:
        """The next batch, end to end: pixels (bytes,) uint8, on a GPU for use on the current
        stream, and (n, 3) int64 on the CPU, where each image begins, its height and its width.

        Raises DaliError, or what ``feed`` raises.
        """
        (images,) = self._outputs()
        shapes = np.array(images.shape(), np.int64)  # (n, 3): height, width, channels
        pixels = torch.from_dlpack(images.as_reshaped_tensor([int(shapes.prod(1).sum())]))
        return pixels, placement(shapes)


def undecodable(images: Sequence[np.ndarray], device: torch.device) -> dict[int, str]:
    """Which of the encoded ``images``, (bytes,) uint8 each, DALI cannot decode, and why."""
    found: dict[int, str] = {}
    pipeline = None
    for position, image in enumerate(images):
        if pipeline is None:  # one that failed is of no more use
            pipeline = _one_image(
                device.type, batch_size=1, num_threads=1, prefetch_queue_depth=1,
                device_id=dali_device(device),
            )  # fmt: skip
            _alive.add(pipeline)
        pipeline.feed_input("image", [image])
        try:
            pipeline.run()
        except RuntimeError as error:
            found[position], pipeline = _reason(error), None
    return found


def _reason(error: RuntimeError) -> str:
    """What went wrong, out of DALI's long messages."""
    text = str(error).rpartition("encountered:")[2]
    told = re.split(r"C\+\+ context|Stacktrace|Current pipeline object|\[frame", text)[0]
    return " ".join(told.split())[:200] or type(error).__name__


def dali_device(device: torch.device) -> int | None:
    """What DALI calls the device; None: no GPU."""
    return (device.index or 0) if device.type == "cuda" else None


@pipeline_def
def _images(feed: Callable[[], Any], device: str, hw_decoder_load: float):
    return decoded(fn.external_source(feed, batch=True), device, hw_decoder_load)


@pipeline_def
def _one_image(device: str):
    return decoded(fn.external_source(name="image"), device, 0.65)


def decoded(image: Any, device: str, hw_decoder_load: float) -> Any:
    """The node that decodes, by Pillow's rules; ``device`` is ``cpu`` or ``cuda``."""
    return fn.decoders.image(
        image,
        device="mixed" if device == "cuda" else "cpu",
        adjust_orientation=False,  # torchvision does not look at it either
        jpeg_fancy_upsampling=True,  # as Pillow's decoder
        hw_decoder_load=hw_decoder_load,
    )
