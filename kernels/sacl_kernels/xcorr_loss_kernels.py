"""The Triton kernels of the value of the cross-correlation loss; ``xcorr_loss`` launches them and
has the maths. Those of the gradient are in ``xcorr_loss_gradient_kernels``.

Matrices have a unit column stride. Shapes stand at the arguments: E is the number of embeddings (2,
or 4 with targets), n this rank's rows of N.
"""

from __future__ import annotations

# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# (Triton's language looks like Python and is not.)
import triton
import triton.language as tl

# --- standardisation and diagonals ---------------------------------------------------------------


@triton.jit
def load_block(base, stride, rows, cols, row_mask, col_mask):
    """A block of a matrix with unit column stride, 0 outside of the masks."""
    offsets = rows[:, None].to(tl.int64) * stride + cols[None, :]
    return tl.load(base + offsets, mask=row_mask[:, None] & col_mask[None, :], other=0.0)


@triton.jit
def _statistics(z, stride, cols, col_mask, N, degrees, eps, BLOCK_N: tl.constexpr):
    """Mean and 1 / deviation of columns; deviations from a first mean, whose rounding error is
    then corrected."""
    total = tl.zeros(cols.shape, tl.float32)
    for start in range(0, N, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        total += tl.sum(load_block(z, stride, rows, cols, rows < N, col_mask).to(tl.float32), 0)
    first = total / N
    rest = tl.zeros(cols.shape, tl.float32)
    squares = tl.zeros(cols.shape, tl.float32)
    for start in range(0, N, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        value = load_block(z, stride, rows, cols, rows < N, col_mask).to(tl.float32)
        deviation = tl.where(rows[:, None] < N, value - first[None, :], 0.0)
        rest += tl.sum(deviation, 0)
        squares += tl.sum(deviation * deviation, 0)
    rest = rest / N
    variance = tl.maximum(squares - N * rest * rest, 0.0) / degrees
    return first, rest, tl.where(col_mask, 1.0 / tl.sqrt(variance + eps), 0.0)


@triton.jit
def _standardized(z, x, stride, rows, cols, first, rest, rstd, N, D, col_mask):
    """Standardise a block of z (N, D), store it to x (N, D), return it in fp32."""
    row_mask = rows < N
    value = load_block(z, stride, rows, cols, row_mask, col_mask).to(tl.float32)
    value = ((value - first[None, :]) - rest[None, :]) * rstd[None, :]
    value = tl.where(row_mask[:, None], value, 0.0)
    offsets = rows[:, None].to(tl.int64) * D + cols[None, :]
    tl.store(x + offsets, value, mask=row_mask[:, None] & col_mask[None, :])
    return value


@triton.jit
def standardize_kernel(
    z0,  # (N, D) each, unit column stride
    z1,
    z2,
    z3,
    x,  # (2 or 4, N, D), type of z
    rstd,  # (2, D) fp32
    diagonals,  # (1 or 3, D) fp32
    stride0,
    stride1,
    stride2,
    stride3,
    N,
    D,
    degrees,  # N, or N - 1 for the unbiased variance
    eps,
    TARGETS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_D features of all embeddings. Memory is read once, by the first pass; the
    later ones find their 32 bytes a row in the cache."""
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    col_mask = cols < D
    size = tl.cast(N, tl.int64) * D
    first0, rest0, rstd0 = _statistics(z0, stride0, cols, col_mask, N, degrees, eps, BLOCK_N)
    first1, rest1, rstd1 = _statistics(z1, stride1, cols, col_mask, N, degrees, eps, BLOCK_N)
    tl.store(rstd + cols, rstd0, mask=col_mask)
    tl.store(rstd + D + cols, rstd1, mask=col_mask)
    if TARGETS:
        first2, rest2, rstd2 = _statistics(z2, stride2, cols, col_mask, N, degrees, eps, BLOCK_N)
        first3, rest3, rstd3 = _statistics(z3, stride3, cols, col_mask, N, degrees, eps, BLOCK_N)
    c1 = tl.zeros(cols.shape, tl.float32)
    c2 = tl.zeros(cols.shape, tl.float32)
    c3 = tl.zeros(cols.shape, tl.float32)
    for start in range(0, N, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        a = _standardized(z0, x, stride0, rows, cols, first0, rest0, rstd0, N, D, col_mask)
        b = _standardized(z1, x + size, stride1, rows, cols, first1, rest1, rstd1, N, D, col_mask)
        c1 += tl.sum(a * b, 0)
        if TARGETS:
            s = _standardized(
                z2, x + 2 * size, stride2, rows, cols, first2, rest2, rstd2, N, D, col_mask
            )
            c2 += tl.sum(a * s, 0)
            t = _standardized(
                z3, x + 3 * size, stride3, rows, cols, first3, rest3, rstd3, N, D, col_mask
            )
            c3 += tl.sum(b * t, 0)
    tl.store(diagonals + cols, c1 / N, mask=col_mask)
    if TARGETS:
        tl.store(diagonals + D + cols, c2 / N, mask=col_mask)
        tl.store(diagonals + 2 * D + cols, c3 / N, mask=col_mask)


# --- Gram matrices: N <= D -----------------------------------------------------------------------


@triton.jit
def gram_kernel(
    x,  # (E, N, D)
    partial,  # (SPLITS, E, n, N) fp32
    first,  # this rank's rows: first .. first + n
    n,
    N,
    D,
    depth,  # features of one split, a multiple of BLOCK_K
    SYMMETRIC: tl.constexpr,  # n = N: only tiles on and below the diagonal
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: one tile of one X X^T over one split of the features."""
    tiles = tl.cdiv(N, BLOCK)
    i, j = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if SYMMETRIC and j > i:
        return
    embedding, split = tl.program_id(1), tl.program_id(2)
    matrix = x + tl.cast(embedding, tl.int64) * N * D
    rows = i * BLOCK + tl.arange(0, BLOCK)
    cols = j * BLOCK + tl.arange(0, BLOCK)
    stop = tl.minimum((split + 1) * depth, D)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(split * depth, stop, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        p = load_block(matrix, D, first + rows, ks, rows < n, ks < stop)
        q = load_block(matrix, D, cols, ks, cols < N, ks < stop)
        acc = tl.dot(p, tl.trans(q), acc, input_precision=PRECISION)
    out = partial + tl.cast((split * tl.num_programs(1) + embedding), tl.int64) * n * N
    offsets = rows[:, None].to(tl.int64) * N + cols[None, :]
    tl.store(out + offsets, acc, mask=(rows[:, None] < n) & (cols[None, :] < N))


@triton.jit
def _sum_splits(partial, embedding, rows, cols, n, N, SPLITS: tl.constexpr, E: tl.constexpr):
    total = tl.zeros((rows.shape[0], cols.shape[0]), tl.float32)
    for split in range(SPLITS):
        base = partial + tl.cast(split * E + embedding, tl.int64) * n * N
        total += load_block(base, N, rows, cols, rows < n, cols < N)
    return total


@triton.jit
def combine_kernel(
    partial,  # (SPLITS, E, n, N) fp32
    factors,  # (2, n, N) fp32: off K_B + xd K_S, off K_A + xd K_T
    sums,  # (2, programs) fp32: the off-diagonal and the XD sums of squares, weighted
    n,
    N,
    off,
    xd,
    SYMMETRIC: tl.constexpr,
    TARGETS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one tile of the factors (and its mirror image), and its part of the value."""
    i, j = tl.program_id(0), tl.program_id(1)
    program = i * tl.num_programs(1) + j
    programs = tl.num_programs(0) * tl.num_programs(1)
    if SYMMETRIC and j > i:
        tl.store(sums + program, 0.0)
        tl.store(sums + programs + program, 0.0)
        return
    rows = i * BLOCK + tl.arange(0, BLOCK)
    cols = j * BLOCK + tl.arange(0, BLOCK)
    embeddings: tl.constexpr = 4 if TARGETS else 2
    k_a = _sum_splits(partial, 0, rows, cols, n, N, SPLITS, embeddings)
    k_b = _sum_splits(partial, 1, rows, cols, n, N, SPLITS, embeddings)
    times = tl.where(i > j, 2.0, 1.0) if SYMMETRIC else 1.0
    m1, m2 = off * k_b, off * k_a
    tl.store(sums + program, times * tl.sum(k_a * m1))
    distilled = 0.0
    if TARGETS:
        k_s = _sum_splits(partial, 2, rows, cols, n, N, SPLITS, embeddings)
        k_t = _sum_splits(partial, 3, rows, cols, n, N, SPLITS, embeddings)
        m1 += xd * k_s
        m2 += xd * k_t
        distilled = times * xd * tl.sum(k_a * k_s + k_b * k_t)
    tl.store(sums + programs + program, distilled)
    size = tl.cast(n, tl.int64) * N
    mask = (rows[:, None] < n) & (cols[None, :] < N)
    offsets = rows[:, None].to(tl.int64) * N + cols[None, :]
    tl.store(factors + offsets, m1, mask=mask)
    tl.store(factors + size + offsets, m2, mask=mask)
    if SYMMETRIC and i > j:
        mirrored = cols[None, :].to(tl.int64) * N + rows[:, None]
        tl.store(factors + mirrored, m1, mask=mask)
        tl.store(factors + size + mirrored, m2, mask=mask)


@triton.jit
def finish_kernel(
    sums,  # (2, count) fp32
    diagonals,  # (1 or 3, D) fp32
    loss,  # () fp32
    parts,  # (3,) fp32
    count,
    D,
    divisor,  # of the sums
    on,
    off,
    xd,
    TARGETS: tl.constexpr,
    WITH_DIAGONAL: tl.constexpr,  # the sums include the squares of the diagonal
    BLOCK: tl.constexpr,
):
    """One program: the three terms and the loss."""
    index = tl.arange(0, BLOCK)
    off_sum = tl.zeros((BLOCK,), tl.float32)
    xd_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        inside = start + index < count
        off_sum += tl.load(sums + start + index, mask=inside, other=0.0)
        xd_sum += tl.load(sums + count + start + index, mask=inside, other=0.0)
    on_sum = tl.zeros((BLOCK,), tl.float32)
    off_squares = tl.zeros((BLOCK,), tl.float32)
    xd_squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, BLOCK):
        inside = start + index < D
        c1 = tl.load(diagonals + start + index, mask=inside, other=1.0)
        on_sum += (1 - c1) * (1 - c1)
        off_squares += tl.where(inside, c1 * c1, 0.0)
        if TARGETS:
            c2 = tl.load(diagonals + D + start + index, mask=inside, other=0.0)
            c3 = tl.load(diagonals + 2 * D + start + index, mask=inside, other=0.0)
            xd_squares += c2 * c2 + c3 * c3
    on_part = on * tl.sum(on_sum)
    off_part = tl.sum(off_sum) / divisor
    xd_part = tl.sum(xd_sum) / divisor
    if WITH_DIAGONAL:
        off_part -= off * tl.sum(off_squares)
        xd_part -= xd * tl.sum(xd_squares)
    tl.store(parts, on_part)
    tl.store(parts + 1, off_part)
    tl.store(parts + 2, xd_part)
    tl.store(loss, on_part + off_part + xd_part)


# --- panels of C: N > D --------------------------------------------------------------------------


@triton.jit
def correlation_kernel(
    x,  # (E, N, D)
    panel,  # (2 sides, E / 2 pairs, P, D), type of x: C times weight / scale, without diagonal
    sums,  # (2, panels * programs) fp32, of which this launch fills programs from `first` on
    first,
    count,
    start,  # first feature of the panel
    P,
    N,
    D,
    off,
    xd,
    scale,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: one tile of C(x[side], its partner (pair 0) or its target (pair 1))."""
    tiles = tl.cdiv(D, BLOCK)
    i, j = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    pair, side = tl.program_id(1), tl.program_id(2)
    pairs = tl.num_programs(1)
    program = (side * pairs + pair) * tl.num_programs(0) + tl.program_id(0)
    again = (side == 1) & (pair == 0)  # C(B, A), whose value came with C(A, B)
    if again and not KEEP:
        tl.store(sums + first + program, 0.0)
        tl.store(sums + count + first + program, 0.0)
        return
    size = tl.cast(N, tl.int64) * D
    other = tl.where(pair == 0, 1 - side, 2 + side)
    rows = i * BLOCK + tl.arange(0, BLOCK)
    cols = j * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, N, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        p = load_block(x + side * size, D, ks, start + rows, ks < N, rows < P)
        q = load_block(x + other * size, D, ks, cols, ks < N, cols < D)
        acc = tl.dot(tl.trans(p), q, acc, input_precision=PRECISION)
    c = tl.where(start + rows[:, None] == cols[None, :], 0.0, acc / N)
    weight = tl.where(pair == 0, off, xd)
    squares = weight * tl.sum(c * c)
    tl.store(sums + first + program, tl.where(pair == 0, tl.where(again, 0.0, squares), 0.0))
    tl.store(sums + count + first + program, tl.where(pair == 0, 0.0, squares))
    if KEEP:
        out = panel + tl.cast(side * pairs + pair, tl.int64) * P * D
        offsets = rows[:, None].to(tl.int64) * D + cols[None, :]
        mask = (rows[:, None] < P) & (cols[None, :] < D)
        tl.store(out + offsets, c * (weight / scale), mask=mask)
