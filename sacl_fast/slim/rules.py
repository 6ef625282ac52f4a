"""Which operations act on a slim activation part by part, and how.

A rule is registered for every form of a function (``torch.relu``, ``F.relu``, ``Tensor.relu_``).
It is called with the function itself and its arguments, of which at least one is a ``SlimTensor``
or ``KeptFilters``, and returns NotImplemented for arguments that it does not cover. The parts of
a result are new tensors unless torch's own result would share memory with the operand: in-place
operations follow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sacl_fast.ops.batch_norm_act import ACTIVATIONS, Activation
from sacl_fast.ops.slim_add import slim_add
from sacl_fast.ops.slim_conv import BACKEND
from sacl_fast.ops.slim_gate import slim_gate
from sacl_fast.slim.channels import (
    all_channels,
    channels,
    common,
    joined,
    shifted,
    sources,
    window,
)
from sacl_fast.slim.parts import Part, at, select
from sacl_fast.slim.tensor import RULES, KeptFilters, SlimTensor, dense, make

Rule = Callable[..., Any]
_NAMESPACES = (torch, F, Tensor, torch._C._nn, torch._C._VariableFunctions)  # type: ignore[attr-defined]


def rule_for(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for the functions of these names, wherever torch has them."""

    def register(rule: Rule) -> Rule:
        for name in names:
            for namespace in _NAMESPACES:
                if (function := getattr(namespace, name, None)) is not None:
                    RULES[function] = rule
        return rule

    return register


# --- one operand, value by value ------------------------------------------------------------------

_ACTIVATIONS = """
    relu relu6 leaky_relu elu selu celu gelu silu mish hardtanh hardswish hardsigmoid
    sigmoid logsigmoid tanh tanhshrink softplus softsign softshrink hardshrink threshold
""".split()
_FUNCTIONS = """
    abs neg negative exp expm1 log log1p sqrt rsqrt square reciprocal erf sin cos clamp clamp_min
    clamp_max clip nan_to_num round floor ceil sign positive
""".split()
_COPIES = "clone detach contiguous float double half bfloat16 to".split()


@rule_for(*_ACTIVATIONS, *_FUNCTIONS, *_COPIES, *(f"{n}_" for n in (*_ACTIVATIONS, *_FUNCTIONS)))
def _elementwise(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(x, SlimTensor) or any(_has_channels(a) for a in (*args, *kwargs.values())):
        return NotImplemented
    values = [func(p.values, *args, **kwargs) for p in x.parts]
    if all(v is p.values for v, p in zip(values, x.parts, strict=True)):  # in place, or no change
        return x.become(x)
    return make([p._replace(values=v) for p, v in zip(x.parts, values, strict=True)], x.shape)


_AFTER_NORM = [name for name in ACTIVATIONS if name != "none"]


@rule_for(*_AFTER_NORM, *(f"{name}_" for name in _AFTER_NORM))
def _activation(func: Any, x: Any, *inplace: bool, **named: bool) -> Any:
    """One that a norm may have waited for; its only other argument is ``inplace``."""
    if not isinstance(x, SlimTensor) or not x.waits_for_activation:
        return _elementwise(func, x, *inplace, **named)
    name = func.__name__
    in_place = name.endswith("_") or any(inplace) or any(named.values())
    return x.activated(cast(Activation, name.removesuffix("_")), in_place=in_place)


def _has_channels(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.ndim > 0


@rule_for("prelu")
def _prelu(func: Any, x: Any, weight: Tensor) -> Any:
    if not isinstance(x, SlimTensor) or weight.numel() not in (1, x.shape[1]):
        return NotImplemented
    return by_part(x, lambda p: func(p.values, _at(weight.view(1, -1, 1, 1), p).flatten()))


@rule_for("dropout", "dropout2d", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
def _dropout(
    func: Any, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    # An active one draws a number for every value, as many as the dense tensor has.
    return input if not training or p == 0 else NotImplemented


@rule_for("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor")
def _new(func: Any, x: SlimTensor, *args: Any, **kwargs: Any) -> Tensor:
    return func(x.parts[0].values, *args, **kwargs)


def by_part(x: SlimTensor, function: Callable[[Part], Tensor]) -> Tensor:
    return make([p._replace(values=function(p)) for p in x.parts], x.shape)


# --- two operands ---------------------------------------------------------------------------------

_ARITHMETIC = "add sub subtract mul multiply div divide true_divide maximum minimum pow".split()
_REVERSED = "__radd__ __rsub__ __rmul__ __rdiv__ __rtruediv__ __rpow__ rsub".split()
_IN_PLACE = {
    function: getattr(torch, name)
    for name in _ARITHMETIC
    for namespace in _NAMESPACES
    for suffixed in (f"{name}_", f"__i{'truediv' if name == 'div' else name}__")
    if (function := getattr(namespace, suffixed, None)) is not None
}


@rule_for(*_ARITHMETIC, *_REVERSED)
@rule_for(*(f"__{n}__" for n in ("add", "sub", "mul", "div", "truediv", "pow")))
def _arithmetic(func: Any, a: Any, b: Any, **kwargs: Any) -> Any:
    x, y = (a, b) if isinstance(a, SlimTensor) else (b, a)
    if not isinstance(x, SlimTensor) or isinstance(y, KeptFilters) or "out" in kwargs:
        return NotImplemented
    if isinstance(y, Tensor) and y.shape == x.shape and func in _SUMS and not kwargs:
        total = _sum(x, y)
        if total is not None:
            return total
    if isinstance(y, SlimTensor):
        return _two_slim(func, a, b, kwargs) if x.shape == y.shape else NotImplemented
    if not _has_channels(y):
        return by_part(x, lambda p: _ordered(func, a is x, p.values, y, kwargs))
    if y.ndim > 4 or torch.broadcast_shapes(x.shape, y.shape) != x.shape:
        return NotImplemented
    y = y.reshape(*[1] * (4 - y.ndim), *y.shape)
    if y.stride()[2:] == (0, 0):  # a gate that was expanded over the image
        y = y[:, :, :1, :1]
    if y.shape == (*x.shape[:2], 1, 1) and func in _PRODUCTS and not kwargs:
        return _gated(x, y)
    return by_part(x, lambda p: _ordered(func, a is x, p.values, _at(y, p), kwargs))


_SUMS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}
_PRODUCTS = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__}
_NO_PART = Part(channels(()), torch.empty(1, 0, 1, 1))


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
    either, *places = sources(*(p.channels for operand in operands for p in operand))
    given = []
    for (live, rest), source in zip(operands, places, strict=True):
        constants = rest.values if len(rest.channels) else None
        given += [live.values, constants, source.index(x.device, len(live.channels))]
    both, in_a, in_b = common(rest_a.channels, rest_b.channels)
    parts = [Part(either, slim_add(*given, backend=BACKEND.get()))]
    if len(both):
        constants = select(rest_a, in_a, both).values + select(rest_b, in_b, both).values
        parts.append(Part(both, constants))
    return make(parts, x.shape)


def _gated(x: SlimTensor, gate: Tensor) -> Tensor:
    """Times (N, C, 1, 1): what was the same for all samples is so no more."""
    live, *rest = x.parts
    shared = next((p for p in rest if p.values.shape == (1, len(p.channels), *x.shape[2:])), None)
    index = [None if p is None else p.channels.index(x.device, x.shape[1]) for p in (live, shared)]
    values = slim_gate(
        *(live.values, shared.values if shared else None, gate, *index), backend=BACKEND.get()
    )
    own = joined(live.channels, shared.channels) if shared else live.channels
    others = [p._replace(values=p.values * _at(gate, p)) for p in rest if p is not shared]
    return make([Part(own, values), *others], x.shape)


def _ordered(func: Any, first: bool, x: Tensor, y: Any, kwargs: dict[str, Any]) -> Tensor:
    return func(x, y, **kwargs) if first else func(y, x, **kwargs)


def _at(y: Tensor, part: Part) -> Tensor:
    """What of an operand (., C or 1, ., .) belongs to the part's channels."""
    return y if y.shape[1] == 1 else at(y, part.channels)


def _two_slim(func: Any, a: SlimTensor, b: SlimTensor, kwargs: dict[str, Any]) -> Tensor:
    """Each pair of parts meets in the channels that both hold."""
    parts = []
    for p in a.parts:
        for q in b.parts:
            shared, in_p, in_q = common(p.channels, q.channels)
            if len(shared):
                pair = select(p, in_p, shared).values, select(q, in_q, shared).values
                parts.append(Part(shared, func(*pair, **kwargs)))
    return make(parts, a.shape)


@rule_for(*(f"{n}_" for n in _ARITHMETIC))
@rule_for("__iadd__", "__isub__", "__imul__", "__idiv__", "__itruediv__", "__ipow__")
def _in_place(func: Any, a: Any, b: Any, **kwargs: Any) -> Any:
    if not isinstance(a, SlimTensor):
        return func(a, dense(b), **kwargs)
    result = _arithmetic(_IN_PLACE[func], a, b, **kwargs)
    if result is NotImplemented or result.shape != a.shape:
        return NotImplemented
    return a.become(result if result.dtype == a.dtype else result.to(a.dtype))


@rule_for("expand_as")
def _expand_as(func: Any, x: Any, other: Tensor) -> Any:
    return NotImplemented if isinstance(x, SlimTensor) else x.expand(other.shape)


# --- places ---------------------------------------------------------------------------------------


@rule_for("max_pool2d", "avg_pool2d", "lp_pool2d")
@rule_for("adaptive_avg_pool2d", "adaptive_max_pool2d")
def _pool(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(x, SlimTensor):
        return NotImplemented
    # Zeros that an average counts make it differ at the border; so the constant is pooled as an
    # image, one for all samples, and nothing has to be known about the arguments.
    by_place = func in _AVERAGES_OF_WINDOWS
    live = func(x.parts[0].values, *args, **kwargs)
    if not isinstance(live, Tensor):  # with the indices of the maxima
        return NotImplemented
    parts = [x.parts[0]._replace(values=live)]
    for p in x.parts[1:]:
        if p.is_constant and not by_place:
            parts.append(p._replace(values=p.values.clone()))
        else:
            parts.append(p._replace(values=func(as_image(p, x), *args, **kwargs)))
    return make(parts, torch.Size((*x.shape[:2], *live.shape[2:])))


_AVERAGES_OF_WINDOWS = {F.avg_pool2d, F.lp_pool2d}


def as_image(part: Part, x: Tensor) -> Tensor:
    """The part's values at every place of the image, still for one sample where that is all."""
    values, size = part.values, x.shape[2:]
    return values if values.shape[2:] == size else values.expand(-1, -1, *size)


@rule_for("mean", "amax", "amin")
def _over_the_image(
    func: Any, x: Any, dim: Any = None, keepdim: bool = False, **kwargs: Any
) -> Any:
    if not isinstance(x, SlimTensor) or not isinstance(dim, tuple | list):
        return NotImplemented
    if kwargs or sorted(d % 4 for d in dim) != [2, 3]:
        return NotImplemented
    parts = [p._replace(values=func(p.values, (2, 3), True)) for p in x.parts]
    out = make(parts, torch.Size((*x.shape[:2], 1, 1)))
    return out if keepdim else out.flatten(1)


@rule_for("pad")
def _pad(func: Any, x: Any, pad: Any, mode: str = "constant", value: float | None = None) -> Any:
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
            parts.append(p._replace(values=func(as_image(p, x), pad, mode, value)))
    return make(parts, torch.Size((*x.shape[:2], *live.shape[2:])))


# --- channels -------------------------------------------------------------------------------------


@rule_for("cat", "concat", "concatenate")
def _cat(func: Any, tensors: Any, dim: int = 0, **kwargs: Any) -> Any:
    tensors = list(tensors)
    slim = next((t for t in tensors if isinstance(t, SlimTensor)), None)
    if slim is None or dim not in (1, -3) or kwargs:
        return NotImplemented
    if any(
        t.ndim != 4 or t.shape[::2] != slim.shape[::2] or t.shape[3] != slim.shape[3]
        for t in tensors
    ):
        return NotImplemented
    parts, offset = [], 0
    for t in tensors:
        own = t.parts if isinstance(t, SlimTensor) else (Part(all_channels(t.shape[1]), t),)
        # Copies, because a part that is joined with no other would stay the operand's memory.
        parts += [Part(shifted(p.channels, offset), p.values) for p in own]
        offset += t.shape[1]
    forms = [tuple(p.values.shape[i] for i in (0, 2, 3)) for p in parts]
    alone = [forms.count(f) == 1 for f in forms]
    parts = [
        p._replace(values=p.values.clone()) if own else p
        for p, own in zip(parts, alone, strict=True)
    ]
    return make(parts, torch.Size((slim.shape[0], offset, *slim.shape[2:])))


@rule_for("chunk", "split", "split_with_sizes")
def _split(func: Any, x: Any, size: Any = None, dim: int = 0, **kwargs: Any) -> Any:
    if not isinstance(x, SlimTensor) or dim not in (1, -3) or kwargs or size is None:
        return NotImplemented
    # The sizes are torch's own, learnt on a tensor without values.
    ends, result = 0, []
    for piece in func(torch.empty(x.shape[1], device="meta"), size, 0):
        start, ends = ends, ends + len(piece)
        parts = []
        for p in x.parts:
            chosen, positions = window(p.channels, start, ends)
            if len(chosen):
                parts.append(select(p, positions, chosen))
        result.append(make(parts, torch.Size((x.shape[0], ends - start, *x.shape[2:]))))
    return tuple(result)
