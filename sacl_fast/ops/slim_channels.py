"""Channels of several tensors put into one: a slim activation made dense, or added to a dense one.

Each part holds some of the channels in a form that broadcasts to the full size (see
``slim_conv``). One write per part; the backward takes each part's channels from the gradient and
sums them over the dimensions along which the part is constant.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def assemble(shape: torch.Size, values: list[Tensor], indices: list[Tensor]) -> Tensor:
    """The dense tensor (N, C, H, W) whose channels ``indices[i]`` are ``values[i]``.

    Args:
        values: (1 or N, K_i, 1 or H, 1 or W), of one dtype; the first decides the memory format.
        indices: (K_i,), each channel once.
    """
    return _Assemble.apply(shape, len(values), *values, *indices)  # type: ignore[no-any-return]


def add_channels(base: Tensor, values: list[Tensor], indices: list[Tensor]) -> Tensor:
    """``base + assemble(...)`` for a dense base (N, C, H, W), without the sum's second operand."""
    return _AddChannels.apply(base, len(values), *values, *indices)  # type: ignore[no-any-return]


class _Assemble(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shape: torch.Size, count: int, *tensors: Tensor) -> Tensor:
        values, indices = tensors[:count], tensors[count:]
        ctx.save_for_backward(*indices)
        ctx.shapes = [v.shape for v in values]
        out = values[0].new_empty(shape).contiguous(memory_format=_memory_format(values[0]))
        for v, index in zip(values, indices, strict=True):
            out.index_copy_(1, index, v.expand(shape[0], -1, *shape[2:]))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return None, None, *_parts_of(ctx, grad, 2)


class _AddChannels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: Tensor, count: int, *tensors: Tensor) -> Tensor:
        values, indices = tensors[:count], tensors[count:]
        ctx.save_for_backward(*indices)
        ctx.shapes = [v.shape for v in values]
        out = base.clone()
        for v, index in zip(values, indices, strict=True):
            out.index_add_(1, index, v.expand(base.shape[0], -1, *base.shape[2:]))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad, None, *_parts_of(ctx, grad, 2)


def _parts_of(ctx: Any, grad: Tensor, first: int) -> list[Tensor | None]:
    """The gradients of the parts, and None for their indices."""
    indices = ctx.saved_tensors
    needed = ctx.needs_input_grad[first:]
    grads = [
        grad.index_select(1, index).sum_to_size(shape) if need else None
        for index, shape, need in zip(indices, ctx.shapes, needed, strict=False)
    ]
    return [*grads, *[None] * len(indices)]


def _memory_format(x: Tensor) -> torch.memory_format:
    last = torch.channels_last
    return last if x.is_contiguous(memory_format=last) else torch.contiguous_format
