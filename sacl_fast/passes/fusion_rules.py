"""What becomes of each operator of a recorded pass when its batch norms are fused; see ``fusion``.

A rule is given the writer, the old node and its arguments, and gives the node's value.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from sacl_fast.ops import norm_act, norm_depthwise, norm_pointwise
from sacl_fast.passes.fusion import (
    BeforeActivation,
    Convolution,
    Gated,
    InputGradient,
    Norm,
    OfMean,
    Operand,
    Rows,
    Rule,
    Writer,
    Zeros,
)

_ops, _aten = torch.ops.sacl_fast, torch.ops.aten
_RELU = 1
norm_pointwise.register()
assert norm_act.is_compiled() and norm_depthwise.is_compiled()  # and PyTorch is told of them

RULES: dict[Any, Rule] = {}
"""Operator -> rule."""


def _rule_for(*operators: Any) -> Any:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(operators, rule))
        return rule

    return register


# --- forward: norms ---------------------------------------------------------------------------


@_rule_for(_ops.batch_norm_act.default)
def _norm(
    w: Writer, node: fx.Node, x: fx.Node, weight: Any, bias: Any, kept: Any, zeroed: Any, *rest: Any
) -> Any:
    running_mean, running_var, count, momentum, eps, act = rest
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
    return _takes_norms(x) or any(
        _takes_norms(user) and user.args[0] is y and _feeds_norm(w, user)
        for y in w.users(norm)
        if y.args[1] == 0
        for user in w.users(y)
    )


_CONVOLUTIONS = {_ops.slim_pointwise.default, _ops.depthwise_conv.default}


def _takes_norms(node: fx.Node) -> bool:
    return node.target in _CONVOLUTIONS


def _feeds_norm(w: Writer, convolution: fx.Node) -> bool:
    user = w.only_user(convolution)
    if user is None or user.target is not _ops.batch_norm_act.default:
        return False
    return user.args[0] is convolution and w.is_activation(convolution)


# --- forward: convolutions --------------------------------------------------------------------


@_rule_for(_ops.slim_pointwise.default)
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
    if not _feeds_norm(w, node) or not w.is_activation(x):
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
        added, border = w.read(offset), _border(w, offset)
    if shift is not None:
        shift = w.cast(w.view(shift, -1), w.form(x).dtype, torch.float32)
    given = *w.operand(x), matrix, w.read(in_index), chosen, added
    y, sums = w.outputs(2, _ops.norm_pointwise, *given)
    w.convolutions[y] = Convolution(sums, shift, border)
    return y


@_rule_for(_ops.depthwise_conv.default)
def _depthwise(w: Writer, node: fx.Node, x: fx.Node, weight: Any, index: Any, *window: Any) -> Any:
    if not _feeds_norm(w, node) or not w.is_activation(x):
        return NotImplemented
    raw, affine, act, gate = w.operand(x)
    if gate is not None:
        raw, affine = w.read(x), None
    given = raw, affine, act, *_filters(w, weight), w.read(index), *window
    y, sums = w.outputs(2, _ops.norm_depthwise, *given)
    w.convolutions[y] = Convolution(sums)
    return y


@_rule_for(_aten.index_select.default)
def _index_select(w: Writer, node: fx.Node, x: fx.Node, dim: int, index: fx.Node) -> Any:
    return NotImplemented if dim else Rows(w.read(x), w.read(index))


@_rule_for(_aten.constant_pad_nd.default)
def _pad(w: Writer, node: fx.Node, x: fx.Node, pad: list[int], value: float = 0) -> Any:
    """Filters of zeros after some rows of a weight, which are meant by there being fewer rows."""
    rows = w.value(x)
    if not isinstance(rows, Rows) or value or any(pad[:-1]) or len(w.form(x).shape) != 3:
        return NotImplemented
    return Rows(rows.of, rows.index, pad[-1])


def _filters(w: Writer, weight: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """A weight, and which of its filters are meant."""
    value = w.value(weight)
    return (value.of, value.index) if isinstance(value, Rows) else (w.read(weight), None)


def _is_constant(w: Writer, offset: fx.Node) -> bool:
    shape = w.form(offset).shape
    return shape[0] == 1 and shape[2:] == (1, 1)


def _border(w: Writer, map: fx.Node) -> list[int]:
    """Rows at the top and the bottom and columns at the left and the right, where a map (1, O, H,
    W) varies; empty if it is not known that it is constant elsewhere.

    It is, where it comes from a depthwise convolution of constants, through a norm and a 1x1
    convolution.
    """
    if map.target is not _ops.slim_pointwise.default or map.args[6] is not None:
        return []
    normed: Any = map.args[0]
    norm = normed.args[0] if normed.target is operator.getitem else normed
    if norm.target is not _ops.batch_norm_act.default:
        return []
    convolution = norm.args[0]
    if convolution.target is not _ops.depthwise_conv.default:
        return []
    image, weight, _, *window = convolution.args
    constant = image
    while constant.target in (_aten.clone.default, _aten.expand.default):
        constant = constant.args[0]
    if w.form(constant).shape[2:] != (1, 1):
        return []
    sides = zip(
        w.form(image).shape[2:],
        w.form(convolution).shape[2:],
        w.form(weight).shape[1:],
        *window,
        strict=True,
    )
    return [count for side in sides for count in _beyond(*side)]


def _beyond(size: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> Any:
    """The first and the last outputs of a side whose windows leave the image."""
    inside = [
        i * stride >= padding and i * stride - padding + (kernel - 1) * dilation < size
        for i in range(out)
    ]
    first = inside.index(True) if True in inside else out
    return first, 0 if first == out else inside[::-1].index(True)


# --- forward: what else reads a norm's output -------------------------------------------------


@_rule_for(_aten.mean.dim)
def _mean(w: Writer, node: fx.Node, x: fx.Node, dim: Any = None, keep: bool = False) -> Any:
    value = w.value(x)
    if not isinstance(value, Operand) or value.gate is not None or value.computed:
        return NotImplemented
    if node.kwargs or sorted(d % 4 for d in dim) != [2, 3]:
        return NotImplemented
    mean = w.emit(_ops.norm_act_mean, value.norm.raw, value.norm.affine, value.norm.act)
    return mean if keep else w.view(mean, *w.form(node).shape)


@_rule_for(_ops.slim_gate.default)
def _gate(w: Writer, node: fx.Node, x: fx.Node, map: Any, gate: fx.Node, *indices: Any) -> Any:
    value, user = w.value(x), w.only_user(node)
    fits = user is not None and user.target is _ops.slim_pointwise.default
    if not isinstance(value, Operand) or value.gate is not None or not fits:
        return NotImplemented
    if map is not None or indices != (None, None) or not _feeds_norm(w, user):
        return NotImplemented
    return Operand(value.norm, w.read(gate))


@_rule_for(_ops.slim_add.default)
def _slim_sum(
    w: Writer, node: fx.Node, a: fx.Node, a_rest: Any, a_index: Any, b: fx.Node, *b_rest: Any
) -> Any:
    if (a_rest, a_index, *b_rest) != (None,) * 4:
        return NotImplemented
    return _sum(w, node, a, b)


@_rule_for(_aten.add.Tensor)
def _add(w: Writer, node: fx.Node, a: Any, b: Any) -> Any:
    for one, other in ((w.value(a), w.value(b)), (w.value(b), w.value(a))):
        if isinstance(one, Gated) and one.dmean is None and isinstance(other, OfMean):
            return Gated(one.dy, one.gate, one.pixels, other.dmean)
    if node.kwargs or not isinstance(b, fx.Node) or w.form(a) != w.form(b):
        return NotImplemented
    if _is_own(w, a) and _may_wait(w, node) and w.only_user(b) is node:
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


@_rule_for(_aten.relu.default, _aten.relu_.default)
def _relu(w: Writer, node: fx.Node, x: fx.Node) -> Any:
    return w.done.get(node, NotImplemented)


# --- backward ---------------------------------------------------------------------------------


@_rule_for(_ops.batch_norm_act_backward.default)
def _norm_backward(
    w: Writer, node: fx.Node, dy: fx.Node, drest: Any, x: fx.Node, weight: Any, bias: Any,
    kept: Any, zeroed: Any, mean: fx.Node, rstd: fx.Node, act: int,
) -> Any:  # fmt: skip
    norm = w.norm_of.get(w.value(mean))
    if norm is None:
        return NotImplemented
    value, own = w.value(dy), (norm.raw, norm.affine, act)
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


@_rule_for(_ops.slim_pointwise_backward.default)
def _pointwise_backward(
    w: Writer, node: fx.Node, dy: fx.Node, x: fx.Node, weight: fx.Node, in_index: Any,
    out_index: Any, rest: Any, rest_index: Any, offset_shape: list[int],
) -> Any:  # fmt: skip
    gradient = w.value(dy)
    if not isinstance(gradient, InputGradient) or gradient.y not in w.convolutions:
        return NotImplemented
    given, form = (gradient.g, gradient.y, gradient.coefficients), w.form(dy)
    dx = _output(w, node, 0)
    to_norm = dx is not None and _goes_to_norm(w, dx, x)
    matrix, chosen = w.read(weight), w.read(out_index)
    own = *w.operand(x), matrix, w.read(in_index), chosen, to_norm, dx is not None
    g, gsums, dweight = w.outputs(3, _ops.norm_pointwise_backward, *given, *own)

    def summed(shape: list[int], border: list[int]) -> fx.Node:
        found = w.emit(_ops.norm_act_offset_gradient, *given, shape, border)
        return w.cast(found, torch.float32, form.dtype)

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
    return BeforeActivation(g, gsums) if to_norm else g, dweight, drest, doffset


@_rule_for(_ops.depthwise_conv_backward_input.default)
def _depthwise_backward(
    w: Writer, node: fx.Node, dy: fx.Node, weight: fx.Node, index: Any, H: int, W: int, C: int,
    *window: Any,
) -> Any:  # fmt: skip
    gradient = w.value(dy)
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
    filters = _filters(w, weight)
    own = *filters, w.read(index), *window, to_norm
    g, gsums, dweight = w.outputs(3, _ops.norm_depthwise_backward, *given, *own)
    if filters[1] is not None:  # the gradient is full already
        w.full.add(dweight)
    w.done[of_weight[0]] = dweight
    return BeforeActivation(g, gsums) if to_norm else g


@_rule_for(_ops.depthwise_conv_backward_weight.default)
def _depthwise_backward_weight(w: Writer, node: fx.Node, *_: Any) -> Any:
    return w.done.get(node, NotImplemented)


@_rule_for(_aten.new_zeros.default, _aten.index_copy_.default, _aten.slice.Tensor)
def _made_full(w: Writer, node: fx.Node, x: fx.Node, *_: Any) -> Any:
    """What makes the gradient of all filters of that of some."""
    return w.value(x) if w.value(x) in w.full else NotImplemented


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


@_rule_for(_ops.slim_gate_backward.default)
def _gate_backward(
    w: Writer, node: fx.Node, dy: fx.Node, x: fx.Node, map: Any, gate: fx.Node, *indices: Any
) -> Any:
    value = w.value(x)
    if not isinstance(value, Operand) or value.gate is not None or value.computed:
        return NotImplemented
    if map is not None or indices != (None, None):
        return NotImplemented
    norm, form = value.norm, w.form(x)
    own = w.read(dy)
    dgate = w.emit(_ops.norm_act_gate_gradient, own, norm.raw, norm.affine, norm.act)
    dgate = w.cast(dgate, torch.float32, form.dtype)
    return Gated(own, w.read(gate), form.shape[2] * form.shape[3]), None, dgate


@_rule_for(_aten.expand.default)
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


@_rule_for(_aten.view.default)
def _view(w: Writer, node: fx.Node, x: fx.Node, shape: list[int]) -> Any:
    value = w.value(x)
    return Zeros(w.form(node)) if isinstance(value, Zeros) else NotImplemented


# --- additions that may wait until the end of the pass ----------------------------------------


@_rule_for(_aten.add_.Tensor)
def _add_in_place(w: Writer, node: fx.Node, a: fx.Node, b: Any) -> Any:
    form = w.form(a)
    if node.kwargs or w.users(node) or a in w.done:
        return NotImplemented
    if b == 1 and form.dtype == torch.int64 and not form.shape and isinstance(w.value(a), int):
        w.counters.append(w.read(a))
    elif isinstance(b, fx.Node) and w.only_user(b) is node and _may_wait(w, a):
        w.sums[w.read(a)] = w.read(b)
    else:
        return NotImplemented
    w.done[a] = None  # added to once more, it is not put off
    return None


_VIEWS = {_aten.view.default, _aten.unsqueeze.default, _aten.squeeze.dim, _aten.permute.default}


def _may_wait(w: Writer, x: fx.Node) -> bool:
    """Whether a tensor of backward is added to and given back, and nothing else."""
    if w.graph is not w.graphs[1] or x.op == "placeholder":
        return False
    return all(
        (user.target is _aten.add_.Tensor and user.args[0] is x)
        or (user.target in _VIEWS and _may_wait(w, user))
        for user in w.users(x)
    )


def _is_own(w: Writer, x: fx.Node) -> bool:
    """Whether nothing but one addition reads a tensor's memory."""
    base: Any = x
    while base.target in _VIEWS and w.only_user(base):
        base = base.args[0]
    read = [user for user in w.users(base) if user.target is not _aten.index_copy_.default]
    return base.target is _aten.new_zeros.default and len(read) == 1 and w.only_user(x) is not None
