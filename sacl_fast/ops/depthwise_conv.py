"""Depthwise convolution in which each filter names the channel it reads.

A slim encoder keeps some filters of a depthwise convolution, and they read some of the channels
that are there. The compiled operator (``depthwise_conv.cpp`` in ``csrc/cpu`` and ``csrc/cuda``)
picks the channels as it reads them, so they are not copied first, and gives the input's gradient
back in place. Under autocast it does what PyTorch's convolutions do.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from sacl_fast.ops import compiled
from sacl_fast.ops.backend import is_faster
from sacl_fast.ops.slim_channels import positions_in, take_channels


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    in_index: Tensor | None = None,
    out_index: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    size: tuple[int, int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """(N, C, H, W) to (N, K, H', W'): filter ``out_index[j]`` on channel ``in_index[j]``.

    Args:
        x: (N, C, H, W).
        weight: (Cout, 1, kh, kw).
        in_index: (K,) int64, no channel twice; None: K = C, in order.
        out_index: (K,) int64; None: K = Cout, in order. Where there are fewer than channels read,
            the last ones are read by filters of zeros, so that their outputs are 0.
        size: (H, W) of the image that x, constant (N, C, 1, 1), fills.
        backend: ``cpu`` (compiled: float32, channels-last memory), ``cuda`` (compiled: also
            bfloat16 and float16), ``torch``, or ``auto``.

    Raises:
        UserError: a backend given by name that cannot run, see ``backend.is_faster``.
    """
    x, weight = compiled.as_under_autocast(x, weight)
    if is_faster("depthwise_conv", backend, _unfit, x, weight):
        return _DepthwiseConv.apply(x, weight, in_index, out_index, size, stride, padding, dilation)
    if size is not None:
        x = x.expand(-1, -1, *size)
    if in_index is not None:
        x = take_channels(x, in_index)
    weight = _chosen(weight, out_index, x.shape[1])
    return F.conv2d(x, weight, None, stride, padding, dilation, groups=len(weight))


def _chosen(weight: Tensor, out_index: Tensor | None, count: int) -> Tensor:
    """So many filters of (Cout, ...): those of an index, and zeros after them."""
    if out_index is None:
        return weight
    chosen = weight.index_select(0, out_index)
    zeros = count - len(out_index)
    return F.pad(chosen, (0, 0) * (weight.ndim - 1) + (0, zeros)) if zeros else chosen


def _unfit(x: Tensor, weight: Tensor) -> str | None:
    return compiled.unfit(x, weight) or (None if is_compiled() else compiled.obstacle())


class _DepthwiseConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        in_index: Tensor | None,
        out_index: Tensor | None,
        size: tuple[int, int] | None,
        *window: tuple[int, int],
    ) -> Tensor:
        if size is not None:
            x = x.expand(-1, -1, *size).contiguous(memory_format=torch.channels_last)
        count = x.shape[1] if in_index is None else len(in_index)
        chosen = _chosen(weight.squeeze(1), out_index, count).contiguous()
        ctx.save_for_backward(x, chosen)
        ctx.in_index, ctx.out_index, ctx.window = in_index, out_index, window
        ctx.is_constant, ctx.full = size is not None, weight.shape
        return torch.ops.sacl_fast.depthwise_conv(x, chosen, in_index, *window)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        op = torch.ops.sacl_fast
        x, weight = ctx.saved_tensors
        dy, dx, dweight = dy.contiguous(memory_format=torch.channels_last), None, None
        if ctx.needs_input_grad[0]:
            _, channels, high, wide = x.shape
            size = high, wide, channels
            given = {"positions": positions_in(ctx.in_index, channels)} if dy.is_cuda else {}
            dx = op.depthwise_conv_backward_input(
                dy, weight, ctx.in_index, *size, *ctx.window, **given
            )
            if ctx.is_constant:
                dx = dx.sum((2, 3), keepdim=True)
        if ctx.needs_input_grad[1]:
            dweight = op.depthwise_conv_backward_weight(
                x, dy, ctx.in_index, *weight.shape[1:], *ctx.window
            )
            if ctx.out_index is not None:
                full = dweight.new_zeros(ctx.full[0], *dweight.shape[1:])
                own = dweight[: len(ctx.out_index)]
                dweight = full.index_copy_(0, ctx.out_index, own)
            dweight = dweight.unsqueeze(1)
        return dx, dweight, *[None] * 6


def _describe() -> None:
    op = torch.ops.sacl_fast

    @torch.library.register_fake("sacl_fast::depthwise_conv")
    def _(
        x: Tensor, weight: Tensor, in_index: Any, stride: Any, padding: Any, dilation: Any
    ) -> Any:
        sides = zip(x.shape[2:], weight.shape[1:], stride, padding, dilation, strict=True)
        high, wide = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides)
        return compiled.images(x, x.shape[0], weight.shape[0], high, wide)

    @torch.library.register_fake("sacl_fast::depthwise_conv_backward_input")
    def _(
        dy: Tensor, weight: Tensor, in_index: Any, H: int, W: int, C: int, *_: Any, **__: Any
    ) -> Any:
        return compiled.images(dy, dy.shape[0], C, H, W)

    @torch.library.register_fake("sacl_fast::depthwise_conv_backward_weight")
    def _(x: Tensor, dy: Tensor, in_index: Any, kh: int, kw: int, *_: Any) -> Any:
        return x.new_empty(dy.shape[1], kh, kw)

    @register_flop_formula(op.depthwise_conv)
    def _(x: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
        return 2 * prod(out_shape) * prod(weight[1:])

    @register_flop_formula(op.depthwise_conv_backward_input)
    def _(dy: Any, weight: Any, *_: Any, **__: Any) -> int:
        return 2 * prod(dy) * prod(weight[1:])

    @register_flop_formula(op.depthwise_conv_backward_weight)
    def _(x: Any, dy: Any, in_index: Any, kh: int, kw: int, *_: Any, **__: Any) -> int:
        return 2 * prod(dy) * kh * kw


is_compiled = compiled.there(_describe)
