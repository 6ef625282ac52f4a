"""LARS with momentum over all tensors of a group, in two launches.

For each parameter p with gradient g and momentum m, all float32, dense and with the same strides::

    trust = eta * |p| / (|g| + weight_decay * |p| + 1e-8)      with clip: min(trust / lr, 1)
    m = momentum * m + trust * (g + weight_decay * p)
    p = p - lr * m

``sacl_fast/ops/lars.py`` is the same in plain PyTorch. The first launch writes sums of squares of
chunks of weights and gradients; the second adds those of a tensor up in a fixed order, without
atomics, and updates. With n values in all, 4 n bytes times 7 move: two reads for the norms, three
reads and two writes for the update.

Where tensors lie is in tables on the device. Their numbers get there as arguments of further
launches, ``NUMBERS`` each: in the first step four for a tensor, and later one, its gradient's
address, where gradients have moved. Nothing is copied from the host's memory, so nothing there must
outlive the copy, and a CUDA graph with such a launch writes the addresses that it was captured
with. Tables are never written again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import triton
from torch import Tensor

from sacl_kernels.lars_kernels import norms_kernel, table_kernel, update_kernel
from sacl_kernels.options import FMA

# pyright: reportArgumentType=false, reportCallIssue=false
# (Triton's `kernel[grid]` takes what the kernel declares as constexpr, and launch options besides.)

NUMBERS = 480  # arguments of a launch: 3,840 of the 4,096 bytes that all devices take
_STEP = 32  # their count is rounded up to a multiple, so that few kernels are compiled
_OFFSET = 1 << 40
_KEPT = 8  # tables; gradients alternate between a few places, if they move at all


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Estimated from occupancy, not yet measured on a GPU."""

    block: int = 2048
    """values of a tensor that a program has at once"""
    chunk: int = 8192
    """values of a program, at least: a multiple of ``block``"""
    chunks: int = 1024
    """of a tensor, at most: each program adds the sums of all of them up"""
    sums: int = 256
    """that are added at once"""
    warps: int = 8

    def chunk_size(self, largest: int) -> int:
        """For tensors of at most ``largest`` values."""
        return self.chunk * max(1, -(-largest // (self.chunk * self.chunks)))


class Tables:
    """Numbers of the host, in device memory."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, ...], Tensor] = {}
        self._in_graphs: list[Tensor] = []

    def of(self, numbers: tuple[int, ...], device: torch.device) -> Tensor:
        """int64 (at least as many as there are numbers)."""
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        table = self._kept.pop(numbers, None)
        if table is None:
            table = _written(numbers, device)
            if capturing:  # it has its numbers when the graph runs, and is the graph's memory
                return table
        elif capturing:
            self._in_graphs.append(table)
        self._kept[numbers] = table
        if len(self._kept) > _KEPT:
            del self._kept[next(iter(self._kept))]
        return table


def _written(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    # Encoded so that all are int64, multiples of 16 and not 1: Triton compiles anew for others.
    encoded = [number * 16 + _OFFSET for number in numbers]
    encoded += [_OFFSET] * (-len(encoded) % _STEP)
    table = torch.empty(len(encoded), dtype=torch.int64, device=device)
    for first in range(0, len(encoded), NUMBERS):
        part = tuple(encoded[first : first + NUMBERS])
        table_kernel[(1,)](table, first, part, OFFSET=_OFFSET, COUNT=len(part), num_warps=1, **FMA)
    return table


def update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    scaled: int,
    *,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    eta: float,
    clip: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    tables: Tables,
    launch: Launch | None = None,
) -> None:
    """One update in place.

    Args:
        params, grads, momenta: float32, none of them empty, on one device; each three have the same
            strides and no gaps in memory.
        scaled: as many of the first have a trust ratio and decay; of the others it is 1, without.
        lr: a number, or one on the device ().
        grad_scale: gradients are divided by it ().
        found_inf: where it is not 0, nothing is written ().
        tables: the same in every step.
    """
    launch = launch or Launch()
    device, P = params[0].device, len(params)
    sizes = [p.numel() for p in params]
    chunk_size = launch.chunk_size(max(sizes))
    firsts = [0, *accumulate(-(-size // chunk_size) for size in sizes)]
    places = [[t.data_ptr() for t in tensors] for tensors in (params, momenta, grads)]
    common = {
        "PADDED_P": triton.next_power_of_2(P),
        "ALIGNED": all(place % 16 == 0 for of_one in places for place in of_one),
        "BLOCK": launch.block,
        "num_warps": launch.warps,
    }
    with torch.cuda.device_of(params[0]):
        tensors = tables.of((*places[0], *places[1], *sizes, *firsts[:-1]), device)
        gradients = tables.of(tuple(places[2]), device)
        partial = torch.empty(2, firsts[scaled], device=device)
        if scaled:
            norms_kernel[(firsts[scaled],)](
                *(tensors, gradients, partial, P, firsts[scaled], chunk_size), **common, **FMA
            )
        update_kernel[(firsts[-1],)](
            *(tensors, gradients, partial, lr, grad_scale, found_inf, P, firsts[scaled]),
            *(chunk_size, momentum, weight_decay, eta),
            LR_ON_DEVICE=isinstance(lr, Tensor),
            CLIP=clip,
            BLOCK_SUMS=launch.sums,
            **common,
            **FMA,
        )
