r"""Triton kernels for the cross-correlation loss: value and gradient without a D x D matrix.

The maths and the names are those of ``sacl_fast/ops/xcorr_loss_reference.py``, which these
launchers replace one for one: standardised embeddings x = (A, B[, S, T]), sides 0 (A) and 1 (B);
the partner of a side is the other one, its target x[2 + side].

``gram`` (N <= D), 5 launches: standardize | gram (split along D) | combine | finish; backward:
gradient, which for up to 512 rows holds all of them in one program and goes through the
standardisation in its epilogue (else: project). ``tiles`` (N > D): standardize | (correlation |
gradient) for each panel of C | project | finish.

Embeddings are kept in the type they come in, everything reduced is fp32, and the N x N factors
enter the gradient as tf32 (bf16 would double its error). fp32 embeddings use tf32x3 throughout.
No atomics: every partial sum has memory of its own, and they are added up in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs

from sacl_kernels.options import FMA
from sacl_kernels.xcorr_loss_gradient_kernels import gradient_kernel, project_kernel
from sacl_kernels.xcorr_loss_kernels import (
    combine_kernel,
    correlation_kernel,
    finish_kernel,
    gram_kernel,
    standardize_kernel,
)
from sacl_kernels.xcorr_loss_launch import Launch, launch_for

# pyright: reportArgumentType=false, reportCallIssue=false
# (Triton's `kernel[grid]` takes what the kernel declares as constexpr, and launch options besides.)

# --- launchers -----------------------------------------------------------------------------------
# `rows` and `terms` are the tuples Rows and Terms of xcorr_loss_reference.


def gram_forward(
    batch: Sequence[Tensor], rows: Any, terms: Any, *, keep: bool, launch: Launch | None = None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The loss (), its terms (3,) and what ``gram_backward`` needs: x (2 or 4, N, D), rstd (2, D),
    diagonals (1 or 3, D), factors (2, n, N)."""
    launch = launch or _launch_for(batch, rows)
    with torch.cuda.device_of(batch[0]):
        x, rstd, diagonals = _standardize(batch, terms, launch)
        (embeddings, N, D), n = x.shape, rows.count
        symmetric = n == N
        splits = min(launch.gram_splits, triton.cdiv(D, launch.gram_depth))
        depth = triton.cdiv(triton.cdiv(D, splits), launch.gram_depth) * launch.gram_depth
        splits = triton.cdiv(D, depth)
        partial = _fp32(x, splits, embeddings, n, N)
        tiles = triton.cdiv(n, launch.gram_block) * triton.cdiv(N, launch.gram_block)
        gram_kernel[(tiles, embeddings, splits)](
            *(x, partial, rows.first, n, N, D, depth),
            SYMMETRIC=symmetric,
            PRECISION=_precision(x),
            BLOCK=launch.gram_block,
            BLOCK_K=launch.gram_depth,
            num_warps=launch.gram_warps,
            num_stages=launch.gram_stages,
            **FMA,
        )
        grid = triton.cdiv(n, launch.combine_block), triton.cdiv(N, launch.combine_block)
        factors, sums = _fp32(x, 2, n, N), _fp32(x, 2, grid[0] * grid[1])
        combine_kernel[grid](
            *(partial, factors, sums, n, N, terms.off, terms.xd),
            SYMMETRIC=symmetric,
            TARGETS=embeddings == 4,
            SPLITS=splits,
            BLOCK=launch.combine_block,
            **FMA,
        )
        if rows.sum_over_ranks is not None:
            sums = sums.sum(1, keepdim=True)
            rows.sum_over_ranks(sums)
        loss, parts = _finish(sums, diagonals, terms, float(N) ** 2, with_diagonal=True)
    return loss, parts, [x, rstd, diagonals, factors] if keep else []


def gram_backward(
    grad: Tensor, saved: Sequence[Tensor], rows: Any, terms: Any, launch: Launch | None = None
) -> Tensor:
    """Gradients (2, n, D) of this rank's rows of z1 and z2, in the type of x."""
    x, rstd, diagonals, factors = saved
    launch = launch or _launch_for(x, rows)
    with torch.cuda.device_of(x):
        n, (_, N, D) = rows.count, x.shape
        block = max(16, triton.next_power_of_2(n))
        fused = block <= launch.fused_rows and rows.sum_over_ranks is None
        block = block if fused else launch.gradient_rows
        blocks = triton.cdiv(n, block)
        out = x.new_empty(2, n, D, dtype=x.dtype if fused else torch.float32)
        sums = _fp32(x, *((2, 2, blocks, D) if not fused else (1,)))
        gradient_kernel[(triton.cdiv(D, launch.gradient_columns), blocks, 2)](
            *(x, factors, diagonals, rstd, grad, out, sums, rows.first, n, N, D, 0, D),
            *(N - terms.unbiased, 2 / N**2, terms.on, terms.off, terms.xd),
            GRAM=True,
            TARGETS=len(x) == 4,
            FUSED=fused,
            PRECISION=_precision(x),
            BLOCK_N=block,
            BLOCK_D=launch.gradient_columns,
            BLOCK_K=launch.gradient_depth,
            num_warps=launch.gradient_warps,
            num_stages=launch.gradient_stages,
            **FMA,
        )
        if not fused:
            out = _project(out, x, sums, rstd, grad, rows, terms, launch, x.dtype)
    return out


def tiles(
    batch: Sequence[Tensor], rows: Any, terms: Any, *, keep: bool, launch: Launch | None = None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The loss (), its terms (3,) and if ``keep`` the gradients (2, n, D) of z1 and z2 in fp32."""
    launch = launch or _launch_for(batch, rows)
    with torch.cuda.device_of(batch[0]):
        x, rstd, diagonals = _standardize(batch, terms, launch)
        (embeddings, N, D), n = x.shape, rows.count
        width = min(launch.panel if keep else D, D)
        block = launch.correlation_block
        programs = 2 * (embeddings // 2) * triton.cdiv(width, block) * triton.cdiv(D, block)
        count = triton.cdiv(D, width) * programs
        sums = x.new_zeros(2, count, dtype=torch.float32)
        panel = x.new_empty(2, embeddings // 2, width if keep else 0, D)
        blocks = triton.cdiv(n, launch.gradient_rows)
        dx, column_sums = _fp32(x, 2, n, D), _fp32(x, 2, 2, blocks, D)
        scale = max(terms.off, terms.xd) or 1.0
        for number, start in enumerate(range(0, D, width)):
            P = min(width, D - start)
            grid = triton.cdiv(P, block) * triton.cdiv(D, block), embeddings // 2, 2
            correlation_kernel[grid](
                *(x, panel, sums, number * programs, count, start, P, N, D),
                *(terms.off, terms.xd, scale),
                KEEP=keep,
                PRECISION=_precision(x),
                BLOCK=block,
                BLOCK_K=launch.correlation_depth,
                num_warps=launch.correlation_warps,
                num_stages=launch.correlation_stages,
                **FMA,
            )
            if not keep:
                continue
            gradient_kernel[(triton.cdiv(P, launch.tile_columns), blocks, 2)](
                *(x, panel, diagonals, rstd, rstd, dx, column_sums, rows.first, n, N, D, start, P),
                *(N - terms.unbiased, 2 * scale / N, terms.on, 0.0, 0.0),
                GRAM=False,
                TARGETS=embeddings == 4,
                FUSED=False,
                PRECISION=_precision(x),
                BLOCK_N=launch.gradient_rows,
                BLOCK_D=launch.tile_columns,
                BLOCK_K=launch.gradient_depth,
                num_warps=launch.gradient_warps,
                num_stages=launch.gradient_stages,
                **FMA,
            )
        loss, parts = _finish(sums, diagonals, terms, 1.0, with_diagonal=False)
        if not keep:
            return loss, parts, []
        one = torch.ones((), device=x.device)
        dz = _project(dx, x, column_sums, rstd, one, rows, terms, launch, torch.float32)
    return loss, parts, [dz]


def _standardize(
    batch: Sequence[Tensor], terms: Any, launch: Launch
) -> tuple[Tensor, Tensor, Tensor]:
    if knobs.runtime.interpret and batch[0].dtype == torch.bfloat16:
        raise ValueError("Triton's interpreter multiplies bf16 wrongly; fp32 and fp16 work in it")
    zs = [z if z.stride(1) == 1 else z.contiguous() for z in batch]
    (N, D), count = zs[0].shape, len(zs)
    x = zs[0].new_empty(count, N, D)
    rstd, diagonals = _fp32(x, 2, D), _fp32(x, count - 1, D)
    four = zs if count == 4 else zs * 2
    standardize_kernel[(triton.cdiv(D, launch.standardize_columns),)](
        *(*four, x, rstd, diagonals, *(z.stride(0) for z in four), N, D),
        *(N - terms.unbiased, terms.eps),
        TARGETS=count == 4,
        BLOCK_N=min(launch.standardize_rows, triton.next_power_of_2(N)),
        BLOCK_D=launch.standardize_columns,
        num_warps=launch.standardize_warps,
        **FMA,
    )
    return x, rstd, diagonals


def _finish(
    sums: Tensor, diagonals: Tensor, terms: Any, divisor: float, *, with_diagonal: bool
) -> tuple[Tensor, Tensor]:
    loss, parts = sums.new_empty(()), sums.new_empty(3)
    finish_kernel[(1,)](
        *(sums, diagonals, loss, parts, sums.shape[1], diagonals.shape[1], divisor),
        *(terms.on, terms.off, terms.xd),
        TARGETS=len(diagonals) == 3,
        WITH_DIAGONAL=with_diagonal,
        BLOCK=1024,
        **FMA,
    )
    return loss, parts


def _project(
    dx: Tensor,
    x: Tensor,
    sums: Tensor,
    rstd: Tensor,
    grad: Tensor,
    rows: Any,
    terms: Any,
    launch: Launch,
    dtype: torch.dtype,
) -> Tensor:
    if rows.sum_over_ranks is not None:
        sums = sums.sum(2, keepdim=True)
        rows.sum_over_ranks(sums)
    out = torch.empty_like(dx, dtype=dtype)
    n, (_, N, D) = rows.count, x.shape
    block_n, block_d = launch.project_rows, launch.project_columns
    project_kernel[(triton.cdiv(D, block_d), triton.cdiv(n, block_n), 2)](
        *(dx, x, sums, rstd, grad, out, rows.first, n, N, D, sums.shape[2], N - terms.unbiased),
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        **FMA,
    )
    return out


def _launch_for(batch: Sequence[Tensor] | Tensor, rows: Any) -> Launch:
    z = batch[0]
    capability = torch.cuda.get_device_capability(z.device) if z.is_cuda else (9, 0)
    return launch_for(*z.shape, z.dtype, capability)


def _precision(x: Tensor) -> str:
    return "tf32x3" if x.dtype == torch.float32 else "tf32"


def _fp32(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)
