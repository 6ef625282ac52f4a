"""The slim encoder as an ordinary, smaller module for deployment, equal to it in eval mode.

A zeroed filter leaves a channel that is a constant in eval mode as well: batch norm and
activation of 0. The encoder's graph is walked with the channels of each activation split in three:

- live: computed, by layers cut down to them;
- constant: known now, and folded into the bias of the convolution that reads them. Where zero
  padding makes their share vary at the border it is a convolution of an image of ones, one
  channel and one sample whatever the batch, so it is exact at any input size;
- by sample: a constant times a squeeze-excite gate, (N, C, 1, 1), read through a convolution at
  one place.

Padded depthwise filters that read a constant become live, and an operation that is not known here
is given the whole activation. The result is a ``torch.fx.GraphModule`` of the encoder's own kinds
of layers and torch functions; nothing in it refers to sacl_fast, and ``print(module.code)`` shows
all that it does.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import NamedTuple

import torch
from timm.layers._fx import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from sacl_fast.slim.compacter import CONVOLUTIONS, Compacter


class Cost(NamedTuple):
    parameters: int
    flops: int
    """Of one image, forward, two for a multiply-add."""


def cost(module: nn.Module, image_size: int, in_chans: int = 3) -> Cost:
    """Parameters of a module and, in eval mode, the FLOPs of its convolutions and matrix products.

    The module is left as it is, its running statistics and its mode too.
    """
    first = next(module.parameters())
    image = torch.zeros(1, in_chans, image_size, image_size, dtype=first.dtype, device=first.device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(module).eval()(image)
    return Cost(sum(p.numel() for p in module.parameters()), counter.get_total_flops())


def compact(
    encoder: nn.Module, masks: Mapping[str, Tensor], norms: Mapping[str, nn.Module] | None = None
) -> nn.Module:
    """A standalone module that equals the slim encoder in eval mode, on images of any size.

    Args:
        encoder: left as it is.
        masks: ``Slicer.masks``, convolution name -> (Cout,), true where the filter is kept.
        norms: ``Slicer.norms``, batch-norm name -> the slim encoder's own, where it has some.

    Returns:
        A module in eval mode. Where the encoder's graph cannot be followed (its code branches on
        values), the whole encoder with zeroed filters: equal, but not smaller.
    """
    encoder = copy.deepcopy(encoder).eval().requires_grad_(False)
    for name, norm in (norms or {}).items():
        own = copy.deepcopy(norm).eval().requires_grad_(False)
        parent, _, child = name.rpartition(".")
        setattr(encoder.get_submodule(parent), child, own)
    for name, mask in masks.items():
        for p in encoder.get_submodule(name).parameters(recurse=False):
            p.mul_(mask.to(p.device).view(-1, *[1] * (p.ndim - 1)))
    try:
        graph = _Tracer().trace(encoder)
    except (TypeError, ValueError, RuntimeError, AttributeError, AssertionError, KeyError):
        return encoder
    traced = fx.GraphModule(encoder, graph)
    return Compacter(traced, masks).run() if _with_shapes(traced) else encoder


class _Tracer(fx.Tracer):
    """Through everything but torch's layers and those that timm marks as one piece."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        whole = (*get_notrace_modules(), *CONVOLUTIONS, _BatchNorm)
        return isinstance(m, whole) or super().is_leaf_module(m, module_qualified_name)


def _with_shapes(traced: fx.GraphModule) -> bool:
    """Note each value's shape, of two images, at the first size that the encoder accepts."""
    first = next(traced.parameters())
    convs = (m for m in traced.modules() if isinstance(m, nn.Conv2d))
    in_chans = next((c.in_channels for c in convs), 3)
    for size in (64, 96, 128, 224, 256, 299):
        images = torch.zeros(2, in_chans, size, size, dtype=first.dtype, device=first.device)
        try:
            with torch.no_grad():
                ShapeProp(traced).propagate(images)
        except (RuntimeError, AssertionError, ValueError):
            continue
        return True
    return False
