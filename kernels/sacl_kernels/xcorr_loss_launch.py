"""Launch settings of the cross-correlation loss, by (N, D, type, architecture).

Nothing is tuned at run time. ``benchmarks/tune_xcorr_loss.py`` searches and prints what to change
here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Block sizes, warps and pipeline stages of every kernel."""

    standardize_rows: int = 128
    standardize_columns: int = 16
    standardize_warps: int = 8
    gram_block: int = 64
    gram_depth: int = 64
    """features in one step of the inner loop; a split covers a multiple of it"""
    gram_splits: int = 4
    gram_warps: int = 4
    gram_stages: int = 3
    combine_block: int = 32
    """divides gram_block"""
    fused_rows: int = 512
    """rows up to which one program has all of them, and goes through the standardisation"""
    gradient_rows: int = 128
    gradient_columns: int = 32
    tile_columns: int = 64
    gradient_depth: int = 32
    gradient_warps: int = 8
    gradient_stages: int = 3
    correlation_block: int = 128
    correlation_depth: int = 64
    correlation_warps: int = 8
    correlation_stages: int = 3
    panel: int = 2048
    """rows of C at a time: up to four of panel x D in the type of the embeddings"""
    project_rows: int = 32
    project_columns: int = 128


_PROCESSORS = {8: 108, 9: 132}  # of an A100, of an H100 or H200


def launch_for(N: int, D: int, dtype: torch.dtype, capability: tuple[int, int]) -> Launch:
    """The settings for N x D embeddings. Estimated from occupancy, not yet measured on a GPU."""
    launch = Launch()
    tiles = -(-N // launch.gram_block)
    programs = 4 * tiles * (tiles + 1) // 2
    # About two programs a processor, of no less than 512 features each.
    wanted = -(-2 * _PROCESSORS.get(capability[0], 132) // programs)
    launch = replace(launch, gram_splits=max(1, min(wanted, -(-D // 512))))
    if dtype == torch.float32:  # tf32x3 holds three products in flight
        launch = replace(
            launch,
            standardize_rows=64,
            gram_depth=32,
            correlation_block=64,
            correlation_depth=32,
            correlation_warps=4,
            tile_columns=32,
            fused_rows=256,
        )
    aligned = N % 16 == 0 and D % 16 == 0
    if not aligned:  # an address for every number, so smaller blocks
        launch = replace(
            launch,
            standardize_rows=64,
            gram_block=32,
            gram_depth=32,
            correlation_block=64,
            correlation_depth=32,
            gradient_rows=64,
            gradient_columns=16,
            tile_columns=32,
            fused_rows=256,
        )
        if dtype == torch.float32:  # Triton 3.9 spills with 4
            launch = replace(launch, gram_warps=8)
    if capability[0] < 9 and dtype == torch.float32:  # less goes into an Ampere's registers
        launch = replace(launch, gram_warps=8)
        if not aligned:
            launch = replace(launch, standardize_rows=32, tile_columns=16, gradient_depth=16)
    return launch
