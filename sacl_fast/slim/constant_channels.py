"""Whether batch norms of constant channels make a slim encoder's gradients grow.

A zeroed filter leaves a constant channel behind, 0 where the norm's bias is 0, as in an untrained
encoder. Its batch norm multiplies gradients by ``weight / sqrt(eps)``, 316 times the weight. As a
rule they end there, at the zeroed filter before it. But where a kept filter, an addition or nothing
at all stands between a constant and a norm, gradients go on: through one such norm in MobileNet-V3,
and in RepViT, where no block fills some channels of the residual stream, through thirty in a row,
to 1e30 (``benchmarks/results/constant_channels.json``). One is a factor, several are a hazard.

How many follow one another is found by differentiating, not read from the modules: if each of
these norms multiplied gradients by ``t`` more, the largest gradient would grow with the power of
``t`` that is asked for.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sacl_fast.slim.slicer import Slicer

_IMAGES, _SIDE = 4, 64  # what is constant does not depend on the size of an image
_LOW, _HIGH = 1e4, 1e5
_CONSTANT = 1e-3  # of eps: the variance of what is constant, or all but constant


def constant_norms_in_a_row(slicer: Slicer, image_size: int, in_chans: int = 3) -> float:
    """Through how many batch norms of constant channels, one after another, a gradient of the slim
    encoder passes; about a whole number.

    It depends on the architecture alone: found with random images on a copy in float64 that has
    weights of its own, and batch norms of scale 1 and bias 0, so that all constants are 0. Infinite
    where gradients are not finite. Encoder, slicer and torch's random state are left as they are.
    """
    if slicer.ratio == 1 or not slicer.masks:
        return 0.0
    encoder, copied = copy.deepcopy((slicer.encoder, slicer))
    encoder, copied = encoder.double().train(), copied.double()
    copied.enabled, copied.norm_gradient = True, "exact"
    norms = {m for m in (*encoder.modules(), *copied.modules()) if isinstance(m, _BatchNorm)}
    factor = [1.0]
    for norm in norms:
        norm.reset_parameters()
        norm.register_forward_pre_hook(lambda *call: _growing(*call, factor))
    side = image_size if _has_fixed_size(encoder) else min(_SIDE, image_size)
    largest = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _, conv in copied._convs:
            nn.init.kaiming_normal_(conv.weight)
        copied.refresh()
        for factor[0] in (_LOW, _HIGH):
            torch.manual_seed(0)
            images = torch.randn(_IMAGES, in_chans, side, side, dtype=torch.float64)
            largest.append(_largest_gradient(encoder, copied, images))
    low, high = largest
    if high == 0:
        return 0.0
    return math.log(high / low) / math.log(_HIGH / _LOW) if high < math.inf else math.inf


def _has_fixed_size(encoder: nn.Module) -> bool:
    return bool(getattr(encoder, "pretrained_cfg", {}).get("fixed_input_size", False))


def _growing(norm: nn.Module, arguments: tuple[Any, ...], factor: list[float]) -> Any:
    """Multiply the gradient of constant channels that a norm is given."""
    x, *rest = arguments
    if not x.requires_grad:
        return None
    variance = x.detach().var([0, *range(2, x.ndim)], correction=0)
    scale = torch.where(variance < _CONSTANT * norm.eps, factor[0], 1.0)  # type: ignore[operator]
    scale = scale.view(1, -1, *[1] * (x.ndim - 2))
    x = x.view_as(x)
    x.register_hook(lambda gradient: gradient * scale)
    return x, *rest


def _largest_gradient(encoder: nn.Module, slicer: Slicer, images: Tensor) -> float:
    """Of the slim encoder's parameters, for a random linear function of the features."""
    encoder.zero_grad()
    slicer.zero_grad()
    with slicer.mode("mask"):
        features = encoder(images)
    (features * torch.randn_like(features)).sum().backward()
    parameters = (*encoder.parameters(), *slicer.parameters())
    gradients = [p.grad.abs().max() for p in parameters if p.grad is not None]
    return torch.stack(gradients).max().item()
