"""Every Triton kernel compiles for Ampere and Hopper, without a driver and without register spills.

What is compiled is what the launchers launch, with the settings they choose, for batches of 256.
"""
# ruff: noqa: E741 (O: output channels, as in the shapes)

from typing import NamedTuple

import pytest
import torch
from kernel_compilation import (
    SHARED_MEMORY,
    compile_for,
    noted_launches,
    registers_and_spills,
    source,
)

from sacl_kernels import norm_pointwise
from sacl_kernels.norm_pointwise_launch import launch_for

KERNELS = {"part", "forward", "fused", "input", "weight", "scatter"}


class Layer(NamedTuple):
    """A 1x1 convolution of K to O channels, and what it is given."""

    K: int
    O: int
    size: int
    act: int = 2
    gate: bool = False
    offset: bool = False
    indexed: bool = False


# A layer for every setting of launch_for, of MobileNet-V1 and V3, EfficientNet-B0 and ResNet-50;
# odd ones, as slim layers can be.
LAYERS = [
    Layer(32, 64, 112),
    Layer(16, 96, 112, act=4, indexed=True),
    Layer(64, 256, 56, act=1),
    Layer(256, 64, 56, act=1, offset=True),
    Layer(672, 112, 14, act=4, gate=True, indexed=True),
    Layer(512, 512, 14),
    Layer(1152, 192, 7, act=3, gate=True, indexed=True),
    Layer(61, 67, 28, act=4, gate=True, offset=True, indexed=True),
    Layer(1, 3, 1),
]


def launches(monkeypatch, layer, dtype, capability):
    """(kernel, arguments, constants and options) of both passes."""
    K, O, size = layer[:3]

    def images(channels, samples=256):
        shape = samples, channels, size, size
        return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)

    def floats(*shape):
        return torch.empty(shape, device="meta")

    def index(channels):
        return floats(channels).long() if layer.indexed else None

    times = 2 if layer.indexed else 1
    gate = floats(256, K) if layer.gate else None
    operand = images(K), floats(4, K), layer.act, gate
    weight = floats(times * O, times * K), index(K), index(O)
    launch = launch_for(K, O, dtype, capability)

    def run():
        offset = images(O, 1) if layer.offset else None
        norm_pointwise.forward(*operand, *weight, offset, launch=launch)
        dy = images(O), images(O), floats(4, O)
        # A gradient to a norm, or a gate's; both with a residual gradient and without.
        for other in (None, images(K)):
            norm_pointwise.backward(
                *dy, *operand, *weight, not layer.gate, True, other, launch=launch
            )

    return noted_launches(monkeypatch, run)


def names(launched):
    return [kernel.__name__.removesuffix("_kernel") for kernel, *_ in launched]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernels_compile_without_spills(monkeypatch, tmp_path, dtype, arch):
    seen, compiled_names, spilling = set(), set(), []
    for layer in LAYERS:
        for launched in launches(monkeypatch, layer, dtype, (arch // 10, 0)):
            (name,) = names([launched])
            src, options = source(launched)
            if src.hash() in seen:
                continue
            seen.add(src.hash())
            compiled_names.add(name)
            compiled = compile_for(arch, src, options)
            assert compiled.metadata.shared <= SHARED_MEMORY[arch]
            registers, spilled = registers_and_spills(compiled, tmp_path)
            if spilled:
                spilling.append((name, layer, registers, spilled))
    assert not spilling
    assert compiled_names == KERNELS - ({"fused"} if dtype == torch.float32 else set())


def test_launches(monkeypatch):
    """One or two forward, two backward where both gradients fit one kernel, else four."""
    small, large = (
        names(launches(monkeypatch, layer, torch.bfloat16, (9, 0)))
        for layer in (Layer(64, 128, 56), Layer(512, 512, 14))
    )
    assert small == ["forward", *2 * ["fused", "scatter"]]
    assert large == ["part", "forward", *2 * ["part", "input", "weight", "scatter"]]
