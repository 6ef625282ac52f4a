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


def damped(x: Tensor, eps: float) -> Tensor:
    """``x``, to be normalised in training, with its gradient times ``min(1, variance / eps)``.

    A norm multiplies gradients by ``weight / sqrt(variance + eps)``. Of a channel that hardly
    varies that is ``weight / sqrt(eps)``, 316 times the weight for eps 1e-5, and several such norms
    in a row multiply theirs. With the factor it is never more than ``weight / sqrt(2 eps)``, and 0
    for a constant. A channel of variance eps or more keeps its gradient to the bit. The factor is
    continuous, so how a variance of 0 is rounded does not matter, and no value is read by the host.

    Args:
        x: (N, C, ...).
    """
    if not (torch.is_grad_enabled() and x.requires_grad and eps > 0):
        return x
    with torch.no_grad():
        # Batch norm's own statistics: on the CPU, channels-last, ``var`` takes 90 times as long (32
        # images of 64 x 56 x 56, one core: 1.5 and 135 ms or more).
        # Of differences to a channel's first value, so that a large constant's is exactly 0.
        first = x[:1, :, *[slice(1)] * (x.ndim - 2)]
        _, variance = torch.batch_norm_update_stats(x - first, None, None, 0.0)
        factor = (variance / eps).clamp(max=1).to(x.dtype)
    return _Damped.apply(x, factor.view(1, -1, *[1] * (x.ndim - 2)))


class _Damped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return gradient * factor, None


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
