"""The sum of two slim activations in one pass over the channels.

Both operands of a residual sum may have live channels and constants, which differ; what either has
live is live in the sum. The compiled operator (``slim_add.cpp`` in ``csrc/cpu`` and ``csrc/cuda``)
writes the result's channels side by side, where PyTorch's take, add and concatenate pass by pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sacl_fast.ops import compiled
from sacl_fast.ops.backend import is_faster
from sacl_fast.ops.slim_channels import take_channels


def slim_add(
    a: Tensor,
    a_rest: Tensor | None,
    a_index: Tensor | None,
    b: Tensor,
    b_rest: Tensor | None,
    b_index: Tensor | None,
    *,
    backend: str = "auto",
) -> Tensor:
    """(N, U, H, W): channel u is a's channel ``a_index[u]`` plus b's ``b_index[u]``.

    Args:
        a: (N, Ka, H, W), the live channels.
        a_rest: (1, Ra, 1, 1), constants, which are numbered after the live ones.
        a_index: (U,) int64, no channel twice; None: all live ones, in order.
        b, b_rest, b_index: likewise.
        backend: ``cpu`` or ``cuda`` (compiled, see ``compiled.unfit``), ``torch``, or ``auto``.

    Raises:
        UserError: a backend given by name that cannot run, see ``backend.is_faster``.
    """
    if is_faster("slim_add", backend, _unfit, a, b, a_rest, b_rest):
        return _SlimAdd.apply(a, a_rest, a_index, b, b_rest, b_index)
    return _chosen(a, a_rest, a_index) + _chosen(b, b_rest, b_index)


def _chosen(x: Tensor, rest: Tensor | None, index: Tensor | None) -> Tensor:
    if index is None:
        return x
    if rest is not None:
        x = torch.cat([x, rest.expand(len(x), -1, *x.shape[2:])], 1)
    return take_channels(x, index)


def _unfit(a: Tensor, b: Tensor, *rests: Tensor | None) -> str | None:
    unfit = compiled.unfit(a, b, *rests) or compiled.unfit(b)
    return unfit or (None if is_compiled() else compiled.obstacle())


class _SlimAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        a_rest: Tensor | None,
        a_index: Tensor | None,
        b: Tensor,
        b_rest: Tensor | None,
        b_index: Tensor | None,
    ) -> Tensor:
        rests = [None if r is None else r.flatten() for r in (a_rest, b_rest)]
        counts = [0 if r is None else r.numel() for r in rests]
        ctx.given = a.shape[1], counts[0], a_index, b.shape[1], counts[1], b_index
        return torch.ops.sacl_fast.slim_add(a, rests[0], a_index, b, rests[1], b_index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        dy = dy.contiguous(memory_format=torch.channels_last)
        da, da_rest, db, db_rest = torch.ops.sacl_fast.slim_add_backward(dy, *ctx.given)
        rests = (r.view(1, -1, 1, 1) if r.numel() else None for r in (da_rest, db_rest))
        da, db = (d if d.numel() else dy for d in (da, db))
        return da, next(rests), None, db, next(rests), None


def _describe() -> None:
    @torch.library.register_fake("sacl_fast::slim_add")
    def _(a: Tensor, a_rest: Any, a_index: Tensor | None, *_: Any) -> Tensor:
        channels = a.shape[1] if a_index is None else len(a_index)
        return compiled.images(a, a.shape[0], channels, *a.shape[2:])

    @torch.library.register_fake("sacl_fast::slim_add_backward")
    def _(
        dy: Tensor, a_live: int, a_rest: int, a_index: Any, b_live: int, b_rest: int, b_index: Any
    ) -> Any:
        def gradient(live: int, index: Any) -> Tensor:
            whole = index is None
            return dy.new_empty(0) if whole else compiled.images(dy, len(dy), live, *dy.shape[2:])

        return (
            *(gradient(a_live, a_index), dy.new_empty(a_rest)),
            *(gradient(b_live, b_index), dy.new_empty(b_rest)),
        )


is_compiled = compiled.there(_describe)
