"""Rules for functions of one operand, value by value."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from sacl_fast.ops.batch_norm_act import ACTIVATIONS, Activation
from sacl_fast.slim.operations import COPIES, ELEMENTWISE
from sacl_fast.slim.parts import for_part
from sacl_fast.slim.rules.registry import rule_for
from sacl_fast.slim.tensor import SlimTensor, by_part, from_parts

_AFTER_NORM = [name for name in ACTIVATIONS if name != "none"]


@rule_for(*ELEMENTWISE, *COPIES, *(f"{name}_" for name in ELEMENTWISE))
def elementwise(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(x, SlimTensor) or any(has_channels(a) for a in (*args, *kwargs.values())):
        return NotImplemented
    values = [func(p.values, *args, **kwargs) for p in x.parts]
    if all(v is p.values for v, p in zip(values, x.parts, strict=True)):  # in place, or no change
        return x.become(x)
    return from_parts([p._replace(values=v) for p, v in zip(x.parts, values, strict=True)], x.shape)


def has_channels(argument: Any) -> bool:
    """Whether an argument is more than a single number."""
    return isinstance(argument, Tensor) and argument.ndim > 0


@rule_for(*_AFTER_NORM, *(f"{name}_" for name in _AFTER_NORM))
def activation(func: Any, x: Any, *inplace: bool, **named: bool) -> Any:
    """One that a batch norm may wait for. Its only other argument is ``inplace``; with a slope,
    say, it is another function."""
    given = (*inplace, *named.values())
    if not isinstance(x, SlimTensor) or not x.waits_for_activation:
        return elementwise(func, x, *inplace, **named)
    if not all(isinstance(value, bool) for value in given):
        return elementwise(func, x, *inplace, **named)
    name = func.__name__
    in_place = name.endswith("_") or any(given)
    return x.activated(cast(Activation, name.removesuffix("_")), in_place=in_place)


@rule_for("hardtanh", "hardtanh_")
def hardtanh(func: Any, x: Any, *args: Any, **named: Any) -> Any:
    """Between 0 and 6 it is ``relu6``, and what ``nn.ReLU6`` calls. (``clamp`` between them is
    not: its gradient at 0 and at 6 is 1, where that of ``relu6`` is 0.)"""
    given = dict(zip(("min_val", "max_val", "inplace"), args, strict=False)) | named
    bounds = given.get("min_val"), given.get("max_val")
    if not isinstance(x, SlimTensor) or not x.waits_for_activation or bounds != (0, 6):
        return elementwise(func, x, *args, **named)
    in_place = func.__name__.endswith("_") or given.get("inplace", False)
    return x.activated("relu6", in_place=in_place)


@rule_for("prelu")
def prelu(func: Any, x: Any, weight: Tensor) -> Any:
    if not isinstance(x, SlimTensor) or weight.numel() not in (1, x.shape[1]):
        return NotImplemented
    slopes = weight.view(1, -1, 1, 1)
    return by_part(x, lambda p: func(p.values, for_part(slopes, p).flatten()))


@rule_for("dropout", "dropout2d", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
def dropout(
    func: Any, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    # An active one draws a number for every value, as many as the dense tensor has.
    return input if not training or p == 0 else NotImplemented


@rule_for("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor")
def new(func: Any, x: SlimTensor, *args: Any, **kwargs: Any) -> Tensor:
    return func(x.parts[0].values, *args, **kwargs)
