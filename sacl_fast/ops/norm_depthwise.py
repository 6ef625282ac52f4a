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


def _forward(
    x: Tensor,
    affine: Tensor | None,
    act: int,
    weight: Tensor,
    in_index: Tensor | None,
    stride: _Pair,
    padding: _Pair,
    dilation: _Pair,
) -> tuple[Tensor, Tensor]:
    window = stride, padding, dilation
    filters = weight.unsqueeze(1)
    y = F.conv2d(_read(x, affine, act, in_index), filters, None, *window, groups=len(weight))
    return images_like(y), moments(y)


def _backward(
    g: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    x: Tensor,
    affine: Tensor | None,
    act: int,
    weight: Tensor,
    in_index: Tensor | None,
    stride: _Pair,
    padding: _Pair,
    dilation: _Pair,
    to_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dy, read = input_gradient(g, y, coefficients), _read(x, affine, act, in_index)
    window = stride, padding, dilation, False, [0, 0], len(weight)
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        dy, read, weight.unsqueeze(1), None, *window, [True, True, False]
    )
    if in_index is not None:
        dx = torch.zeros_like(x).index_copy_(1, in_index, dx)
    sums = precise(x).new_empty(0)
    if to_norm and affine is not None:
        dx = before_activation(dx, x, affine, act)
        sums = gradient_sums(dx, x, affine)
    return images_like(dx), sums, dweight.squeeze(1)


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
