"""Launch settings of the 1x1 convolution of a normalised operand, by shape, type, architecture.

Nothing is tuned at run time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A kernel's block sizes, warps and stages, and its programs a multiprocessor."""

    rows: int
    outs: int
    ins: int
    warps: int
    stages: int
    resident: int = 2

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
    """whether all K are one block of ``forward``, so that a program loads its weights once"""
    fused: Tile | None
    """of both gradients in one kernel; None: too many channels for that"""
    input: Tile
    weight: Tile


_PROCESSORS = {8: 108, 9: 132}  # of an A100, of an H100 or H200


def launch_for(K: int, O: int, dtype: torch.dtype, capability: tuple[int, int]) -> Launch:
    """The settings for K to O channels. Estimated from occupancy, not yet measured on a GPU."""
    half, hopper = dtype != torch.float32, capability[0] >= 9
    whole = _block(K) <= (128 if half else 64)
    columns = _columns(O, K, 128 if half else 64)
    forward = Tile(
        rows=128,
        outs=columns,
        ins=_block(K) if whole else 64 if half else 32,
        warps=8 if columns > 64 else 4,
        stages=3,
    )
    fused = None
    if _block(K) <= 128 and _block(O) <= 128 and half:
        large = _block(K) * _block(O) > 64 * 64
        fused = Tile(
            rows=64,
            outs=_block(O),
            ins=_block(K),
            warps=8 if large else 4,
            stages=3 if hopper else 2,
            resident=1 if large else 2,
        )
    columns = _columns(K, 2 * O, 128 if half else 64)
    input = Tile(
        rows=128, outs=32, ins=columns, warps=8 if columns > 64 else 4, stages=3
    )
    side = 128 if half else 64
    outs, ins = _columns(O, 2 * K, side), _columns(K, 2 * O, side)
    weight = Tile(
        rows=64 if half else 32, outs=outs, ins=ins, warps=8 if outs * ins > 64 * 64 else 4, stages=3
    )
    return Launch(
        processors=_PROCESSORS.get(capability[0], 132),
        forward=forward,
        whole=whole,
        fused=fused,
        input=input,
        weight=weight,
    )


def _block(channels: int) -> int:
    """The smallest block that holds the channels."""
    return max(16, 1 << (channels - 1).bit_length())


def _columns(channels: int, depth: int, most: int) -> int:
    """The block into which channels are cut, if every block reads ``depth`` others again: the
    fewest numbers read or padded."""
    sizes = [s for s in (16, 32, 64, 128) if s <= min(most, _block(channels))]
    return min(reversed(sizes), key=lambda s: -(-channels // s) * (depth + s))
