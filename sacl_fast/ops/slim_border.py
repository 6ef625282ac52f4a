"""What zero padding makes of constant channels, from a depthwise convolution to the next product.

Filters ``filter_index`` (S,) of ``filters`` (Cdw, kh, kw) read the constants ``in_index`` of
``constants`` (R,), channels of zeroed filters that are the same everywhere in an image (H, W). They
give a map (1, S, OH, OW), which differs by pixel at the border only. It goes through a batch norm
in training, whose channels ``norm_index`` it is, and an activation. A 1x1 convolution has it in its
inputs ``map_index``, and constants ``rest`` (R2,) in its inputs ``rest_index`` ::

    map = act(norm(depthwise(constants)))
    offset = weight[out_index][:, map_index] map + weight[out_index][:, rest_index] rest

The offset (1, O, OH, OW) is what the live channels' product then adds.

A pixel counts by its class alone: its row is in a run of rows that have the same taps of the window
inside the image, and so is its column. For a padded 3x3 window there are 3 x 3 classes. ``saved``
(classes + 1, S) holds for each class, row by row, the normalised value, and below them
1 / deviation. The compiled operator (``csrc/cuda/slim_border.cpp``) computes classes, and only
writes, and in backward reads, what is of the image's size. What is written here, in plain PyTorch
on whole images, runs on CPUs: the reference that it is tested against.
"""

from __future__ import annotations

from functools import lru_cache
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
    operand,
    precise,
)
from sacl_fast.ops.slim_conv import take

LARGEST_WINDOW = 7  # taps along a side that the compiled operator takes

_Pair = list[int]


def _forward(
    constants: Tensor,
    filters: Tensor,
    filter_index: Tensor,
    in_index: Tensor,
    H: int,
    W: int,
    stride: _Pair,
    padding: _Pair,
    dilation: _Pair,
    norm_weight: Tensor,
    norm_bias: Tensor,
    norm_index: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    count: int,
    momentum: float,
    eps: float,
    act: int,
    weight: Tensor,
    map_index: Tensor,
    out_index: Tensor | None,
    rest: Tensor | None,
    rest_index: Tensor | None,
) -> tuple[Tensor, Tensor]:
    image, window = _image(constants, in_index, H, W), _window(filters, filter_index)
    y = F.conv2d(image, window, None, stride, padding, dilation, groups=len(window))
    mean = y.mean((0, 2, 3))
    centred = y - mean.view(1, -1, 1, 1)
    var = centred.square().mean((0, 2, 3))
    for running, own in ((running_mean, mean), (running_var, var * (count / max(count - 1, 1)))):
        if running is not None:
            moved = torch.lerp(take(running, norm_index), own.to(running.dtype), momentum)
            running.index_copy_(0, norm_index, moved)
    rstd = (var + eps).rsqrt()
    normalised = centred * rstd.view(1, -1, 1, 1)
    map = operand(normalised, _affine(norm_weight, norm_bias, norm_index), act)
    offset = F.conv2d(map, _columns(weight, out_index, map_index)[:, :, None, None])
    if rest is not None and rest_index is not None:
        others = _columns(weight, out_index, rest_index) @ precise(rest)
        offset = offset + others.view(1, -1, 1, 1)
    rows, columns = _runs_of(filters, H, W, stride, padding, dilation)
    by_class = normalised[0][:, _firsts(rows, y)][:, :, _firsts(columns, y)].flatten(1)
    saved = torch.cat([by_class.T, rstd.unsqueeze(0)])
    return images_like(offset.to(constants.dtype)), saved


def _backward(
    doffset: Tensor,
    saved: Tensor,
    constants: Tensor,
    filters: Tensor,
    filter_index: Tensor,
    in_index: Tensor,
    H: int,
    W: int,
    stride: _Pair,
    padding: _Pair,
    dilation: _Pair,
    norm_weight: Tensor,
    norm_bias: Tensor,
    norm_index: Tensor,
    act: int,
    weight: Tensor,
    map_index: Tensor,
    out_index: Tensor | None,
    rest: Tensor | None,
    rest_index: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, columns = _runs_of(filters, H, W, stride, padding, dilation)
    by_class = saved[:-1].T.unflatten(1, (len(rows), len(columns)))
    of_row, of_column = _numbers(rows, saved), _numbers(columns, saved)
    normalised = by_class.index_select(1, of_row).index_select(2, of_column).unsqueeze(0)
    affine = _affine(norm_weight, norm_bias, norm_index)

    map, taken = operand(normalised, affine, act), _columns(weight, out_index, map_index)
    dmap, dtaken, _ = torch.ops.aten.convolution_backward(
        doffset, map, taken[:, :, None, None], None,
        [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, False],
    )  # fmt: skip
    outputs = torch.arange(len(weight), device=weight.device) if out_index is None else out_index
    dweight = torch.zeros_like(weight)
    dweight[outputs[:, None], map_index] = dtaken.flatten(1).to(weight.dtype)
    drest = constants.new_empty(0)
    if rest is not None and rest_index is not None:
        summed = doffset.sum((0, 2, 3))
        drest = (summed @ _columns(weight, out_index, rest_index)).to(rest.dtype)
        dweight[outputs[:, None], rest_index] = summed.outer(precise(rest)).to(weight.dtype)

    g = before_activation(dmap, normalised, affine, act)
    dbias, dscale = gradient_sums(g, normalised, affine)[0]
    total, projection = (v.view(1, -1, 1, 1) / g[0, 0].numel() for v in (dbias, dscale))
    dy = (affine[0] * saved[-1]).view(1, -1, 1, 1) * (g - total - normalised * projection)

    window = _window(filters, filter_index)
    dimage, dwindow, _ = torch.ops.aten.convolution_backward(
        dy, _image(constants, in_index, H, W), window, None,
        stride, padding, dilation, False, [0, 0], len(window), [True, True, False],
    )  # fmt: skip
    return (
        _put(dimage.sum((0, 2, 3)), in_index, constants),
        _put(dwindow.squeeze(1), filter_index, filters),
        _put(dscale, norm_index, norm_weight),
        _put(dbias, norm_index, norm_bias),
        dweight,
        drest,
    )


def _image(constants: Tensor, in_index: Tensor, H: int, W: int) -> Tensor:  # (1, S, H, W)
    return precise(take(constants, in_index)).view(1, -1, 1, 1).expand(-1, -1, H, W).contiguous()


def _window(filters: Tensor, filter_index: Tensor) -> Tensor:  # (S, 1, kh, kw)
    return precise(take(filters, filter_index)).unsqueeze(1)


def _columns(weight: Tensor, out_index: Tensor | None, index: Tensor) -> Tensor:  # (O, columns)
    return precise(take(weight, out_index).index_select(1, index))


def _affine(weight: Tensor, bias: Tensor, index: Tensor) -> Tensor:
    """(4, S): what is applied to normalised values."""
    scale, shift = (precise(take(v, index)) for v in (weight, bias))
    return torch.stack([scale, shift, torch.zeros_like(scale), torch.ones_like(scale)])


def _put(values: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """Values at their places among zeros."""
    return torch.zeros_like(like).index_add_(0, index, values.to(like.dtype))


# --- the classes of pixels ----------------------------------------------------------------------


def _runs_of(
    filters: Tensor, H: int, W: int, stride: _Pair, padding: _Pair, dilation: _Pair
) -> tuple[list[range], list[range]]:
    """The classes of rows and of columns."""
    sides = zip((H, W), filters.shape[1:], stride, padding, dilation, strict=True)
    rows, columns = (_runs(*side) for side in sides)
    return rows, columns


@lru_cache(maxsize=1024)
def _runs(size: int, kernel: int, stride: int, padding: int, dilation: int) -> list[range]:
    """Along one side, runs of outputs that have the same taps inside the image."""
    count = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    inside = [
        [0 <= i * stride - padding + t * dilation < size for t in range(kernel)]
        for i in range(count)
    ]
    firsts = [i for i in range(count) if not i or inside[i] != inside[i - 1]]
    return [range(*ends) for ends in zip(firsts, [*firsts[1:], count], strict=True)]


def _firsts(runs: list[range], like: Tensor) -> Tensor:
    return torch.tensor([run.start for run in runs], device=like.device)


def _numbers(runs: list[range], like: Tensor) -> Tensor:
    """The class of each output along a side."""
    return torch.tensor([i for i, run in enumerate(runs) for _ in run], device=like.device)


def _describe() -> None:
    op = torch.ops.sacl_fast
    for name, function in (("slim_border", _forward), ("slim_border_backward", _backward)):
        torch.library.impl(f"sacl_fast::{name}", "CPU")(function)
        torch.library.register_fake(f"sacl_fast::{name}")(function)

    @register_flop_formula(op.slim_border)
    def _(*_: Any, out_shape: Any, **__: Any) -> int:
        offset, saved = out_shape
        return 2 * offset[1] * prod(saved)

    @register_flop_formula(op.slim_border_backward)
    def _(doffset: Any, saved: Any, *_: Any, **__: Any) -> int:
        return 4 * doffset[1] * prod(saved)


is_compiled = compiled.there(_describe)
