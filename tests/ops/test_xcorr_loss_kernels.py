"""Every Triton kernel compiles for Ampere and Hopper, without a driver and without register spills.

What is compiled is what the launchers launch, with the settings they choose.
"""

import pytest
import torch
from kernel_compilation import (
    SHARED_MEMORY,
    compile_for,
    noted_launches,
    registers_and_spills,
    source,
)

from sacl_fast.ops.xcorr_loss_reference import Rows, Terms
from sacl_kernels import xcorr_loss
from sacl_kernels.xcorr_loss_launch import launch_for

KERNELS = {"standardize", "gram", "combine", "finish", "correlation", "gradient", "project"}

# (N, D, embeddings, rows of this rank): the presets' sizes, one tile, all rows in one program and
# not, sizes that are no multiple of 16, 1 as a size.
SHAPES = [
    (256, 2048, 4, 256),
    (512, 8192, 4, 512),
    (1024, 2048, 2, 1024),
    (4096, 512, 4, 4096),
    (512, 2048, 4, 128),
    (200, 333, 4, 200),
    (777, 123, 4, 777),
    (777, 4100, 2, 777),
    (2, 1, 2, 1),
]


def launches(monkeypatch, shape, dtype, capability):
    """(kernel, arguments, constants and options) of value and gradient at that shape."""
    N, D, count, n = shape
    batch = [torch.empty(N, D, dtype=dtype) for _ in range(count)]
    rows = Rows(0, n, None if n == N else lambda x: None)
    terms = Terms(0.9, 0.02, 0.003 if count == 4 else 0.0, False, 1e-5)
    launch = launch_for(N, D, dtype, capability)

    def run():
        if N <= D:
            _, _, saved = xcorr_loss.gram_forward(batch, rows, terms, keep=True, launch=launch)
            xcorr_loss.gram_backward(torch.ones(()), saved, rows, terms, launch)
        else:
            for keep in (True, False):
                xcorr_loss.tiles(batch, rows, terms, keep=keep, launch=launch)

    return noted_launches(monkeypatch, run)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernels_compile_without_spills(monkeypatch, tmp_path, dtype, arch):
    seen, names, spilling = set(), set(), []
    for shape in SHAPES:
        for launched in launches(monkeypatch, shape, dtype, (arch // 10, 0)):
            name = launched[0].__name__.removesuffix("_kernel")
            src, options = source(launched)
            if src.hash() in seen:
                continue
            seen.add(src.hash())
            names.add(name)
            compiled = compile_for(arch, src, options)
            assert compiled.metadata.shared <= SHARED_MEMORY[arch]
            if registers_and_spills(compiled, tmp_path)[1]:
                spilling.append((name, shape))
    assert names == KERNELS
    assert not spilling


@pytest.mark.parametrize("d", [512, 2048, 8192])
def test_five_launches_forward_and_backward(monkeypatch, d):
    noted = launches(monkeypatch, (256, d, 4, 256), torch.bfloat16, (9, 0))
    assert len(noted) == 5, [kernel.__name__ for kernel, *_ in noted]
