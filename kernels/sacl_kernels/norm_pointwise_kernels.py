"""The Triton kernel of the 1x1 convolution of a normalised operand, and what it shares with those
of its gradient (``norm_pointwise_gradient_kernels``); ``norm_pointwise`` launches them.

Images are matrices of M rows (the pixels of all samples) with unit column stride: x (M, K),
y (M, O). Programs are persistent: each takes every n-th tile of rows, so that what it sums leaves
one partial sum. Column masks load zeros, which every prologue keeps.
"""
# ruff: noqa: E741 (O: output channels, as in the shapes)

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
def load_vector(vectors, row: tl.constexpr, width, cols, col_mask):
    """A row of affine or coefficients (4, width), for a block of rows. To be called where it is
    used: it is in the cache, and all of them would take a third of the registers."""
    return tl.load(vectors + row * width + cols, mask=col_mask, other=0.0)[None, :]


@triton.jit
def normalised(x, affine, cols, col_mask, width):
    """What is activated, and x - mean, of a raw block; x itself without affine."""
    z, centred = x, x
    if affine is not None:
        centred = x.to(tl.float32) - load_vector(affine, 2, width, cols, col_mask)
        z = centred * load_vector(affine, 0, width, cols, col_mask)
        z += load_vector(affine, 1, width, cols, col_mask)
    return z, centred


@triton.jit
def gated(value, gate, first, rows, row_mask, cols, col_mask, width, pixels):
    """value times the gate (N, width) of each row's sample."""
    if gate is not None:
        at = ((first + rows) // pixels)[:, None] * width + cols[None, :]
        factor = tl.load(gate + at, mask=row_mask[:, None] & col_mask[None, :], other=0.0)
        value = value.to(tl.float32) * factor.to(tl.float32)
    return value


@triton.jit
def by_class(block, WARPS: tl.constexpr):
    """A block (R, C) as (R / (16 WARPS), WARPS, 2, 8, C), where what differs in the first and the
    third dimension is in one thread, if WARPS warps share the rows as tensor cores lay out a
    product. Sums over those two cost nothing, and what they give, 8 WARPS classes of rows, can be
    added up over tiles and reduced across threads once."""
    return tl.reshape(block, (block.shape[0] // (16 * WARPS), WARPS, 2, 8, block.shape[1]))


@triton.jit
def sum_classes(block, WARPS: tl.constexpr):  # (WARPS, 8, C)
    return tl.sum(tl.sum(by_class(block, WARPS), 2), 0)


@triton.jit
def sum_all(classes):
    return tl.sum(tl.sum(classes, 1), 0)


@triton.jit
def count_classes(row_mask, WARPS: tl.constexpr):  # (WARPS, 8, 1)
    return sum_classes(tl.where(row_mask[:, None], 1.0, 0.0), WARPS)


@triton.jit
def add_moments(mean, squares, count, block, row_mask, WARPS: tl.constexpr):
    """Mean and squared differences from it (WARPS, 8, C) of each class of rows, which had ``count``
    values so far, with those of a block (Chan's formula)."""
    new = count_classes(row_mask, WARPS)
    masked = by_class(tl.where(row_mask[:, None], block, 0.0), WARPS)
    new_mean = tl.sum(tl.sum(masked, 2), 0) * (1 / tl.maximum(new, 1.0))
    away = by_class(block, WARPS) - new_mean[None, :, None]
    away = tl.where(by_class(row_mask[:, None], WARPS), away, 0.0)
    share = new / tl.maximum(count + new, 1.0)
    step = new_mean - mean
    squares += tl.sum(tl.sum(away * away, 2), 0) + step * step * (count * share)
    return mean + step * share, squares


@triton.jit
def load_operand(
    x, affine, gate, first, rows, row_mask, cols, col_mask, width, pixels, ACT: tl.constexpr
):
    """What a product reads of a block of rows, in the type of x."""
    raw = load_rows(x, first, rows, row_mask, cols, col_mask, width)
    z, _ = normalised(raw, affine, cols, col_mask, width)
    value = gated(activated(z, ACT), gate, first, rows, row_mask, cols, col_mask, width, pixels)
    return value.to(raw.dtype)


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
    CHUNKS: tl.constexpr,  # of K, whose weights a program loads once; 0: for every tile of rows
    ALIGN_K: tl.constexpr,
    ALIGN_O: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
):
    """One program: BLOCK_O channels of every T-th tile of rows, and their moments. Programs next to
    each other read the same rows."""
    K, O = aligned(K, ALIGN_K), aligned(O, ALIGN_O)
    blocks = tl.cdiv(O, BLOCK_O)
    program, programs = tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    outs = tl.program_id(0) % blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    rows, ks = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    out_mask = outs < O
    dtype: tl.constexpr = x.dtype.element_ty
    ws = ()
    for chunk in tl.static_range(CHUNKS):
        ins = chunk * BLOCK_K + ks
        w = load_weight(weight, out_index, in_index, outs, out_mask, ins, ins < K, stride)
        ws += (tl.trans(w.to(dtype)),)
    count = 0.0  # values of a class so far; only the last tile may have fewer for some
    mean = tl.zeros((WARPS, 8, BLOCK_O), tl.float32)
    squares = tl.zeros((WARPS, 8, BLOCK_O), tl.float32)
    tiles = tl.cdiv(M, BLOCK_M)
    for tile in tl.range(program, tiles, programs, disable_licm=True):
        first = tile * BLOCK_M
        row_mask = rows < M - first
        acc = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
        if offset is not None:
            if BY_SAMPLE and BY_PIXEL:
                acc = load_rows(offset, first, rows, row_mask, outs, out_mask, O).to(tl.float32)
            else:
                at = tl.zeros((BLOCK_M,), tl.int32)
                if BY_SAMPLE:
                    at = (first + rows) // pixels
                if BY_PIXEL:
                    at = (first + rows) % pixels
                at = at[:, None] * O + outs[None, :]
                mask = row_mask[:, None] & out_mask[None, :]
                acc = tl.load(offset + at, mask=mask, other=0.0).to(tl.float32)
        for chunk in tl.static_range(CHUNKS):
            ins = chunk * BLOCK_K + ks
            value = load_operand(
                x, affine, gate, first, rows, row_mask, ins, ins < K, K, pixels, ACT
            )
            acc = tl.dot(value, ws[chunk], acc, input_precision=PRECISION)
        if CHUNKS == 0:
            for k in range(0, K, BLOCK_K):
                ins = k + ks
                w = load_weight(weight, None, None, outs, out_mask, ins, ins < K, K)
                value = load_operand(
                    x, affine, gate, first, rows, row_mask, ins, ins < K, K, pixels, ACT
                )
                acc = tl.dot(value, tl.trans(w), acc, input_precision=PRECISION)
        mean, squares = add_moments(mean, squares, count, acc, row_mask, WARPS)
        count += BLOCK_M // (8 * WARPS)
        store_rows(y, acc.to(dtype), first, rows, row_mask, outs, out_mask, O)

    last = (program + (tiles - 1 - program) // programs * programs) * BLOCK_M
    counts = count - BLOCK_M // (8 * WARPS) + count_classes(rows < M - last, WARPS)
    whole_count = sum_all(counts)  # (1,)
    whole_mean = sum_all(mean * counts) / tl.maximum(whole_count, 1.0)
    step = mean - whole_mean[None, None, :]
    own = sums + program.to(tl.int64) * 3 * O + outs
    tl.store(own, whole_count + tl.zeros((BLOCK_O,), tl.float32), mask=out_mask)
    tl.store(own + O, whole_mean, mask=out_mask)
    tl.store(own + 2 * O, sum_all(squares + step * step * counts), mask=out_mask)
