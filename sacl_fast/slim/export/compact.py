"""The slim encoder as an ordinary, smaller module for deployment, equal to it in eval mode.

A zeroed filter leaves a channel that is a constant in eval mode as well: batch norm and
activation of 0. The encoder's graph is walked with the channels of each activation split in three:

- live: computed, by layers cut down to them;
- constant: known now, and folded into the bias of the convolution that reads them. Where zero
  padding makes their share vary at the border it is a convolution of an image of ones, one
  channel and one sample whatever the batch, so it is exact at any input size;
- by sample: a constant times a squeeze-excite gate, (N, C, 1, 1), read by a 1x1 convolution.

Padded depthwise filters that read a constant become live, and an operation that is not known here
is given the whole activation. The result is a ``torch.fx.GraphModule`` of the encoder's own kinds
of layers and torch functions; nothing in it refers to sacl_fast, and ``print(module.code)`` shows
all that it does.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import logging
import os
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from timm.layers._fx import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from sacl_fast.checks import Count, check, checked
from sacl_fast.encoders import load_encoder
from sacl_fast.errors import UserError, reason_of
from sacl_fast.slim.export.graph import without_zeroed_filters
from sacl_fast.slim.export.layers import CONVOLUTIONS

logger = logging.getLogger(__name__)


class Cost(NamedTuple):
    parameters: int
    flops: int
    """Of one image, forward, two for a multiply-add."""


@checked
def cost(module: nn.Module, image_size: Count, in_chans: Count = 3) -> Cost:
    """Parameters of a module and, in eval mode, the FLOPs of its convolutions and matrix products.

    The module is left as it is, its running statistics and its mode too.
    """
    first = next(module.parameters())
    image = torch.zeros(1, in_chans, image_size, image_size, dtype=first.dtype, device=first.device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(module).eval()(image)
    return Cost(sum(p.numel() for p in module.parameters()), counter.get_total_flops())


def compact(
    encoder: nn.Module,
    masks: Mapping[str, Tensor],
    norms: Mapping[str, nn.Module] | None = None,
    *,
    statistics: Literal["slim", "encoder"] = "slim",
    strict: bool = False,
) -> nn.Module:
    """A standalone module that equals the slim encoder in eval mode, on images of any size.

    Args:
        encoder: left as it is.
        masks: ``Slicer.masks``, convolution name -> (Cout,), true where the filter is kept.
        norms: ``Slicer.norms``, batch-norm name -> the slim encoder's own, where it has some.
        statistics: of batch norms. ``slim``: those estimated for the slim encoder, which ``masks``
            know after ``Slicer.recalibrate`` and in the last checkpoint of a run. ``encoder``: the
            encoder's as they are; after training these are of two networks and of no use to either.
        strict: raise where the module would be no smaller.

    Returns:
        A module in eval mode. Where the encoder cannot be made smaller (its code branches on
        values, its convolutions are of a kind that is not known here), the whole of it with zeroed
        filters: equal, at full size; a warning says why.

    Raises:
        UserError: ``statistics`` is ``slim``, and they have not been estimated; or, if ``strict``,
            why the encoder cannot be made smaller.
    """
    check(statistics, Literal["slim", "encoder"], "statistics")
    check(strict, bool, "strict")
    encoder = _plain_copy(encoder)
    modules = dict(encoder.named_modules())
    if unknown := [name for name in masks if not isinstance(modules.get(name), nn.Conv2d)]:
        raise UserError(f"masks name {unknown[0]!r}, which is no convolution of the encoder")
    for name, norm in (norms or {}).items():
        own = copy.deepcopy(norm).eval().requires_grad_(False)
        parent, _, child = name.rpartition(".")
        setattr(encoder.get_submodule(parent), child, own)
    if statistics == "slim" and not all(mask.all() for mask in masks.values()):
        own = getattr(masks, "statistics", None)
        if own is None and not norms and _has_statistics(encoder):
            raise UserError(
                "the slim encoder's batch-norm statistics are not known, and the encoder's are not "
                "its own: slicer.recalibrate(batches of images) estimates them, and a run's "
                "encoder_slim.safetensors and last checkpoint have them (statistics='encoder' "
                "takes the encoder's)"
            )
        for name, value in (own or {}).items():
            encoder.get_buffer(name).copy_(value)
    for name, mask in masks.items():
        for p in encoder.get_submodule(name).parameters(recurse=False):
            p.mul_(mask.to(p.device).view(-1, *[1] * (p.ndim - 1)))
    return _compacted(encoder, masks, strict)


def load_compact(path: str | os.PathLike[str], *, strict: bool = False) -> nn.Module:
    """The slim encoder of a run as a smaller module, from its ``encoder_slim.safetensors``.

    Args:
        strict: raise where the module would be no smaller.

    Returns:
        As ``compact``: in eval mode, for images (N, 3, H, W) of any size, normalised by the
        ``mean`` and ``std`` in the file's metadata (``encoders.read_encoder_metadata``).

    Raises:
        UserError: there is no such file, or it does not say which encoder it holds; or, if
            ``strict``, why the encoder cannot be made smaller.
    """
    check(strict, bool, "strict")
    return compact_zeroed(load_encoder(path), strict=strict)


def compact_zeroed(encoder: nn.Module, *, strict: bool = False) -> nn.Module:
    """An encoder in which filters are zeros, such as ``Slicer.slim_state`` gives, as a smaller
    module; see ``load_compact``. ``encoder`` is left as it is."""
    encoder = _plain_copy(encoder)
    # A filter of zeros gives a constant, whoever zeroed it.
    masks = {
        name: torch.stack([p.flatten(1).any(1) if p.ndim > 1 else p != 0 for p in parameters]).any(
            0
        )
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Conv2d) and (parameters := list(module.parameters(recurse=False)))
    }
    return _compacted(encoder, masks, strict)


def _plain_copy(encoder: nn.Module) -> nn.Module:
    """A copy in eval mode, without gradient; in mode ``mask``, with the masked weights as its
    parameters."""
    masked = [
        (name, key, value.detach().clone())
        for name, module in encoder.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, Tensor) and key in ("weight", "bias")
    ]
    memo = {id(getattr(encoder.get_submodule(name), key)): value for name, key, value in masked}
    copied = copy.deepcopy(encoder, memo).eval().requires_grad_(False)
    for name, key, value in masked:
        module = copied.get_submodule(name)
        delattr(module, key)
        module.register_parameter(key, nn.Parameter(value, requires_grad=False))
    return copied


def _has_statistics(encoder: nn.Module) -> bool:
    return any(isinstance(m, _BatchNorm) and m.track_running_stats for m in encoder.modules())


def _compacted(encoder: nn.Module, masks: Mapping[str, Tensor], strict: bool) -> nn.Module:
    """An encoder with zeroed filters, without them; of a convolution without any other, one stays,
    as torch has no layer without channels."""
    masks = {name: mask if mask.any() else _first(mask) for name, mask in masks.items()}
    module, obstacle = _without_zeroed_filters(encoder, masks)
    if obstacle is not None:
        if strict:
            raise UserError(f"the slim encoder cannot be made smaller, since {obstacle}")
        logger.warning("the slim encoder keeps its full size, since %s", obstacle)
    return module


def _first(mask: Tensor) -> Tensor:
    return torch.arange(len(mask), device=mask.device) == 0


def _without_zeroed_filters(
    encoder: nn.Module, masks: Mapping[str, Tensor]
) -> tuple[nn.Module, str | None]:
    """The smaller module; or one that is no smaller, and why."""
    try:
        traced = fx.GraphModule(encoder, _Tracer().trace(encoder))
    except (TypeError, ValueError, RuntimeError, AttributeError, AssertionError, KeyError) as error:
        return encoder, f"its code cannot be followed: {reason_of(error)}"
    if not _with_shapes(traced):
        return encoder, "it takes no image tried"
    module = without_zeroed_filters(traced, masks)
    if all(mask.all() for mask in masks.values()) or _size(module) < _size(encoder):
        return module, None
    return module, _kinds_that_stay(encoder, masks)


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _kinds_that_stay(encoder: nn.Module, masks: Mapping[str, Tensor]) -> str:
    """A sentence on convolutions with zeroed filters, none of which could be cut."""
    slim = [encoder.get_submodule(name) for name, mask in masks.items() if not mask.all()]
    kinds = {type(m).__name__ for m in slim if type(m) not in CONVOLUTIONS}
    if not kinds:
        return "its slim convolutions are grouped or padded with other than zeros"
    known = " and ".join(kind.__name__ for kind in CONVOLUTIONS)
    return f"its slim convolutions are of kind {', '.join(sorted(kinds))}; {known} can be cut"


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
    # Where pixels are moved into channels first, the first convolution has more than images do.
    counts = dict.fromkeys((*(c.in_channels for c in itertools.islice(convs, 1)), 3))
    for size, count in itertools.product((64, 96, 128, 224, 256, 299), counts):
        images = torch.zeros(2, count, size, size, dtype=first.dtype, device=first.device)
        try:
            # ShapeProp prints a traceback of what it raises.
            with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
                ShapeProp(traced).propagate(images)
        except (RuntimeError, AssertionError, ValueError):
            continue
        return True
    return False
