"""A slim activation times a gate for each sample (squeeze-excite), in one pass over the channels.

The gate turns a map, which is the same for all samples, into live channels. The compiled operator
(``csrc/cpu/slim_gate.cpp``, ``csrc/cuda/slim_gate.cpp``) writes the result's channels side by side,
where PyTorch's multiply and concatenate pass by pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sacl_fast.ops import compiled
from sacl_fast.ops.backend import is_faster


def slim_gate(
    x: Tensor,
    map: Tensor | None,
    gate: Tensor,
    x_index: Tensor | None = None,
    map_index: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """(N, K + R, H, W): channels times their gates, those of x and then those of the map.

    Args:
        x: (N, K, H, W), the channels ``x_index`` (K,) of the full activation; None: all, in order.
        map: (1, R, H, W), the same for all samples, the channels ``map_index`` (R,).
        gate: (N, C, 1, 1).
        backend: ``cpu`` or ``cuda`` (compiled, see ``compiled.unfit``), ``torch``, or ``auto``.

    Raises:
        UserError: a backend given by name that cannot run, see ``backend.is_faster``.
    """
    parts = [(x, x_index)] if map is None else [(x, x_index), (map, map_index)]
    if is_faster("slim_gate", backend, _unfit, x, map, gate):
        return _SlimGate.apply(x, map, gate, x_index, map_index)
    gated = [v * (gate if i is None else gate.index_select(1, i)) for v, i in parts]
    return gated[0] if map is None else torch.cat(gated, 1)


def _unfit(x: Tensor, map: Tensor | None, gate: Tensor) -> str | None:
    unfit = compiled.unfit(x, map, gate) or (None if map is None else compiled.unfit(map))
    return unfit or (None if is_compiled() else compiled.obstacle())


class _SlimGate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        map: Tensor | None,
        gate: Tensor,
        x_index: Tensor | None,
        map_index: Tensor | None,
    ) -> Tensor:
        factors = gate.flatten(1).contiguous()
        ctx.save_for_backward(x, map, factors)
        ctx.indices = x_index, map_index
        return torch.ops.sacl_fast.slim_gate(x, map, factors, x_index, map_index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        dy = dy.contiguous(memory_format=torch.channels_last)
        x, map, factors = ctx.saved_tensors
        dx, dmap, dgate = torch.ops.sacl_fast.slim_gate_backward(dy, x, map, factors, *ctx.indices)
        dmap = None if map is None else dmap
        return dx, dmap, dgate.view(*dgate.shape, 1, 1), None, None


def _describe() -> None:
    @torch.library.register_fake("sacl_fast::slim_gate")
    def _(x: Tensor, map: Tensor | None, *_: Any) -> Tensor:
        channels = x.shape[1] + (0 if map is None else map.shape[1])
        return compiled.images(x, x.shape[0], channels, *x.shape[2:])

    @torch.library.register_fake("sacl_fast::slim_gate_backward")
    def _(dy: Tensor, x: Tensor, map: Tensor | None, gate: Tensor, *_: Any) -> Any:
        dmap = dy.new_empty(0) if map is None else torch.empty_like(map)
        return torch.empty_like(x), dmap, torch.empty_like(gate)


is_compiled = compiled.there(_describe)
