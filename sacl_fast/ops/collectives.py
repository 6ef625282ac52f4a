"""Collectives: what makes W ranks of n samples equal one process of W * n.

The differentiable ones come back as themselves where there is one process, so callers need no
second path.

Scale of the gradients: ``DistributedDataParallel`` averages parameter gradients over the ranks.
Here every rank computes the same global loss and scales its share by W, so that the average is
the exact gradient of that loss (an in-place ``all_reduce`` inside a loss gives 1/W of it).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# Newer versions of torch have renamed it.
_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def world_size() -> int:
    """Processes in the default group; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


# --- operators, which a recorded or compiled pass can hold; without gradient ---------------------

torch.library.define("sacl_fast::all_gather", "(Tensor x) -> Tensor")
torch.library.define("sacl_fast::all_reduce", "(Tensor x) -> Tensor")


@torch.library.impl("sacl_fast::all_gather", "CompositeExplicitAutograd")
def _all_gather(x: Tensor) -> Tensor:  # (M,) -> (W * M,), in rank order
    out = x.new_empty(world_size() * len(x))
    _gather(out, x)
    return out


@torch.library.register_fake("sacl_fast::all_gather")
def _(x: Tensor) -> Tensor:
    return x.new_empty(world_size() * len(x))


@torch.library.impl("sacl_fast::all_reduce", "CompositeExplicitAutograd")
def _all_reduce(x: Tensor) -> Tensor:
    total = x.clone()
    dist.all_reduce(total)
    return total


@torch.library.register_fake("sacl_fast::all_reduce")
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


# --- with gradient -------------------------------------------------------------------------------


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:  # (n, D) -> (W * n, D)
        ctx.n = rows.shape[0]
        parts = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,) = grads
        start = dist.get_rank() * ctx.n
        return grad[start : start + ctx.n] * world_size()


def gather_rows(rows: Tensor) -> Tensor:
    """All ranks' rows in rank order: (n, D) -> (W * n, D). Each rank must bring n rows.

    The backward communicates nothing: every rank has the gradient of the same loss, takes its
    own rows of it and scales them by W (see the module's docstring).
    """
    return rows if world_size() == 1 else _GatherRows.apply(rows.contiguous())


def gather_uneven(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """All ranks' rows in rank order, without gradient: (n, ...) -> (sum of counts, ...).

    Args:
        counts: how many rows each rank brings.
    """
    if len(counts) == 1:
        return rows
    most = max(counts)
    own = rows.new_zeros(most, *rows.shape[1:])
    own[: len(rows)] = rows
    everything = rows.new_empty(len(counts) * most, *rows.shape[1:])
    _gather(everything, own)
    parts = everything.split(most) if most else ()
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])


class RowGather:
    """All ranks' rows, gathered without gradient while the caller goes on.

    ``wait`` gives (n, D) -> (W * n, D), in rank order. Each rank must bring n rows, and all ranks
    must start their gathers in the same order.
    """

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows.detach().contiguous()  # alive until it is sent
        self._all = rows.new_empty(world_size() * rows.shape[0], *rows.shape[1:])
        # As bytes: gloo does not know every type.
        out, own = (x.view(torch.uint8) for x in (self._all, self._rows))
        self._work = _gather(out, own, async_op=True)

    def wait(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
        return self._all


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of a tensor over all ranks; its gradient is summed over all ranks too."""
    return x if world_size() == 1 else _SumOverRanks.apply(x)
