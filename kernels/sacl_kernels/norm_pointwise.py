r"""1x1 convolution of a normalised operand: batch norm's work in its prologue and epilogue.

``forward`` gives y = v W^T + offset and the moments of y, of raw x (N, K, H, W), where
v = gate act((x - mean) scale + bias). ``backward`` gives dx = dy W + other, through the activation
if ``to_norm``, the sums of it that the norm before needs, the gate's gradient and dweight = dy^T v,
where dy = c0 g + c1 (y - c3) + c2 is the gradient of what the norm behind is given.
``sacl_fast/ops/norm_pointwise.py`` is the same in plain PyTorch. Images are in channels-last
memory, weights full and in the type of x or float32, affine (4, K) and coefficients (4, O) float32.

What a call reads and writes, in X = N K H W and Y = N O H W values, and its launches:

========================  ==========  ===============================================
forward                   X + Y       1 (K at most 128), or part and 1
backward, fused           2 X + 2 Y   fused, scatter
backward, apart           3 X + 4 Y   part, input, weight, scatter; 2 X if neither to_norm
                                      nor gated
backward, without dx      X + 2 Y     weight, scatter
``other``                 + X
========================  ==========  ===============================================

Fused is what has few output channels (`launch_for`): a program holds its part of dweight in
registers. Blocks of channels that several programs share are read from memory once, and from the
L2 cache by the others. Weights and partial sums are small beside these.

No atomics: every partial sum has memory of its own, and they are added up in a fixed order. fp32
images use tf32x3 throughout.
"""
# ruff: noqa: E741 (O: output channels, as in the shapes)

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton import knobs

from sacl_kernels.norm_pointwise_gradient_kernels import (
    fused_kernel,
    input_kernel,
    scatter_kernel,
    weight_kernel,
)
from sacl_kernels.norm_pointwise_kernels import forward_kernel, part_kernel
from sacl_kernels.norm_pointwise_launch import Launch, Tile, launch_for
from sacl_kernels.options import FMA

# pyright: reportArgumentType=false, reportCallIssue=false
# (Triton's `kernel[grid]` takes what the kernel declares as constexpr, and launch options besides.)


def forward(
    x: Tensor,
    affine: Tensor | None,
    act: int,
    gate: Tensor | None,
    weight: Tensor,
    in_index: Tensor | None,
    out_index: Tensor | None,
    offset: Tensor | None,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """y (N, O, H, W) and its sums (T, 3, O).

    Args:
        gate: (N, K).
        weight: (Cout, Cin), of which ``weight[out_index][:, in_index]`` is used.
        offset: (1 or N, O, 1 or H, 1 or W), added.
    """
    x, weight = _images(x), weight.contiguous()
    (N, K, H, W), O = x.shape, _count(out_index, weight.shape[0])
    launch = launch or _launch_for(x, K, O)
    tile, M = launch.forward, N * H * W
    with torch.cuda.device_of(x):
        if not launch.whole:
            weight, in_index, out_index = _part(weight, in_index, out_index, x), None, None
        y = _empty_images(x, N, O, H, W)
        blocks = triton.cdiv(O, tile.outs)
        programs = _programs(triton.cdiv(M, tile.rows), blocks, tile, launch)
        sums = _fp32(x, programs, 3, O)
        by_pixel = False
        if offset is not None:
            by_pixel = offset.shape[2] * offset.shape[3] > 1
            shape = offset.shape[0], O, *((H, W) if by_pixel else (1, 1))
            offset = _images(offset.expand(shape))
        forward_kernel[(programs * blocks,)](
            *(x, _contiguous(affine), _contiguous(gate), weight, out_index, in_index, offset),
            *(y, sums, M, K, O, H * W, weight.stride(0)),
            ACT=act if affine is not None else 0,
            BY_SAMPLE=offset is not None and offset.shape[0] > 1,
            BY_PIXEL=by_pixel,
            CHUNKS=triton.cdiv(K, tile.ins) if launch.whole else 0,
            ALIGN_K=_alignment(K),
            ALIGN_O=_alignment(O),
            WARPS=tile.sharing,
            **_options(tile, x),
            **FMA,
        )
    return y, sums


def backward(
    g: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    x: Tensor,
    affine: Tensor | None,
    act: int,
    gate: Tensor | None,
    weight: Tensor,
    in_index: Tensor | None,
    out_index: Tensor | None,
    to_norm: bool,
    input: bool,
    other: Tensor | None,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx (N, K, H, W), gsums (T, 2, K), dgate (N, K) and dweight (Cout, Cin), 0 where the weight is
    not used.

    Args:
        g: (N, O, H, W), with ``y`` and ``coefficients`` the gradient of the norm's output.
        to_norm: dx is the gradient before the operand's activation, with its gsums; else that of
            the gated operand, and gsums is empty (0).
        input: if not, dx, gsums and dgate are empty (0); dgate is without a gate, too.
        other: (N, K, H, W), the rest of the gated operand's gradient.
    """
    x, g, y = _images(x), _images(g), None if y is None else _images(y)
    weight = weight.contiguous()
    (N, K, H, W), O = x.shape, g.shape[1]
    launch = launch or _launch_for(x, K, O)
    M, to_norm = N * H * W, to_norm and input and affine is not None
    of_dy = g, y, _contiguous(coefficients)
    affine, gate = _contiguous(affine), _contiguous(gate)
    dx, gsums, dgate, dweight = x.new_empty(0), _fp32(x, 0), _fp32(x, 0), torch.empty_like(weight)
    other, gates = None if other is None else _images(other), None
    fill = dweight.numel() if dweight.numel() > K * O else 0
    common = {
        "ACT": act if affine is not None else 0,
        "ALIGN_K": _alignment(K),
        "ALIGN_O": _alignment(O),
    }
    with torch.cuda.device_of(x):
        if input:
            dx = _empty_images(x, N, K, H, W)
        if input and launch.fused is not None:
            tile, blocks = launch.fused, triton.cdiv(K, launch.fused.ins)
            tiles, gates = _gradient_tiles(x, gate, tile)
            programs = _programs(tiles, blocks, tile, launch)
            gsums = _fp32(x, programs, 2, K) if to_norm else gsums
            partial = _fp32(x, programs, O, K)
            fused_kernel[(programs * blocks,)](
                *(*of_dy, x, affine, gate, weight, out_index, in_index, other, dx, gsums, gates),
                *(partial, dweight, M, K, O, H * W, weight.stride(0), fill),
                TO_NORM=to_norm,
                WARPS=tile.sharing,
                **common,
                **_options(tile, x),
                **FMA,
            )
        else:
            if input:
                tile = launch.input
                blocks = triton.cdiv(K, tile.ins)
                tiles, gates = _gradient_tiles(x, gate, tile)
                programs = _programs(tiles, blocks, tile, launch)
                gsums = _fp32(x, programs, 2, K) if to_norm else gsums
                part = _part(weight, in_index, out_index, x)
                input_kernel[(programs * blocks,)](
                    *(*of_dy, x, affine, part, other, dx, gsums, gates, M, K, O, H * W),
                    TO_NORM=to_norm,
                    WARPS=tile.sharing,
                    **common,
                    **_options(tile, x),
                    **FMA,
                )
            tile = launch.weight
            blocks = triton.cdiv(O, tile.outs) * triton.cdiv(K, tile.ins)
            programs = _programs(triton.cdiv(M, tile.rows), blocks, tile, launch)
            partial = _fp32(x, programs, O, K)
            weight_kernel[(programs * blocks,)](
                *(*of_dy, x, affine, gate, partial, dweight, M, K, O, H * W, fill),
                **common,
                **_options(tile, x),
                **FMA,
            )
        scatter_kernel[(triton.cdiv(O * K, 128),)](
            *(partial, out_index, in_index, dweight, len(partial), K, O * K, weight.stride(0)),
            BLOCK_P=16,
            BLOCK=128,
            **FMA,
        )
        if gates is not None:
            dgate = gates.sum(1)
    return dx, gsums, dgate, dweight


def _part(
    weight: Tensor, in_index: Tensor | None, out_index: Tensor | None, like: Tensor
) -> Tensor:
    """weight[out_index][:, in_index] (O, K) in the type of ``like``."""
    if in_index is None and out_index is None and weight.dtype == like.dtype:
        return weight
    O, K = (_count(i, n) for i, n in zip((out_index, in_index), weight.shape, strict=True))
    part = like.new_empty(O, K)
    part_kernel[(triton.cdiv(O, 16), triton.cdiv(K, 128))](
        *(weight, out_index, in_index, part, O, K, weight.stride(0)),
        BLOCK_O=16,
        BLOCK_K=128,
        **FMA,
    )
    return part


def _gradient_tiles(x: Tensor, gate: Tensor | None, tile: Tile) -> tuple[int, Tensor | None]:
    """How many tiles of rows there are, and where each leaves its part of the gate's gradient
    (N, tiles of a sample, K)."""
    N, K, H, W = x.shape
    if gate is None:
        return -(-N * H * W // tile.rows), None
    each = -(-H * W // tile.rows)
    return N * each, _fp32(x, N, each, K)


def _programs(tiles: int, blocks: int, tile: Tile, launch: Launch) -> int:
    """Programs that share the tiles of rows evenly, for each of the blocks of channels."""
    tiles, most = max(1, tiles), max(1, tile.resident * launch.processors // blocks)
    return -(-tiles // -(-tiles // most))


def _options(tile: Tile, x: Tensor) -> dict[str, int | str]:
    return {
        "PRECISION": "tf32x3" if x.dtype == torch.float32 else "tf32",
        "BLOCK_M": tile.rows,
        "BLOCK_O": tile.outs,
        "BLOCK_K": tile.ins,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "maxnreg": tile.registers,
    }


def _launch_for(x: Tensor, K: int, O: int) -> Launch:
    if knobs.runtime.interpret and x.dtype == torch.bfloat16:
        raise ValueError("Triton's interpreter multiplies bf16 wrongly; fp32 and fp16 work in it")
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)
    return launch_for(K, O, x.dtype, capability)


def _images(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _empty_images(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def _contiguous(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


def _count(index: Tensor | None, whole: int) -> int:
    return whole if index is None else len(index)


def _alignment(channels: int) -> int:
    """Of a row of so many values: a multiple of 8 makes 16-byte accesses."""
    return 8 if channels % 8 == 0 else 1


def _fp32(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)
