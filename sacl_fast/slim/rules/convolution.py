"""The rule for convolutions.

An ungrouped convolution sums over the parts of its input, each at its own size, and gives live
channels for the kept filters and the constant 0 for the others. A depthwise filter reads one
channel: what is kept and reads a live one is live, and what reads another part stays as small as
that, or becomes a map where it is padded. Some filters that are not kept are computed along with
the live ones, as zeros, where kernels take so many at once (``channels.MULTIPLES``). Grouped
convolutions between the two run dense on masked filters (a group's live inputs are not equally
many), and their result is slim again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.utils import _pair

from sacl_fast.ops.slim_channels import take_pixels
from sacl_fast.ops.slim_conv import (
    BACKEND,
    Geometry,
    constant_response,
    output_size,
    slim_conv,
    slim_depthwise_conv,
    take,
    take_filters,
)
from sacl_fast.ops.slim_pointwise import slim_pointwise
from sacl_fast.slim.channels import (
    Channels,
    all_channels,
    complement,
    joined,
    missing,
    readers,
    zeroed_readers,
)
from sacl_fast.slim.parts import Part, as_image, channels_at
from sacl_fast.slim.rules.registry import rule_for
from sacl_fast.slim.tensor import KeptFilters, SlimTensor, dense, with_zeros


@rule_for("conv2d")
def conv2d(
    func: Any,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    if input.ndim != 4 or isinstance(weight, SlimTensor) or isinstance(bias, SlimTensor):
        return NotImplemented
    padding = padding if isinstance(padding, str) else _pair(padding)
    geometry = Geometry(_pair(stride), padding, _pair(dilation))
    count = weight.shape[0]
    kept = weight.kept if isinstance(weight, KeptFilters) else all_channels(count)
    if isinstance(bias, KeptFilters) and bias.kept is not kept:
        return NotImplemented
    full_weight, full_bias = (
        t.parameter if isinstance(t, KeptFilters) else t for t in (weight, bias)
    )
    if bias is not None and not isinstance(bias, KeptFilters) and kept.numbers.size < count:
        return NotImplemented  # a bias that zeroed filters keep
    parts = input.parts if isinstance(input, SlimTensor) else ()
    parts = parts or (Part(all_channels(input.shape[1]), input),)
    if groups == 1:
        live = _sum_over_parts(parts, input, full_weight, full_bias, kept, geometry)
        outputs = [Part(kept, live)]
    elif groups == input.shape[1]:
        outputs = _depthwise(parts, input, full_weight, full_bias, kept, geometry)
    else:
        y = F.conv2d(dense(input), dense(weight), dense(bias), *geometry, groups=groups)
        outputs = [Part(kept, channels_at(y, kept))]
    size = output_size(_size(input), _size(weight), geometry)
    shape = torch.Size((input.shape[0], count, *size))
    zeroed = complement(joined(*(p.channels for p in outputs)), count)
    return with_zeros(outputs, zeroed, shape)


def _size(x: Tensor) -> tuple[int, int]:
    return x.shape[2], x.shape[3]


def _sum_over_parts(
    parts: tuple[Part, ...],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kept: Channels,
    geometry: Geometry,
) -> Tensor:
    """The kept outputs (N, K, H', W') of an ungrouped convolution."""
    device, (out_channels, in_channels) = weight.device, weight.shape[:2]
    out = kept.index(device, out_channels)
    offset = None if bias is None else take(bias, out).view(1, -1, 1, 1)
    if weight.shape[2:] == (1, 1) and geometry.padding in ((0, 0), "valid", "same"):
        read = tuple(
            p
            if p.is_constant
            else p._replace(values=take_pixels(as_image(p, x.shape), geometry.stride))
            for p in parts
        )
        return _sum_of_pointwise(read, weight, out, offset)
    for p in parts[1:]:
        index = p.channels.index(device, in_channels)
        if p.is_constant:
            filters = take_filters(weight, out, index)
            response = constant_response(p.values, filters, _size(x), geometry)
        else:
            response = slim_conv(as_image(p, x.shape), weight, index, out, None, geometry)
        offset = response if offset is None else offset + response
    live = parts[0]
    index = live.channels.index(device, in_channels)
    return slim_conv(live.values, weight, index, out, offset, geometry)


def _sum_of_pointwise(
    parts: tuple[Part, ...], weight: Tensor, out: Tensor | None, offset: Tensor | None
) -> Tensor:
    """A map and constants are taken in along with the live channels."""
    live, *others = parts
    maps = [p for p in others if not p.is_constant]
    constants = sorted((p for p in others if p.is_constant), key=lambda p: len(p.values))

    def convolve(p: Part, rest: Part | None = None, mapped: Part | None = None) -> Tensor:
        """And the offset, which with a map is one for all samples."""

        def given(part: Part | None) -> tuple[Tensor | None, Tensor | None]:
            if part is None:
                return None, None
            return part.values, part.channels.index(weight.device, weight.shape[1])

        values, index = given(p)
        assert values is not None
        own = values, weight, index, out
        return slim_pointwise(*own, *given(rest), offset, *given(mapped), backend=BACKEND.get())

    for p in constants[:-1]:  # those for all samples, where each sample has others too
        offset = convolve(p)
    if len(maps) == 1 and len(maps[0].values) == 1:
        return convolve(live, constants[-1] if constants else None, maps[0])
    for p in sorted(maps, key=lambda p: len(p.values)):  # what no known model makes
        offset = convolve(p)
    return convolve(live, constants[-1] if constants else None)


def _depthwise(
    parts: tuple[Part, ...],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kept: Channels,
    geometry: Geometry,
) -> list[Part]:
    """The kept outputs, by the parts that they read, and zeros that fill up the live ones."""
    device, count = weight.device, weight.shape[0]
    multiplier = count // x.shape[1]
    outputs = []
    for p in parts:
        own, positions = readers(p.channels, kept, multiplier)
        if not len(own):
            continue
        out = own.index(device, count)
        if p is parts[0] and bias is None and multiplier == 1:
            zeros, read_by_zeros = zeroed_readers(p.channels, kept, missing(len(own), device))
            own, positions = joined(own, zeros), joined(positions, read_by_zeros)
        read = positions.index(device, len(p.channels))
        if p.is_constant and p.values.shape[0] > 1:
            values, filters = channels_at(p.values, positions), take(weight, out)
            response = constant_response(values, filters, _size(x), geometry, depthwise=True)
            if bias is not None:
                response = response + take(bias, out).view(1, -1, 1, 1)
        else:
            size, values = (_size(x), p.values) if p.is_constant else (None, as_image(p, x.shape))
            response = slim_depthwise_conv(
                values, weight, read, out, bias, geometry, multiplier, size
            )
        outputs.append(Part(own, response))
    live, first = parts[0], outputs[0]
    if not len(readers(live.channels, kept, multiplier)[0]):
        # No filter reads the live channels. Their gradient is 0, but not missing: a sum over none
        # of them says so (without it DDP waits for parameters that only the slim pass uses).
        outputs[0] = first._replace(values=first.values + live.values[:, :0].sum())
    return outputs
