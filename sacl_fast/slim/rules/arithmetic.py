"""Rules for functions of two operands, value by value."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sacl_fast.ops.slim_add import slim_add
from sacl_fast.ops.slim_channels import assemble
from sacl_fast.ops.slim_conv import BACKEND
from sacl_fast.ops.slim_gate import slim_gate
from sacl_fast.slim.channels import (
    all_channels,
    channels,
    common,
    complement,
    joined,
    live_in_either,
    missing,
    shifted,
)
from sacl_fast.slim.operations import ARITHMETIC, BETWEEN, IN_PLACE, REVERSED
from sacl_fast.slim.parts import Part, for_part, select, split
from sacl_fast.slim.rules.elementwise import has_channels
from sacl_fast.slim.rules.registry import forms, rule_for
from sacl_fast.slim.tensor import KeptFilters, SlimTensor, by_part, dense, from_parts

_SUMS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}
_PRODUCTS = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__}
_NO_PART = Part(channels(()), torch.empty(1, 0, 1, 1))


@rule_for(*ARITHMETIC, *BETWEEN, *REVERSED)
def arithmetic(func: Any, a: Any, b: Any, **kwargs: Any) -> Any:
    x, y = (a, b) if isinstance(a, SlimTensor) else (b, a)
    if not isinstance(x, SlimTensor) or isinstance(y, KeptFilters) or "out" in kwargs:
        return NotImplemented
    if isinstance(y, Tensor) and y.shape == x.shape and func in _SUMS and not kwargs:
        total = _sum(x, y)
        if total is not None:
            return total
    if isinstance(y, SlimTensor):
        return _two_slim(func, a, b, kwargs) if x.shape == y.shape else NotImplemented
    if not has_channels(y):
        return by_part(x, lambda p: _ordered(func, a is x, p.values, y, kwargs))
    if y.ndim > 4 or torch.broadcast_shapes(x.shape, y.shape) != x.shape:
        return NotImplemented
    y = y.reshape(*[1] * (4 - y.ndim), *y.shape)
    if y.stride()[2:] == (0, 0):  # a gate that was expanded over the image
        y = y[:, :, :1, :1]
    if y.shape == (*x.shape[:2], 1, 1) and func in _PRODUCTS and not kwargs:
        return _gated(x, y)
    return by_part(x, lambda p: _ordered(func, a is x, p.values, for_part(y, p), kwargs))


def _sum(x: SlimTensor, y: Tensor) -> Tensor | None:
    """Of activations that are live or constant for all samples; None for others."""
    operands = []
    for operand in (x, y):
        slim = isinstance(operand, SlimTensor)
        live, *rest = operand.parts if slim else [Part(all_channels(y.shape[1]), operand)]
        if len(rest) > 1 or any(p.values.shape[::2] != (1, 1) or not p.is_constant for p in rest):
            return None
        operands.append((live, rest[0] if rest else _NO_PART))
    (live_a, rest_a), (live_b, rest_b) = operands
    if live_a.values.dtype != live_b.values.dtype:
        return None
    lists = [p.channels for operand in operands for p in operand]
    either, *positions = live_in_either(*lists, x.device)
    given = []
    for (live, rest), own in zip(operands, positions, strict=True):
        constants = rest.values if len(rest.channels) else None
        given += [live.values, constants, own.index(x.device, len(live.channels))]
    parts = [Part(either, slim_add(*given, backend=BACKEND.get()))]
    both, in_a, _ = common(rest_a.channels, complement(either, x.shape[1]))
    if len(both):
        _, _, in_b = common(both, rest_b.channels)
        constants = select(rest_a, in_a, both).values + select(rest_b, in_b, both).values
        parts.append(Part(both, constants))
    return from_parts(parts, x.shape)


def _gated(x: SlimTensor, gate: Tensor) -> Tensor:
    """Times (N, C, 1, 1): what was the same for all samples is so no more."""
    live, *rest = x.parts
    is_map = [p.values.shape == (1, len(p.channels), *x.shape[2:]) for p in rest]
    mapped = rest.pop(is_map.index(True)) if any(is_map) else None
    is_constant = [p.values.shape == (1, len(p.channels), 1, 1) for p in rest]
    if mapped and any(is_constant):
        wanted = missing(len(live.channels) + len(mapped.channels), x.device)
        mapped, others = _with_some(mapped, rest.pop(is_constant.index(True)), wanted)
        rest.append(others)
    index = [None if p is None else p.channels.index(x.device, x.shape[1]) for p in (live, mapped)]
    values = slim_gate(
        *(live.values, mapped.values if mapped else None, gate, *index), backend=BACKEND.get()
    )
    own = joined(live.channels, mapped.channels) if mapped else live.channels
    others = [p._replace(values=p.values * for_part(gate, p)) for p in rest]
    return from_parts([Part(own, values), *others], x.shape)


def _with_some(mapped: Part, constant: Part, count: int) -> tuple[Part, Part]:
    """The map and the first ``count`` constants, and the other constants; all of them where there
    are not as many."""
    if not 0 < count <= len(constant.channels):
        return mapped, constant
    chosen, others = split(constant, count)
    own = joined(mapped.channels, chosen.channels)
    positions = (
        all_channels(len(mapped.channels)),
        shifted(all_channels(count), len(mapped.channels)),
    )
    values = assemble(
        torch.Size((1, len(own), *mapped.values.shape[2:])),
        [mapped.values, chosen.values],
        [p.on(mapped.values.device) for p in positions],
    )
    return Part(own, values), others


def _ordered(func: Any, first: bool, x: Tensor, y: Any, kwargs: dict[str, Any]) -> Tensor:
    return func(x, y, **kwargs) if first else func(y, x, **kwargs)


def _two_slim(func: Any, a: SlimTensor, b: SlimTensor, kwargs: dict[str, Any]) -> Tensor:
    """Each pair of parts meets in the channels that both hold."""
    parts = []
    for p in a.parts:
        for q in b.parts:
            both, in_p, in_q = common(p.channels, q.channels)
            if len(both):
                pair = select(p, in_p, both).values, select(q, in_q, both).values
                parts.append(Part(both, func(*pair, **kwargs)))
    return from_parts(parts, a.shape)


_WITHOUT_CHANGE = {
    function: getattr(torch, name)
    for in_place, name in IN_PLACE.items()
    for function in forms(in_place)
}


@rule_for(*IN_PLACE)
def arithmetic_in_place(func: Any, a: Any, b: Any, **kwargs: Any) -> Any:
    if not isinstance(a, SlimTensor):
        return func(a, dense(b), **kwargs)
    result = arithmetic(_WITHOUT_CHANGE[func], a, b, **kwargs)
    if result is NotImplemented or result.shape != a.shape:
        return NotImplemented
    return a.become(result if result.dtype == a.dtype else result.to(a.dtype))


@rule_for("expand_as")
def expand_as(func: Any, x: Any, other: Tensor) -> Any:
    return NotImplemented if isinstance(x, SlimTensor) else x.expand(other.shape)
