"""The parts of a batch norm in training, for convolutions that do most of its work themselves.

A norm between two convolutions costs six passes over their activation: statistics, output, and in
backward sums, gradient. Here the output is never stored. What a convolution leaves is raw, with the
``sums`` of its statistics; they give the norm's ``affine``, and whoever reads the activation
normalises it as it loads (``norm_pointwise``, ``norm_depthwise``). Backward likewise: the gradient
of a norm's input is ``c0 * g + c1 * (y - c3) + c2`` for each channel, of the gradient ``g`` of its
output and its input ``y``, so it is formed where it is read.

The operators are those of ``csrc/operators.cpp``, which says what each is given and gives; a pass's
recording is rewritten to use them (``passes.fusion``). They are there for CUDA devices. What is
written here, in plain PyTorch, runs on CPUs: the reference that they are tested against.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sacl_fast.ops import compiled
from sacl_fast.ops.batch_norm_act import ACTIVATIONS
from sacl_fast.ops.slim_conv import take

_ACTIVATIONS = list(ACTIVATIONS.values())
_GRADIENTS: list[Callable[[Tensor, Tensor], Tensor]] = [  # of g and of what was activated
    lambda g, z: g,
    lambda g, z: torch.ops.aten.threshold_backward(g, z, 0),
    lambda g, z: torch.ops.aten.hardtanh_backward(g, z, 0, 6),
    torch.ops.aten.hardswish_backward,
    torch.ops.aten.silu_backward,
]


# --- what the operators have in common --------------------------------------------------------


def precise(x: Tensor) -> Tensor:
    """In the type that is computed in: float32, or float64 where x is."""
    return x if x.dtype == torch.float64 else x.float()


def operand(x: Tensor, affine: Tensor | None, act: int, gate: Tensor | None = None) -> Tensor:
    """``act((x - mean) * scale + bias)``, times the gate (N, K) of its sample and channel, in x's
    type; ``affine`` None: x itself, gated."""
    if affine is not None:
        x = _ACTIVATIONS[act](_normalised(x, affine)).to(x.dtype)
    return x if gate is None else x * gate[:, :, None, None].to(x.dtype)


def before_activation(g: Tensor, x: Tensor, affine: Tensor, act: int) -> Tensor:
    """The gradient of the activation's input, from that of its output."""
    return _GRADIENTS[act](precise(g), _normalised(x, affine)).to(g.dtype)


def input_gradient(g: Tensor, y: Tensor | None, coefficients: Tensor | None) -> Tensor:
    """Of what a norm is given: ``c0 * g + c1 * (y - c3) + c2``; without coefficients, g."""
    if y is None or coefficients is None:
        return g
    c0, c1, c2, c3 = (c.view(1, -1, 1, 1) for c in coefficients)
    return (c0 * precise(g) + c1 * (precise(y) - c3) + c2).to(g.dtype)


def moments(y: Tensor) -> Tensor:
    """sums (1, 3, K) of (N, K, H, W): count, mean, and squared differences from it."""
    values = precise(y).transpose(0, 1).flatten(1)
    mean = values.mean(1)
    squares = (values - mean[:, None]).square().sum(1)
    return torch.stack([torch.full_like(mean, values.shape[1]), mean, squares]).unsqueeze(0)


def gradient_sums(g: Tensor, x: Tensor, affine: Tensor) -> Tensor:
    """gsums (1, 2, K): sums of g, and of g times the normalised x."""
    _, _, mean, rstd = (v.view(1, -1, 1, 1) for v in affine)
    g, normalised = precise(g), (precise(x) - mean) * rstd
    return torch.stack([g.sum((0, 2, 3)), (g * normalised).sum((0, 2, 3))]).unsqueeze(0)


def _normalised(x: Tensor, affine: Tensor) -> Tensor:
    scale, bias, mean, _ = (v.view(1, -1, 1, 1) for v in affine)
    return (precise(x) - mean) * scale + bias


# --- the operators ----------------------------------------------------------------------------


def _affine(
    sums: Tensor,
    weight: Tensor,
    bias: Tensor,
    kept_index: Tensor | None,
    zeroed_index: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean_shift: Tensor | None,
    count: int,
    momentum: float,
    eps: float,
    act: int,
) -> tuple[Tensor, Tensor]:
    counts, means, squares = sums.double().unbind(1)
    total = counts.sum(0)
    mean = (counts * means).sum(0) / total
    var = (squares.sum(0) + (counts * (means - mean).square()).sum(0)) / total
    none = mean.new_zeros(0 if zeroed_index is None else len(zeroed_index))
    shifted = mean if mean_shift is None else mean + mean_shift
    for running, own in ((running_mean, shifted), (running_var, var * (count / max(count - 1, 1)))):
        if running is not None:
            for index, value in ((kept_index, own), (zeroed_index, none)):
                if index is None and value is none:
                    continue
                target = running if index is None else running.index_select(0, index)
                value = torch.lerp(target.double(), value, momentum).to(running.dtype)
                running.copy_(value) if index is None else running.index_copy_(0, index, value)
    rstd = (var + eps).rsqrt()
    rows = take(weight, kept_index) * rstd, take(bias, kept_index), mean, rstd
    rest = bias[:0] if zeroed_index is None else take(bias, zeroed_index)
    return torch.stack([r.to(sums.dtype) for r in rows]), _ACTIVATIONS[act](rest.clone())


def _apply(
    x: Tensor,
    affine: Tensor,
    act: int,
    other: Tensor | None,
    other_affine: Tensor | None,
    act_after: int,
) -> Tensor:
    y = operand(x, affine, act)
    if other is not None:
        y = y + operand(other, other_affine, 0)
    return _ACTIVATIONS[act_after](y).contiguous(memory_format=torch.channels_last)


def _mean(x: Tensor, affine: Tensor, act: int) -> Tensor:
    return operand(x, affine, act).mean((2, 3), keepdim=True)


def _gradient(
    dy: Tensor, x: Tensor, affine: Tensor, act: int, gate: Tensor | None, dmean: Tensor | None
) -> tuple[Tensor, Tensor]:
    unchanged = not act and gate is None and dmean is None and dy.shape == x.shape
    if dy.shape != x.shape:
        dy = dy[:, : x.shape[1]].clone(memory_format=torch.channels_last)
    g = dy if gate is None else dy * gate[:, :, None, None]
    if dmean is not None:
        g = g + (dmean / (x.shape[2] * x.shape[3]))[:, :, None, None]
    g = before_activation(g, x, affine, act)
    sums = gradient_sums(g, x, affine)
    return dy.new_empty(0) if unchanged else images_like(g), sums


def _gate_gradient(dy: Tensor, x: Tensor, affine: Tensor, act: int) -> Tensor:
    return (precise(dy) * operand(x, affine, act)).sum((2, 3))


def _coefficients(
    gsums: Tensor,
    drest: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    kept_index: Tensor | None,
    zeroed_index: Tensor | None,
    affine: Tensor,
    count: int,
    act: int,
) -> tuple[Tensor, Tensor, Tensor]:
    total, with_normalised = gsums.double().sum(0).to(gsums.dtype)
    scale, _, mean, rstd = affine
    rows = scale, -scale * rstd * with_normalised / count, -scale * total / count, mean
    dweight, dbias = torch.zeros_like(weight), torch.zeros_like(bias)
    for gradient, own in ((dweight, with_normalised), (dbias, total)):
        if kept_index is None:
            gradient.copy_(own)
        else:
            gradient.index_copy_(0, kept_index, own.to(gradient.dtype))
    if drest is not None and zeroed_index is not None:
        dbias.index_copy_(0, zeroed_index, _GRADIENTS[act](drest, take(bias, zeroed_index)))
    return torch.stack(rows), dweight, dbias


def _input_gradient(g: Tensor, y: Tensor, coefficients: Tensor) -> Tensor:
    return images_like(input_gradient(g, y, coefficients))


def _offset_gradient(
    g: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    shape: list[int],
    border: list[int],
) -> Tensor:
    found = precise(input_gradient(g, y, coefficients)).sum_to_size(shape)
    if border:
        top, bottom, left, right = border
        inner = found[:, :, top : shape[2] - bottom, left : shape[3] - right]
        if inner.numel():
            outer = found.sum((2, 3), keepdim=True) - inner.sum((2, 3), keepdim=True)
            inner.copy_((-outer / inner[0, 0].numel()).expand_as(inner))
    return images_like(found)


def images_like(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


_OPERATORS: dict[str, Callable[..., Any]] = {
    "moments": moments,
    "affine": _affine,
    "apply": _apply,
    "mean": _mean,
    "gradient": _gradient,
    "gate_gradient": _gate_gradient,
    "coefficients": _coefficients,
    "input_gradient": _input_gradient,
    "offset_gradient": _offset_gradient,
}


def _describe() -> None:
    for name, function in _OPERATORS.items():
        torch.library.impl(f"sacl_fast::norm_act_{name}", "CPU")(function)
        torch.library.register_fake(f"sacl_fast::norm_act_{name}")(function)


is_compiled = compiled.there(_describe)
