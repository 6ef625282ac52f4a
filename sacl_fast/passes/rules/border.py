"""Rules for what zero padding makes of constants: a chain of small operators that is one.

Constants that a depthwise convolution reads become a map, which a norm and a 1x1 convolution turn
into an offset of the live channels (``ops.slim_border``).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sacl_fast.ops.slim_border import LARGEST_WINDOW
from sacl_fast.passes.fusion import Rows, Writer, rule_for

_ops, _aten = torch.ops.sacl_fast, torch.ops.aten


@dataclass(frozen=True)
class Chain:
    """The operators, in the old graph."""

    constants: fx.Node  # (1, R, 1, 1)
    image: fx.Node  # they, at every pixel
    convolution: fx.Node
    norm: fx.Node
    pointwise: fx.Node

    def border(self, w: Writer) -> list[int]:
        """Rows at the top and the bottom, and columns at the left and the right, where the offset
        varies."""
        weight: Any = self.convolution.args[1]
        window: Any = self.convolution.args[3:]
        sizes = w.form(self.image).shape[2:], w.form(self.convolution).shape[2:]
        sides = zip(*sizes, w.form(weight).shape[1:], *window, strict=True)
        return [count for side in sides for count in _beyond(*side)]


def _beyond(size: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> Any:
    """The first and the last outputs of a side whose windows leave the image."""
    inside = [
        i * stride >= padding and i * stride - padding + (kernel - 1) * dilation < size
        for i in range(out)
    ]
    first = inside.index(True) if True in inside else out
    return first, 0 if first == out else inside[::-1].index(True)


def chain_of(w: Writer, convolution: Any) -> Chain | None:
    """The chain that a depthwise convolution begins."""
    if convolution.target is not _ops.depthwise_conv.default:
        return None
    image, weight, index, *_ = convolution.args
    constants = image
    while constants.target in (_aten.clone.default, _aten.expand.default):
        constants = constants.args[0]
    b, _, *size = w.form(constants).shape
    small = (b, *size) == (1, 1, 1) and max(w.form(weight).shape[1:]) <= LARGEST_WINDOW
    if not small or index is None or weight.target is not _aten.index_select.default:
        return None
    norm: Any = w.only_user(convolution)
    if norm is None or norm.target is not _ops.batch_norm_act.default:
        return None
    (y, *others) = (user for user in w.users(norm) if user.args[1] in (0, 1))
    pointwise: Any = None if others or y.args[1] else w.only_user(y)
    if pointwise is None or pointwise.target is not _ops.slim_pointwise.default:
        return None
    kept, offset = norm.args[3], pointwise.args[6]
    fits = pointwise.args[0] is y and kept is not None and offset is None
    return Chain(constants, image, convolution, norm, pointwise) if fits else None


def chain_to(w: Writer, pointwise: Any) -> Chain | None:
    """The chain that a 1x1 convolution ends."""
    y = pointwise.args[0] if pointwise.target is _ops.slim_pointwise.default else None
    norm = y.args[0] if y is not None and y.target is operator.getitem else None
    if norm is None or norm.target is not _ops.batch_norm_act.default:
        return None
    return chain_of(w, norm.args[0])


def border_of(w: Writer, map: fx.Node) -> list[int]:
    """Where a map (1, O, H, W) varies, see ``norm_act_offset_gradient``; empty if that is not
    known."""
    chain = chain_to(w, map)
    return [] if chain is None else chain.border(w)


def write(w: Writer, chain: Chain) -> fx.Node:
    """The operator of a chain, forward; gives the offset."""
    _, weight, index, *window = chain.convolution.args
    _, norm_weight, norm_bias, kept, _, *statistics = chain.norm.args
    _, matrix, map_index, out_index, rest, rest_index, _ = chain.pointwise.args
    constants, filters = w.view(w.read(chain.constants), -1), w.value(weight)
    assert isinstance(filters, Rows)
    read = w.form(chain.image).shape[2:], *window
    before = constants, filters.of, filters.index, w.read(index), *read[0], *read[1:]
    norm = map(w.read, (norm_weight, norm_bias, kept, *statistics))
    rest = None if rest is None else w.view(w.read(rest), -1)
    after = w.read(matrix), w.read(map_index), w.read(out_index), rest, w.read(rest_index)
    offset, saved = w.outputs(2, _ops.slim_border, *before, *norm, *after)
    *_, act = statistics
    w.chains[offset] = (saved, *before, *map(w.read, (norm_weight, norm_bias, kept)), act, *after)
    return offset


class Within:
    """The value of what lies within a chain, forward or backward."""


@dataclass(frozen=True)
class Gradients(Within):
    """Those that the backward of a chain gave at once."""

    constants: fx.Node
    filters: fx.Node
    norm_weight: fx.Node
    norm_bias: fx.Node


def write_backward(w: Writer, doffset: fx.Node, chain: Chain) -> tuple[Any, ...]:
    """What the 1x1 convolution's backward gives: the gradients further down, dweight, drest."""
    saved = w.chains[w.values[chain.pointwise]]
    precise = w.precise.get(w.value(doffset))
    if precise is None:
        precise = w.cast(w.read(doffset), w.form(doffset).dtype, torch.float32)
    *found, dweight, drest = w.outputs(6, _ops.slim_border_backward, precise, *saved)
    drest = w.view(drest, 1, -1)
    constants, filters, norm_weight, norm_bias = found
    w.full.add(filters)
    return Gradients(constants, filters, norm_weight, norm_bias), dweight, drest, None


@rule_for(_aten.sum.dim_IntList)
def _sum(
    w: Writer, node: fx.Node, x: fx.Node, dim: Any = None, keep: bool = False, **_: Any
) -> Any:
    value = w.value(x)
    if not isinstance(value, Gradients):
        return NotImplemented
    return w.view(value.constants, *w.form(node).shape)
