"""Rules for what looks at pixels together: pooling and padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sacl_fast.ops.slim_channels import image_mean
from sacl_fast.slim.parts import as_image
from sacl_fast.slim.rules.registry import rule_for
from sacl_fast.slim.tensor import SlimTensor, by_part, from_parts

_ONE_PIXEL = ((1,), ((1, 1),), ([1, 1],))
_AVERAGES_OF_WINDOWS = {F.avg_pool2d, F.lp_pool2d}


@rule_for("max_pool2d", "avg_pool2d", "lp_pool2d")
@rule_for("adaptive_avg_pool2d", "adaptive_max_pool2d")
def pool(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(x, SlimTensor):
        return NotImplemented
    # Zeros that an average counts make it differ at the border; so the constant is pooled as an
    # image, one for all samples, and nothing has to be known about the arguments.
    border_differs = func in _AVERAGES_OF_WINDOWS
    if func is F.adaptive_avg_pool2d and args in _ONE_PIXEL and not kwargs:
        return _mean(x)
    live = func(x.parts[0].values, *args, **kwargs)
    if not isinstance(live, Tensor):  # with the indices of the maxima
        return NotImplemented
    parts = [x.parts[0]._replace(values=live)]
    for p in x.parts[1:]:
        if p.is_constant and not border_differs:
            parts.append(p._replace(values=p.values.clone()))
        else:
            parts.append(p._replace(values=func(as_image(p, x.shape), *args, **kwargs)))
    return from_parts(parts, torch.Size((*x.shape[:2], *live.shape[2:])))


@rule_for("mean", "amax", "amin")
def over_the_image(func: Any, x: Any, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    if not isinstance(x, SlimTensor) or not isinstance(dim, tuple | list):
        return NotImplemented
    if kwargs or sorted(d % 4 for d in dim) != [2, 3]:
        return NotImplemented
    if func in (torch.mean, Tensor.mean):
        out = _mean(x)
    else:
        out = _of_each(x, lambda values: func(values, (2, 3), True))
    return out if keepdim else out.flatten(1)


def _mean(x: SlimTensor) -> Tensor:
    return _of_each(x, lambda values: values if values.shape[2:] == (1, 1) else image_mean(values))


def _of_each(x: SlimTensor, over_the_image: Callable[[Tensor], Tensor]) -> Tensor:
    parts = [p._replace(values=over_the_image(p.values)) for p in x.parts]
    return from_parts(parts, torch.Size((*x.shape[:2], 1, 1)))


@rule_for("pad")
def pad_borders(
    func: Any, x: Any, pad: Any, mode: str = "constant", value: float | None = None
) -> Any:
    if not isinstance(x, SlimTensor) or len(pad) > 4:
        return NotImplemented
    if not any(pad):
        return x if mode != "constant" else by_part(x, lambda p: p.values.clone())
    live = func(x.parts[0].values, pad, mode, value)
    parts = [x.parts[0]._replace(values=live)]
    for p in x.parts[1:]:
        if p.is_constant and mode != "constant":
            parts.append(p._replace(values=p.values.clone()))
        else:
            parts.append(p._replace(values=func(as_image(p, x.shape), pad, mode, value)))
    return from_parts(parts, torch.Size((*x.shape[:2], *live.shape[2:])))
