"""The walk over an encoder's graph that ``export.compact`` describes, making smaller layers."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeGuard

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, fx, nn

from sacl_fast.slim.channels import Channels, all_channels, channels, complement
from sacl_fast.slim.export.layers import (
    CONVOLUTIONS,
    batch_norm_of,
    convolution_like,
    leaves_constants,
    pointwise_convolution,
)
from sacl_fast.slim.export.writer import GraphWriter, SplitActivation, index_of
from sacl_fast.slim.operations import (
    ACTIVATION_MODULES,
    ARITHMETIC,
    ELEMENTWISE,
    IDENTITY_MODULES,
    arithmetic,
    is_in_place,
)


def without_zeroed_filters(traced: fx.GraphModule, masks: Mapping[str, Tensor]) -> nn.Module:
    """A traced encoder with zeroed filters (and the shape of each value), without them.

    Args:
        masks: convolution name -> (Cout,), false where the filter is zeroed.
    """
    return _Translation(traced, masks).run()


class _Translation:
    """From the encoder's graph to the smaller one, node by node."""

    def __init__(self, traced: fx.GraphModule, masks: Mapping[str, Tensor]) -> None:
        self.old = traced
        self.modules: dict[str, Any] = dict(traced.named_modules())
        self.masks = masks
        self.new = GraphWriter(next(traced.parameters()).device)
        self.values: dict[fx.Node, Any] = {}
        """Node of the old graph -> its value in the new: a node, a split activation, anything."""

    def run(self) -> nn.Module:
        with torch.no_grad():
            for node in self.old.graph.nodes:
                self.values[node] = self.translate(node)
        return self.new.module()

    # --- one node -------------------------------------------------------------------------------

    def translate(self, node: fx.Node) -> Any:
        first = self.values[node.args[0]] if node.args and _is_node(node.args[0]) else None
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            if type(module) in CONVOLUTIONS and len(node.args) == 1:
                return self.convolution(str(node.target), module, first, node)
            if isinstance(first, SplitActivation) and len(node.args) == 1:
                if type(module) in (nn.BatchNorm2d, BatchNormAct2d):
                    return self.batch_norm(module, first)
                if leaves_constants(module):
                    return replace(first, node=self.new.call(module, first.node))
                if type(module) in (*ACTIVATION_MODULES, *IDENTITY_MODULES):
                    own = copy.deepcopy(module)
                    if hasattr(own, "inplace"):
                        own.inplace = False
                    made = self.each(first, lambda x: self.new.call(own, x), own)
                    return self.changed(node, made, getattr(module, "inplace", False))
        elif node.op in ("call_function", "call_method") and isinstance(first, SplitActivation):
            made = self.function(node, first)
            if made is not None:
                return made
        elif node.op in ("call_function", "call_method") and len(node.args) == 2:
            second = self.values[node.args[1]] if _is_node(node.args[1]) else None
            made = self.two_operands(node) if isinstance(second, SplitActivation) else None
            if made is not None:
                return made
        return self.unknown(node)

    def function(self, node: fx.Node, x: SplitActivation) -> Any:
        name, rest = _name(node), node.args[1:]
        if name == "contiguous":
            return x
        if name.rstrip("_") in ELEMENTWISE and not any(
            _is_node(v) or isinstance(v, bool) for v in (*rest, *node.kwargs.values())
        ):
            target = getattr(torch, name.rstrip("_"), None) or getattr(F, name.rstrip("_"))
            made = self.each(
                x,
                lambda n: self.new.apply(target, n, *rest, **node.kwargs),
                lambda v: target(v, *rest, **node.kwargs),
            )
            return self.changed(node, made, name.endswith("_"))
        if arithmetic(name) is not None:
            return self.two_operands(node)
        if name == "mean" and node.op == "call_method":
            dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
            keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
            if isinstance(dims, tuple | list) and sorted(d % 4 for d in dims) == [2, 3]:
                y = self.new.graph.call_method("mean", (x.node, (2, 3), True))
                pooled = replace(x, node=y)
                if keep:
                    return pooled
                return self.new.graph.call_method("flatten", (self.new.whole(pooled), 1))
        if name in ("adaptive_avg_pool2d", "adaptive_max_pool2d") and not node.kwargs:
            return replace(x, node=self.new.apply(getattr(F, name), x.node, *rest))
        return None

    def unknown(self, node: fx.Node) -> fx.Node:
        """The same node, on whole activations."""
        if node.op == "call_module" and not hasattr(self.new.root, str(node.target)):
            self.new.keep(str(node.target), self.modules[str(node.target)])
        elif node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(self.old)
            if isinstance(value, Tensor):
                return self.new.constant(value)
            setattr(self.new.root, str(node.target), value)
        made = self.new.graph.node_copy(node, lambda n: self.new.whole(self.values[n]))
        in_place = is_in_place(_name(node)) or bool(node.kwargs.get("inplace"))
        if node.op == "call_module":
            in_place |= bool(getattr(self.modules[str(node.target)], "inplace", False))
        return self.changed(node, made, in_place)

    def changed(self, node: fx.Node, made: Any, in_place: bool) -> Any:
        """After an operation in place, every name of its operand means the result."""
        if in_place and node.args and _is_node(node.args[0]):
            before = self.values[node.args[0]]
            for other, value in self.values.items():
                if value is before:
                    self.values[other] = made
        return made

    # --- layers ---------------------------------------------------------------------------------

    def convolution(self, name: str, conv: nn.Conv2d, x: Any, node: fx.Node) -> Any:
        mask = self.masks.get(name)
        kept = all_channels(conv.out_channels)
        if mask is not None:
            kept = channels(mask.cpu().numpy().nonzero()[0])
        depthwise = conv.groups == conv.in_channels > 1
        whole = (conv.groups > 1 and not depthwise) or conv.padding_mode != "zeros"
        if whole or not isinstance(x, SplitActivation):
            every, none = all_channels(conv.in_channels), all_channels(0)
            zero = conv.weight.new_zeros(1, 0, 1, 1)
            x = SplitActivation(conv.in_channels, every, self.new.whole(x), none, zero)
        out = index_of(kept)
        weight = conv.weight[out]
        bias = None if conv.bias is None else conv.bias[out]
        if whole:
            y = self.new.call(conv, x.node)
            y = self.new.select_node(y, kept, conv.out_channels)
        elif depthwise:
            kept, y = self.depthwise(conv, kept, x)
        else:
            y = self.ungrouped(conv, weight, bias, x)
        zeroed = complement(kept, conv.out_channels)
        zeros = weight.new_zeros(1, len(zeroed), 1, 1)
        made = SplitActivation(conv.out_channels, kept, y, zeroed, zeros)
        return made if len(zeroed) else self.new.whole(made)

    def depthwise(
        self, conv: nn.Conv2d, kept: Channels, x: SplitActivation
    ) -> tuple[Channels, fx.Node]:
        """The kept filters in the order in which their results stand, and these."""

        def filters(chosen: Channels, scale: Tensor | float, groups: int) -> nn.Conv2d:
            out = index_of(chosen)
            bias = None if conv.bias is None else conv.bias[out]
            return convolution_like(conv, conv.weight[out] * scale, bias, groups)

        numbers = np.asarray(kept.numbers)
        read = numbers // (conv.out_channels // conv.in_channels)
        of_constants = np.isin(read, x.constant.numbers)
        if of_constants.all() or not of_constants.any():
            y = self.new.call(filters(kept, 1.0, len(kept)), self.new.select(x, channels(read)))
            return kept, y
        live, fixed = channels(numbers[~of_constants]), channels(numbers[of_constants])
        y = self.new.call(
            filters(live, 1.0, len(live)), self.new.select(x, channels(read[~of_constants]))
        )
        values = x.constants(read[of_constants]).view(-1, 1, 1, 1)
        border = self.new.call(filters(fixed, values, 1), self.new.image_of_ones(x.node))
        return channels([*live.numbers, *fixed.numbers]), self.new.cat_expanded([y, border])

    def ungrouped(
        self, conv: nn.Conv2d, weight: Tensor, bias: Tensor | None, x: SplitActivation
    ) -> fx.Node:
        unpadded = type(conv) is nn.Conv2d and conv.padding in ((0, 0), "valid")
        unpadded |= conv.kernel_size == (1, 1) and conv.padding in ((0, 0), "same")
        if not unpadded and len(x.varying):
            merged = channels([*x.live.numbers, *x.varying.numbers])
            x = SplitActivation(x.count, merged, self.new.select(x, merged), x.constant, x.value)
        share = (weight[:, index_of(x.constant)] * x.value).sum(1, keepdim=True)
        if unpadded and len(x.constant):
            fixed = share.sum((1, 2, 3))
            bias = fixed if bias is None else bias + fixed
        y = self.new.call(convolution_like(conv, weight[:, index_of(x.live)], bias, 1), x.node)
        if not unpadded and bool(share.any()):
            ones = self.new.image_of_ones(x.node)
            border = self.new.call(convolution_like(conv, share, None, 1), ones)
            y = self.new.apply(operator.add, y, border)
        if len(x.varying):
            taps = weight[:, index_of(x.varying)].sum((2, 3), keepdim=True)
            assert x.by_sample is not None
            y = self.new.apply(
                operator.add, y, self.new.call(pointwise_convolution(taps), x.by_sample)
            )
        return y

    def batch_norm(self, norm: nn.Module, x: SplitActivation) -> SplitActivation:
        return replace(
            x,
            node=self.new.call(batch_norm_of(norm, x.live), x.node),
            # torch's batch norm refuses a tensor without channels.
            value=batch_norm_of(norm, x.constant)(x.value) if len(x.constant) else x.value,
            by_sample=x.by_sample and self.new.call(batch_norm_of(norm, x.varying), x.by_sample),
        )

    def two_operands(self, node: fx.Node) -> Any:
        """``a + b`` and the like; ``a``, ``b`` or both are split."""
        name = arithmetic(_name(node))
        if name is None or node.kwargs or len(node.args) != 2:
            return None
        target = ARITHMETIC[name]
        operands: list[Any] = [self.values[v] if _is_node(v) else v for v in node.args]
        a, b = operands
        in_place = is_in_place(_name(node))
        if isinstance(a, SplitActivation) and isinstance(b, SplitActivation):
            return self.changed(node, self.both_split(target, a, b), in_place)
        if not isinstance(a, SplitActivation) and in_place:
            return None
        x, y = (a, b) if isinstance(a, SplitActivation) else (b, a)

        def ordered(p: Any, q: Any) -> tuple[Any, Any]:
            return (p, q) if x is a else (q, p)

        if not isinstance(y, fx.Node):
            made = self.each(
                x,
                lambda n: self.new.apply(target, *ordered(n, y)),
                lambda v: target(*ordered(v, y)),
            )
            return self.changed(node, made, in_place)
        other = node.args[1] if x is a else node.args[0]
        assert isinstance(other, fx.Node)
        shape = _shape(other)
        if shape is None or len(shape) not in (3, 4) or shape[-2:] != (1, 1):
            return None
        if shape[-3] != x.count:
            return None
        if len(shape) == 3:
            y = self.new.graph.call_method("unsqueeze", (y, 0))

        def gated(own: Channels, value: fx.Node) -> fx.Node:
            gate = self.new.select_node(y, own, x.count)
            return self.new.apply(target, *ordered(value, gate))

        # A constant that meets a gate is another one for each sample.
        varying = channels([*x.varying.numbers, *x.constant.numbers])
        pieces = [x.by_sample] if x.by_sample is not None else []
        if len(x.constant):
            pieces.append(self.new.constant(x.value))
            if x.by_sample is not None:
                pieces = [self.new.cat_expanded(pieces)]
        made = replace(
            x,
            node=gated(x.live, x.node),
            constant=all_channels(0),
            value=x.value[:, :0],
            varying=varying,
            by_sample=gated(varying, pieces[0]) if pieces else None,
        )
        return self.changed(node, made, in_place)

    def both_split(self, target: Any, a: SplitActivation, b: SplitActivation) -> SplitActivation:
        """Constant where both are."""
        fixed = np.intersect1d(a.constant.numbers, b.constant.numbers)
        live = complement(channels(fixed), a.count)
        value = target(a.constants(fixed), b.constants(fixed))
        y = self.new.apply(target, self.new.select(a, live), self.new.select(b, live))
        return SplitActivation(a.count, live, y, channels(fixed), value)

    def each(self, x: SplitActivation, emit: Any, compute: Any) -> SplitActivation:
        """The same for every part."""
        return replace(
            x,
            node=emit(x.node),
            value=compute(x.value),
            by_sample=None if x.by_sample is None else emit(x.by_sample),
        )


def _is_node(value: Any) -> TypeGuard[fx.Node]:
    return isinstance(value, fx.Node)


def _name(node: fx.Node) -> str:
    target = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _shape(node: fx.Node) -> torch.Size | None:
    return getattr(node.meta.get("tensor_meta"), "shape", None)
