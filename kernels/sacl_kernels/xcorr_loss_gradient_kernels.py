"""The Triton kernels of the gradient of the cross-correlation loss; see ``xcorr_loss_kernels``."""

from __future__ import annotations

# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# (Triton's language looks like Python and is not.)
import triton
import triton.language as tl

from sacl_kernels.xcorr_loss_kernels import load_block


@triton.jit
def gradient_kernel(
    x,  # (E, N, D)
    factors,  # gram: (2, n, N) fp32. tiles: (2, E / 2, P, D), type of x
    diagonals,  # (1 or 3, D) fp32
    rstd,  # (2, D) fp32
    grad,  # () of the loss; only read if FUSED
    out,  # (2, n, D): FUSED: the gradient of z; else that of x, fp32
    sums,  # not FUSED: (2 sides, 2, row blocks, D) fp32: column sums of dx and of dx * x
    first,
    n,
    N,
    D,
    start,  # first feature of the panel; 0 for gram
    P,  # features of the panel; D for gram
    degrees,
    scale,  # of the product
    on,  # weights of the diagonal terms
    off,
    xd,
    GRAM: tl.constexpr,
    TARGETS: tl.constexpr,
    FUSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: BLOCK_N rows of BLOCK_D features of the gradient of one side.

    gram: factor @ x[side]. tiles: partner @ C^T + target @ C^T. Then the diagonal terms and, if
    FUSED (which takes all rows), the backward pass of the standardisation."""
    block, side = tl.program_id(1), tl.program_id(2)
    size = tl.cast(N, tl.int64) * D
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    local = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)  # within the panel
    cols = start + local
    row_mask, col_mask = rows < n, local < P
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if GRAM:
        factor = factors + tl.cast(side, tl.int64) * n * N
        for k in range(0, N, BLOCK_K):
            ks = k + tl.arange(0, BLOCK_K)
            m = load_block(factor, N, rows, ks, row_mask, ks < N)
            y = load_block(x + side * size, D, ks, cols, ks < N, col_mask).to(tl.float32)
            acc = tl.dot(m, y, acc, input_precision=PRECISION)
    else:
        pairs: tl.constexpr = 2 if TARGETS else 1
        for pair in tl.static_range(pairs):
            y = x + (1 - side if pair == 0 else 2 + side) * size
            c = factors + tl.cast(side * pairs + pair, tl.int64) * P * D
            for k in range(0, D, BLOCK_K):
                ks = k + tl.arange(0, BLOCK_K)
                left = load_block(y, D, first + rows, ks, row_mask, ks < D)
                right = load_block(c, D, local, ks, col_mask, ks < D)
                acc = tl.dot(left, tl.trans(right), acc, input_precision=PRECISION)

    c1 = tl.load(diagonals + cols, mask=col_mask, other=1.0)
    to_partner = (-2.0 / N) * (on * (1 - c1) + off * c1)
    # Offsets within the block in 32 bits: 64 would take twice the registers.
    inside = tl.arange(0, BLOCK_N)[:, None] * D + cols[None, :]
    mask = row_mask[:, None] & col_mask[None, :]
    above = tl.cast(block * BLOCK_N, tl.int64) * D
    tile = x + tl.cast(first, tl.int64) * D + above
    partner = tl.load(tile + (1 - side) * size + inside, mask=mask, other=0.0)
    dx = scale * acc + partner.to(tl.float32) * to_partner[None, :]
    if GRAM and TARGETS:
        c = tl.load(diagonals + (1 + side) * D + cols, mask=col_mask, other=0.0)
        target = tl.load(tile + (2 + side) * size + inside, mask=mask, other=0.0)
        dx += target.to(tl.float32) * ((-2.0 / N) * xd * c)[None, :]

    own = tl.load(tile + side * size + inside, mask=mask, other=0.0).to(tl.float32)
    total, products = tl.sum(dx, 0), tl.sum(dx * own, 0)  # outside of the masks all is 0
    out_tile = out + tl.cast(side, tl.int64) * n * D + above
    if FUSED:
        factor = tl.load(rstd + side * D + cols, mask=col_mask, other=0.0) * tl.load(grad)
        dz = (dx - (total / N)[None, :] - own * (products / degrees)[None, :]) * factor[None, :]
        tl.store(out_tile + inside, dz, mask=mask)
    else:
        tl.store(out_tile + inside, dx, mask=mask)
        blocks = tl.num_programs(1)
        own_sums = sums + (side * 2 * blocks + block).to(tl.int64) * D + cols
        tl.store(own_sums, total, mask=col_mask)
        tl.store(own_sums + tl.cast(blocks, tl.int64) * D, products, mask=col_mask)


@triton.jit
def project_kernel(
    dx,  # (2, n, D) fp32
    x,  # (E, N, D)
    sums,  # (2, 2, blocks, D) fp32
    rstd,  # (2, D) fp32
    grad,  # () fp32, of the loss
    out,  # (2, n, D)
    first,
    n,
    N,
    D,
    blocks,
    degrees,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: a block of ``rstd * (dx - mean(dx) - x sum(dx x) / degrees)`` of one side."""
    side = tl.program_id(2)
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, col_mask = rows < n, cols < D
    total = tl.zeros((BLOCK_D,), tl.float32)
    products = tl.zeros((BLOCK_D,), tl.float32)
    base = sums + tl.cast(side, tl.int64) * 2 * blocks * D + cols
    for block in range(blocks):
        total += tl.load(base + tl.cast(block, tl.int64) * D, mask=col_mask, other=0.0)
        products += tl.load(base + tl.cast(blocks + block, tl.int64) * D, mask=col_mask, other=0.0)
    offset = tl.cast(side, tl.int64) * n * D
    y = load_block(x + tl.cast(side, tl.int64) * N * D, D, first + rows, cols, row_mask, col_mask)
    value = load_block(dx + offset, D, rows, cols, row_mask, col_mask)
    factor = tl.load(rstd + side * D + cols, mask=col_mask, other=0.0) * tl.load(grad)
    value -= (total / N)[None, :] + y.to(tl.float32) * (products / degrees)[None, :]
    offsets = offset + rows[:, None].to(tl.int64) * D + cols[None, :]
    tl.store(out + offsets, value * factor[None, :], mask=row_mask[:, None] & col_mask[None, :])
