"""The Triton kernels of LARS; ``lars`` launches them and has the maths.

All tensors of a group are updated by one launch, cut into chunks of which each program has one.
Where they lie is read from tables (int64): ``tensors`` (4, P), the addresses of parameters and
momentum, sizes and first chunks, and ``gradients`` (P,), addresses.
"""

from __future__ import annotations

# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# (Triton's language looks like Python and is not.)
import triton
import triton.language as tl


@triton.jit
def table_kernel(table, first, numbers, OFFSET: tl.constexpr, COUNT: tl.constexpr):
    """table[first + i] = numbers[i], the numbers being arguments of the launch as ``lars`` encodes
    them."""
    for i in tl.static_range(COUNT):
        tl.store(table + first + i, (numbers[i] - OFFSET) >> 4)


@triton.jit
def _number_of_tensor(chunk, tensors, P, PADDED_P: tl.constexpr):
    numbers = tl.arange(0, PADDED_P)
    firsts = tl.load(tensors + 3 * P + numbers, mask=numbers < P, other=2**62)
    return tl.sum((firsts <= chunk).to(tl.int32)) - 1


@triton.jit
def _values(address, ALIGNED: tl.constexpr):
    """Those that lie at an address that a table has."""
    pointer = tl.load(address).to(tl.pointer_type(tl.float32))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


# Counts are not specialised: a step with fewer gradients, in a capture say, compiles nothing anew.
@triton.jit(do_not_specialize=["P", "chunks"])
def norms_kernel(
    tensors,  # (4, P)
    gradients,  # (P,)
    partial,  # (2, chunks): sums of squares of weights and gradients
    P,
    chunks,  # of the tensors with a trust ratio, which come first
    chunk_size,  # a multiple of BLOCK
    PADDED_P: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0)
    tensor = _number_of_tensor(chunk, tensors, P, PADDED_P)
    p = _values(tensors + tensor, ALIGNED)
    g = _values(gradients + tensor, ALIGNED)
    size = tl.load(tensors + 2 * P + tensor)
    start = (chunk - tl.load(tensors + 3 * P + tensor)) * chunk_size
    stop = tl.minimum(start + chunk_size, size)
    whole = start + (stop - start) // BLOCK * BLOCK
    values = tl.arange(0, BLOCK)
    p_squares = tl.zeros((BLOCK,), tl.float32)
    g_squares = tl.zeros((BLOCK,), tl.float32)
    for at in range(start, whole, BLOCK):
        p_block = tl.load(p + at + values)
        g_block = tl.load(g + at + values)
        p_squares += p_block * p_block
        g_squares += g_block * g_block
    if whole < stop:  # apart, since a mask would make all loads narrow
        rest = whole + values
        p_block = tl.load(p + rest, mask=rest < stop, other=0.0)
        g_block = tl.load(g + rest, mask=rest < stop, other=0.0)
        p_squares += p_block * p_block
        g_squares += g_block * g_block
    tl.store(partial + chunk, tl.sum(p_squares))
    tl.store(partial + chunks + chunk, tl.sum(g_squares))


@triton.jit
def _norm(partial, count, BLOCK: tl.constexpr):
    """From partial sums of squares, which are added in one order."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        numbers = start + tl.arange(0, BLOCK)
        total += tl.load(partial + numbers, mask=numbers < count, other=0.0)
    return tl.sqrt_rn(tl.sum(total))


@triton.jit
def _update(p, m, p_block, g_block, m_block, mask, trust, decay, momentum, lr):
    m_block = momentum * m_block + (trust * g_block + decay * p_block)
    tl.store(m, m_block, mask=mask)
    tl.store(p, p_block - lr * m_block, mask=mask)


@triton.jit(do_not_specialize=["P", "norm_chunks"])
def update_kernel(
    tensors,  # (4, P)
    gradients,  # (P,)
    partial,  # (2, norm_chunks)
    lr,  # a number, or the address of one
    grad_scale,  # () or None
    found_inf,  # () or None
    P,
    norm_chunks,  # of the tensors with a trust ratio, which come first
    chunk_size,
    momentum,
    weight_decay,
    eta,
    LR_ON_DEVICE: tl.constexpr,
    CLIP: tl.constexpr,
    PADDED_P: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SUMS: tl.constexpr,
):
    overflow = False
    if found_inf is not None:
        overflow = tl.load(found_inf) != 0
    if not overflow:
        chunk = tl.program_id(0)
        tensor = _number_of_tensor(chunk, tensors, P, PADDED_P)
        p = _values(tensors + tensor, ALIGNED)
        m = _values(tensors + P + tensor, ALIGNED)
        g = _values(gradients + tensor, ALIGNED)
        size = tl.load(tensors + 2 * P + tensor)
        first = tl.load(tensors + 3 * P + tensor)
        # Casts, since numbers are float64 in the interpreter.
        momentum = tl.cast(momentum, tl.float32)
        weight_decay = tl.cast(weight_decay, tl.float32)
        rate = tl.load(lr) if LR_ON_DEVICE else tl.cast(lr, tl.float32)
        scale = tl.full((), 1.0, tl.float32) if grad_scale is None else tl.load(grad_scale)

        trust = tl.full((), 1.0, tl.float32)
        decay = tl.full((), 0.0, tl.float32)
        if chunk < norm_chunks:
            count = tl.cdiv(size, chunk_size)
            p_norm = _norm(partial + first, count, BLOCK_SUMS)
            g_norm = _norm(partial + norm_chunks + first, count, BLOCK_SUMS)
            g_norm = tl.div_rn(g_norm, scale)
            if (p_norm > 0) & (g_norm > 0):
                top = tl.cast(eta, tl.float32) * p_norm
                trust = tl.div_rn(top, g_norm + weight_decay * p_norm + 1e-8)
                if CLIP:
                    trust = tl.minimum(tl.div_rn(trust, tl.maximum(rate, 2e-38)), 1.0)
                decay = weight_decay * trust
        trust = tl.div_rn(trust, scale)

        start = (chunk - first) * chunk_size
        stop = tl.minimum(start + chunk_size, size)
        whole = start + (stop - start) // BLOCK * BLOCK
        values = tl.arange(0, BLOCK)
        for at in range(start, whole, BLOCK):
            here = at + values
            p_block = tl.load(p + here)
            g_block = tl.load(g + here)
            m_block = tl.load(m + here)
            _update(
                *(p + here, m + here, p_block, g_block, m_block, None),
                *(trust, decay, momentum, rate),
            )
        if whole < stop:
            here = whole + values
            mask = here < stop
            p_block = tl.load(p + here, mask=mask)
            g_block = tl.load(g + here, mask=mask)
            m_block = tl.load(m + here, mask=mask)
            _update(
                *(p + here, m + here, p_block, g_block, m_block, mask),
                *(trust, decay, momentum, rate),
            )
