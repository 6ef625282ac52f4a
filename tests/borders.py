"""What slim_border is given in tests, and what it then is in float64 by the operators that it
stands for."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sacl_fast.ops.batch_norm_act import ACTIVATIONS, batch_norm_act
from sacl_fast.ops.depthwise_conv import depthwise_conv
from sacl_fast.ops.slim_pointwise import slim_pointwise

# eps: without it the offset would not depend on the constants, and rounding were their gradient.
EPS, MOMENTUM, COUNT = 0.5, 0.1, 500

# (H, W), window, stride, padding, dilation
WINDOWS = [
    ((9, 11), (3, 3), (1, 1), (1, 1), (1, 1)),
    ((9, 11), (3, 3), (2, 2), (1, 1), (1, 1)),
    ((8, 7), (5, 5), (1, 1), (2, 2), (1, 1)),
    ((12, 7), (5, 5), (2, 2), (2, 2), (1, 1)),
    ((15, 9), (7, 7), (1, 1), (3, 3), (1, 1)),
    ((10, 10), (3, 3), (1, 1), (2, 2), (2, 2)),
    ((9, 9), (3, 3), (2, 2), (0, 0), (1, 1)),  # no border
    ((8, 9), (2, 4), (2, 1), (1, 3), (1, 1)),
    ((2, 3), (5, 5), (1, 1), (2, 2), (1, 1)),  # smaller than the window
    ((1, 1), (3, 3), (1, 1), (1, 1), (1, 1)),
    ((6, 6), (3, 3), (1, 1), (4, 4), (1, 1)),  # padding beyond the window
]
CLASSES = [9, 9, 25, 9, 49, 9, 1, 21, 6, 1, 49]


class Call(NamedTuple):
    """What slim_border is given."""

    constants: Tensor
    filters: Tensor
    filter_index: Tensor
    in_index: Tensor
    H: int
    W: int
    stride: Any
    padding: Any
    dilation: Any
    norm_weight: Tensor
    norm_bias: Tensor
    norm_index: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    count: int
    momentum: float
    eps: float
    act: int
    weight: Tensor
    map_index: Tensor
    out_index: Tensor | None
    rest: Tensor | None
    rest_index: Tensor | None

    @property
    def of_backward(self) -> tuple:
        return *self[:12], *self[17:]


def call(window, act=2, sizes=(14, 6, 5, 7), dtype=torch.float64, with_rest=True) -> Call:
    """sizes: channels between the convolutions, filters that read a constant, outputs, constants
    of the rest."""
    (H, W), kernel, stride, padding, dilation = window
    C, S, outputs, R = sizes
    generator = torch.Generator().manual_seed(H + W + S)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    order = torch.randperm(C, generator=generator)
    vectors = normal(4, C).to(torch.float64 if dtype == torch.float64 else torch.float32)
    vectors[3].abs_()
    return Call(
        normal(S + 3), normal(C, *kernel), order[:S],
        torch.randperm(S + 3, generator=generator)[:S], H, W, stride, padding, dilation,
        vectors[0].clone(), vectors[1].clone(), order[:S], vectors[2].clone(), vectors[3].clone(),
        COUNT, MOMENTUM, EPS, act,
        normal(outputs + 2, C), order[:S],
        torch.randperm(outputs + 2, generator=generator)[:outputs],
        normal(R) if with_rest else None, order[S : S + R] if with_rest else None,
    )  # fmt: skip


def chained(given: Call) -> Tensor:
    """The offset by the operators that slim_border stands for."""
    name: Any = list(ACTIVATIONS)[given.act]
    map = depthwise_conv(
        given.constants.view(1, -1, 1, 1), given.filters.unsqueeze(1), given.in_index,
        given.filter_index, stride=given.stride, padding=given.padding, dilation=given.dilation,
        size=(given.H, given.W), backend="torch",
    )  # fmt: skip
    map, _, _ = batch_norm_act(
        map, given.norm_weight, given.norm_bias, given.running_mean, given.running_var,
        momentum=given.momentum, eps=given.eps, act=name, kept_index=given.norm_index,
        count=given.count, backend="torch",
    )  # fmt: skip
    rest = None if given.rest is None else given.rest.view(1, -1, 1, 1)
    return slim_pointwise(
        map, given.weight[:, :, None, None], given.map_index, given.out_index, rest,
        given.rest_index, backend="torch",
    )  # fmt: skip


PARAMETERS = ("constants", "filters", "norm_weight", "norm_bias", "weight", "rest")
STATISTICS = ("running_mean", "running_var")


def copied(given: Call) -> Call:
    """With statistics, which an operator changes, and parameters of its own."""
    own = {n: getattr(given, n) for n in (*STATISTICS, *PARAMETERS)}
    return given._replace(**{n: v if v is None else v.clone() for n, v in own.items()})


def exact(given: Call, doffset: Tensor | None = None) -> tuple[Tensor, Call, list[Tensor]]:
    """The offset, what was given with its statistics updated, and gradients, in float64."""
    tensors = {n: getattr(given, n) for n in (*PARAMETERS, *STATISTICS)}
    leaves = given._replace(**{n: v if v is None else v.double() for n, v in tensors.items()})
    leaves = copied(leaves)
    of = [t.requires_grad_() for n in PARAMETERS if (t := getattr(leaves, n)) is not None]
    offset = chained(leaves)
    doffset = gradient_of(offset) if doffset is None else doffset.double()
    grads = list(torch.autograd.grad(offset, of, doffset))
    return offset.detach(), leaves, grads + [offset.new_empty(0)] * (len(PARAMETERS) - len(of))


def gradient_of(offset: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(offset.shape, generator=generator, dtype=torch.float64)
    return normal.to(offset.dtype).contiguous(memory_format=torch.channels_last)
