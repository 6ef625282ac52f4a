"""The views of a batch of images, each as it was drawn: random resized crop, flip, colour jitter,
grayscale, Gaussian blur, solarise, normalise.

The compiled operator of the CPU (``csrc/cpu/augment.cpp``) makes a view in one go, by one thread,
in its cache, and works on 8-bit pixels as Pillow does: it gives the same bits, but for a blur that
may be one of 255 off (two passes of floats, summed in another order, less taps of a millionth of
the weight). Its reference is ``sacl_fast.data.views.draw.apply_view``. There is no gradient.

On a CUDA device ``augment_packed`` makes the same views (``csrc/cuda/augment_kernels.cu``): the
bits of the CPU before normalisation, but for a blur, of which at most one value in a thousand is
one of 255 off (``exp`` and fused multiplications). It can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sacl_fast.ops import compiled

# What a row of ``draws`` holds.
COLUMNS = (
    *("top", "left", "height", "width", "flip"),
    *("operation0", "operation1", "operation2", "operation3"),
    *("factor0", "factor1", "factor2", "factor3"),
    *("grayscale", "sigma", "threshold"),
)
# What an operation is called there; 0: none.
OPERATIONS = {"brightness": 1, "contrast": 2, "saturation": 3, "hue": 4}


def augment(
    images: Sequence[Tensor],
    draws: Tensor,
    *,
    size: int,
    window: int,
    mean: Sequence[float],
    std: Sequence[float],
    threads: int = 1,
) -> Tensor:
    """Views v of images i to (V, n, 3, size, size) float32, channels last in memory.

    Args:
        images: n of them, (H, W, 3) uint8, of any size.
        draws: (V, n, 16) float64, ``COLUMNS``: the crop in pixels, whether it is flipped, up to
            four operations of the jitter in their order with their factors, whether it is made
            gray, sigma of the blur (0: none), and from which value on it is solarised (256: none).
        window: taps of the blur, odd.
        mean, std: of the channels, as shares of 255.
        threads: threads that share the work; they end with it.
    """
    obstacle = compiled.obstacle()
    if obstacle is not None:
        raise RuntimeError(f"augment has no other backend than the compiled one: {obstacle}")
    scaled = (255 * torch.tensor(values, dtype=torch.float32) for values in (mean, std))
    views = torch.ops.sacl_fast.augment(list(images), draws, size, window, *scaled, threads)
    return views.unflatten(0, draws.shape[:2])


def augment_packed(
    pixels: Tensor,
    images: Tensor,
    draws: Tensor,
    *,
    window: int,
    mean: Tensor,
    std: Tensor,
    out: Tensor,
    threads: int = 1,
) -> None:
    """``augment`` of images that lie in one buffer, written to ``out``.

    Args:
        pixels: (bytes,) uint8, on the device that makes the views, as all that follows.
        images: (n, 3) int64: where in ``pixels`` each begins, its height and its width.
        draws: (V, n, 16) float64, as ``augment`` takes them.
        mean, std: (3,) float32, of the channels, in 0..255.
        out: (V * n, 3, size, size), channels last in memory; float32, on a CUDA device float16 or
            bfloat16 too.
        threads: of the CPU, that share the work.

    An image outside ``pixels`` or a crop outside its image is a ``RuntimeError`` on the CPU. A CUDA
    device reads both when the kernels run, so there it ends the process's use of the device, as an
    index out of range does in PyTorch; so do two contrasts in one row of ``draws``, and an image of
    2^24 pixels or more along a side.
    """
    on_gpu = out.device.type == "cuda"
    obstacle = compiled.cuda_obstacle(out.device) if on_gpu else compiled.obstacle()
    if obstacle is not None:
        raise RuntimeError(f"augment has no other backend than the compiled one: {obstacle}")
    torch.ops.sacl_fast.augment_packed(pixels, images, draws, window, mean, std, out, threads)
