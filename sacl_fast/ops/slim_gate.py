"""Sums of two slim activations, and their products with a gate, in one pass over the channels.

Both operands of a residual sum may have live channels and constants, which differ; what either has
live is live in the sum. A squeeze-excite gate turns maps, which all samples share, into live
channels. The compiled operators (``combine.cpp`` in ``csrc/cpu`` and
``csrc/cuda``) write the result's channels side by
side, where PyTorch's take, add, multiply and concatenate pass by pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sacl_fast.ops import compiled
from sacl_fast.ops.slim_channels import take_channels


def slim_add(
    a: Tensor,
    a_rest: Tensor | None,
    a_source: Tensor | None,
    b: Tensor,
    b_rest: Tensor | None,
    b_source: Tensor | None,
    *,
    backend: str = "auto",
) -> Tensor:
    """(N, U, H, W): channel u is a's channel ``a_source[u]`` plus b's ``b_source[u]``.

    Args:
        a: (N, Ka, H, W), the live channels.
        a_rest: (1, Ra, 1, 1), constants, which are numbered after the live ones.
        a_source: (U,) int64, no channel twice; None: all live ones, in order.
        b, b_rest, b_source: likewise.
        backend: ``cpu`` or ``cuda`` (compiled, see ``compiled.takes``), ``torch``, or ``auto``.
    """
    if backend != "torch" and _suit((a, b), a_rest, b_rest):
        return _SlimAdd.apply(  # type: ignore[no-any-return]
            a, a_rest, a_source, b, b_rest, b_source
        )
    return _chosen(a, a_rest, a_source) + _chosen(b, b_rest, b_source)


def _chosen(x: Tensor, rest: Tensor | None, source: Tensor | None) -> Tensor:
    if source is None:
        return x
    if rest is not None:
        x = torch.cat([x, rest.expand(len(x), -1, *x.shape[2:])], 1)
    return take_channels(x, source)


def slim_gate(
    x: Tensor,
    shared: Tensor | None,
    gate: Tensor,
    index: Tensor | None = None,
    shared_index: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """(N, K + R, H, W): channels times their gates, those of x and then the shared ones.

    Args:
        x: (N, K, H, W), the channels ``index`` (K,) of the full activation; None: all, in order.
        shared: (1, R, H, W), the same for all samples, the channels ``shared_index`` (R,).
        gate: (N, C, 1, 1).
        backend: as of ``slim_add``.
    """
    parts = [(x, index)] if shared is None else [(x, index), (shared, shared_index)]
    if backend != "torch" and _suit([values for values, _ in parts], gate):
        return _SlimGate.apply(x, shared, gate, index, shared_index)  # type: ignore[no-any-return]
    gated = [v * (gate if i is None else gate.index_select(1, i)) for v, i in parts]
    return gated[0] if shared is None else torch.cat(gated, 1)


def _suit(images: Any, *others: Tensor | None) -> bool:
    given = [t for t in others if t is not None]
    return all(compiled.takes(x, *given) for x in images) and is_compiled()


class _SlimAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        a_rest: Tensor | None,
        a_source: Tensor | None,
        b: Tensor,
        b_rest: Tensor | None,
        b_source: Tensor | None,
    ) -> Tensor:
        rests = [None if r is None else r.flatten() for r in (a_rest, b_rest)]
        counts = [0 if r is None else r.numel() for r in rests]
        ctx.given = a.shape[1], counts[0], a_source, b.shape[1], counts[1], b_source
        return torch.ops.sacl_fast.slim_add(  # type: ignore[no-any-return]
            a, rests[0], a_source, b, rests[1], b_source
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        dy = dy.contiguous(memory_format=torch.channels_last)
        da, da_rest, db, db_rest = torch.ops.sacl_fast.slim_add_backward(dy, *ctx.given)
        rests = (r.view(1, -1, 1, 1) if r.numel() else None for r in (da_rest, db_rest))
        da, db = (d if d.numel() else dy for d in (da, db))
        return da, next(rests), None, db, next(rests), None


class _SlimGate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shared: Tensor | None,
        gate: Tensor,
        index: Tensor | None,
        shared_index: Tensor | None,
    ) -> Tensor:
        factors = gate.flatten(1).contiguous()
        ctx.save_for_backward(x, shared, factors)
        ctx.indices = index, shared_index
        return torch.ops.sacl_fast.slim_gate(  # type: ignore[no-any-return]
            x, shared, factors, index, shared_index
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        dy = dy.contiguous(memory_format=torch.channels_last)
        x, shared, factors = ctx.saved_tensors
        dx, dshared, dgate = torch.ops.sacl_fast.slim_gate_backward(
            dy, x, shared, factors, *ctx.indices
        )
        dshared = None if shared is None else dshared
        return dx, dshared, dgate.view(*dgate.shape, 1, 1), None, None


def _describe() -> None:
    @torch.library.register_fake("sacl_fast::slim_add")
    def _(a: Tensor, a_rest: Any, a_source: Tensor | None, *_: Any) -> Tensor:
        channels = a.shape[1] if a_source is None else len(a_source)
        return compiled.images(a, a.shape[0], channels, *a.shape[2:])

    @torch.library.register_fake("sacl_fast::slim_gate")
    def _(x: Tensor, shared: Tensor | None, *_: Any) -> Tensor:
        channels = x.shape[1] + (0 if shared is None else shared.shape[1])
        return compiled.images(x, x.shape[0], channels, *x.shape[2:])

    @torch.library.register_fake("sacl_fast::slim_add_backward")
    def _(
        dy: Tensor, a_live: int, a_rest: int, a_source: Any, b_live: int, b_rest: int, b_source: Any
    ) -> Any:
        def gradient(live: int, source: Any) -> Tensor:
            whole = source is None
            return dy.new_empty(0) if whole else compiled.images(dy, len(dy), live, *dy.shape[2:])

        return (
            *(gradient(a_live, a_source), dy.new_empty(a_rest)),
            *(gradient(b_live, b_source), dy.new_empty(b_rest)),
        )

    @torch.library.register_fake("sacl_fast::slim_gate_backward")
    def _(dy: Tensor, x: Tensor, shared: Tensor | None, gate: Tensor, *_: Any) -> Any:
        dshared = dy.new_empty(0) if shared is None else torch.empty_like(shared)
        return torch.empty_like(x), dshared, torch.empty_like(gate)


is_compiled = compiled.there(_describe)
