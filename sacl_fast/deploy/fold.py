"""Batch norms of sums and of joined channels, folded into the convolutions that give them, as
exporters fold the norm of a single convolution.

In the compact slim encoder a convolution's result is added to, or stands beside, what constant
channels give, which is a convolution too. Before the batch norm those channels are of very
different sizes, and an int8 file has one scale for all of them: with the norms where they were,
features of a slim ``test_efficientnet`` had a mean cosine of 0.27 with their own in int8.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx, nn

from sacl_fast.slim.export.layers import CONVOLUTIONS


@torch.no_grad()
def fold_batch_norms(module: nn.Module) -> nn.Module:
    """In place, up to rounding: ``norm(a(x) + b(y))`` and ``norm(cat([a(x), b(y)], 1))`` become the
    same of two other convolutions, without the norm.

    Args:
        module: in eval mode; one that is no ``fx.GraphModule`` is left as it is.
    """
    if not isinstance(module, fx.GraphModule):
        return module
    for node in module.graph.nodes:
        norm = _layer(module, node)
        if not isinstance(norm, nn.BatchNorm2d) or norm.running_var is None:
            continue
        given = node.args[0]
        assert isinstance(given, fx.Node)
        if given.op == "call_module" or not _is_foldable(module, given):
            continue
        _fold(module, given, *_affine(norm))
        rest = [getattr(norm, name) for name in ("drop", "act") if hasattr(norm, name)]
        module.set_submodule(str(node.target), nn.Sequential(*rest))
    module.recompile()
    return module.eval()


def _layer(module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _is_foldable(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether it is made of convolutions alone, and nothing but the norm reads their values."""
    if sum(not _is_shape(user) for user in node.users) > 1:
        return False
    if node.op == "call_module":
        calls = [other for other in module.graph.nodes if other.target == node.target]
        return len(calls) == 1 and type(_layer(module, node)) in CONVOLUTIONS
    parts = _parts(node)
    if not parts or len({*parts}) < len(parts):
        return False
    if not all(_is_foldable(module, part) for part in parts):
        return False
    return node.target is torch.cat or len({_channels(module, part) for part in parts}) == 1


def _is_shape(node: fx.Node) -> bool:
    """Whether it takes the size of what it is given, and not the values."""
    return node.target is torch.ones_like or (
        node.target is operator.getitem and all(map(_is_shape, node.users))
    )


def _parts(node: fx.Node) -> list[fx.Node]:
    if node.target is operator.add and all(isinstance(part, fx.Node) for part in node.args):
        return list(node.args)  # type: ignore[arg-type]
    if node.target is torch.cat and (*node.args[1:], node.kwargs.get("dim"))[0] == 1:
        return list(node.args[0])  # type: ignore[arg-type]
    if node.target is operator.mul and _is_ones(node.args[0]):
        return [node.args[1]]  # type: ignore[list-item]
    return []


def _is_ones(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target is torch.ones_like


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """The norm as a factor and a summand of each channel, float64."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    return scale, shift + norm.bias.double() if norm.affine else shift


def _fold(module: fx.GraphModule, node: fx.Node, scale: Tensor, shift: Tensor) -> None:
    if (conv := _layer(module, node)) is not None:
        assert isinstance(conv, nn.Conv2d)
        weight = conv.weight.double() * scale.view(-1, 1, 1, 1)
        bias = shift if conv.bias is None else conv.bias.double() * scale + shift
        conv.weight = nn.Parameter(weight.to(conv.weight), requires_grad=False)
        conv.bias = nn.Parameter(bias.to(conv.weight), requires_grad=False)
    elif node.target is torch.cat:
        parts = _parts(node)
        counts = [_channels(module, part) for part in parts]
        for part, *own in zip(parts, scale.split(counts), shift.split(counts), strict=True):
            _fold(module, part, *own)
    else:  # the summand is added once
        first, *others = _parts(node)
        _fold(module, first, scale, shift)
        for part in others:
            _fold(module, part, scale, torch.zeros_like(shift))


def _channels(module: fx.GraphModule, node: fx.Node) -> int:
    if (conv := _layer(module, node)) is not None:
        assert isinstance(conv, nn.Conv2d)
        return conv.out_channels
    counts = [_channels(module, part) for part in _parts(node)]
    return sum(counts) if node.target is torch.cat else counts[0]
