"""Whether batch norms of constant channels make a slim encoder's gradients grow.

A zeroed filter leaves a constant channel behind, 0 where the norm's bias is 0, as in an untrained
encoder. Its batch norm multiplies gradients by ``weight / sqrt(eps)``, 316 times the weight. As a
rule they end there, at the zeroed filter before it. But where a kept filter, an addition or nothing
at all stands between a constant and a norm, gradients go on, through one such norm in MobileNets
with squeeze-excite, and through thirty in a row in RepViT, whose residual stream has channels that
no block fills: 1e30 (``benchmarks/results/constant_channels.json`` has some eighty encoders).

So it is measured, before training, with the encoder's own code, rather than read from its modules.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sacl_fast.slim.slicer import NormGradient, Slicer

TOO_MUCH = 100.0
"""Growth from which gradients are damped. It was at most 50 in the encoders that train well, and
500 or more where a rate that suits the dense encoder is too high for the slim one."""
_IMAGES = 4


def gradient_growth(slicer: Slicer, image_size: int, in_chans: int = 3) -> float:
    """How many times larger the slim encoder's largest gradient of a batch norm is than with
    ``norm_gradient="damped"``.

    Of a copy whose batch norms have scale 1 and bias 0, so that constants are 0, in mode ``mask``,
    for a few random images and a random linear function of the features. 1 where no filter is
    zeroed; infinite where the gradient is not finite. Encoder, slicer and torch's random state are
    left as they are.
    """
    if slicer.ratio == 1 or not slicer.masks:
        return 1.0
    encoder, copied = copy.deepcopy((slicer.encoder, slicer))
    copied.enabled = True
    norms = [m for m in (*encoder.modules(), *copied.modules()) if isinstance(m, _BatchNorm)]
    for norm in norms:
        norm.reset_parameters()
    first = next(encoder.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images = torch.randn(_IMAGES, in_chans, image_size, image_size).to(first)
        exact = _largest_gradient(encoder.train(), copied, norms, images, "exact")
        bounded = _largest_gradient(encoder, copied, norms, images, "damped")
    return exact / bounded if math.isfinite(exact) and bounded > 0 else math.inf


def _largest_gradient(
    encoder: nn.Module,
    slicer: Slicer,
    norms: list[_BatchNorm],
    images: torch.Tensor,
    norm_gradient: NormGradient,
) -> float:
    """Of the batch norms' parameters, 0 if there are none."""
    torch.manual_seed(1)  # for both ways the same, drop paths too
    slicer.norm_gradient = norm_gradient
    encoder.zero_grad()
    slicer.zero_grad()
    with slicer.mode("mask"):
        features = encoder(images)
    (features * torch.randn_like(features)).sum().backward()
    gradients = [
        p.grad.abs().max() for norm in norms for p in norm.parameters() if p.grad is not None
    ]
    return torch.stack(gradients).max().item() if gradients else 0.0
