"""The walk over an encoder's graph that ``slim.compact`` describes, making smaller layers."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, fx, nn

from sacl_fast.slim.channels import Channels, all_channels, channels, complement

CONVOLUTIONS = (nn.Conv2d, Conv2dSame)
_POINTWISE_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Identity),
    *(nn.Dropout, nn.Dropout2d, nn.AlphaDropout),
)
_POOLS = (nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_POINTWISE_NAMES = frozenset(
    """
    relu relu6 leaky_relu elu selu celu gelu silu mish hardtanh hardswish hardsigmoid sigmoid tanh
    softplus clamp
    """.split()
)
_ARITHMETIC_NAMES = {
    name: short
    for short in ("add", "sub", "mul", "truediv")
    for name in (short, f"{short}_", f"i{short}", short.replace("true", ""))
} | {"div_": "truediv"}


@dataclass(frozen=True, eq=False)
class _Slim:
    """An activation of C channels in the new graph."""

    count: int
    live: Channels
    node: fx.Node  # (N, K, H, W)
    constant: Channels
    value: Tensor  # (1, R, 1, 1)
    varying: Channels = all_channels(0)  # noqa: RUF009 - one and the same object
    by_sample: fx.Node | None = None  # (1 or N, S, 1, 1)


class Compacter:
    """Writes the new graph, node by node."""

    def __init__(self, traced: fx.GraphModule, masks: Mapping[str, Tensor]) -> None:
        self.old = traced
        self.modules: dict[str, Any] = dict(traced.named_modules())
        self.masks = masks
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.values: dict[fx.Node, Any] = {}
        self.added = 0

    def run(self) -> nn.Module:
        with torch.no_grad():
            for node in self.old.graph.nodes:
                self.values[node] = self.translate(node)
        made = fx.GraphModule(self.root, self.graph, "CompactEncoder")
        made.graph.eliminate_dead_code()
        made.delete_all_unused_submodules()
        made.recompile()
        return made.eval()

    # --- one node -------------------------------------------------------------------------------

    def translate(self, node: fx.Node) -> Any:
        first = self.values[node.args[0]] if node.args and _is_node(node.args[0]) else None
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            if type(module) in CONVOLUTIONS and len(node.args) == 1:
                return self.convolution(str(node.target), module, first, node)
            if isinstance(first, _Slim) and len(node.args) == 1:
                if type(module) in (nn.BatchNorm2d, BatchNormAct2d):
                    return self.batch_norm(module, first)
                if _leaves_constants(module):
                    return replace(first, node=self.call(module, first.node))
                if type(module) in _POINTWISE_MODULES:
                    own = copy.deepcopy(module)
                    if hasattr(own, "inplace"):
                        own.inplace = False
                    made = self.each(first, lambda x: self.call(own, x), own)
                    return self.changed(node, made, getattr(module, "inplace", False))
        elif node.op in ("call_function", "call_method") and isinstance(first, _Slim):
            made = self.function(node, first)
            if made is not None:
                return made
        elif node.op in ("call_function", "call_method") and len(node.args) == 2:
            second = self.values[node.args[1]] if _is_node(node.args[1]) else None
            if isinstance(second, _Slim) and (made := self.arithmetic(node)) is not None:
                return made
        return self.unknown(node)

    def function(self, node: fx.Node, x: _Slim) -> Any:
        name, rest = _name(node), node.args[1:]
        if name == "contiguous":
            return x
        if name.rstrip("_") in _POINTWISE_NAMES and not any(
            _is_node(v) or isinstance(v, bool) for v in (*rest, *node.kwargs.values())
        ):
            target = getattr(torch, name.rstrip("_"), None) or getattr(F, name.rstrip("_"))
            made = self.each(
                x,
                lambda n: self.graph.call_function(target, (n, *rest), dict(node.kwargs)),
                lambda v: target(v, *rest, **node.kwargs),
            )
            return self.changed(node, made, name.endswith("_"))
        if name in _ARITHMETIC_NAMES and len(node.args) == 2:
            return self.arithmetic(node)
        if name == "mean" and node.op == "call_method":
            dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
            keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
            if isinstance(dims, tuple | list) and sorted(d % 4 for d in dims) == [2, 3]:
                y = self.graph.call_method("mean", (x.node, (2, 3), True))
                pooled = replace(x, node=y)
                return (
                    pooled if keep else self.graph.call_method("flatten", (self.whole(pooled), 1))
                )
        if name in ("adaptive_avg_pool2d", "adaptive_max_pool2d") and not node.kwargs:
            target = getattr(F, name)
            return replace(x, node=self.graph.call_function(target, (x.node, *rest)))
        return None

    def unknown(self, node: fx.Node) -> fx.Node:
        """The same node, on whole activations."""
        if node.op == "call_module" and not hasattr(self.root, str(node.target)):
            self.put(str(node.target), self.modules[str(node.target)])
        elif node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(self.old)
            if isinstance(value, Tensor):
                return self.constant(value)
            setattr(self.root, str(node.target), value)
        made = self.graph.node_copy(node, lambda n: self.whole(self.values[n]))
        in_place = _name(node).endswith("_") and not _name(node).endswith("__")
        in_place |= _name(node) in ("iadd", "isub", "imul", "itruediv")
        in_place |= bool(node.kwargs.get("inplace"))
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
        if whole or not isinstance(x, _Slim):
            every, none = all_channels(conv.in_channels), all_channels(0)
            zero = conv.weight.new_zeros(1, 0, 1, 1)
            x = _Slim(conv.in_channels, every, self.whole(x), none, zero)
        out = _index(kept)
        weight = conv.weight[out]
        bias = None if conv.bias is None else conv.bias[out]
        if whole:
            y = self.call(conv, x.node)
            y = self.select_node(y, kept, conv.out_channels)
        elif depthwise:
            read = channels(np.asarray(kept.numbers) // (conv.out_channels // conv.in_channels))
            y = self.call(_conv(conv, weight, bias, len(kept)), self.select(x, read))
        else:
            y = self.ungrouped(conv, weight, bias, x)
        zeroed = complement(kept, conv.out_channels)
        if not len(zeroed):
            return y
        zeros = weight.new_zeros(1, len(zeroed), 1, 1)
        return _Slim(conv.out_channels, kept, y, zeroed, zeros)

    def ungrouped(self, conv: nn.Conv2d, weight: Tensor, bias: Tensor | None, x: _Slim) -> fx.Node:
        unpadded = type(conv) is nn.Conv2d and conv.padding in ((0, 0), "valid")
        unpadded |= conv.kernel_size == (1, 1) and conv.padding in ((0, 0), "same")
        if not unpadded and len(x.varying):
            merged = channels([*x.live.numbers, *x.varying.numbers])
            x = _Slim(x.count, merged, self.select(x, merged), x.constant, x.value)
        share = (weight[:, _index(x.constant)] * x.value).sum(1, keepdim=True)
        if unpadded and len(x.constant):
            fixed = share.sum((1, 2, 3))
            bias = fixed if bias is None else bias + fixed
        y = self.call(_conv(conv, weight[:, _index(x.live)], bias, 1), x.node)
        if not unpadded and bool(share.any()):
            # An image of ones, of one sample: cut from the input, so that it has its size.
            first = self.graph.call_function(operator.getitem, (x.node, _FIRST_OF_ALL))
            ones = self.graph.call_function(torch.ones_like, (first,))
            border = self.call(_conv(conv, share, None, 1), ones)
            y = self.graph.call_function(operator.add, (y, border))
        if len(x.varying):
            taps = weight[:, _index(x.varying)].sum((2, 3), keepdim=True)
            reader = nn.Conv2d(taps.shape[1], taps.shape[0], 1, bias=False)
            reader.weight = nn.Parameter(taps, requires_grad=False)
            assert x.by_sample is not None
            y = self.graph.call_function(operator.add, (y, self.call(reader, x.by_sample)))
        return y

    def batch_norm(self, norm: nn.Module, x: _Slim) -> _Slim:
        def cut(own: Channels) -> nn.Module:
            part = copy.deepcopy(norm)
            if hasattr(act := getattr(part, "act", None), "inplace"):
                act.inplace = False  # type: ignore[union-attr]
            for kind in (part._parameters, part._buffers):
                for key, value in kind.items():
                    if value is not None and value.ndim == 1:
                        rows = value.detach()[_index(own)]
                        kind[key] = (  # type: ignore[assignment]
                            nn.Parameter(rows, requires_grad=False)
                            if kind is part._parameters
                            else rows
                        )
            part.num_features = len(own)  # type: ignore[assignment]
            return part

        return replace(
            x,
            node=self.call(cut(x.live), x.node),
            value=cut(x.constant)(x.value),
            by_sample=x.by_sample and self.call(cut(x.varying), x.by_sample),
        )

    def arithmetic(self, node: fx.Node) -> Any:
        """``a + b`` and the like, of which at least one is in three."""
        short = _ARITHMETIC_NAMES.get(_name(node))
        if short is None or node.kwargs or len(node.args) != 2:
            return None
        target = getattr(operator, short)
        operands: list[Any] = [self.values[v] if _is_node(v) else v for v in node.args]
        a, b = operands
        in_place = _name(node).endswith("_") or _name(node).startswith("i")
        if isinstance(a, _Slim) and isinstance(b, _Slim):
            return self.changed(node, self.two(target, a, b), in_place)
        if not isinstance(a, _Slim) and in_place:
            return None
        x, y = (a, b) if isinstance(a, _Slim) else (b, a)

        def ordered(p: Any, q: Any) -> tuple[Any, Any]:
            return (p, q) if x is a else (q, p)

        if not isinstance(y, fx.Node):
            made = self.each(
                x,
                lambda n: self.graph.call_function(target, ordered(n, y)),
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
            y = self.graph.call_method("unsqueeze", (y, 0))

        def gated(own: Channels, value: fx.Node) -> fx.Node:
            gate = self.select_node(y, own, x.count)
            return self.graph.call_function(target, ordered(value, gate))

        # A constant that meets a gate is another one for each sample.
        varying = channels([*x.varying.numbers, *x.constant.numbers])
        pieces = [x.by_sample] if x.by_sample is not None else []
        if len(x.constant):
            pieces.append(self.constant(x.value))
            if x.by_sample is not None:
                pieces = [self.cat_expanded(pieces)]
        made = replace(
            x,
            node=gated(x.live, x.node),
            constant=all_channels(0),
            value=x.value[:, :0],
            varying=varying,
            by_sample=gated(varying, pieces[0]) if pieces else None,
        )
        return self.changed(node, made, in_place)

    def two(self, target: Any, a: _Slim, b: _Slim) -> _Slim:
        """Constant where both are."""
        fixed = np.intersect1d(a.constant.numbers, b.constant.numbers)
        live = complement(channels(fixed), a.count)
        value = target(_constants(a, fixed), _constants(b, fixed))
        y = self.graph.call_function(target, (self.select(a, live), self.select(b, live)))
        return _Slim(a.count, live, y, channels(fixed), value)

    def each(self, x: _Slim, emit: Any, compute: Any) -> _Slim:
        """The same for every part."""
        return replace(
            x,
            node=emit(x.node),
            value=compute(x.value),
            by_sample=None if x.by_sample is None else emit(x.by_sample),
        )

    # --- channels -------------------------------------------------------------------------------

    def whole(self, x: Any) -> Any:
        return self.select(x, all_channels(x.count)) if isinstance(x, _Slim) else x

    def select(self, x: _Slim, chosen: Channels) -> fx.Node:
        """Some channels (N, K, H, W) of an activation, live or not."""
        held, node = x.live, x.node
        if not np.isin(chosen.numbers, held.numbers).all():
            rest = [self.constant(x.value)] if len(x.constant) else []
            if x.by_sample is not None:
                rest.append(x.by_sample)
            held = channels([*x.live.numbers, *x.constant.numbers, *x.varying.numbers])
            node = self.cat_expanded([node, *rest])
        return self.select_node(node, _positions(held, chosen, x.count), len(held))

    def cat_expanded(self, nodes: list[fx.Node]) -> fx.Node:
        """Channels joined, all at the samples and places of the first."""
        first = self.graph.call_function(operator.getitem, (nodes[0], _FIRST_CHANNEL))
        ones = self.graph.call_function(torch.ones_like, (first,))
        rest = [self.graph.call_function(operator.mul, (ones, n)) for n in nodes[1:]]
        return self.graph.call_function(torch.cat, ([nodes[0], *rest], 1))

    def select_node(self, node: fx.Node, positions: Channels, count: int) -> fx.Node:
        if positions.in_order and len(positions) == count:
            return node
        index = self.constant(_index(positions), "index")
        return self.graph.call_method("index_select", (node, 1, index))

    # --- names ----------------------------------------------------------------------------------

    def put(self, name: str, module: nn.Module) -> None:
        """The module in the new root, under its own name."""
        *parents, last = name.split(".")
        where = self.root
        for parent in parents:
            if not hasattr(where, parent):
                where.add_module(parent, nn.Module())
            where = where.get_submodule(parent)
        where.add_module(last, module)

    def call(self, module: nn.Module, x: fx.Node) -> fx.Node:
        name = self.fresh("layer")
        self.root.add_module(name, module)
        return self.graph.call_module(name, (x,))

    def constant(self, value: Tensor, kind: str = "constant") -> fx.Node:
        name = self.fresh(kind)
        device = next(self.old.parameters()).device
        if isinstance(value, nn.Parameter):
            self.root.register_parameter(name, value)
        else:
            self.root.register_buffer(name, value.to(device))
        return self.graph.get_attr(name)

    def fresh(self, kind: str) -> str:
        self.added += 1
        return f"{kind}_{self.added}"


_FIRST_CHANNEL = (slice(None), slice(0, 1))
_FIRST_OF_ALL = (slice(0, 1), slice(0, 1))


def _is_node(value: Any) -> TypeGuard[fx.Node]:
    return isinstance(value, fx.Node)


def _name(node: fx.Node) -> str:
    target = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _index(numbers: Channels) -> Tensor:
    return torch.from_numpy(numbers.numbers.copy())


def _positions(held: Channels, chosen: Channels, count: int) -> Channels:
    """Where in a list of channels the chosen ones stand."""
    position = np.full(count, -1)
    position[held.numbers] = np.arange(len(held))
    return channels(position[chosen.numbers])


def _constants(x: _Slim, chosen: np.ndarray) -> Tensor:
    """Some of the constants (1, R', 1, 1)."""
    return x.value[:, _index(_positions(x.constant, channels(chosen), x.count))]


def _leaves_constants(module: nn.Module) -> bool:
    """Whether it is a pooling that a constant passes unchanged: no padded zeros count."""
    if type(module) is nn.AvgPool2d:
        whole = module.padding in (0, (0, 0)) and not module.ceil_mode
        return whole and module.divisor_override is None
    return type(module) in _POOLS and not getattr(module, "return_indices", False)


def _conv(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None, groups: int) -> nn.Conv2d:
    """The same convolution with another weight (O, I / groups, kh, kw)."""
    made = type(conv)(
        weight.shape[1] * groups,
        weight.shape[0],
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        groups,
        bias is not None,
        device="meta",
    )
    made.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias, requires_grad=False)
    return made.eval()


def _shape(node: fx.Node) -> torch.Size | None:
    return getattr(node.meta.get("tensor_meta"), "shape", None)
