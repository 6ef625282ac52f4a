"""Layers of an encoder cut down to some of their channels."""

from __future__ import annotations

import copy

from timm.layers import Conv2dSame
from torch import Tensor, nn

from sacl_fast.slim.channels import Channels
from sacl_fast.slim.export.writer import index_of

CONVOLUTIONS = (nn.Conv2d, Conv2dSame)
_POOLS = (nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


def convolution_like(
    conv: nn.Conv2d, weight: Tensor, bias: Tensor | None, groups: int
) -> nn.Conv2d:
    """The same convolution with another weight (O, I / groups, kh, kw)."""
    made = type(conv)(
        weight.shape[1] * groups,
        weight.shape[0],
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        groups,
        bias is not None,
        device="meta",
    )
    made.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias, requires_grad=False)
    return made.eval()


def pointwise_convolution(weight: Tensor) -> nn.Conv2d:
    """Of a weight (O, I, 1, 1)."""
    made = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=False)
    made.weight = nn.Parameter(weight, requires_grad=False)
    return made


def batch_norm_of(norm: nn.Module, chosen: Channels) -> nn.Module:
    """A batch norm, and the activation that is part of it, of some of its channels."""
    made = copy.deepcopy(norm)
    if hasattr(act := getattr(made, "act", None), "inplace"):
        act.inplace = False  # type: ignore[union-attr]
    for kind in (made._parameters, made._buffers):
        for key, value in kind.items():
            if value is not None and value.ndim == 1:
                rows = value.detach()[index_of(chosen)]
                kind[key] = (  # type: ignore[assignment]
                    nn.Parameter(rows, requires_grad=False) if kind is made._parameters else rows
                )
    made.num_features = len(chosen)  # type: ignore[assignment]
    return made


def leaves_constants(module: nn.Module) -> bool:
    """Whether it is a pooling that a constant passes unchanged: no padded zeros count."""
    if type(module) is nn.AvgPool2d:
        whole = module.padding in (0, (0, 0)) and not module.ceil_mode
        return whole and module.divisor_override is None
    return type(module) in _POOLS and not getattr(module, "return_indices", False)
