"""Launch settings of the 1x1 convolution of a normalised operand, by channels, type, architecture.

Nothing is tuned at run time. Blocks are the largest that spill no registers, with the programs a
multiprocessor that leave them enough: estimated from occupancy, not yet measured on a GPU.
"""
# ruff: noqa: E741 (O: output channels, as in the shapes)

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A kernel's block sizes, and how many programs of how many warps share a multiprocessor."""

    rows: int
    outs: int
    ins: int
    warps: int
    stages: int
    resident: int

    @property
    def registers(self) -> int:
        """of a thread, so that ``resident`` programs fit. Always given: left alone, the assembler
        spills a few to get under the next bound."""
        return min(65536 // (32 * self.warps * self.resident) // 8 * 8, 255)

    @property
    def sharing(self) -> int:
        """warps that share a block's rows, each 16"""
        return min(self.warps, self.rows // 16)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The settings of all kernels for K to O channels."""

    processors: int
    forward: Tile
    whole: bool
    """whether a program of ``forward`` loads its weights once, for all K"""
    fused: Tile | None
    """of both gradients in one kernel; None: too many output channels for that, or float32"""
    input: Tile
    weight: Tile


_PROCESSORS = {8: 108, 9: 132}  # of an A100, of an H100 or H200


def launch_for(K: int, O: int, dtype: torch.dtype, capability: tuple[int, int]) -> Launch:
    """The settings for K to O channels."""
    hopper, half = capability[0] >= 9, dtype != torch.float32
    processors = _PROCESSORS.get(capability[0], 132)
    if half and K % 8 == 0 and O % 8 == 0:
        return _aligned(K, O, hopper, processors)
    # Odd rows take an address for every number, and tf32x3 holds three products in flight.
    large = half or hopper
    side, warps = (64, 8) if large else (32, 4)
    return Launch(
        processors=processors,
        forward=_tile(K, O, 64, side, side // 2, warps, 2, 1),
        whole=large and K <= 64,
        fused=_tile(K, O, 64, 64, 32, 8, 2, 1) if O <= 64 and half else None,
        input=_tile(K, O, 64, 32, side, 8, 2, 1),
        weight=_tile(K, O, 32, side, side, warps, 2, 1),
    )


def _aligned(K: int, O: int, hopper: bool, processors: int) -> Launch:
    """For half types in rows that are multiples of 16 bytes."""
    whole = K <= 128 if hopper else K <= 96
    if whole or (O <= 64 and hopper):
        forward = _tile(K, O, 64, 64, 32, 4, 3, 3 if hopper else 2)
    else:
        forward = _tile(K, O, 128 if hopper else 64, 128, 32, 8, 4 if hopper else 3, 1)
    fused = None
    if not hopper:
        small = _block(K) * _block(O) <= 1024
        warps, resident = (4, 3) if small else (8, 1)
        fused = _tile(K, O, 64, 128, 32, warps, 2, resident) if O <= 128 else None
    elif O <= 64 and K <= 32:
        warps, stages = (8, 2) if O > 32 else (4, 3)
        fused = _tile(K, O, 64, 64, 32, warps, stages, 2)
    elif O <= 128:
        fused = _tile(K, O, 64, 128, 64, 8, 2 if O > 64 else 3, 1)
    elif O <= 256 and K <= 64:  # g and y are read again for every 32 of K
        fused = _tile(K, O, 64, 256, 32, 8, 3, 1)
    return Launch(
        processors=processors,
        forward=forward,
        whole=whole,
        fused=fused,
        input=_tile(K, O, 64, 32, 128 if hopper else 64, 8, 3, 1),
        weight=_tile(K, O, 64, 128, 128, 8, 2, 1) if hopper else _tile(K, O, 32, 128, 64, 8, 3, 1),
    )


def _tile(
    K: int, O: int, rows: int, outs: int, ins: int, warps: int, stages: int, resident: int
) -> Tile:
    """A tile of these numbers, but blocks of channels no larger than K and O need."""
    return Tile(
        rows=rows,
        outs=min(outs, _block(O)),
        ins=min(ins, _block(K)),
        warps=warps,
        stages=stages,
        resident=resident,
    )


def _block(channels: int) -> int:
    """The smallest block that holds the channels."""
    return max(16, 1 << (channels - 1).bit_length())
