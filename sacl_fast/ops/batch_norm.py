"""What batch norms are made of, and ``damped``, for those of channels that hardly vary."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

DAMPED: ContextVar[bool] = ContextVar("DAMPED", default=False)
"""Whether batch norms of slim activations, in training, are to be ``damped``. Set by the slicer,
which sees to ordinary tensors itself."""


def damped(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x``, to be normalised in training, without what norms in a row make too large.

    A norm divides a channel that hardly varies by ``sqrt(eps)``: it multiplies it by 316 for eps
    1e-5, and several such norms in a row multiply theirs.

    - Forward, they multiply the rounding of the mean, which makes of a constant one that is not 0,
      and of that, by padding, a map. So a channel of variance beneath eps comes less its first
      value. A norm gives the same of both, but for the running mean (``put_back``).
    - Backward, they multiply gradients. So those are multiplied by ``min(1, variance / eps)``; then
      a norm multiplies them by ``weight / sqrt(2 eps)`` at most, and by 0 for a constant.

    A channel of variance eps or more keeps values and gradient to the bit. No value is read by the
    host.

    Args:
        x: (N, C, ...).

    Returns:
        what the norm is to be given, like x, and what was taken away of each channel (C,).
    """
    if eps == 0:
        return x, x.new_zeros(x.shape[1])
    with torch.no_grad():
        first, variance = first_and_variance(x)
        factor = (variance / eps).clamp(max=1).to(x.dtype)
        taken = torch.where(variance < eps, first, 0)
    shape = [1, -1, *[1] * (x.ndim - 2)]
    return _Damped.apply(x, factor.view(shape), taken.view(shape)), taken


class _Damped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, taken: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x - taken

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (factor,) = ctx.saved_tensors
        return gradient * factor, None, None


def first_and_variance(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of each channel of (N, C, ...) the first value (C,) and the biased variance (C,), which of a
    constant is exactly 0, however large that is."""
    first = x[:1, :, *[slice(1)] * (x.ndim - 2)]
    # Batch norm's own statistics: on the CPU, channels-last, ``var`` takes 90 times as long (32
    # images of 64 x 56 x 56, one core: 1.5 and 135 ms or more).
    _, variance = torch.batch_norm_update_stats(x - first, None, None, 0.0)
    return first.flatten(), variance


@torch.no_grad()
def put_back(
    running_mean: Tensor | None, taken: Tensor, momentum: float, index: Tensor | None = None
) -> None:
    """Have a running mean, just updated by a norm, be of values from which ``taken`` (K,) was not
    taken away.

    Args:
        running_mean: (C,) or None.
        index: (K,), which of the C channels were given; None: all, in order.
    """
    if running_mean is None:
        return
    own = momentum * taken.to(running_mean.dtype)
    # Without autograd's notice: it may have saved the buffer.
    if index is None:
        running_mean.data.add_(own)
    else:
        running_mean.data.index_add_(0, index, own)


def standardize_channels(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Standardised (N, C, ...) in at least fp32, with the mean (C,) and biased variance (C,)."""
    dims = [0, *range(2, x.ndim)]
    shape = [1, -1, *[1] * (x.ndim - 2)]
    wide = x if x.dtype == torch.float64 else x.float()
    count = x.numel() // x.shape[1]
    mean = wide.sum(dims) / count
    centered = wide - mean.view(shape)
    var = centered.square().sum(dims) / count
    return centered * (var + eps).rsqrt().view(shape), mean, var


def affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Scale and shift of each channel of (N, C, ...), each (C,) or None."""
    shape = [1, -1, *[1] * (x.ndim - 2)]
    if weight is not None:
        x = x * weight.view(shape)
    return x if bias is None else x + bias.view(shape)


@torch.no_grad()
def update_running(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: int,
    momentum: float,
) -> None:
    """Move running statistics (C,) to a batch's mean and, made unbiased, its variance.

    Like torch's kernels without autograd's notice (``data``): it may have saved the buffers.
    """
    if running_mean is not None:
        running_mean.data.lerp_(mean.to(running_mean.dtype), momentum)
    if running_var is not None:
        unbiased = var * (count / max(1, count - 1))
        running_var.data.lerp_(unbiased.to(running_var.dtype), momentum)
