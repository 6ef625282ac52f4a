"""1x1 convolution of a slim activation: from live inputs to kept filters, on the full weight.

What other channels hold, if it is constant over the image, adds a number for each filter (and
sample). The compiled operator (``csrc/cpu/slim_pointwise.cpp``, ``csrc/cuda/slim_pointwise.cpp``)
does all that in one call, and writes the weight's gradient into the full one.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from sacl_fast.ops import compiled
from sacl_fast.ops.backend import is_faster
from sacl_fast.ops.slim_channels import positions_in
from sacl_fast.ops.slim_conv import POINTWISE, slim_conv


def slim_pointwise(
    x: Tensor,
    weight: Tensor,
    in_index: Tensor | None = None,
    out_index: Tensor | None = None,
    rest: Tensor | None = None,
    rest_index: Tensor | None = None,
    offset: Tensor | None = None,
    map: Tensor | None = None,
    map_index: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """(N, K, H, W) to (N, O, H, W).

    Args:
        x: the channels ``in_index`` of the full activation.
        weight: full, (Cout, Cin, 1, 1).
        in_index, out_index: (K,) and (O,) int64; None: all, in order.
        rest: (1 or N, R, 1, 1), the channels ``rest_index`` (R,) of the full activation.
        offset: (1 or N, O, 1 or H, 1 or W), added.
        map: (1, S, H, W), the same for all samples, the channels ``map_index`` (S,).
        backend: ``cpu`` or ``cuda`` (compiled, see ``compiled.unfit``; a weight of the type of x or
            float32), ``torch``, or ``auto``. Under autocast as PyTorch's convolutions.

    Raises:
        UserError: a backend given by name that cannot run, see ``backend.is_faster``.
    """
    x, rest, offset, map = compiled.as_under_autocast(x, rest, offset, map)
    given = x, weight, rest, offset, map
    if is_faster("slim_pointwise", backend, _unfit, *given):
        return _SlimPointwise.apply(*given, in_index, out_index, rest_index, map_index)
    for values, index in ((rest, rest_index), (map, map_index)):
        if values is not None:
            response = slim_conv(values, weight, index, out_index, None, POINTWISE)
            offset = response if offset is None else offset + response
    return slim_conv(x, weight, in_index, out_index, offset, POINTWISE)


def _unfit(x: Tensor, weight: Tensor, *others: Tensor | None) -> str | None:
    if weight.dtype not in (x.dtype, torch.float32) or weight.device != x.device:
        return f"the weight is {weight.dtype} on {weight.device}"
    return compiled.unfit(x, *others) or (None if is_compiled() else compiled.obstacle())


class _SlimPointwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        rest: Tensor | None,
        offset: Tensor | None,
        map: Tensor | None,
        in_index: Tensor | None,
        out_index: Tensor | None,
        rest_index: Tensor | None,
        map_index: Tensor | None,
    ) -> Tensor:
        op, matrix = torch.ops.sacl_fast.slim_pointwise, weight.flatten(1)
        constants = None if rest is None else rest.flatten(1).contiguous()
        offset, map = (
            None if t is None else t.contiguous(memory_format=torch.channels_last)
            for t in (offset, map)
        )
        ctx.save_for_backward(x, matrix, constants, map)
        ctx.indices = in_index, out_index, rest_index, map_index
        ctx.shapes = weight.shape, None if rest is None else rest.shape
        ctx.offset_shape = () if offset is None else offset.shape
        own, others = _who_takes(constants, rest_index, map)
        if map is not None:  # what it comes to is an offset, for all samples
            offset = op(map, matrix, map_index, out_index, *others, offset)
        return op(x, matrix, in_index, out_index, *own, offset)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        op = torch.ops.sacl_fast.slim_pointwise_backward
        x, matrix, constants, map = ctx.saved_tensors
        in_index, out_index, rest_index, map_index = ctx.indices
        own, others = _who_takes(constants, rest_index, map)
        dy, shape = dy.contiguous(memory_format=torch.channels_last), ctx.offset_shape
        between = shape if map is None else (1, dy.shape[1], *dy.shape[2:])
        given = x, matrix, in_index, out_index, *own
        dx, dweight, drest, doffset = op(dy, *given, between, **_positions(*given))
        dmap = None
        if map is not None:
            given = map, matrix, map_index, out_index, *others
            dmap, more, dothers, doffset = op(doffset, *given, shape, **_positions(*given))
            dweight.add_(more)
            drest = drest if others[0] is None else dothers
        weight_shape, rest_shape = ctx.shapes
        drest = None if constants is None else drest.view(rest_shape)
        doffset = doffset if shape else None
        return dx, dweight.view(weight_shape), drest, doffset, dmap, *[None] * 4


def _positions(
    x: Tensor,
    matrix: Tensor,
    in_index: Tensor | None,
    out_index: Tensor | None,
    _: Any,
    rest_index: Tensor | None,
) -> dict[str, Tensor | None]:
    """What the backward of these takes besides; on the CPU it is quicker without."""
    if not x.is_cuda:
        return {}
    outs, ins = matrix.shape
    return {
        "out_positions": positions_in(out_index, outs),
        "in_positions": positions_in(in_index, ins, rest_index),
    }


_Constants = tuple[Tensor | None, Tensor | None]


def _who_takes(
    constants: Tensor | None, index: Tensor | None, map: Tensor | None
) -> tuple[_Constants, _Constants]:
    """The constants that the live channels take in, and those that the map does: it, where
    they are for all samples, because it has fewer values."""
    if map is not None and constants is not None and len(constants) == 1:
        return (None, None), (constants, index)
    return (constants, index), (None, None)


def _describe() -> None:
    op = torch.ops.sacl_fast

    @torch.library.register_fake("sacl_fast::slim_pointwise")
    def _(x: Tensor, weight: Tensor, in_index: Any, out_index: Tensor | None, *_: Any) -> Tensor:
        filters = weight.shape[0] if out_index is None else len(out_index)
        return compiled.images(x, x.shape[0], filters, *x.shape[2:])

    @torch.library.register_fake("sacl_fast::slim_pointwise_backward")
    def _(
        dy: Tensor, x: Tensor, weight: Tensor, in_index: Any, out_index: Any,
        rest: Tensor | None, rest_index: Any, offset_shape: Any, **_: Any,
    ) -> Any:  # fmt: skip
        drest = x.new_empty(0 if rest is None else rest.shape)
        doffset = compiled.images(x, *offset_shape) if offset_shape else x.new_empty(0)
        return torch.empty_like(x), torch.empty_like(weight), drest, doffset

    @register_flop_formula(op.slim_pointwise)
    def _(x: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
        return 2 * prod(out_shape) * x[1]

    @register_flop_formula(op.slim_pointwise_backward)
    def _(dy: Any, x: Any, *_: Any, **__: Any) -> int:
        return 4 * prod(dy) * x[1]


is_compiled = compiled.there(_describe)
