"""Convolutions of a slim encoder: from some input channels to some filters, on the full weight.

A slim activation consists of parts. Live channels are full-size, ``(N, K, H, W)``; what a zeroed
filter leaves behind is the same for all samples or all pixels and is kept in its smallest form
``(1 or N, R, 1 or H, 1 or W)`` (see ``slim.tensor``). A convolution is linear, so its output is
the sum over the parts of the input, each computed at the part's own size::

    y = conv(live, W[out][:, live_in]) + bias + conv(rest, W[out][:, rest_in])

For a constant the last term needs no convolution, only the sum of the kernel's taps that fall
inside the image: at most a few classes of rows times a few of columns, whatever the image's size
(``constant_response``). Zero padding makes it differ at the border; dropping that is an error of
17 % on a bottleneck.

The functions here are plain PyTorch, given activations of some channels, the full weight and index
lists (None: all channels). ``slim_conv`` is the reference of ``slim_pointwise``, and
``slim_depthwise_conv`` calls ``depthwise_conv``; those have faster backends.
"""

from __future__ import annotations

from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sacl_fast.ops.depthwise_conv import depthwise_conv
from sacl_fast.ops.slim_channels import add_map, take_channels

BACKEND: ContextVar[str] = ContextVar("BACKEND", default="auto")
"""The ``backend`` that a slim encoder's calls of operators are given. Set by the slicer, since
models call PyTorch's functions and know nothing of ours. In a run it is ``torch`` or ``auto``; by a
name such as ``cpu`` a layer that the operator does not take is an error (``backend.is_faster``)."""


class Geometry(NamedTuple):
    """Stride, padding and dilation of a convolution, as (vertical, horizontal)."""

    stride: tuple[int, int]
    padding: Any  # or "same", "valid"
    dilation: tuple[int, int]


POINTWISE = Geometry((1, 1), (0, 0), (1, 1))


def output_size(
    size: tuple[int, int], kernel: tuple[int, int], geometry: Geometry
) -> tuple[int, int]:
    """(H', W') of a convolution of (H, W)."""
    sides = zip(
        size,
        kernel,
        geometry.stride,
        _padding(geometry, kernel),
        geometry.dilation,
        strict=True,
    )
    high, wide = (_output_length(*side) for side in sides)
    return high, wide


def take(vector: Tensor, index: Tensor | None) -> Tensor:
    """The chosen ones of (C, ...); the tensor itself where all are."""
    return vector if index is None else vector.index_select(0, index)


def take_filters(weight: Tensor, out_index: Tensor | None, in_index: Tensor | None) -> Tensor:
    """(Cout, Cin, kh, kw) -> (K_out, K_in, kh, kw), in the same memory format."""
    if out_index is not None:
        last = weight.permute(0, 2, 3, 1)
        if last.is_contiguous():
            weight = last.index_select(0, out_index).permute(0, 3, 1, 2)
        else:
            weight = weight.index_select(0, out_index)
    return weight if in_index is None else take_channels(weight, in_index)


def slim_conv(
    live: Tensor,
    weight: Tensor,
    in_index: Tensor | None,
    out_index: Tensor | None,
    offset: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    """Convolution of one group: (N, K_in, H, W) -> (N, K_out, H', W').

    Args:
        weight: full, (Cout, Cin, kh, kw).
        offset: (1 or N, K_out, 1 or H', 1 or W'), added: bias and the part of constant channels.
    """
    filters = take_filters(weight, out_index, in_index)
    if offset is None or offset.numel() == filters.shape[0]:  # a bias costs nothing
        return F.conv2d(live, filters, None if offset is None else offset.flatten(), *geometry)
    y = F.conv2d(live, filters, None, *geometry)
    offset = offset.to(y.dtype)
    per_pixel = offset.shape == (1, *y.shape[1:])
    return add_map(y, offset) if per_pixel else y.add_(offset)


def slim_depthwise_conv(
    values: Tensor,
    weight: Tensor,
    in_index: Tensor | None,
    out_index: Tensor | None,
    bias: Tensor | None,
    geometry: Geometry,
    multiplier: int = 1,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Depthwise convolution: (b, K, H, W) -> (b, K_out, H', W').

    Args:
        values: some channels of the activation.
        weight: full, (Cout, 1, kh, kw).
        in_index: for each output, which channel of ``values`` it reads.
        out_index: the filters, as many as ``in_index``; with ``multiplier`` 1 and no bias also
            fewer, see ``depthwise_conv``.
        bias: full, (Cout,).
        multiplier: filters that read one channel of the full activation.
        size: of the image that ``values``, constant (b, K, 1, 1), fill.
    """
    bias = None if bias is None else take(bias, out_index)
    if multiplier == 1 and not isinstance(geometry.padding, str):
        options = {**geometry._asdict(), "size": size, "backend": BACKEND.get()}
        y = depthwise_conv(values, weight, in_index, out_index, **options)
        return y if bias is None else y + bias.view(1, -1, 1, 1)
    if size is not None:
        values = values.expand(-1, -1, *size)
    filters = take(weight, out_index)
    read = values if in_index is None else take_channels(values, in_index)
    return F.conv2d(read, filters, bias, *geometry, groups=filters.shape[0])


def constant_response(
    value: Tensor,
    filters: Tensor,
    size: tuple[int, int],
    geometry: Geometry,
    *,
    depthwise: bool = False,
) -> Tensor:
    """What filters give for channels that are constant over the image, without their bias.

    Args:
        value: (b, K, 1, 1).
        filters: (O, K, kh, kw), or (K, 1, kh, kw) where ``depthwise``.
        size: (H, W) of the image that the constants fill.

    Returns:
        (b, O, 1, 1) where no tap of the kernel ever leaves the image, else (b, O, H', W').
    """
    taps = filters.flatten(2)  # (O, K, t)
    if depthwise:
        sums = value.flatten(2) * taps.transpose(0, 1)  # (b, K, t)
    else:
        sums = torch.einsum("okt,bk->bot", taps, value.flatten(1))
    kernel = (filters.shape[2], filters.shape[3])
    padding = _padding(geometry, kernel)
    grid, row_of, column_of = _border(
        size, kernel, geometry.stride, padding, geometry.dilation, sums.dtype, sums.device
    )
    response = sums @ grid.flatten(2).flatten(0, 1).T  # (b, O, rows * columns)
    response = response.unflatten(2, grid.shape[:2])
    if response.shape[2:] == (1, 1):
        return response
    return response.index_select(2, row_of).index_select(3, column_of)


def _padding(
    geometry: Geometry, kernel: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Zeros before and after the image, vertically and horizontally."""
    if geometry.padding == "same":  # the odd one comes after, as in torch
        high, wide = (d * (k - 1) for d, k in zip(geometry.dilation, kernel, strict=True))
        return (high // 2, high - high // 2), (wide // 2, wide - wide // 2)
    if isinstance(geometry.padding, str):  # "valid"
        return (0, 0), (0, 0)
    high, wide = geometry.padding
    return (high, high), (wide, wide)


@lru_cache(maxsize=1024)
@torch.inference_mode(False)  # whatever is running: training may use them later
def _border(
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
    dilation: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Which taps see the image, and where: it differs at the border only.

    Returns:
        grid: (rows, columns, kh * kw), 0 or 1, for each class of rows and of columns.
        row_of, column_of: (H',) and (W',), the classes of the output's rows and columns.
    """
    (rows, row_of), (columns, column_of) = (
        _taps_inside(*side) for side in zip(size, kernel, stride, padding, dilation, strict=True)
    )
    grid = [[[r * c for r in row for c in column] for column in columns] for row in rows]
    return (
        torch.tensor(grid, dtype=dtype, device=device),
        torch.tensor(row_of, device=device),
        torch.tensor(column_of, device=device),
    )


def _taps_inside(
    size: int, kernel: int, stride: int, padding: tuple[int, int], dilation: int
) -> tuple[list[tuple[int, ...]], list[int]]:
    """Along one side: the different sets of taps (0 or 1 each) inside, and each output's set."""
    count = _output_length(size, kernel, stride, padding, dilation)
    sets = [
        tuple(int(0 <= i * stride - padding[0] + t * dilation < size) for t in range(kernel))
        for i in range(count)
    ]
    kinds = list(dict.fromkeys(sets))
    return kinds, [kinds.index(s) for s in sets]


def _output_length(
    size: int, kernel: int, stride: int, padding: tuple[int, int], dilation: int
) -> int:
    return (size + sum(padding) - dilation * (kernel - 1) - 1) // stride + 1
