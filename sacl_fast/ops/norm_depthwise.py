"""Depthwise convolution with a batch norm fused into both its sides; see ``norm_act``.

Without the fusion, forward moves ``X + 6 Y`` values and backward ``5 Y + 3 X`` (an input of X and
an output of Y values, each norm's own passes counted with the convolution before it); with it
``X + Y`` and, in one kernel, ``2 Y + 2 X``.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sacl_fast.ops import compiled
from sacl_fast.ops.depthwise_conv import chosen_filters
from sacl_fast.ops.norm_act import (
    before_activation,
    gradient_sums,
    images_like,
    input_gradient,
    moments,
    operand,
    precise,
)

_Pair = list[int]


def _read(
    x: Tensor, affine: Tensor | None, act: int, in_index: Tensor | None
) -> Tensor:  # (N, K, H, W)
    values = operand(x, affine, act)
    return values if in_index is None else values.index_select(1, in_index)


def _filters(weight: Tensor, out_index: Tensor | None, count: int) -> Tensor:  # (K, 1, kh, kw)
    return chosen_filters(weight, out_index, count).unsqueeze(1)


def _forward(
    x: Tensor,
    affine: Tensor | None,
    act: int,
    weight: Tensor,
    out_index: Tensor | None,
    in_index: Tensor | None,
    stride: _Pair,
    padding: _Pair,
    dilation: _Pair,
) -> tuple[Tensor, Tensor]:
    read, window = _read(x, affine, act, in_index), (stride, padding, dilation)
    filters = _filters(weight, out_index, read.shape[1])
    y = F.conv2d(read, filters, None, *window, groups=len(filters))
    return images_like(y), moments(y)


def _backward(
    g: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    x: Tensor,
    affine: Tensor | None,
    act: int,
    weight: Tensor,
    out_index: Tensor | None,
    in_index: Tensor | None,
    stride: _Pair,
    padding: _Pair,
    dilation: _Pair,
    to_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dy, read = input_gradient(g, y, coefficients), _read(x, affine, act, in_index)
    filters = _filters(weight, out_index, read.shape[1])
    window = stride, padding, dilation, False, [0, 0], len(filters)
    dx, dfilters, _ = torch.ops.aten.convolution_backward(
        dy, read, filters, None, *window, [True, True, False]
    )
    dweight = dfilters.squeeze(1)
    if out_index is not None:
        dweight = torch.zeros_like(weight).index_copy_(0, out_index, dweight[: len(out_index)])
    if in_index is not None:
        dx = torch.zeros_like(x).index_copy_(1, in_index, dx)
    sums = precise(x).new_empty(0)
    if to_norm and affine is not None:
        dx = before_activation(dx, x, affine, act)
        sums = gradient_sums(dx, x, affine)
    return images_like(dx), sums, dweight


def _describe() -> None:
    op = torch.ops.sacl_fast
    for name, function in (("norm_depthwise", _forward), ("norm_depthwise_backward", _backward)):
        torch.library.impl(f"sacl_fast::{name}", "CPU")(function)
        torch.library.register_fake(f"sacl_fast::{name}")(function)

    @register_flop_formula(op.norm_depthwise)
    def _(x: Any, affine: Any, act: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
        return 2 * prod(out_shape[0]) * prod(weight[1:])

    @register_flop_formula(op.norm_depthwise_backward)
    def _(
        g: Any, y: Any, coefficients: Any, x: Any, affine: Any, act: Any, weight: Any, *_: Any,
        **__: Any,
    ) -> int:  # fmt: skip
        return 4 * prod(g) * prod(weight[1:])


is_compiled = compiled.there(_describe)
