"""An activation's channels in parts, and what moves them from part to part; see ``slim.tensor``.

Data alone: what torch's functions and autograd do with it is told in ``tensor`` and ``rules``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from sacl_fast.ops.batch_norm_act import Activation
from sacl_fast.ops.slim_channels import assemble, take_channels
from sacl_fast.slim.channels import Channels, channels, joined


class Part(NamedTuple):
    """Some channels of an activation, in a form that broadcasts to its full size."""

    channels: Channels
    values: Tensor  # (1 or N, K, 1 or H, 1 or W)

    @property
    def is_constant(self) -> bool:
        """Over the image; it may differ by sample."""
        return self.values.shape[2:] == (1, 1)


def arranged(parts: Sequence[Part], shape: torch.Size) -> tuple[Part, ...]:
    """The parts that are not empty, those of one form joined, a full-size one first."""
    by_form: dict[tuple[int, ...], list[Part]] = {}
    for part in parts:
        if len(part.channels):
            b, _, h, w = part.values.shape
            by_form.setdefault((b, h, w), []).append(part)
    full = (shape[0], *shape[2:])
    live = by_form.pop(full, [])
    rest = [_join(group) for group in by_form.values()]
    if not live and rest and shape.numel():  # an operation needs at least one live channel
        one, others = split(rest[0], 1)
        live = [one._replace(values=one.values.expand(full[0], 1, *full[1:]).contiguous())]
        rest = [p for p in (others, *rest[1:]) if len(p.channels)]
    return (_join(live), *rest)


def is_live(part: Part, shape: torch.Size) -> bool:
    return part.values.shape[::2] == shape[::2] and part.values.shape[3] == shape[3]


def zero_part(zeroed: Channels, parts: Sequence[Part]) -> Part:
    return Part(zeroed, parts[0].values.new_zeros(1, len(zeroed), 1, 1))


def _join(parts: list[Part]) -> Part:
    if len(parts) == 1:
        return parts[0]
    dtype = reduce(torch.promote_types, (p.values.dtype for p in parts))
    values = torch.cat([p.values.to(dtype) for p in parts], 1)
    return Part(joined(*(p.channels for p in parts)), values)


def split(part: Part, count: int) -> tuple[Part, Part]:
    """The first ``count`` channels of a part, and the others."""
    numbers, values = part.channels.numbers, part.values
    return (
        Part(channels(numbers[:count]), values[:, :count]),
        Part(channels(numbers[count:]), values[:, count:]),
    )


def select(part: Part, positions: Channels, chosen: Channels) -> Part:
    """The part's channels at some positions, which are numbered ``chosen``."""
    return Part(chosen, channels_at(part.values, positions))


def channels_at(x: Tensor, positions: Channels) -> Tensor:
    """The channels of (N, C, H, W) at some positions; the tensor itself where that is all."""
    index = positions.index(x.device, x.shape[1])
    return x if index is None else take_channels(x, index)


def for_part(y: Tensor, part: Part) -> Tensor:
    """What of an operand (., C or 1, ., .) belongs to the part's channels."""
    return y if y.shape[1] == 1 else channels_at(y, part.channels)


def as_image(part: Part, shape: torch.Size) -> Tensor:
    """The part's values at every pixel of (N, C, H, W), still for one sample where that is all."""
    values, size = part.values, shape[2:]
    return values if values.shape[2:] == size else values.expand(-1, -1, *size)


Resolve = Callable[[Activation], tuple[Part, ...]]
"""Computes parts that were deferred, with the activation that follows done along with them."""


class Content:
    """The parts of a slim tensor, of which some may still have to be computed.

    Apart from the tensor, so that autograd's node of the tensor can have it and not the tensor,
    which has the node.
    """

    def __init__(
        self,
        computed: tuple[Part, ...],
        shape: torch.Size,
        *,
        zeroed: Channels | None = None,
        resolve: Resolve | None = None,
    ) -> None:
        """
        Args:
            computed: the parts that are there.
            shape: of the tensor.
            zeroed: channels of value 0 besides.
            resolve: computes the parts, where there are none yet.
        """
        self.computed, self.shape, self.zeroed, self.resolve = computed, shape, zeroed, resolve
        self.with_gradient = torch.is_grad_enabled()

    @property
    def is_deferred(self) -> bool:
        return self.resolve is not None

    def resolved(self, act: Activation) -> tuple[Part, ...]:
        """The deferred parts, after an activation."""
        assert self.resolve is not None
        resolve, self.resolve = self.resolve, None
        self.computed = resolve(act)
        return self.computed

    @property
    def parts(self) -> tuple[Part, ...]:
        if self.is_deferred:
            self.resolved("none")
        if self.zeroed is not None:
            zeroed, self.zeroed = self.zeroed, None
            parts = (*self.computed, zero_part(zeroed, self.computed))
            self.computed = arranged(parts, self.shape)
        return self.computed

    def dense(self) -> Tensor:
        (first, *rest) = self.parts
        if not rest and first.channels.in_order:
            return first.values
        values = [p.values.to(first.values.dtype) for p in self.parts]
        indices = [p.channels.on(first.values.device) for p in self.parts]
        return assemble(self.shape, values, indices)
