"""The Triton kernel of the 1x1 convolution of a normalised operand, and what it shares with those
of its gradient (``norm_pointwise_gradient_kernels``); ``norm_pointwise`` launches them.

Images are matrices of M rows (the pixels of all samples) with unit column stride: x (M, K),
y (M, O). Programs are persistent: each takes every n-th tile of rows, so that what it sums leaves
one partial sum. Column masks load zeros, which every prologue keeps.
"""

from __future__ import annotations

# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# (Triton's language looks like Python and is not.)
import triton
import triton.language as tl

# --- activations, by their number in csrc/activation_list.h ---------------------------------------


@triton.jit
def activated(z, ACT: tl.constexpr):
    """none, relu, relu6, hardswish or silu; NaN stays NaN, and 0 stays 0."""
    if ACT == 1:
        z = tl.where(z < 0, 0.0, z)
    elif ACT == 2:
        z = tl.where(z < 0, 0.0, tl.where(z > 6, 6.0, z))
    elif ACT == 3:
        z = z * tl.where(z < -3, 0.0, tl.where(z > 3, 6.0, z + 3)) * (1.0 / 6)
    elif ACT == 4:
        z = z / (1 + tl.exp(-z))
    return z


@triton.jit
def through_activation(d, z, ACT: tl.constexpr):
    """d times the derivative at z."""
    if ACT == 1:
        d = tl.where(z > 0, d, 0.0)
    elif ACT == 2:
        d = tl.where((z > 0) & (z < 6), d, 0.0)
    elif ACT == 3:
        d = tl.where(z < -3, 0.0, tl.where(z <= 3, d * (z * (1.0 / 3) + 0.5), d))
    elif ACT == 4:
        s = 1 / (1 + tl.exp(-z))
        d = d * s * (1 + z * (1 - s))
    return d


# --- blocks --------------------------------------------------------------------------------------


@triton.jit
def aligned(size, ALIGN: tl.constexpr):
    """A number of channels that is a multiple of ALIGN, known as such to the compiler."""
    return size // ALIGN * ALIGN


@triton.jit
def load_rows(base, first, rows, row_mask, cols, col_mask, width):
    """Rows first + rows of a matrix (M, width)."""
    tile = base + first.to(tl.int64) * width
    mask = row_mask[:, None] & col_mask[None, :]
    return tl.load(tile + rows[:, None] * width + cols[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(base, value, first, rows, row_mask, cols, col_mask, width):
    tile = base + first.to(tl.int64) * width
    mask = row_mask[:, None] & col_mask[None, :]
    tl.store(tile + rows[:, None] * width + cols[None, :], value, mask=mask)


@triton.jit
def load_weight(weight, out_index, in_index, outs, out_mask, ins, in_mask, stride):
    """A block of weight[out_index][:, in_index], out of a matrix with rows of ``stride``."""
    o, i = outs, ins
    if out_index is not None:
        o = tl.load(out_index + outs, mask=out_mask, other=0).to(tl.int32)
    if in_index is not None:
        i = tl.load(in_index + ins, mask=in_mask, other=0).to(tl.int32)
    mask = out_mask[:, None] & in_mask[None, :]
    return tl.load(weight + o[:, None] * stride + i[None, :], mask=mask, other=0.0)


@triton.jit
def load_vectors(vectors, width, cols, col_mask):
    """The rows of affine or coefficients (4, width); anything if there are none."""
    v0 = tl.zeros(cols.shape, tl.float32)
    v1, v2, v3 = v0, v0, v0
    if vectors is not None:
        v0 = tl.load(vectors + cols, mask=col_mask, other=0.0)
        v1 = tl.load(vectors + width + cols, mask=col_mask, other=0.0)
        v2 = tl.load(vectors + 2 * width + cols, mask=col_mask, other=0.0)
        v3 = tl.load(vectors + 3 * width + cols, mask=col_mask, other=0.0)
    return v0, v1, v2, v3


@triton.jit
def operand(x, affine, scale, bias, mean, ACT: tl.constexpr):
    """The value that a raw block x stands for, in its own type without affine, else in fp32."""
    value = x
    if affine is not None:
        z = (x.to(tl.float32) - mean[None, :]) * scale[None, :] + bias[None, :]
        value = activated(z, ACT)
    return value


@triton.jit
def gated(value, gate, first, rows, row_mask, cols, col_mask, width, pixels):
    """value times the gate (N, width) of each row's sample."""
    if gate is not None:
        at = ((first + rows) // pixels)[:, None] * width + cols[None, :]
        factor = tl.load(gate + at, mask=row_mask[:, None] & col_mask[None, :], other=0.0)
        value = value.to(tl.float32) * factor.to(tl.float32)
    return value


@triton.jit
def folded(block, WARPS: tl.constexpr):
    """Sums over the rows of a block (R, C) that one thread holds, (8 WARPS, C), if WARPS warps
    share them as tensor cores lay out a product: 16 rows a warp, 8 apart in a thread. Adding these
    up over tiles and reducing them once spares a reduction across threads for every tile."""
    R: tl.constexpr = block.shape[0]
    C: tl.constexpr = block.shape[1]
    if R >= 16 * WARPS:
        parts = tl.reshape(block, (R // (16 * WARPS), WARPS, 2, 8, C))
        block = tl.reshape(tl.sum(tl.sum(parts, 2), 0), (8 * WARPS, C))
    return block


# --- kernels -------------------------------------------------------------------------------------


@triton.jit
def part_kernel(
    weight,  # (Cout, Cin), any type
    out_index,  # (O,) int64 or None
    in_index,  # (K,) int64 or None
    part,  # (O, K)
    O,
    K,
    stride,  # Cin
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """weight[out_index][:, in_index], in the type of part."""
    outs = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    ins = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    out_mask, in_mask = outs < O, ins < K
    block = load_weight(weight, out_index, in_index, outs, out_mask, ins, in_mask, stride)
    mask = out_mask[:, None] & in_mask[None, :]
    tl.store(part + outs[:, None] * K + ins[None, :], block, mask=mask)


@triton.jit
def forward_kernel(
    x,  # (M, K)
    affine,  # (4, K) fp32 or None
    gate,  # (N, K) or None
    weight,  # (Cout, Cin), or its part (O, K) in the type of x
    out_index,  # (O,) int64 or None
    in_index,  # (K,) int64 or None
    offset,  # (1 or N, 1 or pixels, O) or None
    y,  # (M, O)
    sums,  # (T, 3, O) fp32
    M,
    K,
    O,
    pixels,  # of a sample
    stride,  # of the weight's rows
    ACT: tl.constexpr,
    BY_SAMPLE: tl.constexpr,  # the offset
    BY_PIXEL: tl.constexpr,
    RESIDENT: tl.constexpr,  # all K are one block, whose weights a program loads once
    ALIGN_K: tl.constexpr,
    ALIGN_O: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
):
    """One program: BLOCK_O channels of every T-th tile of rows, and their moments, as sums of
    differences from the mean of its first tile. Programs next to each other read the same rows."""
    K, O = aligned(K, ALIGN_K), aligned(O, ALIGN_O)
    blocks = tl.cdiv(O, BLOCK_O)
    program, programs = tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    outs = tl.program_id(0) % blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    rows, ks = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    out_mask = outs < O
    dtype: tl.constexpr = x.dtype.element_ty
    if RESIDENT:
        w = load_weight(weight, out_index, in_index, outs, out_mask, ks, ks < K, stride)
        w = tl.trans(w.to(dtype))
        scale, bias, mean, _ = load_vectors(affine, K, ks, ks < K)

    shift = tl.zeros((BLOCK_O,), tl.float32)
    total = folded(tl.zeros((BLOCK_M, BLOCK_O), tl.float32), WARPS)
    squares = folded(tl.zeros((BLOCK_M, BLOCK_O), tl.float32), WARPS)
    for tile in range(program, tl.cdiv(M, BLOCK_M), programs):
        first = tile * BLOCK_M
        row_mask = rows < M - first
        if RESIDENT:
            raw = load_rows(x, first, rows, row_mask, ks, ks < K, K)
            value = operand(raw, affine, scale, bias, mean, ACT)
            value = gated(value, gate, first, rows, row_mask, ks, ks < K, K, pixels)
            acc = tl.dot(value.to(dtype), w, input_precision=PRECISION)
        else:
            acc = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
            for k in range(0, K, BLOCK_K):
                cols = k + ks
                raw = load_rows(x, first, rows, row_mask, cols, cols < K, K)
                w = load_weight(weight, None, None, outs, out_mask, cols, cols < K, K)
                scale, bias, mean, _ = load_vectors(affine, K, cols, cols < K)
                value = operand(raw, affine, scale, bias, mean, ACT)
                value = gated(value, gate, first, rows, row_mask, cols, cols < K, K, pixels)
                acc = tl.dot(value.to(dtype), tl.trans(w), acc, input_precision=PRECISION)
        if offset is not None:
            at = tl.zeros((BLOCK_M,), tl.int32)
            if BY_SAMPLE:
                at += (first + rows) // pixels
                if BY_PIXEL:
                    at *= pixels
            if BY_PIXEL:
                at += (first + rows) % pixels
            mask = row_mask[:, None] & out_mask[None, :]
            at = at[:, None].to(tl.int64) * O + outs[None, :]
            acc += tl.load(offset + at, mask=mask, other=0.0).to(tl.float32)
        if tile == program:
            shift = tl.sum(tl.where(row_mask[:, None], acc, 0.0), 0) / tl.minimum(M - first, BLOCK_M)
        difference = tl.where(row_mask[:, None], acc - shift[None, :], 0.0)
        total += folded(difference, WARPS)
        squares += folded(difference * difference, WARPS)
        store_rows(y, acc.to(dtype), first, rows, row_mask, outs, out_mask, O)

    strip = programs * BLOCK_M  # rows of one tile of each program
    count = M // strip * BLOCK_M + tl.minimum(
        tl.maximum(M % strip - program * BLOCK_M, 0), BLOCK_M
    )
    count = count.to(tl.float32)
    total_ = tl.sum(total, 0)
    own = sums + program.to(tl.int64) * 3 * O + outs
    tl.store(own, tl.zeros((BLOCK_O,), tl.float32) + count, mask=out_mask)
    mean_difference = total_ / tl.maximum(count, 1.0)
    tl.store(own + O, shift + mean_difference, mask=out_mask)
    m2 = tl.maximum(tl.sum(squares, 0) - total_ * mean_difference, 0.0)
    tl.store(own + 2 * O, m2, mask=out_mask)
