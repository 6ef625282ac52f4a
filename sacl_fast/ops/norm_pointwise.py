"""1x1 convolution with a batch norm fused into both its sides; see ``norm_act``.

``sacl_fast::norm_pointwise`` gives ``y (N, O, H, W)`` and its ``sums`` of an operand (N, K, H, W),
times a gate (N, K) where there is one: the filters ``out_index`` of the full weight (Cout, Cin) on
the channels ``in_index``, plus an offset (1 or N, O, 1 or H, 1 or W). Its backward gives ``dx``,
``gsums``, the gate's gradient (N, K) and the full weight's; ``to_norm``: dx is the gradient before
the operand's activation, with its gsums, else that of the operand (gated, as the product reads it).
``other`` (N, K, H, W) is added to the operand's gradient: what comes from where else it is read.
``input``: whether dx is wanted.

On CUDA devices the kernels are Triton's (``sacl_kernels.norm_pointwise``); what is written here, in
plain PyTorch, runs on CPUs: the reference that they are tested against.
"""

from __future__ import annotations

from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sacl_fast.ops.backend import triton_obstacle
from sacl_fast.ops.norm_act import (
    before_activation,
    gradient_sums,
    images_like,
    input_gradient,
    moments,
    operand,
    precise,
)
from sacl_fast.ops.slim_conv import take_filters

_SCHEMAS = {
    "norm_pointwise": (
        "(Tensor x, Tensor? affine, int act, Tensor? gate, Tensor weight, Tensor? in_index, "
        "Tensor? out_index, Tensor? offset) -> (Tensor, Tensor)"
    ),
    "norm_pointwise_backward": (
        "(Tensor g, Tensor? y, Tensor? coefficients, Tensor x, Tensor? affine, int act, "
        "Tensor? gate, Tensor weight, Tensor? in_index, Tensor? out_index, bool to_norm, "
        "bool input, Tensor? other) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
}


def _filters(
    weight: Tensor, in_index: Tensor | None, out_index: Tensor | None, like: Tensor
) -> Tensor:  # (O, K)
    return take_filters(weight[:, :, None, None], out_index, in_index).flatten(1).to(like.dtype)


def _forward(
    x: Tensor,
    affine: Tensor | None,
    act: int,
    gate: Tensor | None,
    weight: Tensor,
    in_index: Tensor | None,
    out_index: Tensor | None,
    offset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    y = torch.einsum(
        "nkhw,ok->nohw",
        operand(x, affine, act, gate),
        _filters(weight, in_index, out_index, x),
    )
    if offset is not None:
        y = y + offset.to(y.dtype)
    return images_like(y), moments(y)


def _backward(
    g: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    x: Tensor,
    affine: Tensor | None,
    act: int,
    gate: Tensor | None,
    weight: Tensor,
    in_index: Tensor | None,
    out_index: Tensor | None,
    to_norm: bool,
    input: bool,
    other: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dy, values = input_gradient(g, y, coefficients), operand(x, affine, act, gate)
    own = torch.einsum("nohw,nkhw->ok", dy, values).to(weight.dtype)
    dweight = weight.new_zeros(weight.shape)
    rows, columns = (
        torch.arange(count, device=x.device) if index is None else index
        for index, count in zip((out_index, in_index), weight.shape, strict=True)
    )
    dweight[rows[:, None], columns] = own
    sums = dgate = precise(x).new_empty(0)
    if not input:
        return x.new_empty(0), sums, dgate.clone(), dweight
    dx = torch.einsum("nohw,ok->nkhw", dy, _filters(weight, in_index, out_index, x))
    dx = dx if other is None else dx + other
    dgate = dgate.clone() if gate is None else (precise(dx) * operand(x, affine, act)).sum((2, 3))
    if to_norm and affine is not None:
        dx = before_activation(dx, x, affine, act)
        sums = gradient_sums(dx, x, affine)
    return images_like(dx), sums, dgate, dweight


def obstacle(device: torch.device) -> str | None:
    """Why the operators cannot run on a device; None if they can."""
    return None if device.type == "cpu" else triton_obstacle(device)


@cache
def register() -> None:
    """Tell PyTorch of the operators; once."""
    functions = {"norm_pointwise": _forward, "norm_pointwise_backward": _backward}
    for name, schema in _SCHEMAS.items():
        torch.library.define(f"sacl_fast::{name}", schema)
        torch.library.impl(f"sacl_fast::{name}", "CPU")(functions[name])
        torch.library.register_fake(f"sacl_fast::{name}")(functions[name])

    @torch.library.impl("sacl_fast::norm_pointwise", "CUDA")
    def _(*given: Any) -> Any:
        from sacl_kernels import norm_pointwise

        return norm_pointwise.forward(*given)

    @torch.library.impl("sacl_fast::norm_pointwise_backward", "CUDA")
    def _(*given: Any) -> Any:
        from sacl_kernels import norm_pointwise

        return norm_pointwise.backward(*given)

    op = torch.ops.sacl_fast

    @register_flop_formula(op.norm_pointwise)
    def _(x: Any, *_: Any, out_shape: Any, **__: Any) -> int:
        return 2 * prod(out_shape[0]) * x[1]

    @register_flop_formula(op.norm_pointwise_backward)
    def _(g: Any, y: Any, coefficients: Any, x: Any, *_: Any, **__: Any) -> int:
        return 4 * prod(g) * x[1]
