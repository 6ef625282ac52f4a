"""The Triton kernels of the gradient of the 1x1 convolution of a normalised operand; see
``norm_pointwise_kernels``. dy (M, O) is formed as it is loaded, of g, y and coefficients."""
# ruff: noqa: E741 (O: output channels, as in the shapes)

from __future__ import annotations

# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# (Triton's language looks like Python and is not.)
import triton
import triton.language as tl

from sacl_kernels.norm_pointwise_kernels import (
    activated,
    aligned,
    gated,
    load_rows,
    load_vector,
    load_weight,
    normalised,
    store_rows,
    sum_all,
    sum_classes,
    through_activation,
)


@triton.jit
def load_gradient(g, y, coefficients, first, rows, row_mask, cols, col_mask, width):
    """A block of dy in the type of g, 0 outside of the masks."""
    dy = load_rows(g, first, rows, row_mask, cols, col_mask, width)
    if y is not None:
        raw = load_rows(y, first, rows, row_mask, cols, col_mask, width).to(tl.float32)
        value = (raw - load_vector(coefficients, 3, width, cols, col_mask)) * load_vector(
            coefficients, 1, width, cols, col_mask
        )
        value += dy.to(tl.float32) * load_vector(coefficients, 0, width, cols, col_mask)
        value += load_vector(coefficients, 2, width, cols, col_mask)
        dy = tl.where(row_mask[:, None], value, 0.0).to(dy.dtype)
    return dy


@triton.jit
def store_gsums(gsums, program, total, products, affine, cols, col_mask, width):
    """``products``: of the gradient and x - mean."""
    own = gsums + program.to(tl.int64) * 2 * width + cols
    rstd = tl.load(affine + 3 * width + cols, mask=col_mask, other=0.0)
    tl.store(own, sum_all(total), mask=col_mask)
    tl.store(own + width, sum_all(products) * rstd, mask=col_mask)


@triton.jit
def tiles_of(M, pixels, BY_SAMPLE: tl.constexpr, BLOCK_M: tl.constexpr):
    """How many tiles hold all rows; ``BY_SAMPLE``: each those of one sample."""
    if BY_SAMPLE:
        return M // pixels * tl.cdiv(pixels, BLOCK_M)
    else:
        return tl.cdiv(M, BLOCK_M)


@triton.jit
def rows_of(tile, M, pixels, BY_SAMPLE: tl.constexpr, BLOCK_M: tl.constexpr):
    """The first row of a tile, and how many there are from it on that may be its own."""
    if BY_SAMPLE:
        each = tl.cdiv(pixels, BLOCK_M)
        start = tile % each * BLOCK_M
        return tile // each * pixels + start, pixels - start
    else:
        first = tile * BLOCK_M
        return first, M - first


@triton.jit
def store_gate_sums(gates, tile, d, raw, affine, cols, col_mask, width, ACT: tl.constexpr):
    """Of a tile's rows, the sums of the gated operand's gradient times what is gated."""
    z, _ = normalised(raw, affine, cols, col_mask, width)
    sums = tl.sum(d * activated(z, ACT).to(tl.float32), 0)
    tl.store(gates + tl.cast(tile, tl.int64) * width + cols, sums, mask=col_mask)


@triton.jit
def fill_zero(base, size, BLOCK: tl.constexpr):
    """All programs together."""
    index = tl.arange(0, BLOCK)
    for start in range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
        tl.store(base + start + index, tl.zeros((BLOCK,), tl.float32), mask=start + index < size)


@triton.jit
def fused_kernel(
    g,  # (M, O)
    y,  # (M, O) or None
    coefficients,  # (4, O) fp32 or None
    x,  # (M, K)
    affine,  # (4, K) fp32 or None
    gate,  # (N, K) or None
    weight,  # (Cout, Cin), any type
    out_index,  # (O,) int64 or None
    in_index,  # (K,) int64 or None
    other,  # (M, K) or None: added to dx
    dx,  # (M, K)
    gsums,  # (T, 2, K) fp32
    gates,  # (tiles, K) fp32 or None: of the gate's gradient; then tiles are of one sample
    partial,  # (T, O, K) fp32: of dweight
    dweight,  # (Cout, Cin), filled with 0
    M,
    K,
    O,
    pixels,
    stride,
    fill,  # values of dweight to fill
    ACT: tl.constexpr,
    TO_NORM: tl.constexpr,
    ALIGN_K: tl.constexpr,
    ALIGN_O: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
):
    """One program: BLOCK_K channels of dx of every T-th tile of rows, and what these rows give
    dweight. O are one block. Programs next to each other read the same rows of g and y."""
    K, O = aligned(K, ALIGN_K), aligned(O, ALIGN_O)
    blocks = tl.cdiv(K, BLOCK_K)
    program, programs = tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    fill_zero(dweight, fill, 1024)
    rows, outs = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_O)
    ins = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    out_mask, in_mask = outs < O, ins < K
    dtype: tl.constexpr = x.dtype.element_ty
    w = load_weight(weight, out_index, in_index, outs, out_mask, ins, in_mask, stride).to(dtype)
    acc = tl.zeros((BLOCK_O, BLOCK_K), tl.float32)
    total = tl.zeros((WARPS, 8, BLOCK_K), tl.float32)
    products = tl.zeros((WARPS, 8, BLOCK_K), tl.float32)
    tiles = tiles_of(M, pixels, gates is not None, BLOCK_M)
    for tile in tl.range(program, tiles, programs, disable_licm=True):
        first, count = rows_of(tile, M, pixels, gates is not None, BLOCK_M)
        row_mask = rows < count
        raw = load_rows(x, first, rows, row_mask, ins, in_mask, K)
        d = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        if other is not None:
            d = load_rows(other, first, rows, row_mask, ins, in_mask, K).to(tl.float32)
        # The widest block last, so that it is not held while the others are loaded.
        dy = load_gradient(g, y, coefficients, first, rows, row_mask, outs, out_mask, O)
        d = tl.dot(dy, w, d, input_precision=PRECISION)
        if gates is not None:
            store_gate_sums(gates, tile, d, raw, affine, ins, in_mask, K, ACT)
        if TO_NORM:
            z, centred = normalised(raw, affine, ins, in_mask, K)
            d = through_activation(d, z, ACT)
            total += sum_classes(d, WARPS)
            products += sum_classes(d * centred, WARPS)
        store_rows(dx, d.to(dtype), first, rows, row_mask, ins, in_mask, K)
        # Again, after the store, which keeps the compiler from sharing it: 50 registers fewer.
        z, _ = normalised(raw, affine, ins, in_mask, K)
        value = gated(activated(z, ACT), gate, first, rows, row_mask, ins, in_mask, K, pixels)
        acc = tl.dot(tl.trans(dy), value.to(dtype), acc, input_precision=PRECISION)
    if TO_NORM:
        store_gsums(gsums, program, total, products, affine, ins, in_mask, K)
    own = partial + program.to(tl.int64) * O * K
    mask = out_mask[:, None] & in_mask[None, :]
    tl.store(own + outs[:, None] * K + ins[None, :], acc, mask=mask)


@triton.jit
def input_kernel(
    g,  # (M, O)
    y,  # (M, O) or None
    coefficients,  # (4, O) fp32 or None
    x,  # (M, K)
    affine,  # (4, K) fp32 or None
    part,  # (O, K) of the weight, in the type of x
    other,  # (M, K) or None: added to dx
    dx,  # (M, K)
    gsums,  # (T, 2, K) fp32
    gates,  # (tiles, K) fp32 or None: of the gate's gradient; then tiles are of one sample
    M,
    K,
    O,
    pixels,
    ACT: tl.constexpr,
    TO_NORM: tl.constexpr,
    ALIGN_K: tl.constexpr,
    ALIGN_O: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
):
    """One program: BLOCK_K channels of dx of every T-th tile of rows. Programs next to each other
    read the same rows."""
    K, O = aligned(K, ALIGN_K), aligned(O, ALIGN_O)
    blocks = tl.cdiv(K, BLOCK_K)
    program, programs = tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    ins = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    rows, os = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_O)
    in_mask = ins < K
    total = tl.zeros((WARPS, 8, BLOCK_K), tl.float32)
    products = tl.zeros((WARPS, 8, BLOCK_K), tl.float32)
    tiles = tiles_of(M, pixels, gates is not None, BLOCK_M)
    for tile in tl.range(program, tiles, programs, disable_licm=True):
        first, count = rows_of(tile, M, pixels, gates is not None, BLOCK_M)
        row_mask = rows < count
        d = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for o in range(0, O, BLOCK_O):
            outs = o + os
            dy = load_gradient(g, y, coefficients, first, rows, row_mask, outs, outs < O, O)
            w = load_weight(part, None, None, outs, outs < O, ins, in_mask, K)
            d = tl.dot(dy, w, d, input_precision=PRECISION)
        if other is not None:
            d += load_rows(other, first, rows, row_mask, ins, in_mask, K).to(tl.float32)
        if gates is not None:
            raw = load_rows(x, first, rows, row_mask, ins, in_mask, K)
            store_gate_sums(gates, tile, d, raw, affine, ins, in_mask, K, ACT)
        if TO_NORM:
            raw = load_rows(x, first, rows, row_mask, ins, in_mask, K)
            z, centred = normalised(raw, affine, ins, in_mask, K)
            d = through_activation(d, z, ACT)
            total += sum_classes(d, WARPS)
            products += sum_classes(d * centred, WARPS)
        store_rows(dx, d.to(x.dtype.element_ty), first, rows, row_mask, ins, in_mask, K)
    if TO_NORM:
        store_gsums(gsums, program, total, products, affine, ins, in_mask, K)


@triton.jit
def weight_kernel(
    g,  # (M, O)
    y,  # (M, O) or None
    coefficients,  # (4, O) fp32 or None
    x,  # (M, K)
    affine,  # (4, K) fp32 or None
    gate,  # (N, K) or None
    partial,  # (splits, O, K) fp32: of dweight
    dweight,  # (Cout, Cin), filled with 0
    M,
    K,
    O,
    pixels,
    fill,  # values of dweight to fill
    ACT: tl.constexpr,
    ALIGN_K: tl.constexpr,
    ALIGN_O: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: BLOCK_O x BLOCK_K of dweight, over every n-th tile of rows. Programs next to
    each other read the same rows."""
    K, O = aligned(K, ALIGN_K), aligned(O, ALIGN_O)
    fill_zero(dweight, fill, 1024)
    across = tl.cdiv(K, BLOCK_K)
    blocks = tl.cdiv(O, BLOCK_O) * across
    split, splits = tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    block = tl.program_id(0) % blocks
    outs = block // across * BLOCK_O + tl.arange(0, BLOCK_O)
    ins = block % across * BLOCK_K + tl.arange(0, BLOCK_K)
    rows = tl.arange(0, BLOCK_M)
    out_mask, in_mask = outs < O, ins < K
    dtype: tl.constexpr = x.dtype.element_ty
    acc = tl.zeros((BLOCK_O, BLOCK_K), tl.float32)
    for tile in tl.range(split, tl.cdiv(M, BLOCK_M), splits, disable_licm=True):
        first = tile * BLOCK_M
        row_mask = rows < M - first
        raw = load_rows(x, first, rows, row_mask, ins, in_mask, K)
        z, _ = normalised(raw, affine, ins, in_mask, K)
        value = gated(activated(z, ACT), gate, first, rows, row_mask, ins, in_mask, K, pixels)
        value = value.to(dtype)
        dy = load_gradient(g, y, coefficients, first, rows, row_mask, outs, out_mask, O)
        acc = tl.dot(tl.trans(dy), value, acc, input_precision=PRECISION)
    own = partial + split.to(tl.int64) * O * K
    mask = out_mask[:, None] & in_mask[None, :]
    tl.store(own + outs[:, None] * K + ins[None, :], acc, mask=mask)


@triton.jit
def scatter_kernel(
    partial,  # (count, O, K) fp32
    out_index,  # (O,) int64 or None
    in_index,  # (K,) int64 or None
    dweight,  # (Cout, Cin)
    count,
    K,
    size,  # O * K
    stride,  # Cin
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK values of dweight, the sums of the partial ones."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    numbers = tl.arange(0, BLOCK_P)
    total = tl.zeros((BLOCK_P, BLOCK), tl.float32)
    for start in range(0, count, BLOCK_P):
        at = (start + numbers)[:, None].to(tl.int64) * size + index[None, :]
        mask = (start + numbers < count)[:, None] & inside[None, :]
        total += tl.load(partial + at, mask=mask, other=0.0)
    o, i = index // K, index % K
    if out_index is not None:
        o = tl.load(out_index + o, mask=inside, other=0).to(tl.int32)
    if in_index is not None:
        i = tl.load(in_index + i, mask=inside, other=0).to(tl.int32)
    tl.store(dweight + o * stride + i, tl.sum(total, 0), mask=inside)
