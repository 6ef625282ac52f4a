"""Rules for what reads or makes a norm's input and output, forward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from sacl_fast.passes.fusion import (
    Convolution,
    Gated,
    Norm,
    OfMean,
    Operand,
    Rows,
    Writer,
    rule_for,
)
from sacl_fast.passes.rules.additions import is_own, may_wait
from sacl_fast.passes.rules.border import Within, border_of, chain_of, chain_to, write

_ops, _aten = torch.ops.sacl_fast, torch.ops.aten
_RELU = 1


@rule_for(_ops.batch_norm_act.default)
def _norm(
    w: Writer, node: fx.Node, x: fx.Node, weight: Any, bias: Any, kept: Any, zeroed: Any, *rest: Any
) -> Any:
    running_mean, running_var, count, momentum, eps, act = rest
    if isinstance(w.value(x), Within):
        return (Within(),) * 4
    if not _is_fused(w, node):
        return NotImplemented
    raw = w.read(x)
    own = w.convolutions.get(raw) or Convolution(w.emit(_ops.norm_act_moments, raw))
    norm = map(w.read, (weight, bias, kept, zeroed, running_mean, running_var))
    affine, constants = w.outputs(
        2, _ops.norm_act_affine, own.sums, *norm, own.shift, count, momentum, eps, act
    )
    w.norms += 1
    made = Norm(raw, affine, act)
    mean, rstd = (w.emit(_aten.select.int, affine, 0, row) for row in (2, 3))
    w.norm_of[mean] = made
    dtype = w.form(x).dtype
    constants = w.cast(w.view(constants, 1, -1, 1, 1), torch.float32, dtype)
    return Operand(made), constants, mean, rstd


def _is_fused(w: Writer, norm: fx.Node) -> bool:
    """Whether a norm is of an activation, and what is before or after it takes part."""
    x = norm.args[0]
    assert isinstance(x, fx.Node)
    if not w.is_activation(x) or w.only_user(x) is not norm:
        return False
    return _takes_norms(w, x) or any(
        _takes_norms(w, user) and user.args[0] is y and feeds_norm(w, user)
        for y in w.users(norm)
        if y.args[1] == 0
        for user in w.users(y)
    )


def _takes_norms(w: Writer, node: fx.Node) -> bool:
    if node.target is _ops.slim_pointwise.default:
        return w.products
    return node.target is _ops.depthwise_conv.default


def feeds_norm(w: Writer, convolution: fx.Node) -> bool:
    user = w.only_user(convolution)
    if user is None or user.target is not _ops.batch_norm_act.default:
        return False
    return user.args[0] is convolution and w.is_activation(convolution)


@rule_for(_ops.slim_pointwise.default)
def _pointwise(
    w: Writer,
    node: fx.Node,
    x: fx.Node,
    weight: fx.Node,
    in_index: Any,
    out_index: Any,
    rest: Any,
    rest_index: Any,
    offset: Any,
) -> Any:
    if chain := chain_to(w, node):
        return write(w, chain)
    if not w.products or not feeds_norm(w, node) or not w.is_activation(x):
        return NotImplemented
    by_sample = rest is not None and w.form(rest).shape[0] > 1
    if by_sample and offset is not None:
        return NotImplemented
    matrix, chosen = w.read(weight), w.read(out_index)
    # Constants of all samples cancel in the norm; only its running mean sees them.
    shift, added, border = None, None, []
    if rest is not None:
        image = w.view(w.read(rest), *w.form(rest).shape, 1, 1)
        index = w.read(rest_index)
        response = w.emit(_ops.slim_pointwise, image, matrix, index, chosen, None, None, None)
        shift, added = (None, response) if by_sample else (response, None)
    if offset is not None and _is_constant(w, offset):
        own = w.read(offset)
        shift = own if shift is None else w.emit(_aten.add.Tensor, shift, own)
    elif offset is not None:
        added, border = w.read(offset), border_of(w, offset)
    if shift is not None:
        shift = w.cast(w.view(shift, -1), w.form(x).dtype, torch.float32)
    given = *w.operand(x), matrix, w.read(in_index), chosen, added
    y, sums = w.outputs(2, _ops.norm_pointwise, *given)
    w.convolutions[y] = Convolution(sums, shift, border)
    return y


@rule_for(_ops.depthwise_conv.default)
def _depthwise(w: Writer, node: fx.Node, x: fx.Node, weight: Any, index: Any, *window: Any) -> Any:
    if chain_of(w, node):
        return Within()
    if not feeds_norm(w, node) or not w.is_activation(x):
        return NotImplemented
    raw, affine, act, gate = w.operand(x)
    if gate is not None:
        raw, affine = w.read(x), None
    given = raw, affine, act, *filters_of(w, weight), w.read(index), *window
    y, sums = w.outputs(2, _ops.norm_depthwise, *given)
    w.convolutions[y] = Convolution(sums)
    return y


@rule_for(_aten.index_select.default)
def _index_select(w: Writer, node: fx.Node, x: fx.Node, dim: int, index: fx.Node) -> Any:
    return NotImplemented if dim else Rows(w.read(x), w.read(index))


@rule_for(_aten.constant_pad_nd.default)
def _pad(w: Writer, node: fx.Node, x: fx.Node, pad: list[int], value: float = 0) -> Any:
    """Filters of zeros after some rows of a weight, which are meant by there being fewer rows."""
    rows = w.value(x)
    if not isinstance(rows, Rows) or value or any(pad[:-1]) or len(w.form(x).shape) != 3:
        return NotImplemented
    return Rows(rows.of, rows.index, pad[-1])


def filters_of(w: Writer, weight: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """A weight, and which of its filters are meant."""
    value = w.value(weight)
    return (value.of, value.index) if isinstance(value, Rows) else (w.read(weight), None)


def _is_constant(w: Writer, offset: fx.Node) -> bool:
    shape = w.form(offset).shape
    return shape[0] == 1 and shape[2:] == (1, 1)


@rule_for(_aten.mean.dim)
def _mean(w: Writer, node: fx.Node, x: fx.Node, dim: Any = None, keep: bool = False) -> Any:
    value = w.value(x)
    if not isinstance(value, Operand) or value.gate is not None or value.computed:
        return NotImplemented
    if node.kwargs or dim is None or sorted(d % 4 for d in dim) != [2, 3]:
        return NotImplemented
    mean = w.emit(_ops.norm_act_mean, value.norm.raw, value.norm.affine, value.norm.act)
    return mean if keep else w.view(mean, *w.form(node).shape)


@rule_for(_ops.slim_gate.default)
def _gate(w: Writer, node: fx.Node, x: fx.Node, map: Any, gate: fx.Node, *indices: Any) -> Any:
    value, user = w.value(x), w.only_user(node)
    if not isinstance(value, Operand) or value.gate is not None or value.computed:
        return NotImplemented
    read = user is not None and user.target is _ops.slim_pointwise.default and w.products
    if user is not None and read and feeds_norm(w, user) and (map, *indices) == (None,) * 3:
        return Operand(value.norm, w.read(gate))
    given = w.read(map), w.read(gate), *(w.read(index) for index in indices)
    norm = value.norm
    return w.emit(_ops.norm_slim_gate, norm.raw, norm.affine, norm.act, *given)


@rule_for(_ops.slim_add.default)
def _slim_sum(
    w: Writer, node: fx.Node, a: fx.Node, a_rest: Any, a_index: Any, b: fx.Node, *of_b: Any
) -> Any:
    if (a_rest, a_index, *of_b) == (None,) * 4:
        return _sum(w, node, a, b)
    given: list[Any] = []
    for x, rest, index in ((a, a_rest, a_index), (b, *of_b)):
        raw, affine, act, gate = w.operand(x)
        if act or gate is not None:
            raw, affine = w.read(x), None
        given += [raw, affine, w.read(rest), w.read(index)]
    if given[1] is given[5] is None:
        return NotImplemented
    return w.emit(_ops.norm_slim_add, *given)


@rule_for(_aten.add.Tensor)
def _add(w: Writer, node: fx.Node, a: Any, b: Any) -> Any:
    if node in w.done:
        return w.done[node]
    for one, other in ((w.value(a), w.value(b)), (w.value(b), w.value(a))):
        if isinstance(one, Gated) and one.dmean is None and isinstance(other, OfMean):
            return replace(one, dmean=other.dmean)
    if node.kwargs or not isinstance(b, fx.Node) or w.form(a) != w.form(b):
        return NotImplemented
    if is_own(w, a) and may_wait(w, node) and w.only_user(b) is node:
        w.sums[w.read(a)] = w.read(b)
        return w.read(a)
    return _sum(w, node, a, b)


def _sum(w: Writer, node: fx.Node, a: fx.Node, b: fx.Node) -> Any:
    """A residual sum, and the ReLU that reads nothing but it, along with a norm."""
    for x, other in ((a, b), (b, a)):
        value = w.value(x)
        if not isinstance(value, Operand) or value.gate is not None or value.computed:
            continue
        raw, affine, act, gate = w.operand(other)
        if act or gate is not None:
            raw, affine = w.read(other), None
        relu = _relu_of(w, node)
        norm = value.norm.raw, value.norm.affine, value.norm.act
        y = w.emit(_ops.norm_act_apply, *norm, raw, affine, _RELU if relu else 0)
        if relu:
            w.done[relu] = y
        return y
    return NotImplemented


def _relu_of(w: Writer, node: fx.Node) -> fx.Node | None:
    """The ReLU after which a sum is not there any more, or alone reads it."""
    first = next(iter(w.users(node)), None)
    if first is None or node in w.results:
        return None
    if first.target is _aten.relu_.default:
        return first
    alone = w.only_user(node) is first and not w.is_read_later(node)
    alone &= first.target is _aten.relu.default
    return first if alone else None


@rule_for(_aten.relu.default, _aten.relu_.default)
def _relu(w: Writer, node: fx.Node, x: fx.Node) -> Any:
    return w.done.get(node, NotImplemented)
