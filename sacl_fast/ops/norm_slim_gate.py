"""A raw slim activation times a gate for each sample (squeeze-excite); see ``norm_act``.

Where the gate is of live channels alone, a 1x1 convolution applies it as it loads
(``norm_pointwise``). With a map beside them, which is the same for all samples until it is gated,
the products are written, side by side, of channels that are normalised as they are read. Backward,
the gradient of the live channels goes on to ``norm_act_gradient``, with the gate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sacl_fast.ops import compiled
from sacl_fast.ops.norm_act import images_like, operand, precise
from sacl_fast.ops.slim_gate import slim_gate


def _forward(
    x: Tensor,
    affine: Tensor,
    act: int,
    map: Tensor | None,
    gate: Tensor,  # (N, C)
    x_index: Tensor | None,
    map_index: Tensor | None,
) -> Tensor:
    given = operand(x, affine, act), map, gate[:, :, None, None], x_index, map_index
    return images_like(slim_gate(*given, backend="torch"))


def _backward(
    dy: Tensor,
    x: Tensor,
    affine: Tensor,
    act: int,
    map: Tensor | None,
    gate: Tensor,
    x_index: Tensor | None,
    map_index: Tensor | None,
) -> tuple[Tensor, Tensor]:
    K = x.shape[1]
    dgate = torch.zeros_like(gate, dtype=precise(dy).dtype)
    parts = [(dy[:, :K], operand(x, affine, act), x_index)]
    dmap = x.new_empty(0)
    if map is not None and map_index is not None:
        parts.append((dy[:, K:], map, map_index))
        factors = gate.index_select(1, map_index)[:, :, None, None]
        dmap = images_like((precise(dy[:, K:]) * factors).sum(0, keepdim=True).to(x.dtype))
    for gradient, values, index in parts:
        products = (precise(gradient) * values).sum((2, 3))
        dgate = products if index is None else dgate.index_copy(1, index, products)
    return dmap, dgate


def _describe() -> None:
    for name, function in (("norm_slim_gate", _forward), ("norm_slim_gate_backward", _backward)):
        torch.library.impl(f"sacl_fast::{name}", "CPU")(function)
        torch.library.register_fake(f"sacl_fast::{name}")(function)


is_compiled = compiled.there(_describe)
