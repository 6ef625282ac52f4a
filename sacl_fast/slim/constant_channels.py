"""Whether batch norms of constant channels make a slim encoder's gradients grow.

A zeroed filter leaves a constant channel behind, 0 where the norm's bias is 0, as in an untrained
encoder. Its batch norm multiplies gradients by ``weight / sqrt(eps)``, 316 times the weight. As a
rule they end there, at the zeroed filter before it. But where a kept filter, an addition or nothing
at all stands between a constant and a norm, gradients go on: through one such norm in MobileNet-V3,
and in RepViT, where no block fills some channels of the residual stream, through 16 in a row,
to 1e30 (``benchmarks/results/constant_channels.json``). One is a factor, several are a hazard.

How many follow one another is found by differentiating, not read from the modules: if each of
these norms multiplied gradients by ``t`` more, the largest gradient would grow with the power of
``t`` that is asked for.
"""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sacl_fast.errors import reason_of
from sacl_fast.slim.slicer import Slicer

logger = logging.getLogger(__name__)

_IMAGES, _SIDE = 4, 64  # what is constant does not depend on the size of an image
_LOW, _HIGH = 1e4, 1e5
_CONSTANT = 1e-3  # of eps: the variance of what is constant, or all but constant


def constant_norms_in_a_row(slicer: Slicer, image_size: int, in_chans: int = 3) -> float:
    """Through how many batch norms of constant channels, one after another, a gradient of the slim
    encoder passes, but for those right after a zeroed filter; about a whole number.

    It depends on the architecture alone: found with random images on a copy in float64 that has
    weights of its own, and batch norms of scale 1 and bias 0, so that all constants are 0. Infinite
    where gradients are not finite. Encoder, slicer and torch's random state are left as they are.

    Args:
        slicer: in no mode, with an encoder of (N, in_chans, H, W) -> (N, F).
        image_size: side of images that the encoder takes, tried where it does not take 64 px.
    """
    has_norms = any(isinstance(m, _BatchNorm) for m in slicer.encoder.modules())
    if slicer.ratio == 1 or not slicer.masks or not has_norms:
        return 0.0
    obstacle: Exception | None = None
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        probe = Probe(slicer, in_chans)
        for side in (min(_SIDE, image_size), image_size):
            try:
                low = probe.largest_gradient(_LOW, side)
                high = 0.0 if low == 0 else probe.largest_gradient(_HIGH, side)
            except (RuntimeError, AssertionError) as error:
                obstacle = error
                continue
            if high == 0:
                return float(probe.met > 0)
            return math.log(high / low) / math.log(_HIGH / _LOW) if high < math.inf else math.inf
    logger.warning(
        "whether gradients of the slim encoder grow over constant channels cannot be found out, as "
        "it does not run in float64 (%s); slim.norm_gradient damped bounds them in any case",
        reason_of(obstacle) if obstacle else "",
    )
    return 0.0


class Probe:
    """A copy of an encoder, of which batch norms of constant channels multiply gradients by more
    than they do."""

    def __init__(self, slicer: Slicer, in_chans: int) -> None:
        self.encoder, self.slicer = copy.deepcopy((slicer.encoder, slicer))
        self.in_chans = in_chans
        self.factor = 1.0
        self.met = 0
        """norms of constant channels in the last pass"""
        self.encoder.cpu().double().train()
        self.slicer.cpu().double()
        self.slicer.enabled, self.slicer.norm_gradient = True, "exact"
        torch.manual_seed(0)
        for name, mask in self.slicer.masks.items():
            conv = self.encoder.get_submodule(name)
            nn.init.kaiming_normal_(conv.weight)  # type: ignore[arg-type]
            conv.register_forward_hook(lambda *call, kept=mask: setattr(call[2], "kept", kept))
        self.slicer.refresh()
        for part in (self.encoder, self.slicer):
            for module in part.modules():
                if isinstance(module, _BatchNorm):
                    module.reset_parameters()
                    module.register_forward_pre_hook(self._grow)

    def largest_gradient(self, factor: float, side: int) -> float:
        """Of the slim encoder's parameters, for a random linear function of the features; 0 if
        fewer than two norms of constant channels are met on the way to those."""
        self.factor, self.met = factor, 0
        torch.manual_seed(0)
        self.encoder.zero_grad()
        self.slicer.zero_grad()
        images = torch.randn(_IMAGES, self.in_chans, side, side, dtype=torch.float64)
        with self.slicer.mode("mask"):
            features = self.encoder(images)
        if self.met < 2:
            return 0.0
        (features * torch.randn_like(features)).sum().backward()
        parameters = (*self.encoder.parameters(), *self.slicer.parameters())
        gradients = [p.grad.abs().max() for p in parameters if p.grad is not None]
        return torch.stack(gradients).max().item()

    def _grow(self, norm: nn.Module, arguments: tuple[Any, ...]) -> Any:
        """Multiply the gradient of the constant channels that a norm is given."""
        x, *rest = arguments
        if not x.requires_grad:
            return None
        variance = x.detach().var([0, *range(2, x.ndim)], correction=0)
        constant = variance < _CONSTANT * norm.eps  # type: ignore[operator]
        kept: Tensor | None = getattr(x, "kept", None)
        if kept is not None:
            constant &= kept
        if not constant.any():
            return None
        self.met += 1
        scale = torch.where(constant, self.factor, 1.0).view(1, -1, *[1] * (x.ndim - 2))
        x = x.view_as(x)
        x.register_hook(lambda gradient: gradient * scale)
        return x, *rest
