"""Rules for the backward of what is fused."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sacl_fast.passes.fusion import (
    BeforeActivation,
    Gated,
    InputGradient,
    OfMean,
    Operand,
    Writer,
    Zeros,
    rule_for,
)
from sacl_fast.passes.rules.additions import stays
from sacl_fast.passes.rules.border import Chain, Gradients, Within, chain_to, write_backward
from sacl_fast.passes.rules.forward import filters_of

_ops, _aten = torch.ops.sacl_fast, torch.ops.aten


@rule_for(_ops.batch_norm_act_backward.default)
def _norm_backward(
    w: Writer, node: fx.Node, dy: fx.Node, drest: Any, x: fx.Node, weight: Any, bias: Any,
    kept: Any, zeroed: Any, mean: fx.Node, rstd: fx.Node, act: int,
) -> Any:  # fmt: skip
    value = w.value(dy)
    if isinstance(value, Gradients):  # of a chain, which has them already
        return value, value.norm_weight, value.norm_bias
    norm = w.norm_of.get(w.value(mean))
    if norm is None:
        return NotImplemented
    own = norm.raw, norm.affine, act
    if isinstance(value, BeforeActivation):
        g, gsums = value.g, value.gsums
    elif isinstance(value, Gated):
        given = value.dy, *own, value.gate, value.dmean
        g, gsums = w.outputs(2, _ops.norm_act_gradient, *given)
    else:
        given = w.read(dy)
        g, gsums = w.outputs(2, _ops.norm_act_gradient, given, *own, None, None)
        g = g if act else given  # it is not written again where it is the same
    if drest is not None and not isinstance(w.value(drest), Zeros):
        drest = w.cast(w.view(w.read(drest), -1), w.form(drest).dtype, torch.float32)
    else:
        drest = None
    vectors = map(w.read, (weight, bias, kept, zeroed))
    count = _values_of_a_channel(w, x)
    coefficients, dweight, dbias = w.outputs(
        3, _ops.norm_act_coefficients, gsums, drest, *vectors, norm.affine, count, act
    )
    return InputGradient(g, norm.raw, coefficients), dweight, dbias


def _values_of_a_channel(w: Writer, x: fx.Node) -> int:
    shape = w.form(x).shape
    return shape[0] * shape[2] * shape[3]


@rule_for(_ops.slim_pointwise_backward.default)
def _pointwise_backward(
    w: Writer, node: fx.Node, dy: fx.Node, x: fx.Node, weight: fx.Node, in_index: Any,
    out_index: Any, rest: Any, rest_index: Any, offset_shape: list[int],
) -> Any:  # fmt: skip
    if chain := _chain_of_map(w, x):
        return write_backward(w, dy, chain)
    gradient = w.value(dy)
    if not isinstance(gradient, InputGradient) or gradient.y not in w.convolutions:
        return NotImplemented
    given, form = (gradient.g, gradient.y, gradient.coefficients), w.form(dy)
    dx = _output(w, node, 0)
    total, other = _with_what_is_added(w, dx)
    to_norm = total is not None and _goes_to_norm(w, total, x)
    matrix, chosen = w.read(weight), w.read(out_index)
    raw, affine, act, gate = w.operand(x)
    own = raw, affine, act, gate, matrix, w.read(in_index), chosen, to_norm, dx is not None, other
    g, gsums, dgate, dweight = w.outputs(4, _ops.norm_pointwise_backward, *given, *own)
    if gate is not None:
        w.gate_gradients[g] = dgate

    def summed(shape: list[int], border: list[int]) -> fx.Node:
        found = w.emit(_ops.norm_act_offset_gradient, *given, shape, border)
        rounded = w.cast(found, torch.float32, form.dtype)
        w.precise[rounded] = found
        return rounded

    drest: Any = None
    if rest is not None and w.form(rest).shape[0] == 1:
        drest = Zeros(w.form(rest))
    elif rest is not None:
        shape = list(w.form(rest).shape)
        image = w.view(w.read(rest), *shape, 1, 1)
        found = summed([shape[0], form.shape[1], 1, 1], [])
        constants = found, image, matrix, w.read(rest_index), chosen, None, None, []
        drest, more, *_ = w.outputs(4, _ops.slim_pointwise_backward, *constants)
        w.emit(_aten.add_.Tensor, dweight, more)
        drest = w.view(drest, *shape)
    doffset: Any = None
    if offset_shape and offset_shape[0] == 1 and offset_shape[2:] == [1, 1]:
        doffset = Zeros(form._replace(shape=torch.Size(offset_shape)))
    elif offset_shape:
        doffset = summed(offset_shape, list(w.convolutions[gradient.y].border))
    found = BeforeActivation(g, gsums) if to_norm else g
    if other is not None and total is not None:
        w.done[total] = found
    return found, dweight, drest, doffset


def _with_what_is_added(w: Writer, dx: fx.Node | None) -> tuple[fx.Node | None, fx.Node | None]:
    """A gradient and None; or what it is added to, if that is all that is done with it: the sum in
    the old graph, and the other summand, which is there already, in the new one."""
    total = None if dx is None else w.only_user(dx)
    if dx is None or total is None or total.target is not _aten.add.Tensor or total.kwargs:
        return dx, None
    other = total.args[1] if total.args[0] is dx else total.args[0]
    if other is dx or not isinstance(other, fx.Node) or w.form(other) != w.form(dx):
        return dx, None
    if not isinstance(w.values.get(other), fx.Node) or not stays(w, other):
        return dx, None
    return total, w.read(other)


@rule_for(_ops.depthwise_conv_backward_input.default)
def _depthwise_backward(
    w: Writer, node: fx.Node, dy: fx.Node, weight: fx.Node, index: Any, H: int, W: int, C: int,
    *window: Any,
) -> Any:  # fmt: skip
    gradient = w.value(dy)
    if isinstance(gradient, Gradients):
        return gradient
    if not isinstance(gradient, InputGradient) or gradient.y not in w.convolutions:
        return NotImplemented
    of_weight = [
        user for user in w.users(dy) if user.target is _ops.depthwise_conv_backward_weight.default
    ]
    if len(of_weight) != 1:
        return NotImplemented
    x = of_weight[0].args[0]
    assert isinstance(x, fx.Node)
    to_norm = _goes_to_norm(w, node, x)
    raw, affine, act, gate = w.operand(x)
    if gate is not None:
        raw, affine = w.read(x), None
    given = gradient.g, gradient.y, gradient.coefficients, raw, affine, act
    filters = filters_of(w, weight)
    own = *filters, w.read(index), *window, to_norm
    g, gsums, dweight = w.outputs(3, _ops.norm_depthwise_backward, *given, *own)
    if filters[1] is not None:  # the gradient is full already
        w.full.add(dweight)
    w.done[of_weight[0]] = dweight
    return BeforeActivation(g, gsums) if to_norm else g


@rule_for(_ops.depthwise_conv_backward_weight.default)
def _depthwise_backward_weight(w: Writer, node: fx.Node, x: Any, dy: fx.Node, *_: Any) -> Any:
    gradient = w.value(dy)
    if isinstance(gradient, Gradients):
        return gradient.filters
    return w.done.get(node, NotImplemented)


@rule_for(_aten.new_zeros.default, _aten.index_copy_.default, _aten.slice.Tensor)
def _made_full(w: Writer, node: fx.Node, x: fx.Node, *_: Any) -> Any:
    """What makes the gradient of all filters of that of some."""
    return w.value(x) if w.value(x) in w.full else NotImplemented


def _chain_of_map(w: Writer, x: fx.Node) -> Chain | None:
    """The chain whose map backward reads."""
    y: Any = w.forward_of(x)
    if y is None or not isinstance(w.value(x), Within):
        return None
    user = w.only_user(y)
    return None if user is None else chain_to(w, user)


def _output(w: Writer, node: fx.Node, i: int) -> fx.Node | None:
    return next((user for user in w.users(node) if user.args[1] == i), None)


def _goes_to_norm(w: Writer, dx: fx.Node, x: fx.Node) -> bool:
    """Whether the gradient of an operand is read by its norm's backward alone."""
    value, user = w.value(x), w.only_user(dx)
    if not isinstance(value, Operand) or value.gate is not None or value.computed or user is None:
        return False
    if user.target is not _ops.batch_norm_act_backward.default or user.args[0] is not dx:
        return False
    return w.norm_of.get(w.value(user.args[7])) is value.norm


@rule_for(_ops.slim_gate_backward.default)
def _gate_backward(
    w: Writer, node: fx.Node, dy: fx.Node, x: fx.Node, map: Any, gate: fx.Node, *indices: Any
) -> Any:
    value = w.value(x)
    if not isinstance(value, Operand) or value.gate is not None or value.computed:
        return NotImplemented
    norm, form = (value.norm.raw, value.norm.affine, value.norm.act), w.form(x)
    own, factors, dmap = w.read(dy), w.read(gate), None
    if own in w.gate_gradients:
        dgate = w.gate_gradients[own]
    elif map is None and indices == (None, None):
        dgate = w.emit(_ops.norm_act_gate_gradient, own, *norm)
    else:
        x_index, map_index = (w.read(index) for index in indices)
        given = w.read(map), factors, x_index, map_index
        dmap, dgate = w.outputs(2, _ops.norm_slim_gate_backward, own, *norm, *given)
        if x_index is not None:
            factors = w.emit(_aten.index_select, factors, 1, x_index)
    dgate = w.cast(dgate, torch.float32, form.dtype)
    return Gated(own, factors, form.shape), dmap, dgate


@rule_for(_aten.expand.default)
def _mean_backward(w: Writer, node: fx.Node, x: fx.Node, shape: list[int]) -> Any:
    """Of a mean over the image: its gradient, divided and spread out."""
    form, user = w.form(node), w.only_user(node)
    if x.target is not _aten.div.Tensor or not w.is_activation(node):
        return NotImplemented
    of_mean: Any = x.args[0]
    pixels = form.shape[2] * form.shape[3]
    if w.form(of_mean).shape != (*form.shape[:2], 1, 1) or x.args[1] != pixels:
        return NotImplemented
    if user is None or user.target is not _aten.add.Tensor:
        return NotImplemented
    return OfMean(w.view(w.read(of_mean), *form.shape[:2]), node)


@rule_for(_aten.view.default)
def _view(w: Writer, node: fx.Node, x: fx.Node, shape: list[int]) -> Any:
    value = w.value(x)
    return Zeros(w.form(node)) if isinstance(value, Zeros) else NotImplemented
